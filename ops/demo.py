"""`runbooks demo`: scenario 1 on a real stack, from the release to the report, with a person's approval in the middle.

It drives nothing: the simulator brings the traffic, the alarm starts the incident, and the one thing the demo does is
what a person does, by the command a person would type. Then it checks the result against Redis, Bedrock and the disk.
"""

import asyncio
import base64
import json
import os
import shlex
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import psutil
import typer
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
from domain.incident import IncidentRecord, LeverName, LeverStatus, Phase, TimelineEntry
from domain.knobs import KnobName, baseline_value, effective_value
from domain.load import LoadSnapshot, total_offered
from domain.messages import incident_id, load_query
from domain.mitigation import Guard, guard
from domain.people import Role
from ops.servers import ServerNotFound
from ops.service import ExitCode, Incident, OpsError, OpsService
from ops.stack import TOKYO, Stack, StackError, StackOptions
from ops.supervisor import ChildFailed
from ops.views import cleaned, console, plain
from workers.clients import AwsClients
from workers.settings import Settings

MODEL = "sonnet"
KEY = f"bedrock-throttle:{MODEL}"
WHY = "the release traffic has passed"
SPEED = 60

LOOK_EVERY_SECONDS = 0.5
READ_LOAD_EVERY_SECONDS = 1.0
GIVE_UP_AFTER = timedelta(minutes=200)
"""Business time from the start of the rehearsal; it needs about 90 minutes."""
SLACK_SECONDS = 60.0
"""Real time on top, for a slow machine."""
QUIET_SECONDS = 5.0
"""Without a terminal, the current line is printed after so long without another."""
MOST_APPROVALS = 3
"""The way back stops when the guard says no; then a person approves again."""

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
    """What the demo found; with `--json` the last line of stdout."""

    incident_id: str = incident_id(KEY)
    alarm_to_mitigated_seconds: float | None = None
    """From the alarm's change to every knob in Redis and the capacity request accepted, in real seconds."""
    verified: bool = False
    """The service was seen recovered, every measure held for its time."""
    reverted: bool = False
    """Every lever that was taken was released."""
    knobs_at_baseline: bool = False
    capacity_at_baseline: bool = False
    report: str | None = None
    temporal_ui: str | None = None
    stopped: bool = False
    """No process of the stack was left."""
    seconds: float = 0
    """The whole demo, start and stop included."""
    error: str | None = None


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack up afterwards, until Ctrl-C.")] = False,
    interactive: Annotated[bool, typer.Option("--interactive", help="Leave the approval to you.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Progress on stderr; one JSON object as the only line of stdout.")
    ] = False,
    state_dir: Annotated[Path, typer.Option(help="Folder for state, logs, tokens and the report.")] = Path(".runbooks"),
    speed: Annotated[float, typer.Option(help="Business seconds per real second.")] = SPEED,
) -> None:
    """Play scenario 1 on a stack of its own: alarm, mitigation, approval, way back, report. Takes about 100 s."""
    show = _Show(as_json)
    result = DemoResult()
    code = 0
    try:
        asyncio.run(_run(_Options(keep, interactive, as_json, state_dir, speed), show, result))
    except (StackError, ServerNotFound, ChildFailed) as error:
        code = show.failed(result, str(error), "Mend this and start again.")
    except OpsError as error:
        code = show.failed(result, error.message, error.next_step)
    except DemoFailed as error:
        code = show.failed(result, error.message, error.next_step)
    except (KeyboardInterrupt, asyncio.CancelledError):
        show.line("Interrupted: everything is stopped.", "yellow")
        code = 130
        result.error = "interrupted"
    if as_json and not (keep and code == 0):
        print(result.model_dump_json(), flush=True)
    raise typer.Exit(code)


@dataclass(frozen=True)
class _Options:
    keep: bool
    interactive: bool
    as_json: bool
    state_dir: Path
    speed: float


class _Show:
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


async def _run(options: _Options, show: _Show, result: DemoResult) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    show.line(f"Scenario 1: a Monday release brings five times the traffic. {options.speed:g} times as fast as life.")
    pids: list[int] = []
    stack = Stack(StackOptions(state_dir=options.state_dir, speed=options.speed), say=show.line)
    try:
        with show.status:
            async with stack:
                pids = list(stack.pids.values())
                await _play(stack, options, show, result)
                show.now(None, "stopping")
    finally:
        left = [pid for pid in pids if psutil.pid_exists(pid)]
        result.stopped = not left
        result.seconds = round(time.monotonic() - show.started, 1)
    if left:
        raise DemoFailed(f"Processes of the stack are still there: {left}.", "End them by their ids.")
    show.line(f"Every process is stopped. The demo took {result.seconds:g} s.", "bold green")


