"""One override: a person holds a knob at a value for a time, and gives it back on time whatever happens."""

import asyncio
import contextlib
from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

from activities.cloudwatch import CloudWatchActivities
from activities.decisions import DecisionActivities
from activities.leases import LeaseActivities
from activities.settings import SettingsActivities
from domain.incident import span, utc
from domain.knobs import Holder, KnobName, LeaseRequest, Refusal
from domain.messages import (
    APPROVE,
    DENY,
    EXTEND,
    HAND_OVER,
    LEASES_LOST,
    OVERRIDE_WORKFLOW,
    RECORD,
    RELEASE,
    STARTED,
    AssessOverride,
    CaughtUp,
    HandOverRequest,
    KnobState,
    OverrideAnswer,
    OverrideExtendRequest,
    OverrideInput,
    PersonRequest,
    PolicySnapshot,
    ReadKnobs,
    ReleaseLeases,
    TakeLeases,
    UpdateResult,
    load_query,
)
from domain.override import (
    Assessment,
    OverrideEnd,
    OverrideKind,
    OverridePhase,
    OverrideRecord,
    answer_of,
    held_by,
    render_override,
    role_to_set,
    shown,
)
from domain.people import Role
from domain.policy import OverridesPolicy
from workflows._people import ON_CALL, OnRecord
from workflows._step import MUTATE_TOTAL, decide, failure, load_policy, mutate, read
from workflows.search_attributes import ENDS_AT, HOLDS_LEASES, KNOB

PROMPT = timedelta(seconds=15)
"""How long a person who waits for the answer is kept while Redis does not answer."""
BACKGROUND = timedelta(seconds=30)
"""How long the end waits for pages and refusals that are still being sent."""
OVER = (OverridePhase.ENDING, OverridePhase.ENDED)
PHASES = {
    APPROVE: (OverridePhase.AWAITING_APPROVAL,),
    DENY: (OverridePhase.AWAITING_APPROVAL,),
    RELEASE: (OverridePhase.AWAITING_APPROVAL, OverridePhase.IN_FORCE),
    EXTEND: (OverridePhase.IN_FORCE,),
    HAND_OVER: (OverridePhase.IN_FORCE,),
}
"""When each of these is possible."""


