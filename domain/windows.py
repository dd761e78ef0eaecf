"""Window controllers: how long the first request of a batch waits for mates, and how many a batch may have (S3).

Pure: they are told what arrived and how long calls took, and are asked for a decision now and then. Times are seconds.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Window:
    """A decision."""

    seconds: float
    """Longest wait of a batch's first request while a slot is free; 0: send at once."""
    size: int
    """A batch that has so many goes at once."""
    why: str


class WindowController(Protocol):
    """Decides for one model and group of intents."""

    def served(self, at: float, size: int, latency_seconds: float) -> None:
        """A call of `size` requests took `latency_seconds` in the backend alone, without any wait before it."""
        ...

    def answered(self, at: float, total_seconds: float, tokens: int) -> None:
        """The first request of a batch was answered, its wait included; the batch had so many tokens."""
        ...

    def look(self, at: float, arrived: int, slots: int) -> Window:
        """The window from now on; `arrived` requests came since the last look, `slots` calls may be in flight."""
        ...


class FixedWindow:
    """Always the same."""

    def __init__(self, seconds: float, size: int) -> None:
        self._window = Window(seconds, size, "fixed")

    def served(self, at: float, size: int, latency_seconds: float) -> None:
        """Changes nothing."""

    def answered(self, at: float, total_seconds: float, tokens: int) -> None:
        """Changes nothing."""

    def look(self, at: float, arrived: int, slots: int) -> Window:
        """The one it was made with."""
        return self._window


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of scenario 3's table."""

    below_tokens_per_second: float
    seconds: float


class TableWindow:
    """The runbook's table: a window by tokens/s, and a small one once the total P99 breaches.

    As written it latches: the total contains the wait that it sets (design check 9). `dwell_seconds` and `hysteresis`
    soften that, and do not cure it.
    """

    def __init__(
        self,
        rows: Sequence[TableRow],
        *,
        breach_p99_seconds: float,
        breach_window_seconds: float,
        size: int,
        fixed_seconds: float,
        memory_seconds: float = 60,
        rate_seconds: float = 10,
        hysteresis: float = 0,
        dwell_seconds: float = 0,
    ) -> None:
        """`fixed_seconds`: the stages of a request outside the batcher, part of its total."""
        self._rows = sorted(rows, key=lambda row: row.below_tokens_per_second)
        self._breach, self._breach_window = breach_p99_seconds, breach_window_seconds
        self._size, self._fixed = size, fixed_seconds
        self._memory, self._rate_seconds = memory_seconds, rate_seconds
        self._hysteresis, self._dwell = hysteresis, dwell_seconds
        self._totals: deque[tuple[float, float]] = deque()
        self._tokens: deque[tuple[float, int]] = deque()
        self._window = Window(self._rows[0].seconds, size, "nothing is known yet")
        self._changed_at = -math.inf

    def served(self, at: float, size: int, latency_seconds: float) -> None:
        """Not looked at: the table goes by totals."""

    def answered(self, at: float, total_seconds: float, tokens: int) -> None:
        """Remembered for a while."""
        self._totals.append((at, total_seconds + self._fixed))
        self._tokens.append((at, tokens))

    def look(self, at: float, arrived: int, slots: int) -> Window:
        """The row that fits now."""
        while self._totals and self._totals[0][0] < at - self._memory:
            self._totals.popleft()
        while self._tokens and self._tokens[0][0] < at - self._rate_seconds:
            self._tokens.popleft()
        totals = sorted(total for _, total in self._totals)
        p99 = totals[min(len(totals) - 1, int(0.99 * len(totals)))] if totals else 0.0
        breached = self._window.seconds == self._breach_window
        limit = self._breach * (1 - self._hysteresis) if breached else self._breach
        rate = sum(tokens for _, tokens in self._tokens) / self._rate_seconds
        if p99 > limit:
            seconds, why = self._breach_window, f"total P99 {p99:.2f} s is over {limit:g} s"
        else:
            row = next((row for row in self._rows if rate < row.below_tokens_per_second), self._rows[-1])
            seconds, why = row.seconds, f"{rate:,.0f} tokens/s"
        if seconds != self._window.seconds and at - self._changed_at >= self._dwell:
            self._window, self._changed_at = Window(seconds, self._size, why), at
        return self._window


