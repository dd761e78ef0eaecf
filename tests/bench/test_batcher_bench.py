"""The batchers' benchmark: its limit is one, and its runs come out the same."""

from itertools import pairwise

from bench._batchers import NONE, OURS
from bench._batching_worlds import SIZE, World, fewest_calls
from bench.batcher import play

SHORT = World("short", ((8, 120.0),))


def test_the_limit_is_below_what_anybody_does_and_never_below_full_batches() -> None:
    arrivals = SHORT.arrivals(5)
    least = fewest_calls(SHORT, arrivals) / len(arrivals)
    ours = play(SHORT, OURS, 5)
    assert 1 / SIZE <= least < ours.calls_per_request < 0.5
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
