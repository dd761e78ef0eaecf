"""The alarm intake on a real Temporal server and an AWS endpoint over HTTP; only the incident is a stand-in."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import boto3
import pytest
import stamina.instrumentation
import structlog.testing
from botocore.config import Config
from pydantic import BaseModel
from temporalio import workflow
from temporalio.client import Client, WorkflowHandle
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from domain.alarm_rules import IncidentTarget
from domain.alarms import AlarmChange, AlarmState
from domain.incident import IncidentRecord
from domain.messages import (
    ALARM_CHANGED,
    ALARM_REPEATED,
    INCIDENT_WORKFLOW,
    RECORD,
    AlarmRepeats,
    IncidentInput,
    incident_id,
)
from domain.policy import AlarmRule, IntakePolicy, Policy
from tests.servers import AwsServer, TemporalServer
from workers.clients import AwsClients
from workers.incidents import Incidents
from workers.intake import Intake
from workers.settings import Settings
from workers.temporal import connect

if TYPE_CHECKING:
    from types_boto3_cloudwatch.client import CloudWatchClient
    from types_boto3_sns.client import SNSClient
    from types_boto3_sqs.client import SQSClient
    from types_boto3_sqs.type_defs import MessageTypeDef

AT = datetime(2026, 11, 23, 15, 5, tzinfo=UTC)
REGION = "ap-northeast-1"


class Heard(BaseModel):
    """What the stand-in was told."""

    started_by: IncidentInput
    changes: list[AlarmChange] = []
    repeats: int = 0


@workflow.defn(name=INCIDENT_WORKFLOW)
class StandIn:
    """Takes an incident's place: notes what it hears, and closes when told to."""

    @workflow.init
    def __init__(self, started_by: IncidentInput) -> None:
        self._heard = Heard(started_by=started_by)
        self._closed = False

    @workflow.run
    async def run(self, started_by: IncidentInput) -> None:
        await workflow.wait_condition(lambda: self._closed)

    @workflow.signal(name=ALARM_CHANGED)
    def alarm_changed(self, change: AlarmChange) -> None:
        self._heard.changes.append(change)

    @workflow.signal(name=ALARM_REPEATED)
    def alarm_repeated(self, repeats: AlarmRepeats) -> None:
        self._heard.repeats += repeats.count

    @workflow.signal
    def close(self) -> None:
        self._closed = True

    @workflow.query
    def heard(self) -> Heard:
        return self._heard

    @workflow.query(name=RECORD)
    def record(self) -> IncidentRecord:
        last = self._heard.changes[-1]
        return IncidentRecord(
            incident_id=workflow.info().workflow_id,
            run_id=workflow.info().run_id,
            key=self._heard.started_by.key,
            model=None,
            runbook=None,
            alarm=last,
            alarm_on=last.state == "ALARM",
            opened_at=workflow.now(),
        )


@pytest.fixture(autouse=True)
def _quiet_retries() -> None:
    stamina.instrumentation.set_on_retry_hooks([])


@pytest.fixture(scope="module")
def aws_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = AwsServer(tmp_path_factory.mktemp("aws")).start()
    yield server.endpoint
    server.kill()


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")


