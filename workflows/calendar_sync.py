"""The calendar's sync: every few minutes the table is read, and each event's workflow is started, moved or ended."""

from contextlib import suppress
from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

from activities.calendar import CalendarActivities
from activities.decisions import DecisionActivities
from activities.events import EventActivities
from activities.pages import PageActivities
from domain.calendar_sync import CALENDAR_SYNC_WORKFLOW, CalendarSynced, PlanCalendar, about
from domain.messages import Page
from domain.pre_provisioning import (
    EVENT_REMOVED,
    EventRemoved,
    TellEvent,
    event_workflow_id,
    planned,
)
from workflows._step import decide, failure, last_result, load_policy, mutate, read
from workflows.search_attributes import SERVICE

WITHIN = timedelta(minutes=1)
"""For each message: the next sync tries again."""
MOST_PAGES = 5
"""Of one sync: a table that was filled with nonsense is one thing to look at."""


@workflow.defn(name=CALENDAR_SYNC_WORKFLOW)
class CalendarSyncWorkflow:
    """One sync. Its schedule hands each run the result of the last one, so that nothing is told twice."""

    @workflow.run
    async def run(self) -> CalendarSynced:
        """Answers what was found and done; fails when the table or Temporal cannot be read, which the health check
        sees."""
        workflow.upsert_search_attributes([SERVICE.value_set("mangaassist")])
        snapshot = await load_policy()
        # In this order: a workflow that is started after the table was read must not look like one without a row.
        running = await read(EventActivities.running_events, None, summary="Which events are followed?")
        table = await read(CalendarActivities.read_calendar, None, summary="Read the calendar")
        plan = await decide(
            DecisionActivities.plan_calendar,
            PlanCalendar(table=table, running=running, snapshot=snapshot, now=workflow.now()),
            summary="Which events to start, move and end",
        )
        workflow.set_current_details(plan.summary)
        untold = []
        for event in plan.tell:
            summary = f"Tell {event.event_id}"[:200]
            try:
                await mutate(EventActivities.tell_event, TellEvent(event=event), summary=summary, within=WITHIN)
            except ActivityError as error:  # the next sync tries again; the other events must not wait for that
                why = failure(error)[1]
                text = f"{planned(event)} could not be handed to its workflow: {why}. The next sync tries again"
                untold.append(about(event.event_id, text))
        for event_id, why in plan.remove.items():
            with suppress(ApplicationError):  # it has just ended by itself
                await workflow.get_external_workflow_handle(event_workflow_id(event_id)).signal(
                    EVENT_REMOVED, EventRemoved(reason=why)
                )
        last = last_result(CalendarSynced)
        told = await self._page([*plan.pages, *untold], last.told if last else [])
        return CalendarSynced(summary=plan.summary, told=told)

    async def _page(self, pages: list[Page], before: list[str]) -> list[str]:
        """Page about what was not told before; of very many the rest in one. Answers what has been told."""
        new = [page for page in pages if page.page_id not in before]
        told = [page.page_id for page in pages if page.page_id in before]
        rest = {page.page_id: page for page in new[MOST_PAGES:]}
        if rest:
            text = f"calendar: {len(rest)} more rows need a person; the details of this calendar-sync run name each"
            new = [*new[:MOST_PAGES], about("calendar", text)]
        for page in new:
            try:
                await mutate(PageActivities.page, page, summary=f"Page {page.to}"[:200], within=WITHIN)
            except ActivityError as error:  # the next sync tries again
                workflow.logger.error("a page could not be sent", extra={"error": failure(error)[1]})
            else:
                told.append(page.page_id)
        return [*told, *rest]
