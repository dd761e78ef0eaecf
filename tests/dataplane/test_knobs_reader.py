"""The data plane's reader of the knobs against a real server, there and away."""

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis

from dataplane import keys
from dataplane.connection import connect
from dataplane.knobs import Knobs
from dataplane.ledger import Ledger
from domain.knobs import Baseline, Holder, KnobName, LeaseRequest
from tests.servers import ValkeyServer

BASELINE = Baseline(
    cache_ttl_seconds=30, model_routing={"faq": "sonnet", "search": "sonnet"}, model_ranks={"haiku": 1, "sonnet": 2}
)
HOLDER = Holder(kind="incident", id="incident-bedrock-throttle:sonnet")
NEVER = timedelta(hours=1)


def ttl(lease_id: str, seconds: int, duration_ms: int = 60_000) -> LeaseRequest:
    return LeaseRequest(
        lease_id=lease_id,
        knob=KnobName.CACHE_TTL_SECONDS,
        value=seconds,
        holder=HOLDER,
        reason="throttled",
        duration_ms=duration_ms,
    )


def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path).start()
    yield server
    server.kill()


def test_a_change_is_pushed_and_a_lease_ends_without_a_word(redis_client: redis.Redis) -> None:
    ledger = Ledger(redis_client)
    ledger.acquire([ttl("before", 60)])
    with Knobs(redis_client, BASELINE, poll_every=NEVER) as knobs:
        eventually(lambda: knobs.cache_ttl_seconds == 60)
        routing = LeaseRequest(
            lease_id="routing",
            knob=KnobName.MODEL_ROUTING,
            value={"faq": "haiku"},
            holder=HOLDER,
            reason="throttled",
            duration_ms=60_000,
        )
        ledger.acquire([ttl("now", 120, duration_ms=300), routing])
        eventually(lambda: knobs.cache_ttl_seconds == 120)
        assert knobs.model_for("faq") == "haiku"
        assert knobs.model_for("search") == "sonnet"
        eventually(lambda: knobs.cache_ttl_seconds == 60)
        ledger.release(["before", "routing"], HOLDER, "recovered")
        eventually(lambda: knobs.cache_ttl_seconds == 30 and knobs.model_for("faq") == "sonnet")
    with pytest.raises(KeyError):
        knobs.model_for("weather")


def test_polling_finds_what_no_message_told(redis_client: redis.Redis) -> None:
    with Knobs(redis_client, BASELINE, poll_every=timedelta(milliseconds=50)) as knobs:
        Ledger(redis_client).acquire([ttl("a", 60)])
        eventually(lambda: knobs.cache_ttl_seconds == 60)
        now_ms = int(time.time() * 1000)
        record = redis_client.hget(keys.LEASES, "a")
        assert isinstance(record, str)
        redis_client.hset(keys.LEASES, "b", record.replace('"60"', '"90"'))
        redis_client.zadd(keys.EXPIRIES, {"b": now_ms + 60_000})
        eventually(lambda: knobs.cache_ttl_seconds == 90)


def test_while_redis_is_away_and_then_empty_each_lease_stays_until_its_own_end(own_server: ValkeyServer) -> None:
    with connect(own_server.url) as client:
        ledger, knobs = Ledger(client), Knobs(client, BASELINE)
        ledger.acquire([ttl("long", 120), ttl("short", 240, duration_ms=1000), ttl("other", 60)])
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


def test_following_survives_a_restart(own_server: ValkeyServer) -> None:
    with connect(own_server.url) as client, Knobs(client, BASELINE, poll_every=timedelta(milliseconds=200)) as knobs:
        ledger = Ledger(client)
        ledger.acquire([ttl("a", 120)])
        eventually(lambda: knobs.cache_ttl_seconds == 120)
        own_server.kill()
        time.sleep(0.3)
        assert knobs.cache_ttl_seconds == 120
        own_server.start()
        ledger.acquire([ttl("b", 240)])
        eventually(lambda: knobs.cache_ttl_seconds == 240)
        ledger.release(["b"], HOLDER, "done")
        eventually(lambda: knobs.cache_ttl_seconds == 120)
