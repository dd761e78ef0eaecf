"""Temporal Schedules on a real server: made, brought up to date, deleted, and left paused."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import BaseModel
from temporalio.client import Client, Schedule, ScheduleActionStartWorkflow, ScheduleOverlapPolicy

from activities.schedules import RUN_TIMEOUT, ScheduledWorkflow, ensure_schedules
from tests.servers import TemporalServer
from workers.settings import Settings
from workers.temporal import connect

QUEUE = "schedules-test"


class _Input(BaseModel):
    number: int


ONE = ScheduledWorkflow(
    "one",
    "SomeWorkflow",
    every=timedelta(minutes=15),
    catch_up=timedelta(minutes=5),
    note="First",
    input=_Input(number=1),
)
TWO = ScheduledWorkflow("two", "OtherWorkflow", every=timedelta(seconds=0.2), catch_up=timedelta(0), note="Second")


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    """A server of its own: schedules are a whole namespace's."""
    server = TemporalServer(tmp_path).start()
    yield await connect(Settings(temporal_address=server.address))
    server.kill()


async def _known(client: Client, schedule_id: str) -> Schedule:
    return (await client.get_schedule_handle(schedule_id).describe()).schedule


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    give_up_at = time.monotonic() + 30
    while not await condition():
        assert time.monotonic() < give_up_at, "it never came true"
        await asyncio.sleep(0.05)


async def _listed(client: Client) -> set[str]:
    return {listed.id async for listed in await client.list_schedules()}


async def test_schedules_become_what_the_list_says(client: Client) -> None:
    # Two workers start at once.
    both = await asyncio.gather(*(ensure_schedules(client, [ONE, TWO], QUEUE) for _ in range(2)))
    assert sorted(both[0] + both[1]) == ["created one", "created two"]
    one = await _known(client, "one")
    assert isinstance(one.action, ScheduleActionStartWorkflow)
    assert (one.action.workflow, one.action.id, one.action.task_queue) == ("SomeWorkflow", "one", QUEUE)
    assert one.action.execution_timeout == RUN_TIMEOUT, "a run that hangs does not stop all later ones"
    assert one.spec.intervals[0].every == timedelta(minutes=15)
    assert one.policy.catchup_window == timedelta(minutes=5)
    assert one.policy.overlap is ScheduleOverlapPolicy.SKIP
    assert one.state.note == "First"
    two = await _known(client, "two")  # Temporal's shortest
    assert (two.spec.intervals[0].every, two.policy.catchup_window) == (timedelta(seconds=1), timedelta(seconds=10))

    assert await ensure_schedules(client, [ONE, TWO], QUEUE) == []

    # A person pauses one; the policy changes its interval; another schedule, not ours, is there.
    await client.get_schedule_handle("one").pause(note="freeze until Monday")
    await client.create_schedule("theirs", TWO.schedule(QUEUE))
    await _until(lambda: _has(client, {"one", "two", "theirs"}))
    hourly = ScheduledWorkflow(
        "one",
        "SomeWorkflow",
        every=timedelta(hours=1),
        catch_up=timedelta(minutes=5),
        note="First",
        input=_Input(number=2),
    )
    assert await ensure_schedules(client, [hourly], QUEUE) == ["updated one", "deleted two"]
    one = await _known(client, "one")
    assert one.spec.intervals[0].every == timedelta(hours=1)
    assert (one.state.paused, one.state.note) == (True, "freeze until Monday")
    await _until(lambda: _has(client, {"one", "theirs"}))
    assert await ensure_schedules(client, [hourly], QUEUE) == []


async def _has(client: Client, ids: set[str]) -> bool:
    return await _listed(client) == ids
