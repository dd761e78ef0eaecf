"""What the product may do in AWS: every call it makes, the IAM statement that allows it, and a harmless way to try it.

The one declaration behind `runbooks iam policy`, the check at start, and the statement that an AccessDenied names.
Actions, resource types and condition keys are those of AWS's Service Authorization Reference. No condition key limits
units or commitment: that is held by the policy's ceilings and by the units that AWS Support grants.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from domain.capacity import MANAGED_BY, MANAGED_BY_TAG
from domain.metrics import MANGA_ASSIST
from domain.people import AwsRole

ACCESS_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "AuthorizationError", "UnauthorizedOperation"})
"""Error codes by which AWS says that a permission is missing; `AuthorizationError` is SNS's."""


class Scope(BaseModel):
    """Where statements apply. `*` stands for what is not known; an ARN that is not configured is None."""

    model_config = ConfigDict(frozen=True)

    account: str = "*"
    region: str = "*"
    owner: str = MANAGED_BY
    """Value of the tag on what we buy."""
    model_ids: tuple[str, ...] = ("*",)
    """Foundation models that provisioned throughput is bought for, with their context variants."""
    ecs_cluster: str = "*"
    ecs_service: str = "*"
    event_table: str = "*"
    page_topic_arn: str | None = None
    alarm_queue_arn: str | None = None
    dead_letter_queue_arn: str | None = None
    role_arn: str | None = None
    """The role that the policy is for."""


Resources = Callable[[Scope], Sequence[str]]
Statement = dict[str, Any]


def _all(scope: Scope) -> Sequence[str]:
    return ["*"]


def _foundation(scope: Scope) -> Sequence[str]:
    return [f"arn:aws:bedrock:{scope.region}::foundation-model/{model_id}" for model_id in scope.model_ids]


def _provisioned(scope: Scope) -> Sequence[str]:
    return [f"arn:aws:bedrock:{scope.region}:{scope.account}:provisioned-model/*"]


def _bought(scope: Scope) -> Sequence[str]:
    return [*_foundation(scope), *_provisioned(scope)]


def _called(scope: Scope) -> Sequence[str]:
    profiles = f"arn:aws:bedrock:{scope.region}:{scope.account}:inference-profile/*"
    # A cross-region profile calls the model where it likes.
    return [*(f"arn:aws:bedrock:*::foundation-model/{one}" for one in scope.model_ids), *_provisioned(scope), profiles]


def _service(scope: Scope) -> Sequence[str]:
    return [f"arn:aws:ecs:{scope.region}:{scope.account}:service/{scope.ecs_cluster}/{scope.ecs_service}"]


def _table(scope: Scope) -> Sequence[str]:
    return [f"arn:aws:dynamodb:{scope.region}:{scope.account}:table/{scope.event_table}"]


def _topic(scope: Scope) -> Sequence[str]:
    return [scope.page_topic_arn] if scope.page_topic_arn else []


def _alarm_queue(scope: Scope) -> Sequence[str]:
    return [scope.alarm_queue_arn] if scope.alarm_queue_arn else []


def _dead_letter_queue(scope: Scope) -> Sequence[str]:
    return [scope.dead_letter_queue_arn] if scope.dead_letter_queue_arn else []


def _role(scope: Scope) -> Sequence[str]:
    return [scope.role_arn] if scope.role_arn else []


@dataclass(frozen=True)
class Grant:
    """One action that IAM must allow."""

    action: str
    resources: Resources
    """Answers nothing while what it is about is not configured."""
    needs: str = ""
    """What has to be given then."""
    condition: tuple[str, str | None] | None = None
    """Condition key, and what it must be; None: the owner."""

    def statement(self, scope: Scope) -> Statement | None:
        """None: what it is about is not configured."""
        resources = [*self.resources(scope)]
        if not resources:
            return None
        statement: Statement = {
            "Sid": _sid(self.action),
            "Effect": "Allow",
            "Action": self.action,
            "Resource": resources[0] if len(resources) == 1 else resources,
        }
        if conditions := self.conditions(scope):
            statement["Condition"] = {"StringEquals": conditions}
        return statement

    def conditions(self, scope: Scope) -> dict[str, str]:
        """Condition keys, and what they must be."""
        return {key: value or scope.owner for key, value in filter(None, [self.condition])}


def _sid(action: str) -> str:
    service, _, operation = action.partition(":")
    return service.capitalize() + operation


@dataclass(frozen=True)
class Call:
    """A boto3 call of the product."""

    service: str
    operation: str
    roles: frozenset[AwsRole]
    grants: tuple[Grant, ...]
    """None: IAM never refuses it."""
    probe: Callable[[Scope], Mapping[str, Any]] | None = None
    """Parameters of a call that changes nothing, whatever there is; None: it cannot be tried without effect."""


