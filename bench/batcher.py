"""Our batcher beside its peers, the runbook's table and a limit: `python -m bench.batcher --peers DIR`.

Calls per request and latency in virtual time: the clock jumps to the next timer, so a run is the same on any machine.
Every batcher has the same arrivals and latencies. CPU per request is real time and says something on an idle machine
only: `--only cpu` measures it alone, and puts its rows into the results that are there.

The peers are no dependencies of the product. Into a folder of their own:
`.venv/bin/pip install --no-deps --target DIR -r requirements-bench-peers.lock`. Those that are missing are left out.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from bench._batchers import (
    CONTENDERS,
    NONE,
    OURS,
    PEER_CONTENDERS,
    PEERS,
    TABLE,
    contender,
    find_peers,
    fixed,
)
from bench._batching_cpu import measure_cpu
from bench._batching_worlds import (
    FIXED_SECONDS,
    P99_SECONDS,
    SIZE,
    SLO_SECONDS,
    Backend,
    Refused,
    Trouble,
    World,
    fewest_calls,
    fewest_calls_without_foresight,
)
from bench._harness import RESULTS, Figure, console, percentile, progress, publish, result, write
from bench._harness import show as show_figures
from domain.batching import RequestRefused
from tests.virtual_time import run_virtually

SEEDS = tuple(int.from_bytes(sha256(f"bench.batcher, anew {n}".encode()).digest()[:3]) for n in range(5))
"""From a text, so that nobody has picked them; the batcher was developed on others."""
STEADY = (
    World("5/s", ((5, 2400),)),
    World("12/s", ((12, 1800),)),
    World("60/s", ((60, 360),)),
    World("200/s", ((200, 120),)),
)
MIXED = World("mixed", tuple((rate, 120.0) for rate in (12, 60, 12, 1, 5, 200, 12)))
GROWING = (
    World("12/s, +3 % an item", ((12, 1800),), growth=0.03),
    World("12/s, +10 % an item", ((12, 1800),), growth=0.1),
)
TROUBLE_BEGIN, TROUBLE_END = 600.0, 720.0
BACK_SECONDS = 30.0
"""After trouble's end all is to be normal within so long."""
FEW_SLOTS = World("8 slots, 30/s", ((30, 600),), slots=8)
TROUBLED = (
    World("brown-out", ((12, 960),), trouble=Trouble(TROUBLE_BEGIN, TROUBLE_END, slower=3)),
    World("brown-out, 8 slots, 30/s", ((30, 960),), slots=8, trouble=Trouble(TROUBLE_BEGIN, TROUBLE_END, slower=3)),
    World("throttled to 2 calls/s", ((30, 960),), trouble=Trouble(TROUBLE_BEGIN, TROUBLE_END, calls_per_second=2)),
)
HINDSIGHT_SECONDS = (0.6, 0.7, 0.8, 0.9)
"""Windows of our own core, fixed: what the best one would have been is known afterwards only."""
BENTO_WORLDS = {"BentoML": (*STEADY[1:], MIXED), "BentoML, few slots": (STEADY[1], GROWING[1])}
"""It polls every millisecond, which takes long even in virtual time: it is run here only, with the first seed."""
HUNG_SECONDS = 600.0
"""A run that does not end so long after the last request fails."""
BUSIEST_WITHOUT_BATCHING = 40
"""Requests a second beyond which 64 slots do not carry a call for each: not run."""


@dataclass(frozen=True)
class Run:
    """What one batcher did in one world with one seed."""

    world: str
    batcher: str
    seed: int
    calls_per_request: float
    fill: float
    p50_seconds: float
    """Of the total, the stages outside the batcher included."""
    p99_seconds: float
    refused_share: float
    window_changes_per_hour: float
    """After the first 5 minutes."""
    trouble_p99_seconds: float | None = None
    """Of the requests that came during the trouble and were answered."""
    after_p99_seconds: float | None = None
    """Of those that came later than `BACK_SECONDS` after it."""


def play(world: World, name: str, seed: int) -> Run:
    """One batcher in one world."""
    return run_virtually(_play(world, name, seed))


