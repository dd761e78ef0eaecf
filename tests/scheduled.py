"""What tests of workflows that a real worker runs share."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from temporalio.client import Client, ScheduleActionExecutionStartWorkflow
from temporalio.worker import Replayer

from workers.temporal import runbook_plugin


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits until `condition` is true; fails after 40 s."""
    give_up_at = time.monotonic() + 40
    while not await condition():
        assert time.monotonic() < give_up_at, "it never came true"
        await asyncio.sleep(0.05)


async def replays(client: Client, schedule_id: str, workflow: type) -> int:
    """Replays every run so far where nothing but what is deterministic is allowed; answers how many there are."""
    replayer = Replayer(workflows=[workflow], plugins=[runbook_plugin(guarded=True)])
    runs = (await client.get_schedule_handle(schedule_id).describe()).info.recent_actions
    for run in runs:
        assert isinstance(run.action, ScheduleActionExecutionStartWorkflow)
        await replayer.replay_workflow(await client.get_workflow_handle(run.action.workflow_id).fetch_history())
    return len(runs)
