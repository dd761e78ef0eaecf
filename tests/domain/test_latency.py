"""Scenario 3's tree, its plan, its guard and its budget table; and whose its alarms are."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from domain.alarm_definitions import alarm_definitions
from domain.alarm_rules import IncidentTarget, target_of
from domain.alarms import AlarmChange, AlarmMetric, AlarmState
from domain.evidence import Evidence, EvidenceKey, Reading, Value
from domain.incident import LeverName, LeverStatus
from domain.load import LoadSnapshot, ModelLoad
from domain.metrics import CATALOGUE, MetricName
from domain.policy import BatcherPolicy, LatencyStage, Policy, Signal
from domain.runbooks.latency import (
    INVOCATION,
    QUEUE_WAIT,
    TOTAL,
    budget,
    diagnosed,
    guard,
    keep_proposal,
    plan,
    recovery_checks,
    tree,
    window_before,
)
from domain.trees import Leaf, Question, mermaid

NOW = datetime(2026, 12, 1, 11, 0, tzinfo=UTC)
"""Tuesday 20:00 in Tokyo."""
MINUTE = timedelta(minutes=1)
POLICY = Policy(batcher=BatcherPolicy(controller="fixed"))
SLO = Policy()
PAGE = Path(__file__).parents[2] / "docs" / "latency-tree.md"
INCREASED: dict[EvidenceKey, Value | None] = {
    EvidenceKey.QUEUE_WAIT_MS: 480.0,
    EvidenceKey.QUEUE_DEPTH: 7.0,
    EvidenceKey.WINDOW_MS: 500.0,
    EvidenceKey.WINDOW_BEFORE_MS: 150.0,
    EvidenceKey.REDIS_READ_US: 400.0,
    EvidenceKey.REDIS_CONNECTIONS: 900.0,
    EvidenceKey.OPENSEARCH_MS: 90.0,
    EvidenceKey.DYNAMODB_MS: 6.0,
    EvidenceKey.INTEGRATION_MS: 40.0,
}
"""What the runbook's own incident reads."""
FAST: dict[str, Value | None] = {"queue_wait_ms": 140.0, "window_ms": 150.0}


def evidence(**changes: Value | None) -> Evidence:
    values = {**INCREASED, **{EvidenceKey(name): value for name, value in changes.items()}}
    return Evidence(
        readings={
            key: Reading(key=key, value=value, missing=None if value is not None else "timed out", source="test")
            for key, value in values.items()
        }
    )


def load(p99_ms: float | None, queue_wait_ms: float | None) -> LoadSnapshot:
    return LoadSnapshot(observed_at=NOW, p99_ms=p99_ms, models={"sonnet": ModelLoad(queue_wait_ms=queue_wait_ms)})


# ---------------------------------------------------------------- the tree


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, "window-increased"),
        ({"window_before_ms": 500.0, "queue_depth": 400.0}, "batching-backlog"),
        ({"window_before_ms": 500.0}, "other-stages"),
        ({**FAST, "redis_read_us": 9_000.0}, "redis"),
        ({**FAST, "redis_connections": 60_000.0}, "redis"),
        ({**FAST, "opensearch_ms": 900.0}, "opensearch"),
        ({**FAST, "dynamodb_ms": 80.0}, "dynamodb-api-gateway"),
        ({**FAST, "integration_ms": 700.0}, "dynamodb-api-gateway"),
        (FAST, "elsewhere"),
    ],
)
def test_each_leaf_is_found(changes: dict[str, Value | None], cause: str) -> None:
    assert [found.id for found in diagnosed(evidence(**changes), POLICY).causes] == [cause]


@pytest.mark.parametrize("missing", ["queue_wait_ms", "window_before_ms"])
def test_missing_evidence_is_unknown_and_never_a_guess(missing: str) -> None:
    found = diagnosed(evidence(**{missing: None}), POLICY)
    assert found.causes == []
    assert found.missing == [f"{missing}: timed out"]


def test_the_runbook_s_six_leaves_are_there_and_one_for_what_they_do_not_explain() -> None:
    def leaves(node: Question | Leaf) -> set[str]:
        return {node.id} if isinstance(node, Leaf) else set().union(*map(leaves, node.branches.values()))

    six = {"window-increased", "batching-backlog", "other-stages", "redis", "opensearch", "dynamodb-api-gateway"}
    assert leaves(tree(POLICY)) == six | {"elsewhere"}


