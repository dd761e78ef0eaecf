"""Every number of the runbooks, in one model: defaults here, overrides in one YAML file under version control.

Durations marked `ScaledDuration` belong to the business and are divided by a rehearsal's speed when the policy is
loaded; the others are technical. Sources are named per section (S1 to S5 are the scenarios of the runbooks).
"""

import math
import re
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from domain.batching import Strategy
from domain.clock import ScaledDuration, ZoneName
from domain.knobs import (
    Baseline,
    CacheTtlSeconds,
    KnobName,
    KnobValue,
    baseline_value,
    check_configured,
    declared_baselines,
)
from domain.metrics import CATALOGUE, MetricName

Share = Annotated[float, Field(ge=0, le=1)]
HEARTBEAT_ALARM = "RunbooksHeartbeatMissing"
MAX_LEASE = timedelta(days=7)
"""As long as the ledger grants one (`LeaseRequest.duration_ms`)."""


_RECORDED = {"recorded": True}


class Section(BaseModel):
    """A part of the policy: immutable. A file's unknown names are refused where it is read.

    What an earlier version recorded is taken as it is (`RecordedPolicy`): workflows in flight survive an upgrade that
    drops a field, or whose defaults contradict what was recorded.
    """

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="after")
    def _checked(self, info: ValidationInfo) -> Self:
        if info.context is not _RECORDED:
            self.check()
        return self

    def check(self) -> None:
        """Raises ValueError where fields contradict each other."""


class ModelPolicy(Section):
    """What a model gives and costs."""

    model_id: str
    """The base model's id: on-demand calls go to it."""
    provisioned_model_id: str
    """The context variant that provisioned throughput is created for (AWS: a model id with `:28k`, `:48k`)."""
    provisioned_regions: tuple[str, ...] | None = None
    """AWS regions that sell provisioned throughput for it (AWS: "Supported regions and models for Provisioned
    Throughput"); None: not known here, and AWS refuses by itself."""
    rank: int
    """Quality order: lower is smaller."""
    tokens_per_second_per_unit: float = Field(gt=0)
    baseline_units: int = Field(ge=0)
    """Units in service when nothing else is demanded, where the timetable does not name the model."""
    floor_units: int = Field(ge=0)
    ceiling_units: int = Field(ge=0)
    quota_units: int | None = Field(default=None, ge=0)
    """Model units that AWS Support has granted the account for this model; None: unknown, AWS refuses by itself."""
    on_demand_tokens_per_second: float = Field(ge=0)
    """The account's on-demand quota. A cushion: never counted when units are sized."""
    inference_profile_id: str | None = None
    """A cross-region inference profile of the model; calls overflow to it while units are missing."""
    inference_profile_tokens_per_second: float = Field(default=0, ge=0)
    """The account's quota for it, its own beside on-demand's (AWS: cross-region inference)."""
    priority_tier: bool = False
    """Calls may ask for the priority tier while units are missing; it costs more (AWS: service tiers, by model)."""
    usd_per_unit_hour: float | None = Field(default=None, gt=0)
    """Without a price, cost caps are counted in unit-hours."""
    usd_per_million_tokens: float | None = Field(default=None, gt=0)
    """On demand, input and output together; the breakeven is reckoned with it."""

    @property
    def most_units(self) -> int:
        """Ceiling or quota, whichever is lower."""
        return self.ceiling_units if self.quota_units is None else min(self.ceiling_units, self.quota_units)

    def sold_in(self, region: str) -> bool:
        """Whether AWS sells provisioned throughput for it there, as far as is known."""
        return self.provisioned_regions is None or region in self.provisioned_regions

    def clamped(self, units: int) -> int:
        """`units` within floor, ceiling and quota."""
        return min(max(units, self.floor_units), self.most_units)

    def check(self) -> None:
        """See `Section`."""
        if not self.floor_units <= self.baseline_units <= self.ceiling_units:
            raise ValueError(
                f"floor_units {self.floor_units} <= baseline_units {self.baseline_units} "
                f"<= ceiling_units {self.ceiling_units} does not hold"
            )


class IntentPolicy(Section):
    """One intent of the chatbot."""

    model: str
    """The model that answers it."""
    downgrade_to: str | None = None
    """The smaller model that may answer it during a mitigation (S1: faq and greeting), and while its own refuses."""
    strategy: Strategy = Strategy.PASS
    """How its requests share calls."""
    personal_data: bool = True
    """Whether prompts or answers hold a user's data: then nothing is packed and nothing is cached."""

    @model_validator(mode="after")
    def _keeps_users_apart(self) -> Self:
        if self.personal_data and self.strategy is Strategy.PACK:
            raise ValueError(
                "strategy: pack is allowed only where personal_data is false; coalesce and pass are always"
            )
        return self


