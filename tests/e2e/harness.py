"""The whole stack on real servers at a high rehearsal factor, and what tests do to it and look at."""

import asyncio
import json
import os
import shutil
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boto3
import redis
from temporalio.client import Client, WorkflowHandle

from activities.cloudwatch import CloudWatchActivities
from activities.settings import load_policy
from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from domain.alarms import AlarmChange
from domain.incident import IncidentRecord, LeverName, LeverStatus, Phase
from domain.knobs import AuditEntry, KnobName, KnobValue, baseline_value, effective_value
from domain.load import LoadSnapshot, total_offered
from domain.messages import INCIDENT_WORKFLOW, incident_id, load_query
from domain.people import Role
from domain.policy import Policy
from ops.service import OpsError, OpsService
from ops.stack import TOKYO, Stack, StackOptions
from simulator.aws.trail import RESIDENT_KEY
from workers.settings import Settings
from workers.temporal import connect as connect_temporal

SPEED = 300
MONDAY = datetime(2026, 11, 30, 9, tzinfo=TOKYO)
"""Business time at which a stack starts: a quiet morning."""
KEY = "bedrock-throttle:sonnet"
INCIDENT = incident_id(KEY)
POLICY_FILE = Path(__file__).with_name("policy.yaml")
USUAL, CURABLE, WORSE = 5_000, 35_000, 50_000
"""Tokens/s that reach Bedrock at the configured hit rate, at any hour. The free levers cure the second; the third
needs more units of Sonnet, too."""
PASSED = 15_000
"""Offered tokens/s, before the cache, at which every lever may be released."""


