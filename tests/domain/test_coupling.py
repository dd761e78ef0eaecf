"""Coupled scaling and the 80 % rule: when they ask, how much, and that nothing swings."""

from datetime import UTC, datetime, timedelta
from math import ceil

import pytest

from domain.capacity import Demand, DemandKind
from domain.clock import RehearsalClock
from domain.coupling import CAPACITY_COUPLING, CouplingPlan, CouplingState, Firing, plan
from domain.knobs import KnobName
from domain.load import LoadSnapshot, ModelLoad
from domain.messages import CapacityState, Paused, PolicySnapshot
from domain.policy import CouplingPolicy, Policy

NOW = datetime(2026, 12, 2, 3, 0, tzinfo=UTC)
"""Wednesday noon in Tokyo: 8 Sonnet and 3 Haiku units."""
POLICY = Policy()
SNAPSHOT = PolicySnapshot(policy=POLICY, clock=RehearsalClock())
SONNET = POLICY.models["sonnet"]
MINUTE = timedelta(minutes=1)
COUPLING = CouplingPolicy()


def load(sonnet: float, *, capacity: float = 18_500, throttles: float = 0, calls: float | None = None) -> LoadSnapshot:
    """So many tokens/s sent to Sonnet, and a sixth of it to Haiku."""
    sent = {"recommendation": sonnet / 0.85, "search": sonnet / 6 / 0.85}
    return LoadSnapshot(
        observed_at=NOW,
        models={
            "sonnet": ModelLoad(
                sent_tokens_per_second=sonnet, capacity_tokens_per_second=capacity, throttles=throttles
            ),
            "haiku": ModelLoad(sent_tokens_per_second=sonnet / 6, capacity_tokens_per_second=11_000, throttles=0),
        },
        offered_tokens_per_second=sent,
        hit_rate=0.15,
        calls_per_second_per_task=calls,
    )


def fleet(
    sonnet: int = 8, demands: list[Demand] | None = None, paused: Paused | None = None
) -> dict[str, CapacityState]:
    return {
        "sonnet": CapacityState(model="sonnet", units_in_service=sonnet, demands=demands or [], paused=paused),
        "haiku": CapacityState(model="haiku", units_in_service=3),
    }


def look(
    tasks: float | None = 15,
    sonnet: float = 4_000,
    before: CouplingState | None = None,
    at: datetime = NOW,
    states: dict[str, CapacityState] | None = None,
    snapshot: PolicySnapshot = SNAPSHOT,
    **changes: float,
) -> CouplingPlan:
    start = before or CouplingState(tasks=15)
    return plan(snapshot, at, load(sonnet, **changes), tasks, states or fleet(), start)


def firing(ago: timedelta, extra: int = 5, model: str = "sonnet") -> Firing:
    at = NOW - ago
    return Firing(at=at, model=model, rule="tasks rose", units=8 + extra, extra_units=extra, until=at + COUPLING.hold)


def test_when_tasks_rise_the_demand_follows_by_the_ratio_before_anything_throttles() -> None:
    result = look(tasks=35)
    assert [(demand.model, demand.units) for demand in result.demands] == [("sonnet", 15), ("haiku", 5)]
    demand = result.demands[0]
    assert (demand.kind, demand.asked_by) == (DemandKind.EMERGENCY, CAPACITY_COUPLING)
    assert (demand.start, demand.end) == (NOW, NOW + COUPLING.hold)
    assert "ECS runs 35 tasks" in demand.reason
    assert result.state.tasks == 35
    assert "sonnet" in result.state.said[0]


@pytest.mark.parametrize(
    ("what", "result"),
    [
        ("the same tasks", look(tasks=15)),
        ("fewer tasks", look(tasks=14)),
        ("tasks that cannot be read", look(tasks=None)),
        ("the first look", look(tasks=35, before=CouplingState())),
        ("tasks that today's units carry", look(tasks=17)),
    ],
)
def test_no_demand_for(what: str, result: CouplingPlan) -> None:
    assert result.demands == [], what


