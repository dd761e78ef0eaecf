"""The health check as people ask for it: the last result, or a new one now."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from pydantic import AwareDatetime, BaseModel
from temporalio.client import (
    Client,
    ScheduleActionExecutionStartWorkflow,
    ScheduleOverlapPolicy,
    WorkflowExecutionStatus,
    WorkflowFailureError,
)
from temporalio.service import RPCError, RPCStatusCode

from domain.health import HEALTH_SCHEDULE, HealthReport
from domain.incident import span
from ops.asking import RPC_TIMEOUT, Asking, ExitCode, OpsError

M = TypeVar("M", bound=BaseModel)

# Technical.
LOOK_EVERY_SECONDS = 0.1
CHECK_WITHIN = timedelta(minutes=2)
"""How long a person waits for a check: every system that is away costs it half a minute."""
SLACK = timedelta(seconds=30)


class Health(BaseModel):
    """A check, and whether it still says something."""

    report: HealthReport
    late_since: AwareDatetime | None
    """The last check is so old that a newer one should have come; None: it is recent."""

    @property
    def healthy(self) -> bool:
        """Nothing is open, and the check is recent."""
        return not self.report.open and self.late_since is None


async def run_now(client: Client, schedule_id: str, kind: type[M], within: timedelta) -> M:
    """The result of a run that begins now, after one that is under way; it has the last run's result to begin from.

    Raises:
        RPCError: NOT_FOUND when there is no such schedule; Temporal did not answer.
        TimeoutError: no worker came to the end of a run in time.
        WorkflowFailureError: the run failed.
    """
    handle = client.get_schedule_handle(schedule_id)
    async with asyncio.timeout(within.total_seconds()):
        before = (await handle.describe()).info.num_actions
        # Buffered: skipped while another one runs, the answer would be an older one.
        await handle.trigger(overlap=ScheduleOverlapPolicy.BUFFER_ONE)
        while True:
            info = (await handle.describe()).info
            if info.num_actions > before:
                break
            await asyncio.sleep(LOOK_EVERY_SECONDS)
        run = info.recent_actions[-1].action
        assert isinstance(run, ScheduleActionExecutionStartWorkflow)
        result: M = await client.get_workflow_handle(run.workflow_id, result_type=kind).result()
        return result


class HealthChecks(Asking):
    """Actions on the health check."""

    async def last_check(self) -> Health:
        """The last check that came to its end.

        Raises:
            OpsError: there is none, or Temporal does not answer.
        """
        try:
            async with self._errors():
                described = await self._client.get_schedule_handle(HEALTH_SCHEDULE).describe(rpc_timeout=RPC_TIMEOUT)
                for action in reversed(described.info.recent_actions):
                    run = action.action
                    assert isinstance(run, ScheduleActionExecutionStartWorkflow)
                    handle = self._client.get_workflow_handle(run.workflow_id, result_type=HealthReport)
                    status = (await handle.describe(rpc_timeout=RPC_TIMEOUT)).status
                    if status is WorkflowExecutionStatus.COMPLETED:
                        report: HealthReport = await handle.result()
                        late_at = report.checked_at + 2 * described.schedule.spec.intervals[0].every + SLACK
                        return Health(report=report, late_since=late_at if late_at < datetime.now(UTC) else None)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
        raise OpsError(
            "No health check has come to its end yet.",
            "See that a runbook worker runs (`runbooks dev` starts one), then: runbooks health --now",
            ExitCode.NOT_FOUND,
        )

    async def check_now(self) -> Health:
        """A new check; a schedule that is missing is made first.

        Raises:
            OpsError: no worker answers, the policy cannot be read, or the check failed.
        """
        try:
            async with self._errors():
                try:
                    report = await run_now(self._client, HEALTH_SCHEDULE, HealthReport, CHECK_WITHIN)
                except RPCError as error:
                    if error.status is not RPCStatusCode.NOT_FOUND:
                        raise
                    await self._write_schedules()
                    report = await run_now(self._client, HEALTH_SCHEDULE, HealthReport, CHECK_WITHIN)
        except TimeoutError:
            raise OpsError(
                f"No health check came to its end within {span(CHECK_WITHIN)}.",
                f"See that a runbook worker runs on task queue {self._settings.task_queue!r}, and what the check waits "
                f"for: {self._settings.temporal_ui_url}",
                ExitCode.UNREACHABLE,
            ) from None
        except WorkflowFailureError as error:
            raise OpsError(
                f"The health check failed: {error.cause}", "See its workflow in the Temporal UI.", ExitCode.UNEXPECTED
            ) from None
        return Health(report=report, late_since=None)

    async def _write_schedules(self) -> None:
        from activities.schedules import ensure_schedules
        from activities.settings import ConfigurationError, load_policy
        from domain.messages import PolicySnapshot
        from workers.schedules import schedules

        settings = self._settings
        try:
            policy = load_policy(settings.policy_file, settings.clock)
        except ConfigurationError as error:
            raise OpsError(str(error), "Mend the policy file.", ExitCode.USAGE) from None
        snapshot = PolicySnapshot(policy=policy, clock=settings.clock)
        await ensure_schedules(self._client, schedules(snapshot), settings.task_queue)
