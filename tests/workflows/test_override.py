"""Overrides on a real Temporal server and a real Valkey: taken, shown, moved, given back on time, put back."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from temporalio.api.sdk.v1 import WorkflowMetadata
from temporalio.client import Client, WorkflowHandle
from temporalio.worker import Replayer, Worker

from activities.entities import EntityActivities, start_override
from activities.leases import LeaseActivities
from activities.pages import PageActivities
from activities.settings import SettingsActivities
from activities.standing import StandingActivities
from dataplane.knobs import Knobs
from dataplane.ledger import Ledger
from domain.clock import RehearsalClock
from domain.incident import utc
from domain.knobs import Holder, KnobName, KnobValue, LeaseRequest
from domain.messages import (
    APPROVE,
    DENY,
    EXTEND,
    HAND_OVER,
    RECORD,
    RELEASE,
    HandOverRequest,
    OverrideAnswer,
    OverrideExtendRequest,
    OverrideInput,
    PersonRequest,
    StartOverride,
    UpdateResult,
    override_id,
)
from domain.override import OverrideEnd, OverrideKind, OverridePhase, OverrideRecord
from domain.policy import OverridesPolicy, Policy
from tests.servers import TemporalServer, ValkeyServer
from tests.workflows.fakes import APPROVER, ENGINEER, FakeCloudWatch, activities_of
from workers.redis_loss import watch_redis
from workers.temporal import runbook_plugin
from workflows.override import OverrideWorkflow

TTL, WINDOW, FLAG = KnobName.CACHE_TTL_SECONDS, KnobName.BATCH_WINDOW_MS, KnobName.FEATURE_FLAG
VIEWER, COLLEAGUE, SECOND_APPROVER = "viewer@example.com", "colleague@example.com", "second@example.com"
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)


@dataclass
class Stack:
    """A worker, and hands on everything around it."""

    client: Client
    redis: redis.Redis
    ledger: Ledger
    folder: Path
    queue: str = field(default_factory=lambda: uuid4().hex[:8])
    cloudwatch: FakeCloudWatch = field(default_factory=FakeCloudWatch)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(16))
    worker: asyncio.Task[None] | None = None
    started: list[str] = field(default_factory=list)

    def configure(self, *, ttl_seconds: int = 30, renew_every: timedelta = SECOND, **overrides: Any) -> None:
        """The policy file and the roster; read anew each time."""
        section = OverridesPolicy(warn_before=SECOND, **overrides)
        fixed = Policy.model_validate({"batcher": {"controller": "fixed"}, "knobs": {"batch_window_ms": 150}})
        policy = fixed.model_copy(update={"overrides": section, "cache_ttl_seconds": ttl_seconds})
        renewals = policy.leases.model_copy(update={"renew_every": renew_every})
        self.policy_file.write_text(policy.model_copy(update={"leases": renewals}).model_dump_json())
        people = {APPROVER: "approver", SECOND_APPROVER: "approver", VIEWER: "viewer"}
        people |= dict.fromkeys((ENGINEER, COLLEAGUE), "engineer")
        self.roster_file.write_text(json.dumps({"people": people}))

    @property
    def policy_file(self) -> Path:
        return self.folder / "policy.json"

    @property
    def roster_file(self) -> Path:
        return self.folder / "roster.json"

    def start_worker(self) -> None:
        settings = SettingsActivities(
            policy_file=self.policy_file, roster_file=self.roster_file, clock=RehearsalClock()
        )
        leases = LeaseActivities(self.ledger)
        activities = activities_of(
            leases,
            StandingActivities(settings, leases),
            EntityActivities(settings.snapshot),
            settings,
            PageActivities(None, topic_arn=None, log=self.folder / "pages.jsonl"),  # type: ignore[arg-type]
            self.cloudwatch,
        )
        worker = Worker(
            self.client,
            task_queue=self.queue,
            workflows=[OverrideWorkflow],
            activities=activities,
            activity_executor=self.threads,
        )
        self.worker = asyncio.create_task(worker.run())

    async def stop_worker(self) -> None:
        if self.worker is not None:
            self.worker.cancel()
            await asyncio.gather(self.worker, return_exceptions=True)
            self.worker = None

    async def set(
        self,
        knob: KnobName,
        value: KnobValue,
        duration: timedelta = MINUTE,
        *,
        who: str = ENGINEER,
        kind: OverrideKind = OverrideKind.TIMED,
        short_id: str | None = None,
        **more: Any,
    ) -> OverrideAnswer:
        input = OverrideInput(
            knob=knob, value=value, kind=kind, who=who, reason="latency regression", duration=duration, **more
        )
        id = override_id(knob, short_id or uuid4().hex[:8])
        self.started.append(id)
        return await start_override(self.client, StartOverride(override_id=id, input=input), self.queue)

    def handle(self, answer: OverrideAnswer) -> WorkflowHandle[Any, Any]:
        return self.client.get_workflow_handle(answer.record.override_id)

    async def record(self, answer: OverrideAnswer) -> OverrideRecord:
        record: OverrideRecord = await self.handle(answer).query(RECORD, result_type=OverrideRecord)
        return record

    async def ended(self, answer: OverrideAnswer) -> OverrideRecord:
        handle = self.client.get_workflow_handle(answer.record.override_id, result_type=OverrideRecord)
        record: OverrideRecord = await asyncio.wait_for(handle.result(), 40)
        return record

    async def asks(self, answer: OverrideAnswer, update: str, request: PersonRequest) -> UpdateResult:
        result: UpdateResult = await self.handle(answer).execute_update(update, request, result_type=UpdateResult)
        return result

    def value(self, knob: KnobName = TTL) -> KnobValue:
        return self.ledger.effective(knob, Policy().baseline)

    def pages(self) -> list[tuple[str, str]]:
        log = self.folder / "pages.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(page["to"], page["text"]) for page in map(json.loads, lines)]

    async def until(self, what: Callable[[], Awaitable[object] | object], seconds: float = 40) -> None:
        give_up_at = time.monotonic() + seconds
        while True:
            found = what()
            if await found if isinstance(found, Awaitable) else found:
                return
            assert time.monotonic() < give_up_at, "it never came true"
            await asyncio.sleep(0.02)


@pytest.fixture
async def stack(temporal: TemporalServer, redis_client: redis.Redis, tmp_path: Path) -> AsyncIterator[Stack]:
    client = await Client.connect(temporal.address, plugins=[runbook_plugin()])
    stack = Stack(client, redis_client, Ledger(redis_client), tmp_path)
    stack.configure()
    stack.start_worker()
    yield stack
    for id in stack.started:
        handle = client.get_workflow_handle(id)
        history = await handle.fetch_history()
        await Replayer(workflows=[OverrideWorkflow], plugins=[runbook_plugin()]).replay_workflow(history)
        if (await handle.describe()).close_time is None:
            await handle.terminate("the test is over")
    await stack.stop_worker()


def by(who: str, why: str = "because") -> PersonRequest:
    return PersonRequest(who=who, why=why)


async def test_a_person_holds_a_knob_for_a_time_is_warned_and_it_ends_on_time(stack: Stack) -> None:
    answer = await stack.set(TTL, 120, 4 * SECOND)
    assert answer.outcome == "accepted"
    record = answer.record
    assert record.ends_at is not None
    assert (record.phase, record.effective, stack.value()) == (OverridePhase.IN_FORCE, 120, 120)
    [lease] = stack.ledger.leases().leases
    assert (lease.holder, lease.reason) == (Holder(kind="person", id=ENGINEER), "latency regression")
    assert abs(lease.expires_at - record.ends_at) < 2 * SECOND, "it lapses by itself at its end"

    described = await stack.handle(answer).describe()
    attributes = described.search_attributes
    assert (attributes["Knob"], attributes["HoldsLeases"]) == (["cache_ttl_seconds"], [True])
    assert abs(attributes["OverrideEndsAt"][0] - record.ends_at) < SECOND / 100  # type: ignore[operator]

    assert await described.static_summary() == "cache_ttl_seconds at 120 (timed)"
    metadata = await stack.handle(answer).query("__temporal_workflow_metadata", result_type=WorkflowMetadata)
    for said in (f"**Ends**: {utc(record.ends_at)}", "**Next**: warn before the end, at", "hit rate: "):
        assert said in metadata.current_details

    ended = await stack.ended(answer)
    assert ended.end is OverrideEnd.ON_TIME
    assert ended.ended_at is not None
    assert timedelta(0) <= ended.ended_at - record.ends_at < 5 * SECOND
    assert (ended.effective, stack.value(), ended.still_held) == (30, 30, [])
    assert ended.outcome == "On time: cache_ttl_seconds is 30, as configured."
    [(to, text)] = stack.pages()
    assert to == ENGINEER
    assert "ends at" in text
    actions = [entry.action for entry in stack.ledger.history(record.asked_at - MINUTE)]
    assert actions in (["acquired", "released"], ["acquired", "expired"])


async def test_what_still_holds_the_knob_is_said_before_and_after(stack: Stack) -> None:
    incident = Holder(kind="incident", id="incident-bedrock-throttle:sonnet")
    stack.ledger.acquire(
        [LeaseRequest(lease_id="other", knob=TTL, value=300, holder=incident, reason="throttles", duration_ms=60_000)]
    )
    answer = await stack.set(TTL, 120)
    assert "in force is 300, which another lease asks for" in answer.message
    assert answer.record.assessment is not None
    [conflict] = answer.record.assessment.conflicts
    assert conflict.startswith(f"held at 300 by {incident.id} until ")
    released = await stack.asks(answer, RELEASE, by(ENGINEER, "not needed"))
    assert released.message.startswith(
        f"Released early by {ENGINEER} (not needed): cache_ttl_seconds is 300: still held"
    )
    ended = await stack.ended(answer)
    assert (ended.effective, len(ended.still_held)) == (300, 1)


async def test_a_pin_outranks_the_merge_and_is_an_approvers(stack: Stack) -> None:
    merged = await stack.set(WINDOW, 50)
    refused = await stack.set(WINDOW, 100, kind=OverrideKind.PIN)
    assert refused.outcome == "denied"
    assert f"{ENGINEER} is engineer; approver is needed" in refused.message
    assert stack.value(WINDOW) == 50
    await stack.until(lambda: stack.ledger.refusals(refused.record.asked_at - MINUTE))
    [refusal] = stack.ledger.refusals(refused.record.asked_at - MINUTE)
    assert refusal.holder == Holder(kind="person", id=ENGINEER)
    assert (refusal.action, refusal.target, refusal.value) == ("set", "batch_window_ms", "100")
    pinned = await stack.set(WINDOW, 100, kind=OverrideKind.PIN, who=APPROVER)
    assert (pinned.outcome, stack.value(WINDOW)) == ("accepted", 100)
    await stack.asks(pinned, RELEASE, by(APPROVER))
    assert stack.value(WINDOW) == 50
    await stack.asks(merged, RELEASE, by(ENGINEER))


async def test_what_needs_an_approval_waits_for_somebody_else(stack: Stack) -> None:
    over_budget = await stack.set(WINDOW, 700, who=APPROVER)
    assert over_budget.outcome == "accepted"
    assert "it waits for an approver other than approver@example.com: P99 latency by the budget table would be" in (
        over_budget.message
    )
    assert stack.value(WINDOW) == 1000, "nothing is leased"
    own = await stack.asks(over_budget, APPROVE, by(APPROVER))
    assert (own.outcome, "somebody else must agree" in own.message) == ("denied", True)
    engineer = await stack.asks(over_budget, APPROVE, by(ENGINEER))
    assert engineer.outcome == "denied"
    early = await stack.asks(over_budget, EXTEND, OverrideExtendRequest(who=SECOND_APPROVER, why="x", by=MINUTE))
    assert early.outcome == "not-possible"
    agreed = await stack.asks(over_budget, APPROVE, by(SECOND_APPROVER, "tested at peak"))
    assert (agreed.outcome, stack.value(WINDOW)) == ("accepted", 700)
    record = await stack.record(over_budget)
    assert record.approved_by == SECOND_APPROVER
    assert record.ends_at is not None
    assert record.in_force_since is not None
    assert timedelta(0) <= record.ends_at - record.in_force_since + SECOND < MINUTE + SECOND, "time starts then"
    assert (await stack.asks(over_budget, APPROVE, by(SECOND_APPROVER))).outcome == "already-done"
    still_theirs = await stack.asks(over_budget, EXTEND, OverrideExtendRequest(who=APPROVER, why="x", by=MINUTE))
    assert still_theirs.outcome == "denied"
    await stack.until(lambda: len(stack.ledger.refusals(record.asked_at - MINUTE)) == 3)
    await stack.asks(over_budget, RELEASE, by(SECOND_APPROVER))

    flag = await stack.set(FLAG, {"taste_profile": False})
    assert (await stack.asks(flag, DENY, by(APPROVER, "not tonight"))).outcome == "accepted"
    ended = await stack.ended(flag)
    assert (ended.end, stack.value(FLAG)) == (OverrideEnd.DENIED, {"taste_profile": True})
    assert "not tonight" in ended.outcome
    withdrawn = await stack.set(FLAG, {"taste_profile": False})
    await stack.asks(withdrawn, RELEASE, by(ENGINEER))
    assert (await stack.ended(withdrawn)).end is OverrideEnd.WITHDRAWN


async def test_what_is_not_approved_in_time_is_given_up_and_unread_metrics_delay_nothing_for_long(
    stack: Stack,
) -> None:
    stack.configure(approve_within=SECOND / 2)
    stack.cloudwatch.load = None
    answer = await stack.set(WINDOW, 600)
    assert answer.record.phase is OverridePhase.AWAITING_APPROVAL
    assert answer.record.assessment is not None
    assert answer.record.assessment.impact is not None
    assert "the present metrics could not be read" in answer.record.assessment.impact.notes[0]
    assert (await stack.ended(answer)).end is OverrideEnd.NOT_APPROVED
    assert stack.ledger.leases().leases == ()


async def test_extend_release_and_hand_over(stack: Stack) -> None:
    answer = await stack.set(TTL, 120, 3 * SECOND)
    longer = await stack.asks(answer, EXTEND, OverrideExtendRequest(who=ENGINEER, why="it goes on", by=MINUTE))
    assert longer.outcome == "accepted"
    ends_at = answer.record.ends_at
    assert ends_at is not None
    denied = await stack.asks(answer, EXTEND, OverrideExtendRequest(who=VIEWER, why="x", by=MINUTE))
    assert denied.outcome == "denied"
    far = await stack.asks(answer, EXTEND, OverrideExtendRequest(who=ENGINEER, why="x", by=timedelta(days=365)))
    assert (far.outcome, "at most 24 h" in far.message) == ("not-possible", True)
    endless = OverrideExtendRequest(who=ENGINEER, why="x", by=timedelta.max)
    assert (await stack.asks(answer, EXTEND, endless)).outcome == "not-possible"
    [lease] = stack.ledger.leases().leases
    assert abs(lease.expires_at - (ends_at + MINUTE)) < 5 * SECOND

    nobody = await stack.asks(answer, HAND_OVER, HandOverRequest(who=ENGINEER, why="shift", to="nobody@example.com"))
    assert (nobody.outcome, "not in the roster" in nobody.message) == ("not-possible", True)
    given = await stack.asks(answer, HAND_OVER, HandOverRequest(who=ENGINEER, why="shift", to=APPROVER))
    assert given.outcome == "accepted"
    [lease] = stack.ledger.leases().leases
    assert lease.holder.id == APPROVER
    assert abs(lease.expires_at - (ends_at + MINUTE)) < 5 * SECOND
    actions = [entry.action for entry in stack.ledger.history(ends_at - MINUTE)]
    assert actions[-2:] == ["acquired", "released"], "no gap"

    await asyncio.sleep(max(0, (ends_at - datetime.now(UTC)) / SECOND + 0.2))
    assert stack.value() == 120, "past its first end"
    over = await stack.asks(answer, RELEASE, by(APPROVER, "quiet again"))
    assert over.message == f"Released early by {APPROVER} (quiet again): cache_ttl_seconds is 30, as configured."
    assert stack.ledger.leases().leases == ()
    assert (await stack.ended(answer)).extensions == 1


async def test_another_persons_override_is_an_approvers_to_move_until_it_is_handed_over(stack: Stack) -> None:
    answer = await stack.set(TTL, 120)
    tries: list[tuple[str, PersonRequest]] = [
        (RELEASE, by(COLLEAGUE)),
        (EXTEND, OverrideExtendRequest(who=COLLEAGUE, why="x", by=MINUTE)),
        (HAND_OVER, HandOverRequest(who=COLLEAGUE, why="x", to=COLLEAGUE)),
    ]
    for update, request in tries:
        result = await stack.asks(answer, update, request)
        assert result.outcome == "denied"
        assert f"approver is needed; it is {ENGINEER}'s, who may hand it over" in result.message
    assert (await stack.record(answer)).ends_at == answer.record.ends_at
    assert stack.ledger.leases().leases[0].holder.id == ENGINEER
    since = answer.record.asked_at - MINUTE
    await stack.until(lambda: len(stack.ledger.refusals(since)) == 3)
    refusals = stack.ledger.refusals(since)
    assert {(one.holder and one.holder.id, one.target) for one in refusals} == {(COLLEAGUE, TTL)}
    assert {one.action for one in refusals} == {RELEASE, EXTEND, HAND_OVER}

    longer = await stack.asks(answer, EXTEND, OverrideExtendRequest(who=APPROVER, why="it goes on", by=MINUTE))
    given = await stack.asks(answer, HAND_OVER, HandOverRequest(who=ENGINEER, why="shift", to=COLLEAGUE))
    over = await stack.asks(answer, RELEASE, by(COLLEAGUE))
    assert [longer.outcome, given.outcome, over.outcome] == ["accepted"] * 3
    waiting = await stack.set(FLAG, {"taste_profile": False})
    assert (await stack.asks(waiting, RELEASE, by(COLLEAGUE))).outcome == "denied"
    assert (await stack.asks(waiting, RELEASE, by(ENGINEER))).outcome == "accepted"


async def test_the_same_id_never_holds_twice_and_a_value_the_knob_does_not_take_changes_nothing(stack: Stack) -> None:
    answers = await asyncio.gather(*(stack.set(TTL, 120, short_id=stack.queue) for _ in range(3)))
    assert {answer.record.run_id for answer in answers} == {answers[0].record.run_id}
    assert len(stack.ledger.leases().leases) == 1
    await stack.asks(answers[0], RELEASE, by(ENGINEER))
    await stack.ended(answers[0])
    again = await stack.set(TTL, 120, short_id=stack.queue)
    assert (again.outcome, again.record.end) == ("not-possible", OverrideEnd.RELEASED)
    refused = await stack.set(TTL, 0)
    assert (refused.outcome, "from 1 to 3600" in refused.message) == ("not-possible", True)
    endless = await stack.set(TTL, 120, timedelta(days=365))
    assert (endless.outcome, "at most 24 h" in endless.message) == ("not-possible", True)
    assert stack.ledger.leases().leases == ()


async def test_a_lost_redis_is_put_back_with_the_time_left_and_what_ended_is_not(
    stack: Stack, redis_client: redis.Redis
) -> None:
    kept = await stack.set(TTL, 120, 5 * SECOND)
    pinned = await stack.set(WINDOW, 100, who=APPROVER, kind=OverrideKind.PIN)
    gone = await stack.set(TTL, 300)
    await stack.asks(gone, RELEASE, by(ENGINEER))
    stack.ledger.ensure_epoch()
    knobs = Knobs(redis_client, Policy().baseline).start()
    watching = asyncio.create_task(watch_redis(stack.ledger, knobs, stack.client))
    try:
        redis_client.flushall()
        await stack.until(lambda: len(stack.ledger.leases().leases) == 2)
        assert (stack.value(), stack.value(WINDOW)) == (120, 100)
        leases = {lease.knob: lease for lease in stack.ledger.leases().leases}
        assert kept.record.ends_at is not None
        assert abs(leases[TTL].expires_at - kept.record.ends_at) < SECOND
        assert leases[WINDOW].pin
        assert pinned.record.lease is not None
        assert leases[WINDOW].acquired_at == pinned.record.lease.acquired_at, "a pin keeps its place"
        ended = await stack.ended(kept)
        assert ended.end is OverrideEnd.ON_TIME
        assert any("Redis lost writes" in entry.text for entry in ended.timeline)
    finally:
        watching.cancel()
        knobs.close()


async def test_with_the_control_plane_dead_the_lease_lapses_and_is_noticed_afterwards(stack: Stack) -> None:
    stack.configure(late_after=SECOND / 2)
    answer = await stack.set(TTL, 120, 3 * SECOND)
    await stack.stop_worker()
    await stack.until(lambda: stack.value() == 30)
    lapsed_at = datetime.now(UTC)
    assert answer.record.ends_at is not None
    assert -SECOND < lapsed_at - answer.record.ends_at < 5 * SECOND
    await asyncio.sleep(0.7)
    stack.start_worker()
    ended = await stack.ended(answer)
    assert ended.end is OverrideEnd.LAPSED
    assert any("lapsed by itself; noticed" in entry.text for entry in ended.timeline)


async def test_a_standing_override_is_renewed_and_ends_when_the_configured_baseline_has_caught_up(
    stack: Stack,
) -> None:
    stack.configure(renew_every=SECOND / 2, standing_lease=10 * SECOND, reminder=SECOND / 2)
    answer = await stack.set(TTL, 120, SECOND, kind=OverrideKind.STANDING, approved_by=APPROVER)
    assert answer.record.review_at is not None
    assert "reviewed at" in answer.message
    first = stack.ledger.leases().leases[0].expires_at
    await stack.until(lambda: stack.ledger.leases().leases[0].expires_at > first)
    await stack.until(lambda: len(stack.pages()) >= 2)
    later = await stack.asks(answer, EXTEND, OverrideExtendRequest(who=ENGINEER, why="still needed", by=MINUTE))
    assert later.outcome == "accepted"
    reminded = len(stack.pages())
    await asyncio.sleep(1.1)
    assert len(stack.pages()) <= reminded + 1, "a decision ends the reminders; one may have been on its way"
    stack.configure(ttl_seconds=120)
    ended = await stack.ended(answer)
    assert ended.end is OverrideEnd.CAUGHT_UP
    assert ended.outcome.startswith("The configured baseline has caught up: cache_ttl_seconds is 120, as configured")
    assert stack.ledger.leases().leases == ()


@pytest.fixture
def short_histories(tmp_path: Path) -> Iterator[TemporalServer]:
    server = TemporalServer(tmp_path, {"limit.historyCount.suggestContinueAsNew": "60"}).start()
    yield server
    server.kill()


async def test_a_standing_override_outlives_its_history(
    short_histories: TemporalServer, redis_client: redis.Redis, valkey: ValkeyServer, tmp_path: Path
) -> None:
    client = await Client.connect(short_histories.address, plugins=[runbook_plugin()])
    stack = Stack(client, redis_client, Ledger(redis_client), tmp_path)
    stack.configure(renew_every=SECOND / 10, standing_lease=10 * SECOND)
    stack.start_worker()
    answer = await stack.set(TTL, 120, MINUTE, kind=OverrideKind.STANDING)
    first = answer.record.run_id

    async def goes_on() -> bool:
        return (await stack.handle(answer).describe()).run_id != first

    await stack.until(goes_on)
    assert stack.value() == 120
    over = await stack.asks(answer, RELEASE, by(ENGINEER))
    assert over.outcome == "accepted"
    assert (stack.value(), stack.ledger.leases().leases) == (30, ())
    assert len((await stack.record(answer)).decisions) == 1
    await stack.stop_worker()
