"""The alarm intake: `python -m workers.intake` turns alarm messages in SQS into incidents in Temporal.

A message is deleted only after Temporal has what it says. Every alarm's last delivered state is remembered, so that
a change is signalled at once and a storm of duplicates becomes a count. What cannot be parsed goes to the dead-letter
queue with its reason. Once a minute CloudWatch is asked which alarms are on, because it notifies of transitions only.

While Temporal or AWS is away the messages in hand wait, no further ones are taken, and nothing is lost.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import stamina
import stamina.instrumentation
import structlog
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import ValidationError
from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowHandle,
    WorkflowQueryFailedError,
)
from temporalio.common import (
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
)
from temporalio.service import RPCError, RPCStatusCode

from activities.settings import ConfigurationError, load_policy
from domain.alarm_messages import Ignored, NotAnAlarm, described_alarm, parse_alarm
from domain.alarm_rules import IncidentTarget, target_of
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
from workers.clients import AwsClients
from workers.settings import Settings
from workers.temporal import connect

if TYPE_CHECKING:
    from types_boto3_bedrock.client import BedrockClient
    from types_boto3_cloudwatch.client import CloudWatchClient
    from types_boto3_sqs.client import SQSClient
    from types_boto3_sqs.type_defs import DeleteMessageBatchRequestEntryTypeDef, MessageTypeDef

P = ParamSpec("P")
R = TypeVar("R")

log = structlog.get_logger("intake")

POLLERS = 2
"""One waits for messages while the other handles its own."""
MAX_BATCH = 10
"""SQS's limit of messages in one call."""
MAX_KEYS = 10_000
MAX_ALARMS_PER_KEY = 100
RPC_TIMEOUT = timedelta(seconds=5)
MAX_BACKOFF = timedelta(seconds=2)
GRACE = timedelta(seconds=8)
"""After SIGTERM, how long what is in hand may take."""
MAX_REASON_CHARS = 256
MAX_DEAD_LETTER_BYTES = 240 * 1024
"""Any queue takes 256 KiB, attributes included."""
SUMMARY_NAME_CHARS = 60
"""Temporal takes 400 bytes of summary as JSON, in which a character may need six."""
MAX_THREADS = 16
MODELS_MAX_AGE = timedelta(seconds=10)
"""How often the provisioned models may be listed when alarms name an unknown one."""

_KEY = SearchAttributeKey.for_keyword("IncidentKey")
_AWS_ERRORS = (BotoCoreError, ClientError)
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


class Outage:
    """One neighbour's being away: logged when it begins and when it ends, not at each try."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._since: float | None = None

    def failed(self, error: Exception) -> None:
        """A try failed."""
        if self._since is None:
            self._since = time.monotonic()
            log.error("away", what=self._name, error=str(error)[:500], will="wait and try again; nothing is lost")

    def worked(self) -> None:
        """A try succeeded."""
        if self._since is not None:
            log.info("back", what=self._name, after_seconds=round(time.monotonic() - self._since, 1))
            self._since = None


async def insist(call: Callable[[], Awaitable[R]], outage: Outage, is_away: Callable[[Exception], bool]) -> R:
    """The answer of `call`, which is tried without end, with backoff, while its errors say that a neighbour is away."""
    async for attempt in stamina.retry_context(
        on=is_away, attempts=None, timeout=None, wait_initial=0.1, wait_max=MAX_BACKOFF, wait_jitter=0.1
    ):
        with attempt:
            try:
                answer = await call()
            except Exception as error:
                if is_away(error):
                    outage.failed(error)
                else:
                    outage.worked()
                raise
            outage.worked()
            return answer
    raise AssertionError("the attempts never end")


def _temporal_is_away(error: Exception) -> bool:
    return isinstance(error, RPCError) and error.status in _AWAY


def _is_aws_error(error: Exception) -> bool:
    return isinstance(error, _AWS_ERRORS)


@dataclass
class Seen:
    """What Temporal has been told of one alarm."""

    state: AlarmState
    changed_at: datetime


@dataclass
class Key:
    """What Temporal has been told of one incident key. Whoever reads or writes it holds `lock`."""

    name: str
    alarms: "OrderedDict[str, Seen]" = field(default_factory=OrderedDict)
    repeats: int = 0
    """Duplicates not yet counted in Temporal."""
    counted_at: float = -1e9
    """When the last count was sent, on the monotonic clock."""
    reopens: tuple[AlarmChange, IncidentTarget] | None = None
    """A repeat that is newer than what was delivered: should the incident be closed, this opens the next."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def remember(self, change: AlarmChange) -> None:
        """Temporal has `change`."""
        self.alarms[change.alarm_name] = Seen(change.state, change.changed_at)
        self.alarms.move_to_end(change.alarm_name)
        if len(self.alarms) > MAX_ALARMS_PER_KEY:
            self.alarms.popitem(last=False)


