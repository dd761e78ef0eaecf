"""Redis away while levers are to be taken, and Redis that forgets them while they are in force."""

import asyncio

import pytest

from dataplane.routes import Routes
from domain.incident import LeverName, LeverStatus, Phase
from domain.knobs import KnobName
from domain.people import Role
from domain.policy import Policy
from tests.e2e.harness import CURABLE, INCIDENT, Rehearsal, in_force

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(150)]

AWAY_SECONDS = 20
MODELS = Policy().models.keys()
BOTH = {KnobName.MODEL_ROUTING, KnobName.CACHE_TTL_SECONDS}


async def test_levers_come_into_force_after_redis_and_are_put_back_after_a_flush(world: Rehearsal) -> None:
    world.stack.kill("redis")
    world.spike(CURABLE)
    await asyncio.sleep(AWAY_SECONDS)
    record = await world.until("the incident is open", lambda record: record.phase is Phase.MITIGATING)
    assert record.mitigated_at is None
    await world.stack.restart("redis")
    await world.soon("both knobs are in force", lambda: world.knobs().keys() == BOTH)
    await world.awaits_decision()

    world.redis.flushall()
    await world.soon("both knobs are put back", lambda: world.knobs().keys() == BOTH, seconds=20)
    await world.soon("all routes are back", lambda: Routes(world.redis).read_all().keys() == MODELS, seconds=20)
    told = await world.until("the record says so", lambda record: "put_back" in record.timeline[-1].text)
    assert in_force(told) >= {LeverName.MODEL_ROUTING, LeverName.CACHE_TTL}

    await world.traffic_has_passed()
    approver = world.token(Role.APPROVER)
    assert (await world.ops.release(INCIDENT, approver, "it passed", LeverName.MODEL_ROUTING)).outcome == "accepted"
    await world.until(
        "routing is released, the rest waits",
        lambda record: record.phase is Phase.AWAITING_DECISION and record.levers[0].status is LeverStatus.RELEASED,
    )
    world.redis.flushall()
    await world.soon("the TTL is put back", lambda: KnobName.CACHE_TTL_SECONDS in world.knobs(), seconds=20)
    await asyncio.sleep(2)  # the loss is told twice
    assert world.knobs() == {KnobName.CACHE_TTL_SECONDS: 120}

    await world.approve()
    await world.is_as_before(await world.closed(record.run_id))