async def _play(stack: Stack, options: _Options, show: _Show, result: DemoResult) -> None:
    try:
        await stack.guard(_Play(stack, options, show, result).play())
    except (DemoFailed, OpsError) as error:
        if options.keep:
            show.line(error.message, "bold red")
            await _stay(stack, show)
        raise
    if options.keep:
        if options.as_json:
            result.seconds = round(time.monotonic() - show.started, 1)
            print(result.model_dump_json(), flush=True)
        await _stay(stack, show)


async def _stay(stack: Stack, show: _Show) -> None:
    """The stack stays up until Ctrl-C, which is a good end."""
    show.status.stop()
    show.out.print(f"\nThe stack stays up. To explore it, in another shell:\n  source {stack.state_dir / 'env'}")
    show.out.print(f"  runbooks incident show {KEY} --all\n  runbooks incident list")
    show.out.print("Ctrl-C here stops everything.", style="bold")
    task = asyncio.current_task()
    assert task is not None
    try:
        await stack.guard(asyncio.Event().wait())
    except asyncio.CancelledError:
        task.uncancel()


class _Play:
    """The rehearsal on a running stack, as its audience sees it."""

    def __init__(self, stack: Stack, options: _Options, show: _Show, result: DemoResult) -> None:
        self._stack = stack
        self._options = options
        self._show = show
        self._result = result
        # This process is one of the stack's now: it finds everything where they do.
        os.environ.clear()
        os.environ.update(stack.process_env())
        self._settings = Settings()
        self._clock = self._settings.clock
        self._policy = load_policy(self._settings.policy_file, self._clock)
        self._aws = AwsClients(self._settings)
        self._load: LoadSnapshot | None = None
        self._load_read_at = 0.0
        self._incident: Incident | None = None
        self._said = 0
        self._approvals = 0
        self._bought_at: datetime | None = None
        self._give_up_at = time.monotonic() + GIVE_UP_AFTER.total_seconds() / options.speed + SLACK_SECONDS
        show.business = self._clock.business

    async def play(self) -> None:
        """From the quiet before the release to the proof that everything is as it was.

        Raises:
            DemoFailed: it did not end as it should.
        """
        self._service = await OpsService.connect(self._settings)
        cloudwatch = CloudWatchActivities(
            self._aws.cloudwatch(), ecs_cluster=self._settings.ecs_cluster, ecs_service=self._settings.ecs_service
        )
        self._read_load = lambda: cloudwatch.read_load(load_query(self._policy, MODEL))
        self._show.line("The stack is up. It is a quiet night; the release comes five minutes after midnight.", "bold")
        if ui := self._ui_link():
            self._show.line(f"Temporal UI: {ui}")
        await self._traffic_rises()
        await self._until("the incident recovers under load", self._recovered)
        await self._see_ui("While it waits for a decision, the Temporal UI shows")
        while not self._over():
            await self._traffic_passes()
            await self._approve()
            await self._until("the way back ends", lambda: self._over() or self._waits_for_decision())
            if self._waits_for_decision():
                self._show.line("The way back stopped and waits for a new decision.", "yellow")
        await self._until("its workflow is complete", lambda: self._incident is not None and bool(self._incident.ended))
        await self._check()

    # ------------------------------------------------------------------ what is waited for

    @property
    def _record(self) -> IncidentRecord:
        assert self._incident is not None
        return self._incident.record

    async def _traffic_rises(self) -> None:
        usual: float | None = None
        risen = False

        def opened() -> bool:
            nonlocal usual, risen
            if self._load is not None and (offered := total_offered(self._load)):
                usual = usual or offered
                if not risen and offered > 1.5 * usual:
                    risen = True
                    self._show.line(f"Traffic rises: {offered:,.0f} tokens/s offered, from {usual:,.0f}.", "yellow")
            return self._incident is not None

        await self._until("the alarm opens an incident", opened)
        self._show.line(f"The alarm opened an incident: {self._record.incident_id}", "bold red")

    def _recovered(self) -> bool:
        return self._over() or (self._waits_for_decision() and self._record.recovered_at is not None)

    def _waits_for_decision(self) -> bool:
        return self._record.phase is Phase.AWAITING_DECISION

    def _over(self) -> bool:
        """Nothing is left to decide."""
        if self._incident is not None and self._incident.ended not in (None, "completed"):
            raise DemoFailed(f"The incident's workflow was {self._incident.ended}.", self._look())
        return self._record.phase in (Phase.CLEANUP, Phase.SNOOZED, Phase.CLOSED)

    async def _traffic_passes(self) -> None:
        def passed() -> bool:
            return self._load is not None and self._without_levers(self._load).may

        if not self._waits_for_decision():
            return
        self._show.line("The service has recovered. Now the traffic has to pass.", "bold green")
        await self._until("the traffic passes", lambda: passed() or not self._waits_for_decision())
        if self._load is not None:
            self._show.line(f"The traffic has passed: {self._without_levers(self._load).why}.", "bold green")

    def _without_levers(self, load: LoadSnapshot) -> Guard:
        """What the guard of the way back would say of the last lever."""
        return guard(LeverName.CAPACITY, [], MODEL, load, self._policy)

    async def _approve(self) -> None:
        """By the very command that a person would use, or by that person."""
        if not self._waits_for_decision():  # somebody has decided already
            return
        self._approvals += 1
        if self._approvals > MOST_APPROVALS:
            raise DemoFailed(f"The way back stopped {MOST_APPROVALS} times.", self._look())
        arguments = ["incident", "approve", KEY, "--why", WHY, "--token-file", str(self._stack.tokens[Role.APPROVER])]
        shown = shlex.join(["runbooks", *arguments])
        if self._options.interactive:
            source = f"source {self._stack.state_dir / 'env'}"
            self._show.line(f"It is your decision. In another shell:\n  {source}\n  {shown}", "bold cyan")
            await self._until("you decide", lambda: not self._waits_for_decision(), forever=True)
            return
        self._show.line(f"$ {shown}", "bold cyan")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "ops.cli", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._stack.process_env(),
        )
        said, _ = await process.communicate()
        self._show.line(said.decode(errors="replace").strip(), "cyan")
        if process.returncode:
            raise DemoFailed(f"The approval ended with exit code {process.returncode}.", self._look())

    async def _until(self, what: str, done: Callable[[], bool], *, forever: bool = False) -> None:
        """Look at everything until `done`."""
        waiting_since = time.monotonic()
        while True:
            await self._look_around(what)
            if done():
                if forever:  # a person's time is not counted
                    self._give_up_at += time.monotonic() - waiting_since
                return
            if not forever and time.monotonic() > self._give_up_at:
                raise DemoFailed(f"Gave up waiting until {what}.{self._state()}", self._look())
            await asyncio.sleep(LOOK_EVERY_SECONDS)

    async def _look_around(self, waiting_until: str) -> None:
        if time.monotonic() - self._load_read_at >= READ_LOAD_EVERY_SECONDS:
            self._load_read_at = time.monotonic()
            with suppress(Exception):  # a look at the metrics is for show: what fails is tried again a second later
                self._load = await asyncio.to_thread(self._read_load)
        try:
            found = await self._service.get(KEY)
        except OpsError as error:
            if error.exit_code is not ExitCode.NOT_FOUND or self._incident is not None:
                raise
        else:
            self._incident = found
            record = cleaned(found.record)
            for entry in record.timeline[self._said :]:
                self._show.entry(entry)
            self._said = len(record.timeline)
        if self._incident is not None and self._bought_at is None:
            await self._note_purchase()
        self._show.now(self._load, f"waiting until {waiting_until}")

    async def _note_purchase(self) -> None:
        """When Bedrock accepted the request for the emergency's units, by its own clock."""
        lever = self._record.lever(LeverName.CAPACITY)
        if lever is None or lever.applied_at is None:
            return
        with suppress(OpsError):
            fleet = (await self._service.capacity_state(MODEL)).fleet
            bought = [model.created_at for model in fleet if model.ours and model.created_at >= self._record.opened_at]
            self._bought_at = min(bought, default=None)

    # ------------------------------------------------------------------ the proof

    async def _check(self) -> None:
        record, result = self._record, self._result
        result.incident_id = record.incident_id
        result.verified = record.recovered_at is not None
        taken = [lever for lever in record.levers if lever.status is not LeverStatus.NOT_NEEDED]
        result.reverted = bool(taken) and all(lever.status is LeverStatus.RELEASED for lever in taken)
        result.report = record.report_path
        result.temporal_ui = self._ui_link(record.run_id)
        knobs, result.knobs_at_baseline, acquired = await asyncio.to_thread(self._read_redis)
        capacity, result.capacity_at_baseline = await asyncio.to_thread(self._read_bedrock)
        report_there = await asyncio.to_thread(_is_written, record.report_path)
        mitigated = [*acquired, *filter(None, [self._bought_at])]
        if mitigated:
            passed = max(mitigated) - record.alarm.changed_at
            result.alarm_to_mitigated_seconds = round(passed.total_seconds(), 3)
        await self._see_ui("Now that it is over, the Temporal UI shows")
        speed = result.alarm_to_mitigated_seconds
        checks = (
            ("mitigated", speed is not None and bool(acquired), f"{speed} s after the alarm, every free lever in Redis"
             + (" and the capacity requested" if self._bought_at else "")),
            ("verified", result.verified, record.recovery_detail or "not recovered"),
            ("reverted", result.reverted, ", ".join(f"{lever.name} {lever.status}" for lever in taken) or "no lever"),
            ("knobs", result.knobs_at_baseline, knobs),
            ("capacity", result.capacity_at_baseline, capacity),
            ("report", report_there, "written" if report_there else "not written"),
        )  # fmt: skip
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, good, detail in checks:
            table.add_row(Text("yes" if good else "NO", "bold green" if good else "bold red"), name, plain(detail))
        wrong = [name for name, good, _ in checks if not good]
        self._show.out.print(Panel(table, title="Proved", border_style="red" if wrong else "green"))
        self._show.line(f"Report: {record.report_path or 'none'}", "bold")
        self._show.line(f"Temporal UI, while the stack is up: {result.temporal_ui}")
        if wrong:
            raise DemoFailed(f"Not as it should be: {', '.join(wrong)}.", self._look())

    def _read_redis(self) -> tuple[str, bool, list[datetime]]:
        """Every knob in words, whether all are at their baseline, and when the first levers were acquired."""
        try:
            with connect_redis(self._settings.redis_url) as client:
                ledger = Ledger(client)
                leases = ledger.leases().leases
                history = ledger.history(self._record.opened_at - timedelta(minutes=1))
        except RedisError as error:
            return f"Redis did not answer: {error}", False, []
        baseline = self._policy.baseline
        off = [
            f"{knob} is {value}, not {baseline_value(knob, baseline)}"
            for knob in KnobName
            if (value := effective_value(knob, leases, baseline)) != baseline_value(knob, baseline)
        ]
        until = self._record.mitigated_at or datetime.now(UTC)
        acquired = [
            entry.at
            for entry in history
            if entry.action == "acquired" and entry.holder.id == self._record.incident_id and entry.at <= until
        ]
        return "; ".join(off) or "every knob is at its baseline in Redis", not off and not leases, acquired

    def _read_bedrock(self) -> tuple[str, bool]:
        """The fleet in words, and whether each model has its baseline's units in service and nothing else."""
        summaries = self._aws.bedrock().list_provisioned_model_throughputs()["provisionedModelSummaries"]
        words, good = [], True
        for name, spec in self._policy.models.items():
            own = [item for item in summaries if item["modelArn"].endswith(f"/{spec.provisioned_model_id}")]
            units = sum(item["modelUnits"] for item in own)
            good &= units == spec.baseline_units and all(item["status"] == "InService" for item in own)
            words.append(f"{name} {units} of {spec.baseline_units} units")
        return "Bedrock lists " + ", ".join(words), good

    # ------------------------------------------------------------------ the Temporal UI

    def _ui_link(self, run_id: str | None = None) -> str | None:
        if self._stack.addresses.temporal_ui is None:
            return None
        root = f"{self._stack.addresses.temporal_ui}/namespaces/{self._settings.temporal_namespace}/workflows"
        return f"{root}/{quote(incident_id(KEY), safe='')}/{run_id}/history" if run_id else root

    async def _see_ui(self, title: str) -> None:
        """What the UI shows of this workflow, asked of the UI's own API."""
        if self._stack.addresses.temporal_ui is None:
            return
        try:
            seen = await asyncio.to_thread(self._ask_ui)
        except (OSError, ValueError, KeyError) as error:
            raise DemoFailed(f"The Temporal UI did not answer: {error}", self._look()) from error
        facts, details = seen
        parts = (
            Text(f"{self._ui_link(self._record.run_id)}", "blue"),
            Text(facts),
            Markdown(details, hyperlinks=False),
        )
        self._show.out.print(Panel(Group(*parts), title=title, border_style="blue"))

    def _ask_ui(self) -> tuple[str, str]:
        """Status and search attributes in a line, and the details in Markdown."""
        api = f"{self._stack.addresses.temporal_ui}/api/v1/namespaces/{self._settings.temporal_namespace}/workflows"
        workflow = f"{api}/{quote(incident_id(KEY), safe='')}"
        execution = f"execution.runId={self._record.run_id}"
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

    def _state(self) -> str:
        if self._incident is None:
            return " No incident was opened."
        record = cleaned(self._record)
        return f" The incident is {record.phase} and waits for: {record.waiting_for or 'nothing'}."

    def _look(self) -> str:
        return (
            f"See the logs in {self._stack.log_dir}; `runbooks demo --keep` leaves the stack up, and then "
            f"`runbooks incident show {KEY} --all` tells what happened."
        )


def _is_written(path: str | None) -> bool:
    return path is not None and Path(path).is_file() and Path(path).stat().st_size > 0


def _http_json(url: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json", "Cookie": "_csrf=demo", "X-CSRF-Token": "demo"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers), timeout=5) as answer:
        return json.load(answer)
