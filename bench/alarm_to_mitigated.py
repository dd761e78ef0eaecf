"""How long from an alarm message until everything that mitigates it is in force: `python -m bench.alarm_to_mitigated`.

Each incident has a key and a model of its own, and the evidence for buying stands in the metrics already. It is timed
from just before the SNS publish to: the leases of both free levers in Redis (by Redis's clock), the demand accepted
by the model's capacity workflow, and CreateProvisionedModelThroughput answered by AWS (both by the events of the
histories). Every incident is the first of its model, whose capacity workflow runs since the worker started and is at
rest. The stack is the one that `runbooks dev` starts, on real time (`--speed 1`) and a calm night.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client, WorkflowHandle
from temporalio.service import RPCError

from bench._harness import Figure, percentile, progress, publish
from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from domain.messages import capacity_id, incident_id
from domain.metrics import CATALOGUE, MetricName
from domain.policy import IntentPolicy, ModelPolicy, Policy
from ops.stack import Stack, StackOptions, control_plane, simulator
from ops.supervisor import ChildSpec
from workers.settings import Settings
from workers.temporal import connect

if TYPE_CHECKING:
    from types_boto3_cloudwatch.type_defs import MetricDatumTypeDef

STACKS = 5
"""Started one after another, so that the policy, which every workflow carries along, stays nearly as small as real."""
INCIDENTS = 24
"""Measured on each stack, ..."""
WARM_UP = 8
"""... after so many to warm up."""
SETTLE_SECONDS = 0.5
"""Between the incidents, so that each finds the stack idle."""
PATIENCE_SECONDS = 20
ID_PREFIX = "bench."
BOUND_BY = (
    "Processor time: six hops through Temporal (incident, assessment, mitigation, leases; capacity, survey, create), "
    "each some milliseconds of server, SDK and Python on cores that the simulated AWS shares; no timer or poll."
)
AIMS_MS = {
    "every free lever in force, p50": 50.0,
    "capacity request accepted too, p50": 100.0,
    "capacity request accepted too, p99": 200.0,
}


def bench_policy(models: int) -> Policy:
    """The default policy, and as many models of which each has a large intent and a small one that may move."""
    default = Policy()
    names = [f"m{number:03}" for number in range(models)]
    own = {
        name: ModelPolicy(
            model_id=f"{ID_PREFIX}{name}",
            provisioned_model_id=f"{ID_PREFIX}{name}:28k",
            rank=2,
            tokens_per_second_per_unit=1000,
            baseline_units=0,
            floor_units=0,
            ceiling_units=10,
            on_demand_tokens_per_second=1000,
        )
        for name in names
    }
    intents = {f"talk-{name}": IntentPolicy(model=name) for name in names}
    intents |= {f"faq-{name}": IntentPolicy(model=name, downgrade_to="haiku") for name in names}
    return default.model_copy(update={"models": default.models | own, "intents": default.intents | intents})


def _default_night(stack: Stack) -> list[ChildSpec]:
    """The simulator with the default policy: its MangaAssist knows nothing of the benchmark's models."""
    return [
        replace(child, env={name: value for name, value in child.env.items() if name != "RUNBOOKS_POLICY_FILE"})
        for child in simulator(stack)
    ]


