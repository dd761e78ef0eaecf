"""Overrides: a person holds a knob at a value, with a reason and an end. The record of one, and what it would do."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, Field

from domain.impact import Impact, impact_of
from domain.incident import Decision, TimelineEntry, quoted, utc
from domain.knob_spec import PIN_ROLE
from domain.knobs import (
    Baseline,
    Holder,
    KnobName,
    KnobValue,
    Lease,
    LeaseRequest,
    baseline_value,
    effective_value,
    validate_value,
)
from domain.load import LoadSnapshot
from domain.people import Role, highest
from domain.policy import Policy


class OverrideKind(StrEnum):
    """How an override ends."""

    TIMED = "timed"
    """At its stated end."""
    PIN = "pin"
    """At its stated end; until then it outranks the merge."""
    STANDING = "standing"
    """When the configured baseline has caught up, or somebody decides; people are reminded from its review date on."""


class OverridePhase(StrEnum):
    """Where an override stands."""

    ASKED = "asked"
    """Role, value and impact are being checked, or the lease is being taken."""
    AWAITING_APPROVAL = "awaiting-approval"
    IN_FORCE = "in-force"
    ENDING = "ending"
    ENDED = "ended"


class OverrideEnd(StrEnum):
    """How it ended."""

    ON_TIME = "on time"
    RELEASED = "released early"
    CAUGHT_UP = "the configured baseline has caught up"
    LAPSED = "lapsed by itself"
    """Its end passed while the control plane was away."""
    DENIED = "denied"
    """Who asked may not, or an approver said no."""
    NOT_APPROVED = "not approved in time"
    WITHDRAWN = "withdrawn"
    """Before it was approved."""
    FAILED = "failed"


class Step(BaseModel):
    """The knob's value from a moment on."""

    at: AwareDatetime
    value: KnobValue


class Assessment(BaseModel):
    """What an override would do, seen before it acts."""

    value_now: KnobValue
    """In force at present."""
    course: list[Step]
    """The values in force with the override, as known leases and itself end; the first holds from the start."""
    conflicts: list[str]
    """Other leases of the knob, in words."""
    impact: Impact | None
    """None: nothing is known about what this knob does to latency, hit rate or calls."""
    approval: list[str]
    """Why an approver must agree first; empty: nobody need."""


class OverrideRecord(BaseModel):
    """Everything about one override. Times are workflow time."""

    override_id: str
    """The workflow id, `override-<knob>-<short id>`."""
    run_id: str
    knob: KnobName
    value: KnobValue
    kind: OverrideKind
    reason: str
    asked_by: str
    owner: str
    """Who holds it: the person who asked, or to whom it was handed over."""
    incident: str | None = None
    """The incident it came from, if any."""
    duration: timedelta
    """As asked for; of a standing one the time until its review."""
    asked_at: AwareDatetime
    phase: OverridePhase = OverridePhase.ASKED
    assessment: Assessment | None = None
    approved_by: str | None = None
    in_force_since: AwareDatetime | None = None
    ends_at: AwareDatetime | None = None
    """Of a timed one and a pin, once it is in force."""
    review_at: AwareDatetime | None = None
    """Of a standing one, once it is in force."""
    lease: LeaseRequest | None = None
    """What is held now."""
    undo: list[LeaseRequest] = Field(default_factory=list)
    """Every lease that may be held, known before it is taken."""
    leases_taken: int = 0
    """Part of each lease's id."""
    extensions: int = 0
    effective: KnobValue = None
    """The knob's value in force as last verified: when the lease was taken, and after the end."""
    still_held: list[str] = Field(default_factory=list)
    """After the end: what keeps the knob off its baseline."""
    end: OverrideEnd | None = None
    ended_at: AwareDatetime | None = None
    outcome: str = ""
    """In one sentence."""
    waiting_for: str = ""
    next_step: str = ""
    next_at: AwareDatetime | None = None
    timeline: list[TimelineEntry] = Field(default_factory=list)
    decisions: list[Decision] = Field(default_factory=list)

    @property
    def until(self) -> datetime | None:
        """Its end, or its review date."""
        return self.ends_at or self.review_at


def role_to_set(knob: KnobName, kind: OverrideKind) -> Role:
    """The role that setting this knob needs."""
    return highest(knob.spec.role, PIN_ROLE) if kind is OverrideKind.PIN else knob.spec.role


def assess(
    knob: KnobName,
    value: KnobValue,
    *,
    pin: bool,
    now: datetime,
    ends_at: datetime,
    leases: Sequence[Lease],
    load: LoadSnapshot | None,
    policy: Policy,
) -> Assessment:
    """What holding `knob` at `value` from `now` until `ends_at` would do beside the leases there are.

    Raises:
        KnobValueError: the knob does not take the value.
    """
    baseline = policy.baseline
    value = validate_value(knob, value, baseline)
    before = {name: effective_value(name, leases, baseline) for name in KnobName}
    version = max((lease.version for lease in leases), default=0) + 1
    own = _asked_for(knob, value, pin, now, ends_at, version)
    others = [lease for lease in leases if lease.knob is knob]
    course = _course(knob, [*others, own], now, baseline)
    impact = impact_of(knob, before, course[0].value, load, policy)
    approval = [f"{knob} is changed only with an approver's consent"] if knob.spec.needs_approval else []
    return Assessment(
        value_now=before[knob],
        course=course,
        conflicts=[held_by(lease) for lease in others],
        impact=impact,
        approval=approval + (impact.over if impact else []),
    )


