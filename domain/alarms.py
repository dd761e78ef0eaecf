"""Alarm changes: what CloudWatch says, in one shape, whichever way it came."""

from enum import StrEnum
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict


class AlarmState(StrEnum):
    """CloudWatch's alarm states."""

    OK = "OK"
    ALARM = "ALARM"
    INSUFFICIENT_DATA = "INSUFFICIENT_DATA"


class AlarmMetric(BaseModel):
    """The metric an alarm watches (for metric math: the one its expression is about)."""

    model_config = ConfigDict(frozen=True)

    namespace: str
    name: str
    dimensions: dict[str, str] = {}


class AlarmChange(BaseModel):
    """One change (or restatement) of an alarm's state."""

    model_config = ConfigDict(frozen=True)

    alarm_name: str
    alarm_arn: str | None = None
    """Missing in older notifications."""
    state: AlarmState
    previous_state: AlarmState | None = None
    reason: str = ""
    changed_at: AwareDatetime
    metrics: tuple[AlarmMetric, ...] = ()
    """Empty for a composite alarm."""
    children: tuple[str, ...] = ()
    """ARNs of the alarms that made a composite one change."""
    source: Literal["sns", "eventbridge", "reconcile", "health-check"]
    message_id: str
    """Identity of the delivery: the SNS MessageId, the EventBridge id, or the alarm and its time."""
    suppressed: bool = False
    """Muted, or actions suppressed: SNS would not have been told."""