class Incidents:
    """Starts and joins incidents, and keeps duplicates from them."""

    def __init__(self, temporal: Client, policy: Policy, task_queue: str) -> None:
        self._temporal = temporal
        self._policy = policy
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
            if not oldest.lock.locked() and not oldest.repeats:
                del self._keys[oldest.name]
        return known

    async def deliver(self, change: AlarmChange, target: IncidentTarget) -> str:
        """Make Temporal know `change`; returns what was done, in one word.

        Waits while Temporal is away. A change that Temporal has already, or that an older message tells late, is
        only counted.

        Raises:
            RPCError: Temporal refuses this one; trying again would not help.
        """
        known = self._key(target.key)
        async with known.lock:
            seen = known.alarms.get(change.alarm_name)
            if seen and (change.state is seen.state or change.changed_at < seen.changed_at):
                return await self._repeated(known, change, target, seen)
            if change.state is AlarmState.ALARM:
                await self._start_or_join(target, change)
                done = "signalled"
            else:
                done = "signalled" if await self._signal(target.key, ALARM_CHANGED, change) else "no-incident"
            known.remember(change)
            return done

    async def _repeated(self, known: Key, change: AlarmChange, target: IncidentTarget, seen: Seen) -> str:
        if change.state is not AlarmState.ALARM or change.source == "reconcile":
            return "known"
        known.repeats += 1
        if change.state is seen.state and change.changed_at > seen.changed_at:
            known.reopens = (change, target)
        if self._may_count(known):
            await self._send_count(known)
        return "counted"

    async def _send_count(self, known: Key) -> None:
        known.counted_at = time.monotonic()
        count, reopens = known.repeats, known.reopens
        if not await self._signal(known.name, ALARM_REPEATED, AlarmRepeats(count=count)) and reopens:
            change, target = reopens
            await self._start_or_join(target, change)
            known.remember(change)
        known.repeats, known.reopens = 0, None

    async def send_counts(self, *, all_of_them: bool = False) -> None:
        """Send what duplicates have gathered, for every key whose interval has passed or for all."""
        for known in [known for known in self._keys.values() if known.repeats]:
            async with known.lock:
                if known.repeats and (all_of_them or self._may_count(known)):
                    await self._send_count(known)

    def _may_count(self, known: Key) -> bool:
        interval = self._policy.intake.duplicate_count_interval.total_seconds()
        return time.monotonic() - known.counted_at >= interval

    async def is_missed(self, change: AlarmChange, target: IncidentTarget) -> bool:
        """Whether an alarm that CloudWatch says is on, is one that its incident has not heard of."""
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
        if not known.alarms or any(alarm.state is AlarmState.ALARM for alarm in known.alarms.values()):
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
        found = [run.typed_search_attributes.get(_KEY) async for run in self._temporal.list_workflows(query)]
        return [key for key in found if key]

    async def alarms_on(self, key: str) -> list[str]:
        """Names of the alarms that the open incident believes to be on."""
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
        """Signal-with-start: one open workflow per key, whoever else tries at the same time."""
        fields = IncidentRecord.model_fields
        attributes = TypedSearchAttributes(
            [
                SearchAttributePair(_KEY, target.key),
                SearchAttributePair(SearchAttributeKey.for_keyword("IncidentPhase"), str(Phase.TRIAGE)),
                SearchAttributePair(SearchAttributeKey.for_keyword("Severity"), fields["severity"].default),
                SearchAttributePair(SearchAttributeKey.for_keyword("Service"), fields["service"].default),
                SearchAttributePair(SearchAttributeKey.for_bool("HoldsLeases"), False),
            ]
        )
        await self._call(
            self._temporal.start_workflow,
            INCIDENT_WORKFLOW,
            IncidentInput(key=target.key, runbook=target.runbook, model=target.model, alarm=change),
            id=incident_id(target.key),
            task_queue=self._task_queue,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            start_signal=ALARM_CHANGED,
            start_signal_args=[change],
            search_attributes=attributes,
            static_summary=f"Alarm {quoted(change.alarm_name[:SUMMARY_NAME_CHARS])}",
            static_details=(
                f"Alarm {quoted(change.alarm_name)} is in {change.state} since {utc(change.changed_at)}: "
                f"{quoted(change.reason)}"
            ),
        )

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


