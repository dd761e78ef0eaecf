"""The two clocks, and which durations a rehearsal compresses."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from domain.clock import RehearsalClock, compress
from domain.policy import LeasePolicy, ModelPolicy, Policy

START = datetime(2026, 11, 24, 12, tzinfo=UTC)


def test_the_default_clock_is_the_real_one() -> None:
    assert RehearsalClock().business(START) == START


@given(st.integers(1, 3600), st.timedeltas(timedelta(0), timedelta(days=30)))
def test_business_time_is_a_line_and_its_own_inverse(speed: int, after: timedelta) -> None:
    monday = datetime(2026, 11, 30, tzinfo=ZoneInfo("Asia/Tokyo"))
    clock = RehearsalClock(real_start=START, business_start=monday, speed=speed)
    real = START + after
    assert clock.business(real) - monday == after * speed
    assert abs(clock.real(clock.business(real)) - real) < timedelta(milliseconds=1)


def test_a_rehearsal_compresses_business_durations_at_any_depth_and_no_technical_ones() -> None:
    policy, fast = Policy(), compress(Policy(), 60)
    assert fast.recovery.hold == timedelta(seconds=5)
    assert fast.leases.model_routing == timedelta(minutes=2)
    assert fast.calendar.event_types["final_chapter"].lead_time == timedelta(minutes=4)
    assert fast.metrics.period == timedelta(seconds=1)
    assert fast.evidence.budget == policy.evidence.budget == timedelta(seconds=2)
    assert fast.intake.duplicate_count_interval == policy.intake.duplicate_count_interval
    assert compress(policy, 1) is policy


def test_what_cannot_hold_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValidationError, match="lapse in the wrong order"):
        LeasePolicy(model_routing=timedelta(hours=3))
    with pytest.raises(ValidationError, match="floor_units 5"):
        ModelPolicy.model_validate({**Policy().models["sonnet"].model_dump(), "floor_units": 5, "baseline_units": 1})
    with pytest.raises(ValidationError, match="no model 'opus'"):
        Policy.model_validate({"intents": {"faq": {"model": "opus"}}})
    with pytest.raises(ValidationError, match="extra"):
        Policy.model_validate({"recovery": {"max_p99": 1}}, extra="forbid")
