"""What was bought for whom, until when and at what cost, and what is bought only with a person's consent."""

import math
from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from domain.clock import HOUR, RehearsalClock


class Purchase(BaseModel):
    """One provisioned model that we bought; kept for a while after its end, as caps look back."""

    model_config = ConfigDict(frozen=True)

    arn: str
    name: str
    units: int = Field(ge=1)
    asked_by: str
    """Incident, event or person that it was bought for; `unknown` where its tags do not say."""
    until: AwareDatetime | None
    """End of the demand that it was bought for."""
    bought_at: AwareDatetime
    ended_at: AwareDatetime | None = None
    """When it was deleted, or its creation failed; None: it costs."""
    failed: bool = False
    """Its creation failed: it never cost anything."""

    def unit_hours(self, at: datetime, clock: RehearsalClock) -> float:
        """Unit-hours of business time paid for by `at`: every hour that has begun counts whole (AWS bills by hour)."""
        if self.failed:
            return 0
        lasted = clock.business_duration(min(at, self.ended_at or at) - self.bought_at)
        return self.units * max(1, math.ceil(lasted / HOUR))


def unit_hours(purchases: Iterable[Purchase], at: datetime, clock: RehearsalClock) -> float:
    """What all of these have cost by `at`."""
    return sum(purchase.unit_hours(at, clock) for purchase in purchases)


class Excess(BaseModel):
    """Units that would go over a cap of cost: bought once a person agrees, and not before."""

    model_config = ConfigDict(frozen=True)

    excess_id: str
    """The same as long as it is the same cap and the same asker (and day): what `APPROVE_CAPACITY` names."""
    cap: Literal["incident", "day"]
    asked_by: str
    """For whom the units are."""
    units: int
    """That wait."""
    amount: float
    """By how much the cap would be exceeded, in its unit."""
    unit: Literal["USD", "unit-hours"]
    until: AwareDatetime
    """When they would be released."""
    text: str
    """What it would cost and why, in one sentence for the person."""


class Consent(BaseModel):
    """A person agreed to go over a cap."""

    model_config = ConfigDict(frozen=True)

    excess_id: str
    who: str
    amount: float = Field(gt=0)
    """At most so much over the cap, in its unit."""
    at: AwareDatetime
    until: AwareDatetime
    """Void from then on."""
