"""`python -m simulator` as a process: AWS over HTTP, a real Redis-protocol server, MangaAssist between them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import boto3
import pytest

from dataplane import keys
from dataplane.connection import connect
from dataplane.ledger import Ledger
from dataplane.routes import Routes
from domain.alarm_messages import parse_alarm
from domain.alarms import AlarmChange, AlarmState
from domain.calendar import CalendarEvent
from domain.capacity import MANAGED_BY, MANAGED_BY_TAG
from domain.clock import RehearsalClock
from domain.evidence import Evidence, EvidenceKey, Reading, Value
from domain.knobs import Holder, KnobName, LeaseRequest
from domain.metrics import BATCHERS, CATALOGUE, OURS, MetricName
from domain.policy import Policy, Signal
from domain.runbooks.throttle import TREE
from domain.trees import diagnose
from simulator.aws.trail import RESIDENT_NAME
from simulator.stages import SYSTEMS
from simulator.traffic import TOKYO
from simulator.world import Row, World, WorldOptions, metric_period, release_event
from tests.servers import ValkeyServer, free_port

T = TypeVar("T")
POLICY = Policy()
SONNET = POLICY.models["sonnet"]
MIDNIGHT = datetime(2026, 11, 30, tzinfo=TOKYO)
SPEED = 60
INCIDENT = Holder(kind="incident", id="incident-bedrock-throttle:sonnet")


@dataclass
class Rehearsal:
    """A running simulator."""

    endpoint: str
    valkey: ValkeyServer
    process: subprocess.Popen[str]
    ready: dict[str, Any]

    def client(self, service: str) -> Any:
        session = boto3.session.Session("test", "test", region_name="ap-northeast-1")
        return session.client(service, endpoint_url=self.endpoint)  # type: ignore[call-overload]

    def control(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.endpoint}/_simulator/{path}", data=data, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def newest(self, name: MetricName, **dimensions: str) -> float | None:
        """The newest period's value, read as alarms and evidence read it."""
        metric, now = CATALOGUE[name], datetime.now(UTC)
        query = {
            "Id": "q",
            "MetricStat": {
                "Metric": {
                    "Namespace": metric.namespace,
                    "MetricName": name,
                    "Dimensions": [{"Name": key, "Value": value} for key, value in dimensions.items()],
                },
                "Period": 1,
                "Stat": metric.statistic,
            },
        }
        answer = self.client("cloudwatch").get_metric_data(
            MetricDataQueries=[query], StartTime=now - timedelta(seconds=3), EndTime=now, ScanBy="TimestampDescending"
        )
        values = answer["MetricDataResults"][0]["Values"]
        return float(values[0]) if values else None


def eventually(read: Callable[[], T], good: Callable[[T], bool], seconds: float = 40) -> T:
    deadline = time.monotonic() + seconds
    while not good(value := read()):
        assert time.monotonic() < deadline, f"still {value!r}"
        time.sleep(0.1)
    return value


def over(limit: float) -> Callable[[float | None], bool]:
    return lambda value: value is not None and value > limit


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    """It begins at 00:06:20 on the release night: the spike is on its way; no hour changes the rest."""
    folder = tmp_path_factory.mktemp("rehearsal")
    valkey = ValkeyServer(folder).start()
    env = {
        **os.environ,
        "RUNBOOKS_REDIS_URL": valkey.url,
        "RUNBOOKS_REHEARSAL_REAL_START": datetime.now(UTC).isoformat(),
        "RUNBOOKS_REHEARSAL_BUSINESS_START": (MIDNIGHT + timedelta(minutes=6, seconds=20)).isoformat(),
        "RUNBOOKS_REHEARSAL_SPEED": str(SPEED),
        "RUNBOOKS_SIMULATOR_PORT": str(free_port()),
        "RUNBOOKS_SIMULATOR_SPIKE_MINUTES": "600",
        "RUNBOOKS_SIMULATOR_USUAL_LOAD": "7000",
    }
    endpoint = f"http://127.0.0.1:{env['RUNBOOKS_SIMULATOR_PORT']}"
    with (folder / "simulator.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "simulator"], env=env, stdout=log, stderr=log, text=True)
    one = Rehearsal(endpoint, valkey, process, {})

    def ready() -> dict[str, Any]:
        assert process.poll() is None, (folder / "simulator.log").read_text()
        try:
            return dict(one.control("GET", "ready"))
        except OSError:
            return {}

    try:
        one.ready = eventually(ready, bool, seconds=30)
        yield one
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=40) == 0, (folder / "simulator.log").read_text()
        assert "Traceback" not in (folder / "simulator.log").read_text()
    finally:
        process.kill()
        process.wait()
        valkey.kill()


