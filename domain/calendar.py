"""The event calendar: one row of the DynamoDB table for each event that multiplies traffic (scenario 1).

The row says what was planned and what pre-provisioning did about it; the decision tree asks it both. Times are
business time. The table's only key is the string `event_id`; it is small and read by Scan.

Rows come from people, files and feeds. What people give is checked here field by field, before it becomes a row;
what stands in the table is checked again before anything is provisioned for it.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from enum import StrEnum
from hashlib import sha256
from typing import Any, Self
from zoneinfo import ZoneInfo

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from domain.clock import known_zone
from domain.policy import Policy

EVENT_TABLE_KEY = "event_id"
"""The table's partition key, a string; there is no sort key."""


INCIDENT_SOURCES = "incident-"
"""Rows whose source begins so are what an incident taught for later events, not what was planned for this one."""


class EventStatus(StrEnum):
    """Whether a row counts."""

    PROPOSED = "proposed"
    """Waits for a person (`runbooks calendar accept`); nothing is provisioned for it."""
    ACCEPTED = "accepted"


YEARS = range(2000, 3000)
"""Outside of them, hours before or after a moment may be none that Python has."""
_YEARS_ALLOWED = f"a year from {YEARS[0]} to {YEARS[-1]} is allowed"


class CalendarRowError(ValueError):
    """A row that is no event; the message names the row, the field and what is wrong with it."""


class CalendarEvent(BaseModel):
    """One event of the calendar."""

    model_config = ConfigDict(frozen=True)

    event_id: str = Field(min_length=1, max_length=200)
    type: str = Field(min_length=1, max_length=100)
    """A key of the policy's `calendar.event_types`, e.g. `monday_release`."""
    starts_at: AwareDatetime
    """With its zone's offset, e.g. `2026-11-30T00:00:00+09:00`."""
    multiplier: float = Field(gt=0)
    """Of traffic, not of units."""
    models: tuple[str, ...] = Field(min_length=1)
    """Models that are provisioned for it."""
    units: dict[str, int] = {}
    """Total provisioned units planned for the event, by model."""
    lead_time: timedelta = Field(ge=timedelta(0))
    """How long before the start provisioning is to be triggered; whole seconds in the row."""
    provisioning_triggered_at: AwareDatetime | None = None
    """None: not triggered."""
    provisioning_completed_at: AwareDatetime | None = None
    """None: not complete."""
    source: str = Field(min_length=1, max_length=500)
    """What the row comes from: a publisher's announcement, an incident's id."""
    asked_by: str = Field(min_length=1, max_length=200)
    """Person or team."""
    status: EventStatus = EventStatus.ACCEPTED
    """Rows without it are accepted."""

    @field_validator("starts_at", "provisioning_triggered_at", "provisioning_completed_at")
    @classmethod
    def _can_be_reckoned_with(cls, at: datetime | None) -> datetime | None:
        if at is not None and at.year not in YEARS:  # `9999-12-31`: a date that is not known yet
            raise ValueError(_YEARS_ALLOWED)
        return at

    @property
    def counts(self) -> bool:
        """Whether it is provisioned for."""
        return self.status is EventStatus.ACCEPTED and not self.source.startswith(INCIDENT_SOURCES)

    @property
    def fingerprint(self) -> str:
        """Changes when what is planned does."""
        planned = (self.type, self.starts_at.astimezone(UTC), self.multiplier, sorted(self.models), self.lead_time)
        return sha256(repr(planned).encode()).hexdigest()[:16]

    def to_item(self) -> dict[str, Any]:
        """The row as DynamoDB's low-level API takes it (`{"S": ...}`)."""
        times = {
            "starts_at": self.starts_at,
            "provisioning_triggered_at": self.provisioning_triggered_at,
            "provisioning_completed_at": self.provisioning_completed_at,
        }
        return {
            "event_id": {"S": self.event_id},
            "type": {"S": self.type},
            "multiplier": {"N": f"{self.multiplier:g}"},
            "models": {"L": [{"S": model} for model in self.models]},
            "units": {"M": {model: {"N": str(units)} for model, units in self.units.items()}},
            "lead_time_seconds": {"N": str(int(self.lead_time.total_seconds()))},
            "source": {"S": self.source},
            "asked_by": {"S": self.asked_by},
            "status": {"S": self.status},
            **{name: {"S": at.isoformat()} for name, at in times.items() if at is not None},
        }

    @classmethod
    def from_item(cls, item: dict[str, Any]) -> Self:
        """The event of a row that DynamoDB's low-level API gave; attributes it does not know are ignored.

        Raises:
            CalendarRowError: an attribute is missing or is no such value.
        """
        try:
            plain = {name: _plain(value) for name, value in item.items()}
            return cls.model_validate({**plain, "lead_time": plain.get("lead_time_seconds")})
        except (ValidationError, ValueError) as error:
            why = str(error)
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}"
            raise CalendarRowError(f"calendar row {item.get('event_id', {}).get('S')!r}: {why}") from error


