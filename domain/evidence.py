"""Evidence: typed readings of the world, each with where it came from, when it was true and how long it took.

Missing evidence is a reading too: its `value` is None and `missing` says why. Nothing is ever guessed.
"""

from enum import StrEnum

from pydantic import AwareDatetime, BaseModel, ConfigDict

Value = bool | int | float | str | list[str]


class EvidenceKey(StrEnum):
    """Everything a decision tree, a plan or a check may ask for."""

    # CloudWatch; where a metric is per model, of the incident's model
    THROTTLES_PER_PERIOD = "throttles_per_period"
    TOKENS_PER_SECOND = "tokens_per_second"
    """Demand: offered load on the model at the measured hit rate, without retries."""
    CAPACITY_TOKENS_PER_SECOND = "capacity_tokens_per_second"
    QUEUE_DEPTH = "queue_depth"
    P99_MS = "p99_ms"
    FALLBACK_PERCENT = "fallback_percent"
    HIT_RATE_PERCENT = "hit_rate_percent"
    # Bedrock
    UNITS_IN_SERVICE = "units_in_service"
    UNITS_CREATING = "units_creating"
    # ECS
    TASKS_RUNNING = "tasks_running"
    TASKS_DESIRED = "tasks_desired"
    # Event calendar (DynamoDB)
    EVENT_CONFIGURED = "event_configured"
    EVENT_ID = "event_id"
    EVENT_STARTS_AT = "event_starts_at"
    EVENT_MULTIPLIER = "event_multiplier"
    EVENT_TRIGGERED_AT = "event_triggered_at"
    EVENT_COMPLETED_AT = "event_completed_at"
    EVENT_UNITS = "event_units"
    EVENT_CAPACITY_TOKENS_PER_SECOND = "event_capacity_tokens_per_second"
    """What those units give."""
    EVENT_LEAD_SECONDS = "event_lead_seconds"
    # What stands between the timetable and Bedrock (scenario 4)
    UNITS_EXPECTED = "units_expected"
    """What the timetable wants in service at this hour."""
    PROVISIONED_TOKENS_PER_SECOND = "provisioned_tokens_per_second"
    """What the units in service give, on-demand left out."""
    CAPACITY_WORKFLOW = "capacity_workflow"
    """`running`, `paused` or `missing`."""
    SCHEDULES_OFF = "schedules_off"
    """Temporal Schedules of ours that are paused or missing, each in words."""
    PROVISIONING_ERROR = "provisioning_error"
    """Kind of the error that keeps the capacity workflow from units (`domain.errors`); empty: none."""
    PROVISIONING_ERROR_TEXT = "provisioning_error_text"
    CALLS_PER_SECOND_PER_TASK = "calls_per_second_per_task"
    """Calls to Bedrock that one ECS task makes."""
    # The batcher and its window (scenario 3); of the incident's model
    INVOCATION_MS = "invocation_ms"
    """P99 of Bedrock's own latency."""
    QUEUE_WAIT_MS = "queue_wait_ms"
    """P99 of the wait in the batcher."""
    WINDOW_MS = "window_ms"
    """The longest wait for mates now, as the batcher publishes it."""
    WINDOW_BEFORE_MS = "window_before_ms"
    """The same before it last grew; the present one where it did not."""
    WINDOW_CHANGED_AT = "window_changed_at"
    """When it last grew; empty: not within the lookback."""
    WINDOW_HELD_BY = "window_held_by"
    """Who holds a lease on it, since when and why, each in words; none: it is configured."""
    # Other systems on an answer's way (scenario 3)
    REDIS_READ_US = "redis_read_us"
    REDIS_CONNECTIONS = "redis_connections"
    OPENSEARCH_MS = "opensearch_ms"
    DYNAMODB_MS = "dynamodb_ms"
    INTEGRATION_MS = "integration_ms"
    # Recent changes
    RECENT_CHANGES = "recent_changes"


class Reading(BaseModel):
    """One piece of evidence."""

    model_config = ConfigDict(frozen=True)

    key: EvidenceKey
    value: Value | None = None
    missing: str | None = None
    """Why there is no value. A value that is truly absent (no event configured) is a value, not missing."""
    observed_at: AwareDatetime | None = None
    """When the value was true, by the source's own time."""
    source: str
    """System and resource, e.g. `cloudwatch AWS/Bedrock InvocationThrottles ModelId=...`."""


class Evidence(BaseModel):
    """Readings by key."""

    readings: dict[EvidenceKey, Reading] = {}

    def value(self, key: EvidenceKey) -> Value | None:
        """The value, or None when it is missing or was not read."""
        reading = self.readings.get(key)
        return reading.value if reading else None

    def number(self, key: EvidenceKey) -> float | None:
        """The value as a number, or None when it is missing, was not read, or is none."""
        value = self.value(key)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def why_missing(self, key: EvidenceKey) -> str:
        """Why `key` has no value."""
        reading = self.readings.get(key)
        return (reading.missing if reading else None) or "not read"

    def merge(self, other: "Evidence") -> "Evidence":
        """Both; `other` wins where both have a key."""
        return Evidence(readings={**self.readings, **other.readings})


class Check(BaseModel):
    """One of the universal first-response checks, with what it found."""

    name: str
    """Which check, e.g. `Bedrock throttles`."""
    finding: str
    """What was found, in one sentence; or what could not be read and why."""
    breaching: bool | None
    """None: could not tell."""
    evidence: Evidence
    observed_at: AwareDatetime | None = None
    duration_ms: float
