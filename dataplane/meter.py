"""What the batcher counts: plain counters for each request, appends for each batch, and readers that take differences.

Everything grows from 0 at the start. Times are kept in buckets 4 % wide, so that memory is bounded.
"""

import logging
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TypeVar

from dataplane.sending import Backend, Reply, Target, Throttled
from domain.batching import Answer, Refusal, Request, RequestRefused
from domain.windows import Window

K = TypeVar("K")

_MOST_WAITS = 10_000
"""Waits kept one by one before they are counted into buckets."""
_STEPS_PER_E = 25
_CHANGES_KEPT = 50

_log = logging.getLogger(__name__)


def bucket(value: float) -> float:
    """The middle of the value's bucket; 0 for what is under 0.1."""
    if value < 0.1:
        return 0.0
    step = round(math.log(value) * _STEPS_PER_E)
    middle = _middles.get(step)
    if middle is None:
        middle = _middles[step] = float(f"{math.exp(step / _STEPS_PER_E):.3g}")
    return middle


_middles: dict[int, float] = {}


@dataclass(frozen=True, slots=True)
class WindowChange:
    """A lane's window from a moment on."""

    at: float
    """Seconds since 1970."""
    model: str
    group: str
    window_ms: float
    size: int
    why: str


@dataclass(slots=True)
class Totals:
    """What has happened since the start, or between two readings."""

    waits_ms: dict[str, Counter[float]] = field(default_factory=lambda: defaultdict(Counter))
    """In the queue, by model."""
    sizes: dict[str, Counter[float]] = field(default_factory=lambda: defaultdict(Counter))
    """Requests of each batch, by model."""
    latency_ms: dict[tuple[str, str], Counter[float]] = field(default_factory=lambda: defaultdict(Counter))
    """Of batches from slot to answer, by model and intent."""
    tokens: dict[tuple[str, str], Counter[float]] = field(default_factory=lambda: defaultdict(Counter))
    """Of each answer, by intent and `input` or `output`."""
    cache: dict[str, Counter[float]] = field(default_factory=lambda: defaultdict(Counter))
    """By intent: 100 for a hit, 0 for a miss."""
    calls: Counter[str] = field(default_factory=Counter)
    """To Bedrock, by model, refused ones included."""
    throttles: Counter[str] = field(default_factory=Counter)
    coalesced: Counter[str] = field(default_factory=Counter)
    """By intent."""
    shed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Requests without an answer, by intent and reason."""
    window_changes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By model and who decided: `controller`, or `knob` where that caps it."""

    def since(self, before: "Totals") -> "Totals":
        """The difference of two readings."""
        nothing: Counter[float] = Counter()

        def newer(now: dict[K, Counter[float]], then: dict[K, Counter[float]]) -> dict[K, Counter[float]]:
            left = {key: counts - then.get(key, nothing) for key, counts in now.items()}
            return {key: counts for key, counts in left.items() if counts}

        return Totals(
            newer(self.waits_ms, before.waits_ms),
            newer(self.sizes, before.sizes),
            newer(self.latency_ms, before.latency_ms),
            newer(self.tokens, before.tokens),
            newer(self.cache, before.cache),
            self.calls - before.calls,
            self.throttles - before.throttles,
            self.coalesced - before.coalesced,
            self.shed - before.shed,
            self.window_changes - before.window_changes,
        )


