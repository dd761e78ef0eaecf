"""What provisioned units cost, by day, against the caps; and from which load on they pay (design check 5)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal
from zoneinfo import ZoneInfo

from domain.capacity import Situation
from domain.clock import HOUR
from domain.fleet import Spell
from domain.policy import CapacityPolicy, ModelPolicy, Policy
from domain.purchases import Consent


def breakeven_tokens_per_second(units: int, spec: ModelPolicy) -> float | None:
    """The load from which `units` cost less than the same tokens on demand; None: a price is not configured."""
    if spec.usd_per_unit_hour is None or spec.usd_per_million_tokens is None:
        return None
    return units * spec.usd_per_unit_hour / (spec.usd_per_million_tokens / 1e6 * HOUR.total_seconds())


@dataclass(frozen=True)
class WindowBreakeven:
    """One window of the timetable, for the report."""

    window: str
    units: int
    tokens_per_second: float | None
    """From which load on the units pay; 0: there are none; None: a price is not configured."""


def breakevens(policy: Policy, model: str) -> tuple[WindowBreakeven, ...]:
    """The breakeven of each window of the timetable; empty where it does not name the model."""
    if policy.timetable is None or model not in policy.timetable.models:
        return ()
    return tuple(
        WindowBreakeven(
            window=window.span,
            units=window.units[model],
            tokens_per_second=breakeven_tokens_per_second(window.units[model], policy.models[model]),
        )
        for window in policy.timetable.windows
    )


class Meter:
    """Counts paid hours on the days of the timetable's zone. An hour that was begun is paid, on the day it began."""

    def __init__(self, situation: Situation) -> None:
        self._clock = situation.clock
        self._zone = ZoneInfo(situation.timetable.zone) if situation.timetable else UTC
        self.period = HOUR / situation.clock.speed
        self.today = self.day(situation.now)

    def day(self, at: datetime) -> date:
        """The day of a moment."""
        return self._clock.business(at).astimezone(self._zone).date()

    def hours(self, spell: Spell) -> int:
        """Hours paid for, one at least."""
        return max(1, -((spell.since - spell.until) // self.period))

    def unit_hours(self, spells: Iterable[Spell]) -> int:
        """All of them together."""
        return sum(spell.units * self.hours(spell) for spell in spells)

    def by_day(self, spells: Iterable[Spell]) -> Mapping[date, int]:
        """Unit-hours of today and later, day by day."""
        found: Counter[date] = Counter()
        for spell in spells:
            for number in reversed(range(self.hours(spell))):
                day = self.day(spell.since + number * self.period)
                if day < self.today:
                    break
                found[day] += spell.units
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Over:
    """A day on which a cap would be passed."""

    day: date
    cap: Literal["max_unit_hours_per_day", "max_usd_per_day"]
    """The policy's name of it."""
    limit: float
    unit: Literal["USD", "unit-hours"]
    amount: float
    """Over the limit, in its unit."""
    unit_hours: int
    """Paid for on that day, all in all."""


def first_over(
    by_day: Mapping[date, int], policy: CapacityPolicy, spec: ModelPolicy, consents: Iterable[Consent], now: datetime
) -> Over | None:
    """The first day that passes a cap by more than a person agreed to; None: there is none."""
    price = spec.usd_per_unit_hour
    agreed = [consent for consent in consents if consent.until > now]
    for day, unit_hours in by_day.items():
        overs = []
        if (most := policy.max_unit_hours_per_day) is not None:
            overs.append(Over(day, "max_unit_hours_per_day", most, "unit-hours", unit_hours - most, unit_hours))
        if (most := policy.max_usd_per_day) is not None and price is not None:
            overs.append(Over(day, "max_usd_per_day", most, "USD", unit_hours * price - most, unit_hours))
        for over in overs:
            prefix = excess_id(day, over.cap, "")
            if over.amount > max((x.amount for x in agreed if x.excess_id.startswith(prefix)), default=0.0):
                return over
    return None


def excess_id(day: date, cap: str, asked_by: str) -> str:
    """Names the wish of `asked_by` to pass a cap on a day."""
    return f"{cap}-{day.isoformat()}-{asked_by}"
