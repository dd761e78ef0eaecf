"""The load on Bedrock at one moment, and the arithmetic every plan, guard and check shares.

Two figures must not be confused (design check 19): *offered* load is what users ask for, before cache, routing and
retries; *sent* load is what reached a model, retries included, and under throttling it is not demand.
"""

import math
from collections.abc import Mapping

from pydantic import AwareDatetime, BaseModel, ConfigDict

from domain.policy import ModelPolicy


class ModelLoad(BaseModel):
    """One model's side of the load. None: the metric had no data."""

    model_config = ConfigDict(frozen=True)

    sent_tokens_per_second: float | None = None
    capacity_tokens_per_second: float | None = None
    throttles: float | None = None
    """Throttled calls in the newest period."""
    throttle_shares: tuple[float, ...] = ()
    """Throttles / (throttles + invocations) of the latest periods, newest last; only periods with calls."""
    queue_wait_ms: float | None = None
    """P99 of the wait in the batcher."""


class LoadSnapshot(BaseModel):
    """Everything one GetMetricData call says about load and service, as of `observed_at`."""

    model_config = ConfigDict(frozen=True)

    observed_at: AwareDatetime
    """End of the newest period with data."""
    models: dict[str, ModelLoad] = {}
    offered_tokens_per_second: dict[str, float] = {}
    """By intent."""
    hit_rate: float | None = None
    """Share of requests answered from the cache, 0 to 1."""
    queue_depth: float | None = None
    p99_ms: float | None = None
    p99_before_ms: float | None = None
    """P99 at the start of the lookback, if nothing was throttled then: the value before an incident that is young."""
    fallback_percent: float | None = None
    tasks_running: float | None = None
    calls_per_second_per_task: float | None = None
    """Calls to Bedrock, of all models, that one ECS task makes."""

    def model(self, name: str) -> ModelLoad:
        """The model's load; all unknown when it was not read."""
        return self.models.get(name) or ModelLoad()


def load_on(model: str, offered: Mapping[str, float], routing: Mapping[str, str], hit_rate: float) -> float:
    """Tokens/s that reach `model` when `routing` holds and the cache answers `hit_rate` of requests."""
    return sum(tokens for intent, tokens in offered.items() if routing.get(intent) == model) * (1 - hit_rate)


def units_for(tokens_per_second: float, model: ModelPolicy, target_utilisation: float) -> int:
    """Provisioned units for a load: ceil(tokens/s / tokens/s per unit / target utilisation) (design idea 2)."""
    return math.ceil(round(tokens_per_second / model.tokens_per_second_per_unit / target_utilisation, 9))


def remaining_tokens_per_second(units: int, model: ModelPolicy) -> float:
    """What may be relied on with `units` in service; without any, the on-demand quota."""
    return units * model.tokens_per_second_per_unit if units else model.on_demand_tokens_per_second


def total_offered(snapshot: LoadSnapshot) -> float:
    """All intents together, tokens/s."""
    return sum(snapshot.offered_tokens_per_second.values())
