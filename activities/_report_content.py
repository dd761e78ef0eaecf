"""What the incident report says, free of any format: sections of texts, lists and tables made from the record.

HTML and Markdown are rendered from the same content, so they cannot differ. Nothing here is invented: every
sentence rests on a field of the record, and the post-mortem asks questions instead of answering them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

from domain.clock import RehearsalClock
from domain.cost import breakevens
from domain.evidence import Check, Reading
from domain.incident import BudgetRow, Decision, IncidentRecord, Lever, LeverName, LeverStatus, Phase
from domain.load import LoadSnapshot
from domain.messages import ABORT, APPROVE_REVERT, RELEASE_LEVER, PolicySnapshot

TOKYO = ZoneInfo("Asia/Tokyo")
LEVER_TITLES = {
    LeverName.MODEL_ROUTING: "model routing",
    LeverName.REQUEST_COALESCING: "request coalescing",
    LeverName.CACHE_TTL: "cache TTL",
    LeverName.BATCH_WINDOW: "batch window",
    LeverName.CAPACITY: "capacity",
}
WEEK = timedelta(days=6)
"""Within it the day of the week says which day is meant."""

Tone = Literal["good", "bad", "quiet", "plain"]


@dataclass(frozen=True)
class Toned:
    """A text that is good or bad news, or of less weight."""

    text: str
    tone: Tone


@dataclass(frozen=True)
class Stamp:
    """One moment: business time in Tokyo, and UTC."""

    tokyo: str
    utc: str


Cell = str | Toned | Stamp


@dataclass(frozen=True)
class Block:
    """One piece of a section."""

    kind: Literal["text", "bullets", "table", "plots"]
    text: str = ""
    items: Sequence[Cell] = ()
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()


@dataclass(frozen=True)
class Section:
    """A chapter of the report."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Content:
    """The whole report."""

    title: str
    status: Toned
    subtitle: str
    summary: Sequence[tuple[str, str]]
    """What happened, what was done, how it ended: one sentence each."""
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]


@dataclass(frozen=True)
class Times:
    """Writes moments and durations of one incident for people."""

    clock: RehearsalClock
    start: datetime
    end: datetime

    @property
    def rehearsed(self) -> bool:
        """Whether business time differs from real time."""
        return self.clock != RehearsalClock()

    def business(self, at: datetime) -> datetime:
        """Business time in Tokyo."""
        return self.clock.business(at).astimezone(TOKYO)

    def tokyo(self, at: datetime) -> str:
        """E.g. `Mon 00:05:12`, with the date when the incident is longer than the week's days tell apart."""
        business = self.business(at)
        longer = self.business(self.end) - self.business(self.start) > WEEK
        return f"{business:%a} {business.day} {business:%b %H:%M:%S}" if longer else f"{business:%a %H:%M:%S}"

    def date(self, at: datetime) -> str:
        """E.g. `Monday 23 November 2026`."""
        business = self.business(at)
        return f"{business:%A} {business.day} {business:%B %Y}"

    def stamp(self, at: datetime | None, absent: str = "–") -> Cell:
        """Tokyo and UTC; UTC to the tenth of a second where time is compressed."""
        if at is None:
            return Toned(absent, "quiet")
        utc = at.astimezone(ZoneInfo("UTC"))
        exact = f".{utc.microsecond // 100_000}" if self.clock.speed > 1 else ""
        return Stamp(self.tokyo(at), f"{utc:%a %H:%M:%S}{exact} UTC")

    def lasting(self, real: timedelta) -> str:
        """A duration in business time, and the real one where time is compressed."""
        if self.clock.speed == 1:
            return _words(real)
        return f"{_words(self.clock.business_duration(real))} ({_words(real)} real)"


def report_content(record: IncidentRecord, snapshot: PolicySnapshot, as_of: datetime) -> Content:
    """The report of `record` as of the real moment `as_of` (its closing, or now)."""
    return _Report(record, snapshot, as_of, Times(snapshot.clock, record.opened_at, as_of)).content()


