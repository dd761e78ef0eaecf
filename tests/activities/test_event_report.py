"""The report of a calendar event: what it says of one in time, one too late and one that was given up."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from activities._event_report import event_content
from activities.report import ReportActivities, render_markdown
from domain.calendar import CalendarEvent
from domain.capacity import DemandOutcome
from domain.clock import RehearsalClock
from domain.incident import TimelineEntry
from domain.messages import PolicySnapshot
from domain.policy import Policy
from domain.pre_provisioning import (
    EventPhase,
    EventRecord,
    EventReportInput,
    PlanEvent,
    WatchedModel,
    plan_event,
)

SNAPSHOT = PolicySnapshot(policy=Policy(), clock=RehearsalClock())
START = datetime(2026, 11, 29, 15, tzinfo=UTC)
HOUR = timedelta(hours=1)
HOSTILE = "<script>alert(1)</script> | **bold** [x](http://evil.example)"
EVENT = CalendarEvent(
    event_id="monday",
    type="monday_release",
    starts_at=START,
    multiplier=5,
    models=("sonnet",),
    lead_time=4 * HOUR,
    source=HOSTILE,
    asked_by="content-ops",
)


def record(**changes: Any) -> EventRecord:
    plan = plan_event(PlanEvent(event=EVENT, snapshot=SNAPSHOT, now=START - timedelta(days=5)))
    times = plan.times
    outcome = DemandOutcome(
        demand_id="x", status="in_service", units_in_service=30, units_wanted=30, detail="30 of 30 units in service"
    )
    record = EventRecord(
        event_id="monday",
        run_id="0123456789",
        event=EVENT,
        phase=EventPhase.DONE,
        times=times,
        sizes=[*plan.sizes],
        findings=[*plan.findings],
        notes=[*plan.notes],
        outcomes={"sonnet": outcome},
        triggered_at=times.buy_at,
        in_service_at=times.buy_at + timedelta(minutes=15),
        in_time=True,
        watched={
            "sonnet": WatchedModel(peak_tokens_per_second=34_000, capacity_tokens_per_second=40_500, throttles=12)
        },
        released_at=times.ends_at + timedelta(minutes=2),
        ended_at=times.ends_at + timedelta(minutes=2),
        outcome="in service 4 h 15 min before the start",
        timeline=[TimelineEntry(at=times.preflight_at, kind="page", text=f"paged on-call: {HOSTILE}")],
    )
    return record.model_copy(update=changes)


def markdown(record: EventRecord) -> str:
    return render_markdown(event_content(record, SNAPSHOT, record.ended_at or START), "no plots here")


def test_it_says_what_was_planned_when_it_came_what_it_carried_and_what_was_not_possible() -> None:
    text = markdown(record())
    assert "sonnet: 5 × 7,000 tokens/s ÷ 1,000 per unit ÷ 0.95 = 37 units, limited to 30" in text
    assert "in service 4 h 15 min before the start; 30 min is the margin" in text
    assert "5x needs 37 units of sonnet, and 30 may be had" in text
    assert "| 34,000 of 40,500 | **12** |" in text
    assert "Units released | Mon 01:32:00 (Sun 16:32:00 UTC)" in text
    assert "<script>" not in text
    assert "[x](" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_time": False, "in_service_at": START + timedelta(minutes=5)}, "in service 5 min after the start"),
        ({"in_time": False, "in_service_at": None}, "never all in service before the event ended"),
        ({"in_time": None, "phase": EventPhase.WITHDRAWN, "outcome": "given up: it is gone"}, "given up: it is gone"),
        ({"phase": EventPhase.SCHEDULED, "outcome": "", "waiting_for": "the time to buy"}, "waiting for the time"),
    ],
)  # fmt: skip
def test_it_says_how_it_ended_or_where_it_stands(changes: Mapping[str, Any], said: str) -> None:
    assert said in markdown(record(**changes))


async def test_it_is_written_without_plots_where_the_metrics_cannot_be_read(tmp_path: Path) -> None:
    activities = ReportActivities(None, tmp_path)  # type: ignore[arg-type]
    request = EventReportInput(record=record(), snapshot=SNAPSHOT)
    written = await activities.write_event_report(request)
    assert written == await activities.write_event_report(request)
    page = Path(written.html_path).read_text()  # noqa: ASYNC240
    assert "There are no plots" in page
    assert "<script>alert" not in page
    assert Path(written.html_path).parent.name == "event-monday-01234567"