def alarm_changes(rehearsal: Rehearsal) -> Iterator[AlarmChange]:
    sqs, queue = rehearsal.client("sqs"), rehearsal.ready["alarm_queue_url"]
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        answer = sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=2, MaxNumberOfMessages=10)
        for message in answer.get("Messages", []):
            sqs.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
            change = parse_alarm(message["Body"])
            assert isinstance(change, AlarmChange)
            yield change
    raise AssertionError("no such alarm message")


def test_the_throttle_alarm_reaches_the_queue(rehearsal: Rehearsal) -> None:
    changes, wanted = alarm_changes(rehearsal), ("BedrockThrottleAlarm-sonnet", AlarmState.ALARM)
    change = next(change for change in changes if (change.alarm_name, change.state) == wanted)
    assert change.source == "sns"
    (metric,) = change.metrics
    assert metric.dimensions == {"ModelId": SONNET.model_id}
    eventually(lambda: rehearsal.newest(MetricName.INVOCATION_THROTTLES, ModelId=SONNET.model_id), over(0))


def test_the_world_is_as_scenario_1_finds_it(rehearsal: Rehearsal) -> None:
    (row,) = rehearsal.client("dynamodb").scan(TableName="mangaassist-events")["Items"]
    event = CalendarEvent.from_item(row)
    assert event == release_event(Row.UNDERSIZED, MIDNIGHT, POLICY)
    assert (event.multiplier, event.units["sonnet"], event.starts_at) == (3, 15, MIDNIGHT)
    bedrock = rehearsal.client("bedrock")
    fleet = bedrock.list_provisioned_model_throughputs(statusEquals="InService")["provisionedModelSummaries"]
    assert {model["modelArn"].rsplit("/", 1)[-1]: model["modelUnits"] for model in fleet} == {
        model.provisioned_model_id: model.baseline_units for model in POLICY.models.values()
    }
    tags = [bedrock.list_tags_for_resource(resourceARN=model["provisionedModelArn"])["tags"] for model in fleet]
    assert all({"key": MANAGED_BY_TAG, "value": MANAGED_BY} in found for found in tags), "the timetable's are ours"
    with connect(rehearsal.valkey.url) as client:
        routed = {route.provisioned_model_arn for held in Routes(client).read_all().values() for route in held.routes}
    assert routed == {model["provisionedModelArn"] for model in fleet}
    assert set(rehearsal.ready["env"]) == {
        "RUNBOOKS_ALARM_QUEUE_URL",
        "RUNBOOKS_DEAD_LETTER_QUEUE_URL",
        "RUNBOOKS_PAGE_TOPIC_ARN",
    }


def test_every_metric_of_the_catalogue_is_published(rehearsal: Rehearsal) -> None:
    known = {
        "ModelId": SONNET.model_id,
        "Model": "sonnet",
        "Intent": "faq",
        "ClusterName": "mangaassist",
        "ServiceName": "orchestrator",
    }
    for name in SYSTEMS:
        signal: Signal = getattr(POLICY.latency.systems, name)
        known |= dict(zip(CATALOGUE[signal.metric].dimensions, signal.dimensions, strict=True))
    without_batcher = {MetricName.CACHE_HIT_RATE, MetricName.BEDROCK_QUEUE_DEPTH}
    for name, metric in CATALOGUE.items():
        if name in OURS | (BATCHERS - without_batcher):
            continue
        where = {key: known[key] for key in metric.dimensions}
        if name is MetricName.STAGE_LATENCY:
            where = {"Stage": "retrieval"}
        newest = partial(rehearsal.newest, name, **where)
        eventually(newest, lambda value: value is not None)
    eventually(
        lambda: rehearsal.newest(MetricName.RUNNING_TASK_COUNT, ClusterName="mangaassist", ServiceName="orchestrator"),
        over(POLICY.ecs.baseline_tasks),
    )