@dataclass(frozen=True)
class _Report:
    record: IncidentRecord
    snapshot: PolicySnapshot
    as_of: datetime
    times: Times

    def content(self) -> Content:
        record, times = self.record, self.times
        is_open = record.closed_at is None
        told = "Times are Tokyo, with UTC beside them."
        if times.rehearsed:
            told = (
                f"This is a rehearsal at {times.clock.speed:g} times real speed: times are business time in Tokyo, "
                "with real UTC beside them."
            )
        when = f"{'As of' if is_open else 'Closed'} {times.tokyo(self.as_of)}"
        return Content(
            title=f"Incident {record.key}",
            status=Toned(f"open: {record.phase}", "bad") if is_open else Toned("closed", "good"),
            subtitle=f"{times.date(record.opened_at)}. {when}. {told}",
            summary=self.summary(),
            facts=self.facts(),
            sections=[
                Section("to-do", "What remains to do", self.to_do()),
                Section("plots", "Plots", [Block("plots")]),
                Section("timeline", "Timeline", self.timeline()),
                Section("diagnosis", "Diagnosis", self.diagnosis()),
                Section("checks", "Evidence checks", self.checks()),
                *self.budget(),
                Section("arithmetic", "Arithmetic of the plan", self.arithmetic()),
                Section("actions", "Actions", self.actions()),
                Section("recovery", "Recovery", self.recovery()),
                Section("decisions", "Who decided what", self.decisions()),
                Section("calendar", "Proposal for the event calendar", self.calendar()),
                Section("post-mortem", "Post-mortem", self.post_mortem()),
                Section("appendix", "Appendix", self.appendix()),
            ],
        )

    # ------------------------------------------------------------ summary

    def summary(self) -> list[tuple[str, str]]:
        record, times = self.record, self.times
        happened = (
            f"On {times.date(record.opened_at)} at {times.business(record.opened_at):%H:%M:%S} Tokyo time alarm "
            f"{record.alarm.alarm_name} opened this incident"
        )
        if record.peak_offered_tokens_per_second:
            happened += f"; users asked for up to {record.peak_offered_tokens_per_second:,.0f} tokens/s"
            if (capacity := self.capacity_at_start()) is not None:
                happened += f" while the capacity of {record.model} was {capacity:,.0f}"
        cause = record.diagnosis.sentence if record.diagnosis else record.alarm.reason
        happened += f"{'; cause: ' if record.diagnosis else '; the alarm says: '}{_stem(cause)}." if cause else "."
        ending = "How it ended" if record.closed_at else "Where it stands"
        return [("What happened", happened), ("What was done", self.done()), (ending, self.ended())]

    def capacity_at_start(self) -> float | None:
        if self.record.load_at_start is None or self.record.model is None:
            return None
        return self.record.load_at_start.model(self.record.model).capacity_tokens_per_second

    def done(self) -> str:
        acted = [lever for lever in self.record.levers if lever.applied_at is not None]
        failed = [lever for lever in self.record.levers if lever.status is LeverStatus.FAILED]
        if not acted and not failed:
            return "Nothing was changed."
        parts = []
        if acted:
            parts.append("the runbook set " + "; ".join(_change(lever) for lever in acted))
        if failed:
            parts.append(
                "it failed to set " + "; ".join(f"{_title(lever)} ({_stem(lever.detail)})" for lever in failed)
            )
        return _capital("; ".join(parts)) + "."

    def ended(self) -> str:
        record, times = self.record, self.times
        if record.closed_at is None:
            waiting = f"waiting for {record.waiting_for}" if record.waiting_for else "waiting for nobody"
            lead = f"Still open ({record.phase}), {waiting}"
            if record.next_step:
                lead += f"; next: {_stem(record.next_step)}"
                lead += f" at {times.tokyo(record.next_at)}" if record.next_at else ""
        elif record.outcome:
            lead = _stem(record.outcome)
        elif record.recovered_at:
            how = _capital(record.recovery or "recovered")
            lead = f"{how} after {self.since_opening(record.recovered_at)}, and closed"
        else:
            lead = "Closed without recovery"
        return f"{lead}; time to mitigate: {self.mitigated()}; extra capacity: {self.cost()}."

    def since_opening(self, at: datetime) -> str:
        return self.times.lasting(at - self.record.opened_at)

    def mitigated(self) -> str:
        return self.since_opening(self.record.mitigated_at) if self.record.mitigated_at else "not mitigated"

    def cost(self) -> str:
        record = self.record
        lever = record.lever(LeverName.CAPACITY)
        if lever is None or not record.units_bought:
            return "none bought"
        if lever.landed_at is None:
            return f"{record.units_bought} units asked for, none in service"
        held, spec = record.capacity_held(self.as_of), self.snapshot.policy.models.get(record.model or "")
        cost = record.cost(held, self.times.clock, spec.usd_per_unit_hour if spec else None)
        running = "" if lever.released_at else " so far, and running"
        return f"{record.units_bought} units for {self.times.lasting(held)} = {cost}{running}"

    def facts(self) -> list[tuple[str, str]]:
        record = self.record
        recovered = self.since_opening(record.recovered_at) if record.recovered_at else "not recovered"
        return [
            ("Severity", record.severity),
            ("Time to mitigate", self.mitigated()),
            ("Time to recover", recovered),
            ("Open for", self.since_opening(self.as_of)),
            ("Extra capacity", self.cost()),
            ("Acknowledged by", record.acknowledged_by or "nobody"),
        ]

    # ------------------------------------------------------------ sections

    def to_do(self) -> list[Block]:
        record, times = self.record, self.times
        items: list[Cell] = []
        if record.closed_at is None:
            next_at = f", {times.tokyo(record.next_at)}" if record.next_at else ""
            items.append(f"Waiting for: {record.waiting_for or 'nobody'}")
            items.append(f"Next: {record.next_step or 'nothing planned'}{next_at}")
            if record.phase is Phase.AWAITING_DECISION and record.keep_proposal:
                items.append(record.keep_proposal)
            for lever in record.held:
                until = f", at most until {times.tokyo(lever.hold_until)}" if lever.hold_until else ""
                items.append(f"Held: {_title(lever)} at {lever.after}{until}")
        items += record.to_do
        items += [Toned(f"Still held after cleanup: {item}", "bad") for item in record.still_held]
        if record.closed_at is not None:
            if not items:
                items.append("Nothing is left for people to do.")
            items.append(_baseline("Knobs", record.knobs_at_baseline))
            if record.runbook == "latency":
                items.append("Capacity: not touched")
            else:
                items.append(_baseline("Capacity", record.capacity_at_baseline))
        return [_bullets(*items)]

    def timeline(self) -> list[Block]:
        rows = [
            [
                self.times.stamp(entry.at),
                entry.kind,
                Toned(entry.text, "plain"),
                entry.who or Toned("automation", "quiet"),
            ]
            for entry in sorted(self.record.timeline, key=lambda entry: entry.at)
        ]
        return [_table(["When", "What", "Event", "Who"], rows)]

    def diagnosis(self) -> list[Block]:
        diagnosis = self.record.diagnosis
        if diagnosis is None:
            return [_text("No diagnosis was made.")]
        rows: list[list[Cell]] = [
            [
                f"{index}. {step.question}",
                Toned(step.answer, "bad" if step.answer == "unknown" else "plain"),
                step.because,
            ]
            for index, step in enumerate(diagnosis.path, 1)
        ]
        blocks = [_text(f"Finding: {diagnosis.sentence}"), _table(["Question", "Answer", "Because"], rows)]
        if diagnosis.missing:
            blocks += [_text("What could not be read:"), _bullets(*diagnosis.missing)]
        return blocks

    def checks(self) -> list[Block]:
        verdicts: dict[bool | None, Cell] = {
            True: Toned("breaching", "bad"),
            False: Toned("normal", "good"),
            None: Toned("could not tell", "bad"),
        }
        rows = [
            [
                check.name,
                verdicts[check.breaching],
                check.finding,
                self.freshness(check),
                f"{check.duration_ms:,.0f} ms",
            ]
            for check in self.record.checks
        ]
        return [_table(["Check", "Verdict", "Finding", "As of", "Took (real)"], rows)]

    def freshness(self, check: Check) -> Cell:
        if check.observed_at is None:
            return Toned("not read", "bad")
        age = self.record.opened_at - check.observed_at
        words = _words(self.times.clock.business_duration(abs(age)))
        relation = "before opening" if age >= timedelta(0) else "after opening"
        return f"{self.times.tokyo(check.observed_at)}, {words} {relation}"

    def budget(self) -> list[Section]:
        """The latency budget, of a latency incident alone."""
        before, after = self.record.budget_before, {row.stage: row for row in self.record.budget_after}
        if not before and not after:
            return []
        rows: list[list[Cell]] = [
            [
                _capital(row.stage),
                "–" if row.budget_ms is None else f"{number(row.budget_ms)} ms",
                _measured(row),
                _measured(after.get(row.stage)),
            ]
            for row in before or after.values()
        ]
        return [
            Section(
                "budget",
                "Latency budget",
                [
                    _table(["Stage (P99)", "Budget", "At the start", "Once recovered"], rows),
                    _text("P99s of stages do not add up to the total's: their tails seldom meet in one request."),
                ],
            )
        ]

    def arithmetic(self) -> list[Block]:
        lines = self.record.arithmetic
        size = _bullets(*lines) if lines else _text("Nothing was computed.")
        if self.record.runbook == "latency":
            return [size]
        pays: list[list[Cell]] = [
            [window.window, str(window.units), f"{number(window.tokens_per_second)} tokens/s"]
            for window in breakevens(self.snapshot.policy, self.record.model or "")
            if window.tokens_per_second
        ]
        headers = ["Timetable", "Units", "Cheaper than on demand from"]
        return [size, _table(headers, pays)] if pays else [size]

    def actions(self) -> list[Block]:
        rows: list[list[Cell]] = []
        for lever in self.record.levers:
            tone: Tone = "bad" if lever.status is LeverStatus.FAILED else "plain"
            changed = lever.applied_at is not None
            rows.append(
                [
                    _capital(_title(lever)),
                    Toned(lever.status, tone),
                    lever.before,
                    lever.after if changed else Toned(f"{lever.after} (not set)", "quiet"),
                    self.times.stamp(lever.applied_at),
                    self.times.stamp(lever.landed_at),
                    self.released(lever),
                    Toned(self.by(lever), "quiet"),
                    ". ".join(_stem(part) for part in (lever.why, lever.detail) if part),
                ]
            )
        headers = [
            "Lever",
            "Now",
            "Before",
            "After",
            "Applied",
            "Effect there",
            "Released",
            "By",
            "Why, and latest word",
        ]
        return [_table(headers, rows)]

    def released(self, lever: Lever) -> Cell:
        if lever.released_at is not None or lever.applied_at is None:
            return self.times.stamp(lever.released_at)
        until = f", at most until {self.times.tokyo(lever.hold_until)}" if lever.hold_until else ""
        extended = f" (extended {lever.extensions} times)" if lever.extensions else ""
        return Toned(f"still held{until}{extended}", "bad")

    def by(self, lever: Lever) -> str:
        if lever.applied_at is None:
            return "–"
        released_at = lever.released_at
        if released_at is None:
            return "runbook"
        if lever.status is LeverStatus.KEPT:
            return "runbook; then a person's own"
        ways = (APPROVE_REVERT, RELEASE_LEVER, ABORT)
        asked = [
            decision
            for decision in self.record.decisions
            if decision.outcome == "accepted" and decision.at <= released_at and decision.action.startswith(ways)
        ]
        if not asked:
            return "runbook; released by the runbook"
        last = max(asked, key=lambda decision: decision.at)
        return f"runbook; released after {last.action} by {last.who}"

    def recovery(self) -> list[Block]:
        record = self.record
        if record.recovered_at:
            how = record.recovery_detail or record.recovery or "recovered"
            after = self.since_opening(record.recovered_at)
            blocks = [_text(f"At {self.times.tokyo(record.recovered_at)}, {after} after opening: {_stem(how)}.")]
        else:
            blocks = [_text(f"Not recovered. {record.recovery_detail}")]
        rows: list[list[Cell]] = [
            [
                check.name,
                Toned("no data", "bad") if check.value is None else f"{number(check.value)} {check.unit}",
                f"{number(check.target)} {check.unit}",
                self.times.stamp(check.since, "met") if check.met else Toned("not met", "bad"),
            ]
            for check in record.recovery_checks
        ]
        blocks.append(_table(["Measure", "Value", "Target", "Met since"], rows))
        if record.effects:
            blocks += [_text("Effects of the levers, beside recovery:"), _bullets(*record.effects)]
        loads = [load for load in (record.load_at_start, record.load_at_recovery) if load is not None]
        if loads:
            columns = [_load_column(load) for load in loads]
            names = [
                name
                for name, load in (("At the start", record.load_at_start), ("At recovery", record.load_at_recovery))
                if load is not None
            ]
            labels = list(dict.fromkeys(label for column in columns for label in column))
            blocks.append(
                _table(["Load", *names], [[label, *(c.get(label, "no data") for c in columns)] for label in labels])
            )
        return blocks

    def decisions(self) -> list[Block]:
        if not self.record.decisions:
            return [_text("Nobody has decided anything.")]
        rows: list[list[Cell]] = [
            [
                self.times.stamp(decision.at),
                decision.who,
                decision.action,
                _outcome(decision),
                decision.why,
                decision.message,
            ]
            for decision in sorted(self.record.decisions, key=lambda decision: decision.at)
        ]
        return [_table(["When", "Who", "Asked for", "Outcome", "Reason given", "Answer"], rows)]

    def calendar(self) -> list[Block]:
        proposal = self.record.calendar_proposal
        if proposal is None:
            return [_text("None.")]
        written = (
            f"Written to the calendar as {proposal.event_id}."
            if proposal.written
            else "Not written: it is written when somebody approves the revert."
        )
        return [
            _text(
                f"Event type {proposal.event_type}, traffic multiplied by {proposal.multiplier:g}: "
                f"{_stem(proposal.reason)}. {written}"
            )
        ]

    def post_mortem(self) -> list[Block]:
        return [
            _text("Prompts from the facts; the answers are yours. Blame nobody."),
            _text("What went well:"),
            _bullets(*self.went_well()),
            _text("What to improve:"),
            _bullets(*self.to_improve()),
        ]

    def went_well(self) -> list[str]:
        record = self.record
        prompts = []
        if record.mitigated_at:
            prompts.append(
                f"Mitigated {self.mitigated()} after opening. What made that possible, and will it next time?"
            )
        if record.recovered_at and record.recovery:
            prompts.append(f"{_capital(record.recovery)}. Which lever did most, and how do we know?")
        if record.knobs_at_baseline and record.capacity_at_baseline:
            prompts.append("Knobs and capacity are proven back at baseline. Was the order of the way back right?")
        return prompts or ["The record shows nothing that went well by itself. What did people do that helped?"]

    def to_improve(self) -> list[str]:
        record = self.record
        prompts = []
        if record.diagnosis and record.diagnosis.causes:
            prompts.append(f"Cause: {record.diagnosis.sentence} What would have prevented it, and who owns that?")
        elif record.diagnosis:
            prompts.append("The cause is unknown because evidence was missing. How do we make it readable?")
        prompts += [
            f"Lever {_title(lever)} failed: {_stem(lever.detail)}. Why, and how do we test that it works?"
            for lever in record.levers
            if lever.status is LeverStatus.FAILED
        ]
        prompts += [
            f"Check {check.name} could not tell: {_stem(check.finding)}. What was missing?"
            for check in record.checks
            if check.breaching is None
        ]
        pages = sum(entry.kind == "page" for entry in record.timeline)
        if pages:
            prompts.append(f"Pages sent to people: {pages}. Which were needed?")
        refused = [decision for decision in record.decisions if decision.outcome in ("denied", "not-possible")]
        prompts += [
            f"{decision.who} asked for {decision.action} and was told: {_stem(decision.message)}. "
            "Is the roster right, and was the way to ask clear?"
            for decision in refused
        ]
        if record.recovered_at is None:
            prompts.append("Recovery was not reached. What was tried by hand, and what should the runbook do?")
        if record.units_bought:
            prompts.append(f"Extra capacity: {self.cost()}. Was the size right, and could it have gone back sooner?")
        if record.previous_incident:
            prompts.append(
                "This key had an incident before (see the appendix). Which action of its post-mortem is open?"
            )
        if record.still_held:
            prompts.append("Something is still held after cleanup. Who takes it back, and when?")
        return prompts or ["The record shows nothing to improve by itself. What surprised people?"]

    def appendix(self) -> list[Block]:
        record, times = self.record, self.times
        identity: list[list[Cell]] = [
            ["Workflow id", record.incident_id],
            ["Run id", record.run_id],
            ["Run id of the last incident with this key", record.previous_incident or "none known"],
            ["Incident key", record.key],
            ["Service, model, runbook", f"{record.service}, {record.model or 'none'}, {record.runbook or 'triage'}"],
            ["Alarm", record.alarm.alarm_name],
            ["Alarm's reason", record.alarm.reason],
            ["Alarm ARN", record.alarm.alarm_arn or "not given"],
            ["Alarm changed at", times.stamp(record.alarm.changed_at)],
            ["Times the alarm said ALARM, duplicates included", str(record.alarm_times)],
            ["First delivery", f"{record.alarm.source} {record.alarm.message_id}"],
            ["Policy version", self.snapshot.policy.version],
            ["Opened", times.stamp(record.opened_at)],
            ["Closed", times.stamp(record.closed_at, "not closed")],
            ["UTC date of opening", f"{record.opened_at.astimezone(ZoneInfo('UTC')):%Y-%m-%d}"],
        ]
        if times.rehearsed:
            clock = times.clock
            identity.append(
                ["Clock", f"{clock.real_start.isoformat()} was business time {clock.business_start.isoformat()}, "
                 f"speed {clock.speed:g}"]
            )  # fmt: skip
        readings: list[list[Cell]] = [
            [check.name, reading.key, _reading(reading), times.stamp(reading.observed_at), reading.source]
            for check in record.checks
            for reading in check.evidence.readings.values()
        ]
        return [
            _text("In the Temporal UI, search for the workflow id and pick the run; its history is the full record."),
            _table(["", "Value"], identity),
            _text("Everything the checks read:"),
            _table(["Check", "Evidence", "Value", "True at", "Source"], readings),
        ]


