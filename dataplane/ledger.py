"""The lease ledger: who holds which knob at which value until when, kept in Redis.

Every change is one Lua script: it reads the server's clock, ends what has expired, checks, writes, appends to the
audit stream and tells the readers. All of it happens or nothing, and all of it may run twice.

- A lease id is used once. The same id again is a renewal; with another holder, knob, value or pin it is refused; after
  a release it is refused, so that a late retry brings nothing back. Who takes a lever again takes a new id.
- What is another holder's is refused and the attempt put on record; nothing else of that call is done either.
- A renewal only ever moves the end of a lease later, so that late duplicates cannot shorten it.
- Expired is judged by the server's clock at each read; nobody has to live for a lease to end.
- Everything is bounded: leases, their size, remembered releases and the audit stream.

Works on Redis 6.2 and later and on Valkey. Redis's errors pass through.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal, cast
from uuid import uuid4

import redis

from dataplane import keys
from dataplane.ledger_scripts import KEYS, MAX_LEASES, MAX_VALUE_BYTES, READ, READ_KEYS, REFUSE, RELEASE, SWEEP, TAKE
from domain.knobs import (
    AuditEntry,
    Baseline,
    Holder,
    KnobName,
    KnobValue,
    Lease,
    LeaseRequest,
    Refusal,
    RefusalEntry,
    effective_value,
)

_log = logging.getLogger(__name__)


class TakeOutcome(StrEnum):
    """What became of one lease that was asked for."""

    ACQUIRED = "acquired"
    RENEWED = "renewed"
    PUT_BACK = "put_back"
    """A renewal found nothing: the lease had expired, or Redis had lost it. It is in force again."""
    RELEASED = "released"
    """Refused: this id was released."""
    OTHER_HOLDER = "other_holder"
    """Refused: another holder has this id."""
    CHANGED = "changed"
    """Refused: the id is held for another knob or value, or as a pin and not as one."""
    FULL = "full"
    """Refused: `MAX_LEASES` are in force."""


class ReleaseOutcome(StrEnum):
    """What a release found. None of them is a failure."""

    RELEASED = "released"
    ALREADY_RELEASED = "already_released"
    NOT_HELD = "not_held"
    """Expired, lost, or never there. A late renewal of it is refused from now on."""


class LeaseRefusedError(Exception):
    """Nothing was changed: at least one lease of the call was refused."""

    def __init__(self, refusals: dict[str, TakeOutcome]) -> None:
        self.refusals = refusals
        """Lease id to why."""
        super().__init__("; ".join(f"lease {id_!r} {_WHY[why]}" for id_, why in refusals.items()))


_WHY = {
    TakeOutcome.RELEASED: "was released; take a new id",
    TakeOutcome.OTHER_HOLDER: "belongs to another holder",
    TakeOutcome.CHANGED: "is held for another knob or value, or is a pin and this is not; take a new id",
    TakeOutcome.FULL: f"is one more than the {MAX_LEASES} that may be in force at one time",
}


@dataclass(frozen=True, slots=True)
class TakeResult:
    """One lease of a renewal: what became of it, and the lease unless it was refused."""

    lease_id: str
    outcome: TakeOutcome
    lease: Lease | None


@dataclass(frozen=True, slots=True)
class ReleaseResult:
    """One lease of a release."""

    lease_id: str
    outcome: ReleaseOutcome


@dataclass(frozen=True, slots=True)
class LedgerView:
    """The ledger at one moment of the server's clock."""

    leases: tuple[Lease, ...]
    """Unexpired leases, the first to end first."""
    epoch: str | None
    """Marker of the data set; None or another than before: Redis lost what it held."""
    version: int
    """Counts the ledger's changes within an epoch."""
    server_time: datetime
    released: frozenset[str]
    """Those of the ids asked about whose release is on record."""


