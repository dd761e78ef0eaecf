"""Knobs and leases: everything a mitigation changes in the running system, and who holds it until when.

A knob's effective value is a pure merge of its unexpired leases, or its baseline when there are none. The baseline
is configuration under version control, never state in Redis. Releasing one lease leaves the others in force, so
there is no previous value to restore and no wrong one (scenarios 1 and 4 set different cache TTLs for one symptom).
A pin is a lease that outranks the merge: the newest unexpired pin holds, by name where a knob has one value for each.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from domain.knob_spec import (
    LARGEST,
    OFF_WINS,
    ON_WINS,
    SMALLEST,
    SMALLEST_MODEL,
    STRICTEST,
    Counts,
    KnobSpec,
    Model,
    Number,
    Ranks,
    Switch,
    Whole,
)
from domain.knob_spec import KnobValue as KnobValue

_TTL = Whole(1, 3600)


class KnobName(StrEnum):
    """The knobs there are: each with the name that Redis, the CLI and the report use, and its declaration."""

    spec: KnobSpec

    def __new__(cls, name: str, spec: KnobSpec | None = None) -> Self:
        """A member; `KnobName("cache_ttl_seconds")` finds one."""
        assert spec is not None, f"{name} has no declaration"
        member = str.__new__(cls, name)
        member._value_ = name
        member.spec = spec
        return member

    CACHE_TTL_SECONDS = (
        "cache_ttl_seconds",
        KnobSpec(
            meaning="how long an answer may be served from the response cache",
            unit="seconds",
            kind=_TTL,
            merge=LARGEST,
            baseline=None,
        ),
    )
    MODEL_ROUTING = (
        "model_routing",
        KnobSpec(
            meaning="the model that answers an intent",
            kind=Model(),
            by="intent",
            merge=SMALLEST_MODEL,
            baseline=None,
        ),
    )
    BATCH_WINDOW_MS = (
        "batch_window_ms",
        KnobSpec(
            meaning="the longest that the batcher waits for a batch to fill; 0: it sends at once",
            unit="milliseconds",
            kind=Whole(0, 1000),
            merge=SMALLEST,
            baseline=1000,
        ),
    )
    REQUEST_COALESCING = (
        "request_coalescing",
        KnobSpec(
            meaning="whether identical requests in flight share one answer",
            kind=Switch(),
            merge=ON_WINS,
            baseline=False,
        ),
    )
    INVOCATIONS_PER_SECOND_PER_TASK = (
        "invocations_per_second_per_task",
        KnobSpec(
            meaning="how often one task may call Bedrock",
            unit="calls a second",
            kind=Number(0.01, 1000),
            merge=SMALLEST,
            baseline=None,
        ),
    )
    FEATURE_FLAG = (
        "feature_flag",
        KnobSpec(
            meaning="whether a feature is offered",
            kind=Switch(),
            by="feature",
            merge=OFF_WINS,
            baseline={"taste_profile": True},
            needs_approval=True,
        ),
    )
    MAX_OUTPUT_TOKENS = (
        "max_output_tokens",
        KnobSpec(
            meaning="the longest answer to an intent",
            unit="tokens",
            kind=Whole(1, 4096),
            by="intent",
            merge=SMALLEST,
            baseline=1024,
        ),
    )
    HISTORY_TRUNCATION = (
        "history_truncation",
        KnobSpec(
            meaning="how much of a user's reading history an intent's prompt carries: the recent and the top-rated",
            unit="titles",
            kind=Counts(("recent", "top"), Whole(0, 1000)),
            by="intent",
            merge=STRICTEST,
            baseline=None,
        ),
    )


_OWN_FIELDS = (KnobName.CACHE_TTL_SECONDS, KnobName.MODEL_ROUTING)

CacheTtlSeconds = Annotated[int, Field(strict=True, ge=_TTL.minimum, le=_TTL.maximum)]


class Baseline(BaseModel):
    """The configured value of every knob, and what its values may name."""

    model_config = ConfigDict(frozen=True)

    cache_ttl_seconds: CacheTtlSeconds
    model_routing: Annotated[dict[str, str], Field(min_length=1)]
    """Every intent with the model that answers it."""
    model_ranks: dict[str, int]
    """Models by quality: a lower rank is a smaller model."""
    others: dict[str, KnobValue] = {}
    """The other knobs' values by knob; a knob that is absent has what its declaration says. Of a knob by intent one
    value for all, or those of some intents; of a knob by feature every feature there is."""


class Holder(BaseModel):
    """Who holds a lease."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["incident", "person", "capacity"]
    id: str = Field(min_length=1, max_length=200)
    """The workflow id of the incident, of a model's capacity or of its coupling with ECS, or the verified subject of a
    person's token."""


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
    pin: bool = False
    """Above the merge. Whoever asks has checked the person's role."""
    acquired_at: AwareDatetime | None = None
    """When the lease was first granted, so that one that is put back keeps its place among pins; a new one has none."""


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
    pin: bool = False


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
    pin: bool = False


class Refusal(BaseModel):
    """An attempt at what somebody may not do, or what no one may, kept beside the changes."""

    model_config = ConfigDict(frozen=True)

    holder: Holder | None
    """Who tried; None: without a token that could be verified."""
    action: str = Field(min_length=1, max_length=100)
    """What was tried, e.g. `acquire`."""
    target: str = Field(max_length=200)
    """The knob or the lease id."""
    value: str = Field(default="", max_length=500)
    """The value that was tried, as it was given."""
    why: str = Field(min_length=1, max_length=500)
    """What the person was told."""


