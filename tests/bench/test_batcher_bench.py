"""The batchers' benchmark: its limit is one, and its runs come out the same."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from bench import _harness, batcher
from bench._batchers import NONE, OURS
from bench._batching_worlds import SIZE, World, fewest_calls, fewest_calls_without_foresight
from bench._harness import Figure, result
from bench.batcher import play

SHORT = World("short", ((8, 120.0),))


def test_the_limit_is_below_what_anybody_does_and_never_below_full_batches() -> None:
    arrivals = SHORT.arrivals(5)
    least = fewest_calls(SHORT, arrivals) / len(arrivals)
    blind = fewest_calls_without_foresight(SHORT, arrivals) / len(arrivals)
    ours = play(SHORT, OURS, 5)
    assert 1 / SIZE <= least < blind < ours.calls_per_request < 0.5
    assert ours == play(SHORT, OURS, 5)
    assert play(SHORT, NONE, 5).calls_per_request == 1


def test_who_comes_alone_needs_a_call_and_who_comes_together_shares_one() -> None:
    alone = [at * 60.0 for at in range(100)]
    assert 0.98 <= fewest_calls(SHORT, alone) / len(alone) <= 1
    together = sorted(alone * 4)
    assert 0.98 <= fewest_calls(SHORT, together) / len(alone) <= 1


def test_arrivals_are_in_order_and_come_as_often_as_they_should() -> None:
    arrivals = SHORT.arrivals(1)
    assert all(one <= other for one, other in pairwise(arrivals))
    assert 800 < len(arrivals) < 1120


def test_cpu_measured_alone_takes_the_place_of_what_was_measured_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_harness, "RESULTS", tmp_path)
    monkeypatch.setattr(batcher, "RESULTS", tmp_path)
    _harness.publish("batcher", [Figure("calls", 1.2, "x", 1.1, "why")], seeds=[1])
    for cost in (9.0, 8.0):
        batcher.merge_cpu(result([Figure("CPU", cost, "µs", 10)]))
    written = json.loads((tmp_path / "batcher.json").read_text())
    assert [(row["name"], row["value"], row["met"]) for row in written["figures"]] == [
        ("calls", 1.2, False),
        ("CPU", 8.0, True),
    ]
    assert written["figures"][0]["note"] == "why"
    assert written["seeds"] == [1]
    assert written["cpu"]["machine"]
