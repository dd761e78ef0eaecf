"""What was changed lately: knobs (the ledger's audit stream), ECS deployments, and AWS calls that CloudTrail knows."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from temporalio import activity

from activities.cloudwatch import evidence_of
from dataplane.ledger import Ledger
from domain.evidence import Check, EvidenceKey
from domain.messages import CheckChanges

if TYPE_CHECKING:
    from types_boto3_cloudtrail.client import CloudTrailClient
    from types_boto3_ecs.client import ECSClient

MAX_CHANGES = 20
"""Changes named in the finding, newest first."""


class ChangeActivities:
    """Three sources; one that cannot be read is named, and the others still count."""

    def __init__(
        self, ledger: Ledger, ecs: "ECSClient", cloudtrail: "CloudTrailClient", *, cluster: str, service: str
    ) -> None:
        self._ledger = ledger
        self._ecs = ecs
        self._cloudtrail = cloudtrail
        self._cluster = cluster
        self._service = service

    @activity.defn
    def check_changes(self, request: CheckChanges) -> list[Check]:
        """First-response check 6: was anything changed within `since`? The incident's own changes are left out."""
        started = time.perf_counter()
        now = datetime.now(UTC)
        since = now - request.since
        changes: list[tuple[datetime, str]] = []
        unread: list[str] = []
        sources: dict[str, Callable[[], list[tuple[datetime, str]]]] = {
            "knobs": lambda: self._knobs(since, request.incident_id),
            "ECS deployments": lambda: self._deployments(since),
            "CloudTrail": lambda: self._trail(since, now),
        }
        for source, read in sources.items():
            try:
                changes += read()
            except Exception as error:
                unread.append(f"could not read {source}: {error}")
        lines = [f"{at:%H:%M:%S} UTC {text}" for at, text in sorted(changes, reverse=True)[:MAX_CHANGES]]
        finding = f"{len(changes)} changes: " + "; ".join(lines) if lines else "no change found"
        return [
            Check(
                name="Recent changes",
                finding="; ".join([finding, *unread]),
                breaching=None if unread and not changes else bool(changes),
                evidence=evidence_of(
                    {EvidenceKey.RECENT_CHANGES: None if len(unread) == 3 else lines},
                    "redis audit stream, ecs DescribeServices, cloudtrail LookupEvents",
                    now,
                    "; ".join(unread),
                ),
                observed_at=now,
                duration_ms=(time.perf_counter() - started) * 1000,
            )
        ]

    def _knobs(self, since: datetime, incident_id: str) -> list[tuple[datetime, str]]:
        return [
            (entry.at, f"{entry.knob} lease {entry.action} by {entry.holder.id} ({entry.reason})")
            for entry in self._ledger.history(since)
            if entry.action in ("acquired", "released")
            and entry.holder.id != incident_id
            and entry.holder.kind != "capacity"  # what capacity does about a shortage is no cause of it
        ]

    def _deployments(self, since: datetime) -> list[tuple[datetime, str]]:
        answer = self._ecs.describe_services(cluster=self._cluster, services=[self._service])
        return [
            (created, f"ECS deployment of {deployment.get('taskDefinition', '?').rsplit('/', 1)[-1]}")
            for service in answer["services"]
            for deployment in service.get("deployments", [])
            if (created := deployment["createdAt"].astimezone(UTC)) >= since
        ]

    def _trail(self, since: datetime, now: datetime) -> list[tuple[datetime, str]]:
        answer = self._cloudtrail.lookup_events(
            StartTime=since,
            EndTime=now + timedelta(minutes=1),
            LookupAttributes=[{"AttributeKey": "ReadOnly", "AttributeValue": "false"}],
            MaxResults=50,
        )
        return [
            (event["EventTime"].astimezone(UTC), f"{event['EventName']} by {event.get('Username', 'unknown')}")
            for event in answer["Events"]
        ]