def test_under_slo_a_wait_counts_as_long_beyond_the_configured_window_alone() -> None:
    assert [x.id for x in diagnosed(evidence(queue_wait_ms=900.0), SLO).causes] == ["elsewhere"]
    assert [x.id for x in diagnosed(evidence(queue_wait_ms=1_100.0), SLO).causes] == ["window-increased"]


def test_under_the_table_its_longest_window_is_no_long_wait() -> None:
    assert Policy(batcher=BatcherPolicy(controller="table")).longest_usual_wait_ms == 500


def test_the_chart_in_the_docs_is_the_tree() -> None:
    assert f"```mermaid\n{mermaid(tree(POLICY))}```" in PAGE.read_text()


# ---------------------------------------------------------------- was the window changed

STEP = {NOW - n * MINUTE: 500.0 if n < 30 else 150.0 for n in range(24 * 60)}


def test_a_step_of_the_metric_tells_when_the_window_grew_and_from_what() -> None:
    assert window_before(STEP, 500, NOW - timedelta(days=1), NOW, 150) == (150.0, NOW - 29 * MINUTE, True)


def test_the_value_before_the_last_step_is_told_and_not_the_smallest_of_the_day() -> None:
    dip = {
        at: 50.0 if NOW - 10 * timedelta(hours=1) < at < NOW - 9 * timedelta(hours=1) else ms for at, ms in STEP.items()
    }
    assert window_before(dip, 500, NOW - timedelta(days=1), NOW, 150) == (150.0, NOW - 29 * MINUTE, True)


def test_a_longer_window_that_is_in_force_and_not_yet_published_has_grown() -> None:
    short = dict.fromkeys(STEP, 150.0)
    assert window_before(short, 500, NOW - timedelta(days=1), NOW, 150) == (150.0, None, True)


def test_a_window_that_is_the_same_all_day_did_not_grow() -> None:
    same = dict.fromkeys(STEP, 500.0)
    assert window_before(same, 500, NOW - timedelta(days=1), NOW, 150) == (500.0, None, True)


def test_a_batcher_that_has_just_begun_to_publish_is_held_against_the_known_good_window() -> None:
    young = {NOW - n * MINUTE: 500.0 for n in range(30)}
    assert window_before(young, 500, NOW - timedelta(days=1), NOW, 150) == (150, NOW - 29 * MINUTE, False)
    assert window_before({}, 500, NOW - timedelta(days=1), NOW, 150) is None


# ---------------------------------------------------------------- the plan


def test_the_window_goes_back_by_a_lease_and_capacity_is_not_touched() -> None:
    made = plan(evidence(), POLICY, NOW)
    [lever] = made.levers
    assert (lever.name, lever.status, lever.before, lever.after) == (
        LeverName.BATCH_WINDOW,
        LeverStatus.APPLYING,
        "500 ms",
        "150 ms",
    )
    assert lever.hold_until == NOW + POLICY.way_back.lever_max_hold
    assert (made.batch_window_ms, made.units, made.routing) == (150, None, {})
    assert not any("upper limit" in line for line in made.arithmetic)


@pytest.mark.parametrize(
    "changes",
    [
        {**FAST, "redis_read_us": 9_000.0},
        {**FAST, "opensearch_ms": 900.0},
        {**FAST, "redis_read_us": None},  # the plan is made before other systems are read
        {"window_before_ms": 500.0, "queue_depth": 400.0},
        {"window_ms": 100.0, "window_before_ms": 50.0},  # grown, and good all the same
    ],
)
def test_no_lever_is_pulled_that_cannot_help(changes: dict[str, Value | None]) -> None:
    [lever] = plan(evidence(**changes), POLICY, NOW).levers
    assert (lever.status, lever.hold_until) == (LeverStatus.NOT_NEEDED, None)


def test_what_cannot_be_read_does_not_hold_up_a_lever_that_costs_only_calls() -> None:
    [lever] = plan(evidence(window_before_ms=None), POLICY, NOW).levers
    assert lever.status is LeverStatus.APPLYING
    assert "window_before_ms: timed out" in lever.why
    [lever] = plan(Evidence(), POLICY, NOW).levers
    assert (lever.status, lever.before) == (LeverStatus.APPLYING, "unknown")


def test_without_a_batcher_there_is_no_lever() -> None:
    [lever] = plan(evidence(queue_wait_ms=None), POLICY, NOW).levers
    assert (lever.status, lever.why) == (
        LeverStatus.NOT_NEEDED,
        "no batcher says how long requests wait for a batch",
    )


def test_with_the_slo_controller_the_plan_says_that_the_knob_is_only_an_upper_limit() -> None:
    assert any("only an upper limit" in line for line in plan(evidence(queue_wait_ms=1_100.0), SLO, NOW).arithmetic)


