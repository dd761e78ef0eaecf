"""A year of MangaAssist drawn from a seed: the load of every minute, calendar entries, and faults of Bedrock's.

An ordinary day is the policy's forecast, but never over what planned utilisation makes of the timetable's units: the
default forecast does exceed the runbook's 5 morning units, on-demand carries the rest, and a year in which every
morning is an emergency would say nothing about the planner. Days and minutes stray by a few percent, always downwards:
forecasts are peaks. Events multiply the load as `simulator.traffic.Spike` does, roughly as announced; some were
announced too small, some are announced late, moved or cancelled. On top come surges that nobody announced.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from domain.calendar import CalendarEvent
from domain.forecast import expected
from domain.policy import Policy
from domain.timetable import changes, units_at
from simulator.traffic import Spike

TOKYO = ZoneInfo("Asia/Tokyo")
BEGIN = datetime(2027, 1, 1, tzinfo=TOKYO).astimezone(UTC)
"""A Friday."""
MINUTE = timedelta(minutes=1)
DAY_MINUTES = 24 * 60
DECAY = timedelta(minutes=10)
"""Of a spike, until little of it is left."""


@dataclass(frozen=True)
class Span:
    """From `start` until `end`."""

    start: datetime
    end: datetime

    def has(self, at: datetime) -> bool:
        """Whether `at` is in it."""
        return self.start <= at < self.end


@dataclass(frozen=True)
class Entry:
    """What the calendar says about one event, as it changes."""

    versions: tuple[tuple[datetime, CalendarEvent | None], ...]
    """When it was entered or changed, and what it said then; None: cancelled."""
    actual_multiplier: float

    @property
    def event_id(self) -> str:
        """It stays when the rest of the entry changes."""
        first = self.versions[0][1]
        assert first is not None, "an entry begins with an event"
        return first.event_id

    @property
    def final(self) -> CalendarEvent | None:
        """What took place."""
        return self.versions[-1][1]


@dataclass(frozen=True)
class Faults:
    """What Bedrock's management calls meet with. Traffic is not touched by any of it."""

    denied: tuple[Span, ...]
    """AccessDenied: somebody changed the role."""
    throttled: tuple[Span, ...]
    refused: tuple[Span, ...]
    """ServiceQuotaExceeded for every creation: AWS has no units to give."""
    deletions: tuple[datetime, ...]
    """Somebody deletes one of our models."""
    failed_share: float = 0.03
    """Of creations: they end as Failed."""
    stuck_share: float = 0.003
    """Of creations: they take hours."""
    unanswered_share: float = 0.01
    """Of creations: AWS made it, and the answer is lost."""


@dataclass(frozen=True)
class Year:
    """Everything that happens, and nothing about what is done."""

    seed: int
    days: int
    load: Mapping[str, NDArray[np.float64]]
    """Tokens/s that reach each model, by minute."""
    entries: tuple[Entry, ...]
    surges: tuple[Spike, ...]
    faults: Faults
    end: datetime = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "end", BEGIN + timedelta(days=self.days))


def minute_of(at: datetime) -> int:
    """The minute of the year that `at` is in."""
    return (at - BEGIN) // MINUTE


def draw(policy: Policy, seed: int, days: int) -> Year:
    """The year of `seed`; equal for equal arguments."""
    chance = random.Random(seed)
    entries = tuple(_entries(policy, chance, days))
    surges = tuple(
        Spike(_moment(chance, days), chance.uniform(1.4, 3), timedelta(minutes=chance.uniform(15, 120)))
        for _ in range(_count(chance, 30, days))
    )
    factor = np.ones(days * DAY_MINUTES)
    for spike in [*surges, *(_spike(entry, policy) for entry in entries if entry.final is not None)]:
        first = max(0, minute_of(spike.starts_at))
        for minute in range(first, min(len(factor), first + int((spike.lasts + timedelta(hours=3)) / MINUTE))):
            factor[minute] = max(factor[minute], spike.factor(BEGIN + minute * MINUTE))
    noise = np.random.default_rng(seed)
    load = {}
    for model in policy.models:
        strays = np.repeat(noise.uniform(0.92, 1, days), DAY_MINUTES) * noise.uniform(0.98, 1, days * DAY_MINUTES)
        load[model] = np.tile(_ordinary_day(policy, model), days) * strays * factor
    return Year(seed, days, load, entries, surges, _faults(chance, days))


