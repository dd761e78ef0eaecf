"""What every `runbooks demo` shares: the stack around it, what people see, commands as they type them, the proof.

A scenario drives nothing: the simulator brings the traffic, workflows act, and the demo does what a person does, by the
command a person would type. Then it checks the result against Redis, Bedrock and the disk.
"""

import asyncio
import base64
import json
import os
import shlex
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import psutil
from pydantic import BaseModel
from redis.exceptions import RedisError
from rich.console import Group
from rich.markdown import Markdown
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from activities.cloudwatch import CloudWatchActivities
from activities.settings import load_policy
from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from domain.incident import TimelineEntry
from domain.knobs import AuditEntry, KnobName, baseline_value, effective_value
from domain.load import LoadSnapshot, total_offered
from domain.messages import load_query
from ops.service import ExitCode, OpsError, OpsService
from ops.stack import TOKYO, Stack, StackOptions
from ops.views import console, plain
from workers.clients import AwsClients
from workers.settings import Settings

MODEL = "sonnet"
"""Whose load is shown."""

LOOK_EVERY_SECONDS = 0.5
READ_LOAD_EVERY_SECONDS = 1.0
SLACK_SECONDS = 60.0
"""Real time on top of a scenario's own limit, for a slow machine."""
QUIET_SECONDS = 5.0
"""Without a terminal, the current line is printed after so long without another."""

_STYLES = {
    "alarm": "bold red",
    "lever": "magenta",
    "capacity": "magenta",
    "recovery": "bold green",
    "decision": "bold cyan",
    "page": "bold yellow",
    "phase": "bold",
}


class DemoFailed(Exception):
    """The rehearsal did not end as it should; what to do next."""

    def __init__(self, message: str, next_step: str) -> None:
        self.message = message
        self.next_step = next_step
        super().__init__(message)


class DemoResult(BaseModel):
    """What a demo found; with `--json` the last line of stdout."""

    incident_id: str
    """The workflow that the scenario is about."""
    alarm_to_mitigated_seconds: float | None = None
    """From the alarm's change to every knob in Redis and the capacity request accepted, in real seconds; None: the
    scenario has no alarm."""
    verified: bool = False
    """Of an incident: the service was seen recovered, every measure held for its time. Pre-provisioning: the units were
    in service before the event with the policy's margin."""
    reverted: bool = False
    """Of an incident: every lever that was taken was released. Pre-provisioning: the event's units were, after it."""
    knobs_at_baseline: bool = False
    capacity_at_baseline: bool = False
    report: str | None = None
    temporal_ui: str | None = None
    stopped: bool = False
    """No process of the stack was left."""
    seconds: float = 0
    """The whole demo, start and stop included."""
    error: str | None = None


@dataclass(frozen=True)
class Options:
    """What the command was told."""

    keep: bool
    interactive: bool
    as_json: bool
    state_dir: Path
    speed: float