async def _play(world: World, name: str, seed: int) -> Run:
    loop = asyncio.get_running_loop()
    arrivals = world.arrivals(seed)
    backend = Backend(world, seed, len(arrivals))
    made = fixed(float(name.split()[1])) if name.startswith("fixed ") else contender(name)
    asked = made(world, backend)
    answered: list[tuple[float, float]] = []
    refused = 0

    async def one(number: int) -> None:
        nonlocal refused
        came = loop.time()
        try:
            await asked.ask(number)
        except (RequestRefused, Refused):
            refused += 1
        else:
            answered.append((came, loop.time() - came + FIXED_SECONDS))

    async with asyncio.timeout(arrivals[-1] + HUNG_SECONDS), asyncio.TaskGroup() as everybody:
        for number, at in enumerate(arrivals):
            await asyncio.sleep(at - loop.time())
            everybody.create_task(one(number))
    left = asyncio.all_tasks() - {asyncio.current_task()}  # a peer's own
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    totals = [total for _, total in answered]
    settled = [at for at, _ in asked.windows if at > 300]
    trouble = world.trouble
    return Run(
        world=world.name,
        batcher=name,
        seed=seed,
        calls_per_request=backend.calls / max(1, backend.carried),
        fill=backend.carried / max(1, backend.calls),
        p50_seconds=percentile(totals, 50),
        p99_seconds=percentile(totals, 99),
        refused_share=refused / len(arrivals),
        window_changes_per_hour=len(settled) / max(1.0, arrivals[-1] - 300) * 3600,
        trouble_p99_seconds=None
        if trouble is None
        else percentile([t for at, t in answered if trouble.begin <= at < trouble.end], 99),
        after_p99_seconds=None
        if trouble is None
        else percentile([t for at, t in answered if at >= trouble.end + BACK_SECONDS], 99),
    )


def limit(world: World, seed: int) -> Run:
    """The clairvoyant one; its latencies are not drawn, the share over the SLO is 1 % by its definition."""
    arrivals = world.arrivals(seed)
    calls = fewest_calls(world, arrivals) / len(arrivals)
    return Run(world.name, LIMIT, seed, calls, 1 / calls, 0, SLO_SECONDS, 0, 0)


def without_foresight(world: World, seed: int) -> Run:
    """Who knows rate and latency, and not what comes."""
    arrivals = world.arrivals(seed)
    calls = fewest_calls_without_foresight(world, arrivals) / len(arrivals)
    return Run(world.name, NO_FORESIGHT, seed, calls, 1 / calls, 0, SLO_SECONDS, 0, 0)


LIMIT, NO_FORESIGHT = "clairvoyant limit", "best without foresight"
Job = tuple[World, str, int]


def jobs(peers: Iterable[str], seeds: tuple[int, ...]) -> list[Job]:
    """What is to be run, the longest first."""
    there = [name for name in CONTENDERS if name not in PEER_CONTENDERS or PEER_CONTENDERS[name][0] in peers]
    found: list[Job] = []
    bento = {(name, world.name, seeds[0]) for name, worlds in BENTO_WORLDS.items() for world in worlds}
    for seed in seeds:
        for world in (*STEADY, MIXED, *GROWING, FEW_SLOTS, *TROUBLED):
            busiest = max(rate for rate, _ in world.phases)
            names = list(there)
            if world.trouble is not None:
                names = [OURS, TABLE] if world is TROUBLED[-1] else [name for name in names if name != NONE]
            if busiest > BUSIEST_WITHOUT_BATCHING or world.slots < 64:
                names = [name for name in names if name != NONE]
            names = [name for name in names if not name.startswith("BentoML") or (name, world.name, seed) in bento]
            if world is MIXED:
                names += [f"fixed {seconds}" for seconds in HINDSIGHT_SECONDS]
            if world in (*STEADY, MIXED, *GROWING):
                names.append(LIMIT)
            if world in STEADY[:2]:
                names.append(NO_FORESIGHT)
            found += [(world, name, seed) for name in names]
    return sorted(found, key=lambda job: not job[1].startswith("BentoML"))


def run_one(job: Job, folder: Path | None) -> Run:
    """In a process of its own."""
    find_peers(folder)
    world, name, seed = job
    if name in (LIMIT, NO_FORESIGHT):
        return (limit if name == LIMIT else without_foresight)(world, seed)
    return play(world, name, seed)


