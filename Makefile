# `make demo` and `make test` need nothing but Python 3.11 or newer, make, bash and a package index.
SHELL := bash
.DEFAULT_GOAL := help

ifeq ($(OS),Windows_NT)
$(error Windows is not supported, because the Temporal and Valkey wheels exist for Linux and macOS only. Use WSL)
endif

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Tried in this order; `make PYTHON=/path/to/python3.12 ...` picks one.
PYTHONS := $(if $(PYTHON),$(PYTHON),python3.14 python3.13 python3.12 python3.11 python3)
UV ?= uv

.PHONY: help venv demo test lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## Make .venv from requirements.lock (PYTHON=... picks the interpreter)

demo: $(INSTALLED) ## Play scenario 1 on a real stack and clean up (KEEP=1 leaves the stack up)
	@$(BIN)/runbooks demo $(if $(KEEP),--keep)

test: $(INSTALLED) ## Check format, lint, types and import rules, run all tests (PYTEST_ARGS=... adds arguments)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@echo 'Tests marked "system" need a browser or Redis 7 from Debian and do not run here: .ci/run runs them.'
	$(BIN)/pytest -m "not system" --ignore tests/e2e -n 2 --dist loadfile $(PYTEST_ARGS)
	@echo 'End to end, on two stacks:'
	$(BIN)/pytest -m "not system" -n 2 --dist loadfile $(PYTEST_ARGS) tests/e2e

lock: ## Write requirements.lock anew from pyproject.toml (needs uv)
	@command -v $(UV) >/dev/null || { echo "make lock needs uv (pip install uv), or UV=/path/to/uv" >&2; exit 1; }
	$(UV) pip compile pyproject.toml --extra dev --extra test --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --no-annotate --quiet -o requirements.lock
	echo playwright | $(UV) pip compile - --constraint requirements.lock --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet -o requirements-system.lock

clean: ## Remove .venv, caches and the state of the stack
	rm -rf $(VENV) .runbooks .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock pyproject.toml
	@$(BIN)/python -c pass 2>/dev/null || .ci/venv $(VENV) $(PYTHONS)
	@total=$$(grep -c '^[a-z0-9].*==' requirements.lock); \
	echo "Installing up to $$total packages from requirements.lock"; \
	set -o pipefail; \
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --require-hashes -r requirements.lock \
	  | awk -v total=$$total '/^(Collecting|Requirement already)/ && ++n % 20 == 0 {print "  " n " of " total; fflush()} \
	    /^Installing/ {print "  unpacking"; fflush()}'
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@
