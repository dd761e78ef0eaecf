"""What waits for the world lives through long poll intervals, and says what it could not see."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from temporalio.testing import ActivityEnvironment

from activities import _polling
from activities.cloudwatch import CloudWatchActivities, Series, snapshot
from domain.incident import RecoveryCheck
from domain.messages import AwaitRecovery, RecoveryQuery, WatchRelease, load_query
from domain.metrics import MetricName
from domain.policy import Policy, RecoveryPolicy

MS = timedelta(milliseconds=1)
SECOND = timedelta(seconds=1)
POLICY = Policy()
QUERY = RecoveryQuery(
    load=load_query(POLICY, "sonnet"),
    model="sonnet",
    intents_of_model=["faq"],
    recovery=RecoveryPolicy(hold=timedelta(minutes=5), poll_interval=200 * MS),
    p99_before_ms=None,
)


class FakeCloudWatch:
    """Answers GetMetricData with what `point` says of a metric at each call; each call is a minute later."""

    def __init__(
        self, point: Callable[[str], float | None], error: Exception | None = None, frozen: bool = False
    ) -> None:
        self.point, self.error, self.frozen = point, error, frozen
        self.calls = 0

    def get_metric_data(self, **request: Any) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        self.calls += 0 if self.frozen and self.calls else 1
        at = datetime(2026, 11, 30, tzinfo=UTC) + timedelta(minutes=self.calls)
        results = []
        for item in request["MetricDataQueries"]:
            value = self.point(item["MetricStat"]["Metric"]["MetricName"])
            points = {} if value is None else {at: value}
            results.append({"Id": item["Id"], "Timestamps": list(points), "Values": list(points.values())})
        return {"MetricDataResults": results}


GOOD = {MetricName.INVOCATION_THROTTLES: 0.0, MetricName.FALLBACK_RATE: 0.0, MetricName.REQUEST_LATENCY_P99: 2_500.0}


def well(name: str) -> float | None:
    return GOOD.get(MetricName(name), 10.0)


def throttled(name: str) -> float | None:
    return 50.0 if name == MetricName.INVOCATION_THROTTLES else well(name)


def activities(cloudwatch: FakeCloudWatch) -> CloudWatchActivities:
    return CloudWatchActivities(cast(Any, cloudwatch), ecs_cluster="c", ecs_service="s")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> ActivityEnvironment:
    monkeypatch.setattr(_polling, "HEARTBEAT_SECONDS", 0.02)
    env = ActivityEnvironment()
    env.info = replace(env.info, scheduled_time=datetime.now(UTC))
    return env


def watch(**changes: Any) -> WatchRelease:
    return WatchRelease(query=QUERY, watch=SECOND, poll_interval=100 * MS, blind_polls=3).model_copy(update=changes)


def wait(**changes: Any) -> AwaitRecovery:
    request = AwaitRecovery(query=QUERY, give_up_after=SECOND, page_p99_ms=8000, page_p99_for=timedelta(minutes=10))
    return request.model_copy(update=changes)


async def test_a_wait_heartbeats_much_oftener_than_it_polls(environment: ActivityEnvironment) -> None:
    beats: list[Any] = []
    environment.on_heartbeat = lambda *details: beats.append(details)
    cloudwatch = FakeCloudWatch(throttled)
    result = await environment.run(activities(cloudwatch).await_recovery, wait())
    assert result.ended == "gave-up"
    assert cloudwatch.calls <= 6
    assert len(beats) > 3 * cloudwatch.calls


async def test_the_deadline_counts_from_the_scheduling_whatever_died(
    environment: ActivityEnvironment,
) -> None:
    environment.info = replace(environment.info, scheduled_time=datetime.now(UTC) - timedelta(hours=1))
    cloudwatch = FakeCloudWatch(throttled)
    result = await environment.run(activities(cloudwatch).await_recovery, wait(give_up_after=timedelta(minutes=30)))
    assert (result.ended, cloudwatch.calls) == ("gave-up", 1)


async def test_a_next_attempt_goes_on_where_the_last_one_stood(environment: ActivityEnvironment) -> None:
    since = datetime(2026, 11, 29, 23, 50, tzinfo=UTC)
    held = [
        RecoveryCheck(name=name, value=0, target=1, unit="", met=True, since=since).model_dump(mode="json")
        for name in ("throttles", "P99 latency", "fallback answers", "queue depth")
    ]
    environment.info = replace(environment.info, heartbeat_details=[held, 123_456.0, ""])
    result = await environment.run(activities(FakeCloudWatch(well)).await_recovery, wait())
    assert (result.ended, result.peak_offered_tokens_per_second) == ("recovered", 123_456.0)
    assert {check.since for check in result.checks} == {since}


async def test_what_could_not_be_read_is_said(environment: ActivityEnvironment) -> None:
    denied = FakeCloudWatch(well, error=RuntimeError("not authorized to perform: cloudwatch:GetMetricData"))
    result = await environment.run(activities(denied).await_recovery, wait(give_up_after=300 * MS))
    assert result.ended == "gave-up"
    assert "cloudwatch:GetMetricData" in result.unread


@pytest.mark.parametrize(
    ("cloudwatch", "clean"),
    [
        (FakeCloudWatch(well), True),
        (FakeCloudWatch(throttled), False),
        (FakeCloudWatch(well, error=RuntimeError("away")), False),
        (FakeCloudWatch(lambda name: None), False),
        (FakeCloudWatch(lambda name: None if name == MetricName.REQUEST_LATENCY_P99 else well(name)), False),
        (FakeCloudWatch(well, frozen=True), False),
    ],
    ids=["well", "throttled", "away", "no data at all", "no P99 of calls", "nothing new"],
)
async def test_only_a_watch_that_saw_the_service_well_is_clean(
    environment: ActivityEnvironment, cloudwatch: FakeCloudWatch, clean: bool
) -> None:
    result = await environment.run(activities(cloudwatch).watch_release, watch())
    assert (result.breaches == []) is clean, result.breaches


async def test_a_cancelled_wait_ends_at_once(environment: ActivityEnvironment) -> None:
    work = asyncio.ensure_future(environment.run(activities(FakeCloudWatch(throttled)).await_recovery, wait()))
    await asyncio.sleep(0.1)
    environment.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


def test_a_snapshot_tells_stale_from_fresh_and_remembers_the_p99_before() -> None:
    start = datetime(2026, 11, 30, tzinfo=UTC)
    minute = timedelta(minutes=1)
    names = (
        "throttles sonnet",
        "invocations sonnet",
        "sent sonnet",
        "capacity sonnet",
        "queue wait sonnet",
        "offered faq",
    )
    series = {
        name: {start + 9 * minute: 100.0} for name in (*names, "queue", "fallback", "hits", "tasks", "calls per task")
    }
    series["p99"] = {start: 2_600.0, start + 9 * minute: 9_800.0}
    series["queue"] = {start: 340.0}
    load = snapshot(series, ["sonnet"], ["faq"], start + 10 * minute, minute)
    assert (load.p99_ms, load.p99_before_ms, load.queue_depth, load.hit_rate) == (9_800.0, 2_600.0, None, 1.0)
    assert load.model("sonnet").throttle_shares == (0.5,)
    series["throttles sonnet"][start] = 5.0
    assert snapshot(series, ["sonnet"], ["faq"], start, minute).p99_before_ms is None, "in the breach already"
    nothing: dict[str, Series] = {name: {} for name in series}
    assert snapshot(nothing, ["sonnet"], ["faq"], start, minute).observed_at == start
