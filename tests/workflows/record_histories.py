"""Records the histories that `test_replay.py` replays: `python -m tests.workflows.record_histories [PATH ...]`.

Plays every path (or those named) with the product's workflows on a Temporal server of its own and with fakes around
them; takes half a minute. Workflows that have been released are not recorded anew: a change that their histories do
not replay belongs behind `workflow.patched`.
"""

import asyncio
import json
import logging
import os
import sys
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from temporalio.client import Client, WorkflowHandle, WorkflowHistory
from temporalio.worker import Worker

from activities.entities import EntityActivities, start_override
from domain.alarms import AlarmState
from domain.calendar import CalendarEvent
from domain.capacity import Demand, DemandKind, DemandOutcome
from domain.errors import ErrorKind
from domain.incident import IncidentRecord, LeverName, LeverStatus, Phase
from domain.knobs import KnobName
from domain.messages import (
    ABORT,
    ACKNOWLEDGE,
    ALARM_CHANGED,
    APPROVE,
    APPROVE_CAPACITY,
    APPROVE_KEEP,
    APPROVE_REVERT,
    CAPACITY_STATE,
    CAPACITY_WORKFLOW,
    EXTEND,
    HAND_OVER,
    INCIDENT_WORKFLOW,
    LEASES_LOST,
    OVERRIDE_WORKFLOW,
    PAUSE_CAPACITY,
    RECONCILE_NOW,
    RECORD,
    REJECT,
    RELEASE,
    RELEASE_LEVER,
    RESUME_CAPACITY,
    SET_DEMAND,
    TAKE_OVER,
    WITHDRAW_DEMAND,
    ApproveCapacity,
    CapacityInput,
    CapacityState,
    ExtendRequest,
    HandOverRequest,
    IncidentInput,
    KeepRequest,
    OverrideExtendRequest,
    OverrideInput,
    PersonRequest,
    ReleaseLeverRequest,
    StartOverride,
    TakeOverRequest,
    UpdateResult,
    WithdrawDemand,
    capacity_id,
    incident_id,
    override_id,
)
from domain.override import OverrideKind
from domain.policy import AlarmRunbook, LadderPolicy, Policy
from domain.pre_provisioning import EVENT_CHANGED, EVENT_WORKFLOW, EventInput, event_workflow_id
from tests.servers import TemporalServer
from tests.workflows.fake_events import FakeEvents
from tests.workflows.fakes import (
    APPROVER,
    CALM,
    ENGINEER,
    HELD,
    MODEL,
    SPIKE,
    FakeWorld,
    activities_of,
    alarm,
    slow,
)
from workers.runbook_worker import WORKFLOWS
from workers.temporal import runbook_plugin

FOLDER = Path(__file__).parent / "histories"
IDENTITY = "recorder"
CARRIED = {
    "workflowTaskScheduledEventAttributes": "taskQueue",
    "activityTaskScheduledEventAttributes": "input",
    "startChildWorkflowExecutionInitiatedEventAttributes": "input",
    "workflowExecutionCompletedEventAttributes": "result",
}
LEFT_OUT = {"stackTrace", "taskId", "requestId", "workerVersion", "header", "priority", "meteringMetadata"}
"""What no replay looks at; a stack trace names files of the machine that recorded."""
KEY = f"bedrock-throttle:{MODEL}"

_DEFAULT = Policy(timetable=None)
SECOND = timedelta(seconds=1)
POLICY = _DEFAULT.model_copy(
    update={
        "capacity": _DEFAULT.capacity.model_copy(update={"drain": SECOND / 10, "minimum_hold": 0 * SECOND}),
        "escalation": _DEFAULT.escalation.model_copy(update={"snooze": SECOND / 2, "approval_reminder": 2 * SECOND}),
        "leases": _DEFAULT.leases.model_copy(update={"renew_every": 1.5 * SECOND}),
        "way_back": _DEFAULT.way_back.model_copy(update={"capacity_max_hold": 4 * SECOND, "recovered_for": SECOND}),
    }
)
"""The default, with the waits that a path sits out cut to seconds."""


FIXED = POLICY.model_copy(
    update={
        "batcher": POLICY.batcher.model_copy(update={"controller": "fixed"}),
        "knobs": {**POLICY.knobs, KnobName.BATCH_WINDOW_MS: 500},
        "latency": POLICY.latency.model_copy(update={"verify_within": SECOND / 2}),
    }
)
"""The same, with a window that was guessed."""


