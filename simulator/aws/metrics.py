"""CloudWatch's metric store: samples by series, statistics over periods, and a little metric math."""

import ast
import math
import re
import threading
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from simulator.aws.errors import AwsError

_PERCENTILE = re.compile(r"p(\d{1,3}(?:\.\d{1,10})?)")
_WHOLE_MINUTE = 60
_SWEEP_EVERY_PUTS = 1000

Points = dict[float, float]
"""A value by the start of its period, in epoch seconds."""


class SeriesKey(NamedTuple):
    """A metric is its namespace, its name and exactly its dimensions."""

    namespace: str
    name: str
    dimensions: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, metric: Mapping[str, Any]) -> "SeriesKey":
        """From the shape `Metric` of AWS's API."""
        dimensions = tuple(sorted((item["Name"], item["Value"]) for item in metric.get("Dimensions") or []))
        return cls(metric["Namespace"], metric["MetricName"], dimensions)


class Sample(NamedTuple):
    """One value that came `times` times, or a statistic set over as many values."""

    at: float
    """Epoch seconds."""
    minimum: float
    maximum: float
    total: float
    times: float
    unit: str


class Statistic:
    """One of Sum, Average, Minimum, Maximum, SampleCount, or a percentile like p99 or p99.9.

    Percentiles are by nearest rank. As in AWS they need raw values: a statistic set counts only where it stands
    for one value, and negative values have no percentiles.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        match = _PERCENTILE.fullmatch(name)
        self.percent = float(match[1]) if match else None
        if self.percent is None and name not in ("Sum", "Average", "Minimum", "Maximum", "SampleCount"):
            raise AwsError("ValidationError", f"The value {name} for parameter Stat is not supported.")
        if self.percent is not None and self.percent > 100:
            raise AwsError("ValidationError", f"The value {name} for parameter Stat is not a percentile.")

    def of(self, samples: list[Sample]) -> float | None:
        """None where there is no such statistic."""
        if not samples:
            return None
        if self.percent is not None:
            return _percentile(samples, self.percent)
        count = math.fsum(sample.times for sample in samples)
        if self.name == "SampleCount":
            return count
        if self.name == "Minimum":
            return min(sample.minimum for sample in samples)
        if self.name == "Maximum":
            return max(sample.maximum for sample in samples)
        total = math.fsum(sample.total for sample in samples)
        return total if self.name == "Sum" else total / count if count else None


def _percentile(samples: list[Sample], percent: float) -> float | None:
    if any(sample.minimum != sample.maximum or sample.minimum < 0 for sample in samples):
        return None
    ordered = sorted(samples, key=lambda sample: sample.minimum)
    rank = percent / 100 * math.fsum(sample.times for sample in ordered)
    seen = 0.0
    for sample in ordered:
        seen += sample.times
        if seen >= rank:
            return sample.minimum
    return ordered[-1].minimum


class MetricStore:
    """Samples, forgotten after `retention_seconds` and beyond `max_samples` a series. Thread-safe."""

    def __init__(self, retention_seconds: float, max_samples: int) -> None:
        self._retention_seconds = retention_seconds
        self._max_samples = max_samples
        self._lock = threading.Lock()
        self._series: dict[SeriesKey, list[Sample]] = {}
        self._puts = 0

    def put(self, key: SeriesKey, samples: Iterable[Sample], now: float) -> None:
        """Add samples, in any order of time."""
        with self._lock:
            series = self._series.setdefault(key, [])
            for sample in samples:
                if series and series[-1].at > sample.at:
                    insort(series, sample, key=lambda item: item.at)
                else:
                    series.append(sample)
            self._trim(series, now)
            self._puts += 1
            if self._puts % _SWEEP_EVERY_PUTS == 0:
                self._sweep(now)

    def _trim(self, series: list[Sample], now: float) -> None:
        old = bisect_left(series, now - self._retention_seconds, key=lambda item: item.at)
        excess = max(old, len(series) - self._max_samples)
        if excess > len(series) // 10:
            del series[:excess]

    def _sweep(self, now: float) -> None:
        for key in [key for key, series in self._series.items() if series[-1].at < now - self._retention_seconds]:
            del self._series[key]

    def series(self) -> list[SeriesKey]:
        """Every series that has samples."""
        with self._lock:
            return sorted(key for key, series in self._series.items() if series)

    def periods(
        self, key: SeriesKey, period: int, start: float, end: float, unit: str | None = None
    ) -> Iterator[tuple[float, list[Sample]]]:
        """The samples of each period that starts in [start, end) and has any, oldest first."""
        with self._lock:
            series = self._series.get(key, [])
            first = bisect_left(series, start, key=lambda item: item.at)
            last = bisect_left(series, end, key=lambda item: item.at)
            samples = series[first:last]
        bucket: list[Sample] = []
        bucket_start = start
        for sample in samples:
            if unit is not None and sample.unit != unit:
                continue
            begins = start + (sample.at - start) // period * period
            if begins != bucket_start and bucket:
                yield bucket_start, bucket
                bucket = []
            bucket_start = begins
            bucket.append(sample)
        if bucket:
            yield bucket_start, bucket

    def points(
        self, key: SeriesKey, statistic: Statistic, period: int, start: float, end: float, unit: str | None = None
    ) -> Points:
        """The statistic of every period in [start, end) that has it."""
        values = ((at, statistic.of(samples)) for at, samples in self.periods(key, period, start, end, unit))
        return {at: value for at, value in values if value is not None}


def rounded_start(start: float, period: int) -> float:
    """AWS rounds a start down to the whole minute, and for periods below a minute to a whole period."""
    step = min(period, _WHOLE_MINUTE)
    return start // step * step


def datum_samples(datum: Mapping[str, Any], now: float) -> list[Sample]:
    """The samples of one `MetricDatum`: a value, values with counts, or a statistic set."""
    at = datum["Timestamp"] if datum.get("Timestamp") is not None else now
    unit = datum.get("Unit") or "None"
    if (stats := datum.get("StatisticValues")) is not None:
        low, high, total, times = (float(stats[name]) for name in ("Minimum", "Maximum", "Sum", "SampleCount"))
        return [Sample(at, low, high, total, times, unit)]
    values = datum.get("Values") or [datum.get("Value", 0)]
    counts = datum.get("Counts") or [1] * len(values)
    pairs = [(float(value), float(count)) for value, count in zip(values, counts, strict=True)]
    return [Sample(at, value, value, value * count, count, unit) for value, count in pairs]


class Expression:
    """Metric math: numbers, ids, `+ - * /`, parentheses, and `FILL(id, number)`. The rest of AWS's is refused."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text, mode="eval").body
            self.ids = self._check(self._tree)
        except (SyntaxError, ValueError) as error:
            raise AwsError(
                "ValidationError",
                f"Error in expression {text!r}: the simulator knows numbers, ids, + - * /, parentheses and "
                "FILL(id, number) only.",
            ) from error

    def _check(self, node: ast.expr) -> set[str]:
        match node:
            case ast.Constant(value=int() | float()):
                return set()
            case ast.Name(id=name):
                return {name}
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._check(operand)
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
                return self._check(left) | self._check(right)
            case ast.Call(func=ast.Name(id="FILL"), args=[ast.Name() as series, ast.Constant(value=int() | float())]):
                return self._check(series)
        raise ValueError(ast.dump(node))

    def of(self, series: Mapping[str, Points], grid: Iterable[float]) -> Points:
        """Its points where every series it names has one; `grid` holds the periods that FILL fills."""
        return self._eval(self._tree, series, list(grid))

    def _eval(self, node: ast.expr, series: Mapping[str, Points], grid: list[float]) -> Points:
        match node:
            case ast.Constant(value=int() | float() as number):
                return dict.fromkeys(grid, float(number))
            case ast.Name(id=name):
                return dict(series[name])
            case ast.UnaryOp(operand=operand):
                return {at: -value for at, value in self._eval(operand, series, grid).items()}
            case ast.Call(args=[ast.Name(id=name), ast.Constant(value=int() | float() as number)]):
                return dict.fromkeys(grid, float(number)) | series[name]
            case ast.BinOp(left=left, op=op, right=right):
                ours, theirs = self._eval(left, series, grid), self._eval(right, series, grid)
                both = {at: _apply(op, ours[at], theirs[at]) for at in sorted(ours.keys() & theirs.keys())}
                return {at: value for at, value in both.items() if value is not None}
        raise AssertionError("checked when it was made")


