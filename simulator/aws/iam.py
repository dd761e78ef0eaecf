"""IAM: identity policies are honoured with their Resource and tag conditions, and the policy simulator answers.

moto checks actions alone, under the name that signs (`monitoring` for CloudWatch's `cloudwatch`). As in moto, nothing
is checked until `POST /moto-api/reset-auth` with body `0` says so. What a call is judged by stands in AWS's Service
Authorization Reference.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from moto import settings
from moto.core.authorization import ActionAuthenticatorMixin
from moto.core.responses import ActionResult, BaseResponse
from moto.iam import urls
from moto.iam.access_control import CreateAccessKeyFailure, IAMPolicy, create_access_key
from moto.iam.responses import IamResponse

from simulator.aws.bedrock import provisioned_arn, tags_of
from simulator.aws.errors import AwsError
from simulator.aws.trail import RESIDENT_KEY
from simulator.aws.world import ACCOUNT_ID

_PREFIXES = {"bedrock-runtime": "bedrock", "service-quotas": "servicequotas"}
"""IAM's name of a service, where it is not boto3's."""


@dataclass(frozen=True)
class Need:
    """One thing that a call needs to be allowed."""

    action: str
    resource: str = "*"
    context: Mapping[str, str] = field(default_factory=dict)
    """Condition keys and their values."""


Needs = Callable[[BaseResponse, Mapping[str, Any]], Iterable[Need]]


def prefix(service: str) -> str:
    """What IAM calls the service."""
    return _PREFIXES.get(service, service)


def _arn(response: BaseResponse, service: str, rest: str) -> str:
    return f"arn:aws:{service}:{response.region}:{ACCOUNT_ID}:{rest}"


def _create(response: BaseResponse, parameters: Mapping[str, Any]) -> Iterable[Need]:
    tags = {f"aws:RequestTag/{tag['key']}": tag["value"] for tag in parameters.get("tags", [])}
    action = "bedrock:CreateProvisionedModelThroughput"
    model_id = str(parameters.get("modelId")).rsplit(":foundation-model/", 1)[-1]
    yield Need(action, f"arn:aws:bedrock:{response.region}::foundation-model/{model_id}", tags)
    yield Need(action, _arn(response, "bedrock", "provisioned-model/*"), tags)
    if tags:
        yield Need("bedrock:TagResource", _arn(response, "bedrock", "provisioned-model/*"), tags)


def _on_provisioned(action: str, parameter: str) -> Needs:
    def needs(response: BaseResponse, parameters: Mapping[str, Any]) -> Iterable[Need]:
        arn = provisioned_arn(response, str(parameters.get(parameter)))
        yield Need(action, arn, {f"aws:ResourceTag/{key}": value for key, value in tags_of(response, arn).items()})

    return needs


def _services(response: BaseResponse, parameters: Mapping[str, Any]) -> Iterable[Need]:
    cluster = str(parameters.get("cluster", "default")).rsplit("/", 1)[-1]
    for service in parameters.get("services", []):
        name = service.rsplit("/", 1)[-1]
        yield Need("ecs:DescribeServices", _arn(response, "ecs", f"service/{cluster}/{name}"))


def _on_table(operation: str) -> Needs:
    return lambda response, parameters: [
        Need(f"dynamodb:{operation}", _arn(response, "dynamodb", f"table/{parameters.get('TableName')}"))
    ]


def _on_queue(action: str) -> Needs:
    return lambda response, parameters: [
        Need(action, _arn(response, "sqs", str(parameters.get("QueueUrl")).rsplit("/", 1)[-1]))
    ]


def _invoke(response: BaseResponse, parameters: Mapping[str, Any]) -> Iterable[Need]:
    target = unquote(response.raw_path.split("/model/", 1)[1].rsplit("/", 1)[0])
    foundation = f"arn:aws:bedrock:{response.region}::foundation-model/{target}"
    yield Need("bedrock:InvokeModel", target if target.startswith("arn:") else foundation)


_NEEDS: dict[str, Needs] = {
    "bedrock:Converse": _invoke,
    "bedrock:CreateProvisionedModelThroughput": _create,
    "bedrock:GetProvisionedModelThroughput": _on_provisioned(
        "bedrock:GetProvisionedModelThroughput", "provisionedModelId"
    ),
    "bedrock:UpdateProvisionedModelThroughput": _on_provisioned(
        "bedrock:UpdateProvisionedModelThroughput", "provisionedModelId"
    ),
    "bedrock:DeleteProvisionedModelThroughput": _on_provisioned(
        "bedrock:DeleteProvisionedModelThroughput", "provisionedModelId"
    ),
    "bedrock:ListTagsForResource": _on_provisioned("bedrock:ListTagsForResource", "resourceARN"),
    "cloudwatch:PutMetricData": lambda response, parameters: [
        Need("cloudwatch:PutMetricData", context={"cloudwatch:namespace": str(parameters.get("Namespace"))})
    ],
    "ecs:DescribeServices": _services,
    **{
        f"dynamodb:{operation}": _on_table(operation)
        for operation in ("DeleteItem", "DescribeTable", "GetItem", "PutItem", "Query", "Scan", "UpdateItem")
    },
    "sns:Publish": lambda response, parameters: [Need("sns:Publish", str(parameters.get("TopicArn")))],
    "sqs:ReceiveMessage": _on_queue("sqs:ReceiveMessage"),
    "sqs:DeleteMessage": _on_queue("sqs:DeleteMessage"),
    "sqs:DeleteMessageBatch": _on_queue("sqs:DeleteMessage"),
    "sqs:SendMessage": _on_queue("sqs:SendMessage"),
    "sts:GetCallerIdentity": lambda response, parameters: [],
    "iam:SimulatePrincipalPolicy": lambda response, parameters: [
        Need("iam:SimulatePrincipalPolicy", str(parameters.get("PolicySourceArn")))
    ],
}
"""What is judged by more than its own name on `*`."""


def refused(
    response: BaseResponse, service: str, operation: str, parameters: Mapping[str, Any]
) -> tuple[str, Need] | None:
    """Who is not allowed what; None: the call may be made.

    An access key that IAM did not make is the account's own (AWS would not know it).
    """
    if ActionAuthenticatorMixin.request_count < settings.INITIAL_NO_AUTH_ACTION_COUNT:
        return None
    if response.access_key == RESIDENT_KEY:
        return None
    try:
        key = create_access_key(ACCOUNT_ID, "aws", response.access_key, response.headers)
    except CreateAccessKeyFailure:
        return None
    name = f"{prefix(service)}:{operation}"
    needs = _NEEDS[name](response, parameters) if name in _NEEDS else [Need(name)]
    policies: list[Any] = key.collect_policies()
    return next(((key.arn, need) for need in needs if judge(policies, need) != "allowed"), None)


def judge(policies: Iterable[Any], need: Need) -> str:
    """IAM's decision, in the words of the policy simulator."""
    decision = "implicitDeny"
    for policy in policies:
        statements = IAMPolicy(policy)._policy_json["Statement"]
        for statement in [statements] if isinstance(statements, dict) else statements:
            if _fits(statement, need):
                if statement["Effect"] == "Deny":
                    return "explicitDeny"
                decision = "allowed"
    return decision


