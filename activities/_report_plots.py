"""The report's figure: four panels over business time, marked with what was done. Imported when first needed."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import StringIO
from itertools import groupby
from textwrap import shorten
from threading import Lock
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from activities._report_content import LEVER_TITLES, TOKYO
from domain.incident import IncidentRecord, LeverStatus
from domain.messages import ABORT, APPROVE_REVERT, REJECT, RELEASE_LEVER, PolicySnapshot
from domain.metrics import CATALOGUE, MetricName
from domain.pre_provisioning import EventRecord

if TYPE_CHECKING:
    from types_boto3_cloudwatch.client import CloudWatchClient
    from types_boto3_cloudwatch.type_defs import MetricDataQueryTypeDef

Points = dict[datetime, float]
"""Real time of a period's start to its value."""
Series = dict[tuple[MetricName, str], Points]
"""By metric and model; the model is empty for metrics of the whole service."""

MAX_POINTS = 1440
"""Points per query; a longer incident is read in longer periods."""
BRIDGED_PERIODS = 2
"""Points at most so many periods apart are joined: one late datapoint is no gap."""

_PER_MODEL = {
    MetricName.INVOCATION_THROTTLES: "ModelId",
    MetricName.TOKENS_PER_SECOND: "Model",
    MetricName.CAPACITY_TOKENS_PER_SECOND: "Model",
    MetricName.QUEUE_WAIT_TIME: "Model",
    MetricName.BATCH_WINDOW: "Model",
}
_OF_SERVICE = (MetricName.REQUEST_LATENCY_P99, MetricName.CACHE_HIT_RATE)

_COLOURS = ("#1d4f91", "#b3541e", "#4d7c2a", "#6b4c9a")
_RED, _GREEN, _PURPLE, _GREY = "#b00020", "#1b6e3c", "#6a1b9a", "#555555"
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "incident-report",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}
_LOCK = Lock()
"""Matplotlib's settings are one per process: one figure at a time."""


@dataclass(frozen=True)
class Mark:
    """Something done, at a real moment."""

    at: datetime
    text: str
    colour: str


def draw(record: IncidentRecord, snapshot: PolicySnapshot, until: datetime, cloudwatch: "CloudWatchClient") -> str:
    """The figure of an incident as an `<svg>` element. Raises what CloudWatch's client raises."""
    start = record.opened_at - snapshot.policy.evidence.metric_lookback
    return draw_load(plotted_models(record, snapshot), marks_of(record), (start, until), snapshot, cloudwatch)


def draw_event(record: EventRecord, snapshot: PolicySnapshot, until: datetime, cloudwatch: "CloudWatchClient") -> str:
    """The figure of a calendar event, from its purchase on. Raises what CloudWatch's client raises."""
    times = record.times
    assert times is not None, "an event that was reckoned"
    start = min(record.triggered_at or times.buy_at, until) - snapshot.policy.evidence.metric_lookback
    moments = (
        (record.triggered_at, "triggered", _COLOURS[0]),
        (record.in_service_at, "in service", _GREEN),
        (times.starts_at, f"start, {record.event.multiplier:g}x", _RED),
        (times.ends_at, "end", _GREY),
        (record.released_at, "released", _GREEN),
    )
    marks = [Mark(at, text, colour) for at, text, colour in moments if at is not None]
    models = [name for name in record.event.models if name in snapshot.policy.models][: len(_COLOURS)]
    return draw_load(models, sorted(marks, key=lambda mark: mark.at), (start, until), snapshot, cloudwatch)


def draw_load(
    models: Sequence[str],
    marks: Sequence[Mark],
    interval: tuple[datetime, datetime],
    snapshot: PolicySnapshot,
    cloudwatch: "CloudWatchClient",
) -> str:
    """Load and service over time as an `<svg>` element without outside references."""
    start, until = interval
    step = query_period(until - start, snapshot.policy.metrics.period)
    series = read(cloudwatch, snapshot, models, start, until, step)
    with _LOCK, mpl.rc_context(_SETTINGS):
        return _svg(_figure(marks, snapshot, models, series, interval, step))


