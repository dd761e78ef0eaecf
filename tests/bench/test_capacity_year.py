"""The year of capacity: what is paid, what the oracle is, and that nothing leaks, on a few virtual days."""

import math
from datetime import timedelta
from itertools import pairwise, permutations

import numpy as np
import pytest

from bench._oracle import assignment, cheapest
from bench._random_year import BEGIN, MINUTE, Faults, Span, draw
from bench._virtual_bedrock import HOUR, Bought, Refused, VirtualBedrock
from bench.capacity_year import EVENING, HINDSIGHT, ORACLE, PLANNER, by_minute, need_of, one_year, run_planner, service
from domain.capacity import Order
from domain.errors import ErrorKind
from domain.policy import Policy

DAYS = 8
"""From a Friday on: a Monday is among them."""
LAG = 10
CALM = Faults((), (), (), (), failed_share=0, stuck_share=0, unanswered_share=0)


def order(units: int, number: int = 1) -> Order:
    return Order(name=f"m-{number}", token=f"t{number}", units=units, asked_by="x", until=BEGIN + HOUR, sequence=number)


def spent(steps: list[tuple[int, int]]) -> int:
    """Unit-hours of the cheapest cover of units from each minute on."""
    need = np.zeros(steps[-1][0], dtype=int)
    for (start, units), (end, _) in pairwise(steps):
        need[start:end] = units
    rentals = cheapest(need, LAG)
    given = np.zeros(len(need) + 48 * 60, dtype=int)
    for rental in rentals:
        given[max(0, rental.asked_at_minute + LAG) : rental.asked_at_minute + 60 * rental.hours] += 1
    assert (given[: len(need)] >= need).all()
    return sum(rental.hours for rental in rentals)


@pytest.mark.parametrize(
    ("steps", "hours"),
    [
        ([(60, 10), (600, 0)], 10 * 10),  # 9 h and the lag are 10 h begun
        ([(60, 1), (110, 0)], 1),
        ([(60, 1), (111, 0)], 2),
        ([(60, 1), (120, 0), (150, 1), (210, 0)], 3),  # kept: twice would be 4
        ([(60, 1), (110, 0), (350, 1), (400, 0)], 2),  # let go for 4 h
        ([(60, 1), (90, 2), (110, 1), (140, 0)], 2),  # one rental after the other, each of an hour
        ([(0, 5), (360, 8), (660, 15), (1200, 0)], 5 * 21 + 3 * 15 + 7 * 10),  # scenario 2's day
    ],
)
def test_the_oracle_pays_the_least_in_whole_hours(steps: list[tuple[int, int]], hours: int) -> None:
    assert spent(steps) == hours


def test_the_assignment_is_the_cheapest_of_all() -> None:
    chance = np.random.default_rng(3)
    for size in (1, 2, 4, 6):
        cost = chance.integers(0, 9, (size, size)).astype(float)
        chosen = assignment(cost)
        assert sorted(chosen) == list(range(size))
        least = min(sum(cost[i, j] for i, j in enumerate(way)) for way in permutations(range(size)))
        assert sum(cost[i, j] for i, j in enumerate(chosen)) == least


def test_bedrock_gives_one_model_for_one_token_within_quota_and_bills_hours_begun() -> None:
    bedrock = VirtualBedrock(10, CALM, 1)
    arn = bedrock.create(order(6), BEGIN)
    assert bedrock.create(order(6), BEGIN) == arn
    with pytest.raises(Refused, match="10 model units granted") as refused:
        bedrock.create(order(5, 2), BEGIN)
    assert refused.value.kind is ErrorKind.QUOTA_EXCEEDED
    with pytest.raises(Refused, match="being created"):
        bedrock.delete(arn, BEGIN + MINUTE)
    model = bedrock.alive[arn]
    assert timedelta(minutes=10) <= model.settled_at - BEGIN <= timedelta(minutes=15)
    bedrock.delete(arn, BEGIN + timedelta(minutes=61))
    bedrock.delete(arn, BEGIN + timedelta(minutes=70))
    assert (bedrock.list(BEGIN + HOUR), model.hours(BEGIN + 9 * HOUR)) == ((), 2)


def test_a_denied_call_changes_nothing_and_a_failed_creation_costs_nothing() -> None:
    denied = (Span(BEGIN, BEGIN + HOUR),)
    bedrock = VirtualBedrock(10, Faults(denied, (), (), (), failed_share=1, stuck_share=0, unanswered_share=0), 1)
    with pytest.raises(Refused) as refused:
        bedrock.create(order(1), BEGIN)
    assert (refused.value.kind, bedrock.bought) == (ErrorKind.ACCESS_DENIED, [])
    bedrock.create(order(1), BEGIN + HOUR)
    assert [model.status for model in bedrock.list(BEGIN + 2 * HOUR)] == ["Failed"]
    assert bedrock.bought[0].hours(BEGIN + 2 * HOUR) == 0


def test_units_count_in_minutes_that_they_serve_whole() -> None:
    year = draw(Policy(), 1, DAYS)
    one = Bought("a", "a", 5, BEGIN, BEGIN + 10.5 * MINUTE, fails=False, deleted_at=BEGIN + 60.5 * MINUTE)
    units = by_minute(service([one], year), year)
    assert np.flatnonzero(units).tolist() == list(range(11, 60))


def test_the_planner_pays_for_hours_begun_stays_within_quota_and_leaks_nothing() -> None:
    policy = Policy()
    year = draw(policy, 2, DAYS)
    run = run_planner(policy, year)
    unit_hours, usd = 0, 0.0
    for model, bought in run.bought.items():
        spec = policy.models[model]
        for one in bought:
            hours = 0 if one.fails else math.ceil(((one.deleted_at or year.end) - one.created_at) / HOUR)
            unit_hours += one.units * hours
            usd += one.units * hours * (spec.usd_per_unit_hour or 0)
        moments = sorted((at, units) for one in bought for at, units in _comes_and_goes(one))
        assert max(np.cumsum([units for _, units in moments])) <= spec.most_units
        # Nothing is served that was not bought.
        assert (run.account.served[model] <= by_minute(service(bought, year), year)).all()
        assert need_of(policy, year, model).max() <= spec.most_units
    assert run.account.unit_hours == unit_hours
    assert run.account.usd == pytest.approx(usd)
    assert run.leaked_unit_hours == 0


def _comes_and_goes(one: Bought) -> list[tuple[float, int]]:
    """Deletions first where both fall on one moment."""
    came = [((one.created_at - BEGIN).total_seconds(), one.units)]
    return came + ([((one.deleted_at - BEGIN).total_seconds(), -one.units)] if one.deleted_at else [])


def test_a_year_of_days_is_the_same_again_and_the_oracle_is_a_bound() -> None:
    first, again = one_year(4, DAYS), one_year(4, DAYS)
    assert (first.rows, first.facts) == (again.rows, again.facts)
    rows = first.rows
    assert rows[HINDSIGHT]["usd"] <= rows[ORACLE]["usd"] <= rows[EVENING]["usd"]
    assert rows[HINDSIGHT]["usd"] <= rows[PLANNER]["usd"]
    assert (rows[ORACLE]["late_minutes_feasible"], rows[PLANNER]["late_minutes_feasible"]) == (0, 0)
    assert rows[ORACLE]["under_demand_minutes"] <= rows[PLANNER]["under_demand_minutes"]
    assert first.facts["events"] > 0
    assert first.facts["leaked unit-hours"] == first.facts["infeasible events not escalated in time"] == 0
