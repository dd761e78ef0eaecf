"""Taking levers and giving them back, the same for every runbook."""

import asyncio
from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.entities import EntityActivities
from activities.leases import LeaseActivities
from domain.capacity import Demand, DemandKind
from domain.incident import Lever, LeverName, LeverStatus
from domain.knobs import Holder, KnobName, KnobValue, LeaseRequest
from domain.messages import (
    LEVERS_CHANGED,
    LeversChanged,
    MitigationInput,
    MitigationResult,
    ReleaseLeases,
    TakeLeases,
    WithdrawDemand,
)
from domain.mitigation import MitigationPlan
from domain.policy import Policy
from workflows._step import MUTATE_TOTAL, failure, mutate


def lease_id(run_id: str, lever: LeverName, attempt: int) -> str:
    """The id of the lease that a lever takes in one attempt; known before it is taken, so that it can be undone."""
    return f"{run_id}:{lever}:{attempt}"


def demand_end(hold_until: datetime, policy: Policy) -> datetime:
    """Past the hold by the longest lease, so that a dead control plane lapses in the order of the way back."""
    return hold_until + policy.leases.cache_ttl_seconds


def lease_request(
    run_id: str, incident_id: str, lever: LeverName, value: KnobValue, attempt: int, reason: str, policy: Policy
) -> LeaseRequest:
    """The lease behind a lever."""
    knob = KnobName(lever)
    lasts = policy.leases.model_routing if knob is KnobName.MODEL_ROUTING else policy.leases.cache_ttl_seconds
    return LeaseRequest(
        lease_id=lease_id(run_id, lever, attempt),
        knob=knob,
        value=value,
        holder=Holder(kind="incident", id=incident_id),
        reason=reason[:500],
        duration_ms=round(lasts / timedelta(milliseconds=1)),
    )


async def apply(input: MitigationInput) -> MitigationResult:
    """Take the plan's levers in parallel: the free ones in one call, capacity beside them. A failure stops no other."""
    policy, plan = input.snapshot.policy, input.plan
    held = {lever.name: lever for lever in input.held}
    values: dict[LeverName, KnobValue] = {
        LeverName.MODEL_ROUTING: plan.routing,
        LeverName.REQUEST_COALESCING: True,
        LeverName.CACHE_TTL: plan.cache_ttl_seconds,
        LeverName.BATCH_WINDOW: plan.batch_window_ms,
    }
    knobs: list[Lever] = []
    capacity: list[Lever] = []
    settled: list[Lever] = []
    for lever in plan.levers:
        kept = held.get(lever.name)
        if kept is not None and (lever.name is not LeverName.CAPACITY or not _wants_more(lever, kept, plan)):
            settled.append(kept)
        elif lever.status is LeverStatus.NOT_NEEDED:
            settled.append(lever)
        elif lever.name is LeverName.CAPACITY:
            assert plan.units is not None
            now = workflow.now()
            demand = Demand(
                demand_id=input.incident_id,
                model=input.model,
                kind=DemandKind.EMERGENCY,
                units=plan.units,
                uncapped_units=plan.uncapped_units,
                start=now,
                end=demand_end(now + policy.way_back.capacity_max_hold, policy),
                reason=input.reason[:500],
                asked_by=input.incident_id,
            )
            capacity.append(lever.model_copy(update={"demand": demand}))
        else:
            request = lease_request(
                input.run_id, input.incident_id, lever.name, values[lever.name], input.attempt, input.reason, policy
            )
            knobs.append(lever.model_copy(update={"lease": request}))

    async def report(levers: list[Lever]) -> None:
        incident = workflow.get_external_workflow_handle(input.incident_id, run_id=input.run_id)
        await incident.signal(LEVERS_CHANGED, LeversChanged(levers=levers))

    async def act(levers: list[Lever]) -> list[Lever]:
        done = await take(levers)
        await report(done)
        return done

    acted = await asyncio.gather(*(act(group) for group in (knobs, capacity) if group))
    levers = settled + [lever for group in acted for lever in group]
    order = list(LeverName)
    return MitigationResult(levers=sorted(levers, key=lambda x: order.index(x.name)), arithmetic=plan.arithmetic)


async def shown(input: MitigationInput) -> MitigationResult:
    """`apply`, with the plan and then its outcome as the workflow's details in the UI."""
    workflow.set_current_details(_details(input.plan.levers, input.plan.arithmetic))
    result = await apply(input)
    workflow.set_current_details(_details(result.levers, result.arithmetic))
    return result


def _details(levers: list[Lever], arithmetic: list[str]) -> str:
    lines = [f"- {lever.name}: {lever.before} → {lever.after}: **{lever.status}**. {lever.why}" for lever in levers]
    return "\n".join([*lines, "", *arithmetic])


def _wants_more(lever: Lever, kept: Lever, plan: MitigationPlan) -> bool:
    if lever.status is LeverStatus.NOT_NEEDED or plan.units is None:
        return False
    return kept.demand is None or plan.units > kept.demand.units


async def take(levers: list[Lever], within: timedelta = MUTATE_TOTAL) -> list[Lever]:
    """Take levers that know their lease or demand; each comes back in force or failed, with the reason."""
    leases = [lever.lease for lever in levers if lever.lease is not None]
    try:
        if leases:
            names = " and ".join(str(lease.knob) for lease in leases)
            await mutate(
                LeaseActivities.take_leases, TakeLeases(leases=leases), summary=f"Lever: lease {names}", within=within
            )
        detail = ""
        for lever in levers:
            if lever.demand is not None:
                outcome = await mutate(
                    EntityActivities.set_demand,
                    lever.demand,
                    summary=f"Lever: demand {lever.demand.units} units of {lever.demand.model}",
                    within=within,
                )
                detail = outcome.detail
    except ActivityError as error:
        kind, message = failure(error)
        failed = {"status": LeverStatus.FAILED, "detail": f"{kind}: {message}"}
        return [lever.model_copy(update=failed) for lever in levers]
    taken = {"status": LeverStatus.IN_FORCE, "applied_at": workflow.now(), "detail": detail}
    return [lever.model_copy(update=taken) for lever in levers]


async def release(lever: Lever, incident_id: str, reason: str) -> None:
    """Give one lever back. Raises ActivityError when it could not be done within the step's time."""
    if lever.lease is not None:
        await mutate(
            LeaseActivities.release_leases,
            ReleaseLeases(lease_ids=[lever.lease.lease_id], holder=lever.lease.holder, reason=reason[:500]),
            summary=f"Release: lease {lever.name}",
        )
    if lever.demand is not None:
        await mutate(
            EntityActivities.withdraw_demand,
            WithdrawDemand(model=lever.demand.model, demand_id=incident_id, reason=reason),
            summary=f"Release: withdraw the demand for {lever.demand.model}",
        )
