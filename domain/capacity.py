"""Capacity: who asks for how many provisioned units until when, what there is, and the steps from one to the other.

AWS cannot change the units of a provisioned throughput; capacity is a *set* of provisioned models that a planner
creates and deletes (design check 1).
"""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from domain.policy import CapacityPolicy, ModelPolicy

MANAGED_BY_TAG = "managed-by"
MANAGED_BY = "runbooks"
"""A provisioned model is ours when `MANAGED_BY_TAG` says so; nothing else is ever deleted."""


class DemandKind(StrEnum):
    """Kinds that combine by max (design idea 2)."""

    EMERGENCY = "emergency"


class Demand(BaseModel):
    """Somebody's dated wish for units of one model. Setting the same `demand_id` again replaces it."""

    model_config = ConfigDict(frozen=True)

    demand_id: str = Field(min_length=1, max_length=200)
    model: str
    kind: DemandKind
    units: int = Field(ge=0)
    """Total units wanted in service, not units on top."""
    start: AwareDatetime
    end: AwareDatetime
    reason: str = Field(min_length=1, max_length=500)
    asked_by: str
    """Incident id or person."""

    @model_validator(mode="after")
    def _ends(self) -> "Demand":
        if self.end <= self.start:
            raise ValueError(f"end {self.end.isoformat()} must be after start {self.start.isoformat()}")
        return self


ModelStatus = Literal["Creating", "InService", "Updating", "Failed"]


class ProvisionedModel(BaseModel):
    """One provisioned throughput as Bedrock lists it."""

    model_config = ConfigDict(frozen=True)

    arn: str
    name: str
    units: int
    status: ModelStatus
    committed: bool = False
    ours: bool = False
    """Made by us: it carries our tag."""
    created_at: AwareDatetime
    failure: str | None = None
    asked_by: str | None = None
    """For whom we bought it, as its tags say; None: it is not ours, or they do not say."""
    until: AwareDatetime | None = None
    """End of the demand that it was bought for, as its tags say."""

    @property
    def in_service(self) -> bool:
        """It answers calls; also while its name is being changed."""
        return self.status in ("InService", "Updating")


class DemandOutcome(BaseModel):
    """What became of a demand; sent to the incident that asked."""

    model_config = ConfigDict(frozen=True)

    demand_id: str
    status: Literal["requested", "in_service", "failed", "withdrawn"]
    units_in_service: int
    """In service and routed: the data plane uses them."""
    units_wanted: int
    """Within floor, ceiling and quota."""
    detail: str
    """In words, for the timeline: what was requested, landed, refused and why."""


class Order(BaseModel):
    """A provisioned model as AWS is asked for it. Sent again it has the same token, so that it is bought once."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(max_length=63, pattern=r"^([0-9a-zA-Z][_-]?)+$")
    token: str = Field(max_length=256, pattern=r"^[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?$")
    units: int = Field(ge=1)
    asked_by: str
    until: AwareDatetime
    """End of the demand."""
    sequence: int = Field(ge=1)
    """Counts the orders for one model; never used twice."""


class StepKind(StrEnum):
    """What is done to one provisioned model, in the order of its life."""

    CREATE = "create"
    AWAIT = "wait until in service"
    PUBLISH = "publish route"
    WITHDRAW = "withdraw route"
    DRAIN = "drain"
    DELETE = "delete"


class Step(BaseModel):
    """One step of a plan."""

    model_config = ConfigDict(frozen=True)

    kind: StepKind
    name: str
    arn: str | None = None
    """None: not created yet."""
    units: int
    why: str
    ready: bool = True
    """May be taken now; otherwise a step before it has to end first."""
    order: Order | None = None
    """What to create."""


class Situation(BaseModel):
    """Everything the planner looks at."""

    model_config = ConfigDict(frozen=True)

    model: str
    spec: ModelPolicy
    policy: CapacityPolicy
    now: AwareDatetime
    demands: tuple[Demand, ...] = ()
    fleet: tuple[ProvisionedModel, ...] | None
    """None: not listed yet, or Bedrock does not answer."""
    sending: tuple[Order, ...] = ()
    """Asked of AWS at this moment."""
    unanswered: tuple[Order, ...] = ()
    """Asked of AWS without an answer: perhaps bought. They are asked for again before any new order is made."""
    next_sequence: int = Field(default=1, ge=1)
    """Number of the next new order."""
    leaving: frozenset[str] = frozenset()
    """ARNs whose deletion has been asked for."""
    routed: frozenset[str] = frozenset()
    """ARNs in the published routes."""
    troubles: tuple[str, ...] = ()
    """What keeps us from getting more units, in words."""


class Survey(BaseModel):
    """Asks to list the fleet and plan for it."""

    model_config = ConfigDict(frozen=True)

    situation: Situation
    """With the fleet as known before."""
    unlisted: frozenset[str] = frozenset()
    """ARNs that were bought and are in no list yet."""
    gone: frozenset[str] = frozenset()
    """ARNs that were proven gone, while lists may still have them."""


class CapacityPlan(BaseModel):
    """The way from the fleet to the units that are wanted at this moment."""

    model_config = ConfigDict(frozen=True)

    desired_units: int
    units_in_service: int
    ends_at_units: int
    """Units once every step has been taken."""
    why_not: str = ""
    """Why the steps do not end at `desired_units`, or not with the baseline's own; empty when they do."""
    summary: str
    """The state and the steps, in one line."""
    steps: tuple[Step, ...] = ()
    routes: dict[str, int] = {}
    """ARN to units: the routes that should stand now."""
    outcomes: tuple[DemandOutcome, ...] = ()
    """One for each demand that has not ended."""
    ended: tuple[str, ...] = ()
    """Ids of demands whose end has passed."""
    next_change_at: AwareDatetime | None = None
    """When time alone changes the plan."""


