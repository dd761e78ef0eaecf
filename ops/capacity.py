"""What people can do with capacity, whoever presents it: look, look ahead, ask for units, pause, resume, approve."""

import asyncio
import re
import uuid
from datetime import UTC, datetime, timedelta

from pydantic import AwareDatetime, BaseModel
from temporalio.client import WorkflowHandle
from temporalio.service import RPCError, RPCStatusCode

from domain.capacity import CapacityPlan, Demand, DemandKind, DemandOutcome, Situation
from domain.clock import HOUR, RehearsalClock
from domain.forecast import NoForecast, expected
from domain.incident import Decision, TimelineEntry
from domain.messages import (
    APPROVE_CAPACITY,
    CAPACITY_STATE,
    PAUSE_CAPACITY,
    RECONCILE_NOW,
    RESUME_CAPACITY,
    SET_DEMAND,
    WITHDRAW_DEMAND,
    ApproveCapacity,
    AwaitedApproval,
    CapacityState,
    DemandAnswer,
    Paused,
    PersonRequest,
    PurchaseState,
    Reconciled,
    UpdateResult,
    WithdrawDemand,
    capacity_id,
    still_paid,
)
from domain.people import Role
from domain.planner import plan
from domain.policy import ModelPolicy, Policy
from domain.purchases import unit_hours
from ops.asking import CAPACITY, MAX_REASON_CHARS, Asking, ExitCode, M, NotAllowed, OpsError

MAX_AHEAD = timedelta(days=366)
"""Of a person's demand, in business time."""
STATE_TIMEOUT = timedelta(seconds=2)
DEMAND_ID = r"^[A-Za-z0-9_.:@+-]{1,150}$"


class Capacity(BaseModel):
    """The capacity of one model: what there is, for whom, until when, at what cost, and what it waits for."""

    model: str
    units_in_service: int = 0
    desired_units: int = 0
    doing: str = ""
    problems: list[str] = []
    """What does not work; empty: all is well."""
    retry_at: AwareDatetime | None = None
    """When what failed is tried again."""
    paused: Paused | None = None
    """The kill switch is on: nothing is bought or deleted."""
    awaiting: list[AwaitedApproval] = []
    """What waits for a person's approval."""
    bought: list[PurchaseState] = []
    """What we bought and still pay for, what ends first at first."""
    others_units: int = 0
    """Units that others provide: committed, or without our tag."""
    unit_hours: float = 0
    """Paid so far for what is bought, in business hours; every hour that has begun counts."""
    usd: float | None = None
    """The same in money; None: the policy has no price."""
    lately_unit_hours: float = 0
    """With what was released lately, as far as caps look back."""
    lately_usd: float | None = None
    demands: list[Demand] = []
    """Without the timetable's."""
    rungs: list[str] = []
    """What carries the load while units are missing, in words."""
    decisions: list[Decision] = []
    timeline: list[TimelineEntry] = []
    listed_at: AwareDatetime | None = None
    """When the fleet was listed last; None: not yet."""
    unreachable: str = ""
    """Why nothing else is known; empty: it is."""
    workflow: str
    """Its workflow in the Temporal UI."""


class LoadAt(BaseModel):
    """The load to expect from a moment on."""

    at: AwareDatetime
    tokens_per_second: float


class Outlook(BaseModel):
    """A dry run: the plan as it would be made now, and the load to expect. Nothing was changed."""

    model: str
    at: AwareDatetime
    until: AwareDatetime
    """How far ahead it looks, in real time."""
    plan: CapacityPlan
    load: list[LoadAt]
    """On an ordinary day, by business hour; empty: the policy has no forecast."""
    tokens_per_second_per_unit: float
    zone: str
    """Of the clocks that people plan by."""
    demand: Demand | None = None
    """That was tried; None: the plan is for what stands."""
    usd: float | None = None
    """What that demand would cost more within the horizon; None: no demand, or no price."""
    unit_hours: int | None = None
    paused: Paused | None = None


