"""The planner: from the fleet and the demands to the ordered steps that make one fit the other; pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Literal

from domain.capacity import (
    MANAGED_BY,
    CapacityPlan,
    Demand,
    DemandKind,
    DemandOutcome,
    ExpectedUnits,
    Order,
    PlanCost,
    ProvisionedModel,
    Situation,
    Step,
    StepKind,
)
from domain.cost import Meter, Over, excess_id, first_over
from domain.fleet import Choice, Piece, Projection, Spell, Terms, choose, chunks, project
from domain.incident import utc
from domain.purchases import Excess
from domain.wishes import Board, Wish, Wishes


def plan(situation: Situation) -> CapacityPlan:
    """Ordered steps that make the fleet's units what is wanted now, or within the lead time, make-before-break; pure.

    A baseline is others' to provide: what is bought are the units over it, also while units of the baseline are
    missing. The timetable's units are bought like any other. What nobody wants does not stay.
    Nothing is created over ceiling, quota or a daily cap; nothing committed, not ours, or younger than the minimum hold
    is deleted, nor because of a cap what was bought for somebody who still asks for it. Paused, nothing is done but to
    watch and route.
    A creation that outlasts the provisioning timeout is replaced where quota allows, and released if it does end.
    Planning again after any step, done or failed, goes on where it stopped.
    """
    now, board, fleet = situation.now, Board(situation), _Fleet(situation)
    wish, wishes = board.wish(now), board.wishes()
    desired = wish.units
    terms = fleet.terms()
    excess, projection = None, None
    choice = Choice(fleet.pieces, (), 0, 0, 0)
    if situation.fleet is not None and not situation.paused:
        wishes, excess, projection = _within_caps(situation, fleet, board, wishes, terms)
        choice = choose(fleet.pieces, fleet.room, now, wishes, terms)
    attainable = terms.attainable(desired)
    dropped = {piece.key for piece in choice.drop}
    surplus = [model for model in fleet.alive if model.arn in dropped]
    surplus += [] if situation.paused else [x for x in fleet.late if x.created_at + fleet.hold <= now]
    staying = [model for model in fleet.alive if model.arn not in dropped]
    enough = sum(model.units for model in staying if model.in_service) >= terms.attainable(wishes.at(now))
    there = _units(staying) + _units(fleet.sending)

    orders = _orders(situation, wish, wishes, there + desired - attainable, choice.buy)
    routes = {x.arn: x.units for x in fleet.alive if x.in_service and not (enough and x.arn in dropped)}
    create = f"{desired} units for {wish.words}, {there} there or on the way"
    release = f"{min(desired, wishes.at(now))} units for {wish.words} are met without it"
    steps = [] if situation.paused else _failed(situation)
    steps += _growth(situation, fleet, orders, routes, create)
    steps += [step for model in surplus for step in _retire(model, situation, enough, release)]

    ends_at = there + choice.buy
    absent = ""
    if situation.fleet is not None and attainable < desired:
        absent = (
            f"only {terms.base_units} of the baseline's {wish.baseline} units are there; buying them needs a person"
        )
    reasons = [absent, _limit(situation, wish), situation.paused and f"paused: {situation.paused}"]
    reasons += [excess.text] if excess is not None and ends_at < attainable else []
    if ends_at != attainable and not situation.paused and (excess is None or ends_at > attainable):
        reasons.append(_why_not(situation, fleet, choice, attainable, ends_at))
    why_not = "; ".join(filter(None, reasons))
    in_service = sum(model.units for model in fleet.alive if model.in_service)
    said = _Said(fleet, [*fleet.sending, *orders], absent, excess)
    return CapacityPlan(
        desired_units=desired,
        wanted_for=wish.words,
        units_in_service=in_service,
        ends_at_units=ends_at,
        why_not=why_not,
        summary=_summary(desired, wish.words, in_service, fleet, choice.buy, surplus, why_not),
        steps=tuple(steps),
        routes=routes,
        outcomes=tuple(_outcome(demand, board, situation, said) for demand in situation.demands if demand.end > now),
        ended=tuple(demand.demand_id for demand in situation.demands if demand.end <= now),
        next_change_at=_next_change(board, situation, fleet, ends_at > attainable),
        expected=_expected(board, projection, now, in_service),
        cost=_cost(situation, fleet, projection),
        excess=excess,
    )


class _Fleet:
    """What stands, what comes and what goes."""

    def __init__(self, situation: Situation) -> None:
        self._situation = situation
        fleet, policy, now = situation.fleet or (), situation.policy, situation.now
        landed = {model.name for model in fleet}
        self.hold = policy.minimum_hold - min(policy.release_ahead, policy.minimum_hold)
        self.sending = [order for order in situation.sending if order.name not in landed]
        there = [model for model in fleet if model.status != "Failed" and model.arn not in situation.leaving]
        self.late = [model for model in there if _late(model, situation)]
        self.alive = [model for model in there if model not in self.late]
        leaving = [model for model in fleet if model.arn in situation.leaving]
        timed = situation.timetable is not None and situation.model in situation.timetable.models
        self.baseline = 0 if timed or situation.fleet is None else situation.spec.baseline_units
        self.base_units = sum(model.units for model in self.alive if model.committed or not model.ours)
        self.leaving_units = _units(leaving)
        self.blocked = self.leaving_units + _units(self.late)
        """Units that count for the quota and not for the demands."""
        standing = _units(self.alive) + _units(self.sending) + self.blocked
        self.room = max(0, situation.spec.most_units - standing)
        ready = now + policy.poll_interval
        self.pieces = (
            *(
                Piece(
                    key=model.arn,
                    units=model.units,
                    since=model.created_at,
                    ready=model.created_at
                    if model.in_service
                    else max(ready, model.created_at + policy.provisioning_lag),
                    releasable=model.created_at + self.hold if model.ours and not model.committed else None,
                )
                for model in self.alive
            ),
            *(
                Piece(x.name, x.units, now, now + policy.provisioning_lag, now + max(self.hold, policy.poll_interval))
                for x in self.sending
            ),
        )
        self.past = [
            *(Spell(x.units, x.created_at, now) for x in [*leaving, *self.late] if x.ours and not x.committed),
            *(
                Spell(x.units, x.bought_at, x.ended_at)
                for x in situation.purchases
                if x.ended_at is not None and not x.failed
            ),
        ]

    def kept(self, at: datetime) -> int:
        """Units that a cap does not take away at `at`: others', and those of which who asked for them still does."""
        ends: dict[str | None, datetime] = {}
        for x in self._situation.demands:
            ends[x.asked_by] = max(x.end, ends.get(x.asked_by, x.end))
        ours: list[Order | ProvisionedModel] = [*self.sending, *(x for x in self.alive if x.ours and not x.committed)]
        held = sum(x.units for x in ours if x.until is None or at < max(x.until, ends.get(x.asked_by, x.until)))
        return held + max(self.base_units, self.baseline)

    def terms(self) -> Terms:
        """What binds the choices."""
        policy, spec = self._situation.policy, self._situation.spec
        return Terms(
            period=Meter(self._situation).period,
            hold=self.hold,
            lag=policy.provisioning_lag,
            drain=policy.drain,
            burst_units=policy.burst_units,
            most_units=spec.most_units,
            baseline=self.baseline,
            base_units=self.base_units,
        )


