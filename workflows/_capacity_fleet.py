"""Acts on the fleet: every step that is ready at once, each in a task of its own."""

import asyncio
from contextlib import suppress
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

from activities.bedrock import BedrockActivities
from domain.capacity import CapacityPlan, DemandOutcome, Order, ProvisionedModel, Step, StepKind
from domain.errors import RETRYABLE
from domain.incident import utc
from domain.messages import AwaitModel, CreateModel, DeleteModel
from workflows._capacity import CREATE, FAILED, Capacity, deletion
from workflows._step import failure, mutate, wait

UNANSWERED_KEPT = 50
SUMMARY = 200
RETIRING = (StepKind.WITHDRAW, StepKind.DRAIN, StepKind.DELETE)


class ActsOnFleet(Capacity):
    """Carries plans out, and says what became of the demands."""

    def act(self, plan: CapacityPlan) -> None:
        """Take what is ready. While paused nothing is bought or deleted, and whatever is in service gets calls."""
        for demand_id in plan.ended:
            demand = self.demands.get(demand_id)
            if demand is not None and demand.end <= workflow.now():  # not prolonged while the plan was made
                self.forget_demand(demand_id)
                self.news.append((demand.asked_by, withdrawn(demand_id, plan, f"it ended at {utc(demand.end)}")))
        if plan.units_in_service >= plan.desired_units:
            self.shortage.clear()
        retire = {step.arn for step in plan.steps if step.kind in RETIRING and step.ready and not self.paused}
        for arn in self.retiring.keys() - self.deleting - retire:
            del self.retiring[arn]  # wanted again
        for step in plan.steps:
            self._take(step)
        self.routes = plan.routes
        if self.paused:
            in_service = [model for model in self.fleet.values() if model.in_service]
            self.routes = {model.arn: model.units for model in in_service if model.arn not in self.deleting}
        if self.look or self.replan or (self.routes != self.routed and "routes" not in self.errors):
            return  # something has changed since the plan was asked for, or is about to: the next one is told
        for outcome in plan.outcomes:
            demand = self.demands.get(outcome.demand_id)
            if demand is not None and self._is_news(outcome):
                self.note_told(outcome)
                self.news.append((demand.asked_by, outcome))

    def stop_effects(self) -> None:
        """The kill switch: what AWS has not answered is not tried again. It may have been done all the same."""
        for task in self.effects:
            task.cancel()

    def _is_news(self, outcome: DemandOutcome) -> bool:
        """A failure is told once all orders under way have ended; again only with other units or of another kind."""
        before = self.told.get(outcome.demand_id)
        if outcome == before or (outcome.status == "failed" and self.sending):
            return False
        if before is None or outcome.status != "failed":
            return True
        figures = outcome.status, outcome.units_in_service, outcome.units_wanted
        known = before.status, before.units_in_service, before.units_wanted
        return figures != known or self.kinds() != self.told_kinds.get(outcome.demand_id)

    def note_told(self, outcome: DemandOutcome) -> None:
        """The asker knows, or is about to."""
        self.told[outcome.demand_id] = outcome
        self.told_kinds[outcome.demand_id] = self.kinds()

    def _take(self, step: Step) -> None:
        if not step.ready:
            return
        if step.kind is StepKind.AWAIT and step.arn not in self.watching | self.held:
            assert step.arn is not None
            self.watching.add(step.arn)
            self.start(self._await_in_service(step.arn, step.name))
        if "fleet" in self.errors or self.paused or deletion(step.arn) in self.held:
            return  # nothing is bought or deleted on an old list, or past the kill switch
        if step.order is not None and CREATE not in self.held:
            if not self.sending:
                self.settled = set(self.shortage.keys() - self.fleet.keys() - {FAILED})
            self.sending[step.name] = step.order
            self.unanswered = [order for order in self.unanswered if order.name != step.name]
            self.next_sequence = max(self.next_sequence, step.order.sequence + 1)
            self.start(self._create(step.order))
        elif step.kind in RETIRING and step.arn not in self.retiring and not self.look:
            # With `look` a message has come since the plan was asked for: the next one decides what goes.
            assert step.arn is not None
            self.retiring[step.arn] = step
            self.start(self._retire(step.arn, step))

    async def _effect(self, activity: Any, request: CreateModel | DeleteModel, summary: str) -> Any:
        """A change at AWS, which `stop_effects` ends."""
        task = asyncio.ensure_future(mutate(activity, request, summary=summary[:SUMMARY]))
        self.effects.append(task)
        try:
            return await task
        finally:
            self.effects.remove(task)

    async def _create(self, order: Order) -> None:
        model_id = self.now_snapshot.policy.models[self.model].provisioned_model_id
        request = CreateModel(provisioned_model_id=model_id, order=order)
        summary = f"Create {order.name}: {order.units} units for {order.asked_by}"
        try:
            arn: str = await self._effect(BedrockActivities.create_model, request, summary)
        except ActivityError as error:
            kind, message = failure(error)
            stopped = is_cancelled_exception(error)
            if not stopped:
                self.held.add(CREATE)
                self.settled.discard(order.name)
                self.shortage[order.name] = kind, f"{order.units} units were not created: {message}"
            if stopped or kind in RETRYABLE:
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
                    asked_by=order.asked_by,
                    until=order.until,
                )
                self.keep_purchases()
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
                self.forget_model(arn)
            elif seen.status == "Creating":  # it is watched on
                self.shortage[arn] = "late", f"{name} is still Creating after {timeout}: ask AWS Support"
            else:
                self.fleet[arn] = known.model_copy(update={"status": seen.status, "failure": seen.failure})
                if known.ours:
                    self.shortage.pop(FAILED, None)
                if seen.status == "Failed" and known.ours:
                    self.held.add(CREATE)
                    why = f"AWS failed to create {name}: {seen.failure or 'no reason given'}"
                    self.shortage[FAILED] = FAILED, why
                    self.keep_purchases()
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
            await self._effect(BedrockActivities.delete_model, DeleteModel(arn=arn), f"Delete {step.name}: {step.why}")
            timeout = self.policy.provisioning_timeout
            seen = await wait(
                BedrockActivities.await_gone,
                AwaitModel(arn=arn, poll_interval=self.policy.poll_interval, give_up_after=timeout),
                summary=f"Wait until {step.name} is gone",
                at_most=timeout,
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                self.look = True  # it may be gone all the same
            else:
                self.held.add(deletion(arn))
                self.errors[arn] = f"{step.name} was not deleted: {failure(error)[1]}"
        else:
            if seen.status is None:
                self.forget_model(arn)
            else:
                self.held.add(deletion(arn))
                self.errors[arn] = f"{step.name} is still {seen.status} {timeout} after its deletion"
        self.deleting.discard(arn)
        del self.retiring[arn]
        self.replan = True


def withdrawn(demand_id: str, plan: CapacityPlan, why: str) -> DemandOutcome:
    """A demand that is none any more."""
    return DemandOutcome(
        demand_id=demand_id,
        status="withdrawn",
        units_in_service=plan.units_in_service,
        units_wanted=plan.desired_units,
        detail=f"withdrawn: {why}; {plan.summary}",
    )
