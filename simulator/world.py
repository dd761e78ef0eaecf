"""MangaAssist's place in AWS and Redis: what stands there at the start, and the loop that makes it live.

The loop is one thread. Every tenth of a metric period it reads the knobs and the capacity routes as the data plane
would and takes one step of the fluid model; every period it reads AWS, scales its service and publishes metrics. While
Redis or AWS is away it goes on with what it last knew.
"""

import logging
import math
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Any

import boto3
import redis
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from dataplane.connection import connect
from dataplane.knobs import Knobs
from dataplane.metric_data import Datum, data_of
from dataplane.routes import Routes
from domain import timetable
from domain.alarm_definitions import alarm_definitions, put_metric_alarm
from domain.batching import Strategy
from domain.calendar import EVENT_TABLE_KEY, CalendarEvent
from domain.capacity import MANAGED_BY, MANAGED_BY_TAG
from domain.clock import RehearsalClock, compress
from domain.metrics import CATALOGUE, MetricName
from domain.policy import Policy
from domain.routes import CapacityRoute, CapacityRoutes
from simulator import scaling_lag
from simulator.aws.trail import RESIDENT_KEY
from simulator.mangaassist import Controls, Flow, Parameters, at_rest, step
from simulator.requests import MEASURED, Requests
from simulator.stages import Stages
from simulator.traffic import Spike, Traffic, monday_release

ALARM_QUEUE = "mangaassist-alarms"
DEAD_LETTER_QUEUE = "mangaassist-alarms-dlq"
ALARM_TOPIC = "mangaassist-alarms"
PAGE_TOPIC = "mangaassist-pages"
EVENT_ID_PREFIX = "monday-release"

_STEPS_PER_PERIOD = 10
_PERIODS_BEFORE_START = 10
"""Of metrics, so that graphs are not empty."""
_PERIODS_OF_WINDOW = 30
"""For which the batch window of scenario 3 was short, before the start."""
_LATEST_STEPS_KEPT = 60 * _STEPS_PER_PERIOD
"""Steps that are made up for after a pause of the process; older ones are left out."""
_LOST_ROUTES_KEPT = timedelta(seconds=5)
"""A list that is missing was lost, as one that is withdrawn is empty: time for its owner to publish it again."""

_Figure = tuple[MetricName, dict[str, str], float | Mapping[float, int]]
"""A value, or values with counts."""

_log = logging.getLogger(__name__)


class Row(StrEnum):
    """What the event calendar says about the Monday release: scenario 1's causes, one each."""

    ABSENT = "absent"
    """Cause 1: no such event."""
    UNTRIGGERED = "untriggered"
    """Cause 2: pre-provisioning was never triggered."""
    UNDERSIZED = "undersized"
    """Cause 3, the runbook's own: three times the traffic was planned for, five times came."""
    LATE = "late"
    """Cause 4: enough was planned, and was not there in time."""
    GOOD = "good"
    """None of them: enough was planned and there in time; investigate."""


@dataclass(frozen=True, kw_only=True)
class WorldOptions:
    """Where the world stands, and what is in it."""

    aws_endpoint_url: str
    redis_url: str = "redis://127.0.0.1:6379/0"
    aws_region: str = "ap-northeast-1"
    event_table: str = "mangaassist-events"
    ecs_cluster: str = "mangaassist"
    ecs_service: str = "orchestrator"
    seed: int = 1
    release_spike: bool = True
    """The Monday release nearest to the start brings its spike, 5 min after midnight; without: a calm night."""
    peak_multiplier: float = 5
    spike_minutes: float = 27
    """From its start until it fades, in business time."""
    usual_tokens_per_second: float | None = None
    """Sent at any hour before spikes, instead of the day's curve."""
    event_row: Row = Row.UNDERSIZED
    scaling_lag: bool = False
    """Scenario 4: an evening ramp over the afternoon's units, with little on-demand quota left for us."""
    batch_latency: bool = False
    """Scenario 3: the batch window was short until now."""


