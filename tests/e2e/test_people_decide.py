"""What people may do to an incident, whatever they try, on the whole stack."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest

from domain.incident import IncidentRecord, LeverName, Phase
from domain.knobs import KnobName
from domain.people import Role
from ops.service import ExitCode, OpsError
from tests.e2e.harness import CURABLE, INCIDENT, SPEED, WORSE, Rehearsal, in_force, read_text, shapes

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(120)]


async def test_people_decide_the_way_back(world: Rehearsal) -> None:
    ops, approver, engineer = world.ops, world.token(Role.APPROVER), world.token(Role.ENGINEER)
    world.spike(CURABLE)
    await world.mitigated()
    assert (await ops.approve(INCIDENT, approver, "too early")).outcome == "not-possible"
    assert (await ops.abort(INCIDENT, engineer, "before recovery")).outcome == "denied"
    record = await world.awaits_decision()

    assert (await ops.acknowledge(INCIDENT, engineer, "on it")).outcome == "accepted"
    assert (await ops.acknowledge(INCIDENT, engineer, "on it")).outcome == "already-done"
    assert (await ops.approve(INCIDENT, engineer, "I think so")).outcome == "denied"
    assert (await ops.approve(INCIDENT, world.token(Role.VIEWER), "me too")).outcome == "denied"
    await _roster_edits_are_honoured(world, approver)
    assert (await ops.reject(INCIDENT, approver, "one more hour")).outcome == "accepted"
    await _extend(world, engineer, record)
    with pytest.raises(OpsError) as refused:
        await ops.approve(INCIDENT, approver, "  \n ")
    assert refused.value.exit_code is ExitCode.USAGE
    with pytest.raises(OpsError) as unknown:
        await ops.approve("bedrock-throttle:opus", approver, "which one?")
    assert unknown.value.exit_code is ExitCode.NOT_FOUND

    report = await ops.report(INCIDENT)
    assert "awaiting-decision" in read_text(report.markdown_path)
    assert "<svg" in read_text(report.html_path)

    assert (await ops.release(INCIDENT, engineer, "not mine", LeverName.CACHE_TTL)).outcome == "denied"
    await world.traffic_has_passed()
    assert (await ops.release(INCIDENT, approver, "Haiku is poor", LeverName.MODEL_ROUTING)).outcome == "accepted"
    await world.until("routing is released, and the rest waits", _without_routing)
    assert world.knobs() == {KnobName.CACHE_TTL_SECONDS: 120}
    again = await ops.release(INCIDENT, approver, "Haiku is poor", LeverName.MODEL_ROUTING)
    assert again.outcome == "already-done"

    both = await asyncio.gather(*(ops.approve(INCIDENT, approver, "all is well") for _ in range(2)))
    assert sorted(result.outcome for result in both) == ["accepted", "already-done"]
    closed = await world.closed(record.run_id)
    await world.is_as_before(closed)
    with pytest.raises(OpsError) as late:
        await ops.approve(INCIDENT, approver, "too late")
    assert late.value.exit_code is ExitCode.NOT_POSSIBLE
    assert "The incident is over" in late.value.message

    said = [(decision.action, decision.who.split("@")[0], decision.outcome) for decision in closed.decisions]
    assert said == [
        ("approve_revert", "approver", "not-possible"),
        ("abort", "engineer", "denied"),
        ("acknowledge", "engineer", "accepted"),
        ("acknowledge", "engineer", "already-done"),
        ("approve_revert", "engineer", "denied"),
        ("approve_revert", "viewer", "denied"),
        ("approve_revert", "approver", "denied"),
        ("approve_revert", "approver", "denied"),
        ("reject", "approver", "accepted"),
        ("extend", "engineer", "not-possible"),
        ("extend", "engineer", "accepted"),
        ("release_lever", "engineer", "denied"),
        ("release_lever", "approver", "accepted"),
        ("release_lever", "approver", "already-done"),
        ("approve_revert", "approver", "accepted"),
        ("approve_revert", "approver", "already-done"),
    ]
    assert closed.report_path is not None
    text = read_text(closed.report_path.removesuffix(".html") + ".md")
    for decision in closed.decisions:
        assert decision.why in text, decision


async def test_an_abort_gives_everything_back_and_snoozes_until_ok(world: Rehearsal) -> None:
    world.spike(WORSE)
    mitigated = await world.mitigated()
    assert world.knobs()[KnobName.CACHE_TTL_SECONDS] == 120
    approver = world.token(Role.APPROVER)
    both = await asyncio.gather(*(world.ops.abort(INCIDENT, approver, "we shed load by hand") for _ in range(2)))
    assert sorted(result.outcome for result in both) == ["accepted", "already-done"]
    assert (await world.ops.approve(INCIDENT, approver, "after abort")).outcome == "not-possible"
    snoozed = await world.until("snoozed", lambda record: record.phase is Phase.SNOOZED)
    await world.is_as_before(snoozed)
    assert snoozed.recovered_at is None
    assert snoozed.alarm_on

    runs = await world.runs()
    junk = ["hello", "x" * 1_000_000, json.dumps({"AlarmName": "no state"}), json.dumps(["not", "an", "object"])]
    now = datetime.now(UTC)
    world.send(*junk, *(body for n in range(5) for body in shapes(snoozed.alarm, now + timedelta(milliseconds=n))))
    await world.soon("the queue is empty", lambda: world.waiting(world.settings.alarm_queue_url) == 0)
    reasons = world.dead_letters()
    assert len(reasons) == len(junk), reasons
    assert all(reasons), reasons
    assert await world.runs() == runs
    still = await world.until("the alarms are counted", lambda record: record.alarm_times > snoozed.alarm_times)
    assert (still.phase, still.run_id) == (Phase.SNOOZED, snoozed.run_id)
    assert world.knobs() == {}

    world.calm()
    closed = await world.closed(snoozed.run_id)
    assert closed.outcome.startswith("Aborted")
    world.spike(WORSE)
    following = await world.until("a new run", lambda record: record.run_id != closed.run_id)
    following = await world.mitigated(run_id=following.run_id)
    await world.until(
        "it names the last one",
        lambda record: record.previous_incident == closed.run_id,
        run_id=following.run_id,
    )
    assert mitigated.previous_incident != closed.run_id
    assert (await world.ops.abort(INCIDENT, approver, "enough")).outcome == "accepted"
    world.calm()
    await world.is_as_before(await world.closed(following.run_id))


async def _roster_edits_are_honoured(world: Rehearsal, approver: str) -> None:
    """Who was removed a moment ago may not; nor may anybody while the roster cannot be read."""
    roster = world.settings.roster_file
    assert roster is not None
    before = roster.read_text()
    try:
        roster.write_text("people:\n  engineer@example.com: engineer\n")
        removed = await world.ops.approve(INCIDENT, approver, "was on the roster")
        assert (removed.outcome, "is not in the roster" in removed.message) == ("denied", True), removed
        roster.write_text("people: [broken")
        broken = await world.ops.approve(INCIDENT, approver, "and now?")
        assert (broken.outcome, "roster could not be read" in broken.message) == ("denied", True), broken
    finally:
        roster.write_text(before)


async def _extend(world: Rehearsal, engineer: str, record: IncidentRecord) -> None:
    hold = min(lever.hold_until for lever in record.held if lever.hold_until)
    too_long = await world.ops.extend(INCIDENT, engineer, "a week", timedelta(days=7))
    assert too_long.outcome == "not-possible"
    assert (await world.ops.extend(INCIDENT, engineer, "a long night", timedelta(hours=2))).outcome == "accepted"
    extended = (await world.ops.get_record(INCIDENT)).held
    assert min(lever.hold_until for lever in extended if lever.hold_until) == hold + timedelta(hours=2) / SPEED


def _without_routing(record: IncidentRecord) -> bool:
    return record.phase is Phase.AWAITING_DECISION and LeverName.MODEL_ROUTING not in in_force(record)
