"""The generated IAM policies, judged by the simulator's IAM: each suffices for what its process does, statement by
statement. A role of its own makes every call; an account without IAM's limits prepares what the calls are about.
"""

import asyncio
import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
import redis
from botocore.exceptions import ClientError
from temporalio.testing import ActivityEnvironment

from activities.bedrock import BedrockActivities
from activities.calendar import CalendarActivities
from activities.changes import ChangeActivities
from activities.cloudwatch import CloudWatchActivities
from activities.ecs import EcsActivities
from activities.health import HealthActivities
from activities.pages import PageActivities
from activities.permissions import PermissionActivities, check
from dataplane.bedrock import BedrockBackend
from dataplane.ledger import Ledger
from dataplane.meter import BatchMeter
from dataplane.routes import Routes
from dataplane.sending import Gone, Rejected, Target, Unavailable
from domain.calendar import CalendarEvent
from domain.capacity import MANAGED_BY, MANAGED_BY_TAG, Order, Situation, Survey
from domain.errors import ErrorKind
from domain.health import HealthMetrics
from domain.messages import (
    AwaitModel,
    CheckCalendar,
    CheckChanges,
    CheckTasks,
    CreateModel,
    DeleteModel,
    Page,
    load_query,
)
from domain.people import AwsRole
from domain.permissions import CheckPermissions, PermissionsChecked, calls_of, policy_document
from domain.policy import Policy
from domain.pre_provisioning import MarkEvent
from ops.service import OpsError, OpsService
from tests.aws_account import Account
from tests.servers import AwsServer, free_port
from workers.batcher_metrics import Publisher
from workers.clients import AwsClients
from workers.errors import to_application_error
from workers.intake import Intake
from workers.permissions import scope_of
from workers.settings import Settings

POLICY = Policy()
SONNET = POLICY.models["sonnet"]
NOW = datetime.now(UTC)
OURS: Any = {"key": MANAGED_BY_TAG, "value": MANAGED_BY}
ROLE = "arn:aws:iam::123456789012:role/mangaassist"

AN_EVENT = CalendarEvent(
    event_id="release",
    type="final_chapter",
    starts_at=NOW,
    multiplier=3,
    models=("sonnet",),
    lead_time=timedelta(hours=4),
    source="a test",
    asked_by="a test",
)


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """An account with a service, a table, a topic, two queues and a role; it checks permissions once it is asked to."""
    server = AwsServer(tmp_path_factory.mktemp("iam")).start()
    root = Account(server.endpoint)
    root.control("POST", "bedrock", {"provisioning_lag_seconds": 0})
    root.client("sns").create_topic(Name="pages")
    root.client("sqs").create_queue(QueueName="alarms")
    root.client("sqs").create_queue(QueueName="dead-letters")
    root.client("dynamodb").create_table(
        TableName="mangaassist-events",
        BillingMode="PAY_PER_REQUEST",
        KeySchema=[{"AttributeName": "event_id", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "event_id", "AttributeType": "S"}],
    )
    root.client("iam").create_role(RoleName="mangaassist", AssumeRolePolicyDocument="{}")
    plain = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"{server.endpoint}/moto-api/reset-auth", data=b"0", headers=plain)
    urllib.request.urlopen(request, timeout=5).close()
    yield root
    server.kill()


