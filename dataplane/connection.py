"""How to reach Redis: short timeouts and few retries, set on purpose, and Lua scripts by their hash."""

from hashlib import sha1
from typing import Any

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry

_CONNECT_TIMEOUT_SECONDS = 0.5
_ANSWER_TIMEOUT_SECONDS = 1.0
_RETRIES = 2


def connect(url: str) -> redis.Redis:
    """A thread-safe client for `url` (`redis://`, `rediss://` or `unix://`); connects at the first command.

    Three tries: a call fails within half a second when the connection is refused, 2 s when nobody answers the
    connection, 3.5 s when the server hangs. A command whose answer was lost is sent again: all of `dataplane` may run
    twice.
    """
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        socket_connect_timeout=_CONNECT_TIMEOUT_SECONDS,
        socket_timeout=_ANSWER_TIMEOUT_SECONDS,
        socket_keepalive=True,
        health_check_interval=15,
        retry=Retry(ExponentialWithJitterBackoff(base=0.02, cap=0.2), _RETRIES),
    )


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
