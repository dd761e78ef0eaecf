"""How capacity looks in a terminal, and as an SVG: what was bought for whom, and the units of the next hours."""

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from domain.capacity import StepKind
from domain.clock import HOUR, RehearsalClock
from domain.incident import span
from ops.capacity import Capacity, LoadAt, Outlook
from ops.views import Times, cleaned, make_table

_CHART_HEIGHT, _MAX_CHART_WIDTH = 16, 100
_MARGIN = 32
"""Columns that the chart's axes take."""
_SHOWN_TIMELINE = 8
_DANGER = (StepKind.WITHDRAW, StepKind.DELETE)


def capacity_table(rows: Iterable[Capacity], times: Times) -> Table:
    """A line for each model."""
    made = make_table("model", "in service", "wanted", "bought for", "until", "cost so far", "state", whole=3)
    for row in map(cleaned, rows):
        ends = [item.until for item in row.bought if item.until]
        made.add_row(
            Text(row.model, "bold"),
            str(row.units_in_service),
            str(row.desired_units),
            ", ".join(dict.fromkeys(item.asked_by for item in row.bought)) or "-",
            times.both(max(ends)) if ends else "-",
            _cost(row.unit_hours, row.usd),
            _state(row),
        )
    return made


def capacity_view(capacity: Capacity, times: Times) -> RenderableType:
    """Everything about one model's capacity, what needs a person first."""
    row = cleaned(capacity)
    parts: list[RenderableType] = [
        Text.assemble(
            (f"{row.model}  ", "bold"),
            f"{row.units_in_service} units in service",
            f" ({row.others_units} of them others')" if row.others_units else "",
            f", {row.desired_units} wanted",
        ),
        _state(row),
    ]
    if row.paused is not None:
        why = f"paused by {row.paused.who} {times.ago(row.paused.since)}: {row.paused.why}"
        parts.append(Text(f"{why}. Nothing is bought or released until `runbooks capacity resume {row.model}`.", "red"))
    for item in row.awaiting:
        parts.append(Text(f"waits for an approver: {item.text}", "bold magenta"))
        parts.append(Text(f"  runbooks capacity approve {row.model} {item.approval_id} --why ...", "magenta"))
    parts += [Text(problem, "red") for problem in row.problems]
    if row.retry_at is not None:
        parts.append(Text(f"tried again {times.both(row.retry_at)}, or with `runbooks capacity reconcile {row.model}`"))
    if row.bought:
        made = make_table("bought", "units", "status", "for", "until", "cost so far", whole=3)
        for bought in row.bought:
            made.add_row(
                bought.name,
                str(bought.units),
                bought.status,
                bought.asked_by,
                times.both(bought.until) if bought.until else "-",
                _cost(bought.unit_hours, bought.usd),
            )
        made.add_section()
        units = sum(bought.units for bought in row.bought)
        made.add_row("together", str(units), "", "", "", _cost(row.unit_hours, row.usd), style="bold")
        parts.append(made)
    else:
        parts.append(Text("nothing bought", "dim"))
    if row.lately_unit_hours > row.unit_hours:
        parts.append(Text(f"with what was released lately: {_cost(row.lately_unit_hours, row.lately_usd)}"))
    if row.demands:
        made = make_table("demand", "kind", "units", "from", "until", whole=3)
        for demand in row.demands:
            made.add_row(
                demand.demand_id,
                demand.kind,
                f"{'+' * (demand.kind == 'feature')}{demand.units}",
                times.both(demand.start),
                times.both(demand.end),
            )
        parts.append(made)
        parts += [Text(f"{demand.demand_id}, by {demand.asked_by}: {demand.reason}") for demand in row.demands]
    parts += [Text(f"while units are missing: {rung}", "yellow") for rung in row.rungs]
    for entry in row.timeline[-_SHOWN_TIMELINE:]:
        parts.append(Text(f"{times.at(entry.at)}  {entry.text}", "dim"))
    return Group(*parts)