@dataclass
class World:
    """Queues, a topic, a Temporal server; keys and names that no other test has."""

    settings: Settings
    policy: Policy
    temporal: Client
    sqs: "SQSClient"
    sns: "SNSClient"
    cloudwatch: "CloudWatchClient"
    name: str
    policy_file: Path | None = None

    @property
    def key(self) -> str:
        """The key of alarms on throttles of Sonnet."""
        return f"{self.name}:sonnet"

    @property
    def queue(self) -> str:
        return self.settings.alarm_queue_url or ""

    def send(self, *bodies: str) -> None:
        for start in range(0, len(bodies), 10):
            entries = [{"Id": str(i), "MessageBody": body} for i, body in enumerate(bodies[start : start + 10])]
            assert not self.sqs.send_message_batch(QueueUrl=self.queue, Entries=cast(Any, entries)).get("Failed")

    def waiting(self) -> int:
        """Messages in the queue, in hand or not."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self.sqs.get_queue_attributes(QueueUrl=self.queue, AttributeNames=cast(Any, names))["Attributes"]
        return sum(int(found[cast(Any, name)]) for name in names)

    def dead_letters(self) -> "list[MessageTypeDef]":
        url = self.settings.dead_letter_queue_url or ""
        return self.sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, MessageAttributeNames=["All"]).get(
            "Messages", []
        )

    def incident(self, key: str) -> WorkflowHandle[Any, Any]:
        return self.temporal.get_workflow_handle(incident_id(key))

    async def heard(self, key: str) -> Heard:
        return await self.incident(key).query(StandIn.heard, rpc_timeout=timedelta(seconds=5))

    async def runs(self, key: str) -> int:
        return len([run async for run in self.temporal.list_workflows(f"WorkflowId = '{incident_id(key)}'")])

    @asynccontextmanager
    async def intake(self, **intake_policy: Any) -> AsyncIterator[None]:
        """Our intake, ready, in this process."""
        policy = self.policy.model_copy(update={"intake": self.policy.intake.model_copy(update=intake_policy)})
        incidents = Incidents(self.temporal, policy, self.settings.task_queue)
        ready = asyncio.Event()
        settings = self.settings.model_copy(update={"policy_file": self.policy_file})
        serving = asyncio.create_task(Intake(settings, policy, incidents, AwsClients(settings)).serve(ready.set))
        await asyncio.wait_for(ready.wait(), 20)
        yield
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving

    def alarm(self, name: str, state: str = "ALARM", *, throttles: bool = True, **metric: str) -> None:
        """An alarm that CloudWatch has, and nobody was told of."""
        self.cloudwatch.put_metric_alarm(
            AlarmName=name,
            MetricName="InvocationThrottles" if throttles else "Other",
            Namespace="AWS/Bedrock",
            Dimensions=[{"Name": "ModelId", "Value": "sonnet"}] if throttles else [],
            Statistic="Sum",
            Period=60,
            EvaluationPeriods=1,
            Threshold=0,
            ComparisonOperator="GreaterThanThreshold",
            ActionsEnabled=metric.get("actions") != "off",
            AlarmActions=[metric.get("action", f"arn:aws:sns:{REGION}:123456789012:alarms")],
        )
        self.set_state(name, state)

    def set_state(self, name: str, state: str) -> None:
        self.cloudwatch.set_alarm_state(AlarmName=name, StateValue=cast(Any, state), StateReason="r")


def aws_client(service: str, endpoint: str) -> Any:
    config = Config(retries={"total_max_attempts": 1})
    return boto3.client(cast(Any, service), region_name=REGION, endpoint_url=endpoint, config=config)


@asynccontextmanager
async def a_world(temporal_address: str, endpoint: str) -> AsyncIterator[World]:
    name = f"t{uuid.uuid4().hex[:8]}"
    sqs: SQSClient = aws_client("sqs", endpoint)
    attributes = {"VisibilityTimeout": "3"}  # what a stopped poll takes along comes back soon
    settings = Settings(
        temporal_address=temporal_address,
        task_queue=name,
        aws_endpoint_url=endpoint,
        aws_region=REGION,
        alarm_queue_url=sqs.create_queue(QueueName=name, Attributes=cast(Any, attributes))["QueueUrl"],
        dead_letter_queue_url=sqs.create_queue(QueueName=f"{name}-dead")["QueueUrl"],
    )
    policy = Policy(
        # The stand-in of one test must not see the alarms of another.
        alarm_rules=(
            AlarmRule(metric="InvocationThrottles", dimension="ModelId", key=name + ":{model}", runbook="throttle"),
            AlarmRule(alarm_name=f"{name}-key-*", key=name + ":haiku", runbook="throttle"),
        ),
        intake=IntakePolicy(long_poll=timedelta(seconds=1)),
    )
    client = await connect(settings)
    world = World(
        settings=settings,
        policy=policy,
        temporal=client,
        sqs=sqs,
        sns=aws_client("sns", endpoint),
        cloudwatch=aws_client("cloudwatch", endpoint),
        name=name,
    )
    async with Worker(client, task_queue=name, workflows=[StandIn], workflow_runner=UnsandboxedWorkflowRunner()):
        yield world
    async for run in client.list_workflows(f"TaskQueue = '{name}' AND ExecutionStatus = 'Running'"):
        await client.get_workflow_handle(run.id).terminate()
    alarms = world.cloudwatch.describe_alarms(AlarmNamePrefix=name)["MetricAlarms"]
    world.cloudwatch.delete_alarms(AlarmNames=[alarm["AlarmName"] for alarm in alarms])


@pytest.fixture
async def world(temporal: TemporalServer, aws_endpoint: str) -> AsyncIterator[World]:
    async with a_world(temporal.address, aws_endpoint) as made:
        yield made


async def until(check: Callable[[], Awaitable[bool] | bool], seconds: float = 40) -> None:
    """Waits until `check` holds; what is not there yet counts as not holding."""
    async with asyncio.timeout(seconds):
        while True:
            with suppress(Exception):
                answer = await asyncio.to_thread(check)
                if answer if isinstance(answer, bool) else await answer:
                    return
            await asyncio.sleep(0.05)


def cloudwatch_json(name: str, *, at: datetime = AT, state: str = "ALARM", throttles: bool = True) -> dict[str, Any]:
    message: dict[str, Any] = {
        "AlarmName": name,
        "NewStateValue": state,
        "NewStateReason": "Threshold Crossed",
        "StateChangeTime": at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}+0000",
        "OldStateValue": "OK",
    }
    if throttles:
        dimensions = [{"name": "ModelId", "value": "sonnet"}]
        message["Trigger"] = {"MetricName": "InvocationThrottles", "Namespace": "AWS/Bedrock", "Dimensions": dimensions}
    return message


def shapes(name: str, **changes: Any) -> list[str]:
    """The same change in an SNS envelope, raw, and as an EventBridge event."""
    raw = cloudwatch_json(name, **changes)
    metric = {"name": "InvocationThrottles", "namespace": "AWS/Bedrock", "dimensions": {"ModelId": "sonnet"}}
    event = {
        "id": str(uuid.uuid4()),
        "detail-type": "CloudWatch Alarm State Change",
        "source": "aws.cloudwatch",
        "detail": {
            "alarmName": name,
            "configuration": {"metrics": [{"id": "m1", "metricStat": {"metric": metric}, "returnData": True}]},
            "state": {"value": raw["NewStateValue"], "timestamp": raw["StateChangeTime"]},
        },
    }
    envelope = {"Type": "Notification", "MessageId": str(uuid.uuid4()), "Message": json.dumps(raw)}
    return [json.dumps(envelope), json.dumps(raw), json.dumps(event)]


async def test_an_alarm_over_sns_opens_an_incident_that_ok_joins(world: World) -> None:
    topic = world.sns.create_topic(Name=world.name)["TopicArn"]
    arn = world.sqs.get_queue_attributes(QueueUrl=world.queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    world.sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn)
    async with world.intake():
        world.sns.publish(TopicArn=topic, Message=json.dumps(cloudwatch_json("a `b`\n# c")), Subject="ALARM")
        await until(lambda: world.waiting() == 0)
        ok = cloudwatch_json("a `b`\n# c", state="OK", at=AT + timedelta(minutes=5))
        world.sns.publish(TopicArn=topic, Message=json.dumps(ok), Subject="OK")
        await until(lambda: world.waiting() == 0)
    heard = await world.heard(world.key)
    assert (heard.started_by.key, heard.started_by.runbook, heard.started_by.model) == (world.key, "throttle", "sonnet")
    assert [change.state for change in heard.changes] == ["ALARM", "OK"]
    description = await world.incident(world.key).describe()
    attributes = {pair.key.name: pair.value for pair in description.typed_search_attributes}
    assert attributes["IncidentKey"] == world.key
    assert attributes["IncidentPhase"] == "triage"
    assert attributes.keys().isdisjoint({"Severity", "Service", "HoldsLeases"}), "they are the incident's to say"
    assert await description.static_summary() == "Alarm `a 'b' # c`"


async def test_a_storm_is_one_incident_and_a_count(world: World) -> None:
    bodies = [body for n in range(334) for body in shapes(f"{world.name}-alarm")]
    older = [body for n in range(30) for body in shapes(f"{world.name}-alarm", state="OK", at=AT - timedelta(hours=1))]
    random.shuffle(bodies)
    async with world.intake():
        messages = [*bodies[:500], *older, *bodies[500:]]
        for start in range(0, len(messages), 50):
            await asyncio.to_thread(world.send, *messages[start : start + 50])
            await until(lambda: world.waiting() < 50)  # moto's queue takes quadratic time
        await until(lambda: world.waiting() == 0)
    heard = await world.heard(world.key)
    assert [change.state for change in heard.changes] == ["ALARM"]
    assert len(heard.changes) + heard.repeats >= len(bodies), "all are counted, once more if the queue gave one twice"
    history = await world.incident(world.key).fetch_history()
    assert len(history.events) < 100
    assert await world.runs(world.key) == 1
    assert not world.dead_letters()


async def test_an_alarm_that_comes_again_without_an_ok_between_is_told_and_a_burst_of_them_is_not(world: World) -> None:
    def say(minute: int, state: str = "ALARM") -> list[str]:
        return shapes(f"{world.name}-alarm", at=AT + timedelta(minutes=minute), state=state)

    def minutes(heard: Heard) -> list[int]:
        return [int((change.changed_at - AT).total_seconds() / 60) for change in heard.changes]

    async def say_all(*messages: str) -> None:
        world.send(*messages)
        await until(lambda: world.waiting() == 0)

    async with world.intake(duplicate_count_interval=timedelta(seconds=2)):
        await say_all(*say(0))
        await asyncio.sleep(2)
        await say_all(*say(120))
        assert minutes(await world.heard(world.key)) == [0, 120], "told at once, in whichever shape it came first"
        await say_all(*(say(minute)[minute % 3] for minute in range(121, 131)))
        await say_all(say(125, "OK")[0])
        await until(lambda: _is_told(world, 130))
        heard = await world.heard(world.key)
        assert len(heard.changes) <= 5, "what comes faster than it may be told is told when it may, once"
        assert {change.state for change in heard.changes} == {"ALARM"}, "an OK of before the newest ALARM is none"
        await until(lambda: _counts(world, 3 + 3 + 10))


async def _is_told(world: World, minute: int) -> bool:
    return (await world.heard(world.key)).changes[-1].changed_at == AT + timedelta(minutes=minute)


async def _counts(world: World, messages: int) -> bool:
    heard = await world.heard(world.key)
    return len(heard.changes) + heard.repeats >= messages


async def test_the_policy_is_read_again_and_a_broken_one_changes_nothing(world: World, tmp_path: Path) -> None:
    world.policy_file = tmp_path / "policy.yaml"

    def write(pattern: str) -> None:
        intake = world.policy.intake.model_copy(
            update={"ignored_alarms": (pattern,), "reconcile_interval": timedelta(milliseconds=100)}
        )
        policy = world.policy.model_copy(update={"intake": intake})
        (tmp_path / "policy.yaml").write_text(policy.model_dump_json())

    def logged(event: str, times: int) -> bool:
        return len([entry for entry in logs if entry["event"].startswith(event)]) >= times

    write(f"{world.name}-ignored*")
    with structlog.testing.capture_logs() as logs:
        async with world.intake(reconcile_interval=timedelta(milliseconds=100)):
            await until(lambda: logged("the policy has changed", 1))
            (tmp_path / "policy.yaml").write_text("intake: {reconcile_interval: soon}")
            await until(lambda: logged("the policy cannot be read", 2))
            world.send(shapes(f"{world.name}-ignored")[0])
            await until(lambda: world.waiting() == 0)
            assert await world.runs(world.key) == 0
            write("nothing")
            await until(lambda: logged("the policy has changed", 2))
            world.send(shapes(f"{world.name}-ignored")[0])
            await until(lambda: world.waiting() == 0)
            await until(lambda: _has(world, world.key, ["ALARM"]))


async def test_redelivery_after_a_restart_changes_nothing_and_a_newer_alarm_opens_the_next(world: World) -> None:
    first = shapes(f"{world.name}-alarm")
    async with world.intake():
        world.send(first[0])
        await until(lambda: world.waiting() == 0)
    async with world.intake(duplicate_count_interval=timedelta(0)):
        world.send(*first)
        await until(lambda: world.waiting() == 0)
        heard = await world.heard(world.key)
        # One signal after the restart, unless the incident was asked before; then counts.
        assert (len(heard.changes), heard.repeats) in ((2, 2), (1, 3))
        await world.incident(world.key).signal(StandIn.close)
        await world.incident(world.key).result()
        world.send(*first)
        await until(lambda: world.waiting() == 0)
        assert (await world.incident(world.key).describe()).close_time, "told already: a copy opens nothing"
        world.send(shapes(f"{world.name}-alarm", at=AT + timedelta(hours=1))[2])
        await until(lambda: world.waiting() == 0)
    assert [change.changed_at for change in (await world.heard(world.key)).changes] == [AT + timedelta(hours=1)]


async def test_a_change_of_state_is_told_at_once_and_an_older_one_is_not(world: World) -> None:
    def say(state: str, minute: int) -> str:
        return shapes(f"{world.name}-alarm", state=state, at=AT + timedelta(minutes=minute))[0]

    async with world.intake():
        for message in (say("OK", 0), say("ALARM", 1), say("OK", 4), say("ALARM", 3), say("INSUFFICIENT_DATA", 5)):
            world.send(message)
            await until(lambda: world.waiting() == 0)
    heard = await world.heard(world.key)
    assert [change.state for change in heard.changes] == ["ALARM", "OK", "INSUFFICIENT_DATA"]


async def test_what_is_no_alarm_goes_to_the_dead_letter_queue_and_blocks_nothing(world: World) -> None:
    configuration_change = json.loads(shapes("x")[2]) | {"detail-type": "CloudWatch Alarm Configuration Change"}
    muted = json.loads(shapes(f"{world.name}-alarm")[2])
    muted["detail"]["muteDetail"] = {"mutedByArn": "arn"}
    async with world.intake():
        world.send("hello", json.dumps({"Type": "SubscriptionConfirmation"}), json.dumps(configuration_change))
        world.send(json.dumps(muted))
        await until(lambda: world.waiting() == 0)
        assert await world.runs(world.key) == 0, "muted"
        world.send("\U0001f600" * 262_000)
        world.send(shapes(f"{world.name}-alarm")[0])
        await until(lambda: world.waiting() == 0)
    assert len((await world.heard(world.key)).changes) == 1
    letters = {letter["Body"][:5]: letter for letter in world.dead_letters()}
    assert letters.keys() == {"hello", "\U0001f600" * 5}
    assert "body is not JSON" in letters["hello"]["MessageAttributes"]["reason"]["StringValue"]
    assert letters["hello"]["MessageAttributes"]["message_id"]["StringValue"]


async def test_while_the_dead_letter_queue_is_away_junk_stays_and_alarms_pass(world: World) -> None:
    world.sqs.set_queue_attributes(QueueUrl=world.queue, Attributes={"VisibilityTimeout": "1"})
    world.sqs.delete_queue(QueueUrl=world.settings.dead_letter_queue_url or "")
    async with world.intake():
        world.send(*["junk"] * 25, shapes(f"{world.name}-alarm")[0])
        await until(lambda: world.waiting() == 25)
        assert len((await world.heard(world.key)).changes) == 1
        world.sqs.create_queue(QueueName=f"{world.name}-dead")
        await until(lambda: world.waiting() == 0)
    assert world.dead_letters()


async def test_an_alarm_that_maps_to_nothing_opens_a_triage_incident(world: World) -> None:
    name = f"{world.name} <=30% ".ljust(255, "\U0001f4c8")  # the longest there is: Temporal has limits too
    async with world.intake():
        world.send(json.dumps(cloudwatch_json(f"{world.name}-other", state="OK", throttles=False)))
        world.send(json.dumps(cloudwatch_json(name, throttles=False)))
        await until(lambda: world.waiting() == 0)
        ok = cloudwatch_json(name, state="OK", at=AT + timedelta(minutes=1), throttles=False)
        world.send(json.dumps(ok))
        await until(lambda: world.waiting() == 0)
    found = [run async for run in world.temporal.list_workflows(f"TaskQueue = '{world.name}'")]
    assert len(found) == 1, "an OK alone starts nothing"
    heard: Heard = await world.temporal.get_workflow_handle(found[0].id).query(StandIn.heard)
    assert heard.started_by.key.startswith(f"triage:{world.name}-30-")
    assert heard.started_by.runbook is None
    assert [change.state for change in heard.changes] == ["ALARM", "OK"]


async def test_what_was_missed_is_found_and_open_incidents_are_left_in_peace(world: World) -> None:
    world.alarm(f"{world.name}-alarm")
    world.alarm(f"{world.name}-untold", throttles=False)
    world.alarm(f"{world.name}-scaling", throttles=False, action="arn:aws:autoscaling:x:1:scalingPolicy:y")
    world.alarm(f"{world.name}-key-off", throttles=False, actions="off")
    interval = timedelta(milliseconds=100)
    async with world.intake(reconcile_interval=interval):
        await until(lambda: _has(world, world.key, ["ALARM"]))
        await until(lambda: _has(world, f"triage:{world.name}-untold", ["ALARM"]))
        assert (await world.heard(world.key)).started_by.alarm.source == "reconcile"
        await asyncio.sleep(5 * interval.total_seconds())
        assert len((await world.heard(world.key)).changes) == 1
        world.set_state(f"{world.name}-alarm", "OK")
        await until(lambda: _has(world, world.key, ["ALARM", "OK"]))
        world.set_state(f"{world.name}-alarm", "ALARM")
        await until(lambda: _has(world, world.key, ["ALARM", "OK", "ALARM"]))
    async with world.intake(reconcile_interval=interval):  # one that remembers nothing
        await asyncio.sleep(5 * interval.total_seconds())
        assert await _has(world, world.key, ["ALARM", "OK", "ALARM"])
        world.set_state(f"{world.name}-alarm", "OK")
        await until(lambda: _has(world, world.key, ["ALARM", "OK", "ALARM", "OK"]))
        for key in (world.key, f"triage:{world.name}-untold"):
            await world.incident(key).signal(StandIn.close)
            await world.incident(key).result()
        await asyncio.sleep(5 * interval.total_seconds())
    found = [run async for run in world.temporal.list_workflows(f"TaskQueue = '{world.name}'")]
    assert len(found) == 2, "not the scaling alarm, not the one whose actions are off, and nothing paged twice"
    assert all(run.close_time for run in found)


async def test_an_alarm_that_is_part_of_another_incident_opens_its_own_once_it_outlasts_that(world: World) -> None:
    incidents = Incidents(world.temporal, world.policy, world.settings.task_queue)
    throttled = IncidentTarget(key=world.key, runbook="throttle", model="sonnet")
    slow = IncidentTarget(key=f"{world.name}-slow:all", runbook="latency", model="sonnet", part_of=f"{world.name}:*")

    def change(name: str, state: AlarmState, minutes: int) -> AlarmChange:
        at = AT + timedelta(minutes=minutes)
        return AlarmChange(alarm_name=name, state=state, changed_at=at, source="sns", message_id=f"{name}-{minutes}")

    on = change("slow", AlarmState.ALARM, 1)
    assert await incidents.deliver(change("throttles", AlarmState.ALARM, 0), throttled) == "signalled"
    assert await incidents.deliver(on, slow) == "part-of-another"
    assert not await incidents.is_missed(on, slow)
    assert await incidents.deliver(change("throttles", AlarmState.OK, 2), throttled) == "signalled"
    assert await incidents.is_missed(on, slow), "it is found when CloudWatch is asked what is on"
    assert await incidents.deliver(on, slow) == "signalled"
    assert (await world.heard(slow.key)).started_by.runbook == "latency"


async def _has(world: World, key: str, states: list[str]) -> bool:
    return [change.state for change in (await world.heard(key)).changes] == states


async def test_nothing_is_lost_while_temporal_is_dead(tmp_path: Path, aws_endpoint: str) -> None:
    server = TemporalServer(tmp_path).start()
    try:
        async with a_world(server.address, aws_endpoint) as world:
            names = [f"{world.name}-{n}" for n in range(25)]
            bodies = [json.dumps(cloudwatch_json(name, throttles=False)) for name in names]
            async with world.intake():
                world.send(*bodies[:10])
                server.kill()
                world.send(*bodies[10:])
                await asyncio.sleep(1)
                assert world.waiting() >= 15, "kept until Temporal has them"
                await asyncio.to_thread(server.start)
                await until(lambda: world.waiting() == 0)
            for name in names:
                heard = await world.heard(f"triage:{name}")
                assert heard.changes, name
    finally:
        server.kill()


async def test_the_process_waits_for_its_neighbours_and_stops_in_order(
    temporal: TemporalServer, tmp_path: Path
) -> None:
    server = AwsServer(tmp_path)
    endpoint = server.endpoint
    ready = tmp_path / "ready"
    environment = os.environ | {
        "RUNBOOKS_TEMPORAL_ADDRESS": temporal.address,
        "RUNBOOKS_TASK_QUEUE": "nobody",
        "RUNBOOKS_AWS_ENDPOINT_URL": endpoint,
        "RUNBOOKS_ALARM_QUEUE_URL": f"{endpoint}/123456789012/alarms",
        "RUNBOOKS_DEAD_LETTER_QUEUE_URL": f"{endpoint}/123456789012/dead",
        "RUNBOOKS_READY_FILE": str(ready),
    }
    command = [sys.executable, "-m", "workers.intake"]
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=log)
    try:
        await until(lambda: b"away" in (tmp_path / "log").read_bytes())
        await asyncio.sleep(1)
        assert not ready.exists()
        server.start()
        sqs = aws_client("sqs", endpoint)
        sqs.create_queue(QueueName="dead")
        sqs.create_queue(QueueName="alarms")
        await until(ready.exists)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 40) == 0
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        events = [line["event"] for line in lines if line.get("what", "the alarm queue") == "the alarm queue"]
        assert events == ["away", "back", "ready", "stopped"], "an outage is logged once"
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        server.kill()


def test_settings_that_are_missing_are_named() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RUNBOOKS_")}
    command = [sys.executable, "-m", "workers.intake"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, "RUNBOOKS_ALARM_QUEUE_URL is not set" in result.stderr) == (2, True)
    result = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, "RUNBOOKS_DEAD_LETTER_QUEUE_URL" in result.stdout) == (0, True)
