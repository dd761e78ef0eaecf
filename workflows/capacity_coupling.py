"""Capacity follows ECS tasks and utilisation: one look a minute, run by the schedule `capacity-coupling`."""

from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.coupling import CouplingActivities
from activities.entities import EntityActivities
from activities.leases import LeaseActivities
from activities.pages import PageActivities
from domain.coupling import CAPACITY_COUPLING, CAPACITY_COUPLING_WORKFLOW, AssessCoupling, CouplingState
from domain.knobs import Holder
from domain.messages import Page, ReleaseLeases, TakeLeases
from workflows._step import failure, last_result, mutate, read

WITHIN = timedelta(seconds=30)
"""How long an effect is tried: later, the next look knows better."""


@workflow.defn(name=CAPACITY_COUPLING_WORKFLOW)
class CapacityCouplingWorkflow:
    """Begins from the last run's result and answers its own: what was seen, asked for and leased.

    A run that dies leaves a demand that ends by itself, and a rate that lapses within minutes.
    """

    @workflow.run
    async def run(self) -> CouplingState:
        before = last_result(CouplingState) or CouplingState()
        request = AssessCoupling(now=workflow.now(), state=before)
        plan = await read(CouplingActivities.assess_coupling, request, summary="Tasks, load, capacity: what to ask for")
        state, refused = plan.state, set[str]()
        for demand in plan.demands:
            try:
                await mutate(
                    EntityActivities.set_demand,
                    demand,
                    summary=f"Demand {demand.units} units of {demand.model}",
                    within=WITHIN,
                )
            except ActivityError as error:
                refused.add(demand.model)
                kept = [one for one in state.firings if (one.model, one.at) != (demand.model, demand.start)]
                said = [*state.said, f"the demand for {demand.model} was not taken: {failure(error)[1]}"]
                state = state.model_copy(update={"firings": kept, "said": said})
        holder = Holder(kind="capacity", id=CAPACITY_COUPLING)
        try:
            if plan.rate is not None:
                leases = TakeLeases(leases=[plan.rate])
                await mutate(LeaseActivities.take_leases, leases, summary="Lease the per-task rate", within=WITHIN)
            if plan.release:
                former = ReleaseLeases(lease_ids=plan.release, holder=holder, reason="capacity or tasks have changed")
                await mutate(LeaseActivities.release_leases, former, summary="Release the former rate", within=WITHIN)
        except ActivityError as error:
            said = [*state.said, f"the per-task rate could not be leased or released: {failure(error)[1]}"]
            state = state.model_copy(update={"rate": None, "said": said})
        for proposal in [one for one in plan.proposals if one.model not in refused]:
            page = Page(
                page_id=f"{CAPACITY_COUPLING}-{proposal.model}-{workflow.info().run_id}",
                incident_id=CAPACITY_COUPLING,
                severity="SEV3",
                to="capacity owner",
                text=proposal.text,
            )
            try:
                await mutate(PageActivities.page, page, summary="Propose a timetable change", within=WITHIN)
            except ActivityError as error:
                said = [*state.said, f"the proposal could not be sent: {failure(error)[1]}"]
                state = state.model_copy(update={"said": said})
        workflow.set_current_details("\n".join(f"- {line}" for line in state.said) or "Nothing to ask for.")
        return state
