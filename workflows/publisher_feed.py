"""The publisher's feed: read it, recognise announcements, propose calendar entries, tell people."""

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.calendar import CalendarActivities
from activities.decisions import DecisionActivities
from activities.feed import FeedActivities
from activities.pages import PageActivities
from domain.announcements import (
    PUBLISHER_FEED_WORKFLOW,
    FeedReport,
    Proposal,
    Recognise,
    details,
    page_text,
)
from domain.messages import Page
from workflows._record import ON_CALL
from workflows._step import decide, failure, last_result, load_policy, mutate, wait
from workflows.search_attributes import SERVICE

CONTENT_OPS = "content ops"
"""Whose the calendar is (S1, prevention)."""


@workflow.defn(name=PUBLISHER_FEED_WORKFLOW)
class PublisherFeedWorkflow:
    """One reading. Its schedule hands each run the report of the last one, so that nothing is proposed twice."""

    @workflow.run
    async def run(self) -> FeedReport:
        """Answers what was proposed; a feed that cannot be read is an answer, and people are told when it goes on."""
        workflow.upsert_search_attributes([SERVICE.value_set("mangaassist")])
        before = last_result(FeedReport)
        snapshot = await load_policy()
        policy = snapshot.policy.feed
        if policy.url is None:
            return FeedReport(read_at=workflow.now(), known=before.known if before else ())
        read = await wait(FeedActivities.read_feed, policy, summary="Read the feed", at_most=policy.fetch_timeout)
        report = await decide(
            DecisionActivities.recognise_announcements,
            Recognise(read=read, snapshot=snapshot, now=workflow.now(), before=before),
            summary="Recognise announcements",
        )
        report = await self._propose(report)
        workflow.set_current_details(details(report))
        if text := page_text(report, policy):
            info = workflow.info()
            page = Page(
                page_id=f"{info.run_id}-feed",
                incident_id=info.workflow_id,
                severity="SEV4",
                to=ON_CALL if report.problem else CONTENT_OPS,
                text=text,
            )
            await mutate(PageActivities.page, page, summary=f"Tell {page.to}")
        return report

    async def _propose(self, report: FeedReport) -> FeedReport:
        """Only what is a new row is proposed; what could not be written is proposed by the next run."""
        made: list[Proposal] = []
        missed: set[str] = set()
        for proposal in report.proposed:
            event = proposal.event
            try:
                is_new = await mutate(
                    CalendarActivities.propose_event, event, summary=f"Propose {event.type} at {event.starts_at}"[:200]
                )
            except ActivityError as error:
                workflow.logger.error("a proposal could not be written", extra={"error": failure(error)[1]})
                missed.add(event.event_id)
                continue
            if is_new:
                made.append(proposal)
        known = tuple(event_id for event_id in report.known if event_id not in missed)
        return report.model_copy(update={"proposed": tuple(made), "known": known})
