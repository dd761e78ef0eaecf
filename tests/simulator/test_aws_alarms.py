"""Contract of CloudWatch alarms. Each test names the AWS document it follows."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.exceptions import ClientError

from domain.alarm_messages import parse_alarm
from domain.alarms import AlarmChange
from simulator.aws.alarms import CompositeRule, Rule, Slot, evaluate
from simulator.aws.errors import AwsError
from tests.aws_account import Account, eventually

RETAIN = "retain"
DIMENSIONS = [{"Name": "ModelId", "Value": "sonnet"}]


class Watched:
    """A topic and a default bus that both end in queues."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.cloudwatch = account.client("cloudwatch")
        self.topic = account.client("sns").create_topic(Name="alarms")["TopicArn"]
        self.sns_queue, sns_arn = account.queue("from-sns")
        account.client("sns").subscribe(TopicArn=self.topic, Protocol="sqs", Endpoint=sns_arn)
        self.event_queue, event_arn = account.queue("from-events")
        events, pattern = account.client("events"), {"source": ["aws.cloudwatch"]}
        events.put_rule(Name="alarms", EventPattern=json.dumps(pattern))
        events.put_targets(Rule="alarms", Targets=[{"Id": "queue", "Arn": event_arn}])

    def put(self, *values: float, **more: Any) -> None:
        """One value in each of the last complete minutes, the last value in the newest."""
        newest = datetime.now(UTC).replace(second=1, microsecond=0) - timedelta(minutes=1)
        self.cloudwatch.put_metric_data(
            Namespace="AWS/Bedrock",
            MetricData=[
                {
                    "MetricName": "InvocationThrottles",
                    "Dimensions": DIMENSIONS,
                    "Timestamp": newest - timedelta(minutes=age),
                    **(more or {"Value": value}),
                }
                for age, value in enumerate(reversed(values))
            ],
        )

    def alarm(self, name: str = "throttles", **more: Any) -> None:
        """An alarm on those minutes, that tells the topic."""
        settings: dict[str, Any] = {
            "Namespace": "AWS/Bedrock",
            "MetricName": "InvocationThrottles",
            "Dimensions": DIMENSIONS,
            "Statistic": "Sum",
            "Period": 60,
            "EvaluationPeriods": 1,
            "Threshold": 0,
            "ComparisonOperator": "GreaterThanThreshold",
        }
        actions = {key: [self.topic] for key in ("AlarmActions", "OKActions", "InsufficientDataActions")}
        settings |= actions | more
        self.cloudwatch.put_metric_alarm(
            AlarmName=name, **{key: value for key, value in settings.items() if value is not None}
        )

    def state(self, name: str = "throttles") -> str:
        return str(self.cloudwatch.describe_alarms(AlarmNames=[name])["MetricAlarms"][0]["StateValue"])

    def becomes(self, state: str, name: str = "throttles") -> None:
        eventually(lambda: self.state(name), lambda found: found == state)

    def message(self) -> Any:
        """CloudWatch's JSON in the next SNS notification."""
        return json.loads(self.account.messages(self.sns_queue, 1)[0]["Message"])

    def event(self) -> Any:
        return self.account.messages(self.event_queue, 1)[0]


@pytest.fixture
def watched(account: Account) -> Watched:
    return Watched(account)


def slots(picture: str) -> list[Slot]:
    """AWS's notation: `0` within the threshold, `X` breaching, `-` missing; oldest first."""
    values = {"0": 0.0, "X": 1.0, "-": None}
    return [Slot(60 * number, values[sign]) for number, sign in enumerate(picture.split())]