def _fits(statement: Mapping[str, Any], need: Need) -> bool:
    if unknown := statement.keys() - {"Sid", "Effect", "Action", "Resource", "Condition"}:
        raise NotImplementedError(f"the simulator does not honour {sorted(unknown)} in a policy")
    return (
        any(_matches(pattern.lower(), need.action.lower()) for pattern in _listed(statement["Action"]))
        and any(_matches(pattern, need.resource) for pattern in _listed(statement["Resource"]))
        and all(_holds(operator, keys, need.context) for operator, keys in statement.get("Condition", {}).items())
    )


def _holds(operator: str, wanted: Mapping[str, Any], context: Mapping[str, str]) -> bool:
    if operator != "StringEquals":
        raise NotImplementedError(f"the simulator does not honour {operator} in a policy")
    return all(context.get(key) in _listed(values) for key, values in wanted.items())


def _matches(pattern: str, value: str) -> bool:
    parts = (".*" if part == "*" else "." if part == "?" else re.escape(part) for part in re.split(r"([*?])", pattern))
    return re.fullmatch("".join(parts), value) is not None


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


class SimulatingIamResponse(IamResponse):
    """moto's IAM with the policy simulator for principals."""

    def simulate_principal_policy(self) -> ActionResult:
        """Each action on each resource, as the role's or user's own policies decide."""
        arn = str(self._get_param("PolicySourceArn"))
        context = {
            entry["ContextKeyName"]: entry["ContextKeyValues"][0] for entry in self._get_param("ContextEntries") or []
        }
        policies = self._policies(arn)
        return ActionResult(
            {
                "EvaluationResults": [
                    {
                        "EvalActionName": action,
                        "EvalResourceName": resource,
                        "EvalDecision": judge(policies, Need(action, resource, context)),
                    }
                    for action in self._get_param("ActionNames")
                    for resource in self._get_param("ResourceArns") or ["*"]
                ],
                "IsTruncated": False,
            }
        )

    def _policies(self, arn: str) -> list[Any]:
        name = arn.rsplit("/", 1)[-1]
        backend = self.backend
        if ":role/" in arn and name in {role.name for role in backend.roles.values()}:
            inline = [backend.get_role_policy(name, policy)[1] for policy in backend.list_role_policies(name)]
            attached: list[Any] = [*backend.list_attached_role_policies(name)[0]]
            return inline + attached
        if ":user/" in arn and name in backend.users:
            own: list[Any] = [backend.get_user_policy(name, policy) for policy in backend.list_user_policies(name)]
            return [*own, *backend.list_attached_user_policies(name)[0]]
        raise AwsError("NoSuchEntity", f"The principal {arn} cannot be found.")


def install() -> None:
    """Put it in moto's place. Before the server starts."""
    BaseResponse._authenticate_and_authorize_normal_action = lambda self, resource="*": None  # type: ignore[method-assign]
    for path in urls.url_paths:
        urls.url_paths[path] = SimulatingIamResponse.dispatch
