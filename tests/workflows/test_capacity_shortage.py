"""Capacity that does not come, goes by itself, or is wanted otherwise than before; found without being told."""

from datetime import UTC, datetime, time, timedelta
from typing import Any

from temporalio.client import WorkflowHandle

from dataplane.ledger import Ledger
from dataplane.routes import Routes
from domain.knobs import KnobName
from domain.load import ModelLoad
from domain.messages import APPROVE_CAPACITY, LEASES_LOST, CapacityInput, CapacityState
from domain.policy import LadderPolicy, TimetablePolicy, TimetableWindow
from domain.routes import CapacityRoute, CapacityRoutes
from tests.workflows.capacity_stack import APPROVER, Stack, idle, last, until
from tests.workflows.fakes import HELD
from workflows.capacity import CapacityWorkflow

SECOND = timedelta(seconds=1)
POORLY_COVERED = {
    "on_demand_tokens_per_second": 1000.0,
    "inference_profile_id": "apac.sonnet",
    "inference_profile_tokens_per_second": 1000.0,
    "priority_tier": True,
}


async def test_a_creation_that_never_ends_is_climbed_around_and_the_ladder_left_when_the_units_come(
    stack: Stack,
) -> None:
    quick = {"ladder": LadderPolicy(climb_every=0.3 * SECOND)}
    stack.set_policy(POORLY_COVERED, also=quick, provisioning_timeout=0.6 * SECOND)
    stack.control("bedrock", {"provisioning_lag_seconds": 600})
    stack.cloudwatch.load = HELD.model_copy(update={"models": {stack.model: ModelLoad(sent_tokens_per_second=16_000)}})
    await stack.ask(20)
    told = await until(lambda: last(stack, "failed"))
    assert "is still Creating after 0:00:00.6" in told.detail
    assert "AWS Support" in told.detail

    await until(lambda: _looks(stack, 3))
    state = await stack.state()
    assert len(state.rungs) == 2, "on-demand and the profile carry 1,000 tokens/s"

    stack.cloudwatch.load = None
    [asked] = (await until(lambda: _awaiting(stack))).awaiting
    state = await stack.state()
    kinds = ["on-demand", "cross-region inference profile", "priority tier", "shorter answers"]
    assert [rung.kind for rung in state.rungs] == kinds
    overflow = [(target.kind, target.model_id) for target in Routes(stack.redis).read_all()[stack.model].overflow]
    assert [kind for kind, _ in overflow] == ["on_demand", "inference_profile", "priority_tier"]
    assert overflow[1][1] == "apac.sonnet"
    assert _held(stack) == {KnobName.MAX_OUTPUT_TOKENS: {"recommendation": 512}}
    assert "taste_profile off" in asked.text
    assert (await stack.asks(APPROVE_CAPACITY, APPROVER, approval_id=asked.approval_id)).outcome == "accepted"
    await until(lambda: _held(stack).get(KnobName.FEATURE_FLAG) == {"taste_profile": False})
    pages = await until(lambda: _pages(stack, 3))
    assert sorted(page.split(":")[0] for page in pages) == ["approvers", "senior on-call", "senior on-call"]

    stack.redis.flushall()
    Ledger(stack.redis).ensure_epoch()
    await stack.entity.signal(LEASES_LOST)
    await until(lambda: len(_held(stack)) == 2)

    stack.control("settle")
    await until(lambda: sum(stack.routed().values()) == 20)
    await until(lambda: _held(stack) == {})
    await until(lambda: Routes(stack.redis).read_all()[stack.model].overflow == ())
    state = await until(lambda: idle(stack))
    assert (state.rungs, state.leases, state.awaiting, state.short_since) == ([], [], [], None)
    assert len(stack.pages()) == 3


async def _looks(stack: Stack, count: int) -> bool:
    """At the load, before the ladder is climbed."""
    history = await stack.entity.fetch_history()
    started = [event.activity_task_scheduled_event_attributes.activity_type.name for event in history.events]
    return started.count("read_load") >= count