class Intake:
    """Takes messages from the queue and asks CloudWatch what was missed."""

    def __init__(self, settings: Settings, policy: Policy, incidents: Incidents, aws: AwsClients) -> None:
        self._settings = settings
        self._policy = policy
        self._incidents = incidents
        self._sqs: SQSClient = aws.sqs()
        self._cloudwatch: CloudWatchClient = aws.cloudwatch()
        self._bedrock: BedrockClient = aws.bedrock()
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="aws")
        self._in_hand: set[asyncio.Task[None]] = set()
        self._queue = Outage("the alarm queue")
        self._dead_letters = Outage("the dead-letter queue")
        self._alarms = Outage("CloudWatch")
        self._models: dict[str, str] = {}
        self._models_at = -1e9
        self._dead_lettered = 0

    async def serve(self, ready: Callable[[], None]) -> None:
        """Until cancelled; then what is in hand is finished. Says it is `ready` once connections are warm."""
        try:
            await self._incidents.warm_up()
            await self._handle_batch(await self._receive(timedelta(0)))
            async with asyncio.TaskGroup() as tasks:
                for _ in range(POLLERS):
                    tasks.create_task(self._poll())
                tasks.create_task(self._reconcile_forever())
                tasks.create_task(self._count_forever())
                ready()
                log.info("ready", queue=self._settings.alarm_queue_url)
        finally:
            await self._finish()

    async def _finish(self) -> None:
        try:
            async with asyncio.timeout(GRACE.total_seconds()):
                await asyncio.gather(*self._in_hand, return_exceptions=True)
                await self._incidents.send_counts(all_of_them=True)
        except TimeoutError:
            log.warning("stopped with messages in hand; the queue gives them to the next one")
        self._threads.shutdown(wait=False, cancel_futures=True)
        log.info("stopped")

    async def _aws(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *args, **kwargs))

    # ------------------------------------------------------------ messages

    async def _poll(self) -> None:
        while True:
            batch = asyncio.create_task(self._handle_batch(await self._receive(self._policy.intake.long_poll)))
            self._in_hand.add(batch)
            batch.add_done_callback(self._in_hand.discard)
            await asyncio.shield(batch)

    async def _receive(self, wait: timedelta) -> "list[MessageTypeDef]":
        receive = partial(
            self._aws,
            self._sqs.receive_message,
            QueueUrl=self._settings.alarm_queue_url or "",
            MaxNumberOfMessages=MAX_BATCH,
            WaitTimeSeconds=int(wait.total_seconds()),
        )
        answer = await insist(receive, self._queue, _is_aws_error)
        return answer.get("Messages", [])

    async def _handle_batch(self, messages: "list[MessageTypeDef]") -> None:
        if not messages:
            return
        done = await asyncio.gather(*(self._handle(message) for message in messages))
        entries: list[DeleteMessageBatchRequestEntryTypeDef] = [
            {"Id": str(index), "ReceiptHandle": message["ReceiptHandle"]}
            for index, (message, is_done) in enumerate(zip(messages, done, strict=True))
            if is_done
        ]
        if not entries:
            return
        try:
            answer = await self._aws(
                self._sqs.delete_message_batch, QueueUrl=self._settings.alarm_queue_url or "", Entries=entries
            )
        except _AWS_ERRORS as error:  # they come again and are duplicates then
            self._queue.failed(error)
            return
        for failed in answer.get("Failed", []):
            log.warning("message not deleted; it will come again", why=failed.get("Message", failed["Code"]))

    async def _handle(self, message: "MessageTypeDef") -> bool:
        """Whether the message is done with and may be deleted; never raises."""
        try:
            return await self._take(message)
        except RPCError as error:
            log.error("Temporal refuses a message", id=message["MessageId"], error=str(error)[:500])
        except Exception:
            log.exception("message failed; it will come again", id=message["MessageId"])
        return False

    async def _take(self, message: "MessageTypeDef") -> bool:
        body = message["Body"]
        try:
            if len(body.encode()) > self._policy.intake.max_message_bytes:
                raise NotAnAlarm(f"longer than {self._policy.intake.max_message_bytes} bytes")
            change = parse_alarm(body)
        except NotAnAlarm as error:
            return await self._dead_letter(message, str(error))
        if isinstance(change, Ignored):
            log.info("ignored", id=message["MessageId"], why=change.reason)
            return True
        target = await self._target(change)
        if isinstance(target, Ignored):
            log.info("ignored", alarm=change.alarm_name, why=target.reason)
            return True
        if change.suppressed and change.state is AlarmState.ALARM:
            log.info("ignored", alarm=change.alarm_name, why="muted, or its actions are suppressed")
            return True
        done = await self._incidents.deliver(change, target)
        report = log.debug if done in ("counted", "known") else log.info
        report(done, alarm=change.alarm_name, state=change.state, key=target.key, source=change.source)
        return True

    async def _dead_letter(self, message: "MessageTypeDef", reason: str) -> bool:
        """Moves a message that is none, with why, to the dead-letter queue; False (it stays) while that is away."""
        body = message["Body"].encode()[:MAX_DEAD_LETTER_BYTES].decode(errors="ignore")
        why = "".join(c if c.isprintable() else "?" for c in reason)[:MAX_REASON_CHARS]
        try:
            await self._aws(
                self._sqs.send_message,
                QueueUrl=self._settings.dead_letter_queue_url or "",
                MessageBody=body,
                MessageAttributes={
                    "reason": {"DataType": "String", "StringValue": why},
                    "message_id": {"DataType": "String", "StringValue": message["MessageId"]},
                },
            )
        except _AWS_ERRORS as error:
            self._dead_letters.failed(error)
            return False
        self._dead_letters.worked()
        self._dead_lettered += 1
        log.warning("dead-lettered", id=message["MessageId"], why=why, total=self._dead_lettered)
        return True

    async def _target(self, change: AlarmChange) -> IncidentTarget | Ignored:
        values = {value for metric in change.metrics for value in metric.dimensions.values()}
        arns = {value for value in values if ":provisioned-model/" in value}
        if not arns <= self._models.keys() and time.monotonic() - self._models_at > MODELS_MAX_AGE.total_seconds():
            self._models_at = time.monotonic()
            try:
                self._models = await self._aws(self._list_models)
            except _AWS_ERRORS as error:
                log.warning("provisioned models are unknown", arns=sorted(arns), error=str(error)[:500])
        return target_of(change, self._policy, self._models)

    def _list_models(self) -> dict[str, str]:
        pages = self._bedrock.get_paginator("list_provisioned_model_throughputs").paginate()
        return {
            model["provisionedModelArn"]: model["modelArn"]
            for page in pages
            for model in page["provisionedModelSummaries"]
        }

    # ------------------------------------------------------------ what was missed

    async def _reconcile_forever(self) -> None:
        while True:
            try:
                await self._reconcile()
                self._alarms.worked()
            except (*_AWS_ERRORS, RPCError) as error:
                self._alarms.failed(error)
            except Exception:
                log.exception("reconcile failed")
            await asyncio.sleep(self._policy.intake.reconcile_interval.total_seconds())

    async def _reconcile(self) -> None:
        """Start what is on without an incident; tell open incidents whose alarms are no longer on."""
        on: set[str] = set()
        for change, tells in await self._aws(self._describe):
            target = await self._target(change)
            if isinstance(target, Ignored):
                continue
            on.add(target.key)
            if change.suppressed or not (target.runbook or tells):
                continue
            if await self._incidents.is_missed(change, target) and not await self._is_muted(change.alarm_name):
                log.warning("missed", alarm=change.alarm_name, key=target.key, since=change.changed_at.isoformat())
                await self._incidents.start(change, target)
        quiet = [key for key in await self._incidents.open_keys() if key not in on]
        believed = await asyncio.gather(*(self._incidents.alarms_on(key) for key in quiet))
        for key, names in zip(quiet, believed, strict=True):
            for change, _ in await self._aws(self._describe, names) if names else []:
                if change.state is not AlarmState.ALARM:
                    log.warning("missed", alarm=change.alarm_name, key=key, state=change.state)
                    await self._incidents.deliver(change, IncidentTarget(key=key, runbook=None, model=None))

    def _describe(self, names: Sequence[str] = ()) -> list[tuple[AlarmChange, bool]]:
        """The alarms of those names, or all that are on.

        With each: whether it tells an SNS topic (an alarm that only scales something is nobody's emergency).
        """
        paginator = self._cloudwatch.get_paginator("describe_alarms")
        pages = (
            paginator.paginate(AlarmTypes=["MetricAlarm", "CompositeAlarm"], AlarmNames=names)
            if names
            else paginator.paginate(AlarmTypes=["MetricAlarm", "CompositeAlarm"], StateValue="ALARM")
        )
        found: list[tuple[AlarmChange, bool]] = []
        for page in pages:
            for alarm in (*page.get("MetricAlarms", ()), *page.get("CompositeAlarms", ())):
                tells = any(":sns:" in action for action in alarm.get("AlarmActions", ()))
                found.append((described_alarm(alarm), tells))
        return found

    async def _is_muted(self, alarm_name: str) -> bool:
        """Whether a mute rule is active; one that cannot be read counts as none."""
        try:
            answer = await self._aws(self._cloudwatch.list_alarm_mute_rules, AlarmName=alarm_name, Statuses=["ACTIVE"])
        except _AWS_ERRORS as error:
            log.info("mute rules are unknown", alarm=alarm_name, error=str(error)[:200])
            return False
        return bool(answer.get("AlarmMuteRuleSummaries"))

    async def _count_forever(self) -> None:
        while True:
            await asyncio.sleep(self._policy.intake.duplicate_count_interval.total_seconds())
            try:
                await self._incidents.send_counts()
            except RPCError as error:
                log.warning("duplicates not counted", error=str(error)[:500])


