"""Pre-provisioning of one event under the default policy, its days and hours skipped; what is around it is a fake."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
from temporalio.client import Client, WorkflowHandle
from temporalio.service import RPCError
from temporalio.testing import TimeSkipper, TimeSkippingConfig
from temporalio.worker import Replayer, Worker

from domain.calendar import CalendarEvent
from domain.capacity import Demand, DemandKind
from domain.messages import CAPACITY_CHANGED, RECORD
from domain.policy import Policy
from domain.pre_provisioning import (
    EVENT_CHANGED,
    EVENT_REMOVED,
    EVENT_WORKFLOW,
    EventInput,
    EventPhase,
    EventRecord,
    EventRemoved,
    EventTimes,
    event_workflow_id,
)
from tests.servers import TemporalServer
from tests.workflows.fake_events import FakeEvents, Status
from tests.workflows.fakes import activities_of
from workers.runbook_worker import WORKFLOWS
from workers.temporal import runbook_plugin

POLICY = Policy()
PATIENCE_SECONDS = 40
TOKYO = ZoneInfo("Asia/Tokyo")
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)


class Lab:
    """A worker on the time-skipping server, its fakes, and the one workflow under test."""

    def __init__(self, skipper: TimeSkipper, fakes: FakeEvents) -> None:
        self.skipper = skipper
        self.fakes = fakes
        self.queue = uuid4().hex[:8]
        self.handle: WorkflowHandle[Any, Any]
        self.started_at: datetime

    def event(self, days: int = 9, **changes: Any) -> CalendarEvent:
        """A Monday release at a midnight in Tokyo, at least so many days ahead."""
        midnight = (datetime.now(TOKYO) + timedelta(days=days + 1)).replace(hour=0, minute=0, second=0, microsecond=0)
        fields = {
            "event_id": self.queue,
            "type": "monday_release",
            "starts_at": midnight,
            "multiplier": 4.0,
            "models": ("sonnet",),
            "lead_time": 4 * HOUR,
            "source": "test",
            "asked_by": "content-ops",
        }
        return CalendarEvent.model_validate(fields | changes)

    async def start(self, event: CalendarEvent) -> None:
        self.handle = await self.skipper.client.start_workflow(
            EVENT_WORKFLOW, EventInput(event=event), id=event_workflow_id(event.event_id), task_queue=self.queue
        )

    async def says(self, status: Status, *models: str) -> None:
        """The capacity workflows of these models tell news."""
        for demand in list(self.fakes.standing.values()):
            if demand.model in models:
                self.fakes.status[demand.model] = status
                outcome = self.fakes.outcome(demand.demand_id, demand.model)
                await self.handle.signal(CAPACITY_CHANGED, outcome)

    async def record(self) -> EventRecord:
        record: EventRecord = await self.handle.query(RECORD, result_type=EventRecord)
        return record

    async def result(self) -> EventRecord:
        return EventRecord.model_validate(await self.handle.result())

    async def until(self, what: Callable[[EventRecord], Any]) -> EventRecord:
        give_up_at = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while not what(record := await self.record()):
            assert asyncio.get_running_loop().time() < give_up_at, f"it never came true: {record.timeline}"
            await asyncio.sleep(0.02)
        return record

    async def times(self) -> EventTimes:
        """Once they are reckoned."""
        times = (await self.until(lambda record: record.next_at)).times
        assert times is not None
        return times

    async def reaches(self, phase: EventPhase) -> EventRecord:
        return await self.until(lambda record: record.phase is phase)

    async def asked(self, name: str, times: int = 1) -> list[Any]:
        """Arguments of the calls with that name, once there are as many."""
        await self.until(lambda _: len(self.fakes.asked(name)) >= times)
        return self.fakes.asked(name)

    async def paged(self, to: str, times: int = 1) -> list[str]:
        """Texts of the pages to exactly these people, once there are as many."""
        await self.until(lambda _: len(self.fakes.pages(to)) >= times)
        return self.fakes.pages(to)

    async def passes_to(self, moment: datetime) -> None:
        """Let the workflow's time pass; a workflow that waits for something else than time would hang for ever."""
        left = moment - await self.skipper.get_current_time(self.handle)
        await asyncio.wait_for(self.skipper.fast_forward(self.handle, left), 60)