@pytest.fixture
def settings(account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Those of a process that has assumed the role."""
    session = account.client("sts").assume_role(RoleArn=ROLE, RoleSessionName="worker")["Credentials"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", session["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", session["SecretAccessKey"])
    monkeypatch.setenv("AWS_SESSION_TOKEN", session["SessionToken"])
    queues = f"{account.endpoint_url}/123456789012"
    return Settings(
        aws_endpoint_url=account.endpoint_url,
        alarm_queue_url=f"{queues}/alarms",
        dead_letter_queue_url=f"{queues}/dead-letters",
        page_topic_arn="arn:aws:sns:ap-northeast-1:123456789012:pages",
        state_dir=tmp_path,
    )


def may(account: Account, statements: list[Any]) -> None:
    """The role may do this and nothing else."""
    document = {"Version": "2012-10-17", "Statement": statements}
    account.client("iam").put_role_policy(
        RoleName="mangaassist", PolicyName="runbooks", PolicyDocument=json.dumps(document)
    )


def statements(role: AwsRole, settings: Settings) -> list[Any]:
    """The generated policy's."""
    scope = scope_of(settings, POLICY).model_copy(update={"role_arn": ROLE})
    made: list[Any] = policy_document(role, scope)["Statement"]
    return made


class Recorder:
    """What was called, and which actions were denied."""

    def __init__(self, aws: AwsClients, role: AwsRole) -> None:
        self.called: set[tuple[str, str]] = set()
        self.denied: set[str] = set()
        for service in {call.service for call in calls_of(role)}:
            client = aws.client(service)
            methods = {name: method for method, name in client.meta.method_to_api_mapping.items()}
            client.meta.events.register("after-call", self._listener(service, methods))

    def _listener(self, service: str, methods: dict[str, str]) -> Callable[..., None]:
        def listen(model: Any, parsed: dict[str, Any], **_: Any) -> None:
            self.called.add((service, methods[model.name]))
            message = parsed.get("Error", {}).get("Message", "")
            if "not authorized to perform: " in message:
                self.denied.add(message.split("perform: ")[1].split()[0])

        return listen


def provisioned(account: Account, name: str, **tags: str) -> str:
    """The ARN of a provisioned model in service that somebody bought."""
    given = [{"key": key, "value": value} for key, value in tags.items()]
    answer = account.client("bedrock").create_provisioned_model_throughput(
        provisionedModelName=name, modelUnits=1, modelId=SONNET.provisioned_model_id, tags=given
    )
    return str(answer["provisionedModelArn"])


async def work(settings: Settings, aws: AwsClients, ledger: Ledger, routes: Routes, arn: str) -> None:
    """Everything that the worker does in AWS, once; what is refused keeps nothing else from being done."""
    names = {"cluster": "mangaassist", "service": "orchestrator"}
    bedrock = BedrockActivities(aws.bedrock(), routes)
    calendar = CalendarActivities(aws.dynamodb(), table=settings.event_table)
    pages = PageActivities(aws.sns(), topic_arn=settings.page_topic_arn, log=settings.state_dir / "pages.jsonl")
    order = Order(name="a-purchase", token="a-purchase", units=1, asked_by="a test", until=NOW, sequence=1)
    await_it = AwaitModel(arn=arn, poll_interval=timedelta(seconds=1), give_up_after=timedelta(seconds=1))
    situation = Situation(model="sonnet", spec=SONNET, policy=POLICY.capacity, now=NOW, fleet=None)
    page = Page(page_id="p", incident_id="i", severity="P1", to="on-call", text="come")
    at_release = CheckCalendar(
        model="sonnet",
        at=NOW,
        match_before=timedelta(hours=2),
        match_after=timedelta(hours=6),
        tokens_per_second_per_unit=1000,
    )
    permissions = PermissionActivities(aws.client, lambda: scope_of(settings, POLICY))
    steps: list[Callable[[], Any]] = [
        lambda: bedrock.survey(Survey(situation=situation)),
        lambda: bedrock.create_model(CreateModel(order=order, provisioned_model_id=SONNET.provisioned_model_id)),
        lambda: bedrock.delete_model(DeleteModel(arn=arn)),
        lambda: CloudWatchActivities(aws.cloudwatch(), ecs_cluster="c", ecs_service="s").read_load(
            load_query(POLICY, "sonnet")
        ),
        lambda: HealthActivities(aws.cloudwatch(), cast(Any, None)).publish_health(
            HealthMetrics(at=NOW, failed_provisioning={"sonnet": 0})
        ),
        lambda: EcsActivities(aws.ecs(), **names).check_tasks(CheckTasks(baseline_tasks=15)),
        lambda: ChangeActivities(ledger, aws.ecs(), aws.cloudtrail(), **names).check_changes(
            CheckChanges(since=timedelta(hours=1), incident_id="i")
        ),
        lambda: calendar.check_calendar(at_release),
        lambda: calendar.put_event(AN_EVENT),
        lambda: calendar.mark_event(
            MarkEvent(event_id="release", starts_at=NOW, units={"sonnet": 30}, triggered_at=NOW, completed_at=None)
        ),
        lambda: pages.page(page),
        lambda: permissions.check_permissions(CheckPermissions()),
    ]
    with suppress(Exception):
        await ActivityEnvironment().run(bedrock.await_in_service, await_it)
    for step in steps:
        with suppress(Exception):
            await asyncio.to_thread(step)


async def take_alarms(settings: Settings, aws: AwsClients, root: Account) -> None:
    """Everything that the intake does in AWS, once."""
    intake = Intake(settings, POLICY, cast(Any, None), aws)
    root.client("sqs").send_message(QueueUrl=settings.alarm_queue_url, MessageBody="not an alarm")
    messages: list[Any] = []
    with suppress(TimeoutError):  # refused: it tries for ever
        messages = await asyncio.wait_for(intake._receive(timedelta(0)), 1)
    await intake._handle_batch(messages or [{"MessageId": "1", "ReceiptHandle": "1", "Body": "not an alarm"}])
    for step in (intake._list_models, intake._describe):
        with suppress(ClientError):
            await asyncio.to_thread(step)
    await intake._is_muted("an alarm")
    await asyncio.to_thread(check, AwsRole.INTAKE, scope_of(settings, POLICY), aws.client)


async def keep_the_calendar(settings: Settings, aws: AwsClients) -> None:
    """Everything that the ops API and the command line do in AWS, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.clients.AwsClients", lambda settings: aws)
        service = OpsService(cast(Any, None), settings)
        steps: list[Callable[[], Any]] = [
            service._rows,
            lambda: service._put(AN_EVENT),
            lambda: service._write_plan(AN_EVENT, AN_EVENT),
            lambda: service._delete(AN_EVENT.event_id),
        ]
        for step in steps:
            with suppress(OpsError):
                await asyncio.to_thread(step)
        await service._load(POLICY)


async def answer_requests(settings: Settings, aws: AwsClients) -> None:
    """Everything that the batcher does in AWS, once."""
    backend = BedrockBackend(aws.bedrock_runtime(), 1)
    with suppress(Gone, Rejected, Unavailable):
        await backend.call(Target("sonnet", SONNET.model_id), "", "which manga?", 10, within_seconds=10)
    backend.close()
    await Publisher(BatchMeter(), aws.cloudwatch(), timedelta(minutes=1), timedelta(minutes=1)).publish()
    await asyncio.to_thread(check, AwsRole.BATCHER, scope_of(settings, POLICY), aws.client)


async def do_all(
    role: AwsRole, settings: Settings, aws: AwsClients, account: Account, redis_client: redis.Redis
) -> None:
    """What the process of that role does in AWS."""
    if role is AwsRole.WORKER:
        arn = provisioned(account, f"ours-{uuid4().hex[:8]}", **{MANAGED_BY_TAG: MANAGED_BY})
        await work(settings, aws, Ledger(redis_client), Routes(redis_client), arn)
    elif role is AwsRole.INTAKE:
        await take_alarms(settings, aws, account)
    elif role is AwsRole.BATCHER:
        await answer_requests(settings, aws)
    else:
        await keep_the_calendar(settings, aws)


@pytest.mark.parametrize("role", AwsRole)
async def test_the_policy_suffices_and_every_statement_is_needed(
    role: AwsRole, account: Account, settings: Settings, redis_client: redis.Redis
) -> None:
    """With all of it nothing is denied and every declared call is made; without a statement its action alone is."""
    all_of_it = statements(role, settings)
    may(account, all_of_it)
    aws = AwsClients(settings)
    aws.bedrock_runtime = cache(aws.bedrock_runtime)  # type: ignore[method-assign]
    recorder = Recorder(aws, role)
    await do_all(role, settings, aws, account, redis_client)
    assert recorder.denied == set()
    assert recorder.called == {(call.service, call.operation) for call in calls_of(role)}
    for statement in all_of_it:
        may(account, [other for other in all_of_it if other is not statement])
        recorder.denied.clear()
        await do_all(role, settings, aws, account, redis_client)
        assert recorder.denied == {statement["Action"]}


async def test_nothing_beyond_what_is_configured_or_ours(account: Account, settings: Settings) -> None:
    """Resource and tag conditions hold: models that are not ours, other tables, topics, services and queues."""
    both = [*statements(AwsRole.WORKER, settings), *statements(AwsRole.INTAKE, settings)]
    may(account, list({statement["Sid"]: statement for statement in both}.values()))
    aws = AwsClients(settings)
    bought: Any = {"modelUnits": 1, "modelId": SONNET.provisioned_model_id}
    theirs = provisioned(account, "theirs")
    refused: list[Callable[[], Any]] = [
        lambda: aws.bedrock().delete_provisioned_model_throughput(provisionedModelId=theirs),
        lambda: aws.bedrock().create_provisioned_model_throughput(provisionedModelName="untagged", **bought),
        lambda: aws.bedrock().create_provisioned_model_throughput(
            provisionedModelName="other", modelUnits=1, modelId="anthropic.other-v1:0", tags=[OURS]
        ),
        lambda: aws.bedrock().update_provisioned_model_throughput(provisionedModelId=theirs),
        lambda: aws.dynamodb().scan(TableName="somebody-elses"),
        lambda: aws.dynamodb().delete_item(TableName=settings.event_table, Key={"event_id": {"S": "release"}}),
        lambda: aws.ecs().describe_services(cluster="mangaassist", services=["orchestrator", "checkout"]),
        lambda: aws.sns().publish(TopicArn="arn:aws:sns:ap-northeast-1:123456789012:others", Message="x"),
        lambda: aws.sqs().receive_message(QueueUrl=settings.dead_letter_queue_url or ""),
        lambda: aws.cloudwatch().put_metric_data(Namespace="Other", MetricData=[{"MetricName": "x", "Value": 1}]),
        lambda: aws.cloudwatch().set_alarm_state(AlarmName="a", StateValue="OK", StateReason="x"),
    ]
    for call in refused:
        with pytest.raises(ClientError, match="is not authorized to perform"):
            call()


def verdicts(checked: PermissionsChecked) -> dict[str, str]:
    return {finding.action: finding.verdict for finding in checked.findings}


def test_what_another_deployment_bought_is_not_ours(
    account: Account, settings: Settings, redis_client: redis.Redis
) -> None:
    """In one account and region, each with an owner of its own."""
    production = provisioned(account, f"theirs-{uuid4().hex[:8]}", **{MANAGED_BY_TAG: MANAGED_BY})
    staging = settings.model_copy(update={"owner": "runbooks-staging"})
    may(account, statements(AwsRole.WORKER, staging))
    bedrock = BedrockActivities(AwsClients(staging).bedrock(), Routes(redis_client), staging.owner)
    order = Order(name="staging", token="staging", units=1, asked_by="a test", until=NOW, sequence=1)
    bought = bedrock.create_model(CreateModel(order=order, provisioned_model_id=SONNET.provisioned_model_id))
    ours = {model.arn: model.ours for model in bedrock.listed(SONNET, ())}
    assert (ours[bought], ours[production]) == (True, False)
    with pytest.raises(ClientError, match="not authorized to perform: bedrock:DeleteProvisionedModelThroughput"):
        bedrock.delete_model(DeleteModel(arn=production))


def test_the_check_finds_what_is_missing_and_buys_nothing(account: Account, settings: Settings) -> None:
    """Missing permissions of calls that can be tried and of others; the statement to add is the one that is missing."""
    all_of_it = statements(AwsRole.WORKER, settings)
    activities = PermissionActivities(AwsClients(settings).client, lambda: scope_of(settings, POLICY))

    def check_permissions(*actions: str) -> PermissionsChecked:
        return activities.check_permissions(CheckPermissions(actions=frozenset(actions)))

    before = account.client("bedrock").list_provisioned_model_throughputs()["provisionedModelSummaries"]
    may(account, all_of_it)
    assert set(verdicts(check_permissions()).values()) == {"allowed"}

    tried, simulated = "dynamodb:Scan", "bedrock:CreateProvisionedModelThroughput"
    may(account, [statement for statement in all_of_it if statement["Action"] not in (tried, simulated)])
    checked = check_permissions()
    assert {finding.action for finding in checked.denied} == {tried, simulated}
    for finding in checked.denied:
        [missing] = [statement for statement in all_of_it if statement["Action"] == finding.action]
        assert json.loads(finding.statement) == missing
    assert verdicts(check_permissions(tried)) == {tried: "denied"}

    may(account, [statement for statement in all_of_it if statement["Action"] != "iam:SimulatePrincipalPolicy"])
    unknown = {action for action, verdict in verdicts(check_permissions()).items() if verdict == "not verifiable"}
    assert unknown == {
        "bedrock:CreateProvisionedModelThroughput",
        "bedrock:TagResource",
        "bedrock:DeleteProvisionedModelThroughput",
        "cloudwatch:PutMetricData",
        "dynamodb:PutItem",
        "dynamodb:UpdateItem",
        "sns:Publish",
        "iam:SimulatePrincipalPolicy",
    }
    after = account.client("bedrock").list_provisioned_model_throughputs()["provisionedModelSummaries"]
    assert after == before


def test_a_denied_call_names_the_statement_that_allows_it(account: Account, settings: Settings) -> None:
    """The error that a workflow sees, from a real denial; adding what it names mends it."""
    may(account, [{"Effect": "Allow", "Action": "dynamodb:PutItem", "Resource": "*"}])
    scope = scope_of(settings, POLICY)
    dynamodb = AwsClients(settings).dynamodb()
    with pytest.raises(ClientError) as caught:
        dynamodb.scan(TableName=settings.event_table)
    error = to_application_error(caught.value, lambda: scope)
    assert error is not None
    assert error.type == ErrorKind.ACCESS_DENIED
    added = json.loads(str(error).split("add to the role: ")[1])
    may(account, [added])
    assert dynamodb.scan(TableName=settings.event_table)["Count"] >= 0


def test_aws_away_is_no_verdict(account: Account, settings: Settings) -> None:
    """Nothing answers: everything is not verifiable, with the reason."""
    nowhere = settings.model_copy(update={"aws_endpoint_url": f"http://127.0.0.1:{free_port()}"})
    checked = check(AwsRole.WORKER, scope_of(settings, POLICY), AwsClients(nowhere).client)
    assert {finding.verdict for finding in checked.findings} == {"not verifiable"}
    assert all("Could not connect" in finding.detail for finding in checked.findings)
