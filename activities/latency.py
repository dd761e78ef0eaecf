"""Scenario 3's evidence: the batcher and its window, the stages of an answer's way, and the systems on it."""

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from temporalio import activity

from activities._budgeted import budgeted, not_read
from activities.cloudwatch import FRESH_PERIODS, Asked, CloudWatchActivities, Series, evidence_of
from activities.settings import SettingsActivities
from dataplane.ledger import Ledger
from domain.evidence import Check, Evidence, EvidenceKey, Value
from domain.incident import BudgetRow
from domain.knobs import KnobName, Lease, effective_value
from domain.load import LoadSnapshot
from domain.messages import (
    AssessIncident,
    CheckSystem,
    GuardRelease,
    IncidentAssessment,
    MeasureBudget,
    load_query,
)
from domain.metrics import MetricName
from domain.mitigation import Guard
from domain.policy import Policy
from domain.runbooks import latency

KEYS = {
    MetricName.REDIS_READ_LATENCY: EvidenceKey.REDIS_READ_US,
    MetricName.REDIS_CONNECTIONS: EvidenceKey.REDIS_CONNECTIONS,
    MetricName.OPENSEARCH_LATENCY: EvidenceKey.OPENSEARCH_MS,
    MetricName.DYNAMODB_LATENCY: EvidenceKey.DYNAMODB_MS,
    MetricName.INTEGRATION_LATENCY: EvidenceKey.INTEGRATION_MS,
}

_DEPTH = "queue depth"


class _Stages(NamedTuple):
    """Of an answer's way, read at once."""

    batcher: Check
    budget: list[BudgetRow]


class LatencyActivities:
    """CloudWatch, the lease ledger and the configured policy."""

    def __init__(self, settings: SettingsActivities, cloudwatch: CloudWatchActivities, ledger: Ledger) -> None:
        self._settings = settings
        self._cloudwatch = cloudwatch
        self._ledger = ledger

    @activity.defn
    async def assess_latency(self, request: AssessIncident) -> IncidentAssessment:
        """What decides about the lever, read in parallel within the budget, and the plan.

        What cannot be read is planned without.
        """
        snapshot = request.snapshot or self._settings.snapshot()
        policy, model = snapshot.policy, request.model
        if model not in policy.models:
            return IncidentAssessment(snapshot=snapshot, load=_nothing(), plan=None)
        budget, ask = policy.evidence.budget, load_query(policy, model)
        period, recent = policy.metrics.period, policy.evidence.recent_changes
        windows: dict[str, Asked] = {"window": (MetricName.BATCH_WINDOW, (model,))}
        started = time.perf_counter()
        (load, unread), (stages, no_stages), leases, published = await asyncio.gather(
            budgeted(budget, lambda: asyncio.to_thread(self._cloudwatch.read_load, ask)),
            budgeted(budget, lambda: asyncio.to_thread(self._stages, model, policy)),
            budgeted(budget, lambda: asyncio.to_thread(lambda: self._ledger.leases().leases)),
            budgeted(budget, lambda: asyncio.to_thread(self._cloudwatch.series, windows, period, recent)),
        )
        window = window_check(policy, leases, published, (time.perf_counter() - started) * 1000)
        checks = [stages.batcher if stages else not_read("Batcher", no_stages), window]
        known = Evidence()
        for check in checks:
            known = known.merge(check.evidence)
        return IncidentAssessment(
            snapshot=snapshot,
            load=load or _nothing(),
            unread=unread,
            plan=latency.plan(known, policy, request.now),
            runbook="latency",
            checks=checks,
            budget=stages.budget if stages else [],
        )

    @activity.defn
    def measure_budget(self, request: MeasureBudget) -> list[BudgetRow]:
        """The latency budget as measured now; a stage without data has no value."""
        return self._stages(request.model, request.policy).budget

    @activity.defn
    def check_system(self, request: CheckSystem) -> list[Check]:
        """Whether one system is slow, by its own metrics in CloudWatch."""
        started = time.perf_counter()
        wanted: dict[str, Asked] = {signal.metric: (signal.metric, signal.dimensions) for signal in request.signals}
        series, end = self._cloudwatch.series(wanted, request.period, request.lookback)
        values: dict[EvidenceKey, Value | None] = {}
        high, words = False, []
        for signal in request.signals:
            value = _newest(series[signal.metric], end, request.period)
            values[KEYS[signal.metric]] = value
            high |= value is not None and value > signal.high
            shown = "no data" if value is None else f"{value:,.4g}"
            words.append(f"{signal.metric} {shown} (high is over {signal.high:,g}) {'/'.join(signal.dimensions)}")
        unknown = not high and None in values.values()
        return [
            Check(
                name=request.name,
                finding="; ".join(words),
                breaching=None if unknown else high,
                evidence=evidence_of(values, "cloudwatch GetMetricData", end, "no data in the lookback"),
                observed_at=end,
                duration_ms=(time.perf_counter() - started) * 1000,
            )
        ]

    @activity.defn
    def guard_window(self, request: GuardRelease) -> Guard:
        """Whether the window may go back to what leases and the configuration, as it is now, make of it."""
        policy = self._settings.snapshot().policy
        ours = {lever.lease.lease_id for lever in request.held if lever.lease and lever.name is request.lever}
        leases = self._ledger.leases().leases
        others = [lease for lease in leases if lease.lease_id not in ours]
        return latency.guard(_window_ms(leases, policy), _window_ms(others, policy), request.load, policy)

    def _stages(self, model: str, policy: Policy) -> _Stages:
        started = time.perf_counter()
        wanted: dict[str, Asked] = {
            stage.name: (MetricName.STAGE_LATENCY, (stage.name,)) for stage in policy.latency.stages
        }
        wanted |= {
            latency.QUEUE_WAIT: (MetricName.QUEUE_WAIT_TIME, (model,)),
            latency.INVOCATION: (MetricName.INVOCATION_LATENCY, (policy.models[model].model_id,)),
            latency.TOTAL: (MetricName.REQUEST_LATENCY_P99, ()),
            _DEPTH: (MetricName.BEDROCK_QUEUE_DEPTH, ()),
        }
        period = policy.metrics.period
        series, end = self._cloudwatch.series(wanted, period, policy.evidence.metric_lookback)
        now = {name: _newest(points, end, period) for name, points in series.items()}
        wait, depth, invocation = now[latency.QUEUE_WAIT], now[_DEPTH], now[latency.INVOCATION]
        most = policy.longest_usual_wait_ms
        values: dict[EvidenceKey, Value | None] = {
            EvidenceKey.QUEUE_WAIT_MS: wait,
            EvidenceKey.QUEUE_DEPTH: depth,
            EvidenceKey.INVOCATION_MS: invocation,
        }
        batcher = Check(
            name="Batcher",
            finding=f"{model}: P99 of the wait {_ms(wait)} (high is over {most:g} ms), of Bedrock's own latency "
            f"{_ms(invocation)}; queue depth {'unknown' if depth is None else f'{depth:g}'}",
            breaching=None if wait is None else wait > most,
            evidence=evidence_of(values, "cloudwatch GetMetricData", end, "no data in the lookback"),
            observed_at=end,
            duration_ms=(time.perf_counter() - started) * 1000,
        )
        return _Stages(batcher, latency.budget(now, model, policy))


