"""Virtual time, and in it what `CapacityWorkflow` does with the planner: look, plan, act, go round again.

The same states, retries and pauses as in `workflows/capacity.py`, with activities that end within seconds of virtual
time; a reconciliation is skipped where list and memory agree and nothing is held, since the plan is pure.
"""

import heapq
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial

from bench._virtual_bedrock import Bought, Refused, VirtualBedrock
from domain.capacity import CapacityPlan, Demand, Order, ProvisionedModel, Situation, Step, StepKind, merged
from domain.errors import RETRYABLE, ErrorKind
from domain.planner import plan
from domain.policy import Policy
from domain.purchases import Consent, Excess, Purchase

CALL = timedelta(seconds=1)
"""One management call."""
PERSON_ANSWERS = timedelta(minutes=15)
"""A person agrees to what is over a daily cap, always."""
KEPT = timedelta(days=2)
TRIED_FOR = timedelta(minutes=10)
"""As long as `workflows/_step.py` tries a change."""
CREATE, LIST = "create", "list"
RETIRING = (StepKind.WITHDRAW, StepKind.DRAIN, StepKind.DELETE)


class VirtualTime:
    """What happens when; callbacks run in order, none of them waits."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self._queue: list[tuple[datetime, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, moment: datetime, what: Callable[[], None]) -> None:
        """Do `what` at `moment`, at once if that has passed."""
        self._count += 1
        heapq.heappush(self._queue, (max(moment, self.now), self._count, what))

    def run(self, until: datetime) -> None:
        """Everything that happens before `until`."""
        while self._queue and self._queue[0][0] < until:
            self.now, _, what = heapq.heappop(self._queue)
            what()
        self.now = until


class CapacityLoop:
    """One model's capacity."""

    def __init__(self, time: VirtualTime, policy: Policy, model: str, bedrock: VirtualBedrock) -> None:
        self.demands: dict[str, Demand] = {}
        self.asked: list[tuple[datetime, str, Demand | None]] = []
        """What was demanded when; None: no longer."""
        self.plan: CapacityPlan | None = None
        self.plans = 0
        self.consents = 0
        self.units = 0
        """In service: they get calls and answer them."""
        self.served: list[tuple[datetime, int]] = [(time.now, 0)]
        """Since when how many were."""
        self._time, self._policy, self._model, self._bedrock = time, policy, model, bedrock
        self._fleet: dict[str, ProvisionedModel] = {}
        self._listed = False
        self._unlisted: set[str] = set()
        self._gone: set[str] = set()
        self._sending: dict[str, Order] = {}
        self._unanswered: list[Order] = []
        self._next_sequence = 1
        self._watching: set[str] = set()
        self._retiring: dict[str, Step] = {}
        self._deleting: set[str] = set()
        self._purchases: list[Purchase] = []
        """Ended ones, while the daily caps look back on them."""
        self._consents: dict[str, Consent] = {}
        self._asked_to_agree = ("", 0.0)
        self._routed: frozenset[str] = frozenset()
        self._troubles: dict[str, str] = {}
        self._fleet_error = False
        self._held: set[str] = set()
        self._look = True
        self._reconcile_at = time.now
        self._alarm = 0
        """Number of the newest timer: older ones are void."""
        self._pending = False
        self._wake()

    # ------------------------------------------------------------ messages

    def set_demand(self, demand: Demand) -> None:
        """As the update of that name."""
        if demand.end > self._time.now:
            self.demands[demand.demand_id] = demand
            self.asked.append((self._time.now, demand.demand_id, demand))
            self._try_again()

    def withdraw_demand(self, demand_id: str) -> None:
        """As the update of that name."""
        if self.demands.pop(demand_id, None) is not None:
            self.asked.append((self._time.now, demand_id, None))
            self._try_again()

    def note_served(self) -> None:
        """Routes have changed, or somebody has deleted what they name."""
        self.units = sum(self._bedrock.alive[arn].units for arn in self._routed if arn in self._bedrock.alive)
        self.served.append((self._time.now, self.units))

    # ------------------------------------------------------------ main loop

    def _try_again(self) -> None:
        self._held.clear()
        self._look = True
        self._wake()

    def _wake(self) -> None:
        if not self._pending:
            self._pending = True
            self._time.at(self._time.now + CALL, self._round)

    def _round(self) -> None:
        self._pending = False
        now = self._time.now
        look, self._look = self._look, False
        if now >= self._reconcile_at:
            self._reconcile_at = now + self._policy.capacity.reconcile_interval
            if self._listed and not look and self._all_is_well():
                self._sleep()
                return
            self._held.clear()
            look = True
        if look:
            self._list()
        self.plan = plan(self._situation())
        self.plans += 1
        self._act(self.plan)
        if not self._pending:
            self._sleep()

    def _all_is_well(self) -> bool:
        if self._held or self._troubles or self._unanswered or self._fleet_error or self._sending:
            return False
        if (
            self.plan is not None
            and self.plan.next_change_at is not None
            and self.plan.next_change_at <= self._time.now
        ):
            return False
        seen = {arn: model.seen(self._time.now).status for arn, model in self._bedrock.alive.items()}
        return seen == {arn: model.status for arn, model in self._fleet.items()}

    def _sleep(self) -> None:
        moments = [self._reconcile_at]
        if self.plan is not None and self.plan.next_change_at is not None:
            moments.append(self.plan.next_change_at)
        if self._fleet_error and LIST not in self._held:
            moments.append(self._time.now + self._policy.capacity.poll_interval)
        self._alarm += 1
        number = self._alarm

        def ring() -> None:
            if number == self._alarm and not self._pending:
                self._look = self._look or self._time.now < self._reconcile_at
                self._pending = True
                self._round()

        self._time.at(max(min(moments), self._time.now + CALL), ring)

    def _list(self) -> None:
        settled = {arn for arn, model in self._fleet.items() if model.status != "Creating"}
        try:
            listed = self._bedrock.list(self._time.now)
        except Refused as refused:
            self._fleet_error = True
            if refused.kind not in RETRYABLE:
                self._held.add(LIST)
            return
        self._fleet_error, self._listed = False, True
        arns, names = {model.arn for model in listed}, {model.name for model in listed}
        unlisted = self._unlisted - settled
        self._unlisted -= arns | settled
        fleet = merged(self._fleet.values(), listed, unlisted, self._gone)
        self._fleet = {model.arn: model for model in fleet}
        self._gone &= arns
        self._unanswered = [order for order in self._unanswered if order.name not in names]

    def _situation(self) -> Situation:
        return Situation.model_construct(
            model=self._model,
            spec=self._policy.models[self._model],
            policy=self._policy.capacity,
            timetable=self._policy.timetable,
            now=self._time.now,
            demands=tuple(self.demands.values()),
            fleet=tuple(self._fleet.values()) if self._listed else None,
            sending=tuple(self._sending.values()),
            unanswered=tuple(self._unanswered),
            next_sequence=self._next_sequence,
            leaving=frozenset(self._deleting),
            routed=self._routed,
            troubles=tuple(dict.fromkeys(self._troubles.values())),
            purchases=tuple(self._purchases),
            consents=tuple(self._consents.values()),
        )

    # ------------------------------------------------------------ acting

    def _act(self, plan: CapacityPlan) -> None:
        for demand_id in plan.ended:
            self.demands.pop(demand_id, None)
        if plan.units_in_service >= plan.desired_units:
            self._troubles.clear()
        if plan.excess is not None and (plan.excess.excess_id, plan.excess.amount) != self._asked_to_agree:
            self._asked_to_agree = plan.excess.excess_id, plan.excess.amount
            self._time.at(self._time.now + PERSON_ANSWERS, partial(self._consent, plan.excess))
        retire = {step.arn for step in plan.steps if step.kind in RETIRING and step.ready}
        for arn in self._retiring.keys() - self._deleting - retire:
            del self._retiring[arn]  # wanted again
        for step in plan.steps:
            self._take(step)
        if plan.routes.keys() != self._routed:
            self._routed = frozenset(plan.routes)
            self.note_served()
            self._wake()

    def _take(self, step: Step) -> None:
        if not step.ready or step.arn in self._held:
            return
        if step.kind is StepKind.AWAIT and step.arn is not None and step.arn not in self._watching:
            self._watching.add(step.arn)
            self._watch(step.arn)
        if self._fleet_error:
            return  # nothing is bought or deleted on an old list
        if step.order is not None and CREATE not in self._held and step.name not in self._sending:
            self._sending[step.name] = step.order
            self._unanswered = [order for order in self._unanswered if order.name != step.name]
            self._next_sequence = max(self._next_sequence, step.order.sequence + 1)
            self._send(step.order)
        elif step.kind in RETIRING and step.arn is not None and step.arn not in self._retiring and not self._look:
            self._retiring[step.arn] = step
            drain = timedelta(0) if step.kind is StepKind.DELETE else self._policy.capacity.drain
            self._time.at(self._time.now + drain, partial(self._delete, step.arn, step))

    def _try(self, call: Callable[[], None], failed: Callable[[Refused], None]) -> None:
        """As an activity that is tried again while the failure may pass."""
        give_up = self._time.now + TRIED_FOR

        def attempt() -> None:
            try:
                call()
            except Refused as refused:
                again = self._time.now + CALL
                if refused.kind is ErrorKind.THROTTLED:
                    again = self._bedrock.trouble_ends(self._time.now)
                if refused.kind not in RETRYABLE:
                    failed(refused)
                elif again < give_up:
                    self._time.at(again, attempt)
                else:
                    self._time.at(give_up, partial(failed, refused))

        self._time.at(self._time.now + CALL, attempt)

    def _send(self, order: Order) -> None:
        def create() -> None:
            arn = self._bedrock.create(order, self._time.now)
            if arn not in self._fleet:
                self._unlisted.add(arn)
                self._fleet[arn] = self._bedrock.alive[arn].seen(self._bedrock.alive[arn].created_at)
            ended()

        def failed(refused: Refused) -> None:
            self._held.add(CREATE)
            self._troubles[order.name] = f"{order.units} units were not created: {refused}"
            if refused.kind in RETRYABLE:
                self._unanswered.append(order)
            ended()

        def ended() -> None:
            del self._sending[order.name]
            self._wake()

        self._try(create, failed)

    def _watch(self, arn: str) -> None:
        """Polled; what a poll would find is looked up, and found at the poll after it."""
        now, every = self._time.now, self._policy.capacity.poll_interval
        deadline = now + self._policy.capacity.provisioning_timeout
        bought = self._bedrock.alive.get(arn)
        found = min(deadline, _poll_after(now, every, bought)) if bought else now
        denied = self._bedrock.denied_between(now, found)

        def look() -> None:
            try:
                seen = self._bedrock.get(arn, self._time.now)
            except Refused as refused:
                if (
                    refused.kind is ErrorKind.THROTTLED
                    and (again := self._bedrock.trouble_ends(self._time.now)) < deadline
                ):
                    self._time.at(again, look)
                    return
                self._held.add(arn)
                self._troubles[arn] = f"{arn} cannot be watched: {refused}"
            else:
                self._troubles.pop(arn, None)
                if seen is None:
                    self._forget(arn)
                elif seen.status == "Creating":
                    self._held.add(arn)
                    self._troubles[arn] = f"{seen.name} is still Creating"
                else:
                    if arn in self._fleet:
                        self._fleet[arn] = seen
                    if seen.status == "Failed":
                        self._held.add(CREATE)
                        self._troubles["failed"] = f"AWS failed to create {seen.name}: {seen.failure}"
                    else:
                        self._troubles.pop("failed", None)
            self._watching.discard(arn)
            self._wake()

        self._time.at(denied or found, look)

    def _delete(self, arn: str, step: Step) -> None:
        if self._retiring.get(arn) is not step:
            return  # wanted again
        self._deleting.add(arn)

        def delete() -> None:
            self._bedrock.delete(arn, self._time.now)
            self._forget(arn)
            ended()

        def failed(refused: Refused) -> None:
            self._held.add(arn)
            ended()

        def ended() -> None:
            self._deleting.discard(arn)
            self._retiring.pop(arn, None)
            self._wake()

        self._try(delete, failed)

    def _forget(self, arn: str) -> None:
        model = self._fleet.pop(arn, None)
        if model is not None:
            self._remember(model)
        self._unlisted.discard(arn)
        self._gone.add(arn)
        self._held.discard(arn)
        self._troubles.pop(arn, None)

    def _remember(self, model: ProvisionedModel) -> None:
        now = self._time.now
        self._purchases = [x for x in self._purchases if x.ended_at is not None and now - x.ended_at < KEPT]
        gone = Purchase(
            arn=model.arn,
            name=model.name,
            units=model.units,
            asked_by=model.asked_by or "unknown",
            until=model.until,
            bought_at=model.created_at,
            ended_at=now,
            failed=model.status == "Failed",
        )
        self._purchases.append(gone)

    def _consent(self, excess: Excess) -> None:
        """Somebody agrees to what is asked for."""
        self._consents = {key: x for key, x in self._consents.items() if x.until > self._time.now}
        if excess.until > self._time.now:
            self._consents[excess.excess_id] = Consent(
                excess_id=excess.excess_id,
                who="capacity-owner",
                amount=excess.amount,
                at=self._time.now,
                until=excess.until,
            )
            self.consents += 1
            self._try_again()


def _poll_after(now: datetime, every: timedelta, bought: Bought) -> datetime:
    """When a poll that is made every so often finds that the creation has ended."""
    return now + every * max(1, -(-(bought.settled_at - now) // every))
