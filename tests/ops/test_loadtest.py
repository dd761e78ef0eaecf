"""`runbooks loadtest window`: what it refuses, how it judges, and one short run as a process."""

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from domain.policy import Policy
from ops.asking import ExitCode, OpsError
from ops.loadtest import LoadTest, WindowRun, counted, planned, summed_up, verdict

POLICY = Policy()


def seen_by(**changes: object) -> WindowRun:
    figures: dict[str, object] = {
        "window_ms": 500,
        "window_in_force_ms": 500,
        "requests": 840,
        "unanswered": 0,
        "calls_per_request": 0.14,
        "fill": 7.2,
        "queue_wait_p50_ms": 250,
        "queue_wait_p99_ms": 490,
        "budget": [],
        "total_p50_ms": 2100,
        "total_p99_ms": 2600,
        "over_budget_share": 0.001,
    }
    return WindowRun.model_validate(figures | changes)


@pytest.mark.parametrize(
    ("run", "within", "said"),
    [
        (seen_by(), True, "P99 2,600 ms; the budget is under 3,000 ms"),
        (seen_by(total_p99_ms=2999.9), True, "P99"),
        (seen_by(total_p99_ms=3000), False, "P99 3,000 ms"),
        (seen_by(unanswered=8), True, "P99"),
        (seen_by(unanswered=9), False, "9 of 849 requests got no answer"),
        (seen_by(requests=0, total_p99_ms=0), False, "0 of 0 requests"),
    ],
)
def test_the_budget_decides(run: WindowRun, within: bool, said: str) -> None:
    judged = verdict(run, 3000)
    assert judged.within_budget is within
    assert said in judged.why


def test_what_is_not_given_is_the_policys() -> None:
    policy = Policy.model_validate({"knobs": {"batch_window_ms": 150}, "batcher": {"controller": "fixed"}})
    plan = planned(policy, 500, None, None, None, 18, 60)
    assert (plan.windows, plan.controller) == ((150, 500), "fixed")


@pytest.mark.parametrize(
    ("given", "field", "allowed"),
    [
        ({"window_ms": 1001}, "--window-ms", "from 0 to 1000"),
        ({"window_ms": -1}, "--window-ms", "from 0 to 1000"),
        ({"against_ms": 5000}, "--against", "from 0 to 1000"),
        ({"requests_per_second": 0}, "--requests-per-second", "at most 200"),
        ({"requests_per_second": math.nan}, "--requests-per-second", "at most 200"),
        ({"requests_per_second": 1e9}, "--requests-per-second", "at most 200"),
        ({"seconds": 3}, "--seconds", "22 to 3600"),
        ({"seconds": math.inf}, "--seconds", "22 to 3600"),
    ],
)
def test_what_is_not_allowed_is_named(given: dict[str, float], field: str, allowed: str) -> None:
    good = {"window_ms": 500, "against_ms": 150, "controller": None, "batcher_url": None}
    good |= {"requests_per_second": 14, "seconds": 60}
    with pytest.raises(OpsError) as refused:
        planned(POLICY, **(good | given))  # type: ignore[arg-type]
    wrong = refused.value.not_allowed
    assert refused.value.exit_code is ExitCode.USAGE
    assert wrong is not None
    assert wrong.field == field
    assert allowed in wrong.allowed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "Give --window-ms, or --batcher-url"),
        ({"window_ms": 500, "batcher_url": "http://batcher:8235"}, "Give --window-ms, or --batcher-url"),
        ({"against_ms": 150, "batcher_url": "http://batcher:8235"}, "runs with the window and controller that it has"),
        ({"batcher_url": "batcher:8235"}, "http://HOST:PORT is"),
    ],
)
def test_a_batcher_that_is_there_is_asked_as_it_is(given: dict[str, Any], said: str) -> None:
    nothing = {"window_ms": None, "against_ms": None, "controller": None, "batcher_url": None}
    with pytest.raises(OpsError, match=said):
        planned(POLICY, **{**nothing, **given}, requests_per_second=14, seconds=60)
    plan = planned(POLICY, None, None, None, "http://batcher:8235", 14, 60)
    assert (plan.windows, plan.batcher_url) == ((), "http://batcher:8235")