def plotted_models(record: IncidentRecord, snapshot: PolicySnapshot) -> list[str]:
    """The incident's model and those its intents may be downgraded to; all for an incident without a model."""
    intents = snapshot.policy.intents.values()
    targets = {x.downgrade_to for x in intents if x.model == record.model and x.downgrade_to}
    names = [record.model, *sorted(targets)] if record.model else sorted(snapshot.policy.models)
    return [name for name in names if name in snapshot.policy.models][: len(_COLOURS)]


def query_period(span: timedelta, period: timedelta) -> timedelta:
    """The metrics' own period, or the next one CloudWatch takes (1, 5, 10, 20, 30 s, minutes) that is coarse enough."""
    own = max(1, round(period.total_seconds()))
    needed = span.total_seconds() / MAX_POINTS
    if needed <= own:
        return timedelta(seconds=own)
    short = next((seconds for seconds in (5, 10, 20, 30) if seconds >= max(needed, own)), None)
    return timedelta(seconds=short or math.ceil(needed / 60) * 60)


def read(
    cloudwatch: "CloudWatchClient",
    snapshot: PolicySnapshot,
    models: Sequence[str],
    start: datetime,
    end: datetime,
    step: timedelta,
) -> Series:
    """Every series of the figure, in periods of `step`; a period without data has no point."""
    wanted = [(name, model) for name in _PER_MODEL for model in models] + [(name, "") for name in _OF_SERVICE]
    queries: list[MetricDataQueryTypeDef] = []
    for index, (name, model) in enumerate(wanted):
        metric = CATALOGUE[name]
        dimension = _PER_MODEL.get(name)
        value = snapshot.policy.models[model].model_id if dimension == "ModelId" else model
        queries.append(
            {
                "Id": f"q{index}",
                "MetricStat": {
                    "Metric": {
                        "Namespace": metric.namespace,
                        "MetricName": metric.name,
                        "Dimensions": [{"Name": dimension, "Value": value}] if dimension else [],
                    },
                    "Period": int(step.total_seconds()),
                    "Stat": metric.statistic,
                },
            }
        )
    seconds = step.total_seconds()
    first = datetime.fromtimestamp(math.floor(start.timestamp() / seconds) * seconds, UTC)
    last = datetime.fromtimestamp(math.ceil(end.timestamp() / seconds) * seconds, UTC)
    series: Series = {key: {} for key in wanted}
    pages = cloudwatch.get_paginator("get_metric_data").paginate(
        MetricDataQueries=queries, StartTime=first, EndTime=last, ScanBy="TimestampAscending"
    )
    for page in pages:
        for result in page["MetricDataResults"]:
            points = zip(result["Timestamps"], result["Values"], strict=True)
            series[wanted[int(result["Id"][1:])]].update(points)
    return series


def marks_of(record: IncidentRecord) -> list[Mark]:
    """What was done and decided, in order of time."""
    marks = [Mark(record.opened_at, "alarm", _RED)]
    for lever in record.levers:
        title = LEVER_TITLES[lever.name]
        immediate = lever.landed_at == lever.applied_at or lever.landed_at is None
        if lever.applied_at:
            marks.append(Mark(lever.applied_at, f"{title} {'set' if immediate else 'asked for'}", _COLOURS[0]))
        if lever.landed_at and not immediate:
            marks.append(Mark(lever.landed_at, f"{title} landed", _COLOURS[0]))
        if lever.released_at:
            word = "kept" if lever.status is LeverStatus.KEPT else "released"
            marks.append(Mark(lever.released_at, f"{title} {word}", _GREEN))
    decisive = {APPROVE_REVERT: "approved", REJECT: "rejected", ABORT: "aborted", RELEASE_LEVER: "release asked for"}
    for decision in record.decisions:
        asked = next((text for action, text in decisive.items() if decision.action.startswith(action)), None)
        if asked and decision.outcome == "accepted":
            marks.append(Mark(decision.at, asked, _PURPLE))
    if record.recovered_at:
        marks.append(Mark(record.recovered_at, "recovered", _GREEN))
    if record.closed_at:
        marks.append(Mark(record.closed_at, "closed", _GREY))
    return sorted(marks, key=lambda mark: mark.at)


