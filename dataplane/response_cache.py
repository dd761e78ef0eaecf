"""Answers kept in Redis for as long as the knob `cache_ttl_seconds` says, for intents that are free of personal data.

While Redis is away, or slower than a request waits for it, requests go on without. An answer about to expire is fetched
anew by a few early callers, the likelier the longer it took to get (Vattani and others, "Optimal probabilistic cache
stampede prevention"), so that many processes do not all miss at once; within one process equal requests share a call.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Coroutine
from hashlib import sha256
from random import Random
from typing import Any

import redis
import redis.asyncio

from domain.batching import Answer, Request

_PREFIX = "mangaassist:answer:"
"""No hash tag: a cluster spreads the answers."""
_AWAY_AFTER = 3
"""After so many failures in a row ..."""
_AWAY_SECONDS = 1.0
"""... Redis is left alone for so long."""
_CONNECTIONS = 16
_WRITE_SECONDS = 1.0
"""Nobody waits for a write."""
_MOST_WRITES = 256
"""Under way at once; further answers are not kept."""

_log = logging.getLogger(__name__)


class ResponseCache:
    """Never fails; what cannot be read, or was not written for this very question, counts as absent. One event loop."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        ttl_seconds: Callable[[], int],
        *,
        max_bytes: int,
        timeout_seconds: float,
        wall_clock: Callable[[], float] = time.time,
        random: Random | None = None,
    ) -> None:
        """`client` is made by `connect_async`; `ttl_seconds` is asked at each use, so that a change counts at once."""
        self._client = client
        self._ttl_seconds = ttl_seconds
        self._max_bytes = max_bytes
        self._timeout = timeout_seconds
        self._wall_clock = wall_clock
        self._random = random or Random()
        self._away_until = -math.inf
        self._failures = 0
        self._connections = asyncio.Semaphore(_CONNECTIONS)
        self._writes: set[asyncio.Task[None]] = set()

    async def get(self, request: Request) -> Answer | None:
        """The kept answer, unless it is older than the TTL or its turn has come to be fetched anew."""
        key = _key(request)
        held: Any = await self._try(lambda: self._client.get(key), self._timeout)
        if held is None:
            return None
        try:
            written_for, text, model, took, written_at = json.loads(held)
            if written_for != key:
                return None
            age = max(0.0, self._wall_clock() - written_at)
            early = -took * math.log(1 - self._random.random())
            if age + early >= self._ttl_seconds():
                return None
            return Answer(str(text), str(model), 0, 0, cached=True)
        except (ValueError, TypeError):
            return None

    def put(self, request: Request, answer: Answer, took_seconds: float) -> None:
        """Keep an answer that took so long to get; returns at once, and may not keep it."""
        key = _key(request)
        entry = [key, answer.text, answer.model, round(took_seconds, 3), self._wall_clock()]
        held = json.dumps(entry, ensure_ascii=False)
        if len(held.encode()) > self._max_bytes or len(self._writes) >= _MOST_WRITES:
            return
        lasts = self._ttl_seconds()
        write = asyncio.get_running_loop().create_task(self._put(key, held, lasts))
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)

    async def close(self) -> None:
        """Wait for what is being written; the client stays open."""
        await asyncio.gather(*self._writes)

    async def _put(self, key: str, held: str, lasts: int) -> None:
        await self._try(lambda: self._client.set(key, held, ex=lasts), _WRITE_SECONDS)

    async def _try(self, call: Callable[[], Any], within_seconds: float) -> Any:
        now = asyncio.get_running_loop().time()
        if now < self._away_until:
            return None
        try:
            async with asyncio.timeout(within_seconds), self._connections:
                command: Coroutine[Any, Any, Any] = call()
                answer = await command
        except (redis.RedisError, OSError, TimeoutError, UnicodeDecodeError) as error:
            self._failures += 1
            if self._failures >= _AWAY_AFTER:
                self._away_until = now + _AWAY_SECONDS
            if self._failures == _AWAY_AFTER:
                _log.warning("the response cache is away, serving without it: %s", error or "no answer in time")
            return None
        if self._failures >= _AWAY_AFTER:
            _log.info("the response cache is back")
        self._failures = 0
        return answer


def _key(request: Request) -> str:
    named = json.dumps([request.intent, request.prompt, request.max_tokens, request.audience])
    return _PREFIX + sha256(named.encode()).hexdigest()
