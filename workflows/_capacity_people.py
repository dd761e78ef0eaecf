"""What people may do to a model's capacity; a denial is an answer that stays in the record."""

from datetime import datetime

from temporalio import workflow

from domain.incident import utc
from domain.messages import (
    APPROVE_CAPACITY,
    LEASES_LOST,
    PAUSE_CAPACITY,
    RECONCILE_NOW,
    RESUME_CAPACITY,
    ApproveCapacity,
    Paused,
    PersonRequest,
    Reconciled,
    UpdateResult,
)
from domain.people import needed_role
from workflows._capacity_asks import AsksPeople
from workflows._capacity_fleet import ActsOnFleet


class DecidedByPeople(ActsOnFleet, AsksPeople):
    """Adds the updates; the run looks at what they set."""

    @workflow.update(name=PAUSE_CAPACITY)
    async def pause(self, request: PersonRequest) -> UpdateResult:
        """The kill switch. What AWS is asked at this moment is not tried again, but may have been done."""
        if denied := await self._may_not(PAUSE_CAPACITY, request):
            return denied
        if self.paused is not None:
            message = f"{self.paused.who} paused it at {utc(self.paused.since)}"
            return self.decide(PAUSE_CAPACITY, request, "already-done", message)
        self.paused = Paused(who=request.who, why=request.why, since=workflow.now())
        self.stop_effects()
        self.replan = True
        message = f"nothing is bought or deleted until `runbooks capacity resume {self.model}`; routes go on"
        return self.decide(PAUSE_CAPACITY, request, "accepted", message)

    @workflow.update(name=RESUME_CAPACITY)
    async def resume(self, request: PersonRequest) -> UpdateResult:
        """Buy and release again."""
        if denied := await self._may_not(RESUME_CAPACITY, request):
            return denied
        if self.paused is None:
            return self.decide(RESUME_CAPACITY, request, "already-done", "it is not paused")
        self.paused = None
        self.try_again()
        return self.decide(RESUME_CAPACITY, request, "accepted", "it buys and releases again what the demands want")

    @workflow.update(name=APPROVE_CAPACITY)
    async def approve(self, request: ApproveCapacity) -> UpdateResult:
        """Agree to what waits: units over a cap, or a rung of the ladder."""
        if denied := await self._may_not(APPROVE_CAPACITY, request):
            return denied
        asked = self.awaiting.get(request.approval_id)
        if asked is None:
            waits = ", ".join(self.awaiting) or "nothing"
            message = f"{request.approval_id} does not wait for an approval; {waits} does"
            return self.decide(APPROVE_CAPACITY, request, "not-possible", message)
        if asked.asked_by == request.who:
            message = f"{request.who} asked for it: another approver must agree"
            return self.decide(APPROVE_CAPACITY, request, "denied", message)
        return self.decide(APPROVE_CAPACITY, request, "accepted", self.grant(asked, request))

    @workflow.update(name=RECONCILE_NOW)
    async def reconcile_now(self, request: PersonRequest) -> Reconciled:
        """Compare the fleet with the demands now, and try again what failed; answers once that is planned."""
        self.try_again()
        self.reconcile_at = workflow.now()
        seen_by = self.rounds + self.planning + 1
        await workflow.wait_condition(lambda: self.rounds >= seen_by or bool(self.refused))
        unlisted = self.errors.get("fleet") or self.errors.get("plan") or self.refused
        return Reconciled(
            outcome="not-possible" if unlisted else "accepted",
            message=unlisted or (self.plan.summary if self.plan else ""),
            desired_units=self.plan.desired_units if self.plan else 0,
            units_in_service=self.plan.units_in_service if self.plan else 0,
            problems=list(self.problems()),
        )

    @workflow.signal(name=LEASES_LOST)
    def leases_lost(self) -> None:
        """Redis lost its state: routes and leases are put back."""
        self.republish = True
        self.leases_lost_at: datetime | None = workflow.now()

    @pause.validator
    def _check_pause(self, request: PersonRequest) -> None:
        self.refuse_blank(request)

    @resume.validator
    def _check_resume(self, request: PersonRequest) -> None:
        self.refuse_blank(request)

    @approve.validator
    def _check_approve(self, request: ApproveCapacity) -> None:
        self.refuse_blank(request)

    @reconcile_now.validator
    def _check_reconcile(self, request: PersonRequest) -> None:
        self.refuse_blank(request)

    async def _may_not(self, action: str, request: PersonRequest) -> UpdateResult | None:
        """The answer when the action is not this person's to take; None: go on."""
        why_not = await self.why_not(action, request.who, needed_role(action, recovered=False))
        return self.decide(action, request, "denied", why_not) if why_not else None