def number(value: float) -> str:
    """A number for people: `9,800`, `0.1`, `12.3`."""
    if math.isfinite(value) and (value == int(value) or abs(value) >= 100):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _words(duration: timedelta) -> str:
    seconds = duration.total_seconds()
    if seconds < 10:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min" + (f" {rest} s" if rest else "")
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h" + (f" {minutes} min" if minutes else "")
    days, hours = divmod(hours, 24)
    return f"{days} d" + (f" {hours} h" if hours else "")


def _text(text: str) -> Block:
    return Block("text", text=text)


def _bullets(*items: Cell) -> Block:
    return Block("bullets", items=items)


def _table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Block:
    return Block("table", headers=headers, rows=rows) if rows else _text("None.")


def _title(lever: Lever) -> str:
    return LEVER_TITLES[lever.name]


def _change(lever: Lever) -> str:
    return f"{_title(lever)} ({lever.before} → {lever.after})"


def _stem(sentence: str) -> str:
    return sentence.strip().rstrip(".")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _measured(row: BudgetRow | None) -> Cell:
    if row is None or row.measured_ms is None:
        return Toned("no data", "quiet")
    return Toned(f"{number(row.measured_ms)} ms", "bad" if row.over else "plain")


def _baseline(what: str, proven: bool | None) -> Cell:
    if proven is None:
        return Toned(f"{what}: not proven to be at baseline", "bad")
    return Toned(f"{what}: back at baseline", "good") if proven else Toned(f"{what}: not at baseline", "bad")


