"""Faults on demand, and the control path. AWS's side of each is in the API references' "Common errors"."""

import urllib.error
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError

from domain.policy import Policy
from tests.aws_account import Account

SONNET = Policy().models["sonnet"].provisioned_model_id
CREATE = {"service": "bedrock", "operation": "CreateProvisionedModelThroughput"}


def create(account: Account) -> str:
    answer = account.client("bedrock").create_provisioned_model_throughput(
        provisionedModelName="burst", modelUnits=5, modelId=SONNET, clientRequestToken="incident-1"
    )
    return str(answer["provisionedModelArn"])


def fleet(account: Account) -> Any:
    return account.client("bedrock").list_provisioned_model_throughputs()["provisionedModelSummaries"]


@pytest.mark.parametrize(
    ("kind", "code", "status"),
    [
        ("throttling", "ThrottlingException", 429),
        ("access_denied", "AccessDeniedException", 403),
        ("server_error", "InternalServerException", 500),
    ],
)
def test_refused_and_nothing_done(account: Account, kind: str, code: str, status: int) -> None:
    """API reference, errors of CreateProvisionedModelThroughput; the next call goes through."""
    account.control("POST", "faults", {**CREATE, "kind": kind})
    with pytest.raises(ClientError) as caught:
        create(account)
    answer: Any = caught.value.response
    assert (answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"]) == (code, status)
    assert fleet(account) == []
    assert create(account) == fleet(account)[0]["provisionedModelArn"]


def test_access_denied_names_the_permission(account: Account) -> None:
    """IAM user guide, "Troubleshoot access denied error messages": who, which action, on what."""
    account.control("POST", "faults", {**CREATE, "kind": "access_denied"})
    with pytest.raises(ClientError) as caught:
        create(account)
    assert caught.value.response["Error"]["Message"] == (
        "User: arn:aws:sts::123456789012:assumed-role/mangaassist-runbooks/worker is not authorized to perform: "
        "bedrock:CreateProvisionedModelThroughput on resource: "
        f"arn:aws:bedrock:ap-northeast-1::foundation-model/{SONNET} because no identity-based policy allows the "
        "bedrock:CreateProvisionedModelThroughput action"
    )


def test_lost_answer_is_done_and_the_token_saves_it(account: Account) -> None:
    """The operation took effect although the caller saw a broken connection; a retry with the token buys nothing."""
    account.control("POST", "faults", {**CREATE, "kind": "lost_answer"})
    with pytest.raises(ConnectionClosedError):
        create(account)
    [bought] = fleet(account)
    assert create(account) == bought["provisionedModelArn"]
    assert len(fleet(account)) == 1


def test_timeout(account: Account) -> None:
    """No answer within the delay, which the client cannot tell from a slow network; nothing is done."""
    account.control("POST", "faults", {**CREATE, "kind": "timeout", "delay_ms": 50})
    with pytest.raises((ConnectionClosedError, ReadTimeoutError)):
        create(account)
    assert fleet(account) == []


def test_count_after_and_clear(account: Account) -> None:
    """`after` calls pass, then `count` fail; without an operation all of a service's fail, until deleted."""
    sqs = account.client("sqs")
    account.control("POST", "faults", {"service": "sqs", "kind": "throttling", "after": 1, "count": 2})
    outcomes = []
    for _ in range(4):
        try:
            sqs.list_queues()
            outcomes.append("ok")
        except ClientError as error:
            outcomes.append(error.response["Error"]["Code"])
    assert outcomes == ["ok", "ThrottlingException", "ThrottlingException", "ok"]
    account.control("POST", "faults", {"service": "sqs", "kind": "server_error", "count": None})
    assert len(account.control("GET", "faults")) == 1
    for _ in range(3):
        with pytest.raises(ClientError):
            sqs.list_queues()
    account.client("cloudwatch").describe_alarms()
    assert account.control("DELETE", "faults") == []
    sqs.list_queues()


@pytest.mark.parametrize("service", ["cloudwatch", "dynamodb", "ecs", "sns", "cloudtrail", "iam"])
def test_every_service_can_fail_in_its_own_protocol(account: Account, service: str) -> None:
    """JSON services answer AccessDeniedException, query services AccessDenied."""
    calls = {
        "cloudwatch": "describe_alarms",
        "dynamodb": "list_tables",
        "ecs": "list_clusters",
        "sns": "list_topics",
        "cloudtrail": "lookup_events",
        "iam": "list_roles",
    }
    account.control("POST", "faults", {"service": service, "kind": "access_denied"})
    with pytest.raises(ClientError, match=f"AccessDenied.*is not authorized to perform: {service}:"):
        getattr(account.client(service), calls[service])()
    getattr(account.client(service), calls[service])()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("faults", {"service": "bedrock", "kind": "boredom"}),
        ("faults", {"service": "bedrock", "kind": "timeout", "often": 1}),
        ("faults", {"service": "bedrock", "kind": "timeout", "count": 0}),
        ("bedrock", {"provisioning_lag_seconds": -1}),
        ("nothing-here", {}),
    ],
)
def test_bad_control_requests_change_nothing(account: Account, path: str, body: Any) -> None:
    """A 400 or 404 that says what is wrong."""
    with pytest.raises(urllib.error.HTTPError, match=r"40[04]") as caught:
        account.control("POST", path, body)
    assert b"error" in caught.value.read()
    assert account.control("GET", "faults") == []