class Capacities(Asking):
    """Actions on capacity."""

    # ------------------------------------------------------------------ looking

    async def capacity_state(self, model: str) -> CapacityState:
        """What the one writer of a model's capacity knows and does.

        Raises:
            OpsError: no such workflow runs, or no worker answers.
        """
        return await self._state(model)

    async def list_capacity(self) -> list[Capacity]:
        """The capacity of every model of the policy; says so where nobody answers for one."""
        policy = self._policy()

        async def look(model: str) -> Capacity:
            try:
                return self._capacity(await self._state(model, STATE_TIMEOUT), policy)
            except OpsError as error:
                return Capacity(model=model, unreachable=error.message, workflow=self.url(capacity_id(model)))

        return list(await asyncio.gather(*map(look, policy.models)))

    async def get_capacity(self, model: str) -> Capacity:
        """One model's capacity.

        Raises:
            OpsError: there is no such model, or nobody answers for it.
        """
        policy = self._policy()
        _spec(policy, model)
        return self._capacity(await self._state(model), policy)

    async def plan_capacity(self, model: str) -> Outlook:
        """The plan as it would be made now. Raises as `get_capacity`."""
        policy = self._policy()
        _spec(policy, model)
        return self._outlook(await self._state(model), policy)

    # ------------------------------------------------------------------ demands

    async def preview_demand(
        self,
        model: str,
        units: int,
        start: datetime | None,
        until: datetime | timedelta,
        reason: str,
        demand_id: str | None = None,
    ) -> Outlook:
        """The plan with a person's demand, and what it would cost more. Changes nothing. Raises as `set_demand`."""
        policy = self._policy()
        demand = self._demand(policy, model, units, start, until, reason, demand_id, "you")
        return self._outlook(await self._state(model), policy, demand)

    async def preview_withdrawal(self, model: str, demand_id: str) -> Outlook:
        """The plan without a person's demand. Changes nothing. Raises as `withdraw_demand`."""
        policy = self._policy()
        _spec(policy, model)
        state = await self._state(model)
        _withdrawable(state, demand_id)
        left = [demand for demand in state.demands if demand.demand_id != demand_id]
        return self._outlook(state.model_copy(update={"demands": left}), policy)

    async def set_demand(
        self,
        model: str,
        token: str | None,
        units: int,
        start: datetime | None,
        until: datetime | timedelta,
        reason: str,
        demand_id: str | None = None,
    ) -> DemandAnswer:
        """Ask for `units` in service from `start` (now) `until` a moment or for so long, in business time.

        The same id again replaces the demand.

        Raises:
            OpsError: a field is not allowed (its value and what is allowed are named), the token is not good, or
                nobody answers.
        """
        who = await self._subject(token, SET_DEMAND, model)
        demand = self._demand(self._policy(), model, units, start, until, reason, demand_id, who)
        state = await self._state(model)
        before = next((item for item in state.demands if item.demand_id == demand.demand_id), None)
        if before is not None and before.kind is not DemandKind.PERSON:
            raise _not_allowed("demand_id", demand.demand_id, f"an id that no {before.kind} demand has")
        needed = Role.ENGINEER if before is None else _needed_for(before, who)
        if denial := await self._denial(who, needed, SET_DEMAND, model, f"{units} units"):
            return DemandAnswer(outcome="denied", message=denial, demand_id=demand.demand_id)
        result = await self._tell(model, SET_DEMAND, demand, DemandOutcome)
        return DemandAnswer(
            outcome="accepted", message=f"{result.status}: {result.detail}", demand_id=demand.demand_id, result=result
        )

    async def withdraw_demand(self, model: str, token: str | None, demand_id: str, why: str) -> DemandAnswer:
        """Take a person's demand back; another's is an approver's to take. Raises as `set_demand`."""
        request = await self._request(PersonRequest, token, why, WITHDRAW_DEMAND, model)
        _spec(self._policy(), model)
        demand = _withdrawable(await self._state(model), demand_id)
        needed = _needed_for(demand, request.who)
        if denial := await self._denial(request.who, needed, WITHDRAW_DEMAND, model, demand_id):
            return DemandAnswer(outcome="denied", message=denial, demand_id=demand_id)
        reason = f"{request.why} ({request.who})"
        message = WithdrawDemand(model=model, demand_id=demand_id, reason=reason)
        result = await self._tell(model, WITHDRAW_DEMAND, message, DemandOutcome)
        return DemandAnswer(outcome="accepted", message=result.detail, demand_id=demand_id, result=result)

    # ------------------------------------------------------------------ deciding

    async def pause_capacity(self, model: str, token: str | None, why: str) -> UpdateResult:
        """The kill switch: nothing is bought or deleted until somebody resumes; routes stay.

        Raises:
            OpsError: there is no such model, the token is not good, or nobody answers.
        """
        return await self._decide(model, PAUSE_CAPACITY, PersonRequest, UpdateResult, token, why)

    async def resume_capacity(self, model: str, token: str | None, why: str) -> UpdateResult:
        """Buy and release again. Raises as `pause_capacity`."""
        return await self._decide(model, RESUME_CAPACITY, PersonRequest, UpdateResult, token, why)

    async def reconcile_capacity(self, model: str, token: str | None, why: str) -> Reconciled:
        """Compare fleet and demands now, and try again what failed. Raises as `pause_capacity`."""
        return await self._decide(model, RECONCILE_NOW, PersonRequest, Reconciled, token, why)

    async def approve_capacity(
        self, model: str, token: str | None, why: str, approval_id: str | None = None, amount: float | None = None
    ) -> UpdateResult:
        """Agree to what waits, at most by `amount` over the cap; without an id to the only thing that waits.

        Raises:
            OpsError: nothing waits, or several things and none is named; otherwise as `pause_capacity`.
        """
        waiting = [item.approval_id for item in (await self.get_capacity(model)).awaiting]
        chosen = approval_id or (waiting[0] if len(waiting) == 1 else None)
        if chosen not in waiting or chosen is None:
            if not waiting:
                raise OpsError(
                    f"Nothing waits for an approval of {model}'s capacity.",
                    f"`runbooks capacity show {model}` says what it does.",
                    ExitCode.NOT_POSSIBLE,
                )
            raise _not_allowed("approval_id", approval_id, ", ".join(waiting))
        more = {"approval_id": chosen, "amount": amount}
        return await self._decide(model, APPROVE_CAPACITY, ApproveCapacity, UpdateResult, token, why, **more)

    # ------------------------------------------------------------------ inside

    async def _decide(
        self,
        model: str,
        name: str,
        kind: type[PersonRequest],
        answer: type[M],
        token: str | None,
        why: str,
        **more: object,
    ) -> M:
        request = await self._request(kind, token, why, name, model, **more)
        _spec(self._policy(), model)
        return await self._tell(model, name, request, answer)

    async def _state(self, model: str, timeout: timedelta | None = None) -> CapacityState:
        try:
            return await self._query(self._writer(model), CAPACITY_STATE, CapacityState, timeout=timeout)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            raise _no_writer(model) from None

    async def _tell(self, model: str, name: str, message: BaseModel, kind: type[M]) -> M:
        try:
            async with self._answers(CAPACITY, model):
                answer: M = await self._writer(model).execute_update(
                    name, message, result_type=kind, id=self._once or str(uuid.uuid4())
                )
                return answer
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            raise _no_writer(model) from None

    def _writer(self, model: str) -> WorkflowHandle[object, object]:
        return self._client.get_workflow_handle(capacity_id(model))

    async def _denial(self, who: str, needed: Role, action: str, model: str, value: str) -> str:
        """Why `who` may not, which is put on record; empty: they may."""
        roster = self._roster()
        if roster.may(who, needed):
            return ""
        role = roster.people.get(who)
        why = f"{who} {f'is {role}' if role else 'is not in the roster'}; {needed} is needed"
        await self._record_refusal(who, action, model, why, value)
        return why

    def _demand(
        self,
        policy: Policy,
        model: str,
        units: int,
        start: datetime | None,
        until: datetime | timedelta,
        reason: str,
        demand_id: str | None,
        who: str,
    ) -> Demand:
        """What a person asks for, in real time, if it is allowed."""
        spec = _spec(policy, model)
        region = self._settings.aws_region
        if not spec.sold_in(region):
            allowed = ", ".join(spec.provisioned_regions or ()) or "none"
            raise _not_allowed("region", region, f"{allowed} (models.{model}.provisioned_regions)")
        if not 1 <= units <= spec.most_units:
            limit = "ceiling_units" if spec.most_units == spec.ceiling_units else "quota_units"
            bounds = f"1 to {spec.most_units}" if spec.most_units else "none"
            raise _not_allowed("units", units, f"{bounds} (models.{model}.{limit})")
        begin, end = self._span(start, until)
        reason = reason.strip()
        if not 1 <= len(reason) <= MAX_REASON_CHARS:
            raise _not_allowed("reason", reason[:40], f"a text of 1 to {MAX_REASON_CHARS} characters")
        if demand_id is not None and not re.fullmatch(DEMAND_ID, demand_id):
            raise _not_allowed("demand_id", demand_id[:80], "1 to 150 letters, digits and . : @ + - _")
        return Demand(
            demand_id=demand_id or f"person-{self._short_id()}",
            model=model,
            kind=DemandKind.PERSON,
            units=units,
            start=begin,
            end=end,
            reason=reason,
            asked_by=who,
        )

    def _span(self, start: datetime | None, until: datetime | timedelta) -> tuple[datetime, datetime]:
        """Start and end in real time."""
        clock = self._settings.clock
        now = clock.business(datetime.now(UTC))
        begin, latest = start or now, now + MAX_AHEAD
        if begin > latest:
            raise _not_allowed("start", begin.isoformat(), f"a moment up to {latest.isoformat()}")
        end = begin + min(until, MAX_AHEAD) if isinstance(until, timedelta) else until
        if end <= now or end > latest:
            raise _not_allowed(
                "end", end.isoformat(), f"a moment after now, {now.isoformat()}, to {latest.isoformat()}"
            )
        if end <= begin:
            raise _not_allowed("end", end.isoformat(), f"a moment after the start, {begin.isoformat()}")
        return clock.real(begin), clock.real(end)

    def _capacity(self, state: CapacityState, policy: Policy) -> Capacity:
        now, clock = datetime.now(UTC), self._settings.clock
        price = policy.models[state.model].usd_per_unit_hour if state.model in policy.models else None
        # As of now: what a workflow answers is as old as its last step.
        paid = still_paid(state.purchases, state.fleet, now, clock, price)
        bought = sorted(paid, key=lambda item: (item.until or now, item.name))
        hours, lately = sum(item.unit_hours for item in bought), unit_hours(state.purchases, now, clock)
        return Capacity(
            model=state.model,
            units_in_service=state.units_in_service,
            desired_units=state.desired_units,
            doing=state.doing,
            problems=state.problems,
            retry_at=state.retry_at,
            paused=state.paused,
            awaiting=state.awaiting,
            bought=bought,
            others_units=sum(model.units for model in state.fleet if model.committed or not model.ours),
            unit_hours=hours,
            usd=None if price is None else hours * price,
            lately_unit_hours=lately,
            lately_usd=None if price is None else lately * price,
            demands=sorted(state.demands, key=lambda demand: demand.start),
            rungs=[rung.text for rung in state.rungs],
            decisions=state.decisions,
            timeline=state.timeline,
            listed_at=state.last_reconciled_at,
            workflow=self.url(capacity_id(state.model)),
        )

    def _outlook(self, state: CapacityState, policy: Policy, demand: Demand | None = None) -> Outlook:
        now, clock, spec = datetime.now(UTC), self._settings.clock, _spec(policy, state.model)
        situation = Situation(
            model=state.model,
            spec=spec,
            policy=policy.capacity,
            timetable=policy.timetable,
            clock=clock,
            now=now,
            demands=tuple(state.demands),
            fleet=tuple(state.fleet) if state.last_reconciled_at else None,
            unanswered=tuple(state.unanswered),
            next_sequence=state.next_sequence,
            routed=frozenset(state.routes),
            purchases=tuple(state.purchases),
            troubles=tuple(trouble.text for trouble in state.troubles),
            consents=tuple(state.consents),
            paused=f"{state.paused.who}: {state.paused.why}" if state.paused else "",
        )
        made = plan(situation)
        usd = hours = None
        if demand is not None:
            kept = [item for item in state.demands if item.demand_id != demand.demand_id]
            before, made = made, plan(situation.model_copy(update={"demands": (*kept, demand)}))
            hours = made.cost.unit_hours_ahead - before.cost.unit_hours_ahead
            usd = None if spec.usd_per_unit_hour is None else hours * spec.usd_per_unit_hour
        until = now + policy.capacity.plan_horizon
        return Outlook(
            model=state.model,
            at=now,
            until=until,
            plan=made,
            load=_load(policy, state.model, clock, now, until),
            tokens_per_second_per_unit=spec.tokens_per_second_per_unit,
            zone=policy.timetable.zone if policy.timetable else policy.forecast.zone,
            demand=demand,
            usd=usd,
            unit_hours=hours,
            paused=state.paused,
        )


