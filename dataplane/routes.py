"""Capacity routes in Redis: one versioned list for each model, replaced as a whole.

Redis's errors pass through.
"""

import redis

from dataplane import keys
from dataplane.connection import Script
from domain.routes import CapacityRoutes

# ARGV: channel, model, version, the routes as JSON.
_PUBLISH = Script("""
local held = redis.call('HGET', KEYS[1], ARGV[2])
if held == ARGV[4] then return 1 end
if held and cjson.decode(held).version >= tonumber(ARGV[3]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[4])
redis.call('PUBLISH', ARGV[1], 'routes')
return 1
""")


class Routes:
    """The routes in the Redis that `client` (made by `connect`) speaks to. Thread-safe."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def publish(self, routes: CapacityRoutes) -> bool:
        """Replace the model's list; False, and nothing changed, if there is a newer one or another of this version."""
        args: list[str | int] = [keys.CHANGES, routes.model, routes.version, routes.model_dump_json()]
        return bool(_PUBLISH(self._client, [keys.ROUTES], args))

    def withdraw(self, model: str, version: int) -> bool:
        """Replace the model's list by an empty one, under the same rule as `publish`."""
        return self.publish(CapacityRoutes(model=model, routes=(), version=version))

    def read_all(self) -> dict[str, CapacityRoutes]:
        """Every model's list; a model that was never published, or whose list Redis lost, is absent."""
        held = self._client.hgetall(keys.ROUTES)
        return {str(model): CapacityRoutes.model_validate_json(text) for model, text in held.items()}
