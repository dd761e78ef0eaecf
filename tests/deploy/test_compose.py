"""The compose file: valid, pinned, without secrets; and every command of ours in it runs as a plain process."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from temporalio.client import Client

from domain.people import Roster
from ops import stack
from ops.namespace import register_search_attributes
from ops.servers import TEMPORAL_DYNAMIC_CONFIG, find_redis, redis_ready
from ops.stack import Stack, StackOptions
from ops.supervisor import READY_FILE, ChildSpec, Supervisor
from workers.settings import Settings
from workflows.search_attributes import SEARCH_ATTRIBUTES

ROOT = Path(__file__).parents[2]


def load(path: str) -> Any:
    return YAML(typ="safe").load(ROOT / path)


COMPOSE = load("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
ENDS = {"namespace", "temporal-schema"}
"""Services that do their work and end."""
PORTS = {"8234", "8235"}
"""Any free port takes their place in tests."""


def test_it_follows_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run([*command, str(ROOT / "docker-compose.yml")], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_and_watched(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":\d+\.\d+(\.\d+)?(-\w+)?$", service["image"]), service["image"]
    assert ("healthcheck" in service) != (name in ENDS)
    for other, condition in service.get("depends_on", {}).items():
        expected = "service_completed_successfully" if other in ENDS else "service_healthy"
        assert condition == {"condition": expected}


def test_the_base_image_is_pinned() -> None:
    bases = re.findall(r"^FROM (\S+)", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert bases
    assert all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases)


def test_the_image_holds_every_package() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    copied = set(re.findall(r"^COPY (\w+) \./\1$", dockerfile, re.MULTILINE))
    packages = re.search(r"^packages = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert packages
    assert copied == {name.strip('" ').split(".")[0] for name in packages[1].split(",")}
    assert {f"!{name}" for name in copied} <= set((ROOT / ".dockerignore").read_text().split())


def test_the_simulator_is_for_development_only() -> None:
    assert {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service} == {
        "simulator": ["dev"]
    }


def test_secrets_come_from_files_that_are_not_in_the_repository() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|PWD|SECRET|TOKEN|KEY", variable):
                assert str(value).startswith("/run/secrets/"), f"{name}: {variable}"
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"deploy/secrets/", "deploy/runbooks.env", "deploy/roster.yaml"} <= set(ignored)
    assert all(secret["file"].startswith("deploy/secrets/") for secret in COMPOSE["secrets"].values())


def test_the_environment_is_what_our_processes_read() -> None:
    known = {f"RUNBOOKS_{field.upper()}" for field in Settings.model_fields} | {READY_FILE}
    example = re.findall(r"^(?:# )?(RUNBOOKS_\w+)=", (ROOT / "deploy/runbooks.env.example").read_text(), re.MULTILINE)
    assert example
    named = {name for service in OURS.values() for name in service.get("environment", {})} | set(example)
    assert {name for name in named if not name.startswith("RUNBOOKS_SIMULATOR_")} <= known


def test_the_examples_are_good() -> None:
    assert Roster.model_validate(load("deploy/roster.example.yaml")).people
    dynamic = load("deploy/temporal-dynamic-config.yaml")
    assert {name: str(rules[0]["value"]) for name, rules in dynamic.items()} == TEMPORAL_DYNAMIC_CONFIG


def options(folder: Path) -> StackOptions:
    return StackOptions(state_dir=folder / "state", usual_ports=False)


def plain(command: list[str]) -> tuple[str, ...]:
    assert command[0] == "python"
    return (sys.executable, *("0" if part in PORTS else part for part in command[1:]))


@pytest.mark.parametrize("name", [name for name in OURS if name not in ENDS | {"simulator"}])
async def test_a_process_of_ours_becomes_ready_and_stops(name: str, tmp_path: Path) -> None:
    said: list[str] = []
    supervisor = Supervisor(tmp_path, said.append)
    command = plain(OURS[name]["command"])
    # The stack starts the simulator, by its own command in the compose file.
    assert SERVICES["simulator"]["command"] == ["python", "-m", "simulator"]
    async with Stack(options(tmp_path), processes=[stack.simulator]) as running:
        process = ChildSpec(name=name, command=command, env=running.process_env(), ready=tmp_path / "ready")
        await supervisor.start(process)
        await supervisor.stop()
    assert said == [f"{name} is ready", f"stopping {name}"]


async def test_the_namespace_is_prepared(tmp_path: Path) -> None:
    command = plain(OURS["namespace"]["command"])
    async with Stack(options(tmp_path), processes=[]) as running:
        env = {**running.process_env(), "RUNBOOKS_TEMPORAL_NAMESPACE": "elsewhere"}
        for expected in ("made namespace elsewhere", "everything was there"):
            done = subprocess.run(  # noqa: ASYNC221
                command, env=env, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stderr
            assert expected in done.stdout
        client = await Client.connect(running.addresses.temporal, namespace="elsewhere")
        assert await register_search_attributes(client, SEARCH_ATTRIBUTES) == []


async def test_the_redis_command_runs(tmp_path: Path) -> None:
    command = SERVICES["redis"]["command"]
    assert command[0] == "valkey-server"
    server = find_redis()
    supervisor = Supervisor(tmp_path, print)
    port = stack.free_port()
    await supervisor.start(
        ChildSpec(
            name="redis",
            command=(server.path, *command[1:], "--port", str(port), "--dir", str(tmp_path)),
            env={},
            ready=lambda: redis_ready(f"redis://127.0.0.1:{port}/0"),
        )
    )
    await supervisor.stop()
    assert (tmp_path / "appendonlydir").exists()
