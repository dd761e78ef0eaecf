"""`kill -9`: of the worker at random moments, and of the whole control plane while levers are in force."""

import asyncio
import os
import random
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from dataplane.knobs import Knobs
from domain.incident import LeverName
from domain.knobs import KnobName, baseline_value
from domain.override import OverrideEnd, OverrideRecord
from domain.people import Role
from tests.e2e.harness import CURABLE, INCIDENT, WORSE, Rehearsal, in_force

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(180)]

BATCH_WINDOW_MS, REQUEST_COALESCING = KnobName.BATCH_WINDOW_MS, KnobName.REQUEST_COALESCING
MODEL_ROUTING, CACHE_TTL_SECONDS = KnobName.MODEL_ROUTING, KnobName.CACHE_TTL_SECONDS
IN_ORDER = [BATCH_WINDOW_MS, REQUEST_COALESCING, MODEL_ROUTING, CACHE_TTL_SECONDS]
"""Two overrides and an incident's levers, the first to end first."""
SEED = "RUNBOOKS_TEST_SEED"
"""Set it to play the moments of a failed run again."""


async def test_a_worker_that_dies_at_any_moment_changes_nothing_in_the_end(world: Rehearsal) -> None:
    seed = int(os.environ.get(SEED, random.randrange(10**6)))
    moment = random.Random(seed).uniform
    print(f"{SEED}={seed}")
    began, runs = datetime.now(UTC), await world.runs()

    world.spike(WORSE)
    record = await world.until("the incident is open", lambda record: True)
    await _kill(world, "mitigation", moment(0, 1))
    await _kill(world, "mitigation, or what follows", moment(0, 4))
    recovered = await world.awaits_decision(seconds=90)
    assert in_force(recovered) >= {LeverName.CACHE_TTL, LeverName.CAPACITY}
    demand = recovered.levers[-1].demand
    assert demand is not None
    await world.soon("the units are in service", lambda: world.units() == {"InService": demand.units})
    assert sum(world.bought(began).values()) == demand.units - world.policy.models["sonnet"].baseline_units

    await world.approve()
    await _kill(world, "the way back", moment(0, 8))
    closed = await world.closed(record.run_id, seconds=90)
    await world.is_as_before(closed)
    assert await world.runs() == [record.run_id, *runs]

    # No lease was lost while in force, and each was taken and released once.
    audit = Counter((entry.action, entry.lease_id) for entry in world.audit(began))
    assert {action for action, _ in audit} <= {"acquired", "renewed", "released"}, audit
    ids = {lease_id for _, lease_id in audit}
    assert all(audit[("acquired", lease_id)] == audit[("released", lease_id)] == 1 for lease_id in ids), audit
    # Nothing was bought on the way back, or after it.
    assert sum(world.bought(began).values()) == demand.units - world.policy.models["sonnet"].baseline_units


async def _kill(world: Rehearsal, when: str, after_seconds: float) -> None:
    await asyncio.sleep(after_seconds)
    print(f"kill -9 {after_seconds:.2f} s into {when}")
    world.stack.kill("worker")
    await world.stack.restart("worker")


async def test_with_the_control_plane_dead_every_lease_lapses_on_time_and_that_is_said_afterwards(
    world: Rehearsal,
) -> None:
    world.policy_file.write_text(
        world.policy_file.read_text()
        .replace("model_routing: PT4H\n", "model_routing: PT1H20M\n")
        .replace("cache_ttl_seconds: PT4H30M\n", "cache_ttl_seconds: PT1H40M\n  renew_every: PT15M\n")
    )
    engineer, baseline = world.token(Role.ENGINEER), world.policy.baseline
    with Knobs(world.redis, baseline) as data_plane:

        def held() -> set[KnobName]:
            return {knob for knob in KnobName if data_plane.value(knob) != baseline_value(knob, baseline)}

        world.spike(CURABLE)
        record = await world.mitigated()
        overrides = [
            await world.ops.set_override(engineer, BATCH_WINDOW_MS, 100, "cost", timedelta(minutes=30)),
            await world.ops.set_override(engineer, REQUEST_COALESCING, True, "cost", timedelta(minutes=35)),
        ]
        await world.soon("the data plane obeys", lambda: held() == {*IN_ORDER})
        for name in ("worker", "intake", "temporal"):
            world.stack.kill(name)
        ends = {lease.knob: lease.expires_at for lease in world.ledger.leases().leases}
        assert all(lever.demand.end > max(ends.values()) for lever in record.held if lever.demand)

        lapsed: dict[KnobName, datetime] = {}
        while len(lapsed) < len(IN_ORDER) and datetime.now(UTC) < max(ends.values()) + timedelta(seconds=5):
            lapsed |= dict.fromkeys({*IN_ORDER} - held() - lapsed.keys(), datetime.now(UTC))
            await asyncio.sleep(0.02)
        assert list(lapsed) == IN_ORDER, lapsed
        assert all(abs(at - ends[knob]) < timedelta(seconds=3) for knob, at in lapsed.items()), (lapsed, ends)
        assert world.knobs() == {}

    for name in ("temporal", "worker", "intake"):
        await world.stack.restart(name)
    await world.soon("the living workflow has its leases back", lambda: len(world.knobs()) == 2, seconds=40)
    assert world.knobs().keys() == {MODEL_ROUTING, CACHE_TTL_SECONDS}, "what had its end is over"
    for answer in overrides:
        handle = world.temporal.get_workflow_handle(answer.record.override_id, result_type=OverrideRecord)
        override = await asyncio.wait_for(handle.result(), 60)
        assert override.end is OverrideEnd.LAPSED
        assert any("the control plane was away at the end" in entry.text for entry in override.timeline)
    result = await world.ops.abort(INCIDENT, world.token(Role.APPROVER), "enough for today")
    assert result.outcome == "accepted"
    world.calm()
    closed = await world.closed(record.run_id)
    assert any("nobody renewed them in time, and they had lapsed" in entry.text for entry in closed.timeline)
    await world.is_as_before(closed)
