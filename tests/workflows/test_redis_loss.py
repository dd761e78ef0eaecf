"""Redis loses what three incidents and two overrides hold: by a restart without persistence, and by a failover to a
replica that had lost the last writes. A reader of the data plane looks on all the time."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from temporalio.client import Client, WorkflowHandle
from temporalio.service import RPCError
from temporalio.worker import Worker

from activities.entities import start_override
from activities.leases import LeaseActivities
from dataplane import keys
from dataplane.connection import connect
from dataplane.knobs import Knobs
from dataplane.ledger import Ledger
from domain.alarms import AlarmState
from domain.incident import IncidentRecord, Phase
from domain.knobs import KnobName, KnobValue
from domain.messages import (
    INCIDENT_WORKFLOW,
    RECORD,
    RELEASE,
    IncidentInput,
    OverrideAnswer,
    OverrideInput,
    PersonRequest,
    StartOverride,
    UpdateResult,
    incident_id,
    override_id,
)
from domain.override import OverrideEnd, OverrideKind, OverrideRecord
from domain.policy import Policy
from tests.servers import TemporalServer, ValkeyServer
from tests.workflows.fakes import APPROVER, ENGINEER, MODEL, FakeEntities, FakeWorld, activities_of, alarm
from workers.redis_loss import watch_redis
from workers.runbook_worker import WORKFLOWS
from workers.temporal import runbook_plugin

BASELINE = Policy().baseline
TTL, ROUTING, WINDOW = KnobName.CACHE_TTL_SECONDS, KnobName.MODEL_ROUTING, KnobName.BATCH_WINDOW_MS
WITHIN_SECONDS = 40
"""Of Redis being back; 60 are allowed."""


@dataclass
class Scene:
    """Three incidents that hold routing and TTL, an override of the window, and what a chatbot task reads meanwhile."""

    client: Client
    ledger: Ledger
    knobs: Knobs
    handles: list[WorkflowHandle[Any, Any]] = field(default_factory=list)
    seen: set[tuple[int, str, int]] = field(default_factory=set)

    async def incidents(self) -> None:
        for name in ("one", "two", "three"):
            key = f"bedrock-throttle:{name}"
            change = alarm(AlarmState.ALARM, datetime.now(UTC), "1")
            input = IncidentInput(key=key, runbook="throttle", model=MODEL, alarm=change)
            handle = await self.client.start_workflow(INCIDENT_WORKFLOW, input, id=incident_id(key), task_queue=MODEL)
            self.handles.append(handle)
        for handle in self.handles:
            await self.until(lambda handle=handle: self._verifies(handle))  # type: ignore[misc]

    async def _verifies(self, handle: WorkflowHandle[Any, Any]) -> bool:
        record: IncidentRecord = await handle.query(RECORD, result_type=IncidentRecord)
        return record.phase is Phase.VERIFYING

    async def set(self, knob: KnobName, value: KnobValue, duration: timedelta, name: str) -> OverrideAnswer:
        input = OverrideInput(
            knob=knob, value=value, kind=OverrideKind.TIMED, who=ENGINEER, reason="test", duration=duration
        )
        answer = await start_override(
            self.client, StartOverride(override_id=override_id(knob, name), input=input), MODEL
        )
        assert answer.record.in_force_since is not None, answer
        self.handles.append(self.client.get_workflow_handle(answer.record.override_id))
        return answer

    async def release(self, answer: OverrideAnswer) -> None:
        handle = self.client.get_workflow_handle(answer.record.override_id)
        await handle.execute_update(RELEASE, PersonRequest(who=APPROVER, why="done"), result_type=UpdateResult)

    def read(self) -> tuple[int, str, int]:
        """TTL, model of `faq`, window, as the data plane has them."""
        return self.knobs.cache_ttl_seconds, self.knobs.model_for("faq"), self.knobs.batch_window_ms

    def in_redis(self) -> tuple[Any, Any, Any]:
        routing: Any = self.ledger.effective(ROUTING, BASELINE)
        return self.ledger.effective(TTL, BASELINE), routing["faq"], self.ledger.effective(WINDOW, BASELINE)

    async def until(self, what: Callable[[], Any], seconds: float = WITHIN_SECONDS) -> None:
        give_up_at = time.monotonic() + seconds
        while True:
            with suppress(redis.RedisError):
                found = what()
                if await found if asyncio.iscoroutine(found) else found:
                    return
            assert time.monotonic() < give_up_at, "it never came true"
            await asyncio.sleep(0.02)

    @contextmanager
    def looking_on(self) -> Iterator[None]:
        """Collects every combination of values that the data plane has meanwhile."""
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(0.002):
                self.seen.add(self.read())

        looking = threading.Thread(target=look)
        looking.start()
        try:
            yield
        finally:
            stop.set()
            looking.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path, "--repl-diskless-sync-delay", "0").start()
    yield server
    server.kill()


@pytest.fixture
async def scene(temporal: TemporalServer, server: ValkeyServer) -> AsyncIterator[Scene]:
    client = await Client.connect(temporal.address, plugins=[runbook_plugin()])
    world = FakeWorld()
    with (
        connect(server.url) as connection,
        ThreadPoolExecutor(16) as threads,
        Knobs(connection, BASELINE) as knobs,
    ):
        ledger = Ledger(connection)
        ledger.ensure_epoch()
        leases = LeaseActivities(ledger)
        activities = [getattr(leases, one.__name__, one) for one in activities_of(world, FakeEntities(world))]
        scene = Scene(client, ledger, knobs)
        worker = Worker(client, task_queue=MODEL, workflows=WORKFLOWS, activities=activities, activity_executor=threads)
        async with worker:
            watching = asyncio.create_task(watch_redis(ledger, knobs, client))
            yield scene
            assert not watching.done(), watching
            watching.cancel()
            for handle in scene.handles:
                with suppress(RPCError):
                    await handle.terminate("the test is over")


async def test_a_restart_without_persistence(scene: Scene, server: ValkeyServer) -> None:
    await scene.incidents()
    kept = await scene.set(WINDOW, 100, timedelta(minutes=5), "kept")
    short = await scene.set(TTL, 300, timedelta(seconds=6), "short")
    await scene.until(lambda: scene.read() == (300, "haiku", 100))
    with scene.looking_on():
        server.kill()
        assert short.record.ends_at is not None
        await asyncio.sleep(max(0.0, (short.record.ends_at - datetime.now(UTC)).total_seconds()) + 0.5)
        server.start()
        await scene.until(lambda: scene.in_redis() == (120, "haiku", 100))
        await scene.until(lambda: scene.read() == (120, "haiku", 100))
        await asyncio.sleep(6)  # the loss is told twice
    assert scene.seen == {(300, "haiku", 100), (120, "haiku", 100)}, "no task dropped to baseline meanwhile"
    assert len(scene.ledger.leases().leases) == 3 * 2 + 1
    handle = scene.client.get_workflow_handle(short.record.override_id, result_type=OverrideRecord)
    ended: OverrideRecord = await asyncio.wait_for(handle.result(), 40)
    assert ended.end in (OverrideEnd.ON_TIME, OverrideEnd.LAPSED)
    [lease] = [lease for lease in scene.ledger.leases().leases if lease.knob is WINDOW]
    assert kept.record.ends_at is not None
    assert abs(lease.expires_at - kept.record.ends_at) < timedelta(seconds=3), "with the time left"


async def test_a_failover_to_a_replica_that_had_lost_the_last_writes(
    scene: Scene, server: ValkeyServer, tmp_path: Path
) -> None:
    (tmp_path / "replica").mkdir()
    replica = ValkeyServer(tmp_path / "replica", "--replicaof", "127.0.0.1", str(server.port)).start()
    try:
        with connect(replica.url) as promoted:
            await scene.incidents()
            ended = await scene.set(TTL, 300, timedelta(minutes=5), "ended")
            [lease_id] = [lease.lease_id for lease in scene.ledger.leases().leases if lease.value == 300]
            await scene.until(lambda: promoted.hexists(keys.LEASES, lease_id))
            promoted.replicaof("NO", "ONE")
            await scene.release(ended)
            await scene.set(WINDOW, 100, timedelta(minutes=5), "lost")
            await scene.until(lambda: scene.read() == (120, "haiku", 100))
            with scene.looking_on():
                server.kill()
                promoted.config_set("port", server.port)
                await scene.until(lambda: scene.in_redis() == (120, "haiku", 100))
                await scene.until(lambda: scene.knobs.status().unconfirmed_leases == 0)
            assert scene.seen == {(120, "haiku", 100)}, "neither dropped nor brought back to life"
            assert len(scene.ledger.leases().leases) == 3 * 2 + 1
    finally:
        replica.kill()
