"""Scenario 3's incident, on a real Temporal and a real ledger: its lever, its verdicts, its ends."""

from datetime import timedelta

import pytest

from domain.incident import IncidentRecord, LeverName, LeverStatus, Phase
from domain.knobs import KnobName
from domain.messages import APPROVE_KEEP, APPROVE_REVERT, RECORD, KeepRequest, ReportInput
from domain.override import OverrideKind, OverrideRecord
from tests.workflows.fakes import APPROVER, slow
from tests.workflows.handing import Handing
from tests.workflows.record_histories import FIXED

WINDOW = KnobName.BATCH_WINDOW_MS
KEEP = KeepRequest(who=APPROVER, why="the configured value was the fault", lever=LeverName.BATCH_WINDOW)


@pytest.fixture
async def evening(play: Handing) -> Handing:
    """The window was guessed at 500 ms, and answers are slow."""
    play.world.snapshot = play.world.snapshot.model_copy(update={"policy": FIXED})
    play.world.load = slow(4_200, 480)
    return play


async def recovers(play: Handing) -> None:
    play.world.load = slow(2_600, 140)
    play.world.verdicts.append(("recovered", play.world.load))


def touched_capacity(play: Handing) -> list[object]:
    return play.world.asked("set_demand", "withdraw_demand", "create_model", "await_units")


def reported(play: Handing) -> IncidentRecord:
    [report] = play.world.asked("write_report")
    assert isinstance(report, ReportInput)
    return report.record


async def test_the_window_is_reverted_kept_and_the_override_ends_once_the_policy_has_caught_up(
    evening: Handing,
) -> None:
    await evening.opens("latency")
    assert evening.value(WINDOW) == 150
    await recovers(evening)
    await evening.reaches(Phase.AWAITING_DECISION)
    seen = await evening.record()
    assert seen.keep_proposal.startswith("Default: keep. Without the lever the window goes back from 150 ms to 500 ms")
    assert seen.runbook == "latency"
    assert [(row.stage, row.over) for row in seen.budget_before if row.over] == [("queue wait", True), ("total", True)]
    assert [row.stage for row in seen.budget_after if row.over] == []
    assert [check.name for check in seen.recovery_checks] == ["P99 latency", "queue wait"]

    await evening.asks(APPROVE_KEEP, APPROVER, request=KEEP)
    await evening.reaches(Phase.CLOSED)
    assert evening.value(WINDOW) == 150
    record = reported(evening)
    [lever] = record.levers
    assert (lever.name, lever.status) == (LeverName.BATCH_WINDOW, LeverStatus.KEPT)
    assert (record.knobs_at_baseline, record.capacity_at_baseline) == (False, None)
    assert record.diagnosis is not None
    assert [cause.id for cause in record.diagnosis.causes] == ["window-increased"]
    handle = evening.client.get_workflow_handle(lever.detail.split()[-1])
    override: OverrideRecord = await handle.query(RECORD, result_type=OverrideRecord)
    assert (override.kind, override.value, override.knob) == (OverrideKind.STANDING, 150, WINDOW)

    policy = FIXED.model_copy(update={"knobs": {**FIXED.knobs, WINDOW: 150}})
    evening.world.snapshot = evening.world.snapshot.model_copy(update={"policy": policy})
    await handle.result()
    assert evening.ledger.leases().leases == ()
    assert touched_capacity(evening) == []


async def test_a_revert_that_restores_the_breach_is_stopped_and_goes_once_the_configuration_is_mended(
    evening: Handing,
) -> None:
    await evening.opens("latency")
    await recovers(evening)
    await evening.reaches(Phase.AWAITING_DECISION)
    evening.world.load = slow(2_800, 140)
    await evening.asks(APPROVE_REVERT, APPROVER)
    await evening.until(lambda record: "it must stay" in str(record.timeline))
    await evening.reaches(Phase.AWAITING_DECISION)
    assert evening.value(WINDOW) == 150

    evening.world.latency["window_ms"] = 150.0
    await evening.asks(APPROVE_REVERT, APPROVER)
    await evening.reaches(Phase.CLOSED)
    record = reported(evening)
    assert (record.levers[0].status, record.capacity_at_baseline) == (LeverStatus.RELEASED, None)
    assert "capacity" not in record.outcome
    assert evening.ledger.leases().leases == ()


async def test_not_back_in_the_budget_in_time_the_next_tier_hears_once_and_the_lever_stays(evening: Handing) -> None:
    await evening.opens("latency")
    for _ in range(2):
        evening.world.verdicts.append(("gave-up", slow(3_600, 140)))
    await evening.until(lambda record: str(record.timeline).count("looked for anew") == 2)
    [page] = evening.world.pages("senior on-call")
    assert page.startswith("not back in the latency budget")
    assert evening.value(WINDOW) == 150
    await recovers(evening)
    await evening.reaches(Phase.AWAITING_DECISION)
    await evening.asks(APPROVE_KEEP, APPROVER, request=KEEP)
    await evening.reaches(Phase.CLOSED)
    await evening.releases_overrides()


async def test_what_no_lever_helps_is_told_to_people_and_ends_by_itself(evening: Handing) -> None:
    evening.world.latency |= {"queue_wait_ms": 140.0, "window_ms": 150.0}
    evening.world.systems["redis_read_us"] = 9_000.0
    await evening.opens("latency")
    await evening.until(lambda record: bool(evening.world.pages("on-call")))
    [page] = evening.world.pages("on-call")
    assert page.startswith("Redis is slow: a hot key, or the connection pool is exhausted.")
    assert "No lever of ours helps." in page
    await recovers(evening)
    await evening.reaches(Phase.CLOSED)
    record = reported(evening)
    assert [lever.status for lever in record.levers] == [LeverStatus.NOT_NEEDED]
    assert record.mitigated_at is None
    assert any(item.startswith("Redis is slow") for item in record.to_do)
    assert evening.world.asked("take_leases") == []
    assert touched_capacity(evening) == []
    assert record.closed_at is not None
    assert record.closed_at - record.opened_at < timedelta(minutes=5)