@pytest.mark.parametrize(
    ("datapoints_to_alarm", "picture", "missing", "ignore", "breaching", "not_breaching"),
    [
        (3, "0 - X - X", "OK", "OK", "OK", "OK"),
        (3, "- - - - 0", "OK", "OK", "OK", "OK"),
        (3, "- - - - -", "INSUFFICIENT_DATA", RETAIN, "ALARM", "OK"),
        (3, "0 X X - X", "ALARM", "ALARM", "ALARM", "ALARM"),
        (3, "- - X - -", "ALARM", RETAIN, "ALARM", "OK"),
        (2, "0 - X - X", "ALARM", "ALARM", "ALARM", "ALARM"),
        (2, "0 0 X 0 X", "ALARM", "ALARM", "ALARM", "ALARM"),
        (2, "0 - X - -", "OK", "OK", "ALARM", "OK"),
        (2, "- - - - 0", "OK", "OK", "ALARM", "OK"),
        (2, "- - - X -", "ALARM", RETAIN, "ALARM", "OK"),
    ],
)
def test_the_two_tables_on_missing_data(
    datapoints_to_alarm: int, picture: str, missing: str, ignore: str, breaching: str, not_breaching: str
) -> None:
    """User guide, "Configuring how CloudWatch alarms treat missing data": both tables, every cell."""
    found = {}
    for treatment in ("missing", "ignore", "breaching", "notBreaching"):
        verdict = evaluate(Rule("GreaterThanThreshold", 0.5, 3, datapoints_to_alarm, treatment), slots(picture))
        found[treatment] = verdict.state if verdict else RETAIN
    assert found == {"missing": missing, "ignore": ignore, "breaching": breaching, "notBreaching": not_breaching}


@pytest.mark.parametrize(
    ("comparison", "breaching"),
    [
        ("GreaterThanThreshold", [6]),
        ("GreaterThanOrEqualToThreshold", [5, 6]),
        ("LessThanThreshold", [4]),
        ("LessThanOrEqualToThreshold", [4, 5]),
    ],
)
def test_comparison_operators(comparison: str, breaching: list[int]) -> None:
    """API reference, PutMetricAlarm, ComparisonOperator."""
    verdicts = {value: evaluate(Rule(comparison, 5, 1, 1), [Slot(0, value)]) for value in (4, 5, 6)}
    assert [value for value, verdict in verdicts.items() if verdict and verdict.state == "ALARM"] == breaching


def test_composite_rules() -> None:
    """API reference, PutCompositeAlarm, AlarmRule: functions of state, NOT before AND before OR, brackets."""
    states = {"a b": "ALARM", "b": "OK", "c": "INSUFFICIENT_DATA"}
    arn = "arn:aws:cloudwatch:ap-northeast-1:123456789012:alarm:b"
    for text, holds in {
        'ALARM("a b")': True,
        "ALARM(b)": False,
        f"OK({arn})": True,
        "INSUFFICIENT_DATA(c) AND NOT ALARM(b)": True,
        'ALARM(b) AND ALARM(c) OR ALARM("a b")': True,
        'ALARM(b) AND (ALARM(c) OR ALARM("a b"))': False,
        "NOT (OK(b) OR OK(c))": False,
        "TRUE AND NOT FALSE": True,
    }.items():
        assert CompositeRule(text).holds(states) is holds, text
    for text in ("", "ALARM()", "ALARM(b", "ALARM(b) OK(c)", "MAYBE(b)", "ALARM(b) AND", "(TRUE"):
        with pytest.raises(AwsError, match="malformed"):
            CompositeRule(text)


