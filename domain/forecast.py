"""The load to expect on a model at a moment of business time: the policy's table, read."""

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from domain.clock import HOUR
from domain.policy import ForecastPolicy


class NoForecast(ValueError):
    """The policy does not say what to expect on a model; the message names the field."""


def expected(forecast: ForecastPolicy, model: str, at: datetime) -> float:
    """The most tokens/s to expect on `model` within the hour of `at`, on an ordinary day.

    Raises:
        NoForecast: the policy's table does not have the model.
    """
    hours = forecast.tokens_per_second.get(model)
    if hours is None:
        known = ", ".join(sorted(forecast.tokens_per_second)) or "none"
        raise NoForecast(f"forecast.tokens_per_second: nothing for model {model!r}; there is {known}")
    return hours[at.astimezone(ZoneInfo(forecast.zone)).hour]


def peak(forecast: ForecastPolicy, model: str, since: datetime, until: datetime) -> float:
    """The most tokens/s to expect on `model` between `since` and `until`. Raises as `expected`."""
    moments = [since]
    while moments[-1] + HOUR < until:
        moments.append(moments[-1] + HOUR)
    if until > since:
        moments.append(until - timedelta.resolution)
    return max(expected(forecast, model, at) for at in moments)
