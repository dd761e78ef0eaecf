"""Business time: what the wall clock in Tokyo says, computed from workflow time.

Two clocks exist. Workflow (or wall) time is real; business time is a pure function of it, so that a rehearsal
can play Monday 00:05 in Tokyo at any hour and sixty times as fast. With `speed` 1 and equal starts both agree.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin
from zoneinfo import ZoneInfo, available_timezones

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

HOUR = timedelta(hours=1)


class Scaled:
    """Marks a policy duration as belonging to the business: a rehearsal divides it by its speed."""


ScaledDuration = Annotated[timedelta, Scaled]


def known_zone(name: str) -> str:
    """`name`, if it is a time zone of the IANA database.

    Raises:
        ValueError: there is no such zone.
    """
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        close = get_close_matches(name, available_timezones(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "give one like Asia/Tokyo"
        raise ValueError(f"there is no time zone {name!r}; {hint}") from None
    return name


ZoneName = Annotated[str, AfterValidator(known_zone)]
"""A time zone by its name in the IANA database, e.g. `Asia/Tokyo`."""

M = TypeVar("M", bound=BaseModel)


class RehearsalClock(BaseModel):
    """Maps real time to business time: `business_start + (real - real_start) * speed`. Identity by default."""

    model_config = ConfigDict(frozen=True)

    real_start: AwareDatetime = datetime(1970, 1, 1, tzinfo=UTC)
    business_start: AwareDatetime = datetime(1970, 1, 1, tzinfo=UTC)
    speed: float = Field(default=1.0, ge=1, le=3600)
    """Business seconds that pass in one real second."""

    def business(self, real: datetime) -> datetime:
        """Business time at the real moment `real`, in UTC."""
        return self.business_start.astimezone(UTC) + (real - self.real_start) * self.speed

    def real(self, business: datetime) -> datetime:
        """The real moment at which business time is `business`, in UTC."""
        return self.real_start.astimezone(UTC) + (business - self.business_start) / self.speed

    def business_duration(self, real: timedelta) -> timedelta:
        """How much business time passes in the real duration `real` (used for cost hours and reports)."""
        return real * self.speed


def compress(model: M, speed: float) -> M:
    """A copy of `model` in which every duration marked `Scaled`, at any depth, is divided by `speed`."""
    if speed == 1:
        return model
    changed = {
        name: _compress_value(getattr(model, name), field.annotation, _is_scaled(field.metadata), speed)
        for name, field in type(model).model_fields.items()
    }
    return model.model_copy(update=changed)


def _is_scaled(metadata: list[Any]) -> bool:
    return any(item is Scaled for item in metadata)


def _compress_value(value: Any, annotation: Any, scaled: bool, speed: float) -> Any:
    if isinstance(value, timedelta):
        return value / speed if scaled or _mentions_scaled(annotation) else value
    if isinstance(value, BaseModel):
        return compress(value, speed)
    if isinstance(value, Mapping):
        return {k: _compress_value(v, annotation, scaled, speed) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_compress_value(v, annotation, scaled, speed) for v in value)
    return value


def _mentions_scaled(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin is Annotated:
        return any(arg is Scaled for arg in get_args(annotation)[1:])
    if origin in (Union, UnionType) or origin is not None:
        return any(_mentions_scaled(arg) for arg in get_args(annotation))
    return False