def _course(knob: KnobName, leases: Sequence[Lease], now: datetime, baseline: Baseline) -> list[Step]:
    steps: list[Step] = []
    for moment in sorted({now, *(lease.expires_at for lease in leases if lease.expires_at > now)}):
        value = effective_value(knob, [lease for lease in leases if lease.expires_at > moment], baseline)
        if not steps or value != steps[-1].value:
            steps.append(Step(at=moment, value=value))
    return steps


def held_by(lease: Lease) -> str:
    """A lease in words."""
    pinned = "pinned" if lease.pin else "held"
    return f"{pinned} at {shown(lease.value)} by {lease.holder.id} until {utc(lease.expires_at)} ({lease.reason})"


def has_caught_up(knob: KnobName, value: KnobValue, baseline: Baseline) -> bool:
    """Whether the configured value is what the override asks for, so that it changes nothing any more."""
    held = _asked_for(knob, value, False, datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC), 1)
    return effective_value(knob, [held], baseline) == baseline_value(knob, baseline)


def _asked_for(knob: KnobName, value: KnobValue, pin: bool, start: datetime, end: datetime, version: int) -> Lease:
    return Lease(
        lease_id="asked-for",
        knob=knob,
        value=value,
        holder=Holder(kind="person", id="asked-for"),
        reason="asked for",
        acquired_at=start,
        expires_at=end,
        version=version,
        pin=pin,
    )


def shown(value: KnobValue) -> str:
    """A knob's value for people."""
    if value is None:
        return "no limit"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        items: list[tuple[str, Any]] = sorted(value.items())
        return ", ".join(f"{name}: {shown(one)}" for name, one in items)
    return f"{value}"


Outcome = Literal["accepted", "denied", "already-done", "not-possible"]


def answer_of(record: OverrideRecord) -> tuple[Outcome, str]:
    """What the person who asked is told: the outcome and a sentence."""
    if record.phase is OverridePhase.AWAITING_APPROVAL:
        why = "; ".join(record.assessment.approval) if record.assessment else ""
        return "accepted", f"it waits for an approver other than {record.asked_by}: {why}"
    if record.phase in (OverridePhase.ENDING, OverridePhase.ENDED):
        if record.end is OverrideEnd.DENIED:
            return "denied", record.outcome
        return "not-possible", record.outcome or "it is ending"
    until = f" until {utc(record.ends_at)}" if record.ends_at else ""
    until = f", reviewed at {utc(record.review_at)}" if record.review_at else until
    differs = record.effective != record.value and not isinstance(record.value, dict)
    held = f"; in force is {shown(record.effective)}, which another lease asks for" if differs else ""
    return "accepted", f"{record.knob} is held at {shown(record.value)}{until} for {record.owner}{held}"


def render_override(record: OverrideRecord) -> str:
    """The override at this moment, as Markdown for the Temporal UI. Text from outside stands in code spans."""
    how = {
        OverridePhase.AWAITING_APPROVAL: "approve, deny or release",
        OverridePhase.IN_FORCE: "extend, hand-over or release",
    }.get(record.phase)
    parts = [
        f"# {record.phase.upper()}: {record.knob} → {quoted(shown(record.value))} ({record.kind})",
        f"**Why**: {quoted(record.reason)}, asked by {quoted(record.asked_by)}",
        f"**Owner**: {quoted(record.owner)}" + (f", from {quoted(record.incident)}" if record.incident else ""),
    ]
    if record.approved_by:
        parts.append(f"**Approved by**: {quoted(record.approved_by)}")
    if record.ends_at:
        parts.append(f"**Ends**: {utc(record.ends_at)}")
    if record.review_at:
        parts.append(f"**Reviewed**: {utc(record.review_at)}; ends by itself when the configured baseline catches up")
    if record.assessment:
        parts += [f"- {quoted(line)}" for line in [*record.assessment.conflicts, *record.assessment.approval]]
        if record.assessment.impact:
            parts.append("\n".join(f"- {line}" for line in record.assessment.impact.lines))
    if record.waiting_for:
        parts.append(f"**Waiting for**: {record.waiting_for}")
    if record.next_step:
        parts.append(f"**Next**: {record.next_step}" + (f", at {utc(record.next_at)}" if record.next_at else ""))
    if how:
        parts.append(f"Decide with `runbooks override … {record.override_id} --why …`: {how}.")
    parts += [f"- still {quoted(line)}" for line in record.still_held]
    if record.outcome:
        parts.append(f"**How it ended**: {quoted(record.outcome)}")
    return "\n\n".join(parts) + "\n"