class Show:
    """What people see: a line for each thing that happens, and on a terminal a last line that is always current."""

    def __init__(self, as_json: bool) -> None:
        self.out = console(stderr=as_json)
        self.started = time.monotonic()
        self.started_at = datetime.now(UTC)
        self.business: Callable[[datetime], datetime] | None = None
        self._said_at = self.started
        self.status = self.out.status(Text("starting"), spinner="dots")

    def line(self, text: str, style: str = "", at: datetime | None = None) -> None:
        """One thing that happened, in real time since the start and in business time."""
        self._said_at = time.monotonic()
        at = at or datetime.now(UTC)
        stamp = f"{(at - self.started_at).total_seconds():6.1f} s"
        if self.business is not None:
            stamp += f"  {self.business(at).astimezone(TOKYO):%a %H:%M}"
        else:
            stamp += " " * 11
        first, *rest = text.splitlines() or [""]
        self.out.print(Text.assemble((stamp, "dim"), "  ", (plain(first), style)), soft_wrap=True)
        for more in rest:
            self.out.print(Text(f"{' ' * len(stamp)}  {plain(more)}", style), soft_wrap=True)

    def entry(self, entry: TimelineEntry) -> None:
        """One line of the incident's own timeline."""
        who = f"{entry.who}: " if entry.who else ""
        self.line(f"{who}{entry.text}", _STYLES.get(entry.kind, ""), entry.at)

    def now(self, load: LoadSnapshot | None, doing: str) -> None:
        """The current line."""
        parts = [doing]
        if self.business is not None:
            parts.insert(0, f"{self.business(datetime.now(UTC)).astimezone(TOKYO):%A %H:%M}")
        if load is not None:
            model = load.model(MODEL)
            parts.append(f"{total_offered(load):,.0f} tokens/s offered")
            if model.sent_tokens_per_second is not None and model.capacity_tokens_per_second is not None:
                parts.append(f"{MODEL} {model.sent_tokens_per_second:,.0f} of {model.capacity_tokens_per_second:,.0f}")
            if model.throttles is not None:
                parts.append(f"throttles {model.throttles:,.0f}")
            if load.p99_ms is not None:
                parts.append(f"P99 {load.p99_ms / 1000:.1f} s")
            if model.queue_wait_ms is not None:
                parts.append(f"waits {model.queue_wait_ms:,.0f} ms")
            if load.hit_rate is not None:
                parts.append(f"hits {load.hit_rate:.0%}")
        text = " · ".join(parts)
        self.status.update(Text(text[: self.out.width - 3]))
        if not self.out.is_terminal and time.monotonic() - self._said_at > QUIET_SECONDS:
            self.line(text, "dim")

    def failed(self, result: DemoResult, message: str, next_step: str) -> int:
        """Says what went wrong; answers the exit code."""
        result.error = message
        body = Text.assemble(("The demo failed.\n\n", "bold red"), message, "\n\n", (next_step, "bold"))
        self.out.print(Panel(body, border_style="red"))
        return int(ExitCode.UNEXPECTED)


