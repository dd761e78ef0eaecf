"""Pre-provisioning for one calendar event (scenario 1): check days ahead, buy, verify, watch, release, report."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.calendar import CalendarActivities
from activities.decisions import DecisionActivities
from activities.entities import EntityActivities
from activities.events import EventActivities
from activities.permissions import PermissionActivities
from activities.report import ReportActivities
from domain.calendar import CalendarEvent
from domain.capacity import Demand, DemandOutcome
from domain.incident import cut, utc
from domain.messages import CAPACITY_CHANGED, RECORD, LoadQuery, WithdrawDemand, load_query
from domain.permissions import CheckPermissions
from domain.policy import Policy
from domain.pre_provisioning import (
    ENTRY_MEMO,
    EVENT_CHANGED,
    EVENT_REMOVED,
    EVENT_WORKFLOW,
    PROVISIONING_ACTIONS,
    AwaitRelease,
    EndEvent,
    EventInput,
    EventPhase,
    EventPlan,
    EventRecord,
    EventRemoved,
    EventReportInput,
    EventTimes,
    MarkEvent,
    PlanEvent,
    WatchEvent,
    event_details,
    how_in_time,
    in_service,
    planned,
)
from workflows._people import ON_CALL, OnRecord
from workflows._step import decide, failure, load_policy, mutate, read, wait
from workflows.search_attributes import SERVICE

SENIOR = "senior on-call"
PROMPT = timedelta(minutes=1)
"""Technical: what is late by less is on time; and how soon a demand that got lost is set again."""
DECIDED_AHEAD = 2
"""Metric periods."""
RELEASE_MARGIN = timedelta(minutes=2)
"""Technical: for the capacity workflow to notice and plan."""


class _EntryMoved(Exception):
    """The row says something else now, or is gone."""


@workflow.defn(name=EVENT_WORKFLOW)
class EventPreProvisioningWorkflow(OnRecord):
    """Follows one row of the calendar to the end of its event.

    A change of the row interrupts whatever is waited for, and everything is reckoned anew from the row as it is then.
    The demand carries its own end: with this workflow dead, the units are still released.
    """

    record: EventRecord

    @workflow.init
    def __init__(self, input: EventInput) -> None:
        super().__init__("SEV3")
        event = input.event
        self.record = EventRecord(event_id=event.event_id, run_id=workflow.info().run_id, event=event)
        self._entry = event
        """The row as told last."""
        self._removed = ""
        """Why nothing is wanted any more."""
        self._demands: dict[str, Demand] = {}
        """By model, those that may stand."""
        self._failing: set[str] = set()
        """Models whose failure people know."""
        self._news = False
        """A capacity workflow has said something."""
        self._told: set[str] = set()
        """Findings that people were paged about."""

    @workflow.run
    async def run(self, input: EventInput) -> EventRecord:
        """Answers the record once the units are released, or nothing is wanted any more."""
        workflow.upsert_search_attributes([SERVICE.value_set("mangaassist")])
        self.snapshot = await load_policy()
        self.record.clock = self.now_snapshot.clock
        while True:
            try:
                await self._follow(self._entry)
            except _EntryMoved:
                if not self._removed:
                    self.note("note", f"the calendar's row has changed: {planned(self._entry)}")
                    continue
                await self._give_up()
            break
        await self._report()
        await asyncio.gather(*self.background)
        return self.record

    async def _follow(self, event: CalendarEvent) -> None:
        """The event's whole way, whatever of it is past already.

        Raises:
            _EntryMoved: the row changed meanwhile.
        """
        record = self.record
        if record.in_time is None or record.event.starts_at != event.starts_at or not self._has_begun():
            record.triggered_at = record.in_service_at = record.in_time = None
            record.watched = {}
        record.event = event
        workflow.upsert_memo({ENTRY_MEMO: event.fingerprint})
        plan = await self._plan("Reckon times and units")
        if self._demands:
            await self._ask(plan)
        first = plan.times.preflight_at
        self._enter(EventPhase.WAITING, "the time of the preflight", "check limits and permissions", first)
        await self._until(first, "Preflight")
        plan = await self._preflight(plan)
        plan = await self._trigger()
        await self._verify(plan.times)
        await self._release(await self._run_event(plan.times))

    # ------------------------------------------------------------ before the event

    async def _preflight(self, plan: EventPlan) -> EventPlan:
        """Check, post the dated demand, and check again until buying begins while something is wrong."""
        while workflow.now() < plan.times.buy_at:
            self.snapshot = await load_policy()
            plan = await self._plan("Preflight: units, ceiling, quota, other events")
            findings = [*plan.findings, *await self._missing_permissions()]
            self._find(findings)
            if not findings:
                self.note("finding", "preflight: nothing stands against it")
            await self._ask(plan)
            buy_at = plan.times.buy_at
            again = workflow.now() + self._policy.calendar.preflight_interval
            self._enter(EventPhase.SCHEDULED, "the time to buy", "buy what is missing", buy_at)
            if findings and again < buy_at:
                await self._until(again, "Preflight again")
            else:
                await self._until(buy_at, "Buying begins")
        return plan

    def _find(self, findings: list[str]) -> None:
        """Put on record what is wrong; people are paged once about each."""
        self.record.findings = findings
        for text in findings:
            if text not in self._told:
                self._told.add(text)
                self.page(ON_CALL, f"{planned(self.record.event)}: {text}")

    async def _missing_permissions(self) -> list[str]:
        try:
            checked = await read(
                PermissionActivities.check_permissions,
                CheckPermissions(actions=PROVISIONING_ACTIONS),
                summary="Preflight: may we buy and release?",
            )
        except ActivityError as error:
            self.note("note", f"permissions could not be checked: {failure(error)[1]}")
            return []
        return [f"{item.action} is denied: {item.detail} {item.statement}".strip() for item in checked.denied]

    async def _trigger(self) -> EventPlan:
        """Post the demand, sized anew, and say so in the row."""
        record = self.record
        self.snapshot = await load_policy()
        plan = await self._plan("Size it by the policy and the forecast as they are now")
        times, now = plan.times, workflow.now()
        record.triggered_at = record.triggered_at or now
        self._enter(EventPhase.PROVISIONING, "the units to be in service", "verify", times.verify_by)
        said = "; ".join(size.arithmetic for size in plan.sizes)
        self.note("capacity", f"provisioning is triggered: {said}")
        if now > times.needed_at + PROMPT and record.in_time is None:
            left = "in " + record.lasting(times.starts_at - now) if now < times.starts_at else "and runs already"
            self.page(ON_CALL, f"{planned(record.event)}, {left}, is provisioned for only now")
        self._find([*plan.findings])
        await self._ask(plan)
        await self._mark()
        await self._note_landing()
        return plan

    async def _verify(self, times: EventTimes) -> None:
        """See that all of it comes into service and stays; say early when it does not, judge at `verify_by`."""
        record = self.record
        assert record.triggered_at is not None
        if record.in_time is not None:
            return  # judged before the event began; it was changed since
        for deadline, to in ((times.needed_at, ON_CALL), (times.verify_by, SENIOR)):
            if deadline > record.triggered_at:
                await self._until(deadline, "Should be in service" if to is ON_CALL else "Verify")
                await self._read_outcomes()
                if not self._all_in_service:
                    left = record.lasting(times.starts_at - workflow.now())
                    self.page(to, f"{planned(record.event)} starts in {left}, and units are missing: {self._lacks()}")
        record.in_time = self._all_in_service and record.in_service_at is not None
        self.note("capacity", f"verified: {how_in_time(record)}" if record.in_time else f"not in time: {self._lacks()}")
        if record.in_time:
            self._enter(EventPhase.READY, "the event", "watch it", times.starts_at)
        await self._until(times.starts_at, "The event starts")

    async def _read_outcomes(self) -> None:
        """What the capacity workflows know of our demands, should news have been lost; lost demands are set again."""
        for model, demand in sorted(self._demands.items()):
            try:
                state = await read(EntityActivities.capacity_state, model, summary=f"Has {model} our units?")
            except ActivityError as error:
                self.note("note", f"the capacity of {model} could not be read: {failure(error)[1]}")
                continue
            if any(known.demand_id == demand.demand_id for known in state.demands):
                self._hear(model, state.told.get(demand.demand_id))
            else:
                self.note("note", f"the capacity workflow of {model} does not have the demand; it is set again")
                await self._set(demand)
        await self._note_landing()

    def _hear(self, model: str, outcome: DemandOutcome | None) -> None:
        """Take what a capacity workflow says of our demand; people are paged once when it begins to fail."""
        before = self.record.outcomes.get(model)
        if outcome is None or outcome == before or outcome.status == "withdrawn":
            return  # that one ended is no news; that one got lost is seen when it is read
        self.record.outcomes[model] = outcome
        if outcome.status == "failed":
            if model not in self._failing:
                self._failing.add(model)
                self.page(ON_CALL, f"{planned(self.record.event)}: {model}: {outcome.detail}")
            return
        self._failing.discard(model)
        if outcome.status == "in_service" or (before is not None and before.status == "in_service"):
            self.note("capacity", f"{model}: {outcome.detail}")

    async def _note_landing(self) -> None:
        record = self.record
        if record.triggered_at is not None and record.in_service_at is None and self._all_in_service:
            record.in_service_at = workflow.now()
            await self._mark()

    @property
    def _all_in_service(self) -> bool:
        return in_service(self.record.outcomes, self._demands)

    def _lacks(self) -> str:
        late = [f"{model}: {x.detail}" for model, x in self.record.outcomes.items() if x.status != "in_service"]
        return "; ".join(late) or "the demand was not accepted"

    # ------------------------------------------------------------ the event, and after it

    async def _run_event(self, times: EventTimes) -> EventTimes:
        """Watch the event; its end is moved while the load is too much for what would be left. Answers the times."""
        record, planned_end = self.record, times.ends_at
        while True:
            self._enter(EventPhase.RUNNING, "the end of the event", "release the units", times.ends_at)
            # Decided a moment ahead: with the demand at its end the units are released already.
            unread = await self._watch(times.ends_at - DECIDED_AHEAD * self._policy.metrics.period)
            ends_at = await self._decide_end(planned_end, times.ends_at)
            if ends_at <= times.ends_at:
                break
            times = record.times = times.model_copy(update={"ends_at": ends_at})
        await self._until(times.ends_at, "The event ends")
        for model, seen in record.watched.items():
            self.note(
                "finding",
                f"{model}: at most {seen.peak_tokens_per_second:,.0f} of {seen.capacity_tokens_per_second:,.0f} "
                f"tokens/s, {seen.throttles:,.0f} calls throttled",
            )
        if unread:
            self.note("note", f"the load could not be read at the end: {unread}")
        return times

    async def _watch(self, until: datetime) -> str:
        """Watch the load until then; answers why it could not be read at the end, or nothing."""
        left = until - workflow.now()
        if left <= timedelta(0):
            return ""
        request = WatchEvent(
            load=self._load(), poll_interval=self._policy.metrics.period, lasts=left, seen=self.record.watched
        )
        try:
            watched = await self.unless(
                self._has_moved,
                wait(EventActivities.watch_event, request, summary="Watch the load of the event", at_most=left),
            )
        except ActivityError as error:
            return failure(error)[1]
        self._check_moved()
        if watched is None:
            return ""
        self.record.watched = watched.models
        await self._until(until, "The event's load was watched")
        return watched.unread

    async def _decide_end(self, planned_end: datetime, ends_at: datetime) -> datetime:
        """When the units go; a later end is asked for, and people are told of the first and of the last."""
        request = EndEvent(
            demands=[*self._demands.values()],
            others=await self._others(),
            watched=self.record.watched,
            planned_end=planned_end,
            ends_at=ends_at,
            snapshot=self.now_snapshot,
        )
        try:
            end = await decide(DecisionActivities.end_event, request, summary="May the units go at the end?")
        except ActivityError as error:
            self.note("note", f"the end stays as planned: {failure(error)[1]}")
            return ends_at
        event, why = planned(self.record.event), "; ".join(end.why)
        if end.ends_at > ends_at:
            for demand in list(self._demands.values()):
                await self._set(demand.model_copy(update={"end": end.ends_at}))
            later = f"the units of {event} stay until {utc(end.ends_at)}: {why}"
            if ends_at == planned_end:
                self.page(ON_CALL, later)
            else:
                self.note("capacity", later)
        elif end.why:
            self.page(SENIOR, f"the units of {event} go now, after the longest time the policy allows: {why}")
        return end.ends_at

    def _load(self) -> LoadQuery:
        query, models = load_query(self._policy, None), self._policy.models
        return query.model_copy(update={"models": {name: models[name].model_id for name in self.record.event.models}})

    async def _release(self, times: EventTimes) -> None:
        record = self.record
        self._enter(EventPhase.RELEASING, "the units to be gone", "write the report", None)
        demands, outcomes = dict(self._demands), dict(record.outcomes)
        await self._withdraw(sorted(demands), "the event is over")
        record.outcomes = outcomes
        policy = self._policy.capacity
        patience = policy.drain + 2 * policy.poll_interval + RELEASE_MARGIN
        rest: list[str] = []
        for model, demand in sorted(demands.items()):
            request = AwaitRelease(
                model=model,
                demand_id=demand.demand_id,
                poll_interval=policy.poll_interval,
                give_up_after=patience,
            )
            try:
                released = await wait(
                    EventActivities.await_release,
                    request,
                    summary=f"{model} back at what others want",
                    at_most=patience,
                )
            except ActivityError as error:
                rest.append(f"{model} could not be read: {failure(error)[1]}")
                continue
            self.note("capacity", released.detail)
            rest += [] if released.done else [released.detail]
        if rest:
            self.page(ON_CALL, f"after {planned(record.event)} units are left: {'; '.join(rest)}")
        else:
            record.released_at = workflow.now()
        ready = how_in_time(record) if record.in_time else f"not in time: {how_in_time(record)}"
        late = record.lasting(workflow.now() - times.ends_at)
        after = "not all of it released" if rest else f"released {late} after its end"
        self._end(EventPhase.DONE, f"{ready}; {after}")

    async def _give_up(self) -> None:
        await self._withdraw(sorted(self._demands), self._removed)
        self._end(EventPhase.WITHDRAWN, f"given up: {self._removed}")

    def _end(self, phase: EventPhase, outcome: str) -> None:
        self.record.outcome, self.record.ended_at = outcome, workflow.now()
        self._enter(phase, "", "", None)
        self.note("phase", outcome)

    async def _report(self) -> None:
        request = EventReportInput(record=self.record, snapshot=self.now_snapshot)
        try:
            written = await mutate(ReportActivities.write_event_report, request, summary="Write the report")
        except ActivityError as error:
            self.note("note", f"the report could not be written: {failure(error)[1]}")
        else:
            self.record.report_path = written.html_path
        self.show()

    # ------------------------------------------------------------ the demand and the row

    async def _plan(self, summary: str) -> EventPlan:
        """The plan for the row as it is, on record; while there can be none, people are told, and it is tried again.

        Raises:
            _EntryMoved: the row changed meanwhile.
        """
        record = self.record
        while True:
            others = tuple(await self._others())
            request = PlanEvent(event=record.event, snapshot=self.now_snapshot, now=workflow.now(), others=others)
            try:
                plan = await decide(DecisionActivities.plan_event, request, summary=summary)
            except ActivityError as error:
                self._find([f"it cannot be planned: {failure(error)[1]}"])
                again = workflow.now() + self._policy.calendar.sync_interval
                await self._until(again, "Plan again")
                self.snapshot = await load_policy()
            else:
                break
        record.times, record.sizes, record.notes = plan.times, [*plan.sizes], [*plan.notes]
        self.show()
        return plan

    async def _others(self) -> list[Demand]:
        """Every demand for the event's models."""
        others: list[Demand] = []
        for model in self.record.event.models:
            try:
                state = await read(EntityActivities.capacity_state, model, summary=f"Who else wants {model}?")
            except ActivityError as error:
                self.note("note", f"other demands for {model} could not be read: {failure(error)[1]}")
            else:
                others += state.demands
        return others

    async def _ask(self, plan: EventPlan) -> None:
        """Set the plan's demands, and withdraw those of models that it has no more."""
        await self._withdraw(
            sorted(self._demands.keys() - {demand.model for demand in plan.demands}), "it is not needed any more"
        )
        for demand in plan.demands:
            await self._set(demand)

    async def _set(self, demand: Demand) -> None:
        self._demands[demand.model] = demand
        try:
            outcome = await mutate(
                EntityActivities.set_demand,
                demand,
                summary=cut(f"Demand {demand.units} units of {demand.model} from {utc(demand.start)}", 200),
            )
        except ActivityError as error:
            self.page(ON_CALL, f"the demand for {demand.units} units of {demand.model} failed: {failure(error)[1]}")
        else:
            self._hear(demand.model, outcome)

    async def _withdraw(self, models: Sequence[str], reason: str) -> None:
        for model in models:
            request = WithdrawDemand(model=model, demand_id=self._demands[model].demand_id, reason=reason)
            try:
                await mutate(
                    EntityActivities.withdraw_demand, request, summary=cut(f"Withdraw the demand for {model}", 200)
                )
            except ActivityError as error:
                self.page(ON_CALL, f"the demand for {model} was not withdrawn, it ends by itself: {failure(error)[1]}")
            else:
                del self._demands[model]
                self.record.outcomes.pop(model, None)

    async def _mark(self) -> None:
        """Write into the row what was done, as the decision tree of throttling reads it."""
        record = self.record
        assert record.triggered_at is not None
        clock, zone = self.now_snapshot.clock, record.event.starts_at.tzinfo
        request = MarkEvent(
            event_id=record.event_id,
            starts_at=record.event.starts_at,
            units={size.model: size.units for size in record.sizes},
            triggered_at=clock.business(record.triggered_at).astimezone(zone),
            completed_at=clock.business(record.in_service_at).astimezone(zone) if record.in_service_at else None,
        )
        try:
            written = await mutate(CalendarActivities.mark_event, request, summary="Write it into the calendar's row")
        except ActivityError as error:
            self.note("note", f"the calendar's row could not be written: {failure(error)[1]}")
            return
        if not written:
            self.note("note", "the calendar's row is gone or was moved; the next sync tells")

    # ------------------------------------------------------------ what arrives, and waiting

    @workflow.signal(name=EVENT_CHANGED)
    def event_changed(self, event: CalendarEvent) -> None:
        """The row as it is now."""
        self._entry, self._removed = event, ""

    @workflow.signal(name=EVENT_REMOVED)
    def event_removed(self, message: EventRemoved) -> None:
        """Nothing is wanted for it any more."""
        self._removed = message.reason

    @workflow.signal(name=CAPACITY_CHANGED)
    def capacity_changed(self, outcome: DemandOutcome) -> None:
        """What became of one of our demands."""
        for model, demand in self._demands.items():
            if demand.demand_id == outcome.demand_id and self.record.phase is not EventPhase.RELEASING:
                self._hear(model, outcome)
                self._news = True
                self.show()

    @workflow.query(name=RECORD)
    def answer_record(self) -> EventRecord:
        """Everything about it."""
        return self.record

    @property
    def _policy(self) -> Policy:
        return self.now_snapshot.policy

    def _has_moved(self) -> bool:
        return bool(self._removed) or self._entry.fingerprint != self.record.event.fingerprint

    def _has_begun(self) -> bool:
        times = self.record.times
        return times is not None and workflow.now() >= times.starts_at

    def _check_moved(self) -> None:
        if self._has_moved():
            raise _EntryMoved

    async def _until(self, moment: datetime, summary: str) -> None:
        """Wait for a moment; one that is past is there.

        Raises:
            _EntryMoved: the row changed meanwhile.
        """
        while (left := moment - workflow.now()) > timedelta(0):
            with suppress(TimeoutError):
                await workflow.wait_condition(
                    lambda: self._has_moved() or self._news, timeout=left, timeout_summary=summary
                )
            self._check_moved()
            if self._news:
                self._news = False
                await self._note_landing()
        self._check_moved()

    def _enter(self, phase: EventPhase, waiting_for: str, next_step: str, next_at: datetime | None) -> None:
        record = self.record
        record.phase, record.waiting_for, record.next_step, record.next_at = phase, waiting_for, next_step, next_at
        self.show()

    def show(self) -> None:
        """The record as the UI's details."""
        workflow.set_current_details(event_details(self.record))
