"""The health check on a real Temporal server, a real Valkey and the simulated AWS: what is broken is found, mended or
told to people, once."""

import asyncio
import json
import os
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.worker import Worker

from activities.entities import start_capacity
from activities.schedules import ensure_schedules
from dataplane import keys
from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from dataplane.routes import Routes
from domain.alarm_definitions import alarm_definitions, put_metric_alarm
from domain.capacity import MANAGED_BY, MANAGED_BY_TAG
from domain.clock import RehearsalClock
from domain.health import HEALTH_SCHEDULE, Area, HealthReport
from domain.incident import IncidentRecord
from domain.messages import (
    ACKNOWLEDGE,
    RECORD,
    PersonRequest,
    PolicySnapshot,
    UpdateResult,
    capacity_id,
    incident_id,
)
from domain.policy import HEARTBEAT_ALARM, CapacityPolicy, HealthPolicy, Policy
from ops.asking import ExitCode
from ops.health import run_now
from tests.aws_account import Account
from tests.scheduled import replays
from tests.servers import AwsServer, TemporalServer, ValkeyServer
from workers.clients import AwsClients
from workers.runbook_worker import WORKFLOWS, activities
from workers.schedules import schedules
from workers.settings import Settings
from workers.temporal import connect
from workflows.health_check import HealthCheckWorkflow

ENGINEER = "engineer@example.com"
SONNET, HAIKU = (Policy().models[name] for name in ("sonnet", "haiku"))


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")


@pytest.fixture(scope="module")
def aws_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    server = AwsServer(tmp_path_factory.mktemp("aws")).start()
    yield Account(server.endpoint)
    server.kill()


@pytest.fixture
def aws(aws_server: Account) -> Account:
    """An empty account."""
    reset = urllib.request.Request(f"{aws_server.endpoint_url}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset, timeout=5).close()
    aws_server.control("DELETE", "faults")
    aws_server.control("POST", "bedrock", {"provisioning_lag_seconds": 0.1})
    return aws_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TemporalServer]:
    """One of this module's own: schedules, capacity and incidents have one name in a namespace."""
    server = TemporalServer(tmp_path_factory.mktemp("temporal")).start()
    yield server
    server.kill()


@dataclass
class Stack:
    """A worker as it runs in earnest, and hands on everything around it."""

    client: Client
    redis: redis.Redis
    aws: Account
    pages: Path
    worker: Worker
    env: dict[str, str]

    async def check(self) -> HealthReport:
        """One check, by the schedule."""
        return await run_now(self.client, HEALTH_SCHEDULE, HealthReport, timedelta(seconds=40))

    async def incident(self, key: str) -> IncidentRecord:
        handle = self.client.get_workflow_handle(incident_id(key))
        record: IncidentRecord = await handle.query(RECORD, result_type=IncidentRecord)
        return record

    def buy(self, model_id: str, units: int, name: str, *, ours: bool) -> str:
        tags = [{"key": MANAGED_BY_TAG, "value": MANAGED_BY}] if ours else []
        answer = self.aws.client("bedrock").create_provisioned_model_throughput(
            modelId=model_id, modelUnits=units, provisionedModelName=name, tags=tags
        )
        arn: str = answer["provisionedModelArn"]
        return arn

    def heartbeats(self) -> float:
        now = datetime.now(UTC)
        answer = self.aws.client("cloudwatch").get_metric_statistics(
            Namespace="MangaAssist",
            MetricName="ControlPlaneHeartbeat",
            StartTime=now - timedelta(minutes=10),
            EndTime=now + timedelta(minutes=1),
            Period=60,
            Statistics=["Sum"],
        )
        return float(sum(point["Sum"] for point in answer["Datapoints"]))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    give_up_at = time.monotonic() + 40
    while not await condition():
        assert time.monotonic() < give_up_at, "it never came true"
        await asyncio.sleep(0.05)


@pytest.fixture
def policy() -> Policy:
    """One of a single model, whose two units are others'."""
    return Policy(
        models={"sonnet": SONNET.model_copy(update={"baseline_units": 2})},
        intents={"faq": Policy().intents["faq"].model_copy(update={"downgrade_to": None})},
        timetable=None,
        coupling=None,
        capacity=CapacityPolicy(poll_interval=timedelta(seconds=0.1), drain=timedelta(seconds=0.1)),
        health=HealthPolicy(interval=timedelta(days=1000)),
    )


