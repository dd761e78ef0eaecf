"""Waits of hours and days under the default policy, each workflow alone on a server that skips time.

Its clock is the workflow's own, so everything around the workflow is a recording fake.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowHandle
from temporalio.service import RPCError
from temporalio.testing import TimeSkipper, TimeSkippingConfig
from temporalio.worker import Replayer, Worker

from domain.alarms import AlarmState
from domain.capacity import Demand, DemandKind, DemandOutcome
from domain.incident import IncidentRecord, Lever, LeverName, LeverStatus, Phase
from domain.knobs import KnobName
from domain.messages import (
    ABORT,
    ACKNOWLEDGE,
    ALARM_CHANGED,
    APPROVE_REVERT,
    CAPACITY_CHANGED,
    CAPACITY_STATE,
    CAPACITY_WORKFLOW,
    CLEANUP_WORKFLOW,
    EXTEND,
    INCIDENT_WORKFLOW,
    OVERRIDE_WORKFLOW,
    RECORD,
    SET_DEMAND,
    CapacityInput,
    CapacityState,
    CleanupInput,
    CleanupResult,
    ExtendRequest,
    IncidentInput,
    OverrideExtendRequest,
    OverrideInput,
    PersonRequest,
    PurchaseState,
    UpdateResult,
    incident_id,
)
from domain.override import OverrideKind, OverridePhase, OverrideRecord
from domain.policy import Policy
from tests.servers import TemporalServer
from tests.workflows.fakes import (
    APPROVER,
    BASE_ARN,
    CALM,
    ENGINEER,
    HELD,
    MODEL,
    SLIGHT,
    SPIKE,
    FakeEntities,
    FakeWorld,
    activities_of,
    alarm,
    load,
)
from workers.runbook_worker import WORKFLOWS
from workers.temporal import runbook_plugin

POLICY = Policy(timetable=None)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
EVENTS_AN_HOUR = 12
"""What a waiting incident may cost (design: lease length)."""
ON_CALL, SENIOR = "on-call", "senior on-call"


@dataclass
class Lab:
    """A worker on the time-skipping server, its fakes, and the one workflow under test."""

    skipper: TimeSkipper
    world: FakeWorld
    queue: str
    handle: WorkflowHandle[Any, Any] | None = None

    @property
    def workflow(self) -> WorkflowHandle[Any, Any]:
        assert self.handle is not None
        return self.handle

    async def start(self, name: str, input: Any, id: str) -> None:
        self.handle = await self.skipper.client.start_workflow(name, input, id=id, task_queue=self.queue)

    async def start_incident(self, *, runbook: bool = True) -> None:
        """With an alarm that is on, until it has mitigated (or, in triage, waits for people)."""
        key = f"bedrock-throttle:{self.queue}"
        change = alarm(AlarmState.ALARM, datetime.now(UTC), "1")
        input = IncidentInput(
            key=key, runbook="throttle" if runbook else None, model=MODEL if runbook else None, alarm=change
        )
        await self.start(INCIDENT_WORKFLOW, input, incident_id(key))
        await self.reaches(Phase.VERIFYING if runbook else Phase.AWAITING_DECISION)

    async def start_recovered(self, load: Any = HELD) -> datetime:
        """An incident that waits for a decision, its capacity landed; answers its time then."""
        await self.start_incident()
        await self.recover(load)
        if (await self.record()).units_bought:
            await self.workflow.signal(CAPACITY_CHANGED, outcome("in_service"))
            await self.until(lambda record: record.levers[-1].landed_at is not None)
        return await self.now()

    async def recover(self, load: Any = HELD) -> None:
        self.world.load = load
        self.world.verdicts.append(("recovered", load))
        await self.reaches(Phase.AWAITING_DECISION)

    async def record(self) -> IncidentRecord:
        record: IncidentRecord = await self.workflow.query(RECORD, result_type=IncidentRecord)
        return record

    async def reaches(self, phase: Phase) -> IncidentRecord:
        return await self.until(lambda record: record.phase is phase)

    async def until(self, what: Callable[[IncidentRecord], bool]) -> IncidentRecord:
        async def holds() -> IncidentRecord | None:
            record = await self.record()
            return record if what(record) else None

        found: IncidentRecord = await until(holds)
        return found

    async def passes(self, duration: timedelta) -> None:
        """Let the workflow's time pass; a workflow that waits for something else than time would hang for ever."""
        await asyncio.wait_for(self.skipper.fast_forward(self.workflow, duration), 60)

    async def now(self) -> datetime:
        return await self.skipper.get_current_time(self.workflow)

    async def asks(self, update: str, request: PersonRequest) -> UpdateResult:
        result: UpdateResult = await self.workflow.execute_update(update, request, result_type=UpdateResult)
        return result

    async def alarm(self, state: AlarmState) -> None:
        await self.workflow.signal(ALARM_CHANGED, alarm(state, await self.now(), uuid4().hex))

    async def paged(self, to: str, times: int = 1) -> list[str]:
        """Texts of the pages to exactly these people, once there are as many."""
        pages: list[str] = await until(lambda: enough(self.world.pages(to), times))
        return pages

    async def events(self) -> int:
        """Events of the history, without those that only skipping writes."""
        history = await self.workflow.fetch_history()
        names = [EventType.Name(event.event_type) for event in history.events]
        return sum("TIME_SKIPPING" not in name and "OPTIONS_UPDATED" not in name for name in names)


