"""Real requests of the simulator to a real batcher, as processes over HTTP; and what makes stages and systems slow."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from domain.metrics import CATALOGUE, MetricName
from domain.policy import Policy
from simulator.batch_latency import BURST_EVERY_SECONDS, BURST_SECONDS, BURST_TIMES, HAIKU_SHARE
from simulator.requests import BATCHER, HttpBatcher, Requests
from simulator.stages import SYSTEMS, Stages
from tests.aws_account import Account, eventually
from tests.servers import ValkeyServer, free_port
from tests.virtual_time import run_virtually
from tests.workers.test_batcher_process import Process

POLICY = Policy()
SONNET = POLICY.models["sonnet"]
SETTINGS = "{batcher: {controller: fixed, max_lost_share: 1, publish_every: PT1S}, knobs: {batch_window_ms: 100}}"
QUICK = {"median_ms": 100, "p99_ms": 150, "lost_share": 0}


@dataclass
class Evening:
    """A running simulator that asks a running batcher."""

    account: Account
    batcher: Process

    def requests(self) -> dict[str, Any]:
        return dict(self.account.control("GET", "requests"))

    def after(self, count: int) -> dict[str, Any]:
        """What so many requests from now on say."""
        self.account.control("DELETE", "requests")
        return eventually(self.requests, lambda now: now["count"] >= count)

    def figures(self, name: MetricName, statistic: str, minutes: float = 1, **dimensions: str) -> list[float]:
        """Each second's value, the newest first."""
        now = datetime.now(UTC)
        metric = {
            "Namespace": CATALOGUE[name].namespace,
            "MetricName": name,
            "Dimensions": [{"Name": key, "Value": value} for key, value in dimensions.items()],
        }
        answer = self.account.client("cloudwatch").get_metric_data(
            MetricDataQueries=[{"Id": "q", "MetricStat": {"Metric": metric, "Period": 1, "Stat": statistic}}],
            StartTime=now - timedelta(minutes=minutes),
            EndTime=now,
            ScanBy="TimestampDescending",
        )
        return [float(value) for value in answer["MetricDataResults"][0]["Values"]]


@pytest.fixture(scope="module")
def evening(valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evening]:
    folder = tmp_path_factory.mktemp("evening")
    (folder / "policy.yaml").write_text(SETTINGS)
    port, nowhere = free_port(), f"127.0.0.1:{free_port()}"
    endpoint = f"http://127.0.0.1:{port}"
    batcher = Process(folder / "batcher", endpoint, valkey.url, nowhere, SETTINGS)
    env = {
        **os.environ,
        "RUNBOOKS_REDIS_URL": valkey.url,
        "RUNBOOKS_POLICY_FILE": str(folder / "policy.yaml"),
        "RUNBOOKS_REHEARSAL_REAL_START": datetime.now(UTC).isoformat(),
        "RUNBOOKS_REHEARSAL_BUSINESS_START": "2026-12-01T20:00:00+09:00",
        "RUNBOOKS_REHEARSAL_SPEED": "60",
        "RUNBOOKS_SIMULATOR_PORT": str(port),
        "RUNBOOKS_SIMULATOR_SCENARIO": "batch-latency",
        "RUNBOOKS_SIMULATOR_BATCHER_URL": batcher.url,
    }
    with (folder / "simulator.log").open("wb") as log:
        simulator = subprocess.Popen([sys.executable, "-m", "simulator"], env=env, stdout=log, stderr=log)
    account = Account(endpoint)

    def ready() -> bool:
        assert simulator.poll() is None, (folder / "simulator.log").read_text()
        try:
            account.control("GET", "ready")
        except OSError:
            return False
        return True

    try:
        eventually(ready, bool)
        account.control("POST", "converse", {"sonnet": QUICK, "haiku": QUICK})
        yield Evening(account, batcher)
        simulator.send_signal(signal.SIGTERM)
        assert simulator.wait(40) == 0
        assert "Traceback" not in (folder / "simulator.log").read_text()
    finally:
        for process in (simulator, batcher.process):
            process.kill()
            process.wait()


