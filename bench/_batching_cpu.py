"""What a request costs in CPU, in real time: 256 callers who ask again at once, and a backend that answers at once."""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

from bench._batchers import PEER_CONTENDERS, AnswersAtOnce, Asked, Contender, Knobs, contender, core, slo
from bench._batching_worlds import SIZE, Refused, World
from bench._harness import Figure, progress
from dataplane.connection import connect_async
from dataplane.control_state import ControlState
from dataplane.meter import BatchMeter
from dataplane.response_cache import ResponseCache
from dataplane.service import BatcherService
from domain.batching import Answer, Batch, Request, Strategy
from domain.policy import Policy
from domain.windows import FixedWindow, WindowController
from tests.servers import ValkeyServer

CALLERS = 256
REQUESTS = 256 * 400
"""Of one round."""
ROUNDS = 10
"""With one batcher, which learns in the first ones. The best counts: other work on the machine only adds."""
CACHED_CALLERS, CACHED_REQUESTS = 64, 64 * 80
"""Of one round with the response cache, which costs more."""
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


class _RateLimitedService(_RateLimited, AnswersAtOnce):
    """A whole service's, the same."""


async def _with_the_cache(url: str) -> list[Figure]:
    """Each question is asked twice in a round: first it is not in the cache, then it is. Redis is another process."""
    policy = Policy()
    one_by_one = policy.intents["faq"].model_copy(update={"strategy": Strategy.COALESCE})
    policy = policy.model_copy(update={"intents": {**policy.intents, "faq": one_by_one}})
    world, client, settings = _RateLimitedService(), connect_async(url), policy.batcher
    cache = ResponseCache(client, lambda: 3600, max_bytes=settings.max_cached_bytes, timeout_seconds=10)
    service = BatcherService(policy, world, cast(ControlState, world), cache)
    costs: dict[bool, list[float]] = {False: [], True: []}
    asked = iter(range(1_000_000_000))

    async def caller(questions: Sequence[int], cached: bool) -> None:
        for number in questions:
            assert (await service.ask("faq", str(number), task="task")).cached is cached

    for _ in progress(range(ROUNDS), "CPU, ours, response cache on"):
        questions = [next(asked) for _ in range(CACHED_REQUESTS)]
        for cached, spent in costs.items():
            cpu = time.process_time()
            await asyncio.gather(*(caller(questions[n::CACHED_CALLERS], cached) for n in range(CACHED_CALLERS)))
            await cache.close()
            spent.append((time.process_time() - cpu) / CACHED_REQUESTS * 1e6)
    await client.aclose()
    name = "CPU of a request, ours, response cache on"
    return [Figure(f"{name}, kept", min(costs[True]), "µs"), Figure(f"{name}, not kept yet", min(costs[False]), "µs")]


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
    with tempfile.TemporaryDirectory() as folder:
        valkey = ValkeyServer(Path(folder)).start()
        try:
            found += asyncio.run(_with_the_cache(valkey.url))
        finally:
            valkey.kill()
    return found