def test_m_of_n_on_data_tells_sns_and_eventbridge(watched: Watched) -> None:
    """API reference, PutMetricAlarm: new alarms start in INSUFFICIENT_DATA; messages as received from AWS."""
    watched.put(7, 0, 3)
    watched.alarm(EvaluationPeriods=3, DatapointsToAlarm=2, AlarmDescription="Bedrock refuses calls")
    message = watched.message()
    envelope_free = {"AlarmConfigurationUpdatedTimestamp", "StateChangeTime", "NewStateReason"}
    arn = "arn:aws:cloudwatch:ap-northeast-1:123456789012:alarm:throttles"
    assert {key: value for key, value in message.items() if key not in envelope_free} == {
        "AlarmName": "throttles",
        "AlarmDescription": "Bedrock refuses calls",
        "AWSAccountId": "123456789012",
        "NewStateValue": "ALARM",
        "Region": "Asia Pacific (Tokyo)",
        "AlarmArn": arn,
        "OldStateValue": "INSUFFICIENT_DATA",
        "OKActions": [watched.topic],
        "AlarmActions": [watched.topic],
        "InsufficientDataActions": [watched.topic],
        "Trigger": {
            "MetricName": "InvocationThrottles",
            "Namespace": "AWS/Bedrock",
            "StatisticType": "Statistic",
            "Statistic": "SUM",
            "Unit": None,
            "Dimensions": [{"value": "sonnet", "name": "ModelId"}],
            "Period": 60,
            "EvaluationPeriods": 3,
            "DatapointsToAlarm": 2,
            "ComparisonOperator": "GreaterThanThreshold",
            "Threshold": 0.0,
            "TreatMissingData": "missing",
            "EvaluateLowSampleCountPercentile": "",
        },
    }
    assert message["StateChangeTime"].endswith("+0000")
    assert message["NewStateReason"].startswith("Threshold Crossed: 2 out of the last 3 datapoints [3.0 (")
    assert message["NewStateReason"].endswith(
        "were greater than the threshold (0.0) (minimum 2 datapoints for OK -> ALARM transition)."
    )
    event = watched.event()
    assert event["detail-type"] == "CloudWatch Alarm State Change"
    assert (event["source"], event["account"], event["resources"]) == ("aws.cloudwatch", "123456789012", [arn])
    detail = event["detail"]
    assert detail["previousState"]["value"] == "INSUFFICIENT_DATA"
    assert detail["state"]["value"] == "ALARM"
    assert detail["state"]["timestamp"] == message["StateChangeTime"]
    assert json.loads(detail["state"]["reasonData"])["recentDatapoints"] == [7.0, 0.0, 3.0]
    [metric] = detail["configuration"]["metrics"]
    assert metric["returnData"] is True
    assert metric["metricStat"] == {
        "metric": {"namespace": "AWS/Bedrock", "name": "InvocationThrottles", "dimensions": {"ModelId": "sonnet"}},
        "period": 60,
        "stat": "Sum",
    }
    items = watched.cloudwatch.describe_alarm_history(AlarmName="throttles", ScanBy="TimestampAscending")
    kinds = [item["HistoryItemType"] for item in items["AlarmHistoryItems"]]
    assert kinds == ["ConfigurationUpdate", "StateUpdate", "Action"]
    assert items["AlarmHistoryItems"][1]["HistorySummary"] == "Alarm updated from INSUFFICIENT_DATA to ALARM"


def test_the_product_reads_what_is_sent(watched: Watched) -> None:
    """The intake's parser understands both messages alike."""
    watched.put(7)
    watched.alarm()
    [envelope] = watched.account.messages(watched.sns_queue, 1)
    from_sns, from_event = parse_alarm(json.dumps(envelope)), parse_alarm(json.dumps(watched.event()))
    assert isinstance(from_sns, AlarmChange)
    assert isinstance(from_event, AlarmChange)
    assert (from_sns.alarm_arn, from_sns.state, from_sns.changed_at) == (
        from_event.alarm_arn,
        "ALARM",
        from_event.changed_at,
    )
    assert from_sns.metrics == from_event.metrics


def test_percentile_alarm(watched: Watched) -> None:
    """API reference, PutMetricAlarm, EvaluateLowSampleCountPercentile: p99 over fewer than 1,000 samples is ignored."""
    watched.put(0, Values=[100, 9000], Counts=[98, 2])
    p99: dict[str, Any] = {"Statistic": None, "ExtendedStatistic": "p99", "Threshold": 3000}
    watched.alarm("evaluated", **p99, EvaluateLowSampleCountPercentile="evaluate")
    watched.alarm("ignored", **p99, EvaluateLowSampleCountPercentile="ignore")
    trigger = watched.message()["Trigger"]
    assert (trigger["StatisticType"], trigger["ExtendedStatistic"]) == ("ExtendedStatistic", "p99")
    assert "Statistic" not in trigger
    assert watched.state("ignored") == "INSUFFICIENT_DATA"
    watched.put(0, Values=[100, 9000], Counts=[980, 20])
    watched.becomes("ALARM", "ignored")