def test_each_request_waits_for_all_stages_and_the_batcher(evening: Evening) -> None:
    found = evening.after(60)
    assert found["errors"] == 0
    stages = {stage.name: stage.p99_ms for stage in POLICY.latency.stages}
    assert list(found["stages"]) == [*list(stages)[:-1], BATCHER, list(stages)[-1]]
    for name, budget_ms in stages.items():
        assert found["stages"][name]["budget_ms"] == budget_ms
        assert found["stages"][name]["p50_ms"] >= 0.7 * budget_ms
    assert found["stages"][BATCHER]["p50_ms"] >= 100, "one call"
    assert found["total"]["p50_ms"] >= sum(0.7 * budget_ms for budget_ms in stages.values()) + 100
    assert (found["total"]["budget_ms"], found["total"]["alarm_ms"]) == (3_000, 4_000)
    assert 0 <= found["total"]["over_alarm_share"] <= found["total"]["over_budget_share"] < 1


def test_what_is_measured_is_published_and_the_model_is_silent_on_it(evening: Evening) -> None:
    evening.after(60)
    eventually(lambda: evening.figures(MetricName.QUEUE_WAIT_TIME, "p99", Model="sonnet"), bool)
    assert max(evening.figures(MetricName.REQUEST_LATENCY_P99, "SampleCount")) == 1
    assert evening.figures(MetricName.REQUEST_LATENCY_P99, "Maximum")[0] > 400
    assert set(evening.figures(MetricName.FALLBACK_RATE, "Maximum")) == {0}
    counts = evening.figures(MetricName.STAGE_LATENCY, "SampleCount", Stage="retrieval")
    assert max(counts) > 4, "each request's, not the model's one"
    calls = evening.figures(MetricName.INVOCATION_LATENCY, "p99", ModelId=SONNET.model_id)
    assert calls[0] < 1_000, "Bedrock's own, not the model's 2,000 to 2,100"
    assert set(evening.figures(MetricName.CACHE_HIT_RATE, "Minimum")) <= {0, 100}, "lookups of the batcher's"
    cpu = evening.figures(MetricName.CPU_UTILIZATION, "Average", ClusterName="mangaassist", ServiceName="orchestrator")
    assert cpu
    assert cpu == pytest.approx([28] * len(cpu), rel=0.1), "the detection table's"
    before = evening.figures(MetricName.BATCH_WINDOW, "Maximum", minutes=3, Model="sonnet")
    assert before[0] == 100
    assert before.count(POLICY.latency.revert_window_ms) >= 20, "what it was until now"


def test_a_slow_system_slows_its_stage_and_shows_in_its_own_metric(evening: Evening) -> None:
    domain, client = POLICY.latency.systems.opensearch.dimensions
    evening.account.control("POST", "latency", {"opensearch": 5, "delivery": 3})
    try:
        eventually(
            lambda: evening.figures(MetricName.OPENSEARCH_LATENCY, "Average", DomainName=domain, ClientId=client)[0],
            lambda newest: newest == 500,
        )
        found = eventually(lambda: evening.after(20), lambda now: now["stages"]["retrieval"]["p50_ms"] > 500)
        assert found["stages"]["delivery"]["p50_ms"] > 100
        assert found["stages"]["gateway"]["p50_ms"] < 300
    finally:
        times = evening.account.control("DELETE", "latency")
    assert set(times.values()) == {1}