_WORKER, _INTAKE, _API, _BATCHER = (frozenset({role}) for role in AwsRole)
_BOTH = _WORKER | _INTAKE
_CHECK = _BOTH | _BATCHER
_LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
_NOBODYS_MODEL = "aaaaaaaaaaaa"
_ASKED_AS_OURS = (f"aws:RequestTag/{MANAGED_BY_TAG}", None)
_OURS = (f"aws:ResourceTag/{MANAGED_BY_TAG}", None)
_ROLE_NAME = "the role's name (--role-name)"


def _nobodys_arn(scope: Scope) -> str:
    """Well-formed: IAM judges it before Bedrock looks for it."""
    return _provisioned(scope)[0].replace("/*", f"/{_NOBODYS_MODEL}")


CALLS: tuple[Call, ...] = (
    Call(
        "bedrock",
        "list_provisioned_model_throughputs",
        _BOTH,
        (Grant("bedrock:ListProvisionedModelThroughputs", _all),),
        lambda scope: {"maxResults": 1},
    ),
    Call(
        "bedrock",
        "get_provisioned_model_throughput",
        _WORKER,
        (Grant("bedrock:GetProvisionedModelThroughput", _provisioned),),
        lambda scope: {"provisionedModelId": _nobodys_arn(scope)},
    ),
    Call(
        "bedrock",
        "list_tags_for_resource",
        _WORKER,
        (Grant("bedrock:ListTagsForResource", _provisioned),),
        lambda scope: {"resourceARN": _nobodys_arn(scope)},
    ),
    Call(
        "bedrock",
        "create_provisioned_model_throughput",
        _WORKER,
        (
            Grant("bedrock:CreateProvisionedModelThroughput", _bought, condition=_ASKED_AS_OURS),
            # Creating with tags is tagging, too.
            Grant("bedrock:TagResource", _provisioned, condition=_ASKED_AS_OURS),
        ),
    ),
    Call(
        "bedrock",
        "delete_provisioned_model_throughput",
        _WORKER,
        (Grant("bedrock:DeleteProvisionedModelThroughput", _provisioned, condition=_OURS),),
    ),
    # Tried by every request; a probe would be paid for.
    Call("bedrock_runtime", "converse", _BATCHER, (Grant("bedrock:InvokeModel", _called),)),
    Call(
        "cloudwatch",
        "get_metric_data",
        _WORKER | _API,
        (Grant("cloudwatch:GetMetricData", _all),),
        lambda scope: {
            "MetricDataQueries": [
                {
                    "Id": "probe",
                    "MetricStat": {
                        "Metric": {"Namespace": "AWS/Bedrock", "MetricName": "Invocations"},
                        "Period": 60,
                        "Stat": "Sum",
                    },
                }
            ],
            "StartTime": _LONG_AGO,
            "EndTime": _LONG_AGO.replace(minute=1),
        },
    ),
    Call(
        "cloudwatch",
        "put_metric_data",
        _WORKER | _BATCHER,
        (Grant("cloudwatch:PutMetricData", _all, condition=("cloudwatch:namespace", MANGA_ASSIST)),),
    ),
    # Composite alarms are described under `*` only.
    Call(
        "cloudwatch",
        "describe_alarms",
        _INTAKE,
        (Grant("cloudwatch:DescribeAlarms", _all),),
        lambda scope: {"MaxRecords": 1},
    ),
    Call(
        "cloudwatch",
        "list_alarm_mute_rules",
        _INTAKE,
        (Grant("cloudwatch:ListAlarmMuteRules", _all),),
        lambda scope: {"MaxRecords": 1},
    ),
    Call(
        "ecs",
        "describe_services",
        _WORKER,
        (Grant("ecs:DescribeServices", _service),),
        lambda scope: {"cluster": scope.ecs_cluster, "services": [scope.ecs_service]},
    ),
    Call(
        "dynamodb",
        "scan",
        _WORKER | _API,
        (Grant("dynamodb:Scan", _table),),
        lambda scope: {"TableName": scope.event_table, "Limit": 1},
    ),
    Call("dynamodb", "put_item", _WORKER | _API, (Grant("dynamodb:PutItem", _table),)),
    Call(
        "dynamodb",
        "get_item",
        _WORKER,
        (Grant("dynamodb:GetItem", _table),),
        lambda scope: {"TableName": scope.event_table, "Key": {"event_id": {"S": "permission-check"}}},
    ),
    Call("dynamodb", "update_item", _WORKER | _API, (Grant("dynamodb:UpdateItem", _table),)),
    Call("dynamodb", "delete_item", _API, (Grant("dynamodb:DeleteItem", _table),)),
    Call(
        "cloudtrail",
        "lookup_events",
        _WORKER,
        (Grant("cloudtrail:LookupEvents", _all),),
        lambda scope: {"MaxResults": 1},
    ),
    Call("sns", "publish", _WORKER, (Grant("sns:Publish", _topic, "RUNBOOKS_PAGE_TOPIC_ARN"),)),
    # Receiving hides messages for a while, so it is not tried.
    Call("sqs", "receive_message", _INTAKE, (Grant("sqs:ReceiveMessage", _alarm_queue, "RUNBOOKS_ALARM_QUEUE_URL"),)),
    Call(
        "sqs", "delete_message_batch", _INTAKE, (Grant("sqs:DeleteMessage", _alarm_queue, "RUNBOOKS_ALARM_QUEUE_URL"),)
    ),
    Call(
        "sqs",
        "send_message",
        _INTAKE,
        (Grant("sqs:SendMessage", _dead_letter_queue, "RUNBOOKS_DEAD_LETTER_QUEUE_URL"),),
    ),
    Call("sts", "get_caller_identity", _CHECK, ()),
    Call("iam", "simulate_principal_policy", _CHECK, (Grant("iam:SimulatePrincipalPolicy", _role, _ROLE_NAME),)),
)
"""Everything. A call that is made and does not stand here, or the other way round, fails a test."""


