"""What every workflow that people decide on shares: its timeline, pages, roles read at the moment, typed answers."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

from activities.pages import PageActivities
from activities.settings import SettingsActivities
from domain.errors import ErrorKind
from domain.incident import Decision, TimelineEntry, cut
from domain.messages import Authorise, Page, PersonRequest, PolicySnapshot, UpdateResult
from domain.people import Role
from workflows._step import failure, mutate, read

T = TypeVar("T")

MAX_LINES, FIRST_LINES = 400, 100
"""Of the timeline, and how many of its first lines always stay."""
MAX_TEXT = 1500
MAX_DENIALS = 20
"""Of one person; after that the validator refuses, which costs no history."""
MAX_DECISIONS = 500

ON_CALL = "on-call"


class Recorded(Protocol):
    """What every record has."""

    timeline: list[TimelineEntry]
    decisions: list[Decision]


class OnRecord:
    """Base of the workflows that people decide on. Decisions are made one at a time, under `deciding`."""

    record: Recorded

    def __init__(self, severity: str) -> None:
        self.background: list[asyncio.Task[None]] = []
        self.deciding = asyncio.Lock()
        self.snapshot: PolicySnapshot | None = None
        """Loaded first thing in `run`."""
        self._severity = severity
        self._pages = 0
        self._left_out = 0
        self._denials: Counter[str] = Counter()

    @property
    def now_snapshot(self) -> PolicySnapshot:
        """The policy snapshot; only after `run` has loaded it."""
        assert self.snapshot is not None
        return self.snapshot

    def show(self) -> None:
        """The record as the UI's details and its search attributes."""
        raise NotImplementedError

    def note(self, kind: str, text: str, who: str | None = None) -> None:
        """Add a line to the timeline. It is bounded, as Temporal bounds payloads: of very many the middle goes."""
        timeline = self.record.timeline
        timeline.append(
            TimelineEntry.model_validate({"at": workflow.now(), "kind": kind, "text": cut(text, MAX_TEXT), "who": who})
        )
        if len(timeline) > MAX_LINES:
            self._left_out += 1
            left_out = TimelineEntry(
                at=timeline[FIRST_LINES].at, kind="note", text=f"{self._left_out} lines are left out here"
            )
            timeline[FIRST_LINES : FIRST_LINES + 2] = [left_out]
        self.show()

    def page(self, to: str, text: str) -> None:
        """Page people, without waiting for it."""
        self._pages += 1
        self.note("page", f"paged {to}: {text}")
        info = workflow.info()
        page = Page(
            page_id=f"{info.run_id}-{self._pages}",
            incident_id=info.workflow_id,
            severity=self._severity,
            to=to,
            text=text,
        )

        async def send() -> None:
            try:
                await mutate(PageActivities.page, page, summary=f"Page {to}"[:200])
            except ActivityError as error:
                self.note("note", f"a page to {to} could not be sent: {failure(error)[1]}")

        self.background.append(asyncio.create_task(send()))

    async def unless(self, stop: Callable[[], bool], work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, or None (and `work` cancelled) as soon as `stop` holds."""
        task = asyncio.ensure_future(work)
        await workflow.wait_condition(lambda: task.done() or stop())
        if task.done():
            return task.result()
        task.cancel()
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else asks for it
        return None

    # ------------------------------------------------------------ decisions

    def refuse_blank(self, request: PersonRequest) -> None:
        """For validators: malformed requests are refused before they are accepted, and leave no trace.

        So is the next try of one who was denied often: a history takes 2,000 updates, and the last must be an abort.
        """
        if not request.why.strip():
            raise ApplicationError("why: it is blank; say in a few words why", type=ErrorKind.INVALID)
        if self._denials[request.who] >= MAX_DENIALS or len(self.record.decisions) >= MAX_DECISIONS:
            raise ApplicationError(f"{request.who} was denied too often; ask for the role", type=ErrorKind.INVALID)

    async def why_not(self, action: str, who: str, needed: Role) -> str:
        """Empty, or why the person may not: the roster is read at this moment."""
        try:
            answer = await read(
                SettingsActivities.authorise,
                Authorise(who=who, needed=needed),
                summary=f"May {who} {action}?"[:200],
            )
        except ActivityError as error:
            return f"the roster could not be read, so nobody may: {failure(error)[1]}"
        return "" if answer.may else answer.message

    def decide(self, action: str, request: PersonRequest, outcome: str, message: str) -> UpdateResult:
        """Put a decision, or its denial, on record; answers the person."""
        if outcome == "denied":
            self._denials[request.who] += 1
        self.record.decisions.append(
            Decision.model_validate(
                {
                    "at": workflow.now(),
                    "who": request.who,
                    "action": action,
                    "why": request.why,
                    "outcome": outcome,
                    "message": message,
                }
            )
        )
        self.note("decision", f"{action}: {outcome}: {message} (why: {request.why})", request.who)
        return UpdateResult.model_validate({"outcome": outcome, "message": message})