def test_the_rate_can_be_changed(evening: Evening) -> None:
    for rate in (60, 18):
        answer = evening.account.control("POST", "requests", {"requests_per_second": rate})
        assert answer["requests_per_second"] == rate


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("latency", {"mainframe": 2}, "mainframe"),
        ("latency", {"redis": 0}, "redis: 0"),
        ("latency", {"redis": "slow"}, "redis: 'slow'"),
        ("latency", {"redis": True}, "redis: True"),
        ("latency", [], "an object"),
        ("requests", {"requests_per_second": 0}, "requests_per_second"),
        ("requests", {"requests_per_second": 501}, "requests_per_second"),
        ("requests", {"rate": 5}, "rate"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(evening: Evening, path: str, body: object, named: str) -> None:
    before = evening.requests()["requests_per_second"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        evening.account.control("POST", path, body)
    assert refused.value.code == 400
    assert named in str(json.load(refused.value)["error"])
    assert evening.requests()["requests_per_second"] == before
    assert set(evening.account.control("GET", "latency").values()) == {1}


def test_without_its_batcher_everybody_gets_the_fallback(evening: Evening) -> None:
    """The last one: the batcher is gone for good."""
    evening.batcher.process.kill()
    evening.batcher.process.wait()
    found = eventually(lambda: evening.after(20), lambda now: now["errors"] == now["count"])
    assert found["errors_by_reason"] == {"unreachable": found["count"]}
    eventually(lambda: evening.figures(MetricName.FALLBACK_RATE, "Average")[0], lambda newest: newest == 100)


def test_the_scenario_is_refused_without_a_batcher() -> None:
    command = [sys.executable, "-m", "simulator", "--port", "0", "--scenario", "batch-latency"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "scenario batch-latency: needs --batcher-url" in done.stderr
    with pytest.raises(ValueError, match="batcher URL 'ftp://x': http://HOST:PORT is allowed"):
        HttpBatcher("ftp://x")


def test_without_packed_intents_there_is_nobody_to_ask_for() -> None:
    nothing = {name: intent.model_dump() | {"strategy": "pass"} for name, intent in POLICY.intents.items()}
    policy = Policy.model_validate({"intents": nothing})
    with pytest.raises(ValueError, match="none that users ask for has the strategy pack"):
        Requests(policy, Stages(policy.latency), HttpBatcher("http://127.0.0.1:1"), seed=1)


class Notes:
    """A batcher that answers at once."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.asked: Counter[tuple[str, str]] = Counter()

    async def answer(self, intent: str, prompt: str, within_seconds: float) -> str | None:
        self.at.append(asyncio.get_running_loop().time())
        self.asked[intent, prompt] += 1
        return None


def test_requests_come_at_their_rate_with_its_bursts_and_many_again() -> None:
    rate, seconds, batcher = 30.0, 300, Notes()
    requests = Requests(POLICY, Stages(POLICY.latency), batcher, seed=1)
    requests.rate = rate

    async def go() -> None:
        running = asyncio.create_task(requests.run())
        await asyncio.sleep(seconds)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    run_virtually(go())
    assert len(batcher.at) == pytest.approx(seconds * rate, rel=0.05)
    stages_before_seconds = 0.28  # between a message and the batcher
    in_burst = sum((at - stages_before_seconds) % BURST_EVERY_SECONDS < BURST_SECONDS for at in batcher.at)
    usual = (len(batcher.at) - in_burst) / (BURST_EVERY_SECONDS - BURST_SECONDS)
    assert in_burst / BURST_SECONDS == pytest.approx(BURST_TIMES * usual, rel=0.15)
    intents: Counter[str] = Counter()
    for (intent, _), count in batcher.asked.items():
        intents[intent] += count
    assert set(intents) == {"faq", "greeting", "search"}
    assert intents["search"] / intents.total() == pytest.approx(HAIKU_SHARE, rel=0.2)
    repeated = sum(count - 1 for count in batcher.asked.values()) / len(batcher.at)
    assert 0.5 < repeated < 0.7, "90 % come again each 150 s on average: 300 s see most of them"


def test_each_system_is_a_part_of_its_stage() -> None:
    stages = Stages(POLICY.latency)
    usual = {name: stages.p99_ms(name) for name in stages.budgets_ms}
    assert usual == stages.budgets_ms
    for name, system in SYSTEMS.items():
        stages.slow({name: 11})
        slow = {stage for stage in usual if stages.p99_ms(stage) > usual[stage]}
        assert slow == {system.stage}
        assert stages.p99_ms(system.stage) == pytest.approx(usual[system.stage] + 10 * system.p99_ms)
        signal = getattr(POLICY.latency.systems, name)
        shown = {metric: value for metric, _, value in stages.figures()}
        assert shown[signal.metric] == 11 * system.shows
        assert system.shows < signal.high, "usually normal"
        stages.heal()
