"""The record of one incident: everything the query answers, the Temporal UI shows and the report is made of."""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, Field

from domain.alarms import AlarmChange
from domain.capacity import Demand
from domain.clock import RehearsalClock
from domain.evidence import Check
from domain.knobs import LeaseRequest
from domain.load import LoadSnapshot
from domain.trees import Diagnosis

Recovery = Literal["recovered under load", "the demand went away"]
RunbookName = Literal["throttle", "scaling-lag", "latency"]


class Phase(StrEnum):
    """Where an incident stands."""

    TRIAGE = "triage"
    """Re-reading the metric, first-response checks."""
    MITIGATING = "mitigating"
    VERIFYING = "verifying"
    """Levers are in force; waiting for recovery."""
    AWAITING_DECISION = "awaiting-decision"
    """People decide the way back."""
    REVERTING = "reverting"
    CLEANUP = "cleanup"
    SNOOZED = "snoozed"
    """Aborted; further alarms for the key are ignored until OK or the snooze ends."""
    CLOSED = "closed"


class LeverName(StrEnum):
    """The levers of mitigations, in the order of the way back."""

    MODEL_ROUTING = "model_routing"
    REQUEST_COALESCING = "request_coalescing"
    CACHE_TTL = "cache_ttl_seconds"
    BATCH_WINDOW = "batch_window_ms"
    CAPACITY = "capacity"


class LeverStatus(StrEnum):
    """What became of a lever."""

    NOT_NEEDED = "not-needed"
    APPLYING = "applying"
    IN_FORCE = "in-force"
    FAILED = "failed"
    RELEASING = "releasing"
    RELEASED = "released"
    KEPT = "kept"
    """A person's override, or a person's own demand, holds it now."""


class Lever(BaseModel):
    """One lever of the plan, and what became of it."""

    name: LeverName
    status: LeverStatus
    before: str
    """The value it changes, in words, e.g. `30 s`."""
    after: str
    """The value it sets, in words, e.g. `120 s`."""
    why: str
    """Why this value, or why the lever is not needed."""
    applied_at: AwareDatetime | None = None
    landed_at: AwareDatetime | None = None
    """When the effect was there: for capacity, when the units were in service."""
    hold_until: AwareDatetime | None = None
    """The maximum hold; when it ends the way back starts by itself or people are paged."""
    extensions: int = 0
    released_at: AwareDatetime | None = None
    lease: LeaseRequest | None = None
    """What undoes and renews it, when it is a knob."""
    demand: Demand | None = None
    """What undoes it, when it is capacity."""
    detail: str = ""
    """The latest word on it: an error, what is being waited for, what still holds it."""


class RecoveryCheck(BaseModel):
    """One measure of recovery."""

    name: str
    value: float | None
    """None: no data."""
    target: float
    unit: str
    met: bool
    since: AwareDatetime | None = None
    """Met without a break since then."""


class BudgetRow(BaseModel):
    """A stage of the latency budget. P99s of stages do not add up to the total's (design check 28)."""

    stage: str
    budget_ms: float | None
    """None: the policy has none."""
    measured_ms: float | None
    """P99; None: no data."""

    @property
    def over(self) -> bool:
        """Whether it is measured, and over its budget."""
        return self.measured_ms is not None and self.budget_ms is not None and self.measured_ms > self.budget_ms


class TimelineEntry(BaseModel):
    """One line of the incident's history."""

    at: AwareDatetime
    kind: Literal["alarm", "finding", "lever", "recovery", "decision", "page", "capacity", "phase", "note"]
    text: str
    who: str | None = None


class Decision(BaseModel):
    """What a person asked for, and what became of it."""

    at: AwareDatetime
    who: str
    action: str
    why: str
    outcome: Literal["accepted", "denied", "already-done", "not-possible"]
    message: str


class CalendarProposal(BaseModel):
    """An event type for the calendar, learnt from the incident; written once somebody approves the revert."""

    event_type: str
    multiplier: float
    reason: str
    written: bool = False
    event_id: str | None = None


