"""Coupled scaling (S4) and the 80 % rule (S1): capacity follows ECS tasks and utilisation before calls are throttled.

Both rules ask for units by an emergency demand that ends by itself, out of one budget and with one cooldown. For a
model that throttles nothing is asked for here: the incident sizes from the offered load then. Tasks that grow because
answers are slow must raise no demand (design check 22 and 25), nor those that an incident or an event has sized for.
Everything here is pure.
"""

import math
from datetime import datetime, timedelta
from typing import Literal

from pydantic import AwareDatetime, Field

from domain import timetable
from domain.capacity import Demand, DemandKind
from domain.clock import HOUR
from domain.health import HEALTH_SCHEDULE
from domain.incident import span, utc
from domain.knob_spec import Number
from domain.knobs import Holder, KnobName, LeaseRequest
from domain.load import LoadSnapshot, load_on, remaining_tokens_per_second, units_for
from domain.messages import CapacityState, Message, PolicySnapshot, incident_id
from domain.policy import CouplingPolicy, ModelPolicy, Policy
from domain.wishes import wanted_at

CAPACITY_COUPLING_WORKFLOW = "CapacityCouplingWorkflow"
CAPACITY_COUPLING = "capacity-coupling"
"""Id of the schedule, and holder of what it asks for."""
SAME_RATE = 0.1
"""A rate that strays less from the leased one renews it; a lease's value never changes."""
INCIDENT_IDS = incident_id("")

Rule = Literal["tasks rose", "over the utilisation"]


def schedules_of(policy: Policy) -> list[str]:
    """Ids of the schedules that capacity depends on."""
    return [HEALTH_SCHEDULE, *([CAPACITY_COUPLING] if policy.coupling else [])]


class Firing(Message):
    """One demand that coupling made."""

    at: AwareDatetime
    model: str
    rule: Rule
    units: int
    """In all."""
    extra_units: int
    """Over what everybody else wanted."""
    until: AwareDatetime
    more: bool = False
    """It raised a demand of ours that was in force, and replaced it."""


class CouplingState(Message):
    """What one run leaves to the next, as the schedule's last result."""

    tasks: float | None = None
    """Running ECS tasks that capacity has been compared with."""
    over_since: dict[str, AwareDatetime] = Field(default_factory=dict)
    """By model: since when demand has been over the utilisation."""
    firings: list[Firing] = Field(default_factory=list)
    """Of the time that a proposal looks back."""
    rate: LeaseRequest | None = None
    """The per-task rate that is leased; None: none."""
    said: list[str] = Field(default_factory=list)
    """What this run found, in words."""


class AssessCoupling(Message):
    """Asks what to do in view of tasks, load and capacity as they are."""

    now: AwareDatetime
    state: CouplingState


class Proposal(Message):
    """A change of the timetable that repeated demands suggest."""

    model: str
    text: str


class CouplingPlan(Message):
    """What to do, and the state for the next run."""

    demands: list[Demand] = Field(default_factory=list)
    rate: LeaseRequest | None = None
    """To take or renew."""
    release: list[str] = Field(default_factory=list)
    """Leases to give back after that."""
    proposals: list[Proposal] = Field(default_factory=list)
    state: CouplingState


def plan(
    snapshot: PolicySnapshot,
    now: datetime,
    load: LoadSnapshot,
    tasks: float | None,
    capacity: dict[str, CapacityState],
    before: CouplingState,
) -> CouplingPlan:
    """Demands, the per-task rate and proposals. `capacity`: by model; one that could not be read is absent."""
    coupling = snapshot.policy.coupling
    if coupling is None:
        return CouplingPlan(release=[before.rate.lease_id] if before.rate else [], state=CouplingState())
    kept = [firing for firing in before.firings if now - firing.at < coupling.propose_within]
    policy, held = snapshot.policy, before.rate
    needed = {model: _needed(model, load, policy, limited=held is not None) for model in policy.models}
    over_since = {
        model: before.over_since.get(model, now)
        for model, state in capacity.items()
        # Not while it throttles: the load of then is the incident's to size from, and its levers may end it.
        if not load.model(model).throttles
        and _utilisation(needed[model], state, policy.models[model]) > coupling.over_utilisation
    }
    rose = tasks is not None and before.tasks is not None and tasks > before.tasks
    if _expected_growth(load, capacity, now):
        rose = False
    demands: list[Demand] = []
    proposals: list[Proposal] = []
    said: list[str] = []
    waits = False
    for model, state in capacity.items():
        if load.model(model).throttles or state.paused is not None:
            continue
        over = now - over_since[model] >= coupling.over_for if model in over_since else False
        asked = _asked(model, needed[model] if over else None, tasks if rose else None, policy, state)
        if asked is None:
            continue
        units, rule, why = asked
        last = max((firing.at for firing in kept if firing.model == model), default=None)
        if last is not None and now - last < coupling.cooldown:
            waits = True
            said.append(f"{model}: {why}: the last demand was at {utc(last)}, within the cooldown")
            continue
        firing, words = _fire(model, units, rule, snapshot, now, state, kept)
        said.append(f"{model}: {why}: {words}")
        if firing is None:
            continue
        kept.append(firing)
        demands.append(_demand(firing, f"{why}: {words}"))
        if proposal := _proposal(firing, kept, snapshot, coupling):
            proposals.append(proposal)
    rate = _lease(_rate(load, needed, coupling), held, now, coupling)
    if rate is not None:
        said.append(f"one task may call Bedrock {rate.value} times a second: capacity ÷ tasks")
    return CouplingPlan(
        demands=demands,
        rate=rate,
        release=[held.lease_id] if held and (rate is None or rate.lease_id != held.lease_id) else [],
        proposals=proposals,
        state=CouplingState(
            # Tasks that rose within the cooldown are looked at again after it.
            tasks=before.tasks if tasks is None or (rose and waits) else tasks,
            over_since=over_since,
            firings=kept,
            rate=rate,
            said=said,
        ),
    )


