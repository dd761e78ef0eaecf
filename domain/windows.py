"""Window controllers: how long the first request of a batch waits for mates, and how many a batch may have (S3).

Pure: they are told what arrived and how long calls took, and are asked for a decision now and then. Times are seconds.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Window:
    """A decision."""

    seconds: float
    """Longest wait of a batch's first request while a slot is free; 0: send at once."""
    size: int
    """A batch that has so many goes at once."""
    why: str
    capped: bool = False
    """By the knob, which leaves it shorter than it was decided."""


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


_CALLS_REMEMBERED = 2048
_CALLS_OF_A_SIZE = 128
"""So many of each size are remembered besides, for an hour: growth is not forgotten while one size is sent."""
_SIZES_SECONDS = 3600.0
_CALLS_NEEDED = 8
"""Before so many calls nothing is known of the backend, and nobody waits."""
_SLOWED_CALLS = 12
"""When the last so many took longer, or shorter, than the model by `_SHIFT` deviations, they alone are the model."""
_RATE_ARRIVALS = 1000
_RATE_SECONDS = 300.0
"""The rate is that of so many arrivals or so long, whichever is shorter."""
_SHIFT = 5.0
"""Standard deviations by which the last seconds must differ from the rate before: then they are the rate. It is asked
every second: at 4, chance alone is a shift every few hours."""
_SHIFT_LOOKS = 3, 12
"""... over so many looks."""
_UNKNOWN = "nothing is known yet"
"""Then nobody waits, and a batch fills only while it waits for a slot."""
_STEP_SECONDS = 0.01
"""A window is sought this finely."""
_WORTH_WAITING = 0.25
"""Fewer mates than so many are not waited for."""
_DEAD_BAND = 0.02
"""A window that saves a smaller share of the calls is not changed to ..."""
_TOLERATED = 1.25
"""... unless the present one lets so many times the share that is allowed go over the SLO."""
_BROKEN = 2.0
"""With so many times the share it changes at once, and not only when asked again."""
_THINK_LOOKS = 5
"""It thinks at every so manieth look, and when something has shifted, ..."""
_CALLS_LEARNING = 100
"""... and at each until it knows so many calls."""
_AGREEING = 2
"""Thoughts in a row that must ask for another window before it is one."""
_FLAT = 0.005
"""Growth per request, as a share of the call, that does not count."""
_EVIDENT = 3.0
"""Standard errors by which it must differ from nothing."""
_UNSURE = 5.0
"""So many calls' worth of doubt about the noise."""
_STABLE = 0.9
"""Utilisation of the slots up to which a size counts as keeping up."""


