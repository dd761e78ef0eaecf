"""Contract of provisioned throughput. Each test names the AWS document it follows."""

import urllib.error
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.exceptions import ClientError, ParamValidationError

from domain.policy import Policy
from tests.aws_account import Account, eventually

SONNET = Policy().models["sonnet"]
HAIKU = Policy().models["haiku"]


def create(account: Account, name: str = "base", units: int = 1, **more: Any) -> str:
    more.setdefault("modelId", SONNET.provisioned_model_id)
    answer = account.client("bedrock").create_provisioned_model_throughput(
        provisionedModelName=name, modelUnits=units, **more
    )
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 201
    return str(answer["provisionedModelArn"])


def get(account: Account, identifier: str) -> Any:
    return account.client("bedrock").get_provisioned_model_throughput(provisionedModelId=identifier)


def refused(code: str, status: int, call: Any, *args: Any, **parameters: Any) -> str:
    """The message of the error that `call` raises."""
    with pytest.raises(ClientError) as caught:
        call(*args, **parameters)
    error: Any = caught.value.response
    assert (error["Error"]["Code"], error["ResponseMetadata"]["HTTPStatusCode"]) == (code, status)
    return str(error["Error"]["Message"])


def test_created_then_in_service_by_arn_and_by_name(account: Account) -> None:
    """API reference, CreateProvisionedModelThroughput and GetProvisionedModelThroughput."""
    account.control("POST", "bedrock", {"provisioning_lag_seconds": 3600})
    before = datetime.now(UTC)
    arn = create(account, "base", 15)
    made = get(account, arn)
    assert arn.startswith("arn:aws:bedrock:ap-northeast-1:123456789012:provisioned-model/")
    assert (made["status"], made["modelUnits"], made["desiredModelUnits"]) == ("Creating", 15, 15)
    assert made["modelArn"].endswith(f"::foundation-model/{SONNET.provisioned_model_id}")
    assert made["foundationModelArn"].endswith(f"::foundation-model/{SONNET.model_id}")
    assert before - timedelta(seconds=1) <= made["creationTime"] <= datetime.now(UTC)
    assert "commitmentDuration" not in made
    account.control("POST", "bedrock", {"provisioning_lag_seconds": 0.2})
    soon = create(account, "soon")
    ready = eventually(lambda: get(account, "soon"), lambda model: model["status"] != "Creating")
    assert (ready["status"], ready["provisionedModelArn"]) == ("InService", soon)


def test_same_token_buys_once(account: Account) -> None:
    """API reference, clientRequestToken: a token seen before is ignored, without an error."""
    arn = create(account, "base", 10, clientRequestToken="incident-1-step-2")
    assert create(account, "base", 10, clientRequestToken="incident-1-step-2") == arn
    assert create(account, "other", 10, clientRequestToken="incident-1-step-3") != arn
    assert len(account.client("bedrock").list_provisioned_model_throughputs()["provisionedModelSummaries"]) == 2


def test_quota_holds_under_concurrency(account: Account) -> None:
    """API reference, ServiceQuotaExceededException (400); freed by a delete, raised by Support."""
    granted = SONNET.ceiling_units

    def buy(number: int) -> bool:
        try:
            create(account, f"burst-{number}", 5)
        except account.client("bedrock").exceptions.ServiceQuotaExceededException:
            return False
        return True

    account.client("bedrock")
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(buy, range(12))) == granted // 5
    create(account, "haiku", HAIKU.ceiling_units, modelId=HAIKU.provisioned_model_id)
    account.control("POST", "settle")
    account.client("bedrock").delete_provisioned_model_throughput(
        provisionedModelId=account.client("bedrock").list_provisioned_model_throughputs(
            nameContains="burst", maxResults=1
        )["provisionedModelSummaries"][0]["provisionedModelArn"]
    )
    create(account, "freed", 5)
    message = refused("ServiceQuotaExceededException", 400, create, account, "over", 1)
    assert f"{granted} granted" in message
    account.control("POST", "bedrock", {"quotas": {SONNET.provisioned_model_id: granted + 1}})
    create(account, "over", 1)


@pytest.mark.parametrize(
    ("parameters", "code", "status"),
    [
        ({"modelId": "anthropic.claude-nobody:0"}, "ValidationException", 400),
        ({"modelId": SONNET.model_id}, "ValidationException", 400),
        (
            {"modelId": "arn:aws:bedrock:ap-northeast-1::foundation-model/anthropic.claude-nobody:0"},
            "ResourceNotFoundException",
            404,
        ),
        ({"name": "two words"}, "ValidationException", 400),
        ({"name": "x" * 64}, "ValidationException", 400),
        ({"name": "taken"}, "ValidationException", 400),
        ({"tags": [{"key": f"k{number}", "value": "v"} for number in range(51)]}, "TooManyTagsException", 400),
    ],
)
def test_bad_requests_are_refused(account: Account, parameters: dict[str, Any], code: str, status: int) -> None:
    """API reference, errors of CreateProvisionedModelThroughput."""
    create(account, "taken")
    refused(code, status, create, account, **parameters)
    assert len(account.client("bedrock").list_provisioned_model_throughputs()["provisionedModelSummaries"]) == 1