class BatchMeter:
    """The core's `Meter`, and what stands around the core. One event loop."""

    def __init__(self) -> None:
        self._totals = Totals()
        self._tokens: dict[str, tuple[Counter[float], Counter[float]]] = {}
        """By intent, those of the totals: input, output."""
        self._waits: defaultdict[str, list[float]] = defaultdict(list)
        self.depth: Callable[[], int] = lambda: 0
        """Requests that wait for a call now."""
        self._deepest = 0
        self.windows: dict[tuple[str, str], Window] = {}
        """In force, by model and group."""
        self.changes: deque[WindowChange] = deque(maxlen=_CHANGES_KEPT)
        """The newest, the last one last."""
        self.not_packed: set[str] = set()
        """Intents that have lost too many packed answers."""

    # ------------------------------------------------------------ told

    def sent(self, model: str, group: str, waits: Sequence[float]) -> None:
        """A batch left."""
        kept = self._waits[model]
        kept.extend(waits)
        self._totals.sizes[model][len(waits)] += 1
        depth = self.depth()
        if depth > self._deepest:
            self._deepest = depth
        if len(kept) >= _MOST_WAITS:
            self._settle(model)

    def served(
        self,
        model: str,
        group: str,
        requests: Sequence[Request],
        results: Sequence[Answer | RequestRefused],
        seconds: float,
    ) -> None:
        """A batch came back."""
        totals = self._totals
        took = bucket(seconds * 1000)
        intents = {request.intent for request in requests} if len(requests) > 1 else (requests[0].intent,)
        for intent in intents:
            totals.latency_ms[model, intent][took] += 1
        for request, result in zip(requests, results, strict=True):
            intent = request.intent
            if isinstance(result, Answer):
                given, said = self._tokens.get(intent) or self._new_tokens(intent)
                given[result.input_tokens] += 1
                said[result.output_tokens] += 1
            else:
                totals.shed[intent, result.refusal] += 1

    def _new_tokens(self, intent: str) -> tuple[Counter[float], Counter[float]]:
        tokens = self._totals.tokens
        self._tokens[intent] = pair = tokens[intent, "input"], tokens[intent, "output"]
        return pair

    def coalesced(self, intent: str) -> None:
        """A request joined an equal one."""
        self._totals.coalesced[intent] += 1

    def refused(self, intent: str, refusal: Refusal) -> None:
        """A request was refused before it left."""
        self._totals.shed[intent, refusal] += 1

    def window(self, model: str, group: str, window: Window) -> None:
        """A lane's window changed."""
        self.windows[model, group] = window
        self._totals.window_changes[model, "knob" if window.capped else "controller"] += 1
        self.changes.append(
            WindowChange(time.time(), model, group, round(window.seconds * 1000, 1), window.size, window.why)
        )
        _log.info(
            "window of %s %s: %.0f ms, up to %d: %s", model, group, window.seconds * 1000, window.size, window.why
        )

    def looked_up(self, intent: str, hit: bool) -> None:
        """The response cache was asked."""
        self._totals.cache[intent][100.0 if hit else 0.0] += 1

    def packing(self, intent: str, may_pack: bool) -> None:
        """An intent is no longer packed, or is again."""
        (self.not_packed.discard if may_pack else self.not_packed.add)(intent)

    def watched(self, backend: Backend) -> Backend:
        """The same backend, its calls counted."""
        return _Watched(backend, self._totals)

    # ------------------------------------------------------------ read

    def totals(self) -> Totals:
        """Everything up to now, a copy."""
        for model in self._waits:
            self._settle(model)
        return deepcopy(self._totals)

    def take_deepest(self) -> int:
        """The most requests that waited for a call since this was last asked."""
        deepest, self._deepest = max(self._deepest, self.depth()), 0
        return deepest

    def _settle(self, model: str) -> None:
        waits = self._waits[model]
        self._totals.waits_ms[model].update(bucket(seconds * 1000) for seconds in waits)
        waits.clear()


class _Watched:
    def __init__(self, backend: Backend, totals: Totals) -> None:
        self._backend = backend
        self._totals = totals

    async def call(self, target: Target, system: str, prompt: str, max_tokens: int, within_seconds: float) -> Reply:
        self._totals.calls[target.model] += 1
        try:
            return await self._backend.call(target, system, prompt, max_tokens, within_seconds)
        except Throttled:
            self._totals.throttles[target.model] += 1
            raise
