"""The batcher as the policy configures it, in virtual time: controllers and the knob, cache and core together."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

import pytest

from dataplane.control_state import ControlState
from dataplane.response_cache import ResponseCache
from dataplane.sending import Reply, Target, Throttled
from dataplane.service import BatcherService, InvalidField
from domain.batching import Answer, Request, RequestRefused
from domain.knobs import KnobName, baseline_value
from domain.packing import BEGINS
from domain.policy import Policy
from domain.routes import CapacityRoutes
from tests.virtual_time import run_virtually

FIXED = Policy.model_validate({"batcher": {"controller": "fixed"}, "knobs": {"batch_window_ms": 500}})


class World:
    """The backend, the knobs and the cache in one; calls take a second."""

    request_coalescing = False
    invocations_per_second_per_task = None

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.batch_window_ms = cast(int, baseline_value(KnobName.BATCH_WINDOW_MS, policy.baseline))
        self.most_tokens = 1024
        self.calls: list[tuple[float, str, int, str]] = []
        self.full: set[str] = set()
        self.kept: dict[tuple[str, str, int, str], Answer] = {}
        self.changed: Callable[[], None] = lambda: None
        self.lookups = 0

    def service(self, cache: bool = False) -> BatcherService:
        kept = cast(ResponseCache, self) if cache else None
        return BatcherService(self.policy, self, cast(ControlState, self), kept)

    async def call(self, target: Target, system: str, prompt: str, max_tokens: int, within_seconds: float) -> Reply:
        if target.model_id in self.full:
            raise Throttled(0.5)
        self.calls.append((now(), target.model, max_tokens, prompt))
        await asyncio.sleep(1)
        if not system:
            return Reply(f"about {prompt}", 10, 20)
        entries = [
            {"name": name, "begins": question[:BEGINS], "answer": f"about {question}"}
            for name, question in json.loads(prompt).items()
        ]
        return Reply(json.dumps(entries), 10, 20)

    def model_for(self, intent: str) -> str:
        return self.policy.intents[intent].model

    def routes(self, model: str) -> CapacityRoutes | None:
        return None

    def max_output_tokens(self, intent: str) -> int:
        return self.most_tokens

    async def get(self, request: Request) -> Answer | None:
        self.lookups += 1
        return self.kept.get(request.key)

    def put(self, request: Request, answer: Answer, took_seconds: float) -> None:
        assert request.key not in self.kept, "written once"
        self.kept[request.key] = answer

    async def close(self) -> None: ...


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_fixed_window_is_the_knobs_and_a_lower_one_counts_at_once_also_for_what_waits() -> None:
    async def go() -> None:
        world = World(FIXED)
        service = world.service()
        await asyncio.gather(*(service.ask("faq", f"a{n}") for n in range(3)))
        assert [at for at, *_ in world.calls] == [0.5]
        began, world.calls = now(), []
        waiting = [asyncio.create_task(service.ask("faq", f"b{n}")) for n in range(2)]
        await asyncio.sleep(0.1)
        world.batch_window_ms = 150
        world.changed()
        await asyncio.sleep(0.3)
        assert [at - began for at, *_ in world.calls] == [pytest.approx(0.15)]
        world.batch_window_ms = 0
        world.changed()
        await service.ask("greeting", "hi")
        assert world.calls[-1][0] - began == pytest.approx(0.4)
        await asyncio.gather(*waiting)
        last = service.meter.changes[-1]
        assert (last.window_ms, last.why) == (0, "capped by batch_window_ms")

    run_virtually(go())


def test_by_default_slo_decides_and_only_what_is_packed_waits() -> None:
    async def go() -> None:
        world = World(Policy())
        service = world.service()
        assert world.batch_window_ms == 1000
        asked = []
        for n in range(3000):
            intent = ("faq", "search", "recommendation")[n % 3]
            asked.append(asyncio.create_task(service.ask(intent, f"q{n}")))
            await asyncio.sleep(1 / 36)
        window = service.meter.windows["sonnet", "public"]
        assert 0.3 < window.seconds <= 1
        assert window.why.startswith("12")
        waits = service.meter.totals().waits_ms
        assert set(waits["haiku"]) == {0}, "search is not packed"
        assert await service.drain() == 0
        assert all(one.done() and one.result().text for one in asked)

    run_virtually(go())


def test_equal_questions_share_a_call_and_the_cache_is_asked_for_public_intents_alone() -> None:
    async def go() -> None:
        world = World(Policy())
        service = world.service(cache=True)
        answers = await asyncio.gather(*(service.ask("faq", "When?") for _ in range(50)))
        assert {answer.text for answer in answers} == {"about When?"}
        assert (len(world.calls), len(world.kept)) == (1, 1)
        await service.ask("faq", "When?")
        assert len(world.calls) == 1
        world.lookups = 0
        for intent in ("search", "recommendation", "order_status"):
            await service.ask(intent, "When?")
        assert (world.lookups, len(world.kept)) == (0, 1)
        gone = asyncio.create_task(service.ask("greeting", "hello"))
        await asyncio.sleep(0.1)
        gone.cancel()
        await asyncio.sleep(2)
        assert (await service.ask("greeting", "hello")).text == "about hello"

    run_virtually(go())


def test_a_full_model_hands_on_what_the_policy_lets_a_smaller_one_answer() -> None:
    async def go() -> None:
        policy = Policy()
        world = World(policy)
        world.full = {policy.models["sonnet"].model_id}
        service = world.service()
        assert (await service.ask("faq", "When?")).model == "haiku"
        with pytest.raises(RequestRefused, match="throttled"):
            await service.ask("recommendation", "What?", within_seconds=2)

    run_virtually(go())


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"intent": "weather"}, "intent"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x" * 300_000}, "prompt"),
        ({"prompt": "本" * 100_000}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"within_seconds": -1.0}, "deadline_ms"),
        ({"within_seconds": float("nan")}, "deadline_ms"),
        ({"within_seconds": 3600.0}, "deadline_ms"),
    ],
)
def test_bad_input_names_its_field(given: dict[str, Any], field: str) -> None:
    async def go() -> None:
        world = World(Policy())
        service = world.service()
        with pytest.raises(InvalidField) as refused:
            await service.ask(**{"intent": "faq", "prompt": "When?"} | given)
        assert refused.value.field == field
        assert len(str(refused.value)) < 400
        assert world.calls == []

    run_virtually(go())


def test_the_knob_caps_the_length_of_an_answer() -> None:
    async def go() -> None:
        world = World(Policy())
        service = world.service()
        world.most_tokens = 100
        for asked, sent in ((None, 100), (50, 50), (400, 100)):
            await service.ask("recommendation", f"What, in {asked}?", max_tokens=asked)
            assert world.calls[-1][2] == sent

    run_virtually(go())
