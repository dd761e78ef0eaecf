"""One incident, from the alarm to the report: read, mitigate, verify, let people decide, give back, clean up."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, ChildWorkflowError, is_cancelled_exception

from activities.entities import EntityActivities
from activities.latency import LatencyActivities
from activities.leases import LeaseActivities
from activities.report import ReportActivities
from domain.alarms import AlarmChange, AlarmState
from domain.calendar import CalendarEvent
from domain.capacity import DemandOutcome
from domain.evidence import Check, Evidence, EvidenceKey
from domain.incident import CalendarProposal, IncidentRecord, LeverName, LeverStatus, Phase, RunbookName, cut, utc
from domain.knobs import Holder, LeaseRequest
from domain.messages import (
    ALARM_CHANGED,
    ALARM_REPEATED,
    CAPACITY_CHANGED,
    INCIDENT_WORKFLOW,
    LEASES_LOST,
    LEVERS_CHANGED,
    AlarmRepeats,
    AssessIncident,
    CleanupInput,
    CleanupResult,
    IncidentInput,
    LeversChanged,
    MeasureBudget,
    MitigationInput,
    MitigationResult,
    ReleaseLeases,
    ReportInput,
    TakeLeases,
)
from domain.mitigation import MitigationPlan
from workflows._approval import DecidedByPeople
from workflows._evidence import assess, diagnose, first_response
from workflows._mitigation import demand_end, take
from workflows._people import MAX_TEXT
from workflows._record import AWS_SUPPORT, ON_CALL, SENIOR
from workflows._recovery import verify
from workflows._step import failure, load_policy, mutate, read
from workflows._way_back import decide_way_back
from workflows.latency_regression import LatencyRegressionWorkflow
from workflows.post_incident_cleanup import PostIncidentCleanupWorkflow
from workflows.scaling_lag_mitigation import ScalingLagMitigationWorkflow
from workflows.throttle_mitigation import ThrottleMitigationWorkflow

MAX_REASON = 300
"""Characters of an alarm's reason that go on record."""
MAX_TO_DO = 30
CAPACITY_TO_DO = "capacity: "
"""Begins what is to be done about units that did not come."""
PROLONG_WITHIN = timedelta(minutes=1)
"""How long a try to prolong the demand may keep people's decisions waiting; the next renewal tries again."""
BACKGROUND = timedelta(seconds=30)
"""How long the report waits for late evidence and pages that are still being sent."""


MITIGATIONS: dict[RunbookName, Callable[[Any, MitigationInput], Awaitable[MitigationResult]]] = {
    "throttle": ThrottleMitigationWorkflow.run,
    "scaling-lag": ScalingLagMitigationWorkflow.run,
    "latency": LatencyRegressionWorkflow.run,
}