def _within_caps(
    situation: Situation, fleet: _Fleet, board: Board, wishes: Wishes, terms: Terms
) -> tuple[Wishes, Excess | None, Projection]:
    """The wishes as far as the daily caps allow to buy now, what waits for a person, and what both lead to.

    First come, first served: what begins later does not keep from buying now, except the timetable. What would pass a
    cap later is asked for ahead of time.
    """
    now, meter = situation.now, Meter(situation)

    def follow(what: Wishes) -> tuple[Projection, Over | None]:
        ahead = project(fleet.pieces, fleet.blocked, now, board.horizon, what, terms)
        by_day = meter.by_day([*fleet.past, *ahead.spells])
        return ahead, first_over(by_day, situation.policy, situation.spec, situation.consents, now)

    projection, over = follow(wishes)
    if over is None:
        return wishes, None, projection
    lead = situation.policy.provisioning_lead
    begun = board.wishes(only=[demand for demand in situation.demands if demand.start - lead <= now])
    _, over_now = follow(begun)
    subject, over, kept = (wishes, over, begun.at) if over_now is None else (begun, over_now, fleet.kept)
    level = 0
    for step in (64, 32, 16, 8, 4, 2, 1):
        if follow(subject.limited(level + step, kept))[1] is None:
            level += step
    limited = subject.limited(level, kept)
    waits = (x for x in zip(subject.moments, subject.units, limited.units, strict=True) if x[1] > x[2])
    first = next(waits, None)
    excess = None
    if first is not None:  # otherwise what stands passes the cap by itself
        at, units, without = first
        excess = _excess(board.wish(at).buyer(without + 1), units, without, over, situation)
    limited = wishes.limited(level, kept)
    return (wishes if over_now is None else limited), excess, follow(limited)[0]


