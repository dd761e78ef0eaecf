"""The ladder (design idea 2): what carries the load while units are refused or late, rung after rung; pure.

On-demand → cross-region inference profile → priority tier → shorter answers → features off. Where calls go is free to
change back and acts at once, except the priority tier, which costs more. That one, and what users notice, comes rung by
rung, from when the load is more than the quotas of the others carry until the units are there.
"""

from enum import StrEnum
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from domain.knobs import KnobName, KnobValue, baseline_value
from domain.policy import RecordedPolicy
from domain.routes import Overflow


class RungKind(StrEnum):
    """In the order in which they are taken."""

    ON_DEMAND = "on-demand"
    INFERENCE_PROFILE = "cross-region inference profile"
    PRIORITY_TIER = "priority tier"
    SHORTER_ANSWERS = "shorter answers"
    FEATURES_OFF = "features off"


class Shortage(BaseModel):
    """Units of a model that are wanted and not there."""

    model_config = ConfigDict(frozen=True)

    model: str
    units: int = Field(ge=1)
    """Missing now."""
    units_in_service: int
    sent_tokens_per_second: float | None
    """The model's load now; None: it could not be read, and is taken as what the missing units would carry."""
    overloaded_since: AwareDatetime | None
    """As the ladder said last."""
    now: AwareDatetime
    policy: RecordedPolicy


class Rung(BaseModel):
    """One step down."""

    model_config = ConfigDict(frozen=True)

    kind: RungKind
    text: str
    """What it does and why, in words."""
    knob: KnobName | None = None
    """Taken as a lease; None: it is in the routes."""
    value: KnobValue = None
    consent: bool = False
    """Not taken before a person agrees."""


class Ladder(BaseModel):
    """The rungs for a shortage at this moment."""

    model_config = ConfigDict(frozen=True)

    rungs: tuple[Rung, ...]
    overflow: tuple[Overflow, ...]
    """Where calls go that the provisioned models do not take, in this order."""
    overloaded_since: AwareDatetime | None
    """Since when the load has been more than on-demand and inference profile carry; None: it is not."""
    next_at: AwareDatetime | None
    """When to look again if units are still missing; None: nothing more helps, or is needed."""


def ladder(shortage: Shortage) -> Ladder:
    """The rungs that are due. Each of those that cost or are noticed waits `climb_every` longer than the one before."""
    spec, policy, now = shortage.policy.models[shortage.model], shortage.policy.ladder, shortage.now
    missing = shortage.units * spec.tokens_per_second_per_unit
    beyond, what = missing, "that the missing units would carry"
    if shortage.sent_tokens_per_second is not None:
        in_service = shortage.units_in_service * spec.tokens_per_second_per_unit
        beyond, what = max(0.0, shortage.sent_tokens_per_second - in_service), "beyond the units in service"
    carried = spec.on_demand_tokens_per_second
    quota = f"{carried:,.0f} tokens/s of quota for {beyond:,.0f} {what}"
    rungs = [Rung(kind=RungKind.ON_DEMAND, text=f"on-demand takes what the units do not: {quota}")]
    overflow = [Overflow(kind="on_demand", model_id=spec.model_id)]
    if spec.inference_profile_id is not None:
        carried += spec.inference_profile_tokens_per_second
        text = (
            f"then the inference profile {spec.inference_profile_id}, which other regions answer: "
            f"{spec.inference_profile_tokens_per_second:,.0f} tokens/s more"
        )
        rungs.append(Rung(kind=RungKind.INFERENCE_PROFILE, text=text))
        overflow.append(Overflow(kind="inference_profile", model_id=spec.inference_profile_id))
    since = shortage.overloaded_since or (now if beyond > carried else None)
    next_at = now + policy.climb_every if since is None and missing > carried else None
    for number, rung in enumerate(_costly(shortage) if since is not None else (), 1):
        assert since is not None
        due = since + number * policy.climb_every
        if due > now:
            next_at = due
            break
        rungs.append(rung)
        if rung.kind is RungKind.PRIORITY_TIER:
            overflow.append(Overflow(kind="priority_tier", model_id=spec.model_id))
    return Ladder(rungs=tuple(rungs), overflow=tuple(overflow), overloaded_since=since, next_at=next_at)


def _costly(shortage: Shortage) -> list[Rung]:
    """What users or the bill notice, as far as the policy has it."""
    policy, spec = shortage.policy, shortage.policy.models[shortage.model]
    rungs = []
    if spec.priority_tier:
        text = "then the priority tier of on-demand, at its higher price"
        rungs.append(Rung(kind=RungKind.PRIORITY_TIER, text=text))
    most = policy.ladder.max_output_tokens
    now: Any = baseline_value(KnobName.MAX_OUTPUT_TOKENS, policy.baseline)
    shorter = {
        name: most for name, intent in policy.intents.items() if intent.model == shortage.model and now[name] > most
    }
    if shorter:
        rungs.append(
            Rung(
                kind=RungKind.SHORTER_ANSWERS,
                text=f"answers to {', '.join(shorter)} have at most {most} tokens",
                knob=KnobName.MAX_OUTPUT_TOKENS,
                value=dict[str, Any](shorter),
            )
        )
    if features := policy.features if policy.ladder.features_off is None else policy.ladder.features_off:
        rungs.append(
            Rung(
                kind=RungKind.FEATURES_OFF,
                text=f"{', '.join(features)} off: the intents that matter least are shed",
                knob=KnobName.FEATURE_FLAG,
                value=dict[str, Any](dict.fromkeys(features, False)),
                consent=True,
            )
        )
    return rungs
