"""Scenario 3's six leaves: each by breaking just that around a real batcher, and reading what the incident says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.worker import Worker

from activities.cloudwatch import Asked, CloudWatchActivities
from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from dataplane.routes import Routes
from domain.alarms import AlarmState
from domain.incident import IncidentRecord, LeverName, LeverStatus, Phase
from domain.knobs import Holder, KnobName, LeaseRequest
from domain.messages import INCIDENT_WORKFLOW, RECORD, IncidentInput, incident_id
from domain.metrics import MetricName
from domain.policy import Policy
from tests.aws_account import Account
from tests.scheduled import eventually
from tests.servers import AwsServer, TemporalServer, ValkeyServer, free_port
from tests.workers.test_batcher_process import Process
from tests.workflows.fakes import alarm
from workers.clients import AwsClients
from workers.runbook_worker import WORKFLOWS, activities
from workers.settings import Settings
from workers.temporal import connect

QUEUE, KEY, GUESSED_MS, GOOD_MS = "latency", "latency-regression:mangaassist", 500, 150
PERIOD = timedelta(seconds=2)
POLICY = f"""
timetable: null
coupling: null
metrics: {{period: PT2S}}
evidence: {{metric_lookback: PT30S}}
recovery: {{max_queue_depth: 20}}
knobs: {{batch_window_ms: {GUESSED_MS}}}
batcher: {{controller: fixed, publish_every: PT1S, slots: 2}}
"""
QUICK, SLOW = {"median_ms": 100.0, "p99_ms": 120.0}, {"median_ms": 1500.0, "p99_ms": 1600.0}


class MangaAssist(AwsServer):
    """The simulator with MangaAssist in it, who asks a batcher."""

    def __init__(self, data_dir: Path, batcher_url: str) -> None:
        super().__init__(data_dir)
        self.command = (
            *(self.command[0], "-m", "simulator", "--port", self.endpoint.rpartition(":")[2]),
            *("--scenario", "batch-latency", "--batcher-url", batcher_url),
        )

    def answers(self) -> None:
        Account(self.endpoint).control("GET", "ready")


class Evening:
    """A worker as it runs in earnest, with everything around it. One thing of it is slow at a time."""

    def __init__(self, client: Client, aws: Account, metrics: CloudWatchActivities, ledger: Ledger) -> None:
        self.client = client
        self.aws = aws
        self.ledger = ledger
        self._metrics = metrics

    def runs(self, requests_per_second: float, bedrock: dict[str, float], **times: float) -> None:
        """So many requests, a Bedrock as quick as that, and what is so many times as slow as usual."""
        self.aws.control("POST", "requests", {"requests_per_second": requests_per_second})
        self.aws.control("POST", "converse", {"sonnet": {**bedrock, "lost_share": 0}, "haiku": QUICK})
        self.aws.control("DELETE", "latency")
        self.aws.control("POST", "latency", times)

    def keeps_the_window_short(self) -> None:
        """An engineer's override; the batcher's window is the good one from now on."""
        lease = LeaseRequest(
            lease_id="short",
            knob=KnobName.BATCH_WINDOW_MS,
            value=GOOD_MS,
            holder=Holder(kind="person", id="engineer@example.com"),
            reason="until the evening is over",
            duration_ms=600_000,
        )
        self.ledger.acquire([lease])

    async def value(self, name: MetricName, *dimensions: str) -> float | None:
        """The metric's newest value of the last seconds."""
        wanted: dict[str, Asked] = {name: (name, dimensions)}
        series, _ = await asyncio.to_thread(self._metrics.series, wanted, PERIOD, 3 * PERIOD)
        points = series[name]
        return points[max(points)] if points else None

    async def shows(self, name: MetricName, *dimensions: str, over: float = -1, under: float = 1e9) -> None:
        """Wait until the metric is within these."""

        async def within() -> bool:
            value = await self.value(name, *dimensions)
            return value is not None and over < value < under

        await eventually(within)

    async def diagnosed(self) -> IncidentRecord:
        """The record of an incident that opens now, once it has looked at everything."""
        change = alarm(AlarmState.ALARM, datetime.now(UTC), "message-1", "RequestLatencyP99Alarm")
        input = IncidentInput(key=KEY, runbook="latency", model="sonnet", alarm=change)
        handle = await self.client.start_workflow(INCIDENT_WORKFLOW, input, id=incident_id(KEY), task_queue=QUEUE)
        record: IncidentRecord | None = None

        async def found() -> bool:
            nonlocal record
            record = await handle.query(RECORD, result_type=IncidentRecord)
            is_there = record.diagnosis is not None and bool(record.diagnosis.causes)
            told = record.held or any(entry.kind == "page" for entry in record.timeline)
            return is_there and bool(told) and record.phase is Phase.VERIFYING

        await eventually(found)
        assert record is not None
        return record

    async def ends(self) -> None:
        """The incident is over, and its lease is gone."""
        with suppress(RPCError):
            await self.client.get_workflow_handle(incident_id(KEY)).terminate("the next case")
        for lease in self.ledger.leases().leases:
            if lease.holder.kind == "incident":
                self.ledger.release([lease.lease_id], lease.holder, "the next case")


