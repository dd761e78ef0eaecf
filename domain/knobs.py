"""Knobs and leases: everything a mitigation changes in the running system, and who holds it until when.

A knob's effective value is a pure merge of its unexpired leases, or its baseline when there are none. The baseline
is configuration under version control, never state in Redis. Releasing one lease leaves the others in force, so
there is no previous value to restore and no wrong one (scenarios 1 and 4 set different cache TTLs for one symptom).
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class KnobName(StrEnum):
    """The knobs there are, by the name that Redis, the CLI and the report use."""

    CACHE_TTL_SECONDS = "cache_ttl_seconds"
    MODEL_ROUTING = "model_routing"


CacheTtlSeconds = Annotated[int, Field(strict=True, ge=1, le=3600)]
ModelRouting = Annotated[dict[str, str], Field(min_length=1)]
KnobValue = int | dict[str, str]
"""`cache_ttl_seconds`: seconds. `model_routing`: intent to model; an intent that is absent keeps its model."""


class Baseline(BaseModel):
    """The configured value of every knob, and what its values may name."""

    model_config = ConfigDict(frozen=True)

    cache_ttl_seconds: CacheTtlSeconds
    model_routing: ModelRouting
    """Every intent with the model that answers it."""
    model_ranks: dict[str, int]
    """Models by quality: a lower rank is a smaller model, and wins the merge per intent."""


class Holder(BaseModel):
    """Who holds a lease."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["incident", "person"]
    id: str = Field(min_length=1, max_length=200)
    """The incident's workflow id, or the verified subject of a person's token."""


class LeaseRequest(BaseModel):
    """What an owner asks the ledger for. The same `lease_id` again is a renewal, never a second lease."""

    model_config = ConfigDict(frozen=True)

    lease_id: str = Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9:._-]+$")
    knob: KnobName
    value: KnobValue
    holder: Holder
    reason: str = Field(min_length=1, max_length=500)
    duration_ms: int = Field(gt=0, le=7 * 24 * 3600 * 1000)
    """How long the lease lasts from the moment the Redis server grants or renews it; at most 7 days, never endless."""


class Lease(BaseModel):
    """A lease as the ledger holds it. Times are the Redis server's clock."""

    model_config = ConfigDict(frozen=True)

    lease_id: str
    knob: KnobName
    value: KnobValue
    holder: Holder
    reason: str
    acquired_at: AwareDatetime
    expires_at: AwareDatetime
    version: int = Field(ge=1)
    """The ledger's version when this lease was taken or last renewed; it grows with every change of the ledger."""


class AuditEntry(BaseModel):
    """One change of the ledger, written in the same atomic step as the change."""

    model_config = ConfigDict(frozen=True)

    at: AwareDatetime
    action: Literal["acquired", "renewed", "released", "expired"]
    lease_id: str
    knob: KnobName
    value: KnobValue
    holder: Holder
    reason: str
    expires_at: AwareDatetime


class KnobValueError(ValueError):
    """A value that its knob does not take; the message names the knob, the value and what is allowed."""


def validate_value(knob: KnobName, value: object, baseline: Baseline) -> KnobValue:
    """`value` as its knob's type.

    Raises:
        KnobValueError: out of bounds, of the wrong type, or naming an intent or model that does not exist.
    """
    if knob is KnobName.CACHE_TTL_SECONDS:
        try:
            return TypeAdapter[int](CacheTtlSeconds).validate_python(value)
        except ValidationError:
            raise KnobValueError(
                f"cache_ttl_seconds: {value!r} is not allowed; a whole number of seconds from 1 to 3600 is"
            ) from None
    try:
        routing = TypeAdapter[dict[str, str]](ModelRouting).validate_python(value)
    except ValidationError:
        raise KnobValueError(
            f"model_routing: {value!r} is not allowed; a non-empty map of intent to model is"
        ) from None
    for intent, model in routing.items():
        if intent not in baseline.model_routing:
            known = ", ".join(sorted(baseline.model_routing))
            raise KnobValueError(f"model_routing: there is no intent {intent!r}; there are {known}")
        if model not in baseline.model_ranks:
            known = ", ".join(sorted(baseline.model_ranks))
            raise KnobValueError(f"model_routing: there is no model {model!r}; there are {known}")
    return routing


def effective_cache_ttl_seconds(leases: Iterable[Lease], baseline: Baseline) -> int:
    """The longest TTL that an unexpired lease asks for, else the baseline."""
    values = [v for lease in leases if isinstance(v := lease.value, int)]
    return max(values, default=baseline.cache_ttl_seconds)


def effective_model_routing(leases: Iterable[Lease], baseline: Baseline) -> dict[str, str]:
    """Every intent's model: the lowest rank that an unexpired lease asks for, else the baseline."""
    asked: dict[str, list[str]] = {}
    for lease in leases:
        if isinstance(lease.value, dict):
            for intent, model in lease.value.items():
                if intent in baseline.model_routing and model in baseline.model_ranks:
                    asked.setdefault(intent, []).append(model)
    return {
        intent: min(asked[intent], key=lambda model: baseline.model_ranks[model]) if intent in asked else model
        for intent, model in baseline.model_routing.items()
    }


def effective_value(knob: KnobName, leases: Iterable[Lease], baseline: Baseline) -> KnobValue:
    """The value in force, given the knob's unexpired leases (others are ignored)."""
    own = [lease for lease in leases if lease.knob is knob]
    if knob is KnobName.CACHE_TTL_SECONDS:
        return effective_cache_ttl_seconds(own, baseline)
    return effective_model_routing(own, baseline)


def baseline_value(knob: KnobName, baseline: Baseline) -> KnobValue:
    """The knob's configured value."""
    return effective_value(knob, (), baseline)
