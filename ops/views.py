"""How an incident looks in a terminal, for somebody who was asleep a minute ago.

Consoles are made by `console`: nothing in a text is ever taken for Rich markup. Text from outside goes through
`plain`, so that it cannot move the cursor, change colours or turn the direction of writing.
"""

import unicodedata
from collections.abc import Iterable
from datetime import datetime
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from domain.calendar import CalendarEvent, EventStatus, duration_text
from domain.capacity import DemandKind
from domain.clock import RehearsalClock
from domain.health import Severity, headline
from domain.incident import IncidentRecord, Lever, LeverName, LeverStatus, Phase, RecoveryCheck, TimelineEntry, span
from domain.messages import CapacityState
from domain.override import OverridePhase, shown
from ops.health import Health
from ops.overrides import Override, OverrideRow, Preview
from ops.service import Incident, IncidentRow

M = TypeVar("M", bound=BaseModel)

TOKYO = ZoneInfo("Asia/Tokyo")
SHOWN_TIMELINE = 12

_PHASE_STYLES = {
    Phase.TRIAGE: "bold red",
    Phase.MITIGATING: "bold red",
    Phase.VERIFYING: "bold yellow",
    Phase.AWAITING_DECISION: "bold magenta",
    Phase.REVERTING: "bold cyan",
    Phase.CLEANUP: "bold cyan",
    Phase.SNOOZED: "dim",
    Phase.CLOSED: "bold green",
}
_LEVER_STYLES = {
    LeverStatus.APPLYING: "yellow",
    LeverStatus.IN_FORCE: "bold magenta",
    LeverStatus.FAILED: "bold red",
    LeverStatus.RELEASING: "cyan",
    LeverStatus.RELEASED: "green",
    LeverStatus.KEPT: "bold cyan",
    LeverStatus.NOT_NEEDED: "dim",
}


