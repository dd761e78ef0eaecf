"""Capacity routes against a real server."""

import redis

from dataplane import keys
from dataplane.routes import Routes
from domain.routes import CapacityRoute, CapacityRoutes


def listed(version: int, *units: int) -> CapacityRoutes:
    routes = tuple(CapacityRoute(provisioned_model_arn=f"arn:pm/{n}", units=n) for n in units)
    return CapacityRoutes(model="sonnet", routes=routes, version=version)


def test_a_newer_list_replaces_and_an_older_or_contradicting_one_does_not(redis_client: redis.Redis) -> None:
    routes = Routes(redis_client)
    assert routes.read_all() == {}
    assert routes.publish(listed(2, 15))
    assert routes.publish(listed(2, 15)), "the same again is no contradiction"
    assert not routes.publish(listed(2, 30))
    assert not routes.publish(listed(1, 30))
    assert routes.read_all() == {"sonnet": listed(2, 15)}
    assert routes.publish(listed(3, 15, 5))
    assert routes.publish(CapacityRoutes(model="haiku", routes=(), version=1))
    assert routes.read_all()["sonnet"] == listed(3, 15, 5)
    assert routes.withdraw("sonnet", 4)
    assert not routes.publish(listed(3, 15, 5)), "a late publication does not undo a withdrawal"
    assert routes.read_all()["sonnet"].routes == ()
    redis_client.delete(keys.ROUTES)
    assert routes.publish(listed(4, 15)), "a lost list is put back under its version"


def test_readers_are_told(redis_client: redis.Redis) -> None:
    with redis_client.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
        pubsub.subscribe(keys.CHANGES)
        pubsub.get_message(timeout=5)
        Routes(redis_client).publish(listed(1, 15))
        message = pubsub.get_message(timeout=5)
    assert message is not None
    assert message["data"] == "routes"
