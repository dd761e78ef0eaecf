"""Every knob by its declaration: what it takes, what it refuses, how its leases merge, and that pins outrank them.

A new knob needs one case in `CASES`.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from domain.knobs import (
    Baseline,
    Holder,
    KnobName,
    KnobValueError,
    Lease,
    LeaseRequest,
    baseline_value,
    effective_value,
    validate_value,
)
from domain.policy import Policy

BASELINE = Policy().baseline
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Case:
    """One knob: values that leases ask for together, what they make, and values that are refused with what is said."""

    asked: tuple[Any, ...]
    merged: Any
    """Of a knob by intent or feature, the names that differ from the baseline."""
    refused: dict[str, Any]
    """Part of the message, to the value."""


CASES: dict[KnobName, Case] = {
    KnobName.CACHE_TTL_SECONDS: Case(
        asked=(120, 90, 1, 3600),
        merged=3600,
        refused={
            "0 is not allowed; a whole number of seconds from 1 to 3600 is": 0,
            "-1 is": -1,
            "1000000000000 is": 10**12,
            "'two minutes' is": "two minutes",
            "True is": True,
            "1.5 is": 1.5,
        },
    ),
    KnobName.MODEL_ROUTING: Case(
        asked=({"faq": "haiku"}, {"faq": "sonnet", "order_status": "sonnet"}),
        merged={"faq": "haiku", "order_status": "sonnet"},
        refused={
            "there is no intent 'weather'; there are faq, greeting, order_status,": {"weather": "haiku"},
            "'opus' is not allowed for faq; one of the models haiku, sonnet is": {"faq": "opus"},
            "{} is not allowed; a map that gives at least one intent its value is": {},
            "'haiku' is not allowed; a map": "haiku",
        },
    ),
    KnobName.BATCH_WINDOW_MS: Case(
        asked=(500, 150, 300),
        merged=150,
        refused={"-1 is not allowed; a whole number of milliseconds from 0 to 1000 is": -1, "1001 is": 1001},
    ),
    KnobName.REQUEST_COALESCING: Case(
        asked=(False, True),
        merged=True,
        refused={"'yes' is not allowed; true or false is": "yes", "1 is not allowed": 1},
    ),
    KnobName.INVOCATIONS_PER_SECOND_PER_TASK: Case(
        asked=(20, 8),
        merged=8,
        refused={"0 is not allowed; a number of calls a second from 0.01 to 1000 is": 0, "None is": None},
    ),
    KnobName.FEATURE_FLAG: Case(
        asked=({"taste_profile": True}, {"taste_profile": False}),
        merged={"taste_profile": False},
        refused={
            "there is no feature 'karaoke'; there are taste_profile": {"karaoke": False},
            "0 is not allowed for taste_profile; true or false is": {"taste_profile": 0},
        },
    ),
    KnobName.MAX_OUTPUT_TOKENS: Case(
        asked=({"faq": 512, "search": 800}, {"faq": 800, "search": 2000}),
        merged={"faq": 512, "search": 800},
        refused={
            "4097 is not allowed for faq; a whole number of tokens from 1 to 4096 is": {"faq": 4097},
            "there is no intent 'weather'": {"weather": 800},
            "800 is not allowed; a map": 800,
        },
    ),
    KnobName.HISTORY_TRUNCATION: Case(
        asked=({"recommendation": {"recent": 20, "top": 10}}, {"recommendation": {"recent": 30, "top": 5}}),
        merged={"recommendation": {"recent": 20, "top": 5}},
        refused={
            "{'recent': 20} is not allowed for faq; recent and top, each a whole number of titles from 0 to 1000, is": {
                "faq": {"recent": 20}
            },
            "-1": {"faq": {"recent": -1, "top": 0}},
            "None is not allowed for faq": {"faq": None},
        },
    ),
}


def lease(knob: KnobName, value: Any, lease_id: str = "a", *, pin: bool = False, after_s: int = 0) -> Lease:
    return Lease(
        lease_id=lease_id,
        knob=knob,
        value=value,
        holder=Holder(kind="person", id="mika"),
        reason="any",
        acquired_at=NOW + timedelta(seconds=after_s),
        expires_at=NOW + timedelta(hours=1),
        version=1,
        pin=pin,
    )


def in_full(knob: KnobName, value: Any) -> Any:
    """`value` with the configured values of the names it leaves out."""
    configured = baseline_value(knob, BASELINE)
    return {**configured, **value} if knob.spec.by and isinstance(configured, dict) else value


def test_every_knob_has_a_case() -> None:
    assert set(CASES) == set(KnobName)


@pytest.mark.parametrize("knob", KnobName)
def test_what_a_knob_takes_and_how_its_leases_merge(knob: KnobName) -> None:
    case, configured = CASES[knob], baseline_value(knob, BASELINE)
    assert effective_value(knob, [], BASELINE) == configured
    for value in case.asked:
        assert validate_value(knob, value, BASELINE) == value
        request = LeaseRequest(
            lease_id="a", knob=knob, value=value, holder=Holder(kind="person", id="mika"), reason="r", duration_ms=1
        )
        again = LeaseRequest.model_validate_json(request.model_dump_json())
        assert again == request
        assert type(again.value) is type(value)
        assert effective_value(knob, [lease(knob, value)], BASELINE) == in_full(knob, value), "alone it holds"
    asked = [lease(knob, value) for value in case.asked]
    assert effective_value(knob, asked, BASELINE) == in_full(knob, case.merged)
    assert effective_value(knob, asked[::-1], BASELINE) == in_full(knob, case.merged)
    others = [lease(other, value) for other in KnobName if other is not knob for value in CASES[other].asked]
    assert effective_value(knob, others, BASELINE) == configured


@pytest.mark.parametrize(
    ("knob", "said", "value"), [(knob, *one) for knob, case in CASES.items() for one in case.refused.items()]
)
def test_what_a_knob_refuses_and_says(knob: KnobName, said: str, value: Any) -> None:
    with pytest.raises(KnobValueError) as caught:
        validate_value(knob, value, BASELINE)
    assert str(caught.value).startswith(f"{knob}: ")
    assert said in str(caught.value)
    slipped_in = lease(knob, True).model_copy(update={"value": value})
    assert effective_value(knob, [slipped_in], BASELINE) == baseline_value(knob, BASELINE), "it counts for nothing"


def test_a_long_value_is_shown_in_part() -> None:
    with pytest.raises(KnobValueError, match=r"x\.\.\. is not allowed") as caught:
        validate_value(KnobName.CACHE_TTL_SECONDS, "x" * 10_000, BASELINE)
    assert len(str(caught.value)) < 300


@given(st.data())
def test_the_merge_does_not_depend_on_order_or_repetition(data: st.DataObject) -> None:
    knob = data.draw(st.sampled_from(KnobName))
    values = data.draw(st.lists(st.sampled_from(CASES[knob].asked), min_size=1))
    pins = data.draw(st.lists(st.tuples(st.sampled_from(CASES[knob].asked), st.integers(0, 3)), max_size=3))
    leases = [lease(knob, value, f"l{n}") for n, value in enumerate(values)]
    leases += [lease(knob, value, f"p{n}", pin=True, after_s=at) for n, (value, at) in enumerate(pins)]
    expected = effective_value(knob, leases, BASELINE)
    shuffled = data.draw(st.permutations(leases))
    assert effective_value(knob, [*shuffled, *shuffled], BASELINE) == expected


def test_the_newest_pin_outranks_the_merge_name_by_name() -> None:
    ttl, routing = KnobName.CACHE_TTL_SECONDS, KnobName.MODEL_ROUTING
    merged = [lease(ttl, 120, "a"), lease(ttl, 300, "b", after_s=9)]
    older, newer = lease(ttl, 30, "p", pin=True, after_s=1), lease(ttl, 60, "q", pin=True, after_s=2)
    assert effective_value(ttl, [*merged, older], BASELINE) == 30
    assert effective_value(ttl, [newer, *merged, older], BASELINE) == 60
    kept = lease(routing, {"faq": "sonnet"}, "p", pin=True)
    down = lease(routing, {"faq": "haiku", "greeting": "haiku"})
    value = effective_value(routing, [down, kept], BASELINE)
    assert value == {**BASELINE.model_routing, "greeting": "haiku"}, "other intents still merge"


def test_recorded_payloads_of_two_knobs_still_read() -> None:
    recorded = '{"cache_ttl_seconds":30,"model_routing":{"faq":"sonnet"},"model_ranks":{"haiku":1,"sonnet":2}}'
    baseline = Baseline.model_validate_json(recorded)
    assert baseline_value(KnobName.BATCH_WINDOW_MS, baseline) == 1000
    assert baseline_value(KnobName.MAX_OUTPUT_TOKENS, baseline) == {"faq": 1024}
    assert Baseline.model_validate_json(BASELINE.model_dump_json()) == BASELINE
    old = (
        '{"lease_id":"a","knob":"model_routing","value":{"faq":"haiku"},"holder":{"kind":"incident","id":"i"},'
        '"reason":"r","acquired_at":"2026-11-24T12:00:00Z","expires_at":"2026-11-24T13:00:00Z","version":3}'
    )
    assert Lease.model_validate_json(old).pin is False
    with pytest.raises(ValidationError):
        Lease.model_validate_json(old.replace("model_routing", "volume"))


def test_the_policy_configures_every_knob_and_refuses_what_one_does_not_take() -> None:
    policy = Policy.model_validate(
        {
            "knobs": {
                "batch_window_ms": 300,
                "feature_flag": {"taste_profile": True, "voice": False},
                "max_output_tokens": {"faq": 256},
                "history_truncation": {"recent": 20, "top": 10},
            }
        }
    )
    baseline = Policy.model_validate_json(policy.model_dump_json()).baseline
    assert baseline_value(KnobName.BATCH_WINDOW_MS, baseline) == 300
    assert baseline_value(KnobName.REQUEST_COALESCING, baseline) is False
    assert validate_value(KnobName.FEATURE_FLAG, {"voice": True}, baseline) == {"voice": True}
    tokens = baseline_value(KnobName.MAX_OUTPUT_TOKENS, baseline)
    assert isinstance(tokens, dict)
    assert (tokens["faq"], tokens["search"]) == (256, 1024)
    assert set(tokens) == set(policy.intents)
    truncation = baseline_value(KnobName.HISTORY_TRUNCATION, baseline)
    assert isinstance(truncation, dict)
    assert truncation["faq"] == {"recent": 20, "top": 10}
    for wrong, said in [
        ({"batch_window_ms": 5000}, "batch_window_ms: 5000 is not allowed; a whole number of milliseconds"),
        ({"max_output_tokens": {"weather": 5}}, "no intent 'weather'"),
        ({"cache_ttl_seconds": 60}, "has a field of its own"),
        ({"feature_flag": True}, "at least one feature"),
        ({"volume": 11}, "volume"),
    ]:
        with pytest.raises(ValidationError, match=said):
            Policy.model_validate({"knobs": wrong})
    assert Policy.model_validate({"knobs": {"feature_flag": {}}}).baseline.others["feature_flag"] == {}