class Cost(NamedTuple):
    """What bought capacity costs."""

    unit_hours: float
    usd: float | None
    """None: no price is configured."""

    def __str__(self) -> str:
        price = "no price configured" if self.usd is None else f"about {self.usd:,.0f} USD"
        return f"{self.unit_hours:,.1f} unit-hours, {price}"


class IncidentRecord(BaseModel):
    """Everything about one incident. Times are workflow time; the clock of the policy snapshot tells business time."""

    incident_id: str
    """The workflow id, `incident-<key>`."""
    run_id: str
    key: str
    model: str | None
    runbook: RunbookName | None
    """None: a triage incident, opened for an alarm that maps to nothing. Throttling has two: the units tell which."""
    service: str = "mangaassist"
    severity: Literal["SEV1", "SEV2", "SEV3"] = "SEV2"
    phase: Phase = Phase.TRIAGE
    alarm: AlarmChange
    alarm_times: int = 1
    """Deliveries that said the alarm is on, duplicates included."""
    alarm_on: bool = True
    opened_at: AwareDatetime
    mitigated_at: AwareDatetime | None = None
    """When every free lever was in force and the capacity request was accepted."""
    recovered_at: AwareDatetime | None = None
    recovery: Recovery | None = None
    recovery_detail: str = ""
    closed_at: AwareDatetime | None = None
    outcome: str = ""
    """In one sentence, once closed."""
    load_at_start: LoadSnapshot | None = None
    load_at_recovery: LoadSnapshot | None = None
    peak_offered_tokens_per_second: float = 0
    checks: list[Check] = Field(default_factory=list)
    diagnosis: Diagnosis | None = None
    budget_before: list[BudgetRow] = Field(default_factory=list)
    """The latency budget as measured when the plan was made, ..."""
    budget_after: list[BudgetRow] = Field(default_factory=list)
    """... and once recovered."""
    arithmetic: list[str] = Field(default_factory=list)
    """The plan's sums, a line each."""
    levers: list[Lever] = Field(default_factory=list)
    units_before: int | None = None
    """In service when the plan was made; None: they could not be read."""
    units_bought: int = 0
    """Provisioned units bought for this incident, over what was there."""
    recovery_checks: list[RecoveryCheck] = Field(default_factory=list)
    effects: list[str] = Field(default_factory=list)
    """Hit rate, ECS tasks, units in service: effects of levers, reported beside recovery."""
    timeline: list[TimelineEntry] = Field(default_factory=list)
    decisions: list[Decision] = Field(default_factory=list)
    acknowledged_by: str | None = None
    waiting_for: str = ""
    """Who or what the incident waits for."""
    next_step: str = ""
    next_at: AwareDatetime | None = None
    keep_proposal: str = ""
    """How a lever becomes the new normal, should the configured baseline have been the fault."""
    taken_over_by: str | None = None
    taken_over_until: AwareDatetime | None = None
    """The automation is stopped, and the levers are this person's until then."""
    to_do: list[str] = Field(default_factory=list)
    """What remains for people to do."""
    calendar_proposal: CalendarProposal | None = None
    previous_incident: str | None = None
    """Run id of the last incident with this key."""
    knobs_at_baseline: bool | None = None
    capacity_at_baseline: bool | None = None
    still_held: list[str] = Field(default_factory=list)
    """What keeps knobs or capacity off the baseline after cleanup."""
    report_path: str | None = None

    def lever(self, name: LeverName) -> Lever | None:
        """The lever of that name, if the plan has it."""
        return next((lever for lever in self.levers if lever.name is name), None)

    @property
    def held(self) -> list[Lever]:
        """Levers in force or on the way in, in the order of the way back."""
        kept = (LeverStatus.APPLYING, LeverStatus.IN_FORCE, LeverStatus.RELEASING)
        order = list(LeverName)
        return sorted((lever for lever in self.levers if lever.status in kept), key=lambda x: order.index(x.name))

    def capacity_held(self, until: datetime) -> timedelta:
        """How long the bought capacity was in service: from landing to its release, or to `until` while it is held."""
        lever = self.lever(LeverName.CAPACITY)
        if lever is None or lever.landed_at is None:
            return timedelta(0)
        return max((lever.released_at or until) - lever.landed_at, timedelta(0))

    def cost(self, held: timedelta, clock: RehearsalClock, usd_per_unit_hour: float | None) -> Cost:
        """What the bought capacity costs that is held for the real duration `held`; hours are business time."""
        unit_hours = self.units_bought * (clock.business_duration(held) / timedelta(hours=1))
        return Cost(unit_hours, None if usd_per_unit_hour is None else unit_hours * usd_per_unit_hour)


