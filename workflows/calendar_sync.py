"""The calendar's sync: every few minutes the table is read, and each event's workflow is started, moved or ended."""

from contextlib import suppress

from temporalio import workflow
from temporalio.exceptions import ApplicationError

from activities.calendar import CalendarActivities
from activities.decisions import DecisionActivities
from activities.events import EventActivities
from activities.pages import PageActivities
from domain.calendar_sync import CALENDAR_SYNC_WORKFLOW, CalendarSynced, PlanCalendar
from domain.pre_provisioning import (
    EVENT_REMOVED,
    EventRemoved,
    TellEvent,
    event_workflow_id,
)
from workflows._step import decide, load_policy, mutate, read
from workflows.search_attributes import SERVICE


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
        for event in plan.tell:
            await mutate(EventActivities.tell_event, TellEvent(event=event), summary=f"Tell {event.event_id}"[:200])
        for event_id, why in plan.remove.items():
            with suppress(ApplicationError):  # it has just ended by itself
                await workflow.get_external_workflow_handle(event_workflow_id(event_id)).signal(
                    EVENT_REMOVED, EventRemoved(reason=why)
                )
        told = _told_before()
        for page in plan.pages:
            if page.page_id not in told:
                await mutate(PageActivities.page, page, summary=f"Page {page.to}"[:200])
        return CalendarSynced(summary=plan.summary, told=[page.page_id for page in plan.pages])


def _told_before() -> list[str]:
    """By the run before; none if there was none, or this version cannot read it."""
    if not workflow.has_last_completion_result():
        return []
    try:
        last = workflow.get_last_completion_result(CalendarSynced)
    except (ValueError, RuntimeError):
        return []
    return last.told if last else []
