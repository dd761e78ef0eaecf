"""What people decide about capacity: the kill switch, what may be spent, and who may not decide."""

import asyncio

from domain.messages import (
    APPROVE_CAPACITY,
    PAUSE_CAPACITY,
    RESUME_CAPACITY,
    CapacityState,
)
from tests.workflows.capacity_stack import APPROVER, ENGINEER, Stack, idle, last, last_with, until

CREATE, DELETE = "CreateProvisionedModelThroughput", "DeleteProvisionedModelThroughput"


async def test_the_kill_switch_stops_buying_and_deleting_while_routes_go_on(stack: Stack) -> None:
    stack.control("bedrock", {"provisioning_lag_seconds": 60})
    await stack.ask(20)
    await until(lambda: stack.units() == [5, 15])
    stack.fault(CREATE, "throttling", count=None)
    await stack.ask(28)
    await until(lambda: _doing(stack, "asking AWS"))
    assert (await stack.asks(PAUSE_CAPACITY, ENGINEER)).outcome == "accepted"
    assert (await stack.asks(PAUSE_CAPACITY, APPROVER)).outcome == "already-done"
    await until(lambda: _not_doing(stack, "asking AWS"))
    stack.control("faults", method="DELETE")
    stack.control("settle")
    await until(lambda: sum(stack.routed().values()) == 20)
    told = await until(lambda: last_with(stack, 20))
    assert "paused: engineer@example.com" in told.detail
    [page] = await until(lambda: stack.pages())
    assert page.startswith("on-call: ")
    assert f"of 28 units of {stack.model} are missing, 5 of them on their way" in page
    assert "engineer@example.com paused it: because" in page

    calls = stack.calls(CREATE)
    await stack.withdraw()
    paused = await until(lambda: idle(stack))
    await stack.reconcile()
    assert paused.paused is not None
    assert (stack.units(), sum(stack.routed().values())) == ([5, 15], 20)
    assert (stack.calls(CREATE), stack.calls(DELETE)) == (calls, 0)

    assert (await stack.asks(RESUME_CAPACITY, ENGINEER)).outcome == "denied"
    assert (await stack.asks(RESUME_CAPACITY, APPROVER)).outcome == "accepted"
    await until(lambda: stack.units() == [15] and list(stack.routed().values()) == [15])
    state = await until(lambda: idle(stack))
    assert [(taken.action, taken.outcome) for taken in state.decisions] == [
        ("pause_capacity", "accepted"),
        ("pause_capacity", "already-done"),
        ("resume_capacity", "denied"),
        ("resume_capacity", "accepted"),
    ]
    assert "approver is needed" in state.decisions[2].message


async def test_over_a_cap_an_approver_is_asked_and_the_best_there_is_without_stands_meanwhile(stack: Stack) -> None:
    stack.set_policy(max_unit_hours_per_day=7)
    await stack.ask(28)
    [asked] = (await until(lambda: _awaiting(stack))).awaiting
    await until(lambda: sum(stack.routed().values()) > 15)
    state = await until(lambda: idle(stack))
    assert 15 < state.units_in_service < 28
    assert asked.asked_by == stack.incident
    assert "USD" in asked.text
    [page] = stack.pages()
    assert page.startswith("approvers: ")
    assert f"runbooks capacity approve {stack.model} {asked.approval_id}" in page

    # Nobody agrees to far more than people were told: they are told again.
    await stack.ask(28, seconds=4 * 3600)
    await until(lambda: len(stack.pages()) == 2)
    [dearer] = (await until(lambda: idle(stack))).awaiting
    assert (dearer.approval_id, dearer.since) == (asked.approval_id, asked.since)
    assert f"{dearer.amount:,.0f} unit-hours over" in stack.pages()[1]
    await stack.reconcile()
    assert len(stack.pages()) == 2

    for who, approval_id, outcome in (
        (ENGINEER, asked.approval_id, "denied"),
        ("nobody@example.com", asked.approval_id, "denied"),
        (APPROVER, "something-else", "not-possible"),
        (APPROVER, asked.approval_id, "accepted"),
    ):
        assert (await stack.asks(APPROVE_CAPACITY, who, approval_id=approval_id)).outcome == outcome
    await until(lambda: sum(stack.routed().values()) == 28)
    state = await until(lambda: idle(stack))
    assert state.awaiting == []
    assert [consent.who for consent in state.consents] == [APPROVER]
    assert {bought.asked_by for bought in state.bought} == {stack.incident}
    assert sum(bought.unit_hours for bought in state.bought) == 13


async def test_an_incident_over_its_own_cap_gets_the_rest_once_an_approver_agrees_and_keeps_it(stack: Stack) -> None:
    await stack.ask(18, uncapped=28)
    [asked] = (await until(lambda: _awaiting(stack))).awaiting
    assert (asked.units, asked.amount, asked.unit) == (10, 10, "unit-hours")
    assert "10 more than the cap per incident allows" in asked.text
    await until(lambda: sum(stack.routed().values()) == 18)
    request = {"approval_id": asked.approval_id, "amount": 5}
    assert (await stack.asks(APPROVE_CAPACITY, APPROVER, **request)).outcome == "accepted"
    await until(lambda: sum(stack.routed().values()) == 23)
    assert (await stack.ask(18, uncapped=28)).units_wanted == 23, "it is prolonged"
    state = await until(lambda: idle(stack))
    assert (state.awaiting, len(stack.pages())) == ([], 1)
    await stack.withdraw()
    await until(lambda: stack.units() == [15])


async def _awaiting(stack: Stack) -> CapacityState | None:
    state = await stack.state()
    return state if state.awaiting else None


async def _doing(stack: Stack, what: str) -> bool:
    return what in (await stack.state()).doing


async def _not_doing(stack: Stack, what: str) -> bool:
    return not await _doing(stack, what)


async def test_a_reconciliation_answers_what_it_found_and_what_does_not_work(stack: Stack) -> None:
    stack.fault(CREATE, "access_denied", count=None)
    await stack.ask(20)
    await until(lambda: last(stack, "failed"))
    await until(lambda: _not_doing(stack, "asking"))
    stack.fault("ListProvisionedModelThroughputs", "access_denied", count=1)
    found = await stack.reconcile()
    assert found.outcome == "not-possible"
    assert '"Action": "bedrock:ListProvisionedModelThroughputs"' in found.message
    stack.control("faults", method="DELETE")
    answers = await asyncio.gather(stack.reconcile(), stack.reconcile())
    assert {answer.outcome for answer in answers} == {"accepted"}
    await until(lambda: last(stack, "in_service"))
    found = await stack.reconcile()
    assert (found.desired_units, found.units_in_service, found.problems) == (20, 20, [])
