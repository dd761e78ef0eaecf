"""What every activity that waits for the world shares: it heartbeats while it sleeps, and counts from the start."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from temporalio import activity

HEARTBEAT_SECONDS = 5.0
"""Well under the heartbeat timeout of `workflows._step.wait`, however long the poll interval is."""


def elapsed() -> timedelta:
    """Time since the activity was scheduled, whatever workers died meanwhile."""
    return datetime.now(UTC) - activity.info().scheduled_time


async def pause(interval: timedelta, *details: Any) -> None:
    """Sleep until the next poll, telling Temporal that the activity lives; `details` are what a next attempt gets."""
    until = time.monotonic() + interval.total_seconds()
    while True:
        activity.heartbeat(*details)
        remaining = until - time.monotonic()
        if remaining <= 0:
            return
        await asyncio.sleep(min(remaining, HEARTBEAT_SECONDS))