class CapacityPolicy(Section):
    """Buying and releasing provisioned throughput (S1, S2, S4)."""

    unplanned_target_utilisation: Share = 0.8
    planned_target_utilisation: Share = 0.95
    """Of units for calendar events (design check 3): 4x on a Monday is then 30 units, the ceiling."""
    provisioning_lag: ScaledDuration = timedelta(minutes=15)
    """Creation to InService as S4 observes it (10 to 15 min)."""
    provisioning_lead: ScaledDuration = timedelta(minutes=30)
    """Units are bought so long before they must be in service: the lag, and time to try a refused creation again."""
    provisioning_timeout: ScaledDuration = timedelta(minutes=30)
    poll_interval: ScaledDuration = timedelta(seconds=30)
    """How often a provisioned model in creation is looked at."""
    minimum_hold: ScaledDuration = timedelta(hours=1)
    """A bought model is kept at least this long, less `release_ahead`, so that no hour is paid twice."""
    release_ahead: ScaledDuration = timedelta(minutes=5)
    """How long before the minimum hold ends a model may be withdrawn: it is gone before the next hour begins."""
    drain: ScaledDuration = timedelta(minutes=1)
    """Between withdrawing a route and deleting its model."""
    burst_units: int = Field(default=5, ge=1)
    """Largest chunk bought in one provisioned model, so that scaling down is fine-grained."""
    max_unit_hours_per_incident: float = Field(default=120, gt=0)
    max_usd_per_incident: float | None = Field(default=None, gt=0)
    max_unit_hours_per_day: float | None = Field(default=600, gt=0)
    """Of one model, in a day of the timetable's zone: what we buy. More needs an approval."""
    max_usd_per_day: float | None = Field(default=None, gt=0)
    """The same in money; counts where the model has a price."""
    plan_horizon: ScaledDuration = timedelta(hours=48)
    """How far ahead a plan says which units to expect."""
    reconcile_interval: ScaledDuration = timedelta(minutes=15)
    """How often the fleet is compared with the demands (S4: health check every 15 min)."""
    name_prefix: str = "runbooks"
    """Of the names of what is bought; each deployment in one account and region has its own, as `RUNBOOKS_OWNER`."""

    def check(self) -> None:
        """See `Section`."""
        if self.provisioning_lead < self.provisioning_lag:
            raise ValueError(
                f"provisioning_lead {self.provisioning_lead} must be at least provisioning_lag {self.provisioning_lag}"
            )


class TimetableWindow(Section):
    """Units in service from `start` to `end`, each day; past midnight when `end` is not after `start`."""

    start: time
    end: time
    units: dict[str, Annotated[int, Field(ge=0)]]
    """By model."""

    @field_validator("start", "end")
    @classmethod
    def _of_the_zone(cls, at: time) -> time:
        if at.tzinfo is not None:
            raise ValueError(f"{at.isoformat()} has an offset; the timetable's zone holds for all windows")
        return at

    @property
    def span(self) -> str:
        """In words, for messages and reasons."""
        return f"{self.start:%H:%M} to {self.end:%H:%M}"


class TimetablePolicy(Section):
    """Units by time of day (S2). Windows cover the day on the zone's clocks, without gaps or overlaps."""

    zone: ZoneName = "Asia/Tokyo"
    windows: Annotated[tuple[TimetableWindow, ...], Field(min_length=1)] = (
        TimetableWindow(start=time(2), end=time(6), units={"sonnet": 0, "haiku": 0}),
        TimetableWindow(start=time(6), end=time(12), units={"sonnet": 5, "haiku": 3}),
        TimetableWindow(start=time(12), end=time(17), units={"sonnet": 8, "haiku": 3}),
        TimetableWindow(start=time(17), end=time(2), units={"sonnet": 15, "haiku": 5}),
    )
    on_demand_reserve: float = Field(default=2, ge=1)
    """0 units only where the on-demand quota is so many times the window's highest load, ... (design check 24)"""
    max_on_demand_tokens_per_second: float = Field(default=2000, ge=0)
    """... and that load stays under this (S2: 30 days under 2,000 tokens/s)."""

    @property
    def models(self) -> tuple[str, ...]:
        """Models it names. Others have their baseline."""
        return tuple(self.windows[0].units)

    def unit_hours_a_day(self, model: str, lead_hours: float) -> float:
        """The most unit-hours of an ordinary day: each unit is bought ahead, and its last hour is paid whole."""
        ordered = sorted(self.windows, key=lambda window: window.start)
        rises = (
            max(0, following.units[model] - window.units[model])
            for window, following in zip(ordered, [*ordered[1:], ordered[0]], strict=True)
        )
        stands = sum(x.units[model] * _seconds_after(x.start, x.end) for x in ordered) / 3600
        return stands + sum(rises) * (1 + lead_hours)

    def check(self) -> None:
        """See `Section`."""
        names = set(self.models)
        for window in self.windows:
            if set(window.units) != names:
                raise ValueError(
                    f"windows: {window.span} has units for {sorted(window.units)}, the first one for {sorted(names)}; "
                    "every window must name the same models"
                )
        ordered = sorted(self.windows, key=lambda window: window.start)
        for window, following in zip(ordered, [*ordered[1:], ordered[0]], strict=True):
            ends, begins = _seconds_after(window.start, window.end), _seconds_after(window.start, following.start)
            if following.start == window.start and following is not window:
                begins = 0
            if ends < begins:
                raise ValueError(
                    f"windows: none covers {window.end:%H:%M} to {following.start:%H:%M}; they must cover 24 h"
                )
            if ends > begins:
                raise ValueError(
                    f"windows: {window.span} and {following.span} overlap; every moment of the day must have one window"
                )


def _seconds_after(start: time, end: time) -> float:
    """From `start` to the next time that clocks say `end`: more than 0, at most a day."""
    day = date(2000, 1, 1)
    seconds = (datetime.combine(day, end, UTC) - datetime.combine(day, start, UTC)).total_seconds()
    return seconds if seconds > 0 else seconds + 86_400


class LadderPolicy(Section):
    """What is done, rung after rung, while units are refused or late (design idea 2)."""

    climb_every: ScaledDuration = timedelta(minutes=5)
    """Between rungs that cost or that users notice, and between looks at the load."""
    max_output_tokens: int = Field(default=512, ge=1, le=4096)
    """The longest answer then."""
    features_off: tuple[str, ...] | None = None
    """What may be switched off then, once a person agrees; None: every feature there is."""
    lease: ScaledDuration = timedelta(hours=2, minutes=15)
    """Of a knob that a rung holds; renewed at `leases.renew_every`."""


