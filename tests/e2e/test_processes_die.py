"""`kill -9`: of the worker at random moments, and of the whole control plane while levers are in force."""

import asyncio
import os
import random
import time
from collections import Counter
from datetime import UTC, datetime

import pytest

from activities.settings import load_policy
from dataplane.knobs import Knobs
from domain.incident import LeverName
from domain.knobs import KnobName
from domain.people import Role
from tests.e2e.harness import CURABLE, INCIDENT, WORSE, Rehearsal, in_force

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(180)]

TAKEN = (True, 120)
"""Routing and TTL while the levers are in force."""
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


async def test_leases_lapse_in_order_with_nobody_there_and_are_put_back(world: Rehearsal) -> None:
    world.policy_file.write_text(
        world.policy_file.read_text()
        .replace("model_routing: PT4H\n", "model_routing: PT40M\n")
        .replace("cache_ttl_seconds: PT4H30M\n", "cache_ttl_seconds: PT1H\n  renew_every: PT15M\n")
    )
    leased = load_policy(world.policy_file, world.settings.clock).leases
    with Knobs(world.redis, world.policy.baseline) as data_plane:
        world.spike(CURABLE)
        record = await world.mitigated()
        await world.soon("the data plane obeys", lambda: _lever_values(data_plane) == TAKEN)
        for name in ("worker", "intake", "temporal"):
            world.stack.kill(name)
        last_renewed = time.monotonic()
        last_lease_ends = max(lease.expires_at for lease in world.ledger.leases().leases)
        assert all(lever.demand.end > last_lease_ends for lever in record.held if lever.demand)

        lapsed: dict[KnobName, float] = {}
        patience = leased.cache_ttl_seconds.total_seconds() + 3
        while len(lapsed) < 2 and time.monotonic() < last_renewed + patience:
            routed, ttl = _lever_values(data_plane)
            if not routed:
                lapsed.setdefault(KnobName.MODEL_ROUTING, time.monotonic())
            if ttl == world.policy.cache_ttl_seconds:
                lapsed.setdefault(KnobName.CACHE_TTL_SECONDS, time.monotonic())
            await asyncio.sleep(0.05)
        assert list(lapsed) == [KnobName.MODEL_ROUTING, KnobName.CACHE_TTL_SECONDS], lapsed
        apart = lapsed[KnobName.CACHE_TTL_SECONDS] - lapsed[KnobName.MODEL_ROUTING]
        assert apart > (leased.cache_ttl_seconds - leased.model_routing).total_seconds() / 2
        assert world.knobs() == {}

    for name in ("temporal", "worker", "intake"):
        await world.stack.restart(name)
    await world.soon("the living workflow has its leases back", lambda: len(world.knobs()) == 2, seconds=40)
    result = await world.ops.abort(INCIDENT, world.token(Role.APPROVER), "enough for today")
    assert result.outcome == "accepted"
    world.calm()
    await world.is_as_before(await world.closed(record.run_id))


def _lever_values(data_plane: Knobs) -> tuple[bool, int]:
    """Whether `faq` is downgraded, and the TTL, as a chatbot task reads them."""
    return data_plane.model_for("faq") == "haiku", data_plane.cache_ttl_seconds
