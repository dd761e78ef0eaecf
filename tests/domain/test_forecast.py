"""The load to expect, by the policy's table."""

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from domain.forecast import NoForecast, expected, peak
from domain.policy import ForecastPolicy

FORECAST = ForecastPolicy()
MIDNIGHT = datetime(2026, 11, 29, 15, tzinfo=UTC)
"""Monday 2026-11-30 00:00 in Tokyo."""


@pytest.mark.parametrize(
    ("hours", "sonnet"), [(0, 7000), (0.99, 7000), (3, 1500), (7.5, 5000), (20, 12500), (24, 7000), (-0.01, 8400)]
)
def test_an_hour_is_one_of_the_zone(hours: float, sonnet: float) -> None:
    assert expected(FORECAST, "sonnet", MIDNIGHT + timedelta(hours=hours)) == sonnet


def test_the_peak_is_that_of_every_hour_touched_and_no_other() -> None:
    half_past_two = MIDNIGHT + timedelta(hours=2.5)
    assert peak(FORECAST, "sonnet", MIDNIGHT, half_past_two) == 7000
    assert peak(FORECAST, "sonnet", half_past_two, MIDNIGHT + timedelta(hours=5)) == 1900
    assert peak(FORECAST, "sonnet", half_past_two, MIDNIGHT + timedelta(hours=5, seconds=1)) == 1900
    assert peak(FORECAST, "sonnet", half_past_two, half_past_two) == 1900
    assert peak(FORECAST, "sonnet", half_past_two, half_past_two + timedelta(days=2)) == 12500


def test_a_model_without_a_forecast_is_an_error_that_names_the_field() -> None:
    with pytest.raises(NoForecast, match=r"forecast.tokens_per_second: nothing for model 'opus'; there is haiku, son"):
        expected(FORECAST, "opus", MIDNIGHT)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zone": "Asia/Tokio"}, "did you mean Asia/Tokyo"),
        ({"zone": "../etc"}, "there is no time zone"),
        ({"tokens_per_second": {"sonnet": [1] * 23}}, "at least 24"),
        ({"tokens_per_second": {"sonnet": [-1] * 24}}, "greater than or equal to 0"),
    ],
)
def test_a_table_that_cannot_be_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ForecastPolicy.model_validate(given)
