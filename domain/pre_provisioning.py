"""Pre-provisioning for calendar events (scenario 1): sizes, times, what may go wrong, and the messages about it. Pure.

Moments here are real time, which is business time unless rehearsed; the calendar's own rows are business time.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from enum import StrEnum
from zoneinfo import ZoneInfo

from pydantic import AwareDatetime, BaseModel, ConfigDict

from domain.calendar import CalendarEvent, check_planned
from domain.capacity import Demand, DemandKind, DemandOutcome
from domain.clock import HOUR, RehearsalClock, compress
from domain.forecast import peak
from domain.incident import Decision, TimelineEntry, span, utc
from domain.load import remaining_tokens_per_second, units_for
from domain.messages import LoadQuery, Message, PolicySnapshot
from domain.policy import Policy
from domain.timetable import units_at
from domain.wishes import wanted_at

EVENT_WORKFLOW = "EventPreProvisioningWorkflow"

EVENT_CHANGED = "event_changed"
"""Signal, argument CalendarEvent: the row as it is now."""
EVENT_REMOVED = "event_removed"
"""Signal, argument EventRemoved: nothing is to be provisioned for it any more."""
PROVISIONING_ACTIONS = frozenset(
    f"bedrock:{name}ProvisionedModelThroughput{plural}"
    for name, plural in (("List", "s"), ("Get", ""), ("Create", ""), ("Delete", ""))
)
"""What buying and releasing needs of the worker's role."""
ENTRY_MEMO = "entry"
"""Memo of an event's workflow: the fingerprint of the row that it follows."""


def event_workflow_id(event_id: str) -> str:
    """The workflow id of one calendar event, which asks for its units."""
    return f"event-{event_id}"


# ---------------------------------------------------------------- times


class EventTimes(BaseModel):
    """When what happens, in real time."""

    model_config = ConfigDict(frozen=True)

    preflight_at: AwareDatetime
    buy_at: AwareDatetime
    """Buying begins: the units' provisioning is triggered."""
    needed_at: AwareDatetime
    """Lead time ahead of the start: from here on they should be in service."""
    verify_by: AwareDatetime
    """In service by then is in time; later is late."""
    starts_at: AwareDatetime
    ends_at: AwareDatetime
    """The units are released."""


def times_of(event: CalendarEvent, policy: Policy, clock: RehearsalClock) -> EventTimes:
    """The event's times. `policy`: as a snapshot has it, durations divided by the clock's speed."""
    starts_at = clock.real(event.starts_at)
    needed_at = starts_at - event.lead_time / clock.speed
    return EventTimes(
        preflight_at=min(starts_at - policy.calendar.preflight_ahead, needed_at - policy.capacity.provisioning_lead),
        buy_at=needed_at - policy.capacity.provisioning_lead,
        needed_at=needed_at,
        verify_by=starts_at - policy.calendar.verify_margin,
        starts_at=starts_at,
        ends_at=starts_at + policy.calendar.event_types[event.type].lasts,
    )


# ---------------------------------------------------------------- sizes


class EventSize(BaseModel):
    """What one model needs for the event."""

    model_config = ConfigDict(frozen=True)

    model: str
    forecast_tokens_per_second: float
    """On an ordinary day, in the event's busiest hour."""
    tokens_per_second: float
    """With the event's multiplier."""
    needed_units: int
    units: int
    """What may be had of them: within floor, ceiling and quota."""
    arithmetic: str

    @property
    def feasible(self) -> bool:
        """Whether all of it may be had."""
        return self.units >= self.needed_units


class EventPlan(BaseModel):
    """When and how much, and what stands against it."""

    model_config = ConfigDict(frozen=True)

    times: EventTimes
    sizes: tuple[EventSize, ...]
    findings: tuple[str, ...]
    """What a person should mend before the event, each with what to do; empty: nothing."""
    notes: tuple[str, ...]
    """What is worth knowing."""
    demands: tuple[Demand, ...]


class PlanEvent(Message):
    """Asks for the plan of an event."""

    event: CalendarEvent
    snapshot: PolicySnapshot
    now: AwareDatetime
    others: tuple[Demand, ...] = ()
    """Every demand that the capacity workflows of its models hold."""


