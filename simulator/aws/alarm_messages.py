"""What CloudWatch says about an alarm's change: the JSON in its SNS notification, and its EventBridge event.

Sources: notifications as received, and the CloudWatch user guide, "Alarm events and EventBridge".
"""

import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

import botocore.session
from moto.cloudwatch.models import CloudWatchBackend

from simulator.aws.alarms import aws_time


def sns_message(backend: CloudWatchBackend, alarm: Any, period: int, old: str, now: datetime) -> dict[str, Any]:
    """The JSON that CloudWatch publishes to SNS. `period` is that of the metric that is compared."""
    updated = alarm.configuration_updated_timestamp.replace(tzinfo=UTC)
    message = {
        "AlarmName": alarm.name,
        "AlarmDescription": alarm.description,
        "AWSAccountId": backend.account_id,
        "AlarmConfigurationUpdatedTimestamp": aws_time(updated),
        "NewStateValue": alarm.state_value,
        "NewStateReason": alarm.state_reason,
        "StateChangeTime": aws_time(now),
        "Region": region_name(backend.region_name),
        "AlarmArn": alarm.alarm_arn,
        "OldStateValue": old,
        "OKActions": alarm.ok_actions,
        "AlarmActions": alarm.alarm_actions,
        "InsufficientDataActions": alarm.insufficient_data_actions,
    }
    if alarm.rule is not None:
        triggering = json.loads(alarm.state_reason_data).get("triggeringAlarms", [])
        children = [
            {"Arn": child["arn"], "State": {"Value": child["state"]["value"], "Timestamp": child["state"]["timestamp"]}}
            for child in triggering
        ]
        return message | {"AlarmRule": alarm.rule, "TriggeringChildren": children}
    return message | {"Trigger": _trigger(alarm, period)}


def _trigger(alarm: Any, period: int) -> dict[str, Any]:
    compared = {
        "Period": period,
        "EvaluationPeriods": alarm.evaluation_periods,
        "DatapointsToAlarm": alarm.datapoints_to_alarm or alarm.evaluation_periods,
        "ComparisonOperator": alarm.comparison_operator,
        "Threshold": float(alarm.threshold),
        "TreatMissingData": alarm.treat_missing_data or "missing",
        "EvaluateLowSampleCountPercentile": alarm.evaluate_low_sample_count_percentile or "",
    }
    if alarm.metrics:
        return compared | {"Metrics": [_sns_query(query) for query in alarm.metrics]}
    statistic = (
        {"StatisticType": "ExtendedStatistic", "ExtendedStatistic": alarm.extended_statistic}
        if alarm.extended_statistic
        else {"StatisticType": "Statistic", "Statistic": alarm.statistic.upper()}
    )
    dimensions = [{"value": item.value, "name": item.name} for item in alarm.dimensions]
    metric = {"MetricName": alarm.metric_name, "Namespace": alarm.namespace}
    return metric | statistic | {"Unit": alarm.unit, "Dimensions": dimensions} | compared


def _sns_query(query: Mapping[str, Any]) -> dict[str, Any]:
    described = {"Id": query["Id"], "ReturnData": query.get("ReturnData", True)}
    if "Expression" in query:
        return {"Expression": query["Expression"], "Label": query.get("Label"), **described}
    stat = query["MetricStat"]
    dimensions = [{"value": item["Value"], "name": item["Name"]} for item in stat["Metric"].get("Dimensions", [])]
    return {**described, "MetricStat": {**stat, "Metric": {**stat["Metric"], "Dimensions": dimensions}}}


def event(
    backend: CloudWatchBackend, alarm: Any, old: Mapping[str, Any], new: Mapping[str, Any], now: datetime
) -> dict[str, Any]:
    """The event that CloudWatch puts on the default bus."""
    configuration = {"description": alarm.description}
    if alarm.rule is not None:
        configuration["alarmRule"] = alarm.rule
    else:
        configuration["metrics"] = _event_metrics(alarm)
    return {
        "version": "0",
        "id": str(uuid.uuid4()),
        "detail-type": "CloudWatch Alarm State Change",
        "source": "aws.cloudwatch",
        "account": backend.account_id,
        "time": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "region": backend.region_name,
        "resources": [alarm.alarm_arn],
        "detail": {"alarmName": alarm.name, "configuration": configuration, "previousState": old, "state": new},
    }


def _event_metrics(alarm: Any) -> list[dict[str, Any]]:
    if alarm.metrics:
        return [_event_query(query) for query in alarm.metrics]
    metric = {
        "namespace": alarm.namespace,
        "name": alarm.metric_name,
        "dimensions": {item.name: item.value for item in alarm.dimensions},
    }
    stat = alarm.statistic or alarm.extended_statistic
    query_id = str(uuid.uuid5(uuid.NAMESPACE_URL, alarm.alarm_arn))
    return [
        {"id": query_id, "metricStat": {"metric": metric, "period": alarm.period, "stat": stat}, "returnData": True}
    ]


def _event_query(query: Mapping[str, Any]) -> dict[str, Any]:
    described = {"id": query["Id"], "returnData": query.get("ReturnData", True)}
    if "Expression" in query:
        return {**described, "expression": query["Expression"], "label": query.get("Label")}
    stat = query["MetricStat"]
    metric = {
        "namespace": stat["Metric"]["Namespace"],
        "name": stat["Metric"]["MetricName"],
        "dimensions": {item["Name"]: item["Value"] for item in stat["Metric"].get("Dimensions", [])},
    }
    return {**described, "metricStat": {"metric": metric, "period": stat["Period"], "stat": stat["Stat"]}}


@cache
def region_name(region: str) -> str:
    """As alarm messages write it, e.g. `Asia Pacific (Tokyo)`."""
    partitions = botocore.session.get_session().get_data("endpoints")["partitions"]
    for partition in partitions:
        if region in partition["regions"]:
            return str(partition["regions"][region]["description"])
    return region
