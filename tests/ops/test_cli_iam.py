"""`runbooks iam policy` as its user sees it: JSON alone on stdout, what is left out on stderr, wrong values named."""

import json

import pytest
from typer.testing import CliRunner

from domain.people import AwsRole
from ops.cli_iam import iam
from ops.service import ExitCode

ENV = {
    "COLUMNS": "160",
    "RUNBOOKS_AWS_REGION": "eu-west-1",
    "RUNBOOKS_PAGE_TOPIC_ARN": "arn:aws:sns:eu-west-1:123456789012:pages",
    "RUNBOOKS_ALARM_QUEUE_URL": "https://sqs.eu-west-1.amazonaws.com/123456789012/alarms",
    "RUNBOOKS_DEAD_LETTER_QUEUE_URL": "https://sqs.eu-west-1.amazonaws.com/123456789012/dead",
}


@pytest.mark.parametrize("role", AwsRole)
def test_a_policy_ready_to_paste(role: AwsRole) -> None:
    """Account and region are those of the settings; nothing applies to everything that need not."""
    result = CliRunner(env=ENV).invoke(iam, ["policy", "--role", role, "--role-name", "runbooks"])
    assert (result.exit_code, result.stderr) == (ExitCode.OK, "")
    document = json.loads(result.stdout)
    assert document["Version"] == "2012-10-17"
    for statement in document["Statement"]:
        for resource in [statement["Resource"]] if isinstance(statement["Resource"], str) else statement["Resource"]:
            # A cross-region inference profile calls the foundation model in regions of its own choice.
            assert resource == "*" or "123456789012" in resource or ":foundation-model/anthropic." in resource
    resources = {statement["Action"]: statement["Resource"] for statement in document["Statement"]}
    if role is AwsRole.INTAKE:
        assert resources["sqs:ReceiveMessage"] == "arn:aws:sqs:eu-west-1:123456789012:alarms"
        assert resources["sqs:SendMessage"] == "arn:aws:sqs:eu-west-1:123456789012:dead"


def test_options_go_over_the_settings_and_gaps_are_said() -> None:
    env = ENV | {"RUNBOOKS_PAGE_TOPIC_ARN": None}
    asked = ["policy", "--role", "worker", "--account", "210987654321", "--region", "us-west-2"]
    result = CliRunner(env=env).invoke(iam, asked)
    assert "arn:aws:ecs:us-west-2:210987654321:service/mangaassist/orchestrator" in result.stdout
    assert "sns:Publish is left out: RUNBOOKS_PAGE_TOPIC_ARN is not given" in result.stderr
    assert "iam:SimulatePrincipalPolicy is left out" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--account", "1234", "'1234' is not allowed; allowed is 12 digits"),
        ("--region", "Tokyo", "'Tokyo' is not allowed; allowed is a region's name"),
        ("--role-name", "a b", "'a b' is not allowed; allowed is an IAM role's name"),
        ("--role", "boss", "'boss' is not one of 'worker', 'intake', 'api'"),
    ],
)
def test_wrong_values_are_named(option: str, value: str, said: str) -> None:
    result = CliRunner(env=ENV).invoke(iam, ["policy", "--role", "worker", option, value])
    assert result.exit_code == ExitCode.USAGE
    assert said in result.stderr