def test_tasks_that_rise_while_calls_are_throttled_raise_nothing() -> None:
    """design check 25: tasks that grow because answers are slow are no demand; the incident sizes from the load."""
    result = look(tasks=60, sonnet=20_000, throttles=300)
    assert (result.demands, result.state.tasks) == ([], 60), "of no model, and not later either"


@pytest.mark.parametrize(("kind", "who"), [(DemandKind.EVENT, "event-x"), (DemandKind.EMERGENCY, "incident-x")])
def test_tasks_that_an_event_or_an_incident_sized_for_raise_nothing_and_utilisation_still_does(
    kind: DemandKind, who: str
) -> None:
    held = Demand(
        demand_id=who,
        model="haiku",
        kind=kind,
        units=6,
        start=NOW - MINUTE,
        end=NOW + timedelta(hours=4),
        reason="planned for",
        asked_by=who,
    )
    states = fleet() | {"haiku": CapacityState(model="haiku", units_in_service=3, demands=[held])}
    assert look(tasks=60, states=states).demands == []
    before = CouplingState(tasks=15, over_since={"sonnet": NOW - 5 * MINUTE})
    [demand] = look(tasks=60, sonnet=7_000, before=before, states=states).demands
    assert (demand.model, demand.units) == ("sonnet", 9)


def test_over_80_percent_for_2_minutes_asks_for_what_the_demand_needs() -> None:
    states, sonnet = fleet(), 7_000.0  # 88 % of 8,000
    first = look(sonnet=sonnet)
    assert first.demands == []
    assert first.state.over_since == {"sonnet": NOW}
    second = look(sonnet=sonnet, before=first.state, at=NOW + MINUTE)
    assert second.demands == [], "a minute is not two"
    third = look(sonnet=sonnet, before=second.state, at=NOW + 2 * MINUTE, states=states)
    [demand] = third.demands
    assert demand.units == ceil(7_000 / 1_000 / 0.8) == 9
    assert "88%" in demand.reason
    calm = look(sonnet=4_000, before=second.state, at=NOW + 2 * MINUTE)
    assert (calm.demands, calm.state.over_since) == ([], {}), "what ends counts from the start again"
    throttled = look(sonnet=sonnet, before=second.state, at=NOW + 2 * MINUTE, throttles=300)
    after = look(sonnet=sonnet, before=throttled.state, at=NOW + 3 * MINUTE)
    assert after.demands == [], "an incident's levers have just ended the throttling: its units are on their way"
    assert after.state.over_since == {"sonnet": NOW + 3 * MINUTE}


def test_utilisation_is_per_model_so_that_the_evening_itself_buys_nothing() -> None:
    """design check 22: 12,500 tokens/s of both models on 15 Sonnet units are 71 % of Sonnet's."""
    evening = NOW + timedelta(hours=8)
    before = CouplingState(tasks=35, over_since={"sonnet": evening - 10 * MINUTE})
    result = look(tasks=35, sonnet=10_700, before=before, at=evening, states=fleet(15), capacity=25_500)
    assert result.demands == []


def test_retries_are_no_demand() -> None:
    sent = load(7_000).models["sonnet"].model_copy(update={"sent_tokens_per_second": 30_000})
    seen = load(7_000).model_copy(update={"models": {"sonnet": sent}})
    before = CouplingState(tasks=15, over_since={"sonnet": NOW - 5 * MINUTE})
    [demand] = plan(SNAPSHOT, NOW, seen, 15, fleet(), before).demands
    assert demand.units == 9


def test_units_are_bounded_over_what_others_want_and_by_the_ceiling() -> None:
    assert look(tasks=60).demands[0].units == 8 + COUPLING.max_extra_units
    small = POLICY.model_copy(
        update={"models": {**POLICY.models, "sonnet": SONNET.model_copy(update={"ceiling_units": 16})}}
    )
    assert look(tasks=60, snapshot=PolicySnapshot(policy=small, clock=RehearsalClock())).demands[0].units == 16


