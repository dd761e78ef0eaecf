"""Calendar files: rows of ICS and CSV files as what `domain.calendar.entry` takes, each with its line."""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePath
from typing import Any

from domain.calendar import FIELDS, EntryError

MAX_BYTES = 5_000_000
MAX_ROWS = 5000
ICS_FIELDS = {
    "UID": "event_id",
    "X-RUNBOOKS-TYPE": "type",
    "X-RUNBOOKS-MULTIPLIER": "multiplier",
    "X-RUNBOOKS-MODELS": "models",
    "X-RUNBOOKS-LEAD-TIME": "lead_time",
}
"""Properties of a VEVENT; the type may also be its first category, the start is DTSTART, the source SUMMARY."""


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    line: int
    given: Mapping[str, str]
    wrong: EntryError | None = None
    """Why it cannot even be read."""


def rows_of(name: str, content: bytes) -> list[Row]:
    """The rows of a file, by the ending of its name.

    Raises:
        EntryError: it is no such file at all; `field` is `file`.
    """
    kind = PurePath(name).suffix.lower()
    if kind not in (".ics", ".csv"):
        raise EntryError("file", name, "files that end with .ics or .csv")
    if len(content) > MAX_BYTES:
        raise EntryError("file", name, f"at most {MAX_BYTES:,} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EntryError("file", name, f"text in UTF-8 ({error})") from None
    rows = list(_csv(name, text) if kind == ".csv" else _ics(name, text))
    if not rows:
        raise EntryError("file", name, "at least one row" if kind == ".csv" else "at least one VEVENT")
    if len(rows) > MAX_ROWS:
        raise EntryError("file", name, f"at most {MAX_ROWS:,} rows")
    return rows


def _csv(name: str, text: str) -> Iterator[Row]:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [column.strip() for column in next(lines, [])]
        for column in columns:
            if column not in FIELDS:
                raise EntryError("column", column, f"a first line with names of {', '.join(FIELDS)}")
        if len(set(columns)) != len(columns):
            raise EntryError("column", ",".join(columns), "each column once")
        line = lines.line_num + 1
        for cells in lines:
            at, line = line, lines.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            given = dict(zip(columns, cells, strict=False))
            wrong = None
            if len(cells) != len(columns):
                wrong = EntryError("row", ",".join(cells)[:200], f"{len(columns)} cells, as the first line has")
            yield Row(at, given, wrong)
    except csv.Error as error:
        raise EntryError("file", name, f"CSV ({error}, line {lines.line_num})") from None


def _ics(name: str, text: str) -> Iterator[Row]:
    from icalendar import Calendar

    begins = [number for number, line in enumerate(text.splitlines(), 1) if re.match(r"(?i)BEGIN:VEVENT\s*$", line)]
    try:
        events = [event for calendar in Calendar.from_ical(text, multiple=True) for event in calendar.walk("VEVENT")]
    except (ValueError, IndexError, KeyError) as error:
        raise EntryError("file", name, f"an iCalendar file ({error})") from None
    for number, event in enumerate(events):
        line = begins[number] if number < len(begins) else 0
        given = {field: str(event[name]) for name, field in ICS_FIELDS.items() if name in event}
        if "SUMMARY" in event:
            given["source"] = f"{name}: {event['SUMMARY']}"[:500]
        categories = event.get("CATEGORIES")
        if "type" not in given and categories is not None:
            given["type"] = str(next(iter(getattr(categories, "cats", [])), ""))
        try:
            yield Row(line, given | _start(event))
        except EntryError as error:
            yield Row(line, given, error)


def _start(event: Any) -> dict[str, str]:
    for name in ("RRULE", "RDATE"):
        if name in event:
            raise EntryError(name, event[name].to_ical().decode(), "one VEVENT for each event; it does not repeat")
    start = event.get("DTSTART")
    broken = any(name == "DTSTART" for name, _ in event.errors)
    moment = None if broken else getattr(start, "dt", None)
    if moment is None:
        raise EntryError("DTSTART", str(start or ""), "a date and time like 20261130T000000 with its TZID")
    if not isinstance(moment, datetime):
        raise EntryError("DTSTART", moment.isoformat(), "a time as well, like 20261130T000000 with its TZID")
    zone = getattr(moment.tzinfo, "key", None)
    if moment.tzinfo is not None and (zone is None or zone == "UTC"):
        return {"start": moment.isoformat()}  # in UTC, or in a zone that the file itself defines
    zone = zone or start.params.get("TZID")
    return {"start": moment.replace(tzinfo=None).isoformat()} | ({"zone": zone} if zone else {})
