"""The stages of an answer's way and the systems in them: how long they take, and how one is made slow (scenario 3).

Stages and their budgets are the policy's; a system's time is part of its stage's.
"""

import math
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from domain.metrics import CATALOGUE, MetricName
from domain.policy import LatencyPolicy, Signal

MOST_TIMES = 100_000.0
_MEDIAN = 0.8
_DEVIATION = -math.log(_MEDIAN) / 2.326
"""A stage's time is lognormal: its budget is its P99, and the median is so much of it."""


@dataclass(frozen=True, slots=True)
class System:
    """What a system usually shows and takes."""

    shows: float
    """Its metric, in the metric's unit."""
    stage: str
    p99_ms: float
    """Its part of the stage's budget."""


SYSTEMS = {
    "redis": System(300, "intent-classification", 10),
    "redis_connections": System(200, "intent-classification", 5),
    "opensearch": System(100, "retrieval", 150),
    "dynamodb": System(6, "delivery", 24),
    "api_gateway": System(40, "gateway", 40),
}
"""By their names in the policy's `latency.systems`. Assumed; `redis_connections` is the wait for one."""


class Stages:
    """Every stage but the batcher's. Thread-safe."""

    def __init__(self, policy: LatencyPolicy) -> None:
        self._policy = policy
        self._lock = threading.Lock()
        self._times: dict[str, float] = {}
        """How many times as slow as usual, by system, or by stage: its own part then."""
        self.budgets_ms = {stage.name: stage.p99_ms for stage in policy.stages}

    @property
    def times(self) -> dict[str, float]:
        """How many times as slow as usual everything is that can be made slow."""
        with self._lock:
            return {name: self._times.get(name, 1.0) for name in (*SYSTEMS, *self.budgets_ms)}

    def slow(self, changes: dict[str, float]) -> None:
        """From now on.

        Raises:
            ValueError: a name or a number that is not allowed; nothing is changed.
        """
        for name, times in changes.items():
            if name not in self.times:
                raise ValueError(f"{name!r}: there is no such system or stage; there are {', '.join(self.times)}")
            if isinstance(times, bool) or not isinstance(times, (int, float)) or not 0 < times <= MOST_TIMES:
                raise ValueError(f"{name}: {times!r}: a number over 0 and up to {MOST_TIMES:g} is allowed")
        with self._lock:
            self._times |= changes

    def heal(self) -> None:
        """Everything is as usual."""
        with self._lock:
            self._times = {}

    def p99_ms(self, stage: str) -> float:
        """Of a stage as it is now."""
        times, inside = self.times, {name: one for name, one in SYSTEMS.items() if one.stage == stage}
        own = max(0.0, self.budgets_ms[stage] - sum(one.p99_ms for one in inside.values()))
        return own * times[stage] + sum(one.p99_ms * times[name] for name, one in inside.items())

    def draw_ms(self, stage: str, chance: random.Random) -> float:
        """How long one request spends there."""
        return self.p99_ms(stage) * _MEDIAN * math.exp(chance.gauss(0, _DEVIATION))

    def figures(self) -> Iterator[tuple[MetricName, dict[str, str], float]]:
        """What the systems' own metrics show."""
        times = self.times
        for name, system in SYSTEMS.items():
            signal: Signal = getattr(self._policy.systems, name)
            dimensions = dict(zip(CATALOGUE[signal.metric].dimensions, signal.dimensions, strict=True))
            yield signal.metric, dimensions, system.shows * times[name]
