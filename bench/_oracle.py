"""The least that provisioned units can cost for a need that is known ahead, minute by minute.

A unit is rented for whole hours from the moment it is asked for, and serves from `lag` later to the end of what is
paid. Written as conservation of units at each moment, covering the need is a flow of units from the moments where it
rises (sources) to those where it falls (sinks); a unit is carried forward from u to v by a rental of
`ceil(v - u + lag)` hours (one is never dearer than several on end) and backward for nothing (there it is surplus).
Nothing limits how many rentals there are, so the flow is a transport problem with these costs, solved exactly.

It is a bound on every policy that serves the need: refusals, failures and deletions by others only take choices away,
nobody's lag is shorter, chunks larger than one unit only cost more. Quota and ceiling are in the need.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

HOUR_MINUTES = 60

Steps = tuple[tuple[int, int], ...]
"""Minute and units from then on, beginning with the first need and ending with the first zero after it."""


@dataclass(frozen=True)
class Rental:
    """One unit, paid for by the hour."""

    asked_at_minute: int
    hours: int


def cheapest(need: NDArray[np.int_], lag_minutes: int) -> list[Rental]:
    """Rentals that cover `need` (units by minute) at the least cost, each of one unit."""
    rentals = []
    for start, steps in _parts(need, lag_minutes):
        rentals += [Rental(start + minute - lag_minutes, hours) for minute, hours in _part(steps, lag_minutes)]
    return rentals


def _parts(need: NDArray[np.int_], lag: int) -> Iterator[tuple[int, Steps]]:
    """The need cut where nothing is needed for so long that to rent again is never dearer than to go on renting.

    Each of two rentals wastes less than an hour to rounding, and the second a lag: two hours and a lag of nothing.
    """
    padded = np.concatenate(([0], need, [0]))
    changes = np.flatnonzero(np.diff(padded))
    steps = [(int(minute), int(padded[minute + 1])) for minute in changes]
    part: list[tuple[int, int]] = []
    for step, following in pairwise([*steps, (len(need) + 3 * HOUR_MINUTES + lag, 0)]):
        part.append(step)
        if step[1] == 0 and following[0] - step[0] >= 2 * HOUR_MINUTES + lag:
            first = part[0][0]
            yield first, tuple((minute - first, units) for minute, units in part)
            part = []


@cache
def _part(steps: Steps, lag: int) -> tuple[tuple[int, int], ...]:
    """Start of service and hours of each rental."""
    rises: list[int] = []
    falls: list[int] = []
    before = 0
    for minute, units in _without_short_dips(steps, lag):
        (rises if units > before else falls).extend([minute] * abs(units - before))
        before = units
    length = np.subtract.outer(np.array(falls), np.array(rises)).T
    hours = np.where(length > 0, np.ceil((length + lag) / HOUR_MINUTES), 0)
    chosen = assignment(hours)
    return tuple((rises[i], int(hours[i, j])) for i, j in enumerate(chosen) if hours[i, j])


def _without_short_dips(steps: Steps, lag: int) -> list[tuple[int, int]]:
    """`steps` with each dip no longer than the lag filled: to rent again costs that much of paid time at least."""
    minutes = np.zeros(steps[-1][0] + 1, dtype=int)
    for (start, units), (end, _) in pairwise(steps):
        minutes[start:end] = units
    top = int(minutes.max())
    for level in range(1, top + 1):
        below = np.flatnonzero(np.diff(np.concatenate(([1], minutes >= level, [1])).astype(int)))
        for start, end in zip(below[::2], below[1::2], strict=True):
            if start > 0 and end < len(minutes) and end - start <= lag:
                minutes[start:end] = np.maximum(minutes[start:end], level)
    changes = np.flatnonzero(np.diff(np.concatenate(([0], minutes))))
    return [(int(minute), int(minutes[minute])) for minute in changes]


def assignment(cost: NDArray[np.float64]) -> list[int]:
    """The column of each row of a square matrix, each column once, of the least sum (the Hungarian method)."""
    n = len(cost)
    rows, columns = np.zeros(n), np.zeros(n + 1)
    row_of = np.full(n + 1, -1)
    for row in range(n):
        row_of[n], column = row, n
        least, before = np.full(n, math.inf), np.full(n, n)
        used = np.zeros(n + 1, dtype=bool)
        while row_of[column] >= 0:
            used[column] = True
            here = row_of[column]
            free = ~used[:n]
            reduced = cost[here] - rows[here] - columns[:n]
            better = free & (reduced < least)
            least[better], before[better] = reduced[better], column
            column = int(np.argmin(np.where(free, least, math.inf)))
            step = least[column]
            rows[row_of[used]] += step
            columns[used] -= step
            least[free] -= step
        while column != n:
            previous = int(before[column])
            row_of[column] = row_of[previous]
            column = previous
    chosen = [0] * n
    for column in range(n):
        chosen[int(row_of[column])] = column
    return chosen
