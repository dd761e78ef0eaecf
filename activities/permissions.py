"""Whether a process's own AWS role may do what it needs. Nothing is changed and nothing is bought to find out."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from temporalio import activity

from domain.people import AwsRole
from domain.permissions import (
    ACCESS_DENIED,
    Call,
    CheckPermissions,
    Grant,
    PermissionFinding,
    PermissionsChecked,
    Scope,
    as_json,
    calls_of,
    principal_of,
    statement_for,
)

if TYPE_CHECKING:
    from types_boto3_sts.client import STSClient

Clients = Callable[[str], Any]
"""The boto3 client of a service."""

THREADS = 8


class PermissionActivities:
    """The worker's own permissions."""

    def __init__(self, clients: Clients, scope: Callable[[], Scope]) -> None:
        self._clients = clients
        self._scope = scope

    @activity.defn
    def check_permissions(self, request: CheckPermissions) -> PermissionsChecked:
        """Every action that the worker needs, or those asked for. AWS away: not verifiable, and why."""
        return check(AwsRole.WORKER, self._scope(), self._clients, request.actions)


def check(role: AwsRole, scope: Scope, clients: Clients, only: Iterable[str] = ()) -> PermissionsChecked:
    """Try each call that has no effect; ask IAM's policy simulator about the others, where that may be asked.

    What the simulator says leaves out service control policies and the like, and the way in which AWS refuses a call
    that has no effect tells nothing of the resources it does not name.
    """
    wanted = frozenset(only)
    asked = [(call, grant) for call in calls_of(role) for grant in call.grants if not wanted or grant.action in wanted]
    # Made here: boto3 does not make clients in several threads at once.
    made = {service: clients(service) for service in ("sts", "iam", *(call.service for call, _ in asked))}
    scope, principal, why = _identity(scope, made["sts"])

    def find(item: tuple[Call, Grant]) -> PermissionFinding:
        call, grant = item
        if call.probe is not None:
            return _try(getattr(made[call.service], call.operation), call.probe(scope), grant, scope)
        return _simulate(grant, scope, made["iam"], principal, why)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="permissions") as threads:
        return PermissionsChecked(findings=tuple(threads.map(find, asked)))


def _identity(scope: Scope, sts: "STSClient") -> tuple[Scope, str | None, str]:
    """The scope with the caller's account and role; the ARN to simulate; why there is none."""
    try:
        caller = sts.get_caller_identity()
    except Exception as error:
        return scope, None, f"who calls is unknown: {error}"
    principal = principal_of(caller["Arn"])
    scope = scope.model_copy(update={"account": caller["Account"], "role_arn": principal})
    return scope, principal, "" if principal else f"{caller['Arn']} has no policies that can be simulated"


def _try(call: Callable[..., object], probe: Mapping[str, Any], grant: Grant, scope: Scope) -> PermissionFinding:
    try:
        call(**probe)
    except Exception as error:
        code, status = _code_and_status(error)
        if code in ACCESS_DENIED:
            return _denied(grant, scope, str(error))
        if not 400 <= status < 500 or "Throttl" in code:
            return _unknown(grant, f"AWS did not answer: {error}")
        return _allowed(grant, f"AWS answered {code} to a call about nothing, and not that it is denied")
    return _allowed(grant, "AWS answered")


def _simulate(grant: Grant, scope: Scope, iam: Any, principal: str | None, why: str) -> PermissionFinding:
    if principal is None:
        return _unknown(grant, why)
    resources = [*grant.resources(scope)]
    if not resources:
        return _unknown(grant, f"{grant.needs} is not given")
    context = [
        {"ContextKeyName": key, "ContextKeyValues": [value], "ContextKeyType": "string"}
        for key, value in grant.conditions(scope).items()
    ]
    try:
        answer = iam.simulate_principal_policy(
            PolicySourceArn=principal,
            ActionNames=[grant.action],
            ResourceArns=resources,
            ContextEntries=context,
        )
    except Exception as error:
        return _unknown(grant, f"it changes something, so it is not tried, and IAM cannot be asked: {error}")
    refused = [result for result in answer["EvaluationResults"] if result["EvalDecision"] != "allowed"]
    if not refused:
        return _allowed(grant, "IAM's policy simulator says so")
    on = ", ".join(result.get("EvalResourceName", "*") for result in refused)
    explicitly = any(result["EvalDecision"] == "explicitDeny" for result in refused)
    detail = f"IAM's policy simulator says it is denied on {on}"
    return _denied(grant, scope, detail + "; a Deny statement has to go, too" * explicitly)


def _code_and_status(error: Exception) -> tuple[str, int]:
    response: dict[str, Any] = getattr(error, "response", {})
    return (
        response.get("Error", {}).get("Code", type(error).__name__),
        response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0),
    )


def _allowed(grant: Grant, detail: str) -> PermissionFinding:
    return PermissionFinding(action=grant.action, verdict="allowed", detail=detail)


def _unknown(grant: Grant, detail: str) -> PermissionFinding:
    return PermissionFinding(action=grant.action, verdict="not verifiable", detail=detail)


def _denied(grant: Grant, scope: Scope, detail: str) -> PermissionFinding:
    statement = as_json(statement_for(grant.action, scope))
    return PermissionFinding(action=grant.action, verdict="denied", detail=detail, statement=statement)
