"""AWS that refuses, breaks, hangs, or does what was asked and never says so."""

from datetime import UTC, datetime

import pytest

from domain.incident import LeverName, LeverStatus
from domain.knobs import KnobName
from domain.messages import RECONCILE_NOW, PersonRequest, capacity_id
from tests.e2e.harness import WORSE, Rehearsal, in_force, read_text

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(150)]

CREATE, DELETE = "CreateProvisionedModelThroughput", "DeleteProvisionedModelThroughput"
STATEMENT = '"Effect": "Allow", "Action": "bedrock:CreateProvisionedModelThroughput", "Resource": ["arn:aws:bedrock:'


async def test_free_levers_act_blind_and_capacity_lands_once_whatever_aws_does(world: Rehearsal) -> None:
    began = datetime.now(UTC)
    # Blind: nobody tells the load, the calendar or the audit trail.
    world.fault("cloudwatch", "GetMetricData", "server_error")
    world.fault("dynamodb", None, "throttling")
    world.fault("cloudtrail", None, "access_denied")
    world.fault("bedrock", CREATE, "access_denied")
    world.spike(WORSE)
    await world.soon("the free lever acts", lambda: world.knobs().get(KnobName.CACHE_TTL_SECONDS) == 120)
    blind = await world.mitigated()
    assert in_force(blind) == {LeverName.CACHE_TTL}
    assert world.bought(began) == {}
    assert any("metrics could not be read, so nothing is bought" in entry.text for entry in blind.timeline)

    await world.until(
        "the checks say what was not read", lambda record: any("not read" in check.finding for check in record.checks)
    )

    # Seeing again: still throttled, so it buys, and may not.
    world.control("DELETE", "faults")
    world.fault("bedrock", CREATE, "access_denied")
    denied = await world.until("the page names the statement", lambda record: any(map(_names, record.to_do)))
    assert any(entry.kind == "page" and _names(entry.text) for entry in denied.timeline)
    assert any(map(_names, read_text(str(world.settings.state_dir / "pages.jsonl")).replace("\\", "").splitlines()))
    assert world.bought(began) == {}
    assert in_force(denied) >= {LeverName.CACHE_TTL, LeverName.CAPACITY}

    # The role is mended, and AWS has a bad day: refused, broken, silent, and done without an answer.
    world.no_faults()
    for kind, more in (("throttling", {}), ("server_error", {}), ("timeout", {"delay_ms": 300}), ("lost_answer", {})):
        world.fault("bedrock", CREATE, kind, count=1, **more)
    world.fault("bedrock", "ListProvisionedModelThroughputs", "throttling", count=2)
    world.fault("bedrock", "GetProvisionedModelThroughput", "server_error", count=2)
    request = PersonRequest(who="engineer@example.com", why="the role is mended")
    await world.temporal.get_workflow_handle(capacity_id("sonnet")).execute_update(RECONCILE_NOW, request)
    landed = await world.until("the capacity is in service", lambda record: record.levers[-1].landed_at is not None)
    recovered = await world.awaits_decision()
    demand = recovered.levers[-1].demand
    assert demand is not None
    assert world.units() == {"InService": demand.units}
    assert sum(world.bought(began).values()) == demand.units - world.policy.models["sonnet"].baseline_units
    assert world.control("GET", "faults") == []
    assert landed.run_id == blind.run_id

    for kind in ("throttling", "server_error", "lost_answer"):
        world.fault("bedrock", DELETE, kind, count=1)
    await world.approve()
    closed = await world.closed(blind.run_id)
    await world.is_as_before(closed)
    assert closed.levers[-1].status is LeverStatus.RELEASED


def _names(text: str) -> bool:
    return STATEMENT in text