class SloWindow:
    """Waits as long as the share of requests over the SLO allows, and not at all where waiting finds no mate.

    It knows the rate of arrivals and a model of the backend's latency alone, `(a * size + b) * noise` with lognormal
    noise, and reckons for Poisson arrivals what each window and size would bring. The total, which contains the wait
    that it sets, is never looked at.
    """

    def __init__(self, *, slo_seconds: float, over_share: float, fixed_seconds: float, size: int, most_seconds: float):
        """`over_share` of the requests may take longer than `slo_seconds`; `fixed_seconds` are spent elsewhere."""
        self._slack = slo_seconds - fixed_seconds
        self._over_share = over_share
        self._size = size
        self._steps = int(max(0.0, min(most_seconds, self._slack)) / _STEP_SECONDS)
        self._most = most_seconds
        self._calls: deque[tuple[int, float]] = deque(maxlen=_CALLS_REMEMBERED)
        """Sizes, and logarithms of seconds."""
        self._by_size: dict[int, deque[tuple[float, float]]] = {}
        """Of each size: when, and the logarithm of the seconds."""
        self._latency: _Latency | None = None
        self._counts: deque[tuple[float, int]] = deque()
        """Seconds and arrivals of each look that the rate is made of, the newest last."""
        self._looked_at: float | None = None
        self._window = Window(0, size, _UNKNOWN)
        self._asking = self._looks = 0

    def served(self, at: float, size: int, latency_seconds: float) -> None:
        """Remembered."""
        log = math.log(max(latency_seconds, 1e-6))
        self._calls.append((size, log))
        self._by_size.setdefault(size, deque(maxlen=_CALLS_OF_A_SIZE)).append((at, log))

    def answered(self, at: float, total_seconds: float, tokens: int) -> None:
        """Not looked at."""

    def look(self, at: float, arrived: int, slots: int) -> Window:
        """The best window and size for the rate and the latency as they are known now."""
        rate = self._rate(at, arrived)
        self._notice_shift()
        self._looks += 1
        learning = sum(map(len, self._by_size.values())) < _CALLS_LEARNING
        if len(self._calls) < _CALLS_NEEDED or not rate or not (learning or self._looks >= _THINK_LOOKS):
            return self._window
        self._looks = 0
        for calls in self._by_size.values():
            while calls and calls[0][0] < at - _SIZES_SECONDS:
                calls.popleft()
        self._latency = self._fit()
        return self._settle(rate, self._latency, slots)

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

    def _notice_shift(self) -> None:
        if self._latency is None or len(self._calls) < 2 * _SLOWED_CALLS:
            return
        newest = list(self._calls)[-_SLOWED_CALLS:]
        if abs(self._latency.shift(newest)[1]) <= _SHIFT:
            return
        shift, deviations = self._fit().shift(newest)
        if abs(deviations) > _SHIFT:  # and it is not that other sizes are sent now
            self._calls.clear()
            self._calls.extend(newest)
            for size, calls in self._by_size.items():  # all sizes have shifted, as far as is known
                self._by_size[size] = deque(((at, log + shift) for at, log in calls), _CALLS_OF_A_SIZE)
            self._looks = _THINK_LOOKS

    def _fit(self) -> "_Latency":
        return _Latency(self._calls, {size: [log for _, log in calls] for size, calls in self._by_size.items()})

    def _settle(self, rate: float, latency: "_Latency", slots: int) -> Window:
        """The best window, or the present one where that is good enough."""
        now = self._window
        tried = range(1, self._size + 1) if latency.grows else (self._size,)
        sizes = [size for size in tried if rate * latency.mean(size) <= _STABLE * slots * size]
        if not sizes:
            size = max(range(1, self._size + 1), key=lambda size: size / latency.mean(size))
            best = Window(min(self._most, size / rate), size, f"{slots} slots do not keep up with {rate:.1f}/s")
            keep = now.size == size and best.seconds * 0.5 <= now.seconds <= best.seconds * 2
            return self._decide(best, keep, at_once=True)
        best, fewest = Window(0, sizes[0], "waiting would find no mate, or break the SLO"), 1.0
        for size in sizes:
            if latency.over(self._slack, size) > self._over_share:
                break
            for step, calls, over in self._outcomes(rate, size, latency, self._steps):
                if over > self._over_share:
                    break
                seconds = step * _STEP_SECONDS
                if calls < fewest and rate * seconds >= _WORTH_WAITING:
                    best, fewest = Window(seconds, size, f"{rate:.1f}/s: batches of {1 / calls:.1f}"), calls
        calls, share = 1.0, latency.over(self._slack, now.size)
        if now.seconds > 0:
            _, calls, share = list(self._outcomes(rate, now.size, latency, max(1, round(now.seconds / _STEP_SECONDS))))[
                -1
            ]
        waits_for_nobody = now.seconds > 0 and rate * now.seconds < _WORTH_WAITING
        good = now.size in sizes and share <= _TOLERATED * self._over_share and fewest > (1 - _DEAD_BAND) * calls
        hopeless = best.seconds == now.seconds == 0 and best.size == now.size
        return self._decide(best, (good and not waits_for_nobody) or hopeless, share > _BROKEN * self._over_share)

    def _decide(self, best: Window, keep: bool, at_once: bool) -> Window:
        known = self._window.why is not _UNKNOWN
        self._asking = 0 if keep and known else self._asking + 1
        if self._asking >= _AGREEING or (self._asking and (at_once or not known)):
            self._window, self._asking = best, 0
        return self._window

    def _outcomes(self, rate: float, size: int, latency: "_Latency", steps: int) -> Iterator[tuple[int, float, float]]:
        """For each window of so many steps: calls for each request, and the share of requests over the SLO.

        The first request of a batch waits for all of the window, or until the batch is full; the others come at any
        moment of that time, and one that fills the batch does not wait.
        """
        if size == 1:
            yield 0, 1.0, latency.over(self._slack, 1)
            return
        overs = [[latency.over(self._slack, count)] for count in range(1, size + 1)]
        sums = [0.0] * size
        """Of `overs` over the steps so far, by the trapezoid rule."""
        full_before, full_over = 0.0, 0.0
        grows = latency.grows
        for step in range(1, steps + 1):
            left = self._slack - step * _STEP_SECONDS
            mates = rate * step * _STEP_SECONDS
            chance, unfilled, requests, over = math.exp(-mates), 0.0, 0.0, 0.0
            flat = latency.over(left, size)
            for count in range(1, size + 1):
                known = overs[count - 1]
                known.append(latency.over(left, count) if grows else flat)
                sums[count - 1] += (known[-2] + known[-1]) / 2
                if count < size:
                    requests += chance * count
                    over += chance * (known[-1] + (count - 1) * sums[count - 1] / step)
                    unfilled += chance
                    chance *= mates / count
            filled = 1 - unfilled
            known = overs[-1]
            full_over += (filled - full_before) * (known[-1] + (size - 2) * sums[-1] / step + known[0])
            full_before = filled
            requests += filled * size
            yield step, 1 / requests, (over + full_over) / requests