@pytest.fixture
async def stack(
    tmp_path: Path, aws: Account, server: TemporalServer, valkey: ValkeyServer, policy: Policy
) -> AsyncIterator[Stack]:
    policy_file = tmp_path / "policy.yaml"
    policy_file.write_text(json.dumps(policy.model_dump(mode="json")))
    roster = tmp_path / "roster.yaml"
    roster.write_text(f"people: {{{ENGINEER}: engineer}}")
    settings = Settings(
        roster_file=roster,
        temporal_address=server.address,
        redis_url=valkey.url,
        aws_endpoint_url=aws.endpoint_url,
        policy_file=policy_file,
        state_dir=tmp_path / "state",
        event_table="events",
        task_queue="health",
    )
    client = await connect(settings)
    with connect_redis(valkey.url) as connection, ThreadPoolExecutor(50) as threads:
        connection.flushall()
        tools = activities(settings, AwsClients(settings), Ledger(connection), Routes(connection))

        worker = Worker(
            client,
            task_queue=settings.task_queue,
            workflows=WORKFLOWS,
            activities=tools,
            activity_executor=threads,
            max_concurrent_activities=50,
        )
        env = {
            "RUNBOOKS_TEMPORAL_ADDRESS": server.address,
            "RUNBOOKS_TASK_QUEUE": settings.task_queue,
            "RUNBOOKS_POLICY_FILE": str(policy_file),
        }
        stack = Stack(client, connection, aws, tmp_path / "state" / "pages.jsonl", worker, env)
        stack.buy(SONNET.provisioned_model_id, 2, "base", ours=False)
        aws.control("POST", "settle")
        async with worker:
            await start_capacity(client, "sonnet", settings.task_queue)
            await ensure_schedules(
                client, schedules(PolicySnapshot(policy=policy, clock=RehearsalClock())), settings.task_queue
            )
            await until(lambda: _routed(connection))
            yield stack
            await _clear(client)


async def _clear(client: Client) -> None:
    async for schedule in await client.list_schedules():
        with suppress(RPCError):
            await client.get_schedule_handle(schedule.id).delete()
    async for execution in client.list_workflows("ExecutionStatus = 'Running'"):
        with suppress(RPCError):
            await client.get_workflow_handle(execution.id).terminate()


async def _routed(connection: redis.Redis) -> bool:
    return bool(connection.hlen(keys.ROUTES)) and bool(Routes(connection).read_all()["sonnet"].routes)


def ids(report: HealthReport) -> set[str]:
    return {finding.finding_id for finding in report.open}


