"""The event calendar: one row of the DynamoDB table for each event that multiplies traffic (scenario 1).

The row says what was planned and what pre-provisioning did about it; the decision tree asks it both. Times are
business time. The table's only key is the string `event_id`; it is small and read by Scan.
"""

from datetime import timedelta
from enum import StrEnum
from typing import Any, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

EVENT_TABLE_KEY = "event_id"
"""The table's partition key, a string; there is no sort key."""


INCIDENT_SOURCES = "incident-"
"""Rows whose source begins so are what an incident taught for later events, not what was planned for this one."""


class EventStatus(StrEnum):
    """Whether a row counts."""

    PROPOSED = "proposed"
    """Waits for a person (`runbooks calendar accept`); nothing is provisioned for it."""
    ACCEPTED = "accepted"


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

    @property
    def counts(self) -> bool:
        """Whether it is provisioned for."""
        return self.status is EventStatus.ACCEPTED and not self.source.startswith(INCIDENT_SOURCES)

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
