"""Running a batch window at peak traffic before it is deployed (scenario 3, prevention).

A data plane of its own for each window: a Redis-protocol server, the simulator and a real batcher, to which the
simulator sends real requests through every stage of an answer's way. What counts is in the batcher's own metrics and
in what the requests took. Nothing of it runs afterwards.
"""

import asyncio
import json
import math
import re
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from domain.incident import BudgetRow
from domain.knobs import KnobName, baseline_value
from domain.policy import Policy
from domain.runbooks import latency
from ops.asking import ExitCode, NotAllowed, OpsError
from ops.stack import TOKYO, Stack, StackOptions
from ops.supervisor import Say

Sample = tuple[str, frozenset[tuple[str, str]]]
"""Of a metric: its name and its labels."""

LEAST_REQUESTS = 300
"""A P99 of fewer says nothing."""
MOST_PER_SECOND, MOST_SECONDS = 200.0, 3600.0
"""What one simulator can send, and as long as anybody waits."""
MOST_UNANSWERED = 0.01
"""More requests without an answer than a P99 leaves out: then the P99 of the answers says nothing."""
WARM_UP_SECONDS = 3.0
LOOK_EVERY_SECONDS = 1.0
BEDROCK = "Bedrock, second calls included"
"""From a slot to the answers; an incident's report has Bedrock's own metric, of single calls."""
PEAK = timedelta(hours=20)
"""Time of day in Tokyo: the evening's units are in service."""


class WindowRun(BaseModel):
    """What a batcher did with one window. Calls, batches and waits are the main model's."""

    window_ms: int | None
    """The knob; None: as that batcher had it."""
    window_in_force_ms: float
    """At the end: a controller may choose less than the knob."""
    requests: int
    """With an answer."""
    unanswered: int
    calls_per_request: float
    fill: float
    """Requests in a batch, on average."""
    queue_wait_p50_ms: float
    queue_wait_p99_ms: float
    total_p50_ms: float
    total_p99_ms: float
    budget: list[BudgetRow]
    """P99 of each stage and in total, as an incident's report has it."""
    over_budget_share: float


class Verdict(BaseModel):
    """Whether the window may be deployed."""

    within_budget: bool
    why: str


class LoadTest(BaseModel):
    """A window at peak traffic, and beside it another one."""

    controller: str
    requests_per_second: float
    seconds: float
    budget_ms: float
    proposed: WindowRun
    against: WindowRun | None
    """None: a batcher that was there already."""
    verdict: Verdict


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    policy: Policy
    controller: str
    windows: tuple[int, ...]
    """What to compare with, then what is proposed."""
    batcher_url: str | None
    """A batcher that is there already, asked with the window that it has."""
    requests_per_second: float
    seconds: float

    def named(self, window_ms: int | None) -> str:
        """What is run, in words."""
        return f"the batcher at {self.batcher_url}" if window_ms is None else f"window {window_ms} ms"


def planned(
    policy: Policy,
    window_ms: int | None,
    against_ms: int | None,
    controller: str | None,
    batcher_url: str | None,
    requests_per_second: float,
    seconds: float,
) -> Plan:
    """What is to be run, checked; what is not given is as the policy has it.

    Raises:
        OpsError: USAGE; it names the option, the value and what is allowed.
    """
    if (window_ms is None) == (batcher_url is None):
        raise OpsError("Give --window-ms, or --batcher-url of one that is there.", "Nothing was run.", ExitCode.USAGE)
    if batcher_url is not None and (against_ms, controller) != (None, None):
        said = "--batcher-url: that batcher runs with the window and controller that it has."
        raise OpsError(said, "Leave out --against and --controller.", ExitCode.USAGE)
    if batcher_url is not None and not re.fullmatch(r"http://[^/?#\s]+/?", batcher_url):
        raise _wrong("--batcher-url", batcher_url, "http://HOST:PORT")
    windows = {}
    if window_ms is not None:
        configured = baseline_value(KnobName.BATCH_WINDOW_MS, policy.baseline)
        windows = {"--against": configured if against_ms is None else against_ms, "--window-ms": window_ms}
    spec = KnobName.BATCH_WINDOW_MS.spec
    for option, value in windows.items():
        if not spec.kind.takes(value, {}):
            raise _wrong(option, value, spec.kind.allowed(spec.unit, {}))
    rate = requests_per_second
    if not 0 < rate <= MOST_PER_SECOND:  # also NaN
        raise _wrong("--requests-per-second", rate, f"a number over 0, at most {MOST_PER_SECOND:g},")
    least = math.ceil(LEAST_REQUESTS / rate)
    if not least <= seconds <= MOST_SECONDS:
        allowed = f"{least} to {MOST_SECONDS:g} (a P99 needs {LEAST_REQUESTS} requests, at {rate:g} a second)"
        raise _wrong("--seconds", seconds, allowed)
    return Plan(
        policy=policy,
        controller=controller or policy.batcher.controller,
        windows=tuple(value for value in windows.values() if isinstance(value, int)),
        batcher_url=batcher_url,
        requests_per_second=rate,
        seconds=seconds,
    )


