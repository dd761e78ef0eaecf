"""Levers that go from an incident to a person, on a real Temporal and a real ledger: no gap, an owner, and an end."""

from datetime import timedelta

from domain.incident import LeverName, LeverStatus, Phase
from domain.knobs import KnobName
from domain.messages import (
    APPROVE_KEEP,
    CAPACITY_STATE,
    RECORD,
    RELEASE,
    TAKE_OVER,
    CapacityState,
    KeepRequest,
    PersonRequest,
    TakeOverRequest,
    UpdateResult,
    capacity_id,
)
from domain.override import OverrideKind, OverrideRecord
from tests.workflows.fakes import APPROVER, ENGINEER, MODEL
from tests.workflows.handing import Handing
from tests.workflows.record_histories import POLICY, SECOND


async def test_a_lever_is_kept_without_a_gap_as_the_approvers_standing_override(play: Handing) -> None:
    await play.opens()
    await play.recovers()
    before = await play.record()
    assert "runbooks incident keep" in before.keep_proposal
    routed = play.value(KnobName.MODEL_ROUTING)
    assert routed != POLICY.baseline.model_routing
    keep = KeepRequest(who=APPROVER, why="the new normal", lever=LeverName.MODEL_ROUTING, review_in=timedelta(days=2))
    answer: UpdateResult = await play.incident.execute_update(APPROVE_KEEP, keep, result_type=UpdateResult)
    assert answer.outcome == "accepted"
    override = answer.message.split()[-1]
    [lease] = [lease for lease in play.ledger.leases().leases if lease.knob is KnobName.MODEL_ROUTING]
    assert (lease.holder.kind, lease.holder.id) == ("person", APPROVER)
    changes = [entry for entry in play.ledger.history(before.opened_at) if entry.knob is KnobName.MODEL_ROUTING]
    assert [(entry.action, entry.holder.kind) for entry in changes] == [
        ("acquired", "incident"),
        ("acquired", "person"),
        ("released", "incident"),
    ]
    handle = play.client.get_workflow_handle(override)
    kept: OverrideRecord = await handle.query(RECORD, result_type=OverrideRecord)
    assert (kept.kind, kept.incident, kept.approved_by) == (OverrideKind.STANDING, before.incident_id, APPROVER)
    assert kept.review_at is not None

    await play.approved()
    await play.reaches(Phase.CLOSED)
    record = await play.record()
    assert {lever.name: lever.status for lever in record.levers} == {
        LeverName.MODEL_ROUTING: LeverStatus.KEPT,
        LeverName.CACHE_TTL: LeverStatus.RELEASED,
        LeverName.CAPACITY: LeverStatus.RELEASED,
    }
    assert override in record.levers[0].detail
    assert play.value(KnobName.MODEL_ROUTING) == routed, "a standing override with an owner and a review date"
    await handle.execute_update(RELEASE, PersonRequest(who=APPROVER, why="enough"), result_type=UpdateResult)
    assert play.value(KnobName.MODEL_ROUTING) == POLICY.baseline.model_routing


async def test_a_person_takes_over_until_a_stated_end_and_the_automation_stays_away(play: Handing) -> None:
    await play.opens()
    held = {knob: play.value(knob) for knob in (KnobName.MODEL_ROUTING, KnobName.CACHE_TTL_SECONDS)}
    take = TakeOverRequest(who=ENGINEER, why="we know what it is", to=APPROVER, lasts=8 * SECOND)
    answer: UpdateResult = await play.incident.execute_update(TAKE_OVER, take, result_type=UpdateResult)
    assert answer.outcome == "accepted"
    assert "unit-hours" in answer.message
    state: CapacityState = await play.client.get_workflow_handle(capacity_id(MODEL)).query(
        CAPACITY_STATE, result_type=CapacityState
    )
    assert APPROVER in [demand.asked_by for demand in state.demands]

    await play.reaches(Phase.SNOOZED)
    record = await play.record()
    until = record.taken_over_until
    assert until is not None
    assert record.outcome.startswith(f"Taken over by {APPROVER} until {until:%Y-%m-%d %H:%M:%S UTC}.")
    assert {lever.status for lever in record.levers} == {LeverStatus.KEPT}
    leases = play.ledger.leases().leases
    assert {lease.holder.id for lease in leases} == {APPROVER}
    assert {lease.knob for lease in leases} == set(held)
    assert all(abs(lease.expires_at - until) < 3 * SECOND for lease in leases)
    assert {knob: play.value(knob) for knob in held} == held
    assert len(play.world.asked("await_recovery")) == 1, "the automation stays away while the alarm is on"

    await play.soon(lambda: play.ledger.leases().leases == ())
    assert play.value(KnobName.CACHE_TTL_SECONDS) == 30
    await play.reaches(Phase.CLOSED)