class Surveyed(BaseModel):
    """The list, and the plan for it."""

    model_config = ConfigDict(frozen=True)

    listed: tuple[ProvisionedModel, ...]
    plan: CapacityPlan


def merged(
    known: Iterable[ProvisionedModel],
    listed: Iterable[ProvisionedModel],
    unlisted: Iterable[str],
    gone: Iterable[str],
) -> tuple[ProvisionedModel, ...]:
    """The fleet after a list, which may be older than what watching single models has shown."""
    before = {model.arn: model for model in known}
    after = {model.arn: model for model in listed if model.arn not in set(gone)}
    for arn, model in after.items():
        if arn in before and model.status in ("Creating", before[arn].status):
            after[arn] = before[arn]
    return tuple((after | {arn: before[arn] for arn in sorted(unlisted) if arn not in after}).values())


def plan(situation: Situation) -> CapacityPlan:
    """Ordered steps that make the fleet's units what is wanted now, make-before-break; pure.

    The baseline is others' to provide: what is bought for a demand are its units over the baseline, also while units
    of the baseline are missing, and without a demand nothing of ours stays.
    Nothing is created over ceiling or quota; nothing committed, not ours, or younger than the minimum hold is deleted.
    Planning again after any step, done or failed, goes on where it stopped.
    """
    now, spec = situation.now, situation.spec
    active = [demand for demand in situation.demands if demand.start <= now < demand.end]
    leader = max(active, key=lambda demand: (demand.units, demand.end, demand.demand_id), default=None)
    if leader is not None and leader.units <= spec.baseline_units:
        leader = None
    desired = spec.clamped(leader.units if leader else spec.baseline_units)
    fleet = situation.fleet or ()
    landed = {model.name for model in fleet}
    sending = [order for order in situation.sending if order.name not in landed]
    alive = [model for model in fleet if model.status != "Failed" and model.arn not in situation.leaving]
    ours = sorted((model for model in alive if _releasable(model, situation)), key=_keep_first)
    fixed_units = _units(alive) - _units(ours) + _units(sending)
    base_units = sum(model.units for model in alive if model.committed or not model.ours)
    missing_base = max(0, min(spec.baseline_units, desired) - base_units) if situation.fleet is not None else 0
    attainable = desired - missing_base
    target = max(0, attainable - fixed_units)
    leaving_units = sum(model.units for model in fleet if model.arn in situation.leaving)
    room = max(0, spec.most_units - _units(alive) - _units(sending) - leaving_units)

    sums = _subsets(ours)
    kept = sums[max(total for total in sums if total <= target)]
    missing = target - _units(kept)
    if missing > room and len(kept) < len(ours):
        # No room to build the exact sum beside what stands: rather some units too many than too few.
        kept = sums[min(total for total in sums if total >= target)]
        missing = 0
    buy = min(missing, room) if situation.fleet is not None else 0
    surplus = [model for model in ours if model not in kept]
    staying = [model for model in alive if model not in surplus]
    enough = sum(model.units for model in staying if model.in_service) >= attainable
    asked = f"{leader.asked_by} until {_utc(leader.end)}" if leader else "the policy's baseline"

    steps = [
        _step(StepKind.DELETE, model, f"its creation failed: {model.failure or 'no reason given'}")
        for model in fleet
        if model.status == "Failed" and model.ours and not model.committed and model.arn not in situation.leaving
    ]
    orders = _orders(situation, leader, buy)
    why_create = f"{desired} units for {asked}, {_units(staying) + _units(sending)} there or on the way"
    steps += [Step(kind=StepKind.CREATE, name=x.name, units=x.units, why=why_create, order=x) for x in orders]
    steps += [
        _step(StepKind.AWAIT, model, "capacity counts only once it is in service")
        for model in alive
        if model.status == "Creating"
    ]
    not_yet = [Step(kind=StepKind.AWAIT, name=x.name, units=x.units, why="asked for", ready=False) for x in orders]
    steps += not_yet
    routes = {model.arn: model.units for model in alive if model.in_service and not (enough and model in surplus)}
    steps += [
        _step(StepKind.PUBLISH, model, "in service") for model in alive if model.arn in routes.keys() - situation.routed
    ]
    steps += [step.model_copy(update={"kind": StepKind.PUBLISH, "why": "once in service"}) for step in not_yet]
    for model in surplus:
        steps += _retire(model, situation, enough, f"{desired} units for {asked} are met without it")

    ends_at = _units(staying) + _units(sending) + buy
    no_base = f"only {base_units} of the baseline's {spec.baseline_units} units are there; buying them needs a person"
    absent = no_base if missing_base else ""
    surprise = "" if ends_at == attainable else _why_not(situation, attainable, ends_at, fixed_units, leaving_units)
    why_not = "; ".join(filter(None, (absent, surprise)))
    in_service = sum(model.units for model in alive if model.in_service)
    return CapacityPlan(
        desired_units=desired,
        units_in_service=in_service,
        ends_at_units=ends_at,
        why_not=why_not,
        summary=_summary(desired, asked, in_service, alive, sending, buy, surplus, why_not),
        steps=tuple(steps),
        routes=routes,
        outcomes=tuple(
            _outcome(demand, situation, alive, [*sending, *orders], absent)
            for demand in situation.demands
            if demand.end > now
        ),
        ended=tuple(demand.demand_id for demand in situation.demands if demand.end <= now),
        next_change_at=_next_change(situation, alive, ends_at > attainable),
    )


