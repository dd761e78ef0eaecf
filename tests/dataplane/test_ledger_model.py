"""Any interleaving of holders, renewals, releases, expiries and losses: the ledger agrees with a plain model."""

import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dataplane.connection import connect
from dataplane.ledger import LeaseRefusedError, Ledger, ReleaseOutcome, TakeOutcome
from domain.knobs import Holder, KnobName, KnobValue, Lease, LeaseRequest
from tests.servers import ValkeyServer

IDS = ("a", "b", "c", "d", "e")
HOLDERS = st.sampled_from([Holder(kind="incident", id="incident-x"), Holder(kind="person", id="a:b")])
VALUES = st.sampled_from([60, 120, {"faq": "haiku"}, {"search": "haiku", "faq": "sonnet"}])
DURATIONS_MS = st.sampled_from([1, 15, 40, 60_000])
TAKEN = {TakeOutcome.ACQUIRED, TakeOutcome.RENEWED, TakeOutcome.PUT_BACK}


def _request(lease_id: str, value: KnobValue, holder: Holder, duration_ms: int) -> LeaseRequest:
    knob = KnobName.CACHE_TTL_SECONDS if isinstance(value, int) else KnobName.MODEL_ROUTING
    return LeaseRequest(lease_id=lease_id, knob=knob, value=value, holder=holder, reason="any", duration_ms=duration_ms)


REQUESTS = st.lists(
    st.builds(_request, st.sampled_from(IDS), VALUES, HOLDERS, DURATIONS_MS),
    min_size=1,
    max_size=3,
    unique_by=lambda request: request.lease_id,
)


@dataclass(frozen=True)
class Span:
    """The server's clock before and after a call: the call happened in between."""

    start: datetime
    end: datetime