def test_it_obeys_leases_and_breaches_again_without_them(rehearsal: Rehearsal) -> None:
    def throttles() -> float | None:
        return rehearsal.newest(MetricName.INVOCATION_THROTTLES, ModelId=SONNET.model_id)

    eventually(throttles, over(0))
    values = {KnobName.CACHE_TTL_SECONDS: POLICY.throttle.cache_ttl_seconds, KnobName.MODEL_ROUTING: {"faq": "haiku"}}
    with connect(rehearsal.valkey.url) as client:
        Ledger(client).acquire(
            [
                LeaseRequest(
                    lease_id=knob, knob=knob, value=value, holder=INCIDENT, reason="throttled", duration_ms=600_000
                )
                for knob, value in values.items()
            ]
        )
        eventually(lambda: rehearsal.newest(MetricName.CACHE_HIT_RATE), over(37))
        eventually(throttles, lambda value: value == 0)
        faq_too = pytest.approx((5_000 + 1_500) * 0.6 / 0.85, rel=0.08)
        eventually(lambda: rehearsal.newest(MetricName.TOKENS_PER_SECOND, Model="haiku"), lambda sent: sent == faq_too)
        Ledger(client).release(list(values), INCIDENT, "too early")
        eventually(throttles, over(0))


def test_only_capacity_that_is_routed_and_in_service_counts(rehearsal: Rehearsal) -> None:
    haiku = POLICY.models["haiku"]

    def capacity() -> float | None:
        return rehearsal.newest(MetricName.CAPACITY_TOKENS_PER_SECOND, Model="haiku")

    both = haiku.on_demand_tokens_per_second + haiku.baseline_units * haiku.tokens_per_second_per_unit
    eventually(capacity, lambda value: value == both)
    with connect(rehearsal.valkey.url) as client:
        routes = Routes(client)
        held = routes.read_all()["haiku"]
        routes.withdraw("haiku", version=2)
        eventually(capacity, lambda value: value == haiku.on_demand_tokens_per_second)
        routes.publish(held.model_copy(update={"version": 3}))
        eventually(capacity, lambda value: value == both)
        client.hdel(keys.ROUTES, "haiku")
        eventually(capacity, lambda value: value == haiku.on_demand_tokens_per_second)
        routes.publish(held.model_copy(update={"version": 4}))
        eventually(capacity, lambda value: value == both)
        (arn,) = [route.provisioned_model_arn for route in held.routes]
        rehearsal.client("bedrock").delete_provisioned_model_throughput(provisionedModelId=arn)
        eventually(capacity, lambda value: value == haiku.on_demand_tokens_per_second)


def test_faults_spare_it_and_its_scaling_is_not_taken_for_a_persons(rehearsal: Rehearsal) -> None:
    rehearsal.control("POST", "faults", {"service": "bedrock", "kind": "throttling", "count": 1})
    time.sleep(2.5)  # it lists the fleet every second
    assert rehearsal.control("GET", "faults"), "the fault is still there for whom it is meant"
    rehearsal.control("DELETE", "faults")
    scalings = [call for call in rehearsal.control("GET", "trail") if call["event_name"] == "UpdateService"]
    assert scalings
    assert {call["username"] for call in scalings} == {RESIDENT_NAME}


def test_it_goes_on_while_redis_is_away(rehearsal: Rehearsal) -> None:
    rehearsal.valkey.kill()
    try:
        time.sleep(3.5)  # longer than `newest` looks back
        eventually(lambda: rehearsal.newest(MetricName.CACHE_HIT_RATE), over(0))
        eventually(
            lambda: rehearsal.newest(MetricName.CAPACITY_TOKENS_PER_SECOND, Model="sonnet"), lambda x: x == 25_500
        )
    finally:
        rehearsal.valkey.start()


def test_a_spike_can_be_stopped_and_started(rehearsal: Rehearsal) -> None:
    def sent() -> float | None:
        return rehearsal.newest(MetricName.TOKENS_PER_SECOND, Model="sonnet")

    eventually(sent, over(25_500))
    rehearsal.control("DELETE", "traffic")
    eventually(sent, lambda value: value is not None and value < 25_000)
    spikes = rehearsal.control("POST", "traffic", {"multiplier": 6, "minutes": 20})
    assert (spikes[-1]["multiplier"], spikes[-1]["minutes"]) == (6, 20)
    eventually(sent, over(32_000))
    with pytest.raises(urllib.error.HTTPError) as refused:
        rehearsal.control("POST", "traffic", {"multiplier": -1})
    assert refused.value.code == 400