async def until(what: Callable[[], Awaitable[Any]], seconds: float = 40) -> Any:
    """Waits for something true and answers it."""
    give_up_at = asyncio.get_running_loop().time() + seconds
    while not (value := await what()):
        assert asyncio.get_running_loop().time() < give_up_at, "it never came true"
        await asyncio.sleep(0.02)
    return value


def outcome(status: Any, detail: str = "30 of 30 units in service") -> DemandOutcome:
    return DemandOutcome(demand_id="x", status=status, units_in_service=30, units_wanted=30, detail=detail)


def by(who: str, why: str = "because") -> PersonRequest:
    return PersonRequest(who=who, why=why)


LEVERS = [LeverName.MODEL_ROUTING, LeverName.CACHE_TTL, LeverName.CAPACITY]
"""Of a throttle mitigation, in the order of the way back."""


def lever(record: IncidentRecord, name: LeverName) -> Lever:
    found = record.lever(name)
    assert found is not None
    return found


@pytest.fixture
async def lab(time_skipping_temporal: TemporalServer) -> AsyncIterator[Lab]:
    client = await Client.connect(time_skipping_temporal.address, plugins=[runbook_plugin()])
    skipper = TimeSkipper(client, config=TimeSkippingConfig(enabled=False, max_session_skip_count=5000))
    world = FakeWorld()
    lab = Lab(skipper, world, uuid4().hex[:8])
    activities = activities_of(world, FakeEntities(world))
    async with Worker(skipper.client, task_queue=lab.queue, workflows=WORKFLOWS, activities=activities):
        yield lab
        replayer = Replayer(workflows=WORKFLOWS, plugins=[runbook_plugin()])
        await replayer.replay_workflow(await lab.workflow.fetch_history())
        with suppress(RPCError):  # closed
            await lab.workflow.terminate()