def run_all(todo: list[Job], folder: Path | None) -> list[Run]:
    """On all cores."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(run_one, job, folder) for job in todo]
        done = progress_of(waiting)
    order = {(world.name, name, seed): n for n, (world, name, seed) in enumerate(todo)}
    return sorted(done, key=lambda run: (run.seed, order[run.world, run.batcher, run.seed]))


def progress_of(waiting: list) -> list[Run]:  # type: ignore[type-arg]
    """Their results, with a bar that moves on."""
    ready = as_completed(waiting)
    return [next(ready).result() for _ in progress(waiting, "worlds and batchers")]


# ---------------------------------------------------------------- figures


class Runs:
    """Means over the seeds."""

    def __init__(self, runs: list[Run]) -> None:
        self._runs: dict[tuple[str, str], list[Run]] = defaultdict(list)
        for run in runs:
            self._runs[run.world, run.batcher].append(run)

    def names(self, world: World) -> list[str]:
        """Who was run there, in the order of `CONTENDERS`."""
        order = [*CONTENDERS, *(f"fixed {seconds}" for seconds in HINDSIGHT_SECONDS), NO_FORESIGHT, LIMIT]
        return [name for name in order if (world.name, name) in self._runs]

    def all(self, world: World, name: str) -> list[Run]:
        """By seed."""
        return self._runs[world.name, name]

    def calls(self, world: World, name: str) -> float:
        """Calls per request."""
        return mean(run.calls_per_request for run in self.all(world, name))

    def p99(self, world: World, name: str) -> float:
        """Of the total, in seconds."""
        return mean(run.p99_seconds for run in self.all(world, name))

    def share(self, world: World, ours: str, others: str) -> float:
        """Calls of the one, as a multiple of the other's, seed by seed."""
        theirs = {run.seed: run for run in self.all(world, others)}
        pairs = [(run, theirs[run.seed]) for run in self.all(world, ours) if run.seed in theirs]
        return mean(one.calls_per_request / other.calls_per_request for one, other in pairs)


def figures(runs: Runs) -> list[Figure]:
    """Against the aims."""
    found = []
    for world, most in zip(STEADY, (1.25, 1.1, 1.1, 1.1), strict=True):
        note = ""
        if NO_FORESIGHT in runs.names(world):
            least = runs.share(world, NO_FORESIGHT, LIMIT)
            note = f"the best rule for who knows rate and latency exactly, and not what comes: {least:.3f}x"
        ratio = runs.share(world, OURS, LIMIT)
        found.append(Figure(f"{world.name}: calls, to the clairvoyant limit", ratio, "x", most, note))
        found.append(Figure(f"{world.name}: total P99", runs.p99(world, OURS), "s", SLO_SECONDS))
        changes = mean(run.window_changes_per_hour for run in runs.all(world, OURS))
        found.append(Figure(f"{world.name}: window changes", changes, "an hour", 10))
    found.append(Figure("mixed: calls, to the clairvoyant limit", runs.share(MIXED, OURS, LIMIT), "x"))
    ratio, note = runs.share(MIXED, OURS, TABLE), _floor(runs, TABLE)
    found.append(Figure("mixed: calls, to the table", ratio, "x", 0.5, note))
    ours_p99 = runs.p99(MIXED, OURS)
    found.append(Figure("mixed: total P99", ours_p99, "s", SLO_SECONDS))
    for kind, names in (("peer", list(PEER_CONTENDERS)), ("window in hindsight", [*PEER_CONTENDERS, *_fixed_names()])):
        static = [name for name in names if name in runs.names(MIXED) and not name.startswith("BentoML")]
        best = min(
            (n for n in static if runs.p99(MIXED, n) <= ours_p99), key=lambda n: runs.calls(MIXED, n), default=""
        )
        if best:
            aim, ratio = (0.9 if kind == "peer" else None), runs.share(MIXED, OURS, best)
            what = f"mixed: calls, to the best static {kind} ({best})"
            found.append(Figure(what, ratio, "x", aim, _floor(runs, best)))
    for world in GROWING:
        found.append(Figure(f"{world.name}: total P99", runs.p99(world, OURS), "s", SLO_SECONDS))
        keepers = [n for n in runs.names(world) if n not in (OURS, LIMIT) and runs.p99(world, n) <= SLO_SECONDS]
        if keepers:
            best = min(keepers, key=lambda n: runs.calls(world, n))
            found.append(
                Figure(
                    f"{world.name}: calls, to the best that keeps it ({best})", runs.share(world, OURS, best), "x", 1
                )
            )
        found.append(Figure(f"{world.name}: calls, to the clairvoyant limit", runs.share(world, OURS, LIMIT), "x"))
    found.append(Figure(f"{FEW_SLOTS.name}: total P99", runs.p99(FEW_SLOTS, OURS), "s", SLO_SECONDS))
    for world in TROUBLED:
        ours = runs.all(world, OURS)
        one_call = P99_SECONDS * (world.trouble.slower if world.trouble else 1)
        during = mean(run.trouble_p99_seconds or 0 for run in ours)
        after = mean(run.after_p99_seconds or 0 for run in ours)
        found.append(Figure(f"{world.name}: P99 of the admitted meanwhile", during, "s", SLO_SECONDS + one_call))
        found.append(Figure(f"{world.name}: P99 from {BACK_SECONDS:g} s after it", after, "s", SLO_SECONDS))
        found.append(Figure(f"{world.name}: shed", mean(run.refused_share for run in ours) * 100, "%"))
    return found


