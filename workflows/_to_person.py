"""Levers that go from the automation to a person: kept as a standing override, or taken over until a stated end.

The override holds the value before the incident's lease is released, so there is no gap.
"""

from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.entities import EntityActivities
from domain.incident import Lever, LeverStatus, Phase, span, utc
from domain.messages import (
    KeepRequest,
    OverrideInput,
    PersonRequest,
    StartOverride,
    TakeOverRequest,
    override_id,
)
from domain.override import OverrideKind
from domain.people import Role
from workflows import _mitigation
from workflows._record import Incident
from workflows._step import failure, mutate

PROMPT = timedelta(seconds=15)
"""How long the person who asks is kept waiting for one lever."""


async def keep(incident: Incident, request: KeepRequest) -> tuple[str, str]:
    """Make a lever a standing override of the approver who asks; answers outcome and message."""
    record = incident.record
    lever = record.lever(request.lever)
    if lever is not None and lever.status is LeverStatus.KEPT:
        return "already-done", f"{lever.name}: {lever.detail}"
    if lever is None or lever.status is not LeverStatus.IN_FORCE:
        return "not-possible", f"{request.lever} is not in force"
    if lever.lease is None:
        return "not-possible", f"{lever.name} is no knob; what is to stay belongs into the policy"
    if record.phase is not Phase.AWAITING_DECISION or incident.approved_by or incident.release_asked:
        return "not-possible", f"the incident is {record.phase}; wait for its decision"
    review_in = request.review_in or incident.now_snapshot.policy.overrides.review_after
    failed, told = await _start(incident, lever, request, request.who, OverrideKind.STANDING, review_in)
    if failed:
        return "not-possible", f"{lever.name} stays with the incident: {told}"
    await _give_up(incident, lever, f"kept as {told}")
    record.to_do.append(f"policy: {lever.lease.knob} as kept ({lever.after}); {told} ends by itself then")
    return "accepted", f"{lever.name} is kept as {told}"


async def take_over(incident: Incident, request: TakeOverRequest) -> tuple[str, str]:
    """Give every lever to a person and stop the automation; answers outcome and message."""
    record, policy = incident.record, incident.now_snapshot.policy
    if request.lasts > policy.overrides.max_duration:
        return "not-possible", f"at most {span(policy.overrides.max_duration)}, not {span(request.lasts)}"
    to, until = request.to or request.who, workflow.now() + request.lasts
    if record.phase in (Phase.TRIAGE, Phase.MITIGATING):
        return "not-possible", "the levers are being taken; ask again in a moment, or abort"
    levers = [lever for lever in record.held if lever.status is LeverStatus.IN_FORCE]
    if not levers:
        return "not-possible", "no lever is in force; `abort` stops the automation"
    if why_not := await incident.why_not(f"own the levers of {record.key}", to, Role.ENGINEER):
        return "not-possible", f"they cannot be {to}'s: {why_not}"
    taken: list[tuple[Lever, str]] = []
    for lever in levers:
        failed, told = (
            await _start(incident, lever, request, to, OverrideKind.TIMED, request.lasts)
            if lever.lease is not None
            else await _redate(incident, lever, request, to)
        )
        if failed:
            so_far = f"; {to} has already: {', '.join(name for _, name in taken)}" if taken else ""
            return "not-possible", f"the automation goes on: {lever.name}: {told}{so_far}"
        taken.append((lever, told))
    for lever, told in taken:
        lever.status, lever.released_at = LeverStatus.KEPT, workflow.now()
        lever.detail = f"taken over: {told}"
    record.taken_over_by, record.taken_over_until = to, until
    incident.abort_asked = True
    cost = incident.price_of(request.lasts) if any(lever.demand for lever in levers) else ""
    return "accepted", (
        f"the automation stops; {to} has the levers until {utc(until)}: {', '.join(told for _, told in taken)}"
        + (f"; {cost}" if cost else "")
    )


async def _start(
    incident: Incident, lever: Lever, request: PersonRequest, owner: str, kind: OverrideKind, duration: timedelta
) -> tuple[bool, str]:
    """Whether it failed, and the override or why."""
    record, lease = incident.record, lever.lease
    assert lease is not None
    # One id for each attempt: an override that is over cannot be had again.
    id = override_id(lease.knob, f"{record.run_id[-8:]}-{len(record.decisions)}")
    start = StartOverride(
        override_id=id,
        input=OverrideInput(
            knob=lease.knob,
            value=lease.value,
            kind=kind,
            who=owner,
            reason=f"from {record.key}: {request.why}"[:500],
            duration=duration,
            incident=record.incident_id,
            approved_by=request.who,
        ),
    )
    try:
        answer = await mutate(
            EntityActivities.start_override, start, summary=f"Override of {owner}: {lease.knob}"[:200], within=PROMPT
        )
    except ActivityError as error:
        return True, f"{id} could not be started: {failure(error)[1]}"
    return answer.outcome != "accepted", id if answer.outcome == "accepted" else answer.message


async def _redate(incident: Incident, lever: Lever, request: TakeOverRequest, to: str) -> tuple[bool, str]:
    """The demand for capacity as the person's own, until the stated end; whether it failed, and its name or why."""
    assert lever.demand is not None
    now = workflow.now()
    demand = lever.demand.model_copy(
        update={
            "demand_id": f"{incident.record.incident_id}:{to}"[:200],
            "asked_by": to,
            "start": now,
            "end": now + request.lasts,
            "reason": f"taken over from {incident.record.key}: {request.why}"[:500],
        }
    )
    try:
        await mutate(
            EntityActivities.set_demand, demand, summary=f"{demand.units} units of {demand.model} for {to}"[:200]
        )
    except ActivityError as error:
        return True, failure(error)[1]
    return False, f"{demand.units} units of {demand.model}"


async def _give_up(incident: Incident, lever: Lever, detail: str) -> None:
    """Release the incident's own lease, now that somebody else holds the value."""
    lever.status, lever.released_at, lever.detail = LeverStatus.KEPT, workflow.now(), detail
    incident.note("lever", f"{lever.name}: {detail}")
    try:
        await _mitigation.release(lever, incident.record.incident_id, detail)
    except ActivityError as error:
        incident.note("note", f"the lease of {lever.name} lapses by itself: {failure(error)[1]}")