async def test_while_capacity_lags_behind_nothing_goes_back_on_units_that_have_not_come(lab: Lab) -> None:
    """Scenario 4, from its own plan to the way back; its leases are found by what undoes them."""
    lab.world.units = 8
    await lab.start_incident()
    evening = load(0.35, throttles=0)
    await lab.recover(evening)
    record = await lab.until(lambda record: record.diagnosis is not None)
    assert (record.runbook, record.units_before, record.units_bought) == ("scaling-lag", 8, 7)
    assert record.diagnosis is not None
    assert [cause.id for cause in record.diagnosis.causes] == ["access-denied", "mend-and-re-run"]
    [leases] = [request.leases for request in lab.world.asked("take_leases")]
    assert [(lease.knob, lease.value) for lease in leases] == [
        (KnobName.MODEL_ROUTING, {"faq": "haiku", "greeting": "haiku"}),
        (KnobName.REQUEST_COALESCING, True),
        (KnobName.CACHE_TTL_SECONDS, 90),
    ]
    [demand] = lab.world.asked("set_demand")
    assert demand.units == 15
    assert (await lab.asks(APPROVE_REVERT, by(APPROVER))).outcome == "accepted"
    kept = (await lab.until(lambda record: "of 8,000 provisioned" in str(record.timeline))).held
    assert {lever.name for lever in kept} == set(LeverName) - {LeverName.BATCH_WINDOW}, "8 units do not carry it"
    await lab.reaches(Phase.AWAITING_DECISION)
    await lab.workflow.signal(CAPACITY_CHANGED, outcome("in_service"))
    await lab.until(lambda record: record.levers[-1].landed_at is not None)
    assert (await lab.asks(APPROVE_REVERT, by(APPROVER))).outcome == "accepted"
    closed = await lab.reaches(Phase.CLOSED)
    assert {lever.status for lever in closed.levers} == {LeverStatus.RELEASED}
    [cleaned] = [request for request in lab.world.asked("release_leases") if len(request.lease_ids) == 3]
    assert set(cleaned.lease_ids) == {lease.lease_id for lease in leases}


async def test_the_first_hold_to_end_after_an_hour_in_recovery_starts_the_whole_staged_way_back(lab: Lab) -> None:
    await lab.start_recovered(CALM)
    await lab.passes(POLICY.way_back.capacity_max_hold - MINUTE)
    record = await lab.record()
    assert record.phase is Phase.AWAITING_DECISION
    assert lab.world.asked("release_leases", "withdraw_demand") == []
    await lab.passes(2 * MINUTE)
    record = await lab.reaches(Phase.CLOSED)
    released = [(lever.released_at, lever.name) for lever in record.levers]
    assert [name for _, name in sorted(released)] == LEVERS
    assert len(lab.world.asked("watch_release")) == 3
    assert record.decisions == []
    assert (record.knobs_at_baseline, record.capacity_at_baseline) == (True, True)
    assert record.calendar_proposal is not None
    assert not record.calendar_proposal.written, "nobody approved it"


async def test_a_hold_that_ends_early_in_recovery_pages_the_next_tier_and_the_next_hold_gives_back(lab: Lab) -> None:
    await lab.start_recovered()
    await lab.passes(3.5 * HOUR)
    lab.world.load = SPIKE
    await lab.alarm(AlarmState.ALARM)
    await lab.reaches(Phase.VERIFYING)
    await lab.recover()
    await lab.passes(HOUR)
    [text] = await lab.paged(SENIOR)
    assert text == (
        "a hold ended without long enough in recovery; the levers stay. "
        "Running cost so far: 40.0 unit-hours, about 307 USD."
    )
    assert [held.status for held in (await lab.record()).held] == [LeverStatus.IN_FORCE] * 3
    assert lab.world.asked("release_leases", "withdraw_demand") == []

    lab.world.load = CALM
    await lab.passes(POLICY.way_back.lever_max_hold - 5 * HOUR)
    assert (await lab.record()).phase is Phase.AWAITING_DECISION
    await lab.passes(HOUR)
    record = await lab.reaches(Phase.CLOSED)
    assert "a hold ended after long enough" in " ".join(entry.text for entry in record.timeline)
    reminders = lab.world.pages(SENIOR)[1:]
    assert ["waits for a decision. Running cost" in page for page in reminders] == [True] * 3, "past its hold, capacity"


