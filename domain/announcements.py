"""Announcements in the publisher's feed (S1, prevention): recognised by the policy's words, dated, proposed. Pure.

A proposal is a row of the calendar that counts only once a person has accepted it. Its id is a hash of the entry's own
id and the date, so that the same announcement is the same row, and one whose date moved is a new one.
"""

import re
import unicodedata
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from hashlib import sha256
from zoneinfo import ZoneInfo

from pydantic import AwareDatetime, BaseModel, ConfigDict

from domain.calendar import CalendarEvent, EventStatus
from domain.incident import cut, quoted, utc
from domain.messages import Message, PolicySnapshot
from domain.policy import FeedPolicy
from domain.timetable import moment

PUBLISHER_FEED_WORKFLOW = "PublisherFeedWorkflow"
FEED_SCHEDULE = "publisher-feed"
ASKED_BY = "publisher feed"

_WEEKDAYS = "月火水木金土日"
_MONTHS = (
    *("jan(?:uary)?", "feb(?:ruary)?", "mar(?:ch)?", "apr(?:il)?", "may", "june?"),
    *("july?", "aug(?:ust)?", "sep(?:t|tember)?", "oct(?:ober)?", "nov(?:ember)?", "dec(?:ember)?"),
)
_MONTH = rf"(?P<name>(?:{'|'.join(_MONTHS)})\b\.?)"
_DAY = r"(?P<day>\d{1,2})"
_YEAR = r"(?P<year>20\d{2})"
# After the date: a weekday, and an hour on the Japanese clock, which counts past midnight (25:00).
_REST = (
    rf"(?:\s*[(](?P<weekday>[{_WEEKDAYS}])(?:曜日?)?(?:[・･]祝)?[)])?"
    r"(?:\s*(?P<noon>午前|午後)?(?P<hour>\d{1,2})(?:時(?:(?P<minute>\d{1,2})分)?|:(?P<minutes>\d{2})))?"
)
_DATES = (
    rf"(?:{_YEAR}年\s*)?(?P<month>\d{{1,2}})月\s*{_DAY}日{_REST}",
    rf"(?<!\d){_YEAR}[/.-](?P<month>\d{{1,2}})[/.-]{_DAY}(?!\d){_REST}",
    # Without a year only with a weekday: 1/2 may be a half.
    rf"(?<![\d/])(?P<month>\d{{1,2}})/{_DAY}(?=\s*[(][{_WEEKDAYS}]){_REST}",
    rf"\b{_MONTH}\s+{_DAY}(?:st|nd|rd|th)?\b(?:,?\s+{_YEAR})?",
    rf"\b{_DAY}(?:st|nd|rd|th)?\s+{_MONTH}(?:,?\s+{_YEAR})?",
)
_PATTERNS = tuple(re.compile(pattern, re.ASCII | re.IGNORECASE) for pattern in _DATES)
LAST_HOUR = 29
"""Of the Japanese clock that counts past midnight."""
EARLIER = timedelta(days=60)
"""A day and month without a year mean the first such day from so long before the entry on: reports look back, too."""


class FeedEntry(BaseModel):
    """One entry of a feed. Untrusted text."""

    model_config = ConfigDict(frozen=True)

    guid: str
    title: str = ""
    summary: str = ""
    link: str = ""
    published: AwareDatetime | None = None


class FeedRead(Message):
    """What the feed says now."""

    entries: tuple[FeedEntry, ...] = ()
    left_out: int = 0
    """Older ones, over the policy's number."""
    problem: str = ""
    """Why it could not be read; empty: it could."""


class Proposal(Message):
    """An announcement as a row of the calendar."""

    event: CalendarEvent
    title: str
    note: str
    """Where the date comes from, and what is doubtful."""


class FeedReport(Message):
    """What a run found and did; the next run begins from it."""

    read_at: AwareDatetime
    entries: int = 0
    left_out: int = 0
    problem: str = ""
    failures: int = 0
    """Runs in a row that could not read it, with this one."""
    proposed: tuple[Proposal, ...] = ()
    """New in this run."""
    undated: tuple[str, ...] = ()
    """Titles that were recognised and have no date to come."""
    known: tuple[str, ...] = ()
    """Ids of the rows proposed so far whose entries are still in the feed: not proposed again, whatever became of
    the rows."""


class Recognise(Message):
    """Asks for the announcements in a feed."""

    read: FeedRead
    snapshot: PolicySnapshot
    now: AwareDatetime
    """Workflow time."""
    before: FeedReport | None = None


def recognise(request: Recognise) -> FeedReport:
    """Every new announcement of something to come, as a proposal."""
    read, before = request.read, request.before
    known = before.known if before else ()
    if read.problem:
        failures = (before.failures if before else 0) + 1
        return FeedReport(read_at=request.now, problem=read.problem, failures=failures, known=known)
    now = request.snapshot.clock.business(request.now)
    found: dict[str, Proposal] = {}
    undated = []
    for entry in read.entries:
        event_type = _type_of(entry, request.snapshot.policy.feed)
        if event_type is None:
            continue
        proposal = _proposal(entry, event_type, request.snapshot, now)
        if proposal is None:
            undated.append(cut(entry.title or entry.guid, 200))
        else:
            found.setdefault(proposal.event.event_id, proposal)
    return FeedReport(
        read_at=request.now,
        entries=len(read.entries),
        left_out=read.left_out,
        proposed=tuple(proposal for event_id, proposal in found.items() if event_id not in known),
        undated=tuple(undated),
        known=tuple(found),
    )


