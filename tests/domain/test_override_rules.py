"""What an override would do, told before it acts: the course of values, other leases, and scenario 3's budget."""

from datetime import UTC, datetime, timedelta

import pytest

from domain.knobs import Holder, KnobName, KnobValue, KnobValueError, Lease
from domain.load import LoadSnapshot, ModelLoad
from domain.override import Assessment, OverrideKind, assess, has_caught_up, role_to_set
from domain.people import Role
from domain.policy import Policy

NOW = datetime(2026, 11, 24, 20, tzinfo=UTC)
HOUR = timedelta(hours=1)
TTL, ROUTING, WINDOW = KnobName.CACHE_TTL_SECONDS, KnobName.MODEL_ROUTING, KnobName.BATCH_WINDOW_MS
POLICY = Policy.model_validate({"batcher": {"controller": "fixed"}, "knobs": {"batch_window_ms": 150}})
EVENING = LoadSnapshot(
    observed_at=NOW,
    models={"sonnet": ModelLoad(capacity_tokens_per_second=25_500), "haiku": ModelLoad()},
    offered_tokens_per_second={"recommendation": 12_000, "faq": 2_000, "order_status": 3_000},
    hit_rate=0.15,
    p99_ms=2_600,
)


def held(value: KnobValue, ends_in: timedelta, knob: KnobName = TTL, *, pin: bool = False) -> Lease:
    return Lease(
        lease_id="other",
        knob=knob,
        value=value,
        holder=Holder(kind="incident", id="incident-x"),
        reason="throttles",
        acquired_at=NOW,
        expires_at=NOW + ends_in,
        version=1,
        pin=pin,
    )


def asks(
    knob: KnobName, value: KnobValue, *leases: Lease, pin: bool = False, load: LoadSnapshot | None = EVENING
) -> Assessment:
    return assess(knob, value, pin=pin, now=NOW, ends_at=NOW + HOUR, leases=leases, load=load, policy=POLICY)


def figure(assessment: Assessment, name: str) -> tuple[float, float]:
    assert assessment.impact is not None
    [found] = [measure for measure in assessment.impact.measures if measure.name == name]
    return found.before, round(found.after, 3)


def test_the_course_says_which_value_holds_until_when_beside_other_leases() -> None:
    longer = asks(TTL, 120, held(300, 2 * HOUR))
    assert [(step.at - NOW, step.value) for step in longer.course] == [(0 * HOUR, 300), (2 * HOUR, 30)]
    shorter = asks(TTL, 120, held(300, HOUR / 2))
    assert [(step.at - NOW, step.value) for step in shorter.course] == [(0 * HOUR, 300), (HOUR / 2, 120), (HOUR, 30)]
    assert shorter.conflicts == ["held at 300 by incident-x until 2026-11-24 20:30:00 UTC (throttles)"]
    pinned = asks(TTL, 60, held(300, 2 * HOUR), pin=True)
    assert [(step.at - NOW, step.value) for step in pinned.course] == [(0 * HOUR, 60), (HOUR, 300), (2 * HOUR, 30)]
    assert asks(TTL, 60, held(300, HOUR / 2, pin=True)).course[0].value == 300


@pytest.mark.parametrize(("window_ms", "needs"), [(100, False), (150, False), (500, False), (539, False), (540, True)])
def test_a_window_beyond_the_latency_budget_needs_an_approval(window_ms: int, needs: bool) -> None:
    found = asks(WINDOW, window_ms, load=None)
    assert bool(found.approval) is needs
    assert figure(found, "P99 latency by the budget table") == (2610, 2460 + window_ms)
    assert found.impact is not None
    assert any(f"queue wait is taken as the window ({window_ms} ms)" in note for note in found.impact.notes)
    assert any("metrics could not be read" in note for note in found.impact.notes)


def test_the_slo_controller_uses_no_more_of_a_window_than_the_slo_leaves() -> None:
    def assessed(window_ms: int) -> Assessment:
        return assess(WINDOW, window_ms, pin=False, now=NOW, ends_at=NOW + HOUR, leases=(), load=None, policy=Policy())

    assert figure(assessed(150), "P99 latency by the budget table") == (2900, 2610)
    assert figure(assessed(900), "P99 latency by the budget table") == (2900, 2900)
    assert assessed(900).approval == []


def test_the_measured_latency_counts_beside_the_table_and_only_a_change_for_the_worse() -> None:
    slow = EVENING.model_copy(update={"p99_ms": 2_800.0})
    assert asks(WINDOW, 400, load=slow).approval == [
        "P99 latency, measured would be 3,050 ms; the budget is under 3,000 ms"
    ]
    breached = EVENING.model_copy(update={"p99_ms": 9_800.0})
    assert asks(WINDOW, 50, load=breached).approval == []
    assert asks(TTL, 120, load=breached).approval == []


def test_a_ttl_changes_hit_rate_and_calls_and_a_window_how_many_calls_make_a_batch() -> None:
    ttl = asks(TTL, 120)
    assert figure(ttl, "hit rate") == (15, 40)
    assert figure(ttl, "calls to Bedrock") == (100, round(100 * 0.6 / 0.85, 3))
    before, after = figure(ttl, "load on sonnet")
    assert (before, after) == (14_000 * 0.85, 14_000 * 0.6)
    assert figure(asks(WINDOW, 500), "calls to Bedrock") == (100, round(100 * 3.025 / 7.75, 3)), (
        "scenario 3: about -57 %"
    )


def test_routing_that_would_overload_the_target_needs_an_approval() -> None:
    fits = asks(ROUTING, {"faq": "haiku"})
    assert fits.approval == []
    assert figure(fits, "load on haiku") == (3_000 * 0.85, 5_000 * 0.85)
    assert asks(ROUTING, {"recommendation": "haiku"}).approval == [
        "haiku would get 12,750 tokens/s and has 10,000: calls would be throttled"
    ]


def test_other_knobs_have_no_known_impact_and_some_always_need_an_approval() -> None:
    flag = asks(KnobName.FEATURE_FLAG, {"taste_profile": False})
    assert flag.impact is None
    assert flag.approval == ["feature_flag is changed only with an approver's consent"]
    assert role_to_set(TTL, OverrideKind.TIMED) is Role.ENGINEER
    assert role_to_set(TTL, OverrideKind.PIN) is Role.APPROVER


def test_the_baseline_has_caught_up_when_the_override_changes_nothing_any_more() -> None:
    baseline = POLICY.baseline
    assert not has_caught_up(TTL, 120, baseline)
    assert has_caught_up(TTL, 30, baseline)
    assert has_caught_up(ROUTING, {"search": "haiku"}, baseline)
    assert not has_caught_up(ROUTING, {"search": "haiku", "faq": "haiku"}, baseline)


def test_a_value_the_knob_does_not_take_is_refused() -> None:
    with pytest.raises(KnobValueError, match="a whole number of seconds from 1 to 3600"):
        asks(TTL, 0)