def _units(items: Iterable[ProvisionedModel] | Iterable[Order]) -> int:
    return sum(item.units for item in items)


def _releasable(model: ProvisionedModel, situation: Situation) -> bool:
    held = situation.now < model.created_at + situation.policy.minimum_hold
    return model.ours and not model.committed and not held


def _keep_first(model: ProvisionedModel) -> tuple[bool, datetime, str]:
    return not model.in_service, model.created_at, model.arn


def _subsets(models: Sequence[ProvisionedModel]) -> dict[int, tuple[ProvisionedModel, ...]]:
    """Every sum of units that some of `models` have, and which: the first ones where several do."""
    sums: dict[int, tuple[ProvisionedModel, ...]] = {0: ()}
    for model in models:
        for total, chosen in list(sums.items()):
            sums.setdefault(total + model.units, (*chosen, model))
    return sums


def _orders(situation: Situation, leader: Demand | None, buy: int) -> list[Order]:
    """`buy` units in chunks; what was asked for without an answer comes first, under its own token."""
    landed = {model.name for model in situation.fleet or ()} | {order.name for order in situation.sending}
    again = [order for order in situation.unanswered if order.name not in landed]
    orders: list[Order] = []
    sequence = situation.next_sequence
    while buy > 0:
        units = min(buy, situation.policy.burst_units)
        order = next((order for order in again if order.units <= buy), None)
        if order is not None:
            again.remove(order)
        else:
            assert leader is not None, "nothing is bought without a demand"
            order = _order(situation, leader, sequence, units)
            sequence += 1
        orders.append(order)
        buy -= order.units
    return orders


def _order(situation: Situation, leader: Demand, sequence: int, units: int) -> Order:
    digest = sha256(f"{situation.model}\n{leader.demand_id}\n{sequence}".encode()).hexdigest()
    stem = re.sub(r"[^0-9a-zA-Z]+", "-", f"{situation.policy.name_prefix}-{situation.model}")[:40].strip("-")
    return Order(
        name=f"{stem or MANAGED_BY}-{digest[:8]}-{sequence}",
        token=digest,
        units=units,
        asked_by=leader.asked_by,
        until=leader.end,
        sequence=sequence,
    )