def plan_event(request: PlanEvent) -> EventPlan:
    """Sizes, times and demands of one event, and what stands against it.

    Raises:
        EntryError, NoForecast: the row is not within the policy.
    """
    event, policy, clock = request.event, request.snapshot.policy, request.snapshot.clock
    check_planned(event, uncompressed(request.snapshot))
    times = times_of(event, policy, clock)
    sizes = tuple(size_of(event, model, policy, clock) for model in event.models)
    demands = tuple(_demand(event, size, times) for size in sizes if size.needed_units and times.ends_at > request.now)
    notes = [size.arithmetic for size in sizes]
    notes += [_cost(size, times, policy, clock) for size in sizes]
    for demand in demands:
        notes += overlaps(demand, request.others)
    return EventPlan(
        times=times,
        sizes=sizes,
        findings=(
            *(_infeasible(event, size, policy) for size in sizes if not size.feasible),
            *(text for size in sizes for text in _over_caps(size, times, policy, clock)),
        ),
        notes=tuple(notes),
        demands=demands,
    )


def uncompressed(snapshot: PolicySnapshot) -> Policy:
    """The snapshot's policy with business durations as they are written."""
    return compress(snapshot.policy, 1 / snapshot.clock.speed)


def size_of(event: CalendarEvent, model: str, policy: Policy, clock: RehearsalClock) -> EventSize:
    """Units of one model: ceil(multiplier * forecast / tokens/s per unit / planned target utilisation).

    Raises:
        NoForecast: the policy has no load to expect on it.
    """
    spec, target = policy.models[model], policy.capacity.planned_target_utilisation
    lasts = clock.business_duration(policy.calendar.event_types[event.type].lasts)
    forecast = peak(policy.forecast, model, event.starts_at, event.starts_at + lasts)
    load = event.multiplier * forecast
    needed = units_for(load, spec, target)
    units = spec.clamped(needed)
    limited = f", limited to {units} by floor, ceiling or quota" if units != needed else ""
    return EventSize(
        model=model,
        forecast_tokens_per_second=forecast,
        tokens_per_second=load,
        needed_units=needed,
        units=units,
        arithmetic=(
            f"{model}: {event.multiplier:g} × {forecast:,.0f} tokens/s ÷ {spec.tokens_per_second_per_unit:,.0f} per "
            f"unit ÷ {target:g} = {needed} units{limited}"
        ),
    )


def _demand(event: CalendarEvent, size: EventSize, times: EventTimes) -> Demand:
    return Demand(
        demand_id=f"{event_workflow_id(event.event_id)}:{size.model}",
        model=size.model,
        kind=DemandKind.EVENT,
        units=size.needed_units,
        start=times.needed_at,
        end=times.ends_at,
        reason=f"{event.type}, {event.multiplier:g}x from {event.starts_at.isoformat(timespec='minutes')}",
        asked_by=event_workflow_id(event.event_id),
    )


def _infeasible(event: CalendarEvent, size: EventSize, policy: Policy) -> str:
    spec = policy.models[size.model]
    limits = [f"models.{size.model}.ceiling_units is {spec.ceiling_units}"]
    if spec.quota_units is not None:
        limits.append(f"quota_units is {spec.quota_units}")
    carried = size.units * spec.tokens_per_second_per_unit
    times = carried / size.forecast_tokens_per_second
    return (
        f"{event.multiplier:g}x needs {size.needed_units} units of {size.model}, and {size.units} may be had "
        f"({', '.join(limits)}): they carry {carried:,.0f} of {size.tokens_per_second:,.0f} tokens/s, {times:.1f}x. "
        "Raise the limit (AWS Support grants model units), lower the multiplier, or accept that calls overflow"
    )


def _cost(size: EventSize, times: EventTimes, policy: Policy, clock: RehearsalClock) -> str:
    hours = clock.business_duration(times.ends_at - times.buy_at) / timedelta(hours=1)
    price = policy.models[size.model].usd_per_unit_hour
    usd = f", {size.units * hours * price:,.0f} USD" if price else ""
    return (
        f"{size.model}: {size.units} units for {hours:g} h are {size.units * hours:,.0f} unit-hours{usd}, less what "
        "stands there anyway"
    )


