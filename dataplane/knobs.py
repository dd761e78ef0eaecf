"""The data plane's view of the knobs: a local copy, so that reading one costs no network.

A message after each change makes the copy read the ledger again; polling is the safety net. The ledger says which
leases are in force and which of those known here were released. A known lease that is neither is not believed to be
gone (Redis was flushed, restarted, or failed over to a replica that had lost the last writes, and its owner has not
put it back yet): it stays until its own expiry on this process's monotonic clock, as all do while Redis is away.
Then comes the baseline, which is also where a process starts that has never read.
"""

import logging
import threading
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from types import TracebackType
from typing import Self, cast

import redis

from dataplane import keys
from dataplane.ledger import Ledger
from domain.knobs import Baseline, KnobName, KnobValue, Lease, effective_value

_log = logging.getLogger(__name__)

_STOP_CHECK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class _Held:
    lease: Lease
    until: float
    """Monotonic seconds; never later than the lease's end on the server's clock."""


@dataclass(frozen=True, slots=True)
class _Copy:
    held: dict[str, _Held]
    values: dict[KnobName, KnobValue]
    until: float
    """Monotonic seconds at which the next lease ends and the values must be computed again."""


class Knobs:
    """The knobs' values in force, for any number of threads.

    Use it as a context manager, or call `start` and `close`, to be kept up to date in the background; `refresh`
    reads once, by hand.
    """

    def __init__(self, client: redis.Redis, baseline: Baseline, poll_every: timedelta = timedelta(seconds=1)) -> None:
        self._client = client
        self._ledger = Ledger(client)
        self._baseline = baseline
        self._poll_seconds = poll_every.total_seconds()
        self._reading = threading.Lock()
        self._swapping = threading.Lock()
        self._copy = self._copy_of({})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="knobs", daemon=True)

    @property
    def cache_ttl_seconds(self) -> int:
        """How long an answer may be served from the cache."""
        return cast(int, self.value(KnobName.CACHE_TTL_SECONDS))

    def model_for(self, intent: str) -> str:
        """The model that answers `intent`.

        Raises:
            KeyError: there is no such intent in the baseline.
        """
        return cast(dict[str, str], self.value(KnobName.MODEL_ROUTING))[intent]

    def value(self, knob: KnobName) -> KnobValue:
        """The knob's value in force now. No I/O; never fails."""
        copy = self._copy
        if monotonic() >= copy.until:
            with self._swapping:
                copy = self._copy = self._copy_of(self._copy.held)
        return copy.values[knob]

    def refresh(self) -> None:
        """Read the ledger now. Redis's errors pass through, and leave what is known as it is."""
        with self._reading:
            asked_at = monotonic()
            known = self._copy.held
            view = self._ledger.leases(known)
            held = {id_: one for id_, one in known.items() if id_ not in view.released}
            for lease in view.leases:
                until = asked_at + (lease.expires_at - view.server_time).total_seconds()
                before = known.get(lease.lease_id)
                held[lease.lease_id] = _Held(lease, max(until, before.until) if before else until)
            with self._swapping:
                self._copy = self._copy_of(held)

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

    def _copy_of(self, held: dict[str, _Held]) -> _Copy:
        now = monotonic()
        held = {id_: one for id_, one in held.items() if one.until > now}
        leases = [one.lease for one in held.values()]
        values = {knob: effective_value(knob, leases, self._baseline) for knob in KnobName}
        return _Copy(held, values, min((one.until for one in held.values()), default=float("inf")))

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow_connection()
            except Exception as error:  # whatever it is, a reader that stopped reading would be worse
                _log.warning(
                    "knobs cannot be read, keeping what is known: %s",
                    error,
                    exc_info=not isinstance(error, redis.RedisError),
                )
                self._stop.wait(min(self._poll_seconds, 1.0))

    def _follow_connection(self) -> None:
        with self._client.pubsub() as pubsub:  # type: ignore[no-untyped-call]
            pubsub.subscribe(keys.CHANGES)  # its confirmation is the first message: nothing is missed before it
            due = monotonic() + self._poll_seconds
            while not self._stop.is_set():
                message = pubsub.get_message(timeout=_STOP_CHECK_SECONDS)
                if message is None and monotonic() < due:
                    continue
                while message is not None:  # one reading serves all the changes that have come in
                    message = pubsub.get_message()
                self.refresh()
                due = monotonic() + self._poll_seconds
