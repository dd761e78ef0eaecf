"""The data plane's readers of the knobs, with a thread and with asyncio, against real servers, there and away."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from dataplane import keys
from dataplane.connection import connect, connect_async
from dataplane.knob_copy import HistoryTruncation, KnobCopy
from dataplane.knobs import AsyncKnobs, Knobs
from dataplane.ledger import Ledger, LedgerView
from domain.knobs import Baseline, Holder, KnobName, Lease, LeaseRequest
from domain.policy import Policy
from tests.servers import ValkeyCluster, ValkeyServer

BASELINE = Baseline(
    cache_ttl_seconds=30, model_routing={"faq": "sonnet", "search": "sonnet"}, model_ranks={"haiku": 1, "sonnet": 2}
)
HOLDER = Holder(kind="incident", id="incident-bedrock-throttle:sonnet")
NEVER = timedelta(hours=1)
OFTEN = timedelta(milliseconds=100)

Follow = Callable[[str, timedelta], AbstractContextManager[KnobCopy]]


@contextmanager
def follow_with_a_thread(url: str, poll_every: timedelta) -> Iterator[KnobCopy]:
    with connect(url) as client, Knobs(client, BASELINE, poll_every) as knobs:
        yield knobs


@contextmanager
def follow_with_asyncio(url: str, poll_every: timedelta) -> Iterator[KnobCopy]:
    """The reader in a loop of its own, so that the test may block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def begin() -> AsyncKnobs:
        return AsyncKnobs(connect_async(url), BASELINE, poll_every).start()

    async def end() -> None:
        await knobs.close()
        await knobs._client.aclose()

    try:
        knobs = asyncio.run_coroutine_threadsafe(begin(), loop).result(40)
        yield knobs
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(40)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(params=[follow_with_a_thread, follow_with_asyncio], ids=["thread", "asyncio"])
def follow(request: pytest.FixtureRequest) -> Follow:
    chosen: Follow = request.param
    return chosen


def ttl(lease_id: str, seconds: int, duration_ms: int = 60_000) -> LeaseRequest:
    return LeaseRequest(
        lease_id=lease_id,
        knob=KnobName.CACHE_TTL_SECONDS,
        value=seconds,
        holder=HOLDER,
        reason="throttled",
        duration_ms=duration_ms,
    )


def eventually(condition: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path).start()
    yield server
    server.kill()


def test_a_change_is_pushed_and_a_lease_ends_without_a_word(
    redis_client: redis.Redis, server_url: str, follow: Follow
) -> None:
    ledger = Ledger(redis_client)
    ledger.acquire([ttl("before", 60)])
    with follow(server_url, NEVER) as knobs:
        eventually(lambda: knobs.cache_ttl_seconds == 60)
        eventually(lambda: knobs.status().connected)
        routing = LeaseRequest(
            lease_id="routing",
            knob=KnobName.MODEL_ROUTING,
            value={"faq": "haiku"},
            holder=HOLDER,
            reason="throttled",
            duration_ms=60_000,
        )
        ledger.acquire([ttl("now", 120, duration_ms=1000), routing])
        eventually(lambda: knobs.cache_ttl_seconds == 120)
        assert knobs.model_for("faq") == "haiku"
        assert knobs.model_for("search") == "sonnet"
        eventually(lambda: knobs.cache_ttl_seconds == 60)
        ledger.release(["before", "routing"], HOLDER, "recovered")
        eventually(lambda: knobs.cache_ttl_seconds == 30 and knobs.model_for("faq") == "sonnet")
        status = knobs.status()
        assert (status.connected, status.polls, status.errors, status.reconnects) == (True, 0, 0, 0)
        assert (status.pushes, status.version, status.leases) == (2, ledger.leases().version, 0)
        assert status.staleness_seconds is not None
        assert 0 <= status.staleness_seconds < 10
    assert not knobs.status().connected
    with pytest.raises(KeyError):
        knobs.model_for("weather")


def test_polling_finds_what_no_message_told(redis_client: redis.Redis, server_url: str, follow: Follow) -> None:
    with follow(server_url, timedelta(milliseconds=50)) as knobs:
        Ledger(redis_client).acquire([ttl("a", 60)])
        eventually(lambda: knobs.cache_ttl_seconds == 60 and knobs.status().polls > 0)
        now_ms = int(time.time() * 1000)
        record = redis_client.hget(keys.LEASES, "a")
        assert isinstance(record, str)
        redis_client.hset(keys.LEASES, "b", record.replace('"60"', '"90"'))
        redis_client.zadd(keys.EXPIRIES, {"b": now_ms + 60_000})
        eventually(lambda: knobs.cache_ttl_seconds == 90)