def _wrong(option: str, value: object, allowed: str) -> OpsError:
    wrong = NotAllowed(option, value, allowed)
    return OpsError(f"{option}: {value} is not allowed; {allowed} is.", "Nothing was run.", ExitCode.USAGE, wrong)


def verdict(proposed: WindowRun, budget_ms: float) -> Verdict:
    """Whether the window keeps the latency budget."""
    asked = proposed.requests + proposed.unanswered
    if not proposed.requests or proposed.unanswered > MOST_UNANSWERED * asked:
        why = f"{proposed.unanswered} of {asked} requests got no answer: the P99 of the others says nothing"
        return Verdict(within_budget=False, why=why)
    within = proposed.total_p99_ms < budget_ms
    why = f"P99 {proposed.total_p99_ms:,.0f} ms; the budget is under {budget_ms:,.0f} ms"
    return Verdict(within_budget=within, why=why)


# ---------------------------------------------------------------- the run


async def run(plan: Plan, say: Say, now: Say) -> LoadTest:
    """The windows, one after the other, under the same kind of traffic.

    Args:
        plan: what to run.
        say: receives what happens, a line each.
        now: receives what is going on at the moment.

    Raises:
        StackError, ServerNotFound, ChildFailed: a process cannot be started, or died.
        OpsError: requests were not sent, or nothing could be read.
    """
    runs: list[WindowRun] = []
    if plan.batcher_url is not None:
        await asyncio.to_thread(_read, f"{plan.batcher_url.rstrip('/')}/readyz")
    for window_ms in dict.fromkeys(plan.windows) or (None,):
        with tempfile.TemporaryDirectory(prefix="runbooks-loadtest-") as folder:
            async with Stack(_options(plan, window_ms, Path(folder)), say=say) as stack:
                what = plan.named(window_ms)
                say(f"{what}: {plan.requests_per_second:g} requests/s for {plan.seconds:g} s")
                runs.append(await stack.guard(_measured(stack, plan, window_ms, now)))
                say(f"{what}: P99 {runs[-1].total_p99_ms:,.0f} ms")
    budget_ms = plan.policy.latency.max_p99_ms
    return LoadTest(
        controller=plan.controller,
        requests_per_second=plan.requests_per_second,
        seconds=plan.seconds,
        budget_ms=budget_ms,
        proposed=runs[-1],
        against=runs[0] if plan.windows else None,
        verdict=verdict(runs[-1], budget_ms),
    )


def _options(plan: Plan, window_ms: int | None, folder: Path) -> StackOptions:
    policy = plan.policy
    if window_ms is not None:
        policy = policy.model_copy(
            update={
                "knobs": {**policy.knobs, KnobName.BATCH_WINDOW_MS: window_ms},
                "batcher": policy.batcher.model_copy(update={"controller": plan.controller}),
            }
        )
    midnight = datetime.now(TOKYO).replace(hour=0, minute=0, second=0, microsecond=0)
    return StackOptions(
        state_dir=folder,
        speed=1,
        business_start=midnight + PEAK,
        control_plane=False,
        batcher=window_ms is not None,
        batcher_url=plan.batcher_url,
        real_requests=True,
        usual_ports=False,
        policy=policy.model_dump_json(),
        env={"RUNBOOKS_SIMULATOR_SCENARIO": "batch-latency"},
    )