class Bench:
    """The stack's neighbour: publishes alarms, puts the evidence, reads what became of it."""

    def __init__(self, env: Mapping[str, str], temporal: Client, policy: Policy) -> None:
        endpoint = env["RUNBOOKS_AWS_ENDPOINT_URL"]
        self._temporal = temporal
        self._ledger = Ledger(connect_redis(env["RUNBOOKS_REDIS_URL"]))
        session = boto3.session.Session("simulator", "simulator", region_name=Settings().aws_region)
        config = Config(tcp_keepalive=True)
        self._sns = session.client("sns", endpoint_url=endpoint, config=config)
        self._cloudwatch = session.client("cloudwatch", endpoint_url=endpoint, config=config)
        self._topic_arn = _control(endpoint, "ready")["alarm_topic_arn"]
        # The simulated account knows the default policy's models only.
        quotas = {model.provisioned_model_id: model.ceiling_units for model in policy.models.values()}
        _control(endpoint, "bedrock", {"quotas": quotas})

    def put_evidence(self, model: str, spec: ModelPolicy, period: timedelta) -> None:
        """Two periods of throttling, demand over capacity, and a small intent that may move."""
        figures: list[tuple[MetricName, dict[str, str], float]] = [
            (MetricName.INVOCATION_THROTTLES, {"ModelId": spec.model_id}, 400),
            (MetricName.INVOCATIONS, {"ModelId": spec.model_id}, 600),
            (MetricName.TOKENS_PER_SECOND, {"Model": model}, 4000),
            (MetricName.CAPACITY_TOKENS_PER_SECOND, {"Model": model}, 1000),
            (MetricName.OFFERED_TOKENS_PER_SECOND, {"Intent": f"talk-{model}"}, 4000),
            (MetricName.OFFERED_TOKENS_PER_SECOND, {"Intent": f"faq-{model}"}, 100),
        ]
        now = datetime.now(UTC)
        for name, dimensions, value in figures:
            metric = CATALOGUE[name]
            data: list[MetricDatumTypeDef] = [
                {
                    "MetricName": name,
                    "Dimensions": [{"Name": key, "Value": text} for key, text in dimensions.items()],
                    "Value": value,
                    "Unit": metric.unit,  # type: ignore[typeddict-item]
                    "Timestamp": now - period * ago,
                }
                for ago in (1, 2)
            ]
            self._cloudwatch.put_metric_data(Namespace=metric.namespace, MetricData=data)

    def publish_alarm(self, model: str, spec: ModelPolicy, period: timedelta) -> float:
        """The alarm as CloudWatch tells it; answers when, in epoch seconds."""
        message = json.dumps(alarm_message(model, spec.model_id, period))
        at = time.time()
        self._sns.publish(TopicArn=self._topic_arn, Message=message)
        return at

    async def times(self, model: str, published_at: float) -> dict[str, float]:
        """Milliseconds from the publish to each step, once all of them were taken."""
        key = f"bedrock-throttle:{model}"
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                steps = await self._steps(key, model, published_at)
                break
            except (LookupError, RPCError) as error:
                if time.monotonic() > give_up_at:
                    raise SystemExit(f"{key} was not mitigated within {PATIENCE_SECONDS} s: {error}") from error
                await asyncio.sleep(0.1)
        return {name: (at - published_at) * 1000 for name, at in steps.items()}

    async def _steps(self, key: str, model: str, since: float) -> dict[str, float]:
        incident = await self._events(incident_id(key), since)
        mitigation = await self._events(f"{incident_id(key)}-mitigation-1", since)
        capacity = await self._events(capacity_id(model), since)
        taken = [lease for lease in self._ledger.leases().leases if lease.holder.id == incident_id(key)]
        if len(taken) < 2:
            raise LookupError(f"{len(taken)} leases in Redis")
        return {
            "workflow started": incident.at("workflow"),
            "assessment: asked": incident.at("assess_throttle"),
            "assessment: begun": incident.at("assess_throttle", 1),
            "assessment: done": incident.at("assess_throttle", 2),
            "mitigation started": mitigation.at("workflow"),
            "leases: asked": mitigation.at("take_leases"),
            "leases: begun": mitigation.at("take_leases", 1),
            "leases in Redis": max(lease.acquired_at.timestamp() for lease in taken),
            "demand: begun": mitigation.at("set_demand", 1),
            "fleet survey: asked": capacity.at("survey"),
            "fleet surveyed": capacity.at("survey", 2),
            "create: asked": capacity.at("create_model"),
            "create: begun": capacity.at("create_model", 1),
            "AWS accepted": capacity.at("create_model", 2),
            "demand accepted": mitigation.at("set_demand", 2),
        }

    async def _events(self, workflow_id: str, since: float) -> "_Events":
        handle = self._temporal.get_workflow_handle(workflow_id)
        return _Events([event async for event in handle.fetch_history_events()], since)

    async def end(self, model: str) -> None:
        """Take the incident out of the way of the next."""
        for workflow_id in (incident_id(f"bedrock-throttle:{model}"), capacity_id(model)):
            handle: WorkflowHandle[Any, Any] = self._temporal.get_workflow_handle(workflow_id)
            await handle.terminate("measured")


class _Events:
    """When, from `since` on, a workflow started and its activities were scheduled, started and completed.

    All in epoch seconds.
    """

    def __init__(self, events: list[HistoryEvent], since: float) -> None:
        self._at: dict[tuple[str, int], float] = {}
        names: dict[int, str] = {}
        for event in events:
            if event.event_type == EventType.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED:
                name, stage = "workflow", 0
            elif event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
                name = names[event.event_id] = event.activity_task_scheduled_event_attributes.activity_type.name
                stage = 0
            elif event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_STARTED:
                name, stage = names[event.activity_task_started_event_attributes.scheduled_event_id], 1
            elif event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                name, stage = names[event.activity_task_completed_event_attributes.scheduled_event_id], 2
            else:
                continue
            at = event.event_time.ToMicroseconds() / 1e6
            if at >= since:
                self._at.setdefault((name, stage), at)

    def at(self, name: str, stage: int = 0) -> float:
        """Of the first activity of that name (or `workflow`); stage 0 scheduled, 1 started, 2 completed.

        Raises:
            LookupError: it is not in the history (yet).
        """
        return self._at[name, stage]


