"""Waiting for recovery after a mitigation, and escalating on the way as the runbooks' table says."""

from datetime import datetime
from typing import Literal

from temporalio import workflow

from activities.cloudwatch import CloudWatchActivities
from domain.incident import LeverName, Phase, span
from domain.load import LoadSnapshot
from domain.messages import AwaitRecovery
from domain.runbooks.throttle import recovered_how
from workflows._evidence import recovery_query
from workflows._record import SENIOR, SENIOR_AND_TAM, Incident
from workflows._step import wait

Verdict = Literal["recovered", "again", "aborted"]


async def verify(incident: Incident) -> Verdict:
    """Wait until recovered. `again`: still throttled, so the plan is made anew for the load as it is now.

    Not recovered in time escalates, and the levers stay.
    """
    record, policy = incident.record, incident.now_snapshot.policy
    started = workflow.now()
    incident.enter(
        Phase.VERIFYING,
        waiting_for=f"recovery, held for {span(policy.recovery.hold)}",
        next_step="people decide the way back",
    )
    due: list[tuple[datetime, str]] = [
        (started + policy.escalation.throttled_after_mitigation, "throttled"),
        (started + policy.recovery.timeout, "late"),
    ]
    if all(lever.name is not LeverName.CAPACITY for lever in record.held):
        due.insert(0, (started + policy.metrics.period * (policy.throttle.buy_periods + 1), "look-again"))
    page_p99_ms: float | None = policy.escalation.p99_ms
    while not incident.abort_asked:
        at, why = due[0] if due else (workflow.now() + policy.escalation.approval_reminder, "late")
        patience = max(at - workflow.now(), policy.recovery.poll_interval)
        request = AwaitRecovery(
            query=recovery_query(incident.model, incident.now_snapshot),
            checks=record.recovery_checks,
            give_up_after=patience,
            page_p99_ms=page_p99_ms,
            page_p99_for=policy.escalation.p99_for,
        )
        awaited = await incident.unless(
            lambda: incident.abort_asked,
            wait(CloudWatchActivities.await_recovery, request, summary="Wait for recovery", at_most=patience),
        )
        if awaited is None:
            break
        record.recovery_checks, record.effects = awaited.checks, awaited.effects
        incident.saw(awaited.peak_offered_tokens_per_second)
        if awaited.ended == "recovered":
            _recovered(incident, awaited.load)
            return "recovered"
        if awaited.ended == "p99-high":
            page_p99_ms = None
            incident.page(SENIOR, f"P99 over {policy.escalation.p99_ms:g} ms for {span(policy.escalation.p99_for)}")
            continue
        if due:
            due.pop(0)
        throttled = any(check.name == "throttles" and not check.met for check in awaited.checks)
        if why == "late":
            unmet = ", ".join(check.name for check in awaited.checks if not check.met) or "not held long enough"
            incident.page(SENIOR, f"not recovered after {span(workflow.now() - started)}: {unmet}. The levers stay.")
        if throttled:
            if why == "throttled" and not incident.throttles_paged:
                incident.throttles_paged = True
                so_far = f"throttles go on {span(at - started)} after mitigation"
                incident.page(SENIOR_AND_TAM, f"{so_far}. {incident.capacity_progress}")
            incident.note("recovery", "still throttled: the plan is made anew for the present load")
            return "again"
    return "aborted"


def _recovered(incident: Incident, load: LoadSnapshot | None) -> None:
    record = incident.record
    record.recovered_at = workflow.now()
    record.load_at_recovery = load
    incident.throttles_paged = False
    if load is not None:
        record.recovery, record.recovery_detail = recovered_how(
            load, record.peak_offered_tokens_per_second, incident.now_snapshot.policy.recovery
        )
    incident.note("recovery", record.recovery_detail or "recovered")
