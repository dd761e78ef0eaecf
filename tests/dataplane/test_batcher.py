"""The batcher's core in virtual time: exactly one answer or a typed error for each, whatever happens (invariant 8)."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from random import Random
from typing import Any

import pytest

from dataplane.batcher import Batcher, IntentPlan, Limits
from dataplane.sending import Throttled
from domain.batching import Answer, Batch, Refusal, Request, RequestRefused, Strategy
from domain.windows import FixedWindow, Window
from tests.virtual_time import run_virtually

PLANS = {
    "faq": IntentPlan(Strategy.PACK, "public"),
    "greeting": IntentPlan(Strategy.PACK, "public"),
    "search": IntentPlan(Strategy.COALESCE, ""),
    "recommendation": IntentPlan(Strategy.PASS, ""),
}
LIMITS = Limits(slots=4, max_pending=1000, max_wait_seconds=5, burst_seconds=1)
WINDOW, SIZE, CALL = 0.1, 4, 1.0
REQUESTS_OF_A_SOAK = 300


class Fake:
    """Sender, knobs and meter in one; `answer` makes the results of a batch."""

    batch_window_ms = 1000
    request_coalescing = False
    invocations_per_second_per_task: int | None = None

    def __init__(self, seconds: Callable[[Batch], float] = lambda batch: CALL) -> None:
        self.batches: list[tuple[float, Batch]] = []
        self.seconds = seconds
        self.counts: Counter[str] = Counter()

    def model_for(self, intent: str) -> str:
        return "haiku" if intent == "search" else "sonnet"

    async def send(self, batch: Batch) -> Sequence[Answer | RequestRefused]:
        self.batches.append((now(), batch))
        try:
            await asyncio.sleep(self.seconds(batch))
        except Throttled as error:
            await asyncio.sleep(0.02)
            return [RequestRefused(Refusal.THROTTLED, "busy", error.retry_after_seconds)] * len(batch.requests)
        return [answer_to(request, batch) for request in batch.requests]

    def sent(self, model: str, group: str, waits: Sequence[float]) -> None:
        self.counts["sent"] += len(waits)

    def served(
        self,
        model: str,
        group: str,
        requests: Sequence[Request],
        results: Sequence[Answer | RequestRefused],
        seconds: float,
    ) -> None:
        self.counts["served"] += len(results)

    def coalesced(self, intent: str) -> None:
        self.counts["coalesced"] += 1

    def refused(self, intent: str, refusal: Refusal) -> None:
        self.counts[refusal] += 1

    def window(self, model: str, group: str, window: Window) -> None:
        self.counts["window"] += 1


def now() -> float:
    return asyncio.get_running_loop().time()


def answer_to(request: Request, batch: Batch) -> Answer:
    return Answer(request.prompt.upper(), batch.model, 10, 10, len(batch.requests))


def request(prompt: str, intent: str = "faq", within: float = 10, **more: Any) -> Request:
    return Request(intent, prompt, 100, now() + within, **more)


def batcher(fake: Fake, limits: Limits = LIMITS) -> Batcher:
    return Batcher(fake, fake, PLANS, limits, lambda model, group: FixedWindow(WINDOW, SIZE), fake, SIZE, Random(1))


Test = Callable[[], Coroutine[Any, Any, None]]


def virtually(test: Test) -> Callable[[], None]:
    def run() -> None:
        run_virtually(test())

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


@virtually
async def test_nobody_waits_for_a_mates_second_call_or_loses_his_answer_to_it() -> None:
    class AsksAgain(Fake):
        async def send(self, batch: Batch) -> Sequence[Answer | RequestRefused]:
            await asyncio.sleep(CALL)
            for request in batch.requests[1:]:
                batch.ready(request, answer_to(request, batch))
            await asyncio.sleep(CALL if batch.requests[0].prompt == "slow" else 1000)
            return [answer_to(request, batch) for request in batch.requests]

    core = batcher(AsksAgain())
    for lost in ("slow", "never"):
        began = now()
        asked = [core.submit(request(prompt)) for prompt in (lost, "b", "c", "d")]
        mates = await asyncio.gather(*asked[1:])
        assert [answer.text for answer in mates] == ["B", "C", "D"]
        assert now() - began == CALL
        [first] = await asyncio.gather(asked[0], return_exceptions=True)
        assert isinstance(first, Answer if lost == "slow" else RequestRefused)
        assert now() - began == pytest.approx(2 * CALL if lost == "slow" else 10, abs=0.02)
    await asyncio.sleep(1)
    assert core.pending == 0


@virtually
async def test_a_batch_leaves_when_its_window_ends_or_it_is_full() -> None:
    fake = Fake()
    core = batcher(fake)
    early = [core.submit(request(f"a{n}")) for n in range(2)]
    await asyncio.gather(*early)
    assert [(at, len(batch.requests)) for at, batch in fake.batches] == [(WINDOW, 2)]
    started = now()
    answers = await asyncio.gather(*(core.submit(request(f"b{n}")) for n in range(SIZE)))
    assert fake.batches[1][0] == started, "a full one does not wait"
    assert [answer.text for answer in answers] == [f"B{n}" for n in range(SIZE)]
    assert {answer.batch_size for answer in answers} == {SIZE}


@virtually
async def test_intents_of_a_group_share_calls_in_turn_and_others_do_not() -> None:
    fake = Fake()
    core = batcher(fake)
    asked = [request(f"q{n}") for n in range(6)] + [request(f"g{n}", "greeting") for n in range(2)]
    asked += [request("one", "recommendation"), request("two", "recommendation"), request("s", "search")]
    await asyncio.gather(*map(core.submit, asked))
    batches = [[one.prompt for one in batch.requests] for _, batch in fake.batches]
    assert all([alone] in batches for alone in ("one", "two", "s"))
    assert sorted(len(batch) for batch in batches) == [1, 1, 1, 4, 4]
    assert {batch.model for _, batch in fake.batches if batch.requests[0].intent == "search"} == {"haiku"}


@virtually
async def test_equal_requests_share_a_place_within_one_audience() -> None:
    fake = Fake()
    core = batcher(fake)
    asked = [request("same", "search", audience=who) for who in ("ann", "ann", "bob")]
    asked.append(request("same", "recommendation"))
    asked.append(request("same", "recommendation"))
    await asyncio.gather(*map(core.submit, asked))
    assert len(fake.batches) == 4
    fake.request_coalescing = True
    await asyncio.gather(*(core.submit(request("same", "recommendation")) for _ in range(3)))
    assert len(fake.batches) == 5, "the knob shares what would pass"
    assert fake.counts["coalesced"] == 3


@virtually
async def test_what_waits_for_a_slot_goes_on_filling() -> None:
    fake = Fake()
    core = batcher(fake, Limits(slots=1, max_pending=1000, max_wait_seconds=5, burst_seconds=1))
    first = core.submit(request("first"))
    await asyncio.sleep(WINDOW + 0.01)
    late = []
    for n in range(SIZE):
        late.append(core.submit(request(f"late{n}")))
        await asyncio.sleep(0.2)
    await asyncio.gather(first, *late)
    assert [len(batch.requests) for _, batch in fake.batches] == [1, SIZE]


@virtually
async def test_a_caller_that_goes_away_frees_its_place_and_harms_nobody() -> None:
    fake = Fake()
    core = batcher(fake)
    queued, gone, mate = (core.submit(request(name)) for name in ("a", "b", "c"))
    gone.cancel()
    await asyncio.sleep(WINDOW + 0.01)
    assert [one.prompt for one in fake.batches[0][1].requests] == ["a", "c"]
    queued.cancel()
    assert (await mate).text == "C"
    assert core.pending == 0


@virtually
async def test_nobody_waits_longer_than_the_deadline() -> None:
    fake = Fake(lambda batch: math.inf if batch.requests[0].prompt == "never" else CALL)
    core = batcher(fake)
    never, short = core.submit(request("never", within=3)), core.submit(request("short", within=1))
    for future, limit in ((short, 1), (never, 3)):
        with pytest.raises(RequestRefused) as refused:
            await future
        assert refused.value.refusal is Refusal.DEADLINE
        assert now() <= limit
    await asyncio.sleep(0.1)
    assert core.pending == 0
    with pytest.raises(RequestRefused, match=r"deadline: it passed 1\.000 s ago"):
        core.submit(request("late", within=-1))
    with pytest.raises(RequestRefused, match="intent: 'nonsense' is none of faq"):
        core.submit(request("x", "nonsense"))


@virtually
async def test_a_sender_that_breaks_its_word_fails_its_batch_alone() -> None:
    class Broken(Fake):
        async def send(self, batch: Batch) -> Sequence[Answer | RequestRefused]:
            if batch.requests[0].prompt == "raises":
                raise RuntimeError("garbage")
            return (await super().send(batch))[:1]

    core = batcher(Broken())
    first = core.submit(request("raises", "recommendation"))
    pair = [core.submit(request(f"p{n}")) for n in range(2)]
    results = await asyncio.gather(first, *pair, core.submit(request("fine", "search")), return_exceptions=True)
    assert [str(result) for result in results[:3]] == [
        "failed: RuntimeError: garbage",
        *["failed: ValueError: 1 results for 2 requests"] * 2,
    ]
    assert isinstance(results[3], Answer)
    assert core.pending == 0


@virtually
async def test_overload_is_refused_early_with_when_to_come_again() -> None:
    fake = Fake()
    core = batcher(fake, Limits(slots=1, max_pending=8, max_wait_seconds=2, burst_seconds=1))
    await core.submit(request("a", "recommendation"))
    taken = [core.submit(request(f"r{n}", "recommendation", within=60)) for n in range(3)]
    with pytest.raises(RequestRefused, match="a slot is free in about") as refused:
        core.submit(request("more", "recommendation", within=60))
    assert refused.value.refusal is Refusal.OVERLOADED
    assert refused.value.retry_after_seconds
    with pytest.raises(RequestRefused) as hopeless:
        core.submit(request("short", "faq", within=1.5))
    assert hopeless.value.refusal is Refusal.HOPELESS
    await asyncio.gather(*taken)
    fake.invocations_per_second_per_task = 2
    allowed = [core.submit(request(f"t{n}", "search", task="one")) for n in range(3)]
    with pytest.raises(RequestRefused, match="task 'one' asks more than 2 times a second"):
        core.submit(request("t4", "search", task="one"))
    await asyncio.gather(*allowed, core.submit(request("other", "search", task="two")))


class Bucket(Fake):
    """A backend that takes so many calls a second, from `begin` to `end`."""

    def __init__(self, calls_per_second: float, begin: float = 0, end: float = math.inf) -> None:
        super().__init__(self._take)
        self._every, self._begin, self._end = 1 / calls_per_second, begin, end
        self._next = 0.0
        self.taken: list[float] = []

    def _take(self, batch: Batch) -> float:
        if self._begin <= now() < self._end and now() < self._next:
            raise Throttled
        self._next = now() + self._every
        self.taken.append(now())
        return CALL


@virtually
async def test_throttled_calls_hold_no_slot_and_who_is_admitted_is_answered_within_bound_and_call() -> None:
    bound, begin, end = 2.5, 20.0, 80.0
    fake = Bucket(1, begin, end)
    core = batcher(fake, Limits(slots=64, max_pending=1000, max_wait_seconds=bound, burst_seconds=1))
    waits: list[tuple[float, float]] = []
    refused: list[tuple[float, Refusal]] = []

    async def one(n: int) -> None:
        came = now()
        try:
            await core.submit(request(f"n{n}"))
        except RequestRefused as error:
            refused.append((came, error.refusal))
        else:
            waits.append((came, now() - came))

    async with asyncio.TaskGroup() as everybody:
        for n in range(1000):  # 10 a second, of which a batch of 4 a second is let through
            everybody.create_task(one(n))
            await asyncio.sleep(0.1)
    during = [wait for came, wait in waits if begin <= came < end]
    assert max(during) <= bound + CALL + 0.1
    assert len(during) >= 0.8 * SIZE * (end - begin), "what is let through is used"
    assert {refusal for _, refusal in refused} == {Refusal.OVERLOADED}
    assert all(came < end + 2 for came, _ in refused), "soon after it, nobody is refused"
    assert len(fake.batches) - len(fake.taken) < 2 * (end - begin), "few calls are in vain"
    assert core.pending == 0


@virtually
async def test_a_throttle_is_waited_out_as_told_and_the_hopeless_hear_of_it_at_once() -> None:
    told = iter([2.0, 8.0])

    def seconds(batch: Batch) -> float:
        raise Throttled(next(told))

    fake = Fake(seconds)
    core = batcher(fake)
    patient, hasty = core.submit(request("patient")), core.submit(request("hasty", within=1.5))
    with pytest.raises(RequestRefused, match="throttled"):
        await hasty
    assert now() < 0.2
    alone = core.submit(request("alone", "recommendation"))
    fake.seconds = lambda batch: CALL
    assert (await alone).text == "ALONE", "another lane goes on"
    assert (await patient).text == "PATIENT"
    came_again = fake.batches[-1][0] - (WINDOW + 0.02 + 2.0)
    assert 0 <= came_again < 0.2, "not before, and not with all others who were told the same"
    assert fake.counts["sent"] == 2, "what is sent again is counted once, and what was only throttled not at all"
    assert fake.counts["served"] == 3
    fake.seconds = seconds
    last = core.submit(request("last"))
    await asyncio.sleep(WINDOW + 0.03)
    with pytest.raises(RequestRefused, match="a slot is free in about") as refused:
        core.submit(request("too late", within=5))
    assert refused.value.refusal is Refusal.OVERLOADED
    fake.seconds = lambda batch: CALL
    assert await core.drain(15) == 0
    assert (await last).text == "LAST"


@virtually
async def test_who_is_throttled_until_the_deadline_hears_that() -> None:
    def seconds(batch: Batch) -> float:
        raise Throttled

    cores = [batcher(Fake(seconds)) for _ in range(50)]
    asked = [core.submit(request("r", "search", within=0.5 + n / 100)) for n, core in enumerate(cores)]
    for result in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(result, RequestRefused)
        assert result.refusal is Refusal.THROTTLED
        assert result.retry_after_seconds
    assert not any(core.pending for core in cores)


@virtually
async def test_who_has_waited_too_long_gives_way_once_others_fill_the_batch() -> None:
    fake = Fake(lambda batch: 6 if batch.requests[0].prompt == "slow" else CALL)
    core = batcher(fake, Limits(slots=1, max_pending=100, max_wait_seconds=2, burst_seconds=1))
    await core.submit(request("before"))
    slow = core.submit(request("slow"))
    await asyncio.sleep(WINDOW + 0.01)
    old = [core.submit(request(f"old{n}")) for n in range(2)]
    await asyncio.sleep(4)
    young = [core.submit(request(f"young{n}")) for n in range(SIZE - 1)]
    results = await asyncio.gather(slow, *old, *young, return_exceptions=True)
    late = [result for result in results if isinstance(result, RequestRefused)]
    assert [refused.refusal for refused in late] == [Refusal.OVERLOADED]
    assert isinstance(results[2], Answer), "who takes nobody's place is answered, however long it took"
    assert core.pending == 0


@virtually
async def test_draining_answers_what_was_accepted_and_takes_nothing_new() -> None:
    fake = Fake(lambda batch: 100 if batch.requests[0].prompt == "slow" else CALL)
    core = batcher(fake)
    soon, slow = core.submit(request("soon")), core.submit(request("slow", "recommendation", within=1000))
    lost = await core.drain(5)
    assert (lost, now()) == (1, 5)
    assert (await soon).text == "SOON"
    with pytest.raises(RequestRefused, match="draining"):
        await slow
    with pytest.raises(RequestRefused, match="draining"):
        core.submit(request("new"))


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_everyone_hears_once_and_in_time(seed: int) -> None:
    run_virtually(soak(Random(seed)))


async def soak(random: Random) -> None:
    """One schedule of arrivals, callers who go away, failures and perhaps a drain."""

    def seconds(batch: Batch) -> float:
        kind = random.random()
        if kind < 0.05:
            raise RuntimeError("backend")
        if kind > throttled_from:
            raise Throttled(random.choice((None, 0.5, 20.0)))
        return math.inf if kind < 0.08 else random.expovariate(2)

    throttled_from = random.choice((0.5, 0.9, 1.0))
    fake = Fake(seconds)
    core = batcher(fake, Limits(random.randint(1, 4), random.randint(5, 200), random.uniform(0.5, 5), 1))
    outcomes: Counter[str] = Counter()

    async def one(name: str) -> None:
        await asyncio.sleep(random.uniform(0, 20))
        fake.request_coalescing = random.random() < 0.5
        ask = request(name, random.choice(list(PLANS)), random.uniform(0.01, 8))
        try:
            future = core.submit(ask)
            if random.random() < 0.1:
                asyncio.get_running_loop().call_later(random.uniform(0, 2), future.cancel)
            answer = await future
        except RequestRefused as refused:
            outcomes[refused.refusal] += 1
        except asyncio.CancelledError:
            outcomes["cancelled"] += 1
        else:
            assert answer.text == name.upper(), "another's answer"
            outcomes["answered"] += 1
        assert now() <= ask.deadline + 1e-9

    names = [f"n{random.randrange(200)}" for _ in range(REQUESTS_OF_A_SOAK)]
    everybody = asyncio.gather(*map(one, names))
    if random.random() < 0.5:
        await asyncio.sleep(random.uniform(5, 20))
        await core.drain(random.uniform(0, 3))
    await everybody
    await core.drain(10)
    assert outcomes.total() == REQUESTS_OF_A_SOAK
    assert core.pending == 0


@virtually
async def test_a_drain_right_after_an_answer_ends() -> None:
    fake = Fake()
    core = batcher(fake)
    await core.ask(request("the last one", "recommendation"))
    assert await core.drain(5) == 0


@virtually
async def test_who_has_gone_takes_no_place_from_others() -> None:
    """A stuck backend, and callers who give up and ask again: only those who still wait count."""
    fake = Fake(lambda batch: 100 if batch.requests[0].prompt == "stuck" else CALL)
    core = batcher(fake, Limits(slots=1, max_pending=20, max_wait_seconds=1000, burst_seconds=1))
    stuck = core.submit(request("stuck", "recommendation", within=1000))
    for round_ in range(20):
        for intent in PLANS:
            gone = [core.submit(request(f"{round_}-{n}", intent, within=500)) for n in range(4)]
            for one in gone:
                one.cancel()
        await asyncio.sleep(1)
    waits = [core.submit(request(f"waits {n}", "search", within=500)) for n in range(15)]
    waits += [core.submit(request(f"waits {n}", "recommendation", within=500)) for n in range(4)]
    with pytest.raises(RequestRefused, match="20 requests are pending, as many as may"):
        core.submit(request("too many", "recommendation", within=500))
    await stuck
    await asyncio.gather(*waits)
    await core.drain(1000)
    assert core.pending == 0
    assert core._flights == {}, "nothing is kept of them"


@virtually
async def test_who_shares_a_place_counts_too() -> None:
    fake = Fake()
    core = batcher(fake, Limits(slots=1, max_pending=100, max_wait_seconds=1000, burst_seconds=1))
    crowd = [core.submit(request("same", "search")) for _ in range(100)]
    with pytest.raises(RequestRefused, match="100 requests are pending"):
        core.submit(request("same", "search"))
    for one in crowd[:50]:
        one.cancel()
    await asyncio.sleep(0.1)
    crowd += [core.submit(request("same", "search")) for _ in range(50)]
    assert {answer.text for answer in await asyncio.gather(*crowd[50:])} == {"SAME"}
    assert len(fake.batches) == 1
    await asyncio.sleep(10)
    again = [core.submit(request(f"{n}", "search", within=500)) for n in range(100)]
    await asyncio.gather(*again)


@virtually
async def test_what_is_given_up_at_the_end_of_a_drain_has_ended() -> None:
    fake = Fake(lambda batch: math.inf)
    core = batcher(fake)
    asked = [core.submit(request(f"{n}", "recommendation", within=1000)) for n in range(8)]
    assert await core.drain(1) == 8
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert all(isinstance(one.exception(), RequestRefused) for one in asked)
    assert await core.drain(1) == 0, "a second drain has nothing to do"


@virtually
async def test_a_loop_that_stood_still_answers_or_refuses_everybody() -> None:
    """A process that was stopped for a minute: the clock jumps past windows, answers and deadlines."""
    fake = Fake()
    core = batcher(fake)
    early = [core.submit(request(f"early {n}")) for n in range(2)]
    await asyncio.sleep(WINDOW + 0.5)
    waiting = [core.submit(request(f"waiting {n}")) for n in range(2)]
    asyncio.get_running_loop().now += 60  # type: ignore[attr-defined]
    results = await asyncio.gather(*early, *waiting, return_exceptions=True)
    assert all(isinstance(one, Answer | RequestRefused) for one in results)
    await asyncio.sleep(CALL)
    assert core.pending == 0
    assert (await core.ask(request("after"))).text == "AFTER"


@virtually
async def test_tasks_that_nobody_has_heard_of_fill_no_memory() -> None:
    fake = Fake()
    fake.invocations_per_second_per_task = 1
    core = batcher(fake, Limits(slots=4, max_pending=100_000, max_wait_seconds=1000, burst_seconds=1))
    futures = [core.submit(request("q", "recommendation", within=1000, task=f"task-{n}")) for n in range(12_000)]
    assert len(core._next_call) == 10_000
    for future in futures:
        future.cancel()
    await core.drain(1000)


@virtually
async def test_a_flood_of_one_intent_holds_up_no_other() -> None:
    fake = Fake()
    core = batcher(fake, Limits(slots=1, max_pending=1000, max_wait_seconds=1000, burst_seconds=1))
    flood = [core.submit(request(f"flood {n}", within=500)) for n in range(100)]
    mate = core.submit(request("mate", "greeting", within=500))
    other = core.submit(request("other", "recommendation", within=500))
    await asyncio.gather(mate, other)
    assert len(fake.batches) <= 4, "the one under way, one for each of them, and at most one of the flood between"
    await asyncio.gather(*flood)


@virtually
async def test_who_joined_a_call_that_never_ends_has_until_his_own_deadline() -> None:
    fake = Fake(lambda batch: math.inf if now() < 1 else CALL)
    core = batcher(fake)
    first = core.submit(request("same", "search", within=2))
    await asyncio.sleep(1)
    joined = core.submit(request("same", "search", within=5))
    with pytest.raises(RequestRefused, match="deadline"):
        await first
    assert now() <= 2
    assert (await joined).text == "SAME"
    assert now() == pytest.approx(2 + CALL)
    assert (len(fake.batches), core.pending) == (2, 0)
