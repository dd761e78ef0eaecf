"""The one writer of capacity on a real Temporal server and a real Valkey, against the simulated AWS over HTTP."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import redis
from temporalio.client import WithStartWorkflowOperation
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.service import RPCError

from dataplane.knobs import Knobs
from dataplane.ledger import Ledger
from dataplane.routes import Routes
from domain.capacity import DemandOutcome
from domain.messages import (
    APPROVE_CAPACITY,
    CAPACITY_STATE,
    PAUSE_CAPACITY,
    RESUME_CAPACITY,
    SET_DEMAND,
    WITHDRAW_DEMAND,
    CapacityInput,
    CapacityState,
    WithdrawDemand,
    capacity_id,
)
from domain.policy import Policy
from tests.servers import TemporalServer, ValkeyServer
from tests.workflows.capacity_stack import (
    APPROVER,
    ENGINEER,
    FAST,
    LAG_SECONDS,
    SONNET,
    FakeIncident,
    Stack,
    idle,
    last,
    last_with,
    running,
    until,
)
from workers.clients import AwsClients
from workers.redis_loss import watch_redis
from workers.settings import Settings
from workers.temporal import connect
from workflows.capacity import CapacityWorkflow


async def test_a_demand_is_bought_routed_and_given_back(stack: Stack) -> None:
    answer = await stack.ask(28)
    assert (answer.status, answer.units_wanted) == ("requested", 28)
    await until(lambda: stack.units() == [3, 5, 5, 15])
    assert len(stack.routed()) <= 1
    await until(lambda: sum(stack.routed().values()) == 28)
    told = await until(lambda: last(stack, "in_service"))
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
    await until(lambda: idle(stack))
    state = await stack.state()
    assert (state.demands, [model.name for model in state.fleet]) == ([], ["base"])


async def test_a_creation_whose_answer_is_lost_is_not_bought_twice(stack: Stack) -> None:
    stack.fault("CreateProvisionedModelThroughput", "lost_answer", count=3)
    await stack.ask(28)
    await until(lambda: sum(stack.routed().values()) == 28)
    assert stack.units() == [3, 5, 5, 15]
    assert stack.calls("CreateProvisionedModelThroughput") >= 1 + 6


async def test_a_denied_creation_names_the_statement_and_goes_on_when_the_role_is_mended(stack: Stack) -> None:
    stack.fault("CreateProvisionedModelThroughput", "access_denied", count=None)
    await stack.ask(20)
    told = await until(lambda: last(stack, "failed"))
    assert '"Action": "bedrock:CreateProvisionedModelThroughput"' in told.detail
    calls = stack.calls("CreateProvisionedModelThroughput")
    state = await stack.state()
    assert "bedrock:CreateProvisionedModelThroughput" in state.last_error
    stack.control("faults", method="DELETE")
    await asyncio.sleep(0.5)
    assert stack.calls("CreateProvisionedModelThroughput") == calls, "refused calls are not hammered"
    await stack.reconcile()
    await until(lambda: last(stack, "in_service"))
    assert stack.units() == [5, 15]
    assert (await stack.state()).last_error == ""


async def test_a_refused_quota_is_told_in_words_of_aws_and_what_to_do(stack: Stack) -> None:
    stack.control("bedrock", {"quotas": {SONNET.provisioned_model_id: 21}})
    await stack.ask(25)
    told = await until(lambda: last(stack, "failed"))
    assert "exceeds the account's quota" in told.detail
    assert "AWS Support" in told.detail
    told = await until(lambda: last_with(stack, 20))
    assert told.status == "failed"
    assert stack.units() == [5, 15]


async def test_one_failure_is_told_once_however_many_orders_and_reconciliations_it_meets(stack: Stack) -> None:
    stack.control("bedrock", {"quotas": {SONNET.provisioned_model_id: 15}})
    await stack.ask(28)
    await until(lambda: last(stack, "failed"))
    for rounds in range(2, 5):
        await stack.reconcile()
        await until(lambda rounds=rounds: stack.calls("CreateProvisionedModelThroughput") == 1 + 3 * rounds)
        await until(lambda: idle(stack))
    prolonged = await stack.ask(28, seconds=7200)
    assert prolonged.status == "failed"
    await until(lambda: stack.calls("CreateProvisionedModelThroughput") == 1 + 3 * 5)
    await until(lambda: idle(stack))
    failures = [outcome for outcome in await stack.told() if outcome.status == "failed"]
    assert len(failures) == 1
    assert "5 units were not created" in failures[0].detail
    assert "3 units were not created" in failures[0].detail
    stack.fault("CreateProvisionedModelThroughput", "access_denied", count=None)
    await stack.reconcile()
    await until(lambda: _failures(stack, 2))
    stack.control("faults", method="DELETE")
    stack.control("bedrock", {"quotas": {SONNET.provisioned_model_id: 28}})
    await stack.reconcile()
    await until(lambda: last(stack, "in_service"))
    assert (await stack.state()).last_error == ""


async def _failures(stack: Stack, count: int) -> bool:
    return len([outcome for outcome in await stack.told() if outcome.status == "failed"]) == count


async def test_a_failed_creation_is_deleted_reported_and_tried_once_per_reconciliation(stack: Stack) -> None:
    stack.control("bedrock", {"provisioning_lag_seconds": 60})
    await stack.ask(20)
    first = await until(lambda: next((m for m in stack.fleet() if m["status"] == "Creating"), None))
    name = first["provisionedModelName"]
    stack.control("bedrock", {"provisioning_lag_seconds": LAG_SECONDS})
    stack.control(f"provisioned-model-throughput/{name}", {"failure_message": "no capacity in this region"})
    told = await until(lambda: last(stack, "failed"))
    assert "no capacity in this region" in told.detail
    await until(lambda: stack.units() == [15])
    await stack.reconcile()
    await until(lambda: last(stack, "in_service"))
    assert name not in [model["provisionedModelName"] for model in stack.fleet()]


async def test_a_demand_ends_by_itself_with_nobody_there(stack: Stack) -> None:
    await stack.ask(17, seconds=6)
    assert stack.fake is not None
    await stack.fake.terminate()
    await until(lambda: sum(stack.routed().values()) == 17)
    await until(lambda: stack.units() == [15])
    await until(lambda: list(stack.routed().values()) == [15])
    assert (await stack.state()).demands == []


async def test_a_demand_that_is_prolonged_while_its_end_is_planned_goes_on(stack: Stack) -> None:
    await stack.ask(20, seconds=6)
    await until(lambda: last(stack, "in_service"))
    await until(lambda: idle(stack))
    stack.fault("ListProvisionedModelThroughputs", "lost_answer", delay_ms=1500)
    await until(lambda: _planning(stack))
    prolonged = stack.demand(20)
    assert (await stack.state()).demands[0].end < prolonged.start, "it has ended, and the plan is asked for"
    await stack.ask(20)
    await until(lambda: idle(stack))
    assert [demand.units for demand in (await stack.state()).demands] == [20]
    assert stack.units() == [5, 15]
    assert "withdrawn" not in [outcome.status for outcome in await stack.told()]
    assert stack.calls("DeleteProvisionedModelThroughput") == 0


async def test_routes_that_redis_lost_are_published_again_at_once(stack: Stack) -> None:
    ledger = Ledger(stack.redis)
    ledger.ensure_epoch()
    knobs = Knobs(stack.redis, Policy().baseline).start()
    watching = asyncio.create_task(watch_redis(ledger, knobs, stack.client))
    try:
        await stack.ask(20)
        await until(lambda: last(stack, "in_service"))
        await until(lambda: idle(stack))
        stack.redis.flushall()
        await until(lambda: sum(stack.routed().values()) == 20)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        knobs.close()
    assert stack.units() == [5, 15]


async def test_a_model_deleted_by_somebody_else_loses_its_route_and_is_bought_again(stack: Stack) -> None:
    await stack.ask(20)
    await until(lambda: last(stack, "in_service"))
    lost = next(model for model in stack.fleet() if model["provisionedModelName"] != "base")
    stack.control(f"provisioned-model-throughput/{lost['provisionedModelName']}", method="DELETE")
    await stack.reconcile()
    await until(lambda: lost["provisionedModelArn"] not in stack.routed())
    await until(lambda: stack.units() == [5, 15] and sum(stack.routed().values()) == 20)


async def test_demands_and_withdrawals_are_handled_while_models_are_in_creation(stack: Stack) -> None:
    stack.control("bedrock", {"provisioning_lag_seconds": 60})
    await stack.ask(20)
    await until(lambda: stack.units() == [5, 15])
    await stack.ask(25)
    await until(lambda: stack.units() == [5, 5, 15])
    await stack.withdraw()
    assert len(stack.fleet()) == 3, "Bedrock deletes nothing that is in creation"
    stack.control("settle")
    await until(lambda: stack.units() == [15])
    assert list(stack.routed().values()) == [15]


async def test_what_is_draining_is_taken_back_when_it_is_wanted_again(stack: Stack) -> None:
    stack.set_policy(drain=timedelta(seconds=30))
    await stack.ask(20)
    await until(lambda: last(stack, "in_service"))
    await stack.withdraw()
    await until(lambda: list(stack.routed().values()) == [15])
    await stack.ask(20)
    await until(lambda: sum(stack.routed().values()) == 20)
    assert stack.calls("CreateProvisionedModelThroughput") == 1 + 1
    assert stack.calls("DeleteProvisionedModelThroughput") == 0


async def test_others_and_committed_models_are_counted_and_never_touched(stack: Stack) -> None:
    stack.bedrock.create_provisioned_model_throughput(
        provisionedModelName="term",
        modelUnits=4,
        modelId=SONNET.provisioned_model_id,
        commitmentDuration="OneMonth",
        tags=[{"key": "managed-by", "value": "runbooks"}],
    )
    stack.control("settle")
    await stack.ask(20)
    await until(lambda: sum(stack.routed().values()) == 20)
    assert stack.units() == [1, 4, 15]
    await stack.withdraw()
    await until(lambda: stack.units() == [4, 15])
    state = await until(lambda: idle(stack))
    assert (state.desired_units, state.units_in_service) == (15, 19)


async def test_nothing_is_deleted_while_its_route_cannot_be_withdrawn(stack: Stack) -> None:
    await stack.ask(20)
    await until(lambda: last(stack, "in_service"))
    stack.redis.client_pause(6000, all=False)
    await stack.withdraw()
    await asyncio.sleep(1)
    assert stack.units() == [5, 15]
    await until(lambda: stack.units() == [15])
    assert list(stack.routed().values()) == [15]


async def test_wrong_demands_are_refused_with_what_is_allowed(stack: Stack) -> None:
    assert stack.fake is not None
    ended = stack.demand(20).model_copy(
        update={"start": datetime(2020, 1, 1, tzinfo=UTC), "end": datetime(2020, 1, 2, tzinfo=UTC)}
    )
    answer = await stack.fake.execute_update(FakeIncident.ask, ended)
    assert "Invalid: end: 2020-01-02" in str(answer)
    unknown = stack.demand(20).model_copy(update={"model": f"nova-{stack.model}"})
    answer = await stack.fake.execute_update(FakeIncident.ask, unknown)
    assert f"the policy has no 'nova-{stack.model}'; it has" in str(answer)


async def test_state_is_carried_into_continued_runs(redis_client: redis.Redis, aws_server: str, tmp_path: Path) -> None:
    short = {"limit.historyCount.suggestContinueAsNew": "40"}
    temporal = TemporalServer(tmp_path, dynamic_config=short).start()
    try:
        async with running(temporal, redis_client, aws_server, tmp_path) as stack:
            await stack.ask(20, uncapped=25)
            await until(lambda: last(stack, "in_service"))
            before = await until(lambda: idle(stack))
            assert (await stack.asks(PAUSE_CAPACITY, ENGINEER)).outcome == "accepted"
            await _continued(stack)
            state = await stack.state()
            kept = {"demands", "purchases", "awaiting", "routes"}
            assert state.model_dump(include=kept) == before.model_dump(include=kept)
            assert state.paused is not None
            assert [decision.action for decision in state.decisions] == [PAUSE_CAPACITY]
            assert (await stack.asks(RESUME_CAPACITY, APPROVER)).outcome == "accepted"
            [asked] = state.awaiting
            assert (await stack.asks(APPROVE_CAPACITY, APPROVER, approval_id=asked.approval_id)).outcome == "accepted"
            await until(lambda: sum(stack.routed().values()) == 25)
            await _continued(stack)
            assert (await stack.ask(20, uncapped=25)).units_wanted == 25
            told = await stack.told()
            assert len(told) == len({outcome.model_dump_json() for outcome in told}), "told twice"
            assert len(stack.pages()) == 1, "asked once"
            await stack.withdraw()
            await until(lambda: stack.units() == [15])
            assert list(stack.routed().values()) == [15]
    finally:
        temporal.kill()


async def _continued(stack: Stack) -> None:
    """Until another run goes on, which reconciling makes necessary soon."""
    run = (await stack.entity.describe()).run_id

    async def continued() -> bool:
        await stack.reconcile()
        return (await stack.entity.describe()).run_id != run

    await until(continued)
    await until(lambda: idle(stack))


async def test_a_killed_worker_loses_nothing_and_buys_nothing_twice(
    temporal: TemporalServer, valkey: ValkeyServer, redis_client: redis.Redis, aws_server: str, tmp_path: Path
) -> None:
    """One model of each is at every step of its life when the worker is killed."""
    steps = ("asked", "lost", "creating", "draining", "deleting")
    run = uuid4().hex[:8]
    names = {step: f"{step}-{run}" for step in steps}
    ids = {step: f"anthropic.{step}-v1:0" for step in steps}
    specs = {
        names[step]: SONNET.model_copy(
            update={"model_id": ids[step], "provisioned_model_id": f"{ids[step]}:28k", "baseline_units": 0}
        )
        for step in steps
    }
    capacity = FAST.model_copy(update={"drain": timedelta(seconds=4)})
    policy = Policy(timetable=None).model_copy(update={"models": {**Policy().models, **specs}, "capacity": capacity})
    (tmp_path / "policy.yaml").write_text(policy.model_dump_json())
    settings = Settings(temporal_address=temporal.address, task_queue=run, aws_endpoint_url=aws_server)
    client = await connect(settings)
    stack = Stack(client, settings, aws_server, redis_client, tmp_path / "policy.yaml", "", "an engineer")
    stack.bedrock = AwsClients(settings).bedrock()
    stack.reset_aws()
    quotas = {f"{model_id}:28k": 10 for model_id in ids.values()}
    stack.control("bedrock", {"provisioning_lag_seconds": 0, "quotas": quotas})

    async def send(step: str, update: str, message: Any) -> DemandOutcome:
        start: WithStartWorkflowOperation[Any, Any] = WithStartWorkflowOperation(
            CapacityWorkflow.run,
            CapacityInput(state=CapacityState(model=names[step])),
            id=capacity_id(names[step]),
            task_queue=run,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        )
        answer: DemandOutcome = await client.execute_update_with_start_workflow(
            update, message, start_workflow_operation=start, result_type=DemandOutcome
        )
        return answer

    async def ask(step: str) -> DemandOutcome:
        return await send(step, SET_DEMAND, stack.demand(10).model_copy(update={"model": names[step]}))

    async def withdraw(step: str) -> DemandOutcome:
        request = WithdrawDemand(model=names[step], demand_id="an engineer", reason="over")
        return await send(step, WITHDRAW_DEMAND, request)

    def units(step: str) -> int:
        return sum(m["modelUnits"] for m in stack.fleet() if ids[step] in m["modelArn"])

    def routed(step: str) -> int:
        held = Routes(redis_client).read_all().get(names[step])
        return sum(route.units for route in held.routes) if held else 0

    async def state_of(step: str) -> CapacityState:
        state: CapacityState = await client.get_workflow_handle(capacity_id(names[step])).query(
            CAPACITY_STATE, result_type=CapacityState
        )
        return state

    async def does(step: str, what: str) -> bool:
        return what in (await state_of(step)).doing

    environment = os.environ | {
        "RUNBOOKS_TEMPORAL_ADDRESS": temporal.address,
        "RUNBOOKS_TASK_QUEUE": run,
        "RUNBOOKS_REDIS_URL": valkey.url,
        "RUNBOOKS_AWS_ENDPOINT_URL": aws_server,
        "RUNBOOKS_POLICY_FILE": str(tmp_path / "policy.yaml"),
        "RUNBOOKS_STATE_DIR": str(tmp_path),
    }

    def start_worker() -> subprocess.Popen[bytes]:
        with (tmp_path / "worker.log").open("ab") as log:
            command = [sys.executable, "-m", "workers.runbook_worker"]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    worker = start_worker()
    try:
        for step in ("draining", "deleting"):
            await ask(step)
        await until(lambda: routed("draining") == routed("deleting") == 10)
        stack.control("bedrock", {"provisioning_lag_seconds": 8})
        await ask("creating")
        await until(lambda: does("creating", "waiting until"))
        stack.fault("DeleteProvisionedModelThroughput", "lost_answer", count=2, delay_ms=5000)
        await withdraw("deleting")
        await until(lambda: does("deleting", "deleting"))
        stack.fault("CreateProvisionedModelThroughput", "lost_answer", count=2, delay_ms=1500)
        await ask("lost")
        await until(lambda: does("lost", "asking"))
        await withdraw("draining")
        await until(lambda: does("draining", "draining"))
        await ask("asked")
        worker.kill()
        worker.wait()
        worker = start_worker()
        for step, expected in (("asked", 10), ("lost", 10), ("creating", 10), ("draining", 0), ("deleting", 0)):
            await until(lambda step=step, expected=expected: routed(step) == units(step) == expected, seconds=60)
        bought = [m["provisionedModelName"] for m in stack.fleet()]
        assert len(bought) == len(set(bought)) == 6
        for step in steps:
            state = await until(lambda step=step: _rest(state_of(step)))
            assert state.last_error == ""
    finally:
        worker.kill()
        worker.wait()
        for model in policy.models:
            with suppress(RPCError):
                await client.get_workflow_handle(capacity_id(model)).terminate()


async def _rest(reading: Awaitable[CapacityState]) -> CapacityState | None:
    state = await reading
    return state if state.doing == "idle" else None


async def _planning(stack: Stack) -> bool:
    return "planning" in (await stack.state()).doing


def test_what_no_list_has_yet_or_has_still_is_known_to_the_next_run() -> None:
    """Otherwise what was bought a moment before a run ends is bought again, and what is gone gets calls."""
    state = CapacityState(model="sonnet", unlisted=["arn:bought"], gone=["arn:deleted"])
    assert CapacityWorkflow(CapacityInput(state=state)).state(datetime.now(UTC)) == state.model_copy(
        update={"doing": "planning"}
    )
