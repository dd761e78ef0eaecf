"""Scenario 4's trees, its plan, and what tells it from scenario 1."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from domain.evidence import Evidence, EvidenceKey, Reading, Value
from domain.incident import LeverName, LeverStatus
from domain.load import LoadSnapshot, ModelLoad
from domain.policy import Policy
from domain.runbooks.scaling_lag import TREE, diagnosed, mismatch_tree, plan, units_lag
from domain.trees import mermaid

NOW = datetime(2026, 12, 2, 8, 30, tzinfo=UTC)
"""Wednesday 17:30 in Tokyo."""
POLICY = Policy()
LAGS: dict[EvidenceKey, Value | None] = {
    EvidenceKey.UNITS_IN_SERVICE: 8,
    EvidenceKey.UNITS_CREATING: 0,
    EvidenceKey.UNITS_EXPECTED: 15,
    EvidenceKey.CAPACITY_WORKFLOW: "running",
    EvidenceKey.SCHEDULES_OFF: [],
    EvidenceKey.PROVISIONING_ERROR: "AccessDenied",
    EvidenceKey.PROVISIONING_ERROR_TEXT: "not authorized to perform: bedrock:CreateProvisionedModelThroughput",
    EvidenceKey.TOKENS_PER_SECOND: 10_700.0,
    EvidenceKey.PROVISIONED_TOKENS_PER_SECOND: 8_000.0,
    EvidenceKey.CALLS_PER_SECOND_PER_TASK: 0.6,
}
"""What the runbook's own incident reads."""
PAGE = Path(__file__).parents[2] / "docs" / "scaling-lag-trees.md"


def evidence(**changes: Value | None) -> Evidence:
    values = {**LAGS, **{EvidenceKey(name): value for name, value in changes.items()}}
    return Evidence(
        readings={
            key: Reading(key=key, value=value, missing=None if value is not None else "timed out", source="test")
            for key, value in values.items()
        }
    )


NO_ERROR: dict[str, Value | None] = {"provisioning_error": "", "provisioning_error_text": ""}
THERE: dict[str, Value | None] = {**NO_ERROR, "units_in_service": 15, "provisioned_tokens_per_second": 15_000.0}


@pytest.mark.parametrize(
    ("changes", "causes"),
    [
        ({**NO_ERROR, "capacity_workflow": "paused"}, ["schedule-off", "switch-on"]),
        ({**NO_ERROR, "capacity_workflow": "missing"}, ["schedule-off", "switch-on"]),
        ({**NO_ERROR, "schedules_off": ["health-check is paused"]}, ["schedule-off", "switch-on"]),
        ({}, ["access-denied", "mend-and-re-run"]),
        ({"provisioning_error": "NotFound"}, ["stale-arn", "mend-and-re-run"]),
        ({"provisioning_error": "Unavailable"}, ["timeout", "mend-and-re-run"]),
        ({"provisioning_error": "Throttled"}, ["management-throttled", "mend-and-re-run"]),
        ({"provisioning_error": "QuotaExceeded"}, ["other-error", "mend-and-re-run"]),
        ({**NO_ERROR, "units_creating": 7}, ["still-creating", "wait-for-creation"]),
        ({**THERE, "tokens_per_second": 16_000.0}, ["not-provisioning", "increase-units"]),
        ({**THERE, "calls_per_second_per_task": 3.0}, ["not-provisioning", "rate-limit-per-task"]),
        (THERE, ["not-provisioning", "ask-aws"]),
    ],
)
def test_each_cause_and_what_to_do_about_it(changes: dict[str, Value | None], causes: list[str]) -> None:
    found = diagnosed(evidence(**changes), POLICY)
    assert [cause.id for cause in found.causes] == causes
    assert found.missing == []


def test_what_could_not_be_read_gives_unknown_and_never_a_guess() -> None:
    found = diagnosed(evidence(provisioning_error=None), POLICY)
    assert found.causes == []
    assert found.missing == ["provisioning_error: timed out"]
    assert found.sentence == "Unknown: could not read provisioning_error: timed out."


def test_the_path_names_the_readings_that_tell() -> None:
    off = diagnosed(evidence(**NO_ERROR, schedules_off=["the schedule health-check is paused: by Mika"]), POLICY)
    assert "health-check is paused: by Mika" in off.path[0].because
    denied = diagnosed(evidence(), POLICY)
    assert any("bedrock:CreateProvisionedModelThroughput" in step.because for step in denied.path)


@pytest.mark.parametrize(
    ("in_service", "expected", "near", "lags", "words"),
    [
        (8, 15, False, True, "8 units are in service, and the hour expects 15"),
        (15, 15, False, False, "demand is the trouble"),
        (8, 15, True, False, "a calendar event is near"),
        (None, 15, False, False, "the units in service could not be read"),
        (8, 15, None, False, "the event calendar could not be read"),
    ],
)
def test_units_tell_the_two_runbooks_of_throttling_apart(
    in_service: int | None, expected: int, near: bool | None, lags: bool, words: str
) -> None:
    found, why = units_lag(in_service, expected, near)
    assert found is lags
    assert words in why


def test_the_plan_is_the_runbooks() -> None:
    """TTL 90 s, faq and greeting to Haiku, coalescing on, and the units that the hour expects; nothing is sized."""
    load = LoadSnapshot(
        observed_at=NOW,
        models={
            "sonnet": ModelLoad(sent_tokens_per_second=10_700, capacity_tokens_per_second=10_500, throttles=23),
            "haiku": ModelLoad(sent_tokens_per_second=1_800, capacity_tokens_per_second=11_000),
        },
        offered_tokens_per_second={
            "recommendation": 7_350.0,
            "product_question": 4_200.0,
            "faq": 630.0,
            "greeting": 420.0,
            "order_status": 1_260.0,
            "search": 840.0,
        },
        hit_rate=0.15,
    )
    result = plan("sonnet", load, POLICY, NOW, 8, 15)
    assert [(lever.name, lever.status, lever.after) for lever in result.levers] == [
        (LeverName.MODEL_ROUTING, LeverStatus.APPLYING, "faq: haiku, greeting: haiku"),
        (LeverName.REQUEST_COALESCING, LeverStatus.APPLYING, "on"),
        (LeverName.CACHE_TTL, LeverStatus.APPLYING, "90 s"),
        (LeverName.CAPACITY, LeverStatus.APPLYING, "15 units"),
    ]
    assert (result.units, result.cache_ttl_seconds) == (15, 90)
    assert "No data plane obeys it yet" in result.levers[1].why
    assert result.levers[3].hold_until == NOW + timedelta(hours=4)
    assert plan("sonnet", load, POLICY, NOW, 8, 50).units == 30, "within the ceiling"
    nothing = plan("sonnet", LoadSnapshot(observed_at=NOW), POLICY, NOW, 8, 15)
    assert nothing.units == 15, "the timetable has said what the hour needs, whatever can be read"
    assert nothing.levers[0].status is LeverStatus.NOT_NEEDED


def test_the_charts_in_the_docs_are_the_trees() -> None:
    page = PAGE.read_text()
    assert f"```mermaid\n{mermaid(TREE)}```" in page
    assert f"```mermaid\n{mermaid(mismatch_tree(POLICY))}```" in page