class ThrottlePolicy(Section):
    """Throttle mitigation (S1)."""

    cache_ttl_seconds: CacheTtlSeconds = 120
    hit_rate_at_baseline: Share = 0.15
    hit_rate_at_mitigation: Share = 0.40
    """What the longer TTL should bring the hit rate to (S1: 15 % to 40 %)."""
    buy_throttle_share: Share = 0.01
    """Throttles as a share of calls that count as evidence for buying, ..."""
    buy_periods: int = Field(default=2, ge=1)
    """... held for so many metric periods."""
    buy_utilisation: Share = 0.8
    """Demand over this share of a model's capacity is evidence at once."""
    downgrade_headroom: Share = 0.8
    """Intents are downgraded while the target model stays at or under this utilisation."""


class ScalingLagPolicy(Section):
    """Mitigation while provisioned throughput lags behind (S4). What it shares with throttling stands there."""

    cache_ttl_seconds: CacheTtlSeconds = 90
    most_calls_per_second_per_task: float = Field(default=2, gt=0)
    """A task that calls Bedrock more often amplifies bursts."""


class CouplingPolicy(Section):
    """Coupled scaling (S4) and the 80 % rule (S1): one budget and one cooldown for both (design check 22, 25)."""

    every: ScaledDuration = timedelta(minutes=1)
    units_per_task: dict[str, Annotated[float, Field(ge=0)]] = {"sonnet": 15 / 35, "haiku": 5 / 35}
    """Units that one more running ECS task needs: S4's 35 tasks go with the evening's units. A model that is not named
    does not follow tasks."""
    over_utilisation: Share = 0.8
    """Demand over this share of the provisioned capacity asks for units, ..."""
    over_for: ScaledDuration = timedelta(minutes=2)
    """... once it has lasted so long."""
    hold: ScaledDuration = timedelta(hours=1)
    """How long the units are asked for."""
    cooldown: ScaledDuration = timedelta(minutes=5)
    """After a demand, none for the same model: a ramp asks in a few steps and not each minute. What was asked for and
    has not landed is never asked for again."""
    max_extra_units: int = Field(default=10, ge=1)
    """Most units of a model over what everybody else wants."""
    max_unit_hours_per_day: float = Field(default=40, gt=0)
    """Of all models, extra units times hold."""
    propose_after: int = Field(default=3, ge=1)
    """So many times that a model needed more, each until its demand ended, ..."""
    propose_within: ScaledDuration = timedelta(days=7)
    """... within this propose a change of the timetable."""
    rate_lease: ScaledDuration = timedelta(minutes=5)
    """Of the per-task rate, taken anew each minute while a model is short of capacity."""


class RecoveryPolicy(Section):
    """When an incident counts as recovered (S1, design idea 4)."""

    max_throttles: int = 0
    max_p99_ms: float = 3000
    max_fallback_percent: float = 0.1
    max_queue_depth: float = 50
    hold: ScaledDuration = timedelta(minutes=5)
    poll_interval: ScaledDuration = timedelta(seconds=30)
    timeout: ScaledDuration = timedelta(minutes=30)
    """Not recovered by then: escalate, and mitigation stays on."""
    under_load_share: Share = 0.8
    """Demand at or over this share of the incident's peak: recovered under load; below: the demand went away."""


class WayBackPolicy(Section):
    """Reverting (design idea 4)."""

    max_utilisation_without_lever: Share = 0.8
    stage_watch: ScaledDuration = timedelta(minutes=10)
    watch_poll_interval: ScaledDuration = timedelta(seconds=30)
    breach_polls: int = Field(default=2, ge=1)
    """Polls in a row that must breach before a watched release counts as failed: one blip is none."""
    blind_polls: int = Field(default=5, ge=1)
    """Polls in a row without new metrics at the end of a watch that make it a blind one, which is not clean."""
    capacity_max_hold: ScaledDuration = timedelta(hours=4)
    lever_max_hold: ScaledDuration = timedelta(hours=24)
    recovered_for: ScaledDuration = timedelta(hours=1)
    """A hold that ends after so long in recovery starts the guarded revert by itself; otherwise people are paged."""
    max_extension: ScaledDuration = timedelta(hours=24)


class LeasePolicy(Section):
    """Lease lengths, staggered in the order of the way back."""

    model_routing: ScaledDuration = timedelta(hours=2)
    cache_ttl_seconds: ScaledDuration = timedelta(hours=2, minutes=15)
    renew_every: ScaledDuration = timedelta(hours=1)

    def check(self) -> None:
        """See `Section`."""
        if not self.renew_every < self.model_routing <= self.cache_ttl_seconds:
            raise ValueError(
                "renew_every < model_routing <= cache_ttl_seconds does not hold: "
                "a dead control plane would lapse in the wrong order"
            )


class LatencyStage(Section):
    """A part of every answer's way."""

    name: str
    """Also the dimension `Stage` of its metric."""
    p99_ms: float = Field(ge=0)
    """Its budget."""

    def check(self) -> None:
        """See `Section`."""
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,63}", self.name):
            raise ValueError(f"name: {self.name!r}; lower-case letters, digits and hyphens are allowed, 64 at most")


