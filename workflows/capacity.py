"""The one writer of a model's provisioned capacity: holds dated demands and drives the fleet to what they need."""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

from activities.bedrock import BedrockActivities
from activities.decisions import DecisionActivities
from domain.capacity import (
    CapacityPlan,
    Demand,
    DemandOutcome,
    Order,
    ProvisionedModel,
    Situation,
    Step,
    StepKind,
    Survey,
    merged,
)
from domain.errors import RETRYABLE, ErrorKind
from domain.incident import quoted, utc
from domain.messages import (
    CAPACITY_CHANGED,
    CAPACITY_STATE,
    CAPACITY_WORKFLOW,
    LEASES_LOST,
    RECONCILE_NOW,
    SET_DEMAND,
    WITHDRAW_DEMAND,
    AwaitModel,
    CapacityInput,
    CapacityState,
    CreateModel,
    DeleteModel,
    PersonRequest,
    Reconciled,
    WithdrawDemand,
)
from domain.policy import CapacityPolicy
from domain.routes import CapacityRoute, CapacityRoutes
from workflows._step import decide, failure, load_policy, mutate, read, wait
from workflows.search_attributes import SERVICE

UNANSWERED_KEPT = 50
SUMMARY = 200
POLICY_RETRY = timedelta(seconds=10)
# Short, so that a list made meanwhile goes out instead of an old one that Redis did not take.
PUBLISH_WITHIN = timedelta(seconds=30)
CREATE, LIST, FAILED = "create", "list", "failed"
RETIRING = (StepKind.WITHDRAW, StepKind.DRAIN, StepKind.DELETE)


