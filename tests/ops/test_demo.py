"""`runbooks demo` as a process, on the stack that it starts."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from ops.service import ExitCode

UP = "The stack is up"


@contextmanager
def demo(state_dir: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The demo, started; ended if the test fails."""
    command = [sys.executable, "-P", "-m", "ops.cli", "demo", "--json", "--state-dir", str(state_dir), *arguments]
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def children_when_up(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Waits until the stack is up; answers its processes."""
    assert process.stderr is not None
    assert any(UP in line for line in process.stderr)
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(children: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


@pytest.mark.timeout(300)
def test_scenario_1_is_mitigated_verified_approved_reverted_and_cleaned_up(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        out, progress = process.communicate(timeout=280)
    assert process.returncode == ExitCode.OK, progress[-3000:]
    [line] = out.splitlines()
    result = json.loads(line)
    assert result["incident_id"] == "incident-bedrock-throttle:sonnet"
    assert 0 < result["alarm_to_mitigated_seconds"] < 60
    assert result["error"] is None
    facts = ("verified", "reverted", "knobs_at_baseline", "capacity_at_baseline", "stopped")
    assert {name: result[name] for name in facts} == dict.fromkeys(facts, True)
    assert "bedrock-throttle:sonnet" in Path(result["report"]).read_text()
    assert result["incident_id"].replace(":", "%3A") in result["temporal_ui"]
    for said in ("Traffic rises", "opened an incident", "has recovered", "$ runbooks incident approve", "accepted:"):
        assert said in progress


def test_ctrl_c_stops_every_process(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        children = children_when_up(process)
        assert len(children) >= 5
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=90)
    assert process.returncode == 130
    assert json.loads(out)["error"] == "interrupted"
    assert_gone(children)


def test_a_process_that_dies_fails_the_demo_and_takes_the_rest_down(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        children = children_when_up(process)
        [worker] = [child for child in children if "workers.runbook_worker" in " ".join(child.cmdline())][:1]
        worker.kill()
        out, progress = process.communicate(timeout=90)
    assert process.returncode == ExitCode.UNEXPECTED
    assert "worker was ended by SIGKILL" in json.loads(out)["error"]
    assert "The demo failed." in progress
    assert_gone(children)
