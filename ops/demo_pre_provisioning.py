"""Pre-provisioning as a demo: from the entry in the calendar to the release of the units after the event."""

import asyncio
from datetime import UTC, datetime, timedelta

from domain import timetable
from domain.calendar import CalendarEvent
from domain.people import Role
from domain.policy import CapacityPolicy, EventTypePolicy
from domain.pre_provisioning import EventPhase, EventRecord, event_workflow_id, how_in_time
from ops.calendar import FollowedEvent
from ops.demo_stage import MODEL, DemoFailed, DemoResult, Options, Scenario, Show
from ops.service import ExitCode, OpsError
from ops.stack import Stack, StackOptions, before_next_release
from ops.views import cleaned

EVENT_TYPE = "monday_release"
EVENT_ID = "monday-release-4x"
MULTIPLIER = 4
"""Of the traffic that comes, as the calendar has it."""
TO_BUY = timedelta(seconds=25)
"""Real time from the start of the rehearsal's clock until buying begins: the stack is up, and the preflight done."""
LEAD = EventTypePolicy.model_fields["lead_time"].default + CapacityPolicy.model_fields["provisioning_lead"].default
"""The default policy's, from buying to the start."""


class PreProvisioning(Scenario):
    """The calendar knows of the release: the capacity is there hours before the traffic is."""

    TITLE = f"Pre-provisioning: the calendar says that a Monday release brings {MULTIPLIER} times the traffic."
    WORKFLOW_ID = event_workflow_id(EVENT_ID)
    GIVE_UP_AFTER = timedelta(hours=8)  # it needs seven
    EXPLORE = (f"runbooks calendar show {EVENT_ID}", "runbooks calendar list", f"runbooks capacity show {MODEL}")

    @classmethod
    def stack_options(cls, options: Options) -> StackOptions:
        """Five hours before the release, which is not in the calendar yet."""
        ahead = LEAD + TO_BUY * options.speed
        return StackOptions(
            state_dir=options.state_dir,
            speed=options.speed,
            business_start=before_next_release(datetime.now(UTC), ahead),
            env={
                "RUNBOOKS_SIMULATOR_EVENT_ROW": "absent",
                "RUNBOOKS_SIMULATOR_PEAK_MULTIPLIER": str(MULTIPLIER),
            },
        )

    def __init__(self, stack: Stack, options: Options, show: Show, result: DemoResult) -> None:
        super().__init__(stack, options, show, result)
        self._found: FollowedEvent | None = None
        self._said = 0

    async def play(self) -> None:
        """From the entry of the event to the proof that its units came in time and went after it."""
        await self.connect()
        self.show.line("The stack is up. It is Sunday evening; the release comes at midnight.", "bold")
        if ui := self.ui_link():
            self.show.line(f"Temporal UI: {ui}")
        start = before_next_release(self.clock.business(datetime.now(UTC)), timedelta(0))
        await self.command(
            *("calendar", "add", "--type", EVENT_TYPE, "--multiplier", str(MULTIPLIER), "--id", EVENT_ID),
            *("--start", start.strftime("%Y-%m-%dT%H:%M"), "--zone", "Asia/Tokyo", "--source", "release calendar"),
            *("--token-file", str(self.stack.tokens[Role.ENGINEER])),
        )
        await self.until("the event is followed", lambda: self._found is not None)
        await self.until("its units are asked for", lambda: self._record.triggered_at is not None or self._over())
        await self.until(
            "they are in service and routed", lambda: self._record.in_service_at is not None or self._over()
        )
        await self.until("they are verified, ahead of the start", lambda: self._record.in_time is not None)
        await self.see_ui("While it waits for the event, the Temporal UI shows", self._record.run_id)
        await self.until("the event begins", lambda: self._record.phase is EventPhase.RUNNING or self._over())
        self.show.line("The release is out.", "bold yellow")
        await self.until("the event is over", lambda: self._record.phase is not EventPhase.RUNNING)
        self.show.line("The event is over. Its units are released.", "bold green")
        await self.until("its workflow is complete", self._over)
        await self._check()

    @property
    def _record(self) -> EventRecord:
        assert self._found is not None
        return self._found.record

    def _over(self) -> bool:
        found = self._found
        if found is not None and found.ended not in (None, "completed"):
            raise DemoFailed(f"The event's workflow was {found.ended}.", self.hint())
        return found is not None and found.ended is not None

    async def look(self) -> None:
        """The event's own timeline."""
        try:
            found = await self.service.follow_event(EVENT_ID)
        except OpsError as error:
            if error.exit_code is not ExitCode.NOT_FOUND or self._found is not None:
                raise
            return
        self._found = found
        timeline = cleaned(found.record).timeline
        for entry in timeline[self._said :]:
            self.show.entry(entry)
        self._said = len(timeline)

    # ------------------------------------------------------------------ the proof

    async def _check(self) -> None:
        record, result = self._record, self.result
        result.verified = record.in_time is True
        result.reverted = record.released_at is not None
        await self.see_ui("Now that it is over, the Temporal UI shows", record.run_id)
        times, seen, row = record.times, record.watched.get(MODEL), await self._row()
        assert times is not None
        on_time = record.triggered_at is not None and record.triggered_at <= times.needed_at
        carried = seen is not None and seen.throttles == 0 and seen.peak_tokens_per_second > 0
        load = (
            f"{seen.peak_tokens_per_second:,.0f} of {seen.capacity_tokens_per_second:,.0f} tokens/s at the peak, "
            f"{seen.throttles:,.0f} calls throttled"
            if seen
            else "not seen"
        )
        knobs, _ = await asyncio.to_thread(self.knobs_check, record.timeline[0].at)
        now = self.clock.business(datetime.now(UTC))
        standing = {model: timetable.units_at(self.policy, model, now) for model in self.policy.models}
        capacity = await asyncio.to_thread(self.capacity_check, standing)
        checks = (
            ("triggered", on_time, "; ".join(size.arithmetic for size in record.sizes)),
            ("verified", result.verified, how_in_time(record)),
            ("carried", carried, load),
            ("reverted", result.reverted, record.outcome),
            ("calendar", row is not None and row.provisioning_completed_at is not None, _said(row)),
            knobs,
            capacity,
            self.report_check(record.report_path),
        )
        self.prove(checks, record.run_id)

    async def _row(self) -> CalendarEvent | None:
        rows = await self.service.list_events()
        return next((event for event in rows.events if event.event_id == EVENT_ID), None)

    def state(self) -> str:
        """The event's phase, and what it waits for."""
        if self._found is None:
            return " No workflow follows the event."
        record = cleaned(self._record)
        return f" The event is {record.phase} and waits for: {record.waiting_for or 'nothing'}."


def _said(row: CalendarEvent | None) -> str:
    if row is None:
        return "no such row"
    units = ", ".join(f"{count} {model}" for model, count in row.units.items()) or "no units"
    done = row.provisioning_completed_at
    return f"the row says {units}, " + (f"complete {done.isoformat(timespec='minutes')}" if done else "not complete")
