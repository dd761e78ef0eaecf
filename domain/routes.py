"""Capacity routes: which provisioned models the data plane may send a model's calls to, beside on-demand."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CapacityRoute(BaseModel):
    """One provisioned model in service."""

    model_config = ConfigDict(frozen=True)

    provisioned_model_arn: str = Field(min_length=1, max_length=2048)
    units: int = Field(gt=0)
    """Model units; calls are spread in proportion to them."""


class Overflow(BaseModel):
    """Where calls go that the provisioned models do not take."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["on_demand", "inference_profile", "priority_tier"]
    """`priority_tier`: on demand, with `serviceTier` set to `priority`."""
    model_id: str = Field(min_length=1, max_length=2048)
    """What a call names: the base model, or a cross-region inference profile."""


class CapacityRoutes(BaseModel):
    """All provisioned capacity of one model; none means on-demand alone."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(min_length=1, max_length=200)
    routes: tuple[CapacityRoute, ...] = Field(max_length=100)
    overflow: tuple[Overflow, ...] = Field(default=(), max_length=10)
    """Ordered: the next one takes what the one before throttles. None: on-demand, as always when nothing is short."""
    version: int = Field(ge=1, lt=2**53)
    """Counted by the model's one writer: an older list never replaces a newer one."""