# ---------------------------------------------------------------- the two rules


def _expected_growth(load: LoadSnapshot, capacity: dict[str, CapacityState], now: datetime) -> bool:
    """Whether tasks may grow for a reason that somebody sizes for: slow answers, an incident, a calendar event."""
    if any(load.model(model).throttles for model in capacity):
        return True
    demands = [demand for state in capacity.values() for demand in state.demands if demand.start <= now < demand.end]
    return any(demand.kind is DemandKind.EVENT or demand.asked_by.startswith(INCIDENT_IDS) for demand in demands)


def _needed(model: str, load: LoadSnapshot, policy: Policy, limited: bool) -> float:
    """What users need of the model, tokens/s: what is sent, but no more than is offered (retries are no demand).

    `limited`: tasks may not call as often as they would, so that what is sent is no measure.
    """
    sent = load.model(model).sent_tokens_per_second
    if not load.offered_tokens_per_second or load.hit_rate is None:
        return sent or 0.0
    offered = load_on(model, load.offered_tokens_per_second, policy.baseline.model_routing, load.hit_rate)
    return offered if sent is None or limited else min(sent, offered)


def _utilisation(needed: float, state: CapacityState, spec: ModelPolicy) -> float:
    """Demand as a share of what is provisioned (S1: of provisioned capacity); of on-demand where nothing is."""
    provisioned = remaining_tokens_per_second(state.units_in_service, spec)
    return needed / provisioned if provisioned else 0.0


def _asked(
    model: str, over_with: float | None, risen_to: float | None, policy: Policy, state: CapacityState
) -> tuple[int, Rule, str] | None:
    """Units that one of the rules asks for, which, and why; None: neither does.

    `over_with`: the demand that has been over the utilisation for long enough; `risen_to`: the tasks, if they rose.
    """
    coupling, spec = policy.coupling, policy.models[model]
    assert coupling is not None
    answers: list[tuple[int, Rule, str]] = []
    if risen_to is not None and (ratio := coupling.units_per_task.get(model)):
        units = math.ceil(round(risen_to * ratio, 9))
        answers.append((units, "tasks rose", f"ECS runs {risen_to:g} tasks, at {ratio:.2f} units a task"))
    if over_with is not None:
        units = units_for(over_with, spec, policy.capacity.unplanned_target_utilisation)
        share = _utilisation(over_with, state, spec)
        why = f"{over_with:,.0f} tokens/s are {share:.0%} of what is provisioned"
        answers.append((units, "over the utilisation", why))
    return max(answers, key=lambda answer: answer[0], default=None)


def _fire(
    model: str,
    units: int,
    rule: Rule,
    snapshot: PolicySnapshot,
    now: datetime,
    state: CapacityState,
    firings: list[Firing],
) -> tuple[Firing | None, str]:
    """The demand, bounded; or None and why there is none."""
    policy, clock = snapshot.policy, snapshot.clock
    coupling = policy.coupling
    assert coupling is not None
    others = _wanted_by_others(model, state, snapshot, now)
    own = next((d.units for d in state.demands if d.asked_by == CAPACITY_COUPLING and _lasts(d, policy, now)), 0)
    if units <= max(others, own):
        return None, f"{max(others, own)} units are wanted already"
    day = clock.business(now) - timedelta(days=1)
    hours = clock.business_duration(coupling.hold) / HOUR
    spent = sum(
        firing.extra_units
        * (clock.business_duration(_ends(firing, firings, now if firing.model == model else None) - firing.at) / HOUR)
        for firing in firings
        if clock.business(firing.at) > day
    )
    left = math.floor((coupling.max_unit_hours_per_day - spent) / hours)
    extra = min(units, policy.models[model].most_units) - others
    bounded = min(extra, coupling.max_extra_units, left)
    if bounded <= 0 or others + bounded <= own:
        return None, f"{units} units would be needed, and the day's budget or the ceiling leaves none"
    more = any(firing.model == model and firing.until > now for firing in firings)
    firing = Firing(
        at=now,
        model=model,
        rule=rule,
        units=others + bounded,
        extra_units=bounded,
        until=now + coupling.hold,
        more=more,
    )
    return firing, f"{firing.units} units, {bounded} over what is wanted otherwise, until {utc(firing.until)}"


