"""Reading CloudWatch: the load on Bedrock, whether the service has recovered, whether a release holds."""

import asyncio
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from temporalio import activity

from activities._polling import elapsed, pause
from domain.evidence import Check, Evidence, EvidenceKey, Reading, Value
from domain.incident import RecoveryCheck
from domain.load import LoadSnapshot, ModelLoad, total_offered
from domain.messages import (
    AwaitedRecovery,
    AwaitRecovery,
    LoadQuery,
    RecoveryQuery,
    WatchedRelease,
    WatchRelease,
)
from domain.metrics import CATALOGUE, MetricName
from domain.mitigation import breaching, effects, held_since, recovery_checks
from domain.runbooks import latency

if TYPE_CHECKING:
    from types_boto3_cloudwatch.client import CloudWatchClient
    from types_boto3_cloudwatch.type_defs import MetricDataQueryTypeDef

Series = dict[datetime, float]
Asked = tuple[MetricName, Sequence[str]]
"""A metric, and its dimensions' values in order."""

THROTTLE_PERIODS = 10
"""Periods whose throttle share is reported."""
FRESH_PERIODS = 3
"""A gauge is current if it is at most so many periods older than the newest one."""


class CloudWatchActivities:
    """CloudWatch, and the ECS names that its Container Insights metrics carry."""

    def __init__(self, cloudwatch: "CloudWatchClient", *, ecs_cluster: str, ecs_service: str) -> None:
        self._cloudwatch = cloudwatch
        self._ecs = (ecs_cluster, ecs_service)

    @activity.defn
    def read_load(self, query: LoadQuery) -> LoadSnapshot:
        """The load now. Throttles as a whole number of the newest period; metrics without data stay None."""
        return self._read(query)

    @activity.defn
    async def await_recovery(self, request: AwaitRecovery) -> AwaitedRecovery:
        """Poll until recovered. Heartbeats carry since when each measure has been met, so a dead worker loses nothing.

        CloudWatch away: the measures stay as they were, polling goes on, and the answer says what could not be read.
        """
        query = request.query
        checks, peak, p99_since = request.checks, 0.0, None
        if details := activity.info().heartbeat_details:
            checks = [RecoveryCheck.model_validate(item) for item in details[0]]
            peak, p99_since = float(details[1]), datetime.fromisoformat(details[2]) if details[2] else None
        load: LoadSnapshot | None = None
        ended = "gave-up"
        while True:
            read, unread = await self._try_read(query.load)
            if read is not None:
                load = read
                checks = measures(query, load, checks)
                peak = max(peak, total_offered(load))
                since = held_since(checks)
                if since is not None and load.observed_at - since >= query.recovery.hold:
                    ended = "recovered"
                    break
                high = request.page_p99_ms is not None and (load.p99_ms or 0) > request.page_p99_ms
                p99_since = (p99_since or load.observed_at) if high else None
                if p99_since is not None and load.observed_at - p99_since >= request.page_p99_for:
                    ended = "p99-high"
                    break
            if elapsed() >= request.give_up_after:
                break
            state = [check.model_dump(mode="json") for check in checks]
            await pause(query.recovery.poll_interval, state, peak, p99_since.isoformat() if p99_since else "")
        return AwaitedRecovery.model_validate(
            {
                "ended": ended,
                "checks": checks,
                "load": load,
                "peak_offered_tokens_per_second": peak,
                "effects": effects(query.model, load) if load else [],
                "unread": unread,
            }
        )

    @activity.defn
    async def watch_release(self, request: WatchRelease) -> WatchedRelease:
        """Poll for the whole watch, or until the service breaches in several polls running.

        A watch that could not see the service to its end is not clean: what it did not see counts as a breach.
        """
        query = request.query
        checks: list[RecoveryCheck] = []
        load: LoadSnapshot | None = None
        breached = blind = 0
        while True:
            await pause(request.poll_interval)
            read, unread = await self._try_read(query.load)
            if read is None or not _seen(read, query.model, load):
                blind += 1
            else:
                load, blind = read, 0
                checks = measures(query, load, checks)
                breached = breached + 1 if breaching(checks) else 0
                if breached >= request.breach_polls:
                    return WatchedRelease(breaches=breaching(checks), checks=checks, load=load)
            if elapsed() >= request.watch:
                unseen = [f"the service could not be seen: {unread or 'no new metrics'}"]
                blinded = load is None or blind >= request.blind_polls
                return WatchedRelease(breaches=unseen if blinded else [], checks=checks, load=load)

    @activity.defn
    def check_metrics(self, query: RecoveryQuery) -> list[Check]:
        """First-response checks 1 (which metrics breach) and 2 (are there throttles)."""
        started = time.perf_counter()
        load = self._read(query.load)
        spent_ms = (time.perf_counter() - started) * 1000
        checks = measures(query, load, ())
        off_target, unread = breaching(checks), [check.name for check in checks if check.value is None]
        finding = "breaching: " + "; ".join(off_target) if off_target else "no metric breaches"
        if unread:
            finding += "; no data on " + ", ".join(unread)
        model = load.model(query.model)
        readings: dict[EvidenceKey, Value | None] = {
            EvidenceKey.THROTTLES_PER_PERIOD: model.throttles,
            EvidenceKey.TOKENS_PER_SECOND: demand(query, load),
            EvidenceKey.CAPACITY_TOKENS_PER_SECOND: model.capacity_tokens_per_second,
            EvidenceKey.QUEUE_DEPTH: load.queue_depth,
            EvidenceKey.P99_MS: load.p99_ms,
            EvidenceKey.FALLBACK_PERCENT: load.fallback_percent,
            EvidenceKey.HIT_RATE_PERCENT: None if load.hit_rate is None else load.hit_rate * 100,
            EvidenceKey.CALLS_PER_SECOND_PER_TASK: load.calls_per_second_per_task,
        }
        evidence = evidence_of(readings, "cloudwatch GetMetricData", load.observed_at, "no data in the lookback")
        throttles = model.throttles
        share = model.throttle_shares[-1] if model.throttle_shares else None
        throttle_finding = "throttles could not be read: no data"
        if throttles is not None:
            of_calls = f", {share:.1%} of calls" if share is not None else ""
            throttle_finding = f"{throttles:g} throttles on {query.model} in the newest period{of_calls}"
        common = {"evidence": evidence, "observed_at": load.observed_at, "duration_ms": spent_ms}
        return [
            Check(name="Which metrics breach", finding=finding, breaching=bool(off_target), **common),
            Check(
                name="Bedrock throttles",
                finding=throttle_finding,
                breaching=None if throttles is None else throttles > 0,
                **common,
            ),
        ]

    async def _try_read(self, query: LoadQuery) -> tuple[LoadSnapshot | None, str]:
        """The load, or None and why it could not be read."""
        try:
            return await asyncio.to_thread(self._read, query), ""
        except Exception as error:
            activity.logger.warning("CloudWatch could not be read, polling goes on", extra={"error": str(error)})
            return None, str(error)

    def series(
        self, wanted: Mapping[str, Asked], period: timedelta, lookback: timedelta
    ) -> tuple[dict[str, Series], datetime]:
        """Every metric by its label, of whole periods, in one GetMetricData call; and when the newest one ended."""
        queries: list[MetricDataQueryTypeDef] = []
        seconds = max(1, round(period.total_seconds()))
        for label, (name, values) in wanted.items():
            metric = CATALOGUE[name]
            dimensions = zip(metric.dimensions, values, strict=True)
            queries.append(
                {
                    "Id": f"q{len(queries)}",
                    "Label": label,
                    "MetricStat": {
                        "Metric": {
                            "Namespace": metric.namespace,
                            "MetricName": metric.name,
                            "Dimensions": [{"Name": key, "Value": value} for key, value in dimensions],
                        },
                        "Period": seconds,
                        "Stat": metric.statistic,
                    },
                }
            )
        end = datetime.fromtimestamp(math.floor(time.time() / seconds) * seconds, UTC)
        answer = self._cloudwatch.get_metric_data(MetricDataQueries=queries, StartTime=end - lookback, EndTime=end)
        by_id: dict[str, Series] = {}
        for result in answer["MetricDataResults"]:
            points = zip(result["Timestamps"], result["Values"], strict=True)
            by_id.setdefault(result["Id"], {}).update({at.astimezone(UTC): value for at, value in points})
        return {label: by_id.get(query["Id"], {}) for label, query in zip(wanted, queries, strict=True)}, end

    def _read(self, query: LoadQuery) -> LoadSnapshot:
        wanted: dict[str, Asked] = {}
        for model, model_id in query.models.items():
            wanted |= {
                f"throttles {model}": (MetricName.INVOCATION_THROTTLES, (model_id,)),
                f"invocations {model}": (MetricName.INVOCATIONS, (model_id,)),
                f"sent {model}": (MetricName.TOKENS_PER_SECOND, (model,)),
                f"capacity {model}": (MetricName.CAPACITY_TOKENS_PER_SECOND, (model,)),
                f"queue wait {model}": (MetricName.QUEUE_WAIT_TIME, (model,)),
            }
        wanted |= {f"offered {intent}": (MetricName.OFFERED_TOKENS_PER_SECOND, (intent,)) for intent in query.intents}
        wanted |= {
            "queue": (MetricName.BEDROCK_QUEUE_DEPTH, ()),
            "p99": (MetricName.REQUEST_LATENCY_P99, ()),
            "fallback": (MetricName.FALLBACK_RATE, ()),
            "hits": (MetricName.CACHE_HIT_RATE, ()),
            "tasks": (MetricName.RUNNING_TASK_COUNT, self._ecs),
            "calls per task": (MetricName.INVOCATIONS_PER_TASK, ()),
        }
        series, end = self.series(wanted, query.period, query.lookback)
        return snapshot(series, list(query.models), query.intents, end, query.period)


