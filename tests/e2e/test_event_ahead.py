"""A calendar event from its entry to the release of its units, on the whole stack, though the worker is killed."""

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest

from domain.people import Role
from domain.pre_provisioning import EventPhase, EventRecord
from ops.service import OpsError
from tests.e2e.harness import Rehearsal

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(150)]

EVENT = "release-ahead"


async def reaches(world: Rehearsal, phase: EventPhase, seconds: float = 60) -> EventRecord:
    """The event's record once it is in that phase. Nobody answering is waited out, too."""
    give_up_at = time.monotonic() + seconds
    seen = ""
    while True:
        try:
            record = (await world.ops.follow_event(EVENT)).record
            if record.phase is phase:
                return record
            seen = f"{record.phase}: {[line.text for line in record.timeline]}"
        except OpsError as error:
            seen = str(error)
        assert time.monotonic() < give_up_at, f"not {phase} within {seconds:g} s; {seen}"
        await asyncio.sleep(0.1)


async def test_units_are_there_before_the_event_and_gone_after_it_though_the_worker_dies(world: Rehearsal) -> None:
    began, base = datetime.now(UTC), world.policy.models["sonnet"].baseline_units
    start = world.settings.clock.business(began) + timedelta(hours=3)
    given = {"event_id": EVENT, "type": "monday_release", "start": start.isoformat(), "lead_time": "2h"}
    await world.ops.add_event(world.token(Role.ENGINEER), {**given, "models": "sonnet", "source": "a test"})
    await reaches(world, EventPhase.PROVISIONING)
    world.stack.kill("worker")
    await world.stack.restart("worker")

    running = await reaches(world, EventPhase.RUNNING)
    assert running.in_time, running.timeline
    units = running.sizes[0].units
    assert units > base
    assert world.units() == {"InService": units}
    assert sum(world.bought(began).values()) == units - base
    [row] = [event for event in (await world.ops.list_events()).events if event.event_id == EVENT]
    assert row.units == {"sonnet": units}
    assert row.provisioning_triggered_at is not None
    assert row.provisioning_triggered_at <= row.starts_at - row.lead_time
    assert row.provisioning_completed_at is not None
    assert row.provisioning_completed_at < row.starts_at - timedelta(minutes=30)

    done = await reaches(world, EventPhase.DONE)
    assert done.released_at is not None
    await world.soon("its units are gone", lambda: world.units() == {"InService": base})
    assert sum(world.bought(began).values()) == units - base