def console(*, stderr: bool = False) -> Console:
    """A console that takes no text for markup, emoji codes or things to highlight."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def plain(text: str) -> str:
    """`text` without control, format and unassigned characters; line breaks and tabs become spaces."""
    spaced = " ".join(text.split())
    return "".join(char if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Cn") else "\N{REPLACEMENT CHARACTER}"
                   for char in spaced)  # fmt: skip


def cleaned(model: M) -> M:
    """`model` with every text in it `plain`."""
    return type(model).model_validate(_cleaned(model.model_dump()))


def _cleaned(value: Any) -> Any:
    if type(value) is str:
        return plain(value)
    if isinstance(value, dict):
        return {_cleaned(name): _cleaned(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cleaned(item) for item in value)
    return value


class Times:
    """Says when something is, against one `now`; with the business time where a rehearsal has its own."""

    def __init__(self, now: datetime, clock: RehearsalClock) -> None:
        self.now = now
        self._clock = clock

    def at(self, moment: datetime) -> str:
        """The time of day here, with the date unless it is today."""
        local = moment.astimezone()
        today = local.date() == self.now.astimezone().date()
        return local.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M")

    def ago(self, moment: datetime) -> str:
        """E.g. `3 min ago`, `in 20 s`."""
        return f"in {span(moment - self.now)}" if moment > self.now else f"{span(self.now - moment)} ago"

    def both(self, moment: datetime) -> str:
        """The time of day and how long ago or ahead."""
        return f"{self.at(moment)} ({self.ago(moment)})"

    def business(self, moment: datetime) -> str | None:
        """The business time at `moment` in Tokyo; None when it is the real one."""
        if self._clock == RehearsalClock():
            return None
        return self._clock.business(moment).astimezone(TOKYO).strftime("%a %H:%M Tokyo")


def incident_table(rows: Iterable[IncidentRow], times: Times) -> Table:
    """A list of incidents."""
    table = make_table("incident", "phase", "sev.", "cause", "opened", "waiting for", whole=2)
    for row in map(cleaned, rows):
        over = f"closed {times.ago(row.closed_at)}" if row.closed_at else ""
        if row.ended not in (None, "completed"):
            over = f"{row.ended}! {over}"
        table.add_row(
            Text(row.key, "bold"),
            _phase(row.phase),
            row.severity,
            row.cause or "-",
            times.ago(row.opened_at),
            row.waiting_for or over or "-",
        )
    return table


def incident_view(
    incident: Incident, times: Times, capacity: CapacityState | None = None, *, timeline: int = SHOWN_TIMELINE
) -> RenderableType:
    """Everything about one incident, the most urgent first; at most `timeline` lines of what happened, the newest."""
    record = cleaned(incident.record)
    parts: list[RenderableType] = [*_head(record, incident.ended, times)]
    if record.levers:
        parts.append(_levers(record.levers, times))
    if record.recovery_checks:
        parts.append(_recovery(record.recovery_checks, times))
    facts = [*record.effects]
    if capacity is not None:
        facts.append(_capacity(cleaned(capacity)))
    if record.recovery:
        facts.append(record.recovery_detail or record.recovery)
    if facts:
        parts.append(_grid(("·", fact) for fact in facts))
    if record.decisions:
        parts.append(Text("\nDecisions", "bold"))
        parts.append(
            _grid(
                (times.at(item.at), f"{item.who}: {item.action}: {item.outcome}: {item.message} (why: {item.why})")
                for item in record.decisions
            )
        )
    for title, lines in (("Still held", record.still_held), ("To do", record.to_do)):
        if lines:
            parts += [Text(f"\n{title}", "bold"), _grid(("-", line) for line in lines)]
    if shown := record.timeline[-timeline:] if timeline else []:
        hidden = len(record.timeline) - len(shown)
        more = f" (the last {len(shown)}; --all shows {hidden} more)" if hidden else ""
        parts += [Text(f"\nWhat happened{more}", "bold"), _grid(_timeline_cells(entry, times) for entry in shown)]
    if record.phase is Phase.AWAITING_DECISION and incident.ended is None:
        parts.append(Text("\n" + how_to_decide(record), "magenta"))
    if record.report_path:
        parts.append(Text(f"\nReport: {record.report_path}"))
    return Group(*parts)


def calendar_table(events: Iterable[CalendarEvent]) -> Table:
    """The event calendar; times as the rows have them, in business time."""
    table = make_table("event", "type", "starts", "traffic", "ahead", "models", "state", "from", whole=1)
    for event in map(cleaned, events):
        if event.status is EventStatus.PROPOSED:
            state = Text("proposed", "yellow")
        elif not event.counts:
            state = Text("learnt", "dim")
        elif event.provisioning_completed_at:
            state = Text(f"in service {event.provisioning_completed_at:%m-%d %H:%M}", "green")
        elif event.provisioning_triggered_at:
            state = Text(f"triggered {event.provisioning_triggered_at:%m-%d %H:%M}", "cyan")
        else:
            state = Text("planned")
        units = ", ".join(f"{model} {event.units[model]}" if model in event.units else model for model in event.models)
        table.add_row(
            Text(event.event_id, "bold"),
            event.type,
            event.starts_at.isoformat(" ", "minutes"),
            f"{event.multiplier:g}x",
            duration_text(event.lead_time),
            units,
            state,
            event.source,
        )
    return table


def override_table(rows: Iterable[OverrideRow], times: Times) -> Table:
    """A list of overrides."""
    table = make_table("override", "value", "owner", "until", "state", "why", whole=1)
    for row in map(cleaned, rows):
        record = row.record
        until = times.both(row.until) if row.until and row.ended is None else "-"
        over = f"{row.ended} {times.ago(row.closed_at)}" if row.closed_at else "no worker answers"
        table.add_row(
            Text(row.override_id, "bold"),
            shown(record.value) if record else "",
            record.owner if record else "",
            until,
            _override_state(record.phase) if record else Text(over),
            record.outcome or record.reason if record else "",
        )
    return table


def override_view(override: Override, times: Times) -> RenderableType:
    """Everything about one override."""
    record = cleaned(override.record)
    lines = {
        "why": f"{record.reason}, asked by {record.asked_by} {times.both(record.asked_at)}",
        "owner": record.owner + (f", from {record.incident}" if record.incident else ""),
        "approved": record.approved_by or "",
        "ends": times.both(record.ends_at) if record.ends_at else "",
        "reviewed": times.both(record.review_at) if record.review_at else "",
        "in force": shown(record.effective) if record.in_force_since else "",
        "waiting for": "" if override.ended else record.waiting_for,
        "next": ""
        if override.ended
        else record.next_step + (f", {times.both(record.next_at)}" if record.next_at else ""),
        "outcome": record.outcome,
        "workflow": override.url,
    }
    title = Text.assemble(
        _override_state(record.phase), f"  {record.kind}  ", (f"{record.knob} → {shown(record.value)}", "bold")
    )
    parts: list[RenderableType] = [title, _grid((name, text) for name, text in lines.items() if text)]
    if override.ended not in (None, "completed"):
        warning = f"Its workflow was {override.ended}: what it holds lapses by itself. Check the knob."
        parts.append(Text(warning, "bold red"))
    if record.assessment and record.assessment.impact:
        parts += [Text("\nWhat it should do", "bold"), _grid(("-", x) for x in record.assessment.impact.lines)]
    if record.still_held:
        parts += [Text("\nStill held", "bold"), _grid(("-", line) for line in record.still_held)]
    parts += [Text("\nWhat happened", "bold"), _grid(_timeline_cells(entry, times) for entry in record.timeline)]
    return Group(*parts)


def preview_view(preview: Preview, times: Times) -> RenderableType:
    """What an override would do."""
    found = preview.assessment
    steps = [f"{times.both(step.at)}: {shown(step.value)}" for step in found.course]
    parts: list[RenderableType] = [
        Text.assemble("DRY RUN, nothing was changed  ", (f"{preview.knob} → {shown(preview.value)}", "bold")),
        _grid(
            [
                ("allowed", preview.allowed),
                ("role", preview.needed_role),
                ("in force now", shown(found.value_now)),
                ("would be", steps[0]),
                *(("then", step) for step in steps[1:]),
                *(("beside it", conflict) for conflict in map(plain, found.conflicts)),
            ]
        ),
    ]
    if found.impact:
        parts += [Text("\nWhat it should do", "bold"), _grid(("-", line) for line in found.impact.lines)]
    if found.approval:
        parts += [Text("\nIt needs an approval", "bold magenta"), _grid(("-", why) for why in found.approval)]
    return Group(*parts)


def _override_state(phase: OverridePhase) -> Text:
    styles = {OverridePhase.AWAITING_APPROVAL: "bold magenta", OverridePhase.IN_FORCE: "bold yellow"}
    return Text(phase.upper().replace("-", " "), styles.get(phase, "bold green"))


def timeline_line(entry: TimelineEntry, times: Times) -> str:
    """One line of the incident's history. `entry` comes from a cleaned record."""
    return "  ".join(_timeline_cells(entry, times))


