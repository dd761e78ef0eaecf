"""CloudWatch: metrics that read back right, and alarms that evaluate on data and tell SNS and EventBridge.

moto keeps the alarms' definitions; samples, states and history are kept here.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from moto.cloudwatch import urls
from moto.cloudwatch.models import Alarm, CloudWatchBackend, cloudwatch_backends
from moto.cloudwatch.responses import CloudWatchResponse
from moto.core.responses import ActionResult, EmptyResult
from moto.events.models import events_backends
from moto.sns.models import sns_backends
from moto.sqs.models import sqs_backends

from simulator.aws.alarm_messages import event, region_name, sns_message
from simulator.aws.alarms import (
    ALARM,
    COMPARISONS,
    EXTRA_PERIODS,
    INSUFFICIENT_DATA,
    OK,
    TREATMENTS,
    CompositeRule,
    Rule,
    Slot,
    aws_time,
    evaluate,
    reason_data,
)
from simulator.aws.errors import AwsError
from simulator.aws.metrics import (
    MetricQuery,
    MetricStore,
    SeriesKey,
    Statistic,
    checked_period,
    datum_samples,
    parse_queries,
    rounded_start,
    run_queries,
)
from simulator.aws.world import ENVIRON_KEY, AwsConfig, World

log = logging.getLogger(__name__)

_MAX_HISTORY = 10_000
_MAX_RECORDS = 100
_DEFAULT_RECORDS = 50
_MAX_QUERIES = 500
_MAX_DATA = 1000
_MAX_VALUES = 150
_MAX_DIMENSIONS = 30
_MAX_DATAPOINTS = 1440
_MAX_METRICS_PAGE = 500
_MAX_SUBJECT = 100
_STATES = (OK, ALARM, INSUFFICIENT_DATA)


@dataclass
class AlarmState:
    """What an alarm needs beyond moto's definition of it."""

    queries: list[MetricQuery] = field(default_factory=list)
    """Of a metric alarm."""
    rule: CompositeRule | None = None
    """Of a composite alarm."""
    seen_children: dict[str, str] = field(default_factory=dict)
    """The children's states when a composite was last evaluated."""
    not_before: float = 0
    """Epoch seconds: SetAlarmState holds until the next evaluation."""

    @property
    def returned(self) -> MetricQuery:
        """The one query that the threshold is compared with."""
        return next(query for query in self.queries if query.returned)


class CloudWatchState:
    """Kept on moto's backend, so that moto's reset empties it."""

    def __init__(self, settings: AwsConfig) -> None:
        self.lock = threading.RLock()
        """Held while an alarm changes its state and tells so: messages leave in the order of the changes."""
        self.store = MetricStore(settings.metric_retention.total_seconds(), settings.max_samples_per_series)
        self.alarms: dict[str, AlarmState] = {}
        self.history: deque[dict[str, Any]] = deque(maxlen=_MAX_HISTORY)


def state_of(backend: CloudWatchBackend, settings: AwsConfig) -> CloudWatchState:
    """The backend's state, made on first use."""
    state: CloudWatchState | None = backend.__dict__.get("_simulator_state")
    if state is None:
        state = backend.__dict__.setdefault("_simulator_state", CloudWatchState(settings))
    return state


