"""The planner driven through hours and days, step by step, on a small Bedrock that fails at will."""

import math
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain import timetable
from domain.capacity import CapacityPlan, Demand, DemandKind, Order, ProvisionedModel, Situation, StepKind
from domain.clock import RehearsalClock
from domain.planner import plan
from domain.policy import CapacityPolicy, ModelPolicy, Policy, TimetablePolicy
from domain.purchases import Purchase
from domain.wishes import Board

START = datetime(2026, 11, 24, 3, 0, tzinfo=UTC)  # 12:00 in Tokyo
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
DEFAULT = Policy()
RETRY = 5 * MINUTE
CAPS = CapacityPolicy(max_unit_hours_per_day=None)


def demand(name: str, kind: DemandKind, units: int, start: timedelta, lasts: timedelta) -> Demand:
    begins = START + start
    return Demand(
        demand_id=name,
        model="sonnet",
        kind=kind,
        units=units,
        start=begins,
        end=begins + lasts,
        reason="a test",
        asked_by=name,
    )


@dataclass
class Bedrock:
    """Provisioned models, and one writer that follows the plan at every moment something may have changed."""

    spec: ModelPolicy
    policy: CapacityPolicy
    timetable: TimetablePolicy | None
    demands: list[Demand]
    fleet: dict[str, ProvisionedModel] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    steps_at_once: int = 100
    now: datetime = START
    ready: dict[str, datetime] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    unanswered: list[Order] = field(default_factory=list)
    routed: set[str] = field(default_factory=set)
    purchases: dict[str, Purchase] = field(default_factory=dict)
    sequence: int = 1
    retry_at: datetime | None = None
    quiet: list[tuple[CapacityPlan, int]] = field(default_factory=list)
    """Plans without a step to take, and the units in service."""
    seen: list[tuple[datetime, int]] = field(default_factory=list)
    """Units in service from each moment on."""

    def situation(self) -> Situation:
        known = [x for x in self.demands if x.kind is not DemandKind.EMERGENCY or x.start <= self.now]
        return Situation(
            model="sonnet",
            spec=self.spec,
            policy=self.policy,
            timetable=self.timetable,
            now=self.now,
            demands=tuple(x for x in known if x.end > self.now),
            fleet=tuple(self.fleet.values()),
            unanswered=tuple(self.unanswered),
            next_sequence=self.sequence,
            routed=frozenset(self.routed),
            purchases=tuple(self.purchases.values()),
        )

    def units(self, in_service: bool = False) -> int:
        return sum(x.units for x in self.fleet.values() if x.status != "Failed" and (x.in_service or not in_service))

    def ours(self) -> int:
        return sum(x.units for x in self.fleet.values() if x.ours)

    def run(self, until: datetime) -> None:
        most = max(self.spec.most_units, self.units())
        theirs = {arn for arn, x in self.fleet.items() if not x.ours or x.committed}
        while self.now < until:
            for _ in range(200):
                result = plan(self.situation())
                assert plan(self.situation()) == result
                if not self.take(result):
                    break
                assert self.units() <= most
                assert theirs <= self.fleet.keys()
            else:
                raise AssertionError("there is no end of steps")
            if all(x.status != "Creating" for x in self.fleet.values()) and self.retry_at is None:
                self.quiet.append((result, self.units(in_service=True)))
            self.seen.append((self.now, self.units(in_service=True)))
            self.pass_time(result, until)

    def pass_time(self, result: CapacityPlan, until: datetime) -> None:
        moments = [*self.ready.values(), *(x.start for x in self.demands), until]
        moments += [at for at in (result.next_change_at, self.retry_at) if at is not None]
        self.now = min(at for at in moments if at > self.now)
        if self.retry_at is not None and self.now >= self.retry_at:
            self.retry_at = None
        for arn, at in list(self.ready.items()):
            if at <= self.now and arn in self.fleet:
                failed = self.fault("failed")
                self.fleet[arn] = self.fleet[arn].model_copy(update={"status": "Failed" if failed else "InService"})
                if failed:
                    self.purchases[arn] = self.purchases[arn].model_copy(update={"failed": True, "ended_at": self.now})
            if at <= self.now:
                del self.ready[arn]

    def fault(self, *kinds: str) -> str:
        return self.faults.pop() if self.faults and self.faults[-1] in kinds else ""

    def take(self, result: CapacityPlan) -> bool:
        """A few ready steps; whether there was one."""
        taken = 0
        for step in result.steps:
            if not step.ready or step.kind is StepKind.AWAIT or taken >= self.steps_at_once:
                continue
            if step.kind is StepKind.CREATE and self.retry_at is not None:
                continue
            taken += 1
            arn = step.arn or ""
            if step.order is not None:
                self.create(step.order)
            elif step.kind is StepKind.PUBLISH:
                self.routed.add(arn)
            elif step.kind is StepKind.WITHDRAW:
                self.routed.discard(arn)
            else:
                self.delete(arn)
        return taken > 0

    def create(self, order: Order) -> None:
        fault = self.fault("refused", "unanswered", "answer lost", "slow", "never")
        self.sequence = max(self.sequence, order.sequence + 1)
        self.unanswered = [x for x in self.unanswered if x.token != order.token]
        if fault in ("refused", "unanswered"):
            self.unanswered += [order] if fault == "unanswered" else []
            self.retry_at = self.now + RETRY
            return
        arn = f"arn:{order.name}"
        if order.token not in self.tokens:
            self.tokens[order.token] = arn
            self.fleet[arn] = ProvisionedModel(
                arn=arn,
                name=order.name,
                units=order.units,
                status="Creating",
                ours=True,
                created_at=self.now,
                asked_by=order.asked_by,
                until=order.until,
            )
            lag = {"slow": 25 * MINUTE, "never": 6 * HOUR}.get(fault, self.policy.provisioning_lag)
            self.ready[arn] = self.now + lag
            self.purchases[arn] = Purchase(
                arn=arn,
                name=order.name,
                units=order.units,
                asked_by=order.asked_by,
                until=order.until,
                bought_at=self.now,
            )
        if fault == "answer lost":
            self.unanswered.append(order)
            self.retry_at = self.now + RETRY

    def delete(self, arn: str) -> None:
        gone = self.fleet.pop(arn)
        assert gone.ours
        assert not gone.committed
        assert arn not in self.routed
        self.ready.pop(arn, None)
        wanted = Board(self.situation()).wish(self.now).units
        base = sum(x.units for x in self.fleet.values() if not x.ours or x.committed)
        promised = wanted if self.timetable else max(base, wanted - max(0, self.spec.baseline_units - base))
        if gone.in_service and self.policy.max_unit_hours_per_day is None:
            assert self.units(in_service=True) >= min(wanted, promised), "never below what is in use"
        if arn in self.purchases:
            never = gone.status == "Creating"
            update = {"ended_at": self.now + self.policy.drain, "failed": never or self.purchases[arn].failed}
            self.purchases[arn] = self.purchases[arn].model_copy(update=update)

    def unit_hours_by_day(self) -> Counter[date]:
        zone, found = ZoneInfo(self.timetable.zone) if self.timetable else UTC, Counter[date]()
        for x in self.purchases.values():
            if not x.failed:
                hours = max(1, math.ceil(((x.ended_at or self.now) - x.bought_at) / HOUR))
                for number in range(hours):
                    found[(x.bought_at + number * HOUR).astimezone(zone).date()] += x.units
        return found


