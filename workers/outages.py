"""Neighbours that are away: waited for with backoff, and logged once."""

import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeVar

import stamina
import structlog

R = TypeVar("R")

MAX_BACKOFF = timedelta(seconds=2)

_log = structlog.get_logger("intake")


class Outage:
    """One neighbour's being away: logged when it begins and when it ends, not at each try."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._since: float | None = None

    def failed(self, error: Exception) -> None:
        """A try failed."""
        if self._since is None:
            self._since = time.monotonic()
            _log.error("away", what=self._name, error=str(error)[:500], will="wait and try again; nothing is lost")

    def worked(self) -> None:
        """A try succeeded."""
        if self._since is not None:
            _log.info("back", what=self._name, after_seconds=round(time.monotonic() - self._since, 1))
            self._since = None


async def insist(call: Callable[[], Awaitable[R]], outage: Outage, is_away: Callable[[Exception], bool]) -> R:
    """The answer of `call`, which is tried without end, with backoff, while its errors say that a neighbour is away."""
    async for attempt in stamina.retry_context(
        on=is_away, attempts=None, timeout=None, wait_initial=0.1, wait_max=MAX_BACKOFF, wait_jitter=0.1
    ):
        with attempt:
            try:
                answer = await call()
            except Exception as error:
                if is_away(error):
                    outage.failed(error)
                else:
                    outage.worked()
                raise
            outage.worked()
            return answer
    raise AssertionError("the attempts never end")
