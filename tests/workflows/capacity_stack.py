"""A worker around the one writer of capacity: real Temporal, real Valkey, the simulated AWS over HTTP."""

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import redis
from temporalio import workflow
from temporalio.client import Client, WorkflowHandle
from temporalio.exceptions import ActivityError
from temporalio.service import RPCError
from temporalio.worker import Replayer, Worker

from activities.bedrock import BedrockActivities
from activities.capacity_watch import CapacityWatch
from activities.entities import EntityActivities
from activities.leases import LeaseActivities
from activities.pages import PageActivities
from activities.settings import SettingsActivities
from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from dataplane.routes import Routes
from domain.capacity import Demand, DemandKind, DemandOutcome
from domain.clock import RehearsalClock
from domain.messages import (
    CAPACITY_CHANGED,
    CAPACITY_STATE,
    RECONCILE_NOW,
    CapacityState,
    PersonRequest,
    Reconciled,
    UpdateResult,
    WithdrawDemand,
    capacity_id,
)
from domain.people import Role, Roster
from domain.policy import CapacityPolicy, IntentPolicy, Policy
from tests.servers import TemporalServer
from tests.workflows.fakes import FakeCloudWatch, activities_of
from workers.clients import AwsClients
from workers.settings import Settings
from workers.temporal import connect, runbook_plugin
from workflows._step import failure, mutate
from workflows.capacity import CapacityWorkflow

APPROVER, ENGINEER = "approver@example.com", "engineer@example.com"
SONNET = Policy().models["sonnet"]
PAGES, ROSTER = "pages.jsonl", "roster.yaml"
"""Beside the policy."""
LAG_SECONDS = 0.4
FAST = CapacityPolicy(
    poll_interval=timedelta(seconds=0.1),
    provisioning_timeout=timedelta(seconds=20),
    drain=timedelta(seconds=0.3),
    minimum_hold=timedelta(0),
    reconcile_interval=timedelta(minutes=10),
)


MORNING = RehearsalClock(
    real_start=datetime.now(UTC), business_start=datetime(2026, 11, 25, 10, tzinfo=ZoneInfo("Asia/Tokyo"))
)
"""Ten o'clock, far from the end of a day in Tokyo and in UTC, whenever the tests run."""