async def test_what_is_broken_is_found_mended_or_told_once(stack: Stack) -> None:
    report = await stack.check()
    assert report.findings == (), report
    assert stack.heartbeats() == 1

    # Lost routes and a writer that somebody terminated are mended; an orphan and a paused schedule are for people.
    stack.redis.delete(keys.ROUTES)
    await stack.client.get_workflow_handle(capacity_id("sonnet")).terminate("by mistake")
    orphan = stack.buy(HAIKU.provisioned_model_id, 1, "runbooks-haiku-left", ours=True)
    stack.aws.control("POST", "settle")
    schedule = stack.client.get_schedule_handle(HEALTH_SCHEDULE)
    await schedule.pause(note="freeze until Monday")

    report = await stack.check()
    found = {finding.finding_id: finding for finding in report.findings}
    assert found.keys() == {
        "capacity-writer:sonnet",
        "routes-missing:sonnet",
        "orphan:runbooks-haiku-left",
        f"schedule-paused:{HEALTH_SCHEDULE}",
    }
    assert ids(report) == {"orphan:runbooks-haiku-left", f"schedule-paused:{HEALTH_SCHEDULE}"}
    assert orphan in found["orphan:runbooks-haiku-left"].do
    assert "freeze until Monday" in found[f"schedule-paused:{HEALTH_SCHEDULE}"].what
    await until(lambda: _routed(stack.redis))
    orphans, paused = "capacity-health:orphans", "control-health:schedules"
    assert {finding.incident for finding in report.open} == {orphans, paused}
    assert (await stack.incident(orphans)).alarm_times == 1

    # What stands is told once; what was mended is gone.
    report = await stack.check()
    assert ids(report) == {"orphan:runbooks-haiku-left", f"schedule-paused:{HEALTH_SCHEDULE}"}
    assert not report.to_tell
    assert (await stack.incident(orphans)).alarm_times == 1
    texts = [json.loads(line)["text"] for line in stack.pages.read_text().splitlines()]
    assert len(texts) == 2
    assert all(text.startswith("the health check found it: ") for text in texts)

    # While Bedrock denies everything, nothing about the fleet is over and nothing new is claimed.
    deny = {"service": "bedrock", "operation": None, "kind": "access_denied", "count": None}
    stack.aws.control("POST", "faults", deny)
    await schedule.unpause()
    report = await stack.check()
    denied = ("ListProvisionedModelThroughputs", "GetProvisionedModelThroughput", "ListTagsForResource")
    assert ids(report) == {
        "orphan:runbooks-haiku-left",
        "unread:bedrock",
        *(f"permission:bedrock:{action}" for action in denied),
    }
    opened = await stack.incident("control-health:permissions")
    assert '"Action": "bedrock:' in opened.alarm.reason
    assert Area.CAPACITY not in report.checked
    unread = next(finding for finding in report.open if finding.finding_id == "unread:bedrock")
    assert "bedrock:ListProvisionedModelThroughputs" in unread.what
    assert unread.incident is None  # at the next check, if it still stands
    assert not (await stack.incident(paused)).alarm_on

    stack.aws.control("DELETE", "faults")
    stack.aws.client("bedrock").delete_provisioned_model_throughput(provisionedModelId=orphan)
    report = await stack.check()
    assert report.findings == (), report
    assert not (await stack.incident(orphans)).alarm_on
    assert stack.heartbeats() == 5

    # Somebody looked and it is over: the incident closes with its report.
    handle = stack.client.get_workflow_handle(incident_id(orphans), result_type=IncidentRecord)
    await handle.execute_update(ACKNOWLEDGE, PersonRequest(who=ENGINEER, why="seen"), result_type=UpdateResult)
    closed = await handle.result()
    assert closed.report_path is not None
    assert "the health check found it" in Path(closed.report_path).with_suffix(".md").read_text()
    assert await replays(stack.client, HEALTH_SCHEDULE, HealthCheckWorkflow) == 5


async def test_the_command_line_shows_the_last_check_and_makes_a_new_one(stack: Stack) -> None:
    async def runbooks(*arguments: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "ops.cli", "health", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **stack.env, "COLUMNS": "160"},
        )
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode, out.decode()

    code, out = await runbooks()
    assert code == ExitCode.NOT_FOUND, out
    assert "runbooks health --now" in out

    code, out = await runbooks("--now")
    assert (code, out.splitlines()[0].split(".")[0]) == (0, "Healthy")

    # A schedule that is missing is made again, and what is open is exit code 1.
    await stack.client.get_schedule_handle(HEALTH_SCHEDULE).delete()
    stack.buy(HAIKU.provisioned_model_id, 1, "runbooks-haiku-left", ours=True)
    code, out = await runbooks("--now")
    assert code == 1
    assert "warning: runbooks-haiku-left" in out
    assert "aws bedrock delete-provisioned-model-throughput" in out
    code, out = await runbooks("--json")
    assert code == 1
    assert [finding["finding_id"] for finding in json.loads(out)["report"]["findings"]] == [
        "orphan:runbooks-haiku-left"
    ]


class TestHeartbeat:
    @pytest.fixture
    def policy(self, policy: Policy) -> Policy:
        """The shortest intervals there are."""
        return policy.model_copy(update={"health": HealthPolicy(interval=timedelta(seconds=1))})

    async def test_a_dead_worker_raises_the_alarm_past_us(self, stack: Stack, policy: Policy) -> None:
        cloudwatch, sns = stack.aws.client("cloudwatch"), stack.aws.client("sns")
        topic = sns.create_topic(Name="pages")["TopicArn"]
        url, queue = stack.aws.queue("pages")
        sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=queue)
        definition = alarm_definitions(policy)[-1]
        cloudwatch.put_metric_alarm(**put_metric_alarm(definition, topic))

        async def is_in(state: str) -> bool:
            [alarm] = cloudwatch.describe_alarms(AlarmNames=[HEARTBEAT_ALARM])["MetricAlarms"]
            return bool(alarm["StateValue"] == state)

        await until(lambda: is_in("OK"))
        await stack.worker.shutdown()
        await until(lambda: is_in("ALARM"))
        states = [json.loads(body["Message"])["NewStateValue"] for body in stack.aws.messages(url, 2)]
        assert states[-1] == "ALARM"
