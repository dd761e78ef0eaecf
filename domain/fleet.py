"""Which provisioned models to keep, drop and buy, and what that leads to as time goes on; arithmetic without words."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from domain.wishes import Wishes

ROUNDS = 1000
"""More changes than any horizon has: a bound for the case that something is wrong."""


@dataclass(frozen=True)
class Piece:
    """A provisioned model, or an order of one."""

    key: str
    units: int
    since: datetime
    """Paid from."""
    ready: datetime
    """In service from then on, as far as is known."""
    releasable: datetime | None
    """From when it may go; None: never, it is not ours or committed."""


@dataclass(frozen=True)
class Terms:
    """What binds every choice."""

    period: timedelta
    """A paid hour."""
    hold: timedelta
    """From a purchase to the moment it may be released."""
    lag: timedelta
    """From a purchase to its service."""
    drain: timedelta
    """From a release to its end."""
    burst_units: int
    most_units: int
    baseline: int
    """Others' to provide ..."""
    base_units: int
    """... and what they do provide."""

    def attainable(self, wanted: int) -> int:
        """Of `wanted` units what can be had without buying others' baseline."""
        return wanted - max(0, min(self.baseline, wanted) - self.base_units)

    def paid_until(self, piece: Piece, at: datetime) -> datetime:
        """The end of the hour that is being paid for at `at`."""
        return piece.since + (math.floor((at - piece.since) / self.period) + 1) * self.period

    def to_pay(self, piece: Piece, at: datetime, until: datetime | None) -> int:
        """Hours that begin after the one being paid for at `at`, if the piece is released at `until`; None: 0."""
        return max(0, math.ceil((until + self.drain - self.paid_until(piece, at)) / self.period)) if until else 0


@dataclass(frozen=True)
class Choice:
    """What is done at one moment."""

    keep: tuple[Piece, ...]
    drop: tuple[Piece, ...]
    buy: int
    again: int
    """Units kept only because they are wanted again before their paid hour ends."""
    cheaper: int
    """Units too many that are cheaper than buying the exact sum."""


def choose(pieces: Sequence[Piece], room: int, at: datetime, wishes: Wishes, terms: Terms) -> Choice:
    """Keep what fits what is wanted at `at`, of several the one paid for longest; buy what is missing, within `room`.

    One that is wanted again before its paid hour ends, perhaps in place of one that must be held until then, stays; so
    do some units too many where the exact sum could not stand beside them, or would cost more until the next change.
    """
    wanted = wishes.at(at)
    free = [piece for piece in pieces if piece.releasable is not None and piece.releasable <= at]
    fall = next((moment for moment, units in wishes.ahead(at) if units < wanted), None)

    def price(piece: Piece) -> tuple[int, int, float]:
        left = (terms.paid_until(piece, at) - at) / terms.period
        return piece.units * (piece.ready > at), piece.units * terms.to_pay(piece, at, fall), -piece.units * left

    short = terms.attainable(wanted) - _units(pieces) + _units(free)
    target = max(0, short)
    sums = _subsets(sorted(free, key=lambda x: x.key), price)
    keep = sums[max(total for total in sums if total <= target)]
    missing = target - _units(keep)
    cheaper = 0
    if missing and _units(free) >= target:
        more = sums[min(total for total in sums if total >= target)]
        if missing > room or _is_cheaper(more, keep, missing, at, wishes, terms):
            cheaper = _units(more) - target if missing <= room else 0
            keep, missing = more, 0
    again = 0
    for piece in sorted((x for x in free if x not in keep), key=lambda x: terms.paid_until(x, at), reverse=True):
        until = terms.paid_until(piece, at)
        passing = _units([x for x in pieces if x.releasable is not None and at < x.releasable < until])
        later = wishes.most(at, until) - wanted + passing
        if later > 0 and _units(keep) + piece.units <= short + later:
            keep = (*keep, piece)
            again += piece.units
    missing = max(0, target - _units(keep))
    drop = tuple(piece for piece in free if piece not in keep)
    return Choice(
        keep=tuple(piece for piece in pieces if piece not in drop),
        drop=drop,
        buy=min(missing, room),
        again=again,
        cheaper=cheaper,
    )


