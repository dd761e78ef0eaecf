"""Scenario 3 as a demo: a batch window that is too long, on the real batcher, with real requests."""

import asyncio
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from activities.cloudwatch import Asked, CloudWatchActivities
from activities.settings import load_policy
from domain.incident import LeverName, LeverStatus
from domain.knobs import KnobName
from domain.messages import incident_id
from domain.metrics import MetricName
from domain.override import OverrideEnd, OverrideRecord
from domain.people import Role
from domain.runbooks.latency import WINDOW_INCREASED
from ops.demo_stage import MODEL, DemoFailed, DemoResult, Options, Show
from ops.demo_throttle import Throttle
from ops.stack import TO_START, Stack, StackError, StackOptions, coming
from ops.views import cleaned

SEEN_AT = timedelta(hours=20)
"""Tuesday's time of day once the stack is up."""
TUESDAY = 1
TOO_LONG_MS, GOOD_MS = 500, 150
MOST_SPEED = 3.0
"""A metric period is 20 s then, and has more than 300 requests."""


def policy(window_ms: int) -> str:
    """The policy file of the demo, with that batch window."""
    return f"""\
version: "batch window {window_ms} ms"
batcher:
  controller: fixed  # ours would make no such fault
  max_lost_share: 0.15  # with less the batcher would stop packing by itself, before any alarm
  publish_every: PT2S
knobs:
  batch_window_ms: {window_ms}
leases:
  renew_every: PT1M  # a standing override looks for the configured value as often
"""


@dataclass(frozen=True)
class Signal:
    """A row of scenario 3's detection table. Bounds say what counts as the runbook's figure."""

    name: str
    written: str
    """The runbook's figure in the incident, ..."""
    bounds: tuple[float, float]
    normal: str
    """... and what it calls normal."""
    normal_bounds: tuple[float, float]
    unit: str = "ms"


_ANY = (0.0, math.inf)
SIGNALS: Mapping[str, Signal] = {
    "p99": Signal("RequestLatencyP99", "4,200", (4_000, 5_000), "< 3,000", (0, 2_999.9)),
    "sonnet": Signal("Bedrock, Sonnet P99", "2,100", (1_950, 2_300), "2,000", (1_850, 2_200)),
    "haiku": Signal("Bedrock, Haiku P99", "350", (270, 450), "300", _ANY),
    "throttles": Signal("InvocationThrottles", "0", (0, 0), "0", (0, 0), ""),
    "window": Signal("batch window", "500", (500, 500), "150", (150, 150)),
    "fill": Signal("requests in a batch", "7.2", (6.2, 8), "3.1", (2.5, 3.8), ""),
    "wait": Signal("queue wait P99", "480", (430, 600), "140", (100, 300)),
    "cpu": Signal("ECS CPU", "28 %", (24, 32), "", _ANY, "%"),
}
EXCEPTIONS = (
    "What of the runbook's table cannot hold together (docs/simulator.md has the arithmetic):",
    "- 15 % of the requests over 4 s, beside a P99 of 4.2 s: here 2 to 3 %.",
    "- 4.2 s as a sum: the stages' P99s come to 2.9 s at most. Here full prompts lose answers, which are asked again.",
    "- Haiku at 300 ms again: its calls do not depend on the window.",
)


def shown(value: float | None, unit: str) -> str:
    """A measured figure."""
    return "no data" if value is None else f"{round(value, 0 if unit else 1):,g} {unit}".rstrip()


def detection(slow: Mapping[str, float | None], mended: Mapping[str, float | None]) -> tuple[Table, list[str]]:
    """The runbook's detection table, row by row, beside what was measured; and the rows that do not hold."""
    table = Table(title="Scenario 3's detection table, measured", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "signal", "runbook", "measured", "normal", f"at {GOOD_MS} ms"):
        table.add_column(column, justify="left" if column in ("", "signal") else "right")
    wrong = []
    for name, signal in SIGNALS.items():
        pairs = ((slow[name], signal.bounds), (mended[name], signal.normal_bounds))
        holds = all(value is not None and low <= value <= high for value, (low, high) in pairs)
        if not holds:
            wrong.append(signal.name)
        mark = Text("yes" if holds else "NO", "bold green" if holds else "bold red")
        figures = (shown(slow[name], signal.unit), signal.normal, shown(mended[name], signal.unit))
        table.add_row(mark, signal.name, signal.written, *figures)
    return table, wrong


