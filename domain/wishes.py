"""How demands combine, now and ahead: the largest holds, features add to it (design idea 2)."""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Self

from domain.capacity import Demand, DemandKind, Situation
from domain.clock import RehearsalClock
from domain.incident import utc
from domain.policy import Policy
from domain.timetable import demands, units_at


def combined(base: int, active: Iterable[Demand]) -> int:
    """Units that `base` and demands of one moment come to."""
    active = list(active)
    largest = max([base, *(x.units for x in active if x.kind is not DemandKind.FEATURE)])
    return largest + sum(x.units for x in active if x.kind is DemandKind.FEATURE)


def wanted_at(policy: Policy, model: str, clock: RehearsalClock, asked: Iterable[Demand], at: datetime) -> int:
    """Units of `model` that the timetable (or the baseline) and `asked` want in service at `at`, in real time.

    No limit is kept to.
    """
    active = (x for x in asked if x.model == model and x.start <= at < x.end)
    return combined(units_at(policy, model, clock.business(at)), active)


@dataclass(frozen=True)
class Wish:
    """What is wanted at one moment, and by whom."""

    asked: int
    """By all together."""
    units: int
    """Of that, within floor, ceiling and quota."""
    baseline: int
    """Of that, others' to provide."""
    largest: tuple[Demand, ...]
    """Demands for more than the baseline that combine by max, the largest first."""
    features: tuple[Demand, ...]

    def buyer(self, level: int) -> Demand:
        """For whom the unit number `level` is: of those who want it the one who wants it longest."""
        longest = max((x for x in self.largest if x.units >= level), key=lambda x: x.end, default=None)
        demand = longest or next(iter([*self.features, *self.largest]), None)
        assert demand is not None, "nothing is bought without a demand"
        return demand

    @property
    def words(self) -> str:
        """Who wants it: who won, over whom, and what features add."""
        base = [f"the policy's baseline of {self.baseline}"] if self.baseline else []
        words = "the policy's baseline" if base else "nobody"
        if self.largest:
            first, *others = self.largest
            words = f"{first.asked_by} until {utc(first.end)}"
            less = [f"{x.units} of {x.asked_by}" for x in others] + base
            words += f" (the largest; beside {', '.join(less)})" if others else ""
        elif self.features and not base:
            first, *others = self.features
            return ", ".join([f"{first.asked_by} until {utc(first.end)}", *(_more(x) for x in others)])
        return ", ".join([words, *(_more(x) for x in self.features)])


def _more(feature: Demand) -> str:
    return f"{feature.units} more for {feature.asked_by} until {utc(feature.end)}"


@dataclass(frozen=True)
class Wishes:
    """The units that must be bought or kept, over time: from `provisioning_lead` ahead of each demand to its end."""

    moments: tuple[datetime, ...]
    """At which they change; the first one is now."""
    units: tuple[int, ...]
    """From each moment on, within floor, ceiling and quota."""
    ensured: tuple[int, ...]
    """Of that, the timetable's or the baseline: policy, and no demand of anybody."""

    def at(self, at: datetime) -> int:
        """Units at a moment that is not before now."""
        return self.units[bisect_right(self.moments, at) - 1]

    def most(self, since: datetime, until: datetime) -> int:
        """The most units at any moment from `since` on and before `until`."""
        first = bisect_right(self.moments, since) - 1
        after = (
            units for at, units in zip(self.moments[first + 1 :], self.units[first + 1 :], strict=True) if at < until
        )
        return max([self.units[first], *after])

    def ahead(self, at: datetime) -> tuple[tuple[datetime, int], ...]:
        """The changes after `at`."""
        first = bisect_right(self.moments, at)
        return tuple(zip(self.moments[first:], self.units[first:], strict=True))

    def limited(self, level: int, kept: Callable[[datetime], int]) -> Self:
        """The same with no more than `level` units, but for what is ensured, and for what is `kept` at a moment."""
        triples = zip(self.moments, self.units, self.ensured, strict=True)
        return replace(self, units=tuple(min(units, max(level, sure, kept(at))) for at, units, sure in triples))


class Board:
    """All demands on a model, the timetable's included, from now to the plan's horizon."""

    def __init__(self, situation: Situation) -> None:
        self._spec = situation.spec
        self._lead = situation.policy.provisioning_lead
        self._now = situation.now
        self._asked = situation.demands
        self.horizon = situation.now + situation.policy.plan_horizon
        self._timetable: tuple[Demand, ...] = ()
        self._baseline = situation.spec.baseline_units
        timetable, model = situation.timetable, situation.model
        if timetable is not None and model in timetable.models:
            self._baseline = 0
            until = self.horizon + self._lead
            self._timetable = tuple(demands(timetable, model, situation.clock, situation.now, until))

    def wish(self, at: datetime, lead: bool = True) -> Wish:
        """What is wanted at `at`, or must be bought for what starts within the lead time."""
        ahead = self._lead if lead else 0 * self._lead
        return self._combined([x for x in [*self._timetable, *self._asked] if x.start - ahead <= at < x.end])

    @property
    def changes(self) -> set[datetime]:
        """When demands start and end, within the horizon, and now."""
        moments = {at for x in [*self._timetable, *self._asked] for at in (x.start, x.end)}
        return {self._now, *(at for at in moments if self._now < at <= self.horizon)}

    @property
    def next_change(self) -> datetime | None:
        """When time alone changes what is wanted; not only within the horizon."""
        changes = (at for x in [*self._timetable, *self._asked] for at in (x.start - self._lead, x.end))
        return min((at for at in changes if at > self._now), default=None)

    def wishes(self, only: Iterable[Demand] | None = None) -> Wishes:
        """The same over time; of the demands `only` these, beside the timetable."""
        asked = self._asked if only is None else tuple(only)
        everyone = [*self._timetable, *asked]
        changes = {at for x in everyone for at in (x.start - self._lead, x.end)}
        moments = (self._now, *sorted(at for at in changes if self._now < at <= self.horizon))

        def units(of: Iterable[Demand], at: datetime) -> int:
            return self._combined([x for x in of if x.start - self._lead <= at < x.end]).units

        return Wishes(
            moments=moments,
            units=tuple(units(everyone, at) for at in moments),
            ensured=tuple(units(self._timetable, at) for at in moments),
        )

    def _combined(self, active: list[Demand]) -> Wish:
        largest = sorted(
            (x for x in active if x.kind is not DemandKind.FEATURE and x.units > self._baseline),
            key=lambda x: (x.units, x.end, x.demand_id),
            reverse=True,
        )
        features = sorted((x for x in active if x.kind is DemandKind.FEATURE), key=lambda x: x.demand_id)
        asked = combined(self._baseline, active)
        return Wish(asked, self._spec.clamped(asked), self._baseline, tuple(largest), tuple(features))
