"""What one process knows of the knobs: a local copy without any I/O, shared by the sync and the asyncio reader.

A reading says which leases are in force and which of those known here were released. A known lease that is neither
is not believed to be gone (Redis was flushed, restarted, or failed over to a replica that had lost the last writes,
and its owner has not put it back yet): it stays until its own expiry on this process's monotonic clock, as all do
while Redis is away. Then comes the baseline, which is also where a process starts that has never read. A release that
was seen here stays one, whatever a replica that lost it says later.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple, cast

from dataplane.ledger import LedgerView
from domain.knobs import Baseline, KnobName, KnobValue, Lease, effective_value


class HistoryTruncation(NamedTuple):
    """How many titles of a user's reading history a prompt carries."""

    recent: int
    top: int


@dataclass(frozen=True, slots=True)
class KnobsStatus:
    """A reader's gauges and counters at one moment. Counters grow from 0 at the reader's making."""

    connected: bool
    """Whether changes are pushed to this reader now; polling goes on as long as Redis answers."""
    staleness_seconds: float | None
    """Age of the newest reading: what is known here was in force so long ago, or later. None: never read."""
    epoch: str | None
    """The data set's marker at the newest reading."""
    version: int
    """The ledger's version at the newest reading."""
    leases: int
    """Unexpired leases known here, ..."""
    unconfirmed_leases: int
    """... and those of them that the newest reading did not show: kept until their own expiry."""
    pushes: int
    """Changes that were told."""
    polls: int
    """Readings because nothing had been told for the polling interval."""
    readings: int
    """Readings that succeeded, for whatever reason."""
    errors: int
    """Readings or connections that failed."""
    reconnects: int
    """Connections for pushed changes after the first."""
    losses: int
    """Readings that showed that Redis had lost writes: another epoch than before, or an older version."""


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


class KnobCopy:
    """The knobs' values in force, for any number of threads. Reading does no I/O and never fails.

    Values that are maps are shared: do not change them.
    """

    def __init__(self, baseline: Baseline, clock: Callable[[], float] = monotonic) -> None:
        self._baseline = baseline
        self._clock = clock
        self._changing = threading.Lock()
        self._copy = self._copy_of({})
        self._released: dict[str, float] = {}
        self._seen: frozenset[str] = frozenset()
        self._read_at: float | None = None
        self._epoch: str | None = None
        self._version = 0
        self._connected = False
        self._connections = self._pushes = self._polls = self._readings = self._errors = self._losses = 0

    def value(self, knob: KnobName) -> KnobValue:
        """The knob's value in force now."""
        copy = self._copy
        if self._clock() >= copy.until:
            with self._changing:
                copy = self._copy = self._copy_of(self._copy.held)
        return copy.values[knob]

    @property
    def cache_ttl_seconds(self) -> int:
        """How long an answer may be served from the cache."""
        return cast(int, self.value(KnobName.CACHE_TTL_SECONDS))

    @property
    def model_routing(self) -> dict[str, str]:
        """Every intent with the model that answers it."""
        return cast(dict[str, str], self.value(KnobName.MODEL_ROUTING))

    def model_for(self, intent: str) -> str:
        """The model that answers `intent`.

        Raises:
            KeyError: there is no such intent in the baseline; so do the others by intent, and those by feature.
        """
        return self.model_routing[intent]

    @property
    def batch_window_ms(self) -> int:
        """How long the batcher waits for a batch to fill; 0: not at all."""
        return cast(int, self.value(KnobName.BATCH_WINDOW_MS))

    @property
    def request_coalescing(self) -> bool:
        """Whether identical requests in flight share one answer."""
        return cast(bool, self.value(KnobName.REQUEST_COALESCING))

    @property
    def invocations_per_second_per_task(self) -> int | None:
        """How often this task may call Bedrock; None: as often as it likes."""
        return cast(int | None, self.value(KnobName.INVOCATIONS_PER_SECOND_PER_TASK))

    def feature_enabled(self, feature: str) -> bool:
        """Whether `feature` is offered."""
        return cast(dict[str, bool], self.value(KnobName.FEATURE_FLAG))[feature]

    def max_output_tokens(self, intent: str) -> int:
        """The longest answer to `intent`."""
        return cast(dict[str, int], self.value(KnobName.MAX_OUTPUT_TOKENS))[intent]

    def history_truncation(self, intent: str) -> HistoryTruncation | None:
        """How much of the reading history the prompt of `intent` carries; None: all of it."""
        counts = cast(dict[str, dict[str, int] | None], self.value(KnobName.HISTORY_TRUNCATION))[intent]
        return None if counts is None else HistoryTruncation(**counts)

    def status(self) -> KnobsStatus:
        """What there is to know of this reader."""
        with self._changing:
            now = self._clock()
            unexpired = {id_ for id_, one in self._copy.held.items() if one.until > now}
            return KnobsStatus(
                connected=self._connected,
                staleness_seconds=None if self._read_at is None else now - self._read_at,
                epoch=self._epoch,
                version=self._version,
                leases=len(unexpired),
                unconfirmed_leases=len(unexpired - self._seen),
                pushes=self._pushes,
                polls=self._polls,
                readings=self._readings,
                errors=self._errors,
                reconnects=max(0, self._connections - 1),
                losses=self._losses,
            )

    def known_ids(self) -> list[str]:
        """The ids whose release the next reading should ask for."""
        return list(self._copy.held)

    def take(self, view: LedgerView, asked_at: float) -> None:
        """Learn what a reading said that was asked for at `asked_at`. Readings are taken in the order they were made.

        `known_ids` were asked for with it.
        """
        with self._changing:
            known = self._copy.held
            for id_ in view.released & known.keys():
                self._released[id_] = known[id_].until
            self._released = {id_: until for id_, until in self._released.items() if until > asked_at}
            held = {id_: one for id_, one in known.items() if id_ not in self._released}
            for lease in view.leases:
                if lease.lease_id not in self._released:
                    until = asked_at + (lease.expires_at - view.server_time).total_seconds()
                    before = known.get(lease.lease_id)
                    held[lease.lease_id] = _Held(lease, max(until, before.until) if before else until)
            other_data = self._epoch is not None and view.epoch != self._epoch
            if other_data or view.version < self._version:
                self._losses += 1
            self._seen = frozenset(lease.lease_id for lease in view.leases)
            self._read_at, self._epoch, self._version = asked_at, view.epoch, view.version
            self._readings += 1
            self._copy = self._copy_of(held)

    def told(self, kind: str) -> None:
        """A message of the subscription came in: its confirmation, or that something changed."""
        if kind == "subscribe":
            self._connected = True
            self._connections += 1
        else:
            self._pushes += 1

    def disconnected(self) -> None:
        """Changes are no longer pushed."""
        self._connected = False

    def failed(self) -> None:
        """A reading or the connection failed."""
        self._errors += 1

    def polled(self) -> None:
        """Nothing was told for the polling interval."""
        self._polls += 1

    def _copy_of(self, held: dict[str, _Held]) -> _Copy:
        now = self._clock()
        held = {id_: one for id_, one in held.items() if one.until > now}
        leases = [one.lease for one in held.values()]
        values = {knob: effective_value(knob, leases, self._baseline) for knob in KnobName}
        return _Copy(held, values, min((one.until for one in held.values()), default=float("inf")))
