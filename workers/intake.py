"""The alarm intake: `python -m workers.intake` turns alarm messages in SQS into incidents in Temporal.

A message is deleted only after Temporal has what it says. Every alarm's last delivered state is remembered, so that
a change is signalled at once and a storm of duplicates becomes a count. What cannot be parsed goes to the dead-letter
queue with its reason. Once a minute CloudWatch is asked which alarms are on, because it notifies of transitions only.

While Temporal or AWS is away the messages in hand wait, no further ones are taken, and nothing is lost.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import stamina.instrumentation
import structlog
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import ValidationError
from temporalio.service import RPCError

from activities.settings import ConfigurationError, load_policy
from domain.alarm_messages import Ignored, NotAnAlarm, described_alarm, parse_alarm
from domain.alarm_rules import IncidentTarget, target_of
from domain.alarms import AlarmChange, AlarmState
from domain.people import AwsRole
from domain.policy import Policy
from workers.clients import AwsClients
from workers.incidents import Incidents
from workers.lifecycle import configure_logs, keep_loaded, leave, run_until_signalled, say_ready
from workers.outages import Outage, insist
from workers.permissions import say_missing
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
GRACE = timedelta(seconds=8)
"""After SIGTERM, how long what is in hand may take."""
MAX_REASON_CHARS = 256
MAX_DEAD_LETTER_BYTES = 240 * 1024
"""Any queue takes 256 KiB, attributes included."""
MAX_THREADS = 16
MODELS_MAX_AGE = timedelta(seconds=10)
"""How often the provisioned models may be listed when alarms name an unknown one."""

_AWS_ERRORS = (BotoCoreError, ClientError)


def _is_aws_error(error: Exception) -> bool:
    return isinstance(error, _AWS_ERRORS)


class Intake:
    """Takes messages from the queue and asks CloudWatch what was missed."""

    def __init__(self, settings: Settings, policy: Policy, incidents: Incidents, aws: AwsClients) -> None:
        self._settings = settings
        self._policy = policy
        self._incidents = incidents
        self._clients = aws
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
                keep_loaded()
                ready()
                log.info("ready", queue=self._settings.alarm_queue_url)
                await self._aws(say_missing, AwsRole.INTAKE, self._settings, self._policy, self._clients)
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
            await self._reload_policy()
            await asyncio.sleep(self._policy.intake.reconcile_interval.total_seconds())

    async def _reload_policy(self) -> None:
        """Take the policy as its file is now; while that is broken, what was read before stays."""
        path = self._settings.policy_file
        if path is None:
            return
        try:
            policy = await self._aws(load_policy, path, self._settings.clock)
        except ConfigurationError as error:
            log.error("the policy cannot be read; the one before stays", error=str(error)[:500])
            return
        if policy != self._policy:
            self._policy = self._incidents.policy = policy
            log.info("the policy has changed")

    async def _reconcile(self) -> None:
        """Start what is on without an incident; tell open incidents whose alarms are no longer on."""
        on: set[str] = set()
        found = [(change, await self._target(change), tells) for change, tells in await self._aws(self._describe)]
        # What may be a part of another incident comes last: after a restart that one must be known first.
        found.sort(key=lambda one: isinstance(one[1], IncidentTarget) and one[1].part_of is not None)
        for change, target, tells in found:
            if isinstance(target, Ignored):
                continue
            on.add(target.key)
            if change.suppressed or not (target.runbook or tells):
                continue
            if await self._incidents.is_missed(change, target) and not await self._is_muted(change.alarm_name):
                log.warning("missed", alarm=change.alarm_name, key=target.key, since=change.changed_at.isoformat())
                await self._incidents.start(change, target)
        quiet = [key for key in {*await self._incidents.open_keys(), *self._incidents.believed_on()} if key not in on]
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
    """The process, until it is cancelled."""
    temporal = await insist(
        partial(connect, settings), Outage("Temporal"), lambda error: isinstance(error, (RuntimeError, RPCError))
    )
    incidents = Incidents(temporal, policy, settings.task_queue)
    await Intake(settings, policy, incidents, AwsClients(settings)).serve(ready)


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
    configure_logs()
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
    asyncio.run(run_until_signalled(run(settings, policy, say_ready)))
    return 0


if __name__ == "__main__":
    leave(main())
