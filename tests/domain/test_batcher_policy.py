"""What a policy may say of the batcher, and what follows from it."""

from typing import Any

import pytest
from pydantic import ValidationError

from domain.alarm_definitions import alarm_definitions, put_metric_alarm
from domain.batching import Strategy
from domain.policy import Policy


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"intents": {"faq": {"model": "sonnet", "strategy": "pack"}}}, "pack is allowed only where personal_data is"),
        ({"batcher": {"controller": "magic"}}, "'fixed', 'table' or 'slo'"),
        ({"batcher": {"table": []}}, "at least 1"),
        ({"batcher": {"table": [{"window_ms": 1}, {"window_ms": 2}]}}, "the last row, and it alone"),
        ({"batcher": {"table": [{"below_tokens_per_second": 5, "window_ms": 1}]}}, "the last row, and it alone"),
        ({"batcher": {"deadline": "PT30S"}}, "deadline 0:00:30 <= max_deadline"),
        ({"batcher": {"slots": 0}}, "greater than or equal to 1"),
    ],
)
def test_what_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Policy.model_validate(given)


def test_the_default_packs_what_is_free_of_personal_data() -> None:
    intents = Policy().intents
    assert {name for name, one in intents.items() if one.strategy is Strategy.PACK} == {"faq", "greeting"}
    assert {name for name, one in intents.items() if one.strategy is Strategy.COALESCE} == {
        "search",
        "product_question",
    }
    assert {name for name, one in intents.items() if not one.personal_data} == {"faq", "greeting"}


@pytest.mark.parametrize(
    ("given", "threshold_ms"),
    [
        ({"batcher": {"controller": "fixed"}, "knobs": {"batch_window_ms": 500}}, 300),
        ({"batcher": {"controller": "table"}}, 500),
        ({}, 1000),
        ({"knobs": {"batch_window_ms": 200}}, 300),
    ],
)
def test_the_alarm_on_the_queue_wait_is_not_on_what_the_controller_does_on_purpose(
    given: dict[str, Any], threshold_ms: float
) -> None:
    found = {one.name: put_metric_alarm(one, "topic") for one in alarm_definitions(Policy.model_validate(given))}
    alarm = found["BatcherQueueWaitAlarm-sonnet"]
    assert (alarm["Threshold"], alarm["ExtendedStatistic"]) == (threshold_ms, "p99")
    assert "Statistic" not in alarm