def events_of(items: Iterable[dict[str, Any]]) -> tuple[list[CalendarEvent], dict[str, str]]:
    """The events of rows as DynamoDB's low-level API gives them, and by id what is wrong with rows that are none."""
    events: list[CalendarEvent] = []
    broken: dict[str, str] = {}
    for item in items:
        try:
            events.append(CalendarEvent.from_item(item))
        except CalendarRowError as error:
            broken[str(item[EVENT_TABLE_KEY]["S"])] = str(error)
    return events, broken


class EntryError(ValueError):
    """Something given for an entry that is not allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(f"{field}: {value!r} is not allowed: {allowed}")


FIELDS = ("event_id", "type", "start", "zone", "multiplier", "models", "lead_time", "source")
"""What people give for an entry, by name; in CSV files the columns."""
_NAME = re.compile(r"[\w.:@+-]{1,150}", re.ASCII)
_DURATION = re.compile(r"(?:(\d{1,4})h)?(?:(\d{1,4})m)?", re.ASCII)


def duration_of(text: str) -> timedelta:
    """`45m`, `2h` or `1h30m` as a duration.

    Raises:
        ValueError: anything else, or nothing.
    """
    match = _DURATION.fullmatch(text.strip())
    hours, minutes = (int(group or 0) for group in match.groups()) if match else (0, 0)
    if not hours and not minutes:
        raise ValueError("give hours and minutes like 45m, 2h or 1h30m, more than 0")
    return timedelta(hours=hours, minutes=minutes)


def duration_text(duration: timedelta) -> str:
    """As `duration_of` reads it; less than a minute is left out."""
    hours, minutes = divmod(int(duration / timedelta(minutes=1)), 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if minutes or not hours else "")


def entry(given: Mapping[str, str], *, policy: Policy, now: datetime, asked_by: str) -> CalendarEvent:
    """A new event from what people give; what may be left out is the event type's or the policy's.

    Args:
        given: by the names of `FIELDS`; empty texts count as left out.
        policy: as it is written, durations not divided by a rehearsal's speed.
        now: business time.
        asked_by: person or team.

    Raises:
        EntryError: a field is missing or not allowed.
    """
    fields = {name: text.strip() for name, text in given.items() if text.strip()}
    for name in fields:
        if name not in FIELDS:
            raise EntryError(name, given[name], f"there is no such field; there are {', '.join(FIELDS)}")
    kind_name = fields.get("type", "")
    kind = policy.calendar.event_types.get(kind_name)
    if kind is None:
        known = sorted(policy.calendar.event_types)
        near = get_close_matches(kind_name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)} (calendar.event_types)"
        raise EntryError("type", kind_name, hint)
    starts_at = moment_of(fields.get("start", ""), fields.get("zone"))
    if starts_at <= now:
        said = f"it must be later than {now.astimezone(starts_at.tzinfo).isoformat(timespec='minutes')}, which is now"
        raise EntryError("start", fields["start"], said)
    event_id = fields.get("event_id", f"{kind_name}-{starts_at:%Y-%m-%dT%H%M}")
    if not _NAME.fullmatch(event_id):
        raise EntryError("event_id", event_id[:200], "1 to 150 letters, digits and . : @ + - _ are allowed")
    multiplier = kind.multiplier
    if "multiplier" in fields:
        try:
            multiplier = float(fields["multiplier"].removesuffix("x"))
        except ValueError:
            raise EntryError("multiplier", fields["multiplier"], "give a number like 4") from None
    lead_time = kind.lead_time
    if "lead_time" in fields:
        try:
            lead_time = duration_of(fields["lead_time"])
        except ValueError as error:
            raise EntryError("lead_time", fields["lead_time"], str(error)) from None
    models = tuple(dict.fromkeys(name.strip() for name in fields.get("models", "").split(",") if name.strip()))
    source = fields.get("source", f"by hand, {asked_by}")
    if len(source) > 500 or source.startswith(INCIDENT_SOURCES):
        raise EntryError("source", source[:80], f"at most 500 characters, and not begun with {INCIDENT_SOURCES!r}")
    event = CalendarEvent(
        event_id=event_id,
        type=kind_name,
        starts_at=starts_at,
        multiplier=multiplier if multiplier > 0 else 1,
        models=models or tuple(name for name in policy.models if name in policy.forecast.tokens_per_second),
        lead_time=lead_time,
        source=source,
        asked_by=asked_by,
    )
    check_planned(event, policy, multiplier)
    return event


def check_planned(event: CalendarEvent, policy: Policy, multiplier: float | None = None) -> None:
    """Whether what a row plans is within the policy, whoever wrote it.

    Args:
        event: the row.
        policy: as it is written, durations not divided by a rehearsal's speed.
        multiplier: as it was given, where a row could not even have it.

    Raises:
        EntryError: the first field that is not.
    """
    calendar = policy.calendar
    if event.type not in calendar.event_types:
        raise EntryError("type", event.type, f"there are {', '.join(sorted(calendar.event_types))}")
    multiplier = event.multiplier if multiplier is None else multiplier
    if not calendar.min_multiplier <= multiplier <= calendar.max_multiplier:
        least, most = f"{calendar.min_multiplier:g}", f"{calendar.max_multiplier:g}"
        bounds = f"from {least} (calendar.min_multiplier) to {most} (calendar.max_multiplier)"
        raise EntryError("multiplier", f"{multiplier:g}", bounds)
    if not calendar.verify_margin <= event.lead_time <= calendar.max_lead_time:
        least, most = duration_text(calendar.verify_margin), duration_text(calendar.max_lead_time)
        bounds = f"from {least} (calendar.verify_margin) to {most} (calendar.max_lead_time)"
        raise EntryError("lead_time", duration_text(event.lead_time), bounds)
    for name in event.models:
        model = policy.models.get(name)
        if model is None:
            raise EntryError("models", name, f"there are {', '.join(sorted(policy.models))}")
        if name not in policy.forecast.tokens_per_second:
            raise EntryError("models", name, "the policy has no load to expect on it (forecast.tokens_per_second)")
        if model.most_units == 0:
            limit = "ceiling_units" if model.ceiling_units == 0 else "quota_units"
            raise EntryError("models", name, f"it can have no provisioned units: models.{name}.{limit} is 0")


def check_sold(event: CalendarEvent, policy: Policy, region: str) -> None:
    """Whether AWS sells provisioned throughput for all its models in `region`, as far as the policy knows.

    Raises:
        EntryError: not for one of them.
    """
    for name in event.models:
        model = policy.models[name]
        if not model.sold_in(region):
            where = ", ".join(model.provisioned_regions or ()) or "no region"
            said = f"its units are not sold in {region} but in {where} (models.{name}.provisioned_regions)"
            raise EntryError("models", name, said)


def moment_of(start: str, zone: str | None) -> datetime:
    """A start as people give it: ISO 8601, with its offset or with a zone of the IANA database.

    Raises:
        EntryError: no such moment, no zone at all, or an hour that the zone's clocks skip or show twice.
    """
    try:
        moment = datetime.fromisoformat(start)
    except ValueError:
        raise EntryError("start", start, "give date and time like 2026-11-30T00:00") from None
    if moment.year not in YEARS:
        raise EntryError("start", start, _YEARS_ALLOWED)
    if zone is None:
        if moment.tzinfo is None:
            allowed = "it has no zone: give one by name (Asia/Tokyo) or the offset (2026-11-30T00:00+09:00)"
            raise EntryError("start", start, allowed)
        return moment
    try:
        known_zone(zone)
    except ValueError as error:
        raise EntryError("zone", zone, str(error)) from None
    return in_zone(moment.replace(tzinfo=None), ZoneInfo(zone), moment.utcoffset(), start)


def in_zone(local: datetime, zone: ZoneInfo, offset: timedelta | None, start: str) -> datetime:
    """The moment at which the zone's clocks show `local`; `offset`, if given, must be one they have then.

    Raises:
        EntryError: the clocks skip it, show it twice, or have another offset.
    """
    both = [local.replace(tzinfo=zone, fold=fold) for fold in (0, 1)]
    shown = {at.utcoffset(): at for at in both if at.astimezone(UTC).astimezone(zone).replace(tzinfo=None) == local}
    if not shown:
        raise EntryError("start", start, f"the clocks of {zone.key} skip it; give a time that they show")
    offsets = " or ".join(f"{at:%z}"[:3] + ":" + f"{at:%z}"[3:5] for at in shown.values())
    if offset is not None:
        if offset not in shown:
            raise EntryError("start", start, f"its offset is not that of {zone.key} then, which is {offsets}")
        return _fixed(shown[offset])
    if len(shown) > 1:
        allowed = f"the clocks of {zone.key} show it twice; say which by its offset, {offsets}"
        raise EntryError("start", start, allowed)
    return _fixed(next(iter(shown.values())))


def _fixed(at: datetime) -> datetime:
    """The same moment with its offset instead of its zone: arithmetic then counts hours that pass, not the clocks'."""
    return datetime.fromisoformat(at.isoformat())


def _plain(value: dict[str, Any]) -> Any:
    """DynamoDB's typed value as a plain one."""
    kind, inner = next(iter(value.items()))
    if kind == "N":
        return float(inner)
    if kind == "M":
        return {name: _plain(part) for name, part in inner.items()}
    if kind == "L":
        return [_plain(part) for part in inner]
    return None if kind == "NULL" else inner
