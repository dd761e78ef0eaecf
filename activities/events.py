"""Pre-provisioning's looks at capacity and load, and the calendar's messages to the workflows of its events."""

import asyncio
from datetime import UTC, datetime

from temporalio import activity
from temporalio.common import WorkflowIDConflictPolicy

from activities._polling import elapsed, pause
from activities.cloudwatch import CloudWatchActivities
from activities.entities import capacity_state
from domain.calendar_sync import RunningEvent
from domain.pre_provisioning import (
    ENTRY_MEMO,
    EVENT_CHANGED,
    EVENT_WORKFLOW,
    AwaitRelease,
    EventInput,
    Released,
    TellEvent,
    WatchedEvent,
    WatchedModel,
    WatchEvent,
    event_workflow_id,
)


class EventActivities:
    """What the workflows of calendar events need of Temporal and CloudWatch."""

    def __init__(self, cloudwatch: CloudWatchActivities) -> None:
        self._cloudwatch = cloudwatch

    # ------------------------------------------------------------------ capacity

    @activity.defn
    async def await_release(self, request: AwaitRelease) -> Released:
        """Poll until the model has no more units in service than others want, or are others' own."""
        while True:
            state = await capacity_state(activity.client(), request.model)
            fixed = sum(model.units for model in state.fleet if model.committed or not model.ours)
            wanted, there = max(state.desired_units, fixed), state.units_in_service
            withdrawn = all(demand.demand_id != request.demand_id for demand in state.demands)
            if withdrawn and there <= wanted:
                return Released(done=True, detail=f"{there} units of {request.model} in service, {wanted} wanted")
            if elapsed() + request.poll_interval > request.give_up_after:
                why = state.last_error or state.doing
                return Released(
                    done=False, detail=f"{there} units of {request.model} in service, {wanted} wanted: {why}"
                )
            await pause(request.poll_interval)

    # ------------------------------------------------------------------ load

    @activity.defn
    async def watch_event(self, request: WatchEvent) -> WatchedEvent:
        """Read the load until the event ends: each model's peak with its capacity then, and all throttles.

        Heartbeats carry what was seen, so a dead worker loses nothing. What cannot be read is left out, and said.
        """
        details = activity.info().heartbeat_details
        seen = WatchedEvent.model_validate(details[0]) if details else WatchedEvent(models=request.seen)
        last = datetime.fromisoformat(details[1]) if details else datetime.min.replace(tzinfo=UTC)
        while True:
            try:
                load = await asyncio.to_thread(self._cloudwatch.read_load, request.load)
            except Exception as error:  # whatever the client raises: the event goes on, seen or not
                seen = seen.model_copy(update={"unread": str(error)})
            else:
                models = dict(seen.models)
                for name in request.load.models:
                    before, now = models.get(name) or WatchedModel(), load.model(name)
                    sent, peak = now.sent_tokens_per_second or 0, before.peak_tokens_per_second
                    capacity = now.capacity_tokens_per_second or 0
                    models[name] = WatchedModel(
                        peak_tokens_per_second=max(peak, sent),
                        capacity_tokens_per_second=capacity if sent > peak else before.capacity_tokens_per_second,
                        throttles=before.throttles + (now.throttles or 0) * (load.observed_at > last),
                        tokens_per_second=sent,
                    )
                last = max(last, load.observed_at)
                seen = WatchedEvent(models=models)
            if elapsed() >= request.lasts:
                return seen
            await pause(request.poll_interval, seen.model_dump(mode="json"), last.isoformat())

    # ------------------------------------------------------------------ the calendar's messages

    @activity.defn
    async def running_events(self, _: None = None) -> list[RunningEvent]:
        """The events that are followed, with the rows their workflows know; as visibility has them, a moment late."""
        found = []
        query = f"WorkflowType = '{EVENT_WORKFLOW}' AND ExecutionStatus = 'Running'"
        async for execution in activity.client().list_workflows(query):
            fingerprint: str = await execution.memo_value(ENTRY_MEMO, default="", type_hint=str)
            event_id = execution.id.removeprefix(event_workflow_id(""))
            found.append(RunningEvent(event_id=event_id, fingerprint=fingerprint))
        return found

    @activity.defn
    async def tell_event(self, request: TellEvent) -> None:
        """Start the event's workflow, or tell the one that runs what its row says; telling it again changes nothing."""
        event = request.event
        await activity.client().start_workflow(
            EVENT_WORKFLOW,
            EventInput(event=event),
            id=event_workflow_id(event.event_id),
            task_queue=activity.info().task_queue,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            start_signal=EVENT_CHANGED,
            start_signal_args=[event],
            memo={ENTRY_MEMO: event.fingerprint},
            static_summary=f"{event.type}, {event.multiplier:g}x".encode("ascii", "replace").decode()[:200],
        )
