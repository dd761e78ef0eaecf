"""The batchers that are compared, each behind one function that asks it.

Peers are run as their packages have them, on a loop whose clock is virtual: only the `time` that they read is replaced,
and where Ray Serve asks its replica and its metrics, it hears nothing (which flatters it: outside its server it has
less to do).
"""

import asyncio
import importlib
import json
import math
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from bench._batching_worlds import FIXED_SECONDS, SIZE, SLO_SECONDS, TOKENS, Backend, Refused, World
from dataplane.batcher import Batcher, IntentPlan, KnobReader, Limits, Meter
from dataplane.sending import ModelTargets, Reply, Sending, Target, Throttled
from domain.batching import Answer, Batch, Refusal, Request, RequestRefused, Sender, Strategy
from domain.packing import BEGINS
from domain.policy import Policy
from domain.windows import FixedWindow, SloWindow, TableRow, TableWindow, Window, WindowController

SETTINGS = Policy().batcher
DEADLINE_SECONDS = SETTINGS.deadline.total_seconds()
LONGEST_WINDOW_SECONDS = 1.0
PEERS = {"Ray Serve": "ray", "async-batcher": "async-batcher", "BentoML": "bentoml"}
"""The package of each."""

Ask = Callable[[int], Awaitable[Any]]
"""Asks for the answer to one request, by its number; raises when there is none."""


@dataclass
class Asked:
    """A batcher at work."""

    ask: Ask
    windows: list[tuple[float, Window]]
    """Each that was set, and when; ours only."""


Contender = Callable[[World, Backend], Asked]


# ---------------------------------------------------------------- ours, and the controllers that it may have


class Knobs:
    """No knob is turned."""

    batch_window_ms = round(LONGEST_WINDOW_SECONDS * 1000)
    request_coalescing = False
    invocations_per_second_per_task: int | None = None

    def model_for(self, intent: str) -> str:
        return "sonnet"


class AnswersAtOnce(Knobs):
    """Knobs, routes and a backend for a whole service."""

    reply = Reply("yes", 300, 200)

    async def call(self, target: Target, system: str, prompt: str, max_tokens: int, within_seconds: float) -> Reply:
        return self.reply

    def model_for(self, intent: str) -> str:
        return "haiku"

    def routes(self, model: str) -> None:
        return None

    def max_output_tokens(self, intent: str) -> int:
        return 300


class WindowsMeter:
    """Remembers windows, and nothing else."""

    def __init__(self) -> None:
        self.windows: list[tuple[float, Window]] = []

    def sent(self, model: str, group: str, waits: Sequence[float]) -> None:
        """Forgotten."""

    def served(
        self,
        model: str,
        group: str,
        requests: Sequence[Request],
        results: Sequence[Answer | RequestRefused],
        seconds: float,
    ) -> None:
        """Forgotten."""

    def coalesced(self, intent: str) -> None:
        """Forgotten."""

    def refused(self, intent: str, refusal: Refusal) -> None:
        """Forgotten."""

    def window(self, model: str, group: str, window: Window) -> None:
        """A lane's window changed."""
        self.windows.append((asyncio.get_running_loop().time(), window))