class EvaluatingCloudWatchResponse(CloudWatchResponse):
    """moto's CloudWatch with a metric store and alarms of our own."""

    @property
    def _world(self) -> World:
        world: World = self.normalized_request.environ[ENVIRON_KEY]
        return world

    @property
    def _state(self) -> CloudWatchState:
        return state_of(self.cloudwatch_backend, self._world.settings)

    # Metrics

    def put_metric_data(self) -> ActionResult:
        """Values, values with counts, and statistic sets. All or nothing."""
        data, now = self._get_param("MetricData", []), time.time()
        if len(data) > _MAX_DATA:
            raise AwsError("InvalidParameterValue", f"{len(data)} metrics; one call takes at most {_MAX_DATA}.")
        for number, datum in enumerate(data, start=1):
            self.cloudwatch_backend._validate_parameters_put_metric_data(datum, number)
            for name, limit in (("Values", _MAX_VALUES), ("Dimensions", _MAX_DIMENSIONS)):
                if len(datum.get(name) or []) > limit:
                    raise AwsError(
                        "InvalidParameterValue", f"MetricData.member.{number}.{name} has more than {limit} entries."
                    )
        namespace = self._get_param("Namespace")
        for datum in data:
            key = SeriesKey.of({**datum, "Namespace": namespace})
            samples = datum_samples({**datum, "Timestamp": _epoch(datum.get("Timestamp"))}, now)
            self._state.store.put(key, samples, now)
        return EmptyResult()

    def get_metric_data(self) -> ActionResult:
        """Metrics by namespace and exact dimensions, percentiles, simple metric math; newest first by default."""
        queries = self._get_param("MetricDataQueries", [])
        if len(queries) > _MAX_QUERIES:
            raise AwsError("ValidationError", f"{len(queries)} queries; one call takes at most {_MAX_QUERIES}.")
        parsed = parse_queries(queries)
        start, end = self._range()
        found = run_queries(self._state.store, parsed, start, end)
        newest_first = self._get_param("ScanBy", "TimestampDescending") != "TimestampAscending"
        results = []
        for query in parsed:
            if query.returned:
                points = sorted(found[query.id].items(), reverse=newest_first)
                results.append(
                    {
                        "Id": query.id,
                        "Label": query.label,
                        "Timestamps": [datetime.fromtimestamp(at, UTC) for at, _ in points],
                        "Values": [value for _, value in points],
                        "StatusCode": "Complete",
                    }
                )
        return ActionResult({"MetricDataResults": results})

    def get_metric_statistics(self) -> ActionResult:
        """Statistics and percentiles of one metric."""
        plain, extended = self._get_param("Statistics", []), self._get_param("ExtendedStatistics", [])
        if not plain and not extended:
            raise AwsError("InvalidParameterCombination", "Must specify either Statistics or ExtendedStatistics")
        start, end = self._range()
        period = checked_period(self._get_param("Period"))
        if (end - start) / period > _MAX_DATAPOINTS:
            raise AwsError(
                "InvalidParameterCombination",
                f"You have requested up to {int((end - start) / period)} datapoints, which exceeds the limit of "
                f"{_MAX_DATAPOINTS}.",
            )
        key = SeriesKey.of({name: self._get_param(name) for name in ("Namespace", "MetricName", "Dimensions")})
        statistics = [Statistic(name) for name in (*plain, *extended)]
        unit = self._get_param("Unit")
        datapoints = []
        for at, samples in self._state.store.periods(key, period, rounded_start(start, period), end, unit):
            values = {statistic.name: statistic.of(samples) for statistic in statistics}
            datapoint: dict[str, Any] = {name: values[name] for name in plain}
            datapoint |= {"Timestamp": datetime.fromtimestamp(at, UTC), "Unit": samples[0].unit}
            if extended:
                datapoint["ExtendedStatistics"] = {n: values[n] for n in extended if values[n] is not None}
            datapoints.append(datapoint)
        return ActionResult({"Label": key.name, "Datapoints": datapoints})

    def _range(self) -> tuple[float, float]:
        start, end = _epoch(self._get_param("StartTime")), _epoch(self._get_param("EndTime"))
        if start is None or end is None or start >= end:
            raise AwsError("ValidationError", "The parameter EndTime must be greater than StartTime.")
        return start, end

    def list_metrics(self) -> ActionResult:
        """Every series that has samples, in pages of 500."""
        namespace, name = self._get_param("Namespace"), self._get_param("MetricName")
        wanted = self._get_param("Dimensions", [])
        found = [
            {
                "Namespace": key.namespace,
                "MetricName": key.name,
                "Dimensions": [{"Name": have, "Value": value} for have, value in key.dimensions],
            }
            for key in self._state.store.series()
            if namespace in (None, key.namespace)
            and name in (None, key.name)
            and all(
                any(item["Name"] == have and item.get("Value") in (None, value) for have, value in key.dimensions)
                for item in wanted
            )
        ]
        page, token = _page(found, self._get_param("NextToken"), _MAX_METRICS_PAGE)
        return ActionResult({"Metrics": page, "NextToken": token})

    # Alarms

    def put_metric_alarm(self) -> ActionResult:
        """A new alarm starts in INSUFFICIENT_DATA; an updated one keeps its state."""
        state = AlarmState(queries=self._alarm_queries())
        periods = self._get_param("EvaluationPeriods")
        datapoints = self._get_param("DatapointsToAlarm") or periods
        if not periods or not 1 <= datapoints <= periods:
            raise AwsError(
                "ValidationError",
                f"DatapointsToAlarm {datapoints} must be from 1 to EvaluationPeriods {periods}.",
            )
        comparison, treat = self._get_param("ComparisonOperator"), self._get_param("TreatMissingData")
        if comparison not in COMPARISONS or self._get_param("Threshold") is None:
            raise AwsError(
                "ValidationError",
                f"The simulator compares with a Threshold, by one of {', '.join(COMPARISONS)}; got {comparison!r}.",
            )
        if treat is not None and treat not in TREATMENTS:
            raise AwsError("ValidationError", f"TreatMissingData {treat!r} must be one of {', '.join(TREATMENTS)}.")
        return self._put_alarm(state, super().put_metric_alarm)

    def _alarm_queries(self) -> list[MetricQuery]:
        if metrics := self._get_param("Metrics"):
            queries = parse_queries(metrics)
        else:
            stat = self._get_param("Statistic") or self._get_param("ExtendedStatistic")
            if stat is None:
                raise AwsError("ValidationError", "Statistic, ExtendedStatistic or Metrics must be given.")
            metric = {name: self._get_param(name) for name in ("Namespace", "MetricName", "Dimensions")}
            query = {
                "Metric": metric,
                "Period": self._get_param("Period"),
                "Stat": stat,
                "Unit": self._get_param("Unit"),
            }
            queries = parse_queries([{"Id": "m1", "MetricStat": query}])
        if sum(query.returned for query in queries) != 1:
            raise AwsError("ValidationError", "Exactly one element of the metrics list should return data.")
        return queries

    def put_composite_alarm(self) -> ActionResult:
        """A rule over other alarms' states. Action suppression is not simulated."""
        if self._get_param("ActionsSuppressor"):
            raise AwsError("ValidationError", "The simulator does not suppress actions: leave out ActionsSuppressor.")
        rule = CompositeRule(self._get_param("AlarmRule"))
        missing = rule.children - set(self.cloudwatch_backend.alarms)
        if missing:
            raise AwsError("ValidationError", f"AlarmRule names alarms that do not exist: {sorted(missing)}")
        return self._put_alarm(AlarmState(rule=rule), super().put_metric_alarm)

    def _put_alarm(self, state: AlarmState, put: Any) -> ActionResult:
        name = self._get_param("AlarmName")
        backend, ours = self.cloudwatch_backend, self._state
        with ours.lock:
            before = backend.alarms.get(name)
            answer: ActionResult = put()
            alarm: Any = backend.alarms[name]
            alarm.metrics = self._get_param("Metrics") or None
            if before is None:
                alarm.state_value = INSUFFICIENT_DATA
                alarm.state_transitioned_timestamp = alarm.state_updated_timestamp
            else:
                for kept in ("value", "reason", "reason_data", "updated_timestamp", "transitioned_timestamp"):
                    setattr(alarm, f"state_{kept}", getattr(before, f"state_{kept}"))
            ours.alarms[name] = state
            verb = "created" if before is None else "updated"
            _remember(ours, alarm, "ConfigurationUpdate", f'Alarm "{name}" {verb}', {})
        return answer

    def describe_alarms(self) -> ActionResult:
        """Metric alarms, and composite ones when `AlarmTypes` asks for them; in pages."""
        names, prefix = self._get_param("AlarmNames"), self._get_param("AlarmNamePrefix")
        wanted, action = self._get_param("StateValue"), self._get_param("ActionPrefix")
        if self._get_param("ChildrenOfAlarmName") or self._get_param("ParentsOfAlarmName"):
            raise AwsError("ValidationError", "The simulator does not list children or parents of alarms.")
        types = self._get_param("AlarmTypes") or ["MetricAlarm"]
        with self._state.lock:
            found = [
                alarm
                for name, alarm in sorted(self.cloudwatch_backend.alarms.items())
                if _type_of(alarm) in types
                and (not names or name in names)
                and name.startswith(prefix or "")
                and wanted in (None, alarm.state_value)
                and (not action or any(arn.startswith(action) for arn in alarm.alarm_actions))
            ]
        page, token = _page(found, self._get_param("NextToken"), self._max_records())
        return ActionResult(
            {
                "MetricAlarms": [alarm for alarm in page if alarm.rule is None],
                "CompositeAlarms": [alarm for alarm in page if alarm.rule is not None],
                "NextToken": token,
            }
        )

    def describe_alarm_history(self) -> ActionResult:
        """State changes, configuration changes and actions, newest first by default."""
        name, kind = self._get_param("AlarmName"), self._get_param("HistoryItemType")
        start, end = _epoch(self._get_param("StartDate")), _epoch(self._get_param("EndDate"))
        types = self._get_param("AlarmTypes") or ["MetricAlarm"]
        with self._state.lock:
            found = [
                item
                for item in self._state.history
                if name in (None, item["AlarmName"])
                and kind in (None, item["HistoryItemType"])
                and (name is not None or item["AlarmType"] in types)
                and (start is None or item["Timestamp"].timestamp() >= start)
                and (end is None or item["Timestamp"].timestamp() <= end)
            ]
        if self._get_param("ScanBy") != "TimestampAscending":
            found.reverse()
        page, token = _page(found, self._get_param("NextToken"), self._max_records())
        return ActionResult({"AlarmHistoryItems": page, "NextToken": token})

    def _max_records(self) -> int:
        limit = int(self._get_param("MaxRecords") or _DEFAULT_RECORDS)
        if not 1 <= limit <= _MAX_RECORDS:
            raise AwsError("ValidationError", f"MaxRecords {limit} must be from 1 to {_MAX_RECORDS}.")
        return limit

    def set_alarm_state(self) -> ActionResult:
        """Fires the actions of that state; a metric alarm returns to its real state at its next evaluation."""
        name, value = self._get_param("AlarmName"), self._get_param("StateValue")
        data = self._get_param("StateReasonData")
        if value not in _STATES:
            raise AwsError("ValidationError", f"StateValue {value!r} must be one of {', '.join(_STATES)}.")
        if data is not None and not _is_json(data):
            raise AwsError("InvalidFormat", "StateReasonData is not JSON.")
        backend, ours = self.cloudwatch_backend, self._state
        with ours.lock:
            alarm = backend.alarms.get(name)
            if alarm is None:
                raise AwsError("ResourceNotFound", f"There is no alarm {name}.")
            state = ours.alarms[name]
            if state.rule is None:
                period = state.returned.period
                state.not_before = (time.time() // period + 1) * period
            transition(backend, ours, alarm, value, self._get_param("StateReason"), data)
        return EmptyResult()


def _epoch(at: datetime | None) -> float | None:
    """moto's naive UTC as epoch seconds."""
    if at is None:
        return None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _page(found: list[Any], token: str | None, limit: int) -> tuple[list[Any], str | None]:
    start = int(token or 0)
    return found[start : start + limit], str(start + limit) if start + limit < len(found) else None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _type_of(alarm: Alarm) -> str:
    return "MetricAlarm" if alarm.rule is None else "CompositeAlarm"


def _remember(ours: CloudWatchState, alarm: Alarm, kind: str, summary: str, data: Mapping[str, Any]) -> None:
    ours.history.append(
        {
            "AlarmName": alarm.name,
            "AlarmType": _type_of(alarm),
            "Timestamp": datetime.now(UTC),
            "HistoryItemType": kind,
            "HistorySummary": summary,
            "HistoryData": json.dumps({"version": "1.0", **data}),
        }
    )


# Evaluation


class AlarmEvaluator(threading.Thread):
    """Evaluates every alarm of every account and region at each tick: metric alarms first, then composite ones."""

    def __init__(self, world: World) -> None:
        super().__init__(name="aws-alarms", daemon=True)
        self._world = world

    def run(self) -> None:
        """Until the simulator stops."""
        while not self._world.stopping.wait(self._world.settings.alarm_tick.total_seconds()):
            with self._world.resetting:
                for backend in _backends():
                    ours = state_of(backend, self._world.settings)
                    for alarm in sorted(backend.alarms.values(), key=_type_of, reverse=True):
                        try:
                            with ours.lock:
                                self._evaluate(backend, ours, alarm)
                        except Exception:
                            log.exception("alarm %s could not be evaluated", alarm.name)

    def _evaluate(self, backend: CloudWatchBackend, ours: CloudWatchState, alarm: Alarm) -> None:
        if backend.alarms.get(alarm.name) is not alarm:
            return  # changed or deleted meanwhile
        state = ours.alarms[alarm.name]
        if state.rule is not None:
            _evaluate_composite(backend, ours, alarm, state, state.rule)
        elif time.time() >= state.not_before:
            _evaluate_metric(backend, ours, alarm, state)


def _backends() -> Iterator[CloudWatchBackend]:
    for regions in list(cloudwatch_backends.values()):
        yield from list(regions.values())


def _evaluate_metric(backend: CloudWatchBackend, ours: CloudWatchState, alarm: Alarm, state: AlarmState) -> None:
    query, now = state.returned, datetime.now(UTC)
    datapoints = alarm.datapoints_to_alarm or alarm.evaluation_periods
    rule = Rule(
        alarm.comparison_operator,
        float(alarm.threshold),
        alarm.evaluation_periods,
        datapoints,
        alarm.treat_missing_data or "missing",
        _min_samples(alarm, query),
    )
    end = now.timestamp() // query.period * query.period
    start = end - (alarm.evaluation_periods + EXTRA_PERIODS) * query.period
    points = run_queries(ours.store, state.queries, start, end, align=False)[query.id]
    counts: Mapping[float, float] = {}
    if query.key is not None:
        counts = ours.store.points(query.key, Statistic("SampleCount"), query.period, start, end, query.unit)
    starts = [start + number * query.period for number in range(alarm.evaluation_periods + EXTRA_PERIODS)]
    verdict = evaluate(rule, [Slot(at, points.get(at), counts.get(at)) for at in starts])
    if verdict is not None and verdict.state != alarm.state_value:
        statistic = query.statistic.name if query.statistic is not None else None
        data = reason_data(rule, verdict, statistic=statistic, period=query.period, now=now)
        transition(backend, ours, alarm, verdict.state, verdict.reason, json.dumps(data))


def _min_samples(alarm: Alarm, query: MetricQuery) -> float:
    """AWS: 10 / (1 - p) from the median up, 10 / p below; only where the alarm asks to ignore fewer samples."""
    if alarm.evaluate_low_sample_count_percentile != "ignore" or query.statistic is None:
        return 0
    percent = query.statistic.percent
    if percent is None or not 0 < percent < 100:
        return 0
    share = percent / 100
    return round(10 / (1 - share) if share >= 0.5 else 10 / share, 6)


def _evaluate_composite(
    backend: CloudWatchBackend, ours: CloudWatchState, alarm: Alarm, state: AlarmState, rule: CompositeRule
) -> None:
    states = {name: backend.alarms[name].state_value for name in rule.children if name in backend.alarms}
    if states == state.seen_children:
        return
    changed = [name for name, value in states.items() if state.seen_children.get(name) != value]
    state.seen_children = states
    value = ALARM if rule.holds(states) else OK
    if value == alarm.state_value:
        return
    child = backend.alarms[max(changed, key=lambda name: backend.alarms[name].state_updated_timestamp)]
    at = child.state_updated_timestamp.replace(tzinfo=UTC)
    reason = f"{child.alarm_arn} transitioned to {child.state_value} at {at:%A %d %B, %Y %H:%M:%S} UTC"
    triggering = [{"arn": child.alarm_arn, "state": {"value": child.state_value, "timestamp": aws_time(at)}}]
    transition(backend, ours, alarm, value, reason, json.dumps({"triggeringAlarms": triggering}))


# Telling


def transition(
    backend: CloudWatchBackend, ours: CloudWatchState, alarm: Any, value: str, reason: str, data: str | None
) -> None:
    """Change the state and tell about it. The same state again changes the reason only. The lock is held."""
    now = datetime.now(UTC)
    old = {"value": alarm.state_value, "reason": alarm.state_reason, "reasonData": alarm.state_reason_data}
    old["timestamp"] = aws_time(alarm.state_updated_timestamp.replace(tzinfo=UTC))
    alarm.state_value, alarm.state_reason, alarm.state_reason_data = value, reason, data or "{}"
    alarm.state_updated_timestamp = now.replace(tzinfo=None)
    if value == old["value"]:
        return
    alarm.state_transitioned_timestamp = alarm.state_updated_timestamp
    new = {"value": value, "reason": reason, "timestamp": aws_time(now)} | ({"reasonData": data} if data else {})
    _remember(
        ours,
        alarm,
        "StateUpdate",
        f"Alarm updated from {old['value']} to {value}",
        {"oldState": _history_state(old), "newState": _history_state(new)},
    )
    _put_event(backend, event(backend, alarm, old, new, now))
    if alarm.actions_enabled:
        _fire(backend, ours, alarm, old["value"], now)


def _history_state(state: Mapping[str, Any]) -> dict[str, Any]:
    described = {"stateValue": state["value"], "stateReason": state["reason"]}
    if state.get("reasonData"):
        described["stateReasonData"] = json.loads(state["reasonData"])
    return described


def _fire(backend: CloudWatchBackend, ours: CloudWatchState, alarm: Alarm, old: str, now: datetime) -> None:
    actions = {OK: alarm.ok_actions, ALARM: alarm.alarm_actions, INSUFFICIENT_DATA: alarm.insufficient_data_actions}
    for arn in actions[alarm.state_value]:
        try:
            if ":sns:" not in arn:
                raise ValueError("the simulator performs SNS actions only")
            state = ours.alarms[alarm.name]
            message = sns_message(backend, alarm, state.returned.period if state.rule is None else 0, old, now)
            subject = f'{alarm.state_value}: "{alarm.name}" in {region_name(backend.region_name)}'
            sns_backends[backend.account_id][backend.region_name].publish(
                json.dumps(message, separators=(",", ":")),
                arn,
                subject=subject[:_MAX_SUBJECT],
            )
        except Exception as error:
            log.warning("action %s of alarm %s failed: %s", arn, alarm.name, error)
            summary = f"Failed to execute action {arn}. Received error: {error!r}"
        else:
            summary = f"Successfully executed action {arn}"
        _remember(
            ours, alarm, "Action", summary, {"stateUpdateTimestamp": now.timestamp(), "notificationResource": arn}
        )


def _put_event(backend: CloudWatchBackend, message: Any) -> None:
    """To the SQS queues that rules of the default bus name. moto's own way drops `account` and rewrites `<words>`."""
    bus = events_backends[backend.account_id][backend.region_name].describe_event_bus("default")
    for rule in list(bus.rules.values()):
        if rule.state != "ENABLED" or not rule.event_pattern.matches_event(message):
            continue
        for arn in [target["Arn"] for target in rule.targets]:
            try:
                queues = sqs_backends[backend.account_id][backend.region_name]
                queues.send_message(queue_name=arn.rsplit(":", 1)[-1], message_body=json.dumps(message))
            except Exception as error:
                log.warning("event could not be sent to %s: %s", arn, error)


def install() -> None:
    """Put it in moto's place. Before the server starts."""
    for path in urls.url_paths:
        urls.url_paths[path] = EvaluatingCloudWatchResponse.dispatch
