"""Pre-provisioning's arithmetic: sizes, times, what cannot be, which of several events counts, and the sync's plan."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from domain.calendar import CalendarEvent, EntryError, EventStatus
from domain.calendar_sync import (
    CalendarPlan,
    CalendarTable,
    PlanCalendar,
    RunningEvent,
    plan_calendar,
)
from domain.capacity import Demand, DemandKind
from domain.clock import RehearsalClock, compress
from domain.messages import PolicySnapshot
from domain.policy import Policy
from domain.pre_provisioning import (
    EndEvent,
    EventEnd,
    PlanEvent,
    WatchedModel,
    end_event,
    overlaps,
    plan_event,
)

POLICY = Policy()
CLOCK = RehearsalClock()
SNAPSHOT = PolicySnapshot(policy=POLICY, clock=CLOCK)
HOUR = timedelta(hours=1)
MIDNIGHT = datetime.fromisoformat("2026-11-30T00:00:00+09:00")
EVENT = CalendarEvent(
    event_id="monday",
    type="monday_release",
    starts_at=MIDNIGHT,
    multiplier=4,
    models=("sonnet", "haiku"),
    lead_time=4 * HOUR,
    source="test",
    asked_by="content-ops",
)


def planned(event: CalendarEvent = EVENT, snapshot: PolicySnapshot = SNAPSHOT, **changes: Any) -> Any:
    event = event.model_copy(update=changes)
    return plan_event(PlanEvent(event=event, snapshot=snapshot, now=MIDNIGHT - timedelta(days=5)))


@pytest.mark.parametrize(
    ("multiplier", "sonnet", "haiku"),
    [(3, 23, 2), (4, 30, 3), (5, 37, 3)],  # 5x needs 35 units even at 100 % (design check 3)
)
def test_a_multiplier_multiplies_the_forecast_of_each_model(multiplier: float, sonnet: int, haiku: int) -> None:
    plan = planned(multiplier=multiplier)
    assert {size.model: size.needed_units for size in plan.sizes} == {"sonnet": sonnet, "haiku": haiku}
    assert f"{multiplier} × 7,000 tokens/s ÷ 1,000 per unit ÷ 0.95 = {sonnet} units" in plan.sizes[0].arithmetic
    assert bool(plan.findings) == (multiplier == 5)


def test_the_busiest_hour_of_the_event_counts() -> None:
    evening = planned(starts_at=MIDNIGHT - 5.5 * HOUR, multiplier=2, models=("sonnet",))  # 18:30 to 20:00
    assert evening.sizes[0].forecast_tokens_per_second == 12_500
    night = planned(starts_at=MIDNIGHT + 2 * HOUR, multiplier=2, models=("sonnet",))
    assert night.sizes[0].forecast_tokens_per_second == 1_900


def test_in_service_a_lead_time_ahead_and_bought_before_that() -> None:
    times = planned().times
    assert times.starts_at == MIDNIGHT
    assert times.needed_at == MIDNIGHT - 4 * HOUR
    assert times.buy_at == times.needed_at - POLICY.capacity.provisioning_lead
    assert times.verify_by == MIDNIGHT - POLICY.calendar.verify_margin
    assert times.preflight_at == MIDNIGHT - POLICY.calendar.preflight_ahead
    assert times.ends_at == MIDNIGHT + 1.5 * HOUR
    demand = planned().demands[0]
    assert (demand.kind, demand.units, demand.start, demand.end) == (
        DemandKind.EVENT, 30, times.needed_at, times.ends_at
    )  # fmt: skip


def test_a_rehearsal_compresses_the_times_and_nothing_else() -> None:
    clock = RehearsalClock(real_start=MIDNIGHT, business_start=MIDNIGHT - 12 * HOUR, speed=60)
    rehearsed = PolicySnapshot(policy=compress(POLICY, 60), clock=clock)
    plan = plan_event(PlanEvent(event=EVENT, snapshot=rehearsed, now=MIDNIGHT))
    assert plan.times.starts_at == MIDNIGHT + timedelta(minutes=12)
    assert plan.times.starts_at - plan.times.needed_at == timedelta(minutes=4)
    assert plan.sizes == planned().sizes
    assert plan.notes == planned().notes


def test_what_cannot_be_says_how_far_it_carries_and_what_to_do() -> None:
    [finding] = planned(multiplier=5).findings
    assert "5x needs 37 units of sonnet, and 30 may be had (models.sonnet.ceiling_units is 30)" in finding
    assert "30,000 of 35,000 tokens/s, 4.3x" in finding
    assert "AWS Support" in finding
    assert planned(multiplier=5).demands[0].units == 37  # all of it is asked for: the limit may be raised meanwhile


def test_a_row_outside_the_policy_is_no_plan() -> None:
    with pytest.raises(EntryError, match="multiplier"):
        planned(multiplier=1000.0)


def demand(name: str, units: int, start: float, end: float, kind: DemandKind = DemandKind.EVENT) -> Demand:
    return Demand(
        demand_id=name,
        model="sonnet",
        kind=kind,
        units=units,
        start=MIDNIGHT + start * HOUR,
        end=MIDNIGHT + end * HOUR,
        reason=name,
        asked_by=name,
    )


def test_of_overlapping_events_the_larger_counts_and_is_named() -> None:
    own = demand("own", 26, -4, 2)
    others = [
        own,
        demand("larger", 30, 1, 5),
        demand("smaller", 20, -6, -3),
        demand("equal", 26, 0, 1),
        demand("before", 40, -9, -4),
        demand("incident", 28, 0, 1, DemandKind.EMERGENCY),
    ]
    said = overlaps(own, others)
    assert len(said) == 3
    assert "smaller wants 20 units" in said[0]
    assert "our 26: ours, the larger, counts" in said[0]
    assert "our 26: either counts" in said[1]
    assert "our 26: larger, the larger, counts" in said[2]


def test_a_cap_that_timetable_and_event_pass_together_is_said_days_ahead() -> None:
    """Sonnet on Sunday: 0, 5, 8 and 15 units for 4, 6, 5 and 9 hours (205), and 15 more from 19:30 on."""
    assert planned().findings == ()
    capped = POLICY.capacity.model_copy(update={"max_unit_hours_per_day": 250})
    policy = POLICY.model_copy(update={"capacity": capped})
    [finding] = planned(snapshot=PolicySnapshot(policy=policy, clock=CLOCK)).findings
    assert "sonnet is expected to need 280 on 2026-11-29, and capacity.max_unit_hours_per_day is 250" in finding
    flat = POLICY.model_copy(
        update={"timetable": None, "capacity": capped.model_copy(update={"max_unit_hours_per_day": 70})}
    )
    [finding] = planned(snapshot=PolicySnapshot(policy=flat, clock=CLOCK)).findings  # the baseline is others'
    assert "sonnet is expected to need 105 on 2026-11-29" in finding  # a day of UTC without a timetable


def ended(tokens_per_second: float, *others: Demand, moved: float = 0) -> EventEnd:
    """The end of an event of 30 units at 01:30, `moved` by so many hours already."""
    ends_at = MIDNIGHT + (1.5 + moved) * HOUR
    own = demand("own", 30, -4, 1.5 + moved)
    request = EndEvent(
        demands=[own],
        others=[own, *others],
        watched={"sonnet": WatchedModel(tokens_per_second=tokens_per_second)},
        planned_end=MIDNIGHT + 1.5 * HOUR,
        ends_at=ends_at,
        snapshot=SNAPSHOT,
    )
    return end_event(request)


def test_the_units_stay_while_the_load_needs_them_and_no_longer_than_allowed() -> None:
    half_past_one = MIDNIGHT + 1.5 * HOUR
    assert ended(12_000).ends_at == half_past_one  # 80 % of the timetable's 15 units
    later = ended(12_001)
    assert later.ends_at == half_past_one + POLICY.calendar.prolong_by
    assert "12,001 tokens/s are more than 80% of the 15,000 that 15 units leave" in later.why[0]
    # At 02:00 the timetable has no units: what is left is the on-demand quota.
    night = ended(9_000, moved=0.5)
    assert night.ends_at == half_past_one + HOUR
    assert "the 10,500 that 0 units leave" in night.why[0]
    assert ended(25_000, demand("b", 30, 0, 3)).ends_at == half_past_one  # another event has as many
    last = ended(25_000, moved=4)
    assert last.ends_at == half_past_one + POLICY.calendar.max_prolong
    assert last.why


# ---------------------------------------------------------------- the sync


def synced(*rows: CalendarEvent, now: datetime = MIDNIGHT - 5 * HOUR, **more: Any) -> CalendarPlan:
    """`more`: `running` (id to fingerprint) and `broken` (id to why)."""
    running = [RunningEvent(event_id=name, fingerprint=text) for name, text in more.get("running", {}).items()]
    table = CalendarTable(events=list(rows), broken=more.get("broken", {}))
    return plan_calendar(PlanCalendar(table=table, running=running, snapshot=SNAPSHOT, now=now))


def test_a_new_row_is_followed_a_changed_one_told_a_gone_one_given_up_and_the_same_left_alone() -> None:
    assert synced(EVENT).tell == [EVENT]
    assert synced(EVENT, running={"monday": EVENT.fingerprint}).tell == []
    moved = EVENT.model_copy(update={"starts_at": MIDNIGHT + HOUR})
    assert synced(moved, running={"monday": EVENT.fingerprint}).tell == [moved]
    assert synced(running={"monday": EVENT.fingerprint}).remove == {"monday": "its row is gone from the calendar"}


def test_a_row_that_cannot_be_read_keeps_its_workflow_and_is_paged() -> None:
    plan = synced(running={"monday": EVENT.fingerprint}, broken={"monday": "calendar row 'monday': multiplier: bad"})
    assert plan.remove == {}
    assert "multiplier: bad" in plan.pages[0].text
    wild = EVENT.model_copy(update={"multiplier": 1000.0})
    plan = synced(wild, running={"monday": EVENT.fingerprint})
    assert (plan.tell, plan.remove) == ([], {})
    assert "multiplier: '1000' is not allowed" in plan.pages[0].text
    assert synced(wild).pages == plan.pages  # the same page: told once


def test_proposals_and_what_incidents_taught_are_never_provisioned_for() -> None:
    proposed = EVENT.model_copy(update={"status": EventStatus.PROPOSED})
    learnt = EVENT.model_copy(update={"source": "incident-x"})
    for row in (proposed, learnt):
        assert synced(row).tell == []
        assert synced(row).pages == []
        assert "monday" in synced(row, running={"monday": EVENT.fingerprint}).remove


def test_what_was_provisioned_for_already_is_not_bought_for_again() -> None:
    """Scenario 1's own row: triggered two hours ahead by its plan, found ten minutes before the release."""
    row = EVENT.model_copy(
        update={
            "multiplier": 3.0,
            "lead_time": 2 * HOUR,
            "units": {"sonnet": 15},
            "provisioning_triggered_at": MIDNIGHT - 2 * HOUR,
            "provisioning_completed_at": MIDNIGHT - 1.8 * HOUR,
        }
    )
    plan = synced(row, now=MIDNIGHT - timedelta(minutes=10))
    assert (plan.tell, plan.pages) == ([], [])
    # Moved a week on, the old trigger counts for nothing.
    moved = row.model_copy(update={"starts_at": MIDNIGHT + timedelta(days=7)})
    assert synced(moved, now=MIDNIGHT).tell == [moved]


def test_late_is_better_than_never_until_the_event_has_begun_and_then_it_is_said_once() -> None:
    ten_minutes = timedelta(minutes=10)
    assert synced(EVENT, now=MIDNIGHT - ten_minutes).tell == [EVENT]
    plan = synced(EVENT, now=MIDNIGHT + ten_minutes)
    assert plan.tell == []
    assert "was never provisioned for" in plan.pages[0].text
    assert plan.pages[0].page_id == synced(EVENT, now=MIDNIGHT + 2 * ten_minutes).pages[0].page_id
    over = synced(EVENT, now=MIDNIGHT + 3 * HOUR)
    assert (over.tell, over.pages) == ([], [])


def test_an_event_in_the_utc_of_a_hand_written_row_is_the_same_event() -> None:
    utc = EVENT.model_copy(update={"starts_at": MIDNIGHT.astimezone(UTC)})
    assert synced(utc, running={"monday": EVENT.fingerprint}).tell == []