class BatchLatency(Throttle):
    """A batch window of 500 ms, which somebody configured to save calls, and the evening's traffic."""

    TITLE = f"Scenario 3: the batch window went from {GOOD_MS} to {TOO_LONG_MS} ms, and the evening is slow."
    WHY = f"{TOO_LONG_MS} ms is what is configured, so going back would bring the fault back"
    KEY: ClassVar[str] = "latency-regression:mangaassist"
    WORKFLOW_ID = incident_id(KEY)
    GIVE_UP_AFTER = timedelta(minutes=20)  # it needs about 14
    EXPLORE = (f"runbooks incident show {KEY} --all", "runbooks override list")
    SPEED = 2.5

    @classmethod
    def stack_options(cls, options: Options) -> StackOptions:
        """A Tuesday evening, the batcher, and a policy with the window that is too long.

        Raises:
            StackError: so fast that a metric period would have too few requests.
        """
        if options.speed > MOST_SPEED:
            raise StackError(
                f"speed {options.speed:g}: from 1 to {MOST_SPEED:g} is allowed, because requests are real and each "
                "metric period needs 300 of them for its P99"
            )
        return StackOptions(
            state_dir=options.state_dir,
            speed=options.speed,
            business_start=coming(TUESDAY, datetime.now(UTC)) + SEEN_AT - TO_START * options.speed,
            batcher=True,
            real_requests=True,
            policy=policy(TOO_LONG_MS),
            env={"RUNBOOKS_SIMULATOR_SCENARIO": "batch-latency"},
        )

    def __init__(self, stack: Stack, options: Options, show: Show, result: DemoResult) -> None:
        super().__init__(stack, options, show, result)
        self._metrics = CloudWatchActivities(
            self.aws.cloudwatch(), ecs_cluster=self.settings.ecs_cluster, ecs_service=self.settings.ecs_service
        )
        self._override_id = ""
        self._override_said = 0
        self._configured_at: datetime | None = None
        self._standing: OverrideRecord | None = None

    async def play(self) -> None:
        """From slow answers to the configured window that makes them fast, and nothing held any more."""
        await self._begin(
            f"It is Tuesday, {SEEN_AT // timedelta(hours=1)}:00, and the batcher waits {TOO_LONG_MS} ms for mates: "
            "the cost initiative's change. Requests and waits are real; only alarm periods are shortened."
        )
        await self.until("the alarm opens an incident", lambda: self._incident is not None)
        self.show.line(f"The alarm opened an incident: {self._record.incident_id}", "bold red")
        await self.until("the cause is found", lambda: self._record.diagnosis is not None)
        assert self._record.diagnosis is not None
        if [cause.id for cause in self._record.diagnosis.causes] != [WINDOW_INCREASED]:
            raise DemoFailed(f"Another cause was found: {self._record.diagnosis.sentence}", self.hint())
        await self.until("the window is short", lambda: self._record.mitigated_at is not None)
        slow = await self._measured(self._record.opened_at)
        await self.until("P99 is in its budget and stays there", self._recovered)
        self._detection(slow, await self._measured(datetime.now(UTC)))
        await self.see_ui("While it waits for a decision, the Temporal UI shows", self._record.run_id)
        await self._keep()
        await self._configure()
        await self.until("the standing override has seen that, and ends", self._caught_up)
        await self.until("the service has been seen without any lease", self._seen_configured)
        await self.until("its workflow is complete", lambda: self._incident is not None and bool(self._incident.ended))
        await self._check()

    # ------------------------------------------------------------------ what the runbook's table says

    async def _measured(self, until: datetime) -> dict[str, float | None]:
        """Every signal in the newest period that was over then."""
        models = {name: model.model_id for name, model in self.policy.models.items()}
        wanted: dict[str, Asked] = {
            "p99": (MetricName.REQUEST_LATENCY_P99, ()),
            "sonnet": (MetricName.INVOCATION_LATENCY, (models["sonnet"],)),
            "haiku": (MetricName.INVOCATION_LATENCY, (models["haiku"],)),
            "throttles": (MetricName.INVOCATION_THROTTLES, (models["sonnet"],)),
            "window": (MetricName.BATCH_WINDOW, (MODEL,)),
            "fill": (MetricName.BATCH_FILL_RATE, (MODEL,)),
            "wait": (MetricName.QUEUE_WAIT_TIME, (MODEL,)),
            "cpu": (MetricName.CPU_UTILIZATION, (self.settings.ecs_cluster, self.settings.ecs_service)),
        }
        period = self.policy.metrics.period
        lookback = self.policy.evidence.metric_lookback
        found, _ = await asyncio.to_thread(self._metrics.series, wanted, period, lookback)
        over = {name: [at for at in series if at + period <= until] for name, series in found.items()}
        values = {name: found[name][max(times)] if times else None for name, times in over.items()}
        return values | {"throttles": values["throttles"] or 0}  # none: Bedrock publishes nothing

    def _detection(self, slow: Mapping[str, float | None], mended: Mapping[str, float | None]) -> None:
        """Show the runbook's detection table beside what was measured.

        Raises:
            DemoFailed: a row does not hold, and is none of the known exceptions.
        """
        table, wrong = detection(slow, mended)
        self.show.out.print(table)
        self.show.line("\n".join(EXCEPTIONS), "dim")
        if wrong:
            raise DemoFailed(f"Not as the runbook's table has it: {', '.join(wrong)}.", self.hint())

    # ------------------------------------------------------------------ what people do

    async def _keep(self) -> None:
        """The lever becomes a standing override: by the very command that a person would use, or by that person."""
        arguments = (
            *("incident", "keep", self.KEY, str(LeverName.BATCH_WINDOW), "--why", self.WHY),
            *("--token-file", str(self.stack.tokens[Role.APPROVER])),
        )
        if self.options.interactive:
            shown_ = f"  source {self.stack.state_dir / 'env'}\n  {shlex.join(['runbooks', *arguments])}"
            self.show.line(f"It is your decision. In another shell:\n{shown_}", "bold cyan")
            await self.until("you decide", lambda: not self._waits_for_decision(), forever=True)
        else:
            await self.command(*arguments)
        await self.until("it stands as an override", lambda: self._standing is not None)

    async def _configure(self) -> None:
        """The configured value becomes the good one: what a merge and a deployment do."""
        self.show.line(f"The policy file under version control is changed: batch_window_ms {GOOD_MS}.", "bold cyan")
        self.stack.policy_file.write_text(policy(GOOD_MS))
        self.policy = load_policy(self.stack.policy_file, self.clock)
        self.show.line(
            "The worker reads it by itself; the batcher is started anew with it. Its users get the fallback text for "
            "those seconds: a deployment of several starts a new one first.",
            "cyan",
        )
        await self.stack.restart("batcher")
        self._configured_at = datetime.now(UTC)

    async def look(self) -> None:
        """The incident, and the standing override that comes of it."""
        await super().look()
        if self._incident is None or not any(lever.status is LeverStatus.KEPT for lever in self._record.levers):
            return
        if self._standing is None:
            rows = await self.service.list_overrides()
            found = [row.override_id for row in rows if row.knob == KnobName.BATCH_WINDOW_MS]
            if not found:
                return
            self._override_id = found[0]
        self._standing = cleaned((await self.service.get_override(self._override_id)).record)
        for entry in self._standing.timeline[self._override_said :]:
            self.show.entry(entry)
        self._override_said = len(self._standing.timeline)

    def _caught_up(self) -> bool:
        return self._standing is not None and self._standing.ended_at is not None

    def _seen_configured(self) -> bool:
        """Whether a whole metric period of the batcher that was started anew is over."""
        assert self._configured_at is not None
        load = self.load
        return load is not None and load.observed_at - self.policy.metrics.period >= self._configured_at

    def _more_checks(self) -> Sequence[tuple[str, bool, str]]:
        p99 = self.load.p99_ms if self.load is not None else None
        within = p99 is not None and p99 < self.policy.latency.max_p99_ms
        words = f"P99 {shown(p99, 'ms')} with {GOOD_MS} ms configured and no lease"
        return (("detected", True, "every row of the runbook's table"), ("cured", within, words))

    def _reverted(self) -> tuple[bool, str]:
        """The lever was kept, and what it became ended because the configured value caught up."""
        lever = self._record.lever(LeverName.BATCH_WINDOW)
        kept = lever is not None and lever.status is LeverStatus.KEPT
        end = self._standing.end if self._standing is not None else None
        words = f"the lever was {lever.status if lever else 'not taken'}; its standing override: {end or 'not ended'}"
        return kept and end is OverrideEnd.CAUGHT_UP, words
