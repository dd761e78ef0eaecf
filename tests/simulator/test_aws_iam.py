"""Identity policies as IAM judges them. AWS's side: IAM user guide, "Policy evaluation logic" and "Policy elements"."""

import json

import pytest

from simulator.aws.iam import Need, judge
from tests.aws_account import Account


def allow(action: str, resource: str, **more: object) -> str:
    return json.dumps({"Statement": [{"Effect": "Allow", "Action": action, "Resource": resource, **more}]})


TAGGED = {"Condition": {"StringEquals": {"aws:ResourceTag/a": "b"}}}
DENY = json.dumps({"Statement": {"Effect": "Deny", "Action": ["sns:*"], "Resource": ["arn:aws:sns:*:*:secret"]}})


@pytest.mark.parametrize(
    ("policies", "need", "decision"),
    [
        ([], Need("sns:Publish", "arn:aws:sns:r:a:t"), "implicitDeny"),
        ([allow("sns:Publish", "*")], Need("sns:Publish", "arn:aws:sns:r:a:t"), "allowed"),
        ([allow("SNS:publish", "*")], Need("sns:Publish"), "allowed"),
        ([allow("sns:Publish", "arn:aws:sns:r:a:t?")], Need("sns:Publish", "arn:aws:sns:r:a:t"), "implicitDeny"),
        ([allow("sns:*", "*"), DENY], Need("sns:Publish", "arn:aws:sns:r:a:secret"), "explicitDeny"),
        ([allow("sns:*", "*"), DENY], Need("sns:Publish", "arn:aws:sns:r:a:t"), "allowed"),
        ([allow("x:y", "*", **TAGGED)], Need("x:y", "z", {"aws:ResourceTag/a": "b"}), "allowed"),
        ([allow("x:y", "*", **TAGGED)], Need("x:y", "z", {"aws:ResourceTag/a": "c"}), "implicitDeny"),
        ([allow("x:y", "*", **TAGGED)], Need("x:y", "z"), "implicitDeny"),
        # An allowance of one action on a wildcard does not cover the whole type unless the pattern does.
        ([allow("x:y", "arn:p/1")], Need("x:y", "arn:p/*"), "implicitDeny"),
    ],
)
def test_decisions(policies: list[str], need: Need, decision: str) -> None:
    assert judge(policies, need) == decision


def test_the_policy_simulator_answers_for_a_role(account: Account) -> None:
    """API reference, SimulatePrincipalPolicy: each action on each resource; NoSuchEntity for nobody."""
    iam = account.client("iam")
    role = iam.create_role(RoleName="r", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    document = json.loads(allow("x:y", "arn:aws:x:r:a:1", **TAGGED)) | {"Version": "2012-10-17"}
    iam.put_role_policy(RoleName="r", PolicyName="p", PolicyDocument=json.dumps(document))
    context = [{"ContextKeyName": "aws:ResourceTag/a", "ContextKeyValues": ["b"], "ContextKeyType": "string"}]
    asked = {
        "ActionNames": ["x:y", "x:z"],
        "ResourceArns": ["arn:aws:x:r:a:1", "arn:aws:x:r:a:2"],
        "ContextEntries": context,
    }
    results = iam.simulate_principal_policy(PolicySourceArn=role, **asked)["EvaluationResults"]
    assert [item["EvalDecision"] for item in results] == ["allowed", "implicitDeny", "implicitDeny", "implicitDeny"]
    with pytest.raises(iam.exceptions.NoSuchEntityException):
        iam.simulate_principal_policy(PolicySourceArn=role + "x", ActionNames=["x:y"])
