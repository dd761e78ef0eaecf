"""From batches to answers on a backend that does what a test says, in virtual time."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from dataplane.sending import Gone, ModelTargets, Rejected, Reply, Sending, Target, Throttled, Unavailable
from domain.batching import Answer, Batch, Refusal, Request, RequestRefused
from domain.packing import BEGINS
from domain.routes import CapacityRoute, CapacityRoutes, Overflow
from tests.virtual_time import run_virtually

SMALL = Target("haiku", "haiku-id")
MODELS = {"sonnet": ModelTargets(Target("sonnet", "sonnet-id"), SMALL), "haiku": ModelTargets(SMALL)}
BIG, BURST = "arn:big", "arn:burst"
ROUTES = CapacityRoutes(
    model="sonnet",
    routes=(CapacityRoute(provisioned_model_arn=BIG, units=3), CapacityRoute(provisioned_model_arn=BURST, units=1)),
    version=1,
)


class World:
    """The backend: `acts` answers a call, or raises."""

    def __init__(self, acts: Callable[[Target, str, str], str] | None = None) -> None:
        self.acts = acts or (lambda target, system, prompt: good(system, prompt))
        self.calls: list[tuple[float, Target, str]] = []
        self.routes: CapacityRoutes | None = None
        self.lost: Counter[tuple[str, bool]] = Counter()

    async def call(self, target: Target, system: str, prompt: str, max_tokens: int, within_seconds: float) -> Reply:
        await asyncio.sleep(0.1)
        self.calls.append((asyncio.get_running_loop().time(), target, prompt))
        return Reply(self.acts(target, system, prompt), 100, 50)

    def send(self, *prompts: str, intent: str = "faq", within: float = 10) -> list[Answer | RequestRefused]:
        async def go() -> list[Answer | RequestRefused]:
            def packed(intent: str, kept: bool) -> None:
                self.lost[intent, kept] += 1

            sending = Sending(self, lambda model: self.routes, MODELS, frozenset({"faq"}), packed, Random(1))
            batch = Batch("sonnet", [Request(intent, prompt, 100, within) for prompt in prompts], within)
            return list(await sending.send(batch))

        return run_virtually(go())

    @property
    def ids(self) -> list[str]:
        return [target.model_id for _, target, _ in self.calls]


def good(system: str, prompt: str) -> str:
    if not system:
        return f"about {prompt}"
    asked = json.loads(prompt).items()
    return json.dumps([{"name": n, "begins": q[:BEGINS], "answer": f"about {q}"} for n, q in asked])


def texts(results: list[Answer | RequestRefused]) -> list[str]:
    return [result.text if isinstance(result, Answer) else str(result.refusal) for result in results]


def test_a_batch_is_one_call_whose_tokens_are_shared_out() -> None:
    world = World()
    results = world.send("a", "bb", "ccc")
    assert texts(results) == ["about a", "about bb", "about ccc"]
    assert len(world.calls) == 1
    assert sum(result.input_tokens for result in results if isinstance(result, Answer)) == pytest.approx(100, abs=2)
    assert {result.batch_size for result in results if isinstance(result, Answer)} == {3}


def test_what_the_split_does_not_give_is_asked_again_alone() -> None:
    world = World(lambda target, system, prompt: "I would rather chat" if system else f"about {prompt}")
    assert texts(world.send("a", "b")) == ["about a", "about b"]
    assert len(world.calls) == 3
    assert world.lost == {("faq", False): 2}


def test_what_is_there_does_not_wait_for_what_is_asked_again() -> None:
    def acts(target: Target, system: str, prompt: str) -> str:
        return good(system, json.dumps({k: v for k, v in json.loads(prompt).items() if v != "b"}) if system else prompt)

    async def go() -> None:
        world, found = World(acts), dict[str, float]()
        sending = Sending(world, lambda model: None, MODELS, frozenset(), lambda intent, kept: None, Random(1))
        clock = asyncio.get_running_loop().time
        asked = [Request("faq", prompt, 100, 10) for prompt in "abc"]
        batch = Batch("sonnet", asked, 10, lambda request, answer: found.update({request.prompt: clock()}))
        assert texts(list(await sending.send(batch))) == ["about a", "about b", "about c"]
        assert (found, clock()) == ({"a": 0.1, "c": 0.1}, 0.2)

    run_virtually(go())


def test_a_bad_item_fails_alone() -> None:
    def acts(target: Target, system: str, prompt: str) -> str:
        if "poison" in prompt:
            raise Rejected("content")
        return good(system, prompt)

    prompts = ["a", "b", "poison", "d", "e"]
    assert texts(World(acts).send(*prompts)) == ["about a", "about b", "invalid", "about d", "about e"]


def test_calls_are_spread_by_units_and_overflow_in_order() -> None:
    world = World()
    world.routes = ROUTES

    async def go() -> None:
        sending = Sending(world, lambda model: world.routes, MODELS, frozenset(), lambda *_: None)
        for n in range(8):
            await sending.send(Batch("sonnet", [Request("search", str(n), 100, 100)], 100))

    run_virtually(go())
    assert Counter(world.ids) == {BIG: 6, BURST: 2}
    full = World(lambda target, system, prompt: _throttled() if target.model_id.startswith("arn") else "ok")
    overflow = tuple(Overflow(kind=kind, model_id=kind) for kind in ("on_demand", "inference_profile"))
    full.routes = ROUTES.model_copy(update={"overflow": overflow})
    full.send("x")
    assert full.ids[-1] == "on_demand"
    assert set(full.ids[:-1]) == {BIG, BURST}


def _throttled(after: float | None = None) -> str:
    raise Throttled(after)


def test_a_throttle_falls_back_and_comes_back_at_once_where_there_is_nothing_to_fall_back_to() -> None:
    smaller = World(lambda target, system, prompt: _throttled() if target.model == "sonnet" else "small")
    assert texts(smaller.send("x")) == ["small"]
    for told in (None, 2.0):
        never = World(lambda target, system, prompt, told=told: _throttled(told))  # type: ignore[misc]
        [refused] = never.send("x", intent="search")
        assert isinstance(refused, RequestRefused)
        assert (refused.refusal, refused.retry_after_seconds) == (Refusal.THROTTLED, told)
        assert len(never.calls) == 1, "who waits holds a slot"


def test_a_route_that_is_gone_is_left_alone_and_failures_end() -> None:
    def acts(target: Target, system: str, prompt: str) -> str:
        if target.model_id.startswith("arn"):
            raise Gone(target.model_id)
        return "ok"

    world = World(acts)
    world.routes = ROUTES
    assert texts(world.send("x")) == ["ok"]
    assert world.ids == [BIG, BURST, "sonnet-id"]

    def broken(target: Target, system: str, prompt: str) -> str:
        raise Unavailable("500")

    failing = World(broken)
    [refused] = failing.send("x")
    assert isinstance(refused, RequestRefused)
    assert (refused.refusal, refused.why) == (Refusal.FAILED, "sonnet: 500")


def test_an_answer_says_how_long_its_own_call_took_without_the_failed_ones_before() -> None:
    failed = iter([True, True, False])

    def act(target: Target, system: str, prompt: str) -> str:
        if next(failed):
            raise Unavailable("500")
        return f"about {prompt}"

    [answer] = World(act).send("a")
    assert isinstance(answer, Answer)
    assert answer.seconds == pytest.approx(0.1)


def test_however_many_provisioned_models_fail_on_demand_is_asked() -> None:
    def acts(target: Target, system: str, prompt: str) -> str:
        if target.model_id.startswith("arn"):
            raise Unavailable("500")
        return "ok"

    world = World(acts)
    many = tuple(CapacityRoute(provisioned_model_arn=f"arn:{n}", units=1) for n in range(5))
    world.routes = CapacityRoutes(model="sonnet", routes=many, version=1)
    assert texts(world.send("x", intent="search")) == ["ok"]
    assert len(world.calls) == 6