async def test_under_load_no_hold_gives_back_and_a_day_of_waiting_keeps_every_lever(lab: Lab) -> None:
    await lab.start_recovered(HELD)
    held = (await lab.record()).held
    await lab.passes(25 * HOUR + MINUTE)
    assert len(lab.world.asked("renew_leases")) == 25
    for renewal in lab.world.asked("renew_leases"):
        assert renewal.leases == [lever.lease for lever in held if lever.lease]
    record = await lab.record()
    assert (record.phase, [lever.name for lever in record.held]) == (Phase.AWAITING_DECISION, LEVERS)
    next_tier = await lab.paged(SENIOR, 2)
    next_tier = lab.world.pages(SENIOR)
    assert ["must stay" in text for text in next_tier] == [True, False, False, False, True], "after 4 h and after 24 h"
    assert all("waits for a decision. Running cost" in text for text in next_tier[1:4]), "capacity is past its hold"
    assert "Running cost so far: 240.0 unit-hours, about 1,841 USD." in next_tier[-1]
    assert lab.world.pages(ON_CALL) == []
    assert lab.world.asked("release_leases", "withdraw_demand", "watch_release") == []
    demands = lab.world.asked("set_demand")
    assert demands[-1].end > await lab.now() + POLICY.leases.cache_ttl_seconds, "the demand goes on while it must stay"
    assert {demand.units for demand in demands} == {demands[0].units}

    lab.world.load = CALM
    assert (await lab.asks(APPROVE_REVERT, by(APPROVER))).outcome == "accepted"
    record = await lab.reaches(Phase.CLOSED)
    assert [lever.status for lever in record.levers] == [LeverStatus.RELEASED] * 3


async def test_people_are_reminded_until_somebody_acknowledges_and_then_waiting_is_cheap(lab: Lab) -> None:
    lab.world.load = SLIGHT
    await lab.start_recovered(SLIGHT)
    assert [lever.name for lever in (await lab.record()).held] == [LeverName.MODEL_ROUTING, LeverName.CACHE_TTL]
    await lab.passes(MINUTE)
    before = await lab.events()
    await lab.passes(12 * HOUR)
    assert await lab.events() - before <= 12 * EVENTS_AN_HOUR, "reminders included"
    assert ["waits for a decision. No bought capacity" in text for text in await lab.paged(ON_CALL, 2)] == [True] * 2
    assert (await lab.asks(ACKNOWLEDGE, by(ENGINEER))).outcome == "accepted"
    await lab.passes(MINUTE)
    before = await lab.events()
    await lab.passes(11 * HOUR)
    assert await lab.events() - before <= 11 * EVENTS_AN_HOUR
    assert len(lab.world.asked("renew_leases")) == 23
    assert len(lab.world.pages(ON_CALL)) == 2
    await lab.passes(HOUR)
    await lab.reaches(Phase.CLOSED)


async def test_an_extension_is_counted_priced_and_holds_that_much_longer(lab: Lab) -> None:
    await lab.start_recovered(CALM)
    [demand] = lab.world.asked("set_demand")
    before = await lab.record()
    by_two = ExtendRequest(who=ENGINEER, why="the event goes on", lever=LeverName.CAPACITY, by=2 * HOUR)
    answer = await lab.asks(EXTEND, by_two)
    assert answer.outcome == "accepted"
    assert "20.0 unit-hours, about 153 USD more" in answer.message
    capacity = lever(await lab.record(), LeverName.CAPACITY)
    assert (capacity.extensions, capacity.hold_until) == (1, hold(before, LeverName.CAPACITY) + 2 * HOUR)
    [_, longer] = lab.world.asked("set_demand")
    ends_at = hold(before, LeverName.CAPACITY) + 2 * HOUR + POLICY.leases.cache_ttl_seconds
    assert longer == demand.model_copy(update={"end": ends_at})

    await lab.passes(6 * HOUR - MINUTE)
    assert (await lab.record()).phase is Phase.AWAITING_DECISION
    await lab.passes(2 * MINUTE)
    await lab.reaches(Phase.CLOSED)