class Scenario:
    """One rehearsal on a running stack, as its audience sees it. Subclasses say what is played and what is proved."""

    TITLE: ClassVar[str]
    """What happens, in a sentence."""
    WORKFLOW_ID: ClassVar[str]
    """The workflow that it is about."""
    GIVE_UP_AFTER: ClassVar[timedelta]
    """Business time from the start of the rehearsal."""
    EXPLORE: ClassVar[Sequence[str]]
    """Commands to look around with while the stack stays up."""
    SPEED: ClassVar[float] = 60
    """Business seconds in a real second, unless the command says otherwise."""

    @classmethod
    def stack_options(cls, options: Options) -> StackOptions:
        """The stack it plays on."""
        return StackOptions(state_dir=options.state_dir, speed=options.speed)

    def __init__(self, stack: Stack, options: Options, show: Show, result: DemoResult) -> None:
        self.stack = stack
        self.options = options
        self.show = show
        self.result = result
        # This process is one of the stack's now: it finds everything where they do.
        os.environ.clear()
        os.environ.update(stack.process_env())
        self.settings = Settings()
        self.clock = self.settings.clock
        self.policy = load_policy(self.settings.policy_file, self.clock)
        self.aws = AwsClients(self.settings)
        self.load: LoadSnapshot | None = None
        self._load_read_at = 0.0
        self.give_up_at = time.monotonic() + self.GIVE_UP_AFTER.total_seconds() / options.speed + SLACK_SECONDS
        show.business = self.clock.business
        self.service: OpsService

    async def connect(self) -> None:
        """Ready to look and to act."""
        self.service = await OpsService.connect(self.settings)
        cloudwatch = CloudWatchActivities(
            self.aws.cloudwatch(), ecs_cluster=self.settings.ecs_cluster, ecs_service=self.settings.ecs_service
        )
        self._read_load = lambda: cloudwatch.read_load(load_query(self.policy, MODEL))

    async def play(self) -> None:
        """From the start to the proof.

        Raises:
            DemoFailed: it did not end as it should.
        """
        raise NotImplementedError

    async def look(self) -> None:
        """Look at the scenario's own workflow, and say what is new."""
        raise NotImplementedError

    def state(self) -> str:
        """Where it stands, in a sentence after a blank; for when it goes wrong."""
        raise NotImplementedError

    # ------------------------------------------------------------------ what is waited for and done

    async def until(self, what: str, done: Callable[[], bool], *, forever: bool = False) -> None:
        """Look at everything until `done`."""
        waiting_since = time.monotonic()
        while True:
            await self._look_around(what)
            if done():
                if forever:  # a person's time is not counted
                    self.give_up_at += time.monotonic() - waiting_since
                return
            if not forever and time.monotonic() > self.give_up_at:
                raise DemoFailed(f"Gave up waiting until {what}.{self.state()}", self.hint())
            await asyncio.sleep(LOOK_EVERY_SECONDS)

    async def _look_around(self, waiting_until: str) -> None:
        if time.monotonic() - self._load_read_at >= READ_LOAD_EVERY_SECONDS:
            self._load_read_at = time.monotonic()
            with suppress(Exception):  # a look at the metrics is for show: what fails is tried again a second later
                self.load = await asyncio.to_thread(self._read_load)
        await self.look()
        self.show.now(self.load, f"waiting until {waiting_until}")

    async def command(self, *arguments: str) -> None:
        """Run `runbooks ARGUMENTS` as a person would.

        Raises:
            DemoFailed: it did not end with 0.
        """
        self.show.line(f"$ {shlex.join(['runbooks', *arguments])}", "bold cyan")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "ops.cli", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self.stack.process_env(),
        )
        said, _ = await process.communicate()
        self.show.line(said.decode(errors="replace").strip(), "cyan")
        if process.returncode:
            raise DemoFailed(f"`runbooks {arguments[0]}` ended with exit code {process.returncode}.", self.hint())

    # ------------------------------------------------------------------ the proof

    def prove(self, checks: Sequence[tuple[str, bool, str]], run_id: str) -> None:
        """Show what was checked: name, whether it is as it should be, and what was found.

        Raises:
            DemoFailed: something is not as it should be.
        """
        self.result.temporal_ui = self.ui_link(run_id)
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, good, detail in checks:
            table.add_row(Text("yes" if good else "NO", "bold green" if good else "bold red"), name, plain(detail))
        wrong = [name for name, good, _ in checks if not good]
        self.show.out.print(Panel(table, title="Proved", border_style="red" if wrong else "green"))
        self.show.line(f"Report: {self.result.report or 'none'}", "bold")
        self.show.line(f"Temporal UI, while the stack is up: {self.result.temporal_ui}")
        if wrong:
            raise DemoFailed(f"Not as it should be: {', '.join(wrong)}.", self.hint())

    def report_check(self, path: str | None) -> tuple[str, bool, str]:
        """Whether the report was written."""
        self.result.report = path
        written = path is not None and Path(path).is_file() and Path(path).stat().st_size > 0
        return "report", written, "written" if written else "not written"

    def knobs_check(self, since: datetime) -> tuple[tuple[str, bool, str], list[AuditEntry]]:
        """Whether every knob is at its baseline, and the ledger's entries since then."""
        try:
            with connect_redis(self.settings.redis_url) as client:
                ledger = Ledger(client)
                leases = ledger.leases().leases
                history = ledger.history(since)
        except RedisError as error:
            return ("knobs", False, f"Redis did not answer: {error}"), []
        baseline = self.policy.baseline
        off = [
            f"{knob} is {value}, not {baseline_value(knob, baseline)}"
            for knob in KnobName
            if (value := effective_value(knob, leases, baseline)) != baseline_value(knob, baseline)
        ]
        self.result.knobs_at_baseline = not off and not leases
        words = "; ".join(off) or "every knob is at its baseline in Redis"
        return ("knobs", self.result.knobs_at_baseline, words), history

    def capacity_check(self, expected: Mapping[str, int]) -> tuple[str, bool, str]:
        """Whether each model has just the units expected in service."""
        summaries = self.aws.bedrock().list_provisioned_model_throughputs()["provisionedModelSummaries"]
        words, good = [], True
        for name, spec in self.policy.models.items():
            own = [item for item in summaries if item["modelArn"].endswith(f"/{spec.provisioned_model_id}")]
            units = sum(item["modelUnits"] for item in own)
            good &= units == expected[name] and all(item["status"] == "InService" for item in own)
            words.append(f"{name} {units} of {expected[name]} units")
        self.result.capacity_at_baseline = good
        return "capacity", good, "Bedrock lists " + ", ".join(words)

    # ------------------------------------------------------------------ the Temporal UI

    def ui_link(self, run_id: str | None = None) -> str | None:
        """The workflows of the stack's UI, or this one; None: it has none."""
        if self.stack.addresses.temporal_ui is None:
            return None
        root = f"{self.stack.addresses.temporal_ui}/namespaces/{self.settings.temporal_namespace}/workflows"
        return f"{root}/{quote(self.WORKFLOW_ID, safe='')}/{run_id}/history" if run_id else root

    async def see_ui(self, title: str, run_id: str) -> None:
        """What the UI shows of this workflow, asked of the UI's own API."""
        if self.stack.addresses.temporal_ui is None:
            return
        try:
            seen = await asyncio.to_thread(self._ask_ui, run_id)
        except (OSError, ValueError, KeyError) as error:
            raise DemoFailed(f"The Temporal UI did not answer: {error}", self.hint()) from error
        facts, details = seen
        parts = (Text(f"{self.ui_link(run_id)}", "blue"), Text(facts), Markdown(details, hyperlinks=False))
        self.show.out.print(Panel(Group(*parts), title=title, border_style="blue"))

    def _ask_ui(self, run_id: str) -> tuple[str, str]:
        """Status and search attributes in a line, and the details in Markdown."""
        api = f"{self.stack.addresses.temporal_ui}/api/v1/namespaces/{self.settings.temporal_namespace}/workflows"
        workflow = f"{api}/{quote(self.WORKFLOW_ID, safe='')}"
        execution = f"execution.runId={run_id}"
        info = _http_json(f"{workflow}?{execution}")["workflowExecutionInfo"]
        attributes = {
            name: json.loads(base64.b64decode(payload["data"]))
            for name, payload in info.get("searchAttributes", {}).get("indexedFields", {}).items()
            if name[:5] != "Build" and name[:8] != "Temporal"
        }
        status = info["status"].removeprefix("WORKFLOW_EXECUTION_STATUS_").title()
        facts = [status, f"{info.get('historyLength', '?')} events", *(f"{k}={v}" for k, v in attributes.items())]
        answer = _http_json(f"{workflow}/query/__temporal_workflow_metadata?{execution}", body={})
        metadata = json.loads(base64.b64decode(answer["queryResult"]["payloads"][0]["data"]))
        details = "\n".join(plain(line) for line in metadata.get("currentDetails", "").splitlines())
        return plain(" · ".join(facts)), details

    # ------------------------------------------------------------------ when it goes wrong

    def hint(self) -> str:
        """What to do then."""
        return (
            f"See the logs in {self.stack.log_dir}; `runbooks demo --keep` leaves the stack up, and then "
            f"`{self.EXPLORE[0]}` tells what happened."
        )