_PATHS = 64
"""Sample paths of arrivals on which a window is tried."""
_CALLS_REMEMBERED = 512
_CALLS_NEEDED = 8
"""Before so many calls nothing is known of the backend, and nobody waits."""
_RATE_ARRIVALS = 1000
_RATE_SECONDS = 300.0
"""The rate is that of so many arrivals or so long, whichever is shorter."""
_SHIFT = 4.0
"""Standard deviations by which the last seconds must differ from the rate before: then they are the rate."""
_SHIFT_LOOKS = 3, 12
"""... over so many looks."""
_UNKNOWN = "nothing is known yet"
"""Then nobody waits, and a batch fills only while it waits for a slot."""
_FINE_SECONDS = 0.01
"""A window is sought this finely."""
_WORTH_WAITING = 0.25
"""Fewer mates than so many are not waited for."""
_DEAD_BAND = 0.15
_DEAD_BAND_SECONDS = 0.03
_THINK_LOOKS = 5
"""It thinks at every so manieth look, and when the rate has shifted."""
_AGREEING = 2
"""Thoughts in a row that must ask for another window before it is one; what the SLO needs comes at once."""
_FLAT = 0.005
"""Growth per request, as a share of the call, that does not count."""
_STABLE = 0.9
"""Utilisation of the slots up to which a size counts as keeping up."""


class SloWindow:
    """Waits as long as the share of requests over the SLO allows, and not at all where waiting finds no mate.

    It knows the rate of arrivals and a model of the backend's latency alone, `(a * size + b) * noise` with lognormal
    noise; a window and a size are tried on fixed sample paths of Poisson arrivals. The total, which contains the wait
    that it sets, is never looked at.
    """

    def __init__(self, *, slo_seconds: float, over_share: float, fixed_seconds: float, size: int, most_seconds: float):
        """`over_share` of the requests may take longer than `slo_seconds`; `fixed_seconds` are spent elsewhere."""
        self._slack = slo_seconds - fixed_seconds
        self._over_share = over_share
        self._size = size
        self._most = most_seconds
        self._calls: deque[tuple[int, float]] = deque(maxlen=_CALLS_REMEMBERED)
        self._counts: deque[tuple[float, int]] = deque()
        """Seconds and arrivals of each look that the rate is made of, the newest last."""
        self._looked_at: float | None = None
        self._window = Window(0, size, _UNKNOWN)
        self._asking = self._looks = 0
        random = Random(1)
        self._paths = [[random.expovariate(1) for _ in range(size - 1)] for _ in range(_PATHS)]

    def served(self, at: float, size: int, latency_seconds: float) -> None:
        """Remembered."""
        self._calls.append((size, max(latency_seconds, 1e-6)))

    def answered(self, at: float, total_seconds: float, tokens: int) -> None:
        """Not looked at."""

    def look(self, at: float, arrived: int, slots: int) -> Window:
        """The best window and size for the rate and the latency as they are known now."""
        rate = self._rate(at, arrived)
        self._looks += 1
        if len(self._calls) < _CALLS_NEEDED or rate is None or self._looks < _THINK_LOOKS:
            return self._window
        self._looks = 0
        latency = _Latency(self._calls)
        return self._settle(self._best(rate, latency, slots), rate, latency)

    def _rate(self, at: float, arrived: int) -> float | None:
        if self._looked_at is None:
            self._looked_at = at
            return None
        if (took := at - self._looked_at) > 0:
            self._counts.append((took, arrived))
            self._looked_at = at
        for looks in _SHIFT_LOOKS:
            newest, before = list(self._counts)[-looks:], list(self._counts)[:-looks]
            (seconds, count), (long_seconds, long_count) = _sums(newest), _sums(before)
            expected = long_count / long_seconds * seconds if long_seconds else count
            if abs(count - expected) > _SHIFT * math.sqrt(max(expected, 1)):
                self._counts = deque(newest)
                self._looks = _THINK_LOOKS
        while len(self._counts) > max(_SHIFT_LOOKS):
            first_seconds, first_count = self._counts[0]
            seconds, count = _sums(self._counts)
            if count - first_count < _RATE_ARRIVALS and seconds - first_seconds < _RATE_SECONDS:
                break
            self._counts.popleft()
        seconds, count = _sums(self._counts)
        return count / seconds if seconds else None

    def _best(self, rate: float, latency: "_Latency", slots: int) -> Window:
        """Fewest calls for the share that may be over; the most throughput where the slots do not keep up."""
        sizes = range(1, self._size + 1) if latency.grows else (self._size,)
        if not any(rate * latency.mean(size) <= _STABLE * slots * size for size in sizes):
            size = max(sizes, key=lambda size: size / latency.mean(size))
            return Window(min(self._most, size / rate), size, f"{slots} slots do not keep up with {rate:.1f}/s")
        best, fewest = Window(0, sizes[0], "waiting would find no mate, or break the SLO"), 1.0
        for size in sizes:
            if size > 1 and latency.over(self._slack, size) > self._over_share:
                break
            short, long = 0.0, min(self._most, self._slack)
            mean_size = 1.0
            while long - short > _FINE_SECONDS:
                middle = (short + long) / 2
                tried, over = self._try(rate, middle, size, latency)
                if over <= self._over_share:
                    short, mean_size = middle, tried
                else:
                    long = middle
            if rate * short >= _WORTH_WAITING and 1 / mean_size < fewest - 1e-3:
                best, fewest = Window(short, size, f"{rate:.1f}/s: batches of {mean_size:.1f}"), 1 / mean_size
        return best

    def _try(self, rate: float, seconds: float, size: int, latency: "_Latency") -> tuple[float, float]:
        """Mean size of a batch, and the share of requests over the SLO."""
        requests = over = 0.0
        slack = self._slack
        for path in self._paths:
            arrivals, at = [0.0], 0.0
            for gap in path[: size - 1]:
                at += gap / rate
                if at > seconds:
                    break
                arrivals.append(at)
            count = len(arrivals)
            spare = slack - (arrivals[-1] if count == size else seconds)
            requests += count
            for arrived in arrivals:
                over += latency.over(spare + arrived, count)
        return requests / len(self._paths), over / requests

    def _settle(self, wanted: Window, rate: float, latency: "_Latency") -> Window:
        """The wanted window once it is far enough from the present one and asked for often enough."""
        now = self._window
        if wanted.size == now.size and abs(wanted.seconds - now.seconds) <= max(
            _DEAD_BAND_SECONDS, _DEAD_BAND * now.seconds
        ):
            self._asking = 0
            return now
        self._asking += 1
        size = max(now.size, 1)
        breaks = now.seconds > 0 and self._try(rate, now.seconds, size, latency)[1] > 2 * self._over_share
        if breaks or self._asking >= _AGREEING or now.why is _UNKNOWN:
            self._window, self._asking = wanted, 0
        return self._window