def _over_caps(size: EventSize, times: EventTimes, policy: Policy, clock: RehearsalClock) -> Iterator[str]:
    """The days on which timetable and event together pass a cap of cost: buying would wait for a person then."""
    capacity, spec = policy.capacity, policy.models[size.model]
    timetabled = policy.timetable is not None and size.model in policy.timetable.models
    since, until = clock.business(times.buy_at), clock.business(times.ends_at)
    day = since.astimezone(ZoneInfo(policy.timetable.zone if policy.timetable else "UTC")).replace(
        hour=0, minute=0, second=0, microsecond=0
    )
    while day < until:
        hours = [day + n * HOUR for n in range(24)]
        standing = [units_at(policy, size.model, at) for at in hours]
        wanted = [
            max(units, size.units) if at < until and since < at + HOUR else units
            for at, units in zip(hours, standing, strict=True)
        ]
        others = 0 if timetabled else spec.baseline_units
        unit_hours = sum(units - others for units in wanted)
        for name, most, price in (
            ("max_unit_hours_per_day", capacity.max_unit_hours_per_day, 1.0),
            ("max_usd_per_day", capacity.max_usd_per_day, spec.usd_per_unit_hour),
        ):
            if most is not None and price is not None and unit_hours * price > most:
                yield (
                    f"{size.model} is expected to need {unit_hours * price:,.0f} on {day:%Y-%m-%d}, and "
                    f"capacity.{name} is {most:,.0f}: buying will wait until a person agrees (`runbooks capacity "
                    "approve`). Raise it for the event, or be there"
                )
        day += timedelta(days=1)


def overlaps(own: Demand, others: Iterable[Demand]) -> list[str]:
    """Of events at the same time the larger demand counts; says which, for each other event."""
    return [
        f"{own.model}: {other.asked_by} wants {other.units} units from {utc(other.start)} to {utc(other.end)}, at the "
        f"same time as our {own.units}: {_winner(own, other)} counts, they do not add"
        for other in sorted(others, key=lambda x: (x.start, x.demand_id))
        if other.kind is DemandKind.EVENT
        and (other.demand_id, other.model) != (own.demand_id, own.model)
        and other.model == own.model
        and other.start < own.end
        and own.start < other.end
    ]


def _winner(own: Demand, other: Demand) -> str:
    if own.units == other.units:
        return "either"
    return "ours, the larger," if own.units > other.units else f"{other.asked_by}, the larger,"


# ---------------------------------------------------------------- the record


class EventPhase(StrEnum):
    """Where an event stands."""

    WAITING = "waiting"
    """For the preflight."""
    SCHEDULED = "scheduled"
    """Checked; the demand stands with its dates."""
    PROVISIONING = "provisioning"
    READY = "ready"
    """In service, ahead of the start."""
    RUNNING = "running"
    """The event is on."""
    RELEASING = "releasing"
    DONE = "done"
    WITHDRAWN = "withdrawn"


class WatchedModel(BaseModel):
    """What the event did to one model."""

    peak_tokens_per_second: float = 0
    """Sent to it."""
    capacity_tokens_per_second: float = 0
    """At that moment."""
    throttles: float = 0
    tokens_per_second: float = 0
    """Sent to it at the last look."""


class EventRecord(BaseModel):
    """Everything about one event's pre-provisioning: what the query, the UI and the report show."""

    event_id: str
    run_id: str
    event: CalendarEvent
    clock: RehearsalClock = RehearsalClock()
    """Durations in words are business time."""
    phase: EventPhase = EventPhase.WAITING
    times: EventTimes | None = None
    sizes: list[EventSize] = []
    findings: list[str] = []
    """What stood against it at the last check."""
    notes: list[str] = []
    outcomes: dict[str, DemandOutcome] = {}
    """By model, the latest of its capacity workflow."""
    triggered_at: AwareDatetime | None = None
    in_service_at: AwareDatetime | None = None
    """When all of it was seen in service and routed first."""
    in_time: bool | None = None
    """In service at `verify_by`; None: not judged yet."""
    watched: dict[str, WatchedModel] = {}
    released_at: AwareDatetime | None = None
    """When the fleet was seen back at what others want."""
    waiting_for: str = ""
    next_step: str = ""
    next_at: AwareDatetime | None = None
    timeline: list[TimelineEntry] = []
    decisions: list[Decision] = []
    outcome: str = ""
    """How it ended, in a sentence."""
    ended_at: AwareDatetime | None = None
    report_path: str | None = None

    def lasting(self, real: timedelta) -> str:
        """A real duration as business time, in words."""
        return span(self.clock.business_duration(real))


def event_details(record: EventRecord) -> str:
    """The event at this moment, as Markdown for the Temporal UI."""
    event, times = record.event, record.times
    lines = [
        f"# {record.phase.upper()}: {event.type}, {event.multiplier:g}x",
        "",
        f"**Starts** {event.starts_at.isoformat(timespec='minutes')}"
        + (f" ({utc(times.starts_at)}); released at {utc(times.ends_at)}" if times else ""),
        "",
        f"**Waiting for**: {record.waiting_for or 'nothing'}"
        + (f". **Next**: {record.next_step}" if record.next_step else "")
        + (f" at {utc(record.next_at)}" if record.next_at else ""),
    ]
    lines += ["", "**Needs a person**:", *(f"- {text}" for text in record.findings)] if record.findings else []
    lines += ["", *(f"- {text}" for text in record.notes)]
    lines += [f"- {model}: {outcome.status}, {outcome.detail}" for model, outcome in record.outcomes.items()]
    if record.timeline:
        lines += ["", *(f"- {utc(line.at)} {line.text}" for line in record.timeline[-10:])]
    return "\n".join(lines)