class Signal(Section):
    """A metric that tells whether a system on an answer's way is slow."""

    metric: MetricName
    dimensions: tuple[str, ...]
    """Values, in the order of the metric's dimensions: which resource it is."""
    high: float = Field(gt=0)
    """Over this the system is slow; in the metric's unit."""

    def check(self) -> None:
        """See `Section`."""
        names = CATALOGUE[self.metric].dimensions
        if len(names) != len(self.dimensions):
            raise ValueError(f"dimensions: {list(self.dimensions)}; {self.metric} has {list(names)}")


class SystemsPolicy(Section):
    """The systems that scenario 3 looks at. The runbook names no figures for them: `high` is ours."""

    redis: Signal = Signal(metric=MetricName.REDIS_READ_LATENCY, dimensions=("mangaassist-cache-001",), high=5_000)
    redis_connections: Signal = Signal(
        metric=MetricName.REDIS_CONNECTIONS, dimensions=("mangaassist-cache-001",), high=50_000
    )
    opensearch: Signal = Signal(
        metric=MetricName.OPENSEARCH_LATENCY, dimensions=("mangaassist-catalogue", "123456789012"), high=200
    )
    dynamodb: Signal = Signal(
        metric=MetricName.DYNAMODB_LATENCY, dimensions=("mangaassist-sessions", "GetItem"), high=25
    )
    api_gateway: Signal = Signal(metric=MetricName.INTEGRATION_LATENCY, dimensions=("mangaassist", "prod"), high=100)


class LatencyPolicy(Section):
    """The latency budget, what a change is checked against before it is made, and the latency incident (S3)."""

    max_p99_ms: float = Field(default=3000, gt=0)
    """Total P99 stays under it; a change that goes over needs an approval. A latency incident recovers under it."""
    alarm_p99_ms: float = Field(default=4000, gt=0)
    """The alarm on RequestLatencyP99, ..."""
    alarm_periods: int = Field(default=3, ge=1)
    """... held for so many metric periods."""
    revert_window_ms: int = Field(default=150, ge=0)
    """The batch window that is known to be good; a latency incident goes back to it."""
    verify_within: ScaledDuration = timedelta(minutes=3)
    """P99 is back in its budget so long after that, or people hear (S3: 2 to 3 min)."""
    stages: tuple[LatencyStage, ...] = (
        LatencyStage(name="gateway", p99_ms=50),
        LatencyStage(name="intent-classification", p99_ms=30),
        LatencyStage(name="retrieval", p99_ms=200),
        LatencyStage(name="delivery", p99_ms=80),
    )
    """All but the batcher's queue wait and the model's invocation: WebSocket and API Gateway, intent classification,
    OpenSearch retrieval, formatting and delivery."""
    queue_wait_p99_ms: float = Field(default=140, ge=0)
    """The batcher's part of the budget, ..."""
    invocation_p99_ms: dict[str, float] = {"sonnet": 2100, "haiku": 350}
    """... and Bedrock's, by model."""
    systems: SystemsPolicy = SystemsPolicy()
    requests_per_second: float = Field(default=13.5, ge=0)
    """Arrivals in one batcher, as the fill rates of S3 imply."""
    max_batch: int = Field(default=8, ge=1)


class BatchTableRow(Section):
    """A row of scenario 3's table."""

    below_tokens_per_second: float | None = Field(default=None, gt=0)
    """None: the last row, for all that is more."""
    window_ms: int = Field(ge=0)


class BatcherPolicy(Section):
    """The micro-batcher (S3). Technical durations, save `publish_every`. Stages and batch size stand in `latency`."""

    controller: Literal["fixed", "table", "slo"] = "slo"
    """`fixed`: the window is the knob `batch_window_ms`. `table`: the runbook's. `slo`: from measured latency and
    arrivals. The knob caps each of them."""
    slo_ms: float = Field(default=2900, gt=0)
    """From the user's message to the answer, with the stages of `latency`; ..."""
    over_share: Annotated[float, Field(gt=0, lt=1)] = 0.0085
    """... which `slo` lets so many requests exceed: less than the hundredth that a P99 leaves, for what it has not yet
    learned and what it estimates wrongly."""
    table: Annotated[tuple[BatchTableRow, ...], Field(min_length=1)] = (
        BatchTableRow(below_tokens_per_second=5_000, window_ms=500),
        BatchTableRow(below_tokens_per_second=15_000, window_ms=250),
        BatchTableRow(window_ms=100),
    )
    table_breach_p99_ms: float = Field(default=2500, gt=0)
    table_breach_window_ms: int = Field(default=50, ge=0)
    max_queue_wait_p99_ms: float = Field(default=300, gt=0)
    """The alarm on QueueWaitTime (S3), ..."""
    queue_wait_periods: int = Field(default=3, ge=1)
    """... held for so many metric periods (S3: the latency alarm's)."""
    slots: int = Field(default=64, ge=1, le=512)
    """Calls in flight to one model."""
    max_pending: int = Field(default=10_000, ge=1)
    """Requests that wait or are in flight."""
    max_slot_wait: timedelta = Field(default=timedelta(seconds=2.5), gt=timedelta(0))
    """A request that would wait longer for a slot is refused: `slo_ms` less the stages outside the batcher, so that who
    is admitted is answered within the SLO and one call."""
    deadline: timedelta = Field(default=timedelta(seconds=10), gt=timedelta(0))
    """Of a request that names none."""
    max_deadline: timedelta = Field(default=timedelta(seconds=29), gt=timedelta(0))
    """API Gateway's limit on an integration (AWS: quotas for WebSocket APIs)."""
    task_burst: timedelta = Field(default=timedelta(seconds=1), gt=timedelta(0))
    """How far a task may run ahead of the knob `invocations_per_second_per_task`."""
    max_lost_share: Share = 0.05
    """An intent that loses more of its packed answers (missing, swapped, cut off) ..."""
    lost_of: int = Field(default=100, ge=1)
    """... among its last so many ..."""
    pass_for: timedelta = Field(default=timedelta(minutes=10), gt=timedelta(0))
    """... is not packed for so long."""
    drain: timedelta = Field(default=timedelta(seconds=15), gt=timedelta(0))
    """After SIGTERM; the longest call should fit."""
    max_request_bytes: int = Field(default=256 * 1024, ge=1)
    max_bytes: int = Field(default=64 * 1024 * 1024, ge=1)
    """Of the bodies of all HTTP requests that are in hand."""
    max_cached_bytes: int = Field(default=64 * 1024, ge=0)
    """A longer answer is not cached."""
    cache_timeout: timedelta = Field(default=timedelta(milliseconds=50), gt=timedelta(0))
    """A request waits no longer for the cache."""
    publish_every: Annotated[ScaledDuration, Field(gt=timedelta(0))] = timedelta(seconds=10)
    """Metrics; with the metric period, in which alarms look at them, in a rehearsal's time."""

    @field_validator("table")
    @classmethod
    def _table_is_whole(cls, table: tuple[BatchTableRow, ...]) -> tuple[BatchTableRow, ...]:
        if [row.below_tokens_per_second is None for row in table] != [False] * (len(table) - 1) + [True]:
            raise ValueError("the last row, and it alone, is without below_tokens_per_second")
        return table

    @model_validator(mode="after")
    def _deadlines_ordered(self) -> Self:
        if self.deadline > self.max_deadline:
            raise ValueError(f"deadline {self.deadline} <= max_deadline {self.max_deadline} does not hold")
        return self