def _ends(firing: Firing, firings: list[Firing], replaced_at: datetime | None) -> datetime:
    """When it ended, or will: the next demand for its model replaces it."""
    later = [one.at for one in firings if one.model == firing.model and one.at > firing.at]
    return min([firing.until, *later, *([replaced_at] if replaced_at else [])])


def _wanted_by_others(model: str, state: CapacityState, snapshot: PolicySnapshot, now: datetime) -> int:
    others = [demand for demand in state.demands if demand.asked_by != CAPACITY_COUPLING]
    return wanted_at(snapshot.policy, model, snapshot.clock, others, now)


def _lasts(demand: Demand, policy: Policy, now: datetime) -> bool:
    """Units asked for now would not be there before it ends."""
    return demand.end - now > policy.capacity.provisioning_lag


def _demand(firing: Firing, reason: str) -> Demand:
    return Demand(
        demand_id=f"{CAPACITY_COUPLING}-{firing.model}",
        model=firing.model,
        kind=DemandKind.EMERGENCY,
        units=firing.units,
        start=firing.at,
        end=firing.until,
        reason=reason[:500],
        asked_by=CAPACITY_COUPLING,
    )


def _proposal(
    firing: Firing, firings: list[Firing], snapshot: PolicySnapshot, coupling: CouplingPolicy
) -> Proposal | None:
    """At every `propose_after`th time within `propose_within`."""
    own = [one for one in firings if one.model == firing.model]
    times = sum(not one.more for one in own)
    if firing.more or times % coupling.propose_after:
        return None
    policy, business = snapshot.policy, snapshot.clock.business(firing.at)
    most = max(one.units for one in own)
    hour = timetable.units_at(policy, firing.model, business)
    window = timetable.window_at(policy.timetable, business) if policy.timetable else None
    where = f"timetable.windows {window.span}: units.{firing.model}" if window else f"models.{firing.model}: base units"
    within = span(snapshot.clock.business_duration(coupling.propose_within))
    text = (
        f"{firing.model} needed more units than the timetable {times} times in {within}, {most} at most: "
        f"consider {where} from {hour} to {most}"
    )
    return Proposal(model=firing.model, text=text)


# ---------------------------------------------------------------- the per-task rate


def _rate(load: LoadSnapshot, needed: dict[str, float], coupling: CouplingPolicy) -> float | None:
    """Calls a second that each task may make so that all tasks together fill the capacity and no more.

    None: no model is short of capacity, or what it rests on could not be read. The scarcest model tells: of what one
    task calls now, that share which the model can answer. Calls, capacity and tasks change together, so a task's share
    falls as tasks are added while the sum of all stays what Bedrock can answer (design check 25).
    """
    calls = load.calls_per_second_per_task
    if not calls:
        return None
    shares = []
    for model, tokens in needed.items():
        now = load.model(model)
        sent, capacity = now.sent_tokens_per_second, now.capacity_tokens_per_second
        if sent and capacity and tokens > coupling.over_utilisation * capacity:
            shares.append(capacity / sent)
    if not shares:
        return None
    kind = KnobName.INVOCATIONS_PER_SECOND_PER_TASK.spec.kind
    assert isinstance(kind, Number)
    return min(max(math.floor(100 * calls * min(shares)) / 100, kind.minimum), kind.maximum)


def _lease(
    rate: float | None, before: LeaseRequest | None, now: datetime, coupling: CouplingPolicy
) -> LeaseRequest | None:
    if rate is None:
        return None
    if before is not None and isinstance(before.value, float) and abs(rate - before.value) <= SAME_RATE * before.value:
        return before
    return LeaseRequest(
        lease_id=f"{CAPACITY_COUPLING}:rate:{round(now.timestamp() * 1000)}",
        knob=KnobName.INVOCATIONS_PER_SECOND_PER_TASK,
        value=float(rate),
        holder=Holder(kind="capacity", id=CAPACITY_COUPLING),
        reason="capacity ÷ tasks, so that more tasks do not mean more calls than Bedrock answers. No data plane obeys "
        "it yet",
        duration_ms=round(coupling.rate_lease / timedelta(milliseconds=1)),
    )
