"""Bedrock's provisioned throughput in one process and on virtual time, with the faults of a drawn year.

It behaves as the simulator's (`simulator/aws`): equal tokens give the same model; units in creation count for the
quota; a model in creation cannot be deleted; one whose creation failed stays in the list until it is deleted. Time in
creation is 10 to 15 min (S4). Every hour that a model has begun, from its creation to its deletion, is paid whole;
one whose creation fails costs nothing.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta

from bench._random_year import Faults, Span
from domain.capacity import ModelStatus, Order, ProvisionedModel
from domain.errors import ErrorKind

SHORTEST_LAG = timedelta(minutes=10)
LONGEST_LAG = timedelta(minutes=15)
HOUR = timedelta(hours=1)


class Refused(Exception):
    """A management call that failed; `kind` says what it deserves."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Bought:
    """One provisioned model, and what is known of it afterwards."""

    arn: str
    name: str
    units: int
    created_at: datetime
    settled_at: datetime
    """In service from then on, or failed."""
    fails: bool
    deleted_at: datetime | None = None
    asked_by: str | None = None
    until: datetime | None = None
    """The tags: for whom it was bought, and until when."""

    def hours(self, at: datetime) -> int:
        """Hours paid for by `at`."""
        if self.fails:
            return 0
        return max(1, math.ceil((min(at, self.deleted_at or at) - self.created_at) / HOUR))

    def seen(self, now: datetime) -> ProvisionedModel:
        """As Bedrock lists it."""
        status: ModelStatus = "Creating"
        if now >= self.settled_at:
            status = "Failed" if self.fails else "InService"
        return ProvisionedModel.model_construct(
            arn=self.arn,
            name=self.name,
            units=self.units,
            status=status,
            ours=True,
            created_at=self.created_at,
            asked_by=self.asked_by,
            until=self.until,
            failure="no capacity" if status == "Failed" else None,
        )


class VirtualBedrock:
    """One model's provisioned throughput of an account."""

    def __init__(self, quota_units: int, faults: Faults, seed: int) -> None:
        self._quota_units = quota_units
        self._faults = faults
        self._chance = random.Random(seed)
        self._by_token: dict[str, Bought] = {}
        self.bought: list[Bought] = []
        """Everything that ever was."""
        self.alive: dict[str, Bought] = {}
        self.refusals: Counter[ErrorKind] = Counter()

    def trouble(self, now: datetime) -> Refused | None:
        """What every management call meets with at `now`."""
        if _within(self._faults.denied, now):
            return Refused(ErrorKind.ACCESS_DENIED, "not authorized to perform: bedrock:*")
        if _within(self._faults.throttled, now):
            return Refused(ErrorKind.THROTTLED, "Rate exceeded")
        return None

    def trouble_ends(self, now: datetime) -> datetime:
        """When calls are no longer throttled."""
        return max(span.end for span in self._faults.throttled if span.has(now))

    def denied_between(self, since: datetime, until: datetime) -> datetime | None:
        """When a call that is made again and again would first meet with a denial."""
        starts = [max(since, span.start) for span in self._faults.denied if span.start < until and span.end > since]
        return min(starts, default=None)

    def create(self, order: Order, now: datetime) -> str:
        """The ARN. Raises Refused; `UNAVAILABLE` although it was bought is one of the ways."""
        self._check(now)
        if order.token in self._by_token:
            return self._by_token[order.token].arn
        held = sum(model.units for model in self.alive.values())
        if held + order.units > self._quota_units or _within(self._faults.refused, now):
            raise self._refusal(ErrorKind.QUOTA_EXCEEDED, f"{self._quota_units} model units granted, {held} in use")
        lag = SHORTEST_LAG + (LONGEST_LAG - SHORTEST_LAG) * self._chance.random()
        if self._chance.random() < self._faults.stuck_share:
            lag = timedelta(hours=self._chance.uniform(1, 3))
        fails = self._chance.random() < self._faults.failed_share
        arn = f"provisioned-model/{len(self.bought):012}"
        model = Bought(arn, order.name, order.units, now, now + lag, fails, None, order.asked_by, order.until)
        self._by_token[order.token] = self.alive[arn] = model
        self.bought.append(model)
        if self._chance.random() < self._faults.unanswered_share:
            raise self._refusal(ErrorKind.UNAVAILABLE, "no answer in time")
        return arn

    def list(self, now: datetime) -> tuple[ProvisionedModel, ...]:
        """All there are. Raises Refused."""
        self._check(now)
        return tuple(model.seen(now) for model in self.alive.values())

    def get(self, arn: str, now: datetime) -> ProvisionedModel | None:
        """None: there is no such model. Raises Refused."""
        self._check(now)
        model = self.alive.get(arn)
        return model.seen(now) if model else None

    def delete(self, arn: str, now: datetime) -> None:
        """One that is gone already is a success. Raises Refused."""
        self._check(now)
        model = self.alive.get(arn)
        if model is not None and now < model.settled_at:
            raise self._refusal(ErrorKind.CONFLICT, f"{model.name} is being created")
        self.remove(arn, now)

    def remove(self, arn: str, now: datetime) -> None:
        """Whoever does it."""
        model = self.alive.pop(arn, None)
        if model is not None:
            model.deleted_at = now

    def _check(self, now: datetime) -> None:
        trouble = self.trouble(now)
        if trouble is not None:
            self.refusals[trouble.kind] += 1
            raise trouble

    def _refusal(self, kind: ErrorKind, message: str) -> Refused:
        self.refusals[kind] += 1
        return Refused(kind, message)


def _within(spans: tuple[Span, ...], now: datetime) -> bool:
    return any(span.has(now) for span in spans)
