"""Contract of CloudWatch's metrics. Each test names the AWS document it follows."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.exceptions import ClientError

from simulator.aws.metrics import MetricStore, Sample, SeriesKey, Statistic
from tests.aws_account import Account

MINUTE = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=10)


def put(account: Account, namespace: str, name: str, at: datetime, dimensions: dict[str, str], **value: Any) -> None:
    datum = {"MetricName": name, "Timestamp": at, "Dimensions": as_list(dimensions), **value}
    account.client("cloudwatch").put_metric_data(Namespace=namespace, MetricData=[datum])


def as_list(dimensions: dict[str, str]) -> list[dict[str, str]]:
    return [{"Name": name, "Value": value} for name, value in dimensions.items()]


def stat(query_id: str, namespace: str, name: str, dimensions: dict[str, str], statistic: str, **more: Any) -> Any:
    metric = {"Namespace": namespace, "MetricName": name, "Dimensions": as_list(dimensions)}
    period = more.pop("Period", 60)
    return {"Id": query_id, "MetricStat": {"Metric": metric, "Period": period, "Stat": statistic}, **more}


def get(account: Account, *queries: Any, minutes: int = 3, **more: Any) -> dict[str, list[float]]:
    answer = account.client("cloudwatch").get_metric_data(
        MetricDataQueries=list(queries), StartTime=MINUTE, EndTime=MINUTE + timedelta(minutes=minutes), **more
    )
    return {result["Id"]: result["Values"] for result in answer["MetricDataResults"]}


def test_namespace_and_exact_dimensions_tell_series_apart(account: Account) -> None:
    """User guide, "CloudWatch concepts": a metric is its namespace, name and set of dimensions."""
    put(account, "Bot", "Load", MINUTE, {}, Value=1)
    put(account, "Bot", "Load", MINUTE, {"Model": "sonnet"}, Value=5)
    put(account, "Bot", "Load", MINUTE, {"Model": "sonnet", "Zone": "a"}, Value=50)
    put(account, "Other", "Load", MINUTE, {"Model": "sonnet"}, Value=1_000_000)
    found = get(
        account,
        stat("none", "Bot", "Load", {}, "Maximum"),
        stat("one", "Bot", "Load", {"Model": "sonnet"}, "Maximum"),
        stat("two", "Bot", "Load", {"Zone": "a", "Model": "sonnet"}, "Maximum"),
        stat("absent", "Bot", "Load", {"Zone": "a"}, "Maximum"),
    )
    assert found == {"none": [1], "one": [5], "two": [50], "absent": []}
    listed = account.client("cloudwatch").list_metrics(Namespace="Bot", Dimensions=[{"Name": "Zone"}])["Metrics"]
    assert [len(metric["Dimensions"]) for metric in listed] == [2]


def test_statistics_honour_counts_and_statistic_sets(account: Account) -> None:
    """API reference, MetricDatum: Values with Counts, StatisticValues; the five statistics."""
    put(account, "Bot", "Load", MINUTE, {}, Values=[1, 100], Counts=[98, 2])
    sets = {"Sum": 30, "Minimum": 5, "Maximum": 20, "SampleCount": 3}
    put(account, "Bot", "Load", MINUTE + timedelta(seconds=30), {}, StatisticValues=sets)
    names = ("Sum", "Average", "Minimum", "Maximum", "SampleCount")
    found = get(account, *(stat(name.lower(), "Bot", "Load", {}, name) for name in names))
    assert [values[0] for values in found.values()] == [328, pytest.approx(328 / 103), 1, 100, 103]


def test_percentiles_need_raw_values(account: Account) -> None:
    """User guide, "Percentiles": raw values; no percentile over statistic sets or negative values."""
    for at, value in enumerate(range(1, 101)):
        put(account, "Bot", "Latency", MINUTE + timedelta(seconds=at // 2), {}, Value=value)
    put(account, "Bot", "Latency", MINUTE + timedelta(minutes=1), {}, Values=[10, 9000], Counts=[98, 2])
    put(account, "Bot", "Negative", MINUTE, {}, Values=[-1, 2])
    put(
        account,
        "Bot",
        "Sets",
        MINUTE,
        {},
        StatisticValues={"Sum": 30, "Minimum": 5, "Maximum": 20, "SampleCount": 3},
    )
    found = get(
        account,
        stat("p99", "Bot", "Latency", {}, "p99"),
        stat("p50", "Bot", "Latency", {}, "p50"),
        stat("p98", "Bot", "Latency", {}, "p98.0"),
        stat("sets", "Bot", "Sets", {}, "p99"),
        stat("negative", "Bot", "Negative", {}, "p99"),
    )
    assert found == {"p99": [9000, 99], "p50": [10, 50], "p98": [10, 98], "sets": [], "negative": []}
    datapoints = account.client("cloudwatch").get_metric_statistics(
        Namespace="Bot",
        MetricName="Latency",
        StartTime=MINUTE,
        EndTime=MINUTE + timedelta(minutes=2),
        Period=60,
        Statistics=["Maximum"],
        ExtendedStatistics=["p99"],
    )["Datapoints"]
    by_time = {point["Timestamp"]: (point["Maximum"], point["ExtendedStatistics"]["p99"]) for point in datapoints}
    assert by_time == {MINUTE: (100, 99), MINUTE + timedelta(minutes=1): (9000, 9000)}


def test_periods_order_and_units(account: Account) -> None:
    """API reference, GetMetricData: newest first by default, the end is exclusive, start rounded to the minute."""
    for minute in range(4):
        put(account, "Bot", "Load", MINUTE + timedelta(minutes=minute, seconds=59), {}, Value=minute, Unit="Count")
    assert get(account, stat("q", "Bot", "Load", {}, "Sum"))["q"] == [2, 1, 0]
    assert get(account, stat("q", "Bot", "Load", {}, "Sum"), ScanBy="TimestampAscending")["q"] == [0, 1, 2]
    assert get(account, stat("q", "Bot", "Load", {}, "Sum", Period=180))["q"] == [3]
    in_bytes = stat("q", "Bot", "Load", {}, "Sum")
    in_bytes["MetricStat"]["Unit"] = "Bytes"
    assert get(account, in_bytes)["q"] == []
    late = account.client("cloudwatch").get_metric_data(
        MetricDataQueries=[stat("q", "Bot", "Load", {}, "Sum")],
        StartTime=MINUTE + timedelta(seconds=30),
        EndTime=MINUTE + timedelta(seconds=90),
    )["MetricDataResults"][0]
    assert late["Timestamps"] == [MINUTE]
    assert late["StatusCode"] == "Complete"


def test_periods_of_one_second(account: Account) -> None:
    """Deviation: any whole second is a period, so that a rehearsal at 60 times the speed has minutes of 1 s."""
    for second in range(3):
        put(account, "Bot", "Load", MINUTE + timedelta(seconds=second), {}, Value=second + 1)
    assert get(account, stat("q", "Bot", "Load", {}, "Sum", Period=1))["q"] == [3, 2, 1]
    assert get(account, stat("q", "Bot", "Load", {}, "Sum", Period=2))["q"] == [3, 3]


def test_metric_math(account: Account) -> None:
    """User guide, "Using math expressions with CloudWatch metrics": arithmetic, FILL, ReturnData."""
    for minute, (throttled, answered) in enumerate([(1, 99), (0, 0), (5, 0)]):
        put(account, "Bot", "T", MINUTE + timedelta(minutes=minute), {}, Value=throttled)
        if answered:
            put(account, "Bot", "I", MINUTE + timedelta(minutes=minute), {}, Value=answered)
    queries = (
        stat("t", "Bot", "T", {}, "Sum", ReturnData=False),
        stat("i", "Bot", "I", {}, "Sum", ReturnData=False),
    )
    share = {"Id": "share", "Expression": "100 * t / (t + FILL(i, 0))"}
    assert get(account, *queries, share) == {"share": [100, 1]}
    assert get(account, *queries, {"Id": "sum", "Expression": "t + i"}) == {"sum": [100]}


@pytest.mark.parametrize(
    "query",
    [
        {"Id": "e", "Expression": "SEARCH('{Bot} Load', 'Sum')"},
        {"Id": "e", "Expression": "t + nobody"},
        {"Id": "e", "Expression": "__import__('os')"},
        {"Id": "e"},
        stat("e", "Bot", "Load", {}, "p101"),
        stat("e", "Bot", "Load", {}, "TM(10%:90%)"),
    ],
)
def test_what_is_not_simulated_is_refused(account: Account, query: Any) -> None:
    """Deviation: a clear ValidationError instead of an empty answer."""
    with pytest.raises(ClientError, match="ValidationError"):
        get(account, stat("t", "Bot", "T", {}, "Sum"), query)


def test_put_limits(account: Account) -> None:
    """API reference, PutMetricData: 150 values and 30 dimensions; nothing of a bad call is kept."""
    with pytest.raises(ClientError, match="InvalidParameterValue"):
        put(account, "Bot", "Load", MINUTE, {}, Values=list(range(151)))
    with pytest.raises(ClientError, match="InvalidParameterValue"):
        put(account, "Bot", "Load", MINUTE, {str(number): "v" for number in range(31)}, Value=1)
    assert account.client("cloudwatch").list_metrics()["Metrics"] == []


def test_memory_is_bounded() -> None:
    """Samples are forgotten by age and by number, and so are series without any."""
    store = MetricStore(retention_seconds=100, max_samples=50)
    busy, quiet = SeriesKey("n", "busy", ()), SeriesKey("n", "quiet", ())
    store.put(quiet, [Sample(0, 1, 1, 1, 1, "None")], now=0)
    for second in range(2000):
        store.put(busy, [Sample(second, 1, 1, 1, 1, "None")], now=second)
    assert store.series() == [busy]
    assert 50 <= sum(store.points(busy, Statistic("SampleCount"), 10_000, 0, 10_000).values()) <= 56


def test_late_samples_find_their_place() -> None:
    """Samples may come out of order."""
    store, key, now = MetricStore(3600, 1000), SeriesKey("n", "m", ()), time.time()
    start = now // 60 * 60 - 300
    for offset in (200, 10, 130, 70):
        store.put(key, [Sample(start + offset, offset, offset, offset, 1, "None")], now)
    assert list(store.points(key, Statistic("Sum"), 60, start, now).values()) == [10, 70, 130, 200]