@dataclass
class Rehearsal:
    """A running stack and everybody around it: the traffic, AWS, the on-call people and the data plane's Redis."""

    stack: Stack
    settings: Settings
    policy: Policy
    policy_file: Path
    """Read anew whenever a workflow takes its snapshot."""
    temporal: Client
    ops: OpsService
    redis: redis.Redis
    ledger: Ledger
    clients: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------ the world

    def aws(self, service: str) -> Any:
        """A client that suffers no faults."""
        if service not in self.clients:
            session = boto3.session.Session(RESIDENT_KEY, "simulator", region_name=self.settings.aws_region)
            self.clients[service] = session.client(service, endpoint_url=self.settings.aws_endpoint_url)  # type: ignore[call-overload]
        return self.clients[service]

    def control(self, method: str, path: str, body: object = None) -> Any:
        """One of the simulator's control paths."""
        data = None if body is None else json.dumps(body).encode()
        url = f"{self.settings.aws_endpoint_url}/_simulator/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, data, method=method), timeout=5) as answer:
            return json.load(answer)

    def load(self) -> LoadSnapshot:
        """As CloudWatch has it now."""
        names = {"ecs_cluster": self.settings.ecs_cluster, "ecs_service": self.settings.ecs_service}
        return CloudWatchActivities(self.aws("cloudwatch"), **names).read_load(load_query(self.policy, "sonnet"))

    def spike(self, tokens_per_second: float) -> None:
        """From now on users ask for so much until `calm`."""
        self.control("DELETE", "traffic")
        self.control("POST", "traffic", {"multiplier": tokens_per_second / USUAL, "minutes": 1440})

    def calm(self) -> None:
        """Every spike fades."""
        self.control("DELETE", "traffic")

    async def traffic_has_passed(self) -> None:
        """Calm, and waits until the load is so low that every lever may go."""
        self.calm()
        await self.soon("the traffic has passed", lambda: total_offered(self.load()) < PASSED)

    def fault(self, service: str, operation: str | None, kind: str, count: int | None = None, **more: Any) -> None:
        """AWS fails, `count` times or until `no_faults`."""
        body = {"service": service, "operation": operation, "kind": kind, "count": count, **more}
        self.control("POST", "faults", body)

    def no_faults(self) -> None:
        """AWS is well again."""
        self.control("DELETE", "faults")

    # ------------------------------------------------------------ what is in force

    def knobs(self) -> dict[KnobName, KnobValue]:
        """The knobs whose value in force is not the baseline."""
        leases, baseline = self.ledger.leases().leases, self.policy.baseline
        values = {knob: effective_value(knob, leases, baseline) for knob in KnobName}
        return {knob: value for knob, value in values.items() if value != baseline_value(knob, baseline)}

    def audit(self, since: datetime) -> list[AuditEntry]:
        """What happened to leases."""
        self.ledger.sweep()
        return self.ledger.history(since)

    def units(self, model: str = "sonnet") -> dict[str, int]:
        """Provisioned units of a model by Bedrock's status."""
        spec = self.policy.models[model]
        found: dict[str, int] = {}
        for item in self.aws("bedrock").list_provisioned_model_throughputs()["provisionedModelSummaries"]:
            if item["modelArn"].endswith(f"/{spec.provisioned_model_id}"):
                found[item["status"]] = found.get(item["status"], 0) + item["modelUnits"]
        return found

    def bought(self, since: datetime) -> dict[str, int]:
        """Units that AWS was asked for and granted, by name: a repetition of an order counts once."""
        return {
            event["request_parameters"]["provisionedModelName"]: event["request_parameters"]["modelUnits"]
            for event in self.control("GET", "trail")
            if event["event_name"] == "CreateProvisionedModelThroughput"
            and event["error_code"] is None
            and datetime.fromisoformat(event["event_time"]) >= since
        }

    def waiting(self, queue_url: str | None) -> int:
        """Messages in a queue, in hand or not."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self.aws("sqs").get_queue_attributes(QueueUrl=queue_url, AttributeNames=names)["Attributes"]
        return sum(int(found[name]) for name in names)

    def send(self, *bodies: str) -> None:
        """Into the alarm queue."""
        sqs = self.aws("sqs")
        for start in range(0, len(bodies), 10):
            entries = [{"Id": str(i), "MessageBody": body} for i, body in enumerate(bodies[start : start + 10])]
            answer = sqs.send_message_batch(QueueUrl=self.settings.alarm_queue_url, Entries=entries)
            assert not answer.get("Failed"), answer

    def dead_letters(self) -> list[str]:
        """Why messages are in the dead-letter queue, which is empty then."""
        sqs, queue = self.aws("sqs"), self.settings.dead_letter_queue_url
        reasons: list[str] = []
        while found := sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10, MessageAttributeNames=["All"]).get(
            "Messages"
        ):
            for message in found:
                reasons.append(message["MessageAttributes"]["reason"]["StringValue"])
                sqs.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
        return reasons

    # ------------------------------------------------------------ the incident

    def handle(self, run_id: str | None = None) -> WorkflowHandle[Any, Any]:
        """The incident's workflow."""
        return self.temporal.get_workflow_handle(INCIDENT, run_id=run_id)

    async def history_length(self) -> int:
        """Events of the newest run."""
        return (await self.handle().describe()).history_length

    async def runs(self) -> list[str]:
        """Run ids of all incidents there ever were, the newest first."""
        found = [run async for run in self.temporal.list_workflows(f"WorkflowType = '{INCIDENT_WORKFLOW}'")]
        return [run.run_id for run in sorted(found, key=lambda run: run.start_time, reverse=True)]

    def token(self, role: Role) -> str:
        """Of the person with that role."""
        return self.stack.tokens[role].read_text()

    async def until(
        self,
        what: str,
        holds: Callable[[IncidentRecord], bool],
        seconds: float = 60,
        run_id: str | None = None,
        incident: str = INCIDENT,
    ) -> IncidentRecord:
        """The record of the open incident, or of a run, once it is so. Nobody answering is waited out, too."""
        give_up_at = time.monotonic() + seconds
        record: IncidentRecord | None = None
        problem = ""
        while True:
            try:
                found = await self.ops.get(incident, run_id)
                record = found.record
                if (run_id or found.ended is None) and holds(record):
                    return record
            except OpsError as error:
                problem = str(error)
            if time.monotonic() > give_up_at:
                raise AssertionError(f"not within {seconds:g} s: {what}\n{problem}\n{self._story(record)}")
            await asyncio.sleep(0.1)

    async def soon(self, what: str, holds: Callable[[], object], seconds: float = 40) -> None:
        """Waits until something outside the incident is so; what fails meanwhile counts as not so."""
        give_up_at = time.monotonic() + seconds
        while True:
            try:
                seen = await asyncio.to_thread(holds)
            except Exception as error:
                seen, problem = False, repr(error)
            else:
                problem = repr(seen)
            if seen:
                return
            if time.monotonic() > give_up_at:
                record = (await self.ops.get(INCIDENT)).record
                raise AssertionError(f"not within {seconds:g} s: {what} ({problem})\n{self._story(record)}")
            await asyncio.sleep(0.1)

    def _story(self, record: IncidentRecord | None) -> str:
        lines = ["no incident answered"]
        if record is not None:
            lines = [f"{entry.at:%M:%S.%f} {entry.kind:9} {entry.text} {entry.who or ''}" for entry in record.timeline]
            lines += [f"phase {record.phase}, waits for {record.waiting_for}; run {record.run_id}"]
            lines += [f"{lever.name}: {lever.status} {lever.detail}" for lever in record.levers]
            lines += [f"{check.name}: {check.value}, met: {check.met}" for check in record.recovery_checks]
        load = self.load()
        lines += [f"now {datetime.now(UTC):%M:%S}; knobs {self.knobs()}; units {self.units()}"]
        lines += [f"offered {total_offered(load):,.0f}; {load.models}; logs in {self.stack.log_dir}"]
        return "\n".join(lines)

    async def mitigated(self, seconds: float = 60, run_id: str | None = None) -> IncidentRecord:
        """Every lever acted."""
        return await self.until("mitigated", lambda record: record.mitigated_at is not None, seconds, run_id)

    async def awaits_decision(self, seconds: float = 60) -> IncidentRecord:
        """Recovered, and people decide."""
        return await self.until(
            "recovered, and waits for a decision", lambda record: record.phase is Phase.AWAITING_DECISION, seconds
        )

    async def approve(self) -> None:
        """The approver lets the traffic pass, and approves."""
        await self.traffic_has_passed()
        result = await self.ops.approve(INCIDENT, self.token(Role.APPROVER), "the traffic has passed")
        assert result.outcome == "accepted", result

    async def closed(self, run_id: str, seconds: float = 60) -> IncidentRecord:
        """That run's record once it is over."""
        record = await self.until("closed", lambda record: record.phase is Phase.CLOSED, seconds, run_id)
        await self.handle(run_id).result()
        return record

    async def is_as_before(self, record: IncidentRecord) -> None:
        """A closed incident left nothing behind: invariant 2."""
        assert record.knobs_at_baseline, self._story(record)
        assert record.capacity_at_baseline, self._story(record)
        assert record.still_held == []
        assert record.report_path is not None
        assert read_text(record.report_path)
        assert {lever.status for lever in record.levers} <= {
            LeverStatus.RELEASED,
            LeverStatus.NOT_NEEDED,
            LeverStatus.FAILED,
        }
        assert self.knobs() == {}
        assert self.ledger.leases().leases == ()
        assert self.units() == {"InService": self.policy.models["sonnet"].baseline_units}

    async def clear(self) -> None:
        """Whatever a failed test left broken or open is mended and ended, so that the next one starts from baseline."""
        shutil.copy(POLICY_FILE, self.policy_file)
        for name in ("redis", "temporal", "worker", "intake"):
            if name not in self.stack.pids:
                await self.stack.restart(name)
        self.no_faults()
        self.calm()
        if any(row.incident_id == INCIDENT and row.ended is None for row in await self.ops.list_incidents()):
            with suppress(OpsError, TimeoutError):
                await self.ops.abort(INCIDENT, self.token(Role.APPROVER), "the test is over")
                await asyncio.wait_for(self.handle().result(), 60)