class Ledger:
    """The ledger in the Redis that `client` (made by `connect`) speaks to. Thread-safe."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def acquire(self, requests: Sequence[LeaseRequest]) -> list[Lease]:
        """Take or renew several leases, all or none, in the order of `requests`.

        Raises:
            LeaseRefusedError: an id was released, is another holder's or has another value, or the ledger is full.
            ValueError: an id twice in one call, or a value that is too large.
        """
        results = self._take(requests, TakeOutcome.ACQUIRED)
        if refusals := {result.lease_id: result.outcome for result in results if result.lease is None}:
            raise LeaseRefusedError({id_: why for id_, why in refusals.items() if why in _WHY})
        return [result.lease for result in results if result.lease is not None]

    def renew(self, requests: Sequence[LeaseRequest]) -> list[TakeResult]:
        """Renew several leases and put back those that are gone, unless released; one refusal stops no other.

        Raises:
            ValueError: an id twice in one call, or a value that is too large.
        """
        return self._take(requests, TakeOutcome.PUT_BACK)

    def release(self, lease_ids: Sequence[str], holder: Holder, reason: str) -> list[ReleaseResult]:
        """End several leases of `holder`, all or none, in the order of `lease_ids`; releasing again is a success.

        Raises:
            LeaseRefusedError: one of them is another holder's.
        """
        if not lease_ids:
            return []
        ids = list(dict.fromkeys(lease_ids))
        answer = cast(list[str], RELEASE(self._client, KEYS, [keys.CHANGES, _holder_text(holder), reason, *ids]))
        if refused := [id_ for id_, outcome in zip(ids, answer, strict=True) if outcome == TakeOutcome.OTHER_HOLDER]:
            raise LeaseRefusedError(dict.fromkeys(refused, TakeOutcome.OTHER_HOLDER))
        return [ReleaseResult(id_, ReleaseOutcome(outcome)) for id_, outcome in zip(ids, answer, strict=True)]

    def leases(self, known_ids: Iterable[str] = ()) -> LedgerView:
        """What is in force now, and which of `known_ids` are known to be released. Writes nothing."""
        return parse_view(READ(self._client, READ_KEYS, list(known_ids)))

    def effective(self, knob: KnobName, baseline: Baseline) -> KnobValue:
        """The knob's value in force now."""
        return effective_value(knob, self.leases().leases, baseline)

    def history(self, since: datetime, count: int = 1000) -> list[AuditEntry]:
        """The newest `count` changes that happened at `since` or later, oldest first.

        A lease that ended by itself is on record since the next change of the ledger or `sweep`.
        """
        parsed = [entry for fields in self._stream(keys.AUDIT, since, count) if (entry := _parse_audit(fields))]
        return sorted((entry for entry in parsed if entry.at >= since), key=lambda entry: entry.at)

    def record_refusal(self, refusal: Refusal) -> None:
        """Put on record that somebody tried what they may not. Twice is on record twice."""
        holder = _holder_text(refusal.holder) if refusal.holder else ""
        REFUSE(self._client, KEYS, [keys.CHANGES, refusal.action, refusal.target, refusal.value, holder, refusal.why])

    def refusals(self, since: datetime, count: int = 1000) -> list[RefusalEntry]:
        """The newest `count` refused attempts at `since` or later, oldest first: those recorded by `record_refusal`,
        and those at a lease of another holder."""
        return [
            RefusalEntry(
                **{key: fields[key] for key in ("action", "target", "value", "why")},
                holder=Holder(**_holder_fields(fields["holder"])) if fields["holder"] else None,
                at=_time(fields["at_ms"]),
            )
            for fields in self._stream(keys.REFUSALS, since, count)
        ]

    def sweep(self) -> bool:
        """Put the leases that have ended on record and forget them; whether there were any."""
        return bool(SWEEP(self._client, KEYS, [keys.CHANGES]))

    def ensure_epoch(self) -> str:
        """The data set's marker, made if it is missing.

        Call it only after what a missing marker means has been dealt with: the owners told to put their leases back.
        """
        marker = uuid4().hex
        if self._client.set(keys.EPOCH, marker, nx=True):
            return marker
        return cast(str | None, self._client.get(keys.EPOCH)) or self.ensure_epoch()

    def _stream(self, key: str, since: datetime, count: int) -> list[dict[str, str]]:
        entries = cast(
            list[tuple[str, dict[str, str]]],
            self._client.xrevrange(key, min=str(int(since.timestamp() * 1000)), count=count),
        )
        return [fields for _, fields in reversed(entries)]

    def _take(
        self, requests: Sequence[LeaseRequest], new: Literal[TakeOutcome.ACQUIRED, TakeOutcome.PUT_BACK]
    ) -> list[TakeResult]:
        if not requests:
            return []
        if len({request.lease_id for request in requests}) < len(requests):
            raise ValueError(f"lease_id: {[request.lease_id for request in requests]} has one id twice")
        args: list[str | int] = [keys.CHANGES, new]
        for request in requests:
            value = json.dumps(request.value, sort_keys=True, separators=(",", ":"))
            if len(value) > MAX_VALUE_BYTES:
                raise ValueError(
                    f"value of lease {request.lease_id}: {len(value)} bytes; {MAX_VALUE_BYTES} are allowed"
                )
            holder = _holder_text(request.holder)
            first = "" if request.acquired_at is None else int(request.acquired_at.timestamp() * 1000)
            args += [request.lease_id, request.knob, value, holder, request.reason, request.duration_ms]
            args += [int(request.pin), first]
        answer = cast(list[list[Any]], TAKE(self._client, KEYS, args))
        return [_take_result(request, *entry) for request, entry in zip(requests, answer, strict=True)]