def window_check(
    policy: Policy,
    leases: tuple[Sequence[Lease] | None, str],
    published: tuple[tuple[dict[str, Series], datetime] | None, str],
    took_ms: float,
) -> Check:
    """The window now and before, and by whom: leases tell who, a configured change only the metric's step.

    Args:
        policy: the incident's.
        leases: the ledger's, or why they could not be read.
        published: the metric's values since `evidence.recent_changes`, and their end; or why they could not be read.
        took_ms: reading both.
    """
    held = None if leases[0] is None else [one for one in leases[0] if one.knob is KnobName.BATCH_WINDOW_MS]
    in_force = None if held is None else _window_ms(held, policy)
    configured = _window_ms([], policy)
    series, end = ({}, datetime.now(UTC)) if published[0] is None else (published[0][0]["window"], published[0][1])
    now: float | None = in_force
    grown: tuple[float, datetime | None, bool] | None = None
    if policy.batcher.controller == "fixed":
        newest = _newest(series, end, policy.metrics.period)
        now = in_force if newest is None else newest
        if now is not None:
            since = end - policy.evidence.recent_changes
            grown = latency.window_before(series, now, since, end, policy.latency.revert_window_ms)
    elif in_force is not None:  # it chooses by itself; only the upper limit is anybody's
        grown = (min(in_force, configured), None, True)
    holders: list[str] | None = None
    by = f"leases could not be read: {leases[1]}"
    if held is not None:
        holders = [
            f"{lease.holder.id} since {lease.acquired_at:%H:%M:%S} UTC until {lease.expires_at:%H:%M:%S} UTC: "
            f"{lease.value} ms ({lease.reason})"
            for lease in held
        ]
        by = "held by " + ("; ".join(holders) or "nobody")
    missing = "; ".join(filter(None, (leases[1], published[1]))) or "no data on BatchWindow"
    values: dict[EvidenceKey, Value | None] = {
        EvidenceKey.WINDOW_MS: now,
        EvidenceKey.WINDOW_BEFORE_MS: grown[0] if grown else None,
        EvidenceKey.WINDOW_CHANGED_AT: (grown[1].isoformat() if grown[1] else "") if grown else None,
        EvidenceKey.WINDOW_HELD_BY: holders,
    }
    story = f"{_story(now, grown, missing)}; controller {policy.batcher.controller}"
    return Check(
        name="Batch window",
        finding=f"{story}; configured are {configured} ms (policy version {policy.version}); {by}",
        breaching=None if grown is None or now is None else now > grown[0],
        evidence=evidence_of(values, "redis leases, cloudwatch BatchWindow", end, missing),
        observed_at=end,
        duration_ms=took_ms,
    )


def _story(now: float | None, grown: tuple[float, datetime | None, bool] | None, missing: str) -> str:
    if now is None:
        return f"the window is unknown ({missing})"
    if grown is None:
        return f"the window is {now:g} ms; what it was is unknown ({missing})"
    before, at, is_measured = grown
    if now <= before:
        return f"the window is {now:g} ms and has not grown"
    if not is_measured:
        return f"the window is {now:g} ms as far as is known; {before:g} ms is known to be good"
    since = f" since {at:%Y-%m-%d %H:%M:%S} UTC" if at else ""
    return f"the window is {now:g} ms{since}, and was {before:g} ms"


def _window_ms(leases: Sequence[Lease], policy: Policy) -> int:
    value = effective_value(KnobName.BATCH_WINDOW_MS, leases, policy.baseline)
    assert isinstance(value, int)
    return value


def _newest(series: Series, end: datetime, period: timedelta) -> float | None:
    """The present value; None: it is too old to be that."""
    at = max(series, default=None)
    return series[at] if at is not None and at >= end - (FRESH_PERIODS + 1) * period else None


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f} ms"


def _nothing() -> LoadSnapshot:
    return LoadSnapshot(observed_at=datetime.now(UTC))
