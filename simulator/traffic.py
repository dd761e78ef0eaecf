"""What users ask for: a seeded day of offered load in tokens/s per intent, and spikes on top of it.

Everything is a pure function of (seed, business time): equal seeds give equal days, whenever and however often they
are asked. Figures are of the tokens that reach Bedrock at the configured hit rate, as the runbooks count them
(scenario 1: 7,000 on a Monday at 00:00 and five times that; scenario 2: 1,500 at night, 5,000 by 08:00; scenario 4:
12,500 in the evening); the offered load is that divided by the share of requests the cache leaves.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

TOKYO = ZoneInfo("Asia/Tokyo")

_DAY = (
    (0.0, 7000.0),
    (0.75, 7000.0),
    (2.0, 1900.0),
    (3.0, 1400.0),
    (5.0, 1400.0),
    (6.0, 1900.0),
    (8.0, 5000.0),
    (12.0, 7000.0),
    (17.0, 8500.0),
    (20.0, 12500.0),
    (22.0, 11000.0),
    (23.5, 7000.0),
    (24.0, 7000.0),
)
"""Hour of the day in Tokyo and tokens/s sent at the configured hit rate; straight lines between."""

MIX: dict[str, float] = {
    "recommendation": 17.5 / 35,
    "product_question": 10 / 35,
    "faq": 1.5 / 35,
    "greeting": 1 / 35,
    "order_status": 3 / 35,
    "search": 2 / 35,
}
"""Each intent's share of the tokens."""

_NOISE_PERIODS_SECONDS = (97.0, 431.0, 2503.0)
_NOISE_AMPLITUDE = 0.004
"""Of each period's wave: together an intent strays from its curve by at most 1.2 %."""

_RISE = timedelta(minutes=3)
_DECAY = timedelta(minutes=10)
_AFTERGLOW = timedelta(hours=2)
_AFTERGLOW_SHARE = 0.05
"""Share of the rise that is left after the decay: a fivefold spike leaves 1.2 times the usual load."""


@dataclass(frozen=True, slots=True)
class Spike:
    """More traffic for a while: up within 3 min (steepest at first), held, down within 10 min, then an afterglow."""

    starts_at: datetime
    multiplier: float
    lasts: timedelta
    """From the start to the begin of the decay."""

    def factor(self, at: datetime) -> float:
        """What the usual load is multiplied by at `at`."""
        age = at - self.starts_at
        if age < timedelta(0):
            return 1
        rise = (self.multiplier - 1) * (1 - (1 - min(1.0, min(age, self.lasts) / _RISE)) ** 2)
        if age <= self.lasts:
            return 1 + rise
        faded = age - self.lasts
        if faded < _DECAY:
            return 1 + rise * (1 - (1 - _AFTERGLOW_SHARE) * (faded / _DECAY))
        return 1 + rise * _AFTERGLOW_SHARE * max(0.0, 1 - (faded - _DECAY) / _AFTERGLOW)

    def stopped(self, at: datetime) -> "Spike":
        """The spike whose decay begins at `at`, unless it did already."""
        return replace(self, lasts=max(timedelta(0), min(self.lasts, at - self.starts_at)))


class Traffic:
    """Offered load at any moment of business time."""

    def __init__(
        self,
        seed: int,
        configured_hit_rate: float,
        spikes: Iterable[Spike] = (),
        mix: Mapping[str, float] = MIX,
        usual_tokens_per_second: float | None = None,
    ) -> None:
        """`configured_hit_rate`: share of requests the cache answers at the configured TTL.

        `usual_tokens_per_second`: sent at any hour, instead of the day's curve.
        """
        self.spikes = tuple(spikes)
        self._usual = usual_tokens_per_second
        self._shares = {intent: share / (1 - configured_hit_rate) for intent, share in mix.items()}
        chance = random.Random(seed)
        self._phases = {intent: [chance.uniform(0, math.tau) for _ in _NOISE_PERIODS_SECONDS] for intent in mix}

    def offered(self, at: datetime) -> dict[str, float]:
        """Tokens/s that users ask for, by intent, before the cache, at business time `at`."""
        usual = (_usual(at) if self._usual is None else self._usual) * max(
            (spike.factor(at) for spike in self.spikes), default=1
        )
        return {intent: usual * share * (1 + self._noise(intent, at)) for intent, share in self._shares.items()}

    def _noise(self, intent: str, at: datetime) -> float:
        seconds = at.timestamp()
        waves = zip(_NOISE_PERIODS_SECONDS, self._phases[intent], strict=True)
        return _NOISE_AMPLITUDE * sum(math.sin(math.tau * seconds / period + phase) for period, phase in waves)


def _usual(at: datetime) -> float:
    local = at.astimezone(TOKYO)
    hour = local.hour + local.minute / 60 + local.second / 3600 + local.microsecond / 3.6e9
    i = bisect_right(_DAY, (hour, math.inf)) - 1
    (hour0, load0), (hour1, load1) = _DAY[i], _DAY[i + 1]
    return load0 + (load1 - load0) * (hour - hour0) / (hour1 - hour0)


def monday_release(now: datetime) -> datetime:
    """The start (00:00 in Tokyo) of the Monday release nearest to `now`: the last if under half a week old."""
    local = now.astimezone(TOKYO) + timedelta(days=3, hours=12)
    monday = local.date() - timedelta(days=local.weekday())
    return datetime(monday.year, monday.month, monday.day, tzinfo=TOKYO)
