"""Temporal Schedules: made to say what a list says, and looked at. The list itself is in `workers/schedules.py`.

Intervals, not calendars: they are business durations and so can be rehearsed; what recurs by the calendar is computed
in the domain from the business clock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog
from pydantic import BaseModel
from temporalio import activity
from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionExecutionStartWorkflow,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleDescription,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    ScheduleState,
    ScheduleUpdate,
    ScheduleUpdateInput,
    WorkflowExecutionStatus,
)
from temporalio.service import RPCError, RPCStatusCode

from domain.capacity import MANAGED_BY, MANAGED_BY_TAG
from domain.health import ScheduleSeen
from domain.messages import PolicySnapshot

SHORTEST = timedelta(seconds=1)
"""Temporal counts intervals in whole seconds."""
SHORTEST_CATCH_UP = timedelta(seconds=10)
"""Temporal makes a shorter one this long."""
RUNS_LOOKED_AT = 3
RUN_TIMEOUT = timedelta(minutes=30)
"""A run that hangs ends then: while it goes on, no other one begins. Longer than everything that a run tries."""

_log = structlog.get_logger()


@dataclass(frozen=True)
class ScheduledWorkflow:
    """One schedule. While a run goes on, the next one is skipped."""

    schedule_id: str
    """Also the workflow id of its runs, which Temporal ends with the time of each."""
    workflow: str
    every: timedelta
    catch_up: timedelta
    """A run that is late by more than this (Temporal was away) is left out; never more than the lead time of what the
    runs prepare. Temporal's own default is a year."""
    note: str
    """What it does, for people."""
    input: BaseModel | None = None

    def schedule(self, task_queue: str, state: ScheduleState | None = None) -> Schedule:
        """As Temporal takes it. `state` is kept where a person paused it."""
        return Schedule(
            action=ScheduleActionStartWorkflow(
                self.workflow,
                args=[] if self.input is None else [self.input],
                id=self.schedule_id,
                task_queue=task_queue,
                execution_timeout=RUN_TIMEOUT,
                static_summary=self.note,
            ),
            spec=ScheduleSpec(intervals=[ScheduleIntervalSpec(every=_whole(self.every, SHORTEST))]),
            policy=SchedulePolicy(
                overlap=ScheduleOverlapPolicy.SKIP, catchup_window=_whole(self.catch_up, SHORTEST_CATCH_UP)
            ),
            state=state if state is not None and state.paused else ScheduleState(note=self.note),
        )


def _whole(duration: timedelta, at_least: timedelta) -> timedelta:
    return max(timedelta(seconds=round(duration.total_seconds())), at_least)


async def ensure_schedules(client: Client, wanted: Sequence[ScheduledWorkflow], task_queue: str) -> list[str]:
    """Create what is missing, update what differs, delete ours that nobody wants any more; answers what was done.

    What a person paused stays paused, with the person's note. Two processes may do this at the same time: they write
    the same. One that has an older list deletes what it does not know; the health check of the newer one puts it back.

    Raises:
        RPCError: Temporal did not answer.
    """
    done = [what for item in wanted if (what := await _ensure(client, item, task_queue))]
    unwanted = await _ours(client) - {item.schedule_id for item in wanted}
    for schedule_id in sorted(unwanted):
        try:
            await client.get_schedule_handle(schedule_id).delete()
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
        else:
            done.append(f"deleted {schedule_id}")
    if done:
        _log.info("schedules", done=done)
    return done


class ScheduleActivities:
    """The health check's look at the schedules, and its repair of them."""

    def __init__(self, wanted: Callable[[PolicySnapshot], Sequence[ScheduledWorkflow]]) -> None:
        self._wanted = wanted

    @activity.defn
    async def look_at_schedules(self, snapshot: PolicySnapshot) -> list[ScheduleSeen]:
        """Every schedule that should be there, and how its last runs ended."""
        client, queue = activity.client(), activity.info().task_queue
        return [await _seen(client, item, queue) for item in self._wanted(snapshot)]

    @activity.defn
    async def write_schedules(self, snapshot: PolicySnapshot) -> list[str]:
        """Make the schedules what the policy says; answers what was done. Doing it again does nothing."""
        return await ensure_schedules(activity.client(), self._wanted(snapshot), activity.info().task_queue)


