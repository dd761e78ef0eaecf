"""The fluid model against scenario 1: the detection table row by row, what the levers do, and what undoing them does.

All of it runs in virtual time: the model is pure.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from domain.policy import Policy
from simulator.mangaassist import Controls, Flow, Parameters, at_rest, settled_hit_rate, step
from simulator.traffic import TOKYO, Spike, Traffic, monday_release

POLICY = Policy()
PARAMETERS = Parameters()
MIDNIGHT = datetime(2026, 11, 30, tzinfo=TOKYO)
STEP_SECONDS = 3.0
DOWNGRADED = {"faq": "haiku", "greeting": "haiku"}
RECOVERY = POLICY.recovery

BASELINE = Controls(
    cache_ttl_seconds=POLICY.cache_ttl_seconds,
    routing=POLICY.baseline.model_routing,
    capacity_tokens_per_second={
        name: model.baseline_units * model.tokens_per_second_per_unit + model.on_demand_tokens_per_second
        for name, model in POLICY.models.items()
    },
    tasks_min=POLICY.ecs.baseline_tasks,
    tasks_max=POLICY.ecs.max_tasks,
)


def controls(
    ttl: int = POLICY.cache_ttl_seconds, routing: Mapping[str, str] | None = None, more_sonnet_units: int = 0
) -> Controls:
    capacity = dict(BASELINE.capacity_tokens_per_second)
    capacity["sonnet"] += more_sonnet_units * POLICY.models["sonnet"].tokens_per_second_per_unit
    return Controls(
        cache_ttl_seconds=ttl,
        routing={**BASELINE.routing, **(routing or {})},
        capacity_tokens_per_second=capacity,
        tasks_min=BASELINE.tasks_min,
        tasks_max=BASELINE.tasks_max,
    )


@dataclass(frozen=True)
class Minute:
    """One minute as CloudWatch would tell it, and its last step."""

    flows: list[Flow]
    tasks_desired: int

    @property
    def last(self) -> Flow:
        return self.flows[-1]

    def total(self, what: Callable[[Flow], float]) -> float:
        return sum(what(flow) for flow in self.flows)

    @property
    def throttles(self) -> int:
        return round(self.total(lambda flow: sum(model.throttled for model in flow.models.values())))

    @property
    def fallback_percent(self) -> float:
        return 100 * self.total(lambda flow: flow.fallbacks) / self.total(lambda flow: flow.responses)

    @property
    def sent(self) -> float:
        flows = self.flows
        return sum(m.sent_tokens_per_second for flow in flows for m in flow.models.values()) / len(flows)

    @property
    def recovered(self) -> bool:
        return (
            self.throttles <= RECOVERY.max_throttles
            and self.fallback_percent < RECOVERY.max_fallback_percent
            and max(flow.queue_depth for flow in self.flows) < RECOVERY.max_queue_depth
            and max(flow.request_p99_ms for flow in self.flows) < RECOVERY.max_p99_ms
        )


def night(
    acting: Callable[[float], Controls] = lambda minute: BASELINE, until_minute: int = 20, seed: int = 7
) -> dict[int, Minute]:
    """The release night from 23:55, by minutes after midnight; `acting` says what holds at a minute."""
    spike = Spike(MIDNIGHT + timedelta(minutes=5), 5, timedelta(minutes=27))
    traffic = Traffic(seed, POLICY.throttle.hit_rate_at_baseline, [spike])
    state, at, minutes = at_rest(BASELINE, PARAMETERS), MIDNIGHT - timedelta(minutes=5), {}
    for minute in range(-5, until_minute):
        flows = []
        while at < MIDNIGHT + timedelta(minutes=minute + 1):
            now = (at - MIDNIGHT) / timedelta(minutes=1)
            state, flow = step(state, traffic.offered(at), acting(now), PARAMETERS, STEP_SECONDS)
            flows.append(flow)
            at += timedelta(seconds=STEP_SECONDS)
        minutes[minute] = Minute(flows, state.tasks_desired)
    return minutes


@pytest.fixture(scope="module")
def unmitigated() -> dict[int, Minute]:
    return night(until_minute=48)


def test_before_the_release_all_is_normal(unmitigated: dict[int, Minute]) -> None:
    for minute in range(-5, 5):
        before = unmitigated[minute]
        assert before.recovered
        assert before.sent == pytest.approx(7000, rel=0.02)
        assert before.last.hit_rate == pytest.approx(POLICY.throttle.hit_rate_at_baseline, abs=0.002)
        assert before.tasks_desired == POLICY.ecs.baseline_tasks
        assert 2400 < before.last.request_p99_ms < 2700


@pytest.mark.parametrize(
    ("row", "read", "written", "tolerance"),
    [
        ("TokensPerSecond", lambda m: sum(f.sent_tokens_per_second for f in m.last.models.values()), 35_200, 0.03),
        ("BedrockQueueDepth", lambda m: m.last.queue_depth, 340, 0.05),
        ("RequestLatencyP99", lambda m: m.last.request_p99_ms, 9_800, 0.02),
        ("ECS tasks, scaling in progress", lambda m: m.tasks_desired, 30, 0),
        ("fallback answers, %", lambda m: 100 * m.last.fallbacks / m.last.responses, 12, 0.1),
        ("cache hit rate, %", lambda m: 100 * m.last.hit_rate, 15, 0.03),
    ],
)
def test_detection_table_at_0008(
    unmitigated: dict[int, Minute], row: str, read: Callable[[Minute], float], written: float, tolerance: float
) -> None:
    assert read(unmitigated[7]) == pytest.approx(written, rel=tolerance), row


def test_traffic_rises_fivefold_within_three_minutes_and_passes(unmitigated: dict[int, Minute]) -> None:
    assert unmitigated[4].sent < 7_200
    for minute in range(8, 32):
        assert unmitigated[minute].sent == pytest.approx(35_200, rel=0.03)
    assert unmitigated[43].sent == pytest.approx(1.2 * 7_000, rel=0.03)
    assert unmitigated[43].recovered


def test_the_row_that_cannot_hold_with_the_others(unmitigated: dict[int, Minute]) -> None:
    """47 throttles in 60 s: the fallback answers alone are several hundred a minute (design check 19)."""
    minute = unmitigated[8]
    assert minute.total(lambda flow: flow.fallbacks) > 400
    assert minute.throttles > 400
    assert all(unmitigated[m].throttles == 0 for m in range(-5, 6))
    assert unmitigated[6].throttles > 0, "the alarm's first breaching minute is 00:06"


def test_the_hit_rate_is_calibrated_on_the_runbook() -> None:
    throttle = POLICY.throttle
    assert settled_hit_rate(POLICY.cache_ttl_seconds, PARAMETERS) == pytest.approx(throttle.hit_rate_at_baseline)
    assert settled_hit_rate(throttle.cache_ttl_seconds, PARAMETERS) == pytest.approx(throttle.hit_rate_at_mitigation)


@pytest.mark.parametrize(
    "mitigation",
    [controls(ttl=120), controls(ttl=120, routing=DOWNGRADED), controls(more_sonnet_units=15)],
    ids=["ttl", "ttl and routing", "units"],
)
def test_levers_cure_it_under_load(mitigation: Controls) -> None:
    minutes = night(lambda minute: mitigation if minute >= 9 else BASELINE)
    assert minutes[8].recovered is False
    for minute in range(12, 20):
        assert minutes[minute].recovered, minute
        assert sum(minutes[minute].last.offered_tokens_per_second.values()) > 0.95 * 35_000 / 0.85
    if mitigation.cache_ttl_seconds == 120:
        assert minutes[12].last.hit_rate > 0.37


def test_routing_moves_the_load_and_does_not_move_the_outage() -> None:
    minutes = night(lambda minute: controls(routing=DOWNGRADED) if minute >= 9 else BASELINE)
    haiku, sonnet = (minutes[15].last.models[model] for model in ("haiku", "sonnet"))
    assert haiku.sent_tokens_per_second == pytest.approx(7_500, rel=0.03)
    assert haiku.throttled == 0
    assert haiku.sent_tokens_per_second < 0.8 * haiku.capacity_tokens_per_second
    assert sonnet.throttled > 0, "faq and greeting alone are not enough"


def test_undoing_the_levers_at_the_peak_breaches_again_and_after_it_does_not() -> None:
    mitigated = controls(ttl=120, routing=DOWNGRADED)
    too_early = night(lambda minute: mitigated if 9 <= minute < 15 else BASELINE)
    assert too_early[14].recovered
    assert not too_early[18].recovered
    assert too_early[18].throttles > 0
    later = night(lambda minute: mitigated if 9 <= minute < 44 else BASELINE, until_minute=56)
    assert all(later[minute].recovered for minute in range(13, 56))


def test_without_any_capacity_everything_falls_back() -> None:
    none = Controls(30, BASELINE.routing, {"sonnet": 0, "haiku": 0}, BASELINE.tasks_min, BASELINE.tasks_max)
    minute = night(lambda minute: none, until_minute=0)[-2]
    assert minute.total(lambda flow: flow.hits + flow.fallbacks) == pytest.approx(
        minute.total(lambda flow: flow.requests)
    )
    assert minute.last.request_p99_ms > 9_000


def test_no_message_is_lost_or_made_up() -> None:
    minutes = night(until_minute=44)
    flows = [flow for minute in minutes.values() for flow in minute.flows]
    responses = sum(flow.responses for flow in flows)
    window = sum(f.sent_tokens_per_second for f in flows[-1].models.values()) / PARAMETERS.tokens_per_request * 0.07
    assert responses + flows[-1].queue_depth - window == pytest.approx(sum(flow.requests for flow in flows))


def test_equal_seeds_give_equal_nights_and_others_do_not() -> None:
    assert night(seed=3) == night(seed=3)
    assert night(seed=3)[0] != night(seed=4)[0]


def test_a_day_of_traffic() -> None:
    traffic = Traffic(1, 0.15)
    sent = {hour: sum(traffic.offered(MIDNIGHT + timedelta(hours=hour)).values()) * 0.85 for hour in (0, 4, 8, 20, 24)}
    assert sent == pytest.approx({0: 7000, 4: 1400, 8: 5000, 20: 12_500, 24: 7000}, rel=0.02)


def test_a_spike_can_be_stopped() -> None:
    spike = Spike(MIDNIGHT, 4, timedelta(hours=1))
    stopped = spike.stopped(MIDNIGHT + timedelta(minutes=10))
    assert stopped.factor(MIDNIGHT + timedelta(minutes=9)) == 4
    assert stopped.factor(MIDNIGHT + timedelta(minutes=21)) < 1.2
    assert stopped.factor(MIDNIGHT + timedelta(hours=4)) == 1
    assert spike.stopped(MIDNIGHT - timedelta(minutes=1)).factor(MIDNIGHT + timedelta(minutes=1)) == 1


@pytest.mark.parametrize(
    ("now", "release"),
    [
        (datetime(2026, 11, 29, 14, 50, tzinfo=UTC), MIDNIGHT),
        (datetime(2026, 11, 29, 15, 10, tzinfo=UTC), MIDNIGHT),
        (datetime(2026, 12, 3, tzinfo=UTC), MIDNIGHT),
        (datetime(2026, 12, 4, tzinfo=UTC), MIDNIGHT + timedelta(days=7)),
    ],
)
def test_the_nearest_monday_release(now: datetime, release: datetime) -> None:
    assert monday_release(now) == release