def _held(stack: Stack) -> dict[KnobName, Any]:
    return {lease.knob: lease.value for lease in Ledger(stack.redis).leases().leases}


def _pages(stack: Stack, count: int) -> list[str]:
    pages = stack.pages()
    return pages if len(pages) >= count else []


async def _awaiting(stack: Stack) -> CapacityState | None:
    state = await stack.state()
    return state if state.awaiting else None


async def _start(stack: Stack) -> WorkflowHandle[Any, Any]:
    input = CapacityInput(state=CapacityState(model=stack.model))
    handle = await stack.client.start_workflow(
        CapacityWorkflow.run, input, id=stack.entity.id, task_queue=stack.settings.task_queue
    )
    await until(lambda: list(stack.routed().values()) == [15])
    return handle


async def test_what_changes_behind_its_back_is_noticed_without_a_message(stack: Stack) -> None:
    """A stale ARN in the routes, a model deleted by somebody else, another policy: at the next look."""
    stack.set_policy({"ceiling_units": 20}, reconcile_interval=0.5 * SECOND)
    await _start(stack)
    await stack.ask(23)
    await until(lambda: sum(stack.routed().values()) == 20)
    await until(lambda: idle(stack))

    stale = CapacityRoute(provisioned_model_arn="arn:aws:bedrock:ap-northeast-1:1:provisioned-model/gone", units=9)
    version = round(datetime.now(UTC).timestamp() * 1000)
    assert Routes(stack.redis).publish(CapacityRoutes(model=stack.model, routes=(stale,), version=version))
    await until(lambda: sum(stack.routed().values()) == 20)

    lost = next(model for model in stack.fleet() if model["provisionedModelName"] != "base")
    stack.control(f"provisioned-model-throughput/{lost['provisionedModelName']}", method="DELETE")
    await until(lambda: stack.units() == [15])
    await until(lambda: stack.units() == [5, 15] and sum(stack.routed().values()) == 20)
    assert lost["provisionedModelArn"] not in stack.routed()

    stack.set_policy(reconcile_interval=0.5 * SECOND)
    await until(lambda: stack.units() == [3, 5, 15] and sum(stack.routed().values()) == 23)


async def test_the_timetable_is_bought_and_another_one_counts_from_the_next_reconciliation(stack: Stack) -> None:
    noon = time(12)

    def timetable(units: int) -> dict[str, Any]:
        windows = [
            TimetableWindow(start=start, end=end, units={stack.model: units})
            for start, end in ((time(0), noon), (noon, time(0)))
        ]
        return {"timetable": TimetablePolicy(windows=tuple(windows))}

    cheap = {"usd_per_unit_hour": 1.0, "baseline_units": 0}
    stack.set_policy(cheap, also=timetable(17), reconcile_interval=0.5 * SECOND)
    await _start(stack)
    await until(lambda: stack.units() == [2, 15] and sum(stack.routed().values()) == 17)
    [bought] = (await stack.state()).bought
    assert (bought.asked_by, bought.units, bought.unit_hours, bought.usd) == ("the timetable", 2, 2, 2.0)
    assert bought.until is not None
    assert bought.until > datetime.now(UTC)

    stack.set_policy(cheap, also=timetable(19), reconcile_interval=0.5 * SECOND)
    await until(lambda: sum(stack.routed().values()) == 19)

    # Nobody remembers: a workflow that starts afresh learns from the tags what it bought for whom.
    before = (await stack.state()).bought
    await stack.entity.terminate()
    await _start_again(stack)
    state = await until(lambda: idle(stack))
    assert {(x.arn, x.asked_by, x.until) for x in state.bought} == {(x.arn, x.asked_by, x.until) for x in before}
    stack.set_policy(cheap, also=timetable(15), reconcile_interval=0.5 * SECOND)
    await until(lambda: stack.units() == [15])


async def _start_again(stack: Stack) -> None:
    input = CapacityInput(state=CapacityState(model=stack.model))
    await stack.client.start_workflow(
        CapacityWorkflow.run, input, id=stack.entity.id, task_queue=stack.settings.task_queue
    )