def test_metric_math_alarm(watched: Watched) -> None:
    """User guide, "Create an alarm based on a metric math expression": one query returns data."""
    watched.put(5)
    metric = {"Namespace": "AWS/Bedrock", "MetricName": "InvocationThrottles", "Dimensions": DIMENSIONS}
    queries: list[dict[str, Any]] = [
        {"Id": "t", "MetricStat": {"Metric": metric, "Period": 60, "Stat": "Sum"}, "ReturnData": False},
        {"Id": "half", "Expression": "t / 2", "Label": "half", "ReturnData": True},
    ]
    plain: dict[str, Any] = dict.fromkeys(("Namespace", "MetricName", "Dimensions", "Statistic", "Period"))
    watched.alarm(**plain, Metrics=queries, Threshold=2)
    message, event = watched.message(), watched.event()
    trigger = message["Trigger"]
    assert "MetricName" not in trigger
    assert trigger["Period"] == 60
    assert trigger["Metrics"][0]["MetricStat"]["Metric"]["Dimensions"] == [{"value": "sonnet", "name": "ModelId"}]
    assert trigger["Metrics"][1] == {"Expression": "t / 2", "Id": "half", "Label": "half", "ReturnData": True}
    assert [item["returnData"] for item in event["detail"]["configuration"]["metrics"]] == [False, True]
    described = watched.cloudwatch.describe_alarms()["MetricAlarms"][0]
    assert [query["Id"] for query in described["Metrics"]] == ["t", "half"]
    for query in queries:
        query["ReturnData"] = True
    with pytest.raises(ClientError, match="Exactly one"):
        watched.alarm("two", **plain, Metrics=queries)


def test_set_alarm_state_fires_and_the_real_state_returns(watched: Watched) -> None:
    """API reference, SetAlarmState: actions fire; the alarm returns to its actual state at the next evaluation."""
    watched.alarm(Period=1, TreatMissingData="notBreaching")
    watched.becomes("OK")
    assert watched.message()["OldStateValue"] == "INSUFFICIENT_DATA"
    watched.cloudwatch.set_alarm_state(AlarmName="throttles", StateValue="ALARM", StateReason="testing")
    forced, returned = watched.message(), watched.message()
    assert (forced["NewStateValue"], forced["NewStateReason"]) == ("ALARM", "testing")
    assert (returned["OldStateValue"], returned["NewStateValue"]) == ("ALARM", "OK")
    assert "1 missing datapoint was treated as [NonBreaching]" in returned["NewStateReason"]
    for parameters, code in (
        ({"AlarmName": "nobody", "StateValue": "OK"}, "ResourceNotFound"),
        ({"AlarmName": "throttles", "StateValue": "FINE"}, "ValidationError"),
        ({"AlarmName": "throttles", "StateValue": "OK", "StateReasonData": "{"}, "InvalidFormat"),
    ):
        with pytest.raises(ClientError, match=code):
            watched.cloudwatch.set_alarm_state(StateReason="testing", **parameters)


def test_composite_alarm(watched: Watched) -> None:
    """API reference, PutCompositeAlarm; user guide, "Alarm events and EventBridge", composite alarms."""
    watched.put(7)
    watched.alarm("a", AlarmActions=[], Threshold=100)
    watched.alarm("b", AlarmActions=[], OKActions=[])
    watched.becomes("OK", "a")
    watched.becomes("ALARM", "b")
    assert watched.message()["AlarmName"] == "a"
    watched.account.messages(watched.event_queue, 2)
    with pytest.raises(ClientError, match="nobody"):
        watched.cloudwatch.put_composite_alarm(AlarmName="c", AlarmRule="ALARM(nobody)")
    rule = 'ALARM("b") AND NOT ALARM("a")'
    watched.cloudwatch.put_composite_alarm(AlarmName="both", AlarmRule=rule, AlarmActions=[watched.topic])
    message, event = watched.message(), watched.event()
    assert (message["AlarmName"], message["NewStateValue"], message["AlarmRule"]) == ("both", "ALARM", rule)
    assert "Trigger" not in message
    assert [child["Arn"].rsplit(":", 1)[-1] for child in message["TriggeringChildren"]] == ["b"]
    assert event["detail"]["configuration"]["alarmRule"] == rule
    assert json.loads(event["detail"]["state"]["reasonData"])["triggeringAlarms"][0]["state"]["value"] == "ALARM"
    assert [alarm["AlarmName"] for alarm in watched.cloudwatch.describe_alarms()["MetricAlarms"]] == ["a", "b"]
    found = watched.cloudwatch.describe_alarms(AlarmTypes=["CompositeAlarm"])["CompositeAlarms"]
    assert [(alarm["AlarmName"], alarm["AlarmRule"]) for alarm in found] == [("both", rule)]