async def _seen(client: Client, item: ScheduledWorkflow, task_queue: str) -> ScheduleSeen:
    try:
        found = await client.get_schedule_handle(item.schedule_id).describe()
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        return ScheduleSeen(schedule_id=item.schedule_id, every=item.every, exists=False)
    state, info = found.schedule.state, found.info
    return ScheduleSeen(
        schedule_id=item.schedule_id,
        every=found.schedule.spec.intervals[0].every if found.schedule.spec.intervals else item.every,
        exists=True,
        as_wanted=_same(found.schedule, item.schedule(task_queue, state), await _payloads(client, item)),
        paused=(state.note or "") if state.paused else None,
        changed_at=info.last_updated_at or info.created_at,
        last_run_at=info.recent_actions[-1].started_at if info.recent_actions else None,
        runs=tuple(await _how_runs_ended(client, found)),
    )


async def _how_runs_ended(client: Client, found: ScheduleDescription) -> list[str]:
    """Of the last runs, oldest first; what retention has removed is left out."""
    ended = []
    for result in found.info.recent_actions[-RUNS_LOOKED_AT:]:
        run = result.action
        assert isinstance(run, ScheduleActionExecutionStartWorkflow)
        try:
            described = await client.get_workflow_handle(
                run.workflow_id, first_execution_run_id=run.first_execution_run_id
            ).describe()
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
        else:
            ended.append((described.status or WorkflowExecutionStatus.RUNNING).name.lower())
    return ended


async def _payloads(client: Client, item: ScheduledWorkflow) -> Sequence[object]:
    return await client.data_converter.encode([] if item.input is None else [item.input])


async def _ensure(client: Client, item: ScheduledWorkflow, task_queue: str) -> str | None:
    """What was done; None: it is as it should be."""
    try:
        await client.create_schedule(item.schedule_id, item.schedule(task_queue), memo={MANAGED_BY_TAG: MANAGED_BY})
    except ScheduleAlreadyRunningError:
        payloads = await _payloads(client, item)
        changed = False

        def updated(found: ScheduleUpdateInput) -> ScheduleUpdate | None:
            nonlocal changed
            known = found.description.schedule
            desired = item.schedule(task_queue, known.state)
            changed = not _same(known, desired, payloads)
            # Not written when it is the same: a pause by a person at this very moment is not overwritten.
            return ScheduleUpdate(schedule=desired) if changed else None

        await client.get_schedule_handle(item.schedule_id).update(updated)
        return f"updated {item.schedule_id}" if changed else None
    return f"created {item.schedule_id}"


def _same(known: Schedule, desired: Schedule, payloads: Sequence[object]) -> bool:
    action, wanted = known.action, desired.action
    assert isinstance(wanted, ScheduleActionStartWorkflow)
    return (
        isinstance(action, ScheduleActionStartWorkflow)
        and (action.workflow, action.id, action.task_queue) == (wanted.workflow, wanted.id, wanted.task_queue)
        and action.execution_timeout == wanted.execution_timeout
        and list(action.args) == list(payloads)
        and [item.every for item in known.spec.intervals] == [item.every for item in desired.spec.intervals]
        and not (known.spec.calendars or known.spec.cron_expressions)
        and known.policy == desired.policy
    )


async def _ours(client: Client) -> set[str]:
    """Ids of the schedules that this product made, as far as visibility knows yet."""
    found = set()
    async for listed in await client.list_schedules():
        if await listed.memo_value(MANAGED_BY_TAG, default=None) == MANAGED_BY:
            found.add(listed.id)
    return found
