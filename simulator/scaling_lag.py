"""Scenario 4 in the simulator: an evening ramp that ECS follows and Bedrock does not. What it rests on.

Business time. The figures are those of scenario 4's detection table; `docs/simulator.md` says what they imply and where
they cannot hold together.
"""

from datetime import datetime, timedelta

from domain.policy import ThrottlePolicy
from simulator.aws.faults import Fault, FaultKind
from simulator.aws.trail import TrailEvent
from simulator.mangaassist import Parameters
from simulator.traffic import TOKYO, Spike

EVENING = 12_500.0
"""Tokens/s sent at 17:30."""
TASKS_BEFORE, TASKS_AFTER = 15, 35
AFTERNOON = EVENING * TASKS_BEFORE / TASKS_AFTER
"""Tokens/s sent before the ramp: as many for each task as after it, as the service scales on its load."""
RAMP_AT = timedelta(hours=17, minutes=20)
HOURS_BEFORE = timedelta(hours=1)
"""So long before the ramp the units were those that are still there: the afternoon's."""
ON_DEMAND_IN_USE = {"sonnet": 8_000.0}
"""Tokens/s of the account's on-demand quota that others take: 2,500 of 10,500 are left for Sonnet."""
_HITS = ThrottlePolicy().hit_rate_at_baseline
PARAMETERS = Parameters(
    requests_per_second_per_task=EVENING / (1 - _HITS) / Parameters().tokens_per_request / TASKS_AFTER,
    scale_out_tasks=10,
)
"""Of the service: one task's share of the evening's messages, hits and all, and 10 tasks a step."""
ROLE_CHANGED_BEFORE = timedelta(hours=5)


def ramp(now: datetime) -> Spike:
    """The evening of the day of `now`: up within 3 min, and there for the rest of it."""
    midnight = now.astimezone(TOKYO).replace(hour=0, minute=0, second=0, microsecond=0)
    return Spike(midnight + RAMP_AT, EVENING / AFTERNOON, timedelta(hours=8))


def fault() -> Fault:
    """The role was made anew without the permission to buy (root cause 2, the runbook's own)."""
    return Fault(
        service="bedrock", operation="CreateProvisionedModelThroughput", kind=FaultKind.ACCESS_DENIED, count=None
    )


def role_change(at: datetime) -> TrailEvent:
    """The audit trail of who did that, at real time `at`."""
    return TrailEvent(event_name="PutRolePolicy", username="security-hardening", event_time=at)
