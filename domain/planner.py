"""The planner: from the fleet and the demands to the ordered steps that make one fit the other; pure."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Literal

from domain.capacity import (
    MANAGED_BY,
    CapacityPlan,
    Demand,
    DemandKind,
    DemandOutcome,
    Order,
    ProvisionedModel,
    Situation,
    Step,
    StepKind,
)
from domain.timetable import demands

NEXT_WINDOWS = timedelta(days=1)


def plan(situation: Situation) -> CapacityPlan:
    """Ordered steps that make the fleet's units what is wanted now, or within the lead time, make-before-break; pure.

    A baseline is others' to provide: what is bought are the units over it, also while units of the baseline are
    missing. The timetable's units are bought like any other. What nobody wants does not stay.
    Nothing is created over ceiling or quota; nothing committed, not ours, or younger than the minimum hold is deleted.
    A creation that outlasts the provisioning timeout is replaced where quota allows, and released if it does end.
    Planning again after any step, done or failed, goes on where it stopped.
    """
    now, spec = situation.now, situation.spec
    wish = _wish(situation, now)
    baseline, desired = wish.baseline, wish.units
    fleet = situation.fleet or ()
    landed = {model.name for model in fleet}
    sending = [order for order in situation.sending if order.name not in landed]
    alive = [model for model in fleet if model.status != "Failed" and model.arn not in situation.leaving]
    late = [model for model in alive if _late(model, situation)]
    counted = [model for model in alive if model not in late]
    ours = sorted((model for model in counted if _releasable(model, situation)), key=_keep_first)
    fixed_units = _units(counted) - _units(ours) + _units(sending)
    base_units = sum(model.units for model in alive if model.committed or not model.ours)
    missing_base = max(0, min(baseline, desired) - base_units) if situation.fleet is not None else 0
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
    staying = [model for model in counted if model not in surplus]
    surplus += [model for model in late if _releasable(model, situation)]
    enough = sum(model.units for model in staying if model.in_service) >= attainable
    asked = wish.words

    steps = [
        _step(StepKind.DELETE, model, f"its creation failed: {model.failure or 'no reason given'}")
        for model in fleet
        if model.status == "Failed" and model.ours and not model.committed and model.arn not in situation.leaving
    ]
    orders = _orders(situation, wish, _units(staying) + _units(sending), buy)
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
    no_base = f"only {base_units} of the baseline's {baseline} units are there; buying them needs a person"
    absent = no_base if missing_base else ""
    surprise = (
        "" if ends_at == attainable else _why_not(situation, attainable, ends_at, fixed_units, leaving_units, late)
    )
    why_not = "; ".join(filter(None, (absent, surprise)))
    in_service = sum(model.units for model in alive if model.in_service)
    return CapacityPlan(
        desired_units=desired,
        wanted_for=wish.words,
        units_in_service=in_service,
        ends_at_units=ends_at,
        why_not=why_not,
        summary=_summary(desired, asked, in_service, alive, sending, buy, surplus, why_not),
        steps=tuple(steps),
        routes=routes,
        outcomes=tuple(
            _outcome(demand, wish, situation, counted, [*sending, *orders], absent)
            for demand in situation.demands
            if demand.end > now
        ),
        ended=tuple(demand.demand_id for demand in situation.demands if demand.end <= now),
        next_change_at=_next_change(situation, alive, ends_at > attainable),
    )


@dataclass(frozen=True)
class _Wish:
    """What is wanted at one moment, and by whom."""

    baseline: int
    """Of it, others' to provide."""
    units: int
    """Within floor, ceiling and quota."""
    largest: tuple[Demand, ...]
    """Demands that combine by max, the largest first."""
    features: tuple[Demand, ...]
    words: str

    def buyer(self, level: int) -> Demand:
        """Who wants the unit number `level`: of several the one who wants it longest."""
        longest = max((x for x in self.largest if x.units >= level), key=lambda x: x.end, default=None)
        demand = longest or next(iter([*self.features, *self.largest]), None)
        assert demand is not None, "nothing is bought without a demand"
        return demand


def _wish(situation: Situation, at: datetime) -> _Wish:
    """The largest of all demands that are active at `at` or start within the lead time; features add to it."""
    spec = situation.spec
    lead = situation.policy.provisioning_lead
    timetable, model = situation.timetable, situation.model
    everyone = [*situation.demands]
    baseline = spec.baseline_units
    if timetable is not None and model in timetable.models:
        baseline = 0
        everyone += demands(timetable, model, situation.clock, at, at + lead)
    active = [demand for demand in everyone if demand.start - lead <= at < demand.end]
    largest = sorted(
        (x for x in active if x.kind is not DemandKind.FEATURE and x.units > baseline),
        key=lambda x: (x.units, x.end, x.demand_id),
        reverse=True,
    )
    features = sorted((x for x in active if x.kind is DemandKind.FEATURE), key=lambda x: x.demand_id)
    base = f"the policy's baseline of {baseline}" if baseline else "nobody"
    words = "the policy's baseline" if baseline else "nobody"
    if largest:
        words = f"{largest[0].asked_by} until {_utc(largest[0].end)}"
        less = [f"{x.asked_by}'s {x.units}" for x in largest[1:]] + ([base] if baseline else [])
        words += f", larger than {', '.join(less)}" if less else ""
    words += "".join(f", and {x.units} more for {x.asked_by} until {_utc(x.end)}" for x in features)
    units = max([baseline, *(x.units for x in largest)]) + sum(x.units for x in features)
    return _Wish(baseline, spec.clamped(units), tuple(largest), tuple(features), words)


