"""What batchers are compared on: arrivals, a backend of given latency, and the fewest calls that could have been made.

Everything is drawn from a seed, and the same for every batcher: the arrivals, and a call's latency, which goes with the
first request of its batch.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

FIXED_SECONDS = 0.36
"""The stages of a request outside the batcher (S3)."""
SLO_SECONDS = 2.9
MEDIAN_SECONDS, P99_SECONDS = 1.5, 2.1
"""Of one call (S3: 2.1 s; the median is a choice)."""
SIGMA = math.log(P99_SECONDS / MEDIAN_SECONDS) / 2.326
SIZE = 8
TOKENS = 500
"""Of one request: 5/s is off-peak by the runbook's table, 12/s normal, 60 and 200/s peak."""


@dataclass(frozen=True)
class Trouble:
    """From `begin` to `end` calls take `slower` times as long, or are throttled beyond `calls_per_second`."""

    begin: float
    end: float
    slower: float = 1.0
    calls_per_second: float = math.inf


@dataclass(frozen=True)
class World:
    """Arrivals and a backend."""

    name: str
    phases: tuple[tuple[float, float], ...]
    """Requests a second, and for how many seconds."""
    growth: float = 0.0
    """Of a call's latency per request after the first."""
    slots: int = 64
    trouble: Trouble | None = None

    def arrivals(self, seed: int) -> list[float]:
        """When each request comes: Poisson."""
        random = Random(f"{self.name} {seed}")
        found, begin = [], 0.0
        for rate, seconds in self.phases:
            at = begin + random.expovariate(rate)
            while at < begin + seconds:
                found.append(at)
                at += random.expovariate(rate)
            begin += seconds
        return found


class Refused(Exception):
    """The backend takes no more calls now."""


class Backend:
    """Takes calls and counts them."""

    def __init__(self, world: World, seed: int, requests: int) -> None:
        random = Random(f"latency {seed}")
        self._world = world
        self._noise = [MEDIAN_SECONDS * math.exp(SIGMA * random.gauss(0, 1)) for _ in range(requests)]
        self._allowed, self._allowed_at = 1.0, 0.0
        self.calls = 0
        self.carried = 0

    async def call(self, first: int, size: int) -> None:
        """One call for `size` requests, of which `first` is the first.

        Raises:
            Refused: throttled.
        """
        now = asyncio.get_running_loop().time()
        trouble, slower = self._world.trouble, 1.0
        if trouble is not None and trouble.begin <= now < trouble.end:
            slower = trouble.slower
            self._allowed = min(1.0, self._allowed + (now - self._allowed_at) * trouble.calls_per_second)
            self._allowed_at = now
            if self._allowed < 1:
                await asyncio.sleep(0.02)
                raise Refused
            if trouble.calls_per_second < math.inf:
                self._allowed -= 1
        self.calls += 1
        self.carried += size
        await asyncio.sleep(self._noise[first] * slower * (1 + self._world.growth * (size - 1)))


def fewest_calls(world: World, arrivals: Sequence[float], over_share: float = 0.01) -> float:
    """A number of calls below which nobody can go who serves in order of arrival and keeps the SLO.

    Every arrival is known beforehand, the latencies are not. A batch is a run of neighbours, and leaves with its last
    one. For a price of a request over the SLO, dynamic programming finds the cheapest split of the whole trace, calls
    and prices together; what the split costs, less the price of the share that is allowed, is no more than the calls of
    any split that keeps the share (a Lagrangian bound), at whatever price. The best of some prices is returned. Slots
    are not held against it, so it can only be too low.
    """
    slack = SLO_SECONDS - FIXED_SECONDS
    largest = [
        [(math.log(MEDIAN_SECONDS * (1 + world.growth * (size - 1)))), 1 / (SIGMA * math.sqrt(2))]
        for size in range(1, SIZE + 1)
    ]

    def over(wait: float, size: int) -> float:
        left = slack - wait
        centre, scale = largest[size - 1]
        return 0.5 * math.erfc((math.log(left) - centre) * scale) if left > 0 else 1.0

    # prices[i][size - 1]: requests over the SLO, on average, of the batch of `size` that ends before request i + 1.
    prices: list[list[float]] = []
    for last, at in enumerate(arrivals):
        waits = [at - arrivals[first] for first in range(last, max(-1, last - SIZE), -1)]
        if world.growth == 0:
            prices.append(list(accumulate(over(wait, 1) for wait in waits)))
        else:
            prices.append([sum(over(wait, size) for wait in waits[:size]) for size in range(1, len(waits) + 1)])

    def bound(price: float) -> float:
        least = [0.0]
        for last, row in enumerate(prices):
            least.append(1 + min([least[last - n] + price * overs for n, overs in enumerate(row)]))
        return least[-1] - price * over_share * len(arrivals)

    # Concave in the price: golden-section search over its logarithm.
    low, high = math.log(0.001), math.log(1000)
    ratio = (math.sqrt(5) - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    values = [bound(math.exp(x)) for x in inner]
    best = max(values)
    for _ in range(12):
        if values[0] > values[1]:
            high, inner, values = inner[1], [0.0, inner[0]], [0.0, values[0]]
            inner[0] = high - ratio * (high - low)
            values[0] = bound(math.exp(inner[0]))
        else:
            low, inner, values = inner[0], [inner[1], 0.0], [values[1], 0.0]
            inner[1] = low + ratio * (high - low)
            values[1] = bound(math.exp(inner[1]))
        best = max(best, *values)
    return best


def fewest_calls_without_foresight(world: World, arrivals: Sequence[float], over_share: float = 0.01) -> int:
    """The calls of the best rule for somebody who knows the rate and the latency exactly, and no arrival beforehand.

    For Poisson arrivals and a latency that does not grow: a batch leaves when the risk that a moment more adds to its
    requests is worth more than the mate that the moment may bring. The risk only grows while it waits, so to compare
    the two now is the best that can be done (a monotone stopping problem). What a mate is worth is chosen so that the
    share over the SLO is as allowed on these very arrivals. Slots are not held against it.
    """
    slack = SLO_SECONDS - FIXED_SECONDS
    centre, scale = math.log(MEDIAN_SECONDS), SIGMA * math.sqrt(2)

    def over(wait: float) -> float:
        return 0.5 * math.erfc((math.log(slack - wait) - centre) / scale) if wait < slack else 1.0

    def risk(wait: float) -> float:
        """Of a moment more, per second."""
        left = max(slack - wait, 1e-3)
        return math.exp(-(((math.log(left) - centre) / scale) ** 2)) / (scale * math.sqrt(math.pi) * left)

    def leaves(batch: Sequence[float], worth: float) -> float:
        low, high = batch[-1], batch[0] + 0.8 * slack
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (low, middle) if sum(risk(middle - at) for at in batch) > worth else (middle, high)
        return low

    def play(worth: float) -> tuple[int, float]:
        calls, late, batch = 0, 0.0, [arrivals[0]]
        ends = leaves(batch, worth)
        for at in (*arrivals[1:], math.inf):
            if at < ends and len(batch) < SIZE:
                batch.append(at)
            else:
                calls += 1
                late += sum(over(ends - came) for came in batch)
                batch = [at]
            if at < math.inf:
                ends = at if len(batch) == SIZE else leaves(batch, worth)
        return calls, late / len(arrivals)

    low, high = math.log(1e-3), math.log(10)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if play(math.exp(middle))[1] <= over_share else (low, middle)
    return play(math.exp(low))[0]