def _is_cheaper(
    more: Sequence[Piece], exact: Sequence[Piece], missing: int, at: datetime, wishes: Wishes, terms: Terms
) -> bool:
    """Whether keeping `more` until the next change costs at most what `exact` and `missing` new units do."""
    until = next((moment for moment, _ in wishes.ahead(at)), None)
    if until is None:
        return False
    kept, replaced = (sum(x.units * terms.to_pay(x, at, until) for x in pieces) for pieces in (more, exact))
    return kept <= replaced + missing * math.ceil((until + terms.drain - at) / terms.period)


def _subsets(pieces: Sequence[Piece], price: Callable[[Piece], tuple[int, int, float]]) -> dict[int, tuple[Piece, ...]]:
    """Every sum of units that some of `pieces` have, and which: the cheapest ones where several do."""
    sums: dict[int, tuple[tuple[int, int, float], tuple[Piece, ...]]] = {0: ((0, 0, 0.0), ())}
    for piece in pieces:
        late, hours, left = price(piece)
        for total, (spent, chosen) in list(sums.items()):
            cost = spent[0] + late, spent[1] + hours, spent[2] + left
            known = sums.get(total + piece.units)
            if known is None or cost < known[0]:
                sums[total + piece.units] = cost, (*chosen, piece)
    return {total: chosen for total, (_, chosen) in sums.items()}


def chunks(there: int, buy: int, at: datetime, wishes: Wishes, burst_units: int) -> list[int]:
    """How `buy` units beside `there` are divided: a base that stays all the time, then bursts that can go singly.

    Bursts end where the wishes will fall to, so that each fall can be followed exactly.
    """
    later = [units for _, units in wishes.ahead(at)]
    lowest = min([wishes.at(at), *later])
    base = min(buy, lowest - there) if later and lowest > there else 0
    sizes = [base] if base else []
    level, top = there + base, there + buy
    while level < top:
        upto = min([units for units in later if level < units < top], default=top)
        size = min(upto - level, burst_units)
        sizes.append(size)
        level += size
    return sizes


@dataclass(frozen=True)
class Spell:
    """Units that are paid for from `since` to `until`."""

    units: int
    since: datetime
    until: datetime


@dataclass(frozen=True)
class Projection:
    """What following the wishes leads to, if nothing fails."""

    spells: tuple[Spell, ...]
    """Of what we bought and shall buy; the last ones end at the horizon."""
    in_service: tuple[tuple[datetime, int], ...]
    """Units from each moment on."""


def project(
    pieces: Iterable[Piece], others: int, at: datetime, until: datetime, wishes: Wishes, terms: Terms
) -> Projection:
    """Follow the wishes from `at` to `until`. `others` are units that are on their way out and still count."""
    now = list(pieces)
    spells: list[Spell] = []
    seen: list[tuple[datetime, int]] = []
    for _ in range(ROUNDS):
        choice = choose(now, max(0, terms.most_units - _units(now) - others), at, wishes, terms)
        others = 0
        wanted = wishes.at(at)
        enough = sum(x.units for x in choice.keep if x.ready <= at) >= terms.attainable(wanted)
        gone = [x for x in choice.drop if enough and x.ready <= at]
        spells += [Spell(x.units, x.since, at + terms.drain) for x in gone]
        now = [x for x in now if x not in gone]
        level = _units(choice.keep) + wanted - terms.attainable(wanted)
        for size in chunks(level, choice.buy, at, wishes, terms.burst_units):
            now.append(Piece(f"{at.isoformat()} {len(now)}", size, at, at + terms.lag, at + terms.hold))
        seen.append((at, sum(x.units for x in now if x.ready <= at)))
        moments = [x.ready for x in now] + [x.releasable for x in now if x.releasable is not None]
        moments += [moment for moment, _ in wishes.ahead(at)]
        following = min((moment for moment in moments if moment > at), default=until)
        if following >= until:
            break
        at = following
    spells += [Spell(x.units, x.since, until) for x in now if x.releasable is not None]
    return Projection(tuple(spells), tuple(seen))


def _units(pieces: Iterable[Piece]) -> int:
    return sum(piece.units for piece in pieces)
