"""One incident, from the alarm to the report: read, mitigate, verify, let people decide, give back, clean up."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import ActivityError, ChildWorkflowError

from activities.cloudwatch import CloudWatchActivities
from activities.decisions import DecisionActivities
from activities.entities import EntityActivities
from activities.leases import LeaseActivities
from activities.pages import PageActivities
from activities.report import ReportActivities
from domain.alarms import AlarmChange, AlarmState
from domain.calendar import CalendarEvent
from domain.capacity import DemandOutcome
from domain.evidence import Check, EvidenceKey
from domain.incident import (
    CalendarProposal,
    IncidentRecord,
    Lever,
    LeverName,
    LeverStatus,
    Phase,
    render_details,
)
from domain.load import LoadSnapshot, total_offered
from domain.messages import (
    ALARM_CHANGED,
    ALARM_REPEATED,
    CAPACITY_CHANGED,
    INCIDENT_WORKFLOW,
    LEASES_LOST,
    LEVER_CHANGED,
    AlarmRepeats,
    AwaitRecovery,
    CleanupInput,
    GuardRelease,
    IncidentInput,
    MitigationInput,
    Page,
    PolicySnapshot,
    ReportInput,
    TakeLeases,
    WatchRelease,
    load_query,
)
from domain.policy import Policy
from domain.runbooks.throttle import recovered_how
from workflows import _mitigation
from workflows._approval import DecidedByPeople
from workflows._evidence import diagnose, first_response, recovery_query
from workflows._step import decide, failure, load_policy, mutate, read, wait
from workflows.post_incident_cleanup import PostIncidentCleanupWorkflow
from workflows.throttle_mitigation import ThrottleMitigationWorkflow

T = TypeVar("T")

KEY = SearchAttributeKey.for_keyword("IncidentKey")
PHASE = SearchAttributeKey.for_keyword("IncidentPhase")
SEVERITY = SearchAttributeKey.for_keyword("Severity")
CAUSE = SearchAttributeKey.for_keyword("Cause")
SERVICE = SearchAttributeKey.for_keyword("Service")
HOLDS_LEASES = SearchAttributeKey.for_bool("HoldsLeases")

SENIOR_AND_TAM = "senior on-call and AWS TAM"
SENIOR = "senior on-call"
ON_CALL = "on-call"
BACKGROUND_SECONDS = 30
"""How long the report waits for late evidence and pages that are still being sent."""
AWS_SUPPORT = "on-call: contact AWS Support (Severity 1)"


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
                previous_incident=input.previous_run_id,
            )
        )
        self._input = input
        self._alarms: dict[str, AlarmChange] = {input.alarm.alarm_name: input.alarm}
        self._alarm_returned = False
        self._leases_lost = False
        self._attempt = 0
        self._undo: list[str] = []
        self._background: list[asyncio.Task[None]] = []
        self._pages = 0
        self._event_evidence: dict[EvidenceKey, Any] = {}
        self._shown: tuple[Any, ...] = ()

    # ------------------------------------------------------------ what arrives

    @workflow.signal(name=ALARM_CHANGED)
    def alarm_changed(self, change: AlarmChange) -> None:
        """An alarm of this key changed. What is not newer than what is known counts as a repeat."""
        known = self._alarms.get(change.alarm_name)
        if known is not None and change.changed_at <= known.changed_at:
            if change.message_id != self._input.alarm.message_id:
                self.record.alarm_times += 1
            return
        self._alarms[change.alarm_name] = change
        self.record.alarm_on = any(alarm.state is AlarmState.ALARM for alarm in self._alarms.values())
        if change.state is AlarmState.ALARM:
            self.record.alarm_times += 1
            if self.record.phase in (Phase.AWAITING_DECISION, Phase.REVERTING):
                self._alarm_returned = True
        self.note("alarm", f"{change.alarm_name} is {change.state}: {change.reason}")

    @workflow.signal(name=ALARM_REPEATED)
    def alarm_repeated(self, repeats: AlarmRepeats) -> None:
        """Duplicates change nothing but a counter."""
        self.record.alarm_times += repeats.count

    @workflow.signal(name=LEVER_CHANGED)
    def lever_changed(self, lever: Lever) -> None:
        """The mitigation moved a lever."""
        self._set_lever(lever)
        if lever.status is LeverStatus.FAILED:
            self._page(SENIOR, f"lever {lever.name} failed: {lever.detail}")
            self.record.to_do.append(f"lever {lever.name} failed: {lever.detail}")
        words = "in force" if lever.status is LeverStatus.IN_FORCE else str(lever.status)
        self.note("lever", f"{lever.name}: {lever.before} → {lever.after}: {words}. {lever.detail}".rstrip(". ") + ".")

    @workflow.signal(name=CAPACITY_CHANGED)
    def capacity_changed(self, outcome: DemandOutcome) -> None:
        """The capacity workflow says what became of the demand."""
        lever = self.record.lever(LeverName.CAPACITY)
        if lever is None:
            return
        lever.detail = outcome.detail
        if outcome.status == "in_service":
            lever.landed_at = lever.landed_at or workflow.now()
        if outcome.status == "failed":
            self._page(AWS_SUPPORT, f"provisioned throughput request failed: {outcome.detail}")
            self.record.to_do.append(f"capacity: {outcome.detail}")
        self.note("capacity", f"{outcome.units_in_service} of {outcome.units_wanted} units: {outcome.detail}")

    @workflow.signal(name=LEASES_LOST)
    def leases_lost(self) -> None:
        """Redis lost its state: leases are put back at once."""
        self._leases_lost = True

    # ------------------------------------------------------------ the run

    @workflow.run
    async def run(self, input: IncidentInput) -> IncidentRecord:
        self.snapshot = await load_policy()
        self.note("alarm", f"{input.alarm.alarm_name} is {input.alarm.state}: {input.alarm.reason}")
        if input.runbook is None or input.model is None:
            await self._triage()
        else:
            self._background.append(asyncio.create_task(self._link_previous()))
            await self._handle(input.model, self.snapshot)
        await self._report()
        if self.abort_asked:
            await self._snooze(self.snapshot.policy)
        self._phase(Phase.CLOSED, waiting_for="", next_step="")
        await workflow.wait_condition(workflow.all_handlers_finished)
        return self.record

    async def _handle(self, model: str, snapshot: PolicySnapshot) -> None:
        keeper = asyncio.create_task(self._keep_leases(snapshot.policy))
        load = await self._reread(snapshot)
        self._background.append(asyncio.create_task(self._investigate(model, snapshot)))
        again = True
        while again and not self.abort_asked:
            await self._mitigate(model, snapshot, load)
            verified = await self._verify(model, snapshot)
            again = not verified or await self._people(model, snapshot) == "again"
            if again and not self.abort_asked:
                self._alarm_returned = False
                load = await self._reread(snapshot)
        keeper.cancel()
        await self._clean_up(model, snapshot)

    async def _reread(self, snapshot: PolicySnapshot) -> LoadSnapshot:
        """Re-read before acting on the alarm's word. Unreadable: free levers still act, nothing is bought."""
        try:
            load = await read(
                CloudWatchActivities.read_load, load_query(snapshot.policy), summary="Re-read the metrics of the alarm"
            )
        except ActivityError as error:
            self.note("finding", f"the metrics could not be read, so nothing is bought: {failure(error)[1]}")
            return LoadSnapshot(observed_at=workflow.now())
        self.record.load_at_start = self.record.load_at_start or load
        self._peak(total_offered(load))
        return load

    async def _investigate(self, model: str, snapshot: PolicySnapshot) -> None:
        async def found(checks: list[Check], complete: bool) -> None:
            self.record.checks = checks
            self.record.diagnosis = await diagnose(checks)
            for check in checks:
                self._event_evidence |= {key: reading.value for key, reading in check.evidence.readings.items()}
            self._propose(model, snapshot)
            self.note("finding", f"{'' if complete else 'so far: '}{self.record.diagnosis.sentence}")

        await first_response(model, self.record.incident_id, snapshot, found)

    # ------------------------------------------------------------ mitigate and verify

    async def _mitigate(self, model: str, snapshot: PolicySnapshot, load: LoadSnapshot) -> None:
        self._attempt += 1
        self.approved_by = None
        self.record.recovered_at = None
        # Undo first: what the mitigation may take is known before it takes it.
        self._undo += [
            _mitigation.lease_id(self.record.run_id, name, self._attempt)
            for name in (LeverName.MODEL_ROUTING, LeverName.CACHE_TTL)
        ]
        self._phase(Phase.MITIGATING, waiting_for="the levers", next_step="verify recovery")
        child = workflow.execute_child_workflow(
            ThrottleMitigationWorkflow.run,
            MitigationInput(
                incident_id=self.record.incident_id,
                run_id=self.record.run_id,
                model=model,
                reason=f"{self.record.key}: {self.record.alarm.alarm_name}",
                load=load,
                snapshot=snapshot,
                held=[lever for lever in self.record.held if lever.status is LeverStatus.IN_FORCE],
                attempt=self._attempt,
            ),
            id=f"{self.record.incident_id}-mitigation-{self._attempt}",
            static_summary=f"Mitigation {self._attempt} of {self.record.key}",
        )
        try:
            result = await self._unless(lambda: self.abort_asked, child)
        except ChildWorkflowError as error:
            self._page(SENIOR, f"the mitigation failed: {error.cause}")
            self.note("lever", f"the mitigation failed: {error.cause}")
            return
        if result is None:
            return
        for lever in result.levers:
            known = self.record.lever(lever.name)
            # A notice of the capacity workflow may have come first: its word on the lever is the newer one.
            self._set_lever(lever if known is None or known.status is not lever.status else known)
        self.record.arithmetic = result.arithmetic
        self.record.mitigated_at = self.record.mitigated_at or workflow.now()
        spec = snapshot.policy.models[model]
        capacity = self.record.lever(LeverName.CAPACITY)
        if capacity is not None and capacity.demand is not None:
            self.record.units_bought = max(0, capacity.demand.units - spec.baseline_units)
        self.note("phase", "mitigated: " + ", ".join(f"{lever.name} {lever.status}" for lever in result.levers))

    async def _verify(self, model: str, snapshot: PolicySnapshot) -> bool:
        """Wait for recovery; escalate on the way. False: mitigate again (or aborted)."""
        policy = snapshot.policy
        started = workflow.now()
        self._phase(
            Phase.VERIFYING,
            waiting_for=f"recovery, held for {policy.recovery.hold}",
            next_step="people decide the way back",
        )
        due: list[tuple[datetime, str]] = [
            (started + policy.escalation.throttled_after_mitigation, "throttled"),
            (started + policy.recovery.timeout, "late"),
        ]
        bought = any(lever.name is LeverName.CAPACITY for lever in self.record.held)
        if not bought:
            due.insert(0, (started + policy.metrics.period * (policy.throttle.buy_periods + 1), "look-again"))
        page_p99: float | None = policy.escalation.p99_ms
        while not self.abort_asked:
            at, why = due[0] if due else (workflow.now() + policy.escalation.approval_reminder, "late")
            patience = max(at - workflow.now(), policy.recovery.poll_interval)
            request = AwaitRecovery(
                query=recovery_query(model, snapshot, self._p99_before()),
                checks=self.record.recovery_checks,
                give_up_after=patience,
                page_p99_ms=page_p99,
                page_p99_for=policy.escalation.p99_for,
            )
            awaited = await self._unless(
                lambda: self.abort_asked,
                wait(CloudWatchActivities.await_recovery, request, summary="Wait for recovery", at_most=patience),
            )
            if awaited is None:
                return False
            self.record.recovery_checks = awaited.checks
            self.record.effects = awaited.effects
            self._peak(awaited.peak_offered_tokens_per_second)
            if awaited.ended == "recovered":
                self._recovered(awaited.load, policy)
                return True
            if awaited.ended == "p99-high":
                page_p99 = None
                self._page(SENIOR, f"P99 over {policy.escalation.p99_ms:g} ms for {policy.escalation.p99_for}")
                continue
            if due:
                due.pop(0)
            throttled = any(check.name == "throttles" and not check.met for check in awaited.checks)
            if why == "look-again" and throttled:
                self.note("recovery", "still throttled: the evidence for buying is looked at again")
                return False
            if why == "throttled" and throttled:
                self._page(SENIOR_AND_TAM, f"throttles go on {at - started} after mitigation. {self._progress(policy)}")
            if why == "late":
                unmet = ", ".join(check.name for check in awaited.checks if not check.met) or "not held long enough"
                self._page(SENIOR, f"not recovered after {workflow.now() - started}: {unmet}. The levers stay.")
        return False

    def _recovered(self, load: LoadSnapshot | None, policy: Policy) -> None:
        self.record.recovered_at = workflow.now()
        self.record.load_at_recovery = load
        if load is not None:
            kind, detail = recovered_how(load, self.record.peak_offered_tokens_per_second, policy.recovery)
            self.record.recovery = "recovered under load" if kind == "recovered under load" else "the demand went away"
            self.record.recovery_detail = detail
        self.note("recovery", self.record.recovery_detail or "recovered")

    # ------------------------------------------------------------ people and the way back

    async def _people(self, model: str, snapshot: PolicySnapshot) -> str:
        """Wait for a decision. `again`: the alarm returned; `done`: nothing is held any more, or abort."""
        policy = snapshot.policy
        remind_at = workflow.now() + policy.escalation.approval_reminder
        holds_ended_at: datetime | None = None
        while self.record.held and not self.abort_asked:
            hold = min((lever.hold_until for lever in self.record.held if lever.hold_until), default=None)
            if hold is not None and (holds_ended_at is None or hold > holds_ended_at):
                due, next_step = min(remind_at, hold), "the first hold ends: the guarded way back starts by itself"
            else:
                due, hold, next_step = remind_at, None, "remind"
            self._phase(
                Phase.AWAITING_DECISION,
                waiting_for="an approver to decide the way back",
                next_step=next_step,
                next_at=hold or remind_at,
            )
            try:
                await workflow.wait_condition(
                    lambda: bool(self.approved_by or self.abort_asked or self.release_asked or self._alarm_returned),
                    timeout=max(due - workflow.now(), timedelta(0)),
                    timeout_summary="Waiting for a person to decide the way back",
                )
            except TimeoutError:
                now = workflow.now()
                if hold is not None and now >= hold:
                    holds_ended_at = hold
                    recovered = self.record.recovered_at
                    if recovered is not None and now - recovered >= policy.way_back.recovered_for:
                        self.note("phase", "the first hold ended after an hour in recovery: the way back starts")
                        self.approved_by = "policy (hold ended)"
                    else:
                        cost = self._cost(snapshot)
                        self._page(SENIOR, f"a hold ended without an hour of recovery; the levers stay. {cost}")
                if now >= remind_at:
                    remind_at = now + policy.escalation.approval_reminder
                    if self.record.acknowledged_by is None:
                        self._page(ON_CALL, f"{self.record.key} waits for a decision. {self._cost(snapshot)}")
            if self.abort_asked:
                break
            if self._alarm_returned:
                self.note("phase", "the alarm returned: mitigation again")
                return "again"
            if self.release_asked is not None:
                await self._give_back([self.release_asked], model, snapshot)
                self.release_asked = None
            elif self.approved_by is not None:
                await self._give_back([lever.name for lever in self.record.held], model, snapshot)
                self.approved_by = None
            if self._alarm_returned and self.record.held:
                return "again"
        return "done"

    async def _give_back(self, names: list[LeverName], model: str, snapshot: PolicySnapshot) -> None:
        """Release levers in order, each guarded and watched; stops at the first that must stay or be taken again."""
        for name in names:
            lever = self.record.lever(name)
            if lever is None or lever.status is not LeverStatus.IN_FORCE or self.abort_asked:
                continue
            self._phase(Phase.REVERTING, waiting_for=f"the release of {name}", next_step=f"watch without {name}")
            if not await self._may_release(lever, model, snapshot):
                return
            lever.status = LeverStatus.RELEASING
            self.show()
            try:
                await _mitigation.release(lever, self.record.incident_id, f"way back of {self.record.key}")
            except ActivityError as error:
                lever.status = LeverStatus.IN_FORCE
                lever.detail = f"could not be released: {failure(error)[1]}"
                self._page(SENIOR, f"{name} {lever.detail}")
                return
            lever.released_at = workflow.now()
            self.note("lever", f"{name}: {lever.after} → {lever.before}: released, watched now")
            if not await self._watch(lever, model, snapshot):
                return
            lever.status = LeverStatus.RELEASED
            self.note("lever", f"{name}: released for good after a clean watch")

    async def _may_release(self, lever: Lever, model: str, snapshot: PolicySnapshot) -> bool:
        load = await self._reread(snapshot)
        guard = await decide(
            DecisionActivities.guard_release,
            GuardRelease(
                lever=lever.name,
                held=[held.name for held in self.record.held],
                model=model,
                load=load,
                policy=snapshot.policy,
            ),
            summary=f"Guard: may {lever.name} be released?",
        )
        self.note("finding", guard.why)
        if not guard.may:
            lever.detail = guard.why
        return guard.may

    async def _watch(self, lever: Lever, model: str, snapshot: PolicySnapshot) -> bool:
        """Watch a released lever; on a breach, or when the alarm returns, take it again. True: clean."""
        policy = snapshot.policy
        request = WatchRelease(
            query=recovery_query(model, snapshot, self._p99_before()),
            watch=policy.way_back.stage_watch,
            poll_interval=policy.way_back.watch_poll_interval,
        )
        watched = await self._unless(
            lambda: self.abort_asked or self._alarm_returned,
            wait(
                CloudWatchActivities.watch_release,
                request,
                summary=f"Watch the service without {lever.name}",
                at_most=request.watch,
            ),
        )
        if self.abort_asked:
            return False
        if watched is not None:
            self.record.recovery_checks = watched.checks or self.record.recovery_checks
            if not watched.breaches:
                return True
        why = "; ".join(watched.breaches) if watched is not None else "the alarm returned"
        await self._take_again(lever, snapshot.policy, why)
        return False

    async def _take_again(self, lever: Lever, policy: Policy, why: str) -> None:
        self._attempt += 1
        changes: dict[str, Any] = {"released_at": None}
        if lever.lease is not None:
            lease = _mitigation.lease_id(self.record.run_id, lever.name, self._attempt)
            self._undo.append(lease)
            changes["lease"] = lever.lease.model_copy(update={"lease_id": lease})
        if lever.demand is not None:
            now = workflow.now()
            end = now + policy.way_back.capacity_max_hold + policy.leases.cache_ttl_seconds
            changes["demand"] = lever.demand.model_copy(update={"start": now, "end": end})
        [taken] = await _mitigation.take([lever.model_copy(update=changes)])
        if taken.status is LeverStatus.IN_FORCE:
            taken.detail = f"taken again: {why}"
        self._set_lever(taken)
        self.note("lever", f"{lever.name} was released and is taken again ({taken.status}): {why}")
        self._page(ON_CALL, f"the way back stopped: without {lever.name} {why}; it is taken again")

    # ------------------------------------------------------------ the end

    async def _clean_up(self, model: str, snapshot: PolicySnapshot) -> None:
        self._phase(Phase.CLEANUP, waiting_for="cleanup", next_step="report")
        event = self._event(model, snapshot) if self._approved_revert() else None
        result = await workflow.execute_child_workflow(
            PostIncidentCleanupWorkflow.run,
            CleanupInput(
                incident_id=self.record.incident_id,
                model=model,
                lease_ids=self._undo,
                demand_id=self.record.incident_id,
                reason="aborted" if self.abort_asked else f"cleanup after {self.record.key}",
                event=event,
                snapshot=snapshot,
            ),
            id=f"{self.record.incident_id}-cleanup",
            static_summary=f"Cleanup after {self.record.key}",
        )
        for lever in self.record.held:
            lever.status = LeverStatus.RELEASED
            lever.released_at = lever.released_at or workflow.now()
        self.record.knobs_at_baseline = result.knobs_at_baseline
        self.record.capacity_at_baseline = result.capacity_at_baseline
        self.record.still_held = result.still_held
        self.record.to_do += result.to_do
        if self.record.calendar_proposal is not None:
            self.record.calendar_proposal.written = result.event_written
            self.record.calendar_proposal.event_id = event.event_id if event and result.event_written else None
            if not result.event_written:
                proposal = self.record.calendar_proposal
                self.record.to_do.append(f"calendar: add {proposal.event_type} with {proposal.multiplier:g}x")
        self.record.outcome = self._outcome()
        self.note("phase", self.record.outcome)

    def _outcome(self) -> str:
        how = "Aborted" if self.abort_asked else "Closed"
        recovery = self.record.recovery_detail or "not recovered"
        at_baseline = self.record.knobs_at_baseline and self.record.capacity_at_baseline
        rest = "knobs and capacity are at their baseline" if at_baseline else "; ".join(self.record.still_held)
        return f"{how}: {recovery}; {rest or 'not everything is back at its baseline'}."

    async def _report(self) -> None:
        if self._background:
            await workflow.wait(self._background, timeout=BACKGROUND_SECONDS)
        self.record.closed_at = workflow.now()
        self.record.next_step = ""
        self.show()
        try:
            assert self.snapshot is not None
            result = await mutate(
                ReportActivities.write_report,
                ReportInput(record=self.record, snapshot=self.snapshot),
                summary="Write the report",
            )
            self.record.report_path = result.html_path
        except ActivityError as error:
            self.note("note", f"the report could not be written: {failure(error)[1]}")

    async def _snooze(self, policy: Policy) -> None:
        until = workflow.now() + policy.escalation.snooze
        self._phase(
            Phase.SNOOZED, waiting_for="the alarm's OK, or the end of the snooze", next_step="close", next_at=until
        )
        try:
            await workflow.wait_condition(
                lambda: not self.record.alarm_on,
                timeout=policy.escalation.snooze,
                timeout_summary="Snoozed after an abort",
            )
        except TimeoutError:
            self.note("phase", "the snooze ended while the alarm is still on")

    async def _triage(self) -> None:
        """An alarm that maps to nothing: a person must look; closes once it is OK and somebody acknowledged."""
        assert self.snapshot is not None
        policy = self.snapshot.policy
        self._phase(
            Phase.AWAITING_DECISION, waiting_for="on-call to look: no runbook knows this alarm", next_step="remind"
        )
        self._page(ON_CALL, f"no runbook knows alarm {self.record.alarm.alarm_name}: {self.record.alarm.reason}")
        while not self.abort_asked and (self.record.alarm_on or self.record.acknowledged_by is None):
            try:
                await workflow.wait_condition(
                    lambda: self.abort_asked or (not self.record.alarm_on and self.record.acknowledged_by is not None),
                    timeout=policy.escalation.approval_reminder,
                    timeout_summary="Waiting for on-call to acknowledge",
                )
            except TimeoutError:
                if self.record.acknowledged_by is None:
                    self._page(ON_CALL, f"alarm {self.record.alarm.alarm_name} is still nobody's")
        self.record.outcome = f"Triage ended: acknowledged by {self.record.acknowledged_by or 'nobody'}."

    # ------------------------------------------------------------ the small parts

    async def _keep_leases(self, policy: Policy) -> None:
        """Renew every lease in one call: every hour, and at once when Redis lost them."""
        while True:
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(
                    lambda: self._leases_lost,
                    timeout=policy.leases.renew_every,
                    timeout_summary="Next renewal of the leases",
                )
            lost, self._leases_lost = self._leases_lost, False
            leases = [lever.lease for lever in self.record.held if lever.lease and lever.status is LeverStatus.IN_FORCE]
            if not leases:
                continue
            try:
                changed = await mutate(
                    LeaseActivities.renew_leases, TakeLeases(leases=leases), summary="Renew the leases"
                )
            except ActivityError as error:
                self._page(ON_CALL, f"leases could not be renewed and will lapse: {failure(error)[1]}")
                continue
            if lost or changed:
                self.note("lever", f"leases put back after Redis lost them: {', '.join(changed) or 'all were there'}")

    async def _link_previous(self) -> None:
        try:
            self.record.previous_incident = await read(
                EntityActivities.previous_run, self.record.incident_id, summary="Find the last incident of this key"
            )
        except ActivityError as error:
            self.note("note", f"the last incident of this key could not be found: {failure(error)[1]}")

    async def _unless(self, stop: Callable[[], bool], work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, or None (and `work` cancelled) as soon as `stop` holds."""
        task = asyncio.ensure_future(work)
        await workflow.wait_condition(lambda: task.done() or stop())
        if task.done():
            return task.result()
        task.cancel()
        return None

    async def extend_hold(self, lever: Lever, by: timedelta) -> None:
        assert lever.hold_until is not None
        lever.hold_until += by
        lever.extensions += 1
        if lever.demand is not None:
            lever.demand = lever.demand.model_copy(update={"end": lever.demand.end + by})
            await _mitigation.take([lever])

    def price_of(self, by: timedelta) -> str:
        if self.snapshot is None or self.record.model is None or not self.record.units_bought:
            return ""
        hours = self.snapshot.clock.business_duration(by) / timedelta(hours=1)
        price = self.snapshot.policy.models[self.record.model].usd_per_unit_hour
        unit_hours = self.record.units_bought * hours
        return f"; {unit_hours:g} unit-hours more" + (f", about {unit_hours * price:,.0f} USD" if price else "")

    def _cost(self, snapshot: PolicySnapshot) -> str:
        lever = self.record.lever(LeverName.CAPACITY)
        if lever is None or lever.landed_at is None or lever not in self.record.held:
            return "No bought capacity is running."
        return "Running cost so far" + self.price_of(workflow.now() - lever.landed_at).replace(" more", "")

    def _progress(self, policy: Policy) -> str:
        lever = self.record.lever(LeverName.CAPACITY)
        if lever is None or lever.applied_at is None or lever.status is not LeverStatus.IN_FORCE:
            return "No capacity is on its way."
        if lever.landed_at is not None:
            return f"{self.record.units_bought} units landed at {lever.landed_at:%H:%M:%S} UTC."
        lands = lever.applied_at + policy.capacity.provisioning_lag
        return f"{self.record.units_bought} units are being created and should land by {lands:%H:%M:%S} UTC."

    def _page(self, to: str, text: str) -> None:
        self._pages += 1
        self.note("page", f"paged {to}: {text}")
        page = Page(
            page_id=f"{self.record.run_id}-{self._pages}",
            incident_id=self.record.incident_id,
            severity=self.record.severity,
            to=to,
            text=text,
        )

        async def send() -> None:
            try:
                await mutate(PageActivities.page, page, summary=f"Page {to}")
            except ActivityError as error:
                self.note("note", f"a page to {to} could not be sent: {failure(error)[1]}")

        self._background.append(asyncio.create_task(send()))

    def _propose(self, model: str, snapshot: PolicySnapshot) -> None:
        diagnosis = self.record.diagnosis
        if diagnosis is None or all(cause.id != "multiplier-underestimated" for cause in diagnosis.causes):
            return
        learnt = snapshot.policy.calendar.event_types.get("final_chapter")
        planned = self._event_evidence.get(EvidenceKey.EVENT_MULTIPLIER)
        if learnt is not None:
            self.record.calendar_proposal = CalendarProposal(
                event_type="final_chapter",
                multiplier=learnt.multiplier,
                reason=f"{planned:g}x was planned and the traffic outgrew it",
            )

    def _event(self, model: str, snapshot: PolicySnapshot) -> CalendarEvent | None:
        proposal, starts = self.record.calendar_proposal, self._event_evidence.get(EvidenceKey.EVENT_STARTS_AT)
        if proposal is None or not isinstance(starts, str):
            return None
        starts_at = datetime.fromisoformat(starts)
        lead = snapshot.policy.calendar.event_types[proposal.event_type].lead_time
        approvers = [decision.who for decision in self.record.decisions if decision.outcome == "accepted"]
        return CalendarEvent(
            event_id=f"{proposal.event_type}-{starts_at:%Y-%m-%d}",
            type=proposal.event_type,
            starts_at=starts_at,
            multiplier=proposal.multiplier,
            models=(model,),
            lead_time=snapshot.clock.business_duration(lead),
            source=self.record.incident_id,
            asked_by=approvers[-1] if approvers else "policy",
        )

    def _approved_revert(self) -> bool:
        return any(
            decision.action == "approve_revert" and decision.outcome == "accepted" for decision in self.record.decisions
        )

    def _p99_before(self) -> float | None:
        """The alarm's own moment is in the breach already, so the target alone counts until a baseline is known."""
        return None

    def _peak(self, offered: float) -> None:
        self.record.peak_offered_tokens_per_second = max(self.record.peak_offered_tokens_per_second, offered)

    def _set_lever(self, lever: Lever) -> None:
        kept = [other for other in self.record.levers if other.name is not lever.name]
        order = list(LeverName)
        self.record.levers = sorted([*kept, lever], key=lambda item: order.index(item.name))

    def _phase(self, phase: Phase, *, waiting_for: str, next_step: str, next_at: datetime | None = None) -> None:
        if phase is not self.record.phase:
            self.record.phase = phase
            self.note("phase", f"phase: {phase}")
        self.record.waiting_for, self.record.next_step, self.record.next_at = waiting_for, next_step, next_at
        self.show()

    def show(self) -> None:
        how_to = (
            f"Decide with `runbooks incident approve {self.record.key} --why …` (or reject, extend, release, abort)."
        )
        workflow.set_current_details(render_details(self.record, how_to))
        causes = self.record.diagnosis.causes if self.record.diagnosis else []
        cause = causes[0].id if causes else ("unknown" if self.record.diagnosis else "")
        holds = any(lever.lease for lever in self.record.held)
        shown = (self.record.phase, cause, holds)
        if shown != self._shown:
            self._shown = shown
            workflow.upsert_search_attributes(
                [
                    KEY.value_set(self.record.key),
                    PHASE.value_set(self.record.phase),
                    SEVERITY.value_set(self.record.severity),
                    SERVICE.value_set(self.record.service),
                    HOLDS_LEASES.value_set(holds),
                    *([CAUSE.value_set(cause)] if cause else []),
                ]
            )
