"""Capacity: who asks for how many provisioned units until when, and what there is.

AWS cannot change the units of a provisioned throughput; capacity is a *set* of provisioned models that a planner
creates and deletes (SEED-CHECK 1).
"""

from enum import StrEnum
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator


class DemandKind(StrEnum):
    """Kinds that combine by max (DESIGN idea 2)."""

    EMERGENCY = "emergency"


class Demand(BaseModel):
    """Somebody's dated wish for units of one model. Setting the same `demand_id` again replaces it."""

    model_config = ConfigDict(frozen=True)

    demand_id: str = Field(min_length=1, max_length=200)
    model: str
    kind: DemandKind
    units: int = Field(ge=0)
    """Total units wanted in service, not units on top."""
    start: AwareDatetime
    end: AwareDatetime
    reason: str = Field(min_length=1, max_length=500)
    asked_by: str
    """Incident id or person."""

    @model_validator(mode="after")
    def _ends(self) -> "Demand":
        if self.end <= self.start:
            raise ValueError(f"end {self.end.isoformat()} must be after start {self.start.isoformat()}")
        return self


class ProvisionedModel(BaseModel):
    """One provisioned throughput as Bedrock lists it."""

    model_config = ConfigDict(frozen=True)

    arn: str
    name: str
    units: int
    status: Literal["Creating", "InService", "Updating", "Failed"]
    committed: bool = False
    ours: bool = False
    """Made by us: it carries our tag."""
    created_at: AwareDatetime
    failure: str | None = None


class DemandOutcome(BaseModel):
    """What became of a demand; sent to the incident that asked."""

    model_config = ConfigDict(frozen=True)

    demand_id: str
    status: Literal["requested", "in_service", "failed", "withdrawn"]
    units_in_service: int
    units_wanted: int
    detail: str
    """In words, for the timeline: what was requested, landed, refused and why."""
