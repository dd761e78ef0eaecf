"""The one writer of a model's provisioned capacity: holds dated demands and drives the fleet to what they need."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

from activities.bedrock import BedrockActivities
from activities.capacity_watch import CapacityWatch
from activities.decisions import DecisionActivities
from domain.capacity import CapacityPlan, Demand, DemandOutcome, Survey, merged
from domain.errors import RETRYABLE, ErrorKind
from domain.incident import utc
from domain.messages import (
    CAPACITY_CHANGED,
    CAPACITY_STATE,
    CAPACITY_WORKFLOW,
    SET_DEMAND,
    WITHDRAW_DEMAND,
    CapacityInput,
    CapacityState,
    WatchCapacity,
    WithdrawDemand,
)
from workflows._capacity import LIST
from workflows._capacity_fleet import withdrawn
from workflows._capacity_ladder import ClimbsLadder
from workflows._capacity_people import DecidedByPeople
from workflows._step import decide, failure, load_policy, read, watch

POLICY_RETRY = timedelta(seconds=10)
TOLD = ("incident-", "event-")
"""Prefixes of the workflows that are told what became of their demands."""


@workflow.defn(name=CAPACITY_WORKFLOW)
class CapacityWorkflow(DecidedByPeople, ClimbsLadder):
    """Looks (lists the fleet), plans (a recorded decision), acts (every ready step at once, each in its own task).

    Nothing waits in the main loop: it goes round whenever a demand changes, a step ends, or time changes the plan.
    What failed is not tried again before the next reconciliation, `RECONCILE_NOW` or a new demand. While nothing is to
    be done, one activity watches fleet, policy and routes at the pace of reconciliation, without any history.
    """

    @workflow.init
    def __init__(self, input: CapacityInput) -> None:
        super().__init__(input)

    # ------------------------------------------------------------ demands

    @workflow.update(name=SET_DEMAND)
    async def set_demand(self, demand: Demand) -> DemandOutcome:
        """Record the demand; the main loop acts on it beside this answer."""
        before, demand = self.demands.get(demand.demand_id), self.as_raised(demand)
        self.demands[demand.demand_id] = demand
        if before is None or before.units != demand.units:
            self.shortage.clear()
        self.try_again()
        await workflow.wait_condition(lambda: self.listed_at is not None or bool(self.problems()))
        if self.plan is None or demand not in self.planned_for:
            plan = await self._preview("Plan: what the new demand needs")
        else:
            plan = self.plan
        outcome = next((item for item in plan.outcomes if item.demand_id == demand.demand_id), None)
        if outcome is None:
            return withdrawn(demand.demand_id, plan, f"it ended at {utc(demand.end)}")
        self.note_told(outcome)
        return outcome

    @set_demand.validator
    def _check_demand(self, demand: Demand) -> None:
        if demand.model != self.model:
            raise ValueError(f"model: {demand.model!r} is not {self.model!r}, whose capacity is kept here")
        if demand.end <= workflow.now():
            raise ValueError(f"end: {utc(demand.end)} has passed; it must be later than {utc(workflow.now())}")

    @workflow.update(name=WITHDRAW_DEMAND)
    async def withdraw_demand(self, request: WithdrawDemand) -> DemandOutcome:
        """Forget the demand; the main loop releases what nobody asks for any more."""
        known = self.forget_demand(request.demand_id)
        self.try_again()
        plan = await self._preview("Plan: what can go without the withdrawn demand")
        return withdrawn(request.demand_id, plan, request.reason if known else "there is no such demand")

    @workflow.query(name=CAPACITY_STATE)
    def answer_state(self) -> CapacityState:
        """Everything that is known. Costs go on while the workflow rests, and its time does not: they are of now."""
        with workflow.unsafe.sandbox_unrestricted():
            now = datetime.now(UTC)
        return self.state(max(now, workflow.now()))

    async def _preview(self, summary: str) -> CapacityPlan:
        """The plan as an answer; the main loop makes its own.

        Raises:
            ApplicationError: Invalid, when the policy does not have the model.
        """
        await workflow.wait_condition(lambda: self.snapshot is not None or bool(self.refused))
        if self.refused:
            raise ApplicationError(self.refused, type=ErrorKind.INVALID, non_retryable=True)
        return await decide(DecisionActivities.plan_capacity, self.situation(), summary=summary)

    # ------------------------------------------------------------ main loop

    @workflow.run
    async def run(self, input: CapacityInput) -> None:
        """Runs for ever, continued as new when its history has grown."""
        await self._load_first_policy()
        daemons = [asyncio.create_task(work) for work in (self.keep_routes(), self.keep_ladder(), self._keep_told())]
        while not self._should_continue_as_new():
            await self._round()
            self.show()
            await self._sleep()
        for daemon in daemons:
            daemon.cancel()
        workflow.continue_as_new(CapacityInput(state=self.state(workflow.now())))

    async def _round(self) -> None:
        look, self.look, self.replan, self.planning = self.look, False, False, True
        now = workflow.now()
        try:
            if self.reconcile_at is None or now >= self.reconcile_at:
                if self.reconcile_at is not None:
                    await self._load_policy()
                self.reconcile_at = now + self.policy.reconcile_interval
                self.forgive()
                look = self.republish = True
            planned_for = list(self.demands.values())
            plan = await self._survey() if look else None
            if plan is None:
                plan = await decide(
                    DecisionActivities.plan_capacity, self.situation(), summary="Plan: the steps to the units wanted"
                )
        except ActivityError as error:
            self.errors["plan"] = failure(error)[1]
        else:
            self.errors.pop("plan", None)
            self.plan, self.planned_for = plan, planned_for
            self.act(plan)
            self.assess(plan)
        self.background = [task for task in self.background if not task.done()]
        self.planning = False
        self.rounds += 1

    async def _sleep(self) -> None:
        """Until the next round is due; while all is well the watch stands in for the next reconciliation."""
        assert self.reconcile_at is not None
        moments = []
        if self.plan is not None and self.plan.next_change_at is not None:
            moments.append((self.plan.next_change_at, "A demand starts or ends"))
        if "plan" in self.errors or ("fleet" in self.errors and LIST not in self.held):
            moments.append((workflow.now() + self.policy.poll_interval, "List the fleet again"))
        busy = self.problems() or self.held or self.watching or self.sending or self.retiring
        if busy:
            moments.append((self.reconcile_at, "Reconcile fleet and demands"))
        moment, why = min(moments, default=(None, ""))
        watching: asyncio.Task[str] | None = None
        try:
            await self._woken(lambda: not self.must_publish, moment, why)
            if self._must_go_round():
                return
            if not busy:
                watching = asyncio.create_task(self._watch())
            await self._woken(lambda: watching is not None and watching.done(), moment, why)
        except TimeoutError:
            self.look = True
        if watching is None:
            return
        if watching.done():
            watching.exception()  # a look that failed is looked into by the next round
            self.reconcile_at = workflow.now()
        else:
            watching.cancel()
            watching.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def _woken(self, by: Callable[[], bool], moment: datetime | None, why: str) -> None:
        """Wait for `by`, or for whatever makes another round necessary. Raises TimeoutError at `moment`."""
        await workflow.wait_condition(
            lambda: by() or self._must_go_round(),
            timeout=None if moment is None else moment - workflow.now(),
            timeout_summary=why,
        )

    def _must_go_round(self) -> bool:
        return self.look or self.replan or self._should_continue_as_new()

    async def _watch(self) -> str:
        request = WatchCapacity(
            model=self.model,
            snapshot=self.now_snapshot,
            fleet=list(self.fleet.values()),
            routes=self.routed,
            every=self.policy.reconcile_interval,
        )
        return await watch(
            CapacityWatch.watch_capacity,
            request,
            summary="Watch fleet, policy and routes until one is other than known",
            every=request.every,
        )

    async def _load_first_policy(self) -> None:
        """Waits for a policy that can be read.

        Raises:
            ApplicationError: Invalid, when it does not have the model.
        """
        if self.snapshot is None:
            await self._load_policy()
        while self.snapshot is None and not self.refused:
            self.show()
            await workflow.sleep(POLICY_RETRY, summary="Read the policy again")
            await self._load_policy()
        if self.refused:
            await workflow.wait_condition(workflow.all_handlers_finished)
            raise ApplicationError(self.refused, type=ErrorKind.INVALID, non_retryable=True)

    async def _load_policy(self) -> None:
        """Takes the policy as it is now; what was read before stays when that fails or lacks the model."""
        try:
            snapshot = await load_policy()
        except ActivityError as error:
            self.errors["policy"] = failure(error)[1]
            return
        models = snapshot.policy.models
        if self.model in models:
            self.errors.pop("policy", None)
            self.snapshot = snapshot
            return
        self.errors["policy"] = f"model: the policy has no {self.model!r}; it has {', '.join(sorted(models))}"
        self.refused = self.errors["policy"] if self.snapshot is None else ""

    async def _survey(self) -> CapacityPlan | None:
        """Lists the fleet and plans for it; None when it cannot be listed."""
        # What was bought a moment ago may be missing; what had been in service was deleted by somebody else.
        settled = {arn for arn, model in self.fleet.items() if model.status != "Creating"}
        self.errors.pop("fleet", None)
        self.unlistable = []
        request = Survey(
            situation=self.situation(),
            unlisted=frozenset(self.unlisted - settled),
            gone=frozenset(self.gone),
        )
        try:
            surveyed = await read(BedrockActivities.survey, request, summary="List the fleet, and plan")
        except ActivityError as error:
            kind, message = failure(error)
            self.errors["fleet"] = f"the fleet cannot be listed: {message}"
            self.unlistable = [(kind, self.errors["fleet"])]
            if kind not in RETRYABLE:
                self.held.add(LIST)
            return None
        self.listed_at = workflow.now()
        self.unlisted -= {model.arn for model in surveyed.listed} | settled
        fleet = merged(self.fleet.values(), surveyed.listed, self.unlisted, self.gone)
        self.fleet = {model.arn: model for model in fleet}
        self.gone &= {model.arn for model in surveyed.listed}
        self.keep_purchases()
        names = {model.name for model in surveyed.listed}
        self.unanswered = [order for order in self.unanswered if order.name not in names]
        return surveyed.plan

    async def _keep_told(self) -> None:
        """Tells those who asked what became of their demands, in order; one that is closed needs no telling."""
        while True:
            await workflow.wait_condition(lambda: bool(self.news))
            asked_by, outcome = self.news[0]
            if asked_by.startswith(TOLD):
                with suppress(ApplicationError):
                    await workflow.get_external_workflow_handle(asked_by).signal(CAPACITY_CHANGED, outcome)
            self.news.pop(0)

    def _should_continue_as_new(self) -> bool:
        """Watches and drains begin again in the next run; effects under way, and what is to be told, do not."""
        busy = self.sending or self.deleting or self.news or self.publishing or self.stepping
        paging = any(not task.done() for task in self.background)
        return workflow.info().is_continue_as_new_suggested() and not (
            busy or paging or not workflow.all_handlers_finished()
        )
