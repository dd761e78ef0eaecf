"""Scenario 1's tree, plan, recovery and guard: the runbook's figures, row by row."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from domain.capacity import Demand, DemandKind
from domain.clock import RehearsalClock
from domain.evidence import Evidence, EvidenceKey, Reading, Value
from domain.incident import Lever, LeverName, LeverStatus
from domain.knobs import Holder, KnobName, LeaseRequest
from domain.load import LoadSnapshot, ModelLoad
from domain.mitigation import (
    MitigationPlan,
    buying_evidence,
    guard,
    held_since,
    recovered_how,
    recovery_checks,
)
from domain.policy import CapacityPolicy, Policy
from domain.runbooks.throttle import TREE, plan
from domain.trees import diagnose, mermaid, needed

NOW = datetime(2026, 11, 29, 15, 8, tzinfo=UTC)
POLICY = Policy()
OFFERED = {
    "recommendation": 24_000.0,
    "product_question": 8_350.0,
    "faq": 2_000.0,
    "greeting": 950.0,
    "order_status": 2_950.0,
    "search": 2_950.0,
}
STARTS = "2026-11-30T00:05:00+09:00"
PLANNED: dict[EvidenceKey, Value | None] = {
    EvidenceKey.EVENT_CONFIGURED: True,
    EvidenceKey.EVENT_STARTS_AT: STARTS,
    EvidenceKey.EVENT_LEAD_SECONDS: 7200.0,
    EvidenceKey.EVENT_TRIGGERED_AT: "2026-11-29T22:00:00+09:00",
    EvidenceKey.EVENT_COMPLETED_AT: "2026-11-29T22:15:00+09:00",
    EvidenceKey.TOKENS_PER_SECOND: 30_000.0,
    EvidenceKey.EVENT_CAPACITY_TOKENS_PER_SECOND: 40_000.0,
}


def evidence(values: dict[EvidenceKey, Value | None]) -> Evidence:
    return Evidence(
        readings={
            key: Reading(key=key, value=value, missing=None if value is not None else "timed out", source="test")
            for key, value in values.items()
        }
    )


def spike(**changes: object) -> LoadSnapshot:
    """Scenario 1's detection: about 30,000 tokens/s sent to Sonnet, which has 25,500."""
    model = ModelLoad(
        sent_tokens_per_second=30_200,
        capacity_tokens_per_second=25_500,
        throttles=500,
        throttle_shares=(0.1, 0.12),
    )
    load = LoadSnapshot(
        observed_at=NOW,
        models={"sonnet": model, "haiku": ModelLoad(sent_tokens_per_second=5_000, capacity_tokens_per_second=15_000)},
        offered_tokens_per_second=OFFERED,
        hit_rate=0.15,
        queue_depth=340,
        p99_ms=9_800,
        fallback_percent=12,
    )
    return load.model_copy(update=changes)


def planned(load: LoadSnapshot, policy: Policy = POLICY) -> MitigationPlan:
    return plan("sonnet", load, policy, RehearsalClock(), NOW, 15)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({EvidenceKey.EVENT_CONFIGURED: False}, "event-not-in-calendar"),
        ({EvidenceKey.EVENT_TRIGGERED_AT: ""}, "provisioning-not-triggered"),
        ({EvidenceKey.EVENT_TRIGGERED_AT: "2026-11-29T23:30:00+09:00"}, "provisioning-not-triggered"),
        ({EvidenceKey.EVENT_CAPACITY_TOKENS_PER_SECOND: 15_000.0}, "multiplier-underestimated"),
        ({EvidenceKey.EVENT_COMPLETED_AT: ""}, "lead-time-too-short"),
        ({EvidenceKey.EVENT_COMPLETED_AT: "2026-11-30T00:20:00+09:00"}, "lead-time-too-short"),
        ({}, "investigate"),
    ],
)
def test_each_cause_is_found_by_changing_exactly_that(change: dict[EvidenceKey, Value], cause: str) -> None:
    diagnosis = diagnose(TREE, evidence({**PLANNED, **change}))
    assert [found.id for found in diagnosis.causes] == [cause]
    assert diagnosis.path[-1].because


@pytest.mark.parametrize("key", sorted(needed(TREE)))
def test_missing_evidence_is_said_and_never_guessed(key: EvidenceKey) -> None:
    diagnosis = diagnose(TREE, evidence({**PLANNED, key: None}))
    assert diagnosis.causes == []
    assert f"{key}: timed out" in diagnosis.sentence


def test_the_chart_in_the_docs_is_drawn_from_the_same_tree() -> None:
    chart = mermaid(TREE)
    for cause in ("event-not-in-calendar", "multiplier-underestimated", "lead-time-too-short", "investigate"):
        assert f'{cause}["' in chart
    page = Path(__file__).parents[2] / "docs" / "throttle-tree.md"
    assert f"```mermaid\n{chart}```" in page.read_text(), f"{page.name} is stale; it should hold:\n{chart}"


