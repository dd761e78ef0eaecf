"""Scenario 1: Bedrock throttles. The tree of causes and the plan.

Everything here is pure. Sources: scenario 1 of the runbooks; design check 2, 3, 19, 21 and 27.
"""

from datetime import datetime, timedelta

from domain.clock import RehearsalClock
from domain.evidence import Evidence, EvidenceKey
from domain.incident import Lever, LeverName, LeverStatus
from domain.load import LoadSnapshot, load_on, total_offered, units_for
from domain.mitigation import MitigationPlan, buying_evidence, cap_cost, routing_lever, ttl_lever
from domain.policy import Policy
from domain.trees import Leaf, Question

# ---------------------------------------------------------------- the tree


def _triggered_on_time(evidence: Evidence) -> str:
    triggered, starts = _when(evidence, EvidenceKey.EVENT_TRIGGERED_AT), _when(evidence, EvidenceKey.EVENT_STARTS_AT)
    lead = timedelta(seconds=evidence.number(EvidenceKey.EVENT_LEAD_SECONDS) or 0)
    return "yes" if triggered and starts and triggered <= starts - lead else "no"


def _sufficient(evidence: Evidence) -> str:
    load = evidence.number(EvidenceKey.TOKENS_PER_SECOND) or 0
    return "yes" if load <= (evidence.number(EvidenceKey.EVENT_CAPACITY_TOKENS_PER_SECOND) or 0) else "no"


def _completed_in_time(evidence: Evidence) -> str:
    completed, starts = _when(evidence, EvidenceKey.EVENT_COMPLETED_AT), _when(evidence, EvidenceKey.EVENT_STARTS_AT)
    return "yes" if completed and starts and completed <= starts else "no"


def _when(evidence: Evidence, key: EvidenceKey) -> datetime | None:
    value = evidence.value(key)
    return datetime.fromisoformat(value) if isinstance(value, str) and value else None


TREE = Question(
    id="configured",
    text="Was the event in the calendar?",
    needs=(EvidenceKey.EVENT_CONFIGURED,),
    answer=lambda evidence: "yes" if evidence.value(EvidenceKey.EVENT_CONFIGURED) else "no",
    branches={
        "no": Leaf("event-not-in-calendar", "The event was not in the calendar, so nothing was pre-provisioned."),
        "yes": Question(
            id="triggered",
            text="Did provisioning trigger on time?",
            needs=(EvidenceKey.EVENT_TRIGGERED_AT, EvidenceKey.EVENT_STARTS_AT, EvidenceKey.EVENT_LEAD_SECONDS),
            answer=_triggered_on_time,
            branches={
                "no": Leaf("provisioning-not-triggered", "Pre-provisioning did not start on time."),
                "yes": Question(
                    id="sufficient",
                    text="Was the capacity sufficient for the traffic?",
                    needs=(EvidenceKey.TOKENS_PER_SECOND, EvidenceKey.EVENT_CAPACITY_TOKENS_PER_SECOND),
                    answer=_sufficient,
                    branches={
                        "no": Leaf(
                            "multiplier-underestimated",
                            "The event's multiplier was underestimated: traffic outgrew the capacity planned for it.",
                        ),
                        "yes": Question(
                            id="completed",
                            text="Was provisioning complete before the event?",
                            needs=(EvidenceKey.EVENT_COMPLETED_AT, EvidenceKey.EVENT_STARTS_AT),
                            answer=_completed_in_time,
                            branches={
                                "no": Leaf(
                                    "lead-time-too-short",
                                    "The lead time was too short: provisioning was not complete when the event began.",
                                ),
                                "yes": Leaf(
                                    "investigate",
                                    "Capacity was there in time and sufficient as planned: investigate what drove "
                                    "the traffic (a title of unusual interest?).",
                                ),
                            },
                        ),
                    },
                ),
            },
        ),
    },
)

# ---------------------------------------------------------------- the plan

MOST_HITS = 0.99
"""A hit rate so high says nothing about the load without the cache."""