def _excess(demand: Demand, units: int, without: int, over: Over, situation: Situation) -> Excess:
    price = situation.spec.usd_per_unit_hour
    money = f" ({over.unit_hours * price:,.0f} USD)" if price is not None else ""
    return Excess(
        excess_id=excess_id(over.day, over.cap, demand.asked_by),
        cap="day",
        asked_by=demand.asked_by,
        units=units - without,
        amount=over.amount,
        unit=over.unit,
        until=demand.end,
        text=(
            f"{units} units of {situation.model}, for {demand.asked_by} until {utc(demand.end)}, would bring "
            f"{over.day.isoformat()} to {over.unit_hours} unit-hours{money}, {over.amount:,.0f} {over.unit} over "
            f"{over.cap} {over.limit:,.0f}; {units - without} of them wait for an approval"
        ),
    )


def _units(items: Sequence[ProvisionedModel] | Sequence[Order] | Sequence[Piece]) -> int:
    return sum(item.units for item in items)


def _orders(situation: Situation, wish: Wish, wishes: Wishes, level: int, buy: int) -> list[Order]:
    """`buy` units over `level` in chunks; what was asked for without an answer comes first, under its own token."""
    landed = {model.name for model in situation.fleet or ()} | {order.name for order in situation.sending}
    again = [order for order in situation.unanswered if order.name not in landed]
    orders: list[Order] = []
    sequence = situation.next_sequence
    while buy > 0:
        order = next((order for order in again if order.units <= buy), None)
        if order is not None:
            again.remove(order)
        else:
            units = chunks(level, buy, situation.now, wishes, situation.policy.burst_units)[0]
            order = _order(situation, wish.buyer(level + units), sequence, units)
            sequence += 1
        orders.append(order)
        buy -= order.units
        level += order.units
    return orders


def _growth(
    situation: Situation, fleet: _Fleet, orders: Sequence[Order], routes: Mapping[str, int], why: str
) -> list[Step]:
    """Create, wait until in service, publish."""
    not_yet = [Step(kind=StepKind.AWAIT, name=x.name, units=x.units, why="asked for", ready=False) for x in orders]
    return [
        *(Step(kind=StepKind.CREATE, name=x.name, units=x.units, why=why, order=x) for x in orders),
        *(
            _step(StepKind.AWAIT, model, "capacity counts only once it is in service")
            for model in [*fleet.alive, *fleet.late]
            if model.status == "Creating"
        ),
        *not_yet,
        *(_step(StepKind.PUBLISH, x, "in service") for x in fleet.alive if x.arn in routes.keys() - situation.routed),
        *(step.model_copy(update={"kind": StepKind.PUBLISH, "why": "once in service"}) for step in not_yet),
    ]


