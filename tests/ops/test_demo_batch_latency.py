"""Scenario 3's demo in parts: it takes minutes, because windows and latencies are real."""

import io
from datetime import timedelta
from pathlib import Path

import pytest
from rich.console import Console

from activities.settings import load_policy
from domain.clock import RehearsalClock
from domain.knobs import KnobName
from domain.override import has_caught_up
from ops.demo_batch_latency import GOOD_MS, SIGNALS, TOO_LONG_MS, BatchLatency, detection, policy
from ops.demo_stage import Options
from ops.stack import StackError

SLOW = {
    "p99": 4230.0,
    "sonnet": 2110,
    "haiku": 352,
    "throttles": 0,
    "window": 500,
    "fill": 7.1,
    "wait": 492,
    "cpu": 27.5,
}
MENDED = {
    "p99": 2610.0,
    "sonnet": 1990,
    "haiku": 349,
    "throttles": 0,
    "window": 150,
    "fill": 3,
    "wait": 156,
    "cpu": 27.4,
}


def options(folder: Path, speed: float) -> Options:
    return Options(keep=False, interactive=False, as_json=True, state_dir=folder, speed=speed)


def loaded(folder: Path, window_ms: int) -> bool:
    """How the demo's policy file counts a standing override of the good window."""
    file = folder / "policy.yaml"
    file.write_text(policy(window_ms))
    found = load_policy(file, RehearsalClock())
    assert found.batcher.controller == "fixed", "ours would make no such fault"
    return has_caught_up(KnobName.BATCH_WINDOW_MS, GOOD_MS, found.baseline)


def test_the_configured_window_is_the_fault_and_then_the_cure(tmp_path: Path) -> None:
    assert not loaded(tmp_path, TOO_LONG_MS)
    assert loaded(tmp_path, GOOD_MS)


def test_a_period_has_300_requests_or_the_speed_is_refused(tmp_path: Path) -> None:
    chosen = BatchLatency.stack_options(options(tmp_path, BatchLatency.SPEED))
    assert chosen.batcher
    assert chosen.real_requests
    period = timedelta(minutes=1) / BatchLatency.SPEED
    assert period.total_seconds() * 13.5 >= 300
    assert period % timedelta(seconds=1) == timedelta(0)
    with pytest.raises(StackError, match=r"speed 60: from 1 to 3 is allowed"):
        BatchLatency.stack_options(options(tmp_path, 60))


def test_the_detection_table_is_checked_row_by_row() -> None:
    table, wrong = detection(SLOW, MENDED)
    assert wrong == []
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    [row] = [line for line in console.export_text().splitlines() if "RequestLatencyP99" in line]
    assert row.split() == ["yes", "RequestLatencyP99", "4,200", "4,230", "ms", "<", "3,000", "2,610", "ms"]


@pytest.mark.parametrize("name", list(SIGNALS))
def test_a_row_that_does_not_hold_is_named(name: str) -> None:
    for value in (SIGNALS[name].bounds[1] + 1, None):
        _, wrong = detection({**SLOW, name: value}, MENDED)
        assert wrong == [SIGNALS[name].name]
    _, wrong = detection(SLOW, {**MENDED, name: None})
    assert wrong == [SIGNALS[name].name]
