"""A person's override from its setting to its end, with another person's beside it and the chatbot looking on."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from dataplane.knobs import Knobs
from domain.knobs import KnobName
from domain.override import OverrideEnd, OverrideRecord
from domain.people import Role
from tests.e2e.harness import Rehearsal, read_text

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(120)]

TTL = KnobName.CACHE_TTL_SECONDS
MINUTE = timedelta(minutes=1)
"""Of business time: a fifth of a second."""


async def test_an_override_is_warned_of_extended_and_reverts_on_time_and_says_what_still_holds_the_knob(
    world: Rehearsal,
) -> None:
    world.policy_file.write_text(world.policy_file.read_text() + "overrides:\n  warn_before: PT40M\n")
    engineer, approver = world.token(Role.ENGINEER), world.token(Role.APPROVER)
    with Knobs(world.redis, world.policy.baseline) as data_plane:
        beside = await world.ops.set_override(approver, TTL, 90, "release night", 240 * MINUTE)
        answer = await world.ops.set_override(engineer, TTL, 120, "more calls than usual", 45 * MINUTE)
        assert (answer.outcome, answer.record.effective) == ("accepted", 120)
        id = answer.record.override_id
        await world.soon("the data plane obeys", lambda: data_plane.cache_ttl_seconds == 120)

        def warned() -> bool:
            return f"{id} ends at" in read_text(str(world.settings.state_dir / "pages.jsonl"))

        await world.soon("the owner is warned", warned)
        extended = await world.ops.extend_override(id, engineer, "it goes on", 10 * MINUTE)
        assert extended.outcome == "accepted", extended
        ends_at = (await world.ops.get_override(id)).record.ends_at
        assert ends_at is not None
        assert answer.record.ends_at is not None
        assert ends_at - answer.record.ends_at == 10 * MINUTE / world.settings.clock.speed

        await world.soon("it reverts", lambda: data_plane.cache_ttl_seconds != 120)
        assert timedelta(seconds=-1) < datetime.now(UTC) - ends_at < timedelta(seconds=5)
        assert data_plane.cache_ttl_seconds == 90, "there is no previous value to restore, and no wrong one"

        handle = world.temporal.get_workflow_handle(id, result_type=OverrideRecord)
        record = await asyncio.wait_for(handle.result(), 40)
        assert (record.end, record.extensions, record.effective) == (OverrideEnd.ON_TIME, 1, 90)
        assert record.outcome.startswith(
            "On time: cache_ttl_seconds is 90: still held at 90 by approver@example.com until"
        )
        assert [entry.kind for entry in record.timeline] == ["decision", "lever", "page", "decision", "page", "phase"]

        over = await world.ops.release_override(beside.record.override_id, approver, "quiet again")
        assert over.message.endswith("cache_ttl_seconds is 30, as configured.")
        await world.soon("the data plane is at the baseline", lambda: data_plane.cache_ttl_seconds == 30)
    assert world.knobs() == {}