QUARTER = 15 * MINUTE
KINDS = [DemandKind.EVENT, DemandKind.EMERGENCY, DemandKind.PERSON, DemandKind.FEATURE]


@st.composite
def demands(draw: st.DrawFn) -> list[Demand]:
    found = []
    for number in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(KINDS))
        units = draw(st.integers(1, 6 if kind is DemandKind.FEATURE else 40))
        start = QUARTER * draw(st.integers(2, 60))
        found.append(demand(f"{kind}-{number}", kind, units, start, QUARTER * draw(st.integers(1, 40))))
    return found


def theirs(units: int, committed: bool = False) -> dict[str, ProvisionedModel]:
    """What others bought, or we by hand for a term."""
    if not units:
        return {}
    model = ProvisionedModel(
        arn="arn:theirs",
        name="theirs",
        units=units,
        status="InService",
        ours=committed,
        committed=committed,
        created_at=START - HOUR,
    )
    return {model.arn: model}


def spec(baseline: int, ceiling: int, quota: int | None = None) -> ModelPolicy:
    update = {"baseline_units": baseline, "ceiling_units": ceiling, "quota_units": quota}
    return DEFAULT.models["sonnet"].model_copy(update=update)


FAULTS = ["refused", "unanswered", "answer lost", "slow", "never", "failed"]
THOROUGH = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@THOROUGH
@given(st.data())
def test_whatever_is_asked_and_fails_the_fleet_follows_or_the_plan_says_why_not(data: st.DataObject) -> None:
    timed = data.draw(st.booleans(), "timed")
    there = data.draw(st.integers(0, 15), "theirs")
    cap = data.draw(st.none() | st.integers(260, 500), "cap")
    ceiling, quota = data.draw(st.integers(15, 40)), data.draw(st.none() | st.integers(0, 40))
    bedrock = Bedrock(
        spec=spec(there if not timed else 0, ceiling, quota),
        policy=CAPS.model_copy(update={"max_unit_hours_per_day": cap}),
        timetable=DEFAULT.timetable if timed else None,
        demands=data.draw(demands(), "demands"),
        fleet=theirs(there, data.draw(st.booleans(), "committed")),
        faults=data.draw(st.lists(st.sampled_from(FAULTS), max_size=6), "faults"),
        steps_at_once=data.draw(st.sampled_from([1, 2, 100]), "at once"),
    )
    bedrock.run(START + 40 * HOUR)
    for result, units in bedrock.quiet:
        assert units == result.desired_units or result.why_not, result.summary
        assert units == result.ends_at_units
    if cap is not None:
        assert max(bedrock.unit_hours_by_day().values(), default=0) <= cap, bedrock.unit_hours_by_day()
    # All has ended; at night the timetable wants nothing either (02:00 in Tokyo is 17:00 UTC).
    bedrock.demands.clear()
    bedrock.timetable = None
    bedrock.spec = spec(0, ceiling, quota)
    bedrock.run(bedrock.now + 3 * HOUR)
    assert bedrock.ours() == sum(x.units for x in bedrock.fleet.values() if x.committed), "nothing leaks"
    assert len(bedrock.tokens) == len(set(bedrock.tokens.values()))


