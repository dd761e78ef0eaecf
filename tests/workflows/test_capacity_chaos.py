"""Workers that are killed again and again, an AWS that fails, and people who change their minds, all at random."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import pytest
import redis
from temporalio.client import WithStartWorkflowOperation, WorkflowHandle
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.service import RPCError

from dataplane.routes import Routes
from domain.capacity import DemandOutcome
from domain.messages import (
    CAPACITY_STATE,
    RECONCILE_NOW,
    SET_DEMAND,
    WITHDRAW_DEMAND,
    CapacityInput,
    CapacityState,
    PersonRequest,
    WithdrawDemand,
    capacity_id,
)
from domain.policy import Policy
from tests.servers import TemporalServer, ValkeyServer
from tests.workflows.capacity_stack import ENGINEER, FAST, SONNET, Stack, replays, until
from workers.clients import AwsClients
from workers.settings import Settings
from workers.temporal import connect
from workflows.capacity import CapacityWorkflow

MODELS, KILLS, CHANGES = 3, 3, 4
OPERATIONS = ("Create", "Delete", "Get")
FAULTS = ("throttling", "server_error", "lost_answer", "lost_answer")


class Model:
    """One model, its capacity workflow, and somebody who asks for units and changes their mind."""

    def __init__(self, stack: Stack, number: int, random: Random) -> None:
        self.name = f"chaos-{number}-{stack.settings.task_queue}"
        self.model_id = f"anthropic.{self.name}-v1:0"
        self.wanted = 0
        self._stack, self._random = stack, random

    @property
    def handle(self) -> WorkflowHandle[Any, Any]:
        return self._stack.client.get_workflow_handle(capacity_id(self.name))

    async def send(self, update: str, message: Any) -> None:
        """The workflow is started by its first message; a worker that is dead answers when the next one lives."""
        start: WithStartWorkflowOperation[Any, Any] = WithStartWorkflowOperation(
            CapacityWorkflow.run,
            CapacityInput(state=CapacityState(model=self.name)),
            id=capacity_id(self.name),
            task_queue=self._stack.settings.task_queue,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        )
        await self._stack.client.execute_update_with_start_workflow(
            update, message, start_workflow_operation=start, result_type=DemandOutcome
        )

    async def change_minds(self) -> None:
        for number in range(CHANGES):
            self.wanted = self._random.choice((0, 3, 7, 12)) if number < CHANGES - 1 else self._random.randint(1, 12)
            if self.wanted:
                await self.send(SET_DEMAND, self._stack.demand(self.wanted).model_copy(update={"model": self.name}))
            else:
                request = WithdrawDemand(model=self.name, demand_id="an engineer", reason="over")
                await self.send(WITHDRAW_DEMAND, request)
            await asyncio.sleep(self._random.uniform(0, 1))

    def fleet(self) -> list[dict[str, Any]]:
        return [model for model in self._stack.fleet() if self.model_id in model["modelArn"]]

    async def is_as_wanted(self) -> bool:
        """In AWS, in the routes, and in its own books."""
        held = Routes(self._stack.redis).read_all().get(self.name)
        routed = {route.provisioned_model_arn: route.units for route in held.routes} if held else {}
        fleet = {model["provisionedModelArn"]: model["modelUnits"] for model in self.fleet()}
        state: CapacityState = await self.handle.query(CAPACITY_STATE, result_type=CapacityState)
        bought = {purchase.arn: purchase.units for purchase in state.bought}
        return sum(fleet.values()) == self.wanted and fleet == routed == bought and state.doing == "idle"


@contextmanager
def worker(environment: dict[str, str], log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed at the end, at whatever it does."""
    with log_file.open("ab") as log:
        command = [sys.executable, "-m", "tests.workflows.capacity_stack"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("seed", [int(os.environ.get("CHAOS_SEED", "1"))])
async def test_random_kills_leave_exactly_the_units_wanted(
    seed: int,
    temporal: TemporalServer,
    valkey: ValkeyServer,
    redis_client: redis.Redis,
    aws_server: str,
    tmp_path: Path,
) -> None:
    random, queue = Random(seed), uuid4().hex[:8]
    settings = Settings(temporal_address=temporal.address, task_queue=queue, aws_endpoint_url=aws_server)
    stack = Stack(
        await connect(settings), settings, aws_server, redis_client, tmp_path / "policy.yaml", "", "an engineer"
    )
    models = [Model(stack, number, random) for number in range(MODELS)]
    specs = {
        model.name: SONNET.model_copy(
            update={
                "model_id": model.model_id,
                "provisioned_model_id": f"{model.model_id}:28k",
                "baseline_units": 0,
                "quota_units": 16,
            }
        )
        for model in models
    }
    changed = {"models": {**Policy().models, **specs}, "capacity": FAST, "timetable": None}
    stack.policy_file.write_text(Policy().model_copy(update=changed).model_dump_json())
    stack.bedrock = AwsClients(settings).bedrock()
    stack.reset_aws()
    quotas = {f"{model.model_id}:28k": 16 for model in models}
    stack.control("bedrock", {"provisioning_lag_seconds": 0.5, "quotas": quotas})
    environment = os.environ | {
        "RUNBOOKS_TEMPORAL_ADDRESS": temporal.address,
        "RUNBOOKS_TASK_QUEUE": queue,
        "RUNBOOKS_REDIS_URL": valkey.url,
        "RUNBOOKS_AWS_ENDPOINT_URL": aws_server,
        "RUNBOOKS_POLICY_FILE": str(stack.policy_file),
    }
    people = [asyncio.create_task(model.change_minds()) for model in models]
    try:
        for _ in range(KILLS):
            before = len(stack.control("trail", method="GET"))
            with worker(environment, tmp_path / "worker.log"):
                stack.fault(
                    f"{random.choice(OPERATIONS)}ProvisionedModelThroughput",
                    random.choice(FAULTS),
                    count=random.randint(1, 3),
                    delay_ms=random.choice((0, 300)),
                )
                calls = before + random.randint(2, 15)
                with suppress(AssertionError):  # nothing more was to be done: killed at rest
                    await until(lambda calls=calls: len(stack.control("trail", method="GET")) > calls, seconds=2)
        stack.control("faults", method="DELETE")
        with worker(environment, tmp_path / "worker.log"):
            await asyncio.wait_for(asyncio.gather(*people), 60)
            for model in models:
                await model.handle.execute_update(RECONCILE_NOW, PersonRequest(who=ENGINEER, why="it is calm now"))
            for model in models:
                await until(model.is_as_wanted)
                names = [bought["provisionedModelName"] for bought in model.fleet()]
                assert len(names) == len(set(names))
        assert sum(len(model.fleet()) for model in models) == len(stack.fleet()), "nothing else was bought"
        for model in models:
            stack.model = model.name
            await replays(stack)
    finally:
        for person in people:
            person.cancel()
        for model in models:
            with suppress(RPCError):
                await model.handle.terminate()
