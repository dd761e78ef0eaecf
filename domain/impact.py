"""What a change of the batch window, the routing or the cache TTL should do to latency, hit rate and calls.

Scenario 3's prevention: shown before the change is made. Latency follows the policy's budget table; hit rate follows
the two points of the policy (scenario 1: 15 % at 30 s, 40 % at 120 s), fitted as `share * ttl / (ttl + repeat)`.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from domain.knobs import KnobName, KnobValue
from domain.load import LoadSnapshot, load_on, remaining_tokens_per_second
from domain.policy import Policy

_COUNTED_SHARE = 0.01
"""A P99 does not see a model that answers less than one request in a hundred."""


class Measure(BaseModel):
    """One figure before and after the change."""

    name: str
    unit: str
    before: float
    after: float


class Impact(BaseModel):
    """What the change should do."""

    measures: list[Measure]
    over: list[str]
    """Where it goes over the latency budget, in words; empty: nowhere."""
    notes: list[str]
    """How the figures came about, and what could not be known."""

    @property
    def lines(self) -> list[str]:
        """All of it, a line each."""
        figures = [f"{m.name}: {m.before:,.0f} → {m.after:,.0f} {m.unit}" for m in self.measures]
        return [*figures, *(f"over budget: {line}" for line in self.over), *self.notes]


def impact_of(
    knob: KnobName,
    before: Mapping[KnobName, KnobValue],
    after: KnobValue,
    load: LoadSnapshot | None,
    policy: Policy,
) -> Impact | None:
    """The change of `knob` from its value in `before` (every knob's value in force) to `after`; None: not known."""
    if knob not in (KnobName.CACHE_TTL_SECONDS, KnobName.MODEL_ROUTING, KnobName.BATCH_WINDOW_MS):
        return None
    old, new = _Setting(before), _Setting({**before, knob: after})
    notes: list[str] = []
    if load is None:
        notes.append("the present metrics could not be read: the figures are the budget table's alone")
    offered = load.offered_tokens_per_second if load else {}
    waits = _wait_ms(old, offered, policy), _wait_ms(new, offered, policy)
    measures, over = _latency(old, new, waits, offered, load, policy, notes)
    hit_rates = _hit_rates(old, new, load, policy)
    measures.append(Measure(name="hit rate", unit="%", before=hit_rates[0] * 100, after=hit_rates[1] * 100))
    fills = _fill(waits[0], policy), _fill(waits[1], policy)
    calls = 100 * (1 - hit_rates[1]) / (1 - hit_rates[0]) * fills[0] / fills[1] if hit_rates[0] < 1 else 100.0
    measures.append(Measure(name="calls to Bedrock", unit="% of now", before=100, after=calls))
    if fills[0] != fills[1]:
        notes.append(
            f"calls: batches of {fills[0]:.1f} → {fills[1]:.1f} requests, at scenario 3's "
            f"{policy.latency.requests_per_second:g} requests/s"
        )
    for model, spec in policy.models.items():
        tokens = [load_on(model, offered, one.routing, rate) for one, rate in zip((old, new), hit_rates, strict=True)]
        if round(tokens[0]) == round(tokens[1]):
            continue
        measures.append(Measure(name=f"load on {model}", unit="tokens/s", before=tokens[0], after=tokens[1]))
        measured = load.model(model).capacity_tokens_per_second if load else None
        capacity = measured or remaining_tokens_per_second(spec.baseline_units, spec)
        if tokens[1] > max(capacity, tokens[0]):
            over.append(
                f"{model} would get {tokens[1]:,.0f} tokens/s and has {capacity:,.0f}: calls would be throttled"
            )
    return Impact(measures=measures, over=over, notes=notes)


class _Setting:
    """The three knobs at one moment."""

    def __init__(self, values: Mapping[KnobName, Any]) -> None:
        self.ttl_seconds: int = values[KnobName.CACHE_TTL_SECONDS]
        self.routing: dict[str, str] = values[KnobName.MODEL_ROUTING]
        self.window_ms: int = values[KnobName.BATCH_WINDOW_MS]


def _latency(
    old: _Setting,
    new: _Setting,
    waits: tuple[float, float],
    offered: Mapping[str, float],
    load: LoadSnapshot | None,
    policy: Policy,
    notes: list[str],
) -> tuple[list[Measure], list[str]]:
    """P99 by the budget table, and the measured one moved by as much."""
    budget = policy.latency
    stages = sum(stage.p99_ms for stage in budget.stages)
    before, after = (
        stages + wait + _invocation_ms(one, offered, policy) for one, wait in zip((old, new), waits, strict=True)
    )
    notes.append(
        f"latency: stages {stages:g} ms + queue wait + the slowest model's P99; the batcher's queue wait is taken as "
        + (
            f"what `slo` leaves of {policy.batcher.slo_ms:g} ms, at most the window ({new.window_ms} ms)"
            if policy.batcher.controller == "slo"
            else f"the window ({new.window_ms} ms)"
        )
    )
    measures = [Measure(name="P99 latency by the budget table", unit="ms", before=before, after=after)]
    if load is not None and load.p99_ms is not None:
        now = load.p99_ms
        measures.append(Measure(name="P99 latency, measured", unit="ms", before=now, after=now + after - before))
    over = [
        f"{measure.name} would be {measure.after:,.0f} ms; the budget is under {budget.max_p99_ms:,.0f} ms"
        for measure in measures
        if measure.after >= budget.max_p99_ms and measure.after > measure.before
    ]
    return measures, over


def _wait_ms(setting: _Setting, offered: Mapping[str, float], policy: Policy) -> float:
    """P99 of the queue wait: the window, of which the `slo` controller uses no more than its SLO leaves."""
    if policy.batcher.controller != "slo":
        return setting.window_ms
    spent = sum(stage.p99_ms for stage in policy.latency.stages) + _invocation_ms(setting, offered, policy)
    return min(setting.window_ms, max(0.0, policy.batcher.slo_ms - spent))


def _invocation_ms(setting: _Setting, offered: Mapping[str, float], policy: Policy) -> float:
    """P99 of the slowest model that answers enough to count."""
    total = sum(offered.values())
    used = {
        model
        for model in setting.routing.values()
        if not total or load_on(model, offered, setting.routing, 0) >= _COUNTED_SHARE * total
    }
    return max((policy.latency.invocation_p99_ms.get(model, 0) for model in used), default=0)


def _hit_rates(old: _Setting, new: _Setting, load: LoadSnapshot | None, policy: Policy) -> tuple[float, float]:
    """Now and after the change: the fitted curve, moved to where the measured rate is."""
    throttle = policy.throttle
    points = (
        (policy.cache_ttl_seconds, throttle.hit_rate_at_baseline),
        (throttle.cache_ttl_seconds, throttle.hit_rate_at_mitigation),
    )
    measured = load.hit_rate if load else None
    fitted = [_fitted(one.ttl_seconds, points) for one in (old, new)]
    before = fitted[0] if measured is None else measured
    return before, min(1.0, before * fitted[1] / fitted[0]) if fitted[0] else before


def _fitted(ttl_seconds: float, points: tuple[tuple[float, float], tuple[float, float]]) -> float:
    """`share * ttl / (ttl + repeat)` through both points: ttl / rate is a straight line in ttl."""
    (t1, h1), (t2, h2) = points
    if t1 == t2 or not h1 or not h2:
        return h1
    slope = (t2 / h2 - t1 / h1) / (t2 - t1)
    at = t1 / h1 + slope * (ttl_seconds - t1)
    return ttl_seconds / at if at > 0 else max(h1, h2)


def _fill(wait_ms: float, policy: Policy) -> float:
    """Requests in a batch: the first, and those that come while it waits (scenario 3: 3.1 at 150 ms)."""
    latency = policy.latency
    return min(latency.max_batch, 1 + latency.requests_per_second * wait_ms / 1000)
