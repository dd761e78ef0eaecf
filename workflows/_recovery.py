"""Waiting for recovery after a mitigation, and escalating on the way as the runbooks' table says."""

from datetime import timedelta
from typing import Literal

from temporalio import workflow

from activities.cloudwatch import CloudWatchActivities
from domain.incident import LeverName, Phase, span
from domain.load import LoadSnapshot
from domain.messages import AwaitedRecovery, AwaitRecovery
from domain.mitigation import THROTTLES, recovered_how
from workflows._evidence import recovery_query
from workflows._record import SENIOR, SENIOR_AND_TAM, Incident
from workflows._step import wait

Verdict = Literal["recovered", "again", "aborted"]
_MOST_DOUBLINGS = 16
"""Longer than any reminder's wait; more of them would leave what a timedelta can hold."""


async def verify(incident: Incident) -> Verdict:
    """Wait until recovered. `again`: still throttled, so the plan is made anew for the load as it is now.

    What is due on the way is counted from the first mitigation, however often the plan is made anew; holds end here
    too. Each new plan waits twice as long as the one before. Not recovered in time escalates, and the levers stay.
    """
    record, policy = incident.record, incident.now_snapshot.policy
    incident.enter(
        Phase.VERIFYING,
        waiting_for=f"recovery, held for {span(policy.recovery.hold)}",
        next_step="people decide the way back",
    )
    started = workflow.now()
    mitigated_at = record.mitigated_at or started
    incident.late_page_at = incident.late_page_at or mitigated_at + policy.recovery.timeout
    throttled_at = mitigated_at + policy.escalation.throttled_after_mitigation
    settled_at = started + policy.metrics.period * (policy.throttle.buy_periods + 1)
    look_after = _settling(incident, settled_at - started)
    doubled = look_after * 2 ** min(incident.attempt - 1, _MOST_DOUBLINGS)
    look_again_at = started + min(doubled, policy.escalation.approval_reminder)

    throttled_due = throttled_at if started < throttled_at else None

    def stopped() -> bool:
        # An alarm that returns has the plan made anew, once the last one had time to show.
        return incident.abort_asked or (incident.alarm_returned and workflow.now() >= settled_at)

    while not stopped():
        due = [(look_again_at, "look-again"), (incident.late_page_at, "late")]
        if throttled_due is not None:
            due.append((throttled_due, "throttled"))
        if incident.next_hold is not None:
            due.append((incident.next_hold, "hold"))
        at, why = min(due)
        patience = max(at - workflow.now(), policy.recovery.poll_interval)
        request = AwaitRecovery(
            query=recovery_query(incident.model, record.runbook, incident.now_snapshot, incident.p99_before_ms),
            checks=record.recovery_checks,
            give_up_after=patience,
            page_p99_ms=None if incident.p99_paged else policy.escalation.p99_ms,
            page_p99_for=policy.escalation.p99_for,
        )
        awaited = await incident.unless(
            stopped,
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
            incident.p99_paged = True
            incident.page(SENIOR, f"P99 over {policy.escalation.p99_ms:g} ms for {span(policy.escalation.p99_for)}")
            continue
        so_far = f"{span(workflow.now() - mitigated_at)} after mitigation"
        if at >= throttled_at:
            _page_throttled(incident, awaited, so_far)
            throttled_due = None
        if why == "late":
            _late(incident, awaited, so_far)
        if why == "hold":
            incident.holds_ended_until = at
            incident.page(SENIOR, f"a hold ended before recovery; the levers stay. {incident.running_cost}")
        elif why == "late" or at >= look_again_at:
            if anew := _why_anew(incident, awaited, so_far):
                incident.note("recovery", anew)
                return "again"
            if at >= look_again_at:
                look_again_at = incident.late_page_at
    if incident.abort_asked:
        return "aborted"
    incident.note("recovery", "the alarm returned: the plan is made anew for the present load")
    return "again"


def _settling(incident: Incident, otherwise: timedelta) -> timedelta:
    """How long the levers need to show."""
    policy = incident.now_snapshot.policy
    if incident.record.runbook == "latency":
        return policy.latency.verify_within
    bought = any(lever.name is LeverName.CAPACITY for lever in incident.record.held)
    return policy.escalation.throttled_after_mitigation if bought else otherwise


def _page_throttled(incident: Incident, awaited: AwaitedRecovery, so_far: str) -> None:
    throttled = any(check.name == THROTTLES and not check.met for check in awaited.checks)
    if throttled and not incident.stuck_paged:
        incident.stuck_paged = True
        incident.page(SENIOR_AND_TAM, f"throttles go on {so_far}. {incident.capacity_progress}")


def _why_anew(incident: Incident, awaited: AwaitedRecovery, so_far: str) -> str:
    """Why the plan is to be made anew; empty: it need not."""
    unmet = {check.name for check in awaited.checks if not check.met}
    if THROTTLES in unmet:
        return "still throttled: the plan is made anew for the present load"
    if incident.record.runbook != "latency" or not unmet:
        return ""
    names = ", ".join(sorted(unmet))
    if incident.record.held and not incident.stuck_paged:
        incident.stuck_paged = True
        incident.page(SENIOR, f"not back in the latency budget {so_far}: {names}. The levers stay")
    return f"still slow ({names}): the causes are looked for anew"


def _late(incident: Incident, awaited: AwaitedRecovery, so_far: str) -> None:
    incident.late_page_at = workflow.now() + incident.now_snapshot.policy.escalation.approval_reminder
    unmet = ", ".join(check.name for check in awaited.checks if not check.met) or "not held long enough"
    if awaited.unread:
        unmet += f" (the metrics cannot be read: {awaited.unread})"
    incident.page(SENIOR, f"not recovered {so_far}: {unmet}. The levers stay. {incident.running_cost}")


def _recovered(incident: Incident, load: LoadSnapshot | None) -> None:
    record = incident.record
    record.recovered_at = workflow.now()
    record.load_at_recovery = load
    incident.stuck_paged = incident.p99_paged = False
    incident.late_page_at = None
    incident.alarm_returned = False
    if load is not None:
        record.recovery, record.recovery_detail = recovered_how(
            load, record.peak_offered_tokens_per_second, incident.now_snapshot.policy.recovery
        )
    incident.note("recovery", record.recovery_detail or "recovered")