def test_the_emergency_size_comes_from_offered_load_and_the_other_levers() -> None:
    """design check 2: (35,300 - 2,950) * 60 % = 19,410; / 1,000 / 80 % = 24.3, so 25 units, not the runbook's 30."""
    result = planned(spike())
    assert result.routing == {"faq": "haiku", "greeting": "haiku"}
    assert result.cache_ttl_seconds == 120
    assert result.units == 25
    assert [lever.status for lever in result.levers] == [LeverStatus.APPLYING] * 3
    assert [lever.name for lever in result.levers] == [LeverName.MODEL_ROUTING, LeverName.CACHE_TTL, LeverName.CAPACITY]
    assert any("= 25 units" in line for line in result.arithmetic)


def test_throttling_does_not_inflate_the_size() -> None:
    """design check 19: what is sent contains retries; the size must not follow it."""
    retried = spike(models={"sonnet": spike().models["sonnet"].model_copy(update={"sent_tokens_per_second": 60_000})})
    assert planned(retried).units == planned(spike()).units


def test_one_retried_429_buys_nothing() -> None:
    """design check 21."""
    quiet = ModelLoad(
        sent_tokens_per_second=6_000, capacity_tokens_per_second=25_500, throttles=1, throttle_shares=(0, 0.0001)
    )
    load = spike(models={"sonnet": quiet})
    assert buying_evidence("sonnet", load, POLICY) is None
    result = planned(load)
    assert result.units is None
    assert result.levers[2].status is LeverStatus.NOT_NEEDED


@pytest.mark.parametrize(("shares", "buys"), [((0.02,), False), ((0.005, 0.02), False), ((0.02, 0.011), True)])
def test_buying_needs_two_periods_of_throttles(shares: tuple[float, ...], buys: bool) -> None:
    model = ModelLoad(sent_tokens_per_second=10_000, capacity_tokens_per_second=25_500, throttle_shares=shares)
    assert (buying_evidence("sonnet", spike(models={"sonnet": model}), POLICY) is not None) == buys


def test_intents_are_downgraded_only_as_far_as_haiku_has_room() -> None:
    """design check 27: the outage must not move to Haiku. Haiku: 8,000 usable; 5,015 taken; each must fit in turn."""
    crowded = spike(offered_tokens_per_second={**OFFERED, "faq": 4_000.0})
    result = planned(crowded)
    assert result.routing == {"greeting": "haiku"}
    assert "does not fit" in result.levers[0].why
    full = spike(offered_tokens_per_second={**OFFERED, "search": 9_000.0})
    assert planned(full).levers[0].status is LeverStatus.NOT_NEEDED


def test_the_ceiling_and_the_cost_cap_clamp_the_size_and_say_so() -> None:
    huge = spike(offered_tokens_per_second={**OFFERED, "recommendation": 60_000.0})
    assert planned(huge).units == 30
    assert any("ceiling 30" in line for line in planned(huge).arithmetic)
    poor = POLICY.model_copy(update={"capacity": CapacityPolicy(max_unit_hours_per_incident=12)})
    result = planned(huge, poor)
    assert result.units == 18
    assert any("allows 3 units" in line for line in result.arithmetic)


def test_cost_hours_are_business_hours_in_a_rehearsal() -> None:
    fast = Policy(capacity=CapacityPolicy(max_unit_hours_per_incident=12))
    clock = RehearsalClock(speed=60)
    hold = fast.way_back.capacity_max_hold / 60
    compressed = fast.model_copy(update={"way_back": fast.way_back.model_copy(update={"capacity_max_hold": hold})})
    assert plan("sonnet", spike(), compressed, clock, NOW, 15).units == 18


def test_recovery_needs_every_measure_and_remembers_since_when() -> None:
    bad = recovery_checks("sonnet", spike(), POLICY.recovery, (), None)
    assert not any(check.met for check in bad)
    model = ModelLoad(sent_tokens_per_second=18_000, capacity_tokens_per_second=25_500, throttles=0)
    good = spike(models={"sonnet": model}, queue_depth=3, p99_ms=2_600, fallback_percent=0)
    first = recovery_checks("sonnet", good, POLICY.recovery, bad, None)
    assert held_since(first) == NOW
    later = recovery_checks(
        "sonnet", good.model_copy(update={"observed_at": NOW + timedelta(minutes=5)}), POLICY.recovery, first, None
    )
    assert held_since(later) == NOW
    relapse = recovery_checks(
        "sonnet", good.model_copy(update={"p99_ms": 3_000.0}), POLICY.recovery, later, p99_before_ms=None
    )
    assert held_since(relapse) is None
    assert all(
        check.met
        for check in recovery_checks("sonnet", spike(p99_ms=3_400.0), POLICY.recovery, (), 3_500)
        if check.name == "P99 latency"
    )