def _units(items: Iterable[ProvisionedModel] | Iterable[Order]) -> int:
    return sum(item.units for item in items)


def _releasable(model: ProvisionedModel, situation: Situation) -> bool:
    return model.ours and not model.committed and situation.now >= _hold_ends(model, situation)


def _late(model: ProvisionedModel, situation: Situation) -> bool:
    """In creation for so long that it is not waited for any more."""
    ours = model.ours and not model.committed
    return ours and model.status == "Creating" and situation.now >= _late_from(model, situation)


def _late_from(model: ProvisionedModel, situation: Situation) -> datetime:
    return model.created_at + situation.policy.provisioning_timeout


def _hold_ends(model: ProvisionedModel, situation: Situation) -> datetime:
    return model.created_at + situation.policy.minimum_hold - situation.policy.release_ahead


def _keep_first(model: ProvisionedModel) -> tuple[bool, datetime, str]:
    return not model.in_service, model.created_at, model.arn


def _subsets(models: Sequence[ProvisionedModel]) -> dict[int, tuple[ProvisionedModel, ...]]:
    """Every sum of units that some of `models` have, and which: the first ones where several do."""
    sums: dict[int, tuple[ProvisionedModel, ...]] = {0: ()}
    for model in models:
        for total, chosen in list(sums.items()):
            sums.setdefault(total + model.units, (*chosen, model))
    return sums


def _orders(situation: Situation, wish: _Wish, there: int, buy: int) -> list[Order]:
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
            order = _order(situation, wish.buyer(there + units), sequence, units)
            sequence += 1
        orders.append(order)
        buy -= order.units
        there += order.units
    return orders


def _order(situation: Situation, buyer: Demand, sequence: int, units: int) -> Order:
    digest = sha256(f"{situation.model}\n{buyer.demand_id}\n{sequence}".encode()).hexdigest()
    stem = re.sub(r"[^0-9a-zA-Z]+", "-", f"{situation.policy.name_prefix}-{situation.model}")[:40].strip("-")
    return Order(
        name=f"{stem or MANAGED_BY}-{digest[:8]}-{sequence}",
        token=digest,
        units=units,
        asked_by=buyer.asked_by,
        until=buyer.end,
        sequence=sequence,
    )


def _step(kind: StepKind, model: ProvisionedModel, why: str, ready: bool = True) -> Step:
    return Step(kind=kind, name=model.name, arn=model.arn, units=model.units, why=why, ready=ready)


def _retire(model: ProvisionedModel, situation: Situation, enough: bool, why: str) -> list[Step]:
    """The last steps of a model: at once when `enough` is in service without it."""
    if not model.in_service:
        # Bedrock refuses to delete what is still in creation; one that never ends is tried all the same.
        return [_step(StepKind.DELETE, model, why, ready=_late(model, situation))]
    withdraw = [_step(StepKind.WITHDRAW, model, why, ready=enough)] if model.arn in situation.routed else []
    drain = _step(StepKind.DRAIN, model, "calls in flight end first", ready=enough and not withdraw)
    return [*withdraw, drain, _step(StepKind.DELETE, model, why, ready=False)]


def _why_not(
    situation: Situation,
    attainable: int,
    ends_at: int,
    fixed_units: int,
    leaving_units: int,
    late: Sequence[ProvisionedModel],
) -> str:
    if situation.fleet is None:
        return "the fleet is not known yet"
    if ends_at < attainable:
        parts = [f"{leaving_units} units that are being deleted are gone"] if leaving_units or not late else []
        overdue = f"{_units(late)} units in creation for over {situation.policy.provisioning_timeout} come or can go"
        parts += [overdue] if late else []
        return f"{attainable - ends_at} units have to wait until {' and '.join(parts)}"
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
    demand: Demand,
    wish: _Wish,
    situation: Situation,
    alive: Sequence[ProvisionedModel],
    asking: Sequence[Order],
    absent: str,
) -> DemandOutcome:
    """`absent`: that the baseline is not all there; then what we buy is not enough."""
    lead = situation.policy.provisioning_lead
    feature = demand.kind is DemandKind.FEATURE
    added = sum(x.units for x in wish.features)
    asked = wish.units if feature else demand.units + added
    wanted = situation.spec.clamped(asked)
    in_service = [model for model in alive if model.in_service]
    used = sum(model.units for model in in_service if model.arn in situation.routed)
    coming = _units(alive) + _units(asking) - used
    parts = [f"{_units(in_service)} of {wanted} units in service"]
    if situation.fleet is None:
        parts = [f"requested: {wanted} units; the fleet is being read"]
    if wanted != asked:
        parts.append(f"{asked} asked for, limited to {wanted} by floor, ceiling or quota")
    status: Literal["requested", "in_service", "failed"] = "in_service"
    if demand.start - lead > situation.now:
        status = "requested"
        parts.append(f"it starts at {_utc(demand.start)}; units are bought from {_utc(demand.start - lead)} on")
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
    lead = situation.policy.provisioning_lead
    everyone = [*situation.demands]
    if situation.timetable is not None and situation.model in situation.timetable.models:
        soon = situation.now + lead + NEXT_WINDOWS
        everyone += demands(situation.timetable, situation.model, situation.clock, situation.now, soon)
    moments = [moment for demand in everyone for moment in (demand.start - lead, demand.end)]
    moments += [_late_from(model, situation) for model in alive if model.ours and model.status == "Creating"]
    if too_many:
        moments += [_hold_ends(model, situation) for model in alive if model.ours]
    return min((moment for moment in moments if moment > situation.now), default=None)


def _utc(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S %Z")