async def run(scenario: type[Scenario], options: Options, show: Show, result: DemoResult) -> None:
    """Play a scenario on a stack of its own, and stop everything."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    show.line(f"{scenario.TITLE} {options.speed:g} times as fast as life.")
    pids: list[int] = []
    stack = Stack(scenario.stack_options(options), say=show.line)
    try:
        with show.status:
            async with stack:
                pids = list(stack.pids.values())
                await _play(scenario, stack, options, show, result)
                show.now(None, "stopping")
    finally:
        left = [pid for pid in pids if psutil.pid_exists(pid)]
        result.stopped = not left
        result.seconds = round(time.monotonic() - show.started, 1)
    if left:
        raise DemoFailed(f"Processes of the stack are still there: {left}.", "End them by their ids.")
    show.line(f"Every process is stopped. The demo took {result.seconds:g} s.", "bold green")


async def _play(scenario: type[Scenario], stack: Stack, options: Options, show: Show, result: DemoResult) -> None:
    try:
        await stack.guard(scenario(stack, options, show, result).play())
    except (DemoFailed, OpsError) as error:
        if options.keep:
            show.line(error.message, "bold red")
            await _stay(scenario, stack, show)
        raise
    if options.keep:
        if options.as_json:
            result.seconds = round(time.monotonic() - show.started, 1)
            print(result.model_dump_json(), flush=True)
        await _stay(scenario, stack, show)


async def _stay(scenario: type[Scenario], stack: Stack, show: Show) -> None:
    """The stack stays up until Ctrl-C, which is a good end."""
    show.status.stop()
    show.out.print(f"\nThe stack stays up. To explore it, in another shell:\n  source {stack.state_dir / 'env'}")
    for command in scenario.EXPLORE:
        show.out.print(f"  {command}")
    show.out.print("Ctrl-C here stops everything.", style="bold")
    task = asyncio.current_task()
    assert task is not None
    try:
        await stack.guard(asyncio.Event().wait())
    except asyncio.CancelledError:
        task.uncancel()


def _http_json(url: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json", "Cookie": "_csrf=demo", "X-CSRF-Token": "demo"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers), timeout=5) as answer:
        return json.load(answer)
