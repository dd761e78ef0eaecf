"""A year of timetable, calendar events, surges and faults against the planner: `python -m bench.capacity_year`.

The planner is driven as `CapacityWorkflow` drives it (`_capacity_loop`), on virtual time, against an in-process Bedrock
that fails as Bedrock does (`_virtual_bedrock`), by the calendar and by emergencies (`_capacity_desks`), through years
drawn from seeds (`_random_year`). In the same years:

- `oracle`: the least that is to be paid for the need, known ahead, by the hour and with the shortest lag (`_oracle`:
  exact, so a bound). The need is, in each minute, the largest of the timetable, of each event that took place from its
  lead time (or its announcement, if that came later) to its end, and, where the load is over both, of what carries the
  load at the unplanned target utilisation; within ceiling and quota;
- `hindsight`: the same bound for the part of the need that the planner served;
- `always evening peak`: the evening's units all day, as scenario 2 found them; `always year's peak`: the largest need
  all year. Nothing befalls either;
- `three cron rules`: the runbook's (02:00, 06:00 and 17:00): no lead, no afternoon, no events, one call each, the same
  faults.

Late: minutes from an event's start until the units it wants, within ceiling and quota, are in service. Feasible: they
are within both, and the calendar said so a provisioning lead and a sync ahead of the start. Escalated in time: before
the lead time begins, or at once where the calendar said so later. Under demand: minutes in which a model's load is over
what its units in service carry; with none, on-demand carries its quota. Leaked: in service after its minimum hold for
over a paid hour and two reconciliations without being wanted by anybody, while management calls were answered.
"""

import argparse
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from rich.table import Table

from bench._capacity_desks import EmergencyDesk, EventDesk
from bench._capacity_loop import CapacityLoop, VirtualTime
from bench._harness import RESULTS, Figure, console, progress, publish
from bench._oracle import cheapest
from bench._random_year import BEGIN, DAY_MINUTES, MINUTE, TOKYO, Entry, Year, draw, minute_of
from bench._virtual_bedrock import HOUR, SHORTEST_LAG, Bought, Refused, VirtualBedrock
from domain.capacity import Demand, Order
from domain.clock import RehearsalClock
from domain.load import units_for
from domain.policy import Policy
from domain.pre_provisioning import size_of, times_of
from domain.timetable import changes, units_at

SEEDS = (1, 2, 3, 4, 5)
DAYS = 365
COST_AIM_PERCENT = 10
CRON_HOURS = (2, 6, 17)
"""In Tokyo."""
CLOCK = RehearsalClock()

PLANNER, ORACLE, HINDSIGHT = "planner", "oracle", "hindsight"
EVENING, PEAK, CRON = "always evening peak", "always year's peak", "three cron rules"

Minutes = NDArray[np.int_]


@dataclass(frozen=True)
class Account:
    """What one policy bought and gave in one year, of all models."""

    unit_hours: int
    usd: float
    usd_by_day: NDArray[np.float64]
    models_bought: int
    under_demand_minutes: int
    late_minutes: Mapping[str, int]
    """By event that took place: the worst model's."""
    served: Mapping[str, Minutes]
    """Units in service in every minute, by model."""


@dataclass(frozen=True)
class Run:
    """How the planner came to its account."""

    account: Account
    bought: Mapping[str, Sequence[Bought]]
    escalated: Mapping[str, Sequence[datetime]]
    leaked_unit_hours: float
    emergencies: int
    plans: int
    consents: int
    refused_calls: int


# ------------------------------------------------------------ the policies


