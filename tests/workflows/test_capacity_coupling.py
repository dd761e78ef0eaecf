"""Coupling by its schedule on a real Temporal server: each run begins where the last one ended."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from temporalio import activity
from temporalio.client import Client, ScheduleOverlapPolicy
from temporalio.exceptions import ApplicationError
from temporalio.worker import Replayer, Worker

from activities.schedules import ensure_schedules
from domain.capacity import Demand, DemandOutcome
from domain.clock import RehearsalClock
from domain.coupling import CAPACITY_COUPLING, AssessCoupling, CouplingPlan, CouplingState, plan
from domain.errors import ErrorKind
from domain.load import LoadSnapshot, ModelLoad
from domain.messages import CapacityState, Page, PolicySnapshot, ReleaseLeases, TakeLeases
from domain.policy import CouplingPolicy, Policy
from tests.servers import TemporalServer
from tests.workflows.fakes import activities_of
from workers.schedules import schedules
from workers.temporal import runbook_plugin
from workflows.capacity_coupling import CapacityCouplingWorkflow

QUEUE = "coupling"
POLICY = Policy(
    timetable=None,
    coupling=CouplingPolicy(
        every=timedelta(days=1000), cooldown=timedelta(0), propose_after=1, units_per_task={"sonnet": 1.0}
    ),
)
SNAPSHOT = PolicySnapshot(policy=POLICY, clock=RehearsalClock())


@dataclass
class World:
    """What the looks see, and what they do."""

    tasks: int = 15
    capacity: float = 25_500
    fails: bool = False
    refuses: bool = False
    demands: list[Demand] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)

    @activity.defn
    async def assess_coupling(self, request: AssessCoupling) -> CouplingPlan:
        if self.fails:
            raise ApplicationError("CloudWatch refused", type=ErrorKind.ACCESS_DENIED, non_retryable=True)
        sonnet = ModelLoad(sent_tokens_per_second=9_000, capacity_tokens_per_second=self.capacity, throttles=0)
        load = LoadSnapshot(
            observed_at=datetime.now(UTC), models={"sonnet": sonnet}, hit_rate=0.15, calls_per_second_per_task=1.0
        )
        states = {"sonnet": CapacityState(model="sonnet", units_in_service=15, demands=self.demands)}
        return plan(SNAPSHOT, request.now, load, self.tasks, states, request.state)

    @activity.defn
    async def set_demand(self, demand: Demand) -> DemandOutcome:
        if self.refuses:
            raise ApplicationError("end: it has passed", type=ErrorKind.INVALID, non_retryable=True)
        self.demands = [demand]
        return DemandOutcome(
            demand_id=demand.demand_id, status="requested", units_in_service=15, units_wanted=demand.units, detail=""
        )

    @activity.defn
    async def take_leases(self, request: TakeLeases) -> list[object]:
        self.taken += [lease.lease_id for lease in request.leases]
        return []

    @activity.defn
    async def release_leases(self, request: ReleaseLeases) -> None:
        self.released += request.lease_ids

    @activity.defn
    async def page(self, page: Page) -> None:
        self.pages.append(page)


@dataclass
class Coupling:
    client: Client
    world: World

    async def looks(self) -> CouplingState | None:
        """One run of the schedule; its result, or None when it failed."""
        handle = self.client.get_schedule_handle(CAPACITY_COUPLING)
        before = (await handle.describe()).info.num_actions
        await handle.trigger(overlap=ScheduleOverlapPolicy.BUFFER_ALL)
        give_up_at = time.monotonic() + 30
        while (seen := (await handle.describe()).info).num_actions == before or seen.running_actions:
            assert time.monotonic() < give_up_at, "it never ran"
            await asyncio.sleep(0.05)
        run: Any = seen.recent_actions[-1].action
        found = self.client.get_workflow_handle(run.workflow_id, result_type=CouplingState)
        try:
            state: CouplingState = await found.result()
        except Exception:
            return None
        replayer = Replayer(workflows=[CapacityCouplingWorkflow], plugins=[runbook_plugin()])
        await replayer.replay_workflow(await found.fetch_history())
        return state


@pytest.fixture
async def coupling(tmp_path: Path) -> AsyncIterator[Coupling]:
    """A server of its own: the schedule has one name in a namespace."""
    server = TemporalServer(tmp_path).start()
    client = await Client.connect(server.address, plugins=[runbook_plugin()])
    world = World()
    async with Worker(client, task_queue=QUEUE, workflows=[CapacityCouplingWorkflow], activities=activities_of(world)):
        wanted = [item for item in schedules(SNAPSHOT) if item.schedule_id == CAPACITY_COUPLING]
        await ensure_schedules(client, wanted, QUEUE)
        yield Coupling(client, world)
    server.kill()


async def result(coupling: Coupling) -> CouplingState:
    state = await coupling.looks()
    assert state is not None
    return state


async def test_each_run_begins_where_the_last_one_ended(coupling: Coupling) -> None:
    world = coupling.world
    first = await result(coupling)
    assert (first.tasks, world.demands) == (15, [])

    # A run that fails changes nothing, and the next one begins where the last good one ended.
    world.fails, world.tasks = True, 20
    assert await coupling.looks() is None
    world.fails = False
    risen = await result(coupling)
    assert risen.tasks == 20
    assert [demand.units for demand in world.demands] == [20]
    assert [firing.units for firing in risen.firings] == [20]
    assert ["timetable" in page.text for page in world.pages] == [True]
    assert world.pages[0].to == "capacity owner"

    # A demand that is refused does not count, and is tried again by what the next run sees.
    world.demands, world.refuses, world.tasks = [], True, 30
    refused = await result(coupling)
    assert refused.firings == risen.firings
    assert "was not taken: end: it has passed" in refused.said[-1]
    assert len(world.pages) == 1

    # Short of capacity: a task's rate is leased, and given back when there is room.
    world.capacity = 9_000
    short = await result(coupling)
    assert short.rate is not None
    assert (world.taken, world.released) == ([short.rate.lease_id], [])
    assert (await result(coupling)).rate == short.rate
    assert world.taken == [short.rate.lease_id] * 2
    world.capacity = 25_500
    assert (await result(coupling)).rate is None
    assert world.released == [short.rate.lease_id]
