"""Scenario 1 as a demo: from the release to the report, with a person's approval in the middle."""

import asyncio
import shlex
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import ClassVar

from domain import timetable
from domain.incident import IncidentRecord, LeverName, LeverStatus, Phase
from domain.load import LoadSnapshot, total_offered
from domain.messages import incident_id
from domain.mitigation import Guard, guard
from domain.people import Role
from ops.demo_stage import MODEL, DemoFailed, DemoResult, Options, Scenario, Show
from ops.service import ExitCode, Incident, OpsError
from ops.stack import Stack
from ops.views import cleaned

MOST_APPROVALS = 3
"""The way back stops when the guard says no; then a person approves again."""


class Throttle(Scenario):
    """A release brings five times the traffic of a Monday night."""

    TITLE = "Scenario 1: a Monday release brings five times the traffic."
    WHY = "the release traffic has passed"
    """The approver's reason."""
    KEY: ClassVar[str] = f"bedrock-throttle:{MODEL}"
    """Of its incident."""
    WORKFLOW_ID = incident_id(KEY)
    GIVE_UP_AFTER = timedelta(minutes=200)  # it needs about 90
    EXPLORE = (f"runbooks incident show {KEY} --all", "runbooks incident list")

    def __init__(self, stack: Stack, options: Options, show: Show, result: DemoResult) -> None:
        super().__init__(stack, options, show, result)
        self._incident: Incident | None = None
        self._said = 0
        self._approvals = 0
        self._bought_at: datetime | None = None

    async def play(self) -> None:
        """From the quiet before the release to the proof that everything is as it was."""
        await self._begin("It is a quiet night; the release comes five minutes after midnight.")
        await self._traffic_rises()
        await self.until("the incident recovers under load", self._recovered)
        await self.see_ui("While it waits for a decision, the Temporal UI shows", self._record.run_id)
        await self._give_back()
        await self._check()

    async def _begin(self, what_it_is_like: str) -> None:
        await self.connect()
        self.show.line(f"The stack is up. {what_it_is_like}", "bold")
        if ui := self.ui_link():
            self.show.line(f"Temporal UI: {ui}")

    async def _give_back(self) -> None:
        """People decide, until everything is given back and the workflow is complete."""
        while not self._over():
            await self._traffic_passes()
            await self._approve()
            await self.until("the way back ends", lambda: self._over() or self._waits_for_decision())
            if self._waits_for_decision():
                self.show.line("The way back stopped and waits for a new decision.", "yellow")
        await self.until("its workflow is complete", lambda: self._incident is not None and bool(self._incident.ended))

    # ------------------------------------------------------------------ what is waited for

    @property
    def _record(self) -> IncidentRecord:
        assert self._incident is not None
        return self._incident.record

    async def _traffic_rises(self) -> None:
        usual: float | None = None
        risen = False

        def opened() -> bool:
            nonlocal usual, risen
            if self.load is not None and (offered := total_offered(self.load)):
                usual = usual or offered
                if not risen and offered > 1.5 * usual:
                    risen = True
                    self.show.line(f"Traffic rises: {offered:,.0f} tokens/s offered, from {usual:,.0f}.", "yellow")
            return self._incident is not None

        await self.until("the alarm opens an incident", opened)
        self.show.line(f"The alarm opened an incident: {self._record.incident_id}", "bold red")

    def _recovered(self) -> bool:
        return self._over() or (self._waits_for_decision() and self._record.recovered_at is not None)

    def _waits_for_decision(self) -> bool:
        return self._record.phase is Phase.AWAITING_DECISION

    def _over(self) -> bool:
        """Nothing is left to decide."""
        if self._incident is not None and self._incident.ended not in (None, "completed"):
            raise DemoFailed(f"The incident's workflow was {self._incident.ended}.", self.hint())
        return self._record.phase in (Phase.CLEANUP, Phase.SNOOZED, Phase.CLOSED)

    async def _traffic_passes(self) -> None:
        def passed() -> bool:
            return self.load is not None and self._without_levers(self.load).may

        if not self._waits_for_decision():
            return
        self.show.line("The service has recovered. Now the traffic has to pass.", "bold green")
        await self.until("the traffic passes", lambda: passed() or not self._waits_for_decision())
        if self.load is not None:
            self.show.line(f"The traffic has passed: {self._without_levers(self.load).why}.", "bold green")

    def _without_levers(self, load: LoadSnapshot) -> Guard:
        """What the guard of the way back would say of the last lever."""
        return guard(LeverName.CAPACITY, [], MODEL, load, self.policy, self._expected_units()[MODEL])

    async def _approve(self) -> None:
        """By the very command that a person would use, or by that person."""
        if not self._waits_for_decision():  # somebody has decided already
            return
        self._approvals += 1
        if self._approvals > MOST_APPROVALS:
            raise DemoFailed(f"The way back stopped {MOST_APPROVALS} times.", self.hint())
        arguments = (
            "incident",
            "approve",
            self.KEY,
            "--why",
            self.WHY,
            "--token-file",
            str(self.stack.tokens[Role.APPROVER]),
        )
        if self.options.interactive:
            shown = f"  source {self.stack.state_dir / 'env'}\n  {shlex.join(['runbooks', *arguments])}"
            self.show.line(f"It is your decision. In another shell:\n{shown}", "bold cyan")
            await self.until("you decide", lambda: not self._waits_for_decision(), forever=True)
            return
        await self.command(*arguments)

    async def look(self) -> None:
        """The incident's own timeline, and when its units were bought."""
        try:
            found = await self.service.get(self.KEY)
        except OpsError as error:
            if error.exit_code is not ExitCode.NOT_FOUND or self._incident is not None:
                raise
        else:
            self._incident = found
            record = cleaned(found.record)
            for entry in record.timeline[self._said :]:
                self.show.entry(entry)
            self._said = len(record.timeline)
        if self._incident is not None and self._bought_at is None:
            await self._note_purchase()

    async def _note_purchase(self) -> None:
        """When Bedrock accepted the request for the emergency's units, by its own clock."""
        lever = self._record.lever(LeverName.CAPACITY)
        if lever is None or lever.applied_at is None:
            return
        with suppress(OpsError):
            fleet = (await self.service.capacity_state(MODEL)).fleet
            bought = [model.created_at for model in fleet if model.ours and model.created_at >= self._record.opened_at]
            self._bought_at = min(bought, default=None)

    # ------------------------------------------------------------------ the proof

    def _expected_units(self) -> dict[str, int]:
        """What the timetable wants now."""
        at = self.clock.business(datetime.now(UTC))
        return {name: timetable.units_at(self.policy, name, at) for name in self.policy.models}

    async def _check(self) -> None:
        record, result = self._record, self.result
        result.verified = record.recovered_at is not None
        result.reverted, way_back = self._reverted()
        knobs, history = await asyncio.to_thread(self.knobs_check, record.opened_at - timedelta(minutes=1))
        capacity = await asyncio.to_thread(self.capacity_check, self._expected_units())
        until = record.mitigated_at or datetime.now(UTC)
        acquired = [
            entry.at
            for entry in history
            if entry.action == "acquired" and entry.holder.id == record.incident_id and entry.at <= until
        ]
        mitigated = [*acquired, *filter(None, [self._bought_at])]
        if mitigated:
            passed = max(mitigated) - record.alarm.changed_at
            result.alarm_to_mitigated_seconds = round(passed.total_seconds(), 3)
        await self.see_ui("Now that it is over, the Temporal UI shows", record.run_id)
        speed = result.alarm_to_mitigated_seconds
        checks = (
            ("mitigated", speed is not None and bool(acquired), f"{speed} s after the alarm, every free lever in Redis"
             + (" and the capacity requested" if self._bought_at else "")),
            ("verified", result.verified, record.recovery_detail or "not recovered"),
            ("reverted", result.reverted, way_back),
            knobs,
            capacity,
            self.report_check(record.report_path),
            *self._more_checks(),
        )  # fmt: skip
        self.prove(checks, record.run_id)

    def _reverted(self) -> tuple[bool, str]:
        """Whether what was changed is as it should be again, and in words."""
        taken = [lever for lever in self._record.levers if lever.status is not LeverStatus.NOT_NEEDED]
        words = ", ".join(f"{lever.name} {lever.status}" for lever in taken) or "no lever"
        return bool(taken) and all(lever.status is LeverStatus.RELEASED for lever in taken), words

    def _more_checks(self) -> Sequence[tuple[str, bool, str]]:
        """What else a scenario proves."""
        return ()

    def state(self) -> str:
        """The incident's phase, and what it waits for."""
        if self._incident is None:
            return " No incident was opened."
        record = cleaned(self._record)
        return f" The incident is {record.phase} and waits for: {record.waiting_for or 'nothing'}."