def _normal(text: str) -> str:
    """Without tags, in one width."""
    return unicodedata.normalize("NFKC", re.sub(r"<[^<>]*>", " ", text))


def _type_of(entry: FeedEntry, policy: FeedPolicy) -> str | None:
    text = _normal(f"{entry.title}\n{entry.summary}").casefold()
    for rule in policy.rules:
        if any(_normal(word).casefold() in text for word in rule.words):
            return rule.event_type
    return None


def _proposal(entry: FeedEntry, event_type: str, snapshot: PolicySnapshot, now: datetime) -> Proposal | None:
    """None: it says no date that is still to come."""
    policy, zone = snapshot.policy, ZoneInfo(snapshot.policy.feed.zone)
    dated = [
        (start, note)
        for text in (entry.title, entry.summary)
        for start, note in _dates(_normal(text), entry.published or now, zone)
        if start > now
    ]
    if not dated and entry.published is not None and entry.published > now:
        dated = [(entry.published, "the date is the entry's own; its text has none")]
    if not dated:
        return None
    start, note = dated[0]
    others = sorted({f"{other.astimezone(zone):%Y-%m-%d}" for other, _ in dated[1:] if other != start})
    kind = policy.calendar.event_types[event_type]
    local = start.astimezone(zone)
    digest = sha256(f"{entry.guid}\n{local:%Y-%m-%d}".encode()).hexdigest()[:12]
    event = CalendarEvent(
        event_id=f"{event_type}-{local:%Y-%m-%d}-{digest}",
        type=event_type,
        starts_at=local,
        multiplier=kind.multiplier,
        models=tuple(policy.models),
        lead_time=snapshot.clock.business_duration(kind.lead_time),
        source=cut(f"feed: {' '.join(entry.title.split()) or entry.guid} {entry.link}".strip(), 500),
        asked_by=ASKED_BY,
        status=EventStatus.PROPOSED,
    )
    doubts = [note, f"the text has other dates, too: {', '.join(others)}" if others else ""]
    return Proposal(event=event, title=cut(entry.title or entry.guid, 200), note="; ".join(filter(None, doubts)))


def _dates(text: str, published: datetime, zone: ZoneInfo) -> Iterator[tuple[datetime, str]]:
    """Every date in the text, in its order, with what is doubtful about it."""
    matches = [match for pattern in _PATTERNS for match in pattern.finditer(text)]
    for match in sorted(matches, key=lambda found: found.start()):
        found = match.groupdict()
        month = int(found["month"]) if found.get("month") else _month(found["name"])
        day = _day(found.get("year"), month, int(found["day"]), published.astimezone(zone).date())
        if day is None:
            continue
        note = ""
        weekday = found.get("weekday")
        if weekday and _WEEKDAYS.index(weekday) != day.weekday():
            note = f"the text says {weekday}, and {day} is a {_WEEKDAYS[day.weekday()]}"
        hour = int(found.get("hour") or 0) + 12 * (found.get("noon") == "午後")
        minute = int(found.get("minute") or found.get("minutes") or 0)
        if hour > LAST_HOUR or minute > 59:
            hour = minute = 0
        days, hour = divmod(hour, 24)
        yield moment(day + timedelta(days=days), time(hour, minute), zone), note


def _month(name: str) -> int:
    return [month[:3] for month in _MONTHS].index(name[:3].lower()) + 1


def _day(year: str | None, month: int, day: int, published: date) -> date | None:
    """The day, or None if there is none; without a year the first one from shortly before the entry on."""
    years = [int(year)] if year else range((published - EARLIER).year, published.year + 5)
    for candidate in years:
        try:
            found = date(candidate, month, day)
        except ValueError:  # no such day, or only in a leap year
            continue
        if year or found >= published - EARLIER:
            return found
    return None


# ---------------------------------------------------------------- words


def page_text(report: FeedReport, policy: FeedPolicy) -> str:
    """What people are told of a run; empty: nothing."""
    if report.problem:
        if report.failures != policy.page_after_failures:
            return ""
        return f"the publisher's feed could not be read {report.failures} times in a row: {report.problem}"
    lines = [
        f"{proposal.title}: {proposal.event.type} at {proposal.event.starts_at.isoformat()}, "
        f"{proposal.event.multiplier:g}x ({proposal.note or 'dated by its text'}). "
        f"runbooks calendar accept {proposal.event.event_id}"
        for proposal in report.proposed
    ]
    return "the publisher announced, and a person should accept or remove: " + " / ".join(lines) if lines else ""


def details(report: FeedReport) -> str:
    """The report as Markdown, for the Temporal UI."""
    if report.problem:
        return f"# The feed cannot be read\n\n{quoted(report.problem)} ({report.failures} times in a row)."
    lines = [f"# {len(report.proposed)} new proposals", "", f"{report.entries} entries, read {utc(report.read_at)}."]
    lines += [f"{report.left_out} older ones were left out."] if report.left_out else []
    for proposal in report.proposed:
        event = proposal.event
        lines += ["", f"- **{event.type}** {event.starts_at.isoformat()}, {event.multiplier:g}x: "
                  f"{quoted(proposal.title)}"]  # fmt: skip
        lines += [f"  {quoted(proposal.note)}"] if proposal.note else []
        lines += [f"  `runbooks calendar accept {event.event_id}`"]
    lines += ["", "Recognised, and without a date to come:"] if report.undated else []
    lines += [f"- {quoted(title)}" for title in report.undated]
    return "\n".join(lines)