@pytest.fixture
async def evening(tmp_path: Path, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Evening]:
    policy_file, roster_file = tmp_path / "policy.yaml", tmp_path / "roster.yaml"
    policy_file.write_text(POLICY)
    roster_file.write_text("people: {}")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "RUNBOOKS_REDIS_URL": valkey.url,
        "RUNBOOKS_POLICY_FILE": str(policy_file),
    }.items():
        monkeypatch.setenv(name, value)
    with connect_redis(valkey.url) as connection:
        connection.flushall()
        port, temporal = free_port(), TemporalServer(tmp_path).start()
        manga = MangaAssist(tmp_path, f"http://127.0.0.1:{port}").start()
        settings = Settings(
            temporal_address=temporal.address,
            redis_url=valkey.url,
            aws_endpoint_url=manga.endpoint,
            policy_file=policy_file,
            roster_file=roster_file,
            state_dir=tmp_path / "state",
            task_queue=QUEUE,
        )
        batcher = Process(tmp_path / "batcher", manga.endpoint, valkey.url, temporal.address, POLICY, port)
        clients, client = AwsClients(settings), await connect(settings)
        metrics = CloudWatchActivities(clients.cloudwatch(), ecs_cluster="c", ecs_service="s")
        with ThreadPoolExecutor(50) as threads:
            worker = Worker(
                client,
                task_queue=QUEUE,
                workflows=WORKFLOWS,
                activities=activities(settings, clients, Ledger(connection), Routes(connection)),
                activity_executor=threads,
                max_concurrent_activities=50,
            )
            async with worker:
                found = Evening(client, Account(manga.endpoint), metrics, Ledger(connection))
                yield found
                await found.ends()
        batcher.process.kill()
        batcher.process.wait()
        temporal.kill()
        manga.kill()


SYSTEMS = Policy().latency.systems
WAIT = MetricName.QUEUE_WAIT_TIME, "sonnet"
LOOKS = 4
MOST_WAIT_MS, MOST_DEPTH = Policy().batcher.max_queue_wait_p99_ms, 20


async def too_long_a_window(evening: Evening) -> None:
    evening.runs(6, QUICK)
    await evening.shows(MetricName.BATCH_WINDOW, "sonnet", over=GUESSED_MS - 1)
    await evening.shows(MetricName.INVOCATION_LATENCY, Policy().models["sonnet"].model_id)
    await evening.shows(MetricName.STAGE_LATENCY, "delivery")
    await evening.shows(MetricName.REQUEST_LATENCY_P99)
    await evening.shows(*WAIT, over=MOST_WAIT_MS)


async def too_few_slots(evening: Evening) -> None:
    """Bedrock takes longer than two slots can stand, and who waits is soon served all the same."""
    evening.runs(3, SLOW)
    await evening.shows(*WAIT, over=MOST_WAIT_MS)


async def too_many_requests(evening: Evening) -> None:
    evening.runs(60, SLOW)
    await evening.shows(*WAIT, over=MOST_WAIT_MS)
    await evening.shows(MetricName.BEDROCK_QUEUE_DEPTH, over=MOST_DEPTH)


async def redis_is_slow(evening: Evening) -> None:
    await slow(evening, "redis", 100)


async def opensearch_is_slow(evening: Evening) -> None:
    await slow(evening, "opensearch", 10)


async def api_gateway_is_slow(evening: Evening) -> None:
    await slow(evening, "api_gateway", 10)


async def slow(evening: Evening, system: str, times: float) -> None:
    evening.runs(6, QUICK, **{system: times})
    signal = getattr(SYSTEMS, system)
    await evening.shows(signal.metric, *signal.dimensions, over=signal.high)
    await evening.shows(*WAIT, under=MOST_WAIT_MS)
    await evening.shows(MetricName.BEDROCK_QUEUE_DEPTH, under=MOST_DEPTH)


async def diagnosed(evening: Evening, broken: Callable[[Evening], Awaitable[None]], cause: str) -> IncidentRecord:
    """The record of an incident about what is broken; the last one is over. A period has few requests: looks again."""
    said = ""
    for _ in range(LOOKS):
        await evening.ends()
        await broken(evening)
        record = await evening.diagnosed()
        assert record.diagnosis is not None
        if [found.id for found in record.diagnosis.causes] == [cause]:
            return record
        said = f"{broken.__name__}: {record.diagnosis} {[check.finding for check in record.checks]}"
    raise AssertionError(said)


async def test_a_window_that_was_increased_is_found_and_reverted_on_the_real_batcher(evening: Evening) -> None:
    """And, as it is not the window any more: the other five, one after the other."""
    record = await diagnosed(evening, too_long_a_window, "window-increased")
    [lever] = record.levers
    assert (lever.name, lever.status, lever.before, lever.after) == (
        LeverName.BATCH_WINDOW,
        LeverStatus.IN_FORCE,
        "500 ms",
        "150 ms",
    )
    [window] = [check.finding for check in record.checks if check.name == "Batch window"]
    assert "and was 150 ms" in window
    assert "configured are 500 ms" in window
    assert [row.stage for row in record.budget_before if row.measured_ms is None] == []
    await evening.shows(MetricName.BATCH_WINDOW, "sonnet", under=GOOD_MS + 1)

    evening.keeps_the_window_short()
    for broken, cause in (
        (redis_is_slow, "redis"),
        (opensearch_is_slow, "opensearch"),
        (api_gateway_is_slow, "dynamodb-api-gateway"),
        (too_few_slots, "other-stages"),
        (too_many_requests, "batching-backlog"),
    ):
        record = await diagnosed(evening, broken, cause)
        assert [lever.status for lever in record.levers] == [LeverStatus.NOT_NEEDED], cause
        assert any(entry.kind == "page" and "No lever of ours helps" in entry.text for entry in record.timeline), cause
        assert evening.ledger.effective(KnobName.BATCH_WINDOW_MS, Policy().baseline) == GOOD_MS
