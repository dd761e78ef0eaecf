"""The lease ledger: who holds which knob at which value until when, kept in Redis.

Every change is one Lua script: it reads the server's clock, ends what has expired, checks, writes, appends to the
audit stream and tells the readers. All of it happens or nothing, and all of it may run twice.

- A lease id is used once. The same id again is a renewal; with another holder, knob or value it is refused; after
  a release it is refused, so that a late retry brings nothing back. Who takes a lever again takes a new id.
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
from dataplane.connection import Script
from domain.knobs import AuditEntry, Baseline, Holder, KnobName, KnobValue, Lease, LeaseRequest, effective_value

MAX_LEASES = 1000
"""Leases in force at one time; more are refused."""
MAX_VALUE_BYTES = 4096
"""Size of one lease's value as JSON."""
AUDIT_ENTRIES = 10_000
"""About how many audit entries are kept; the oldest go first."""
REMEMBER_RELEASED_MS = 24 * 3600 * 1000
"""How long a released id stays refused, at least; longer if the lease would have lived longer."""
MAX_RELEASED = 10_000
"""Released ids remembered; the soonest to be forgotten go first."""

_log = logging.getLogger(__name__)

_KEYS = [keys.LEASES, keys.EXPIRIES, keys.RELEASED, keys.AUDIT, keys.VERSION]

_LIMITS = f"""
local MAX_LEASES, MAX_RELEASED, AUDIT_ENTRIES = {MAX_LEASES}, {MAX_RELEASED}, {AUDIT_ENTRIES}
local REMEMBER_RELEASED_MS = {REMEMBER_RELEASED_MS}
"""

# Shared by every script that changes the ledger. Numbers become text by int(): Lua would write 1.7e+12.
_PRELUDE = (
    _LIMITS
    + """
local LEASES, EXPIRIES, RELEASED, AUDIT, VERSION = unpack(KEYS)
local function int(number) return string.format('%.0f', number) end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local version

local function changed()
  version = version or redis.call('INCR', VERSION)
  return version
end

local function find(id)
  local record, expires = redis.call('HGET', LEASES, id), redis.call('ZSCORE', EXPIRIES, id)
  if record and expires then return cjson.decode(record), tonumber(expires) end
end

local function audit(action, id, record, expires, reason)
  changed()
  redis.call('XADD', AUDIT, 'MAXLEN', '~', AUDIT_ENTRIES, '*', 'action', action, 'at_ms',
    int(action == 'expired' and expires or now), 'lease_id', id, 'knob', record.knob, 'value', record.value,
    'holder', record.holder, 'reason', reason, 'expires_ms', int(expires))
end

local function remove(id)
  redis.call('HDEL', LEASES, id)
  redis.call('ZREM', EXPIRIES, id)
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', EXPIRIES, '-inf', int(now))) do
  local record, expires = find(id)
  if record then audit('expired', id, record, expires, record.reason) end
  remove(id)
end
redis.call('ZREMRANGEBYSCORE', RELEASED, '-inf', int(now))

local function finish(answer)
  if version then redis.call('PUBLISH', ARGV[1], 'leases') end
  return answer
end
"""
)

# ARGV: channel, outcome for a lease that is not there, then id, knob, value, holder, reason, duration for each.
_TAKE = Script(
    _PRELUDE
    + """
local count = redis.call('ZCARD', EXPIRIES)
local answer, refused = {}, false
for i = 3, #ARGV, 6 do
  local id, knob, value, holder = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local record, expires = find(id)
  local outcome
  if redis.call('ZSCORE', RELEASED, id) then outcome = 'released'
  elseif record and record.holder ~= holder then outcome = 'other_holder'
  elseif record and (record.knob ~= knob or record.value ~= value) then outcome = 'changed'
  elseif record then outcome = 'renewed'
  elseif count >= MAX_LEASES then outcome = 'full'
  else outcome = ARGV[2]; count = count + 1 end
  local taken = outcome == 'renewed' or outcome == ARGV[2]
  refused = refused or not taken
  answer[#answer + 1] = {outcome, taken and (record and record.acquired_ms or int(now)) or '',
    taken and int(math.max(expires or 0, now + tonumber(ARGV[i + 5]))) or ''}
end
if refused and ARGV[2] == 'acquired' then return finish(answer) end
for n, entry in ipairs(answer) do
  if entry[2] ~= '' then
    local i = 3 + (n - 1) * 6
    local record = {knob = ARGV[i + 1], value = ARGV[i + 2], holder = ARGV[i + 3], reason = ARGV[i + 4],
      acquired_ms = entry[2], version = changed()}
    redis.call('HSET', LEASES, ARGV[i], cjson.encode(record))
    redis.call('ZADD', EXPIRIES, entry[3], ARGV[i])
    audit(entry[1] == 'renewed' and 'renewed' or 'acquired', ARGV[i], record, tonumber(entry[3]), record.reason)
    entry[4] = record.version
  end
end
return finish(answer)
"""
)

