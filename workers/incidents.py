"""Starting and joining incidents in Temporal: one open workflow per key, and a storm of duplicates becomes a count."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from functools import partial
from typing import TypeVar

from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowHandle,
    WorkflowQueryFailedError,
)
from temporalio.common import (
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
)
from temporalio.service import RPCError, RPCStatusCode

from domain.alarm_rules import IncidentTarget
from domain.alarms import AlarmChange, AlarmState
from domain.incident import IncidentRecord, Phase, quoted, utc
from domain.messages import (
    ALARM_CHANGED,
    ALARM_REPEATED,
    INCIDENT_WORKFLOW,
    RECORD,
    AlarmRepeats,
    IncidentInput,
    incident_id,
)
from domain.policy import Policy
from workers.outages import Outage, insist
from workflows.search_attributes import INCIDENT_KEY, PHASE

R = TypeVar("R")

MAX_KEYS = 10_000
MAX_ALARMS_PER_KEY = 100
RPC_TIMEOUT = timedelta(seconds=5)
SUMMARY_NAME_CHARS = 60
"""Temporal takes 400 bytes of summary as JSON, in which a character may need six."""

_AWAY = frozenset(
    (
        RPCStatusCode.UNAVAILABLE,
        RPCStatusCode.DEADLINE_EXCEEDED,
        RPCStatusCode.CANCELLED,
        RPCStatusCode.RESOURCE_EXHAUSTED,
        RPCStatusCode.INTERNAL,
        RPCStatusCode.UNKNOWN,
        RPCStatusCode.ABORTED,
    )
)
"""Answers that say nothing about the request itself: it waits and is sent again."""


def _temporal_is_away(error: Exception) -> bool:
    return isinstance(error, RPCError) and error.status in _AWAY


async def start_or_join(
    client: Client, target: IncidentTarget, change: AlarmChange, task_queue: str, rpc_timeout: timedelta = RPC_TIMEOUT
) -> None:
    """Signal-with-start: one open workflow per key, whoever else tries at the same time.

    Raises:
        RPCError: Temporal did not answer, or refuses.
    """
    # So that it is found at once; the incident knows the others.
    attributes = TypedSearchAttributes(
        [SearchAttributePair(INCIDENT_KEY, target.key), SearchAttributePair(PHASE, str(Phase.TRIAGE))]
    )
    await client.start_workflow(
        INCIDENT_WORKFLOW,
        IncidentInput(key=target.key, runbook=target.runbook, model=target.model, alarm=change),
        id=incident_id(target.key),
        task_queue=task_queue,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        start_signal=ALARM_CHANGED,
        start_signal_args=[change],
        search_attributes=attributes,
        static_summary=f"Alarm {quoted(change.alarm_name[:SUMMARY_NAME_CHARS])}",
        static_details=(
            f"Alarm {quoted(change.alarm_name)} is in {change.state} since {utc(change.changed_at)}: "
            f"{quoted(change.reason)}"
        ),
        rpc_timeout=rpc_timeout,
    )


@dataclass
class Seen:
    """What Temporal has been told of one alarm."""

    state: AlarmState
    changed_at: datetime
    told_at: float = -1e9
    """On the monotonic clock."""


@dataclass
class Key:
    """What Temporal has been told of one incident key. Whoever reads or writes it holds `lock`."""

    name: str
    alarms: "OrderedDict[str, Seen]" = field(default_factory=OrderedDict)
    repeats: int = 0
    """Duplicates not yet counted in Temporal."""
    counted_at: float = -1e9
    """When the last count was sent, on the monotonic clock."""
    newer: dict[str, tuple[AlarmChange, IncidentTarget]] = field(default_factory=dict)
    """The newest ALARM of each alarm that came too soon after the last one: told when it may be."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_on(self) -> bool:
        """Whether an alarm of it is, as far as is known."""
        return any(alarm.state is AlarmState.ALARM for alarm in self.alarms.values())

    def remember(self, change: AlarmChange) -> None:
        """Temporal has `change`."""
        self.alarms[change.alarm_name] = Seen(change.state, change.changed_at, time.monotonic())
        self.newer.pop(change.alarm_name, None)
        self.alarms.move_to_end(change.alarm_name)
        if len(self.alarms) > MAX_ALARMS_PER_KEY:
            self.alarms.popitem(last=False)


