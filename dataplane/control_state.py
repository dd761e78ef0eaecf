"""Knobs and capacity routes in one reader, for the batcher: both are pushed by the same channel and polled.

While Redis is away the last known routes stay. A model whose list Redis has lost keeps the one known here, until its
writer has put it back; an older list than the known one counts only in another data set.
"""

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import cast

import redis.asyncio
from pydantic import ValidationError

from dataplane import keys
from dataplane.knobs import POLL_EVERY, AsyncKnobs
from domain.knobs import Baseline
from domain.routes import CapacityRoutes

_log = logging.getLogger(__name__)


class ControlState(AsyncKnobs):
    """An `AsyncKnobs` that knows the routes as well."""

    def __init__(self, client: redis.asyncio.Redis, baseline: Baseline, poll_every: timedelta = POLL_EVERY) -> None:
        """`client` is made by `connect_async`."""
        super().__init__(client, baseline, poll_every)
        self._routes: dict[str, CapacityRoutes] = {}
        self._texts: dict[str, str] = {}
        """As they were read last: each is parsed, and complained of, once."""
        self._routes_epoch: str | None = None
        self.changed: Callable[[], None] = lambda: None
        """Called after each reading."""

    def routes(self, model: str) -> CapacityRoutes | None:
        """The model's published routes, without I/O; None: none are known."""
        return self._routes.get(model)

    async def refresh(self) -> None:
        """Read the ledger and the routes now. Redis's errors pass through, and leave what is known as it is."""
        await super().refresh()
        held = cast(dict[str, str], await self._client.hgetall(keys.ROUTES))
        epoch = self.status().epoch
        for model, text in held.items():
            if text == self._texts.get(model):
                continue
            self._texts[model] = text
            try:
                routes = CapacityRoutes.model_validate_json(text)
            except ValidationError as error:
                what = error.errors(include_url=False)[0]["msg"]
                _log.error("routes of %s cannot be read, keeping what is known: %s", model, what)
                continue
            known = self._routes.get(model)
            if known is None or routes.version > known.version or epoch != self._routes_epoch:
                self._routes[model] = routes
        self._routes_epoch = epoch
        self.changed()
