"""What the simulated account is like, apart from what moto keeps: settings, quotas, faults, the audit trail.

It travels in the WSGI environment of every request, so that moto's response classes find it without a global.
"""

import math
import random
import threading
from collections.abc import Collection
from datetime import timedelta

from pydantic import BaseModel, ConfigDict, Field

from domain.clock import ScaledDuration, compress
from domain.policy import Policy
from simulator.aws.faults import Faults
from simulator.aws.trail import Trail

ACCOUNT_ID = "123456789012"
"""moto's account for every access key that IAM did not make."""
ENVIRON_KEY = "simulator.aws.world"
_P99_DEVIATIONS = 2.326


def _quotas() -> dict[str, int]:
    return {model.provisioned_model_id: model.ceiling_units for model in Policy().models.values()}


class ConverseModel(BaseModel):
    """How one model answers Converse. Real time: nothing here is compressed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_id: str
    """The base model's."""
    median_ms: float = Field(gt=0)
    p99_ms: float = Field(gt=0)
    """Latency is lognormal with this median and P99, ..."""
    growth_per_question: float = Field(default=0.03, ge=0)
    """... times 1 and this for each packed question after the first."""
    answer_tokens: int = Field(default=60, ge=1)
    """Output tokens of an answer, unless its text has more or the caller allows less."""
    tokens_per_second_per_unit: float = Field(gt=0)
    on_demand_tokens_per_second: float = Field(ge=0)
    lost_share: float = Field(default=0, ge=0, le=1)
    """Of packed questions, left out of the answer, ..."""
    lost_from: int = Field(default=1, ge=1)
    """... where so many are packed."""
    retry_after_seconds: int | None = Field(default=None, ge=1)
    """Sent with a throttle as `Retry-After`; None: without, as Bedrock's are (AWS documents none)."""

    def draw_latency_ms(self, questions: int, draws: random.Random) -> float:
        """Of one call."""
        spread = math.log(self.p99_ms / self.median_ms) / _P99_DEVIATIONS
        latency_ms = self.median_ms * math.exp(draws.gauss(0, spread))
        return latency_ms * (1 + self.growth_per_question * (questions - 1))

    def draw_lost(self, names: Collection[str], draws: random.Random) -> set[str]:
        """Which of the packed questions an answer leaves out."""
        if len(names) < self.lost_from:
            return set()
        return {name for name in names if draws.random() < self.lost_share}


def converse_models() -> dict[str, ConverseModel]:
    """The models of the policy's defaults, by their short names."""
    latency = {"sonnet": (1500, 2100), "haiku": (250, 350)}  # P99: scenario 3; medians are assumed
    return {
        name: ConverseModel(
            model_id=model.model_id,
            median_ms=latency[name][0],
            p99_ms=latency[name][1],
            tokens_per_second_per_unit=model.tokens_per_second_per_unit,
            on_demand_tokens_per_second=model.on_demand_tokens_per_second,
        )
        for name, model in Policy().models.items()
    }


class AwsConfig(BaseModel):
    """The simulated account. Durations marked `Scaled` are business time and are divided by `speed`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free one."""
    region: str = "ap-northeast-1"
    speed: float = Field(default=60, ge=1, le=3600)
    """Business seconds in one real second. Metric and alarm periods come already compressed by the caller."""
    model_unit_quotas: dict[str, int] = Field(default_factory=_quotas)
    """Model units granted, by the model id that provisioned throughput is bought for. No other models exist."""
    provisioning_lag: ScaledDuration = timedelta(minutes=15)
    """Creation to InService (S4 observes 10 to 15 min)."""
    task_start: ScaledDuration = timedelta(minutes=1)
    """How long a batch of ECS tasks takes from placement to running."""
    tasks_per_batch: int = Field(default=10, ge=1)
    converse: dict[str, ConverseModel] = Field(default_factory=converse_models)
    """The models that answer Converse, by a short name."""
    alarm_tick: timedelta = timedelta(milliseconds=250)
    """How often alarms are evaluated, in real time."""
    metric_retention: timedelta = timedelta(hours=3)
    """Real time after which samples are forgotten."""
    max_samples_per_series: int = Field(default=100_000, ge=1)
    principal_arn: str = f"arn:aws:sts::{ACCOUNT_ID}:assumed-role/mangaassist-runbooks/worker"
    """Who the audit trail and access-denied messages say the caller is."""
    seed: int = 1
    """Of the ids that AWS would draw."""


class CapacitySettings(BaseModel):
    """Body of `POST /_simulator/bedrock`: what is given is changed."""

    model_config = ConfigDict(extra="forbid")

    quotas: dict[str, int] | None = None
    """By model id; others stay."""
    provisioning_lag_seconds: float | None = Field(default=None, ge=0)
    """Real seconds, for models created from now on."""


class World:
    """Mutable state beside moto's own. Emptied with moto's reset."""

    def __init__(self, config: AwsConfig) -> None:
        self.settings = compress(config, config.speed)
        """The config with its business durations divided by its speed."""
        self.faults = Faults()
        self.trail = Trail(config.region, config.principal_arn)
        self.lock = threading.RLock()
        """Held while provisioned throughput is counted and changed."""
        self.resetting = threading.Lock()
        """Held while everything is emptied, and while alarms are evaluated."""
        self.stopping = threading.Event()
        self.reset()

    def reset(self) -> None:
        """As at the start."""
        self.faults.clear()
        self.trail.clear()
        self.quotas = dict(self.settings.model_unit_quotas)
        self.provisioning_lag = self.settings.provisioning_lag
        self.ids = random.Random(self.settings.seed)
        self.converse = dict(self.settings.converse)
        self.converse_draws = random.Random(self.settings.seed)
        self.converse_levels: dict[str, tuple[float, float]] = {}
        """Tokens that a target may take at once, as of a moment, by what calls name."""

    def change_converse(self, name: str, changes: dict[str, object]) -> None:
        """Change how a model answers, by its short name."""
        with self.lock:
            known = self.converse.get(name)
            if known is None:
                raise ValueError(f"there is no model {name!r}; there are {sorted(self.converse)}")
            self.converse[name] = ConverseModel.model_validate(known.model_dump() | changes)
            self.converse_levels.clear()

    def change_capacity(self, settings: CapacitySettings) -> None:
        """Grant or withdraw quota, change the lag."""
        with self.lock:
            self.quotas |= settings.quotas or {}
            if settings.provisioning_lag_seconds is not None:
                self.provisioning_lag = timedelta(seconds=settings.provisioning_lag_seconds)