class _Latency:
    """`(a * size + b) * noise`: growth by what is known of each size, level and noise by the newest calls."""

    def __init__(self, calls: Sequence[tuple[int, float]], by_size: Mapping[int, Sequence[float]]) -> None:
        """Both with the logarithms of seconds."""
        known = [(size, math.exp(log)) for size, logs in by_size.items() for log in logs] or [(1, 1.0)]
        count = len(known)
        mean_size = sum(size for size, _ in known) / count
        mean = sum(seconds for _, seconds in known) / count
        spread = sum((size - mean_size) ** 2 for size, _ in known) or 1.0
        slope = sum((size - mean_size) * (seconds - mean) for size, seconds in known) / spread
        varies = sum((seconds - mean - slope * (size - mean_size)) ** 2 for size, seconds in known) / max(1, count - 2)
        doubt = math.sqrt(varies / spread)
        # The least that it may well be: a size that was given up wrongly is tried again, and then more is known of it.
        self._slope = slope - doubt if slope > max(_FLAT * mean, _EVIDENT * doubt) else 0.0
        self._base = max(mean - self._slope * mean_size, 0.05 * mean)
        self._centre = 0.0
        level = {size: math.log(self.mean(size)) for size in {size for size, _ in calls}}
        logs = [log - level[size] for size, log in calls]
        self._count = len(logs)
        self._centre = sum(logs) / self._count
        variance = sum((log - self._centre) ** 2 for log in logs) / max(1, self._count - 1)
        # A few calls may have shown less noise than there is: as much more as Student's distribution has in its tail.
        self._scale = math.sqrt(2 * max(variance, 4e-4) * (1 + _UNSURE / self._count))

    def mean(self, size: int) -> float:
        """Seconds that a call of `size` usually takes."""
        return (self._slope * size + self._base) * math.exp(self._centre)

    def over(self, seconds: float, size: int) -> float:
        """How likely a call of `size` takes longer than `seconds`."""
        if seconds <= 0:
            return 1.0
        return 0.5 * math.erfc((math.log(seconds / (self._slope * size + self._base)) - self._centre) / self._scale)

    def shift(self, calls: Sequence[tuple[int, float]]) -> tuple[float, float]:
        """The logarithm of how many times as slow these calls are as the model, and its standard deviations."""
        shift = sum(log - math.log(self.mean(size)) for size, log in calls) / len(calls)
        return shift, shift * math.sqrt(2 / (1 / len(calls) + 1 / self._count)) / self._scale

    @property
    def grows(self) -> bool:
        """Whether a call takes longer the more requests it has."""
        return self._slope > 0


def _sums(counts: Sequence[tuple[float, int]] | deque[tuple[float, int]]) -> tuple[float, int]:
    return sum(seconds for seconds, _ in counts), sum(count for _, count in counts)
