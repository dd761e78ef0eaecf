"""The end of an override: its leases are released, the value in force is verified, and what still holds it is said."""

from temporalio import workflow
from temporalio.exceptions import ActivityError

from domain.incident import span, utc
from domain.override import OverrideEnd, OverridePhase, held_by, shown
from workflows._override import Override
from workflows._people import ON_CALL
from workflows._step import MUTATE_TOTAL, failure


async def end_override(override: Override, end: OverrideEnd) -> None:
    """Give everything back, and say how it ended."""
    record, asked = override.record, override.release_asked
    record.end = end
    held = bool(record.undo)
    override.enter(OverridePhase.ENDING, waiting_for="the release of the lease" if held else "")
    if end is OverrideEnd.LAPSED and record.ends_at is not None:
        late = span(workflow.now() - record.ends_at)
        override.note(
            "note", f"the control plane was away at the end: the lease lapsed by itself; noticed {late} later"
        )
    rest = await _give_back(override) if held else ""
    said = record.outcome or (asked.why if asked else "")
    by = f" by {asked.who}" if asked else ""
    record.outcome = f"{end[0].upper()}{end[1:]}{by}" + (f" ({said})" if said else "") + (f": {rest}." if rest else ".")
    record.ended_at = workflow.now()
    override.note("phase", record.outcome)
    override.enter(OverridePhase.ENDED)


async def _give_back(override: Override) -> str:
    """Release the leases and verify the value in force; answers what that is, in words."""
    record = override.record
    for lease in record.undo:
        try:
            await override.release_lease(lease, f"{record.end}: {record.reason}", MUTATE_TOTAL)
        except ActivityError as error:
            ends = f"it lapses by itself at {utc(record.ends_at)}" if record.ends_at else "it lapses by itself"
            override.page(ON_CALL, f"{record.override_id} could not release its lease ({failure(error)[1]}); {ends}")
    try:
        state = await override.in_force("Verify: the value in force after the end")
    except ActivityError as error:
        override.page(ON_CALL, f"{record.knob} could not be verified after {record.override_id}: {failure(error)[1]}")
        return f"the value in force could not be read: {failure(error)[1]}"
    record.effective = state.value
    record.still_held = [held_by(lease) for lease in state.leases]
    if {lease.lease_id for lease in state.leases} & {lease.lease_id for lease in record.undo}:
        override.page(ON_CALL, f"{record.knob} is still held by {record.override_id} after its end")
    if not state.leases:
        return f"{record.knob} is {shown(state.value)}, as configured"
    return f"{record.knob} is {shown(state.value)}: still {'; '.join(record.still_held)}"
