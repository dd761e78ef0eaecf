"""Reading before the levers: tried again until the evidence budget is spent, then planned without."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeVar

from domain.evidence import Check, Evidence

R = TypeVar("R")

_TRY_AGAIN = timedelta(milliseconds=100)


async def budgeted(budget: timedelta, read: Callable[[], Awaitable[R]]) -> tuple[R | None, str]:
    """What `read` answers, tried again until the budget is spent; else None, and why it could not be read."""
    why = f"no answer within {budget.total_seconds():g} s"
    try:
        async with asyncio.timeout(budget.total_seconds()):
            while True:
                try:
                    return await read(), ""
                except Exception as error:
                    why = str(error)
                await asyncio.sleep(_TRY_AGAIN.total_seconds())
    except TimeoutError:
        return None, why


def not_read(name: str, why: str) -> Check:
    """The check that could not be made."""
    return Check(name=name, finding=f"could not be read: {why}", breaching=None, evidence=Evidence(), duration_ms=0)
