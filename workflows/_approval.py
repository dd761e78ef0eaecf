"""What people may do to an incident: eight updates, each with a typed answer that stays in the record.

The role is read from the roster at the moment of the decision. Malformed input is refused before it is accepted and
leaves no trace; one who may not, or comes too late, gets a typed answer and a line in the record.
"""

from datetime import timedelta

from temporalio import workflow

from domain.incident import IncidentRecord, Lever, LeverStatus, Phase, span, utc
from domain.messages import (
    ABORT,
    ACKNOWLEDGE,
    APPROVE_KEEP,
    APPROVE_REVERT,
    EXTEND,
    RECORD,
    REJECT,
    RELEASE_LEVER,
    TAKE_OVER,
    ExtendRequest,
    KeepRequest,
    PersonRequest,
    ReleaseLeverRequest,
    TakeOverRequest,
    UpdateResult,
)
from domain.people import needed_role
from workflows._mitigation import demand_end, take
from workflows._record import Incident
from workflows._to_person import keep, take_over

ENDING = (Phase.CLEANUP, Phase.SNOOZED, Phase.CLOSED)


class DecidedByPeople(Incident):
    """Adds the query and the updates; the run looks at the flags that they set."""

    @workflow.query(name=RECORD)
    def answer_record(self) -> IncidentRecord:
        """The incident as it stands."""
        return self.record

    @workflow.update(name=APPROVE_REVERT)
    async def approve_revert(self, request: PersonRequest) -> UpdateResult:
        """Start the guarded, staged way back."""
        async with self.deciding:
            if result := await self._may_not(APPROVE_REVERT, request):
                return result
            if self.approved_by is not None:
                return self.decide(
                    APPROVE_REVERT,
                    request,
                    "already-done",
                    f"already approved by {self.approved_by}; the way back runs",
                )
            if self.record.phase is not Phase.AWAITING_DECISION:
                return self.decide(
                    APPROVE_REVERT,
                    request,
                    "not-possible",
                    f"the incident is {self.record.phase}, nothing waits for approval yet; "
                    "`abort` gives everything back without waiting for recovery",
                )
            if not self.record.held:
                return self.decide(APPROVE_REVERT, request, "not-possible", "nothing is held, so nothing can go back")
            self.approved_by = request.who
            return self.decide(
                APPROVE_REVERT,
                request,
                "accepted",
                "the way back starts: " + ", then ".join(lever.name for lever in self.record.held),
            )

    @workflow.update(name=REJECT)
    async def reject(self, request: PersonRequest) -> UpdateResult:
        """Keep the levers for now; the maximum holds go on."""
        async with self.deciding:
            if result := await self._may_not(REJECT, request):
                return result
            if self.record.phase is not Phase.AWAITING_DECISION:
                return self.decide(REJECT, request, "not-possible", f"the incident is {self.record.phase}")
            ends = min((lever.hold_until for lever in self.record.held if lever.hold_until), default=None)
            until = f" until the first hold ends at {utc(ends)}" if ends else ""
            return self.decide(REJECT, request, "accepted", f"the levers stay{until}; approve again at any time")

    @workflow.update(name=EXTEND)
    async def extend(self, request: ExtendRequest) -> UpdateResult:
        """Extend the maximum hold of one lever, or of all."""
        async with self.deciding:
            if result := await self._may_not(EXTEND, request):
                return result
            levers = [
                lever
                for lever in self.record.held
                if lever.hold_until and lever.status is LeverStatus.IN_FORCE and request.lever in (None, lever.name)
            ]
            most = self.now_snapshot.policy.way_back.max_extension
            if not levers:
                return self.decide(EXTEND, request, "not-possible", f"{request.lever or 'no lever'} is not held")
            if request.by > most:
                return self.decide(
                    EXTEND,
                    request,
                    "not-possible",
                    f"at most {self._span(most)} at a time, not {self._span(request.by)}",
                )
            done: list[str] = []
            for lever in levers:
                if why_not := await self._extend_hold(lever, request.by):
                    so_far = f"; extended before: {', '.join(done)}" if done else ""
                    return self.decide(EXTEND, request, "not-possible", why_not + so_far)
                done.append(f"{lever.name} until {utc(lever.hold_until)}" if lever.hold_until else lever.name)
            names = ", ".join(done)
            price = self.price_of(request.by) if any(lever.demand for lever in levers) else ""
            return self.decide(
                EXTEND, request, "accepted", f"held longer: {names}" + (f"; {price} more" if price else "")
            )

    @workflow.update(name=RELEASE_LEVER)
    async def release_lever(self, request: ReleaseLeverRequest) -> UpdateResult:
        """Release one lever ahead of the rest, guarded and watched like every release."""
        async with self.deciding:
            if result := await self._may_not(RELEASE_LEVER, request):
                return result
            if all(lever.name is not request.lever for lever in self.record.held):
                return self.decide(RELEASE_LEVER, request, "already-done", f"{request.lever} is not held")
            if self.record.phase is not Phase.AWAITING_DECISION or self.approved_by or self.release_asked:
                return self.decide(
                    RELEASE_LEVER,
                    request,
                    "not-possible",
                    f"the incident is {self.record.phase}; wait for its decision",
                )
            self.release_asked = request.lever
            return self.decide(RELEASE_LEVER, request, "accepted", f"{request.lever} is released if the load allows")

    @workflow.update(name=ABORT)
    async def abort(self, request: PersonRequest) -> UpdateResult:
        """Give everything back at once and close. Takes no turn: whatever else is being decided must not hold it up."""
        if result := await self._may_not(ABORT, request):
            return result
        if self.abort_asked:
            return self.decide(ABORT, request, "already-done", "the incident is being aborted already")
        self.abort_asked = True
        return self.decide(ABORT, request, "accepted", "every lever is given back now, then the incident closes")

    @workflow.update(name=ACKNOWLEDGE)
    async def acknowledge(self, request: PersonRequest) -> UpdateResult:
        """Somebody is on it: reminders stop."""
        if result := await self._may_not(ACKNOWLEDGE, request):
            return result
        if self.record.acknowledged_by is not None:
            message = f"already acknowledged by {self.record.acknowledged_by}"
            return self.decide(ACKNOWLEDGE, request, "already-done", message)
        self.record.acknowledged_by = request.who
        return self.decide(ACKNOWLEDGE, request, "accepted", "acknowledged; reminders stop")

    @workflow.update(name=APPROVE_KEEP)
    async def approve_keep(self, request: KeepRequest) -> UpdateResult:
        """Turn a lever into a standing override: for when the configured baseline was the fault."""
        async with self.deciding:
            if result := await self._may_not(APPROVE_KEEP, request):
                return result
            return self.decide(APPROVE_KEEP, request, *await keep(self, request))

    @workflow.update(name=TAKE_OVER)
    async def take_over(self, request: TakeOverRequest) -> UpdateResult:
        """Stop the automation; the levers stay with a person until a stated end."""
        async with self.deciding:
            if result := await self._may_not(TAKE_OVER, request):
                return result
            if self.abort_asked:
                return self.decide(TAKE_OVER, request, "not-possible", "the incident is ending")
            return self.decide(TAKE_OVER, request, *await take_over(self, request))

    @approve_revert.validator
    def _check_approve(self, request: PersonRequest) -> None:
        self.refuse_blank(request)

    @reject.validator
    def _check_reject(self, request: PersonRequest) -> None:
        self.refuse_blank(request)

    @extend.validator
    def _check_extend(self, request: ExtendRequest) -> None:
        self.refuse_blank(request)

    @release_lever.validator
    def _check_release(self, request: ReleaseLeverRequest) -> None:
        self.refuse_blank(request)

    @abort.validator
    def _check_abort(self, request: PersonRequest) -> None:
        self.refuse_blank(request)

    @acknowledge.validator
    def _check_acknowledge(self, request: PersonRequest) -> None:
        self.refuse_blank(request)

    @approve_keep.validator
    def _check_keep(self, request: KeepRequest) -> None:
        self.refuse_blank(request)

    @take_over.validator
    def _check_take_over(self, request: TakeOverRequest) -> None:
        self.refuse_blank(request)

    async def _extend_hold(self, lever: Lever, by: timedelta) -> str:
        """Empty, or why the lever's demand could not be extended."""
        assert lever.hold_until is not None
        hold_until = max(lever.hold_until, workflow.now()) + by
        if lever.demand is not None:
            end = demand_end(hold_until, self.now_snapshot.policy)
            demand = lever.demand.model_copy(update={"end": end})
            [taken] = await take([lever.model_copy(update={"demand": demand})])
            if taken.status is LeverStatus.FAILED:
                return f"the demand for {demand.model} could not be extended: {taken.detail}"
            lever.demand = demand
        lever.hold_until = hold_until
        lever.extensions += 1
        return ""

    def _span(self, duration: timedelta) -> str:
        return span(self.now_snapshot.clock.business_duration(duration))

    async def _may_not(self, action: str, request: PersonRequest) -> UpdateResult | None:
        """The answer when the action is too late or not this person's to take; None: go on."""
        if self.record.phase in ENDING:
            return self.decide(action, request, "not-possible", f"too late: the incident is {self.record.phase}")
        needed = needed_role(action, recovered=self.record.recovered_at is not None)
        why_not = await self.why_not(action, request.who, needed)
        return self.decide(action, request, "denied", why_not) if why_not else None
