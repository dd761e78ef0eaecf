"""What callers of the ops API send, and what a change of a knob is answered.

What is allowed stands in the schema and is said in words. Unknown names are refused, so that a typo is an error.
"""

from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from domain.incident import LeverName
from domain.knob_spec import Whole
from domain.knobs import KnobName, KnobValue, LeaseRequest
from ops.asking import MAX_REASON_CHARS
from ops.capacity import DEMAND_ID
from ops.service import OpsError, parse_duration

MAX_WHY_CHARS, MAX_SUBJECT_CHARS = 1000, 200
MAX_UNITS = 10_000


def _parse_span(value: object) -> timedelta:
    try:
        return parse_duration(value if isinstance(value, str) else "")
    except OpsError:
        raise ValueError("hours and minutes like 45m, 2h or 1h30m, more than 0") from None


_SPAN = {"type": "string", "pattern": "^(?=[0-9hm]*[1-9])([0-9]{1,4}h)?([0-9]{1,4}m)?$", "examples": ["45m", "1h30m"]}
Span = Annotated[timedelta, PlainValidator(_parse_span), WithJsonSchema(_SPAN)]
"""A duration in business time."""


def _takes(knob: KnobName) -> PlainValidator:
    """Says what is allowed as the knob's declaration does."""
    spec = knob.spec

    def check(value: object) -> object:
        if not spec.kind.takes(value, {}):
            raise ValueError(spec.kind.allowed(spec.unit, {}))
        return value

    return PlainValidator(check)


def _bounds(knob: KnobName) -> WithJsonSchema:
    kind = knob.spec.kind
    assert isinstance(kind, Whole)
    return WithJsonSchema({"type": "integer", "minimum": kind.minimum, "maximum": kind.maximum})


def _words(most: int) -> PlainValidator:
    def check(value: object) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= most or not value.strip():
            raise ValueError(f"a text of 1 to {most} characters that is not blank")
        return value.strip()

    return PlainValidator(
        check, json_schema_input_type=Annotated[str, Field(min_length=1, max_length=most, pattern=r"\S")]
    )


TtlSeconds = Annotated[int, _takes(KnobName.CACHE_TTL_SECONDS), _bounds(KnobName.CACHE_TTL_SECONDS)]
WindowMs = Annotated[int, _takes(KnobName.BATCH_WINDOW_MS), _bounds(KnobName.BATCH_WINDOW_MS)]
Reason = Annotated[str, _words(MAX_REASON_CHARS)]
Why = Annotated[str, _words(MAX_WHY_CHARS)]
Subject = Annotated[str, _words(MAX_SUBJECT_CHARS)]


class Body(BaseModel):
    """What is sent: names that are not known are refused, so that a typo is an error."""

    model_config = ConfigDict(extra="forbid")


class Timed(Body):
    """What every change of a knob says."""

    reason: Reason
    duration: Span | None = None
    """How long, in business time; without one as long as the policy's default, never endless."""


class CacheTtl(Timed):
    """Runbook 1: serve answers from the cache for longer."""

    ttl_seconds: TtlSeconds


class ModelRouting(Timed):
    """Runbook 1: let a model answer some intents."""

    intents: Annotated[list[str], Field(min_length=1, max_length=100)]
    model: str


class BatchWindow(Timed):
    """Runbook 3: how long the batcher waits for a batch to fill."""

    batch_window_ms: WindowMs


class AnyKnob(Timed):
    """Any knob's value; `GET /knobs` says what each takes."""

    knob: KnobName
    value: Any
    pin: bool = False
    """Above the merge; needs an approver's role."""


class PreviewBody(Body):
    """What an override would do, before it is made."""

    knob: KnobName
    value: Any
    duration: Span | None = None
    pin: bool = False


class Held(BaseModel):
    """What became of a change, and where to follow it."""

    outcome: Literal["accepted", "already-done"]
    message: str
    override_id: str
    """`GET /overrides/ID` has its record."""
    lease: LeaseRequest | None
    """What it holds; none while it waits for an approver."""
    ends_at: AwareDatetime | None
    """When it ends by itself; none while it waits for an approver."""
    effective: KnobValue
    """The knob's value in force, by all that hold it."""
    held_by_others: list[str]
    """Other leases of the knob when it was asked for, in words."""
    impact: list[str]
    """What it should do to latency, hit rate and calls."""
    approval: list[str]
    """Why an approver must agree first; empty: nobody need."""
    workflow: str
    """Its workflow in the Temporal UI."""


class Decision(Body):
    """Why somebody decides; it stays in the record."""

    why: Why


class ExtendBody(Decision):
    """How much longer an incident's levers are held."""

    by: Span
    lever: LeverName | None = None
    """None: all that are held."""


class ReleaseBody(Decision):
    """Which of an incident's levers is released."""

    lever: LeverName


class KeepBody(Decision):
    """Which of an incident's levers becomes a standing override, and when that is reviewed."""

    lever: LeverName
    review_in: Span | None = None
    """None: as the policy says."""


class TakeOverBody(Decision):
    """How long an incident's levers stay with a person, and with whom."""

    duration: Span
    to: Subject | None = None
    """None: with whoever asks."""


class LaterBody(Decision):
    """How much later an override ends, or is reviewed."""

    by: Span


class HandOverBody(Decision):
    """Who owns an override from now on."""

    to: Subject


class DemandBody(Body):
    """Units that somebody wants in service for a time."""

    units: Annotated[int, Field(ge=1, le=MAX_UNITS)]
    """Total, not on top; at most the model's ceiling."""
    duration: Span
    """From the start on, in business time."""
    start: AwareDatetime | None = None
    """Business time; without one: now."""
    reason: Reason
    demand_id: Annotated[str, Field(pattern=DEMAND_ID)] | None = None
    """Replaces the caller's demand of that id."""


class ApproveCapacityBody(Decision):
    """What waits for an approval, and up to how much."""

    approval_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """As `awaiting` names it; without one: the only thing that waits."""
    amount: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """At most so much over the cap, in its unit; without one: what was asked for."""