def _order(situation: Situation, buyer: Demand, sequence: int, units: int) -> Order:
    # With the prefix: a token is the account's, and another deployment's must not answer with its model.
    what = situation.policy.name_prefix, situation.model, buyer.demand_id, str(sequence)
    digest = sha256("\n".join(what).encode()).hexdigest()
    stem = re.sub(r"[^0-9a-zA-Z]+", "-", f"{situation.policy.name_prefix}-{situation.model}")[:40].strip("-")
    return Order(
        name=f"{stem or MANAGED_BY}-{digest[:8]}-{sequence}",
        token=digest,
        units=units,
        asked_by=buyer.asked_by,
        until=buyer.end,
        sequence=sequence,
    )


def _failed(situation: Situation) -> list[Step]:
    return [
        _step(StepKind.DELETE, model, f"its creation failed: {model.failure or 'no reason given'}")
        for model in situation.fleet or ()
        if model.status == "Failed" and model.ours and not model.committed and model.arn not in situation.leaving
    ]


def _late(model: ProvisionedModel, situation: Situation) -> bool:
    """In creation for so long that it is not waited for any more."""
    ours = model.ours and not model.committed
    return ours and model.status == "Creating" and situation.now >= _late_from(model, situation)


def _late_from(model: ProvisionedModel, situation: Situation) -> datetime:
    return model.created_at + situation.policy.provisioning_timeout


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


def _limit(situation: Situation, wish: Wish) -> str:
    """Why all together get less than they ask for, or more."""
    spec = situation.spec
    if wish.asked > wish.units:
        quota = "" if spec.quota_units is None else f", quota_units {spec.quota_units}"
        return (
            f"{wish.asked} units are asked for, {wish.units} are the limit (ceiling_units {spec.ceiling_units}{quota})"
        )
    return f"floor_units is {spec.floor_units}, {wish.asked} are asked for" if wish.asked < wish.units else ""


def _why_not(situation: Situation, fleet: _Fleet, choice: Choice, attainable: int, ends_at: int) -> str:
    if situation.fleet is None:
        return "the fleet is not known yet"
    if ends_at < attainable:
        parts = []
        if fleet.leaving_units or not fleet.late:
            parts.append(f"{fleet.leaving_units} units that are being deleted are gone")
        if fleet.late:
            timeout = situation.policy.provisioning_timeout
            parts.append(f"{_units(fleet.late)} units in creation for over {timeout} come or can go")
        return f"{attainable - ends_at} units have to wait until {' and '.join(parts)}"
    fixed = [x for x in fleet.pieces if x.releasable is None or x.releasable > situation.now]
    if _units(fixed) > attainable:
        return f"{_units(fixed)} units are others', committed, within their minimum hold or just asked for"
    if choice.again:
        return f"{choice.again} units stay, for they are wanted again before the hour ends that is paid for"
    if choice.cheaper:
        return f"{choice.cheaper} units too many stay: until the next change that costs less than the exact sum"
    return (
        f"{ends_at - attainable} units too many stay: to replace them by fewer, both would have to stand side by side, "
        f"and {situation.spec.most_units} units are the limit"
    )


def _summary(
    desired: int,
    words: str,
    in_service: int,
    fleet: _Fleet,
    buy: int,
    surplus: Sequence[ProvisionedModel],
    why_not: str,
) -> str:
    creating = sum(model.units for model in fleet.alive if model.status == "Creating")
    parts = [f"{desired} units wanted for {words}", f"{in_service} in service"]
    parts += [f"{creating} in creation"] if creating else []
    parts += [f"{_units(fleet.sending) + buy} to be created"] if fleet.sending or buy else []
    parts += [f"{_units(surplus)} to be deleted"] if surplus else []
    return "; ".join(parts) + (f" ({why_not})" if why_not else "")


@dataclass(frozen=True)
class _Said:
    """What the answers to all demands are made of."""

    fleet: _Fleet
    asking: Sequence[Order]
    """Asked of AWS, or about to be."""
    absent: str
    """That the baseline is not all there; then what we buy is not enough."""
    excess: Excess | None


