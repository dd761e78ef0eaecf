"""After an incident: give back all that it may hold, prove the baseline, write what was learnt."""

from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.bedrock import BedrockActivities
from activities.calendar import CalendarActivities
from activities.entities import EntityActivities
from activities.leases import LeaseActivities
from domain import timetable
from domain.knobs import Holder, KnobName
from domain.messages import (
    CLEANUP_WORKFLOW,
    AwaitUnits,
    CleanupInput,
    CleanupResult,
    FleetUnits,
    ReadKnobs,
    ReleaseLeases,
    WithdrawDemand,
)
from workflows._step import failure, mutate, read, wait

UNITS_MARGIN = timedelta(minutes=2)
NO_TIME = timedelta(0)


@workflow.defn(name=CLEANUP_WORKFLOW)
class PostIncidentCleanupWorkflow:
    """Every part is tried whatever became of the others; what failed becomes a to-do for people."""

    @workflow.run
    async def run(self, input: CleanupInput) -> CleanupResult:
        to_do: list[str] = []
        held: list[str] = []
        holder = Holder(kind="incident", id=input.incident_id)
        try:
            await mutate(
                LeaseActivities.release_leases,
                ReleaseLeases(lease_ids=input.lease_ids, holder=holder, reason=input.reason),
                summary="Release every lease the incident may hold",
            )
        except ActivityError as error:
            to_do.append(f"release the incident's leases ({failure(error)[1]}); they lapse by themselves")
        if input.demand_id is not None:
            await self._withdraw(input, input.demand_id, to_do)
        knobs_at_baseline = await self._knobs(input, held)
        capacity_at_baseline = None if input.demand_id is None else await self._capacity(input, held, to_do)
        written = False
        if input.event is not None:
            try:
                await mutate(
                    CalendarActivities.put_event,
                    input.event,
                    summary=f"Calendar: {input.event.type}, {input.event.multiplier:g}x",
                )
                written = True
            except ActivityError as error:
                to_do.append(f"write {input.event.type} into the event calendar ({failure(error)[1]})")
        workflow.set_current_details(
            f"knobs at baseline: {knobs_at_baseline}; capacity at baseline: "
            f"{'not touched' if capacity_at_baseline is None else capacity_at_baseline}"
            + "".join(f"\n- {line}" for line in held + to_do)
        )
        return CleanupResult(
            knobs_at_baseline=knobs_at_baseline,
            capacity_at_baseline=capacity_at_baseline,
            still_held=held,
            event_written=written,
            to_do=to_do,
        )

    async def _withdraw(self, input: CleanupInput, demand_id: str, to_do: list[str]) -> None:
        try:
            await mutate(
                EntityActivities.withdraw_demand,
                WithdrawDemand(model=input.model, demand_id=demand_id, reason=input.reason),
                summary="Withdraw the capacity demand",
            )
        except ActivityError as error:
            to_do.append(f"withdraw the capacity demand ({failure(error)[1]}); it ends by itself")

    async def _knobs(self, input: CleanupInput, held: list[str]) -> bool:
        try:
            states = await read(
                LeaseActivities.read_knobs,
                ReadKnobs(knobs=list(KnobName), baseline=input.snapshot.policy.baseline),
                summary="Prove: every knob at its baseline",
            )
        except ActivityError as error:
            held.append(f"knobs could not be read: {failure(error)[1]}")
            return False
        held += [
            f"{state.knob} is {state.value}: held by {lease.holder.id} until {lease.expires_at:%H:%M:%S} UTC "
            f"({lease.reason})"
            for state in states.knobs
            for lease in state.leases
        ]
        return all(state.value == state.baseline for state in states.knobs)

    async def _capacity(self, input: CleanupInput, held: list[str], to_do: list[str]) -> bool:
        policy, clock = input.snapshot.policy.capacity, input.snapshot.clock
        units = timetable.units_at(input.snapshot.policy, input.model, clock.business(workflow.now()))
        # Drain, delete, and one poll: what the capacity workflow needs.
        patience = policy.drain + 2 * policy.poll_interval + UNITS_MARGIN
        try:
            fleet = await self._units(input, units, patience, f"Prove: capacity at the {units} units of this hour")
            if fleet.units == units:
                return True
            state = await read(EntityActivities.capacity_state, input.model, summary="Who still asks for capacity?")
            paid_for = max((x.bought_at + policy.minimum_hold - workflow.now() for x in state.bought), default=NO_TIME)
            if not state.demands and paid_for > NO_TIME:
                units = state.desired_units
                summary = f"Prove: {units} units once the hour is over that is paid for"
                fleet = await self._units(input, units, paid_for + patience, summary)
        except ActivityError as error:
            held.append(f"capacity, and who asks for it, could not be read: {failure(error)[1]}")
            return False
        if not state.demands and fleet.units == state.desired_units:
            return True
        line = f"{input.model} has {fleet.units} units ({fleet.creating} being created), not {units}"
        held += [f"{line}: {x.asked_by} asks for {x.units} until {x.end:%H:%M:%S} UTC" for x in state.demands]
        if not state.demands:
            to_do.append(f"{line}, and nobody asks for them: {state.last_error or state.doing}")
        return False

    async def _units(self, input: CleanupInput, units: int, patience: timedelta, summary: str) -> FleetUnits:
        policy = input.snapshot.policy
        return await wait(
            BedrockActivities.await_units,
            AwaitUnits(
                model=input.model,
                spec=policy.models[input.model],
                units=units,
                poll_interval=policy.capacity.poll_interval,
                give_up_after=patience,
            ),
            summary=summary,
            at_most=patience,
        )