@workflow.defn(name="FakeIncident", sandboxed=False)
class FakeIncident:
    """Asks for capacity as an incident does, and keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[DemandOutcome] = []

    @workflow.signal(name=CAPACITY_CHANGED)
    def capacity_changed(self, outcome: DemandOutcome) -> None:
        self.told.append(outcome)

    @workflow.query
    def outcomes(self) -> list[DemandOutcome]:
        return self.told

    @workflow.update
    async def ask(self, demand: Demand) -> DemandOutcome | str:
        try:
            return await mutate(EntityActivities.set_demand, demand, summary="Ask")
        except ActivityError as error:
            return "{}: {}".format(*failure(error))

    @workflow.update
    async def withdraw(self, request: WithdrawDemand) -> DemandOutcome:
        return await mutate(EntityActivities.withdraw_demand, request, summary="Withdraw")

    @workflow.run
    async def run(self) -> None:
        await workflow.wait_condition(lambda: False)


def worker_of(
    client: Client,
    settings: Settings,
    redis_client: redis.Redis,
    policy_file: Path,
    threads: ThreadPoolExecutor,
    cloudwatch: FakeCloudWatch | None = None,
) -> Worker:
    """With everything that capacity needs, and nothing else."""
    aws = AwsClients(settings)
    configured = SettingsActivities(policy_file=policy_file, roster_file=policy_file.with_name(ROSTER), clock=MORNING)
    bedrock = BedrockActivities(aws.bedrock(), Routes(redis_client))
    owners = (
        bedrock,
        CapacityWatch(configured.snapshot, bedrock, Routes(redis_client)),
        LeaseActivities(Ledger(redis_client)),
        PageActivities(aws.sns(), topic_arn=None, log=policy_file.with_name(PAGES)),
        EntityActivities(configured.snapshot),
        cloudwatch or FakeCloudWatch(),
        configured,
    )
    return Worker(
        client,
        task_queue=settings.task_queue,
        workflows=[CapacityWorkflow, FakeIncident],
        activities=activities_of(*owners),
        activity_executor=threads,
    )


@dataclass
class Stack:
    """A worker, and hands on everything around it."""

    client: Client
    settings: Settings
    aws: str
    redis: redis.Redis
    policy_file: Path
    model: str
    incident: str
    worker: asyncio.Task[None] | None = None
    fake: WorkflowHandle[Any, Any] | None = None
    bedrock: Any = None
    cloudwatch: FakeCloudWatch = field(default_factory=FakeCloudWatch)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(16))

    def pages(self) -> list[str]:
        """Texts of what people were paged, with whom first."""
        log = self.policy_file.with_name(PAGES)
        lines = log.read_text().splitlines() if log.exists() else []
        return ["{to}: {text}".format_map(json.loads(line)) for line in lines]

    def set_policy(
        self, spec: dict[str, Any] | None = None, *, also: dict[str, Any] | None = None, **capacity: Any
    ) -> None:
        """Written anew; read at the next start and reconciliation. `spec` changes the model, `also` other sections."""
        default = Policy()
        changed = {
            "models": {**default.models, self.model: SONNET.model_copy(update=spec)},
            "intents": {**default.intents, "recommendation": IntentPolicy(model=self.model)},
            "capacity": FAST.model_copy(update=capacity),
            "timetable": None,
            **(also or {}),
        }
        self.policy_file.write_text(default.model_copy(update=changed).model_dump_json())

    async def start_worker(self) -> None:
        worker = worker_of(self.client, self.settings, self.redis, self.policy_file, self.threads, self.cloudwatch)
        self.worker = asyncio.create_task(worker.run())

    async def stop_worker(self) -> None:
        if self.worker is not None:
            self.worker.cancel()
            await asyncio.gather(self.worker, return_exceptions=True)
            self.worker = None

    def demand(self, units: int, *, seconds: float = 3600) -> Demand:
        now = datetime.now(UTC)
        return Demand(
            demand_id=self.incident,
            model=self.model,
            kind=DemandKind.EMERGENCY,
            units=units,
            start=now,
            end=now + timedelta(seconds=seconds),
            reason="throttles",
            asked_by=self.incident,
        )

    async def ask(self, units: int, *, seconds: float = 3600, uncapped: int | None = None) -> DemandOutcome:
        assert self.fake is not None
        demand = self.demand(units, seconds=seconds).model_copy(update={"uncapped_units": uncapped})
        answer = await self.fake.execute_update(FakeIncident.ask, demand)
        assert isinstance(answer, DemandOutcome), answer
        return answer

    async def withdraw(self) -> DemandOutcome:
        assert self.fake is not None
        request = WithdrawDemand(model=self.model, demand_id=self.incident, reason="over")
        return await self.fake.execute_update(FakeIncident.withdraw, request)

    async def told(self) -> list[DemandOutcome]:
        assert self.fake is not None
        return await self.fake.query(FakeIncident.outcomes)

    @property
    def entity(self) -> WorkflowHandle[Any, Any]:
        return self.client.get_workflow_handle(capacity_id(self.model))

    async def reconcile(self) -> Reconciled:
        request = PersonRequest(who=ENGINEER, why="mended")
        answer: Reconciled = await self.entity.execute_update(RECONCILE_NOW, request, result_type=Reconciled)
        return answer

    async def asks(self, update: str, who: str, **more: Any) -> UpdateResult:
        """A person's wish, and its answer."""
        request = {"who": who, "why": "because", **more}
        answer: UpdateResult = await self.entity.execute_update(update, request, result_type=UpdateResult)
        return answer

    async def state(self) -> CapacityState:
        state: CapacityState = await self.entity.query(CAPACITY_STATE, result_type=CapacityState)
        return state

    def fleet(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self.bedrock.list_provisioned_model_throughputs()["provisionedModelSummaries"]
        return listed

    def units(self) -> list[int]:
        return sorted(model["modelUnits"] for model in self.fleet())

    def routed(self) -> dict[str, int]:
        held = Routes(self.redis).read_all().get(self.model)
        return {route.provisioned_model_arn: route.units for route in held.routes} if held else {}

    def control(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        request = urllib.request.Request(
            f"{self.aws}/_simulator/{path}", data=json.dumps(body or {}).encode(), method=method
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def reset_aws(self) -> None:
        urllib.request.urlopen(urllib.request.Request(f"{self.aws}/moto-api/reset", method="POST"), timeout=5).close()

    def fault(self, operation: str, kind: str, **more: Any) -> None:
        self.control("faults", {"service": "bedrock", "operation": operation, "kind": kind, **more})

    def calls(self, operation: str) -> int:
        return sum(1 for event in self.control("trail", method="GET") if event["event_name"] == operation)


async def until(what: Callable[[], Any] | Callable[[], Awaitable[Any]], seconds: float = 40) -> Any:
    """Waits for something true and answers it."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        result = what()
        value = await result if asyncio.iscoroutine(result) else result
        if value:
            return value
        assert asyncio.get_running_loop().time() < deadline, "it never came true"
        await asyncio.sleep(0.05)


@asynccontextmanager
async def running(temporal: TemporalServer, redis_client: redis.Redis, aws: str, folder: Path) -> AsyncIterator[Stack]:
    """A stack with 15 units of somebody else's, whose histories are replayed at the end."""
    model = f"sonnet-{uuid4().hex[:8]}"
    settings = Settings(temporal_address=temporal.address, task_queue=model, aws_endpoint_url=aws)
    client = await connect(settings)
    made = Stack(client, settings, aws, redis_client, folder / "policy.yaml", model, f"incident-{model}")
    made.set_policy()
    made.policy_file.with_name(ROSTER).write_text(
        Roster(people={APPROVER: Role.APPROVER, ENGINEER: Role.ENGINEER}).model_dump_json()
    )
    made.reset_aws()
    made.bedrock = AwsClients(settings).bedrock()
    made.control("bedrock", {"provisioning_lag_seconds": LAG_SECONDS})
    made.bedrock.create_provisioned_model_throughput(
        provisionedModelName="base", modelUnits=15, modelId=SONNET.provisioned_model_id
    )
    made.control("settle")
    await made.start_worker()
    made.fake = await client.start_workflow(FakeIncident.run, id=made.incident, task_queue=settings.task_queue)
    try:
        yield made
        await replays(made)
    finally:
        for handle in (made.entity, made.fake):
            with suppress(RPCError):  # never started, or ended
                await handle.terminate()
        await made.stop_worker()
        made.threads.shutdown()


async def last(stack: Stack, status: str) -> DemandOutcome | None:
    told = await stack.told()
    return told[-1] if told and told[-1].status == status else None


async def idle(stack: Stack) -> CapacityState | None:
    state = await stack.state()
    return state if state.doing == "idle" else None


async def replays(stack: Stack) -> None:
    """Whatever happened in a test is deterministic."""
    replayer = Replayer(workflows=[CapacityWorkflow], plugins=[runbook_plugin()])
    async for run in stack.client.list_workflows(f"WorkflowId = '{capacity_id(stack.model)}'"):
        handle = stack.client.get_workflow_handle(run.id, run_id=run.run_id)
        await replayer.replay_workflow(await handle.fetch_history())


async def last_with(stack: Stack, units: int) -> DemandOutcome | None:
    told = await stack.told()
    return told[-1] if told and told[-1].units_in_service == units else None


async def main() -> None:
    """A worker as a process of its own, to be killed: `python -m tests.workflows.capacity_stack`."""
    settings = Settings()
    assert settings.policy_file is not None
    threads = ThreadPoolExecutor(64)
    await worker_of(
        await connect(settings), settings, connect_redis(settings.redis_url), settings.policy_file, threads
    ).run()


if __name__ == "__main__":
    asyncio.run(main())