async def _measured(stack: Stack, plan: Plan, window_ms: int | None, now: Say) -> WindowRun:
    """The batcher under load, after a short warm-up."""
    what = plan.named(window_ms)
    requests = f"{stack.addresses.aws_endpoint_url}/_simulator/requests"
    batcher = stack.addresses.batcher_url.rstrip("/")
    now(f"{what}: warming up")
    await asyncio.to_thread(_read, requests, "POST", {"requests_per_second": plan.requests_per_second})
    await asyncio.sleep(WARM_UP_SECONDS)
    await asyncio.to_thread(_read, requests, "DELETE")
    before = counted(await asyncio.to_thread(_read, f"{batcher}/metrics"))
    began = time.monotonic()
    while (passed := time.monotonic() - began) < plan.seconds:
        await asyncio.sleep(min(LOOK_EVERY_SECONDS, plan.seconds - passed))
        seen = json.loads(await asyncio.to_thread(_read, requests))
        now(
            f"{what}: {time.monotonic() - began:.0f} of {plan.seconds:g} s · {seen['count']} requests"
            f" · P99 {seen['total']['p99_ms'] or 0:,.0f} ms"
        )
    after = counted(await asyncio.to_thread(_read, f"{batcher}/metrics"))
    return summed_up(window_ms, plan.policy, seen, before, after)


def summed_up(
    window_ms: int | None,
    policy: Policy,
    seen: Mapping[str, Any],
    before: Counter[Sample],
    after: Counter[Sample],
) -> WindowRun:
    """What the requests took, and what the batcher counted meanwhile, in one."""
    model, total = policy.main_model, seen["total"]
    batcher = Counter({sample: after[sample] - before[sample] for sample in after})
    asked, batches = (_total(batcher, f"batcher_batch_size_{what}", model=model) for what in ("sum", "count"))
    wait_p50_ms, wait_p99_ms = _quantiles(batcher, "batcher_queue_wait_seconds", model=model)
    measured = {stage.name: seen["stages"][stage.name]["p99_ms"] for stage in policy.latency.stages}
    measured |= {
        latency.QUEUE_WAIT: wait_p99_ms,
        latency.INVOCATION: _quantiles(batcher, "batcher_batch_seconds", model=model)[1],
        latency.TOTAL: total["p99_ms"],
    }
    windows = _matching(after, "batcher_window_seconds", {"model": model})
    return WindowRun(
        window_ms=window_ms,
        window_in_force_ms=1000 * max((value for _, value in windows), default=0),
        requests=seen["count"] - seen["errors"],
        unanswered=seen["errors"],
        calls_per_request=_total(batcher, "batcher_calls_total", model=model) / asked if asked else 0,
        fill=asked / batches if batches else 0,
        queue_wait_p50_ms=wait_p50_ms,
        queue_wait_p99_ms=wait_p99_ms,
        total_p50_ms=total["p50_ms"] or 0,
        total_p99_ms=total["p99_ms"] or 0,
        over_budget_share=total["over_budget_share"] or 0,
        budget=[
            row.model_copy(update={"stage": BEDROCK}) if row.stage == latency.INVOCATION else row
            for row in latency.budget(measured, model, policy)
        ],
    )


# ---------------------------------------------------------------- the batcher's own metrics


def counted(text: str) -> Counter[Sample]:
    """What `/metrics` says, by sample."""
    return Counter(
        {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    )


def _matching(batcher: Counter[Sample], name: str, labels: Mapping[str, str]) -> Iterable[tuple[dict[str, str], float]]:
    for (found, its), value in batcher.items():
        if found == name and labels.items() <= dict(its).items():
            yield dict(its), value


def _total(batcher: Counter[Sample], name: str, **labels: str) -> float:
    return sum(value for _, value in _matching(batcher, name, labels))


def _quantiles(batcher: Counter[Sample], name: str, **labels: str) -> tuple[float, float]:
    """P50 and P99 of a histogram in seconds, in ms: within a bucket along a straight line. Without samples: 0."""
    buckets: defaultdict[float, float] = defaultdict(float)
    for its, value in _matching(batcher, f"{name}_bucket", labels):
        buckets[float(its["le"])] += value
    edges = sorted(buckets)
    found = []
    for share in (0.5, 0.99):
        rank, below, quantile = share * buckets[math.inf], 0.0, 0.0
        for low, edge in zip([0.0, *edges], edges, strict=False):
            if buckets[edge] >= rank > below:
                quantile = low if edge == math.inf else low + (edge - low) * (rank - below) / (buckets[edge] - below)
                break
            below = buckets[edge]
        found.append(quantile * 1000)
    return found[0], found[1]


def _read(url: str, method: str = "GET", body: object = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            text: str = answer.read().decode()
    except OSError as error:
        said = f"{method} {url} failed: {getattr(error, 'reason', error)}."
        raise OpsError(said, "See that it runs and takes requests.", ExitCode.UNREACHABLE) from error
    return text
