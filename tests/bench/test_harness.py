"""The harness of the benchmarks: percentiles, aims, and the results file."""

import json
from pathlib import Path

import pytest

from bench import _harness
from bench._harness import Figure, percentile, publish


def test_percentiles_are_by_nearest_rank() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (0.5, 1, 50, 99, 99.1, 100)] == [1, 1, 50, 99, 100, 100]
    assert percentile([7.0], 99) == 7
    assert percentile([3.0, 1.0, 2.0], 50) == 2


@pytest.mark.parametrize("percent", [0, -1, 100.1])
def test_a_percentage_out_of_range_is_refused(percent: float) -> None:
    with pytest.raises(ValueError, match="percent"):
        percentile([1.0], percent)


def test_a_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


def test_an_aim_is_met_up_to_and_including_it() -> None:
    assert Figure("a", 50, "ms", 50).met is True
    assert Figure("a", 50.1, "ms", 50).met is False
    assert Figure("a", 50, "ms").met is None


def test_the_results_file_has_every_figure_and_where_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_harness, "RESULTS", tmp_path / "results")
    figures = [Figure("p50", 41.23456, "ms", 50), Figure("p99", 300, "ms", 200), Figure("step", 5, "ms")]
    path = publish("some_bench", figures, incidents=3)
    assert path == tmp_path / "results" / "some_bench.json"
    written = json.loads(path.read_text())
    assert written["figures"] == [
        {"name": "p50", "value": 41.235, "unit": "ms", "aim": 50, "met": True},
        {"name": "p99", "value": 300, "unit": "ms", "aim": 200, "met": False},
        {"name": "step", "value": 5, "unit": "ms", "aim": None, "met": None},
    ]
    assert written["incidents"] == 3
    assert written["machine"]["cores"] >= 1
    assert {"python", "temporalio", "moto"} <= written["versions"].keys()
