"""Any interleaving of holders, pins, renewals, releases, expiries, refusals and losses: the ledger agrees with a plain
model, and what is in force is the merge of what is unexpired."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dataplane.connection import connect
from dataplane.ledger import LeaseRefusedError, Ledger, ReleaseOutcome, TakeOutcome
from domain.knobs import (
    Holder,
    KnobName,
    KnobValue,
    Lease,
    LeaseRequest,
    Refusal,
    baseline_value,
    effective_value,
)
from domain.policy import Policy

IDS = ("a", "b", "c", "d", "e")
HOLDERS = st.sampled_from([Holder(kind="incident", id="incident-x"), Holder(kind="person", id="a:b")])
BASELINE = Policy().baseline
VALUES: list[tuple[KnobName, Any]] = [
    *((KnobName.CACHE_TTL_SECONDS, value) for value in (60, 120, 300)),
    *((KnobName.MODEL_ROUTING, value) for value in ({"faq": "haiku"}, {"search": "haiku", "faq": "sonnet"})),
    *((KnobName.BATCH_WINDOW_MS, value) for value in (0, 500)),
    (KnobName.REQUEST_COALESCING, True),
    *((KnobName.INVOCATIONS_PER_SECOND_PER_TASK, value) for value in (5, 9)),
    *((KnobName.FEATURE_FLAG, {"taste_profile": value}) for value in (True, False)),
    *((KnobName.MAX_OUTPUT_TOKENS, value) for value in ({"faq": 512}, {"faq": 256, "search": 800})),
    (KnobName.HISTORY_TRUNCATION, {"faq": {"recent": 9, "top": 1}}),
    (KnobName.HISTORY_TRUNCATION, {"faq": {"recent": 5, "top": 5}}),
]
RULES: dict[KnobName, Callable[[list[Any]], Any]] = {
    KnobName.CACHE_TTL_SECONDS: max,
    KnobName.MODEL_ROUTING: min,  # "haiku" before "sonnet"
    KnobName.BATCH_WINDOW_MS: min,
    KnobName.REQUEST_COALESCING: any,
    KnobName.INVOCATIONS_PER_SECOND_PER_TASK: min,
    KnobName.FEATURE_FLAG: all,
    KnobName.MAX_OUTPUT_TOKENS: min,
    KnobName.HISTORY_TRUNCATION: lambda asked: {key: min(one[key] for one in asked) for key in ("recent", "top")},
}
DURATIONS_MS = st.sampled_from([1, 15, 40, 60_000])
TAKEN = {TakeOutcome.ACQUIRED, TakeOutcome.RENEWED, TakeOutcome.PUT_BACK}


def _request(
    lease_id: str, knob_and_value: tuple[KnobName, KnobValue], holder: Holder, duration_ms: int, pin: bool
) -> LeaseRequest:
    knob, value = knob_and_value
    return LeaseRequest(
        lease_id=lease_id, knob=knob, value=value, holder=holder, reason="any", duration_ms=duration_ms, pin=pin
    )


def _in_force(knob: KnobName, leases: Iterable[Lease]) -> Any:
    """The merge, in the plainest words."""
    configured: Any = baseline_value(knob, BASELINE)
    own: list[Any] = sorted(
        (one for one in leases if one.knob is knob), key=lambda one: (one.acquired_at, one.lease_id)
    )

    def of(asked: list[Any], pinned: list[Any], otherwise: Any) -> Any:
        return pinned[-1] if pinned else RULES[knob](asked) if asked else otherwise

    if not knob.spec.by:
        return of([one.value for one in own], [one.value for one in own if one.pin], configured)
    return {
        name: of(
            [one.value[name] for one in own if name in one.value],
            [one.value[name] for one in own if name in one.value and one.pin],
            otherwise,
        )
        for name, otherwise in configured.items()
    }


def _requests(knobs: Iterable[KnobName]) -> st.SearchStrategy[list[LeaseRequest]]:
    values = st.sampled_from([one for one in VALUES if one[0] in knobs])
    one = st.builds(_request, st.sampled_from(IDS), values, HOLDERS, DURATIONS_MS, st.booleans())
    return st.lists(one, min_size=1, max_size=3, unique_by=lambda request: request.lease_id)


REQUESTS = st.runner().flatmap(lambda machine: _requests(machine.knobs))


@dataclass(frozen=True)
class Span:
    """The server's clock before and after a call: the call happened in between."""

    start: datetime
    end: datetime