def plan(
    model: str, load: LoadSnapshot, policy: Policy, clock: RehearsalClock, now: datetime, base_units: int
) -> MitigationPlan:
    """The levers of scenario 1 for `model`, sized from offered load before retries (design check 2, 3, 19).

    `base_units`: what the hour has anyway.
    """
    throttle, until = policy.throttle, now + policy.way_back.lever_max_hold
    routing, moved = routing_lever(model, load, policy, until)
    why_buy = buying_evidence(model, load, policy)
    wanted, arithmetic = _size(model, load, policy, moved) if why_buy else (base_units, [])
    buys = wanted > base_units
    units = base_units
    if buys:
        units, arithmetic = cap_cost(wanted, base_units, model, policy, clock, arithmetic)
    capacity_lever = Lever(
        name=LeverName.CAPACITY,
        status=LeverStatus.APPLYING if buys else LeverStatus.NOT_NEEDED,
        before=f"{base_units} units",
        after=f"{units} units",
        why=why_buy or "no evidence for buying yet: throttles under the share, demand within capacity",
        hold_until=now + policy.way_back.capacity_max_hold if buys else None,
    )
    if why_buy and not buys:
        capacity_lever = capacity_lever.model_copy(update={"why": f"{why_buy}; but the free levers suffice"})
    ttl = ttl_lever(
        throttle.cache_ttl_seconds,
        f"the hit rate should rise to {throttle.hit_rate_at_mitigation:.0%}; it costs nothing",
        policy,
        until,
    )
    return MitigationPlan(
        levers=[routing, ttl, capacity_lever],
        routing=moved,
        cache_ttl_seconds=throttle.cache_ttl_seconds,
        units=units if buys else None,
        uncapped_units=wanted if buys else None,
        arithmetic=[f"Evidence for buying: {why_buy or 'none'}.", *arithmetic],
    )


def _size(model: str, load: LoadSnapshot, policy: Policy, moved: dict[str, str]) -> tuple[int, list[str]]:
    """The units for the load, and the sums."""
    throttle, spec, capacity = policy.throttle, policy.models[model], policy.capacity
    routing = policy.baseline.model_routing
    offered = load.offered_tokens_per_second
    if not offered:
        sent = load.model(model).sent_tokens_per_second or 0
        hit_rate = throttle.hit_rate_at_baseline if load.hit_rate is None else min(load.hit_rate, MOST_HITS)
        expected = sent * (1 - throttle.hit_rate_at_mitigation) / (1 - hit_rate)
        lines = [
            f"Offered load by intent is unknown; {sent:,.0f} tokens/s sent gives {expected:,.0f} at the longer TTL."
        ]
    else:
        asked = load_on(model, offered, routing, 0)
        downgraded = load_on(model, offered, {**routing, **moved}, 0)
        expected = load_on(model, offered, {**routing, **moved}, throttle.hit_rate_at_mitigation)
        lines = [
            f"Offered to {model} before cache and retries: {asked:,.0f} tokens/s "
            f"(of {total_offered(load):,.0f} in all).",
            f"Less the downgraded intents ({', '.join(sorted(moved)) or 'none'}): {downgraded:,.0f} tokens/s.",
            f"Less the cache at {throttle.hit_rate_at_mitigation:.0%} hits: {expected:,.0f} tokens/s.",
        ]
    target = capacity.unplanned_target_utilisation
    wanted = units_for(expected, spec, target)
    lines.append(
        f"{expected:,.0f} ÷ {spec.tokens_per_second_per_unit:,.0f} tokens/s per unit ÷ {target:.0%} "
        f"target utilisation = {wanted} units."
    )
    clamped = spec.clamped(wanted)
    if clamped != wanted:
        quota = "none known" if spec.quota_units is None else spec.quota_units
        bounds = f"Floor {spec.floor_units}, ceiling {spec.ceiling_units} and quota ({quota})"
        lines.append(f"{bounds} make it {clamped} units.")
    return clamped, lines
