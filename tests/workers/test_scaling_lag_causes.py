"""Scenario 4's six causes: each by breaking just that thing on real servers, and reading what the incident says."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from datetime import time as clock_time
from pathlib import Path

import pytest
from temporalio.client import Client, WorkflowHandle
from temporalio.service import RPCError
from temporalio.worker import Worker

from activities.entities import start_capacity
from activities.schedules import ensure_schedules
from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from dataplane.routes import Routes
from domain.alarms import AlarmState
from domain.capacity import DemandKind
from domain.clock import RehearsalClock
from domain.health import HEALTH_SCHEDULE
from domain.incident import IncidentRecord, LeverName, LeverStatus
from domain.messages import (
    CAPACITY_STATE,
    INCIDENT_WORKFLOW,
    PAUSE_CAPACITY,
    RECONCILE_NOW,
    RECORD,
    CapacityState,
    IncidentInput,
    PersonRequest,
    PolicySnapshot,
    Reconciled,
    UpdateResult,
    capacity_id,
    incident_id,
)
from domain.policy import CapacityPolicy, HealthPolicy, Policy, TimetablePolicy, TimetableWindow
from tests.aws_account import Account
from tests.scheduled import eventually
from tests.servers import AwsServer, TemporalServer, ValkeyServer
from tests.workflows.fakes import alarm
from workers.clients import AwsClients
from workers.runbook_worker import WORKFLOWS, activities
from workers.schedules import schedules
from workers.settings import Settings
from workers.temporal import connect

QUEUE, UNITS = "scaling-lag", 4
CREATE = "CreateProvisionedModelThroughput"
ME = PersonRequest(who="approver@example.com", why="freeze")
POLICY = Policy(
    models={"sonnet": Policy().models["sonnet"]},
    intents={"faq": Policy().intents["faq"].model_copy(update={"downgrade_to": None})},
    timetable=TimetablePolicy(
        windows=(
            TimetableWindow(start=clock_time(0), end=clock_time(12), units={"sonnet": UNITS}),
            TimetableWindow(start=clock_time(12), end=clock_time(0), units={"sonnet": UNITS}),
        )
    ),
    capacity=CapacityPolicy(poll_interval=timedelta(seconds=0.1)),
    health=HealthPolicy(interval=timedelta(days=1000)),
    coupling=None,
)


class Plumbing:
    """A worker as it runs in earnest, with everything around it. One thing of it is broken at a time."""

    def __init__(self, client: Client, aws: Account) -> None:
        self.client = client
        self.aws = aws

    @property
    def writer(self) -> WorkflowHandle[object, object]:
        return self.client.get_workflow_handle(capacity_id("sonnet"))

    async def state(self) -> CapacityState:
        state: CapacityState = await self.writer.query(CAPACITY_STATE, result_type=CapacityState)
        return state

    async def tried(self) -> bool:
        """The capacity workflow has asked AWS, with whatever end."""
        state = await self.state()
        return bool(state.troubles or state.fleet or "asking" in state.doing)

    async def starts(self, until: Callable[[], Awaitable[bool]] | None = None) -> None:
        """The capacity workflow starts anew in an account without units."""
        await start_capacity(self.client, "sonnet", QUEUE)
        await eventually(until or self.tried)

    async def diagnosed(self) -> IncidentRecord:
        """The record of an incident that opens now, once it has a diagnosis of complete checks."""
        key = "bedrock-throttle:sonnet"
        change = alarm(AlarmState.ALARM, datetime.now(UTC), "message-1")
        input = IncidentInput(key=key, runbook="throttle", model="sonnet", alarm=change)
        handle = await self.client.start_workflow(INCIDENT_WORKFLOW, input, id=incident_id(key), task_queue=QUEUE)

        async def found() -> bool:
            seen = await self.record()
            return seen.diagnosis is not None and bool(seen.diagnosis.causes) and len(seen.levers) == 4

        await eventually(found)
        assert handle.id == incident_id(key)
        return await self.record()

    async def record(self) -> IncidentRecord:
        handle = self.client.get_workflow_handle(incident_id("bedrock-throttle:sonnet"))
        record: IncidentRecord = await handle.query(RECORD, result_type=IncidentRecord)
        return record

    async def is_mended(self) -> None:
        """Nothing is broken, and nothing runs or stands."""
        for workflow in (capacity_id("sonnet"), incident_id("bedrock-throttle:sonnet")):
            with suppress(RPCError):
                await self.client.get_workflow_handle(workflow).terminate("the next case")
        self.aws.control("DELETE", "faults")
        self.aws.control("POST", "bedrock", {"provisioning_lag_seconds": 0.1})
        bedrock = self.aws.client("bedrock")
        for model in bedrock.list_provisioned_model_throughputs()["provisionedModelSummaries"]:
            self.aws.control("DELETE", f"provisioned-model-throughput/{model['provisionedModelName']}")
        snapshot = PolicySnapshot(policy=POLICY, clock=RehearsalClock())
        with suppress(RPCError):
            await self.client.get_schedule_handle(HEALTH_SCHEDULE).unpause()
        await ensure_schedules(self.client, schedules(snapshot), QUEUE)

    def breaks(self, kind: str) -> None:
        """Asking AWS for units goes wrong from now on."""
        self.aws.control("POST", "faults", {"service": "bedrock", "operation": CREATE, "kind": kind, "count": None})


@pytest.fixture
async def plumbing(tmp_path: Path, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plumbing]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    aws_server, temporal = AwsServer(tmp_path).start(), TemporalServer(tmp_path).start()
    policy_file = tmp_path / "policy.yaml"
    policy_file.write_text(json.dumps(POLICY.model_dump(mode="json")))
    roster_file = tmp_path / "roster.yaml"
    roster_file.write_text(json.dumps({"people": {ME.who: "approver"}}))
    settings = Settings(
        temporal_address=temporal.address,
        redis_url=valkey.url,
        aws_endpoint_url=aws_server.endpoint,
        policy_file=policy_file,
        roster_file=roster_file,
        state_dir=tmp_path / "state",
        event_table="events",
        task_queue=QUEUE,
    )
    client, account = await connect(settings), Account(aws_server.endpoint)
    account.event_table("events")
    ecs, names = account.client("ecs"), {"cluster": settings.ecs_cluster, "serviceName": settings.ecs_service}
    ecs.create_cluster(clusterName=settings.ecs_cluster)
    container = {"name": "chat", "image": "chat:1", "memory": 512}
    ecs.register_task_definition(family="chat", containerDefinitions=[container])
    ecs.create_service(**names, taskDefinition="chat", desiredCount=35)
    with connect_redis(valkey.url) as connection, ThreadPoolExecutor(50) as threads:
        connection.flushall()
        tools = activities(settings, AwsClients(settings), Ledger(connection), Routes(connection))
        worker = Worker(
            client,
            task_queue=QUEUE,
            workflows=WORKFLOWS,
            activities=tools,
            activity_executor=threads,
            max_concurrent_activities=50,
        )
        async with worker:
            found = Plumbing(client, account)
            yield found
            await found.is_mended()
    temporal.kill()
    aws_server.kill()


async def is_paused(plumbing: Plumbing) -> None:
    plumbing.breaks("access_denied")  # so that nothing comes before the pause
    await plumbing.starts()
    answer: UpdateResult = await plumbing.writer.execute_update(PAUSE_CAPACITY, ME, result_type=UpdateResult)
    assert answer.outcome == "accepted", answer
    plumbing.aws.control("DELETE", "faults")


async def has_no_schedule(plumbing: Plumbing) -> None:
    await plumbing.client.get_schedule_handle(HEALTH_SCHEDULE).delete()


async def has_a_paused_schedule(plumbing: Plumbing) -> None:
    await plumbing.client.get_schedule_handle(HEALTH_SCHEDULE).pause(note="freeze until Monday")


async def may_not_buy(plumbing: Plumbing) -> None:
    plumbing.breaks("access_denied")
    await plumbing.starts()


async def names_what_is_gone(plumbing: Plumbing) -> None:
    plumbing.breaks("not_found")
    await plumbing.starts()


async def lost_its_models(plumbing: Plumbing) -> None:
    async def in_service() -> bool:
        return sum((await plumbing.state()).routes.values()) == UNITS

    await plumbing.starts(in_service)
    for model in plumbing.aws.client("bedrock").list_provisioned_model_throughputs()["provisionedModelSummaries"]:
        plumbing.aws.control("DELETE", f"provisioned-model-throughput/{model['provisionedModelName']}")


async def gets_no_answer(plumbing: Plumbing) -> None:
    plumbing.breaks("timeout")
    await plumbing.starts()


async def calls_too_often(plumbing: Plumbing) -> None:
    plumbing.breaks("throttling")
    await plumbing.starts()


async def waits_for_aws(plumbing: Plumbing) -> None:
    async def creating() -> bool:
        return bool(plumbing.aws.client("bedrock").list_provisioned_model_throughputs()["provisionedModelSummaries"])

    plumbing.aws.control("POST", "bedrock", {"provisioning_lag_seconds": 600})
    await plumbing.starts(creating)


CASES: list[tuple[Callable[[Plumbing], Awaitable[None]], str, str, str]] = [
    (is_paused, "schedule-off", "switch-on", "capacity_workflow = paused"),
    (has_no_schedule, "schedule-off", "switch-on", "the schedule health-check is missing"),
    (has_a_paused_schedule, "schedule-off", "switch-on", "health-check is paused: freeze until Monday"),
    (may_not_buy, "access-denied", "mend-and-re-run", f'"Action": "bedrock:{CREATE}"'),
    (names_what_is_gone, "stale-arn", "mend-and-re-run", "ResourceNotFoundException"),
    (gets_no_answer, "timeout", "mend-and-re-run", "create_model was tried"),
    (calls_too_often, "management-throttled", "mend-and-re-run", "Rate exceeded"),
    (waits_for_aws, "still-creating", "wait-for-creation", "units_creating = 4"),
    (lost_its_models, "stale-arn", "mend-and-re-run", "the routes name models that Bedrock does not have"),
]


async def test_each_cause_is_read_from_the_plumbing(plumbing: Plumbing) -> None:
    for broken, cause, remedy, because in CASES:
        await plumbing.is_mended()
        await broken(plumbing)
        record = await plumbing.diagnosed()
        assert record.diagnosis is not None
        said = f"{broken.__name__}: {record.diagnosis} {[check.finding for check in record.checks]}"
        assert [found.id for found in record.diagnosis.causes] == [cause, remedy], said
        assert because in "; ".join(step.because for step in record.diagnosis.path), said
        assert record.runbook == "scaling-lag", said


async def test_a_mended_role_and_a_reconciliation_bring_the_units(plumbing: Plumbing) -> None:
    """The levers of scenario 4 stand meanwhile; the demand is for what the hour expects."""
    await plumbing.is_mended()
    await may_not_buy(plumbing)
    record = await plumbing.diagnosed()
    assert {lever.name: lever.after for lever in record.levers if lever.status is LeverStatus.IN_FORCE} == {
        LeverName.REQUEST_COALESCING: "on",
        LeverName.CACHE_TTL: "90 s",
        LeverName.CAPACITY: f"{UNITS} units",
    }
    demands = (await plumbing.state()).demands
    assert [(demand.kind, demand.units) for demand in demands] == [(DemandKind.EMERGENCY, UNITS)]

    plumbing.aws.control("DELETE", "faults")
    done: Reconciled = await plumbing.writer.execute_update(RECONCILE_NOW, ME, result_type=Reconciled)
    assert done.outcome == "accepted"

    async def landed() -> bool:
        lever = (await plumbing.record()).lever(LeverName.CAPACITY)
        return lever is not None and lever.landed_at is not None

    await eventually(landed)
    assert sum((await plumbing.state()).routes.values()) == UNITS
