"""The response cache against real servers: what it keeps, for how long, and that it never stands in the way."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
import redis

from dataplane.connection import connect_async
from dataplane.response_cache import ResponseCache
from domain.batching import Answer, Request
from tests.servers import ValkeyServer, free_port

QUESTION = Request("faq", "How do I return a book?", 100, deadline=10)
ANSWER = Answer("By post. 本", "sonnet", 20, 30, 3)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Never(Random):
    """Draws that fetch nothing early."""

    def random(self) -> float:
        return 0.0


class Kept:
    """A cache whose TTL and clock a test sets."""

    def __init__(self, url: str, random: Random | None = None, timeout_seconds: float = 5) -> None:
        self.ttl = 30
        self.clock = Clock()
        self.client = connect_async(url)
        self.cache = ResponseCache(
            self.client,
            lambda: self.ttl,
            max_bytes=1000,
            timeout_seconds=timeout_seconds,
            wall_clock=self.clock,
            random=random or Never(),
        )

    async def put(self, request: Request = QUESTION, answer: Answer = ANSWER, took: float = 2) -> None:
        self.cache.put(request, answer, took)
        await self.cache.close()


@pytest.fixture
async def kept(server_url: str, redis_client: redis.Redis) -> AsyncIterator[Kept]:
    made = Kept(server_url)
    yield made
    await made.client.aclose()


async def test_an_answer_is_kept_for_its_question_alone_and_as_long_as_the_knob_says_now(
    kept: Kept, redis_client: redis.Redis
) -> None:
    assert await kept.cache.get(QUESTION) is None
    await kept.put()
    assert await kept.cache.get(QUESTION) == Answer("By post. 本", "sonnet", 0, 0, cached=True)
    for other in (
        Request("greeting", QUESTION.prompt, 100, 10),
        Request("faq", "How do I return a book", 100, 10),
        Request("faq", QUESTION.prompt, 99, 10),
        Request("faq", QUESTION.prompt, 100, 10, audience="staff"),
    ):
        assert await kept.cache.get(other) is None
    assert await kept.cache.get(Request("faq", QUESTION.prompt, 100, 99, task="other")) is not None
    kept.clock.now += 20
    assert await kept.cache.get(QUESTION) is not None
    kept.ttl = 15
    assert await kept.cache.get(QUESTION) is None, "a TTL that is lowered counts at once"
    kept.ttl = 30
    kept.clock.now -= 3600
    assert await kept.cache.get(QUESTION) is not None, "a clock that jumps back: Redis still ends it"
    [key] = redis_client.scan_iter("mangaassist:answer:*")
    assert 0 < redis_client.ttl(key) <= 30


async def test_what_is_too_long_is_not_kept_and_what_is_no_answer_counts_as_absent(
    kept: Kept, redis_client: redis.Redis
) -> None:
    await kept.put(answer=Answer("x" * 2000, "sonnet", 1, 1))
    assert await kept.cache.get(QUESTION) is None
    await kept.put()
    [key] = redis_client.scan_iter("mangaassist:answer:*")
    for rubbish in ("", "{}", "[1]", '["a", "b", "c", "d"]', "null", b"\xff\xfe"):
        redis_client.set(key, rubbish)
        assert await kept.cache.get(QUESTION) is None, rubbish
        await asyncio.sleep(0)
    await kept.put()
    redis_client.delete(key)
    redis_client.lpush(key, "a list")
    assert await kept.cache.get(QUESTION) is None


async def test_near_its_end_few_of_many_readers_fetch_an_answer_anew(valkey: ValkeyServer) -> None:
    kept = Kept(valkey.url, Random(1))
    await kept.put(took=2)

    async def missing(age: float) -> float:
        kept.clock.now = Clock.now + age
        return sum([await kept.cache.get(QUESTION) is None for _ in range(300)]) / 300

    shares = [await missing(age) for age in (1, 24, 28, 29.9, 30)]
    await kept.client.aclose()
    assert shares[0] == 0
    assert shares[1] < 0.12
    assert 0.25 < shares[2] < 0.5
    assert shares[3] > 0.9
    assert shares[4] == 1


async def test_redis_away_or_hanging_costs_little_and_is_not_asked_again_at_once(tmp_path: Path) -> None:
    away = Kept(f"redis://127.0.0.1:{free_port()}/0", timeout_seconds=0.05)
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert await away.cache.get(QUESTION) is None
    await away.put()
    assert [await away.cache.get(QUESTION) for _ in range(1000)] == [None] * 1000
    assert loop.time() - began < 20, "a thousand requests did not wait 50 ms each"
    await away.client.aclose()
    server = ValkeyServer(tmp_path).start()
    back = Kept(server.url)
    await back.put()
    assert await back.cache.get(QUESTION) is not None
    server.kill()
    for _ in range(5):
        assert await back.cache.get(QUESTION) is None
    server.start()
    await asyncio.sleep(1.1)
    await back.put()
    assert await back.cache.get(QUESTION) is not None, "it is used again when it is back"
    await back.client.aclose()
    server.kill()


async def test_an_answer_that_comes_too_late_is_no_other_questions(valkey: ValkeyServer) -> None:
    """Redis is slow for a while: what was given up is read by nobody."""
    kept = Kept(valkey.url)
    others = [Request("faq", f"question {n}?", 100, 10) for n in range(40)]
    for other in others:
        await kept.put(other, Answer(f"about {other.prompt}", "sonnet", 1, 1))
    hasty = ResponseCache(kept.client, lambda: 30, max_bytes=1000, timeout_seconds=0.02, wall_clock=kept.clock)
    await kept.client.client_pause(500)
    assert None in await asyncio.gather(*map(hasty.get, others))
    await asyncio.sleep(0.6)
    found = await asyncio.gather(*map(kept.cache.get, others))
    assert [one and one.text for one in found] == [f"about {other.prompt}" for other in others]
    await kept.client.aclose()


async def test_what_was_written_for_another_question_counts_as_absent(kept: Kept, redis_client: redis.Redis) -> None:
    await kept.put()
    [key] = redis_client.scan_iter("mangaassist:answer:*")
    await kept.put(Request("faq", "another?", 100, 10), Answer("Another's.", "sonnet", 1, 1))
    [other] = [one for one in redis_client.scan_iter("mangaassist:answer:*") if one != key]
    redis_client.set(key, redis_client.get(other) or "")
    assert await kept.cache.get(QUESTION) is None