class Play:
    """One incident with everything of it, on a server of its own."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.world = FakeWorld(POLICY)
        self.started_at = datetime.now(UTC)

    async def opens(self, runbook: AlarmRunbook | None = "throttle") -> None:
        """The alarm comes; until the incident waits for recovery (or for people)."""
        keys = {"throttle": KEY, "latency": "latency-regression:mangaassist"}
        input = IncidentInput(
            key=keys[runbook] if runbook else "triage:Unknown",
            runbook=runbook,
            model=MODEL if runbook else None,
            alarm=alarm(AlarmState.ALARM, datetime.now(UTC), "message-1"),
        )
        self.incident: WorkflowHandle[Any, Any] = await self.client.start_workflow(
            INCIDENT_WORKFLOW, input, id=incident_id(input.key), task_queue=MODEL
        )
        await self.reaches(Phase.VERIFYING if runbook else Phase.AWAITING_DECISION)

    async def recovers(self, *, landed: bool = True) -> None:
        """Recovery, with the capacity that was bought (if it was)."""
        self.world.load = HELD
        self.world.verdicts.append(("recovered", HELD))
        await self.until(
            lambda record: (
                record.phase is Phase.AWAITING_DECISION
                and (not landed or any(lever.landed_at for lever in record.held))
            )
        )

    async def asks(
        self, update: str, who: str, outcome: str = "accepted", request: PersonRequest | None = None
    ) -> None:
        """A person asks, and is answered as expected."""
        request = request or PersonRequest(who=who, why="as agreed")
        answer: UpdateResult = await self.incident.execute_update(update, request, result_type=UpdateResult)
        if answer.outcome != outcome:
            raise RuntimeError(f"{update} by {who} was {answer.outcome}, not {outcome}: {answer.message}")

    async def approved(self) -> None:
        """The traffic has passed; somebody approves."""
        self.world.load = CALM
        await self.asks(APPROVE_REVERT, APPROVER)

    async def alarms(self, state: AlarmState) -> None:
        """The alarm changes."""
        await self.incident.signal(ALARM_CHANGED, alarm(state, datetime.now(UTC), uuid4().hex))

    async def releases_overrides(self) -> None:
        """What was kept goes."""
        running = f"WorkflowType = '{OVERRIDE_WORKFLOW}' AND ExecutionStatus = 'Running'"
        async for execution in self.client.list_workflows(running):
            request, handle = PersonRequest(who=APPROVER, why="recorded"), self.client.get_workflow_handle(execution.id)
            await handle.execute_update(RELEASE, request, result_type=UpdateResult)

    async def reaches(self, phase: Phase) -> None:
        await self.until(lambda record: record.phase is phase)

    async def until(self, what: Callable[[IncidentRecord], bool]) -> None:
        """Waits, asking as a person who watches would."""
        async with asyncio.timeout(60):
            while True:
                if what(await self.incident.query(RECORD, result_type=IncidentRecord)):
                    return
                await asyncio.sleep(0.05)

    async def histories(self) -> list[WorkflowHistory]:
        """Of every workflow that took part, once all is at rest; the capacity workflow is ended."""
        if self.incident.id != capacity_id(MODEL):
            await self.incident.result()
        if self.incident.id in (incident_id(KEY), capacity_id(MODEL)):
            await self._capacity_rests()
        started = f"StartTime >= '{self.started_at.isoformat()}'"
        runs = [(execution.id, execution.run_id) async for execution in self.client.list_workflows(started)]
        return [await self.client.get_workflow_handle(id, run_id=run).fetch_history() for id, run in sorted(runs)]

    async def _capacity_rests(self) -> None:
        await self.capacity_is(lambda state: not state.demands and len(state.fleet) <= 1)
        await self.client.get_workflow_handle(capacity_id(MODEL)).terminate("recorded")

    async def capacity_is(self, what: Callable[[CapacityState], bool]) -> CapacityState:
        """Waits until capacity is so, and its workflow at rest."""
        handle = self.client.get_workflow_handle(capacity_id(MODEL))
        async with asyncio.timeout(60):
            while True:
                state: CapacityState = await handle.query(CAPACITY_STATE, result_type=CapacityState)
                if state.doing == "idle" and what(state):
                    return state
                await asyncio.sleep(0.05)


async def approved(play: Play) -> None:
    await play.opens()
    await play.asks(APPROVE_REVERT, APPROVER, "not-possible")
    await play.recovers()
    await play.asks(APPROVE_REVERT, ENGINEER, "denied")
    await play.approved()


async def rejected_then_approved(play: Play) -> None:
    await play.opens()
    await play.asks(ACKNOWLEDGE, ENGINEER)
    await play.recovers()
    await play.asks(REJECT, APPROVER)
    longer = ExtendRequest(who=ENGINEER, why="the event goes on", lever=LeverName.CAPACITY, by=timedelta(hours=1))
    await play.asks(EXTEND, ENGINEER, request=longer)
    play.world.load = CALM
    first = ReleaseLeverRequest(who=APPROVER, why="not needed", lever=LeverName.MODEL_ROUTING)
    await play.asks(RELEASE_LEVER, APPROVER, request=first)
    await play.until(lambda record: record.levers[0].status is LeverStatus.RELEASED)
    await play.reaches(Phase.AWAITING_DECISION)
    await play.approved()


async def hold_ended(play: Play) -> None:
    await play.opens()
    await play.recovers()
    play.world.load = CALM
    await play.reaches(Phase.CLOSED)


async def aborted(play: Play) -> None:
    await play.opens()
    await play.asks(ABORT, ENGINEER, "denied")
    await play.asks(ABORT, APPROVER)


async def lever_failed(play: Play) -> None:
    play.world.refused = {"take_leases": ErrorKind.ACCESS_DENIED, "check_changes": ErrorKind.ACCESS_DENIED}
    await play.opens()
    await play.recovers()
    await play.approved()


async def alarm_returned(play: Play) -> None:
    await play.opens()
    await play.recovers()
    await play.alarms(AlarmState.OK)
    play.world.load = SPIKE
    await play.alarms(AlarmState.ALARM)
    await play.reaches(Phase.VERIFYING)
    play.world.verdicts.append(("gave-up", SPIKE))
    await play.until(lambda record: "plan is made anew" in str(record.timeline))
    await play.reaches(Phase.VERIFYING)
    await play.recovers()
    play.world.breaches = [["P99 latency 4,000 ms (target 3,000)"]]
    await play.approved()
    await play.until(lambda record: "is taken again" in str(record.timeline))
    await play.recovers()
    await play.approved()


async def scaling_lag(play: Play) -> None:
    play.world.units = 8
    await play.opens()
    await play.recovers()
    await play.approved()


async def latency_kept(play: Play) -> None:
    """A window that was the fault: reverted, kept as a standing override."""
    play.world.snapshot = play.world.snapshot.model_copy(update={"policy": FIXED})
    play.world.load = slow(4_200, 480)
    await play.opens("latency")
    play.world.load = slow(2_600, 140)
    play.world.verdicts.append(("recovered", play.world.load))
    await play.reaches(Phase.AWAITING_DECISION)
    keep = KeepRequest(who=APPROVER, why="the configured value was the fault", lever=LeverName.BATCH_WINDOW)
    await play.asks(APPROVE_KEEP, APPROVER, request=keep)
    await play.reaches(Phase.CLOSED)
    await play.releases_overrides()


async def latency_elsewhere(play: Play) -> None:
    """Redis is slow: no lever, and the incident ends by itself; looked at twice."""
    play.world.latency |= {"queue_wait_ms": 140.0, "window_ms": 150.0}
    play.world.systems["redis_read_us"] = 9_000.0
    play.world.load = slow(4_200, 140)
    play.world.snapshot = play.world.snapshot.model_copy(update={"policy": FIXED})
    await play.opens("latency")
    await play.until(lambda record: record.diagnosis is not None)
    play.world.verdicts.append(("gave-up", play.world.load))
    await play.until(lambda record: "looked for anew" in str(record.timeline))
    play.world.load = slow(2_600, 140)
    play.world.verdicts.append(("recovered", play.world.load))
    await play.reaches(Phase.CLOSED)


async def triage(play: Play) -> None:
    await play.opens(None)
    await play.asks(ACKNOWLEDGE, ENGINEER)
    await play.alarms(AlarmState.OK)


async def override(play: Play) -> None:
    """One that an approver agrees to, is extended, handed over, lost and put back, and released."""
    input = OverrideInput(
        knob=KnobName.BATCH_WINDOW_MS,
        value=700,
        kind=OverrideKind.TIMED,
        who=ENGINEER,
        reason="cost",
        duration=timedelta(hours=1),
    )
    request = StartOverride(override_id=override_id(input.knob, "recorded"), input=input)
    await start_override(play.client, request, MODEL)
    play.incident = play.client.get_workflow_handle(request.override_id)
    await play.asks(APPROVE, ENGINEER, "denied")
    await play.asks(APPROVE, APPROVER)
    longer = OverrideExtendRequest(who=APPROVER, why="goes on", by=timedelta(hours=1))
    await play.asks(EXTEND, APPROVER, request=longer)
    await play.incident.signal(LEASES_LOST)
    await play.asks(HAND_OVER, ENGINEER, request=HandOverRequest(who=ENGINEER, why="shift ends", to=APPROVER))
    await play.asks(RELEASE, ENGINEER, "denied")
    await play.asks(RELEASE, APPROVER)


async def kept(play: Play) -> None:
    """Routing becomes a standing override; the rest is given back."""
    await play.opens()
    await play.recovers()
    routing = KeepRequest(who=APPROVER, why="the new normal", lever=LeverName.MODEL_ROUTING)
    await play.asks(APPROVE_KEEP, ENGINEER, "denied", routing.model_copy(update={"who": ENGINEER}))
    await play.asks(APPROVE_KEEP, APPROVER, request=routing)
    await play.asks(APPROVE_KEEP, APPROVER, "already-done", routing)
    capacity = routing.model_copy(update={"lever": LeverName.CAPACITY})
    await play.asks(APPROVE_KEEP, APPROVER, "not-possible", capacity)
    await play.approved()
    await play.reaches(Phase.CLOSED)
    await play.releases_overrides()


async def taken_over(play: Play) -> None:
    """The automation stops; a person has the levers for three seconds, and the alarm stays on as long."""
    await play.opens()
    request = TakeOverRequest(who=ENGINEER, why="we know what it is", lasts=3 * SECOND, to=APPROVER)
    too_long = request.model_copy(update={"lasts": timedelta(days=365)})
    await play.asks(TAKE_OVER, ENGINEER, "not-possible", too_long)
    nobody = request.model_copy(update={"to": "nobody@example.com"})
    await play.asks(TAKE_OVER, ENGINEER, "not-possible", nobody)
    await play.asks(TAKE_OVER, ENGINEER, request=request)


async def short_of_units(play: Play) -> None:
    """AWS refuses units: the ladder to its last rung, and the kill switch; then they come, and go again."""
    poor = POLICY.models[MODEL].model_copy(update={"on_demand_tokens_per_second": 0})
    policy = POLICY.model_copy(
        update={"models": {**POLICY.models, MODEL: poor}, "ladder": LadderPolicy(climb_every=SECOND / 5)}
    )
    play.world.snapshot = play.world.snapshot.model_copy(update={"policy": policy})
    play.world.refused = {"create_model": ErrorKind.QUOTA_EXCEEDED}
    input = CapacityInput(state=CapacityState(model=MODEL))
    play.incident = await play.client.start_workflow(CAPACITY_WORKFLOW, input, id=capacity_id(MODEL), task_queue=MODEL)
    now = datetime.now(UTC)
    demand = Demand(
        demand_id=ENGINEER,
        model=MODEL,
        kind=DemandKind.PERSON,
        units=20,
        start=now,
        end=now + timedelta(hours=1),
        reason="a launch",
        asked_by=ENGINEER,
    )
    await play.incident.execute_update(SET_DEMAND, demand, result_type=DemandOutcome)
    [rung] = (await play.capacity_is(lambda state: bool(state.awaiting))).awaiting
    consent = ApproveCapacity(who=APPROVER, why="as agreed", approval_id=rung.approval_id)
    await play.asks(APPROVE_CAPACITY, ENGINEER, "denied", consent.model_copy(update={"who": ENGINEER}))
    await play.asks(APPROVE_CAPACITY, APPROVER, request=consent)
    await play.capacity_is(lambda state: len(state.leases) == 2)
    await play.asks(PAUSE_CAPACITY, ENGINEER)
    await play.asks(RESUME_CAPACITY, APPROVER)
    play.world.refused = {}
    await play.asks(RECONCILE_NOW, ENGINEER)
    await play.capacity_is(lambda state: state.units_in_service == 20 and not state.leases)
    over = WithdrawDemand(model=MODEL, demand_id=ENGINEER, reason="over")
    await play.incident.execute_update(WITHDRAW_DEMAND, over, result_type=DemandOutcome)


async def event(play: Play) -> None:
    """A calendar event, moved while it waits; bought for, in service in time, over, released."""
    soon = {"lead_time": SECOND, "lasts": SECOND}
    types = {name: kind.model_copy(update=soon) for name, kind in POLICY.calendar.event_types.items()}
    policy = POLICY.model_copy(
        update={
            "calendar": POLICY.calendar.model_copy(
                update={"event_types": types, "preflight_ahead": 4 * SECOND, "verify_margin": SECOND / 2}
            ),
            "capacity": POLICY.capacity.model_copy(update={"provisioning_lag": SECOND, "provisioning_lead": SECOND}),
        }
    )
    play.world.snapshot = play.world.snapshot.model_copy(update={"policy": policy})
    entry = CalendarEvent(
        event_id="recorded",
        type="monday_release",
        starts_at=datetime.now(UTC) + timedelta(days=1),
        multiplier=4,
        models=(MODEL,),
        lead_time=SECOND,
        source="a path",
        asked_by=ENGINEER,
    )
    play.incident = await play.client.start_workflow(
        EVENT_WORKFLOW, EventInput(event=entry), id=event_workflow_id(entry.event_id), task_queue=MODEL
    )
    moved = entry.model_copy(update={"starts_at": datetime.now(UTC) + 5 * SECOND})
    await play.incident.signal(EVENT_CHANGED, moved)
    await play.incident.result()


PATHS: dict[str, Callable[[Play], Awaitable[None]]] = {
    path.__name__: path
    for path in (
        approved,
        rejected_then_approved,
        hold_ended,
        aborted,
        lever_failed,
        alarm_returned,
        scaling_lag,
        latency_kept,
        latency_elsewhere,
        triage,
        override,
        kept,
        taken_over,
        short_of_units,
        event,
    )
}


async def record(client: Client, path: str) -> list[WorkflowHistory]:
    """Plays a path; the histories of every workflow that took part."""
    play = Play(client)
    owners = FakeEvents(), play.world, EntityActivities(lambda: play.world.snapshot)
    by_name = {method.__name__: method for method in activities_of(*owners)}  # of the same name the last one
    activities = list(by_name.values())
    async with Worker(client, task_queue=MODEL, workflows=WORKFLOWS, activities=activities, identity=IDENTITY):
        await PATHS[path](play)
        return await play.histories()


def write(path: Path, histories: list[WorkflowHistory]) -> None:
    """One event a line, its payloads as plain JSON; without what commands carry: a replay makes it anew."""
    workflows = []
    for history in histories:
        events = history.to_json_dict()["events"]
        for event in events:
            for attributes, field in CARRIED.items():
                event.get(attributes, {}).pop(field, None)
        lines = ",\n".join(json.dumps(_readable(event), ensure_ascii=False) for event in events)
        workflows.append(f"{json.dumps(history.workflow_id)}: [\n{lines}\n]")
    path.write_text("{\n" + ",\n".join(workflows) + "\n}\n", encoding="utf-8")


def read(path: Path) -> Iterator[WorkflowHistory]:
    """What `write` wrote."""
    for name, events in json.loads(path.read_text(encoding="utf-8")).items():
        yield WorkflowHistory.from_json(name, {"events": _original(events)})


def _readable(part: Any) -> Any:
    if isinstance(part, list):
        return [_readable(item) for item in part]
    if not isinstance(part, Mapping):
        return part
    metadata = part.get("metadata")
    if part.keys() == {"metadata", "data"} and isinstance(metadata, Mapping):
        plain = {name: b64decode(value).decode() for name, value in metadata.items()}
        if plain.pop("encoding") == "json/plain":
            return {"json": json.loads(b64decode(part["data"])), **plain}
    return {name: _readable(value) for name, value in part.items() if name not in LEFT_OUT}


def _original(part: Any) -> Any:
    if isinstance(part, list):
        return [_original(item) for item in part]
    if not isinstance(part, Mapping):
        return part
    if "json" in part:
        metadata = {"encoding": "json/plain", **{name: value for name, value in part.items() if name != "json"}}
        return {
            "metadata": {name: b64encode(value.encode()).decode() for name, value in metadata.items()},
            "data": b64encode(json.dumps(part["json"]).encode()).decode(),
        }
    return {name: _original(value) for name, value in part.items()}


async def main(paths: list[str]) -> int:
    """Records the paths; exit code 2 when there is none of that name."""
    if unknown := [path for path in paths if path not in PATHS]:
        print(f"there is no path {', '.join(unknown)}; there are {', '.join(PATHS)}", file=sys.stderr)
        return 2
    logging.disable(logging.WARNING)  # activities that fail on purpose
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as data_dir:
        server = TemporalServer(Path(data_dir)).start()
        try:
            client = await Client.connect(server.address, plugins=[runbook_plugin(guarded=True)], identity=IDENTITY)
            for number, path in enumerate(paths, 1):
                print(f"{number} of {len(paths)}: {path}", end="", flush=True)
                histories = await record(client, path)
                write(FOLDER / f"{path}.json", histories)
                events = sum(len(history.events) for history in histories)
                print(f": {len(histories)} workflows, {events} events", flush=True)
        finally:
            server.kill()
    return 0


if __name__ == "__main__":
    code = asyncio.run(main(sys.argv[1:] or list(PATHS)))
    sys.stdout.flush()
    os._exit(code)  # a process that used a Temporal client may crash at interpreter exit (sdk-python issue 300)