def _figure(
    marks: Sequence[Mark],
    snapshot: PolicySnapshot,
    models: Sequence[str],
    series: Series,
    interval: tuple[datetime, datetime],
    step: timedelta,
) -> Figure:
    clock, policy = snapshot.clock, snapshot.policy
    figure = Figure(figsize=(10, 9.5), layout=None)
    FigureCanvasSVG(figure)
    panels: list[Axes] = list(figure.subplots(4, 1, sharex=True))

    def line(axes: Axes, points: Points, colour: str, label: str, scale: float = 1, drawn: str = "default") -> None:
        if not points:
            return
        times, values = _with_gaps(points, step)
        axes.plot(
            [_days(clock.business(at)) for at in times],
            [value * scale for value in values],
            color=colour,
            label=label,
            linestyle="-" if drawn == "default" else "--",
            drawstyle=drawn,
            linewidth=1.6,
            marker="." if drawn == "default" else None,
            markersize=2.5,
        )

    throttles, tokens, latency, hits = panels
    per_period = policy.metrics.period / step
    minutes = clock.business_duration(policy.metrics.period) / timedelta(minutes=1)
    for colour, model in zip(_COLOURS, models, strict=False):
        line(throttles, series[MetricName.INVOCATION_THROTTLES, model], colour, model, per_period)
        line(tokens, series[MetricName.TOKENS_PER_SECOND, model], colour, f"{model}: sent")
        line(
            tokens,
            series[MetricName.CAPACITY_TOKENS_PER_SECOND, model],
            colour,
            f"{model}: capacity",
            drawn="steps-post",
        )
    line(latency, series[MetricName.REQUEST_LATENCY_P99, ""], _COLOURS[0], "P99")
    for model in models[:1]:  # where there is a batcher
        line(latency, series[MetricName.QUEUE_WAIT_TIME, model], _COLOURS[1], f"{model}: wait in the batcher")
        window = series[MetricName.BATCH_WINDOW, model]
        line(latency, window, _COLOURS[2], f"{model}: batch window", drawn="steps-post")
    line(hits, series[MetricName.CACHE_HIT_RATE, ""], _COLOURS[0], "hit rate")
    _finish(throttles, f"Throttled calls per {'minute' if minutes == 1 else f'{minutes:g} min'}")
    _finish(tokens, "Tokens/s sent, against capacity")
    _finish(latency, "P99 latency, ms")
    _finish(hits, "Cache hit rate, %")
    limit = policy.recovery.max_p99_ms
    latency.set_ylim(top=max(latency.get_ylim()[1], 1.1 * limit))
    throttles.set_ylim(top=max(throttles.get_ylim()[1], 1))
    latency.axhline(limit, color=_RED, linewidth=1, linestyle=":")
    latency.text(
        1.01, limit, f"limit {limit:,.0f} ms", transform=latency.get_yaxis_transform(), color=_RED, va="center"
    )

    hits.set_xlim(*(_days(clock.business(at)) for at in interval))
    locator = AutoDateLocator(tz=TOKYO, maxticks=10)  # type: ignore[no-untyped-call]
    hits.xaxis.set_major_locator(locator)
    formatter = ConciseDateFormatter(locator, tz=TOKYO, show_offset=False)  # type: ignore[no-untyped-call]
    hits.xaxis.set_major_formatter(formatter)
    hits.set_xlabel("business time in Tokyo")
    rows = _draw_marks(panels, marks, interval, snapshot)
    _lay_out(figure, rows)
    return figure