METRICS = """\
# TYPE batcher_queue_wait_seconds histogram
batcher_queue_wait_seconds_bucket{model="sonnet",le="0.1"} 0
batcher_queue_wait_seconds_bucket{model="sonnet",le="0.15"} 90
batcher_queue_wait_seconds_bucket{model="sonnet",le="0.2"} 100
batcher_queue_wait_seconds_bucket{model="sonnet",le="+Inf"} 100
# TYPE batcher_batch_size histogram
batcher_batch_size_bucket{model="sonnet",le="+Inf"} 25
batcher_batch_size_sum{model="sonnet"} 100
batcher_batch_size_count{model="sonnet"} 25
# TYPE batcher_batch_seconds histogram
batcher_batch_seconds_bucket{model="sonnet",intent="faq",le="2"} 20
batcher_batch_seconds_bucket{model="sonnet",intent="faq",le="3"} 25
batcher_batch_seconds_bucket{model="sonnet",intent="faq",le="+Inf"} 25
batcher_batch_seconds_bucket{model="sonnet",intent="greeting",le="2"} 20
batcher_batch_seconds_bucket{model="sonnet",intent="greeting",le="3"} 25
batcher_batch_seconds_bucket{model="sonnet",intent="greeting",le="+Inf"} 25
# TYPE batcher_window_seconds gauge
batcher_window_seconds{model="sonnet",group=""} 0
batcher_window_seconds{model="sonnet",group="public"} 0.15
# TYPE batcher_calls counter
batcher_calls_total{model="sonnet"} 25
batcher_calls_total{model="haiku"} 25
"""


def test_the_batchers_own_metrics_and_the_requests_are_one_table() -> None:
    ways = {stage.name: {"p99_ms": stage.p99_ms + 1} for stage in POLICY.latency.stages}
    total = {"p50_ms": 2000, "p99_ms": 2700, "over_budget_share": 0.004}
    seen = {"count": 126, "errors": 1, "stages": ways, "total": total}
    run = summed_up(150, POLICY, seen, Counter(), counted(METRICS))
    assert run.window_in_force_ms == 150
    assert (run.requests, run.unanswered) == (125, 1)
    assert run.calls_per_request == 25 / 100
    assert run.fill == 4
    assert run.queue_wait_p50_ms == pytest.approx(100 + 50 * 50 / 90), "empty buckets below it count"
    assert run.queue_wait_p99_ms == pytest.approx(195)
    rows = {row.stage: row for row in run.budget}
    assert list(rows) == [
        "gateway",
        "intent-classification",
        "queue wait",
        "retrieval",
        "Bedrock, second calls included",
        "delivery",
        "total",
    ]
    assert rows["Bedrock, second calls included"].measured_ms == pytest.approx(2950)
    assert rows["queue wait"].over
    assert not rows["total"].over


@pytest.mark.timeout(180)
def test_a_short_run_says_what_it_measured_and_leaves_nothing(tmp_path: Path) -> None:
    """One window against itself needs one run; at 60 requests/s 5 s are enough."""
    (tmp_path / "policy.yaml").write_text("batcher: {controller: fixed}")
    asked = ("--window-ms", "150", "--against", "150", "--requests-per-second", "60", "--seconds", "5", "--json")
    command = [sys.executable, "-P", "-m", "ops.cli", "loadtest", "window", *asked]
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RUNBOOKS_POLICY_FILE": str(tmp_path / "policy.yaml"),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=150)
    found = LoadTest.model_validate_json(done.stdout)
    assert done.returncode == (0 if found.verdict.within_budget else 1), done.stderr[-2000:]
    run = found.proposed
    assert run == found.against
    assert run.requests >= 100
    assert run.fill > 1.5
    assert 0.8 / run.fill < run.calls_per_request < 1, "a call for each batch, and second ones for lost answers"
    assert all(row.measured_ms for row in run.budget)
    assert "window 150 ms: P99" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["policy.yaml"]
    running = (" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    assert not [line for line in running if str(tmp_path) in line]