class LedgerMachine(RuleBasedStateMachine):
    """The model: the last grant of each id, the ids released, and what the audit must say."""

    client: redis.Redis

    @initialize()
    def begin(self) -> None:
        self.client.flushall()
        self.ledger = Ledger(self.client)
        self.started = self._now()
        self.granted: dict[str, Lease] = {}
        self.released: set[str] = set()
        self.audited: Counter[tuple[str, str, datetime]] = Counter()

    def _now(self) -> datetime:
        seconds, micros = self.client.time()
        return datetime.fromtimestamp(seconds, UTC) + timedelta(milliseconds=micros // 1000)

    def _may_be_alive(self, lease_id: str, span: Span) -> set[bool]:
        lease = self.granted.get(lease_id)
        return {lease is not None and lease.expires_at > moment for moment in (span.start, span.end)}

    def _may_become(self, request: LeaseRequest, new: TakeOutcome, span: Span) -> set[TakeOutcome]:
        if request.lease_id in self.released:
            return {TakeOutcome.RELEASED}
        outcomes = set()
        for alive in self._may_be_alive(request.lease_id, span):
            held = self.granted.get(request.lease_id)
            if not alive or held is None:
                outcomes.add(new)
            elif held.holder != request.holder:
                outcomes.add(TakeOutcome.OTHER_HOLDER)
            elif (held.knob, held.value) != (request.knob, request.value):
                outcomes.add(TakeOutcome.CHANGED)
            else:
                outcomes.add(TakeOutcome.RENEWED)
        return outcomes

    def _grant(self, request: LeaseRequest, lease: Lease, span: Span) -> None:
        held = self.granted.get(request.lease_id)
        renewed = held is not None and held.acquired_at == lease.acquired_at
        if held is not None and not renewed:
            self.audited["expired", held.lease_id, held.expires_at] += 1
        floor = held.expires_at if held is not None and renewed else span.start
        duration = timedelta(milliseconds=request.duration_ms)
        assert max(floor, span.start + duration) <= lease.expires_at <= max(floor, span.end + duration)
        assert (lease.knob, lease.value, lease.holder) == (request.knob, request.value, request.holder)
        self.granted[request.lease_id] = lease
        self.audited["renewed" if renewed else "acquired", lease.lease_id, lease.expires_at] += 1

    @rule(requests=REQUESTS)
    def acquire(self, requests: list[LeaseRequest]) -> None:
        start = self._now()
        leases: list[Lease] = []
        refusals: dict[str, TakeOutcome] = {}
        try:
            leases = self.ledger.acquire(requests)
        except LeaseRefusedError as error:
            refusals = error.refusals
        span = Span(start, self._now())
        for request in requests:
            possible = self._may_become(request, TakeOutcome.ACQUIRED, span)
            assert {refusals[request.lease_id]} <= possible if request.lease_id in refusals else possible & TAKEN
        assert bool(leases) != bool(refusals)
        for request, lease in zip(requests, leases, strict=False):
            self._grant(request, lease, span)

    @rule(requests=REQUESTS)
    def renew(self, requests: list[LeaseRequest]) -> None:
        start = self._now()
        results = self.ledger.renew(requests)
        span = Span(start, self._now())
        for request, result in zip(requests, results, strict=True):
            assert result.outcome in self._may_become(request, TakeOutcome.PUT_BACK, span)
            assert (result.lease is not None) == (result.outcome in TAKEN)
            if result.lease is not None:
                self._grant(request, result.lease, span)

    @rule(data=st.data())
    def renew_what_is_held(self, data: st.DataObject) -> None:
        if self.granted:
            held = [self.granted[id_] for id_ in data.draw(st.sets(st.sampled_from(sorted(self.granted)), min_size=1))]
            duration_ms = data.draw(DURATIONS_MS)
            self.renew([_request(lease.lease_id, lease.value, lease.holder, duration_ms) for lease in held])

    @rule(ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=3, unique=True), holder=HOLDERS)
    def release(self, ids: list[str], holder: Holder) -> None:
        start = self._now()
        try:
            results = self.ledger.release(ids, holder, "done")
        except LeaseRefusedError as error:
            span = Span(start, self._now())
            for id_ in error.refusals:
                assert True in self._may_be_alive(id_, span)
                assert self.granted[id_].holder != holder
            return
        span = Span(start, self._now())
        for id_, result in zip(ids, results, strict=True):
            held = self.granted.pop(id_, None)
            if id_ in self.released:
                assert result.outcome is ReleaseOutcome.ALREADY_RELEASED
            elif result.outcome is ReleaseOutcome.RELEASED:
                assert held is not None
                assert held.holder == holder
                assert held.expires_at > span.start
                self.audited["released", id_, held.expires_at] += 1
            else:
                assert result.outcome is ReleaseOutcome.NOT_HELD
                if held is not None:
                    assert held.expires_at <= span.end
                    self.audited["expired", id_, held.expires_at] += 1
            self.released.add(id_)

    @rule(ms=st.sampled_from([1, 10, 20]))
    def wait(self, ms: int) -> None:
        time.sleep(ms / 1000)

    @rule()
    def sweep(self) -> None:
        self.ledger.sweep()

    @rule()
    def lose_everything(self) -> None:
        self._check_audit()
        self.begin()

    @invariant()
    def what_is_in_force_is_what_is_unexpired(self) -> None:
        view = self.ledger.leases(IDS)
        unexpired = {id_: lease for id_, lease in self.granted.items() if lease.expires_at > view.server_time}
        assert {lease.lease_id: lease for lease in view.leases} == unexpired
        assert view.released == self.released

    def teardown(self) -> None:
        if hasattr(self, "granted"):
            self._check_audit()

    def _check_audit(self) -> None:
        start = self._now()
        self.ledger.sweep()
        expected = self.audited.copy()
        for lease in self.granted.values():
            if lease.expires_at <= start:
                expected["expired", lease.lease_id, lease.expires_at] += 1
        known = Counter[tuple[str, str, datetime]](
            (entry.action, entry.lease_id, entry.expires_at) for entry in self.ledger.history(self.started)
        )
        assert expected <= known
        assert all(action == "expired" and start < end <= self._now() for action, _, end in known - expected)


def test_the_ledger_agrees_with_a_plain_model(valkey: ValkeyServer, redis_client: redis.Redis) -> None:
    with connect(valkey.url) as client:
        LedgerMachine.client = client
        run_state_machine_as_test(
            LedgerMachine,
            settings=settings(
                max_examples=40,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