def _outcome(demand: Demand, board: Board, situation: Situation, said: _Said) -> DemandOutcome:
    buys_at = demand.start - situation.policy.provisioning_lead
    wish = board.wish(max(situation.now, buys_at))
    asked = wish.asked if demand.kind is DemandKind.FEATURE else demand.units + sum(x.units for x in wish.features)
    wanted = situation.spec.clamped(asked)
    alive, asking = said.fleet.alive, said.asking
    in_service = [model for model in alive if model.in_service]
    used = sum(model.units for model in in_service if model.arn in situation.routed)
    coming = _units(alive) + _units(asking) - used
    parts = [f"{_units(in_service)} of {wanted} units in service"]
    if situation.fleet is None:
        parts = [f"requested: {wanted} units; the fleet is being read"]
    if wanted != asked:
        parts.append(f"{asked} asked for, limited to {wanted} by floor, ceiling or quota")
    status: Literal["requested", "in_service", "failed"] = "in_service"
    waiting = [said.excess.text] if said.excess is not None and said.excess.asked_by == demand.asked_by else []
    if buys_at > situation.now:
        status = "requested"
        parts += [f"it starts at {utc(demand.start)}; units are bought from {utc(buys_at)} on", *waiting]
    elif used < wanted:
        status = "failed" if situation.troubles or (said.absent and not coming) else "requested"
        unrouted, creating = _units(in_service) - used, _units(alive) - _units(in_service)
        parts += [f"{unrouted} of them get calls once their routes are published"] if unrouted else []
        parts += [f"{creating} more accepted by AWS and on the way"] if creating and not asking else []
        parts += [f"{_units(asking) + creating} more being asked of AWS"] if asking and not situation.troubles else []
        parts += [said.absent] if said.absent else []
        parts += [f"paused: {situation.paused}"] if situation.paused else waiting
        parts += situation.troubles
    return DemandOutcome(
        demand_id=demand.demand_id,
        status=status,
        units_in_service=used,
        units_wanted=wanted,
        detail="; ".join(parts),
    )


def _next_change(board: Board, situation: Situation, fleet: _Fleet, too_many: bool) -> datetime | None:
    now = situation.now
    moments = [board.next_change] if board.next_change is not None else []
    moments += [_late_from(model, situation) for model in fleet.alive if model.ours and model.status == "Creating"]
    moments += [model.created_at + fleet.hold for model in fleet.late]
    if too_many:
        moments += [piece.releasable for piece in fleet.pieces if piece.releasable is not None]
    return min((moment for moment in moments if moment > now), default=None)


def _expected(board: Board, projection: Projection | None, now: datetime, in_service: int) -> tuple[ExpectedUnits, ...]:
    units_from = dict(projection.in_service) if projection is not None else {now: in_service}
    units, found = in_service, list[ExpectedUnits]()
    for at in sorted({*units_from, *board.changes}):
        units = units_from.get(at, units)
        wanted = board.wish(at, lead=False).units
        if not found or (found[-1].units, found[-1].wanted) != (units, wanted):
            found.append(ExpectedUnits(at=at, units=units, wanted=wanted))
    return tuple(found)


def _cost(situation: Situation, fleet: _Fleet, projection: Projection | None) -> PlanCost:
    meter, price = Meter(situation), situation.spec.usd_per_unit_hour
    bought = [x for x in fleet.pieces if x.releasable is not None and x.since < situation.now]
    stands = meter.unit_hours(Spell(x.units, x.since, situation.now) for x in bought)
    past = meter.unit_hours(fleet.past)
    ahead = max(0, meter.unit_hours(projection.spells) - stands) if projection is not None else 0
    return PlanCost(
        unit_hours_so_far=past + stands,
        unit_hours_ahead=ahead,
        usd_so_far=None if price is None else (past + stands) * price,
        usd_ahead=None if price is None else ahead * price,
    )