def test_actions_disabled_or_failing(watched: Watched) -> None:
    """API reference, ActionsEnabled: no notification, but the event; a topic that is gone shows in the history."""
    watched.put(7)
    watched.alarm("silent", ActionsEnabled=False)
    assert watched.event()["detail"]["alarmName"] == "silent"
    watched.alarm("lost", AlarmActions=[f"{watched.topic}-gone"])
    eventually(
        lambda: watched.cloudwatch.describe_alarm_history(AlarmName="lost", HistoryItemType="Action"),
        lambda found: any("Failed to execute" in item["HistorySummary"] for item in found["AlarmHistoryItems"]),
    )
    assert "Messages" not in watched.account.client("sqs").receive_message(QueueUrl=watched.sns_queue)


def test_update_keeps_the_state(watched: Watched) -> None:
    """API reference, PutMetricAlarm: an updated alarm keeps its state until it is evaluated."""
    watched.put(7)
    watched.alarm()
    watched.becomes("ALARM")
    first = watched.message()
    watched.alarm(AlarmDescription="clearer", Threshold=1)
    assert watched.state() == "ALARM"
    watched.alarm(Threshold=100)
    second = watched.message()
    assert (first["NewStateValue"], second["NewStateValue"]) == ("ALARM", "OK")
    assert second["NewStateReason"].endswith(
        "was not greater than the threshold (100.0) (minimum 1 datapoint for ALARM -> OK transition)."
    )


def test_describe_alarms_filters_and_pages(watched: Watched) -> None:
    """API reference, DescribeAlarms: filters, MaxRecords, NextToken."""
    watched.put(7)
    for number in range(3):
        watched.alarm(f"one-{number}", AlarmActions=[], OKActions=[])
    watched.alarm("two")
    watched.becomes("ALARM", "two")

    def names(**query: Any) -> list[str]:
        pages = watched.cloudwatch.get_paginator("describe_alarms").paginate(**query)
        return [alarm["AlarmName"] for page in pages for alarm in page["MetricAlarms"]]

    assert names(PaginationConfig={"PageSize": 2}) == ["one-0", "one-1", "one-2", "two"]
    assert names(AlarmNamePrefix="one") == ["one-0", "one-1", "one-2"]
    assert names(AlarmNames=["two", "nobody"]) == ["two"]
    assert names(ActionPrefix="arn:aws:sns") == ["two"]
    assert names(StateValue="OK") == []
    watched.cloudwatch.delete_alarms(AlarmNames=["one-0"])
    assert names(AlarmNamePrefix="one") == ["one-1", "one-2"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"DatapointsToAlarm": 2},
        {"TreatMissingData": "never"},
        {"ComparisonOperator": "GreaterThanUpperThreshold"},
        {"Statistic": None},
        {"Statistic": None, "ExtendedStatistic": "p200"},
        {"Threshold": None},
    ],
)
def test_bad_alarms_are_refused(watched: Watched, parameters: dict[str, Any]) -> None:
    """API reference, PutMetricAlarm; anomaly detection is not simulated."""
    with pytest.raises(ClientError, match="ValidationError"):
        watched.alarm(**parameters)
    assert watched.cloudwatch.describe_alarms()["MetricAlarms"] == []


def test_a_spike_and_its_end_in_periods_of_one_second(watched: Watched) -> None:
    """Deviation: periods of 1 s; the alarm follows live data there and back."""
    watched.alarm(Period=1, TreatMissingData="notBreaching")
    watched.becomes("OK")
    metric = {"MetricName": "InvocationThrottles", "Dimensions": DIMENSIONS, "Value": 3}
    watched.cloudwatch.put_metric_data(Namespace="AWS/Bedrock", MetricData=[metric])
    assert [watched.message()["NewStateValue"] for _ in range(3)] == ["OK", "ALARM", "OK"]
