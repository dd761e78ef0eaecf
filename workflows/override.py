"""One override: a person holds a knob at a value for a time, and gives it back on time whatever happens."""

import asyncio
import contextlib
from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.cloudwatch import CloudWatchActivities
from activities.decisions import DecisionActivities
from activities.leases import LeaseActivities
from domain.incident import span, utc
from domain.knobs import KnobName
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
    HandOverRequest,
    OverrideAnswer,
    OverrideExtendRequest,
    OverrideInput,
    PersonRequest,
    ReadKnobs,
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
    role_to_set,
    shown,
)
from domain.people import Role, highest
from workflows._override import PROMPT, Override
from workflows._override_end import end_override
from workflows._override_lease import keep_lease
from workflows._step import decide, failure, load_policy, mutate, read

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
class OverrideWorkflow(Override):
    """Its lease lapses by itself at the override's end, so that nothing has to live for the way back."""

    @workflow.init
    def __init__(self, input: OverrideInput) -> None:
        super().__init__(input)

    # ------------------------------------------------------------ the run

    @workflow.run
    async def run(self, input: OverrideInput) -> OverrideRecord:
        self.snapshot = await load_policy()
        end = None if input.resumed else await self._begin()
        if end is None:
            end = await self._hold()
        if end is None:
            await workflow.wait_condition(lambda: bool(self.release_asked) or workflow.all_handlers_finished())
            if self.release_asked is None:
                workflow.continue_as_new(input.model_copy(update={"resumed": self.record}))
            end = OverrideEnd.RELEASED
        await end_override(self, end)
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
            self.put_refusal_on_record("set", record.asked_by, why_not)
            return OverrideEnd.DENIED
        if record.duration > self.longest:
            record.outcome = f"duration: at most {span(self.longest)} is allowed"
            return OverrideEnd.FAILED
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
        gives_up_at = workflow.now() + self.policy.approve_within
        why = "; ".join(record.assessment.approval)
        self.enter(
            OverridePhase.AWAITING_APPROVAL,
            waiting_for=f"an approver other than {record.asked_by}",
            next_step="give up",
            next_at=gives_up_at,
        )
        self.page("approvers", f"{record.override_id} waits for an approval: {why}")
        with contextlib.suppress(TimeoutError):
            await workflow.wait_condition(
                lambda: bool(record.approved_by or self.denied or self.release_asked),
                timeout=self.policy.approve_within,
                timeout_summary="Waiting for an approver",
            )
        if record.approved_by:
            return None
        if self.denied:
            return OverrideEnd.DENIED
        return OverrideEnd.WITHDRAWN if self.release_asked else OverrideEnd.NOT_APPROVED

    async def _hold(self) -> OverrideEnd | None:
        """Hold the lease until the end, which is the answer. None: the history is long; go on in a new run."""
        keeper = asyncio.create_task(keep_lease(self))
        try:
            return await self._wait_for_end()
        finally:
            keeper.cancel()

    async def _wait_for_end(self) -> OverrideEnd | None:
        record = self.record
        warned: datetime | None = None
        reminded: datetime | None = None
        while True:
            moment, what = self._next(warned, reminded)
            self.enter(
                OverridePhase.IN_FORCE, waiting_for=f"its end, or {record.owner}", next_step=what, next_at=moment
            )
            self.moved = False
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(
                    lambda: bool(self.release_asked or self.caught_up or self.moved) or self._history_is_long(),
                    timeout=max(moment - workflow.now(), timedelta(0)),
                    timeout_summary=what,
                )
            now = workflow.now()
            if self.release_asked:
                return OverrideEnd.RELEASED
            if self.caught_up:
                return OverrideEnd.CAUGHT_UP
            if record.ends_at is not None and now >= record.ends_at:
                return OverrideEnd.LAPSED if now - record.ends_at > self.policy.late_after else OverrideEnd.ON_TIME
            if self.moved or now < moment:
                if self._history_is_long() and not self.moved:
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
            warn_at = record.ends_at - self.policy.warn_before
            if warned != record.ends_at and record.in_force_since is not None and warn_at > record.in_force_since:
                return warn_at, "warn before the end"
            return record.ends_at, "the end"
        assert record.review_at is not None
        if reminded is None or reminded < record.review_at:
            return record.review_at, "review"
        return reminded + self.policy.reminder, "remind of the review"

    def _history_is_long(self) -> bool:
        return self.standing and workflow.info().is_continue_as_new_suggested()

    # ------------------------------------------------------------ the lease

    async def _assess(self) -> Assessment:
        record, policy = self.record, self.now_snapshot.policy
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
                leases=[lease for state in states.knobs for lease in state.leases],
                load=load,
                policy=policy,
            ),
            summary="What it would do, and whether an approver must agree",
        )

    async def _take(self) -> OverrideEnd | None:
        """Take the lease and read back what is in force. None: it is held."""
        record, now = self.record, workflow.now()
        if self.standing:
            record.review_at = now + record.duration
        else:
            record.ends_at = now + record.duration
        try:
            await self.acquire(self.new_lease(record.owner), within=min(record.duration, timedelta(minutes=1)))
        except ActivityError as error:
            record.outcome = f"the lease could not be taken: {failure(error)[1]}"
            return OverrideEnd.FAILED
        record.in_force_since = workflow.now()
        with contextlib.suppress(ActivityError):
            record.effective = (await self.in_force("Verify: the value in force")).value
        self.note("lever", f"{record.knob} held at {shown(record.value)}; in force is {shown(record.effective)}")
        self.enter(OverridePhase.IN_FORCE, waiting_for=record.owner)
        return None

    # ------------------------------------------------------------ what arrives

    @workflow.query(name=RECORD)
    def answer_record(self) -> OverrideRecord:
        """The override as it stands."""
        return self.record

    @workflow.signal(name=LEASES_LOST)
    def leases_lost(self) -> None:
        """Redis lost its state: the lease is put back at once."""
        self.redis_lost = True

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
            self.denied = True
            self.record.outcome = f"by {request.who}: {request.why}"
            return self.decide(DENY, request, "accepted", "denied; nothing was changed")

    @workflow.update(name=RELEASE)
    async def release(self, request: PersonRequest) -> UpdateResult:
        """Give the knob back now, or withdraw what waits for an approval."""
        async with self.deciding:
            if result := await self._may_not(RELEASE, request, Role.ENGINEER, owners=True):
                return result
            self.release_asked = request
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
            approved = bool(record.assessment and record.assessment.approval)
            needed = Role.APPROVER if approved else role_to_set(record.knob, record.kind)
            if result := await self._may_not(EXTEND, request, needed, owners=True, asked_by_too=not approved):
                return result
            now, most, before = workflow.now(), self.longest, record.until
            assert before is not None
            if request.by > most - (max(before, now) - now):
                too_far = f"{span(request.by)} more is too far; at most {span(most)} from now"
                return self.decide(EXTEND, request, "not-possible", too_far)
            until = max(before, now) + request.by
            if record.ends_at is None:
                record.review_at = until
            elif why_not := await self._renew_until(until):
                return self.decide(EXTEND, request, "not-possible", f"{why_not}; it still ends at {utc(before)}")
            record.extensions += 1
            self.moved = True
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
            if result := await self._may_not(HAND_OVER, request, Role.ENGINEER, owners=True):
                return result
            if request.to == record.owner:
                return self.decide(HAND_OVER, request, "already-done", f"it is {request.to}'s already")
            if why_not := await self.why_not(f"own {record.knob}", request.to, role_to_set(record.knob, record.kind)):
                return self.decide(HAND_OVER, request, "not-possible", f"it cannot be theirs: {why_not}")
            old = record.lease
            assert old is not None
            new = self.new_lease(request.to).model_copy(update={"duration_ms": old.duration_ms})
            try:
                await self.acquire(new, PROMPT)
            except ActivityError as error:
                return self.decide(HAND_OVER, request, "not-possible", f"try again: {failure(error)[1]}")
            try:
                await self.release_lease(old, f"handed over to {request.to}", PROMPT)
            except ActivityError as error:
                self.note("note", f"the lease of {record.owner} goes on beside it: {failure(error)[1]}")
            record.owner = request.to
            self.moved = True
            return self.decide(HAND_OVER, request, "accepted", f"{request.to} owns it now")

    async def _may_not(
        self, action: str, request: PersonRequest, needed: Role, *, owners: bool = False, asked_by_too: bool = True
    ) -> UpdateResult | None:
        """The answer when the action is not this person's to take or does not fit the phase; None: go on.

        `owners`: of another person's override it is an approver's. Without `asked_by_too` it is somebody else's.
        """
        record = self.record
        anothers = owners and request.who != record.owner
        why_not = await self.why_not(action, request.who, highest(needed, Role.APPROVER) if anothers else needed)
        if why_not and anothers:
            why_not += f"; it is {record.owner}'s, who may hand it over"
        if not why_not and not asked_by_too and request.who in (record.asked_by, record.owner):
            why_not = f"{request.who} asked for it or owns it; somebody else must agree"
        if why_not:
            self.put_refusal_on_record(action, request.who, why_not)
            return self.decide(action, request, "denied", why_not)
        if record.phase not in PHASES[action]:
            late = f": {record.outcome}" if record.outcome else ""
            outcome = "already-done" if action == APPROVE and record.approved_by else "not-possible"
            return self.decide(action, request, outcome, f"the override is {record.phase}{late}")
        return None

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
