"""What a request costs in CPU, in real time: 256 callers who ask again at once, and a backend that answers at once."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from bench._batchers import PEER_CONTENDERS, Asked, Contender, Knobs, contender, core, slo
from bench._batching_worlds import SIZE, Refused, World
from bench._harness import Figure, progress
from dataplane.meter import BatchMeter
from domain.batching import Answer, Batch, Request
from domain.windows import FixedWindow, WindowController

CALLERS = 256
REQUESTS = 256 * 400
"""Of one round."""
ROUNDS = 10
"""With one batcher, which learns in the first ones. The best counts: other work on the machine only adds."""
COST_AIM_US = 10.0
_WORLD = World("CPU", ((1, 1),))
_ANSWERS = [Answer("yes", "sonnet", 300, 200, SIZE)] * SIZE


class _AtOnce:
    """Sender and backend that answer at once."""

    async def send(self, batch: Batch) -> Sequence[Answer]:
        return _ANSWERS[: len(batch.requests)]

    async def call(self, first: int, size: int) -> None:
        """A peer's call."""


class _RateLimited(Knobs):
    """Admission by task is on."""

    invocations_per_second_per_task = 10_000_000


def _ours(controller: Callable[[], WindowController]) -> Contender:
    def make(world: World, backend: object) -> Asked:
        batcher = core(_AtOnce(), BatchMeter(), world.slots, controller, knobs=_RateLimited())
        now = asyncio.get_running_loop().time

        def ask(number: int) -> Awaitable[Answer]:
            return batcher.submit(Request("faq", str(number), 100, now() + 10, "task"))

        return Asked(ask, [])

    return make


def _makers(peers: Iterable[str]) -> dict[str, Callable[[], Contender]]:
    made: dict[str, Callable[[], Contender]] = {
        "ours": lambda: _ours(slo),
        "ours, fixed 150 ms": lambda: _ours(lambda: FixedWindow(0.15, SIZE)),
    }
    for name, (peer, _) in PEER_CONTENDERS.items():
        if peer in peers and not name.endswith(("500 ms", "few slots")):
            made[name] = lambda name=name: contender(name, virtual=False)  # type: ignore[misc]
    return made


async def _measure(make: Contender, name: str) -> list[tuple[float, float, float]]:
    """CPU microseconds and seconds of the clock for a request, and the share without an answer, of each round."""
    asked = make(_WORLD, _AtOnce())  # type: ignore[arg-type]
    lost = 0

    async def caller(first: int) -> None:
        nonlocal lost
        for number in range(first, REQUESTS, CALLERS):
            try:
                await asked.ask(number)
            except Refused:
                lost += 1

    found = []
    for _ in progress(range(ROUNDS), f"CPU, {name}"):
        lost = 0
        cpu, wall = time.process_time(), time.perf_counter()
        await asyncio.gather(*map(caller, range(CALLERS)))
        spent, took = time.process_time() - cpu, time.perf_counter() - wall
        found.append((spent / REQUESTS * 1e6, took / REQUESTS, lost / REQUESTS))
    return found


def measure_cpu(peers: Iterable[str]) -> list[Figure]:
    """All that are there."""
    found = []
    for name, make in _makers(peers).items():
        rounds = asyncio.run(_measure(make(), name))
        cost, took, lost = (min(values) for values in zip(*rounds, strict=True))
        ours = name.startswith("ours")
        found.append(Figure(f"CPU of a request, {name}", cost, "µs", COST_AIM_US if ours else None))
        found.append(Figure(f"100,000 requests, {name}", 100_000 * took, "s", 1.0 if ours else None))
        if lost:
            found.append(Figure(f"without an answer, {name}", lost * 100, "%"))
    return found
