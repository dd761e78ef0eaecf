"""An override at work: its record, the flags that people and Redis set, and the small acts every part uses."""

import asyncio
from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.leases import LeaseActivities
from domain.knobs import Holder, LeaseRequest, Refusal
from domain.messages import (
    KnobState,
    OverrideInput,
    PersonRequest,
    ReadKnobs,
    ReleaseLeases,
    TakeLeases,
)
from domain.override import OverrideKind, OverridePhase, OverrideRecord, render_override, shown
from domain.policy import OverridesPolicy
from workflows._people import OnRecord
from workflows._step import failure, mutate, read
from workflows.search_attributes import ENDS_AT, HOLDS_LEASES, KNOB

PROMPT = timedelta(seconds=15)
"""How long a person who waits for the answer is kept while Redis does not answer."""


class Override(OnRecord):
    """Base of the override workflow. `_override_lease` and `_override_end` work on it."""

    record: OverrideRecord

    def __init__(self, input: OverrideInput) -> None:
        super().__init__("SEV3")
        info = workflow.info()
        self.record = input.resumed or OverrideRecord(
            override_id=info.workflow_id,
            run_id=info.run_id,
            knob=input.knob,
            value=input.value,
            kind=input.kind,
            reason=input.reason,
            asked_by=input.who,
            owner=input.who,
            incident=input.incident,
            duration=input.duration,
            asked_at=workflow.now(),
            approved_by=input.approved_by,
        )
        self.release_asked: PersonRequest | None = None
        self.denied = False
        self.caught_up = False
        """The configured baseline is what a standing override asks for."""
        self.moved = False
        """The end, the review date or the owner is another one."""
        self.redis_lost = input.resumed is not None
        """Redis lost writes, and the lease is to be put back; also on going on: a signal may have come in between."""
        self._shown: tuple[object, ...] = ()

    @property
    def policy(self) -> OverridesPolicy:
        """What the policy says of overrides."""
        return self.now_snapshot.policy.overrides

    @property
    def standing(self) -> bool:
        """Whether it has a review date instead of an end."""
        return self.record.kind is OverrideKind.STANDING

    @property
    def longest(self) -> timedelta:
        """From now until the end, or the review, at most."""
        return self.policy.max_review if self.standing else self.policy.max_duration

    # ------------------------------------------------------------ the record

    def enter(
        self, phase: OverridePhase, *, waiting_for: str = "", next_step: str = "", next_at: datetime | None = None
    ) -> None:
        """Say where the override stands, who is waited for, and what comes next and when."""
        record = self.record
        record.phase, record.waiting_for, record.next_step, record.next_at = phase, waiting_for, next_step, next_at
        self.show()

    def show(self) -> None:
        """The record as the UI's details, and its search attributes when they changed."""
        record = self.record
        workflow.set_current_details(render_override(record))
        holds = bool(record.undo) and record.phase is not OverridePhase.ENDED
        if (holds, record.until) == self._shown:
            return
        self._shown = (holds, record.until)
        until = [ENDS_AT.value_set(record.until)] if record.until else []
        workflow.upsert_search_attributes([KNOB.value_set(record.knob), HOLDS_LEASES.value_set(holds), *until])

    def put_refusal_on_record(self, action: str, who: str, why: str) -> None:
        """In the ledger, beside the changes; without waiting for it."""
        record = self.record
        refusal = Refusal(
            holder=Holder(kind="person", id=who),
            action=action,
            target=record.knob,
            value=shown(record.value)[:500],
            why=why[:500],
        )

        async def put() -> None:
            try:
                await mutate(LeaseActivities.record_refusal, refusal, summary="Put the refusal on record")
            except ActivityError as error:
                self.note("note", f"the ledger did not take the refusal of {who}: {failure(error)[1]}")

        self.background.append(asyncio.create_task(put()))

    # ------------------------------------------------------------ the lease

    def new_lease(self, owner: str) -> LeaseRequest:
        """A lease of `owner` that was never asked for before."""
        record = self.record
        record.leases_taken += 1
        lasts = self.policy.standing_lease if self.standing else record.duration
        return LeaseRequest(
            lease_id=f"{record.run_id}:{record.leases_taken}",
            knob=record.knob,
            value=record.value,
            holder=Holder(kind="person", id=owner),
            reason=record.reason,
            duration_ms=round(lasts / timedelta(milliseconds=1)),
            pin=record.kind is OverrideKind.PIN,
        )

    async def acquire(self, lease: LeaseRequest, within: timedelta) -> None:
        """Take `lease`, which is the override's from then on. Raises ActivityError."""
        self.record.undo.append(lease)
        self.show()
        taken = await mutate(
            LeaseActivities.take_leases,
            TakeLeases(leases=[lease], until=self.record.ends_at),
            summary=f"Lease {lease.knob} at {shown(lease.value)}"[:200],
            within=within,
        )
        first = taken[0].acquired_at if taken else workflow.now()
        self.record.lease = lease.model_copy(update={"acquired_at": first})

    async def release_lease(self, lease: LeaseRequest, reason: str, within: timedelta) -> None:
        """End one of its leases. Raises ActivityError."""
        await mutate(
            LeaseActivities.release_leases,
            ReleaseLeases(lease_ids=[lease.lease_id], holder=lease.holder, reason=reason[:500]),
            summary=f"Release the lease of {lease.holder.id}"[:200],
            within=within,
        )

    async def in_force(self, summary: str) -> KnobState:
        """The knob as it is now. Raises ActivityError."""
        states = await read(
            LeaseActivities.read_knobs,
            ReadKnobs(knobs=[self.record.knob], baseline=self.now_snapshot.policy.baseline),
            summary=summary,
        )
        return states.knobs[0]
