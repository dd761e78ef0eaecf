"""Capacity routes: which provisioned models the data plane may send a model's calls to, beside on-demand."""

from pydantic import BaseModel, ConfigDict, Field


class CapacityRoute(BaseModel):
    """One provisioned model in service."""

    model_config = ConfigDict(frozen=True)

    provisioned_model_arn: str = Field(min_length=1, max_length=2048)
    units: int = Field(gt=0)
    """Model units; calls are spread in proportion to them."""


class CapacityRoutes(BaseModel):
    """All provisioned capacity of one model; none means on-demand alone."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(min_length=1, max_length=200)
    routes: tuple[CapacityRoute, ...] = Field(max_length=100)
    version: int = Field(ge=1, lt=2**53)
    """Counted by the model's one writer: an older list never replaces a newer one."""
