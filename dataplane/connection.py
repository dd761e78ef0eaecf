"""How to reach Redis: short timeouts and few retries, set on purpose, and Lua scripts by their hash.

A URL is `redis://`, `rediss://` (TLS), `unix://`, or `redis+cluster://` and `rediss+cluster://` with the address of any
node of a cluster or its configuration endpoint.
"""

from hashlib import sha1
from typing import Any, cast

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry

_RETRIES = 2
_BACKOFF = ExponentialWithJitterBackoff(base=0.02, cap=0.2)
_OPTIONS: dict[str, Any] = {
    "decode_responses": True,
    "socket_connect_timeout": 0.5,
    "socket_timeout": 1.0,
    "socket_keepalive": True,
    "health_check_interval": 15,
}


def connect(url: str) -> redis.Redis:
    """A thread-safe client for `url`; connects at the first command, to a cluster at once.

    Three tries: a call fails within half a second when the connection is refused, 2 s when nobody answers the
    connection, 3.5 s when the server hangs. A command whose answer was lost is sent again: all of `dataplane` may run
    twice. A cluster's client has the same commands, and follows its failovers.
    """
    options = {**_OPTIONS, "retry": Retry(_BACKOFF, _RETRIES)}
    if (plain := _cluster(url)) is not None:
        return cast(redis.Redis, redis.RedisCluster.from_url(plain, **options))
    return redis.Redis.from_url(url, **options)


def connect_async(url: str) -> redis.asyncio.Redis:
    """`connect` for asyncio; connects at the first command in every case."""
    options = {**_OPTIONS, "retry": AsyncRetry(_BACKOFF, _RETRIES)}
    if (plain := _cluster(url)) is not None:
        return cast(redis.asyncio.Redis, redis.asyncio.RedisCluster.from_url(plain, **options))
    return redis.asyncio.Redis.from_url(url, **options)


def _cluster(url: str) -> str | None:
    scheme, plus, rest = url.partition("+cluster://")
    return f"{scheme}://{rest}" if plus else None


class Script:
    """A Lua script: sent by its hash, and in full to a server that does not know it (yet, or since its restart)."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._sha = sha1(source.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, client: redis.Redis, keys: list[str], args: list[str | int]) -> Any:
        """Run it atomically and give its answer. Redis's errors pass through."""
        try:
            return client.evalsha(self._sha, len(keys), *keys, *args)
        except NoScriptError:
            return client.eval(self._source, len(keys), *keys, *args)

    async def run(self, client: redis.asyncio.Redis, keys: list[str], args: list[str | int]) -> Any:
        """The same, with asyncio."""
        try:
            return await client.evalsha(self._sha, len(keys), *keys, *args)
        except NoScriptError:
            return await client.eval(self._source, len(keys), *keys, *args)