def alarm_message(model: str, model_id: str, period: timedelta) -> dict[str, Any]:
    """The JSON that CloudWatch publishes for `InvocationThrottles` of one model."""
    now = datetime.now(UTC)
    seconds = round(period.total_seconds())
    arn = f"arn:aws:cloudwatch:ap-northeast-1:123456789012:alarm:BedrockThrottleAlarm-{model}"
    return {
        "AlarmName": f"BedrockThrottleAlarm-{model}",
        "AlarmDescription": f"Bedrock refuses calls to {model}",
        "AWSAccountId": "123456789012",
        "AlarmConfigurationUpdatedTimestamp": _aws_time(now - timedelta(days=30)),
        "NewStateValue": "ALARM",
        "NewStateReason": f"Threshold Crossed: 1 datapoint [400.0 ({now:%d/%m/%y %H:%M:%S})] was greater than the "
        "threshold (0.0).",
        "StateChangeTime": _aws_time(now),
        "Region": "Asia Pacific (Tokyo)",
        "AlarmArn": arn,
        "OldStateValue": "OK",
        "OKActions": [],
        "AlarmActions": [],
        "InsufficientDataActions": [],
        "Trigger": {
            "MetricName": "InvocationThrottles",
            "Namespace": "AWS/Bedrock",
            "StatisticType": "Statistic",
            "Statistic": "SUM",
            "Unit": None,
            "Dimensions": [{"value": model_id, "name": "ModelId"}],
            "Period": seconds,
            "EvaluationPeriods": 1,
            "DatapointsToAlarm": 1,
            "ComparisonOperator": "GreaterThanThreshold",
            "Threshold": 0.0,
            "TreatMissingData": "missing",
            "EvaluateLowSampleCountPercentile": "",
        },
    }


def _control(endpoint: str, path: str, body: Any = None) -> Any:
    """The simulator's control path: POST with a body, GET without."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(f"{endpoint}/_simulator/{path}", data, timeout=5) as answer:
        return json.load(answer)


def _aws_time(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03}+0000"


async def measure(stacks: int, incidents: int, warm_up: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The steps of each measured incident, and of the first one on each stack."""
    policy = bench_policy(incidents + warm_up)
    own = policy.model_dump(mode="json", include={"models", "intents"})
    measured, first = [], []
    for number in range(stacks):
        with tempfile.TemporaryDirectory(prefix="runbooks-bench-") as folder:
            policy_file = Path(folder) / "policy.yaml"
            policy_file.write_text(json.dumps(own))  # JSON is YAML
            options = StackOptions(
                state_dir=Path(folder) / "state",
                speed=1,
                usual_ports=False,
                env={"RUNBOOKS_POLICY_FILE": str(policy_file), "RUNBOOKS_SIMULATOR_SCENARIO": "calm"},
            )
            async with Stack(options, say=_quiet, processes=(_default_night, control_plane)) as stack:
                temporal = await connect(Settings(temporal_address=stack.addresses.temporal))
                bench = await asyncio.to_thread(Bench, stack.env, temporal, policy)
                what = f"stack {number + 1} of {stacks}: {warm_up} to warm up, {incidents} measured"
                times = await stack.guard(_run(bench, policy, what))
        first.append(times[0])
        measured += times[warm_up:]
    return measured, first


def _quiet(line: str) -> None:
    """The stack's own progress is not the benchmark's."""


async def _run(bench: Bench, policy: Policy, what: str) -> list[dict[str, float]]:
    period = policy.metrics.period
    models = {name: spec for name, spec in policy.models.items() if spec.model_id.startswith(ID_PREFIX)}
    measured = []
    for model, spec in progress(list(models.items()), what):
        await asyncio.to_thread(bench.put_evidence, model, spec, period)
        await asyncio.sleep(SETTLE_SECONDS)
        at = await asyncio.to_thread(bench.publish_alarm, model, spec, period)
        await asyncio.sleep(SETTLE_SECONDS)
        measured.append(await bench.times(model, at))
        await bench.end(model)
    return measured


def figures(measured: list[dict[str, float]], first: list[dict[str, float]]) -> list[Figure]:
    """The percentiles with their aims, the first incident after a start, and the median of each step."""
    found = [
        Figure(name, percentile([ends(times)[what] for times in measured], percent), "ms", AIMS_MS.get(name))
        for what in ends(measured[0])
        for percent in (50, 99)
        for name in (f"{what}, p{percent}",)
    ]
    found += [
        Figure(f"{what}, first incident after a start", statistics.median(ends(times)[what] for times in first), "ms")
        for what in ends(measured[0])
    ]
    steps = [Figure(f"at: {name}", statistics.median(times[name] for times in measured), "ms") for name in measured[0]]
    return found + steps


def ends(times: Mapping[str, float]) -> dict[str, float]:
    """What is aimed at, of one incident."""
    free, demand, accepted = times["leases in Redis"], times["demand accepted"], times["AWS accepted"]
    return {
        "every free lever in force": free,
        "demand accepted by the capacity workflow": demand,
        "capacity request accepted too": max(free, demand, accepted),
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m bench.alarm_to_mitigated", description=__doc__)
    parser.add_argument("--stacks", type=int, default=STACKS, help="started one after another (default %(default)s)")
    parser.add_argument("--incidents", type=int, default=INCIDENTS, help="measured on each (default %(default)s)")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="before them, on each (default %(default)s)")
    given = parser.parse_args()
    load_before = round(os.getloadavg()[0], 2)
    measured, first = asyncio.run(measure(given.stacks, given.incidents, given.warm_up))
    publish(
        "alarm_to_mitigated",
        figures(measured, first),
        incidents=len(measured),
        stacks=given.stacks,
        warm_up_incidents_on_each=given.warm_up,
        load_average_before=load_before,
        bound_by=BOUND_BY,
    )


if __name__ == "__main__":
    main()