@pytest.fixture
async def lab(time_skipping_temporal: TemporalServer) -> AsyncIterator[Lab]:
    client = await Client.connect(time_skipping_temporal.address, plugins=[runbook_plugin()])
    skipper = TimeSkipper(client, config=TimeSkippingConfig(enabled=False, max_session_skip_count=5000))
    lab = Lab(skipper, FakeEvents())
    activities = activities_of(lab.fakes)
    # Nothing is cached: every workflow task replays the history so far, as after the death of a worker.
    async with Worker(
        skipper.client, task_queue=lab.queue, workflows=WORKFLOWS, activities=activities, max_cached_workflows=0
    ):
        yield lab
        replayer = Replayer(workflows=WORKFLOWS, plugins=[runbook_plugin()])
        await replayer.replay_workflow(await lab.handle.fetch_history())
        with suppress(RPCError):  # closed
            await lab.handle.terminate()


async def test_checked_days_ahead_bought_verified_watched_released_and_reported(lab: Lab) -> None:
    event = lab.event(models=("sonnet", "haiku"))
    await lab.start(event)
    times = await lab.times()
    assert lab.fakes.asked("set_demand", "check_permissions") == []

    await lab.passes_to(times.preflight_at + MINUTE)
    await lab.reaches(EventPhase.SCHEDULED)
    assert times.starts_at - times.preflight_at == POLICY.calendar.preflight_ahead
    posted = lab.fakes.asked("set_demand")
    assert {demand.model for demand in posted} == {"sonnet", "haiku"}
    for demand in posted:
        assert demand.kind is DemandKind.EVENT
        assert (demand.start, demand.end) == (times.starts_at - 4 * HOUR, times.starts_at + 1.5 * HOUR)
    assert lab.fakes.asked("mark_event", "page") == []

    await lab.passes_to(times.buy_at + MINUTE)
    await lab.reaches(EventPhase.PROVISIONING)
    assert times.buy_at == times.needed_at - POLICY.capacity.provisioning_lead
    [mark] = await lab.asked("mark_event")
    assert mark.completed_at is None
    assert mark.triggered_at <= event.starts_at - event.lead_time  # the tree: triggered on time

    await lab.says("in_service", "sonnet")
    await lab.until(lambda record: record.outcomes["sonnet"].status == "in_service")
    assert (await lab.record()).in_service_at is None
    await lab.says("in_service", "haiku")
    await lab.until(lambda record: record.in_service_at)
    await lab.passes_to(times.verify_by + MINUTE)
    record = await lab.reaches(EventPhase.READY)
    assert record.in_time
    mark = lab.fakes.asked("mark_event")[-1]
    assert mark.completed_at is not None
    assert mark.completed_at < event.starts_at
    assert mark.units == {size.model: size.units for size in record.sizes}

    await lab.passes_to(times.starts_at + MINUTE)
    await lab.reaches(EventPhase.RUNNING)
    assert lab.fakes.asked("withdraw_demand") == []
    await lab.passes_to(times.ends_at + MINUTE)
    record = await lab.result()
    assert record.phase is EventPhase.DONE
    assert sorted(request.model for request in lab.fakes.asked("withdraw_demand")) == ["haiku", "sonnet"]
    assert record.released_at is not None
    assert record.released_at >= times.ends_at
    assert record.watched["sonnet"].peak_tokens_per_second == 24_000
    assert record.report_path == "reports/event.html"
    assert lab.fakes.asked("page") == []


async def test_what_cannot_be_is_escalated_days_ahead_once_and_checked_again(lab: Lab) -> None:
    await lab.start(lab.event(multiplier=5))
    times = await lab.times()
    await lab.passes_to(times.preflight_at + MINUTE)
    [page] = await lab.paged("on-call")
    assert "5x needs 37 units of sonnet, and 30 may be had (models.sonnet.ceiling_units is 30)" in page
    assert "30,000 of 35,000 tokens/s, 4.3x" in page
    await lab.passes_to(times.preflight_at + POLICY.calendar.preflight_interval + MINUTE)
    await lab.asked("check_permissions", 2)
    sonnet = POLICY.models["sonnet"].model_copy(update={"ceiling_units": 40})
    lab.fakes.policy = POLICY.model_copy(update={"models": {**POLICY.models, "sonnet": sonnet}})
    await lab.passes_to(times.preflight_at + 2 * POLICY.calendar.preflight_interval + MINUTE)
    record = await lab.until(lambda record: not record.findings)
    assert [demand.units for demand in lab.fakes.asked("set_demand")] == [37, 37, 37]
    assert record.sizes[0].units == 37
    assert len(lab.fakes.pages("on-call")) == 1


