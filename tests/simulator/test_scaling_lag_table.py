"""Scenario 4's detection table, row by row, at Wednesday 17:30; `docs/simulator.md` says what cannot hold."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import pytest

from domain import timetable
from domain.clock import compress
from domain.policy import Policy
from simulator.mangaassist import Controls, Flow, at_rest, step
from simulator.scaling_lag import AFTERNOON, ON_DEMAND_IN_USE, PARAMETERS, TASKS_AFTER, TASKS_BEFORE, ramp
from simulator.traffic import TOKYO, Traffic

POLICY = Policy()
NOON, SEEN = (datetime(2026, 12, 2, *hour, tzinfo=TOKYO) for hour in ((17, 0), (17, 30)))
STEP_SECONDS = 6


def controls(sonnet_units: int, ttl: int = POLICY.cache_ttl_seconds, downgraded: bool = False) -> Controls:
    units = {"sonnet": sonnet_units, "haiku": 3}
    moved = {"faq": "haiku", "greeting": "haiku"} if downgraded else {}
    return Controls(
        cache_ttl_seconds=ttl,
        routing={**POLICY.baseline.model_routing, **moved},
        capacity_tokens_per_second={
            name: units[name] * spec.tokens_per_second_per_unit
            + spec.on_demand_tokens_per_second
            - ON_DEMAND_IN_USE.get(name, 0)
            for name, spec in POLICY.models.items()
        },
        tasks_min=POLICY.ecs.baseline_tasks,
        tasks_max=POLICY.ecs.max_tasks,
    )


AFTERNOONS = controls(8)


@dataclass(frozen=True)
class Minute:
    """One business minute."""

    flows: list[Flow]
    tasks: int

    @property
    def throttles(self) -> float:
        return sum(model.throttled for flow in self.flows for model in flow.models.values())

    @property
    def sent(self) -> float:
        return sum(model.sent_tokens_per_second for flow in self.flows for model in flow.models.values()) / len(
            self.flows
        )


def evening(
    acting: Callable[[datetime], Controls] = lambda at: AFTERNOONS, minutes: int = 60
) -> dict[datetime, Minute]:
    """From 17:00 to 18:00, by the end of each minute."""
    hits = POLICY.throttle.hit_rate_at_baseline
    traffic = Traffic(1, hits, [ramp(NOON)], usual_tokens_per_second=AFTERNOON)
    state, at, found = at_rest(AFTERNOONS, PARAMETERS), NOON, {}
    for minute in range(60):
        flows = []
        while at < NOON + timedelta(minutes=minute + 1):
            state, flow = step(state, traffic.offered(at), acting(at), PARAMETERS, STEP_SECONDS)
            flows.append(flow)
            at += timedelta(seconds=STEP_SECONDS)
        found[at] = Minute(flows, state.tasks_desired)
    return found


@pytest.fixture(scope="module")
def unmitigated() -> dict[datetime, Minute]:
    return evening()


def test_before_the_ramp_all_is_normal(unmitigated: dict[datetime, Minute]) -> None:
    before = [minute for at, minute in unmitigated.items() if at <= NOON + timedelta(minutes=20)]
    assert all(minute.throttles == 0 for minute in before)
    assert {minute.tasks for minute in before} == {TASKS_BEFORE}


def test_ecs_scales_from_15_to_35_tasks_within_10_minutes(unmitigated: dict[datetime, Minute]) -> None:
    assert unmitigated[SEEN].tasks == TASKS_AFTER
    assert unmitigated[SEEN - timedelta(minutes=10)].tasks == TASKS_BEFORE
    after = [minute.tasks for at, minute in unmitigated.items() if at >= SEEN]
    assert set(after) == {TASKS_AFTER}, "and stays there: no oscillation"


def test_23_throttles_in_the_last_60_s(unmitigated: dict[datetime, Minute]) -> None:
    assert unmitigated[SEEN].throttles == pytest.approx(23, rel=0.3)


def test_12_500_tokens_a_second_are_sent(unmitigated: dict[datetime, Minute]) -> None:
    assert unmitigated[SEEN].sent == pytest.approx(12_500, rel=0.02)
    sonnet = unmitigated[SEEN].flows[-1].models["sonnet"]
    assert 8_000 < sonnet.sent_tokens_per_second < 15_000, "below the evening's capacity, above what is provisioned"


def test_8_sonnet_units_where_the_evening_has_15_and_the_increase_is_due_at_17_00() -> None:
    assert timetable.units_at(POLICY, "sonnet", SEEN - timedelta(hours=1)) == 8
    assert timetable.units_at(POLICY, "sonnet", SEEN) == 15
    changes = timetable.changes(POLICY, "sonnet", SEEN - timedelta(hours=1), SEEN)
    assert [(at, units) for at, units in changes] == [(NOON, 15)], "30 min ago"


def test_the_levers_hold_until_the_units_come_and_then_may_all_go(unmitigated: dict[datetime, Minute]) -> None:
    ttl = POLICY.scaling_lag.cache_ttl_seconds
    landed = SEEN + timedelta(minutes=17)

    def acting(at: datetime) -> Controls:
        if at < SEEN:
            return AFTERNOONS
        return controls(8, ttl, downgraded=True) if at < landed else controls(15)

    minutes = evening(acting)
    assert unmitigated[SEEN + timedelta(minutes=10)].throttles > 0
    assert all(minute.throttles == 0 for at, minute in minutes.items() if at > SEEN + timedelta(minutes=3))


def test_with_the_whole_on_demand_quota_nothing_would_throttle() -> None:
    """What cannot hold: 10,500 tokens/s on demand, which scenario 1 needs, carry this evening."""
    spec = POLICY.models["sonnet"]
    free = AFTERNOONS.capacity_tokens_per_second["sonnet"] + ON_DEMAND_IN_USE["sonnet"]
    assert free == 8 * spec.tokens_per_second_per_unit + spec.on_demand_tokens_per_second > 12_500
    assert compress(POLICY, 60).timetable == POLICY.timetable, "time of day is not compressed"
