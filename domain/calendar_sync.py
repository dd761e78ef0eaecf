"""The sync of the event calendar: what its table means for the workflows that follow events. Pure."""

from collections.abc import Mapping, Sequence
from hashlib import sha256

from pydantic import AwareDatetime

from domain.calendar import CalendarEvent, EntryError, check_planned
from domain.clock import RehearsalClock
from domain.forecast import NoForecast
from domain.messages import Message, Page, PolicySnapshot
from domain.pre_provisioning import EventTimes, event_workflow_id, planned, times_of, uncompressed

CALENDAR_SYNC_WORKFLOW = "CalendarSyncWorkflow"
CALENDAR_SCHEDULE = "calendar-sync"


class CalendarTable(Message):
    """The table as read."""

    events: list[CalendarEvent]
    broken: dict[str, str]
    """Rows that are no events: id to what is wrong with them."""


class RunningEvent(Message):
    """An event's workflow that runs."""

    event_id: str
    fingerprint: str
    """Of the row that it follows; empty: not known yet."""


class PlanCalendar(Message):
    """Asks what the table as it is means for the workflows that run."""

    table: CalendarTable
    running: list[RunningEvent]
    snapshot: PolicySnapshot
    now: AwareDatetime


class CalendarSynced(Message):
    """What one sync found and did; the next one is given it."""

    summary: str
    told: list[str]
    """Ids of pages that are not sent again while what they are about stands."""


class CalendarPlan(Message):
    """What the sync does."""

    tell: list[CalendarEvent]
    """Workflows to start, or to tell of a change."""
    remove: dict[str, str]
    """Event id to why its workflow is to end."""
    pages: list[Page]
    """What a person should look at; each is paged once while it stands."""
    summary: str


def plan_calendar(request: PlanCalendar) -> CalendarPlan:
    """Which events are to be followed, moved or given up.

    An event that was provisioned for already (its row says when, and that is no earlier than it should be) is left
    alone, also where no workflow of ours did it. One that has begun is too late to provision for: an incident buys on
    evidence then. A row that cannot be read keeps the workflow that follows it.
    """
    policy, clock = request.snapshot.policy, request.snapshot.clock
    running = {event.event_id: event.fingerprint for event in request.running}
    rows = {event.event_id: event for event in request.table.events}
    tell: list[CalendarEvent] = []
    remove = {
        event_id: "its row is gone from the calendar"
        for event_id in running
        if event_id not in rows and event_id not in request.table.broken
    }
    pages = [about(event_id, f"calendar: {why}") for event_id, why in sorted(request.table.broken.items())]
    for event_id, event in sorted(rows.items()):
        if not event.counts:
            if event_id in running:
                remove[event_id] = f"its row is {event.status}, from {event.source}"
            continue
        try:
            check_planned(event, uncompressed(request.snapshot))
            times = times_of(event, policy, clock)
        except (EntryError, NoForecast) as error:
            pages.append(about(event_id, f"calendar row {event_id!r}: {error}"))
            continue
        if event_id in running:
            if running[event_id] != event.fingerprint:
                tell.append(event)
        elif times.ends_at <= request.now or _provisioned(event, times, clock):
            continue
        elif times.starts_at <= request.now:
            said = "has begun and was never provisioned for; nothing is bought for it now, an incident buys on evidence"
            pages.append(about(event_id, f"{planned(event)} {said}"))
        else:
            tell.append(event)
    return CalendarPlan(
        tell=tell,
        remove=remove,
        pages=pages,
        summary=_summary(rows, running, tell, remove, pages),
    )


def _provisioned(event: CalendarEvent, times: EventTimes, clock: RehearsalClock) -> bool:
    triggered = event.provisioning_triggered_at
    return triggered is not None and clock.real(triggered) >= times.buy_at


def about(event_id: str, text: str) -> Page:
    """The page about an event: the same text has the same id, so that it is sent once."""
    digest = sha256(text.encode()).hexdigest()[:12]
    workflow_id = event_workflow_id(event_id)
    return Page(page_id=f"calendar-{digest}", incident_id=workflow_id, severity="SEV3", to="on-call", text=text[:1500])


def _summary(
    rows: Mapping[str, CalendarEvent],
    running: Mapping[str, str],
    tell: Sequence[CalendarEvent],
    remove: Mapping[str, str],
    pages: Sequence[Page],
) -> str:
    started = [event.event_id for event in tell if event.event_id not in running]
    moved = [event.event_id for event in tell if event.event_id in running]
    parts = [f"{len(rows)} rows, {len(running)} events followed"]
    parts += [f"started: {', '.join(started)}"] if started else []
    parts += [f"changed: {', '.join(moved)}"] if moved else []
    parts += [f"given up: {', '.join(sorted(remove))}"] if remove else []
    parts += [page.text for page in pages]
    return "; ".join(parts)