def metric_period(policy: Policy, speed: float) -> timedelta:
    """The policy's metric period at `speed`.

    Raises:
        ValueError: it would be less than 1 s or no whole number of seconds.
    """
    period = policy.metrics.period / speed
    if period < timedelta(seconds=1) or period % timedelta(seconds=1):
        raise ValueError(
            f"speed {speed:g}: makes the metric period of {policy.metrics.period.total_seconds():g} s "
            f"{period.total_seconds():g} s; whole seconds from 1 are allowed, e.g. a speed of 60, 30, 20, 10 or 1"
        )
    return period


def release_event(row: Row, release: datetime, policy: Policy) -> CalendarEvent | None:
    """The calendar's row for the release at `release`; None for `Row.ABSENT`."""
    if row is Row.ABSENT:
        return None
    planned = {name: model.baseline_units for name, model in policy.models.items()}
    if row in (Row.LATE, Row.GOOD):
        planned = {name: 3 * units for name, units in planned.items()}
    lead_time = timedelta(hours=2)
    triggered = None if row is Row.UNTRIGGERED else release - lead_time
    took = lead_time + timedelta(minutes=7) if row is Row.LATE else timedelta(minutes=12)
    return CalendarEvent(
        event_id=f"{EVENT_ID_PREFIX}-{release:%Y-%m-%d}",
        type="monday_release",
        starts_at=release,
        multiplier=3,
        models=tuple(policy.models),
        units=planned,
        lead_time=lead_time,
        provisioning_triggered_at=triggered,
        provisioning_completed_at=triggered + took if triggered else None,
        source="weekly release calendar",
        asked_by="content-ops",
    )