def read_text(path: str) -> str:
    """A report's file."""
    return Path(path).read_text()


def in_force(record: IncidentRecord) -> set[LeverName]:
    """The levers in force."""
    return {lever.name for lever in record.levers if lever.status is LeverStatus.IN_FORCE}


def shapes(alarm: AlarmChange, at: datetime, state: str = "ALARM") -> list[str]:
    """That alarm in that state since `at`: in an SNS envelope, raw, and as an EventBridge event."""
    [metric] = alarm.metrics
    since = at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}+0000"
    dimensions = [{"name": name, "value": value} for name, value in metric.dimensions.items()]
    raw = {
        "AlarmName": alarm.alarm_name,
        "NewStateValue": state,
        "NewStateReason": "Threshold Crossed",
        "StateChangeTime": since,
        "Trigger": {"MetricName": metric.name, "Namespace": metric.namespace, "Dimensions": dimensions},
    }
    stat = {"metric": {"name": metric.name, "namespace": metric.namespace, "dimensions": metric.dimensions}}
    event = {
        "id": str(uuid.uuid4()),
        "detail-type": "CloudWatch Alarm State Change",
        "source": "aws.cloudwatch",
        "detail": {
            "alarmName": alarm.alarm_name,
            "configuration": {"metrics": [{"id": "m1", "metricStat": stat, "returnData": True}]},
            "state": {"value": state, "timestamp": since},
        },
    }
    envelope = {"Type": "Notification", "MessageId": str(uuid.uuid4()), "Message": json.dumps(raw)}
    return [json.dumps(message) for message in (envelope, raw, event)]


@asynccontextmanager
async def rehearsal(state_dir: Path) -> AsyncIterator[Rehearsal]:
    """A stack of its own, ready, in a calm world."""
    policy_file = state_dir / "policy.yaml"
    shutil.copy(POLICY_FILE, policy_file)
    options = StackOptions(
        state_dir=state_dir,
        usual_ports=False,
        speed=SPEED,
        business_start=MONDAY,
        env={
            "RUNBOOKS_POLICY_FILE": str(policy_file),
            "RUNBOOKS_SIMULATOR_SCENARIO": "calm",
            "RUNBOOKS_SIMULATOR_USUAL_LOAD": str(USUAL),
        },
    )
    async with Stack(options) as stack:
        with patch.dict(os.environ, stack.process_env(), clear=True):
            settings = Settings()
            ops = await OpsService.connect(settings)
            temporal = await connect_temporal(settings)
            with connect_redis(settings.redis_url) as client:
                policy = load_policy(policy_file, settings.clock)
                yield Rehearsal(stack, settings, policy, policy_file, temporal, ops, client, Ledger(client))