def test_one_budget_and_one_cooldown_for_both_rules() -> None:
    over = {"sonnet": NOW - 5 * MINUTE}
    recent = CouplingState(tasks=15, over_since=over, firings=[firing(3 * MINUTE)])
    assert look(tasks=15, sonnet=7_000, before=recent).demands == [], "the other rule fired 3 min ago"
    assert "cooldown" in look(tasks=15, sonnet=7_000, before=recent).state.said[0]
    spent = CouplingState(tasks=15, over_since=over, firings=[firing(timedelta(hours=n + 1), 10) for n in range(4)])
    used_up = look(tasks=15, sonnet=7_000, before=spent)
    assert used_up.demands == []
    assert "budget" in used_up.state.said[0]
    nearly = spent.model_copy(update={"firings": [*spent.firings[:3], firing(timedelta(hours=5), 8)]})
    assert look(tasks=35, before=nearly).demands[0].units == 10, "two unit-hours are left of the day's"
    yesterday = spent.model_copy(update={"firings": [firing(timedelta(hours=25 + n), 10) for n in range(4)]})
    assert look(tasks=15, sonnet=7_000, before=yesterday).demands[0].units == 9


def test_tasks_that_rise_within_the_cooldown_are_answered_after_it() -> None:
    first = look(tasks=25)
    second = look(tasks=35, before=first.state, at=NOW + 3 * MINUTE)
    assert (first.demands[0].units, second.demands, second.state.tasks) == (11, [], 25)
    third = look(tasks=35, before=second.state, at=NOW + 5 * MINUTE)
    assert (third.demands[0].units, third.state.tasks) == (15, 35)


def test_what_others_want_already_is_not_asked_for_again() -> None:
    over = CouplingState(tasks=15, over_since={"sonnet": NOW - 5 * MINUTE})
    incident = Demand(
        demand_id="incident-x",
        model="sonnet",
        kind=DemandKind.EMERGENCY,
        units=20,
        start=NOW - MINUTE,
        end=NOW + timedelta(hours=4),
        reason="throttled",
        asked_by="incident-x",
    )
    assert look(tasks=15, sonnet=7_000, before=over, states=fleet(demands=[incident])).demands == []
    own = incident.model_copy(update={"asked_by": CAPACITY_COUPLING, "units": 15})
    assert [demand.model for demand in look(tasks=35, states=fleet(demands=[own])).demands] == ["haiku"]
    ending = own.model_copy(update={"end": NOW + 10 * MINUTE})
    assert look(tasks=35, states=fleet(demands=[ending])).demands[0].units == 15, "it would end before new ones land"


def test_the_kill_switch_holds_for_coupling_too() -> None:
    paused = Paused(who="approver@example.com", why="freeze", since=NOW)
    assert [demand.model for demand in look(tasks=35, states=fleet(paused=paused)).demands] == ["haiku"]


def test_the_third_demand_in_a_week_proposes_a_timetable_change() -> None:
    twice = CouplingState(tasks=15, firings=[firing(timedelta(days=2)), firing(timedelta(days=1), 9)])
    result = look(tasks=35, before=twice)
    [proposal] = result.proposals
    steps = twice.model_copy(update={"firings": [*twice.firings, firing(10 * MINUTE)], "tasks": 15})
    assert look(tasks=35, before=steps).proposals == [], "a step of a ramp is not another time"
    assert (
        proposal.text == "sonnet needed more units than the timetable 3 times in 7 d, 17 at most: consider "
        "timetable.windows 12:00 to 17:00: units.sonnet from 8 to 17"
    )
    assert (
        look(tasks=35, before=result.state.model_copy(update={"tasks": 15}), at=NOW + timedelta(hours=1)).proposals
        == []
    )
    old = CouplingState(tasks=15, firings=[firing(timedelta(days=8)), firing(timedelta(days=1))])
    assert look(tasks=35, before=old).proposals == []


def test_without_coupling_nothing_is_asked_for_and_the_rate_is_given_back() -> None:
    held = look(sonnet=18_000, calls=0.9).state
    assert held.rate is not None
    off = PolicySnapshot(policy=POLICY.model_copy(update={"coupling": None}), clock=RehearsalClock())
    result = look(tasks=60, sonnet=18_000, before=held, snapshot=off)
    assert (result.demands, result.rate, result.release) == ([], None, [held.rate.lease_id])


