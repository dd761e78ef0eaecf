"""The capacity planner over random fleets, demands and failures."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from domain.capacity import (
    CapacityPlan,
    Demand,
    DemandKind,
    Order,
    ProvisionedModel,
    Situation,
    StepKind,
)
from domain.planner import plan
from domain.policy import CapacityPolicy, ModelPolicy, Policy, TimetablePolicy, TimetableWindow
from domain.purchases import Consent, Purchase

NOW = datetime(2026, 11, 23, 15, 5, tzinfo=UTC)
SONNET = Policy().models["sonnet"]
YOUNG = timedelta(minutes=10)


def spec(*, baseline: int = 15, floor: int = 0, ceiling: int = 30, quota: int | None = None) -> ModelPolicy:
    update = {"baseline_units": baseline, "floor_units": floor, "ceiling_units": ceiling, "quota_units": quota}
    return SONNET.model_copy(update=update)


def demand(units: int, demand_id: str = "d1", *, start: timedelta = timedelta(0), hours: float = 4) -> Demand:
    return Demand(
        demand_id=demand_id,
        model="sonnet",
        kind=DemandKind.EMERGENCY,
        units=units,
        start=NOW + start,
        end=NOW + start + timedelta(hours=hours),
        reason="throttles",
        asked_by="incident-x",
    )


def model(
    units: int,
    name: str,
    *,
    status: str = "InService",
    ours: bool = True,
    committed: bool = False,
    age: timedelta = timedelta(hours=1),
) -> ProvisionedModel:
    return ProvisionedModel.model_validate(
        {
            "arn": f"arn:{name}",
            "name": name,
            "units": units,
            "status": status,
            "ours": ours,
            "committed": committed,
            "created_at": NOW - age,
        }
    )


BASE = model(15, "base", ours=False)


def situation(fleet: list[ProvisionedModel] | None, demands: list[Demand], **update: object) -> Situation:
    fields = {"model": "sonnet", "spec": spec(), "policy": CapacityPolicy(), "now": NOW}
    return Situation.model_validate(fields | {"fleet": fleet, "demands": demands} | update)


def kinds(result: CapacityPlan) -> list[tuple[StepKind, int, bool]]:
    return [(step.kind, step.units, step.ready) for step in result.steps]


def test_an_emergency_buys_small_bursts_and_publishes_them_only_when_in_service() -> None:
    result = plan(situation([BASE], [demand(28)], routed=["arn:base"]))
    assert kinds(result) == [
        *[(StepKind.CREATE, units, True) for units in (5, 5, 3)],
        *[(StepKind.AWAIT, units, False) for units in (5, 5, 3)],
        *[(StepKind.PUBLISH, units, False) for units in (5, 5, 3)],
    ]
    assert result.routes == {"arn:base": 15}
    assert result.ends_at_units == result.desired_units == 28
    assert result.outcomes[0].status == "requested"
    orders = [step.order for step in result.steps if step.order]
    assert len({order.token for order in orders}) == len({order.name for order in orders}) == 3
    assert {order.until for order in orders} == {demand(28).end}


def test_without_demand_bursts_are_withdrawn_drained_and_deleted() -> None:
    fleet = [BASE, model(5, "burst")]
    result = plan(situation(fleet, [], routed=["arn:base", "arn:burst"]))
    assert kinds(result) == [(StepKind.WITHDRAW, 5, True), (StepKind.DRAIN, 5, False), (StepKind.DELETE, 5, False)]
    assert result.routes == {"arn:base": 15}


def test_a_smaller_sum_is_made_before_the_larger_is_broken() -> None:
    fleet = [BASE, model(5, "b1"), model(5, "b2"), model(5, "b3")]
    result = plan(situation(fleet, [demand(27)], spec=spec(ceiling=40), routed=[m.arn for m in fleet]))
    ready = [step for step in result.steps if step.ready]
    assert [(step.kind, step.units) for step in ready] == [(StepKind.CREATE, 2)]
    assert "arn:b3" in result.routes
    tight = plan(situation(fleet, [demand(27)], spec=spec(ceiling=30), routed=[m.arn for m in fleet]))
    assert tight.steps == ()
    assert "3 units too many stay" in tight.why_not


def test_ceiling_and_quota_limit_a_demand_and_the_outcome_says_so() -> None:
    result = plan(situation([BASE], [demand(50)], spec=spec(quota=20)))
    assert [step.units for step in result.steps if step.kind is StepKind.CREATE] == [5]
    assert "50 asked for, limited to 20" in result.outcomes[0].detail


def test_an_order_without_an_answer_is_asked_for_again_under_its_own_token() -> None:
    first = plan(situation([BASE], [demand(25)]))
    orders = [step.order for step in first.steps if step.order]
    again = plan(situation([BASE], [demand(25)], unanswered=orders[:1], next_sequence=3))
    tokens = [step.order.token for step in again.steps if step.order]
    assert tokens[0] == orders[0].token
    assert tokens[1] not in {order.token for order in orders}
    landed = plan(situation([BASE, model(5, orders[0].name)], [demand(25)], unanswered=orders[:1], next_sequence=3))
    assert orders[0].token not in [step.order.token for step in landed.steps if step.order]


def test_a_baseline_that_is_not_there_is_never_bought_and_the_plan_says_whose_it_is() -> None:
    result = plan(situation([], [demand(25)]))
    assert sum(step.units for step in result.steps if step.kind is StepKind.CREATE) == 10
    assert result.ends_at_units == 10
    assert "only 0 of the baseline's 15 units are there; buying them needs a person" in result.why_not
    assert result.outcomes[0].status == "requested"
    part = [model(10, "base", ours=False), model(5, "b1"), model(5, "b2")]
    arns = [m.arn for m in part]
    bought = plan(situation(part, [demand(25)], routed=arns))
    assert bought.steps == ()
    assert (bought.outcomes[0].status, bought.outcomes[0].units_in_service) == ("failed", 20)
    assert "only 10 of the baseline's 15 units" in bought.outcomes[0].detail
    after = plan(situation(part, [], routed=arns))
    assert [step.arn for step in after.steps if step.kind is StepKind.DELETE] == ["arn:b1", "arn:b2"]
    assert "only 10 of the baseline's 15 units" in after.summary
    calm = plan(situation([], []))
    assert (calm.steps, "needs a person" in calm.why_not) == ((), True)
    enough = plan(situation([model(10, "base", ours=False)], [demand(25), demand(18, "d2")]))
    assert sum(step.units for step in enough.steps if step.kind is StepKind.CREATE) == 10


def test_an_outcome_tells_only_what_was_read() -> None:
    unread = plan(situation(None, [demand(20)])).outcomes[0]
    assert (unread.status, unread.detail) == ("requested", "requested: 20 units; the fleet is being read")
    first = plan(situation([BASE], [demand(20)])).outcomes[0]
    assert first.detail == (
        "15 of 20 units in service; 15 of them get calls once their routes are published; 5 more being asked of AWS"
    )
    later = plan(
        situation([BASE, model(5, "b", status="Creating", age=YOUNG)], [demand(20)], routed=["arn:base"])
    ).outcomes[0]
    assert later.detail == "15 of 20 units in service; 5 more accepted by AWS and on the way"


def test_time_changes_the_plan_by_itself() -> None:
    later = demand(30, "later", start=timedelta(hours=1))
    result = plan(situation([BASE], [demand(10, hours=2), later]))
    assert result.desired_units == 15
    assert result.next_change_at == later.start - CapacityPolicy().provisioning_lead
    past = demand(30, "past", start=timedelta(hours=-5))
    assert plan(situation([BASE], [past])).ended == ("past",)


def test_nothing_is_done_while_the_fleet_is_unknown() -> None:
    result = plan(situation(None, [demand(30)], troubles=["AWS did not answer"]))
    assert result.steps == ()
    assert result.outcomes[0].status == "failed"
    assert "AWS did not answer" in result.outcomes[0].detail


def test_a_creation_that_does_not_end_is_replaced_and_released() -> None:
    timeout = CapacityPolicy().provisioning_timeout
    young = model(5, "slow", status="Creating", age=YOUNG)
    before = plan(situation([BASE, young], [demand(20)]))
    assert [step.kind for step in before.steps if step.name == "slow"] == [StepKind.AWAIT]
    assert before.next_change_at == young.created_at + timeout
    slow = model(5, "slow", status="Creating", age=timedelta(hours=1))
    after = plan(situation([BASE, slow], [demand(20)], routed=["arn:base"]))
    ready = [(step.kind, step.name == "slow", step.units) for step in after.steps if step.ready]
    assert ready == [(StepKind.CREATE, False, 5), (StepKind.AWAIT, True, 5), (StepKind.DELETE, True, 5)]
    assert (after.ends_at_units, after.why_not) == (20, "")


def test_a_creation_that_does_not_end_and_fills_the_quota_is_named() -> None:
    slow = model(5, "slow", status="Creating", age=timedelta(hours=1))
    result = plan(situation([BASE, slow], [demand(20)], spec=spec(quota=20)))
    assert not [step for step in result.steps if step.kind is StepKind.CREATE]
    assert result.ends_at_units == 15
    assert result.why_not == "5 units have to wait until 5 units in creation for over 0:30:00 come or can go"


def test_a_young_model_is_kept_for_its_minimum_hold() -> None:
    policy = CapacityPolicy(minimum_hold=timedelta(hours=1))
    fleet = [BASE, model(5, "young", age=timedelta(minutes=20))]
    result = plan(situation(fleet, [], policy=policy, routed=[m.arn for m in fleet]))
    assert result.steps == ()
    assert result.next_change_at == NOW + timedelta(minutes=35)
    assert "minimum hold" in result.why_not


def asked(kind: DemandKind, units: int, name: str, *, start: timedelta = timedelta(0), hours: float = 4) -> Demand:
    return demand(units, name, start=start, hours=hours).model_copy(update={"kind": kind, "asked_by": name})


def test_the_largest_demand_holds_features_add_and_the_plan_says_who_won() -> None:
    wishes = [
        asked(DemandKind.EMERGENCY, 18, "incident-x"),
        asked(DemandKind.EVENT, 22, "event-y"),
        asked(DemandKind.PERSON, 20, "ann"),
        asked(DemandKind.FEATURE, 2, "taste"),
        asked(DemandKind.FEATURE, 3, "voice", hours=1),
    ]
    result = plan(situation([BASE], wishes))
    assert result.desired_units == 27
    assert result.wanted_for == (
        "event-y until 2026-11-23 19:05:00 UTC (the largest; beside 20 of ann, 18 of incident-x, the policy's baseline "
        "of 15), 2 more for taste until 2026-11-23 19:05:00 UTC, 3 more for voice until 2026-11-23 16:05:00 UTC"
    )
    assert [(x.demand_id, x.units_wanted) for x in result.outcomes] == [
        ("incident-x", 23),
        ("event-y", 27),
        ("ann", 25),
        ("taste", 27),
        ("voice", 27),
    ]
    alone = plan(situation([BASE], wishes[3:]))
    assert (alone.desired_units, alone.steps[0].order and alone.steps[0].order.asked_by) == (20, "taste")


def test_units_are_bought_the_lead_time_ahead_and_released_at_the_end() -> None:
    lead, lag = CapacityPolicy().provisioning_lead, CapacityPolicy().provisioning_lag
    event = asked(DemandKind.EVENT, 20, "event-y", start=timedelta(hours=2), hours=3)
    before = plan(situation([BASE], [event]))
    assert before.steps[0].kind is StepKind.PUBLISH
    assert before.next_change_at == event.start - lead
    assert "units are bought from 2026-11-23 16:35:00 UTC on" in before.outcomes[0].detail
    assert [(x.at, x.units, x.wanted) for x in before.expected] == [
        (NOW, 15, 15),
        (event.start - lead + lag, 20, 15),
        (event.start, 20, 20),
        (event.end, 15, 15),
    ]
    assert (before.cost.unit_hours_so_far, before.cost.unit_hours_ahead) == (0, 5 * 4)
    assert before.cost.usd_ahead == 20 * 7.67
    due = plan(situation([BASE], [event], now=event.start - lead))
    assert [step.units for step in due.steps if step.kind is StepKind.CREATE] == [5]
    assert due.next_change_at == event.end


def test_the_timetables_units_are_bought_and_released_like_any_other() -> None:
    at = {"timetable": Policy().timetable, "policy": CapacityPolicy(), "spec": SONNET}
    evening = NOW.replace(hour=7, minute=30)  # 16:30 in Tokyo, half an hour before the evening's window
    fleet = [model(5, "one", age=timedelta(hours=9)), model(3, "two", age=timedelta(hours=9))]
    rise = plan(situation(fleet, [], now=evening, **at))
    orders = [step.order for step in rise.steps if step.order]
    assert [(x.units, x.asked_by) for x in orders] == [(5, "the timetable"), (2, "the timetable")]
    assert rise.next_change_at == evening + timedelta(minutes=30)
    night = evening.replace(hour=17, minute=0)
    fall = plan(situation(fleet, [], now=night, routed=[m.arn for m in fleet], **at))
    assert (fall.desired_units, fall.wanted_for) == (0, "nobody")
    assert [step.units for step in fall.steps if step.kind is StepKind.WITHDRAW] == [5, 3]
    foreign = plan(situation([model(15, "theirs", ours=False)], [], now=night, **at))
    assert not [step for step in foreign.steps if step.kind is StepKind.DELETE]
    assert "15 units are others'" in foreign.why_not


def test_bursts_end_where_the_wishes_will_fall_to_and_what_stays_is_one_base() -> None:
    flat = Policy(
        timetable=TimetablePolicy(windows=(TimetableWindow(start=time(0), end=time(0), units={"sonnet": 12}),))
    )
    event = asked(DemandKind.EVENT, 21, "event-y", hours=6)
    later = asked(DemandKind.PERSON, 14, "ann", start=timedelta(hours=2), hours=10)
    result = plan(situation([], [event, later], timetable=flat.timetable))
    assert [step.units for step in result.steps if step.kind is StepKind.CREATE] == [12, 2, 5, 2]


def test_of_models_that_are_alike_the_one_goes_whose_paid_hour_ends_first() -> None:
    ages = {"long": timedelta(minutes=70), "soon": timedelta(minutes=115), "middle": timedelta(minutes=90)}
    fleet = [BASE, *(model(5, name, age=age) for name, age in ages.items())]
    result = plan(situation(fleet, [demand(25)], routed=[m.arn for m in fleet]))
    assert [step.name for step in result.steps if step.kind is StepKind.DELETE] == ["soon"]


def test_what_is_wanted_again_before_its_paid_hour_ends_stays() -> None:
    burst = model(5, "burst", age=timedelta(minutes=65))
    again = asked(DemandKind.EVENT, 20, "event-y", start=timedelta(minutes=60), hours=1)
    kept = plan(situation([BASE, burst], [again], routed=["arn:base", "arn:burst"]))
    assert kept.steps == ()
    assert kept.why_not == "5 units stay, for they are wanted again before the hour ends that is paid for"
    far = asked(DemandKind.EVENT, 20, "event-y", start=timedelta(minutes=90), hours=1)
    gone = plan(situation([BASE, burst], [far], routed=["arn:base", "arn:burst"]))
    assert [step.name for step in gone.steps if step.ready] == ["burst"]


def test_units_too_many_stay_where_the_exact_sum_would_cost_more() -> None:
    burst = model(5, "burst", age=timedelta(minutes=65))
    result = plan(situation([BASE, burst], [demand(18, hours=0.5)], routed=["arn:base", "arn:burst"]))
    assert result.steps == ()
    assert result.why_not == "2 units too many stay: until the next change that costs less than the exact sum"


def test_a_model_that_nobody_wants_goes_before_its_first_hour_is_over() -> None:
    young = model(5, "young", age=timedelta(minutes=56))
    result = plan(situation([BASE, young], [], routed=["arn:base", "arn:young"]))
    assert [step.name for step in result.steps if step.ready] == ["young"]


def test_what_is_not_granted_is_named_with_what_is_asked_for_and_the_limit() -> None:
    none = plan(situation([], [asked(DemandKind.EVENT, 35, "event-y")], spec=spec(baseline=0, quota=0)))
    assert (none.desired_units, none.steps) == (0, ())
    assert none.why_not == "35 units are asked for, 0 are the limit (ceiling_units 30, quota_units 0)"
    assert none.outcomes[0].units_wanted == 0


def test_paused_nothing_is_bought_or_released_and_routes_go_on() -> None:
    fleet = [BASE, model(5, "burst"), model(5, "broken", status="Failed")]
    why = "ann: a drill"
    more = plan(situation(fleet, [demand(30)], paused=why))
    assert kinds(more) == [(StepKind.PUBLISH, 15, True), (StepKind.PUBLISH, 5, True)]
    assert more.why_not == "paused: ann: a drill"
    assert "paused: ann: a drill" in more.outcomes[0].detail
    less = plan(situation(fleet, [], paused=why, routed=["arn:base", "arn:burst"]))
    assert (less.steps, less.routes) == ((), {"arn:base": 15, "arn:burst": 5})


def test_over_a_daily_cap_a_person_is_asked_and_what_fits_is_bought() -> None:
    event = asked(DemandKind.EVENT, 25, "event-y", hours=7.5)
    tight = CapacityPolicy(max_unit_hours_per_day=60)
    result = plan(situation([BASE], [event], policy=tight))
    assert sum(step.units for step in result.steps if step.kind is StepKind.CREATE) == 7
    assert result.excess is not None
    assert (result.excess.units, result.excess.amount, result.excess.unit) == (3, 20, "unit-hours")
    assert (result.excess.asked_by, result.excess.until) == ("event-y", event.end)
    assert result.excess.text == (
        "25 units of sonnet, for event-y until 2026-11-23 22:35:00 UTC, would bring 2026-11-23 to 80 unit-hours "
        "(614 USD), 20 unit-hours over max_unit_hours_per_day 60; 3 of them wait for an approval"
    )
    assert result.excess.text in result.why_not
    assert result.excess.text in result.outcomes[0].detail
    assert result.outcomes[0].status == "requested"
    leave = Consent(excess_id=result.excess.excess_id, who="ann", amount=20, at=NOW, until=NOW + timedelta(hours=8))
    agreed = plan(situation([BASE], [event], policy=tight, consents=[leave]))
    assert sum(step.units for step in agreed.steps if step.kind is StepKind.CREATE) == 10
    assert agreed.excess is None
    money = plan(situation([BASE], [event], policy=CapacityPolicy(max_usd_per_day=500)))
    assert money.excess is not None
    assert (money.excess.units, money.excess.unit, round(money.excess.amount)) == (2, "USD", 114)


def test_what_was_paid_today_counts_for_the_cap_and_what_begins_later_is_asked_for_ahead() -> None:
    tight = CapacityPolicy(max_unit_hours_per_day=60)
    spent = Purchase(
        arn="arn:gone",
        name="gone",
        units=10,
        asked_by="incident-x",
        until=None,
        bought_at=NOW - timedelta(hours=5),
        ended_at=NOW - timedelta(hours=1, minutes=10),
    )
    event = asked(DemandKind.EVENT, 25, "event-y", hours=1.5)
    result = plan(situation([BASE], [event], policy=tight, purchases=[spent]))
    assert sum(step.units for step in result.steps if step.kind is StepKind.CREATE) == 10
    longer = asked(DemandKind.EVENT, 25, "event-y", hours=2.5)
    over = plan(situation([BASE], [longer], policy=tight, purchases=[spent]))
    assert sum(step.units for step in over.steps if step.kind is StepKind.CREATE) == 6
    later = asked(DemandKind.EVENT, 25, "event-z", start=timedelta(hours=4), hours=2.5)
    ahead = plan(situation([BASE], [event, later], policy=tight, purchases=[spent]))
    assert sum(step.units for step in ahead.steps if step.kind is StepKind.CREATE) == 10
    assert ahead.excess is not None
    assert ahead.excess.asked_by == "event-z"


def test_a_cap_does_not_take_away_what_was_bought_for_a_demand_that_still_stands() -> None:
    tight = CapacityPolicy(max_unit_hours_per_day=30)
    burst = model(10, "burst", age=timedelta(hours=2)).model_copy(update={"asked_by": "d1", "until": NOW})
    prolonged = asked(DemandKind.EMERGENCY, 25, "d1", hours=6)
    fleet, routed = [BASE, burst], ["arn:base", "arn:burst"]
    assert plan(situation(fleet, [prolonged], policy=tight, routed=routed)).steps == ()
    other = plan(situation(fleet, [asked(DemandKind.PERSON, 25, "ann", hours=6)], policy=tight, routed=routed))
    assert [step.name for step in other.steps if step.kind is StepKind.DELETE] == ["burst"]


@dataclass
class World:
    """A Bedrock that fails at will, and one writer that follows the plan."""

    spec: ModelPolicy
    demands: list[Demand]
    fleet: dict[str, ProvisionedModel]
    tokens: dict[str, str] = field(default_factory=dict)
    unanswered: list[Order] = field(default_factory=list)
    routed: set[str] = field(default_factory=set)
    sequence: int = 1
    faults: list[str] = field(default_factory=list)

    def plan(self) -> CapacityPlan:
        return plan(
            situation(
                list(self.fleet.values()),
                self.demands,
                spec=self.spec,
                policy=CapacityPolicy(minimum_hold=timedelta(0)),
                unanswered=self.unanswered,
                routed=self.routed,
                next_sequence=self.sequence,
            )
        )

    def units(self) -> int:
        return sum(m.units for m in self.fleet.values() if m.status != "Failed")

    def ours(self) -> int:
        return sum(m.units for m in self.fleet.values() if m.status != "Failed" and m.ours and not m.committed)

    def base(self) -> int:
        return self.units() - self.ours()

    def fault(self) -> str:
        return self.faults.pop() if self.faults else "none"

    def create(self, order: Order) -> None:
        fault = self.fault()
        self.sequence = max(self.sequence, order.sequence + 1)
        self.unanswered = [other for other in self.unanswered if other.token != order.token]
        if fault == "refused":
            return
        if fault == "unanswered and not done":
            self.unanswered.append(order)
            return
        if order.token not in self.tokens:
            self.tokens[order.token] = order.name
            status = "Failed" if fault == "failed" else "Creating"
            self.fleet[f"arn:{order.name}"] = model(order.units, order.name, status=status, age=YOUNG)
        if fault == "answer lost":
            self.unanswered.append(order)

    def take(self, result: CapacityPlan) -> None:
        for step in result.steps:
            arn = step.arn or ""
            if not step.ready:
                continue
            if step.kind is StepKind.CREATE:
                assert step.order is not None
                self.create(step.order)
            elif step.kind is StepKind.AWAIT:
                status = "Failed" if self.fault() == "failed" else "InService"
                self.fleet[arn] = self.fleet[arn].model_copy(update={"status": status})
            elif step.kind is StepKind.PUBLISH:
                assert self.fleet[arn].in_service
                self.routed.add(arn)
            elif step.kind is StepKind.WITHDRAW:
                self.routed.discard(arn)
            elif step.kind in (StepKind.DRAIN, StepKind.DELETE):
                assert arn not in self.routed
                assert self.fleet[arn].ours
                assert not self.fleet[arn].committed
                if self.fault() == "none":
                    del self.fleet[arn]


FAULTS = ["none", "refused", "unanswered and not done", "answer lost", "failed"]
models = st.builds(
    lambda units, status, ours, committed, age: (units, status, ours, committed, age),
    st.integers(1, 15),
    st.sampled_from(["InService", "Creating", "Failed", "Updating"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([YOUNG, timedelta(hours=1)]),
)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    ceiling = draw(st.integers(0, 40))
    baseline = draw(st.integers(0, ceiling))
    fleet = [
        model(units, f"m{number}", status=status, ours=ours, committed=committed, age=age)
        for number, (units, status, ours, committed, age) in enumerate(draw(st.lists(models, max_size=5)))
    ]
    return World(
        spec=spec(baseline=baseline, ceiling=ceiling, quota=draw(st.none() | st.integers(0, 40))),
        demands=[demand(units, f"d{n}") for n, units in enumerate(draw(st.lists(st.integers(0, 50), max_size=3)))],
        fleet={m.arn: m for m in fleet},
        routed=set(draw(st.sets(st.sampled_from([m.arn for m in fleet if m.in_service]))))
        if fleet and any(m.in_service for m in fleet)
        else set(),
        faults=draw(st.lists(st.sampled_from(FAULTS), max_size=12)),
    )


@settings(max_examples=300, deadline=None)
@given(worlds())
def test_any_fleet_ends_at_the_desired_sum_or_the_plan_says_why_not(world: World) -> None:
    theirs = {arn for arn, m in world.fleet.items() if not m.ours or m.committed}
    limit = min(world.spec.ceiling_units, world.spec.quota_units if world.spec.quota_units is not None else 10**9)
    most = max(limit, world.units())
    wanted = min(max([world.spec.baseline_units, *(d.units for d in world.demands)]), limit)
    promised = max(0, wanted - world.spec.baseline_units)
    for _ in range(60):
        result = world.plan()
        in_service = sum(m.units for m in world.fleet.values() if m.in_service)
        ours = world.ours()
        assert plan(situation(list(world.fleet.values()), world.demands, spec=world.spec)).desired_units <= limit
        if not any(step.ready for step in result.steps):
            break
        world.take(result)
        assert world.units() <= most
        assert theirs <= world.fleet.keys()
        # What was enough stays enough: made before broken.
        after = sum(m.units for m in world.fleet.values() if m.in_service)
        assert after >= min(in_service, result.desired_units, world.base() + promised)
        # Ours are at most what was promised over the baseline; another sum of them stands beside the one it replaces.
        leaving = sum(step.units for step in result.steps if step.kind is StepKind.DELETE)
        assert world.ours() <= max(ours, promised + leaving)
    else:
        raise AssertionError("the plan never comes to an end")
    assert not result.steps, "a step is left that nothing makes ready"
    assert world.units() == result.ends_at_units
    assert result.ends_at_units == result.desired_units or result.why_not
    if world.ours() > promised:
        assert "units too many stay" in result.why_not
    assert ("needs a person" in result.why_not) == (world.base() < min(world.spec.baseline_units, wanted))
    assert world.routed == {arn for arn, m in world.fleet.items() if m.in_service}
    assert not [m for m in world.fleet.values() if m.status == "Failed" and m.arn not in theirs and m.ours]
    world.demands = []
    for _ in range(20):
        result = world.plan()
        world.take(result)
    assert world.ours() == 0, "without a demand nothing of ours stays"
    bought = sum(1 for m in world.fleet.values() if m.name.startswith("runbooks-"))
    assert bought <= len(world.tokens)


def test_names_and_tokens_are_the_same_for_the_same_order_and_fit_aws() -> None:
    one, two = (plan(situation([], [demand(30)])).steps[0].order for _ in range(2))
    assert one == two
    assert one is not None
    long = CapacityPolicy(name_prefix="läuft--" * 20)
    order = plan(situation([], [demand(30)], policy=long, next_sequence=10**9)).steps[0].order
    assert order is not None
    assert len(order.name) <= 63