class RefusalEntry(Refusal):
    """A refusal as the ledger holds it."""

    at: AwareDatetime


class KnobValueError(ValueError):
    """A value that its knob does not take; the message names the knob, the value and what is allowed."""

    def __init__(self, message: str, asked: object, allowed: str, *, is_name: bool = False) -> None:
        self.asked = asked
        """What of the value is not allowed."""
        self.allowed = allowed
        """What is, in words."""
        self.is_name = is_name
        """Whether it is an intent or a feature, not the value for one."""
        super().__init__(message)


def validate_value(knob: KnobName, value: object, baseline: Baseline) -> KnobValue:
    """`value`, if its knob takes it.

    Raises:
        KnobValueError: out of bounds, of the wrong type, or naming an intent, model or feature that does not exist.
    """
    spec, ranks = knob.spec, baseline.model_ranks
    allowed = spec.kind.allowed(spec.unit, ranks)
    if spec.by is None:
        if not spec.kind.takes(value, ranks):
            raise KnobValueError(f"{knob}: {_shown(value)} is not allowed; {allowed} is", value, allowed)
        return value  # type: ignore[return-value]
    if not isinstance(value, dict) or not value:
        a_map = f"a map that gives at least one {spec.by} its value"
        raise KnobValueError(f"{knob}: {_shown(value)} is not allowed; {a_map} is", value, a_map)
    configured = _configured_by_name(knob, baseline)
    for name, one in value.items():
        if name not in configured:
            names = ", ".join(sorted(configured))
            message = f"{knob}: there is no {spec.by} {_shown(name)}; there are {names}"
            raise KnobValueError(message, name, names, is_name=True)
        if not spec.kind.takes(one, ranks):
            raise KnobValueError(f"{knob}: {_shown(one)} is not allowed for {name}; {allowed} is", one, allowed)
    return value


def baseline_value(knob: KnobName, baseline: Baseline) -> KnobValue:
    """The knob's configured value; of a knob by intent or feature for every one of them."""
    if knob.spec.by is not None:
        return _configured_by_name(knob, baseline)
    if knob is KnobName.CACHE_TTL_SECONDS:
        return baseline.cache_ttl_seconds
    return baseline.others.get(knob, knob.spec.baseline)


def effective_value(knob: KnobName, leases: Iterable[Lease], baseline: Baseline) -> KnobValue:
    """The value in force, given unexpired leases.

    Leases of other knobs count for nothing, nor do values and names that this version or this baseline does not know.
    """
    spec, ranks = knob.spec, baseline.model_ranks
    own = [lease for lease in leases if lease.knob is knob]
    if spec.by is None:
        plain: KnobValue = _in_force(
            spec, [(lease, lease.value) for lease in own], baseline_value(knob, baseline), ranks
        )
        return plain
    return {
        name: _in_force(
            spec,
            [(lease, lease.value[name]) for lease in own if isinstance(lease.value, dict) and name in lease.value],
            configured,
            ranks,
        )
        for name, configured in _configured_by_name(knob, baseline).items()
    }


def _in_force(spec: KnobSpec, asked: list[tuple[Lease, Any]], configured: Any, ranks: Ranks) -> Any:
    """The newest pin's value, else the merge, else the configured one."""
    asked = [(lease, value) for lease, value in asked if spec.kind.takes(value, ranks)]
    if pins := [(lease.acquired_at, lease.lease_id, value) for lease, value in asked if lease.pin]:
        return max(pins, key=lambda pin: pin[:2])[2]
    return spec.merge.of([value for _, value in asked], ranks) if asked else configured


def _configured_by_name(knob: KnobName, baseline: Baseline) -> dict[str, Any]:
    if knob is KnobName.MODEL_ROUTING:
        return dict(baseline.model_routing)
    spec = knob.spec
    configured: Any = baseline.others.get(knob, spec.baseline)
    if spec.by == "feature":
        return {**configured}
    if configured is None or spec.kind.takes(configured, baseline.model_ranks):
        return dict.fromkeys(baseline.model_routing, configured)
    return {intent: configured.get(intent, spec.baseline) for intent in baseline.model_routing}


def declared_baselines() -> dict[KnobName, KnobValue]:
    """What the declarations configure: every knob but those that have a field of their own in the policy."""
    return {knob: knob.spec.baseline for knob in KnobName if knob not in _OWN_FIELDS}


def check_configured(others: Mapping[KnobName, KnobValue], baseline: Baseline) -> None:
    """Check a policy's configured values against their knobs' declarations.

    Raises:
        KnobValueError: a value that its knob does not take, or a knob with a field of its own.
    """
    for knob, value in others.items():
        spec = knob.spec
        if knob in _OWN_FIELDS:
            raise KnobValueError(f"knobs.{knob}: has a field of its own, as the intents' models have", value, "nothing")
        for_all = spec.by != "feature" and spec.kind.takes(value, baseline.model_ranks)
        no_limit = value is None and spec.baseline is None
        no_features = spec.by == "feature" and value == {}
        if not (for_all or no_limit or no_features):
            validate_value(knob, value, baseline)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
