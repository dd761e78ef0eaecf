"""The lease ledger against a real server."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import redis

from dataplane import keys, ledger_scripts
from dataplane.connection import connect
from dataplane.ledger import LeaseRefusedError, Ledger, ReleaseOutcome, TakeOutcome
from domain.knobs import Baseline, Holder, KnobName, KnobValue, LeaseRequest
from tests.servers import ValkeyServer

BASELINE = Baseline(
    cache_ttl_seconds=30, model_routing={"faq": "sonnet", "search": "sonnet"}, model_ranks={"haiku": 1, "sonnet": 2}
)
INCIDENT = Holder(kind="incident", id="incident-bedrock-throttle:sonnet")
PERSON = Holder(kind="person", id="mika")
TTL, ROUTING = KnobName.CACHE_TTL_SECONDS, KnobName.MODEL_ROUTING


def ask(lease_id: str, value: KnobValue = 120, holder: Holder = INCIDENT, duration_ms: int = 60_000) -> LeaseRequest:
    knob = TTL if isinstance(value, int) else ROUTING
    return LeaseRequest(
        lease_id=lease_id, knob=knob, value=value, holder=holder, reason="throttled", duration_ms=duration_ms
    )


def eventually(condition: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.002)


@pytest.fixture
def books(redis_client: redis.Redis) -> Ledger:
    return Ledger(redis_client)


def test_several_leases_are_taken_merged_released_and_audited(books: Ledger) -> None:
    start = books.leases().server_time
    ttl, routing = books.acquire([ask("a:ttl"), ask("a:routing", {"faq": "haiku"})])
    books.acquire([ask("b:ttl", 60, PERSON)])
    view = books.leases()
    assert {lease.lease_id for lease in view.leases} == {"a:ttl", "a:routing", "b:ttl"}
    assert ttl in view.leases
    assert routing in view.leases
    assert timedelta(seconds=30) < ttl.expires_at - view.server_time <= timedelta(seconds=60)
    assert ttl.holder == INCIDENT
    assert books.effective(TTL, BASELINE) == 120
    assert books.effective(ROUTING, BASELINE) == {"faq": "haiku", "search": "sonnet"}

    assert [r.outcome for r in books.release(["a:ttl", "a:routing"], INCIDENT, "recovered")] == ["released"] * 2
    assert books.effective(TTL, BASELINE) == 60
    assert books.effective(ROUTING, BASELINE) == BASELINE.model_routing
    history = books.history(start)
    assert [(e.action, e.lease_id) for e in history] == [
        ("acquired", "a:ttl"),
        ("acquired", "a:routing"),
        ("acquired", "b:ttl"),
        ("released", "a:ttl"),
        ("released", "a:routing"),
    ]
    assert history[-1].reason == "recovered"
    assert history[-1].value == {"faq": "haiku"}
    assert history[2].holder == PERSON
    assert [e.lease_id for e in books.history(start, count=2)] == ["a:ttl", "a:routing"]
    assert books.history(books.leases().server_time + timedelta(seconds=1)) == []


def test_the_same_id_again_renews_and_never_shortens(books: Ledger) -> None:
    first = books.acquire([ask("a")])[0]
    shorter = books.acquire([ask("a", duration_ms=1000)])[0]
    longer = books.acquire([ask("a", duration_ms=120_000)])[0]
    assert shorter.expires_at == first.expires_at
    assert longer.expires_at > first.expires_at
    assert longer.acquired_at == first.acquired_at
    assert first.version < shorter.version < longer.version
    assert books.leases().leases == (longer,)


def test_a_refusal_names_the_lease_and_changes_nothing(books: Ledger) -> None:
    books.acquire([ask("mine"), ask("gone")])
    books.release(["gone"], INCIDENT, "done")
    before = books.leases()
    with pytest.raises(LeaseRefusedError, match="another holder") as caught:
        books.acquire([ask("new"), ask("mine", holder=PERSON), ask("gone")])
    assert caught.value.refusals == {"mine": TakeOutcome.OTHER_HOLDER, "gone": TakeOutcome.RELEASED}
    with pytest.raises(LeaseRefusedError, match="another knob or value"):
        books.acquire([ask("mine", 240)])
    with pytest.raises(LeaseRefusedError, match="another holder"):
        books.release(["mine"], PERSON, "not mine")
    after = books.leases()
    assert (after.leases, after.version) == (before.leases, before.version)
    with pytest.raises(ValueError, match="twice"):
        books.acquire([ask("x"), ask("x")])
    with pytest.raises(ValueError, match="4096 are allowed"):
        books.acquire([ask("x", {"faq": "m" * 5000})])


def test_releasing_again_or_what_is_not_there_is_a_success_that_says_so(books: Ledger) -> None:
    books.acquire([ask("a"), ask("short", duration_ms=1)])
    time.sleep(0.005)
    ids = ["a", "short", "never"]
    assert [r.outcome for r in books.release(ids, INCIDENT, "done")] == ["released", "not_held", "not_held"]
    version = books.leases().version
    assert {r.outcome for r in books.release(ids, INCIDENT, "done")} == {ReleaseOutcome.ALREADY_RELEASED}
    assert books.leases().version == version
    assert {r.outcome for r in books.renew([ask(id_) for id_ in ids])} == {TakeOutcome.RELEASED}


def test_a_lease_expires_with_no_living_process_and_is_audited_once(books: Ledger, server_url: str) -> None:
    lease = books.acquire([ask("a", duration_ms=30)])[0]
    with connect(server_url) as stranger:
        eventually(lambda: not Ledger(stranger).leases().leases)
        assert Ledger(stranger).effective(TTL, BASELINE) == 30
    assert books.leases().server_time >= lease.expires_at
    assert books.sweep()
    assert not books.sweep()
    ended = books.history(lease.acquired_at)[-1]
    assert (ended.action, ended.at) == ("expired", lease.expires_at)
    assert books.renew([ask("a", holder=PERSON)])[0].outcome is TakeOutcome.PUT_BACK, "an expired id is free"


def test_a_lost_redis_is_noticed_and_owners_put_back_what_was_not_released(tmp_path: Path) -> None:
    server = ValkeyServer(tmp_path).start()
    try:
        with connect(server.url) as client:
            books = Ledger(client)
            assert books.leases().epoch is None
            epoch = books.ensure_epoch()
            assert books.ensure_epoch() == epoch == books.leases().epoch
            books.acquire([ask("kept"), ask("released")])
            server.kill()
            with pytest.raises(redis.ConnectionError):
                books.leases()
            server.start()
            lost = books.leases()
            assert (lost.epoch, lost.leases) == (None, ())
            books.release(["released"], INCIDENT, "ended meanwhile")
            results = books.renew([ask("released"), ask("kept")])
            assert [r.outcome for r in results] == [TakeOutcome.RELEASED, TakeOutcome.PUT_BACK]
            assert [lease.lease_id for lease in books.leases().leases] == ["kept"]
            assert books.ensure_epoch() not in (None, epoch)
            assert books.renew([ask("kept")])[0].outcome is TakeOutcome.RENEWED
    finally:
        server.kill()


def test_threads_racing_for_one_id_give_one_holder(books: Ledger) -> None:
    holders = [Holder(kind="person", id=f"p{n}") for n in range(8)]

    def race(holder: Holder) -> bool:
        try:
            books.acquire([ask("hot", holder=holder), ask(f"{holder.id}:own", holder=holder)])
        except LeaseRefusedError:
            return False
        return True

    for _ in range(20):
        books.acquire([ask("warm")])
        with ThreadPoolExecutor(8) as pool:
            won = [holder for holder, ok in zip(holders, pool.map(race, holders), strict=True) if ok]
        assert len(won) == 1
        held = {lease.lease_id: lease.holder for lease in books.leases().leases}
        assert held == {"hot": won[0], f"{won[0].id}:own": won[0], "warm": INCIDENT}
        books._client.flushall()


def test_everything_is_bounded(books: Ledger, redis_client: redis.Redis) -> None:
    for start in range(0, ledger_scripts.MAX_LEASES, 100):
        books.acquire([ask(f"l{n}", duration_ms=600_000) for n in range(start, start + 100)])
    with pytest.raises(LeaseRefusedError, match="one more than the 1000"):
        books.acquire([ask("l0"), ask("straw")])
    assert books.renew([ask("straw"), ask("l0")])[0].outcome is TakeOutcome.FULL
    assert len(books.leases().leases) == ledger_scripts.MAX_LEASES
    for start in range(0, ledger_scripts.MAX_RELEASED + 1000, 1000):
        books.release([f"r{n}" for n in range(start, start + 1000)], INCIDENT, "done")
    assert redis_client.zcard(keys.RELEASED) == ledger_scripts.MAX_RELEASED
    for _ in range(110):
        books.renew([ask(f"l{n}") for n in range(100)])
    assert redis_client.xlen(keys.AUDIT) < ledger_scripts.AUDIT_ENTRIES + 200
    assert books.leases(["l0", "r10999", "other"]).released == {"r10999"}


def test_keys_and_entries_of_a_later_version_do_not_break_this_one(books: Ledger, redis_client: redis.Redis) -> None:
    lease = books.acquire([ask("a")])[0]
    record = redis_client.hget(keys.LEASES, "a")
    assert isinstance(record, str)
    redis_client.hset(keys.LEASES, "later", record.replace(TTL, "volume"))
    redis_client.zadd(keys.EXPIRIES, {"later": lease.expires_at.timestamp() * 1000, "orphan": 1, "orphan2": 1e13})
    assert books.leases().leases == (lease,)
    assert books.release(["later"], INCIDENT, "done")[0].outcome is ReleaseOutcome.RELEASED
    assert [e.action for e in books.history(lease.acquired_at)] == ["acquired"]
    assert books.acquire([ask("orphan2")])