class _Latency:
    """`(a * size + b) * noise`, fitted to calls."""

    def __init__(self, calls: Sequence[tuple[int, float]]) -> None:
        count = len(calls)
        mean_size = sum(size for size, _ in calls) / count
        mean = sum(seconds for _, seconds in calls) / count
        spread = sum((size - mean_size) ** 2 for size, _ in calls)
        # One call's worth of evidence for a flat line, so that few sizes give no wild slope.
        slope = sum((size - mean_size) * (seconds - mean) for size, seconds in calls) / (spread + 1)
        self._slope = max(0.0, slope)
        self._base = max(mean - self._slope * mean_size, 0.05 * mean)
        logs = [math.log(seconds / self.mean(size)) for size, seconds in calls]
        self._centre = sum(logs) / count
        variance = sum((log - self._centre) ** 2 for log in logs) / max(1, count - 1)
        self._scale = math.sqrt(2 * max(variance, 4e-4))

    def mean(self, size: int) -> float:
        """Seconds that a call of `size` takes."""
        return self._slope * size + self._base

    def over(self, seconds: float, size: int) -> float:
        """How likely a call of `size` takes longer than `seconds`."""
        if seconds <= 0:
            return 1.0
        return 0.5 * math.erfc((math.log(seconds / (self._slope * size + self._base)) - self._centre) / self._scale)

    @property
    def grows(self) -> bool:
        """Whether a call takes longer the more requests it has."""
        return self._slope > _FLAT * self._base


def _sums(counts: Sequence[tuple[float, int]] | deque[tuple[float, int]]) -> tuple[float, int]:
    return sum(seconds for seconds, _ in counts), sum(count for _, count in counts)