class OverridesPolicy(Section):
    """Overrides that people set."""

    default_duration: ScaledDuration = timedelta(hours=1)
    max_duration: ScaledDuration = timedelta(hours=24)
    """From now on: of a new one, and after an extension."""
    warn_before: ScaledDuration = timedelta(minutes=10)
    approve_within: ScaledDuration = timedelta(hours=1)
    """What needs an approval and does not get it by then is given up."""
    review_after: ScaledDuration = timedelta(days=7)
    """When a standing override is looked at again."""
    max_review: ScaledDuration = timedelta(days=30)
    reminder: ScaledDuration = timedelta(hours=4)
    """How often people are reminded of a review that is due."""
    standing_lease: ScaledDuration = timedelta(hours=2, minutes=15)
    """Of a standing override; at `leases.renew_every` it is renewed, and compared with the configured baseline."""
    late_after: timedelta = timedelta(seconds=5)
    """An end that is noticed so late was missed: the control plane was away. Technical, not scaled."""

    def check(self) -> None:
        """See `Section`."""
        if not self.default_duration <= self.max_duration <= MAX_LEASE:
            raise ValueError(f"default_duration <= max_duration <= {MAX_LEASE.days} days does not hold")


class EscalationPolicy(Section):
    """The runbooks' escalation table."""

    throttled_after_mitigation: ScaledDuration = timedelta(minutes=5)
    p99_ms: float = 8000
    p99_for: ScaledDuration = timedelta(minutes=10)
    snooze: ScaledDuration = timedelta(minutes=30)
    """After an abort, alarms of the same key are ignored for this long, or until OK."""
    approval_reminder: ScaledDuration = timedelta(hours=6)
    """How often people are reminded that an incident waits for them, unless they were paged about it otherwise."""


class EvidencePolicy(Section):
    """Reading before acting."""

    budget: timedelta = Field(default=timedelta(seconds=2), gt=timedelta(0), le=timedelta(seconds=5))
    """After this, mitigation goes ahead on what is known; technical, not scaled."""
    recent_changes: ScaledDuration = timedelta(hours=24)
    metric_lookback: ScaledDuration = timedelta(minutes=10)


AlarmRunbook = Literal["throttle", "latency"]
"""What an alarm may ask for; throttling has two runbooks, told apart later."""


class AlarmRule(Section):
    """Maps alarms to an incident key. The first rule that fits wins; absent conditions fit everything."""

    alarm_name: str | None = None
    """Shell-style pattern, e.g. `BedrockThrottle*`."""
    metric: str | None = None
    dimension: str | None = None
    """A dimension that must be there; its value fills `{model}` (by model id or provisioned ARN)."""
    key: str
    """The incident key, e.g. `bedrock-throttle:{model}`."""
    runbook: AlarmRunbook | None = None
    """None: people are paged, and look."""
    part_of: str | None = None
    """Shell-style pattern of keys: while the alarm of such an incident is on, this one belongs to what it is about, and
    starts nothing."""


class IntakePolicy(Section):
    """Alarm intake."""

    duplicate_count_interval: timedelta = timedelta(seconds=10)
    reconcile_interval: timedelta = timedelta(minutes=1)
    long_poll: timedelta = timedelta(seconds=20)
    max_message_bytes: int = 1_048_576
    ignored_alarms: tuple[str, ...] = (HEARTBEAT_ALARM,)
    """Shell-style patterns of alarms that are somebody else's; a missing heartbeat of ours is told past us."""


class EventTypePolicy(Section):
    """A kind of calendar event."""

    multiplier: float = Field(gt=0)
    """Multiplies traffic, not units."""
    lead_time: ScaledDuration = timedelta(hours=4)
    """The units are in service so long before the start (S1: 4 h before Monday releases, not 2)."""
    lasts: ScaledDuration = timedelta(minutes=90)
    """The units are released so long after the start."""


RepairKind = Literal["reconcile", "start-capacity", "schedules", "delete-orphan"]