async def test_a_missing_permission_is_paged_with_the_statement_to_add(lab: Lab) -> None:
    lab.fakes.denied = ["bedrock:CreateProvisionedModelThroughput"]
    await lab.start(lab.event())
    await lab.passes_to((await lab.times()).preflight_at + MINUTE)
    [page] = await lab.paged("on-call")
    assert 'bedrock:CreateProvisionedModelThroughput is denied: refused. {"Effect": "Allow"}' in page


async def test_units_that_do_not_come_are_told_at_once_and_ever_higher_while_a_person_can_still_act(lab: Lab) -> None:
    lab.fakes.detail = "15 of 30 units in service; AWS refused"
    await lab.start(lab.event(days=1))
    times = await lab.times()
    await lab.passes_to(times.buy_at + MINUTE)
    await lab.reaches(EventPhase.PROVISIONING)
    await lab.says("failed", "sonnet")
    [page] = await lab.paged("on-call")
    assert "AWS refused" in page
    await lab.passes_to(times.needed_at + MINUTE)
    page = (await lab.paged("on-call", 2))[1]
    assert re.search("starts in (4 h|3 h 59 min), and units are missing", page)
    await lab.passes_to(times.verify_by + MINUTE)
    [page] = await lab.paged("senior on-call")
    assert re.search("starts in (30|29) min", page)
    assert (await lab.until(lambda record: record.in_time is not None)).in_time is False
    await lab.says("in_service", "sonnet")
    await lab.until(lambda record: record.in_service_at)
    await lab.passes_to(times.ends_at + MINUTE)
    record = await lab.result()
    assert re.match("not in time: in service (29|28) min before the start; 30 min is the margin", record.outcome)
    assert record.released_at is not None


async def test_a_moved_event_moves_its_demand_and_is_provisioned_for_anew(lab: Lab) -> None:
    event = lab.event(models=("sonnet", "haiku"))
    await lab.start(event)
    times = await lab.times()
    await lab.passes_to(times.buy_at + MINUTE)
    await lab.reaches(EventPhase.PROVISIONING)
    await lab.says("in_service", "sonnet", "haiku")
    await lab.until(lambda record: record.in_service_at)

    moved = event.model_copy(
        update={"starts_at": event.starts_at + timedelta(days=7), "models": ("sonnet",), "multiplier": 3.0}
    )
    await lab.handle.signal(EVENT_CHANGED, event)  # nothing new: no effect
    await lab.handle.signal(EVENT_CHANGED, moved)
    record = await lab.until(lambda record: record.event == moved and record.phase is EventPhase.WAITING)
    assert record.in_service_at is None
    [withdrawn] = lab.fakes.asked("withdraw_demand")
    assert withdrawn.model == "haiku"
    demand = (await lab.asked("set_demand", 5))[-1]
    assert (demand.model, demand.units) == ("sonnet", 23)
    assert demand.start == times.needed_at + timedelta(days=7)

    await lab.passes_to(times.buy_at + timedelta(days=7) + MINUTE)
    await lab.until(lambda record: record.in_service_at)  # they stand already
    assert lab.fakes.asked("mark_event")[-1].starts_at == moved.starts_at


@pytest.mark.parametrize("asked", [False, True])
async def test_a_removed_entry_withdraws_what_was_asked_for(lab: Lab, asked: bool) -> None:
    await lab.start(lab.event())
    times = await lab.times()
    if asked:
        await lab.passes_to(times.buy_at + MINUTE)
        await lab.reaches(EventPhase.PROVISIONING)
    await lab.handle.signal(EVENT_REMOVED, EventRemoved(reason="its row is gone"))
    record = await lab.result()
    assert record.phase is EventPhase.WITHDRAWN
    assert record.outcome == "given up: its row is gone"
    assert [request.reason for request in lab.fakes.asked("withdraw_demand")] == ["its row is gone"] * asked
    assert lab.fakes.asked("page") == []