def run_planner(policy: Policy, year: Year) -> Run:
    """The year with the planner."""
    time = VirtualTime(BEGIN)
    bedrocks = {model: _bedrock(policy, year, model) for model in policy.models}
    loops = {model: CapacityLoop(time, policy, model, bedrock) for model, bedrock in bedrocks.items()}
    events = EventDesk(time, policy, loops, year.entries)
    emergencies = {model: EmergencyDesk(time, policy, model, loop) for model, loop in loops.items()}
    chance = random.Random(year.seed)

    def somebody_deletes(model: str) -> None:
        if _delete_one(bedrocks[model], chance, time.now):
            loops[model].note_served()

    for at, model in _deletions(policy, year):
        time.at(at, partial(somebody_deletes, model))
    for minute in range(year.days * DAY_MINUTES):
        time.run(BEGIN + (minute + 1) * MINUTE)
        for model, desk in emergencies.items():
            desk.minute(float(year.load[model][minute]))
    bought = {model: bedrock.bought for model, bedrock in bedrocks.items()}
    return Run(
        account=account(policy, year, bought, {model: by_minute(loop.served, year) for model, loop in loops.items()}),
        bought=bought,
        escalated=events.escalated,
        leaked_unit_hours=sum(leaked(policy, year, model, bedrocks[model], loops[model]) for model in policy.models),
        emergencies=sum(desk.count for desk in emergencies.values()),
        plans=sum(loop.plans for loop in loops.values()),
        consents=sum(loop.consents for loop in loops.values()),
        refused_calls=sum(bedrock.refusals.total() for bedrock in bedrocks.values()),
    )


def _bedrock(policy: Policy, year: Year, model: str) -> VirtualBedrock:
    number = sorted(policy.models).index(model)
    return VirtualBedrock(policy.models[model].most_units, year.faults, 100 * year.seed + number)


def _deletions(policy: Policy, year: Year) -> list[tuple[datetime, str]]:
    chance = random.Random(year.seed)
    return [(at, chance.choice(sorted(policy.models))) for at in year.faults.deletions]


def _delete_one(bedrock: VirtualBedrock, chance: random.Random, now: datetime) -> bool:
    settled = [bought.arn for bought in bedrock.alive.values() if bought.settled_at <= now]
    if settled:
        bedrock.remove(chance.choice(settled), now)
    return bool(settled)


def run_cron(policy: Policy, year: Year) -> Account:
    """Each rule sets what the timetable says from then on, at that moment, with one call."""
    chance = random.Random(year.seed)
    bedrocks = {model: _bedrock(policy, year, model) for model in policy.models}
    rules = [BEGIN + timedelta(days=day, hours=hour) for day in range(year.days) for hour in CRON_HOURS]
    moments: list[tuple[datetime, str | None]] = [(at, None) for at in rules]
    moments += _deletions(policy, year)
    for at, deleted in sorted(moments, key=lambda moment: moment[0]):
        if deleted is not None:
            _delete_one(bedrocks[deleted], chance, at)
            continue
        for model, bedrock in bedrocks.items():
            _cron_rule(bedrock, units_at(policy, model, at), at)
    bought = {model: bedrock.bought for model, bedrock in bedrocks.items()}
    return account(
        policy, year, bought, {model: by_minute(service(all_of, year), year) for model, all_of in bought.items()}
    )


def _cron_rule(bedrock: VirtualBedrock, units: int, now: datetime) -> None:
    have = sum(model.units for model in bedrock.alive.values())
    try:
        for model in reversed(bedrock.list(now)):
            if have - model.units >= units:
                bedrock.delete(model.arn, now)
                have -= model.units
        if have < units:
            name = f"cron-{now:%Y%m%d%H}"
            order = Order(name=name, token=name, units=units - have, asked_by="cron", until=now + HOUR, sequence=1)
            bedrock.create(order, now)
    except Refused:
        return  # nobody looks; the next rule sets its own units


def run_constant(policy: Policy, year: Year, units: Mapping[str, int]) -> Account:
    """So many units all year."""
    bought = {model: [Bought("", "", count, BEGIN, BEGIN, fails=False)] for model, count in units.items()}
    return account(policy, year, bought, {model: by_minute([(BEGIN, count)], year) for model, count in units.items()})


