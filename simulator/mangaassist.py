"""MangaAssist as a fluid model: pure, deterministic, in business time.

It reacts to the knobs, the capacity and the traffic, and to nothing else; it knows nothing of incidents. The
equations and what they leave out stand in `docs/simulator.md`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Parameters:
    """What MangaAssist is like. Latencies are scenario 3's budget; the rest is set so that scenario 1's table holds."""

    tokens_per_request: float = 550
    repeatable_share: float = 0.9
    """Share of requests that somebody else asks, too."""
    repeat_seconds: float = 150
    """How long until such a request comes again, on average. With the share: 15 % hits at 30 s, 40 % at 120 s."""
    hit_rate_lag_seconds: float = 60
    """Time constant with which the cache follows its TTL."""
    fixed_stages_ms: float = 360
    """Gateway 50, intent classification 30, retrieval 200, formatting and delivery 80."""
    window_ms: float = 140
    """P99 wait for a batch to fill, where nothing else is waited for."""
    gateway_limit_ms: float = 10_000
    gateway_margin_ms: float = 200
    """A request gives up waiting when it could not be answered this long before the gateway's limit."""
    invocation_p99_ms: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"sonnet": (2000, 2100), "haiku": (300, 350)}
    )
    """By model: P99 of an invocation when idle, and when its capacity is used up; straight line between."""
    resend_share: float = 0.1
    """Share of users who send their message again after a fallback answer, ..."""
    resend_lag_seconds: float = 5
    """... and the time constant with which they do."""
    requests_per_second_per_task: float = 1.0
    """Load that the service's scaling policy keeps on one task."""
    scale_out_tasks: int | None = None
    """Tasks added when they are short; None: they are doubled."""
    scale_out_cooldown_seconds: float = 180
    scale_in_cooldown_seconds: float = 300
    cpu_percent: float = 28
    """CPU of a task with one request/s, which is its load on scenario 3's evening."""


@dataclass(frozen=True, slots=True)
class Controls:
    """What the running system obeys at one moment."""

    cache_ttl_seconds: float
    routing: Mapping[str, str]
    """Every intent's model."""
    capacity_tokens_per_second: Mapping[str, float]
    """By model: routed provisioned units in service plus the on-demand quota."""
    tasks_min: int
    tasks_max: int


@dataclass(frozen=True, slots=True)
class State:
    """What MangaAssist carries from one step to the next."""

    hit_rate: float
    tasks_desired: int
    scaling_cooldown_seconds: float = 0
    queues: Mapping[str, float] = field(default_factory=dict)
    """Requests that wait for Bedrock, by model."""
    resends_per_second: Mapping[str, float] = field(default_factory=dict)
    """Requests that users send again, by model."""


@dataclass(frozen=True, slots=True)
class ModelFlow:
    """What one model saw during a step."""

    sent_tokens_per_second: float
    """Asked of it after cache and routing, resends included."""
    capacity_tokens_per_second: float
    answered: float
    """Calls answered."""
    throttled: float
    """Calls refused: the requests that found no capacity when they came, each counted once."""
    fallbacks: float
    """Requests that gave up waiting."""
    waiting: float
    """Requests that wait, at the step's end."""
    invocation_p99_ms: float
    request_p99_ms: float


@dataclass(frozen=True, slots=True)
class Flow:
    """What happened during a step."""

    seconds: float
    offered_tokens_per_second: Mapping[str, float]
    """By intent."""
    models: Mapping[str, ModelFlow]
    requests: float
    """Messages, resends included: each ends as a hit, an answer or a fallback."""
    hits: float
    hit_rate: float

    @property
    def fallbacks(self) -> float:
        """Requests answered with the fallback text."""
        return sum(flow.fallbacks for flow in self.models.values())

    @property
    def responses(self) -> float:
        """Messages answered in whichever way."""
        return self.hits + sum(flow.answered + flow.fallbacks for flow in self.models.values())

    @property
    def queue_depth(self) -> float:
        """Requests that wait for Bedrock, at the step's end."""
        return sum(flow.waiting for flow in self.models.values())

    @property
    def request_p99_ms(self) -> float:
        """P99 from message to answer: that of the slowest model that answers at least one request in a hundred."""
        sent = sum(flow.sent_tokens_per_second for flow in self.models.values())
        slow = [f.request_p99_ms for f in self.models.values() if f.sent_tokens_per_second >= 0.01 * sent > 0]
        return max(slow, default=0)


def settled_hit_rate(ttl_seconds: float, parameters: Parameters) -> float:
    """The hit rate that a TTL leads to: a repeatable request is a hit when it comes again within the TTL."""
    return parameters.repeatable_share * ttl_seconds / (ttl_seconds + parameters.repeat_seconds)


