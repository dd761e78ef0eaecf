"""The batcher's core, asked in any order before a backend in any mood, in virtual time (invariant 8)."""

import asyncio
import math
from collections.abc import Coroutine, Sequence
from random import Random
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dataplane.batcher import Batcher, Limits
from domain.batching import Answer, Batch, Refusal, Request, RequestRefused
from domain.windows import FixedWindow
from tests.dataplane.test_batcher import PLANS, SIZE, WINDOW, Fake, answer_to, now
from tests.virtual_time import VirtualLoop

T = TypeVar("T")
MOODS = ("quick", "slow", "never", "raises", "throttles", "throttles and tells", "short", "mixed")
MOST_PENDING = 20


class Moody(Fake):
    """A sender in the mood of the moment in which it is asked."""

    mood = "quick"

    async def send(self, batch: Batch) -> Sequence[Answer | RequestRefused]:
        mood = self.mood
        await asyncio.sleep({"slow": 3.0, "never": math.inf}.get(mood, 0.2))
        answers: list[Answer | RequestRefused] = [answer_to(request, batch) for request in batch.requests]
        if mood == "raises":
            raise RuntimeError("garbage")
        if mood.startswith("throttles"):
            after = 1.5 if mood.endswith("tells") else None
            return [RequestRefused(Refusal.THROTTLED, "full", after)] * len(answers)
        if mood == "short":
            return answers[1:]
        if mood == "mixed":
            kinds = (Refusal.THROTTLED, Refusal.INVALID, Refusal.FAILED)
            return [RequestRefused(kinds[n % 3], "no") if n % 2 else answer for n, answer in enumerate(answers)]
        return answers


class AnyOrder(RuleBasedStateMachine):
    """Requests, callers who leave, moods, knobs and time, until a drain."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.asked: list[tuple[Request, asyncio.Future[Answer]]] = []
        self.drained = False

    def run_in_loop(self, what: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(what)

    @initialize(slots=st.integers(1, 3), longest=st.sampled_from([0.5, 5.0]))
    def start(self, slots: int, longest: float) -> None:
        async def make() -> Batcher:
            limits = Limits(slots, MOST_PENDING, longest, burst_seconds=1)
            window = FixedWindow(WINDOW, SIZE)
            return Batcher(self.fake, self.fake, PLANS, limits, lambda *_: window, self.fake, SIZE, Random(1))

        self.fake = Moody()
        self.core = self.run_in_loop(make())

    @rule(
        prompts=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8),
        intent=st.sampled_from(sorted(PLANS)),
        within=st.sampled_from([0.05, 0.5, 2.0, 9.0]),
    )
    def ask(self, prompts: list[str], intent: str, within: float) -> None:
        refusals = set()

        async def submit() -> None:
            for prompt in prompts:
                request = Request(intent, prompt, 100, now() + within)
                try:
                    future = self.core.submit(request)
                except RequestRefused as refused:
                    refusals.add(refused.refusal)
                else:
                    self.asked.append((request, future))

        self.run_in_loop(submit())
        allowed = {Refusal.DRAINING} if self.drained else {Refusal.OVERLOADED, Refusal.HOPELESS}
        assert refusals <= allowed

    @rule(which=st.integers(0, 50))
    @precondition(lambda self: self.asked)
    def leave(self, which: int) -> None:
        self.asked[which % len(self.asked)][1].cancel()

    @rule(mood=st.sampled_from(MOODS))
    def change(self, mood: str) -> None:
        self.fake.mood = mood

    @rule(window_ms=st.sampled_from([0, 50, 1000]), coalesces=st.booleans())
    def turn_knobs(self, window_ms: int, coalesces: bool) -> None:
        async def follow() -> None:
            self.fake.batch_window_ms, self.fake.request_coalescing = window_ms, coalesces
            self.core.follow_knobs()

        self.run_in_loop(follow())

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.1, 0.3, 1.0, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.run_in_loop(asyncio.sleep(seconds))

    @rule(within=st.sampled_from([0.0, 0.5, 5.0]))
    @precondition(lambda self: not self.drained)
    def drain(self, within: float) -> None:
        self.drained = True
        began = self.loop.now
        self.run_in_loop(self.core.drain(within))
        assert self.loop.now - began <= within + 1e-9
        assert all(future.done() for _, future in self.asked)

    @invariant()
    def everybody_heard_in_time_and_rightly(self) -> None:
        for request, future in self.asked:
            assert future.done() or request.deadline > self.loop.now - 1e-9
            if future.done() and not future.cancelled() and future.exception() is None:
                assert future.result().text == request.prompt.upper()
        assert sum(not future.done() for _, future in self.asked) <= MOST_PENDING

    def teardown(self) -> None:
        async def end() -> None:
            await asyncio.sleep(10)  # the longest deadline, whatever the backend does
            assert all(future.done() for _, future in self.asked)
            await asyncio.gather(*(future for _, future in self.asked), return_exceptions=True)
            assert self.core.pending == 0
            assert self.core._flights == {}
            self.fake.mood = "quick"
            if not self.drained:
                assert (await self.core.ask(Request("faq", "after all", 100, now() + 9))).text == "AFTER ALL"
            assert await self.core.drain(5) == 0
            assert asyncio.all_tasks() == {asyncio.current_task()}

        self.run_in_loop(end())
        self.loop.close()


AnyOrder.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrder = AnyOrder.TestCase