def test_no_throttle_data_counts_as_none_only_while_calls_were_made() -> None:
    silent = recovery_checks("sonnet", LoadSnapshot(observed_at=NOW), POLICY.recovery, (), None)
    assert not any(check.met for check in silent)
    calling = LoadSnapshot(observed_at=NOW, models={"sonnet": ModelLoad(sent_tokens_per_second=100)})
    assert recovery_checks("sonnet", calling, POLICY.recovery, (), None)[0].met


def test_demand_that_went_away_is_told_apart_from_recovery_under_load() -> None:
    peak = sum(OFFERED.values())
    assert recovered_how(spike(), peak, POLICY.recovery)[0] == "recovered under load"
    calm = spike(offered_tokens_per_second={name: value / 5 for name, value in OFFERED.items()})
    kind, detail = recovered_how(calm, peak, POLICY.recovery)
    assert kind == "the demand went away"
    assert "20%" in detail


def levers_of(plan: MitigationPlan, landed: bool = True) -> list[Lever]:
    """The plan's levers as they are once they are in force."""
    routing = LeaseRequest(
        lease_id="r:1",
        knob=KnobName.MODEL_ROUTING,
        value=dict(plan.routing),
        holder=Holder(kind="incident", id="i"),
        reason="test",
        duration_ms=1,
    )
    demand = Demand(
        demand_id="i",
        model="sonnet",
        kind=DemandKind.EMERGENCY,
        units=plan.units or 15,
        start=NOW,
        end=NOW + timedelta(hours=1),
        reason="test",
        asked_by="i",
    )
    undo: dict[LeverName, dict[str, object]] = {
        LeverName.MODEL_ROUTING: {"lease": routing},
        LeverName.CAPACITY: {"demand": demand, "landed_at": NOW if landed else None},
    }
    return [
        lever.model_copy(update={"status": LeverStatus.IN_FORCE, **undo.get(lever.name, {})}) for lever in plan.levers
    ]


def test_a_lever_stays_while_the_load_without_it_is_too_high() -> None:
    held = levers_of(planned(spike()))
    at_peak = guard(LeverName.MODEL_ROUTING, held, "sonnet", spike(hit_rate=0.4), POLICY, 15)
    assert not at_peak.may
    assert "must stay" in at_peak.why
    calm = spike(offered_tokens_per_second={name: value / 5 for name, value in OFFERED.items()})
    for lever in LeverName:
        assert guard(lever, held, "sonnet", calm, POLICY, 15).may
    unknown = guard(LeverName.CAPACITY, held, "sonnet", LoadSnapshot(observed_at=NOW), POLICY, 15)
    assert not unknown.may


def test_the_guard_counts_what_really_moved_and_what_really_landed() -> None:
    """Only greeting fitted: faq is still Sonnet's, and units that are on their way carry nothing."""
    offered = {"recommendation": 10_000.0, "faq": 8_000.0, "greeting": 1_000.0, "search": 100.0}
    only_greeting = planned(spike()).model_copy(update={"routing": {"greeting": "haiku"}})
    load = spike(hit_rate=0.15, offered_tokens_per_second=offered)
    answer = guard(LeverName.CACHE_TTL, levers_of(only_greeting, landed=False), "sonnet", load, POLICY, 15)
    assert "15,300 of 15,000" in answer.why
    assert not answer.may
    assert (
        "of 25,000 provisioned" in guard(LeverName.CACHE_TTL, levers_of(only_greeting), "sonnet", load, POLICY, 15).why
    )


def test_a_model_in_trouble_gets_nobody_elses_traffic() -> None:
    sonnet = spike().models["sonnet"]
    throttled = ModelLoad(sent_tokens_per_second=15_000, capacity_tokens_per_second=15_000, throttles=90)
    crowded = spike(models={"sonnet": sonnet, "haiku": throttled})
    assert planned(crowded).routing == {}, "a target that throttles takes nothing"
    lost = spike(models={"sonnet": sonnet, "haiku": ModelLoad(capacity_tokens_per_second=5_000)})
    assert planned(lost).routing == {}, "a target without its units takes nothing"
    own = plan("haiku", crowded, POLICY, RehearsalClock(), NOW, 5)
    assert own.routing == {}, "an incident of haiku moves nothing of sonnet's onto it"


def test_the_size_respects_the_quota_and_any_hit_rate() -> None:
    models = {**POLICY.models, "sonnet": POLICY.models["sonnet"].model_copy(update={"quota_units": 18})}
    result = planned(spike(), POLICY.model_copy(update={"models": models}))
    assert result.units == 18
    assert any("quota (18)" in line for line in result.arithmetic)
    for hit_rate in (0.0, 1.0):
        blind = planned(spike(offered_tokens_per_second={}, hit_rate=hit_rate))
        assert "unknown" in blind.arithmetic[1]