@workflow.defn(name=CAPACITY_WORKFLOW)
class CapacityWorkflow:
    """Looks (lists the fleet), plans (a recorded decision), acts (every ready step at once, each in its own task).

    Nothing waits in the main loop: it goes round whenever a demand changes, a step ends, or time changes the plan.
    What failed is not tried again before the next reconciliation, `RECONCILE_NOW` or a new demand.
    """

    @workflow.init
    def __init__(self, input: CapacityInput) -> None:
        state = input.state
        self.model = state.model
        known = input.snapshot is not None and self.model in input.snapshot.policy.models
        self.snapshot = input.snapshot if known else None
        self.demands = {demand.demand_id: demand for demand in state.demands}
        self.fleet = {model.arn: model for model in state.fleet}
        self.listed_at = state.last_reconciled_at
        self.unlisted: set[str] = set()
        """Created, and in no list yet."""
        self.gone: set[str] = set()
        """Deleted: a list that was under way may still have them."""
        self.sending: dict[str, Order] = {}
        self.unanswered = state.unanswered
        self.next_sequence = state.next_sequence
        self.watching: set[str] = set()
        self.retiring: dict[str, Step] = {}
        self.deleting: set[str] = set()
        self.routes: dict[str, int] = {}
        """As they should be."""
        self.routed = state.routes
        """As published last."""
        self.reachable: set[str] | None = None
        """ARNs that calls may still go to; None: this run has not published yet."""
        self.route_version = 0
        self.republish = True
        self.plan: CapacityPlan | None = None
        self.planned_for: list[Demand] = []
        self.told = state.told
        self.news: list[tuple[str, DemandOutcome]] = []
        self.shortage: dict[str, tuple[str, str]] = {}
        """Why there are not more units, as kind and words, by order, by ARN, or `FAILED`: AWS failed to create."""
        self.settled: set[str] = set()
        """Orders in `shortage` of before those that are being sent: forgotten once these have ended."""
        self.told_kinds: dict[str, frozenset[str]] = {}
        """What kept units away when a demand's asker was told last."""
        self.errors: dict[str, str] = {}
        """What else fails, by what it is about."""
        self.held: set[str] = set()
        """What failed and waits for the next reconciliation: ARNs, `CREATE`, `LIST`."""
        self.look = True
        self.replan = False
        self.planning = False
        self.rounds = 0
        """That have ended."""
        self.reconcile_at: datetime | None = None
        self.publishing = False
        self.refused = ""
        """Why this workflow cannot work at all."""
        self.tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ messages

    @workflow.update(name=SET_DEMAND)
    async def set_demand(self, demand: Demand) -> DemandOutcome:
        """Record the demand; the main loop acts on it beside this answer."""
        before = self.demands.get(demand.demand_id)
        self.demands[demand.demand_id] = demand
        if before is None or before.units != demand.units:
            self.shortage.clear()
        self._try_again()
        await workflow.wait_condition(lambda: self.listed_at is not None or bool(self._problems()))
        if self.plan is None or demand not in self.planned_for:
            plan = await self._preview("Plan: what the new demand needs")
        else:
            plan = self.plan
        outcome = next((item for item in plan.outcomes if item.demand_id == demand.demand_id), None)
        if outcome is None:
            return self._withdrawn(demand.demand_id, plan, f"it ended at {utc(demand.end)}")
        self._note_told(outcome)
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
        known = self._forget_demand(request.demand_id)
        self._try_again()
        plan = await self._preview("Plan: what can go without the withdrawn demand")
        return self._withdrawn(request.demand_id, plan, request.reason if known else "there is no such demand")

    @workflow.update(name=RECONCILE_NOW)
    async def reconcile_now(self, request: PersonRequest) -> Reconciled:
        """Compare the fleet with the demands now, and try again what failed; answers once that is planned."""
        self._try_again()
        self.republish = True
        seen_by = self.rounds + self.planning + 1
        await workflow.wait_condition(lambda: self.rounds >= seen_by or bool(self.refused))
        unlisted = self.errors.get("fleet") or self.errors.get("plan") or self.refused
        return Reconciled(
            outcome="not-possible" if unlisted else "accepted",
            message=unlisted or (self.plan.summary if self.plan else ""),
            desired_units=self.plan.desired_units if self.plan else 0,
            units_in_service=self.plan.units_in_service if self.plan else 0,
            problems=list(self._problems()),
        )

    @workflow.signal(name=LEASES_LOST)
    def leases_lost(self) -> None:
        """Redis lost its state: publish the routes again."""
        self.republish = True

    @workflow.query(name=CAPACITY_STATE)
    def state(self) -> CapacityState:
        """Everything that is known; what a continued run starts from."""
        return CapacityState(
            model=self.model,
            demands=list(self.demands.values()),
            fleet=list(self.fleet.values()),
            desired_units=self.plan.desired_units if self.plan else 0,
            units_in_service=self.plan.units_in_service if self.plan else 0,
            doing=self._doing(),
            last_error="; ".join(self._problems()),
            last_reconciled_at=self.listed_at,
            told=self.told,
            routes=self.routed,
            unanswered=self.unanswered,
            next_sequence=self.next_sequence,
        )

    def _withdrawn(self, demand_id: str, plan: CapacityPlan, why: str) -> DemandOutcome:
        return DemandOutcome(
            demand_id=demand_id,
            status="withdrawn",
            units_in_service=plan.units_in_service,
            units_wanted=plan.desired_units,
            detail=f"withdrawn: {why}; {plan.summary}",
        )

    async def _preview(self, summary: str) -> CapacityPlan:
        """The plan as an answer; the main loop makes its own.

        Raises:
            ApplicationError: Invalid, when the policy does not have the model.
        """
        await workflow.wait_condition(lambda: self.snapshot is not None or bool(self.refused))
        if self.refused:
            raise ApplicationError(self.refused, type=ErrorKind.INVALID, non_retryable=True)
        return await decide(DecisionActivities.plan_capacity, self._situation(), summary=summary)

    def _try_again(self) -> None:
        self.held.clear()
        self.look = True

    # ------------------------------------------------------------ main loop

    @workflow.run
    async def run(self, input: CapacityInput) -> None:
        """Runs for ever, continued as new when its history has grown."""
        workflow.upsert_search_attributes([SERVICE.value_set("mangaassist")])
        await self._load_first_policy()
        daemons = [asyncio.create_task(self._keep_routes()), asyncio.create_task(self._keep_told())]
        while not self._should_continue_as_new():
            await self._round()
            workflow.set_current_details(self._details())
            await self._sleep()
        for daemon in daemons:
            daemon.cancel()
        workflow.continue_as_new(CapacityInput(state=self.state()))

    async def _round(self) -> None:
        look, self.look, self.replan, self.planning = self.look, False, False, True
        now = workflow.now()
        try:
            if self.reconcile_at is None or now >= self.reconcile_at:
                if self.reconcile_at is not None:
                    await self._load_policy()
                self.reconcile_at = now + self.policy.reconcile_interval
                self.held.clear()
                look = self.republish = True
            planned_for = list(self.demands.values())
            plan = await self._survey() if look else None
            if plan is None:
                plan = await decide(
                    DecisionActivities.plan_capacity, self._situation(), summary="Plan: the steps to the units wanted"
                )
        except ActivityError as error:
            self.errors["plan"] = failure(error)[1]
        else:
            self.errors.pop("plan", None)
            self.plan, self.planned_for = plan, planned_for
            self._act(plan)
        self.planning = False
        self.rounds += 1

    async def _sleep(self) -> None:
        assert self.reconcile_at is not None
        moments = [(self.reconcile_at, "Reconcile fleet and demands")]
        if self.plan is not None and self.plan.next_change_at is not None:
            moments.append((self.plan.next_change_at, "A demand starts or ends"))
        if "plan" in self.errors or ("fleet" in self.errors and LIST not in self.held):
            moments.append((workflow.now() + self.policy.poll_interval, "List the fleet again"))
        moment, why = min(moments)
        with suppress(TimeoutError):
            await workflow.wait_condition(
                lambda: self.look or self.replan or self._should_continue_as_new(),
                timeout=moment - workflow.now(),
                timeout_summary=why,
            )
            return
        self.look = True

    async def _load_first_policy(self) -> None:
        """Waits for a policy that can be read.

        Raises:
            ApplicationError: Invalid, when it does not have the model.
        """
        if self.snapshot is None:
            await self._load_policy()
        while self.snapshot is None and not self.refused:
            workflow.set_current_details(self._details())
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

    @property
    def policy(self) -> CapacityPolicy:
        assert self.snapshot is not None
        return self.snapshot.policy.capacity

    async def _survey(self) -> CapacityPlan | None:
        """Lists the fleet and plans for it; None when it cannot be listed."""
        # What was bought a moment ago may be missing; what had been in service was deleted by somebody else.
        settled = {arn for arn, model in self.fleet.items() if model.status != "Creating"}
        self.errors.pop("fleet", None)
        request = Survey(
            situation=self._situation(),
            unlisted=frozenset(self.unlisted - settled),
            gone=frozenset(self.gone),
        )
        try:
            surveyed = await read(BedrockActivities.survey, request, summary="List the fleet, and plan")
        except ActivityError as error:
            kind, message = failure(error)
            self.errors["fleet"] = f"the fleet cannot be listed: {message}"
            if kind not in RETRYABLE:
                self.held.add(LIST)
            return None
        self.listed_at = workflow.now()
        self.unlisted -= {model.arn for model in surveyed.listed} | settled
        fleet = merged(self.fleet.values(), surveyed.listed, self.unlisted, self.gone)
        self.fleet = {model.arn: model for model in fleet}
        self.gone &= {model.arn for model in surveyed.listed}
        names = {model.name for model in surveyed.listed}
        self.unanswered = [order for order in self.unanswered if order.name not in names]
        return surveyed.plan

    def _situation(self) -> Situation:
        assert self.snapshot is not None
        return Situation(
            model=self.model,
            spec=self.snapshot.policy.models[self.model],
            policy=self.policy,
            timetable=self.snapshot.policy.timetable,
            clock=self.snapshot.clock,
            now=workflow.now(),
            demands=tuple(self.demands.values()),
            fleet=tuple(self.fleet.values()) if self.listed_at else None,
            sending=tuple(self.sending.values()),
            unanswered=tuple(self.unanswered),
            next_sequence=self.next_sequence,
            leaving=frozenset(self.deleting),
            routed=frozenset(self.routed),
            troubles=tuple(self._troubles()),
        )

    def _troubles(self) -> Sequence[str]:
        other = [self.errors[name] for name in ("fleet", "routes") if name in self.errors]
        return list(dict.fromkeys([*(why for _, why in self.shortage.values()), *other]))

    def _problems(self) -> Sequence[str]:
        return list(dict.fromkeys([*(why for _, why in self.shortage.values()), *self.errors.values()]))

    # ------------------------------------------------------------ acting

    def _act(self, plan: CapacityPlan) -> None:
        for demand_id in plan.ended:
            demand = self.demands.get(demand_id)
            if demand is not None and demand.end <= workflow.now():  # not prolonged while the plan was made
                self._forget_demand(demand_id)
                self.news.append((demand.asked_by, self._withdrawn(demand_id, plan, f"it ended at {utc(demand.end)}")))
        if plan.units_in_service >= plan.desired_units or not self.demands:
            self.shortage.clear()
        retire = {step.arn for step in plan.steps if step.kind in RETIRING and step.ready}
        for arn in self.retiring.keys() - self.deleting - retire:
            del self.retiring[arn]  # wanted again
        for step in plan.steps:
            self._take(step)
        self.routes = plan.routes
        if self.look or self.replan or (self.routes != self.routed and "routes" not in self.errors):
            return  # something has changed since the plan was asked for, or is about to: the next one is told
        for outcome in plan.outcomes:
            demand = self.demands.get(outcome.demand_id)
            if demand is not None and self._is_news(outcome):
                self._note_told(outcome)
                self.news.append((demand.asked_by, outcome))

    def _is_news(self, outcome: DemandOutcome) -> bool:
        """A failure is told once all orders under way have ended; again only with other units or of another kind."""
        before = self.told.get(outcome.demand_id)
        if outcome == before or (outcome.status == "failed" and self.sending):
            return False
        if before is None or outcome.status != "failed":
            return True
        figures = outcome.status, outcome.units_in_service, outcome.units_wanted
        known = before.status, before.units_in_service, before.units_wanted
        return figures != known or self._kinds() != self.told_kinds.get(outcome.demand_id)

    def _kinds(self) -> frozenset[str]:
        return frozenset([*(kind for kind, _ in self.shortage.values()), *self.errors.keys() & {"fleet", "routes"}])

    def _note_told(self, outcome: DemandOutcome) -> None:
        self.told[outcome.demand_id] = outcome
        self.told_kinds[outcome.demand_id] = self._kinds()

    def _forget_demand(self, demand_id: str) -> Demand | None:
        self.told.pop(demand_id, None)
        self.told_kinds.pop(demand_id, None)
        return self.demands.pop(demand_id, None)

    def _take(self, step: Step) -> None:
        if not step.ready or step.arn in self.held:
            return
        if step.kind is StepKind.AWAIT and step.arn not in self.watching:
            assert step.arn is not None
            self.watching.add(step.arn)
            self._start(self._await_in_service(step.arn, step.name))
        if "fleet" in self.errors:
            return  # nothing is bought or deleted on an old list
        if step.order is not None and CREATE not in self.held:
            if not self.sending:
                self.settled = set(self.shortage.keys() - self.fleet.keys() - {FAILED})
            self.sending[step.name] = step.order
            self.unanswered = [order for order in self.unanswered if order.name != step.name]
            self.next_sequence = max(self.next_sequence, step.order.sequence + 1)
            self._start(self._create(step.order))
        elif step.kind in RETIRING and step.arn not in self.retiring and not self.look:
            # With `look` a message has come since the plan was asked for: the next one decides what goes.
            assert step.arn is not None
            self.retiring[step.arn] = step
            self._start(self._retire(step.arn, step))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _create(self, order: Order) -> None:
        assert self.snapshot is not None
        model_id = self.snapshot.policy.models[self.model].provisioned_model_id
        try:
            arn = await mutate(
                BedrockActivities.create_model,
                CreateModel(provisioned_model_id=model_id, order=order),
                summary=f"Create {order.name}: {order.units} units for {order.asked_by}"[:SUMMARY],
            )
        except ActivityError as error:
            kind, message = failure(error)
            self.held.add(CREATE)
            self.settled.discard(order.name)
            self.shortage[order.name] = kind, f"{order.units} units were not created: {message}"
            if kind in RETRYABLE:
                self.unanswered = [*self.unanswered, order][-UNANSWERED_KEPT:]
        else:
            if arn not in self.fleet:
                self.unlisted.add(arn)
                self.fleet[arn] = ProvisionedModel(
                    arn=arn,
                    name=order.name,
                    units=order.units,
                    status="Creating",
                    ours=True,
                    created_at=workflow.now(),
                )
        del self.sending[order.name]
        if not self.sending:
            for name in self.settled:
                self.shortage.pop(name, None)
        self.replan = True

    async def _await_in_service(self, arn: str, name: str) -> None:
        timeout = self.policy.provisioning_timeout
        try:
            seen = await wait(
                BedrockActivities.await_in_service,
                AwaitModel(arn=arn, poll_interval=self.policy.poll_interval, give_up_after=timeout),
                summary=f"Wait until {name} is in service",
                at_most=timeout,
            )
        except ActivityError as error:
            kind, message = failure(error)
            self.held.add(arn)
            self.shortage[arn] = kind, f"{name} cannot be watched: {message}"
        else:
            self.shortage.pop(arn, None)
            known = self.fleet.get(arn)
            if seen.status is None or known is None:
                self._forget(arn)
            elif seen.status == "Creating":
                self.held.add(arn)
                self.shortage[arn] = "late", f"{name} is still Creating after {timeout}: ask AWS Support"
            else:
                self.fleet[arn] = known.model_copy(update={"status": seen.status, "failure": seen.failure})
                if known.ours:
                    self.shortage.pop(FAILED, None)
                if seen.status == "Failed" and known.ours:
                    self.held.add(CREATE)
                    why = f"AWS failed to create {name}: {seen.failure or 'no reason given'}"
                    self.shortage[FAILED] = FAILED, why
        self.watching.discard(arn)
        self.replan = True

    async def _retire(self, arn: str, step: Step) -> None:
        """Withdrawn from the routes, drained, deleted, proven gone; not deleted when it is wanted again meanwhile."""

        def wanted_again() -> bool:
            return self.retiring.get(arn) is not step

        await workflow.wait_condition(
            lambda: wanted_again() or (self.reachable is not None and arn not in self.reachable)
        )
        if step.kind is not StepKind.DELETE:
            with suppress(TimeoutError):
                await workflow.wait_condition(
                    wanted_again,
                    timeout=self.policy.drain,
                    timeout_summary=f"Drain {step.name}: calls in flight end before it is deleted",
                )
        if wanted_again():
            return
        self.deleting.add(arn)
        try:
            await mutate(
                BedrockActivities.delete_model,
                DeleteModel(arn=arn),
                summary=f"Delete {step.name}: {step.why}"[:SUMMARY],
            )
            timeout = self.policy.provisioning_timeout
            seen = await wait(
                BedrockActivities.await_gone,
                AwaitModel(arn=arn, poll_interval=self.policy.poll_interval, give_up_after=timeout),
                summary=f"Wait until {step.name} is gone",
                at_most=timeout,
            )
        except ActivityError as error:
            self.held.add(arn)
            self.errors[arn] = f"{step.name} was not deleted: {failure(error)[1]}"
        else:
            if seen.status is None:
                self._forget(arn)
            else:
                self.held.add(arn)
                self.errors[arn] = f"{step.name} is still {seen.status} {timeout} after its deletion"
        self.deleting.discard(arn)
        del self.retiring[arn]
        self.replan = True

    def _forget(self, arn: str) -> None:
        self.fleet.pop(arn, None)
        self.unlisted.discard(arn)
        self.gone.add(arn)
        self.held.discard(arn)
        self.errors.pop(arn, None)
        self.shortage.pop(arn, None)

    async def _keep_routes(self) -> None:
        """Publishes the routes whenever they change, in order, and again at each reconciliation."""
        while True:
            await workflow.wait_condition(
                lambda: (
                    self.listed_at is not None
                    and self.plan is not None
                    and (self.republish or self.routes != self.routed)
                )
            )
            routes, self.republish, self.publishing = self.routes, False, True
            if self.reachable is not None:
                self.reachable |= routes.keys()
            self.route_version = max(self.route_version + 1, round(workflow.now().timestamp() * 1000))
            message = CapacityRoutes(
                model=self.model,
                routes=tuple(
                    CapacityRoute(provisioned_model_arn=arn, units=units) for arn, units in sorted(routes.items())
                ),
                version=self.route_version,
            )
            try:
                await mutate(
                    BedrockActivities.publish_routes,
                    message,
                    summary=f"Publish routes: {sum(routes.values())} units in {len(routes)} models",
                    within=PUBLISH_WITHIN,
                )
            except ActivityError as error:
                self.errors["routes"] = f"routes are not published: {failure(error)[1]}"
                self.republish = self.replan = True
                self.publishing = False
                await workflow.sleep(self.policy.poll_interval, summary="Publish the routes again")
            else:
                self.errors.pop("routes", None)
                self.replan = self.replan or self.routed != routes
                self.routed, self.reachable = routes, set(routes)
                self.publishing = False

    async def _keep_told(self) -> None:
        """Tells incidents what became of their demands, in order; one that is closed needs no telling."""
        while True:
            await workflow.wait_condition(lambda: bool(self.news))
            asked_by, outcome = self.news[0]
            if asked_by.startswith("incident-"):
                with suppress(ApplicationError):
                    await workflow.get_external_workflow_handle(asked_by).signal(CAPACITY_CHANGED, outcome)
            self.news.pop(0)

    # ------------------------------------------------------------ keeping and showing state

    def _should_continue_as_new(self) -> bool:
        """Watches and drains begin again in the next run; effects under way, and what is to be told, do not."""
        busy = self.sending or self.deleting or self.news or self.publishing or not workflow.all_handlers_finished()
        return workflow.info().is_continue_as_new_suggested() and not busy

    def _doing(self) -> str:
        names = {arn: model.name for arn, model in self.fleet.items()}
        parts = [f"asking AWS for {order.units} units" for order in self.sending.values()]
        parts += [f"waiting until {names.get(arn, arn)} is in service" for arn in sorted(self.watching)]
        parts += [
            f"{'deleting' if arn in self.deleting else 'draining'} {step.name}" for arn, step in self.retiring.items()
        ]
        parts += ["publishing routes"] if self.publishing else []
        parts += ["planning"] if self.planning or self.look or self.replan else []
        return ", ".join(parts) or "idle"

    def _details(self) -> str:
        plan = self.plan
        lines = [f"# Provisioned capacity of {quoted(self.model)}", ""]
        if plan is not None:
            lines += [f"**{plan.units_in_service} of {plan.desired_units} units in service**. {plan.summary}", ""]
        lines.append("**Demands**:" if self.demands else "**Demands**: none, the policy's baseline holds")
        lines += [
            f"- {demand.units} units until {utc(demand.end)} for {quoted(demand.asked_by)}: {quoted(demand.reason)}"
            for demand in self.demands.values()
        ]
        lines += ["", "| provisioned model | units | status | whose | gets calls |", "|---|---|---|---|---|"]
        lines += [
            f"| {quoted(model.name)} | {model.units} | {model.status} | {'ours' if model.ours else 'not ours'} "
            f"| {'yes' if model.arn in self.routed else 'no'} |"
            for model in self.fleet.values()
        ]
        lines += ["", f"**Doing**: {self._doing()}"]
        if errors := self._problems():
            again = f", tried again at {utc(self.reconcile_at)} or on `{RECONCILE_NOW}`" if self.reconcile_at else ""
            lines += ["", f"**Not working**{again}:", *(f"- {quoted(error)}" for error in errors)]
        return "\n".join(lines)
