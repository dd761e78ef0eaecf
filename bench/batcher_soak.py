"""Faults in virtual time: `python -m bench.batcher_soak` plays 10,000 seeded schedules against the batcher's core.

Each is the one of `tests/dataplane/test_batcher.py`: arrivals, callers who go away, calls that fail or never end, and
a drain in the middle. A schedule fails when anybody is not answered once, with the right answer or a typed error,
within the deadline (design invariant 8).
"""

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from random import Random

from bench._harness import Figure, console, progress, publish
from tests.dataplane.test_batcher import REQUESTS_OF_A_SOAK, soak
from tests.virtual_time import run_virtually

SCHEDULES = 10_000


def broken(seed: int) -> str | None:
    """What went wrong with this seed."""
    try:
        run_virtually(soak(Random(seed)))
    except Exception as error:  # whatever it is, the schedule has failed
        return f"seed {seed}: {type(error).__name__}: {error}"
    return None


def play(seeds: Sequence[int]) -> list[str]:
    """What went wrong, on all cores."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        found = pool.imap_unordered(broken, seeds, chunksize=20)
        return [why for _ in progress(seeds, "schedules") if (why := next(found)) is not None]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m bench.batcher_soak", description=__doc__)
    parser.add_argument("--schedules", type=int, default=SCHEDULES)
    parser.add_argument("--first-seed", type=int, default=1000)
    given = parser.parse_args()
    wrong = play(range(given.first_seed, given.first_seed + given.schedules))
    figures = [
        Figure("schedules", given.schedules, ""),
        Figure("requests", given.schedules * REQUESTS_OF_A_SOAK, ""),
        Figure("schedules that broke invariant 8", len(wrong), "", 0),
    ]
    publish("batcher_soak", figures, first_seed=given.first_seed, broken=wrong[:20])
    if wrong:
        console.print("\n".join(wrong[:20]), style="bold red")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