# ARGV: channel, holder, reason, then the ids.
_RELEASE = Script(
    _PRELUDE
    + """
local answer, refused = {}, false
for i = 4, #ARGV do
  local record = find(ARGV[i])
  local outcome = 'not_held'
  if record and record.holder ~= ARGV[2] then outcome = 'other_holder'; refused = true
  elseif record then outcome = 'released'
  elseif redis.call('ZSCORE', RELEASED, ARGV[i]) then outcome = 'already_released' end
  answer[#answer + 1] = outcome
end
if refused then return finish(answer) end
for n, outcome in ipairs(answer) do
  local id = ARGV[n + 3]
  if outcome ~= 'already_released' then
    local record, expires = find(id)
    if record then
      audit('released', id, record, expires, ARGV[3])
      remove(id)
    end
    changed()
    redis.call('ZADD', RELEASED, int(math.max(expires or 0, now + REMEMBER_RELEASED_MS)), id)
  end
end
redis.call('ZREMRANGEBYRANK', RELEASED, 0, -MAX_RELEASED - 1)
return finish(answer)
"""
)

# ARGV: channel.
_SWEEP = Script(_PRELUDE + "return finish(version and 1 or 0)")

# ARGV: lease ids that the reader knows; the answer says which of them were released.
_READ = Script("""
local LEASES, EXPIRIES, RELEASED, VERSION, EPOCH = unpack(KEYS)
local time = redis.call('TIME')
local now = string.format('%.0f', tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000))
local leases, released = {}, {}
local held = redis.call('ZRANGEBYSCORE', EXPIRIES, '(' .. now, '+inf', 'WITHSCORES')
for i = 1, #held, 2 do
  local record = redis.call('HGET', LEASES, held[i])
  if record then leases[#leases + 1] = {held[i], held[i + 1], record} end
end
for _, id in ipairs(ARGV) do
  if redis.call('ZSCORE', RELEASED, id) then released[#released + 1] = id end
end
return {redis.call('GET', EPOCH) or '', redis.call('GET', VERSION) or '0', now, leases, released}
""")


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
    """Refused: the id is held for another knob or value."""
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
    TakeOutcome.CHANGED: "is held for another knob or value; take a new id",
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
        answer = cast(list[str], _RELEASE(self._client, _KEYS, [keys.CHANGES, _holder_text(holder), reason, *ids]))
        if refused := [id_ for id_, outcome in zip(ids, answer, strict=True) if outcome == TakeOutcome.OTHER_HOLDER]:
            raise LeaseRefusedError(dict.fromkeys(refused, TakeOutcome.OTHER_HOLDER))
        return [ReleaseResult(id_, ReleaseOutcome(outcome)) for id_, outcome in zip(ids, answer, strict=True)]

    def leases(self, known_ids: Iterable[str] = ()) -> LedgerView:
        """What is in force now, and which of `known_ids` are known to be released. Writes nothing."""
        read_keys = [keys.LEASES, keys.EXPIRIES, keys.RELEASED, keys.VERSION, keys.EPOCH]
        epoch, version, now_ms, records, released = cast(
            tuple[str, str, str, list[list[str]], list[str]], tuple(_READ(self._client, read_keys, list(known_ids)))
        )
        return LedgerView(
            leases=tuple(lease for entry in records if (lease := _parse_lease(*entry)) is not None),
            epoch=epoch or None,
            version=int(version),
            server_time=_time(now_ms),
            released=frozenset(released),
        )

    def effective(self, knob: KnobName, baseline: Baseline) -> KnobValue:
        """The knob's value in force now."""
        return effective_value(knob, self.leases().leases, baseline)

    def history(self, since: datetime, count: int = 1000) -> list[AuditEntry]:
        """The newest `count` changes that happened at `since` or later, oldest first.

        A lease that ended by itself is on record since the next change of the ledger or `sweep`.
        """
        since_ms = int(since.timestamp() * 1000)
        entries = cast(
            list[tuple[str, dict[str, str]]],
            self._client.xrevrange(keys.AUDIT, min=str(since_ms), count=count),
        )
        parsed = [entry for _, fields in reversed(entries) if (entry := _parse_audit(fields)) is not None]
        return sorted((entry for entry in parsed if entry.at >= since), key=lambda entry: entry.at)

    def sweep(self) -> bool:
        """Put the leases that have ended on record and forget them; whether there were any."""
        return bool(_SWEEP(self._client, _KEYS, [keys.CHANGES]))

    def ensure_epoch(self) -> str:
        """The data set's marker, made if it is missing.

        Call it only after what a missing marker means has been dealt with: the owners told to put their leases back.
        """
        marker = uuid4().hex
        if self._client.set(keys.EPOCH, marker, nx=True):
            return marker
        return cast(str | None, self._client.get(keys.EPOCH)) or self.ensure_epoch()

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
            args += [request.lease_id, request.knob, value, holder, request.reason, request.duration_ms]
        answer = cast(list[list[Any]], _TAKE(self._client, _KEYS, args))
        return [_take_result(request, *entry) for request, entry in zip(requests, answer, strict=True)]


def _take_result(
    request: LeaseRequest, outcome: str, acquired_ms: str, expires_ms: str, version: int | None = None
) -> TakeResult:
    lease = None
    if version is not None:
        lease = Lease(
            **request.model_dump(exclude={"duration_ms", "holder"}),
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