class LedgerMachine(RuleBasedStateMachine):
    """The model: the last grant of each id, the ids released, and what the audit must say."""

    client: redis.Redis

    @initialize(knobs=st.sets(st.sampled_from(KnobName), min_size=1, max_size=2))
    def begin(self, knobs: set[KnobName]) -> None:
        """Few knobs in one run, so that its leases meet."""
        self.knobs = knobs
        self.client.flushall()
        self.ledger = Ledger(self.client)
        self.started = self._now()
        self.granted: dict[str, Lease] = {}
        self.released: set[str] = set()
        self.audited: Counter[tuple[str, str, datetime]] = Counter()
        self.refused: Counter[tuple[str, str, str]] = Counter()

    def _now(self) -> datetime:
        return self.ledger.leases().server_time

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
            elif (held.knob, held.value, held.pin) != (request.knob, request.value, request.pin):
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
        asked = (request.knob, request.value, request.holder, request.pin)
        assert (lease.knob, lease.value, lease.holder, lease.pin) == asked
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
            if refusals.get(request.lease_id) is TakeOutcome.OTHER_HOLDER:
                self.refused["acquire", request.lease_id, request.holder.id] += 1
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
            if result.outcome is TakeOutcome.OTHER_HOLDER:
                self.refused["renew", request.lease_id, request.holder.id] += 1
            if result.lease is not None:
                self._grant(request, result.lease, span)

    @rule(data=st.data())
    def renew_what_is_held(self, data: st.DataObject) -> None:
        if self.granted:
            held = [self.granted[id_] for id_ in data.draw(st.sets(st.sampled_from(sorted(self.granted)), min_size=1))]
            duration_ms = data.draw(DURATIONS_MS)
            other_pin = data.draw(st.sampled_from([False, False, False, True]))
            self.renew(
                [
                    _request(one.lease_id, (one.knob, one.value), one.holder, duration_ms, one.pin != other_pin)
                    for one in held
                ]
            )

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
                self.refused["release", id_, holder.id] += 1
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

    @rule(holder=HOLDERS)
    def refuse(self, holder: Holder) -> None:
        why = "a whole number of seconds is"
        self.ledger.record_refusal(
            Refusal(holder=holder, action="set", target="cache_ttl_seconds", value="-1", why=why)
        )
        self.refused["set", "cache_ttl_seconds", holder.id] += 1

    @rule(ms=st.sampled_from([1, 10, 20]))
    def wait(self, ms: int) -> None:
        time.sleep(ms / 1000)

    @rule()
    def sweep(self) -> None:
        self.ledger.sweep()

    @rule()
    def lose_everything(self) -> None:
        self._check_audit()
        self.begin(self.knobs)

    @invariant()
    def what_is_in_force_is_what_is_unexpired(self) -> None:
        view = self.ledger.leases(IDS)
        unexpired = {id_: lease for id_, lease in self.granted.items() if lease.expires_at > view.server_time}
        assert {lease.lease_id: lease for lease in view.leases} == unexpired
        assert view.released == self.released
        for knob in KnobName:
            assert effective_value(knob, view.leases, BASELINE) == _in_force(knob, unexpired.values())

    @rule(knob=st.sampled_from(KnobName))
    def read_the_effective_value(self, knob: KnobName) -> None:
        start = self._now()
        value = self.ledger.effective(knob, BASELINE)
        ends = sorted(one.expires_at for one in self.granted.values() if start < one.expires_at <= self._now())
        possible = [
            _in_force(knob, [one for one in self.granted.values() if one.expires_at > moment])
            for moment in (start, *ends)
        ]
        assert value in possible

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
        tried = ((one.action, one.target, one.holder.id) for one in self.ledger.refusals(self.started) if one.holder)
        assert Counter(tried) == self.refused
        assert all(action == "expired" and start < end <= self._now() for action, _, end in known - expected)


def test_the_ledger_agrees_with_a_plain_model(server_url: str) -> None:
    with connect(server_url) as client:
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