def parse_view(answer: str) -> LedgerView:
    """What `READ` answered."""
    epoch, version, now_ms, records, released = json.loads(answer)
    return LedgerView(
        leases=tuple(lease for entry in records if (lease := _parse_lease(*entry)) is not None),
        epoch=epoch or None,
        version=int(version),
        server_time=_time(now_ms),
        released=frozenset(released),
    )


def _take_result(
    request: LeaseRequest, outcome: str, acquired_ms: str, expires_ms: str, version: int | None = None
) -> TakeResult:
    lease = None
    if version is not None:
        lease = Lease(
            **request.model_dump(exclude={"duration_ms", "holder", "acquired_at"}),
            holder=request.holder,
            acquired_at=_time(acquired_ms),
            expires_at=_time(expires_ms),
            version=version,
        )
    return TakeResult(request.lease_id, TakeOutcome(outcome), lease)


def _time(ms: str) -> datetime:
    return datetime.fromtimestamp(int(ms) / 1000, UTC)


def _holder_text(holder: Holder) -> str:
    return f"{holder.kind}:{holder.id}"


def _holder_fields(text: str) -> dict[str, str]:
    kind, _, id_ = text.partition(":")
    return {"kind": kind, "id": id_}


def _parse_lease(lease_id: str, expires_ms: str, record: str) -> Lease | None:
    """The lease, or None for one that this version does not know (a knob of a later one), which it leaves alone."""
    try:
        fields = json.loads(record)
        return Lease.model_validate(
            {
                **fields,
                "lease_id": lease_id,
                "value": json.loads(fields["value"]),
                "holder": _holder_fields(fields["holder"]),
                "acquired_at": _time(fields["acquired_ms"]),
                "expires_at": _time(expires_ms),
            }
        )
    except (ValueError, KeyError):
        _log.debug("lease %s is not known to this version: %s", lease_id, record)
        return None


def _parse_audit(fields: dict[str, str]) -> AuditEntry | None:
    try:
        return AuditEntry.model_validate(
            {
                **fields,
                "value": json.loads(fields["value"]),
                "holder": _holder_fields(fields["holder"]),
                "at": _time(fields["at_ms"]),
                "expires_at": _time(fields["expires_ms"]),
            }
        )
    except (ValueError, KeyError):
        return None
