"""The CloudWatch alarms that the product needs, as data: the simulator has them, and `runbooks alarms` prints them."""

from datetime import timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from domain.metrics import CATALOGUE, MetricName
from domain.policy import HEARTBEAT_ALARM, Policy

PARAMETERS = {"intake": "AlarmTopicArn", "on-call": "PageTopicArn"}
"""Of the CloudFormation template: who is told, and the topic's name there."""


class AlarmDefinition(BaseModel):
    """One metric alarm."""

    model_config = ConfigDict(frozen=True)

    name: str
    description: str
    metric: MetricName
    dimensions: tuple[str, ...] = ()
    """Values, in the order of the metric's dimensions."""
    comparison: Literal["GreaterThanThreshold", "LessThanThreshold"]
    threshold: float
    period: timedelta
    periods: int = Field(default=1, ge=1)
    """All of the last so many breach."""
    treat_missing: Literal["missing", "ignore", "breaching", "notBreaching"]
    tells: Literal["intake", "on-call"]
    """Whose topic: the intake's, which starts the incident, or the on-call tool's, past everything of ours."""


def alarm_definitions(policy: Policy) -> tuple[AlarmDefinition, ...]:
    """All of them, at the policy's periods (AWS takes 10 s, 30 s and multiples of 60 s)."""
    health = policy.health
    throttles = [
        AlarmDefinition(
            name=f"BedrockThrottleAlarm-{name}",
            description=f"Bedrock refuses calls to {name} (S1).",
            metric=MetricName.INVOCATION_THROTTLES,
            dimensions=(model.model_id,),
            comparison="GreaterThanThreshold",
            threshold=0,
            period=policy.metrics.period,
            treat_missing="missing",
            tells="intake",
        )
        for name, model in policy.models.items()
    ]
    failures = [
        AlarmDefinition(
            name=f"RunbooksProvisioningFailed-{name}",
            description=f"Provisioned throughput of {name} was refused or failed (S4: nobody was told). "
            f"`runbooks health` says what to do.",
            metric=MetricName.PROVISIONING_FAILURES,
            dimensions=(name,),
            comparison="GreaterThanThreshold",
            threshold=0,
            period=health.interval,
            treat_missing="ignore",  # no health check: the heartbeat's alarm says so
            tells="intake",
        )
        for name in policy.models
    ]
    waits = [
        AlarmDefinition(
            name=f"BatcherQueueWaitAlarm-{name}",
            description=f"Requests to {name} wait long in the batcher (S3): for mates, or for a slot.",
            metric=MetricName.QUEUE_WAIT_TIME,
            dimensions=(name,),
            comparison="GreaterThanThreshold",
            threshold=policy.longest_usual_wait_ms,
            period=policy.metrics.period,
            periods=policy.batcher.queue_wait_periods,
            treat_missing="notBreaching",
            tells="intake",
        )
        for name in policy.models
    ]
    heartbeat = AlarmDefinition(
        name=HEARTBEAT_ALARM,
        description="The runbooks' own stack is silent: no health check came to its end. Look at the runbook worker, "
        "at Temporal, and at the schedule health-check; overrides and demands end by themselves meanwhile.",
        metric=MetricName.CONTROL_PLANE_HEARTBEAT,
        comparison="LessThanThreshold",
        threshold=1,
        period=health.interval,
        periods=health.heartbeat_periods,
        treat_missing="breaching",
        tells="on-call",
    )
    slow = AlarmDefinition(
        name="RequestLatencyP99Alarm",
        description="Answers are slow (S3), whatever makes them so.",
        metric=MetricName.REQUEST_LATENCY_P99,
        comparison="GreaterThanThreshold",
        threshold=policy.latency.alarm_p99_ms,
        period=policy.metrics.period,
        periods=policy.latency.alarm_periods,
        treat_missing="missing",
        tells="intake",
    )
    return *throttles, *failures, slow, *waits, heartbeat


def put_metric_alarm(definition: AlarmDefinition, topic: Any) -> dict[str, Any]:
    """The input of CloudWatch's PutMetricAlarm, and the properties of CloudFormation's AWS::CloudWatch::Alarm.

    Args:
        definition: the alarm.
        topic: ARN of the SNS topic that is told of ALARM and OK, or CloudFormation's reference to it.
    """
    metric = CATALOGUE[definition.metric]
    return {
        "AlarmName": definition.name,
        "AlarmDescription": definition.description,
        "Namespace": metric.namespace,
        "MetricName": str(metric.name),
        "Dimensions": [
            {"Name": name, "Value": value} for name, value in zip(metric.dimensions, definition.dimensions, strict=True)
        ],
        **_statistic(metric.statistic),
        "Period": max(1, round(definition.period.total_seconds())),
        "EvaluationPeriods": definition.periods,
        "DatapointsToAlarm": definition.periods,
        "Threshold": definition.threshold,
        "ComparisonOperator": definition.comparison,
        "TreatMissingData": definition.treat_missing,
        "AlarmActions": [topic],
        "OKActions": [topic],
    }


def _statistic(name: str) -> dict[str, str]:
    """A percentile of few samples says nothing, so AWS is told not to evaluate it."""
    if not name.startswith("p"):
        return {"Statistic": name}
    return {"ExtendedStatistic": name, "EvaluateLowSampleCountPercentile": "ignore"}


def template(policy: Policy) -> dict[str, Any]:
    """A CloudFormation template of all alarms."""
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": "Alarms of MangaAssist Runbooks",
        "Parameters": {
            PARAMETERS["intake"]: {
                "Type": "String",
                "Description": "SNS topic that the intake's queue is subscribed to",
            },
            PARAMETERS["on-call"]: {"Type": "String", "Description": "SNS topic of the on-call tool"},
        },
        "Resources": {
            "".join(filter(str.isalnum, definition.name)): {
                "Type": "AWS::CloudWatch::Alarm",
                "Properties": put_metric_alarm(definition, {"Ref": PARAMETERS[definition.tells]}),
            }
            for definition in alarm_definitions(policy)
        },
    }