def test_units_cannot_be_changed_only_the_name(account: Account) -> None:
    """API reference, UpdateProvisionedModelThroughput: no such parameter; user guide, "Modify": name and tags only."""
    bedrock = account.client("bedrock")
    arn = create(account, "base", 5)
    with pytest.raises(ParamValidationError, match="desiredModelUnits"):
        bedrock.update_provisioned_model_throughput(provisionedModelId=arn, desiredModelUnits=10)
    refused(
        "ValidationException",
        400,
        bedrock.update_provisioned_model_throughput,
        provisionedModelId=arn,
        desiredModelId=HAIKU.provisioned_model_id,
    )
    bedrock.update_provisioned_model_throughput(provisionedModelId="base", desiredProvisionedModelName="renamed")
    assert get(account, "renamed")["modelUnits"] == 5
    refused("ResourceNotFoundException", 404, get, account, "base")


def test_delete_conflicts_while_creating_and_while_committed(account: Account) -> None:
    """API reference, DeleteProvisionedModelThroughput: ConflictException; no delete before a term ends."""
    delete = account.client("bedrock").delete_provisioned_model_throughput
    account.control("POST", "bedrock", {"provisioning_lag_seconds": 3600})
    arn = create(account, "base")
    committed = create(account, "committed", commitmentDuration="OneMonth")
    assert "being created" in refused("ConflictException", 400, delete, provisionedModelId=arn)
    account.control("POST", "settle")
    assert "commitment" in refused("ConflictException", 400, delete, provisionedModelId=committed)
    delete(provisionedModelId=arn)
    refused("ResourceNotFoundException", 404, get, account, arn)
    refused("ResourceNotFoundException", 404, delete, provisionedModelId=arn)
    described = get(account, committed)
    assert described["commitmentExpirationTime"] - described["creationTime"] >= timedelta(days=28)


def test_list_filters_orders_and_pages(account: Account) -> None:
    """API reference, ListProvisionedModelThroughputs."""
    bedrock = account.client("bedrock")
    for number in range(3):
        create(account, f"burst-{number}")
    account.control("POST", "settle")
    account.control("POST", "bedrock", {"provisioning_lag_seconds": 3600})
    create(account, "late", modelId=HAIKU.provisioned_model_id)

    def names(**query: Any) -> list[str]:
        pages = bedrock.get_paginator("list_provisioned_model_throughputs").paginate(
            PaginationConfig={"PageSize": 2}, **query
        )
        return [item["provisionedModelName"] for page in pages for item in page["provisionedModelSummaries"]]

    assert names() == ["late", "burst-2", "burst-1", "burst-0"]
    assert names(sortBy="CreationTime", sortOrder="Ascending", nameContains="burst")[0] == "burst-0"
    assert names(statusEquals="Creating") == ["late"]
    assert names(modelArnEquals=get(account, "late")["modelArn"]) == ["late"]
    assert names(creationTimeAfter=datetime.now(UTC) + timedelta(minutes=1)) == []
    assert len(names(creationTimeBefore=datetime.now(UTC) + timedelta(minutes=1))) == 4


def test_tags(account: Account) -> None:
    """API reference, TagResource, UntagResource, ListTagsForResource."""
    bedrock = account.client("bedrock")
    arn = create(account, "base", tags=[{"key": "managed-by", "value": "runbooks"}])
    bedrock.tag_resource(resourceARN=arn, tags=[{"key": "until", "value": "04:00"}, {"key": "gone", "value": "x"}])
    bedrock.untag_resource(resourceARN=arn, tagKeys=["gone"])
    tags = {tag["key"]: tag["value"] for tag in bedrock.list_tags_for_resource(resourceARN=arn)["tags"]}
    assert tags == {"managed-by": "runbooks", "until": "04:00"}
    account.control("POST", "settle")
    bedrock.delete_provisioned_model_throughput(provisionedModelId=arn)
    refused("ResourceNotFoundException", 404, bedrock.list_tags_for_resource, resourceARN=arn)


def test_what_happens_without_the_owner(account: Account) -> None:
    """API reference, ProvisionedModelStatus and failureMessage; the control path plays AWS and other people."""
    arn = create(account, "base")
    account.control("POST", "provisioned-model-throughput/base", {"in_service_after_seconds": 0})
    assert get(account, arn)["status"] == "InService"
    account.control("POST", "bedrock", {"provisioning_lag_seconds": 3600})
    slow = create(account, "slow")
    account.control("POST", f"provisioned-model-throughput/{slow}", {"failure_message": "no capacity"})
    assert (get(account, slow)["status"], get(account, slow)["failureMessage"]) == ("Failed", "no capacity")
    account.client("bedrock").delete_provisioned_model_throughput(provisionedModelId=slow)
    account.control("DELETE", "provisioned-model-throughput/base")
    refused("ResourceNotFoundException", 404, get, account, arn)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        account.control("POST", "provisioned-model-throughput/nobody", {"failure_message": "x"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        account.control("POST", "bedrock", {"quotas": {"x": "many"}})
