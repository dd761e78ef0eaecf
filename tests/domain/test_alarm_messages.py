"""Alarm messages in every shape they have been seen in, and in shapes nobody sends."""

import contextlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.alarm_messages import Ignored, NotAnAlarm, described_alarm, parse_alarm
from domain.alarms import AlarmChange, AlarmMetric, AlarmState

ARN = "arn:aws:cloudwatch:ap-northeast-1:123456789012:alarm:"
SONNET = "anthropic.claude-3-sonnet-20240229-v1:0"
THROTTLES = AlarmMetric(namespace="AWS/Bedrock", name="InvocationThrottles", dimensions={"ModelId": SONNET})
CALLS = AlarmMetric(namespace="AWS/Bedrock", name="Invocations", dimensions={"ModelId": SONNET})
AT = datetime(2026, 11, 23, 15, 5, 58, 466000, tzinfo=UTC)


def cloudwatch_json(**changes: Any) -> dict[str, Any]:
    """What CloudWatch publishes to SNS for a metric alarm; a change to None takes the field out."""
    message: dict[str, Any] = {
        "AlarmName": "BedrockThrottle-sonnet",
        "AlarmDescription": None,
        "AWSAccountId": "123456789012",
        "AlarmConfigurationUpdatedTimestamp": "2026-11-01T00:00:00.000+0000",
        "NewStateValue": "ALARM",
        "NewStateReason": "Threshold Crossed: 1 out of the last 1 datapoints [38.0] was greater than 0.0.",
        "StateChangeTime": "2026-11-23T15:05:58.466+0000",
        "Region": "Asia Pacific (Tokyo)",
        "AlarmArn": ARN + "BedrockThrottle-sonnet",
        "OldStateValue": "OK",
        "OKActions": [],
        "AlarmActions": ["arn:aws:sns:ap-northeast-1:123456789012:alarms"],
        "InsufficientDataActions": [],
        "Trigger": {
            "MetricName": "InvocationThrottles",
            "Namespace": "AWS/Bedrock",
            "StatisticType": "Statistic",
            "Statistic": "SUM",
            "Unit": None,
            "Dimensions": [{"value": SONNET, "name": "ModelId"}],
            "Period": 60,
            "EvaluationPeriods": 1,
            "DatapointsToAlarm": 1,
            "ComparisonOperator": "GreaterThanThreshold",
            "Threshold": 0.0,
            "TreatMissingData": "- TreatMissingData:                    missing",
            "EvaluateLowSampleCountPercentile": "",
        },
    }
    return {name: value for name, value in (message | changes).items() if value is not None}