def _ordinary_day(policy: Policy, model: str) -> NDArray[np.float64]:
    day = [BEGIN + minute * MINUTE for minute in range(DAY_MINUTES)]
    load = np.array([expected(policy.forecast, model, at) for at in day])
    spec = policy.models[model]
    first = (BEGIN, units_at(policy, model, BEGIN))
    for (since, units), (until, _) in pairwise([first, *changes(policy, model, BEGIN, day[-1]), (day[-1] + MINUTE, 0)]):
        if units:
            planned = units * spec.tokens_per_second_per_unit * policy.capacity.planned_target_utilisation
            here = slice(minute_of(since), minute_of(until))
            load[here] = np.minimum(load[here], planned)
    return load


def _count(chance: random.Random, per_year: float, days: int) -> int:
    """Of something that happens so often; whole numbers around it."""
    return int(per_year * days / 365 + chance.random())


def _moment(chance: random.Random, days: int) -> datetime:
    return BEGIN + chance.uniform(0.5, max(1, days - 1)) * timedelta(days=1)


def _spans(chance: random.Random, days: int, per_year: float, shortest: float, longest: float) -> tuple[Span, ...]:
    """Minutes of length, most of them short."""
    spans = []
    for _ in range(_count(chance, per_year, days)):
        start = _moment(chance, days)
        spans.append(Span(start, start + shortest * (longest / shortest) ** chance.random() * MINUTE))
    return tuple(spans)


def _faults(chance: random.Random, days: int) -> Faults:
    return Faults(
        denied=_spans(chance, days, 8, 10, 180),
        throttled=_spans(chance, days, 24, 2, 40),
        refused=_spans(chance, days, 24, 10, 120),
        deletions=tuple(_moment(chance, days) for _ in range(_count(chance, 12, days))),
    )


def _entries(policy: Policy, chance: random.Random, days: int) -> list[Entry]:
    """Every Monday's release; final chapters and lesser events at other times."""
    midnight = BEGIN + timedelta(days=3)
    planned = []
    while midnight < BEGIN + timedelta(days=days - 1):
        planned.append(("monday_release", midnight, policy.calendar.event_types["monday_release"].multiplier))
        midnight += timedelta(days=7)
    for kind, per_year, multipliers in (("final_chapter", 12, (5.0,)), ("final_chapter", 40, (1.5, 2.0, 2.5, 3.0))):
        for _ in range(_count(chance, per_year, days)):
            day = BEGIN + timedelta(days=chance.randrange(1, max(2, days - 1)))
            hour = chance.choice((0, 7, 10, 12, 15, 18, 20))
            planned.append((kind, day + timedelta(hours=hour), chance.choice(multipliers)))
    return [_entry(policy, chance, number, *what) for number, what in enumerate(planned)]


def _entry(policy: Policy, chance: random.Random, number: int, kind: str, start: datetime, multiplier: float) -> Entry:
    event = CalendarEvent(
        event_id=f"{kind}-{number}",
        type=kind,
        starts_at=start,
        multiplier=multiplier,
        models=tuple(policy.models),
        lead_time=policy.calendar.event_types[kind].lead_time,
        source="drawn",
        asked_by="content-ops",
    )
    # The calendar is synced every few minutes; an entry of the year's first days was there before.
    entered = max(start - timedelta(days=chance.uniform(3, 10)), BEGIN)
    fate = chance.random()
    versions: list[tuple[datetime, CalendarEvent | None]] = [(entered, event)]
    if kind != "monday_release" and fate < 0.1:
        versions = [(start - timedelta(hours=chance.uniform(0.2, 4)), event)]
    elif fate < 0.18:
        moved = event.model_copy(update={"starts_at": start + timedelta(hours=chance.choice((-3, -1, 1, 2, 6)))})
        versions.append((start - timedelta(hours=chance.uniform(8, 48)), moved))
    elif fate < 0.24:
        versions.append((start - timedelta(hours=chance.uniform(1, 24)), None))
    actual = multiplier * (1.25 if chance.random() < 0.05 else chance.uniform(0.8, 1))
    return Entry(tuple((max(at, BEGIN), said) for at, said in versions), actual)


def _spike(entry: Entry, policy: Policy) -> Spike:
    event = entry.final
    assert event is not None
    lasts = policy.calendar.event_types[event.type].lasts - DECAY
    return Spike(event.starts_at, max(1.0, entry.actual_multiplier), lasts)