@workflow.defn(name=INCIDENT_WORKFLOW)
class IncidentWorkflow(DecidedByPeople):
    """At most one is open per incident key."""

    @workflow.init
    def __init__(self, input: IncidentInput) -> None:
        info = workflow.info()
        super().__init__(
            IncidentRecord(
                incident_id=info.workflow_id,
                run_id=info.run_id,
                key=input.key,
                model=input.model,
                runbook=input.runbook,
                severity="SEV2" if input.runbook else "SEV3",
                alarm=input.alarm,
                opened_at=workflow.now(),
            )
        )
        self._alarms: dict[str, AlarmChange] = {input.alarm.alarm_name: input.alarm}
        self._leases_lost = False
        self._evidence = Evidence()
        self._read_before: list[Check] = []
        """What was read before the levers, and counts although they have changed it."""
        self._advised = ""

    # ------------------------------------------------------------ what arrives

    @workflow.signal(name=ALARM_CHANGED)
    def alarm_changed(self, change: AlarmChange) -> None:
        """An alarm of this key changed. What is not newer than what is known counts as a repeat."""
        known = self._alarms.get(change.alarm_name)
        if known is not None and change.changed_at <= known.changed_at:
            if change.message_id != self.record.alarm.message_id:
                self.record.alarm_times += 1
            return
        joins = known is None and self.record.alarm_on
        self._alarms[change.alarm_name] = change
        self.record.alarm_on = any(alarm.state is AlarmState.ALARM for alarm in self._alarms.values())
        if change.state is AlarmState.ALARM:
            self.record.alarm_times += 1
            # Another alarm about the same, while the first is on, is no return: what we did has not had its time yet.
            if not joins and self.record.phase in (Phase.VERIFYING, Phase.AWAITING_DECISION, Phase.REVERTING):
                self.alarm_returned = True
            if known is None and self.record.runbook is None:
                self._page_alarm(change)
            if self.record.phase is Phase.CLEANUP and not self.abort_asked:
                self.page(ON_CALL, "the alarm returned during cleanup; a new incident opens once this one has closed")
        self.note("alarm", f"{change.alarm_name} is {change.state}: {cut(change.reason, MAX_REASON)}")

    @workflow.signal(name=ALARM_REPEATED)
    def alarm_repeated(self, repeats: AlarmRepeats) -> None:
        """Duplicates change nothing but a counter."""
        self.record.alarm_times += repeats.count

    @workflow.signal(name=LEVERS_CHANGED)
    def levers_changed(self, change: LeversChanged) -> None:
        """The mitigation moved levers."""
        for lever in change.levers:
            self.set_lever(lever)
            if lever.status is LeverStatus.FAILED:
                self.page(SENIOR, f"lever {lever.name} failed: {lever.detail}")
                self._to_do(f"lever {lever.name} failed: {lever.detail}")
            detail = f". {lever.detail}" if lever.detail else ""
            self.note("lever", f"{lever.name}: {lever.before} → {lever.after}: {lever.status}{detail}")

    @workflow.signal(name=CAPACITY_CHANGED)
    def capacity_changed(self, outcome: DemandOutcome) -> None:
        """The capacity workflow says what became of the demand."""
        lever = self.record.lever(LeverName.CAPACITY)
        if lever is None:
            return
        lever.detail = outcome.detail
        if outcome.status == "in_service":
            lever.landed_at = lever.landed_at or workflow.now()
            self.record.to_do = [item for item in self.record.to_do if not item.startswith(CAPACITY_TO_DO)]
        if outcome.status == "failed":
            self.page(AWS_SUPPORT, f"provisioned throughput request failed: {outcome.detail}")
            self._to_do(f"{CAPACITY_TO_DO}{outcome.detail}")
        if outcome.status == "withdrawn" and lever.status is LeverStatus.IN_FORCE:
            lever.status, lever.released_at = LeverStatus.RELEASED, workflow.now()
            self.page(SENIOR, f"the capacity that the incident held is gone: {outcome.detail}")
        self.note("capacity", outcome.detail)

    @workflow.signal(name=LEASES_LOST)
    def leases_lost(self) -> None:
        """Redis lost its state: leases are put back at once."""
        self._leases_lost = True

    # ------------------------------------------------------------ the run

    @workflow.run
    async def run(self, input: IncidentInput) -> IncidentRecord:
        self.note("alarm", f"{input.alarm.alarm_name} is {input.alarm.state}: {cut(input.alarm.reason, MAX_REASON)}")
        if input.runbook is None or input.model is None:
            self.snapshot = await load_policy()
            await self._triage()
        else:
            await self._handle()
        await self._report()
        if self.abort_asked:
            await self._snooze()
        self.enter(Phase.CLOSED, waiting_for="", next_step="")
        await workflow.wait_condition(workflow.all_handlers_finished)
        return self.record

    async def _handle(self) -> None:
        plan = await self._assess()
        if plan is None:
            self.note("finding", f"the policy has no model {self.model!r}, so no runbook can run")
            await self._triage()
            return
        keeper = asyncio.create_task(self._keep_leases())
        if self.now_snapshot.broken:
            self.page(ON_CALL, f"the policy file is broken and the last good one serves: {self.now_snapshot.broken}")
        self.background.append(asyncio.create_task(self._investigate()))
        next_step = "again"
        while next_step == "again" and not self.abort_asked:
            await self._mitigate(plan)
            next_step = "verify"
            while next_step == "verify":
                verdict = await verify(self)
                if verdict == "recovered":
                    await self._measure()
                next_step = await decide_way_back(self) if verdict == "recovered" else verdict
            if next_step == "again" and not self.abort_asked:
                self.alarm_returned = False
                plan = await self._assess() or plan
                if self.record.runbook == "latency":
                    self.background.append(asyncio.create_task(self._investigate()))
        keeper.cancel()
        await self._clean_up()

    async def _assess(self) -> MitigationPlan | None:
        """Read the policy (at first) and the load, and plan. Unreadable load: free levers act, nothing is bought.

        None: the policy does not have the model.
        """
        request = AssessIncident(model=self.model, now=workflow.now(), snapshot=self.snapshot)
        try:
            assessment = await assess(request, self.record.runbook)
        except ActivityError as error:
            self.page(SENIOR, f"no plan can be made yet: {failure(error)[1]}")
            request = request.model_copy(update={"snapshot": self.snapshot or await load_policy()})
            assessment = await assess(request, self.record.runbook)
        self.snapshot = assessment.snapshot
        if assessment.plan is None:
            return None
        self.record.runbook, self.record.units_before = assessment.runbook, assessment.units_in_service
        self._read_before = assessment.checks
        self.record.budget_before = self.record.budget_before or assessment.budget
        if assessment.why:
            self.note("finding", assessment.why)
        if assessment.unread:
            so = "" if self.record.runbook == "latency" else ", so nothing is bought"
            self.note("finding", f"the metrics could not be read{so}: {assessment.unread}")
        else:
            self.read(assessment.load)
        return assessment.plan

    async def _investigate(self) -> None:
        """The first-response checks. The levers come first: they begin once these act, or soon beside them."""
        with contextlib.suppress(TimeoutError):
            await workflow.wait_condition(
                lambda: self.record.mitigated_at is not None,
                timeout=self.now_snapshot.policy.evidence.budget,
                timeout_summary="The checks do not wait longer for the levers",
            )
        self.background.append(asyncio.create_task(self._link_previous()))

        runbook = self.record.runbook

        async def found(checks: list[Check], complete: bool) -> None:
            self.record.checks = [*checks, *self._read_before]
            for check in self.record.checks:
                self._evidence = self._evidence.merge(check.evidence)
            self.record.diagnosis = await diagnose(self._evidence, runbook, self.now_snapshot.policy)
            self._propose()
            self.note("finding", f"{'' if complete else 'so far: '}{self.record.diagnosis.sentence}")

        try:
            await first_response(self.model, runbook, self.record.incident_id, self.now_snapshot, found)
        except ActivityError as error:
            self.note("finding", f"the diagnosis failed: {failure(error)[1]}")
        if runbook == "latency":
            self._advise()

    def _advise(self) -> None:
        """Where no lever helps people are told what was found, and what to do; once for each finding."""
        diagnosis = self.record.diagnosis
        if diagnosis is None or self.record.held or diagnosis.sentence == self._advised:
            return
        self._advised = diagnosis.sentence
        off = [f"{check.name}: {check.finding}" for check in self.record.checks if check.breaching]
        self.page(ON_CALL, f"{diagnosis.sentence} No lever of ours helps. {'. '.join(off)}")
        self._to_do(diagnosis.sentence)

    async def _measure(self) -> None:
        """The latency budget once recovered, beside the one at the start."""
        if self.record.runbook != "latency":
            return
        request = MeasureBudget(model=self.model, policy=self.now_snapshot.policy)
        try:
            self.record.budget_after = await read(
                LatencyActivities.measure_budget, request, summary="Measure the latency budget"
            )
        except ActivityError as error:
            self.note("note", f"the latency budget could not be measured: {failure(error)[1]}")

    async def _mitigate(self, plan: MitigationPlan) -> None:
        if self.approved_by is not None:
            self.note("decision", "the approval does not count any more: the alarm returned", self.approved_by)
        self.approved_by = self.release_asked = None
        self.record.recovered_at = None
        self.record.recovery_checks = []
        attempt = self.next_attempt(*(lever.name for lever in plan.levers if lever.name is not LeverName.CAPACITY))
        self.enter(Phase.MITIGATING, waiting_for="the levers", next_step="verify recovery")
        child = workflow.execute_child_workflow(
            MITIGATIONS[self.record.runbook or "throttle"],
            MitigationInput(
                incident_id=self.record.incident_id,
                run_id=self.record.run_id,
                model=self.model,
                reason=f"{self.record.key}: {self.record.alarm.alarm_name}",
                plan=plan,
                snapshot=self.now_snapshot,
                held=[lever for lever in self.record.held if lever.status is LeverStatus.IN_FORCE],
                attempt=attempt,
            ),
            id=f"{self.record.incident_id}-mitigation-{attempt}",
            static_summary=f"Mitigation {attempt} of {self.record.key}",
        )
        try:
            result = await self.unless(lambda: self.abort_asked, child)
        except ChildWorkflowError as error:
            self.page(SENIOR, f"the mitigation failed: {error.cause}")
            return
        if result is not None:
            self._mitigated(result)

    def _mitigated(self, result: MitigationResult) -> None:
        for lever in result.levers:
            known = self.record.lever(lever.name)
            # A notice of the capacity workflow may have come first: its word on the lever is the newer one.
            self.set_lever(lever if known is None or known.status is not lever.status else known)
        self.record.arithmetic = result.arithmetic
        if any(lever.status is not LeverStatus.NOT_NEEDED for lever in result.levers):
            self.record.mitigated_at = self.record.mitigated_at or workflow.now()
        capacity = self.record.lever(LeverName.CAPACITY)
        if capacity is not None and capacity.demand is not None:
            before = self.units_of_the_hour if self.record.units_before is None else self.record.units_before
            self.record.units_bought = max(0, capacity.demand.units - before)
        self.note("phase", "mitigation: " + ", ".join(f"{lever.name} {lever.status}" for lever in result.levers))

    async def _triage(self) -> None:
        """An alarm that maps to nothing: a person must look; closes once it is OK and somebody acknowledged."""
        alarm = self.record.alarm
        self._page_alarm(alarm)
        while not self.abort_asked and (self.record.alarm_on or self.record.acknowledged_by is None):
            remind_after = self.now_snapshot.policy.escalation.approval_reminder
            self.enter(
                Phase.AWAITING_DECISION,
                waiting_for=f"on-call to acknowledge, and the alarm's OK: {_origin(alarm)}",
                next_step="remind people",
                next_at=workflow.now() + remind_after,
            )
            try:
                await workflow.wait_condition(
                    lambda: self.abort_asked or (not self.record.alarm_on and self.record.acknowledged_by is not None),
                    timeout=remind_after,
                    timeout_summary="Waiting for on-call to acknowledge, and for OK",
                )
            except TimeoutError:
                if self.record.acknowledged_by is None:
                    self.page(ON_CALL, f"alarm {alarm.alarm_name} is still nobody's")
        self.record.outcome = f"Triage ended: acknowledged by {self.record.acknowledged_by or 'nobody'}."

    def _page_alarm(self, change: AlarmChange) -> None:
        self.page(ON_CALL, f"{_origin(change)}: {change.reason}")

    # ------------------------------------------------------------ beside the run

    async def _keep_leases(self) -> None:
        """Renew every lease in one call: every hour, and at once when Redis lost them."""
        while True:
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(
                    lambda: self._leases_lost,
                    timeout=self.now_snapshot.policy.leases.renew_every,
                    timeout_summary="Next renewal of the leases",
                )
            lost, self._leases_lost = self._leases_lost, False
            self._remind()
            leases = [lever.lease for lever in self.record.held if lever.lease and lever.status is LeverStatus.IN_FORCE]
            if lost:
                await self._release_former({lease.lease_id for lease in leases})
            if leases:
                await self._renew(leases, lost)
            async with self.deciding:  # an extension at the same moment must not be overtaken
                await self._prolong_demand()

    async def _renew(self, leases: list[LeaseRequest], lost: bool) -> None:
        try:
            changed = await mutate(LeaseActivities.renew_leases, TakeLeases(leases=leases), summary="Renew the leases")
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            self.page(ON_CALL, f"leases could not be renewed and will lapse: {failure(error)[1]}")
            return
        if lost or changed:
            why = "Redis lost writes" if lost else "nobody renewed them in time, and they had lapsed"
            self.note("lever", f"leases renewed, because {why}: {', '.join(changed) or 'all were there'}")

    async def _release_former(self, held: set[str]) -> None:
        """What was given back: a replica that had lost the last writes may have brought it back.

        Not while levers are being taken: their leases are known before they are held.
        """
        if self.record.phase not in (Phase.VERIFYING, Phase.AWAITING_DECISION):
            return
        levers = {lever.lease.lease_id for lever in self.record.held if lever.lease}
        former = [lease_id for lease_id in self.undo if lease_id not in held | levers]
        if not former:
            return
        try:
            await mutate(
                LeaseActivities.release_leases,
                ReleaseLeases(
                    lease_ids=former,
                    holder=Holder(kind="incident", id=self.record.incident_id),
                    reason="was given back before Redis lost writes",
                ),
                summary="Release again what was given back",
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            self.note("note", f"what was given back could not be released again: {failure(error)[1]}")

    def _remind(self) -> None:
        """Remind people of an incident that nobody acknowledged; past a lever's hold the next tier, and whoever
        acknowledged. With the renewals, so that it costs no timer."""
        policy, record = self.now_snapshot.policy, self.record
        now = workflow.now()
        overdue = any(lever.hold_until and lever.hold_until < now for lever in record.held)
        if record.phase is not Phase.AWAITING_DECISION or (record.acknowledged_by is not None and not overdue):
            return
        since = next(entry.at for entry in reversed(record.timeline) if entry.kind in ("phase", "page"))
        if now - since >= policy.escalation.approval_reminder - policy.leases.renew_every / 2:
            self.page(SENIOR if overdue else ON_CALL, f"{record.key} waits for a decision. {self.running_cost}")

    async def _prolong_demand(self) -> None:
        """Past its hold a demand goes on while the incident lives: only people and the guard end it."""
        policy, lever = self.now_snapshot.policy, self.record.lever(LeverName.CAPACITY)
        if lever is None or lever.demand is None or lever.status is not LeverStatus.IN_FORCE:
            return
        if lever.demand.end - workflow.now() >= policy.leases.cache_ttl_seconds:
            return
        end = demand_end(workflow.now() + policy.leases.renew_every, policy)
        lever.demand = lever.demand.model_copy(update={"end": end})
        [taken] = await take([lever], within=PROLONG_WITHIN)
        if taken.status is LeverStatus.FAILED:
            self.page(ON_CALL, f"the demand for capacity could not be prolonged and will end: {taken.detail}")

    async def _link_previous(self) -> None:
        try:
            self.record.previous_incident = await read(
                EntityActivities.previous_run, self.record.incident_id, summary="Find the last incident of this key"
            )
        except ActivityError as error:
            self.note("note", f"the last incident of this key could not be found: {failure(error)[1]}")

    def _to_do(self, text: str) -> None:
        if text not in self.record.to_do and len(self.record.to_do) < MAX_TO_DO:
            self.record.to_do.append(cut(text, MAX_TEXT))

    # ------------------------------------------------------------ the end

    async def _clean_up(self) -> None:
        self.enter(Phase.CLEANUP, waiting_for="cleanup", next_step="report")
        event = self._event()
        try:
            result = await workflow.execute_child_workflow(
                PostIncidentCleanupWorkflow.run,
                CleanupInput(
                    incident_id=self.record.incident_id,
                    model=self.model,
                    lease_ids=self.undo,
                    demand_id=None if self.record.runbook == "latency" else self.record.incident_id,
                    reason=self._why_it_ends(),
                    event=event,
                    snapshot=self.now_snapshot,
                ),
                id=f"{self.record.incident_id}-cleanup",
                static_summary=f"Cleanup after {self.record.key}",
            )
        except ChildWorkflowError as error:
            self.page(SENIOR, f"the cleanup failed, leases and demand end by themselves: {error.cause}")
            result = CleanupResult(
                knobs_at_baseline=False,
                capacity_at_baseline=False,
                still_held=["unknown: the cleanup failed"],
                event_written=False,
                to_do=[f"look at the cleanup workflow: {error.cause}"],
            )
        for lever in self.record.held:
            lever.status = LeverStatus.RELEASED
            lever.released_at = lever.released_at or workflow.now()
        self.record.knobs_at_baseline = result.knobs_at_baseline
        self.record.capacity_at_baseline = result.capacity_at_baseline
        self.record.still_held = result.still_held
        self.record.to_do += result.to_do
        proposal = self.record.calendar_proposal
        if proposal is not None:
            proposal.written = result.event_written
            proposal.event_id = event.event_id if event is not None and result.event_written else None
            if not result.event_written:
                self._to_do(f"calendar: add {proposal.event_type} with {proposal.multiplier:g}x")
        self.record.outcome = self._outcome()
        self.note("phase", self.record.outcome)

    def _why_it_ends(self) -> str:
        record = self.record
        if record.taken_over_by is not None and record.taken_over_until is not None:
            return f"taken over by {record.taken_over_by} until {utc(record.taken_over_until)}"
        return "aborted" if self.abort_asked else f"cleanup after {record.key}"

    def _outcome(self) -> str:
        recovery = self.record.recovery_detail or "it had not recovered"
        if self.record.knobs_at_baseline and self.record.capacity_at_baseline is not False:
            capacity = "" if self.record.capacity_at_baseline is None else " and capacity"
            rest = f"knobs{capacity} are at their baseline"
        else:
            rest = "; ".join(self.record.still_held) or "not everything is back at its baseline"
        how = self._why_it_ends() if self.abort_asked else "closed"
        return f"{how[0].upper()}{how[1:]}. {recovery[0].upper()}{recovery[1:]}; {rest}."

    async def _report(self) -> None:
        with contextlib.suppress(TimeoutError):
            await workflow.wait_condition(
                lambda: all(task.done() for task in self.background),
                timeout=BACKGROUND,
                timeout_summary="Late evidence, and pages that are still being sent",
            )
        self.record.closed_at = workflow.now()
        self.show()
        try:
            result = await mutate(
                ReportActivities.write_report,
                ReportInput(record=self.record, snapshot=self.now_snapshot),
                summary="Write the report",
            )
            self.record.report_path = result.html_path
        except ActivityError as error:
            self.note("note", f"the report could not be written: {failure(error)[1]}")

    async def _snooze(self) -> None:
        """The automation stays away until OK, or until the snooze or the person's time ends."""
        until = self.record.taken_over_until or workflow.now() + self.now_snapshot.policy.escalation.snooze
        snooze = max(until - workflow.now(), timedelta(0))
        self.enter(
            Phase.SNOOZED,
            waiting_for="the alarm's OK, or the end of the snooze",
            next_step="close",
            next_at=workflow.now() + snooze,
        )
        try:
            await workflow.wait_condition(
                lambda: not self.record.alarm_on, timeout=snooze, timeout_summary=f"Snoozed: {self._why_it_ends()}"
            )
        except TimeoutError:
            self.note("phase", "the snooze ended while the alarm is still on")

    # ------------------------------------------------------------ what is learnt

    def _propose(self) -> None:
        """Root cause 3 teaches the calendar a kind of event; it is written when somebody approves the revert."""
        diagnosis = self.record.diagnosis
        learnt = self.now_snapshot.policy.calendar.event_types.get("final_chapter")
        if diagnosis is None or learnt is None:
            return
        if any(cause.id == "multiplier-underestimated" for cause in diagnosis.causes):
            planned = self._evidence.number(EvidenceKey.EVENT_MULTIPLIER) or 0
            self.record.calendar_proposal = CalendarProposal(
                event_type="final_chapter",
                multiplier=learnt.multiplier,
                reason=f"{planned:g}x was planned and the traffic outgrew it",
            )

    def _event(self) -> CalendarEvent | None:
        """The proposal as a calendar event, if somebody approved the revert."""
        proposal, starts = self.record.calendar_proposal, self._evidence.value(EvidenceKey.EVENT_STARTS_AT)
        approvers = [
            decision.who
            for decision in self.record.decisions
            if decision.action == "approve_revert" and decision.outcome == "accepted"
        ]
        if proposal is None or not isinstance(starts, str) or not approvers:
            return None
        starts_at = datetime.fromisoformat(starts)
        lead = self.now_snapshot.policy.calendar.event_types[proposal.event_type].lead_time
        return CalendarEvent(
            event_id=f"{proposal.event_type}-{starts_at:%Y-%m-%d}",
            type=proposal.event_type,
            starts_at=starts_at,
            multiplier=proposal.multiplier,
            models=(self.model,),
            lead_time=self.now_snapshot.clock.business_duration(lead),
            source=self.record.incident_id,
            asked_by=approvers[-1],
        )


def _origin(change: AlarmChange) -> str:
    """Why people must look."""
    found = change.source == "health-check"
    return "the health check found it" if found else f"no runbook knows alarm {change.alarm_name}"
