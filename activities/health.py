"""The health check's looks at Temporal, its repairs there, what it tells incidents, and its heartbeat."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from temporalio import activity
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowQueryFailedError
from temporalio.service import RPCError, RPCStatusCode

from activities.entities import start_capacity
from domain.alarm_rules import IncidentTarget
from domain.alarms import AlarmChange, AlarmState
from domain.health import HealthMetrics, TellIncident, Writer
from domain.messages import (
    ALARM_CHANGED,
    CAPACITY_STATE,
    RECONCILE_NOW,
    CapacityState,
    PersonRequest,
    Reconciled,
    capacity_id,
    incident_id,
)
from domain.metrics import CATALOGUE, Metric, MetricName

if TYPE_CHECKING:
    from types_boto3_cloudwatch.client import CloudWatchClient
    from types_boto3_cloudwatch.type_defs import MetricDatumTypeDef

StartOrJoin = Callable[[Client, IncidentTarget, AlarmChange, str], Awaitable[None]]
"""Starts the incident of a key, or joins it, as the intake does."""

WHO = "health-check"
ANSWER_WITHIN = timedelta(seconds=2)


class HealthActivities:
    """What the health check needs of Temporal and CloudWatch."""

    def __init__(self, cloudwatch: "CloudWatchClient", start_or_join: StartOrJoin) -> None:
        self._cloudwatch = cloudwatch
        self._start_or_join = start_or_join

    @activity.defn
    async def look_at_writers(self, models: list[str]) -> dict[str, Writer]:
        """The capacity workflow of each model: whether it runs, and what it knows."""
        found = await asyncio.gather(*(_writer(activity.client(), model) for model in models))
        return dict(zip(models, found, strict=True))

    @activity.defn
    async def start_writer(self, model: str) -> str:
        """Start the capacity workflow of a model; one that runs is left alone. Answers what was done."""
        await start_capacity(activity.client(), model, activity.info().task_queue)
        return f"the capacity workflow of {model} was started"

    @activity.defn
    async def reconcile_writer(self, model: str) -> str:
        """Have a model's fleet compared with its demands and its routes published; answers what was found."""
        info = activity.info()
        handle = activity.client().get_workflow_handle(capacity_id(model))
        try:
            found: Reconciled = await handle.execute_update(
                RECONCILE_NOW,
                PersonRequest(who=WHO, why="the health check found a difference"),
                id=f"{info.workflow_run_id}-{info.activity_id}",
                result_type=Reconciled,
            )
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            return await self.start_writer(model)  # it begins with a reconciliation
        return "; ".join([f"reconciled: {found.message}", *found.problems])

    @activity.defn
    async def tell_incident(self, news: TellIncident) -> None:
        """Start or join an incident, or tell it that a finding is over. Told twice it counts once."""
        target, change = news.target, news.change
        if change.state is AlarmState.ALARM:
            await self._start_or_join(activity.client(), target, change, activity.info().task_queue)
            return
        try:
            await activity.client().get_workflow_handle(incident_id(target.key)).signal(ALARM_CHANGED, change)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:  # it has closed
                raise

    @activity.defn
    def publish_health(self, metrics: HealthMetrics) -> None:
        """The heartbeat, and the failures by model; a repetition counts one heartbeat more, which is no harm."""
        data = [_datum(MetricName.CONTROL_PLANE_HEARTBEAT, 1, metrics)]
        data += [
            _datum(MetricName.PROVISIONING_FAILURES, failed, metrics, model)
            for model, failed in metrics.failed_provisioning.items()
        ]
        self._cloudwatch.put_metric_data(
            Namespace=_metric(MetricName.CONTROL_PLANE_HEARTBEAT).namespace, MetricData=data
        )


def _metric(name: MetricName) -> Metric:
    return CATALOGUE[name]


def _datum(name: MetricName, value: float, metrics: HealthMetrics, *dimensions: str) -> "MetricDatumTypeDef":
    metric = _metric(name)
    return {
        "MetricName": metric.name,
        "Dimensions": [{"Name": key, "Value": value} for key, value in zip(metric.dimensions, dimensions, strict=True)],
        "Timestamp": metrics.at,
        "Value": value,
        "Unit": "Count",
    }


async def _writer(client: Client, model: str) -> Writer:
    handle = client.get_workflow_handle(capacity_id(model))
    try:
        described = await handle.describe()
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        return Writer(running=False)
    if described.status is not WorkflowExecutionStatus.RUNNING:
        return Writer(running=False)
    try:
        state: CapacityState = await handle.query(CAPACITY_STATE, result_type=CapacityState, rpc_timeout=ANSWER_WITHIN)
    except (WorkflowQueryFailedError, RPCError) as error:
        return Writer(running=True, unanswered=str(error))
    return Writer(running=True, state=state)
