"""The ledger's Lua: each script is one atomic step, judged by the Redis server's clock."""

from dataplane import keys
from dataplane.connection import Script

MAX_LEASES = 1000
"""Leases in force at one time; more are refused."""
MAX_VALUE_BYTES = 4096
"""Size of one lease's value as JSON."""
AUDIT_ENTRIES = 10_000
"""About how many audit entries are kept; the oldest go first."""
REMEMBER_RELEASED_MS = 24 * 3600 * 1000
"""How long a released id stays refused, at least; longer if the lease would have lived longer."""
REFUSALS = 1000
"""About how many refused attempts are kept. They have a stream of their own, so that no flood of them pushes the
changes out of the audit."""
MAX_RELEASED = 10_000
"""Released ids remembered; the soonest to be forgotten go first."""

KEYS = [keys.LEASES, keys.EXPIRIES, keys.RELEASED, keys.AUDIT, keys.VERSION, keys.REFUSALS]
READ_KEYS = [keys.LEASES, keys.EXPIRIES, keys.RELEASED, keys.VERSION, keys.EPOCH]

_LIMITS = f"""
local MAX_LEASES, MAX_RELEASED, AUDIT_ENTRIES = {MAX_LEASES}, {MAX_RELEASED}, {AUDIT_ENTRIES}
local REFUSALS, REMEMBER_RELEASED_MS = {REFUSALS}, {REMEMBER_RELEASED_MS}
"""

# Shared by every script that changes the ledger. Numbers become text by int(): Lua would write 1.7e+12.
_PRELUDE = (
    _LIMITS
    + """
local LEASES, EXPIRIES, RELEASED, AUDIT, VERSION, REFUSED = unpack(KEYS)
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
    'holder', record.holder, 'reason', reason, 'expires_ms', int(expires), 'pin', record.pin and 1 or 0)
end

local function refuse(action, target, value, holder, why)
  redis.call('XADD', REFUSED, 'MAXLEN', '~', REFUSALS, '*', 'at_ms', int(now), 'action', action, 'target', target,
    'value', string.sub(value, 1, 500), 'holder', holder, 'why', why)
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

# ARGV: channel, outcome for a lease that is not there, then id, knob, value, holder, reason, duration, whether it is a
# pin (1 or 0) and when it was first granted ('': now) for each.
TAKE = Script(
    _PRELUDE
    + """
local count = redis.call('ZCARD', EXPIRIES)
local answer, refused = {}, false
for i = 3, #ARGV, 8 do
  local id, knob, value, holder, pin = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 6] == '1'
  local record, expires = find(id)
  local outcome
  if redis.call('ZSCORE', RELEASED, id) then outcome = 'released'
  elseif record and record.holder ~= holder then
    outcome = 'other_holder'
    refuse(ARGV[2] == 'acquired' and 'acquire' or 'renew', id, value, holder, 'it belongs to another holder')
  elseif record and (record.knob ~= knob or record.value ~= value or (record.pin or false) ~= pin) then
    outcome = 'changed'
  elseif record then outcome = 'renewed'
  elseif count >= MAX_LEASES then outcome = 'full'
  else outcome = ARGV[2]; count = count + 1 end
  local taken = outcome == 'renewed' or outcome == ARGV[2]
  local first = outcome == 'put_back' and math.min(now, tonumber(ARGV[i + 7]) or now) or now
  refused = refused or not taken
  answer[#answer + 1] = {outcome, taken and (record and record.acquired_ms or int(first)) or '',
    taken and int(math.max(expires or 0, now + tonumber(ARGV[i + 5]))) or ''}
end
if refused and ARGV[2] == 'acquired' then return finish(answer) end
for n, entry in ipairs(answer) do
  if entry[2] ~= '' then
    local i = 3 + (n - 1) * 8
    local record = {knob = ARGV[i + 1], value = ARGV[i + 2], holder = ARGV[i + 3], reason = ARGV[i + 4],
      acquired_ms = entry[2], version = changed(), pin = ARGV[i + 6] == '1' or nil}
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
RELEASE = Script(
    _PRELUDE
    + """
local answer, refused = {}, false
for i = 4, #ARGV do
  local record = find(ARGV[i])
  local outcome = 'not_held'
  if record and record.holder ~= ARGV[2] then
    outcome = 'other_holder'
    refused = true
    refuse('release', ARGV[i], '', ARGV[2], 'it belongs to another holder')
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
SWEEP = Script(_PRELUDE + "return finish(version and 1 or 0)")

# ARGV: channel, action, target, value, holder ('': nobody known), why.
REFUSE = Script(
    _PRELUDE
    + """
refuse(ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6])
return finish('')
"""
)

# ARGV: lease ids that the reader knows; the answer says which of them were released. It is one JSON text,
# which a client takes apart faster than nested answers; an empty list comes as an empty object.
READ = Script("""
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
return cjson.encode({redis.call('GET', EPOCH) or '', redis.call('GET', VERSION) or '0', now, leases, released})
""")
