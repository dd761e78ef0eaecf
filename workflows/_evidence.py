"""The six universal first-response checks, read in parallel within a budget, and the diagnosis."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import datetime

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.assessment import AssessmentActivities
from activities.bedrock import BedrockActivities
from activities.calendar import CalendarActivities
from activities.changes import ChangeActivities
from activities.cloudwatch import CloudWatchActivities
from activities.decisions import DecisionActivities
from activities.ecs import EcsActivities
from activities.latency import LatencyActivities
from domain import timetable
from domain.evidence import Check, Evidence
from domain.incident import RunbookName
from domain.messages import (
    AssessIncident,
    CheckCapacity,
    CheckChanges,
    CheckSystem,
    CheckTasks,
    DiagnoseIncident,
    IncidentAssessment,
    LatencyTargets,
    PolicySnapshot,
    RecoveryQuery,
    calendar_check,
    load_query,
)
from domain.policy import Policy
from domain.trees import Diagnosis
from workflows._step import decide, failure, read


def recovery_query(
    model: str, runbook: RunbookName | None, snapshot: PolicySnapshot, p99_before_ms: float | None = None
) -> RecoveryQuery:
    """What recovery of `model` is judged by."""
    policy, targets = snapshot.policy, None
    if runbook == "latency":
        targets = LatencyTargets(p99_ms=policy.latency.max_p99_ms, queue_wait_ms=policy.longest_usual_wait_ms)
    return RecoveryQuery(
        load=load_query(policy, model),
        model=model,
        intents_of_model=[name for name, intent in policy.intents.items() if intent.model == model],
        recovery=policy.recovery,
        p99_before_ms=p99_before_ms,
        latency=targets,
    )


def system_checks(policy: Policy) -> list[CheckSystem]:
    """Scenario 3's systems."""
    systems = policy.latency.systems
    named = {
        "Redis": [systems.redis, systems.redis_connections],
        "OpenSearch": [systems.opensearch],
        "DynamoDB": [systems.dynamodb],
        "API Gateway": [systems.api_gateway],
    }
    return [
        CheckSystem(name=name, signals=signals, period=policy.metrics.period, lookback=policy.evidence.metric_lookback)
        for name, signals in named.items()
    ]


async def assess(request: AssessIncident, runbook: RunbookName | None) -> IncidentAssessment:
    """What decides about the levers, and the plan; recorded. Raises ActivityError."""
    summary = "Re-read the metrics of the alarm, plan the levers"
    if runbook == "latency":
        return await decide(LatencyActivities.assess_latency, request, summary=summary)
    return await decide(AssessmentActivities.assess_throttle, request, summary=summary)


async def first_response(
    model: str,
    runbook: RunbookName | None,
    incident_id: str,
    snapshot: PolicySnapshot,
    found: Callable[[list[Check], bool], Awaitable[None]],
) -> None:
    """Run the checks, and scenario 3's on top where it is that.

    `found(checks, complete)` is called when the budget is spent, and again if more arrived later.
    """
    policy, spec = snapshot.policy, snapshot.policy.models[model]
    expected = timetable.units_at(policy, model, snapshot.clock.business(workflow.now()))
    reads: list[tuple[str, Awaitable[list[Check]]]] = [
        (
            "CloudWatch metrics",
            read(
                CloudWatchActivities.check_metrics,
                recovery_query(model, runbook, snapshot),
                summary="Checks 1, 2: breaching metrics, Bedrock throttles",
            ),
        ),
        (
            "Provisioned throughput",
            read(
                BedrockActivities.check_capacity,
                CheckCapacity(model=model, spec=spec, expected_units=expected),
                summary="Check 3: provisioned throughput against the expected level",
            ),
        ),
        (
            "ECS task count",
            read(
                EcsActivities.check_tasks,
                CheckTasks(baseline_tasks=policy.ecs.baseline_tasks),
                summary="Check 4: ECS tasks",
            ),
        ),
        (
            "Event calendar",
            read(
                CalendarActivities.check_calendar,
                calendar_check(snapshot, model, workflow.now()),
                summary="Check 5: event calendar",
            ),
        ),
        (
            "Recent changes",
            read(
                ChangeActivities.check_changes,
                CheckChanges(since=policy.evidence.recent_changes, incident_id=incident_id),
                summary="Check 6: changes of the last 24 h",
            ),
        ),
    ]
    if runbook == "latency":
        reads += [
            (system.name, read(LatencyActivities.check_system, system, summary=f"Scenario 3: is {system.name} slow?"))
            for system in system_checks(policy)
        ]
    results: dict[str, list[Check]] = {}

    async def one(name: str, awaitable: Awaitable[list[Check]], started: datetime) -> None:
        try:
            results[name] = await awaitable
        except ActivityError as error:
            kind, message = failure(error)
            spent_ms = (workflow.now() - started).total_seconds() * 1000
            results[name] = [
                Check(
                    name=name,
                    finding=f"could not be read: {kind}: {message}",
                    breaching=None,
                    evidence=Evidence(),
                    duration_ms=spent_ms,
                )
            ]

    def all_checks() -> list[Check]:
        return [check for name, _ in reads for check in results.get(name, [])]

    now = workflow.now()
    tasks = [asyncio.create_task(one(name, awaitable, now)) for name, awaitable in reads]
    with contextlib.suppress(TimeoutError):
        await workflow.wait_condition(
            lambda: all(task.done() for task in tasks),
            timeout=policy.evidence.budget,
            timeout_summary="Evidence budget: mitigation does not wait longer",
        )
    pending = [task for task in tasks if not task.done()]
    late = [
        Check(
            name=name,
            finding=f"not read within {policy.evidence.budget.total_seconds():g} s; mitigation goes ahead without it",
            breaching=None,
            evidence=Evidence(),
            duration_ms=policy.evidence.budget.total_seconds() * 1000,
        )
        for name, _ in reads
        if name not in results
    ]
    await found(all_checks() + late, not pending)
    if pending:
        await workflow.wait(pending)
        await found(all_checks(), True)


async def diagnose(evidence: Evidence, runbook: RunbookName | None, policy: Policy) -> Diagnosis:
    """The runbook's trees over everything the checks read; a recorded decision."""
    request = DiagnoseIncident(evidence=evidence, runbook=runbook or "throttle", policy=policy)
    if runbook == "latency":
        return await decide(DecisionActivities.diagnose_latency, request, summary="Diagnose: the tree of latency")
    return await decide(DecisionActivities.diagnose_throttle, request, summary=f"Diagnose: the trees of {runbook}")
