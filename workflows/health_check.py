"""The health check: look at everything, judge, mend what the policy allows, tell people the rest, give a heartbeat."""

import asyncio
from collections.abc import Awaitable
from datetime import datetime, timedelta
from typing import TypeVar

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.bedrock import BedrockActivities
from activities.decisions import DecisionActivities
from activities.health import HealthActivities
from activities.permissions import PermissionActivities
from activities.schedules import ScheduleActivities
from domain.alarms import AlarmState
from domain.health import (
    HEALTH_CHECK_WORKFLOW,
    Facts,
    Finding,
    HealthMetrics,
    HealthReport,
    JudgeHealth,
    Repair,
    Source,
    details,
    headline,
)
from domain.messages import DeleteModel, PolicySnapshot
from domain.permissions import CheckPermissions
from workflows._step import decide, failure, last_result, load_policy, mutate, read
from workflows.search_attributes import SERVICE

R = TypeVar("R")

WITHIN = timedelta(minutes=1)
"""For each step that changes something: the next check tries again."""


@workflow.defn(name=HEALTH_CHECK_WORKFLOW)
class HealthCheckWorkflow:
    """One check. Its schedule hands each run the result of the last one, so that nothing is told twice."""

    def __init__(self) -> None:
        self._unread: dict[Source, str] = {}

    @workflow.run
    async def run(self) -> HealthReport:
        """Answers what is wrong; a system that cannot be read is a finding, not a failure."""
        workflow.upsert_search_attributes([SERVICE.value_set("mangaassist")])
        before = last_result(HealthReport)
        snapshot = await load_policy()
        facts = await self._look(snapshot)
        request = JudgeHealth(facts=facts, snapshot=snapshot, before=before)
        report = await decide(DecisionActivities.judge_health, request, summary="Judge what was read")
        workflow.set_current_details(details(report))
        report = await self._mend(report, snapshot)
        report = await self._tell(report)
        workflow.set_current_details(details(report))
        # Last: a check that did not come to its end is none, and the missing heartbeat says so.
        metrics = HealthMetrics(at=workflow.now(), failed_provisioning=report.failed_provisioning)
        try:
            await mutate(
                HealthActivities.publish_health, metrics, summary=f"Heartbeat: {headline(report)}"[:200], within=WITHIN
            )
        except ActivityError as error:  # that it is missing is what the alarm is for; what was told must stand
            workflow.logger.error("no heartbeat", extra={"error": failure(error)[1]})
        return report

    async def _look(self, snapshot: PolicySnapshot) -> Facts:
        fleet, writers, routes, schedules, permissions = await asyncio.gather(
            self._read(Source.BEDROCK, read(BedrockActivities.look_at_fleet, snapshot, summary="List the fleet")),
            self._read(
                Source.WRITERS,
                read(
                    HealthActivities.look_at_writers,
                    list(snapshot.policy.models),
                    summary="Ask the capacity workflows what they know",
                ),
            ),
            self._read(Source.REDIS, read(BedrockActivities.look_at_routes, None, summary="Read the routes")),
            self._read(
                Source.SCHEDULES,
                read(ScheduleActivities.look_at_schedules, snapshot, summary="Look at the schedules and their runs"),
            ),
            self._read(
                Source.PERMISSIONS,
                read(PermissionActivities.check_permissions, CheckPermissions(), summary="Check our permissions"),
            ),
        )
        return Facts(
            now=workflow.now(),
            fleet=tuple(fleet or ()),
            writers=writers or {},
            routes=routes or {},
            schedules=tuple(schedules or ()),
            permissions=permissions.denied if permissions else (),
            unread=self._unread,
        )

    async def _read(self, source: Source, reading: Awaitable[R]) -> R | None:
        try:
            return await reading
        except ActivityError as error:
            self._unread[source] = failure(error)[1]
            return None

    async def _mend(self, report: HealthReport, snapshot: PolicySnapshot) -> HealthReport:
        """Each repair once, however many findings ask for it."""
        done: dict[Repair, tuple[str, str]] = {}
        for repair in dict.fromkeys(finding.repair for finding in report.findings if finding.repair):
            try:
                done[repair] = await self._repair(repair, snapshot), ""
            except ActivityError as error:
                done[repair] = "", failure(error)[1]
        return _with(
            report,
            {
                finding.finding_id: dict(zip(("repaired", "repair_error"), done[finding.repair], strict=True))
                for finding in report.findings
                if finding.repair
            },
        )

    async def _repair(self, repair: Repair, snapshot: PolicySnapshot) -> str:
        about = repair.about
        if repair.kind == "reconcile":
            return await mutate(HealthActivities.reconcile_writer, about, summary=f"Reconcile {about}", within=WITHIN)
        if repair.kind == "start-capacity":
            summary = f"Start the capacity workflow of {about}"
            return await mutate(HealthActivities.start_writer, about, summary=summary, within=WITHIN)
        if repair.kind == "schedules":
            done = await mutate(
                ScheduleActivities.write_schedules, snapshot, summary="Write the schedules", within=WITHIN
            )
            return ", ".join(done) or "nothing was left to do"
        summary = f"Delete the orphan {about}"[:200]
        await mutate(BedrockActivities.delete_model, DeleteModel(arn=about), summary=summary, within=WITHIN)
        return f"{about} was deleted"

    async def _tell(self, report: HealthReport) -> HealthReport:
        told: dict[str, dict[str, str]] = {}
        for finding in report.findings:
            if finding.finding_id in report.to_tell and await self._told(finding, AlarmState.ALARM, finding.since):
                told[finding.finding_id] = {"incident": finding.incident_key}
        still = [finding for finding in report.over if not await self._told(finding, AlarmState.OK, report.checked_at)]
        # An incident that could not be told is told by the next check.
        report = _with(report, told)
        return report.model_copy(update={"findings": (*report.findings, *still)})

    async def _told(self, finding: Finding, state: AlarmState, at: datetime) -> bool:
        summary = f"Tell incident {finding.incident_key}: {finding.finding_id} is {state}"[:200]
        try:
            await mutate(HealthActivities.tell_incident, finding.news(state, at), summary=summary, within=WITHIN)
        except ActivityError as error:
            workflow.logger.error("an incident could not be told", extra={"error": failure(error)[1]})
            return False
        return True


def _with(report: HealthReport, changes: dict[str, dict[str, str]]) -> HealthReport:
    """The report with fields of its findings changed."""
    return report.model_copy(
        update={
            "findings": tuple(
                finding.model_copy(update=changes.get(finding.finding_id, {})) for finding in report.findings
            )
        }
    )