def _timeline_cells(entry: TimelineEntry, times: Times) -> tuple[str, str, str]:
    business = times.business(entry.at)
    when = times.at(entry.at) + (f" [{business}]" if business else "")
    return when, f"{entry.kind:<8}", (f"{entry.who}: " if entry.who else "") + entry.text


def how_to_decide(record: IncidentRecord) -> str:
    """The commands that answer an incident which waits for a decision; what is proposed by default first."""
    key, window = record.key, record.lever(LeverName.BATCH_WINDOW)
    ways = [
        ("let the staged way back begin", f'approve {key} --why "..."'),
        ("keep the levers for now", f'reject {key} --why "..."'),
        ("hold the levers longer", f'extend {key} --by 2h --why "..."'),
    ]
    if window in record.held:
        ways.insert(0, (f"make {window.after} your standing override", f'keep {key} {window.name} --why "..."'))
    return "\n".join(f"  # {meaning}\n  runbooks incident {command}" for meaning, command in ways)


def _head(record: IncidentRecord, ended: str | None, times: Times) -> list[RenderableType]:
    title = Text.assemble(
        (record.phase.upper().replace("-", " "), _PHASE_STYLES[record.phase]),
        f"  {record.severity}  ",
        (record.key, "bold"),
    )
    business = times.business(record.opened_at)
    told = "once" if record.alarm_times == 1 else f"{record.alarm_times} times"
    state = "on" if record.alarm_on else "off"
    lines = {
        "opened": times.both(record.opened_at) + (f", {business}" if business else ""),
        "alarm": f"{record.alarm.alarm_name} ({state}, told {told}). {record.alarm.reason}",
        "cause": record.diagnosis.sentence if record.diagnosis else "",
        "seen by": record.acknowledged_by or "",
        "closed": times.both(record.closed_at) if record.closed_at else "",
        "waiting for": "" if ended else record.waiting_for,
        "next": "" if ended else record.next_step + (f", {times.both(record.next_at)}" if record.next_at else ""),
        "proposal": record.keep_proposal if record.phase is Phase.AWAITING_DECISION and not ended else "",
        "outcome": record.outcome,
    }
    parts: list[RenderableType] = [title]
    if ended is not None and record.phase is not Phase.CLOSED:
        warning = f"Its workflow was {ended} before the incident was closed: what it holds lapses by itself. "
        parts.append(Text(warning + "Check the knobs and the capacity.", "bold red"))
    strong = {"waiting for": "bold"}
    return [*parts, _grid((name, Text(text, strong.get(name, ""))) for name, text in lines.items() if text)]


