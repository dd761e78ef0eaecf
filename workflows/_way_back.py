"""People decide the way back; it is guarded, staged and watched, and a lever whose release breaches is taken again."""

from datetime import datetime, timedelta
from typing import Any, Literal

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.cloudwatch import CloudWatchActivities
from activities.decisions import DecisionActivities
from activities.latency import LatencyActivities
from domain.incident import Lever, LeverName, LeverStatus, Phase, span
from domain.messages import GuardRelease, WatchRelease
from domain.mitigation import Guard
from domain.runbooks import latency
from workflows import _mitigation
from workflows._evidence import recovery_query
from workflows._record import ON_CALL, SENIOR, Incident
from workflows._step import decide, failure, wait

BY_POLICY = "policy: the hold ended"


async def decide_way_back(incident: Incident) -> Literal["done", "again", "verify"]:
    """Wait for decisions and carry them out until nothing is held. `again`: the alarm returned; mitigate again.
    `verify`: a release breached and was taken back, so recovery has to be seen anew.

    A hold that ends starts the whole way back by itself after an hour in recovery; otherwise people are paged.
    """
    review_after = incident.now_snapshot.policy.overrides.review_after
    incident.record.keep_proposal = (
        f"Was a configured value the fault? `runbooks incident keep {incident.record.key} LEVER --why …` makes a lever "
        f"your standing override, reviewed after {span(review_after)}; it ends by itself once the policy has caught up."
    )
    window = incident.record.lever(LeverName.BATCH_WINDOW)
    if window is not None:
        incident.record.keep_proposal = latency.keep_proposal(incident.record.key, window, incident.now_snapshot.policy)
    while incident.record.held and not incident.abort_asked:
        hold = incident.next_hold
        incident.enter(
            Phase.AWAITING_DECISION,
            waiting_for="an approver to decide the way back",
            next_step="a hold ends: the guarded way back, or a page" if hold else "",
            next_at=hold,
        )
        try:
            await _decision(incident, hold)
        except TimeoutError:
            incident.holds_ended_until = hold
            _hold_ended(incident)
        if incident.alarm_returned or incident.abort_asked:
            break
        if incident.release_asked is not None:
            await _give_back(incident, [incident.release_asked])
            incident.release_asked = None
        elif incident.approved_by is not None:
            await _give_back(incident, [lever.name for lever in incident.record.held])
            incident.approved_by = None
        if incident.record.recovered_at is None and not incident.alarm_returned and not incident.abort_asked:
            return "verify" if incident.record.held else "again"
    breached = incident.record.held or incident.record.recovered_at is None
    if incident.alarm_returned and breached and not incident.abort_asked:
        incident.note("phase", "the alarm returned: mitigation again")
        return "again"
    return "done"


async def _decision(incident: Incident, hold: datetime | None) -> None:
    """Wait for a decision, or for `hold` to be another one. Raises TimeoutError when `hold` ends."""
    await workflow.wait_condition(
        lambda: bool(
            incident.approved_by
            or incident.abort_asked
            or incident.release_asked
            or incident.alarm_returned
            or not incident.record.held
            or incident.next_hold != hold
        ),
        timeout=None if hold is None else max(hold - workflow.now(), timedelta(0)),
        timeout_summary="Waiting for a person to decide the way back",
    )


def _hold_ended(incident: Incident) -> None:
    recovered_at = incident.record.recovered_at
    if (
        recovered_at is not None
        and workflow.now() - recovered_at >= incident.now_snapshot.policy.way_back.recovered_for
    ):
        incident.note("phase", "a hold ended after long enough in recovery: the way back starts by itself")
        incident.approved_by = BY_POLICY
    else:
        incident.page(SENIOR, f"a hold ended without long enough in recovery; the levers stay. {incident.running_cost}")


async def _give_back(incident: Incident, names: list[LeverName]) -> None:
    """Release levers in order, each guarded and watched; stops at the first that must stay or is taken again."""
    record = incident.record
    for name in names:
        lever = record.lever(name)
        if lever is None or lever.status is not LeverStatus.IN_FORCE or incident.abort_asked:
            continue
        if incident.alarm_returned:
            return
        incident.enter(Phase.REVERTING, waiting_for=f"the release of {name}", next_step=f"watch without {name}")
        if not await _may_release(incident, lever) or incident.alarm_returned or incident.abort_asked:
            return
        async with incident.deciding:  # an extension at the same moment must not put it back
            lever.status = LeverStatus.RELEASING
            incident.show()
            try:
                await _mitigation.release(lever, record.incident_id, f"way back of {record.key}")
            except ActivityError as error:
                lever.status = LeverStatus.IN_FORCE
                lever.detail = f"could not be released: {failure(error)[1]}"
                incident.page(SENIOR, f"{name} {lever.detail}")
                return
        lever.released_at = workflow.now()
        incident.note("lever", f"{name}: {lever.after} → {lever.before}: released, watched now")
        if not await _watch(incident, lever):
            return
        lever.status = LeverStatus.RELEASED
        lever.detail = ""
        incident.note("lever", f"{name}: released for good after a clean watch")