def _apply(op: ast.operator, left: float, right: float) -> float | None:
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
    return left / right if right else None


class MetricQuery(NamedTuple):
    """One entry of GetMetricData's or an alarm's list of metrics."""

    id: str
    label: str
    period: int
    returned: bool
    key: SeriesKey | None
    statistic: Statistic | None
    unit: str | None
    expression: Expression | None


def parse_queries(queries: Iterable[Mapping[str, Any]]) -> list[MetricQuery]:
    """Checked: ids are distinct, expressions name queries of the list that are no expressions themselves."""
    parsed = [_parse_query(query) for query in queries]
    stats = {query.id: query for query in parsed if query.key is not None}
    if len({query.id for query in parsed}) != len(parsed):
        raise AwsError("ValidationError", "The values for parameter Id in MetricDataQueries are not unique.")
    for number, query in enumerate(parsed):
        if query.expression is None:
            continue
        if not query.expression.ids or not query.expression.ids <= stats.keys():
            raise AwsError(
                "ValidationError",
                f"Expression {query.id} must name at least one metric of the list, and only such; "
                f"they are {sorted(stats)}.",
            )
        period = query.period or max(stats[name].period for name in query.expression.ids)
        parsed[number] = query._replace(period=period)
    return parsed


def _parse_query(query: Mapping[str, Any]) -> MetricQuery:
    returned = bool(query.get("ReturnData", True))
    if "Expression" in query:
        expression = Expression(query["Expression"])
        label = query.get("Label") or query["Id"]
        return MetricQuery(query["Id"], label, int(query.get("Period") or 0), returned, None, None, None, expression)
    if "MetricStat" not in query:
        raise AwsError("ValidationError", f"Query {query.get('Id')} needs MetricStat or Expression.")
    stat = query["MetricStat"]
    key = SeriesKey.of(stat["Metric"])
    period = checked_period(stat["Period"])
    label = query.get("Label") or key.name
    return MetricQuery(query["Id"], label, period, returned, key, Statistic(stat["Stat"]), stat.get("Unit"), None)


def checked_period(period: Any) -> int:
    """Whole seconds from 1. AWS takes 1, 5, 10, 20, 30 and multiples of 60 only."""
    if period is None or int(period) < 1:
        raise AwsError("ValidationError", f"Period {period} must be at least 1 second.")
    return int(period)


def run_queries(
    store: MetricStore, queries: Iterable[MetricQuery], start: float, end: float, *, align: bool = True
) -> dict[str, Points]:
    """The points of every query, by id."""
    queries = list(queries)
    found: dict[str, Points] = {}
    for query in queries:
        if query.key is not None and query.statistic is not None:
            begins = rounded_start(start, query.period) if align else start
            found[query.id] = store.points(query.key, query.statistic, query.period, begins, end, query.unit)
    for query in queries:
        if query.expression is not None:
            begins = rounded_start(start, query.period) if align else start
            steps = range(math.ceil((end - begins) / query.period))
            grid = [begins + step * query.period for step in steps]
            found[query.id] = query.expression.of(found, grid)
    return found