def planned(event: CalendarEvent) -> str:
    """The event in a few words."""
    return f"{event.event_id} ({event.type}, {event.multiplier:g}x, {event.starts_at.isoformat(timespec='minutes')})"


def how_in_time(record: EventRecord) -> str:
    """Whether the units were there in time, in words."""
    times = record.times
    if record.in_time is None or times is None:
        return "not judged"
    if record.in_service_at is None:
        return "never all in service before the event ended"
    ahead = times.starts_at - record.in_service_at
    margin = record.lasting(times.starts_at - times.verify_by)
    if ahead < timedelta(0):
        return f"in service {record.lasting(ahead)} after the start"
    return f"in service {record.lasting(ahead)} before the start; {margin} is the margin"


def in_service(outcomes: Mapping[str, DemandOutcome], models: Iterable[str]) -> bool:
    """Whether every one of these models has its units in service and routed."""
    return all(model in outcomes and outcomes[model].status == "in_service" for model in models)


# ---------------------------------------------------------------- messages


class EventInput(Message):
    """Starts the pre-provisioning of one event."""

    event: CalendarEvent


class TellEvent(Message):
    """Starts the event's workflow, or tells it what its row says."""

    event: CalendarEvent


class EventRemoved(Message):
    """The entry is gone, or counts no more."""

    reason: str


class AwaitRelease(Message):
    """Wait until a model has no more units than its remaining demands want, or give up."""

    model: str
    demand_id: str
    poll_interval: timedelta
    give_up_after: timedelta


class Released(Message):
    """How the wait for the release ended."""

    done: bool
    detail: str


class WatchEvent(Message):
    """Watch the models during the event."""

    load: LoadQuery
    poll_interval: timedelta
    lasts: timedelta
    seen: dict[str, WatchedModel]
    """What was seen before."""


class WatchedEvent(Message):
    """What the watch saw."""

    models: dict[str, WatchedModel]
    unread: str = ""
    """Why the last look failed; empty: it did not."""


class EndEvent(Message):
    """Asks whether the units may go at the event's end."""

    demands: list[Demand]
    """Of the event."""
    others: list[Demand]
    """All demands for its models, those of the event among them."""
    watched: dict[str, WatchedModel]
    planned_end: AwareDatetime
    ends_at: AwareDatetime
    """As moved so far."""
    snapshot: PolicySnapshot


class EventEnd(Message):
    """When the units go."""

    ends_at: AwareDatetime
    why: list[str]
    """Why not as planned, for each model; empty: as planned."""


def end_event(request: EndEvent) -> EventEnd:
    """Moves the end while the load is too much for what would be left; never further than the policy's maximum."""
    policy, clock, ends_at = request.snapshot.policy, request.snapshot.clock, request.ends_at
    longest = request.planned_end + policy.calendar.max_prolong
    most = policy.way_back.max_utilisation_without_lever
    why = []
    own = {demand.demand_id for demand in request.demands}
    others = [demand for demand in request.others if demand.demand_id not in own]
    for demand in request.demands:
        spec, seen = policy.models[demand.model], request.watched.get(demand.model)
        left = wanted_at(policy, demand.model, clock, others, ends_at)
        if seen is None or left >= demand.units:
            continue
        rest = remaining_tokens_per_second(left, spec)
        if seen.tokens_per_second > most * rest:
            why.append(
                f"{demand.model}: {seen.tokens_per_second:,.0f} tokens/s are more than {most:.0%} of the {rest:,.0f} "
                f"that {left} units leave"
            )
    if not why or ends_at >= longest:
        return EventEnd(ends_at=ends_at, why=why)
    return EventEnd(ends_at=min(ends_at + policy.calendar.prolong_by, longest), why=why)


class MarkEvent(Message):
    """What pre-provisioning writes into the event's row, as it stands now. Times are business time."""

    event_id: str
    starts_at: AwareDatetime
    """Only into the row that still says so."""
    units: dict[str, int]
    triggered_at: AwareDatetime
    completed_at: AwareDatetime | None


class EventReportInput(Message):
    """Asks for the report of an event as its record stands."""

    record: EventRecord
    snapshot: PolicySnapshot
