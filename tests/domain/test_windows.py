"""Window controllers on drawn arrivals and latencies, without a batcher."""

import math
from itertools import pairwise
from random import Random

import pytest

from domain.windows import FixedWindow, SloWindow, TableRow, TableWindow, Window

SIZE, SLOTS = 8, 64
MEDIAN, P99 = 1.5, 2.1
SIGMA = math.log(P99 / MEDIAN) / 2.326
SLO, FIXED, OVER = 2.9, 0.36, 0.0085
ROWS = (TableRow(5000, 0.5), TableRow(15_000, 0.25), TableRow(math.inf, 0.1))


def slo() -> SloWindow:
    return SloWindow(slo_seconds=SLO, over_share=OVER, fixed_seconds=FIXED, size=SIZE, most_seconds=1)


def latency(random: Random, size: int, growth: float = 0) -> float:
    return MEDIAN * math.exp(SIGMA * random.gauss(0, 1)) * (1 + growth * (size - 1))


def steady(
    controller: SloWindow, rate: float, seconds: int, growth: float = 0, slots: int = SLOTS, begin: int = 0
) -> list[Window]:
    """What it decides in a steady time, one look a second."""
    random = Random(int(rate * 10) + begin)
    windows = []
    for at in range(begin, begin + seconds):
        arrived = sum(random.random() < rate / 1000 for _ in range(1000))
        window = controller.look(at, arrived, slots)
        windows.append(window)
        size = max(1, min(window.size, round(1 + rate * window.seconds)))
        for _ in range(max(1, arrived // size)):
            controller.served(at, size, latency(random, size, growth))
    return windows


def changes(windows: list[Window]) -> int:
    return sum(one != other for one, other in pairwise(windows))


@pytest.mark.parametrize("rate", [5, 12])
def test_it_waits_as_long_as_the_slo_allows_and_stays_there(rate: float) -> None:
    windows = steady(slo(), rate, 1200)
    assert windows[0] == Window(0, SIZE, "nothing is known yet")
    assert 0.4 < windows[-1].seconds < 0.9
    assert windows[-1].size == SIZE
    assert changes(windows[600:]) <= 2, "10 an hour at most"


def test_it_waits_for_nobody_where_nobody_comes() -> None:
    assert steady(slo(), 0.3, 900)[-1].seconds == 0


def test_latency_that_grows_with_the_batch_makes_batches_small() -> None:
    flat, growing = steady(slo(), 12, 900)[-1], steady(slo(), 12, 900, growth=0.1)[-1]
    assert growing.size < SIZE or growing.seconds < flat.seconds / 1.5


def test_a_slow_backend_leaves_nothing_to_wait_with_and_too_few_slots_make_batches_full() -> None:
    controller = slo()
    steady(controller, 12, 300)
    random = Random(1)
    for at in range(300, 420):
        window = controller.look(at, 12, SLOTS)
        for _ in range(3):
            controller.served(at, 4, 3 * latency(random, 4))
    assert window.seconds == 0
    assert steady(slo(), 60, 60, slots=8)[-1].size == SIZE


def test_a_change_of_the_rate_is_seen_within_seconds() -> None:
    controller = slo()
    assert steady(controller, 0.3, 600)[-1].seconds == 0
    busy = steady(controller, 60, 15, begin=600)[-1]
    assert busy.seconds > 0.1
    assert steady(controller, 0.3, 60, begin=615)[-1].seconds == 0


def test_growth_is_remembered_while_one_size_is_sent_and_a_slow_backend_is_no_growth() -> None:
    controller, random = slo(), Random(3)
    for at in range(60):
        controller.look(at, 12, SLOTS)
        for size in (1, 2, 4, 8):
            controller.served(at, size, latency(random, size, 0.1))
    for at in range(60, 660):
        window = controller.look(at, 12, SLOTS)
        for _ in range(5):
            controller.served(at, 2, latency(random, 2, 0.1))
    assert window.size in (2, 3), "as the growth by 10 % leaves it"
    controller = slo()
    steady(controller, 12, 300)
    for at in range(300, 330):
        for _ in range(3):
            controller.served(at, 8, 1.3 * latency(random, 8))
        window = controller.look(at, 12, SLOTS)
    assert (window.seconds, window.size) == (0, SIZE), "nothing to wait with, and no reason for small batches"


def test_the_table_is_as_written_and_latches_unless_its_limit_is_out_of_reach() -> None:
    def table(breach: float) -> TableWindow:
        return TableWindow(ROWS, breach_p99_seconds=breach, breach_window_seconds=0.05, size=SIZE, fixed_seconds=FIXED)

    for tokens_per_second, seconds in ((4999, 0.5), (5000, 0.25), (14_999, 0.25), (15_001, 0.1)):
        controller = table(breach=9)
        for second in range(10):
            controller.answered(second, 2.0, tokens_per_second)
        assert controller.look(10, 0, SLOTS).seconds == seconds, tokens_per_second
    latched = table(breach=2.5)
    for second in range(10):
        latched.answered(second, 2.2, 4000)
    window = latched.look(10, 0, SLOTS)
    assert window.seconds == 0.05
    assert window.why == "total P99 2.56 s is over 2.5 s"


def test_fixed_is_fixed() -> None:
    assert FixedWindow(0.15, SIZE).look(0, 1000, SLOTS) == Window(0.15, SIZE, "fixed")