async def run(settings: Settings, policy: Policy, ready: Callable[[], None]) -> None:
    """The process, until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    own_task = asyncio.current_task()
    assert own_task
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, own_task.cancel)
    with suppress(asyncio.CancelledError):
        temporal = await insist(
            partial(connect, settings), Outage("Temporal"), lambda error: isinstance(error, (RuntimeError, RPCError))
        )
        incidents = Incidents(temporal, policy, settings.task_queue)
        await Intake(settings, policy, incidents, AwsClients(settings)).serve(ready)


def _write_ready_file() -> None:
    path = os.environ.get("RUNBOOKS_READY_FILE")
    if path:
        Path(path).write_text("ready\n")


def main() -> int:
    """Entry point; the exit code: 0 stopped by a signal, 2 wrong settings."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.intake",
        description="Takes CloudWatch alarm messages from SQS and starts or joins their incidents in Temporal.",
        epilog="Settings are environment variables: RUNBOOKS_ALARM_QUEUE_URL and RUNBOOKS_DEAD_LETTER_QUEUE_URL are "
        "needed; RUNBOOKS_TEMPORAL_ADDRESS, RUNBOOKS_AWS_ENDPOINT_URL, RUNBOOKS_AWS_REGION, RUNBOOKS_POLICY_FILE "
        "and the others of workers/settings.py have defaults. RUNBOOKS_READY_FILE names a file that is written once "
        "messages are taken. SIGTERM finishes what is in hand.",
    )
    parser.parse_args()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    stamina.instrumentation.set_on_retry_hooks([])  # an outage is logged once, not at each try
    try:
        settings = Settings()
        policy = load_policy(settings.policy_file, settings.clock)
    except (ValidationError, ConfigurationError) as error:
        print(error, file=sys.stderr)
        return 2
    for name in ("alarm_queue_url", "dead_letter_queue_url"):
        if not getattr(settings, name):
            print(f"RUNBOOKS_{name.upper()} is not set; the URL of an SQS queue is needed", file=sys.stderr)
            return 2
    asyncio.run(run(settings, policy, _write_ready_file))
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    # The Temporal client may crash while the interpreter ends, and a long poll would hold it up.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