def snapshot(
    series: dict[str, Series], models: list[str], intents: list[str], end: datetime, period: timedelta
) -> LoadSnapshot:
    """Raw series as a load snapshot, as of the newest point of any of them."""
    newest = max((at for points in series.values() for at in points), default=None)
    if newest is None:
        return LoadSnapshot(observed_at=end)
    oldest = newest - FRESH_PERIODS * period

    def current(label: str) -> float | None:
        points = series[label]
        at = max(points, default=None)
        return points[at] if at is not None and at >= oldest else None

    def model_load(model: str) -> ModelLoad:
        throttles, invocations = series[f"throttles {model}"], series[f"invocations {model}"]
        times = sorted(set(throttles) | set(invocations))[-THROTTLE_PERIODS:]
        calls = [(throttles.get(at, 0.0), invocations.get(at, 0.0)) for at in times]
        return ModelLoad(
            sent_tokens_per_second=current(f"sent {model}"),
            capacity_tokens_per_second=current(f"capacity {model}"),
            throttles=throttles.get(times[-1]) if times and times[-1] >= oldest else None,
            queue_wait_ms=current(f"queue wait {model}"),
            throttle_shares=tuple(refused / (refused + ok) for refused, ok in calls if refused + ok > 0),
        )

    hits = current("hits")
    return LoadSnapshot(
        observed_at=newest,
        models={model: model_load(model) for model in models},
        offered_tokens_per_second={
            intent: value for intent in intents if (value := current(f"offered {intent}")) is not None
        },
        hit_rate=None if hits is None else hits / 100,
        queue_depth=current("queue"),
        p99_ms=current("p99"),
        p99_before_ms=_before_throttles(series["p99"], [series[f"throttles {model}"] for model in models]),
        fallback_percent=current("fallback"),
        tasks_running=current("tasks"),
        calls_per_second_per_task=current("calls per task"),
    )


