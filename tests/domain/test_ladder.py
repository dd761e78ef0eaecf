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


def rungs_after(minutes: int, *, units: int = 10, sent: float | None = None, **changes: object) -> Ladder:
    """`minutes` after the first look, at which the load was what it is."""
    policy = Policy(timetable=None, models={**Policy().models, "sonnet": FULL.model_copy(update=changes)})

    def shortage(since: datetime | None, now: datetime) -> Shortage:
        return Shortage(
            model="sonnet",
            units=units,
            units_in_service=5,
            sent_tokens_per_second=sent,
            overloaded_since=since,
            now=now,
            policy=policy,
        )

    first = ladder(shortage(None, SINCE))
    return ladder(shortage(first.overloaded_since, SINCE + timedelta(minutes=minutes)))


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
    assert "1,000 tokens/s of quota for 3,000 that the missing units would carry" in found.rungs[0].text


def test_a_load_that_the_quotas_carry_is_looked_at_again_and_an_overload_lasts_as_long_as_the_shortage() -> None:
    found = rungs_after(600, sent=8000)
    assert [rung.kind for rung in found.rungs] == ALL[:2]
    assert found.next_at == SINCE + timedelta(minutes=600) + Policy().ladder.climb_every
    assert "for 3,000 beyond the units in service" in found.rungs[0].text
    over = rungs_after(5, sent=8001)
    assert [rung.kind for rung in over.rungs] == ALL[:3]
    now = SINCE + timedelta(minutes=15)
    policy = Policy(timetable=None, models={**Policy().models, "sonnet": FULL})
    calm = Shortage(
        model="sonnet",
        units=1,
        units_in_service=5,
        sent_tokens_per_second=0,
        overloaded_since=over.overloaded_since,
        now=now,
        policy=policy,
    )
    assert [rung.kind for rung in ladder(calm).rungs] == ALL


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