def test_the_rate_is_capacity_divided_by_tasks_and_ends_when_there_is_room() -> None:
    """35 tasks make 0.62 calls a second each, 2 % more than Bedrock answers."""
    crowded = look(tasks=35, sonnet=10_700, capacity=10_500, throttles=23, calls=0.62)
    assert crowded.rate is not None
    assert (crowded.rate.knob, crowded.rate.value) == (KnobName.INVOCATIONS_PER_SECOND_PER_TASK, 0.6)
    assert crowded.rate.duration_ms == 300_000
    again = look(
        tasks=36, sonnet=10_700, capacity=10_500, throttles=23, calls=0.6, before=crowded.state, at=NOW + MINUTE
    )
    assert again.rate == crowded.rate, "about the same: renewed"
    more = look(tasks=70, sonnet=10_500, capacity=10_500, calls=0.31, before=again.state, at=NOW + 2 * MINUTE)
    assert more.rate is not None
    assert more.rate.value == 0.31
    assert more.release == [crowded.rate.lease_id]
    room = look(tasks=70, sonnet=10_700, capacity=17_500, calls=0.31, before=more.state, at=NOW + 3 * MINUTE)
    assert (room.rate, room.release, room.state.rate) == (None, [more.rate.lease_id], None)
    assert look(tasks=35, sonnet=10_700, capacity=10_500).rate is None, "calls could not be read"


def test_an_evening_of_looks_does_not_swing() -> None:
    """design check 25, rehearsed: units go up once and stay, tasks settle, nothing throttles for long.

    A worst case of a service: its tasks follow what waits, too, and the rate is obeyed.
    """
    state, demands = CouplingState(), list[Demand]()
    tasks, waiting, rate = 15.0, 0.0, None
    in_service, landing = 8, dict[datetime, int]()
    asked, task_counts, unit_counts = list[int](), list[float](), list[int]()
    at = NOW
    for minute in range(240):
        at = NOW + minute * MINUTE
        tokens = 5_400.0 if minute < 20 else min(11_000.0, 5_400.0 + 400 * (minute - 20))
        in_service = max([in_service, *(units for when, units in landing.items() if when <= at)])
        demands = [demand for demand in demands if demand.end > at]
        capacity = in_service * 1_000 + 2_500.0
        calls = tokens / 550
        allowed = min(capacity / 550, calls if rate is None else rate * tasks)
        waiting = max(0.0, waiting + (calls - allowed) * 60) * 0.5  # half of them give up
        wanted = ceil((calls + waiting / 60) / 0.65)
        tasks = min(60.0, tasks + 10, wanted) if wanted > 1.1 * tasks else (wanted if wanted < 0.9 * tasks else tasks)
        offered = load(tokens)
        seen = load(allowed * 550, capacity=capacity, calls=allowed / tasks, throttles=max(0.0, calls - allowed) * 60)
        seen = seen.model_copy(update={"offered_tokens_per_second": offered.offered_tokens_per_second})
        states = fleet(in_service, demands)
        result = plan(SNAPSHOT, at, seen, tasks, states, state)
        for demand in (one for one in result.demands if one.model == "sonnet"):
            demands = [demand]
            landing[at + 15 * MINUTE] = demand.units
            asked.append(demand.units)
        state = result.state
        rate = float(str(result.rate.value)) if result.rate is not None else None
        task_counts.append(tasks)
        unit_counts.append(in_service)
    turns = sum(
        (later - now) * (now - earlier) < 0
        for earlier, now, later in zip(task_counts, task_counts[1:], task_counts[2:], strict=False)
    )
    assert turns <= 2, task_counts
    assert len(set(task_counts[-120:])) == 1, "tasks settle"
    assert unit_counts == sorted(unit_counts)
    assert 11 <= unit_counts[-1] <= 18
    assert len(asked) <= 6, asked
