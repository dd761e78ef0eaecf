"""The one writer of capacity on a real Temporal server and a real Valkey, against the simulated AWS over HTTP."""

import asyncio
import json
import os
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from temporalio import workflow
from temporalio.client import Client, WorkflowHandle
from temporalio.exceptions import ActivityError
from temporalio.worker import Worker

from activities.bedrock import BedrockActivities
from activities.decisions import DecisionActivities
from activities.entities import EntityActivities
from activities.settings import SettingsActivities
from dataplane.routes import Routes
from domain.capacity import Demand, DemandKind, DemandOutcome
from domain.clock import RehearsalClock
from domain.messages import (
    CAPACITY_CHANGED,
    CAPACITY_STATE,
    RECONCILE_NOW,
    CapacityState,
    WithdrawDemand,
    capacity_id,
)
from domain.policy import CapacityPolicy, Policy
from simulator.aws import AwsConfig, AwsSimulator
from tests.servers import TemporalServer
from workers.clients import AwsClients
from workers.settings import Settings
from workers.temporal import connect
from workflows._step import failure, mutate
from workflows.capacity import CapacityWorkflow

SONNET = Policy().models["sonnet"]
LAG_SECONDS = 0.4
FAST = CapacityPolicy(
    poll_interval=timedelta(seconds=0.1),
    provisioning_timeout=timedelta(seconds=20),
    drain=timedelta(seconds=0.3),
    reconcile_interval=timedelta(minutes=10),
)


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


@pytest.fixture(scope="module")
def aws_server() -> Iterator[AwsSimulator]:
    with AwsSimulator(AwsConfig()) as simulator:
        yield simulator


@dataclass
class Stack:
    """A worker, and hands on everything around it."""

    client: Client
    settings: Settings
    aws: AwsSimulator
    redis: redis.Redis
    policy_file: Path
    model: str
    incident: str
    worker: asyncio.Task[None] | None = None
    fake: WorkflowHandle[Any, Any] | None = None
    bedrock: Any = None
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(16))

    async def start_worker(self) -> None:
        worker = Worker(
            self.client,
            task_queue=self.settings.task_queue,
            workflows=[CapacityWorkflow, FakeIncident],
            activities=[
                method
                for owner in (
                    BedrockActivities(AwsClients(self.settings).bedrock(), Routes(self.redis)),
                    DecisionActivities(),
                    EntityActivities(),
                    SettingsActivities(policy_file=self.policy_file, roster_file=None, clock=RehearsalClock()),
                )
                for name in dir(owner)
                if hasattr(method := getattr(owner, name), "__temporal_activity_definition")
            ],
            activity_executor=self.threads,
        )
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

    async def ask(self, units: int, *, seconds: float = 3600) -> DemandOutcome:
        assert self.fake is not None
        answer = await self.fake.execute_update(FakeIncident.ask, self.demand(units, seconds=seconds))
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
            f"{self.aws.endpoint_url}/_simulator/{path}", data=json.dumps(body or {}).encode(), method=method
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

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


@pytest.fixture
async def stack(
    temporal: TemporalServer, redis_client: redis.Redis, aws_server: AwsSimulator, tmp_path: Path
) -> AsyncIterator[Stack]:
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
    model = f"sonnet-{uuid4().hex[:8]}"
    aws_server.reset()
    settings = Settings(temporal_address=temporal.address, task_queue=model, aws_endpoint_url=aws_server.endpoint_url)
    policy = Policy().model_copy(update={"models": {**Policy().models, model: SONNET}, "capacity": FAST})
    policy_file = tmp_path / "policy.yaml"
    policy_file.write_text(policy.model_dump_json())
    client = await connect(settings)
    made = Stack(client, settings, aws_server, redis_client, policy_file, model, f"incident-{model}")
    made.bedrock = AwsClients(settings).bedrock()
    made.control("bedrock", {"provisioning_lag_seconds": LAG_SECONDS})
    made.bedrock.create_provisioned_model_throughput(
        provisionedModelName="base", modelUnits=15, modelId=SONNET.provisioned_model_id
    )
    made.control("settle")
    await made.start_worker()
    made.fake = await client.start_workflow(FakeIncident.run, id=made.incident, task_queue=settings.task_queue)
    yield made
    for handle in (made.entity, made.fake):
        try:
            await handle.terminate()
        except Exception:  # it was never started
            continue
    await made.stop_worker()
    made.threads.shutdown()


async def test_a_demand_is_bought_routed_and_given_back(stack: Stack) -> None:
    answer = await stack.ask(28)
    assert (answer.status, answer.units_wanted) == ("requested", 28)
    await until(lambda: stack.units() == [3, 5, 5, 15])
    assert len(stack.routed()) <= 1
    await until(lambda: sum(stack.routed().values()) == 28)
    told = await until(lambda: _last(stack, "in_service"))
    assert told.units_in_service == 28
    ours = [model for model in stack.fleet() if model["provisionedModelName"] != "base"]
    for model in ours:
        tags = stack.bedrock.list_tags_for_resource(resourceARN=model["provisionedModelArn"])["tags"]
        assert {tag["key"]: tag["value"] for tag in tags}.items() >= {
            ("managed-by", "runbooks"),
            ("asked-by", stack.incident),
        }
    state = await stack.state()
    assert (state.desired_units, state.units_in_service, state.doing, state.last_error) == (28, 28, "idle", "")

    assert (await stack.withdraw()).status == "withdrawn"
    await until(lambda: list(stack.routed().values()) == [15])
    await until(lambda: stack.units() == [15])
    await until(lambda: _idle(stack))
    state = await stack.state()
    assert (state.demands, [model.name for model in state.fleet]) == ([], ["base"])
    details = (await stack.entity.describe()).id
    assert details == capacity_id(stack.model)


async def _last(stack: Stack, status: str) -> DemandOutcome | None:
    told = await stack.told()
    return told[-1] if told and told[-1].status == status else None


async def _idle(stack: Stack) -> bool:
    return (await stack.state()).doing == "idle"