@THOROUGH
@given(st.data())
def test_without_faults_units_are_there_at_the_start_and_cost_no_more_than_naively(data: st.DataObject) -> None:
    timed = data.draw(st.booleans(), "timed")
    asked = data.draw(demands(), "demands")
    bedrock = Bedrock(spec=spec(0, 80), policy=CAPS, timetable=DEFAULT.timetable if timed else None, demands=asked)
    until = START + 40 * HOUR
    bedrock.run(until)
    planned = [x for x in asked if x.kind is not DemandKind.EMERGENCY]
    for x in planned:
        for (at, units), (then, _) in pairwise([*bedrock.seen, (until, 0)]):
            if then > x.start and at < x.end:
                assert units >= x.units, f"{units} of {x.units} units for {x.demand_id} at {at}"
    table = DEFAULT.timetable
    windows = timetable.demands(table, "sonnet", RehearsalClock(), START, until) if timed and table else []
    lead = CAPS.provisioning_lead
    naive = sum(
        x.units * math.ceil((min(x.end + CAPS.drain, until) - max(START, x.start - lead)) / HOUR)
        for x in [*asked, *windows]
        if max(START, x.start - lead) < until
    )
    # What stays is chosen for the time until the next fall only: once in some thousand cases that costs an hour more.
    assert sum(bedrock.unit_hours_by_day().values()) <= 1.02 * naive