async def test_an_extension_after_the_hold_ended_counts_from_now(lab: Lab) -> None:
    await lab.start_recovered(HELD)
    await lab.passes(10 * HOUR)
    now = await lab.now()
    answer = await lab.asks(EXTEND, ExtendRequest(who=ENGINEER, why="it goes on", by=3 * HOUR))
    assert answer.outcome == "accepted"
    record = await lab.record()
    assert MINUTE > hold(record, LeverName.CAPACITY) - (now + 3 * HOUR) >= timedelta(0)
    longest_lease = POLICY.leases.cache_ttl_seconds
    assert lab.world.asked("set_demand")[-1].end == hold(record, LeverName.CAPACITY) + longest_lease
    lab.world.load = CALM
    await lab.passes(3 * HOUR + MINUTE)
    await lab.reaches(Phase.CLOSED)


async def test_capacity_that_lapsed_is_no_longer_held_and_costs_nothing_more(lab: Lab) -> None:
    await lab.start_recovered(HELD)
    await lab.passes(6.25 * HOUR)
    await lab.workflow.signal(CAPACITY_CHANGED, outcome("withdrawn", "withdrawn: it ended"))
    record = await lab.until(lambda record: LeverName.CAPACITY not in [lever.name for lever in record.held])
    assert lever(record, LeverName.CAPACITY).released_at == record.timeline[-1].at
    await lab.passes(2 * HOUR)
    await lab.passes(5 * HOUR)
    assert "No bought capacity is running." in (await lab.paged(ON_CALL, 1))[-1]


@pytest.mark.parametrize("ends_by_ok", [False, True])
async def test_after_an_abort_the_key_is_snoozed_until_ok_or_half_an_hour(lab: Lab, ends_by_ok: bool) -> None:
    await lab.start_recovered()
    assert (await lab.asks(ABORT, by(APPROVER, "false alarm"))).outcome == "accepted"
    record = await lab.reaches(Phase.SNOOZED)
    assert (record.knobs_at_baseline, record.outcome[:7], record.report_path is None) == (True, "Aborted", False)
    await lab.passes(POLICY.escalation.snooze - MINUTE)
    await lab.alarm(AlarmState.ALARM)
    assert (await lab.record()).phase is Phase.SNOOZED
    if ends_by_ok:
        await lab.alarm(AlarmState.OK)
    else:
        await lab.passes(2 * MINUTE)
    record = await lab.reaches(Phase.CLOSED)
    texts = [entry.text for entry in record.timeline]
    assert ("the snooze ended while the alarm is still on" in texts) is not ends_by_ok
    assert len(lab.world.asked("await_recovery")) == 1, "no mitigation during the snooze"


async def test_what_does_not_recover_is_escalated_and_keeps_its_levers_for_as_long_as_it_takes(lab: Lab) -> None:
    slow = HELD.model_copy(update={"p99_ms": 5_000.0})
    lab.world.verdicts = [("gave-up", slow)] * 4
    await lab.start_incident()
    waits = await until(lambda: enough(lab.world.asked("await_recovery"), 5))
    rounded = [round(wait.give_up_after / MINUTE) for wait in waits]
    assert rounded == [5, 30, 240, 360, 360], "throttles after 5 min, recovery after 30, the hold, then every 6 h"
    pages = await lab.paged(SENIOR, 3)
    assert ["P99 latency. The levers stay" in text for text in pages] == [True, False, True]
    assert "a hold ended before recovery" in pages[1]
    assert len((await lab.record()).held) == 3
    await lab.recover()


async def test_a_triage_incident_waits_a_day_for_ok_and_for_somebody(lab: Lab) -> None:
    await lab.start_incident(runbook=False)
    before = await lab.events()
    await lab.passes(25 * HOUR)
    assert await lab.events() - before <= 25 * EVENTS_AN_HOUR
    assert len(await lab.paged(ON_CALL, 1 + 4)) == 5
    await lab.alarm(AlarmState.OK)
    await lab.passes(HOUR)
    assert (await lab.record()).phase is Phase.AWAITING_DECISION, "OK alone closes nothing"
    assert (await lab.asks(ACKNOWLEDGE, by(ENGINEER))).outcome == "accepted"
    record = await lab.reaches(Phase.CLOSED)
    assert record.outcome == f"Triage ended: acknowledged by {ENGINEER}."


