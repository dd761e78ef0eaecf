"""`docs/knobs.md` says what the declarations say. `python -m tests.domain.test_knob_docs` writes its table anew."""

from pathlib import Path

from domain.knobs import KnobName, baseline_value
from domain.policy import Policy

PAGE = Path(__file__).parents[2] / "docs" / "knobs.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def _row(knob: KnobName) -> list[str]:
    spec, policy = knob.spec, Policy()
    configured = baseline_value(knob, policy.baseline)
    if knob is KnobName.MODEL_ROUTING:
        baseline = "the intents' models"
    elif isinstance(configured, dict) and spec.by == "intent":
        baseline = _shown(next(iter(configured.values())))
    elif isinstance(configured, dict):
        baseline = ", ".join(f"{name} {_shown(value)}" for name, value in configured.items())
    else:
        baseline = _shown(configured)
    ranks = policy.baseline.model_ranks
    return [
        f"`{knob}`",
        spec.meaning,
        (f"for each {spec.by} " if spec.by else "") + spec.kind.allowed(spec.unit, ranks).rstrip(","),
        baseline,
        spec.merge.name,
        f"{spec.role}{', with approval' if spec.needs_approval else ''}",
        spec.unreadable,
    ]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "no limit" if value is None else str(value)


def table() -> str:
    """The page's table."""
    head = ["knob", "what it is", "allowed", "baseline", "while leases overlap", "who changes it", "when Redis is away"]
    rows = [head, ["---"] * len(head), *(_row(knob) for knob in KnobName)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _with_table(page: str) -> str:
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def test_the_table_is_what_the_declarations_say() -> None:
    page = PAGE.read_text()
    assert page == _with_table(page), "stale: python -m tests.domain.test_knob_docs"


if __name__ == "__main__":
    PAGE.write_text(_with_table(PAGE.read_text()))