def test_it_goes_on_while_everything_is_away() -> None:
    nowhere = free_port()
    options = WorldOptions(aws_endpoint_url=f"http://127.0.0.1:{nowhere}", redis_url=f"redis://127.0.0.1:{nowhere}/0")
    clock = RehearsalClock(real_start=datetime.now(UTC), business_start=MIDNIGHT, speed=SPEED)
    stop = threading.Event()
    world = World(options, clock, POLICY)
    loop = threading.Thread(target=world.run, args=(stop,))
    loop.start()
    loop.join(timeout=2)
    assert loop.is_alive()
    stop.set()
    loop.join(timeout=40)
    assert not loop.is_alive()


def test_it_is_not_ready_before_redis_answers() -> None:
    nowhere = free_port()
    env = {**os.environ, "RUNBOOKS_REDIS_URL": f"redis://127.0.0.1:{nowhere}/0"}
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "simulator", "--port", str(port)], env=env, stderr=subprocess.PIPE
    )
    try:

        def answer() -> int | None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/_simulator/ready", timeout=10) as ready:
                    return int(ready.status)
            except urllib.error.HTTPError as error:
                return error.code
            except OSError:
                return None

        assert eventually(answer, lambda status: status is not None, seconds=30) == 503
        assert process.stderr is not None
        assert any(b"Redis does not answer, trying again" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=40)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("speed", [61, 120, 45])
def test_a_speed_that_makes_impossible_periods_is_refused(speed: float) -> None:
    with pytest.raises(ValueError, match=rf"speed {speed}: .* whole seconds from 1 are allowed"):
        metric_period(POLICY, speed)


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ([], {"RUNBOOKS_REHEARSAL_SPEED": "90"}, "speed 90: makes the metric period of 60 s 0.666667 s"),
        ([], {"RUNBOOKS_REHEARSAL_SPEED": "fast"}, "RUNBOOKS_REHEARSAL_SPEED: 'fast'"),
        ([], {"RUNBOOKS_POLICY_FILE": "/no/policy.yaml"}, "RUNBOOKS_POLICY_FILE: /no/policy.yaml: "),
        (["--event-row", "odd"], {}, "invalid choice: 'odd'"),
    ],
)
def test_a_wrong_setting_is_named(arguments: list[str], env: dict[str, str], message: str) -> None:
    moments = dict.fromkeys(("RUNBOOKS_REHEARSAL_REAL_START", "RUNBOOKS_REHEARSAL_BUSINESS_START"), "2026-11-24T00:00Z")
    done = subprocess.run(
        [sys.executable, "-m", "simulator", "--port", "0", *arguments],
        env={**os.environ, **moments, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (Row.ABSENT, "event-not-in-calendar"),
        (Row.UNTRIGGERED, "provisioning-not-triggered"),
        (Row.UNDERSIZED, "multiplier-underestimated"),
        (Row.LATE, "lead-time-too-short"),
        (Row.GOOD, "investigate"),
    ],
)
def test_each_row_of_the_calendar_leads_to_its_cause(row: Row, cause: str) -> None:
    event = release_event(row, MIDNIGHT, POLICY)
    values: dict[EvidenceKey, Value] = {EvidenceKey.EVENT_CONFIGURED: False, EvidenceKey.TOKENS_PER_SECOND: 30_000}
    if event is not None:
        triggered, completed = event.provisioning_triggered_at, event.provisioning_completed_at
        values |= {
            EvidenceKey.EVENT_CONFIGURED: True,
            EvidenceKey.EVENT_STARTS_AT: event.starts_at.isoformat(),
            EvidenceKey.EVENT_TRIGGERED_AT: triggered.isoformat() if triggered else "",
            EvidenceKey.EVENT_COMPLETED_AT: completed.isoformat() if completed else "",
            EvidenceKey.EVENT_CAPACITY_TOKENS_PER_SECOND: event.units["sonnet"] * SONNET.tokens_per_second_per_unit,
            EvidenceKey.EVENT_LEAD_SECONDS: event.lead_time.total_seconds(),
        }
    readings = {key: Reading(key=key, value=value, source="the row") for key, value in values.items()}
    assert [found.id for found in diagnose(TREE, Evidence(readings=readings)).causes] == [cause]
