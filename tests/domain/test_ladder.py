"""The ladder: what carries the load while units are missing, and when each rung is due."""

from datetime import UTC, datetime, timedelta

import pytest

from domain.knobs import KnobName
from domain.ladder import Ladder, RungKind, Shortage, ladder
from domain.policy import LadderPolicy, Policy

SINCE = datetime(2026, 11, 23, 15, 5, tzinfo=UTC)
ALL = list(RungKind)
FULL = (
    Policy()
    .models["sonnet"]
    .model_copy(
        update={
            "on_demand_tokens_per_second": 1000,
            "inference_profile_id": "apac.sonnet",
            "inference_profile_tokens_per_second": 2000,
            "priority_tier": True,
        }
    )
)


def rungs_after(minutes: int, *, units: int = 10, **changes: object) -> Ladder:
    policy = Policy(models={**Policy().models, "sonnet": FULL.model_copy(update=changes)}, timetable=None)
    now = SINCE + timedelta(minutes=minutes)
    return ladder(Shortage(model="sonnet", units=units, since=SINCE, now=now, policy=policy))


@pytest.mark.parametrize(("minutes", "expected"), [(0, 2), (4, 2), (5, 3), (10, 4), (15, 5), (600, 5)])
def test_each_costly_rung_waits_longer_than_the_one_before(minutes: int, expected: int) -> None:
    found = rungs_after(minutes)
    assert [rung.kind for rung in found.rungs] == ALL[:expected]
    every = Policy().ladder.climb_every
    assert found.next_at == (SINCE + (expected - 1) * every if expected < 5 else None)
    overflow = [target.kind for target in found.overflow]
    assert overflow == ["on_demand", "inference_profile", "priority_tier"][: min(expected, 3)]


def test_what_on_demand_and_profile_carry_needs_nothing_that_users_notice() -> None:
    found = rungs_after(600, units=3)
    assert [rung.kind for rung in found.rungs] == ALL[:2]
    assert found.next_at is None
    assert "1,000 tokens/s of on-demand quota for 3,000 that are missing" in found.rungs[0].text


def test_what_the_policy_does_not_have_is_left_out() -> None:
    found = rungs_after(5, inference_profile_id=None, priority_tier=False)
    assert [rung.kind for rung in found.rungs] == [RungKind.ON_DEMAND, RungKind.SHORTER_ANSWERS]


def test_knobs_name_the_intents_of_the_model_and_features_need_consent() -> None:
    shorter, off = rungs_after(600).rungs[-2:]
    intents = ["recommendation", "product_question", "faq", "greeting"]
    assert (shorter.knob, shorter.value) == (KnobName.MAX_OUTPUT_TOKENS, dict.fromkeys(intents, 512))
    assert (off.knob, off.value) == (KnobName.FEATURE_FLAG, {"taste_profile": False})
    assert [shorter.consent, off.consent] == [False, True]


def test_a_feature_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"ladder.features_off: there is no feature 'x'; there are \['taste_profile'\]"
    ):
        Policy(ladder=LadderPolicy(features_off=("x",)))