def measures(query: RecoveryQuery, load: LoadSnapshot, before: Iterable[RecoveryCheck]) -> list[RecoveryCheck]:
    """The measures of the incident's runbook."""
    if (targets := query.latency) is not None:
        return latency.recovery_checks(query.model, load, targets.p99_ms, targets.queue_wait_ms, before)
    return recovery_checks(query.model, load, query.recovery, before, query.p99_before_ms)


def _seen(load: LoadSnapshot, model: str, before: LoadSnapshot | None) -> bool:
    """Whether the reading says something new of a service that answers."""
    new = before is None or load.observed_at > before.observed_at
    calls_made = (load.model(model).sent_tokens_per_second or 0) > 0
    return new and bool(load.models) and (load.p99_ms is not None or not calls_made)


def _before_throttles(p99: Series, throttles: list[Series]) -> float | None:
    """The oldest P99 in the lookback, if nothing was throttled yet then."""
    at = min(p99, default=None)
    if at is None or any(series.get(at, 0) > 0 for series in throttles):
        return None
    return p99[at]


def demand(query: RecoveryQuery, load: LoadSnapshot) -> float | None:
    """Demand on the incident's model: what would be sent without retries, at the measured hit rate."""
    if not load.offered_tokens_per_second or load.hit_rate is None:
        return load.model(query.model).sent_tokens_per_second
    offered = sum(load.offered_tokens_per_second.get(intent, 0.0) for intent in query.intents_of_model)
    return offered * (1 - load.hit_rate)


def evidence_of(
    values: dict[EvidenceKey, Value | None], source: str, observed_at: datetime | None, missing: str
) -> Evidence:
    """Values of one source as evidence; None becomes missing, and says why."""
    return Evidence(
        readings={
            key: Reading(
                key=key,
                value=value,
                missing=missing if value is None else None,
                observed_at=observed_at,
                source=source,
            )
            for key, value in values.items()
        }
    )