async def _may_release(incident: Incident, lever: Lever) -> bool:
    record, bought = incident.record, incident.record.lever(LeverName.CAPACITY)
    base_units = incident.units_of_the_hour
    if record.runbook == "scaling-lag" and record.units_before is not None and not (bought and bought.landed_at):
        base_units = record.units_before  # what the hour expects has not come yet
    request = GuardRelease(
        lever=lever.name,
        held=incident.record.held,
        model=incident.model,
        load=await incident.reread(),
        policy=incident.now_snapshot.policy,
        base_units=base_units,
    )
    try:
        summary = f"Guard: may {lever.name} be released?"
        if lever.name is LeverName.BATCH_WINDOW:
            guard = await decide(LatencyActivities.guard_window, request, summary=summary)
        else:
            guard = await decide(DecisionActivities.guard_release, request, summary=summary)
    except ActivityError as error:
        guard = Guard(may=False, why=f"the load without {lever.name} could not be projected: {failure(error)[1]}")
    incident.note("finding", guard.why)
    if not guard.may:
        lever.detail = guard.why
        _stopped(incident, f"the way back stops at {lever.name}: {guard.why}")
    return guard.may


async def _watch(incident: Incident, lever: Lever) -> bool:
    """Watch a released lever; on a breach, or when the alarm returns, take it again. True: clean."""
    way_back = incident.now_snapshot.policy.way_back
    request = WatchRelease(
        query=recovery_query(incident.model, incident.record.runbook, incident.now_snapshot, incident.p99_before_ms),
        watch=way_back.stage_watch,
        poll_interval=way_back.watch_poll_interval,
        breach_polls=way_back.breach_polls,
        blind_polls=way_back.blind_polls,
    )
    watched = await incident.unless(
        lambda: incident.abort_asked or incident.alarm_returned,
        wait(
            CloudWatchActivities.watch_release,
            request,
            summary=f"Watch the service without {lever.name}",
            at_most=request.watch,
        ),
    )
    if incident.abort_asked:
        return False
    if watched is not None:
        incident.record.recovery_checks = watched.checks or incident.record.recovery_checks
        if not watched.breaches:
            return True
    await _take_again(incident, lever, "; ".join(watched.breaches) if watched is not None else "the alarm returned")
    return False


async def _take_again(incident: Incident, lever: Lever, why: str) -> None:
    policy, now = incident.now_snapshot.policy, workflow.now()
    attempt = incident.next_attempt(lever.name)
    hold = policy.way_back.capacity_max_hold if lever.demand is not None else policy.way_back.lever_max_hold
    changes: dict[str, Any] = {"released_at": None, "hold_until": now + hold}
    if lever.lease is not None:
        lease = _mitigation.lease_id(incident.record.run_id, lever.name, attempt)
        changes["lease"] = lever.lease.model_copy(update={"lease_id": lease})
    if lever.demand is not None:
        end = _mitigation.demand_end(now + hold, policy)
        changes["demand"] = lever.demand.model_copy(update={"start": now, "end": end})
    [taken] = await _mitigation.take([lever.model_copy(update=changes)])
    if taken.status is LeverStatus.IN_FORCE:
        taken.detail = f"taken again: {why}"
    incident.set_lever(taken)
    incident.record.recovered_at = None
    incident.note("lever", f"{lever.name} was released and is taken again ({taken.status}): {why}")
    again = "it is taken again" if taken.status is LeverStatus.IN_FORCE else f"it could NOT be taken: {taken.detail}"
    _stopped(incident, f"the way back stopped: without {lever.name} {why}; {again}")


def _stopped(incident: Incident, text: str) -> None:
    """People decided: on-call hears. A hold ended and nobody decided: the next tier hears, with the running cost."""
    to = SENIOR if incident.approved_by == BY_POLICY else ON_CALL
    incident.page(to, f"{text}. {incident.running_cost}")
