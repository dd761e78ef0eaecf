"""Contract of ECS's counts and of CloudTrail's LookupEvents. Each test names the AWS document it follows."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError

from domain.policy import Policy
from simulator.aws import AwsSimulator, ecs
from tests.aws_account import Account


def service(account: Account) -> Any:
    return account.client("ecs").describe_services(cluster="manga", services=["bot"])["services"][0]


def counts(account: Account) -> tuple[int, int, int]:
    found = service(account)
    return found["runningCount"], found["pendingCount"], found["desiredCount"]


@pytest.fixture
def bot(account: Account) -> Account:
    """A service of 15 tasks, all running."""
    ecs = account.client("ecs")
    ecs.create_cluster(clusterName="manga")
    ecs.register_task_definition(family="bot", containerDefinitions=[{"name": "bot", "image": "bot", "memory": 64}])
    ecs.create_service(cluster="manga", serviceName="bot", taskDefinition="bot", desiredCount=15)
    account.control("POST", "settle")
    return account


@pytest.fixture
def batches_start(monkeypatch: pytest.MonkeyPatch, aws_simulator: AwsSimulator) -> Callable[[float], None]:
    """Lets so many times pass as a batch of tasks takes to start; no time passes otherwise."""
    clock = SimpleNamespace(moment=datetime.now(UTC))
    monkeypatch.setattr(ecs, "datetime", SimpleNamespace(now=lambda _: clock.moment))

    def passes(batches: float) -> None:
        clock.moment += batches * aws_simulator.world.settings.task_start

    return passes


def test_running_follows_desired_in_batches(bot: Account, batches_start: Callable[[float], None]) -> None:
    """API reference, Service: running, pending and desired counts, and those of the deployment, while tasks start."""
    assert counts(bot) == (15, 0, 15)
    bot.client("ecs").update_service(cluster="manga", service="bot", desiredCount=38)
    seen = [counts(bot)]
    for _ in range(3):
        batches_start(1)
        seen.append(counts(bot))
    assert seen == [(15, 10, 38), (25, 10, 38), (35, 3, 38), (38, 0, 38)]
    deployment = service(bot)["deployments"][0]
    assert (deployment["runningCount"], deployment["pendingCount"], deployment["rolloutState"]) == (38, 0, "COMPLETED")
    bot.client("ecs").update_service(cluster="manga", service="bot", desiredCount=10)
    assert counts(bot) == (10, 0, 10)


def test_a_start_is_not_lost_by_the_next_update(bot: Account, batches_start: Callable[[float], None]) -> None:
    """A second update goes on from what runs; another property leaves the counts alone."""
    client = bot.client("ecs")
    client.update_service(cluster="manga", service="bot", desiredCount=60)
    batches_start(1.5)
    client.update_service(cluster="manga", service="bot", desiredCount=40)
    assert counts(bot) == (25, 10, 40)
    batches_start(2)
    assert counts(bot) == (40, 0, 40)


def test_changing_calls_are_in_the_trail(bot: Account) -> None:
    """CloudTrail user guide, "LookupEvents": management events, newest first, by one attribute."""
    trail = bot.client("cloudtrail")
    bot.client("ecs").update_service(cluster="manga", service="bot", desiredCount=20)
    bot.client("ecs").list_clusters()
    bot.client("cloudwatch").put_metric_data(Namespace="n", MetricData=[{"MetricName": "m", "Value": 1}])
    with pytest.raises(ClientError):
        bot.client("bedrock").create_provisioned_model_throughput(
            provisionedModelName="over", modelUnits=1000, modelId=Policy().models["sonnet"].provisioned_model_id
        )
    statement = {"Effect": "Allow", "Action": "bedrock:InvokeModel", "Resource": "*"}
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    bot.client("iam").create_role(RoleName="worker", AssumeRolePolicyDocument="{}")
    bot.client("iam").put_role_policy(RoleName="worker", PolicyName="p", PolicyDocument=json.dumps(policy))
    written = [{"AttributeKey": "ReadOnly", "AttributeValue": "false"}]
    names = [event["EventName"] for event in trail.lookup_events(LookupAttributes=written)["Events"]]
    assert names[:4] == ["PutRolePolicy", "CreateRole", "CreateProvisionedModelThroughput", "UpdateService"]
    assert not {"ListClusters", "PutMetricData"} & set(names)
    by_name = [{"AttributeKey": "EventName", "AttributeValue": "CreateProvisionedModelThroughput"}]
    [event] = trail.lookup_events(LookupAttributes=by_name)["Events"]
    assert event["EventSource"] == "bedrock.amazonaws.com"
    assert event["Username"] == "worker"
    assert '"errorCode": "ServiceQuotaExceededException"' in event["CloudTrailEvent"]
    by_resource = [{"AttributeKey": "ResourceName", "AttributeValue": "worker"}]
    assert len(trail.lookup_events(LookupAttributes=by_resource)["Events"]) == 2


def test_a_rehearsal_adds_events(account: Account) -> None:
    """API reference, LookupEvents: time range, pages, and its errors."""
    trail, now = account.client("cloudtrail"), datetime.now(UTC).replace(microsecond=0)
    for hours in range(5):
        at = now - timedelta(hours=hours)
        event = {"event_name": f"change-{hours}", "event_time": at.isoformat(), "username": "a-deployment"}
        account.control("POST", "trail", event)

    def names(**query: Any) -> list[str]:
        pages = trail.get_paginator("lookup_events").paginate(**query)
        return [event["EventName"] for page in pages for event in page["Events"]]

    assert names(PaginationConfig={"PageSize": 2}) == [f"change-{hours}" for hours in range(5)]
    assert names(StartTime=now - timedelta(hours=2), EndTime=now - timedelta(hours=1)) == ["change-1", "change-2"]
    two = [{"AttributeKey": key, "AttributeValue": "x"} for key in ("EventName", "Username")]
    with pytest.raises(ClientError, match="InvalidLookupAttributesException"):
        trail.lookup_events(LookupAttributes=two)
    with pytest.raises(ClientError, match="InvalidTimeRangeException"):
        trail.lookup_events(StartTime=now, EndTime=now - timedelta(hours=1))
