"""Reading the orchestrator's ECS service."""

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from temporalio import activity

from activities.cloudwatch import evidence_of
from domain.evidence import Check, EvidenceKey
from domain.messages import CheckTasks

if TYPE_CHECKING:
    from types_boto3_ecs.client import ECSClient
    from types_boto3_ecs.type_defs import ServiceTypeDef


class EcsActivities:
    """One ECS service."""

    def __init__(self, ecs: "ECSClient", *, cluster: str, service: str) -> None:
        self._ecs = ecs
        self._cluster = cluster
        self._service = service

    def running_tasks(self) -> int:
        """How many tasks run. Raises as `check_tasks` does."""
        return self._describe()["runningCount"]

    def _describe(self) -> "ServiceTypeDef":
        answer = self._ecs.describe_services(cluster=self._cluster, services=[self._service])
        if not answer["services"]:
            reasons = ", ".join(failure.get("reason", "?") for failure in answer["failures"])
            raise ValueError(f"ecs_service: there is no {self._service!r} in cluster {self._cluster!r} ({reasons})")
        return answer["services"][0]

    @activity.defn
    def check_tasks(self, request: CheckTasks) -> list[Check]:
        """First-response check 4: does the auto-scaler respond? The current counts come from DescribeServices."""
        started = time.perf_counter()
        service = self._describe()
        running, desired = service["runningCount"], service["desiredCount"]
        now = datetime.now(UTC)
        if running < desired:
            finding = f"{running} tasks run, {desired} are wanted: scaling is in progress"
        else:
            finding = f"{running} tasks run, as wanted"
        return [
            Check(
                name="ECS task count",
                finding=f"{finding} ({request.baseline_tasks} at the baseline)",
                breaching=running < desired,
                evidence=evidence_of(
                    {EvidenceKey.TASKS_RUNNING: running, EvidenceKey.TASKS_DESIRED: desired},
                    f"ecs DescribeServices {self._cluster}/{self._service}",
                    now,
                    "not in the answer",
                ),
                observed_at=now,
                duration_ms=(time.perf_counter() - started) * 1000,
            )
        ]
