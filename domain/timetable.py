"""The timetable (scenario 2): units by time of day, read at moments of business time.

A boundary is a time on the zone's clocks. One that the clocks skip falls on the moment they jump; one that they show
twice counts when they show it first. So a day has 23, 24 or 25 hours, and every moment has one window.
"""

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

from domain.capacity import Demand, DemandKind
from domain.clock import RehearsalClock
from domain.policy import Policy, TimetablePolicy, TimetableWindow

DAY = timedelta(days=1)


def units_at(policy: Policy, model: str, at: datetime) -> int:
    """Units of `model` that the timetable wants in service at `at`; the baseline where it does not name the model."""
    if policy.timetable is None or model not in policy.timetable.models:
        return policy.models[model].baseline_units
    return window_at(policy.timetable, at).units[model]


def changes(policy: Policy, model: str, since: datetime, until: datetime) -> tuple[tuple[datetime, int], ...]:
    """The moments after `since`, up to `until`, from which other units are wanted, and how many."""
    if policy.timetable is None or model not in policy.timetable.models:
        return ()
    units = units_at(policy, model, since)
    found: list[tuple[datetime, int]] = []
    for at, window in boundaries(policy.timetable, since, until):
        if window.units[model] != units:
            units = window.units[model]
            found.append((at, units))
    return tuple(found)


def demands(
    timetable: TimetablePolicy, model: str, clock: RehearsalClock, since: datetime, until: datetime
) -> list[Demand]:
    """The timetable as demands of `model`, in real time: of the window at `since` and of all that begin by `until`."""
    begin, end = clock.business(since), clock.business(until)
    windows = list(boundaries(timetable, begin - 2 * DAY, end + 2 * DAY))
    found = []
    for (at, window), (then, _) in pairwise(windows):
        if then > begin and at <= end and window.units[model]:
            demand = Demand(
                demand_id=f"timetable-{at:%Y-%m-%dT%H:%MZ}",
                model=model,
                kind=DemandKind.TIMETABLE,
                units=window.units[model],
                start=clock.real(at),
                end=clock.real(then),
                reason=f"{window.span} {timetable.zone}",
                asked_by="the timetable",
            )
            found.append(demand)
    return found


def window_at(timetable: TimetablePolicy, at: datetime) -> TimetableWindow:
    """The window that holds at `at`."""
    return list(boundaries(timetable, at - 2 * DAY, at))[-1][1]


def boundaries(
    timetable: TimetablePolicy, since: datetime, until: datetime
) -> Iterator[tuple[datetime, TimetableWindow]]:
    """The moments after `since`, up to `until`, at which a window begins, in UTC and in order."""
    zone = ZoneInfo(timetable.zone)
    day, last = (since - DAY).astimezone(zone).date(), (until + DAY).astimezone(zone).date()
    ordered = sorted(timetable.windows, key=lambda window: window.start)
    while day <= last:
        for window in ordered:
            at = moment(day, window.start, zone)
            if since < at <= until:
                yield at, window
        day += DAY


def moment(day: date, at: time, zone: ZoneInfo) -> datetime:
    """When the zone's clocks first show, or jump over, `at` on `day`, in UTC."""
    late, early = (datetime.combine(day, at.replace(fold=fold), zone).astimezone(UTC) for fold in (0, 1))
    if early >= late:  # shown once, or twice: fold 0 came first
        return late
    while late - early > timedelta(seconds=1):  # skipped: the jump is between the two
        middle = early + (late - early) / 2
        if middle.astimezone(zone).replace(tzinfo=None) < datetime.combine(day, at):
            early = middle
        else:
            late = middle
    return late.replace(microsecond=0)