class World:
    """Use `seed` once AWS answers, then `run` in a thread of its own. The traffic may be changed from any thread."""

    def __init__(
        self,
        options: WorldOptions,
        clock: RehearsalClock,
        policy: Policy,
        parameters: Parameters | None = None,
        stages: Stages | None = None,
        requests: Requests | None = None,
    ) -> None:
        """`policy`: as it is written, durations not divided by the clock's speed.

        `requests`: real ones to a batcher; then nothing is published of the model that they, the batcher or Bedrock
        measure.

        Raises:
            ValueError: the clock's speed makes metric periods that cannot be.
        """
        self._options = options
        self._clock = clock
        self._period = metric_period(policy, clock.speed)
        self._policy = compress(policy, clock.speed)
        self._parameters = parameters or (scaling_lag.PARAMETERS if options.scaling_lag else Parameters())
        self._stages = stages or Stages(policy.latency)
        self._requests = requests
        self._redis = connect(options.redis_url)
        self._knobs = Knobs(self._redis, self._policy.baseline)
        self._routes = Routes(self._redis)
        self._routed: dict[str, CapacityRoutes] = {}
        self._lost_since: dict[str, float] = {}
        """Since when, on the monotonic clock, a model's list has been missing."""
        self._in_service: dict[str, int] = {}
        self._tasks_running = self._policy.ecs.baseline_tasks
        self._tasks_desired = self._tasks_running
        self._release = monday_release(clock.business(datetime.now(UTC)))
        spike = Spike(
            self._release + timedelta(minutes=5), options.peak_multiplier, timedelta(minutes=options.spike_minutes)
        )
        spikes, usual = [spike] if options.release_spike else [], options.usual_tokens_per_second
        if options.scaling_lag:
            spikes, usual = [scaling_lag.ramp(clock.business(datetime.now(UTC)))], scaling_lag.AFTERNOON
        self._traffic = Traffic(
            options.seed, policy.throttle.hit_rate_at_baseline, spikes, usual_tokens_per_second=usual
        )
        if options.batch_latency:
            self._tasks_desired = self._tasks_running = self._tasks_of(clock.business(datetime.now(UTC)))
        config = Config(retries={"total_max_attempts": 1}, connect_timeout=1, read_timeout=3, tcp_keepalive=True)
        session = boto3.session.Session(
            aws_access_key_id=RESIDENT_KEY, aws_secret_access_key="simulator", region_name=options.aws_region
        )

        def client(service: str) -> Any:
            return session.client(service, endpoint_url=options.aws_endpoint_url, config=config)  # type: ignore[call-overload]

        self._bedrock, self._cloudwatch, self._ecs = client("bedrock"), client("cloudwatch"), client("ecs")
        self._dynamodb, self._sns, self._sqs = client("dynamodb"), client("sns"), client("sqs")

    def _tasks_of(self, at: datetime) -> int:
        """Tasks that the service has settled at, at business time `at`."""
        requests = sum(self._traffic.offered(at).values()) / self._parameters.tokens_per_request
        wanted = math.ceil(requests / self._parameters.requests_per_second_per_task)
        return min(max(wanted, self._policy.ecs.baseline_tasks), self._policy.ecs.max_tasks)

    # ------------------------------------------------------------------ what stands there at the start

    def seed(self) -> dict[str, Any]:
        """Make what is not there yet; running it again changes nothing. AWS's and Redis's errors pass through.

        Answers the names of what was made; `env` is what our processes must be told.
        """
        self._routes.read_all()  # in an hour without units nothing else would ask whether Redis is there
        self._seed_calendar()
        self._seed_service()
        self._seed_capacity()
        made = self._seed_alarms()
        # All of it has been there for long: what was bought is in service, what was started runs.
        settle = urllib.request.Request(f"{self._options.aws_endpoint_url}/_simulator/settle", method="POST")
        with urllib.request.urlopen(settle, timeout=3):
            return made

    def _seed_calendar(self) -> None:
        table = self._options.event_table
        try:
            self._dynamodb.create_table(
                TableName=table,
                KeySchema=[{"AttributeName": EVENT_TABLE_KEY, "KeyType": "HASH"}],
                AttributeDefinitions=[{"AttributeName": EVENT_TABLE_KEY, "AttributeType": "S"}],
                BillingMode="PAY_PER_REQUEST",
            )
        except self._dynamodb.exceptions.ResourceInUseException:
            return
        if event := release_event(self._options.event_row, self._release, self._policy):
            self._dynamodb.put_item(TableName=table, Item=event.to_item())

    def _seed_service(self) -> None:
        cluster, service = self._options.ecs_cluster, self._options.ecs_service
        self._ecs.create_cluster(clusterName=cluster)
        if self._ecs.describe_services(cluster=cluster, services=[service])["services"]:
            return
        self._ecs.register_task_definition(
            family=service, containerDefinitions=[{"name": service, "image": f"{service}:1", "memory": 512}]
        )
        self._ecs.create_service(
            cluster=cluster, serviceName=service, taskDefinition=service, desiredCount=self._tasks_desired
        )

    def _seed_capacity(self) -> None:
        """What the hour has: the timetable's units are ours, a baseline without a timetable is others'."""
        timetabled = self._policy.timetable.models if self._policy.timetable else ()
        at = self._clock.business(datetime.now(UTC)) - self._options.scaling_lag * scaling_lag.HOURS_BEFORE
        for name, model in self._policy.models.items():
            units = timetable.units_at(self._policy, name, at)
            if not units:
                continue
            tags = {MANAGED_BY_TAG: MANAGED_BY, "asked-by": "the timetable"} if name in timetabled else {}
            arn = self._bedrock.create_provisioned_model_throughput(
                clientRequestToken=f"mangaassist-base-{name}",
                provisionedModelName=f"mangaassist-base-{name}",
                modelId=model.provisioned_model_id,
                modelUnits=units,
                tags=[{"key": key, "value": value} for key, value in tags.items()],
            )["provisionedModelArn"]
            route = CapacityRoute(provisioned_model_arn=arn, units=units)
            self._routes.publish(CapacityRoutes(model=name, routes=(route,), version=1))

    def _seed_alarms(self) -> dict[str, Any]:
        topic = self._sns.create_topic(Name=ALARM_TOPIC)["TopicArn"]
        pages = self._sns.create_topic(Name=PAGE_TOPIC)["TopicArn"]
        dead_letters = self._sqs.create_queue(QueueName=DEAD_LETTER_QUEUE)["QueueUrl"]
        queue = self._sqs.create_queue(QueueName=ALARM_QUEUE)["QueueUrl"]
        arn = self._sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        self._sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn)
        for definition in alarm_definitions(self._policy):
            told = topic if definition.tells == "intake" else pages
            self._cloudwatch.put_metric_alarm(**put_metric_alarm(definition, told))
        if self._options.batch_latency:
            self._seed_window()
        # The control plane has been alive so far, too.
        heartbeat = CATALOGUE[MetricName.CONTROL_PLANE_HEARTBEAT]
        self._cloudwatch.put_metric_data(
            Namespace=heartbeat.namespace,
            MetricData=[
                {
                    "MetricName": heartbeat.name,
                    "Value": 1,
                    "Timestamp": datetime.now(UTC) - n * self._policy.health.interval,
                }
                for n in range(self._policy.health.heartbeat_periods + 1)
            ],
        )
        return {
            "alarm_queue_url": queue,
            "dead_letter_queue_url": dead_letters,
            "alarm_topic_arn": topic,
            "page_topic_arn": pages,
            "env": {
                "RUNBOOKS_ALARM_QUEUE_URL": queue,
                "RUNBOOKS_DEAD_LETTER_QUEUE_URL": dead_letters,
                "RUNBOOKS_PAGE_TOPIC_ARN": pages,
            },
        }

    def _seed_window(self) -> None:
        """What the batcher showed until it was configured anew: the window that is known to be good."""
        now, window = datetime.now(UTC), float(self._policy.latency.revert_window_ms)
        models = sorted({one.model for one in self._policy.intents.values() if one.strategy is Strategy.PACK})
        data = [
            datum
            for model in models
            for n in range(1, _PERIODS_OF_WINDOW + 1)
            for datum in self._data(MetricName.BATCH_WINDOW, {"Model": model}, window, now - n * self._period)
        ]
        self._cloudwatch.put_metric_data(Namespace=CATALOGUE[MetricName.BATCH_WINDOW].namespace, MetricData=data)

    # ------------------------------------------------------------------ traffic

    @property
    def spikes(self) -> tuple[Spike, ...]:
        """Past, present and to come."""
        return self._traffic.spikes

    def start_spike(self, multiplier: float, minutes: float) -> Spike:
        """A spike from now on, for so many business minutes; the larger of overlapping spikes counts."""
        spike = Spike(self._clock.business(datetime.now(UTC)), multiplier, timedelta(minutes=minutes))
        self._traffic.spikes = (*self._traffic.spikes, spike)
        return spike

    def stop_spikes(self) -> None:
        """Every spike that has begun fades from now on, and none of those to come will come."""
        now = self._clock.business(datetime.now(UTC))
        self._traffic.spikes = tuple(spike.stopped(now) for spike in self._traffic.spikes if spike.starts_at <= now)

    # ------------------------------------------------------------------ the loop

    def run(self, stop: threading.Event) -> None:
        """Live until `stop` is set."""
        seconds = self._period.total_seconds() / _STEPS_PER_PERIOD
        business_seconds = seconds * self._clock.speed
        number = (math.floor(time.time() / self._period.total_seconds()) - _PERIODS_BEFORE_START) * _STEPS_PER_PERIOD
        with self._knobs:
            self._look()
            state = replace(at_rest(self._controls(), self._parameters), tasks_desired=self._tasks_desired)
            flows: list[Flow] = []
            while not stop.wait(max(0.0, (number + 1) * seconds - time.time())):
                number = max(number, math.floor(time.time() / seconds) - _LATEST_STEPS_KEPT)
                at = self._clock.business(datetime.fromtimestamp(number * seconds, UTC))
                offered = self._traffic.offered(at)
                stages_ms = sum(map(self._stages.p99_ms, self._stages.budgets_ms))
                parameters = replace(self._parameters, fixed_stages_ms=stages_ms)
                state, flow = step(state, offered, self._controls(), parameters, business_seconds)
                flows.append(flow)
                number += 1
                if number % _STEPS_PER_PERIOD == 0:
                    middle = datetime.fromtimestamp(number * seconds, UTC) - self._period / 2
                    self._publish(flows, middle)
                    flows = []
                    self._scale_to(state.tasks_desired)
                    self._look()

    def _controls(self) -> Controls:
        """What the data plane obeys now; where Redis does not answer, what it last said."""
        try:
            self._read_routes()
        except (redis.RedisError, ValueError) as error:
            _log.warning("capacity routes cannot be read, keeping what is known: %s", error)
        policy = self._policy
        capacity = {}
        for name, model in policy.models.items():
            routes = self._routed[name].routes if name in self._routed else ()
            units = sum(self._in_service.get(route.provisioned_model_arn, 0) for route in routes)
            taken = scaling_lag.ON_DEMAND_IN_USE.get(name, 0.0) if self._options.scaling_lag else 0.0
            on_demand = max(0.0, model.on_demand_tokens_per_second - taken)
            capacity[name] = units * model.tokens_per_second_per_unit + on_demand
        return Controls(
            cache_ttl_seconds=self._knobs.cache_ttl_seconds,
            routing=self._knobs.model_routing,
            capacity_tokens_per_second=capacity,
            tasks_min=policy.ecs.baseline_tasks,
            tasks_max=policy.ecs.max_tasks,
        )

    def _read_routes(self) -> None:
        found, now = self._routes.read_all(), time.monotonic()
        self._lost_since = {model: self._lost_since.get(model, now) for model in self._routed.keys() - found.keys()}
        for model, since in self._lost_since.items():
            if now - since < _LOST_ROUTES_KEPT.total_seconds():
                found[model] = self._routed[model]
        self._routed = found

    def _look(self) -> None:
        """Read from AWS what is in service."""
        _unless_away("Bedrock", self._look_at_fleet)
        _unless_away("ECS", self._look_at_tasks)

    def _look_at_fleet(self) -> None:
        pages = self._bedrock.get_paginator("list_provisioned_model_throughputs").paginate(statusEquals="InService")
        self._in_service = {
            model["provisionedModelArn"]: model["modelUnits"]
            for page in pages
            for model in page["provisionedModelSummaries"]
        }

    def _look_at_tasks(self) -> None:
        cluster, service = self._options.ecs_cluster, self._options.ecs_service
        found = self._ecs.describe_services(cluster=cluster, services=[service])["services"][0]
        self._tasks_running, self._tasks_desired = found["runningCount"], found["desiredCount"]

    def _scale_to(self, tasks: int) -> None:
        if tasks == self._tasks_desired:
            return
        cluster, service = self._options.ecs_cluster, self._options.ecs_service
        update = partial(self._ecs.update_service, cluster=cluster, service=service, desiredCount=tasks)
        _unless_away("ECS", update)

    def _publish(self, flows: list[Flow], at: datetime) -> None:
        figures: list[_Figure] = [*self._figures(flows), *self._stages.figures()]
        if self._requests is not None:
            figures = [figure for figure in figures if figure[0] not in MEASURED] + list(self._requests.figures())
        by_namespace: dict[str, list[Datum]] = {}
        for name, dimensions, value in figures:
            by_namespace.setdefault(CATALOGUE[name].namespace, []).extend(self._data(name, dimensions, value, at))
        for namespace, data in by_namespace.items():
            _unless_away("CloudWatch", partial(self._cloudwatch.put_metric_data, Namespace=namespace, MetricData=data))

    def _data(
        self, name: MetricName, dimensions: dict[str, str], value: float | Mapping[float, int], at: datetime
    ) -> Iterator[Datum]:
        """As PutMetricData takes it."""
        assert tuple(dimensions) == CATALOGUE[name].dimensions
        counts = value if isinstance(value, Mapping) else {value: 1}
        resolution_seconds = 60 if self._period >= timedelta(minutes=1) else 1
        return data_of(name, tuple(dimensions.values()), counts, at, resolution_seconds)

    def _figures(self, flows: list[Flow]) -> list[tuple[MetricName, dict[str, str], float]]:
        """One period's metrics of the model, each with the value that its statistic gives."""
        steps = len(flows)
        figures: list[tuple[MetricName, dict[str, str], float]] = []
        for name, model in self._policy.models.items():
            own = [flow.models[name] for flow in flows]
            by_id, by_name = {"ModelId": model.model_id}, {"Model": name}
            latency = max(flow.invocation_p99_ms for flow in own)
            sent = sum(flow.sent_tokens_per_second for flow in own) / steps
            capacity = sum(flow.capacity_tokens_per_second for flow in own) / steps
            figures += [
                (MetricName.INVOCATION_THROTTLES, by_id, round(sum(flow.throttled for flow in own))),
                (MetricName.INVOCATIONS, by_id, round(sum(flow.answered for flow in own))),
                (MetricName.INVOCATION_LATENCY, by_id, latency),
                (MetricName.TOKENS_PER_SECOND, by_name, sent),
                (MetricName.CAPACITY_TOKENS_PER_SECOND, by_name, capacity),
            ]
        figures += [
            (MetricName.STAGE_LATENCY, {"Stage": name}, self._stages.p99_ms(name)) for name in self._stages.budgets_ms
        ]
        for intent in flows[0].offered_tokens_per_second:
            offered = sum(flow.offered_tokens_per_second[intent] for flow in flows) / steps
            figures.append((MetricName.OFFERED_TOKENS_PER_SECOND, {"Intent": intent}, offered))
        responses, requests = sum(flow.responses for flow in flows), sum(flow.requests for flow in flows)
        fallback_percent = 100 * sum(flow.fallbacks for flow in flows) / responses if responses else 0
        hit_percent = 100 * sum(flow.hits for flow in flows) / requests if requests else 0
        service = {"ClusterName": self._options.ecs_cluster, "ServiceName": self._options.ecs_service}
        calls = sum(model.answered + model.throttled for flow in flows for model in flow.models.values())
        seconds = sum(flow.seconds for flow in flows)
        per_task = calls / seconds / max(1, self._tasks_running)
        load_per_task = requests / seconds / max(1, self._tasks_running)
        return [
            *figures,
            (MetricName.INVOCATIONS_PER_TASK, {}, per_task),
            (MetricName.BEDROCK_QUEUE_DEPTH, {}, max(flow.queue_depth for flow in flows)),
            (MetricName.REQUEST_LATENCY_P99, {}, max(flow.request_p99_ms for flow in flows)),
            (MetricName.FALLBACK_RATE, {}, fallback_percent),
            (MetricName.CACHE_HIT_RATE, {}, hit_percent),
            (MetricName.RUNNING_TASK_COUNT, service, self._tasks_running),
            (MetricName.DESIRED_TASK_COUNT, service, self._tasks_desired),
            (MetricName.CPU_UTILIZATION, service, min(100.0, load_per_task * self._parameters.cpu_percent)),
        ]


def _unless_away(system: str, call: Callable[[], Any]) -> None:
    """Make the call; if the system fails, say so and go on."""
    try:
        call()
    except (BotoCoreError, ClientError) as error:
        _log.warning("%s does not answer, going on: %s", system, error)
