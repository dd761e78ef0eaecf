"""The data plane's readers of the knobs: a local copy, so that reading one costs no network.

A message after each change makes the copy read the ledger again; polling is the safety net. What is known while Redis
is away, or has lost what it held, `knob_copy` says.
"""

import asyncio
import logging
import threading
from datetime import timedelta
from time import monotonic
from types import TracebackType
from typing import Self

import redis
import redis.asyncio

from dataplane import keys
from dataplane.knob_copy import KnobCopy
from dataplane.ledger import Ledger, parse_view
from dataplane.ledger_scripts import READ, READ_KEYS
from domain.knobs import Baseline

POLL_EVERY = timedelta(seconds=1)
"""What is known is not older than this and one reading, as long as Redis answers."""

_STOP_CHECK_SECONDS = 0.2
_MOST_WAIT_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Knobs(KnobCopy):
    """The knobs' values in force, for any number of threads.

    Use it as a context manager, or call `start` and `close`, to be kept up to date in the background; `refresh`
    reads once, by hand.
    """

    def __init__(self, client: redis.Redis, baseline: Baseline, poll_every: timedelta = POLL_EVERY) -> None:
        """`client` is made by `connect`."""
        super().__init__(baseline)
        self._client = client
        self._ledger = Ledger(client)
        self._poll_seconds = poll_every.total_seconds()
        self._reading = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="knobs", daemon=True)

    def refresh(self) -> None:
        """Read the ledger now. Redis's errors pass through, and leave what is known as it is."""
        with self._reading:
            asked_at = monotonic()
            self.take(self._ledger.leases(self.known_ids()), asked_at)

    def start(self) -> Self:
        """Keep the copy up to date from now on."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop following; the values known stay readable until they expire."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow_connection()
            except Exception as error:  # whatever it is, a reader that stopped reading would be worse
                self.failed()
                _warn(error)
            finally:
                self.disconnected()
            self._stop.wait(min(self._poll_seconds, _MOST_WAIT_SECONDS))

    def _follow_connection(self) -> None:
        self.refresh()  # also where nothing can be subscribed to; and a cluster's client learns what nodes there are
        with self._client.pubsub() as pubsub:  # type: ignore[no-untyped-call]
            pubsub.subscribe(keys.CHANGES)  # its confirmation is the first message: nothing is missed before it
            due = monotonic() + self._poll_seconds
            while not self._stop.is_set():
                message = pubsub.get_message(timeout=min(_STOP_CHECK_SECONDS, max(0.0, due - monotonic())))
                if message is None and monotonic() < due:
                    continue
                if message is None:
                    self.polled()
                while message is not None:  # one reading serves all the changes that have come in
                    self.told(message["type"])
                    message = pubsub.get_message()
                self.refresh()
                due = monotonic() + self._poll_seconds


class AsyncKnobs(KnobCopy):
    """The knobs' values in force, for an asyncio process; values may be read from any thread.

    Use it as an asynchronous context manager, or call `start` and `close`, to be kept up to date in the background;
    `refresh` reads once, by hand.
    """

    def __init__(self, client: redis.asyncio.Redis, baseline: Baseline, poll_every: timedelta = POLL_EVERY) -> None:
        """`client` is made by `connect_async`."""
        super().__init__(baseline)
        self._client = client
        self._poll_seconds = poll_every.total_seconds()
        self._reading = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Read the ledger now. Redis's errors pass through, and leave what is known as it is."""
        async with self._reading:
            asked_at = monotonic()
            self.take(parse_view(await READ.run(self._client, READ_KEYS, [*self.known_ids()])), asked_at)

    def start(self) -> Self:
        """Keep the copy up to date from now on, in the running loop."""
        self._task = asyncio.create_task(self._follow(), name="knobs")
        return self

    async def close(self) -> None:
        """Stop following; the values known stay readable until they expire."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _follow(self) -> None:
        while True:
            try:
                await self._follow_connection()
            except Exception as error:  # as in Knobs
                self.failed()
                _warn(error)
            finally:
                self.disconnected()
            await asyncio.sleep(min(self._poll_seconds, _MOST_WAIT_SECONDS))

    async def _follow_connection(self) -> None:
        await self.refresh()  # as in Knobs
        async with self._client.pubsub() as pubsub:
            await pubsub.subscribe(keys.CHANGES)
            due = monotonic() + self._poll_seconds
            while True:
                message = await pubsub.get_message(timeout=max(0.0, due - monotonic()))
                if message is None and monotonic() < due:
                    continue
                if message is None:
                    self.polled()
                while message is not None:
                    self.told(message["type"])
                    message = await pubsub.get_message()
                await self.refresh()
                due = monotonic() + self._poll_seconds


def _warn(error: Exception) -> None:
    _log.warning(
        "knobs cannot be read, keeping what is known: %s", error, exc_info=not isinstance(error, redis.RedisError)
    )
