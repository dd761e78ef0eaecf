"""A latency incident's evidence while CloudWatch or Redis is away: what is left decides, within the budget."""

from datetime import UTC, datetime, timedelta

import boto3
import pytest
import redis
from botocore.config import Config
from temporalio.testing import ActivityEnvironment

from activities.cloudwatch import CloudWatchActivities
from activities.latency import LatencyActivities, window_check
from activities.settings import SettingsActivities
from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from domain.clock import RehearsalClock
from domain.evidence import EvidenceKey
from domain.incident import LeverStatus
from domain.knobs import Holder, KnobName, Lease, LeaseRequest
from domain.messages import AssessIncident, PolicySnapshot
from domain.policy import BatcherPolicy, EvidencePolicy, Policy

NOW = datetime(2026, 12, 1, 11, 0, tzinfo=UTC)
FIXED = Policy(
    batcher=BatcherPolicy(controller="fixed"),
    knobs={KnobName.BATCH_WINDOW_MS: 150},
    evidence=EvidencePolicy(budget=timedelta(seconds=0.5)),
)
LONG = LeaseRequest(
    lease_id="longer",
    knob=KnobName.BATCH_WINDOW_MS,
    value=500,
    holder=Holder(kind="person", id="engineer@example.com"),
    reason="to save calls",
    duration_ms=600_000,
)


def evidence_of_nothing(ledger: Ledger) -> LatencyActivities:
    """CloudWatch does not answer."""
    client = boto3.client(
        "cloudwatch",
        region_name="ap-northeast-1",
        endpoint_url="http://127.0.0.1:9",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(connect_timeout=1, retries={"total_max_attempts": 1}),
    )
    settings = SettingsActivities(policy_file=None, roster_file=None, clock=RehearsalClock())
    return LatencyActivities(settings, CloudWatchActivities(client, ecs_cluster="c", ecs_service="s"), ledger)


async def test_without_cloudwatch_the_ledger_tells_who_made_the_window_longer_and_the_lever_acts(
    redis_client: redis.Redis,
) -> None:
    ledger = Ledger(redis_client)
    ledger.acquire([LONG])
    snapshot = PolicySnapshot(policy=FIXED, clock=RehearsalClock())
    request = AssessIncident(model="sonnet", now=NOW, snapshot=snapshot)
    found = await ActivityEnvironment().run(evidence_of_nothing(ledger).assess_latency, request)
    assert "Could not connect" in found.unread
    assert found.plan is not None
    [lever] = found.plan.levers
    assert (lever.status, lever.before) == (LeverStatus.APPLYING, "500 ms")
    batcher, window = found.checks
    assert batcher.finding.startswith("could not be read: ")
    assert "held by engineer@example.com since" in window.finding
    assert window.evidence.value(EvidenceKey.WINDOW_MS) == 500
    assert "Could not connect" in window.evidence.why_missing(EvidenceKey.WINDOW_BEFORE_MS)


async def test_without_both_the_lever_acts_all_the_same() -> None:
    ledger = Ledger(connect_redis("redis://127.0.0.1:9/0"))
    snapshot = PolicySnapshot(policy=FIXED, clock=RehearsalClock())
    request = AssessIncident(model="sonnet", now=NOW, snapshot=snapshot)
    found = await ActivityEnvironment().run(evidence_of_nothing(ledger).assess_latency, request)
    assert found.plan is not None
    assert [(lever.status, lever.before) for lever in found.plan.levers] == [(LeverStatus.APPLYING, "unknown")]
    assert "leases could not be read" in found.checks[1].finding


@pytest.mark.parametrize("controller", ["fixed", "slo"])
def test_a_lease_that_made_the_window_longer_is_seen_under_each_controller(controller: str) -> None:
    policy = FIXED.model_copy(update={"batcher": FIXED.batcher.model_copy(update={"controller": controller})})
    lease = Lease(**LONG.model_dump(exclude={"duration_ms", "acquired_at"}), acquired_at=NOW, expires_at=NOW, version=1)
    short = {NOW - n * timedelta(minutes=1): 150.0 for n in range(5, 20)}
    check = window_check(policy, ([lease], ""), (({"window": short}, NOW), ""), 1)
    assert check.breaching
    assert check.evidence.value(EvidenceKey.WINDOW_MS) == 500
    assert check.evidence.value(EvidenceKey.WINDOW_BEFORE_MS) == 150