def _floor(runs: Runs, other: str) -> str:
    full = 1 / SIZE / runs.calls(MIXED, other)
    return f"the clairvoyant limit: {runs.share(MIXED, LIMIT, other):.3f}x; nothing but full batches: {full:.3f}x"


def _fixed_names() -> list[str]:
    return [f"fixed {seconds}" for seconds in HINDSIGHT_SECONDS]


def show(runs: Runs) -> None:
    """Every batcher in every world."""
    for world in (*STEADY, MIXED, *GROWING, FEW_SLOTS, *TROUBLED):
        table = Table(
            "batcher", "calls/request (seeds)", "total P99 s (seeds)", "shed %", "changes/h", title=world.name
        )
        for name in runs.names(world):
            several = runs.all(world, name)
            table.add_row(
                name,
                _spread([run.calls_per_request for run in several]),
                "" if name in (LIMIT, NO_FORESIGHT) else _spread([run.p99_seconds for run in several]),
                f"{mean(run.refused_share for run in several) * 100:.1f}",
                f"{mean(run.window_changes_per_hour for run in several):.0f}" if name in (OURS, TABLE) else "",
            )
        console.print(table)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else f"{values[0]:.3f}"


def merge_cpu(cpu: dict[str, Any]) -> None:
    """Into the results: its rows beside the others, and with what it was measured as `cpu`."""
    path = RESULTS / "batcher.json"
    whole = json.loads(path.read_text()) if path.exists() else {"figures": []}
    rows = cpu.pop("figures")
    measured = {row["name"] for row in rows}
    whole["figures"] = [row for row in whole["figures"] if row["name"] not in measured] + rows
    write("batcher", whole | {"cpu": cpu})


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m bench.batcher", description=__doc__)
    parser.add_argument("--peers", type=Path, help="the folder that the peers were installed into")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", choices=("latency", "cpu"), help="measure this alone")
    given = parser.parse_args()
    peers = find_peers(given.peers)
    absent = sorted(set(PEERS) - set(peers))
    if absent:
        console.print(f"absent, and left out: {', '.join(absent)}; how to install them: --help", style="bold yellow")
    about = {"peers": peers, "absent": absent}
    missed: list[str] = []
    if given.only != "cpu":
        done = run_all(jobs(peers, tuple(given.seeds)), given.peers)
        runs = Runs(done)
        show(runs)
        found = figures(runs)
        missed += [figure.name for figure in found if figure.met is False]
        publish("batcher", found, **about, seeds=given.seeds, runs=[asdict(run) for run in done])
    if given.only != "latency":
        load_before = round(os.getloadavg()[0], 2)
        found = measure_cpu(peers)
        missed += [figure.name for figure in found if figure.met is False]
        show_figures(found)
        merge_cpu(result(found, **about, load_average_before=load_before))
    if missed:
        console.print(f"over its aim: {'; '.join(missed)}", style="bold red")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