_WIDTH_IN, _LEFT_IN, _RIGHT_IN, _ROW_IN, _PANEL_IN, _GAP_IN, _BOTTOM_IN = 10.0, 0.75, 1.75, 0.19, 1.55, 0.42, 0.6
_LETTER_IN = 0.073
"""Width of a letter of a mark's label, on the safe side."""
_LETTERS = 80
"""Of one label, at most."""


def _lay_out(figure: Figure, rows: int) -> None:
    """Panels of one height whatever the number of rows of labels above them."""
    top = 0.35 + rows * _ROW_IN
    height = top + 4 * _PANEL_IN + 3 * _GAP_IN + _BOTTOM_IN
    figure.set_size_inches(_WIDTH_IN, height)
    figure.subplots_adjust(
        left=_LEFT_IN / _WIDTH_IN,
        right=1 - _RIGHT_IN / _WIDTH_IN,
        top=1 - top / height,
        bottom=_BOTTOM_IN / height,
        hspace=_GAP_IN / _PANEL_IN,
    )


def _draw_marks(
    panels: Sequence[Axes], marks: Sequence[Mark], interval: tuple[datetime, datetime], snapshot: PolicySnapshot
) -> int:
    """Vertical lines through all panels; labels above the first in rows, so placed that none meets another's line.

    Labels run to the right of their line. From right to left, each takes the lowest row over those it would touch.
    Returns the number of rows.
    """
    start, end = interval
    width_in = _WIDTH_IN - _LEFT_IN - _RIGHT_IN
    seconds_per_in = max((end - start).total_seconds(), 1e-6) / width_in

    def column(mark: Mark) -> int:
        return round((mark.at - start).total_seconds() / seconds_per_in / _LETTER_IN)

    taken: list[tuple[int, int]] = []
    rows = 0
    shown = [mark for mark in marks if start <= mark.at <= end]
    for _, together in groupby(reversed(shown), key=column):
        group = list(together)[::-1]
        first = group[0]
        text = shorten(", ".join(dict.fromkeys(mark.text for mark in group)), _LETTERS, placeholder=" …")
        at = column(first)
        row = 1 + max((other_row for other_at, other_row in taken if other_at <= at + len(text) + 1), default=-1)
        taken.append((at, row))
        rows = max(rows, row + 1)
        when = _days(snapshot.clock.business(first.at))
        for axes in panels:
            axes.axvline(when, color=first.colour, linewidth=0.9, alpha=0.75)
        panels[0].annotate(
            text,
            xy=(when, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, (0.32 + row * _ROW_IN) * 72),
            textcoords="offset points",
            color=first.colour,
            fontsize=8.5,
            annotation_clip=False,
        )
        panels[0].annotate(
            "",
            xy=(when, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, (0.32 + row * _ROW_IN + 0.12) * 72),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": first.colour, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )
    return rows


def _days(at: datetime) -> float:
    """`at` as Matplotlib's dates count: days since 1970, UTC."""
    return at.timestamp() / timedelta(days=1).total_seconds()


def _with_gaps(points: Points, step: timedelta) -> tuple[list[datetime], list[float]]:
    times: list[datetime] = []
    values: list[float] = []
    for at in sorted(points):
        if times and at - times[-1] > BRIDGED_PERIODS * step:
            times.append(times[-1] + step)
            values.append(math.nan)
        times.append(at)
        values.append(points[at])
    return times, values


def _finish(axes: Axes, title: str) -> None:
    heading = axes.set_title(title, loc="left", fontsize=10, fontweight="bold", zorder=5)
    heading.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if axes.lines:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0, fontsize=8.5)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=_GREY)


def _svg(figure: Figure) -> str:
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    label = "Throttles, tokens per second against capacity, P99 latency and cache hit rate over business time"
    text = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text)
    return re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
