"""The batcher's copy of knobs and routes: pushed, kept while Redis is away or has lost them."""

import asyncio
from collections.abc import Callable
from datetime import timedelta

import redis

from dataplane import keys
from dataplane.connection import connect_async
from dataplane.control_state import ControlState
from dataplane.ledger import Ledger
from dataplane.routes import Routes
from domain.knobs import Holder, KnobName, LeaseRequest
from domain.policy import Policy
from domain.routes import CapacityRoute, CapacityRoutes

BASELINE = Policy().baseline
SELDOM = timedelta(minutes=10)


def listed(version: int, *units: int) -> CapacityRoutes:
    routes = tuple(CapacityRoute(provisioned_model_arn=f"arn:pm/{n}", units=n) for n in units)
    return CapacityRoutes(model="sonnet", routes=routes, version=version)


def lease(client: redis.Redis) -> None:
    """A window of 50 ms, in a data set that is marked as the control plane marks it."""
    asked = LeaseRequest(
        lease_id="a",
        knob=KnobName.BATCH_WINDOW_MS,
        value=50,
        holder=Holder(kind="person", id="p"),
        reason="r",
        duration_ms=60_000,
    )
    Ledger(client).ensure_epoch()
    Ledger(client).acquire([asked])


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(40):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_routes_and_knobs_are_pushed(server_url: str, redis_client: redis.Redis) -> None:
    client = connect_async(server_url)
    async with ControlState(client, BASELINE, SELDOM) as control:
        assert control.routes("sonnet") is None
        await until(lambda: control.status().connected)
        Routes(redis_client).publish(listed(1, 15))
        await until(lambda: control.routes("sonnet") == listed(1, 15))
        lease(redis_client)
        await until(lambda: control.batch_window_ms == 50)
        Routes(redis_client).withdraw("sonnet", 2)
        await until(lambda: control.routes("sonnet") == listed(2))
    await client.aclose()


async def test_what_is_lost_or_broken_or_older_leaves_what_is_known(redis_client: redis.Redis, server_url: str) -> None:
    client = connect_async(server_url)
    control = ControlState(client, BASELINE)
    lease(redis_client)
    Routes(redis_client).publish(listed(5, 15))
    await control.refresh()
    for text in ("no JSON", "{}", listed(4, 30).model_dump_json()):
        redis_client.hset(keys.ROUTES, "sonnet", text)
        await control.refresh()
        assert control.routes("sonnet") == listed(5, 15)
    redis_client.delete(keys.ROUTES)
    await control.refresh()
    assert control.routes("sonnet") == listed(5, 15)
    redis_client.flushall()
    lease(redis_client)
    Routes(redis_client).publish(listed(1, 10))
    await control.refresh()
    assert control.routes("sonnet") == listed(1, 10), "another data set counts anew"
    await client.aclose()