def test_while_redis_is_away_and_then_empty_each_lease_stays_until_its_own_end(own_server: ValkeyServer) -> None:
    with connect(own_server.url) as client:
        ledger, knobs = Ledger(client), Knobs(client, BASELINE)
        ledger.acquire([ttl("long", 120), ttl("short", 240, duration_ms=2500), ttl("other", 60)])
        assert knobs.cache_ttl_seconds == 30, "never read: the baseline"
        knobs.refresh()
        own_server.kill()
        assert knobs.cache_ttl_seconds == 240
        with pytest.raises(redis.ConnectionError):
            knobs.refresh()
        eventually(lambda: knobs.cache_ttl_seconds == 120)
        assert Knobs(client, BASELINE).cache_ttl_seconds == 30
        own_server.start()
        knobs.refresh()
        assert knobs.cache_ttl_seconds == 120
        ledger.ensure_epoch()
        ledger.renew([ttl("other", 60)])
        knobs.refresh()
        assert knobs.cache_ttl_seconds == 120, "another owner is back, this one not yet"
        ledger.release(["long"], HOLDER, "ended while Redis was away")
        knobs.refresh()
        assert knobs.cache_ttl_seconds == 60, "only a recorded release ends a lease early"


def test_following_survives_a_restart_without_persistence(own_server: ValkeyServer, follow: Follow) -> None:
    with connect(own_server.url) as client, follow(own_server.url, OFTEN) as knobs:
        ledger = Ledger(client)
        ledger.ensure_epoch()
        ledger.acquire([ttl("a", 120), ttl("short", 300, duration_ms=3000)])
        eventually(lambda: knobs.cache_ttl_seconds == 300)
        own_server.kill()
        eventually(lambda: knobs.status().errors > 0)
        assert knobs.cache_ttl_seconds == 300
        own_server.start()
        eventually(lambda: knobs.status().unconfirmed_leases > 0)
        eventually(lambda: knobs.cache_ttl_seconds == 120)
        ledger.acquire([ttl("b", 240)])
        eventually(lambda: knobs.cache_ttl_seconds == 240)
        ledger.release(["b"], HOLDER, "done")
        eventually(lambda: knobs.cache_ttl_seconds == 120)
        status = knobs.status()
        assert (status.losses, status.leases, status.unconfirmed_leases) == (1, 1, 1)
        assert status.reconnects > 0


def test_a_flush_drops_nobody_to_the_baseline_and_brings_nothing_back(own_server: ValkeyServer, follow: Follow) -> None:
    with connect(own_server.url) as client, follow(own_server.url, OFTEN) as knobs:
        ledger = Ledger(client)
        ledger.ensure_epoch()
        ledger.acquire([ttl("ended", 300), ttl("kept", 120)])
        eventually(lambda: knobs.cache_ttl_seconds == 300)
        ledger.release(["ended"], HOLDER, "recovered")
        eventually(lambda: knobs.cache_ttl_seconds == 120)
        client.flushall()
        eventually(lambda: knobs.status().losses == 1)
        assert knobs.cache_ttl_seconds == 120
        ledger.renew([ttl("kept", 120), ttl("ended", 300)])
        eventually(lambda: knobs.status().version == ledger.leases().version)
        assert knobs.cache_ttl_seconds == 120, "a late retry of what was seen to be released"
        assert knobs.status().unconfirmed_leases == 0