class _Direct:
    """Sends a batch as one call."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def send(self, batch: Batch) -> Sequence[Answer | RequestRefused]:
        size = len(batch.requests)
        await self._backend.call(int(batch.requests[0].prompt), size)
        return [Answer("", batch.model, TOKENS // 2, TOKENS // 2, size)] * size


class _Throttling:
    """The backend as `dataplane.sending` sees it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def call(self, target: Target, system: str, prompt: str, max_tokens: int, within_seconds: float) -> Reply:
        asked = json.loads(prompt) if system else {"": prompt}
        numbers = list(asked.values())
        try:
            async with asyncio.timeout(within_seconds):
                await self._backend.call(int(numbers[0]), len(numbers))
        except Refused:
            raise Throttled from None
        answers = [{"name": name, "begins": q[:BEGINS], "answer": f"about {q}"} for name, q in asked.items()]
        return Reply(json.dumps(answers) if system else f"about {prompt}", TOKENS // 2, TOKENS // 2)


def _sending(backend: Backend) -> Sending:
    models = {"sonnet": ModelTargets(Target("sonnet", "on demand"))}
    return Sending(_Throttling(backend), lambda model: None, models, frozenset(), lambda intent, kept: None, Random(1))


def core(
    sender: Sender,
    meter: Meter,
    slots: int,
    controller: Callable[[], WindowController],
    strategy: Strategy = Strategy.PACK,
    knobs: KnobReader | None = None,
) -> Batcher:
    """The data plane's own, with the policy's limits."""
    limits = Limits(slots, SETTINGS.max_pending, SETTINGS.max_slot_wait.total_seconds(), 1)
    plans = {"faq": IntentPlan(strategy, "public")}
    return Batcher(sender, knobs or Knobs(), plans, limits, lambda model, group: controller(), meter, SIZE, Random(1))


def _core(controller: Callable[[], WindowController], strategy: Strategy = Strategy.PACK) -> Contender:
    def make(world: World, backend: Backend) -> Asked:
        throttled = world.trouble is not None and world.trouble.calls_per_second < math.inf
        meter = WindowsMeter()
        batcher = core(_sending(backend) if throttled else _Direct(backend), meter, world.slots, controller, strategy)
        now = asyncio.get_running_loop().time

        def ask(number: int) -> Awaitable[Answer]:
            return batcher.submit(Request("faq", str(number), 100, now() + DEADLINE_SECONDS))

        return Asked(ask, meter.windows)

    return make


def slo() -> SloWindow:
    """Ours."""
    return SloWindow(
        slo_seconds=SLO_SECONDS,
        over_share=SETTINGS.over_share,
        fixed_seconds=FIXED_SECONDS,
        size=SIZE,
        most_seconds=LONGEST_WINDOW_SECONDS,
    )


def _table() -> TableWindow:
    return TableWindow(
        [TableRow(row.below_tokens_per_second or math.inf, row.window_ms / 1000) for row in SETTINGS.table],
        breach_p99_seconds=SETTINGS.table_breach_p99_ms / 1000,
        breach_window_seconds=SETTINGS.table_breach_window_ms / 1000,
        size=SIZE,
        fixed_seconds=FIXED_SECONDS,
    )


def fixed(seconds: float) -> Contender:
    """Our core with one window."""
    return _core(lambda: FixedWindow(seconds, SIZE))


# ---------------------------------------------------------------- peers


class _VirtualTime:
    """What a peer's `time` is replaced by. Like a real clock it has moved on at the next look, if by a nanosecond only:
    who waits for the rest of a time, in steps that rounding makes nothing, would otherwise wait for ever."""

    def __init__(self) -> None:
        self._looks = 0

    def time(self) -> float:
        self._looks += 1
        return asyncio.get_running_loop().time() + self._looks % 1000 * 1e-9

    monotonic = perf_counter = time


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _first(numbers: Sequence[int]) -> tuple[int, int]:
    return numbers[0], len(numbers)


def _ray(seconds: float, virtual: bool) -> Contender:
    batching = _module("ray.serve.batching")
    batching.logger.setLevel("ERROR")
    if virtual:
        batching.time = _VirtualTime()

    class Silent:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def set(self, *args: Any, **kwargs: Any) -> None: ...

        inc = observe = set

    batching.Counter = batching.Gauge = batching.Histogram = Silent
    config = SimpleNamespace(max_ongoing_requests=10**9)
    batching.serve.get_replica_context = lambda: SimpleNamespace(_deployment_config=config)

    def make(world: World, backend: Backend) -> Asked:
        @batching.batch(max_batch_size=SIZE, batch_wait_timeout_s=seconds, max_concurrent_batches=world.slots)  # type: ignore[untyped-decorator]
        async def serve(numbers: list[int]) -> list[int]:
            await backend.call(*_first(numbers))
            return numbers

        return Asked(serve, [])

    return make


def _async_batcher(seconds: float) -> Contender:
    module = _module("async_batcher.batcher")

    def make(world: World, backend: Backend) -> Asked:
        class Peer(module.AsyncBatcher):  # type: ignore[misc, name-defined]
            async def process_batch(self, batch: list[int]) -> list[int]:
                await backend.call(*_first(batch))
                return batch

        peer = Peer(max_batch_size=SIZE, max_queue_time=seconds, concurrency=world.slots)
        return Asked(peer.process, [])

    return make


def _bento(slots_for: Callable[[World], int], virtual: bool) -> Contender:
    dispatcher = _module("bentoml._internal.marshal.dispatcher")
    if virtual:
        dispatcher.time = _module("bentoml._internal.utils.alg").time = _VirtualTime()

    def make(world: World, backend: Backend) -> Asked:
        async def serve(numbers: Sequence[int]) -> Sequence[int]:
            await backend.call(*_first(numbers))
            return numbers

        def shed() -> None:
            return None

        peer = dispatcher.CorkDispatcher(
            round((SLO_SECONDS - FIXED_SECONDS) * 1000),
            SIZE,
            shared_sema=dispatcher.NonBlockSema(slots_for(world)),
            fallback=shed,
            get_batch_size=lambda number: 1,
        )
        call = peer(serve)

        async def ask(number: int) -> None:
            if await call(number) is None:
                raise Refused

        return Asked(ask, [])

    return make


def _slots_for_rate(world: World) -> int:
    """So few that batches form: its only lever."""
    return min(world.slots, max(1, math.ceil(max(rate for rate, _ in world.phases) / 3.5)))


OURS, TABLE, NONE = "ours", "table", "no batching"
OURS_AND_TABLE: dict[str, Callable[[], Contender]] = {
    OURS: lambda: _core(slo),
    TABLE: lambda: _core(_table),
    NONE: lambda: _core(lambda: FixedWindow(0, 1), Strategy.PASS),
}
PEER_CONTENDERS: dict[str, tuple[str, Callable[[bool], Contender]]] = {
    "Ray Serve 150 ms": ("Ray Serve", lambda virtual: _ray(0.15, virtual)),
    "Ray Serve 500 ms": ("Ray Serve", lambda virtual: _ray(0.5, virtual)),
    "async-batcher 150 ms": ("async-batcher", lambda virtual: _async_batcher(0.15)),
    "async-batcher 500 ms": ("async-batcher", lambda virtual: _async_batcher(0.5)),
    "BentoML": ("BentoML", lambda virtual: _bento(lambda world: world.slots, virtual)),
    "BentoML, few slots": ("BentoML", lambda virtual: _bento(_slots_for_rate, virtual)),
}
"""The peer of each, and what makes it, on a virtual clock or the real one."""
CONTENDERS = (*OURS_AND_TABLE, *PEER_CONTENDERS)


def find_peers(folder: Path | None) -> dict[str, str]:
    """The versions of the peers that are there; `folder` is searched last."""
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    found = {}
    for name, package in PEERS.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    return found


def contender(name: str, virtual: bool = True) -> Contender:
    """One of `CONTENDERS`."""
    return OURS_AND_TABLE[name]() if name in OURS_AND_TABLE else PEER_CONTENDERS[name][1](virtual)
