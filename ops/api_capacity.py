"""The operations of the ops API on capacity."""

from typing import Annotated

from fastapi import APIRouter, Path, Request

from domain.messages import DemandAnswer, Reconciled, UpdateResult
from ops.api_bodies import ApproveCapacityBody, Decision, DemandBody
from ops.api_callers import Guarded
from ops.api_routes import CHANGE, READ, READ_ONE, ChangeOf, service_of
from ops.capacity import DEMAND_ID, Capacity, Outlook

router = APIRouter(route_class=Guarded, tags=["capacity"])

Model = Annotated[str, Path(pattern=r"^[A-Za-z0-9_.-]{1,100}$", description="As the policy calls it, e.g. `sonnet`.")]
DemandId = Annotated[str, Path(pattern=DEMAND_ID, description="As `GET /capacity/MODEL` lists it.")]


@router.get("/capacity", responses=READ)
async def list_capacity(request: Request) -> list[Capacity]:
    """Each model: units, what was bought for whom until when, what it costs so far, what waits for an approval."""
    return await (await service_of(request)).list_capacity()


@router.get("/capacity/{model}", responses=READ_ONE)
async def show_capacity(request: Request, model: Model) -> Capacity:
    """One model's capacity."""
    return await (await service_of(request)).get_capacity(model)


@router.get("/capacity/{model}/plan", responses=READ_ONE)
async def plan_capacity(request: Request, model: Model) -> Outlook:
    """A dry run: the steps and why, and the units over the next 48 h against the load to expect."""
    return await (await service_of(request)).plan_capacity(model)


@router.post("/capacity/{model}/demands", responses=CHANGE)
async def set_demand(change: ChangeOf, model: Model, body: DemandBody) -> DemandAnswer:
    """Ask for units in service for a time; they are bought ahead of the start."""
    return await change.decide(
        lambda service, token: service.set_demand(
            model, token, body.units, body.start, body.duration, body.reason, body.demand_id
        ),
        body,
    )


@router.post("/capacity/{model}/demands/preview", responses=CHANGE)
async def preview_demand(request: Request, model: Model, body: DemandBody) -> Outlook:
    """The plan with it, and what it would cost more. Changes nothing."""
    service = await service_of(request)
    return await service.preview_demand(model, body.units, body.start, body.duration, body.reason, body.demand_id)


@router.post("/capacity/{model}/demands/{demand}/withdraw", responses=CHANGE)
async def withdraw_demand(change: ChangeOf, model: Model, demand: DemandId, body: Decision) -> DemandAnswer:
    """Take a person's demand back; another person's is an approver's to take."""
    return await change.decide(lambda service, token: service.withdraw_demand(model, token, demand, body.why), body)


@router.post("/capacity/{model}/pause", responses=CHANGE)
async def pause_capacity(change: ChangeOf, model: Model, body: Decision) -> UpdateResult:
    """The kill switch: nothing is bought or released until somebody resumes."""
    return await change.decide(lambda service, token: service.pause_capacity(model, token, body.why), body)


@router.post("/capacity/{model}/resume", responses=CHANGE)
async def resume_capacity(change: ChangeOf, model: Model, body: Decision) -> UpdateResult:
    """Buy and release again; needs an approver."""
    return await change.decide(lambda service, token: service.resume_capacity(model, token, body.why), body)


@router.post("/capacity/{model}/reconcile", responses=CHANGE)
async def reconcile_capacity(change: ChangeOf, model: Model, body: Decision) -> Reconciled:
    """Compare fleet and demands now, and try again what failed."""
    return await change.decide(lambda service, token: service.reconcile_capacity(model, token, body.why), body)


@router.post("/capacity/{model}/approve", responses=CHANGE)
async def approve_capacity(change: ChangeOf, model: Model, body: ApproveCapacityBody) -> UpdateResult:
    """Agree to units over a cap of cost, or to what else waits for a person; needs an approver."""
    return await change.decide(
        lambda service, token: service.approve_capacity(model, token, body.why, body.approval_id, body.amount), body
    )