def calls_of(role: AwsRole) -> tuple[Call, ...]:
    """What a process calls."""
    return tuple(call for call in CALLS if role in call.roles)


def policy_document(role: AwsRole, scope: Scope) -> dict[str, Any]:
    """The least IAM policy that `role` needs, one statement for each action."""
    statements: dict[str, Statement] = {}
    for call in calls_of(role):
        for grant in call.grants:
            if (statement := grant.statement(scope)) is not None:
                statements.setdefault(grant.action, statement)
    return {"Version": "2012-10-17", "Statement": list(statements.values())}


def left_out(role: AwsRole, scope: Scope) -> list[str]:
    """Why actions have no statement, a line each."""
    return [
        f"{grant.action} is left out: {grant.needs} is not given"
        for call in calls_of(role)
        for grant in call.grants
        if grant.statement(scope) is None
    ]


def statement_for(action: str, scope: Scope) -> Statement:
    """What to add to a role so that it may do `action`, which the product may never have declared."""
    grants = [grant for call in CALLS for grant in call.grants if grant.action == action]
    declared = grants[0].statement(scope) if grants else None
    return declared or {"Effect": "Allow", "Action": action, "Resource": "*"}


def action_of(operation: str) -> str:
    """The IAM action of an API operation, e.g. `GetMetricData`; `?:` and its name where none is declared."""
    for call in CALLS:
        if call.grants and call.operation.replace("_", "") == operation.lower():
            return call.grants[0].action
    return f"?:{operation}"


def principal_of(caller_arn: str) -> str | None:
    """Whose policies judge a caller: its role, or itself as a user; None: nobody's (the account's root, federation).

    A session's ARN does not say the path of its role, so one with a path is looked for in vain.
    """
    match = re.fullmatch(r"arn:aws:(?:sts|iam)::(\d{12}):(assumed-role|user)/(.+)", caller_arn)
    if match is None:
        return None
    account, kind, name = match.groups()
    return caller_arn if kind == "user" else f"arn:aws:iam::{account}:role/{name.split('/')[0]}"


def as_json(statement: Statement) -> str:
    """One line, ready to paste."""
    return json.dumps(statement)


class CheckPermissions(BaseModel):
    """Asks whether the worker's own role may do what it needs."""

    model_config = ConfigDict(frozen=True)

    actions: frozenset[str] = frozenset()
    """Only these, e.g. `bedrock:CreateProvisionedModelThroughput`; none: all of them."""


class PermissionFinding(BaseModel):
    """Whether one action is allowed."""

    model_config = ConfigDict(frozen=True)

    action: str
    verdict: Literal["allowed", "denied", "not verifiable"]
    detail: str
    """In words: how it was found out, or why it could not be."""
    statement: str = ""
    """JSON of the IAM statement to add, where one is missing."""


class PermissionsChecked(BaseModel):
    """One finding for each action, in the order of the declaration."""

    model_config = ConfigDict(frozen=True)

    findings: tuple[PermissionFinding, ...]

    @property
    def denied(self) -> tuple[PermissionFinding, ...]:
        """What is missing for certain."""
        return tuple(finding for finding in self.findings if finding.verdict == "denied")