def sns(message: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The envelope that SNS puts around a message."""
    return {
        "Type": "Notification",
        "MessageId": "5d1b2e5c-0c1a-5f0e-8b8e-7d7c8b6a5f4e",
        "TopicArn": "arn:aws:sns:ap-northeast-1:123456789012:alarms",
        "Subject": 'ALARM: "BedrockThrottle-sonnet" in Asia Pacific (Tokyo)',
        "Message": json.dumps(message),
        "Timestamp": "2026-11-23T15:05:58.511Z",
        "SignatureVersion": "1",
        "Signature": "x",
        "SigningCertURL": "https://sns.ap-northeast-1.amazonaws.com/x.pem",
        "UnsubscribeURL": "https://sns.ap-northeast-1.amazonaws.com/?Action=Unsubscribe",
    } | changes


def stat(id_: str, metric: AlarmMetric, returns: object = False) -> dict[str, Any]:
    """A metric of a math alarm as SNS tells it."""
    dimensions = [{"name": name, "value": value} for name, value in metric.dimensions.items()]
    return {
        "Id": id_,
        "MetricStat": {
            "Metric": {"Dimensions": dimensions, "MetricName": metric.name, "Namespace": metric.namespace},
            "Period": 60,
            "Stat": "Sum",
        },
        "ReturnData": returns,
    }


def math(*metrics: dict[str, Any]) -> dict[str, Any]:
    """An alarm on metric math: its trigger names no metric."""
    return cloudwatch_json(Trigger={"Period": 60, "EvaluationPeriods": 1, "Threshold": 1.0, "Metrics": list(metrics)})


def eventbridge(*, kind: str = "CloudWatch Alarm State Change", **detail: Any) -> dict[str, Any]:
    """The event for the alarm of `cloudwatch_json`."""
    metric = {"namespace": "AWS/Bedrock", "name": "InvocationThrottles", "dimensions": {"ModelId": SONNET}}
    return {
        "version": "0",
        "id": "c4c1c1c9-6542-e61b-6ef0-8c4d36933a92",
        "detail-type": kind,
        "source": "aws.cloudwatch",
        "account": "123456789012",
        "time": "2026-11-23T15:05:58Z",
        "region": "ap-northeast-1",
        "resources": [ARN + "BedrockThrottle-sonnet"],
        "detail": {
            "alarmName": "BedrockThrottle-sonnet",
            "configuration": {
                "metrics": [
                    {"id": "m1", "metricStat": {"metric": metric, "period": 60, "stat": "Sum"}, "returnData": True}
                ]
            },
            "state": {
                "value": "ALARM",
                "reason": "Threshold Crossed",
                "reasonData": "{}",
                "timestamp": "2026-11-23T15:05:58.466+0000",
            },
        }
        | detail,
    }


def parsed(message: dict[str, Any]) -> AlarmChange:
    change = parse_alarm(json.dumps(message))
    assert isinstance(change, AlarmChange)
    return change


def test_the_three_shapes_tell_the_same_change() -> None:
    changes = [parsed(sns(cloudwatch_json())), parsed(cloudwatch_json()), parsed(eventbridge())]
    for change in changes:
        assert change.alarm_name == "BedrockThrottle-sonnet"
        assert change.alarm_arn == ARN + "BedrockThrottle-sonnet"
        assert change.state is AlarmState.ALARM
        assert change.changed_at == AT
        assert change.metrics == (THROTTLES,)
        assert not change.suppressed
    assert [change.message_id for change in changes] == [
        "5d1b2e5c-0c1a-5f0e-8b8e-7d7c8b6a5f4e",
        "BedrockThrottle-sonnet@2026-11-23T15:05:58.466000+00:00",
        "c4c1c1c9-6542-e61b-6ef0-8c4d36933a92",
    ]
    assert [change.source for change in changes] == ["sns", "sns", "eventbridge"]
    assert [change.previous_state for change in changes] == [AlarmState.OK, AlarmState.OK, None]
    assert parsed(sns(eventbridge())) == changes[2], "a rule whose target is a topic"


HAIKU_CALLS = AlarmMetric(namespace="AWS/Bedrock", name="Invocations", dimensions={"ModelId": "haiku"})


@pytest.mark.parametrize(
    ("message", "metrics"),
    [
        pytest.param(
            math(
                stat("m2", CALLS),
                stat("m3", HAIKU_CALLS, "false"),
                {"Expression": "100 * rate", "Id": "e1", "Label": "m3", "ReturnData": "true"},
                {"Expression": "m1 / (m1 + m2)", "Id": "rate", "Label": "", "ReturnData": "false"},
                stat("m1", THROTTLES),
            ),
            (THROTTLES, CALLS),
            id="through-the-expression-that-returns",
        ),
        pytest.param(
            math(stat("m1", THROTTLES, True), {"Expression": "ANOMALY_DETECTION_BAND(m1, 2)", "Id": "ad1"}),
            (THROTTLES,),
            id="anomaly-two-return",
        ),
        pytest.param(
            math(
                stat("t1", THROTTLES), stat("c1", CALLS), {"Expression": "SUM(METRICS())", "Id": "e1", "ReturnData": 1}
            ),
            (THROTTLES, CALLS),
            id="all-metrics-and-nothing-returns",
        ),
        pytest.param(
            math({"Expression": "e2", "Id": "e1"}, {"Expression": "e1 + m1", "Id": "e2"}, stat("m1", THROTTLES)),
            (THROTTLES,),
            id="expressions-in-a-circle",
        ),
        pytest.param(
            math({"Expression": 'IF(m1 > 0, m1, "c1")', "Id": "e1"}, stat("m1", THROTTLES), stat("c1", CALLS)),
            (THROTTLES,),
            id="an-id-in-quotes-is-text",
        ),
        pytest.param(
            cloudwatch_json(
                Trigger={
                    "MetricName": "InvocationLatency",
                    "Namespace": "AWS/Bedrock",
                    "StatisticType": "ExtendedStatistic",
                    "ExtendedStatistic": "p99",
                    "Dimensions": [{"name": "ModelId", "value": SONNET}],
                    "EvaluateLowSampleCountPercentile": "ignore",
                }
            ),
            (AlarmMetric(namespace="AWS/Bedrock", name="InvocationLatency", dimensions={"ModelId": SONNET}),),
            id="percentile",
        ),
        pytest.param(cloudwatch_json(Trigger={"Metrics": "none"}), (), id="a-trigger-that-says-nothing"),
        pytest.param(cloudwatch_json(Trigger=[1, 2]), (), id="a-trigger-that-is-none"),
        pytest.param(
            cloudwatch_json(Trigger={"MetricName": "M", "Dimensions": [{"name": 1}, None, {"value": "x"}]}),
            (AlarmMetric(namespace="", name="M"),),
            id="dimensions-that-are-none",
        ),
    ],
)
def test_the_metrics_that_matter(message: dict[str, Any], metrics: tuple[AlarmMetric, ...]) -> None:
    assert parsed(sns(message)).metrics == metrics


def test_composite_alarms_name_their_children() -> None:
    rule = f"""(ALARM("a, b") OR ALARM({ARN}c)) AND NOT OK('d') AND TRUE"""
    triggered = cloudwatch_json(
        Trigger=None, AlarmRule=rule, TriggeringChildren=[{"Arn": ARN + "c", "State": {"Value": "ALARM"}}]
    )
    assert parsed(sns(triggered)).children == (ARN + "c",)
    assert parsed(sns(cloudwatch_json(Trigger=None, AlarmRule=rule, TriggeringChildren=[]))).children == (
        "a, b",
        ARN + "c",
        "d",
    )
    data = json.dumps({"triggeringAlarms": [{"arn": ARN + "c", "state": {"value": "ALARM"}}]})
    state = {"value": "ALARM", "reasonData": data, "timestamp": "2026-11-23T15:05:58.466+0000"}
    change = parsed(eventbridge(configuration={"alarmRule": rule}, state=state))
    assert (change.children, change.metrics) == ((ARN + "c",), ())
    broken = parsed(eventbridge(configuration={"alarmRule": rule}, state=state | {"reasonData": "{"}))
    assert broken.children == ("a, b", ARN + "c", "d")


def test_old_notifications_odd_names_and_unknown_fields() -> None:
    old = cloudwatch_json(
        AlarmName='Latency "p99" / 3s & fallbacks <=30% 漫画',
        AlarmArn=None,
        OKActions=None,
        AlarmActions=None,
        Trigger=None,
        NewStateValue="INSUFFICIENT_DATA",
        NewStateReason="Setting state to ALARM for testing",
        NewField={"x": [1]},
    )
    change = parsed(sns(old, NewEnvelopeField=1))
    assert change.alarm_name == 'Latency "p99" / 3s & fallbacks <=30% 漫画'
    assert change.alarm_arn is None
    assert change.state is AlarmState.INSUFFICIENT_DATA
    assert change.reason == "Setting state to ALARM for testing"
    without_time = parsed(sns(cloudwatch_json(StateChangeTime=None)))
    assert without_time.changed_at == datetime(2026, 11, 23, 15, 5, 58, 511000, tzinfo=UTC), "the envelope's"


@pytest.mark.parametrize(
    "event",
    [
        eventbridge(muteDetail={"mutedByArn": "arn:aws:cloudwatch:x", "muteWindowEnd": "2026-11-23T16:00:00Z"}),
        eventbridge(
            state={"value": "ALARM", "timestamp": "2026-11-23T15:05:58.466+0000", "actionsSuppressedBy": "WaitPeriod"}
        ),
    ],
)
def test_muted_and_suppressed_events_say_so(event: dict[str, Any]) -> None:
    assert parsed(event).suppressed


@pytest.mark.parametrize(
    "message",
    [
        eventbridge(kind="CloudWatch Alarm Contributor State Change"),
        eventbridge(kind="CloudWatch Alarm Configuration Change", operation="update"),
        sns({}, Type="SubscriptionConfirmation", Message="You have chosen to subscribe"),
        sns({}, Type="UnsubscribeConfirmation"),
    ],
)
def test_what_is_understood_and_starts_nothing(message: dict[str, Any]) -> None:
    assert isinstance(parse_alarm(json.dumps(message)), Ignored)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "body is not JSON"),
        ("hello", "body is not JSON"),
        ("[1]", "body is a JSON list"),
        ("null", "body is a JSON NoneType"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("x" * 1_000_000, "body is not JSON"),
        ("9" * 1_000_000, "body is not JSON"),
        ("{}", "no AlarmName; there is nothing"),
        ('{"Type": "Notification", "Message": "hi"}', "Message is not JSON"),
        ('{"Type": "Notification"}', "Message is missing"),
        (json.dumps(cloudwatch_json(NewStateValue="ALRM")), "NewStateValue is 'ALRM'; allowed are OK"),
        (json.dumps(cloudwatch_json(NewStateValue=3)), "NewStateValue is a int"),
        (json.dumps(cloudwatch_json(StateChangeTime="yesterday")), "StateChangeTime is 'yesterday'"),
        (json.dumps(cloudwatch_json(StateChangeTime="0001-01-01T00:00:00+1400")), "StateChangeTime"),
        (json.dumps(cloudwatch_json(StateChangeTime=None)), "StateChangeTime is missing"),
        (json.dumps(cloudwatch_json(AlarmName="x" * 256)), "256 characters"),
        (json.dumps(cloudwatch_json(AlarmName=" ")), "1 characters"),
        (json.dumps(cloudwatch_json(AlarmName="\ud800")), "surrogate"),
        (json.dumps(eventbridge(alarmName=None)), "alarmName is missing"),
        (json.dumps(eventbridge() | {"detail": "x"}), "alarmName is missing"),
        (json.dumps(eventbridge(kind="Order placed") | {"source": "shop"}), "detail-type is 'Order placed'"),
    ],
)
def test_what_is_no_alarm_says_why_in_a_short_line(body: str, reason: str) -> None:
    with pytest.raises(NotAnAlarm) as error:
        parse_alarm(body)
    assert reason in str(error.value)
    assert len(str(error.value)) <= 400
    assert "\n" not in str(error.value)


def test_sizes_are_cut_to_what_cloudwatch_allows() -> None:
    many = [{"name": f"d{i}", "value": "v" * 5000} for i in range(500)]
    change = parsed(
        cloudwatch_json(
            NewStateReason="r" * 100_000,
            Trigger={"MetricName": "m" * 9000, "Dimensions": many},
            TriggeringChildren=[{"Arn": "a" * 5000}] * 500,
        )
    )
    assert len(change.model_dump_json()) < 250_000


def test_described_alarms() -> None:
    alarm = {
        "AlarmName": "BedrockThrottle-sonnet",
        "AlarmArn": ARN + "BedrockThrottle-sonnet",
        "ActionsEnabled": True,
        "StateValue": "ALARM",
        "StateReason": "Threshold Crossed",
        "StateUpdatedTimestamp": datetime(2026, 11, 23, 15, 9, tzinfo=UTC),
        "StateTransitionedTimestamp": AT,
        "MetricName": "InvocationThrottles",
        "Namespace": "AWS/Bedrock",
        "Dimensions": [{"Name": "ModelId", "Value": SONNET}],
    }
    change = described_alarm(alarm)
    assert (change.metrics, change.changed_at, change.source) == ((THROTTLES,), AT, "reconcile")
    assert not change.suppressed
    assert described_alarm(alarm | {"ActionsEnabled": False}).suppressed
    composite = described_alarm(
        {"AlarmName": "c", "StateValue": "OK", "StateUpdatedTimestamp": AT, "AlarmRule": "ALARM(x)"}
    )
    assert composite.children == ("x",)
    with pytest.raises(NotAnAlarm, match="StateTransitionedTimestamp"):
        described_alarm({"AlarmName": "c", "StateValue": "OK"})


# ---------------------------------------------------------------- nobody sends these

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
LIKELY = st.sampled_from(["", "ALARM", "OK", "m1", "e1 + m1", "METRICS()", "true", "2026-11-23T15:05:58.466+0000"])


@st.composite
def broken(draw: st.DrawFn) -> str:
    """A real message with a few places, at any depth, overwritten."""
    message = draw(
        st.sampled_from(
            [
                cloudwatch_json(TriggeringChildren=[{"Arn": "x"}], AlarmRule="ALARM(x)"),
                math(stat("m1", THROTTLES), {"Expression": "m1 * 2", "Id": "e1", "ReturnData": True}),
                eventbridge(previousState={"value": "OK"}, muteDetail=None),
            ]
        )
    )
    message = json.loads(json.dumps(message))
    for _ in range(draw(st.integers(1, 4))):
        node: Any = message
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and draw(st.booleans()):
                node = node[key]
                continue
            node[key] = draw(JSON | LIKELY)
            break
    return json.dumps(sns(message) if draw(st.booleans()) else message)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=broken() | st.text(max_size=200) | JSON.map(json.dumps))
def test_whatever_comes_is_a_change_ignored_or_not_an_alarm(body: str) -> None:
    change: AlarmChange | Ignored | None = None
    with contextlib.suppress(NotAnAlarm):
        change = parse_alarm(body)
    if isinstance(change, AlarmChange):
        assert AlarmChange.model_validate_json(change.model_dump_json()) == change, "Temporal can carry it"
