"""Running what a Temporal Schedule runs, now and not at its next moment."""

import asyncio
from datetime import timedelta
from typing import TypeVar

from pydantic import BaseModel
from temporalio.client import Client, ScheduleActionExecutionStartWorkflow, ScheduleOverlapPolicy

M = TypeVar("M", bound=BaseModel)

LOOK_EVERY_SECONDS = 0.1


async def run_now(client: Client, schedule_id: str, kind: type[M], within: timedelta) -> M:
    """The result of a run that begins now, after one that is under way; it has the last run's result to begin from.

    Raises:
        RPCError: NOT_FOUND when there is no such schedule; Temporal did not answer.
        TimeoutError: no worker came to the end of a run in time.
        WorkflowFailureError: the run failed.
    """
    handle = client.get_schedule_handle(schedule_id)
    async with asyncio.timeout(within.total_seconds()):
        before = (await handle.describe()).info.num_actions
        # Buffered: skipped while another one runs, the answer would be an older one.
        await handle.trigger(overlap=ScheduleOverlapPolicy.BUFFER_ONE)
        while True:
            info = (await handle.describe()).info
            if info.num_actions > before:
                break
            await asyncio.sleep(LOOK_EVERY_SECONDS)
        run = info.recent_actions[-1].action
        assert isinstance(run, ScheduleActionExecutionStartWorkflow)
        result: M = await client.get_workflow_handle(run.workflow_id, result_type=kind).result()
        return result