async def test_a_demand_ends_by_itself_hours_later_with_nobody_there(lab: Lab) -> None:
    await lab.start(CAPACITY_WORKFLOW, CapacityInput(state=CapacityState(model=MODEL)), f"capacity-{lab.queue}")
    now = await lab.now()
    demand = Demand(
        demand_id="incident-x",
        model=MODEL,
        kind=DemandKind.EMERGENCY,
        units=25,
        start=now,
        end=now + 6 * HOUR,
        reason="throttles",
        asked_by="incident-x",
    )
    answer = await lab.workflow.execute_update(SET_DEMAND, demand, result_type=DemandOutcome)
    assert answer.status == "requested"

    async def routed() -> Any:
        published = lab.world.asked("publish_routes")
        return published and sum(route.units for route in published[-1].routes)

    async def routes_are(units: int) -> bool:
        return bool(await routed() == units)

    await until(lambda: routes_are(25))
    await lab.passes(6 * HOUR - 10 * MINUTE)
    assert await routed() == 25
    await lab.passes(20 * MINUTE)
    await until(lambda: routes_are(15))
    await until(lambda: at_rest(lab))
    assert [model.arn for model in lab.world.fleet] == [BASE_ARN]
    assert len(lab.world.asked("create_model")) == len(lab.world.asked("delete_model")) == 2


async def test_a_capacity_workflow_at_rest_costs_no_history_and_still_sees_another_policy(lab: Lab) -> None:
    await lab.start(CAPACITY_WORKFLOW, CapacityInput(state=CapacityState(model=MODEL)), f"capacity-{lab.queue}")
    await until(lambda: enough(lab.world.asked("watch_capacity"), 1))
    before = await lab.events()
    await lab.passes(24 * HOUR)
    assert await lab.events() - before <= 3, "one activity that is tried again; at most 12 events an hour are allowed"
    looks = len(lab.world.asked("watch_capacity"))
    assert looks >= 24 * 4, "a look at each reconciliation"
    assert len(lab.world.asked("survey")) == 1

    models = {**POLICY.models, MODEL: POLICY.models[MODEL].model_copy(update={"floor_units": 15, "baseline_units": 20})}
    changed = POLICY.model_copy(update={"models": models})
    lab.world.snapshot = lab.world.snapshot.model_copy(update={"policy": changed})
    await lab.passes(POLICY.capacity.reconcile_interval + MINUTE)

    async def wants_more() -> bool:
        state: CapacityState = await lab.workflow.query(CAPACITY_STATE, result_type=CapacityState)
        return state.desired_units == 20

    await until(wants_more)


def override(kind: OverrideKind, duration: timedelta) -> OverrideInput:
    ttl = KnobName.CACHE_TTL_SECONDS
    return OverrideInput(knob=ttl, value=120, kind=kind, who=ENGINEER, reason="test", duration=duration)


async def override_record(lab: Lab) -> OverrideRecord:
    record: OverrideRecord = await lab.workflow.query(RECORD, result_type=OverrideRecord)
    return record


async def in_force(lab: Lab) -> OverrideRecord | None:
    record = await override_record(lab)
    return record if record.phase is OverridePhase.IN_FORCE and record.next_at else None