class HealthPolicy(Section):
    """The health check (S4, prevention)."""

    interval: ScaledDuration = Field(default=timedelta(minutes=15), gt=timedelta(0))
    repairs: tuple[RepairKind, ...] = ("reconcile", "start-capacity", "schedules", "delete-orphan")
    """What it mends itself: compare a fleet with its demands and publish the routes again, start a capacity workflow
    that ended, write the schedules again, delete a provisioned model of ours that no workflow knows."""
    delete_orphans_after: ScaledDuration = Field(default=timedelta(hours=24), ge=timedelta(0))
    """From the check that first found it."""
    failed_runs: int = Field(default=2, ge=1)
    """Runs of a schedule that failed in a row make a finding."""
    late_intervals: int = Field(default=3, ge=2)
    """What should come at an interval and has not for so many of them is late."""
    heartbeat_periods: int = Field(default=2, ge=1)
    """Intervals without a heartbeat of ours until the alarm that watches it goes on."""


class FeedRule(Section):
    """Recognises an announcement. The first rule that fits wins."""

    event_type: str
    """A key of `calendar.event_types`."""
    words: tuple[str, ...] = Field(min_length=1)
    """Any of them in title or summary; case and width do not matter."""


class FeedPolicy(Section):
    """The publisher's feed of announcements (S1, prevention)."""

    url: str | None = Field(default=None, pattern=r"^https?://", max_length=2000)
    """RSS or Atom; None: no feed is read."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts that may be at private, loopback or link-local addresses."""
    interval: ScaledDuration = Field(default=timedelta(minutes=30), gt=timedelta(0))
    zone: ZoneName = "Asia/Tokyo"
    """Of dates in texts."""
    fetch_timeout: timedelta = Field(default=timedelta(seconds=10), gt=timedelta(0), le=timedelta(seconds=15))
    """For the whole fetch, redirects included; technical, not scaled."""
    max_bytes: int = Field(default=1_000_000, ge=1)
    max_redirects: int = Field(default=5, ge=0)
    max_entries: int = Field(default=200, ge=1, le=200)
    """The newest ones of a feed; what is left out is said."""
    page_after_failures: int = Field(default=2, ge=1)
    """People are told when the feed could not be read so many times in a row."""
    rules: tuple[FeedRule, ...] = (
        FeedRule(event_type="final_chapter", words=("最終回", "最終話", "完結", "final chapter", "series finale")),
        FeedRule(event_type="new_series", words=("新連載", "連載開始", "new series")),
        FeedRule(event_type="special_issue", words=("特別号", "増刊", "特大号", "special issue")),
    )


class CalendarPolicy(Section):
    """The event calendar (S1)."""

    event_types: dict[str, EventTypePolicy] = {
        "monday_release": EventTypePolicy(multiplier=4),
        "final_chapter": EventTypePolicy(multiplier=5, lasts=timedelta(hours=3)),
        "new_series": EventTypePolicy(multiplier=2),
        "special_issue": EventTypePolicy(multiplier=2),
    }
    min_multiplier: float = Field(default=1, gt=0)
    max_multiplier: float = 10
    """An entry outside of these is refused."""
    max_lead_time: ScaledDuration = timedelta(hours=24)
    sync_interval: ScaledDuration = timedelta(minutes=5)
    """How often the table is read."""
    preflight_ahead: ScaledDuration = timedelta(days=3)
    """Quota, ceiling and permissions are checked so long before the start, and what is wrong is escalated: AWS Support
    needs days to grant model units."""
    preflight_interval: ScaledDuration = timedelta(days=1)
    """How often what was wrong is checked again until provisioning begins."""
    verify_margin: ScaledDuration = timedelta(minutes=30)
    """The units count as in time when they are in service so long before the start; a lead time is never shorter."""
    prolong_by: ScaledDuration = timedelta(minutes=30)
    """The units stay so much longer while the load at the end is too much for what would be left, ..."""
    max_prolong: ScaledDuration = timedelta(hours=4)
    """... at most so long in all (S1: capacity is held 4 h)."""
    match_before: ScaledDuration = timedelta(hours=2)
    match_after: ScaledDuration = timedelta(hours=6)
    """An incident belongs to an event that starts within `match_before` ahead or started within `match_after`."""

    def check(self) -> None:
        """See `Section`."""
        for name, kind in self.event_types.items():
            if not self.min_multiplier <= kind.multiplier <= self.max_multiplier:
                raise ValueError(
                    f"event_types.{name}.multiplier: {kind.multiplier:g} is not within min_multiplier "
                    f"{self.min_multiplier:g} and max_multiplier {self.max_multiplier:g}"
                )
            if not self.verify_margin <= kind.lead_time <= self.max_lead_time:
                raise ValueError(
                    f"event_types.{name}.lead_time: {kind.lead_time} is not within verify_margin "
                    f"{self.verify_margin} and max_lead_time {self.max_lead_time}"
                )


Hourly = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=24, max_length=24)]
"""A figure for each hour of the day, from 00:00 on."""


class ForecastPolicy(Section):
    """The load to expect on an ordinary day; calendar events multiply it."""

    zone: ZoneName = "Asia/Tokyo"
    tokens_per_second: dict[str, Hourly] = {
        "sonnet": (
            *(7000, 6000, 1900, 1500, 1500, 1900),
            *(3500, 5000, 5500, 6000, 6500, 7000),
            *(7300, 7600, 7900, 8200, 8500, 9900),
            *(11200, 12500, 12500, 11800, 11000, 8400),
        ),
        "haiku": (
            *(1000, 860, 280, 220, 220, 280),
            *(500, 720, 790, 860, 930, 1000),
            *(1050, 1090, 1130, 1180, 1220, 1420),
            *(1600, 1790, 1790, 1690, 1580, 1200),
        ),
    }
    """By model, the most that reaches it within each hour, at the configured hit rate. The runbooks' figures (S1: 7,000
    on a Monday at 00:00; S2: 1,500 at night, 5,000 by 08:00; S4: 12,500 in the evening) are for both models together
    and are counted whole for Sonnet, as design check 3 sizes by them; Haiku's are a seventh of them."""