def plan_view(outlook: Outlook, clock: RehearsalClock, *, width: int, colours: bool) -> RenderableType:
    """The steps with their reasons, what comes when, and the chart."""
    seen = cleaned(outlook)
    plan = seen.plan
    wanted = f"{plan.units_in_service} units in service, {plan.desired_units} wanted"
    parts: list[RenderableType] = [
        Text.assemble((f"{seen.model}  ", "bold"), f"{wanted}: {plan.wanted_for}" if plan.wanted_for else wanted)
    ]
    if seen.demand is not None:
        more = f", {'+' if (seen.unit_hours or 0) >= 0 else ''}{_cost(seen.unit_hours or 0, seen.usd)}"
        parts.append(Text(f"with {seen.demand.units} units for you{more} within {_horizon(seen, clock)}", "bold cyan"))
    if seen.paused is not None:
        parts.append(Text(f"paused by {seen.paused.who}: {seen.paused.why}; no step is taken", "bold red"))
    if plan.why_not:
        parts.append(Text(plan.why_not, "bold red"))
    if plan.excess is not None:
        parts.append(Text(f"needs an approver: {plan.excess.text}", "bold magenta"))
    if plan.steps:
        made = make_table("", "step", "units", "model", "why", whole=4)
        for number, step in enumerate(plan.steps, 1):
            style = "red" if step.kind in _DANGER else "green" if step.kind is StepKind.CREATE else ""
            why = step.why if step.ready else f"{step.why} (after what stands before it)"
            made.add_row(str(number), Text(step.kind, style), str(step.units), step.name, why)
        parts.append(made)
    else:
        parts.append(Text("nothing to do now", "green"))
    parts.append(_coming(seen, clock))
    parts.append(Text.from_ansi(chart(seen, clock, width=width, colours=colours)))
    ahead = _cost(plan.cost.unit_hours_ahead, plan.cost.usd_ahead)
    parts.append(Text(f"cost: {_cost(plan.cost.unit_hours_so_far, plan.cost.usd_so_far)} so far, {ahead} ahead"))
    return Group(*parts)