def _step(kind: StepKind, model: ProvisionedModel, why: str, ready: bool = True) -> Step:
    return Step(kind=kind, name=model.name, arn=model.arn, units=model.units, why=why, ready=ready)


def _retire(model: ProvisionedModel, situation: Situation, enough: bool, why: str) -> list[Step]:
    """The last steps of a model: at once when `enough` is in service without it."""
    if not model.in_service:
        # Bedrock refuses to delete what is still in creation; one that never ends is tried all the same.
        stuck = situation.now >= model.created_at + situation.policy.provisioning_timeout
        return [_step(StepKind.DELETE, model, why, ready=stuck)]
    withdraw = [_step(StepKind.WITHDRAW, model, why, ready=enough)] if model.arn in situation.routed else []
    drain = _step(StepKind.DRAIN, model, "calls in flight end first", ready=enough and not withdraw)
    return [*withdraw, drain, _step(StepKind.DELETE, model, why, ready=False)]


def _why_not(situation: Situation, attainable: int, ends_at: int, fixed_units: int, leaving_units: int) -> str:
    if situation.fleet is None:
        return "the fleet is not known yet"
    if ends_at < attainable:
        return f"{attainable - ends_at} units have to wait until {leaving_units} units that are being deleted are gone"
    if fixed_units > attainable:
        return f"{fixed_units} units are others', committed, within their minimum hold or just asked for"
    return (
        f"{ends_at - attainable} units too many stay: to replace them by fewer, both would have to stand side by side, "
        f"and {situation.spec.most_units} units are the limit"
    )


def _summary(
    desired: int,
    asked: str,
    in_service: int,
    alive: Sequence[ProvisionedModel],
    sending: Sequence[Order],
    buy: int,
    surplus: Sequence[ProvisionedModel],
    why_not: str,
) -> str:
    creating = sum(model.units for model in alive if model.status == "Creating")
    parts = [f"{desired} units wanted for {asked}", f"{in_service} in service"]
    parts += [f"{creating} in creation"] if creating else []
    parts += [f"{_units(sending) + buy} to be created"] if sending or buy else []
    parts += [f"{_units(surplus)} to be deleted"] if surplus else []
    return "; ".join(parts) + (f" ({why_not})" if why_not else "")


def _outcome(
    demand: Demand, situation: Situation, alive: Sequence[ProvisionedModel], asking: Sequence[Order], absent: str
) -> DemandOutcome:
    """`absent`: that the baseline is not all there; then what we buy is not enough."""
    wanted = situation.spec.clamped(demand.units)
    in_service = [model for model in alive if model.in_service]
    used = sum(model.units for model in in_service if model.arn in situation.routed)
    coming = _units(alive) + _units(asking) - used
    parts = [f"{_units(in_service)} of {wanted} units in service"]
    if situation.fleet is None:
        parts = [f"requested: {wanted} units; the fleet is being read"]
    if wanted != demand.units:
        parts.append(f"{demand.units} asked for, limited to {wanted} by floor, ceiling or quota")
    status: Literal["requested", "in_service", "failed"] = "in_service"
    if demand.start > situation.now:
        status = "requested"
        parts.append(f"it starts at {_utc(demand.start)}")
    elif used < wanted:
        status = "failed" if situation.troubles or (absent and not coming) else "requested"
        unrouted, creating = _units(in_service) - used, _units(alive) - _units(in_service)
        parts += [f"{unrouted} of them get calls once their routes are published"] if unrouted else []
        parts += [f"{creating} more accepted by AWS and on the way"] if creating and not asking else []
        parts += [f"{_units(asking) + creating} more being asked of AWS"] if asking and not situation.troubles else []
        parts += [absent] if absent else []
        parts += situation.troubles
    return DemandOutcome(
        demand_id=demand.demand_id,
        status=status,
        units_in_service=used,
        units_wanted=wanted,
        detail="; ".join(parts),
    )


def _next_change(situation: Situation, alive: Sequence[ProvisionedModel], too_many: bool) -> datetime | None:
    moments = [moment for demand in situation.demands for moment in (demand.start, demand.end)]
    if too_many:
        moments += [model.created_at + situation.policy.minimum_hold for model in alive if model.ours]
    return min((moment for moment in moments if moment > situation.now), default=None)


def _utc(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S %Z")
