"""Scenario 4 as a demo: the evening's units never came, ECS scales, Bedrock throttles, a role is mended."""

import asyncio
import urllib.request
from datetime import UTC, datetime, timedelta

from domain.incident import LeverName, cut
from domain.people import Role
from ops.demo_stage import LOOK_EVERY_SECONDS, MODEL, DemoFailed, Options
from ops.demo_throttle import Throttle
from ops.stack import TO_START, StackOptions, coming

READY_AT = timedelta(hours=17, minutes=14)
"""Wednesday's time of day once the stack is up; the ramp comes at 17:20."""
WEDNESDAY = 2
MOST_LOOKS, MOST_WORDS = 10, 400
"""At why the units are missing, and of its words."""
MENDED = "the role has its permission back"


class ScalingLag(Throttle):
    """The runbook's own root cause: a role that was made anew without the permission to buy."""

    TITLE = "Scenario 4: ECS scales with the evening, and Bedrock's provisioned throughput does not."
    WHY = "the evening's units are in service"
    GIVE_UP_AFTER = timedelta(minutes=180)  # it needs about 85

    @classmethod
    def stack_options(cls, options: Options) -> StackOptions:
        """A Wednesday, and the simulator's scenario."""
        return StackOptions(
            state_dir=options.state_dir,
            speed=options.speed,
            business_start=coming(WEDNESDAY, datetime.now(UTC)) + READY_AT - TO_START * options.speed,
            env={"RUNBOOKS_SIMULATOR_SCENARIO": "scaling-lag"},
        )

    async def play(self) -> None:
        """From the missing units to the proof that they are there, and everything else is as it was."""
        await self._begin("It is Wednesday, the ramp is near, and the timetable's increase of 17:00 has not come.")
        state = await self.service.capacity_state(MODEL)
        tries = 0
        while not state.last_error and tries < MOST_LOOKS:  # it has just begun to ask AWS
            await asyncio.sleep(LOOK_EVERY_SECONDS)
            state, tries = await self.service.capacity_state(MODEL), tries + 1
        units = f"{MODEL}: {state.units_in_service} of {state.desired_units} units in service."
        self.show.line(f"{units} {cut(state.last_error, MOST_WORDS)}", "red")
        await self._traffic_rises()
        await self.until("the cause is found", lambda: self._record.diagnosis is not None)
        await self.until("the levers are in force", lambda: self._record.mitigated_at is not None)
        assert self._record.diagnosis is not None
        if [cause.id for cause in self._record.diagnosis.causes[:1]] != ["access-denied"]:
            raise DemoFailed(f"Another cause was found: {self._record.diagnosis.sentence}", self.hint())
        await self._mend()
        await self.until("the units are in service and the incident recovers", self._landed)
        await self.see_ui("While it waits for a decision, the Temporal UI shows", self._record.run_id)
        await self._give_back()
        await self._check()

    async def _mend(self) -> None:
        """What an administrator does, and then what on-call does."""
        self.show.line("An administrator adds the statement to the role. Then what failed is run again:", "bold cyan")
        request = urllib.request.Request(f"{self.settings.aws_endpoint_url}/_simulator/faults", method="DELETE")
        await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=5).close())
        token = str(self.stack.tokens[Role.APPROVER])
        for model in self.policy.models:
            await self.command("capacity", "reconcile", model, "--why", MENDED, "--token-file", token)

    def _landed(self) -> bool:
        lever = self._record.lever(LeverName.CAPACITY)
        return self._over() or (self._recovered() and lever is not None and lever.landed_at is not None)

    async def _traffic_passes(self) -> None:
        """Nothing has to pass: the evening goes on, and the hour's units carry it."""

    async def _note_purchase(self) -> None:
        """Not counted: AWS refuses until the role is mended, and that is a person's time."""
