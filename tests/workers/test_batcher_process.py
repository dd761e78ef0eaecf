"""The batcher as a process over HTTP: a real Redis-protocol server, simulated Bedrock, a Temporal that comes late."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from dataplane.routes import Routes
from domain.invoking import Invoke
from domain.knobs import Holder, KnobName, LeaseRequest
from domain.metrics import BATCHERS, CATALOGUE
from domain.policy import Policy
from domain.routes import CapacityRoute, CapacityRoutes
from tests.aws_account import Account, eventually
from tests.servers import AwsServer, TemporalServer, ValkeyServer, free_port
from tests.workers.test_batcher_invoke import Ask
from workers.settings import Settings
from workers.temporal import connect

QUICK = {"median_ms": 60, "p99_ms": 90}


class Process:
    """`python -m workers.batcher` on a port of its own."""

    def __init__(self, folder: Path, aws: str, redis_url: str, temporal: str, policy: str = "", port: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "policy.yaml").write_text(policy or "{}")
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "batcher.log"
        env = {
            **os.environ,
            "RUNBOOKS_POLICY_FILE": str(folder / "policy.yaml"),
            "RUNBOOKS_AWS_ENDPOINT_URL": aws,
            "RUNBOOKS_REDIS_URL": redis_url,
            "RUNBOOKS_TEMPORAL_ADDRESS": temporal,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }
        with self.log.open("wb") as log:
            command = (sys.executable, "-m", "workers.batcher", "--port", str(self.port))
            self.process = subprocess.Popen(command, env=env, stderr=log)
        deadline = time.monotonic() + 90
        while not self._is_ready():
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/readyz", timeout=1).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    server = AwsServer(tmp_path_factory.mktemp("aws")).start()
    yield Account(server.endpoint)
    server.kill()


@pytest.fixture(scope="module")
def late_temporal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TemporalServer]:
    """A Temporal server that is started after the batcher."""
    server = TemporalServer(tmp_path_factory.mktemp("temporal"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def batcher(
    aws: Account, valkey: ValkeyServer, late_temporal: TemporalServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    policy = "batcher: {cache_timeout: PT5S, publish_every: PT1S, lost_of: 10, pass_for: PT1H}"
    folder = tmp_path_factory.mktemp("batcher")
    process = Process(folder, aws.endpoint_url, valkey.url, late_temporal.address, policy)
    yield process
    process.stop()


@pytest.fixture
async def http(batcher: Process, aws: Account) -> AsyncIterator[httpx.AsyncClient]:
    aws.control("DELETE", "faults")
    aws.control("POST", "converse", {"sonnet": QUICK, "haiku": QUICK})
    async with httpx.AsyncClient(base_url=batcher.url, timeout=30) as client:
        yield client


async def ask(http: httpx.AsyncClient, prompt: str, intent: str = "faq", **more: Any) -> httpx.Response:
    return await http.post("/v1/answer", json={"intent": intent, "prompt": prompt, **more})


async def until(http: httpx.AsyncClient, holds: Callable[[dict[str, Any]], bool]) -> None:
    """Wait until `/v1/state` is so."""
    async with asyncio.timeout(30):
        while not holds((await http.get("/v1/state")).json()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_each_gets_its_own_answer_and_an_equal_one_comes_from_the_cache(http: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(ask(http, f"question {n}?") for n in range(20)))
    assert [answer.json()["text"] for answer in answers] == [f"Simulated answer to: question {n}?" for n in range(20)]
    async with asyncio.timeout(30):
        while (again := (await ask(http, "question 7?")).json())["output_tokens"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # what it was asked first is being written
    assert again["text"] == "Simulated answer to: question 7?"
    personal = [await ask(http, "what do you recommend?", "recommendation") for _ in range(2)]
    assert all(answer.json()["output_tokens"] > 0 for answer in personal), "personal data is never cached"
    metrics = (await http.get("/metrics")).text
    assert 'batcher_cache_lookups_total{intent="faq",result="hit"}' in metrics
    assert 'intent="recommendation",result=' not in metrics


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, "body"),
        (b'{"intent": "\xff"}', 400, "body"),
        (b"[]", 400, "body"),
        (b'{"intent": "faq", "prompt": "\\ud800"}', 400, "body"),
        (b" " * 10_000_000, 413, "body"),
        (b'{"intent": "faq"}', 422, "prompt"),
        (b'{"intent": "faq", "prompt": " "}', 422, "prompt"),
        (b'{"intent": "weather", "prompt": "x"}', 422, "intent"),
        (b'{"intent": "faq", "prompt": "x", "max_tokens": -1}', 422, "max_tokens"),
        (b'{"intent": "faq", "prompt": "x", "max_tokens": "9"}', 422, "max_tokens"),
        (b'{"intent": "faq", "prompt": "x", "deadline_ms": -5}', 422, "deadline_ms"),
        (b'{"intent": "faq", "prompt": "x", "deadline_ms": NaN}', 422, "deadline_ms"),
        (b'{"intent": "faq", "prompt": "x", "colour": "red"}', 422, "colour"),
    ],
)
async def test_bad_input_is_told_its_field(http: httpx.AsyncClient, body: bytes, status: int, field: str) -> None:
    answer = await http.post("/v1/answer", content=body)
    problem = answer.json()
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert problem["status"] == status
    assert [error["field"] for error in problem["errors"]] == [field]
    assert problem["errors"][0]["allowed"]
    assert field in problem["detail"]
    assert len(json.dumps(problem)) < 2000


async def test_refusals_have_their_status(http: httpx.AsyncClient, aws: Account) -> None:
    slow = {"median_ms": 3000, "p99_ms": 3001}
    aws.control("POST", "converse", {"haiku": slow})
    late = await ask(http, "too slow", "search", deadline_ms=200)
    assert (late.status_code, late.json()["reason"]) == (504, "deadline")
    aws.control("POST", "converse", {"haiku": QUICK | {"on_demand_tokens_per_second": 0, "retry_after_seconds": 60}})
    throttled = await ask(http, "no capacity", "order_status")
    assert (throttled.status_code, throttled.json()["reason"]) == (503, "throttled")
    assert int(throttled.headers["retry-after"]) >= 50
    aws.control("POST", "converse", {"haiku": {"on_demand_tokens_per_second": 5000, "retry_after_seconds": None}})


async def test_a_throttle_that_says_when_to_come_again_is_believed(http: httpx.AsyncClient, aws: Account) -> None:
    async def throttles() -> float:
        lines = (await http.get("/metrics")).text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith('batcher_throttles_total{model="haiku"')
        )

    before = await throttles()
    aws.control("POST", "converse", {"haiku": {"on_demand_tokens_per_second": 0, "retry_after_seconds": 3}})
    asked = asyncio.create_task(ask(http, "told when", "search", deadline_ms=20_000))
    async with asyncio.timeout(30):
        while await throttles() == before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    aws.control("POST", "converse", {"haiku": {"on_demand_tokens_per_second": 5000, "retry_after_seconds": None}})
    assert (await asked).status_code == 200
    assert await throttles() == before + 1, "it was not tried before"


async def test_calls_follow_the_routes_and_a_provisioned_model_that_vanished_is_left_out(
    http: httpx.AsyncClient, aws: Account, redis_client: redis.Redis
) -> None:
    sonnet = Policy().models["sonnet"]
    on_demand = sonnet.on_demand_tokens_per_second
    arn = aws.client("bedrock").create_provisioned_model_throughput(
        provisionedModelName="ours", modelId=sonnet.provisioned_model_id, modelUnits=5
    )["provisionedModelArn"]
    aws.control("POST", "settle")
    aws.control("POST", "converse", {"sonnet": {"on_demand_tokens_per_second": 0}})

    async def status(prompt: str) -> int:
        return (await ask(http, prompt, "recommendation", deadline_ms=1500)).status_code

    assert await status("on demand has nothing") in (503, 504)
    route = CapacityRoute(provisioned_model_arn=arn, units=5)
    Routes(redis_client).publish(CapacityRoutes(model="sonnet", routes=(route,), version=1))
    async with asyncio.timeout(40):
        while await status("the provisioned model has room") != 200:
            pass
    aws.control("DELETE", f"provisioned-model-throughput/{arn.rpartition('/')[2]}")
    aws.control("POST", "converse", {"sonnet": {"on_demand_tokens_per_second": on_demand}})
    async with asyncio.timeout(40):
        while await status("on demand has room") != 200:
            pass
    Routes(redis_client).withdraw("sonnet", 2)


async def test_metrics_reach_cloudwatch(http: httpx.AsyncClient, aws: Account) -> None:
    await asyncio.gather(*(ask(http, f"measured {n}", "greeting") for n in range(5)))

    def tokens() -> Any:
        now = datetime.now(UTC)
        return aws.client("cloudwatch").get_metric_statistics(
            Namespace="MangaAssist",
            MetricName="TokensPerIntent",
            Dimensions=[{"Name": "Intent", "Value": "greeting"}, {"Name": "Direction", "Value": "output"}],
            StartTime=now - timedelta(minutes=5),
            EndTime=now + timedelta(minutes=5),
            Period=3600,
            Statistics=["SampleCount", "Average"],
        )["Datapoints"]

    [found] = await asyncio.to_thread(eventually, tokens, lambda points: points and points[0]["SampleCount"] == 5)
    assert found["Average"] >= 60


async def test_an_intent_that_loses_its_packed_answers_gets_a_call_for_each(
    http: httpx.AsyncClient, aws: Account, batcher: Process
) -> None:
    """Until then nobody loses an answer: what a packed call left out is asked again alone."""
    aws.control("POST", "converse", {"sonnet": QUICK | {"lost_share": 1}})
    for round_ in range(20):
        questions = [f"lost {round_}-{n}?" for n in range(120)]
        answers = await asyncio.gather(*(ask(http, question) for question in questions))
        assert [one.json()["text"] for one in answers] == [f"Simulated answer to: {one}" for one in questions]
        if (await http.get("/v1/state")).json()["not_packed"] == ["faq"]:
            break
    else:
        pytest.fail("faq is still packed")
    assert "faq has lost 100 % of its last packed answers" in batcher.log.read_text()
    assert 'batcher_not_packed{intent="faq"} 1.0' in (await http.get("/metrics")).text
    aws.control("POST", "converse", {"sonnet": {"lost_share": 0}})


async def test_every_metric_reaches_cloudwatch_in_its_unit_and_dimensions(
    http: httpx.AsyncClient, aws: Account
) -> None:
    """After all that was asked before: some were coalesced, throttled, refused, and lost in a packed call."""
    await asyncio.gather(*(ask(http, "the same for all", "search") for _ in range(3)))
    cloudwatch = aws.client("cloudwatch")

    def published() -> dict[str, tuple[set[str], str]]:
        found = {}
        for one in cloudwatch.list_metrics(Namespace="MangaAssist")["Metrics"]:
            name, now = one["MetricName"], datetime.now(UTC)
            [point] = cloudwatch.get_metric_statistics(
                Namespace="MangaAssist",
                MetricName=name,
                Dimensions=one["Dimensions"],
                StartTime=now - timedelta(minutes=30),
                EndTime=now + timedelta(minutes=30),
                Period=3600,
                Statistics=["SampleCount"],
            )["Datapoints"][:1]
            found[name] = {dimension["Name"] for dimension in one["Dimensions"]}, point["Unit"]
        return found

    found = await asyncio.to_thread(eventually, published, lambda found: found.keys() >= BATCHERS)
    assert {name: found[name] for name in BATCHERS} == {
        name: (set(CATALOGUE[name].dimensions), CATALOGUE[name].unit) for name in BATCHERS
    }
    text = (await http.get("/metrics")).text
    for name in (
        "queue_wait_seconds",
        "batch_size",
        "batch_seconds",
        "tokens",
        "window_seconds",
        "window_changes_total",
    ):
        assert f"batcher_{name}" in text
    for name in ("calls", "throttles", "coalesced", "unanswered", "cache_lookups"):
        assert f"batcher_{name}_total{{" in text


async def test_temporal_may_come_later(http: httpx.AsyncClient, late_temporal: TemporalServer) -> None:
    await asyncio.to_thread(late_temporal.start)
    client = await connect(Settings(temporal_address=late_temporal.address))
    async with Worker(client, task_queue="asks", workflows=[Ask], workflow_runner=UnsandboxedWorkflowRunner()):
        asked = Invoke(intent="recommendation", prompt="Through Temporal?")
        answer = await client.execute_workflow(Ask.run, asked, id="ask", task_queue="asks")
    assert (answer.text, answer.batch_size) == ("Simulated answer to: Through Temporal?", 1)


def test_the_documented_ten_lines_embed_it_without_http_and_temporal(
    batcher: Process, aws: Account, valkey: ValkeyServer
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "batcher.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0].replace("redis://127.0.0.1:6379/0", valkey.url)
    not_needed = ("temporalio", "starlette", "uvicorn", "prometheus_client", "structlog", "pydantic_settings")
    code += f"import sys\nprint([name for name in {not_needed} if name in sys.modules])\n"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": aws.region}
    env = os.environ | keys | {"AWS_ENDPOINT_URL": aws.endpoint_url, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = "Simulated answer to: How do I return a book? Counter({'sonnet': 1})"
    assert done.stdout.splitlines() == [answer, "[]"]


async def test_redis_may_come_later_and_go_again(aws: Account, tmp_path: Path) -> None:
    aws.control("POST", "converse", {"sonnet": QUICK, "haiku": QUICK})
    own = ValkeyServer(tmp_path)
    process = Process(tmp_path / "batcher", aws.endpoint_url, own.url, f"127.0.0.1:{free_port()}")
    async with httpx.AsyncClient(base_url=process.url, timeout=30) as http:

        async def model(prompt: str) -> str:
            return str((await ask(http, prompt)).json()["model"])

        assert await model("without Redis") == "sonnet"
        own.start()
        with connect_redis(own.url) as client:
            downgrade = LeaseRequest(
                lease_id="a",
                knob=KnobName.MODEL_ROUTING,
                value={"faq": "haiku"},
                holder=Holder(kind="person", id="p"),
                reason="r",
                duration_ms=600_000,
            )
            Ledger(client).acquire([downgrade])
        async with asyncio.timeout(40):
            number = 0
            while await model(f"with Redis {number}") != "haiku":
                number += 1
        own.kill()
        assert [await model(f"without again {n}") for n in range(5)] == ["haiku"] * 5, "the last known knobs"
    process.stop()


async def test_who_leaves_frees_its_place_and_sigterm_answers_the_others(
    aws: Account, valkey: ValkeyServer, tmp_path: Path
) -> None:
    aws.control("POST", "converse", {"sonnet": {"median_ms": 2000, "p99_ms": 2001}})
    nowhere = f"127.0.0.1:{free_port()}"
    process = Process(tmp_path, aws.endpoint_url, valkey.url, nowhere, "batcher: {slots: 1, max_slot_wait: PT1M}")
    async with httpx.AsyncClient(base_url=process.url, timeout=30) as http:
        first = asyncio.create_task(ask(http, "first", "recommendation"))
        await until(http, lambda state: state["pending"] == 1)
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/answer", json={"intent": "recommendation", "prompt": "left"}, timeout=0.3)
        aws.control("POST", "converse", {"sonnet": {"median_ms": 1000, "p99_ms": 1001}})
        assert (await first).status_code == 200
        assert (await ask(http, "next", "recommendation")).status_code == 200
        assert 'batcher_calls_total{model="sonnet"} 2.0' in (await http.get("/metrics")).text, "none for who has left"
        asked = [asyncio.create_task(ask(http, f"last {n}", "recommendation")) for n in range(3)]
        await until(http, lambda state: state["pending"] == 3)
        process.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            while (await http.get("/readyz")).status_code == 200:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for again in (signal.SIGINT, signal.SIGTERM):
            process.process.send_signal(again)
        refused = await ask(http, "late", "recommendation")
        assert (refused.status_code, refused.json()["reason"]) == (503, "draining")
        assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 3
    assert await asyncio.to_thread(process.process.wait, 20) == 0
    assert '"without_answer": 0' in process.log.read_text()