async def test_of_two_events_at_the_same_time_it_says_which_counts(lab: Lab) -> None:
    event = lab.event()
    other = Demand(
        demand_id="event-b",
        model="sonnet",
        kind=DemandKind.EVENT,
        units=26,
        start=event.starts_at - HOUR,
        end=event.starts_at + HOUR,
        reason="b",
        asked_by="event-b",
    )
    lab.fakes.others = [other, other.model_copy(update={"kind": DemandKind.EMERGENCY, "asked_by": "incident-x"})]
    await lab.start(event)
    record = await lab.until(lambda record: record.notes)
    [note] = [note for note in record.notes if "at the same time" in note]
    assert "event-b wants 26 units" in note
    assert "as our 30: ours, the larger, counts" in note


async def test_an_event_that_is_told_late_is_provisioned_for_at_once_and_said(lab: Lab) -> None:
    soon = datetime.now(TOKYO) + 10 * MINUTE
    await lab.start(lab.event(starts_at=soon, multiplier=1))
    await lab.reaches(EventPhase.PROVISIONING)
    [page] = await lab.paged("on-call")
    assert "is provisioned for only now" in page
    assert (await lab.until(lambda record: record.in_time is not None)).in_time is False
    await lab.asked("mark_event")
    assert lab.fakes.pages("senior on-call") == []


async def test_a_demand_that_got_lost_is_set_again(lab: Lab) -> None:
    await lab.start(lab.event(days=1))
    times = await lab.times()
    await lab.passes_to(times.buy_at + MINUTE)
    await lab.asked("mark_event")
    lab.fakes.standing.clear()
    lab.fakes.status = {"sonnet": "in_service"}
    await lab.passes_to(times.needed_at + MINUTE)
    await lab.asked("set_demand", 3)
    assert (await lab.until(lambda record: record.in_service_at)).in_service_at is not None


async def test_units_stay_while_the_load_is_too_much_for_what_would_be_left(lab: Lab) -> None:
    lab.fakes.loads = [20_000, 20_000, 3_000]
    await lab.start(lab.event(days=1))
    times = await lab.times()
    await lab.passes_to(times.buy_at + MINUTE)
    await lab.reaches(EventPhase.PROVISIONING)
    await lab.says("in_service", "sonnet")
    await lab.passes_to(times.ends_at - MINUTE)
    [page] = await lab.paged("on-call")
    assert "sonnet: 20,000 tokens/s are more than 80% of the 15,000 that 15 units leave" in page
    assert lab.fakes.asked("withdraw_demand") == []
    by = POLICY.calendar.prolong_by
    await lab.passes_to(times.ends_at + 2 * by + MINUTE)
    record = await lab.result()
    assert [demand.end for demand in lab.fakes.asked("set_demand")[-2:]] == [times.ends_at + by, times.ends_at + 2 * by]
    assert record.times is not None
    assert record.times.ends_at == times.ends_at + 2 * by
    assert len(lab.fakes.pages("on-call")) == 1
    assert lab.fakes.pages("senior on-call") == []


async def test_an_event_that_is_changed_while_it_runs_was_in_time_all_the_same(lab: Lab) -> None:
    event = lab.event(days=1, multiplier=3)
    await lab.start(event)
    times = await lab.times()
    await lab.passes_to(times.buy_at + MINUTE)
    await lab.reaches(EventPhase.PROVISIONING)
    await lab.says("in_service", "sonnet")
    await lab.passes_to(times.starts_at + MINUTE)
    await lab.reaches(EventPhase.RUNNING)
    await lab.handle.signal(EVENT_CHANGED, event.model_copy(update={"multiplier": 4.0}))
    await lab.until(lambda record: record.event.multiplier == 4)
    demand = (await lab.asked("set_demand", 4))[-1]
    assert (demand.units, demand.end) == (30, times.ends_at)
    record = await lab.reaches(EventPhase.RUNNING)
    assert record.in_time
    assert lab.fakes.asked("page") == []


async def test_a_policy_that_has_lost_the_type_is_told_and_waited_out(lab: Lab) -> None:
    types = {name: kind for name, kind in POLICY.calendar.event_types.items() if name != "monday_release"}
    lab.fakes.policy = POLICY.model_copy(update={"calendar": POLICY.calendar.model_copy(update={"event_types": types})})
    await lab.start(lab.event(days=1))
    [page] = await lab.paged("on-call")
    assert "cannot be planned: type: 'monday_release' is not allowed: there are final_chapter" in page
    lab.fakes.policy = POLICY
    await lab.passes_to(datetime.now(TOKYO) + POLICY.calendar.sync_interval + MINUTE)
    assert await lab.times()
