"""Alarms while an incident is open: a storm of the same one, and one that returns; and one that nobody knows."""

import random
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from domain.alarm_rules import IncidentTarget, target_of
from domain.alarms import AlarmChange, AlarmMetric, AlarmState
from domain.incident import IncidentRecord, Lever, LeverName, LeverStatus, Phase
from domain.people import Role
from tests.e2e.harness import CURABLE, INCIDENT, WORSE, Rehearsal, in_force, read_text, shapes

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(120)]

STORM = 1000
MOST_EVENTS = 100


async def test_a_storm_is_a_count_and_a_return_is_mitigated_again(world: Rehearsal) -> None:
    began = datetime.now(UTC)
    world.spike(CURABLE)
    record = await world.awaits_decision()
    await _storm(world, record)

    approver = world.token(Role.APPROVER)
    assert (await world.ops.release(INCIDENT, approver, "is it over?", LeverName.CACHE_TTL)).outcome == "accepted"
    refused = await world.until("the guard refuses", lambda record: "must stay" in _ttl(record).detail)
    assert LeverName.CACHE_TTL in in_force(refused)

    await world.traffic_has_passed()
    await world.until("people may decide", lambda record: record.phase is Phase.AWAITING_DECISION)
    assert (await world.ops.release(INCIDENT, approver, "it passed", LeverName.CACHE_TTL)).outcome == "accepted"
    await world.until("the lever is released", lambda record: _ttl(record).status is LeverStatus.RELEASING)
    world.spike(WORSE)
    await world.until("taken again", lambda record: "taken again" in _ttl(record).detail)
    again = await world.until("in mitigation again", lambda record: record.recovered_at is None)
    assert again.run_id == record.run_id

    recovered = await world.awaits_decision()
    assert in_force(recovered) == {LeverName.MODEL_ROUTING, LeverName.CACHE_TTL, LeverName.CAPACITY}
    # The new demand took the old one's place: what was bought is what it asks for, and nothing on top.
    [demand] = (await world.ops.capacity_state("sonnet")).demands
    sonnet = world.policy.models["sonnet"]
    assert demand == recovered.levers[-1].demand
    assert sonnet.baseline_units < demand.units <= sonnet.ceiling_units
    await world.soon("the units are in service", lambda: world.units() == {"InService": demand.units})
    assert sum(world.bought(began).values()) == demand.units - sonnet.baseline_units

    await world.approve()
    closed = await world.closed(record.run_id)
    await world.is_as_before(closed)
    assert [lever.status for lever in closed.levers] == [LeverStatus.RELEASED] * 3


async def test_an_alarm_that_maps_to_nothing_is_triaged_by_people(world: Rehearsal) -> None:
    name, now = f"Disk full {uuid.uuid4().hex[:6]}", datetime.now(UTC)
    metric = AlarmMetric(namespace="AWS/EBS", name="Full")
    alarm = AlarmChange(
        alarm_name=name, state=AlarmState.ALARM, changed_at=now, metrics=(metric,), source="sns", message_id=name
    )
    world.send(*shapes(alarm, now))
    target = target_of(alarm, world.policy)
    assert isinstance(target, IncidentTarget)
    key = target.key
    await world.until(
        "people are paged", lambda record: any(entry.kind == "page" for entry in record.timeline), incident=key
    )
    engineer = world.token(Role.ENGINEER)
    assert (await world.ops.acknowledge(key, engineer, "I look")).outcome == "accepted"
    [ok, *_] = shapes(alarm, now + timedelta(seconds=1), "OK")
    world.send(ok)
    closed = await world.until(
        "closed", lambda record: record.phase is Phase.CLOSED, incident=key, run_id=(await world.runs())[0]
    )
    assert closed.acknowledged_by == "engineer@example.com"
    assert name in read_text(str(world.settings.state_dir / "pages.jsonl"))
    assert world.knobs() == {}


async def _storm(world: Rehearsal, record: IncidentRecord) -> None:
    """The alarm has been OK since, and all its thousand deliveries, the latest and older ones, change only a count."""
    runs, before = await world.runs(), await world.ops.get_record(INCIDENT)
    events = await world.history_length()
    at = record.alarm.changed_at
    shaped = [shapes(record.alarm, at - timedelta(seconds=n % 60))[n % 3] for n in range(STORM)]
    random.Random(8).shuffle(shaped)
    world.send(*shaped)

    after = await world.until(
        "all are counted", lambda record: record.alarm_times >= before.alarm_times + STORM, seconds=40
    )

    assert after.alarm_times == before.alarm_times + STORM
    assert world.waiting(world.settings.alarm_queue_url) == 0
    assert world.waiting(world.settings.dead_letter_queue_url) == 0
    assert await world.runs() == runs
    assert await world.history_length() - events < MOST_EVENTS
    assert after.phase is Phase.AWAITING_DECISION
    assert after.mitigated_at == before.mitigated_at


def _ttl(record: IncidentRecord) -> Lever:
    lever = record.lever(LeverName.CACHE_TTL)
    assert lever is not None
    return lever