def test_a_failover_to_a_replica_that_had_lost_the_last_writes(tmp_path: Path, follow: Follow) -> None:
    (tmp_path / "replica").mkdir()
    primary = ValkeyServer(tmp_path, "--repl-diskless-sync-delay", "0").start()
    replica = ValkeyServer(tmp_path / "replica", "--replicaof", "127.0.0.1", str(primary.port)).start()
    try:
        with (
            connect(primary.url) as client,
            connect(replica.url) as promoted,
            follow(primary.url, OFTEN) as knobs,
        ):
            ledger = Ledger(client)
            ledger.ensure_epoch()
            ledger.acquire([ttl("released", 300)])
            eventually(lambda: bool(promoted.hexists(keys.LEASES, "released")))
            promoted.replicaof("NO", "ONE")
            ledger.acquire([ttl("taken", 120)])
            ledger.release(["released"], HOLDER, "recovered")
            eventually(lambda: knobs.cache_ttl_seconds == 120)
            primary.kill()
            promoted.config_set("port", primary.port)
            eventually(lambda: knobs.status().losses == 1)
            assert [lease.lease_id for lease in ledger.leases().leases] == ["released"], "what Redis believes"
            assert knobs.cache_ttl_seconds == 120, "what is so"
            assert knobs.status().unconfirmed_leases == 1
            ledger.renew([ttl("taken", 120)])
            eventually(lambda: knobs.status().unconfirmed_leases == 0)
            ledger.release(["taken"], HOLDER, "recovered")
            eventually(lambda: knobs.cache_ttl_seconds == 30)
    finally:
        primary.kill()
        replica.kill()


def test_a_clusters_failover_is_followed(tmp_path: Path, follow: Follow) -> None:
    cluster = ValkeyCluster(tmp_path, spare=True).start()
    try:
        with connect(cluster.url) as client, follow(cluster.url, OFTEN) as knobs:
            ledger = Ledger(client)
            ledger.acquire([ttl("a", 120)])
            eventually(lambda: knobs.cache_ttl_seconds == 120)
            cluster.kill_owner()
            cluster.await_failover()
            ledger.acquire([ttl("b", 240)])
            eventually(lambda: knobs.cache_ttl_seconds == 240)
            eventually(lambda: knobs.status().connected)
            ledger.release(["b"], HOLDER, "done")
            eventually(lambda: knobs.cache_ttl_seconds == 120)
    finally:
        cluster.kill()


def test_the_copy_goes_by_its_own_clock_and_types_every_knob() -> None:
    now, server_time = 1000.0, datetime(2026, 11, 24, 12, tzinfo=UTC)
    copy = KnobCopy(Policy().baseline, clock=lambda: now)
    values: dict[KnobName, Any] = {
        KnobName.CACHE_TTL_SECONDS: 120,
        KnobName.MODEL_ROUTING: {"faq": "haiku"},
        KnobName.BATCH_WINDOW_MS: 0,
        KnobName.REQUEST_COALESCING: True,
        KnobName.INVOCATIONS_PER_SECOND_PER_TASK: 5,
        KnobName.FEATURE_FLAG: {"taste_profile": False},
        KnobName.MAX_OUTPUT_TOKENS: {"faq": 512},
        KnobName.HISTORY_TRUNCATION: {"faq": {"recent": 20, "top": 10}},
    }
    leases = tuple(
        Lease(
            lease_id=knob,
            knob=knob,
            value=value,
            holder=HOLDER,
            reason="any",
            acquired_at=server_time,
            expires_at=server_time + timedelta(seconds=10),
            version=1,
        )
        for knob, value in values.items()
    )

    def read() -> list[object]:
        return [
            copy.cache_ttl_seconds,
            copy.model_for("faq"),
            copy.batch_window_ms,
            copy.request_coalescing,
            copy.invocations_per_second_per_task,
            copy.feature_enabled("taste_profile"),
            copy.max_output_tokens("faq"),
            copy.history_truncation("faq"),
        ]

    configured = [30, "sonnet", 1000, False, None, True, 1024, None]
    assert read() == configured
    assert copy.status().staleness_seconds is None
    copy.take(LedgerView(leases, "e", 1, server_time, frozenset()), asked_at=now)
    assert read() == [120, "haiku", 0, True, 5, False, 512, HistoryTruncation(recent=20, top=10)]
    now += 9.9
    assert copy.batch_window_ms == 0
    assert copy.status().leases == len(KnobName)
    assert copy.status().staleness_seconds == pytest.approx(9.9)
    now += 0.1
    assert read() == configured
    assert copy.status().leases == 0


def test_the_chatbot_needs_domain_and_dataplane_alone() -> None:
    code = """
import sys
import dataplane.connection, dataplane.knobs, dataplane.routes
rooms = {"activities", "workflows", "workers", "ops", "simulator"}
print(sorted((rooms | {"temporalio", "boto3", "botocore", "moto", "rich", "typer"}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