def _levers(levers: list[Lever], times: Times) -> Table:
    table = make_table("lever", "before → after", "state", "since", "at most until", "detail", whole=1)
    for lever in levers:
        since = lever.released_at or lever.landed_at or lever.applied_at
        held = lever.status in (LeverStatus.APPLYING, LeverStatus.IN_FORCE, LeverStatus.RELEASING)
        table.add_row(
            lever.name,
            f"{lever.before} → {lever.after}",
            Text(lever.status, _LEVER_STYLES[lever.status]),
            times.at(since) if since else "-",
            times.both(lever.hold_until) if held and lever.hold_until else "-",
            lever.detail or (lever.why if lever.status is LeverStatus.NOT_NEEDED else "-"),
        )
    return table


def _recovery(checks: list[RecoveryCheck], times: Times) -> Table:
    table = make_table("recovery", "now", "target", "met since")
    for check in checks:
        met = f"yes, {times.both(check.since)}" if check.since else "yes"
        table.add_row(
            check.name,
            "no data" if check.value is None else f"{_number(check.value)} {check.unit}",
            f"{_number(check.target)} {check.unit}",
            Text(met, "green") if check.met else Text("no", "bold red"),
        )
    return table


def _capacity(state: CapacityState) -> str:
    emergency = [demand for demand in state.demands if demand.kind is DemandKind.EMERGENCY]
    asked = "; ".join(f"{demand.units} units for {demand.asked_by}" for demand in emergency) or "nobody asks for more"
    doing = f" {state.doing}" if state.doing else ""
    error = f" Last error: {state.last_error}" if state.last_error else ""
    return f"Capacity of {state.model}: {state.units_in_service} units in service, {state.desired_units} wanted ({asked}).{doing}{error}"  # noqa: E501


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _grid(rows: Iterable[tuple[str | Text, ...]]) -> Table:
    """Columns without lines; a long text in the last one wraps under itself."""
    grid = Table.grid(padding=(0, 2))
    for n, row in enumerate(rows):
        if n == 0:
            for column in range(len(row)):
                last = column == len(row) - 1
                grid.add_column(overflow="fold", no_wrap=not last, style="" if last else "dim")
        grid.add_row(*row)
    return grid


def _phase(phase: str) -> Text:
    return Text(phase, _PHASE_STYLES.get(Phase(phase), "") if phase in set(Phase) else "")


_SEVERITY_STYLES = {Severity.CRITICAL: "bold red", Severity.WARNING: "bold yellow", Severity.NOTICE: "cyan"}


def health_view(health: Health, times: Times) -> RenderableType:
    """A health check: what is open, the worst first, and what it mended."""
    report = cleaned(health.report)
    style = "bold green" if health.healthy else "bold red"
    parts: list[RenderableType] = [Text(f"{headline(report)}. Checked {times.both(report.checked_at)}.", style)]
    if health.late_since is not None:
        late = f"A newer check should have come {times.ago(health.late_since)}: is a runbook worker running?"
        parts.append(Text(late, "bold red"))
    for finding in report.open:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        told = f"incident {finding.incident}" if finding.incident else ""
        rows = {
            "why": finding.why,
            "do": finding.do,
            "since": times.both(finding.since),
            "told": told,
            "repair": f"failed: {finding.repair_error}" if finding.repair_error else "",
        }
        for name, value in rows.items():
            if value:
                table.add_row(f"  {name}", value)
        parts += [Text(""), Text(f"{finding.severity}: {finding.what}", _SEVERITY_STYLES[finding.severity]), table]
    mended = [finding for finding in report.findings if finding not in report.open]
    parts += [Text(""), Text("Mended", "bold")] if mended else []
    parts += [Text(f"  {finding.what} {finding.repaired}") for finding in mended]
    return Group(*parts)


def make_table(*columns: str, whole: int = 0) -> Table:
    """A table whose first `whole` columns are never wrapped."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for n, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=n < whole)
    return table
