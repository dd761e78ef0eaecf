"""Which incident an alarm belongs to."""

import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.alarm_messages import Ignored
from domain.alarm_rules import IncidentTarget, safe_name, target_of
from domain.alarms import AlarmChange, AlarmMetric, AlarmState
from domain.policy import AlarmRule, IntakePolicy, Policy

SONNET = "anthropic.claude-3-sonnet-20240229-v1:0"
PROVISIONED = "arn:aws:bedrock:ap-northeast-1:123456789012:provisioned-model/abc123def456"
THROTTLE = IncidentTarget(key="bedrock-throttle:sonnet", runbook="throttle", model="sonnet")


def change(
    name: str = "any", *, metric: str = "InvocationThrottles", model: str | None = None, children: tuple[str, ...] = ()
) -> AlarmChange:
    metrics = (AlarmMetric(namespace="AWS/Bedrock", name=metric, dimensions={"ModelId": model}),) if model else ()
    return AlarmChange(
        alarm_name=name,
        state=AlarmState.ALARM,
        changed_at=datetime(2026, 11, 23, tzinfo=UTC),
        metrics=metrics,
        children=children,
        source="sns",
        message_id="1",
    )


@pytest.mark.parametrize(
    "model",
    [
        SONNET,
        SONNET + ":28k",
        "sonnet",
        f"arn:aws:bedrock:ap-northeast-1::foundation-model/{SONNET}",
    ],
)
def test_the_model_is_found_by_any_of_its_names(model: str) -> None:
    assert target_of(change(model=model), Policy()) == THROTTLE


def test_a_provisioned_arn_needs_to_be_known() -> None:
    alarm = change(model=PROVISIONED)
    foundation = f"arn:aws:bedrock:ap-northeast-1::foundation-model/{SONNET}"
    assert target_of(alarm, Policy(), {PROVISIONED: foundation}) == THROTTLE
    unknown = target_of(alarm, Policy())
    assert isinstance(unknown, IncidentTarget)
    assert unknown.runbook is None
    assert target_of(change("BedrockThrottle-x", model=PROVISIONED), Policy()) == THROTTLE, "falls to the next rule"


def test_the_first_rule_that_fits_wins() -> None:
    rules = (
        AlarmRule(alarm_name="Prod *", metric="InvocationThrottles", key="first", runbook="throttle"),
        AlarmRule(dimension="ModelId", key="second:{model}", runbook="throttle"),
        AlarmRule(alarm_name="prod *", key="third:haiku", runbook="throttle"),
    )
    policy = Policy(alarm_rules=rules)

    def key(alarm: AlarmChange) -> str:
        target = target_of(alarm, policy)
        assert isinstance(target, IncidentTarget)
        return target.key

    assert key(change("Prod a", model=SONNET)) == "first"
    assert key(change("Prod a", metric="Invocations", model=SONNET)) == "second:sonnet"
    assert key(change("prod a")) == "third:haiku"
    assert key(change("prod a", model="gpt")) == "third:haiku", "a model nobody knows"
    assert key(change("PROD")).startswith("triage:")


def test_a_composite_alarm_goes_by_its_own_name_then_by_its_children() -> None:
    arn = "arn:aws:cloudwatch:ap-northeast-1:123456789012:alarm:BedrockThrottle: a"
    assert target_of(change("all", children=("other", arn)), Policy()) == THROTTLE
    rules = (
        AlarmRule(alarm_name="BedrockThrottle*", key="child", runbook="throttle"),
        AlarmRule(alarm_name="all", key="own", runbook="throttle"),
    )
    target = target_of(change("all", children=(arn,)), Policy(alarm_rules=rules))
    assert isinstance(target, IncidentTarget)
    assert target.key == "own"


def test_alarms_of_others_are_ignored() -> None:
    policy = Policy(intake=IntakePolicy(ignored_alarms=("TargetTracking-*",)))
    assert isinstance(target_of(change("TargetTracking-x", model=SONNET), policy), Ignored)


@given(st.text(min_size=1, max_size=255), st.text(min_size=1, max_size=255))
def test_triage_keys_are_plain_and_keep_alarms_apart(one: str, other: str) -> None:
    names = [safe_name(one), safe_name(other)]
    assert all(re.fullmatch(r"[A-Za-z0-9._:-]{1,110}", name) for name in names)
    assert (names[0] == names[1]) == (one == other)
    assert safe_name("Latency-p99") == "Latency-p99"
    target = target_of(change(one), Policy(alarm_rules=()))
    assert target == IncidentTarget(key=f"triage:{names[0]}", runbook=None, model=None)