class MetricsPolicy(Section):
    """How metrics are published and read."""

    period: ScaledDuration = timedelta(minutes=1)


class EcsPolicy(Section):
    """The orchestrator's service."""

    baseline_tasks: int = 15
    max_tasks: int = 60


class Policy(Section):
    """The numbers. A snapshot of it is an input of every workflow; workflow code never reads it from elsewhere."""

    version: str = "default"
    models: dict[str, ModelPolicy] = {
        "sonnet": ModelPolicy(
            model_id="anthropic.claude-3-sonnet-20240229-v1:0",
            provisioned_model_id="anthropic.claude-3-sonnet-20240229-v1:0:28k",
            rank=2,
            tokens_per_second_per_unit=1000,
            baseline_units=15,
            floor_units=0,
            ceiling_units=30,
            on_demand_tokens_per_second=10_500,
            usd_per_unit_hour=7.67,
            usd_per_million_tokens=4.01,
        ),
        "haiku": ModelPolicy(
            model_id="anthropic.claude-3-haiku-20240307-v1:0",
            provisioned_model_id="anthropic.claude-3-haiku-20240307-v1:0:48k",
            rank=1,
            tokens_per_second_per_unit=2000,
            baseline_units=5,
            floor_units=0,
            ceiling_units=10,
            on_demand_tokens_per_second=5_000,
            usd_per_unit_hour=7.67,
            usd_per_million_tokens=4.01,
        ),
    }
    intents: dict[str, IntentPolicy] = {
        "recommendation": IntentPolicy(model="sonnet"),
        "product_question": IntentPolicy(model="sonnet", strategy=Strategy.COALESCE),
        "faq": IntentPolicy(model="sonnet", downgrade_to="haiku", strategy=Strategy.PACK, personal_data=False),
        "greeting": IntentPolicy(model="sonnet", downgrade_to="haiku", strategy=Strategy.PACK, personal_data=False),
        "order_status": IntentPolicy(model="haiku"),
        "search": IntentPolicy(model="haiku", strategy=Strategy.COALESCE),
    }
    cache_ttl_seconds: CacheTtlSeconds = 30
    """The configured TTL of the response cache (S1)."""
    knobs: dict[KnobName, KnobValue] = Field(default_factory=declared_baselines)
    """The configured values of the other knobs (S3 to S5), where they differ from their declarations. A knob by intent
    takes one value for all intents, or those of some; `feature_flag` takes every feature there is."""
    capacity: CapacityPolicy = CapacityPolicy()
    ladder: LadderPolicy = LadderPolicy()
    timetable: TimetablePolicy | None = TimetablePolicy()
    """None: every model has its `baseline_units` all day, which are others' to provide."""
    throttle: ThrottlePolicy = ThrottlePolicy()
    scaling_lag: ScalingLagPolicy = ScalingLagPolicy()
    coupling: CouplingPolicy | None = CouplingPolicy()
    """None: capacity does not follow ECS tasks or utilisation by itself."""
    recovery: RecoveryPolicy = RecoveryPolicy()
    way_back: WayBackPolicy = WayBackPolicy()
    leases: LeasePolicy = LeasePolicy()
    latency: LatencyPolicy = LatencyPolicy()
    batcher: BatcherPolicy = BatcherPolicy()
    overrides: OverridesPolicy = OverridesPolicy()
    escalation: EscalationPolicy = EscalationPolicy()
    evidence: EvidencePolicy = EvidencePolicy()
    intake: IntakePolicy = IntakePolicy()
    calendar: CalendarPolicy = CalendarPolicy()
    health: HealthPolicy = HealthPolicy()
    feed: FeedPolicy = FeedPolicy()
    forecast: ForecastPolicy = ForecastPolicy()
    metrics: MetricsPolicy = MetricsPolicy()
    ecs: EcsPolicy = EcsPolicy()
    alarm_rules: tuple[AlarmRule, ...] = (
        AlarmRule(
            metric="InvocationThrottles",
            dimension="ModelId",
            key="bedrock-throttle:{model}",
            runbook="throttle",
        ),
        AlarmRule(alarm_name="BedrockThrottle*", key="bedrock-throttle:sonnet", runbook="throttle"),
        AlarmRule(
            metric="RequestLatencyP99",
            key="latency-regression:mangaassist",
            runbook="latency",
            part_of="bedrock-throttle:*",
        ),
        AlarmRule(
            metric="QueueWaitTime",
            key="latency-regression:mangaassist",
            runbook="latency",
            part_of="bedrock-throttle:*",
        ),
        AlarmRule(metric="ProvisioningFailures", dimension="Model", key="capacity-health:{model}"),
    )

    @field_validator("knobs", mode="before")
    @classmethod
    def _over_the_declared(cls, given: object) -> object:
        return {**declared_baselines(), **given} if isinstance(given, dict) else given

    def check(self) -> None:
        """See `Section`."""
        self._names_exist()
        self._timetable_holds()
        self._caps_leave_the_plan()
        self._standing_is_renewed()

    def _names_exist(self) -> None:
        for name, intent in self.intents.items():
            for model in (intent.model, intent.downgrade_to):
                if model is not None and model not in self.models:
                    raise ValueError(f"intents.{name}: there is no model {model!r}; there are {sorted(self.models)}")
        for rule in self.feed.rules:
            if rule.event_type not in self.calendar.event_types:
                known = sorted(self.calendar.event_types)
                raise ValueError(f"feed.rules: there is no event type {rule.event_type!r}; there are {known}")
        check_configured(self.knobs, self.baseline)
        for feature in self.ladder.features_off or ():
            if feature not in self.features:
                raise ValueError(f"ladder.features_off: there is no feature {feature!r}; there are {self.features}")

    def _timetable_holds(self) -> None:
        for window in self.timetable.windows if self.timetable else ():
            for name, units in window.units.items():
                where = f"timetable.windows: {window.span}: units.{name}"
                spec = self.models.get(name)
                if spec is None:
                    raise ValueError(f"{where}: there is no such model; there are {sorted(self.models)}")
                if spec.clamped(units) != units:
                    raise ValueError(
                        f"{where}: {units}; {spec.floor_units} to {spec.most_units} are allowed "
                        "(floor_units; ceiling_units and quota_units)"
                    )
                if units == 0:
                    self._on_demand_carries(window, name, where)

    def _caps_leave_the_plan(self) -> None:
        """What is planned anyway must fit into the daily caps, or every day would ask a person."""
        capacity = self.capacity
        for name, spec in self.models.items():
            needs = [(24.0 * spec.floor_units, f"floor_units {spec.floor_units}")]
            if self.timetable is not None and name in self.timetable.models:
                lead = capacity.provisioning_lead / timedelta(hours=1)
                needs.append((self.timetable.unit_hours_a_day(name, lead), "the timetable"))
            need, what = max(needs)
            caps = [("max_unit_hours_per_day", capacity.max_unit_hours_per_day, 1.0)]
            if spec.usd_per_unit_hour is not None:
                caps.append(("max_usd_per_day", capacity.max_usd_per_day, spec.usd_per_unit_hour))
            for cap, limit, price in caps:
                if limit is not None and need * price > limit:
                    raise ValueError(
                        f"capacity.{cap}: {limit:g}; at least {math.ceil(need * price)} are needed, "
                        f"for {what} alone comes to that with {name}"
                    )

    def _on_demand_carries(self, window: TimetableWindow, name: str, where: str) -> None:
        """Raises ValueError unless the on-demand quota carries the model's load in the window."""
        assert self.timetable is not None
        hours = self.forecast.tokens_per_second.get(name)
        if hours is None:
            raise ValueError(f"{where}: 0 needs a load to expect: forecast.tokens_per_second has none for {name}")
        zone, step, local = ZoneInfo(self.timetable.zone), timedelta(minutes=15), ZoneInfo(self.forecast.zone)
        length = timedelta(seconds=_seconds_after(window.start, window.end))
        load = max(
            hours[(datetime.combine(date(2026, month, 15), window.start, zone) + n * step).astimezone(local).hour]
            for month in (1, 7)  # the zones' clocks may differ by season
            for n in range(-(-length // step))
        )
        quota, most = self.models[name].on_demand_tokens_per_second, self.timetable.max_on_demand_tokens_per_second
        if load * self.timetable.on_demand_reserve > quota or load >= most:
            raise ValueError(
                f"{where}: 0, but {load:,.0f} tokens/s are to be expected then (forecast); on-demand may carry up to "
                f"{quota / self.timetable.on_demand_reserve:,.0f} of its quota of {quota:,.0f}, if under {most:,.0f}"
            )

    @property
    def main_model(self) -> str:
        """The model that answers most intents, the larger one of equals: what is slow for the service is read there."""
        answers = [intent.model for intent in self.intents.values()]
        return max(self.models, key=lambda name: (answers.count(name), self.models[name].rank))

    @property
    def longest_usual_wait_ms(self) -> float:
        """P99 of the batcher's queue wait beyond which something is wrong.

        Under `slo` and `table`, which wait on purpose, not below the longest window they may choose: a longer wait is
        none of their making.
        """
        threshold = self.batcher.max_queue_wait_p99_ms
        if self.batcher.controller == "fixed":
            return threshold
        window = baseline_value(KnobName.BATCH_WINDOW_MS, self.baseline)
        assert isinstance(window, int)
        if self.batcher.controller == "table":
            window = min(window, max(row.window_ms for row in self.batcher.table))
        return max(threshold, window)

    @property
    def features(self) -> list[str]:
        """Every feature that can be switched off."""
        flags = baseline_value(KnobName.FEATURE_FLAG, self.baseline)
        return sorted(flags) if isinstance(flags, dict) else []

    def _standing_is_renewed(self) -> None:
        if not self.leases.renew_every < self.overrides.standing_lease:
            raise ValueError("leases.renew_every < overrides.standing_lease does not hold: it would lapse in between")

    @property
    def baseline(self) -> Baseline:
        """The configured value of every knob."""
        return Baseline(
            cache_ttl_seconds=self.cache_ttl_seconds,
            model_routing={name: intent.model for name, intent in self.intents.items()},
            model_ranks={name: model.rank for name, model in self.models.items()},
            others={**self.knobs},
        )


def _as_recorded(given: object, handler: ValidatorFunctionWrapHandler) -> object:
    return given if isinstance(given, Policy) else Policy.model_validate(given, context=_RECORDED)


RecordedPolicy = Annotated[Policy, WrapValidator(_as_recorded)]
"""A policy in a message, perhaps of an earlier version: what contradicts itself by now is taken all the same."""