def render_details(record: IncidentRecord, how_to: str) -> str:
    """The incident at this moment, as Markdown for the Temporal UI.

    `how_to` is one line on how to decide. Text from outside (alarm names) stands in code spans.
    """
    reason = record.alarm.reason.rstrip(". ") or "no reason given"
    parts = [
        f"# {record.phase.upper()}: {quoted(record.key)}",
        f"**What is wrong**: alarm {quoted(record.alarm.alarm_name)} ({quoted(reason)}).",
    ]
    if record.diagnosis:
        parts.append(f"**Cause**: {record.diagnosis.sentence}")
    parts.append(f"**Waiting for**: {record.waiting_for or 'nobody'}")
    if record.next_step:
        parts.append(f"**Next**: {record.next_step}" + (f", at {utc(record.next_at)}" if record.next_at else ""))
    if record.phase is Phase.AWAITING_DECISION:
        parts += [how_to, *filter(None, [record.keep_proposal])]
    parts.append("**What we changed**:" if record.levers else "**What we changed**: nothing")
    if record.levers:
        parts.append("\n".join(_lever_line(lever, lever in record.held) for lever in record.levers))
    if record.recovery_checks:
        rows = [_check_row(check) for check in record.recovery_checks]
        parts.append("\n".join(["| measure | now | target | met since |", "|---|---|---|---|", *rows]))
    if record.recovery_detail:
        parts.append(f"**Recovery**: {record.recovery_detail}.")
    if record.to_do:
        parts += ["**To do**:", "\n".join(f"- {item}" for item in record.to_do)]
    if record.outcome:
        parts.append(f"**How it ended**: {record.outcome}")
    if record.report_path:
        parts.append(f"**Report**: {quoted(record.report_path)}")
    return "\n\n".join(parts) + "\n"


def _lever_line(lever: Lever, held: bool) -> str:
    until = f", at most until {utc(lever.hold_until)}" if lever.hold_until and held else ""
    detail = f" ({lever.detail})" if lever.detail else ""
    return f"- {lever.name}: {lever.before} → {lever.after}: **{lever.status}**{until}{detail}"


def _check_row(check: RecoveryCheck) -> str:
    now = "no data" if check.value is None else f"{check.value:,.3g} {check.unit}"
    if check.value is not None and abs(check.value) >= 1000:
        now = f"{check.value:,.0f} {check.unit}"
    since = utc(check.since) if check.met and check.since else "**not met**"
    return f"| {check.name} | {now} | {check.target:g} {check.unit} | {since} |"


def quoted(text: str) -> str:
    """`text` from outside as an inert Markdown code span."""
    return "`" + (" ".join(text.split()).replace("`", "'") or " ") + "`"


def span(duration: timedelta) -> str:
    """A length of time in its two largest units."""
    seconds = round(abs(duration.total_seconds()))
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if minutes < 10 and seconds else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"


def cut(text: str, most: int) -> str:
    """`text`, at most so many characters of it."""
    return text if len(text) <= most else text[: most - 1] + "…"


def utc(at: AwareDatetime) -> str:
    """`at` for people: to the second."""
    return at.strftime("%Y-%m-%d %H:%M:%S %Z")