@workflow.defn(name=OVERRIDE_WORKFLOW)
class OverrideWorkflow(OnRecord):
    """Its lease lapses by itself at the override's end, so that nothing has to live for the way back."""

    record: OverrideRecord

    @workflow.init
    def __init__(self, input: OverrideInput) -> None:
        super().__init__("SEV3")
        info = workflow.info()
        self.record = input.resumed or OverrideRecord(
            override_id=info.workflow_id,
            run_id=info.run_id,
            knob=input.knob,
            value=input.value,
            kind=input.kind,
            reason=input.reason,
            asked_by=input.who,
            owner=input.who,
            incident=input.incident,
            duration=input.duration,
            asked_at=workflow.now(),
            approved_by=input.approved_by,
        )
        self._snapshot: PolicySnapshot | None = None
        self._release: PersonRequest | None = None
        self._denied = False
        self._caught_up = False
        self._moved = False
        """The end, the review date or the owner is another one."""
        self._leases_lost = input.resumed is not None
        """Also on going on: a signal may have come in between."""
        self._shown: tuple[object, ...] = ()

    @property
    def _policy(self) -> OverridesPolicy:
        assert self._snapshot is not None
        return self._snapshot.policy.overrides

    @property
    def _longest(self) -> timedelta:
        """From now until the end, or the review."""
        standing = self.record.kind is OverrideKind.STANDING
        return self._policy.max_review if standing else self._policy.max_duration

    # ------------------------------------------------------------ the run

    @workflow.run
    async def run(self, input: OverrideInput) -> OverrideRecord:
        self._snapshot = await load_policy()
        end = None if input.resumed else await self._begin()
        if end is None:
            end = await self._hold()
        if end is None:
            await workflow.wait_condition(lambda: bool(self._release) or workflow.all_handlers_finished())
            if self._release is None:
                workflow.continue_as_new(input.model_copy(update={"resumed": self.record}))
            end = OverrideEnd.RELEASED
        await self._end(end)
        with contextlib.suppress(TimeoutError):
            await workflow.wait_condition(
                lambda: all(task.done() for task in self.background),
                timeout=BACKGROUND,
                timeout_summary="Pages that are still being sent",
            )
        await workflow.wait_condition(workflow.all_handlers_finished)
        return self.record

    async def _begin(self) -> OverrideEnd | None:
        """Check, ask an approver if need be, take the lease. None: it is in force."""
        record = self.record
        self.note("decision", f"asked for {record.knob} at {shown(record.value)}: {record.reason}", record.asked_by)
        if why_not := await self.why_not(f"set {record.knob}", record.asked_by, role_to_set(record.knob, record.kind)):
            record.outcome = why_not
            self._put_refusal_on_record("set", record.asked_by, why_not)
            return OverrideEnd.DENIED
        try:
            record.assessment = await self._assess()
        except ActivityError as error:
            record.outcome = failure(error)[1]
            return OverrideEnd.FAILED
        if record.assessment.approval and record.approved_by is None and (end := await self._approval()):
            return end
        return await self._take()

    async def _approval(self) -> OverrideEnd | None:
        """None: an approver agreed."""
        record = self.record
        assert record.assessment is not None
        gives_up_at = workflow.now() + self._policy.approve_within
        why = "; ".join(record.assessment.approval)
        self._enter(
            OverridePhase.AWAITING_APPROVAL, f"an approver other than {record.asked_by}", "give up", gives_up_at
        )
        self.page("approvers", f"{record.override_id} waits for an approval: {why}")
        with contextlib.suppress(TimeoutError):
            await workflow.wait_condition(
                lambda: bool(record.approved_by or self._denied or self._release),
                timeout=self._policy.approve_within,
                timeout_summary="Waiting for an approver",
            )
        if record.approved_by:
            return None
        if self._denied:
            return OverrideEnd.DENIED
        return OverrideEnd.WITHDRAWN if self._release else OverrideEnd.NOT_APPROVED

    async def _hold(self) -> OverrideEnd | None:
        """Hold the lease until the end, which is the answer. None: the history is long; go on in a new run."""
        keepers = [asyncio.create_task(self._keep_lease())]
        if self.record.kind is OverrideKind.STANDING:
            keepers.append(asyncio.create_task(self._watch_baseline()))
        try:
            return await self._wait_for_end()
        finally:
            for keeper in keepers:
                keeper.cancel()

    async def _wait_for_end(self) -> OverrideEnd | None:
        record = self.record
        warned: datetime | None = None
        reminded: datetime | None = None
        while True:
            moment, what = self._next(warned, reminded)
            self._enter(OverridePhase.IN_FORCE, f"its end, or {record.owner}", what, moment)
            self._moved = False
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(
                    lambda: bool(self._release or self._caught_up or self._moved) or self._history_is_long(),
                    timeout=max(moment - workflow.now(), timedelta(0)),
                    timeout_summary=what,
                )
            now = workflow.now()
            if self._release:
                return OverrideEnd.RELEASED
            if self._caught_up:
                return OverrideEnd.CAUGHT_UP
            if record.ends_at is not None and now >= record.ends_at:
                return OverrideEnd.LAPSED if now - record.ends_at > self._policy.late_after else OverrideEnd.ON_TIME
            if self._moved or now < moment:
                if self._history_is_long() and not self._moved:
                    return None
                continue
            if record.ends_at is not None:
                warned = record.ends_at
                self.page(record.owner, f"{record.override_id} ends at {utc(record.ends_at)}; extend it or let it end")
            else:
                reminded = now
                self.page(record.owner, f"review of {record.override_id} is due: extend, hand over or release it")

    def _next(self, warned: datetime | None, reminded: datetime | None) -> tuple[datetime, str]:
        """What comes next if nobody does anything, and when."""
        record = self.record
        if record.ends_at is not None:
            warn_at = record.ends_at - self._policy.warn_before
            if warned != record.ends_at and record.in_force_since is not None and warn_at > record.in_force_since:
                return warn_at, "warn before the end"
            return record.ends_at, "the end"
        assert record.review_at is not None
        if reminded is None or reminded < record.review_at:
            return record.review_at, "review"
        return reminded + self._policy.reminder, "remind of the review"

    def _history_is_long(self) -> bool:
        return self.record.kind is OverrideKind.STANDING and workflow.info().is_continue_as_new_suggested()

    def _enter(self, phase: OverridePhase, waiting_for: str, next_step: str, next_at: datetime | None) -> None:
        record = self.record
        record.phase, record.waiting_for, record.next_step, record.next_at = phase, waiting_for, next_step, next_at
        self.show()

    def show(self) -> None:
        """The record as the UI's details, and its search attributes when they changed."""
        record = self.record
        workflow.set_current_details(render_override(record))
        holds = bool(record.undo) and record.phase is not OverridePhase.ENDED
        if (holds, record.until) == self._shown:
            return
        self._shown = (holds, record.until)
        until = [ENDS_AT.value_set(record.until)] if record.until else []
        workflow.upsert_search_attributes([KNOB.value_set(record.knob), HOLDS_LEASES.value_set(holds), *until])

    # ------------------------------------------------------------ the lease

    async def _assess(self) -> Assessment:
        assert self._snapshot is not None
        record, policy = self.record, self._snapshot.policy
        load = None
        with contextlib.suppress(ActivityError, TimeoutError):
            load = await asyncio.wait_for(
                read(CloudWatchActivities.read_load, load_query(policy, None), summary="The present load"),
                policy.evidence.budget.total_seconds(),
            )
        states = await read(
            LeaseActivities.read_knobs,
            ReadKnobs(knobs=list(KnobName), baseline=policy.baseline),
            summary="Who holds which knob now",
        )
        now = workflow.now()
        return await decide(
            DecisionActivities.assess_override,
            AssessOverride(
                knob=record.knob,
                value=record.value,
                pin=record.kind is OverrideKind.PIN,
                now=now,
                ends_at=now + record.duration,
                longest=self._longest,
                leases=[lease for state in states.knobs for lease in state.leases],
                load=load,
                policy=policy,
            ),
            summary="What it would do, and whether an approver must agree",
        )

    async def _take(self) -> OverrideEnd | None:
        """Take the lease and read back what is in force. None: it is held."""
        record, now = self.record, workflow.now()
        if record.kind is OverrideKind.STANDING:
            record.review_at = now + record.duration
        else:
            record.ends_at = now + record.duration
        try:
            await self._acquire(self._new_lease(record.owner), within=min(record.duration, timedelta(minutes=1)))
        except ActivityError as error:
            record.outcome = f"the lease could not be taken: {failure(error)[1]}"
            return OverrideEnd.FAILED
        record.in_force_since = workflow.now()
        with contextlib.suppress(ActivityError):
            record.effective = (await self._state("Verify: the value in force")).value
        self.note("lever", f"{record.knob} held at {shown(record.value)}; in force is {shown(record.effective)}")
        self._enter(OverridePhase.IN_FORCE, record.owner, "", None)
        return None

    def _new_lease(self, owner: str) -> LeaseRequest:
        record = self.record
        record.leases_taken += 1
        lasts = self._policy.standing_lease if record.kind is OverrideKind.STANDING else record.duration
        return LeaseRequest(
            lease_id=f"{record.run_id}:{record.leases_taken}",
            knob=record.knob,
            value=record.value,
            holder=Holder(kind="person", id=owner),
            reason=record.reason,
            duration_ms=round(lasts / timedelta(milliseconds=1)),
            pin=record.kind is OverrideKind.PIN,
        )

    async def _acquire(self, lease: LeaseRequest, within: timedelta) -> None:
        """Take `lease`, which is the override's from then on. Raises ActivityError."""
        self.record.undo.append(lease)
        self.show()
        taken = await mutate(
            LeaseActivities.take_leases,
            TakeLeases(leases=[lease], until=self.record.ends_at),
            summary=f"Lease {lease.knob} at {shown(lease.value)}"[:200],
            within=within,
        )
        first = taken[0].acquired_at if taken else workflow.now()
        self.record.lease = lease.model_copy(update={"acquired_at": first})

    async def _keep_lease(self) -> None:
        """Put the lease back when Redis lost it, with the time left; renew a standing one."""
        assert self._snapshot is not None
        standing = self.record.kind is OverrideKind.STANDING
        while True:
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(
                    lambda: self._leases_lost,
                    timeout=self._snapshot.policy.leases.renew_every if standing else None,
                    timeout_summary="Next renewal of the lease",
                )
            lost, self._leases_lost = self._leases_lost, False
            assert self.record.lease is not None
            try:
                if lost:
                    await self._release_former()
                changed = await mutate(
                    LeaseActivities.renew_leases,
                    TakeLeases(leases=[self.record.lease], until=self.record.ends_at),
                    summary="Put the lease back" if lost else "Renew the lease",
                )
            except ActivityError as error:
                if is_cancelled_exception(error):
                    raise
                self.page(self.record.owner, f"the lease could not be put back: {failure(error)[1]}")
                continue
            if changed:
                why = "Redis lost writes" if lost else "the lease had lapsed while nobody renewed it"
                self.note("lever", f"{why}: {', '.join(changed)}")

    async def _release_former(self) -> None:
        """Of former owners: a replica that had lost the last writes may have brought them back."""
        current = self.record.lease
        for lease in self.record.undo:
            if current is not None and lease.lease_id != current.lease_id:
                await self._release_lease(lease, "handed over", PROMPT)

    async def _watch_baseline(self) -> None:
        """Compare a standing override with the configured baseline, as it is each time."""
        while not self._caught_up:
            await workflow.sleep(self._policy.baseline_check_interval, summary="Next look at the configured baseline")
            try:
                caught_up = await read(
                    SettingsActivities.has_caught_up,
                    CaughtUp(knob=self.record.knob, value=self.record.value),
                    summary="Has the configured baseline caught up?",
                )
            except ActivityError as error:
                if is_cancelled_exception(error):
                    raise
                self.note("note", f"the configured baseline could not be read: {failure(error)[1]}")
                continue
            if caught_up:
                self._snapshot = await load_policy()
                self._caught_up = True

    async def _state(self, summary: str) -> KnobState:
        assert self._snapshot is not None
        states = await read(
            LeaseActivities.read_knobs,
            ReadKnobs(knobs=[self.record.knob], baseline=self._snapshot.policy.baseline),
            summary=summary,
        )
        return states.knobs[0]

    # ------------------------------------------------------------ the end

    async def _end(self, end: OverrideEnd) -> None:
        record = self.record
        record.end = end
        held = bool(record.undo)
        self._enter(OverridePhase.ENDING, "the release of the lease" if held else "", "", None)
        if end is OverrideEnd.LAPSED and record.ends_at is not None:
            late = span(workflow.now() - record.ends_at)
            self.note(
                "note", f"the control plane was away at the end: the lease lapsed by itself; noticed {late} later"
            )
        rest = await self._give_back() if held else ""
        said = record.outcome or (self._release.why if self._release else "")
        by = f" by {self._release.who}" if self._release else ""
        record.outcome = (
            f"{end[0].upper()}{end[1:]}{by}" + (f" ({said})" if said else "") + (f": {rest}." if rest else ".")
        )
        record.ended_at = workflow.now()
        self.note("phase", record.outcome)
        self._enter(OverridePhase.ENDED, "", "", None)

    async def _give_back(self) -> str:
        """Release the lease and verify the value in force; answers what that is, in words."""
        record = self.record
        for lease in record.undo:
            try:
                await self._release_lease(lease, f"{record.end}: {record.reason}", MUTATE_TOTAL)
            except ActivityError as error:
                ends = f"it lapses by itself at {utc(record.ends_at)}" if record.ends_at else "it lapses by itself"
                self.page(ON_CALL, f"{record.override_id} could not release its lease ({failure(error)[1]}); {ends}")
        try:
            state = await self._state("Verify: the value in force after the end")
        except ActivityError as error:
            self.page(ON_CALL, f"{record.knob} could not be verified after {record.override_id}: {failure(error)[1]}")
            return f"the value in force could not be read: {failure(error)[1]}"
        record.effective = state.value
        record.still_held = [held_by(lease) for lease in state.leases]
        if {lease.lease_id for lease in state.leases} & {lease.lease_id for lease in record.undo}:
            self.page(ON_CALL, f"{record.knob} is still held by {record.override_id} after its end")
        if not state.leases:
            return f"{record.knob} is {shown(state.value)}, as configured"
        return f"{record.knob} is {shown(state.value)}: still {'; '.join(record.still_held)}"

    async def _release_lease(self, lease: LeaseRequest, reason: str, within: timedelta) -> None:
        await mutate(
            LeaseActivities.release_leases,
            ReleaseLeases(lease_ids=[lease.lease_id], holder=lease.holder, reason=reason[:500]),
            summary=f"Release the lease of {lease.holder.id}"[:200],
            within=within,
        )

    # ------------------------------------------------------------ what arrives

    @workflow.query(name=RECORD)
    def answer_record(self) -> OverrideRecord:
        """The override as it stands."""
        return self.record

    @workflow.signal(name=LEASES_LOST)
    def leases_lost(self) -> None:
        """Redis lost its state: the lease is put back at once."""
        self._leases_lost = True

    @workflow.update(name=STARTED)
    async def started(self) -> OverrideAnswer:
        """What became of the wish: in force, waiting for an approval, or refused."""
        await workflow.wait_condition(
            lambda: self.record.phase in (OverridePhase.AWAITING_APPROVAL, OverridePhase.IN_FORCE, OverridePhase.ENDED)
        )
        outcome, message = answer_of(self.record)
        return OverrideAnswer(outcome=outcome, message=message, record=self.record)

    @workflow.update(name=APPROVE)
    async def approve(self, request: PersonRequest) -> UpdateResult:
        """Agree; whoever asked for it cannot."""
        async with self.deciding:
            if result := await self._may_not(APPROVE, request, Role.APPROVER, asked_by_too=False):
                return result
            self.record.approved_by = request.who
            result = self.decide(APPROVE, request, "accepted", f"approved; {self.record.knob} is set now")
            await workflow.wait_condition(lambda: self.record.phase in (OverridePhase.IN_FORCE, OverridePhase.ENDED))
            outcome, message = answer_of(self.record)
            return UpdateResult(outcome=outcome, message=message)

    @workflow.update(name=DENY)
    async def deny(self, request: PersonRequest) -> UpdateResult:
        """Say no."""
        async with self.deciding:
            if result := await self._may_not(DENY, request, Role.APPROVER):
                return result
            self._denied = True
            self.record.outcome = f"by {request.who}: {request.why}"
            return self.decide(DENY, request, "accepted", "denied; nothing was changed")

    @workflow.update(name=RELEASE)
    async def release(self, request: PersonRequest) -> UpdateResult:
        """Give the knob back now, or withdraw what waits for an approval."""
        async with self.deciding:
            if result := await self._may_not(RELEASE, request, Role.ENGINEER):
                return result
            self._release = request
            self.decide(RELEASE, request, "accepted", "it ends now")
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(
                    lambda: self.record.phase is OverridePhase.ENDED,
                    timeout=PROMPT,
                    timeout_summary="Waiting to tell how it ended",
                )
            return UpdateResult(outcome="accepted", message=self.record.outcome or "the release is under way")

    @workflow.update(name=EXTEND)
    async def extend(self, request: OverrideExtendRequest) -> UpdateResult:
        """Move the end, or the review date, later."""
        record = self.record
        async with self.deciding:
            needed = role_to_set(record.knob, record.kind)
            approved = bool(record.assessment and record.assessment.approval)
            if result := await self._may_not(
                EXTEND, request, Role.APPROVER if approved else needed, asked_by_too=not approved
            ):
                return result
            now, most = workflow.now(), self._longest
            before = record.until
            assert before is not None
            until = max(before, now) + request.by
            if until > now + most:
                return self.decide(
                    EXTEND, request, "not-possible", f"{utc(until)} is too far; at most {span(most)} from now"
                )
            if record.ends_at is None:
                record.review_at = until
            elif why_not := await self._renew_until(until):
                return self.decide(EXTEND, request, "not-possible", f"{why_not}; it still ends at {utc(before)}")
            record.extensions += 1
            self._moved = True
            return self.decide(EXTEND, request, "accepted", f"now until {utc(until)}, was {utc(before)}")

    async def _renew_until(self, until: datetime) -> str:
        """Move lease and end; empty, or why it did not work."""
        record = self.record
        assert record.lease is not None
        left_ms = round((until - workflow.now()) / timedelta(milliseconds=1))
        lease = record.lease.model_copy(update={"duration_ms": left_ms})
        try:
            await mutate(
                LeaseActivities.take_leases,
                TakeLeases(leases=[lease], until=until),
                summary=f"Renew the lease until {utc(until)}",
                within=PROMPT,
            )
        except ActivityError as error:
            return f"the lease could not be renewed: {failure(error)[1]}"
        if record.phase in OVER:
            return "it has just ended"
        record.lease, record.ends_at = lease, until
        return ""

    @workflow.update(name=HAND_OVER)
    async def hand_over(self, request: HandOverRequest) -> UpdateResult:
        """Give it to another owner: the new lease is taken before the old one is released, so there is no gap."""
        record = self.record
        async with self.deciding:
            if result := await self._may_not(HAND_OVER, request, Role.ENGINEER):
                return result
            if request.to == record.owner:
                return self.decide(HAND_OVER, request, "already-done", f"it is {request.to}'s already")
            if why_not := await self.why_not(f"own {record.knob}", request.to, role_to_set(record.knob, record.kind)):
                return self.decide(HAND_OVER, request, "not-possible", f"it cannot be theirs: {why_not}")
            old = record.lease
            assert old is not None
            new = self._new_lease(request.to).model_copy(update={"duration_ms": old.duration_ms})
            try:
                await self._acquire(new, PROMPT)
            except ActivityError as error:
                return self.decide(HAND_OVER, request, "not-possible", f"try again: {failure(error)[1]}")
            try:
                await self._release_lease(old, f"handed over to {request.to}", PROMPT)
            except ActivityError as error:
                self.note("note", f"the lease of {record.owner} goes on beside it: {failure(error)[1]}")
            record.owner = request.to
            self._moved = True
            return self.decide(HAND_OVER, request, "accepted", f"{request.to} owns it now")

    async def _may_not(
        self, action: str, request: PersonRequest, needed: Role, *, asked_by_too: bool = True
    ) -> UpdateResult | None:
        """The answer when the action does not fit the phase or is not this person's to take; None: go on."""
        record = self.record
        if record.phase not in PHASES[action]:
            late = f": {record.outcome}" if record.outcome else ""
            outcome = "already-done" if action == APPROVE and record.approved_by else "not-possible"
            return self.decide(action, request, outcome, f"the override is {record.phase}{late}")
        why_not = await self.why_not(action, request.who, needed)
        if not why_not and not asked_by_too and request.who in (record.asked_by, record.owner):
            why_not = f"{request.who} asked for it or owns it; somebody else must agree"
        if not why_not:
            return None
        self._put_refusal_on_record(action, request.who, why_not)
        return self.decide(action, request, "denied", why_not)

    def _put_refusal_on_record(self, action: str, who: str, why: str) -> None:
        """In the ledger, beside the changes; without waiting for it."""
        record = self.record
        refusal = Refusal(
            holder=Holder(kind="person", id=who),
            action=action,
            target=record.knob,
            value=shown(record.value)[:500],
            why=why[:500],
        )

        async def put() -> None:
            try:
                await mutate(LeaseActivities.record_refusal, refusal, summary="Put the refusal on record")
            except ActivityError as error:
                self.note("note", f"the ledger did not take the refusal of {who}: {failure(error)[1]}")

        self.background.append(asyncio.create_task(put()))

    @approve.validator
    def _check_approve(self, request: PersonRequest) -> None:
        self.refuse_blank(request)

    @deny.validator
    def _check_deny(self, request: PersonRequest) -> None:
        self.refuse_blank(request)

    @release.validator
    def _check_release(self, request: PersonRequest) -> None:
        self.refuse_blank(request)

    @extend.validator
    def _check_extend(self, request: OverrideExtendRequest) -> None:
        self.refuse_blank(request)

    @hand_over.validator
    def _check_hand_over(self, request: HandOverRequest) -> None:
        self.refuse_blank(request)