def run_oracle(policy: Policy, year: Year, needs: Mapping[str, Minutes]) -> Account:
    """The least that these needs cost."""
    bought = {}
    for model, need in needs.items():
        bought[model] = [
            Bought(
                "",
                "",
                1,
                at := BEGIN + rental.asked_at_minute * MINUTE,
                at + SHORTEST_LAG,
                False,
                at + rental.hours * HOUR,
            )
            for rental in cheapest(need, SHORTEST_LAG // MINUTE)
        ]
    return account(policy, year, bought, needs)


def need_of(policy: Policy, year: Year, model: str) -> Minutes:
    """Units that hindsight would have in service in each minute."""
    spec = policy.models[model]
    planned = timetable_units(policy, year, model)
    for entry in year.entries:
        event = entry.final
        if event is not None and model in event.models:
            times = times_of(event, policy, CLOCK)
            here = _slice(year, max(times.needed_at, entry.versions[-1][0]), times.ends_at)
            planned[here] = np.maximum(planned[here], size_of(event, model, policy, CLOCK).needed_units)
    load, target = year.load[model], policy.capacity.unplanned_target_utilisation
    need = planned.copy()
    for minute in np.flatnonzero(load > carried(policy, model, planned)):
        need[minute] = max(need[minute], units_for(float(load[minute]), spec, target))
    return np.minimum(need, spec.most_units)


# ------------------------------------------------------------ accounts


def account(
    policy: Policy, year: Year, bought: Mapping[str, Sequence[Bought]], served: Mapping[str, Minutes]
) -> Account:
    """What was bought is paid for by the hours begun; what was served is compared with load and events."""
    unit_hours, by_day = 0, np.zeros(year.days)
    for model, all_of in bought.items():
        price = policy.models[model].usd_per_unit_hour or 0
        for one in all_of:
            hours = one.hours(year.end)
            unit_hours += one.units * hours
            days = np.clip((minute_of(one.created_at) + 60 * np.arange(hours)) // DAY_MINUTES, 0, year.days - 1)
            np.add.at(by_day, days, one.units * price)
    return Account(
        unit_hours=unit_hours,
        usd=float(by_day.sum()),
        usd_by_day=by_day,
        models_bought=sum(map(len, bought.values())),
        under_demand_minutes=sum(
            int((year.load[model] > carried(policy, model, units)).sum()) for model, units in served.items()
        ),
        late_minutes={
            entry.event_id: max(_late(policy, year, entry, model, units) for model, units in served.items())
            for entry in year.entries
            if entry.final is not None
        },
        served=served,
    )


def carried(policy: Policy, model: str, units: Minutes) -> NDArray[np.float64]:
    """Tokens/s that so many units carry; without any, the on-demand quota."""
    spec = policy.models[model]
    return np.where(units > 0, units * spec.tokens_per_second_per_unit, spec.on_demand_tokens_per_second)


def timetable_units(policy: Policy, year: Year, model: str) -> Minutes:
    """By minute."""
    return by_minute([(BEGIN, units_at(policy, model, BEGIN)), *changes(policy, model, BEGIN, year.end)], year)


def service(bought: Iterable[Bought], year: Year) -> list[tuple[datetime, int]]:
    """The units in service from each moment on."""
    steps = [(BEGIN, 0)]
    for model in bought:
        until = model.deleted_at or year.end
        if not model.fails and model.settled_at < until:
            steps += [(model.settled_at, model.units), (until, -model.units)]
    steps.sort(key=lambda step: step[0])
    totals = np.cumsum([units for _, units in steps])
    return [(at, int(total)) for (at, _), total in zip(steps, totals, strict=True)]


def by_minute(steps: Sequence[tuple[datetime, int]], year: Year) -> Minutes:
    """The fewest units within each minute, from those since each moment."""
    fewest = np.full(year.days * DAY_MINUTES, np.iinfo(int).max)
    for (at, units), (then, _) in pairwise([*steps, (year.end, 0)]):
        here = _slice(year, at, then)
        fewest[here] = np.minimum(fewest[here], units)
    return fewest


def _slice(year: Year, since: datetime, until: datetime) -> slice:
    """The minutes that have a part of it."""
    return slice(max(0, minute_of(since)), max(0, min(year.days * DAY_MINUTES, -((BEGIN - until) // MINUTE))))


def _late(policy: Policy, year: Year, entry: Entry, model: str, units: Minutes) -> int:
    event = entry.final
    assert event is not None
    times = times_of(event, policy, CLOCK)
    enough = units[_slice(year, times.starts_at, times.ends_at)] >= size_of(event, model, policy, CLOCK).units
    return int(enough.argmax()) if enough.any() else len(enough)


def feasible(policy: Policy, entry: Entry) -> bool:
    """Whether the event's units may be had, and were asked for early enough."""
    event = entry.final
    assert event is not None
    asked = entry.versions[-1][0] + policy.calendar.sync_interval
    return asked + policy.capacity.provisioning_lead <= event.starts_at and all(
        size_of(event, model, policy, CLOCK).feasible for model in event.models
    )


def escalated_in_time(policy: Policy, entry: Entry, at: Sequence[datetime]) -> bool:
    """Whether one of the escalations is of the entry as it was last, and early enough."""
    event = entry.final
    assert event is not None
    said = entry.versions[-1][0]
    by = max(said + policy.calendar.sync_interval, times_of(event, policy, CLOCK).needed_at)
    return any(said <= moment <= by for moment in at)


def leaked(policy: Policy, year: Year, model: str, bedrock: VirtualBedrock, loop: CapacityLoop) -> float:
    """Unit-hours; see the module."""
    capacity = policy.capacity
    lead, patience = capacity.provisioning_lead // MINUTE, (HOUR + 2 * capacity.reconcile_interval) // MINUTE
    timetable = timetable_units(policy, year, model)
    wanted = np.maximum.reduce([np.roll(timetable, -ahead) for ahead in range(lead + 1)])
    standing: dict[str, tuple[datetime, Demand]] = {}
    for at, demand_id, demand in [*loop.asked, *((year.end, demand_id, None) for _, demand_id, _ in loop.asked)]:
        if demand_id in standing:
            since, before = standing.pop(demand_id)
            here = _slice(year, max(since, before.start - capacity.provisioning_lead), min(at, before.end))
            wanted[here] = np.maximum(wanted[here], before.units)
        if demand is not None:
            standing[demand_id] = (at, demand)
    spare = by_minute(service(bedrock.bought, year), year) - np.minimum(wanted, policy.models[model].most_units)
    for span in (*year.faults.denied, *year.faults.throttled):
        spare[_slice(year, span.start, span.end)] = 0
    leaks = 0
    for one in bedrock.bought:
        run = 0
        settled = max(one.settled_at, one.created_at + capacity.minimum_hold)
        for units in spare[_slice(year, settled, one.deleted_at or year.end)]:
            run = run + 1 if units >= one.units else 0
            leaks += one.units * (run > patience)
    return leaks / 60


# ------------------------------------------------------------ one year


@dataclass(frozen=True)
class Week:
    """An excerpt for the plot: units of one model, by minute."""

    model: str
    first_minute: int
    load_units: NDArray[np.float64]
    """What the load would fill whole."""
    units: Mapping[str, Minutes]
    """By policy."""


@dataclass(frozen=True)
class Results:
    """What one year showed."""

    seed: int
    rows: Mapping[str, Mapping[str, float]]
    """Figures by policy."""
    usd_by_day: Mapping[str, NDArray[np.float64]]
    facts: Mapping[str, float]
    """Of the year and of the planner's run."""
    week: Week


def one_year(seed: int, days: int = DAYS, policy: Policy | None = None) -> Results:
    """Every policy through the year of one seed."""
    policy = policy or Policy()
    year = draw(policy, seed, days)
    run = run_planner(policy, year)
    needs = {model: need_of(policy, year, model) for model in policy.models}
    served = {model: np.minimum(need, run.account.served[model]) for model, need in needs.items()}
    evening = {model: int(timetable_units(policy, year, model).max()) for model in policy.models}
    accounts = {
        PLANNER: run.account,
        ORACLE: run_oracle(policy, year, needs),
        HINDSIGHT: run_oracle(policy, year, served),
        EVENING: run_constant(policy, year, evening),
        PEAK: run_constant(policy, year, {model: int(need.max()) for model, need in needs.items()}),
        CRON: run_cron(policy, year),
    }
    took_place = [entry for entry in year.entries if entry.final is not None]
    may_be = [entry for entry in took_place if feasible(policy, entry)]
    may_not = [entry for entry in took_place if entry not in may_be]
    unheard = [x for x in may_not if not escalated_in_time(policy, x, run.escalated.get(x.event_id, ()))]
    return Results(
        seed=seed,
        rows={name: _row(of, accounts[ORACLE], may_be) for name, of in accounts.items()},
        usd_by_day={name: of.usd_by_day for name, of in accounts.items()},
        facts={
            "events": len(took_place),
            "infeasible events": len(may_not),
            "infeasible events not escalated in time": len(unheard),
            "leaked unit-hours": run.leaked_unit_hours,
            "emergencies": run.emergencies,
            "plans": run.plans,
            "agreed to over a cap": run.consents,
            "refused calls": run.refused_calls,
            "failed creations": sum(one.fails for all_of in run.bought.values() for one in all_of),
            "deleted by somebody": len(year.faults.deletions),
        },
        week=_week(policy, year, {name: accounts[name].served for name in (PLANNER, ORACLE, CRON)}),
    )


def _row(of: Account, oracle: Account, may_be: Sequence[Entry]) -> dict[str, float]:
    late = [of.late_minutes[entry.event_id] for entry in may_be]
    return {
        "usd": round(of.usd),
        "of_oracle": of.usd / oracle.usd,
        "unit_hours": of.unit_hours,
        "models_bought": of.models_bought,
        "under_demand_minutes": of.under_demand_minutes,
        "late_minutes_feasible": sum(late),
        "late_events_feasible": sum(minutes > 0 for minutes in late),
        "late_minutes_all": sum(of.late_minutes.values()),
    }


def _week(policy: Policy, year: Year, served: Mapping[str, Mapping[str, Minutes]]) -> Week:
    """The week, from a Saturday on, in which most begins that is not ordinary, for the model that costs most."""
    model = max(policy.models, key=lambda name: timetable_units(policy, year, name).sum())
    starts = [entry.final.starts_at for entry in year.entries if entry.final] + [x.starts_at for x in year.surges]
    weeks = range(DAY_MINUTES, max(DAY_MINUTES + 1, (year.days - 7) * DAY_MINUTES), 7 * DAY_MINUTES)
    first = max(weeks, key=lambda minute: sum(minute <= minute_of(at) < minute + 7 * DAY_MINUTES for at in starts))
    here = slice(first, first + 7 * DAY_MINUTES)
    return Week(
        model=model,
        first_minute=first,
        load_units=year.load[model][here] / policy.models[model].tokens_per_second_per_unit,
        units={name: by_model[model][here] for name, by_model in served.items()},
    )


# ------------------------------------------------------------ what is shown

_COLOURS = {
    PLANNER: "#1d4f91",
    ORACLE: "#4d7c2a",
    HINDSIGHT: "#6b4c9a",
    EVENING: "#b3541e",
    PEAK: "#b00020",
    CRON: "#777777",
}
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "capacity-year",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plot(results: Results, path: Path) -> None:
    """What each policy had cost by each day of one year, and a week of units."""
    with mpl.rc_context(_SETTINGS):
        figure = Plot(figsize=(10, 8), layout="constrained")
        FigureCanvasSVG(figure)
        cost, week = figure.subplots(2, 1)
        days = [BEGIN + timedelta(days=day) for day in range(len(results.usd_by_day[PLANNER]))]
        for name, usd in results.usd_by_day.items():
            if name != HINDSIGHT:  # it lies on the oracle's
                style = "--" if name == ORACLE else "-"
                cost.plot(days, usd.cumsum() / 1000, style, color=_COLOURS[name], label=name)
        cost.set_title(f"Cost of provisioned units so far, all models, seed {results.seed}", loc="left")
        cost.set_ylabel("thousand USD")
        cost.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        excerpt = results.week
        minutes = [BEGIN + (excerpt.first_minute + minute) * MINUTE for minute in range(len(excerpt.load_units))]
        every = 10
        week.fill_between(minutes[::every], excerpt.load_units[::every], color="#dddddd", label="load, in full units")
        for name, units in excerpt.units.items():
            steps = np.flatnonzero(np.diff(units, prepend=-1, append=-1))
            steps[-1] = min(steps[-1], len(minutes) - 1)
            at = [minutes[step] for step in steps]
            label = "need, known ahead" if name == ORACLE else name
            style = "--" if name == ORACLE else "-"
            week.step(at, units[steps], style, where="post", color=_COLOURS[name], label=label)
        week.set_title(f"Units of {excerpt.model} in service, in the week with most events and surges", loc="left")
        week.set_ylabel("units")
        for axes in (cost, week):
            locator = AutoDateLocator(tz=TOKYO)  # type: ignore[no-untyped-call]
            axes.xaxis.set_major_locator(locator)
            formatter = ConciseDateFormatter(locator, tz=TOKYO)  # type: ignore[no-untyped-call]
            axes.xaxis.set_major_formatter(formatter)
            axes.legend(loc="upper left", frameon=False)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def table(years: Sequence[Results]) -> Table:
    """Every policy's figures: the mean of the years; the spread of what it cost beside the oracle."""
    columns = {
        "usd": ("USD", "{:,.0f}"),
        "of_oracle": ("÷ oracle", "{:.3f}"),
        "unit_hours": ("unit-\nhours", "{:,.0f}"),
        "under_demand_minutes": ("min under\ndemand", "{:,.0f}"),
        "late_minutes_feasible": ("min late,\nfeasible", "{:,.0f}"),
        "late_minutes_all": ("min late,\nall", "{:,.0f}"),
    }
    shown = Table("policy", padding=0, title=f"One year: mean of {len(years)} seeds")
    for title, _ in columns.values():
        shown.add_column(title, justify="right", no_wrap=True)
    for name in years[0].rows:
        cells = []
        for key, (_, form) in columns.items():
            values = [year.rows[name][key] for year in years]
            spread = f"\n{form.format(min(values))}–{form.format(max(values))}" if key == "of_oracle" else ""
            cells.append(form.format(sum(values) / len(values)) + spread)
        shown.add_row(name, *cells)
    return shown


def figures(years: Sequence[Results]) -> list[Figure]:
    """The planner's, with the aims, and what the others cost."""

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(years)

    def over(name: str, base: str = ORACLE) -> list[float]:
        return [100 * (year.rows[name]["usd"] / year.rows[base]["usd"] - 1) for year in years]

    def fact(name: str) -> float:
        return sum(year.facts[name] for year in years)

    planner = [year.rows[PLANNER] for year in years]
    return [
        Figure("cost over the oracle's, worst year", max(over(PLANNER)), "%", COST_AIM_PERCENT),
        Figure("cost over the oracle's, mean", mean(over(PLANNER)), "%"),
        Figure("cost over hindsight's, worst year", max(over(PLANNER, HINDSIGHT)), "%", COST_AIM_PERCENT),
        Figure("late at feasible events, all years", sum(row["late_minutes_feasible"] for row in planner), "min", 0),
        Figure("infeasible events, all years", fact("infeasible events"), "events"),
        Figure("of them not escalated in time", fact("infeasible events not escalated in time"), "events", 0),
        Figure("leaked, all years", fact("leaked unit-hours"), "unit-hours", 0),
        Figure("under demand, a year", mean(row["under_demand_minutes"] for row in planner), "min"),
        *(
            Figure(f"{name}: under demand, a year", mean(x.rows[name]["under_demand_minutes"] for x in years), "min")
            for name in (ORACLE, EVENING, PEAK, CRON)
        ),
        *(Figure(f"{name}: cost over oracle's", mean(over(name)), "%") for name in (EVENING, PEAK, CRON)),
    ]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m bench.capacity_year", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="one year each")
    parser.add_argument("--days", type=int, default=DAYS, help="length of each year")
    given = parser.parse_args()
    with ProcessPoolExecutor() as pool:
        waiting = [pool.submit(one_year, seed, given.days) for seed in given.seeds]
        years = [future.result() for future in progress(waiting, "years")]
    console.print(table(years))
    plot(years[0], RESULTS / "capacity_year.svg")
    found = figures(years)
    publish(
        "capacity_year",
        found,
        days=given.days,
        years=[{"seed": year.seed, "policies": year.rows, "facts": year.facts} for year in years],
    )
    missed = [figure.name for figure in found if figure.met is False]
    if missed:
        console.print(f"over its aim: {'; '.join(missed)}", style="bold red")


if __name__ == "__main__":
    main()