# ---------------------------------------------------------------- recovery and the way back


def test_recovered_is_p99_in_its_budget_and_a_usual_wait() -> None:
    checks = recovery_checks("sonnet", load(2_600, 140), 3_000, 300, ())
    assert [(check.name, check.met, check.since) for check in checks] == [
        ("P99 latency", True, NOW),
        ("queue wait", True, NOW),
    ]
    assert [check.met for check in recovery_checks("sonnet", load(3_000, 301), 3_000, 300, checks)] == [False, False]
    assert [check.met for check in recovery_checks("sonnet", load(None, None), 3_000, 300, checks)] == [False]
    assert [check.met for check in recovery_checks("sonnet", load(2_600, None), 3_000, 300, checks)] == [True]


def test_the_window_goes_back_only_where_p99_stays_in_its_budget() -> None:
    assert guard(150, 150, load(2_900, 140), POLICY).may, "the configured value has caught up"
    assert guard(150, 500, load(2_600, 140), POLICY).may
    stays = guard(150, 500, load(2_700, 140), POLICY)
    assert not stays.may
    assert "2,700 + 350 ms = 3,050 ms; the limit is 3,000 ms: it must stay" in stays.why
    assert not guard(150, 500, load(None, None), POLICY).may
    assert guard(150, 1_000, load(2_900, 140), SLO).may, "its controller answers for its own SLO"


def test_the_default_is_to_keep() -> None:
    [lever] = plan(evidence(), POLICY, NOW).levers
    text = keep_proposal("latency-regression:mangaassist", lever, POLICY)
    assert text.startswith("Default: keep. Without the lever the window goes back from 150 ms to 500 ms")
    assert "`runbooks incident keep latency-regression:mangaassist batch_window_ms --why …`" in text


# ---------------------------------------------------------------- the budget


def test_the_budget_table_is_the_runbook_s() -> None:
    measured = {
        "gateway": 50.0, "intent-classification": 30.0, QUEUE_WAIT: 480.0, "retrieval": 200.0, INVOCATION: 2_100.0,
        "delivery": None, TOTAL: 4_200.0,
    }  # fmt: skip
    rows = budget(measured, "sonnet", POLICY)
    assert [(row.stage, row.budget_ms) for row in rows] == [
        ("gateway", 50),
        ("intent-classification", 30),
        (QUEUE_WAIT, 140),
        ("retrieval", 200),
        (INVOCATION, 2_100),
        ("delivery", 80),
        (TOTAL, 3_000),
    ]
    assert sum(row.budget_ms or 0 for row in rows[:-1]) == 2_600, "scenario 3's total at 150 ms"
    assert [row.stage for row in rows if row.over] == [QUEUE_WAIT, TOTAL]
    assert rows[5].measured_ms is None


# ---------------------------------------------------------------- alarms and policy


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("RequestLatencyP99Alarm", "sonnet"),
        ("BatcherQueueWaitAlarm-sonnet", "sonnet"),
        ("BatcherQueueWaitAlarm-haiku", "haiku"),
    ],
)
def test_its_alarms_lead_to_one_incident(name: str, model: str) -> None:
    definition = next(one for one in alarm_definitions(POLICY) if one.name == name)
    metric = CATALOGUE[definition.metric]
    watched = AlarmMetric(
        namespace=metric.namespace,
        name=metric.name,
        dimensions=dict(zip(metric.dimensions, definition.dimensions, strict=True)),
    )
    change = AlarmChange(
        alarm_name=name, state=AlarmState.ALARM, changed_at=NOW, metrics=(watched,), source="sns", message_id="1"
    )
    assert target_of(change, POLICY) == IncidentTarget(
        key="latency-regression:mangaassist", runbook="latency", model=model, part_of="bedrock-throttle:*"
    )


def test_the_alarm_on_p99_is_the_runbook_s() -> None:
    alarm = next(one for one in alarm_definitions(POLICY) if one.metric is MetricName.REQUEST_LATENCY_P99)
    assert (alarm.threshold, alarm.periods, alarm.period) == (4_000, 3, MINUTE)


def test_a_signal_that_names_no_resource_and_a_stage_that_is_no_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dimensions: \['a'\]; SearchLatency has \['DomainName', 'ClientId'\]"):
        Signal(metric=MetricName.OPENSEARCH_LATENCY, dimensions=("a",), high=1)
    with pytest.raises(ValueError, match="name: 'Web Socket'"):
        LatencyStage(name="Web Socket", p99_ms=1)