async def test_an_override_of_a_day_waits_for_nothing_is_warned_of_and_ends_on_time(lab: Lab) -> None:
    await lab.start(OVERRIDE_WORKFLOW, override(OverrideKind.TIMED, 24 * HOUR), f"override-{lab.queue}")
    record: OverrideRecord = await until(lambda: in_force(lab))
    assert record.ends_at is not None
    [lease] = [lease for take in lab.world.asked("take_leases") for lease in take.leases]
    assert lease.duration_ms == 24 * 3600 * 1000, "it lapses by itself"
    before = await lab.events()
    await lab.passes(23.5 * HOUR)
    assert await lab.events() - before <= 2, "a day costs one timer"
    assert lab.world.pages(ENGINEER) == []
    await lab.passes(25 * MINUTE)
    [warning] = await lab.paged(ENGINEER)
    assert "ends at" in warning
    assert lab.world.asked("release_leases") == []
    longer = OverrideExtendRequest(who=ENGINEER, why="it goes on", by=2 * HOUR)
    assert (await lab.asks(EXTEND, longer)).outcome == "accepted"
    await lab.passes(HOUR)
    assert lab.world.asked("release_leases") == [], "it was extended"
    await lab.passes(HOUR + 6 * MINUTE)
    ended = await lab.workflow.result()
    assert len(lab.world.pages(ENGINEER)) == 2, "warned again before the new end"
    assert ended["end"] == "on time"
    late = datetime.fromisoformat(ended["ended_at"]) - record.ends_at - 2 * HOUR
    assert timedelta(0) <= late < timedelta(seconds=1)


async def test_a_standing_override_is_renewed_reviewed_and_ends_when_the_policy_has_caught_up(lab: Lab) -> None:
    await lab.start(OVERRIDE_WORKFLOW, override(OverrideKind.STANDING, 48 * HOUR), f"override-{lab.queue}")
    await until(lambda: in_force(lab))
    before = await lab.events()
    await lab.passes(47 * HOUR)
    assert await lab.events() - before < 47 * EVENTS_AN_HOUR
    assert len(lab.world.asked("renew_standing")) in (46, 47), "one renewal, which looks at the baseline, an hour"
    assert lab.world.pages(ENGINEER) == []
    await lab.passes(10 * HOUR)
    assert len(await lab.paged(ENGINEER, 3)) == 3, "at the review, and every four hours"
    assert (await lab.asks(EXTEND, OverrideExtendRequest(who=ENGINEER, why="yes", by=24 * HOUR))).outcome == "accepted"
    await lab.passes(20 * HOUR)
    assert len(lab.world.pages(ENGINEER)) == 3, "somebody decided"
    caught_up = POLICY.model_copy(update={"cache_ttl_seconds": 120})
    lab.world.snapshot = lab.world.snapshot.model_copy(update={"policy": caught_up})
    await lab.passes(HOUR + MINUTE)
    assert (await lab.workflow.result())["end"] == "the configured baseline has caught up"
    [released] = lab.world.asked("release_leases")
    assert released.holder.id == ENGINEER


async def at_rest(lab: Lab) -> bool:
    state: CapacityState = await lab.workflow.query(CAPACITY_STATE, result_type=CapacityState)
    return state.doing == "idle" and not state.demands and len(state.fleet) == 1


async def enough(found: list[Any], count: int) -> list[Any] | None:
    return found if len(found) >= count else None


def hold(record: IncidentRecord, name: LeverName) -> datetime:
    until = lever(record, name).hold_until
    assert until is not None
    return until


async def test_cleanup_waits_until_the_hour_is_over_that_is_paid_for(lab: Lab) -> None:
    bought = PurchaseState(
        name="burst",
        arn="arn:burst",
        units=5,
        status="InService",
        asked_by="x",
        until=None,
        bought_at=datetime.now(UTC) - 20 * MINUTE,
        unit_hours=5,
        usd=None,
    )
    lab.world.capacity = CapacityState(model=MODEL, desired_units=15, units_in_service=20, bought=[bought])
    lab.world.units_found = [20, 15]
    input = CleanupInput(
        incident_id="x",
        model=MODEL,
        lease_ids=[],
        demand_id="x",
        reason="closed",
        event=None,
        snapshot=lab.world.snapshot,
    )
    await lab.start(CLEANUP_WORKFLOW, input, f"cleanup-{lab.queue}")
    result = CleanupResult.model_validate(await lab.workflow.result())
    assert (result.capacity_at_baseline, result.still_held, result.to_do) == (True, [], [])
    first, second = (request.give_up_after for request in lab.world.asked("await_units"))
    assert 35 * MINUTE < second - first <= 40 * MINUTE