class Incidents:
    """Starts and joins incidents, and keeps duplicates from them."""

    def __init__(self, temporal: Client, policy: Policy, task_queue: str) -> None:
        self._temporal = temporal
        self.policy = policy
        """May be replaced at any time."""
        self._task_queue = task_queue
        self._keys: OrderedDict[str, Key] = OrderedDict()
        self._outage = Outage("Temporal")
        self._workers = Outage("the incidents' worker")

    def _key(self, name: str) -> Key:
        """What is known of a key; the least recently used ones are forgotten."""
        known = self._keys.setdefault(name, Key(name))
        self._keys.move_to_end(name)
        if len(self._keys) > MAX_KEYS:
            oldest = next(iter(self._keys.values()))
            if not oldest.lock.locked() and not oldest.repeats and not oldest.newer:
                del self._keys[oldest.name]
        return known

    async def deliver(self, change: AlarmChange, target: IncidentTarget) -> str:
        """Make Temporal know `change`; returns what was done, in one word.

        Waits while Temporal is away. A change that Temporal has already, or that an older message tells late, is
        only counted. A newer one to the same state is told, as the state between was missed or is never notified;
        of one alarm at most once per `duplicate_count_interval`.

        Raises:
            RPCError: Temporal refuses this one; trying again would not help.
        """
        known = self._key(target.key)
        async with known.lock:
            seen = known.alarms.get(change.alarm_name)
            if change.state is AlarmState.ALARM and self._is_part(target):
                return "part-of-another"
            if seen and not self._is_news(change, seen, known.newer.get(change.alarm_name)):
                return await self._repeated(known, change, target, seen)
            if change.state is AlarmState.ALARM:
                await self._start_or_join(target, change)
                done = "signalled"
            else:
                done = "signalled" if await self._signal(target.key, ALARM_CHANGED, change) else "no-incident"
            known.remember(change)
            return done

    def _is_part(self, target: IncidentTarget) -> bool:
        """Whether what the alarm is about is another incident's for now. When that one's alarms end while this one's
        is on, it is found like one that was missed."""
        if target.part_of is None:
            return False
        others = (key for name, key in self._keys.items() if name != target.key and fnmatchcase(name, target.part_of))
        return any(key.is_on for key in others)

    def _is_news(self, change: AlarmChange, seen: Seen, untold: tuple[AlarmChange, IncidentTarget] | None) -> bool:
        if change.state is not seen.state:
            return change.changed_at >= (untold[0] if untold else seen).changed_at
        # When asked, CloudWatch dates a change more finely than when it notifies of it.
        return change.source != "reconcile" and change.changed_at > seen.changed_at and self._has_passed(seen.told_at)

    async def _repeated(self, known: Key, change: AlarmChange, target: IncidentTarget, seen: Seen) -> str:
        if change.state is not AlarmState.ALARM or change.source == "reconcile":
            return "known"
        untold = known.newer.get(change.alarm_name)
        is_newest = change.changed_at > (untold[0] if untold else seen).changed_at
        if is_newest:
            known.newer[change.alarm_name] = change, target
        if untold or not is_newest:
            known.repeats += 1
        if self._has_passed(known.counted_at):
            await self._send_count(known)
        return "counted"

    async def _send_count(self, known: Key, *, all_of_it: bool = False) -> None:
        known.counted_at = time.monotonic()
        for change, target in list(known.newer.values()):
            seen = known.alarms.get(change.alarm_name)
            if all_of_it or seen is None or self._has_passed(seen.told_at):
                await self._start_or_join(target, change)
                known.remember(change)
        if known.repeats:
            await self._signal(known.name, ALARM_REPEATED, AlarmRepeats(count=known.repeats))
            known.repeats = 0

    async def send_counts(self, *, all_of_them: bool = False) -> None:
        """Send what repetitions have gathered, for every key whose interval has passed or for all."""
        for known in [known for known in self._keys.values() if known.repeats or known.newer]:
            async with known.lock:
                if (known.repeats or known.newer) and (all_of_them or self._has_passed(known.counted_at)):
                    await self._send_count(known, all_of_it=all_of_them)

    def _has_passed(self, since: float) -> bool:
        """Whether the interval of duplicates has passed `since` then, on the monotonic clock."""
        return time.monotonic() - since >= self.policy.intake.duplicate_count_interval.total_seconds()

    async def is_missed(self, change: AlarmChange, target: IncidentTarget) -> bool:
        """Whether an alarm that CloudWatch says is on, is one that its incident has not heard of."""
        if self._is_part(target):
            return False
        known = self._key(target.key)
        seen = known.alarms.get(change.alarm_name)
        if seen and seen.state is not AlarmState.ALARM and change.changed_at <= seen.changed_at:
            return False  # it went off after CloudWatch was asked
        last = await self._last_run(target.key)
        if last is None:
            return True
        if last.status is not WorkflowExecutionStatus.RUNNING:
            # Closed while the alarm is on, after a snooze for one: it opens again. Not so a triage incident: people
            # were paged and closed it, and only a new change pages them again.
            was_paged = target.runbook is None and last.close_time and last.close_time >= change.changed_at
            return not was_paged
        await self._recall(known)
        if not known.alarms or known.is_on:
            return False
        return change.changed_at > max(alarm.changed_at for alarm in known.alarms.values())

    async def start(self, change: AlarmChange, target: IncidentTarget) -> None:
        """Start or join at once, whatever is remembered."""
        known = self._key(target.key)
        async with known.lock:
            await self._start_or_join(target, change)
            known.remember(change)

    async def open_keys(self) -> list[str]:
        """The keys that have an open incident, as far as visibility knows yet."""
        query = f'WorkflowType = "{INCIDENT_WORKFLOW}" AND ExecutionStatus = "Running"'
        found = [run.typed_search_attributes.get(INCIDENT_KEY) async for run in self._temporal.list_workflows(query)]
        return [key for key in found if key]

    def believed_on(self) -> list[str]:
        """The keys of which an alarm is remembered as on, with an open incident or without."""
        return [name for name, known in self._keys.items() if known.is_on]

    async def alarms_on(self, key: str) -> list[str]:
        """Names of the alarms that are believed to be on."""
        known = self._key(key)
        await self._recall(known)
        return [name for name, alarm in known.alarms.items() if alarm.state is AlarmState.ALARM]

    async def _recall(self, known: Key) -> None:
        """After a restart: ask the open incident what it knows. No answer: nothing is known."""
        if known.alarms:
            return
        try:
            record = await self._handle(known.name).query(RECORD, result_type=IncidentRecord, rpc_timeout=RPC_TIMEOUT)
        except (RPCError, WorkflowQueryFailedError) as error:
            self._workers.failed(error)
            return
        self._workers.worked()
        state = AlarmState.ALARM if record.alarm_on else AlarmState.OK
        async with known.lock:
            known.alarms.setdefault(record.alarm.alarm_name, Seen(state, record.alarm.changed_at))

    async def _last_run(self, key: str) -> WorkflowExecutionDescription | None:
        try:
            return await self._call(self._handle(key).describe)
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise

    async def warm_up(self) -> None:
        """Go the way of an alarm to an incident that does not exist; waits until Temporal is there."""
        await self._signal("warm-up", ALARM_REPEATED, AlarmRepeats(count=1))

    async def _start_or_join(self, target: IncidentTarget, change: AlarmChange) -> None:
        await self._call(start_or_join, self._temporal, target, change, self._task_queue)

    async def _signal(self, key: str, name: str, message: AlarmChange | AlarmRepeats) -> bool:
        """Signal the open incident of that key; False if there is none."""
        try:
            await self._call(self._handle(key).signal, name, message)
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return False
            raise
        return True

    def _handle(self, key: str) -> WorkflowHandle[object, object]:
        return self._temporal.get_workflow_handle(incident_id(key))

    async def _call(self, call: Callable[..., Awaitable[R]], *args: object, **kwargs: object) -> R:
        return await insist(partial(call, *args, rpc_timeout=RPC_TIMEOUT, **kwargs), self._outage, _temporal_is_away)