def chart(outlook: Outlook, clock: RehearsalClock, *, width: int, colours: bool) -> str:
    """Units in service and wanted over the horizon, and the expected load in units, in characters.

    A row is a whole number of units and ten columns are a whole number of hours. Without colours the three differ in
    their marks.
    """
    import plotille

    hours, units, wanted = _steps(outlook, clock)
    load = [(_hours(outlook, clock, point.at), _as_units(outlook, point)) for point in outlook.load]
    row = max(1, math.ceil(max([*units, *wanted, *(value for _, value in load)]) / _CHART_HEIGHT))
    begin, zone = clock.business(outlook.at), ZoneInfo(outlook.zone)
    whole = begin.replace(minute=0, second=0, microsecond=0)
    early, end = (whole - begin) / HOUR, (clock.business(outlook.until) - begin) / HOUR
    columns = 10 * max(1, (width - _MARGIN) // 10)
    hours_in_ten = math.ceil((end - early) * 10 / min(columns, _MAX_CHART_WIDTH))
    figure = plotille.Figure()
    figure.width = math.ceil((end - early) / hours_in_ten) * 10
    figure.height = max(2, math.ceil(max([*units, *wanted, *(value for _, value in load)]) / row) + 1)
    figure.with_colors = colours
    figure.color_mode = "names"
    figure.set_x_limits(min_=early, max_=early + figure.width / 10 * hours_in_ten)
    figure.set_y_limits(min_=0, max_=figure.height * row)
    figure.x_label, figure.y_label = outlook.zone, "units"
    figure.x_ticks_fkt = lambda low, high: f"{(begin + HOUR * low).astimezone(zone):%a %H:%M}"
    figure.y_ticks_fkt = lambda low, high: f"{low:.0f}"
    if load:
        label = f"load to expect, in units of {outlook.tokens_per_second_per_unit:,.0f} tokens/s"
        points = _corners([at for at, _ in load], [value for _, value in load], end, every=1)
        figure.scatter(*points, lc="cyan", label=label, marker="x")
    figure.scatter(*_corners(hours, wanted, end, every=0.5), lc="yellow", label="wanted", marker="·")
    figure.plot(*_corners(hours, units, end), lc="green", label="in service")
    return str(figure.show(legend=True))


def write_svg(outlook: Outlook, clock: RehearsalClock, path: Path) -> None:
    """The chart as a picture. Raises OSError."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.figure import Figure

    hours, units, wanted = _steps(outlook, clock)
    begin, zone = clock.business(outlook.at), ZoneInfo(outlook.zone)
    moments = [begin + HOUR * hour for hour in [*hours, (clock.business(outlook.until) - begin) / HOUR]]
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes: Any = figure.subplots()
    axes.step(moments, [*units, units[-1]], where="post", label="units in service", color="#1b6e3c")
    axes.step(moments, [*wanted, wanted[-1]], where="post", label="units wanted", color="#b3541e", linestyle="--")
    if outlook.load:
        at = [clock.business(point.at) for point in outlook.load]
        load = [_as_units(outlook, point) for point in outlook.load]
        label = f"expected load ÷ {outlook.tokens_per_second_per_unit:,.0f} tokens/s"
        axes.step(at, load, where="post", label=label, color="#1d4f91")
    locator = AutoDateLocator(tz=zone)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=zone))  # type: ignore[no-untyped-call]
    axes.set(title=f"{outlook.model}: units to expect", ylabel="units", xlabel=outlook.zone, ylim=(0, None))
    axes.legend(loc="upper left")
    FigureCanvasSVG(figure).print_svg(path)  # type: ignore[no-untyped-call]


def _coming(outlook: Outlook, clock: RehearsalClock) -> Table:
    made = make_table("from", "in service", "wanted", "expected load", "of capacity", whole=5)
    moments = [point.at for point in outlook.plan.expected]
    for point, (since, until) in zip(outlook.plan.expected, pairwise([*moments, outlook.until]), strict=True):
        most = _peak(outlook.load, since, until)
        provisioned = point.units * outlook.tokens_per_second_per_unit
        share = "on demand" if most and not provisioned else f"{most / provisioned:.0%}" if most else "-"
        made.add_row(
            f"{clock.business(since).astimezone(ZoneInfo(outlook.zone)):%a %d %H:%M}",
            str(point.units),
            Text(str(point.wanted), "yellow" if point.wanted != point.units else ""),
            f"{most:,.0f} tokens/s" if most else "-",
            Text(share, "red" if provisioned and most > provisioned else ""),
        )
    return made


def _peak(load: Sequence[LoadAt], since: datetime, until: datetime) -> float:
    """The most that is expected between two moments; 0 without a forecast."""
    before = [point for point in load if point.at <= since][-1:]
    return max((x.tokens_per_second for x in [*before, *(x for x in load if since < x.at < until)]), default=0.0)


def _steps(outlook: Outlook, clock: RehearsalClock) -> tuple[list[float], list[int], list[int]]:
    expected = outlook.plan.expected
    hours = [max(0.0, _hours(outlook, clock, point.at)) for point in expected]
    if not expected:
        plan = outlook.plan
        return [0.0], [plan.units_in_service], [plan.desired_units]
    return hours, [point.units for point in expected], [point.wanted for point in expected]


def _hours(outlook: Outlook, clock: RehearsalClock, at: datetime) -> float:
    return (clock.business(at) - clock.business(outlook.at)) / HOUR


def _as_units(outlook: Outlook, point: LoadAt) -> float:
    return point.tokens_per_second / outlook.tokens_per_second_per_unit


def _corners(
    hours: Sequence[float], values: Sequence[float], end: float, every: float | None = None
) -> tuple[list[float], list[float]]:
    """The corners of steps that last until `end`; or points on them, one `every` so many hours."""
    pairs = list(pairwise([*hours, end]))
    if every is not None:
        points = [
            (since + every * n, value)
            for (since, until), value in zip(pairs, values, strict=True)
            for n in range(max(1, math.ceil((until - since) / every)))
        ]
    else:
        points = [(x, value) for (since, until), value in zip(pairs, values, strict=True) for x in (since, until)]
    return [x for x, _ in points], [y for _, y in points]


def _horizon(outlook: Outlook, clock: RehearsalClock) -> str:
    return span(clock.business_duration(outlook.until - outlook.at))


def _cost(unit_hours: float, usd: float | None) -> str:
    money = "" if usd is None else f" ({usd:,.2f} USD)"
    return f"{unit_hours:g} unit-hour{'s' * (unit_hours != 1)}{money}"


def _state(row: Capacity) -> Any:
    if row.unreachable:
        return Text(row.unreachable, "red")
    if row.paused is not None:
        return Text("paused", "bold red")
    if row.awaiting:
        return Text("waits for an approver", "bold magenta")
    return Text(row.doing or "idle", "red" if row.problems else "")
