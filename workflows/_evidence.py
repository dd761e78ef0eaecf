"""The six universal first-response checks, read in parallel within a budget, and the diagnosis."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import datetime

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.bedrock import BedrockActivities
from activities.calendar import CalendarActivities
from activities.changes import ChangeActivities
from activities.cloudwatch import CloudWatchActivities
from activities.decisions import DecisionActivities
from activities.ecs import EcsActivities
from domain import timetable
from domain.evidence import Check, Evidence
from domain.incident import RunbookName
from domain.messages import (
    CheckCapacity,
    CheckChanges,
    CheckTasks,
    DiagnoseThrottle,
    PolicySnapshot,
    RecoveryQuery,
    calendar_check,
    load_query,
)
from domain.policy import Policy
from domain.trees import Diagnosis
from workflows._step import decide, failure, read


def recovery_query(model: str, snapshot: PolicySnapshot, p99_before_ms: float | None = None) -> RecoveryQuery:
    """What recovery of `model` is judged by."""
    policy = snapshot.policy
    return RecoveryQuery(
        load=load_query(policy, model),
        model=model,
        intents_of_model=[name for name, intent in policy.intents.items() if intent.model == model],
        recovery=policy.recovery,
        p99_before_ms=p99_before_ms,
    )


async def first_response(
    model: str,
    incident_id: str,
    snapshot: PolicySnapshot,
    found: Callable[[list[Check], bool], Awaitable[None]],
) -> None:
    """Run the checks. `found(checks, complete)` is called when the budget is spent, and again if more arrived later."""
    policy, spec = snapshot.policy, snapshot.policy.models[model]
    expected = timetable.units_at(policy, model, snapshot.clock.business(workflow.now()))
    reads: list[tuple[str, Awaitable[list[Check]]]] = [
        (
            "CloudWatch metrics",
            read(
                CloudWatchActivities.check_metrics,
                recovery_query(model, snapshot),
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
    request = DiagnoseThrottle(evidence=evidence, runbook=runbook or "throttle", policy=policy)
    return await decide(DecisionActivities.diagnose_throttle, request, summary=f"Diagnose: the trees of {runbook}")