def _load(policy: Policy, model: str, clock: RehearsalClock, since: datetime, until: datetime) -> list[LoadAt]:
    at, end, found = clock.business(since), clock.business(until), list[LoadAt]()
    try:
        while at < end:
            found.append(LoadAt(at=clock.real(at), tokens_per_second=expected(policy.forecast, model, at)))
            at = at.replace(minute=0, second=0, microsecond=0) + HOUR
    except NoForecast:
        return []
    return found


def _spec(policy: Policy, model: str) -> ModelPolicy:
    if model not in policy.models:
        allowed, hint = ", ".join(sorted(policy.models)), "The policy file says which models there are."
        raise _not_allowed("model", model, allowed, hint, ExitCode.NOT_FOUND)
    return policy.models[model]


def _withdrawable(state: CapacityState, demand_id: str) -> Demand:
    demand = next((item for item in state.demands if item.demand_id == demand_id), None)
    if demand is None or demand.kind is not DemandKind.PERSON:
        people = ", ".join(item.demand_id for item in state.demands if item.kind is DemandKind.PERSON) or "none now"
        hint = f"`runbooks capacity show {state.model}` lists the demands."
        if demand is not None:
            hint = f"It is of kind {demand.kind} and goes with {demand.asked_by}. {hint}"
        code = ExitCode.NOT_FOUND if demand is None else ExitCode.NOT_POSSIBLE
        raise _not_allowed("demand_id", demand_id, f"a person's demand: {people}", hint, code)
    return demand


def _needed_for(demand: Demand, who: str) -> Role:
    """Who may change a person's demand: an engineer their own, an approver anybody's."""
    return Role.ENGINEER if demand.asked_by == who else Role.APPROVER


def _not_allowed(
    field: str, value: object, allowed: str, next_step: str = "Nothing was changed.", code: ExitCode = ExitCode.USAGE
) -> OpsError:
    said = f"{field}: {str(value)[:100]!r} is not allowed; allowed is {allowed}."
    return OpsError(said, next_step, code, NotAllowed(field, value, allowed))


def _no_writer(model: str) -> OpsError:
    return OpsError(
        f"Nothing has asked for capacity of model {model!r} yet.",
        "A runbook worker starts the capacity workflow of each model: see that one runs.",
        ExitCode.NOT_FOUND,
    )