def _outcome(decision: Decision) -> Toned:
    tones: dict[str, Tone] = {"accepted": "good", "already-done": "quiet"}
    return Toned(decision.outcome, tones.get(decision.outcome, "bad"))


def _reading(reading: Reading) -> Cell:
    if reading.value is None:
        return Toned(f"missing: {reading.missing or 'not read'}", "bad")
    value = reading.value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(value) or "none"
    return number(value) if isinstance(value, (int, float)) else value


def _load_column(load: LoadSnapshot) -> dict[str, str]:
    column: dict[str, str] = {}

    def put(label: str, value: float | None, unit: str) -> None:
        column[label] = "no data" if value is None else f"{number(value)} {unit}".strip()

    put("Offered, all intents", sum(load.offered_tokens_per_second.values()) or None, "tokens/s")
    for name, model in load.models.items():
        put(f"Sent to {name}", model.sent_tokens_per_second, "tokens/s")
        put(f"Capacity of {name}", model.capacity_tokens_per_second, "tokens/s")
        put(f"Throttles of {name}, newest period", model.throttles, "calls")
    put("Hit rate", None if load.hit_rate is None else load.hit_rate * 100, "%")
    put("Queue depth", load.queue_depth, "requests")
    put("P99 latency", load.p99_ms, "ms")
    put("Fallback answers", load.fallback_percent, "%")
    put("ECS tasks running", load.tasks_running, "")
    return column
