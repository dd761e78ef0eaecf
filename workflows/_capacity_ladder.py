"""The ladder while units are missing: taken rung by rung, given back when they are there (design idea 2)."""

from contextlib import suppress
from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.cloudwatch import CloudWatchActivities
from activities.decisions import DecisionActivities
from activities.leases import LeaseActivities
from domain.capacity import CapacityPlan
from domain.knobs import Holder, LeaseRequest
from domain.ladder import Ladder, Rung, Shortage
from domain.messages import AwaitedApproval, ReleaseLeases, TakeLeases, load_query
from workflows._capacity_asks import AsksPeople
from workflows._capacity_routes import PublishesRoutes
from workflows._people import ON_CALL
from workflows._step import decide, failure, mutate, read

SENIOR = "senior on-call"


class ClimbsLadder(PublishesRoutes, AsksPeople):
    """Looks at what each plan leaves missing; the ladder itself is climbed beside the main loop."""

    def assess(self, plan: CapacityPlan) -> None:
        """What is missing after `plan` was acted on: the ladder follows it, people are paged once for each cause."""
        if self.look or self.replan:
            return  # the fleet or a wish has changed since the plan was asked for: the next one tells
        wanted_now = plan.expected[0].wanted if plan.expected else plan.desired_units
        self.missing = max(0, wanted_now - plan.units_in_service) if self.listed_at else 0
        if not self.missing:
            self.short_since = None
        elif self.short_since is None and (self.shortage or self.missing > self._coming()):
            self.short_since = workflow.now()
        self.ask_for_money(plan)
        self._page_shortage(plan)

    def _coming(self) -> int:
        """Units asked for, or in creation and not late."""
        creating = [
            model for arn, model in self.fleet.items() if model.status == "Creating" and arn not in self.shortage
        ]
        return sum(order.units for order in self.sending.values()) + sum(model.units for model in creating)

    def _page_shortage(self, plan: CapacityPlan) -> None:
        short = plan.desired_units - plan.units_in_service
        if short <= 0:
            self.paged_for = []
            return
        causes = sorted({kind for kind, _ in self.shortage.values()} | ({"paused"} if self.paused else set()))
        if not causes or causes == self.paged_for or self.sending:
            return
        if causes != ["paused"] and any(demand.asked_by.startswith("incident-") for demand in self.demands.values()):
            return  # the incident is told, and pages itself
        self.paged_for = causes
        paused = [f"{self.paused.who} paused it: {self.paused.why}"] if self.paused else []
        why = "; ".join([*paused, *(words for _, words in self.shortage.values())])
        self.page(
            ON_CALL,
            f"{short} of {plan.desired_units} units of {self.model} are missing, {self._coming()} of them on their way "
            f"({plan.wanted_for}): {why}",
        )

    # ------------------------------------------------------------ climbing

    async def keep_ladder(self) -> None:
        """Runs for ever."""
        again_at: datetime | None = None
        done_for: object = None
        while True:
            with suppress(TimeoutError):
                await workflow.wait_condition(
                    lambda: self._cause() != done_for,  # noqa: B023
                    timeout=None if again_at is None else max(timedelta(0), again_at - workflow.now()),
                    timeout_summary="The next rung, or the leases' renewal",
                )
            done_for, self.stepping = self._cause(), True
            try:
                again_at = await self._step()
            except ActivityError as error:
                self.errors["ladder"] = f"the ladder is stuck: {failure(error)[1]}"
                again_at = workflow.now() + self.policy.poll_interval
            else:
                self.errors.pop("ladder", None)
            self.stepping = False
            self.show()

    def _cause(self) -> object:
        """What a step is taken for: another one is another step."""
        short = self.missing if self.short_since else 0
        return None if not short and not self.rungs else (short, sorted(self.agreed), self.leases_lost_at)

    async def _step(self) -> datetime | None:
        """To where the ladder should stand; answers when the next step is due without anything else changing."""
        ladder = Ladder(rungs=(), overflow=(), overloaded_since=None, next_at=None)
        since = self.short_since
        if since is not None and self.missing:
            shortage = Shortage(
                model=self.model,
                units=self.missing,
                units_in_service=self.plan.units_in_service if self.plan else 0,
                sent_tokens_per_second=await self._load(),
                overloaded_since=self.overloaded_since,
                now=workflow.now(),
                policy=self.now_snapshot.policy,
            )
            summary = f"Ladder: {shortage.units} units are missing"
            ladder = await decide(DecisionActivities.climb_ladder, shortage, summary=summary)
        self.overloaded_since = ladder.overloaded_since
        rungs = [rung for rung in ladder.rungs if not rung.consent or _approval_id(rung, since) in self.agreed]
        await self._hold([rung for rung in rungs if rung.knob], since)
        self.set_overflow(ladder.overflow)
        self._tell(rungs)
        self._ask_consent([rung for rung in ladder.rungs if rung not in rungs], since)
        renew_at = workflow.now() + self.now_snapshot.policy.leases.renew_every if self.leases else None
        return min((moment for moment in (ladder.next_at, renew_at) if moment), default=None)

    async def _load(self) -> float | None:
        """Tokens/s sent to the model; None: they cannot be read."""
        policy = self.now_snapshot.policy
        query, budget = load_query(policy, self.model), policy.evidence.budget
        try:
            load = await read(
                CloudWatchActivities.read_load, query, summary="Load: is it more than quotas carry?", within=budget
            )
        except ActivityError:
            return None
        return load.model(self.model).sent_tokens_per_second or 0.0

    def _ask_consent(self, rungs: list[Rung], since: datetime | None) -> None:
        now, lasts = workflow.now(), self.now_snapshot.policy.ladder.lease
        for rung in rungs:
            self.ask(
                AwaitedApproval(
                    approval_id=_approval_id(rung, since),
                    text=f"{self.missing} units of {self.model} are missing, the next rung: {rung.text}",
                    asked_by="the ladder",
                    units=self.missing,
                    since=now,
                    until=now + lasts,
                )
            )

    async def _hold(self, rungs: list[Rung], since: datetime | None) -> None:
        """Take, renew and release leases, so that exactly these rungs hold theirs."""
        lasts = round(self.now_snapshot.policy.ladder.lease / timedelta(milliseconds=1))
        holder = Holder(kind="capacity", id=workflow.info().workflow_id)
        wanted = [
            LeaseRequest(
                lease_id=f"{workflow.info().first_execution_run_id}:{rung.knob}:{round(since.timestamp() * 1000)}",
                knob=rung.knob,
                value=rung.value,
                holder=holder,
                reason=f"units of {self.model} are missing: {rung.text}"[:500],
                duration_ms=lasts,
            )
            for rung in rungs
            if rung.knob is not None and since is not None
        ]
        held = {lease.lease_id for lease in self.leases}
        self.leases = [*self.leases, *(lease for lease in wanted if lease.lease_id not in held)]  # undo first
        if wanted:
            await mutate(LeaseActivities.take_leases, TakeLeases(leases=wanted), summary="Take what the rungs hold")
        over = [lease.lease_id for lease in self.leases if lease.lease_id not in {x.lease_id for x in wanted}]
        if over:
            request = ReleaseLeases(lease_ids=over, holder=holder, reason="units are there")
            await mutate(LeaseActivities.release_leases, request, summary="Give back what the rungs held")
        self.leases = wanted

    def _tell(self, rungs: list[Rung]) -> None:
        before = {rung.kind for rung in self.rungs}
        new = [rung for rung in rungs if rung.kind not in before]
        ended, self.rungs = bool(self.rungs) and not rungs, rungs
        for rung in new:
            self.note("lever", f"{self.missing} units are missing: {rung.text}")
            if rung.knob is not None:
                self.page(SENIOR, f"{self.missing} units of {self.model} are missing, and users notice: {rung.text}")
        if ended:
            self.note("lever", "the units are there, or nobody wants them: the ladder is left")
            self.agreed.clear()
        if not rungs:
            for name in [name for name, asked in self.awaiting.items() if asked.amount is None]:
                del self.awaiting[name]


def _approval_id(rung: Rung, since: datetime | None) -> str:
    """For this rung in this shortage."""
    return f"{rung.kind.replace(' ', '-')}-{since:%Y%m%dT%H%M%SZ}" if since else ""