def at_rest(controls: Controls, parameters: Parameters) -> State:
    """The state after a long calm under `controls`."""
    return State(hit_rate=settled_hit_rate(controls.cache_ttl_seconds, parameters), tasks_desired=controls.tasks_min)


def step(
    state: State, offered: Mapping[str, float], controls: Controls, parameters: Parameters, seconds: float
) -> tuple[State, Flow]:
    """`seconds` of business time (at most about 10) under constant `offered` load (tokens/s per intent)."""
    target = settled_hit_rate(controls.cache_ttl_seconds, parameters)
    hit_rate = target + (state.hit_rate - target) * math.exp(-seconds / parameters.hit_rate_lag_seconds)

    fresh = dict.fromkeys(controls.capacity_tokens_per_second, 0.0)
    for intent, tokens in offered.items():
        fresh[controls.routing[intent]] += tokens * (1 - hit_rate) / parameters.tokens_per_request

    resending = 1 - math.exp(-seconds / parameters.resend_lag_seconds)
    flows: dict[str, ModelFlow] = {}
    queues: dict[str, float] = {}
    resends: dict[str, float] = {}
    for model, requests in fresh.items():
        resent = state.resends_per_second.get(model, 0.0)
        capacity = controls.capacity_tokens_per_second[model]
        queue = state.queues.get(model, 0.0)
        flows[model], queues[model] = _serve(model, requests + resent, capacity, queue, parameters, seconds)
        given_up = flows[model].fallbacks / seconds
        resends[model] = resent + (parameters.resend_share * given_up - resent) * resending

    asked = sum(offered.values()) / parameters.tokens_per_request
    total = asked + sum(state.resends_per_second.values())
    flow = Flow(
        seconds=seconds,
        offered_tokens_per_second=dict(offered),
        models=flows,
        requests=total * seconds,
        hits=asked * hit_rate * seconds,
        hit_rate=asked * hit_rate / total if total else hit_rate,
    )
    after = replace(state, hit_rate=hit_rate, queues=queues, resends_per_second=resends)
    return _scale(after, total, controls, parameters, seconds), flow


def _serve(
    model: str, requests_per_second: float, capacity: float, queue: float, parameters: Parameters, seconds: float
) -> tuple[ModelFlow, float]:
    """One model's step, and the requests that wait at its end because there was no capacity."""
    possible = capacity / parameters.tokens_per_request
    idle_ms, busy_ms = parameters.invocation_p99_ms[model]
    used = min(1.0, requests_per_second / possible) if possible else 1.0
    invocation_ms = idle_ms + (busy_ms - idle_ms) * (1.0 if queue else used)
    patience_seconds = (
        parameters.gateway_limit_ms - parameters.gateway_margin_ms - parameters.fixed_stages_ms - busy_ms
    ) / 1000
    patience_seconds = max(0.0, patience_seconds)

    there = queue + requests_per_second * seconds
    answered = min(there, possible * seconds)
    left = there - answered
    queue = min(left, possible * patience_seconds)
    wait_ms = max(parameters.window_ms, queue / possible * 1000) if possible else patience_seconds * 1000
    flow = ModelFlow(
        sent_tokens_per_second=requests_per_second * parameters.tokens_per_request,
        capacity_tokens_per_second=capacity,
        answered=answered,
        throttled=max(0.0, requests_per_second - possible) * seconds,
        fallbacks=left - queue,
        waiting=queue + requests_per_second * parameters.window_ms / 2000,
        invocation_p99_ms=invocation_ms,
        request_p99_ms=parameters.fixed_stages_ms + wait_ms + invocation_ms,
    )
    return flow, queue


def _scale(
    state: State, requests_per_second: float, controls: Controls, parameters: Parameters, seconds: float
) -> State:
    """The service's scaling policy: more when the tasks are over their load, a tenth less when well under it."""
    cooldown = max(0.0, state.scaling_cooldown_seconds - seconds)
    wanted = math.ceil(requests_per_second / parameters.requests_per_second_per_task)
    wanted = min(max(wanted, controls.tasks_min), controls.tasks_max)
    desired = state.tasks_desired
    if cooldown == 0 and wanted > 1.1 * desired:
        more = desired if parameters.scale_out_tasks is None else parameters.scale_out_tasks
        desired, cooldown = min(desired + more, controls.tasks_max), parameters.scale_out_cooldown_seconds
    elif cooldown == 0 and wanted < 0.9 * desired:
        desired, cooldown = max(wanted, math.floor(0.9 * desired)), parameters.scale_in_cooldown_seconds
    return replace(state, tasks_desired=desired, scaling_cooldown_seconds=cooldown)
