"""What people see of capacity and do about it: command line and ops API on a running stack, views on made-up states."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import pytest_asyncio
from typer.testing import CliRunner

from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from domain.capacity import Demand, DemandKind, ProvisionedModel
from domain.clock import RehearsalClock
from domain.messages import AwaitedApproval, CapacityState, Paused
from domain.people import Role
from domain.policy import Policy
from domain.purchases import Purchase
from ops.capacity import Capacities, Capacity, Outlook
from ops.capacity_views import capacity_table, capacity_view, chart, plan_view, write_svg
from ops.cli_capacity import capacity as commands
from ops.service import ExitCode
from ops.stack import TOKYO, Stack, StackOptions
from ops.views import Times, console
from tests.stand_in import HOSTILE
from workers.settings import Settings

T = TypeVar("T")

NOW = datetime.now(UTC)
QUIET = datetime(2026, 11, 30, 8, tzinfo=TOKYO)
POLICY = Policy()
on_the_stack = pytest.mark.asyncio(loop_scope="module")


# ---------------------------------------------------------------- what is shown


class Shown(Capacities):
    """Presents a state without asking anybody."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self._settings = Settings()
        self._of = policy

    def capacity(self, state: CapacityState) -> Capacity:
        return self._capacity(state, self._of)

    def outlook(self, state: CapacityState, demand: Demand | None = None) -> Outlook:
        return self._outlook(state, self._of, demand)


def a_demand(units: int, kind: DemandKind = DemandKind.PERSON) -> Demand:
    return Demand(
        demand_id="launch",
        model="sonnet",
        kind=kind,
        units=units,
        start=NOW + timedelta(hours=2),
        end=NOW + timedelta(hours=5),
        reason="a launch",
        asked_by="kana@example.com",
    )


def a_state(**more: Any) -> CapacityState:
    arn = "arn:aws:bedrock:ap-northeast-1:123456789012:provisioned-model/abc"
    bought_at = NOW - timedelta(minutes=90)
    made = {
        "model": "sonnet",
        "fleet": [
            ProvisionedModel(arn=arn, name="ours", units=5, status="InService", ours=True, created_at=bought_at),
            ProvisionedModel(arn=arn + "d", name="base", units=10, status="InService", created_at=bought_at),
        ],
        "purchases": [
            Purchase(
                arn=arn,
                name="ours",
                units=5,
                asked_by="event-final",
                until=NOW + timedelta(hours=1),
                bought_at=bought_at,
            ),
            Purchase(arn=arn + "e", name="gone", units=2, asked_by="x", until=None, bought_at=bought_at, ended_at=NOW),
        ],
        "last_reconciled_at": NOW,
        "units_in_service": 15,
        "desired_units": 15,
    }
    return CapacityState.model_validate(made | more)


def text_of(shown: Any, width: int = 160) -> str:
    out = console()
    out.width = width
    with out.capture() as captured:
        out.print(shown)
    return captured.get()


def test_what_was_bought_for_whom_until_when_at_what_cost() -> None:
    """Hours that were begun count: 90 minutes of 5 units are 10 unit-hours; what is gone counts only with what was."""
    capacity = Shown().capacity(a_state())
    [bought] = capacity.bought
    assert (bought.units, bought.asked_by, bought.unit_hours) == (5, "event-final", 10)
    assert (capacity.unit_hours, capacity.others_units, capacity.lately_unit_hours) == (10, 10, 14)
    assert capacity.usd == pytest.approx(76.7)
    shown = text_of(capacity_view(capacity, Times(NOW, RehearsalClock())))
    assert "15 units in service (10 of them others'), 15 wanted" in shown
    assert re.search(r"ours +5 +InService +event-final +.*\(in 1 h\).* 10 unit-hours \(76.70 USD\)", shown)
    assert "14 unit-hours" in shown


def test_what_needs_a_person_comes_first_and_hostile_text_is_inert() -> None:
    waits = AwaitedApproval(
        approval_id="day-1", text=f"5 units more {HOSTILE}", asked_by="x", since=NOW, until=NOW + timedelta(hours=1)
    )
    state = a_state(awaiting=[waits], paused=Paused(who="kana@example.com", why=HOSTILE, since=NOW))
    capacity = Shown().capacity(state)
    shown = text_of(capacity_view(capacity, Times(NOW, RehearsalClock())))
    lines = shown.splitlines()
    assert "paused" in lines[1]
    assert any("runbooks capacity approve sonnet day-1" in line for line in lines[:6])
    assert "\x1b" not in shown
    assert "[bold red]" in shown
    away = Capacity(model="haiku", unreachable="No worker answers", workflow="")
    table = text_of(capacity_table([capacity, away], Times(NOW, RehearsalClock())))
    assert "paused" in table
    assert "No worker answers" in table


def test_the_dry_run_is_the_planners_own_and_prices_a_demand() -> None:
    """20 units for three hours beside 15: five are bought the lag ahead, and cost every hour that they begin.

    The load is of now and of the 48 full hours that follow.
    """
    flat = POLICY.model_copy(update={"timetable": None})
    theirs = a_state().fleet[1].model_copy(update={"units": 15})
    base = a_state(fleet=[theirs], purchases=[], routes={theirs.arn: 15})
    before = Shown(flat).outlook(base)
    assert (before.plan.desired_units, before.usd, len(before.load)) == (15, None, 49)
    outlook = Shown(flat).outlook(base, a_demand(20))
    assert max(point.units for point in outlook.plan.expected) == 20
    assert outlook.unit_hours is not None
    assert outlook.unit_hours == 5 * 4
    assert outlook.usd == pytest.approx(outlook.unit_hours * 7.67)
    shown = text_of(plan_view(outlook, RehearsalClock(), width=160, colours=False))
    assert f"with 20 units for you, +{outlook.unit_hours} unit-hours" in shown
    assert "nothing to do now" in shown
    assert "in service" in shown


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("speed", [1, 60])
def test_the_chart_fits_and_its_axis_is_business_time(width: int, speed: float, tmp_path: Path) -> None:
    """Rows are whole units, ten columns whole hours; the week's days are the zone's."""
    start = datetime(2026, 11, 30, 8, 20, tzinfo=TOKYO)
    now = datetime.now(UTC)
    clock = RehearsalClock(real_start=now, business_start=start, speed=speed) if speed > 1 else RehearsalClock()
    shown = Shown()
    shown._settings = Settings(rehearsal_real_start=now, rehearsal_business_start=start, rehearsal_speed=speed)
    if speed == 1:
        shown._settings = Settings()
    else:
        compressed = POLICY.capacity.model_copy(update={"plan_horizon": timedelta(hours=48) / speed})
        shown._of = POLICY.model_copy(update={"capacity": compressed})
    outlook = shown.outlook(a_state())
    drawn = chart(outlook, clock, width=width, colours=False)
    assert "\x1b" not in drawn
    if width >= 80:
        assert max(map(len, drawn.splitlines())) <= width
    rows = [int(line.split("|")[0]) for line in drawn.splitlines() if re.match(r" +\d+ \|", line)]
    assert rows == sorted(rows, reverse=True)
    assert len({high - low for high, low in pairwise(rows)}) == 1
    [axis] = [line for line in drawn.splitlines() if re.search(r"\| \w{3} \d\d:00", line)]
    if speed > 1:
        assert "Mon 08:00" in axis
    write_svg(outlook, clock, tmp_path / "chart.svg")
    assert "<svg" in (tmp_path / "chart.svg").read_text()


# ---------------------------------------------------------------- on a running stack


@dataclass
class Running:
    """A stack, and people who use it."""

    stack: Stack
    http: httpx.AsyncClient
    ledger: Ledger

    async def cli(self, *arguments: str, role: Role = Role.ENGINEER) -> tuple[int | None, str, str]:
        env = {**self.stack.process_env(), "COLUMNS": "160", "RUNBOOKS_TOKEN": self.stack.tokens[role].read_text()}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "ops.cli", "capacity", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode, out.decode(), err.decode()

    async def call(
        self, method: str, path: str, body: object = None, role: Role = Role.ENGINEER, key: str = ""
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.stack.tokens[role].read_text()}"}
        if key:
            headers["Idempotency-Key"] = key
        return await self.http.request(method, f"/capacity{path}", json=body, headers=headers)

    async def capacity(self) -> dict[str, Any]:
        answer = await self.call("GET", "/sonnet", role=Role.VIEWER)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("state")
    models = {name: model.model_dump(mode="json", exclude_none=True) for name, model in POLICY.models.items()}
    models["haiku"]["provisioned_regions"] = ["us-east-1"]
    (folder / "policy.yaml").write_text(
        json.dumps({"timetable": None, "models": models, "capacity": {"max_unit_hours_per_day": 150}})
    )
    limits = {"RUNBOOKS_API_CHANGES_PER_MINUTE": "1000", "RUNBOOKS_POLICY_FILE": str(folder / "policy.yaml")}
    options = StackOptions(state_dir=folder, usual_ports=False, api=True, speed=60, business_start=QUIET, env=limits)
    async with Stack(options, say=lambda _: None) as stack:
        with connect_redis(stack.env["RUNBOOKS_REDIS_URL"]) as connection:
            async with httpx.AsyncClient(base_url=stack.addresses.api_url, timeout=30) as http:
                yield Running(stack, http, Ledger(connection))


async def until(read: Callable[[], Awaitable[T]], wanted: Callable[[T], bool]) -> T:
    for _ in range(400):
        if wanted(found := await read()):
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"still {found!r}")


@on_the_stack
async def test_a_persons_demand_from_the_dry_run_to_its_withdrawal(running: Running, tmp_path: Path) -> None:
    """Bought for whom they are, shown with their cost, and released once taken back."""
    asked = ("demand", "set", "sonnet", "20", "--for", "12h", "--reason", "a launch", "--id", "launch")
    code, out, err = await running.cli(*asked, "--dry-run")
    assert (code, err) == (ExitCode.OK, "")
    assert "with 20 units for you" in out
    assert re.search(r"1 +create +5 +runbooks-sonnet", out)
    assert (await running.capacity())["demands"] == []

    code, out, _ = await running.cli(*asked)
    assert code == ExitCode.OK, out
    assert "accepted: requested: 15 of 20 units" in out
    found = await until(running.capacity, lambda found: found["units_in_service"] == 20)
    [bought] = found["bought"]
    assert (bought["units"], bought["asked_by"]) == (5, "engineer@example.com")
    assert bought["unit_hours"] >= 5
    code, out, _ = await running.cli("show", "sonnet")
    assert code == ExitCode.OK
    assert re.search(r"launch +person +20 ", out)
    assert "launch, by engineer@example.com: a launch\n" in out
    code, out, _ = await running.cli("plan", "sonnet", "--svg", str(tmp_path / "plan.svg"))
    assert (code, "Asia/Tokyo" in out) == (ExitCode.OK, True)
    assert (tmp_path / "plan.svg").exists()

    body = {"why": "not needed"}
    denied = await running.call("POST", "/sonnet/demands/launch/withdraw", body, Role.VIEWER)
    assert denied.status_code == 403
    assert "viewer@example.com is viewer; approver is needed" in denied.json()["detail"]
    assert running.ledger.refusals(NOW)[-1].action == "withdraw_demand"
    answer = await running.call("POST", "/sonnet/demands/launch/withdraw", body)
    assert (answer.status_code, answer.json()["outcome"]) == (200, "accepted")
    assert (await running.capacity())["demands"] == []


@on_the_stack
async def test_another_persons_demand_is_an_approvers_to_change(running: Running) -> None:
    body = {"units": 15, "duration": "1h", "reason": "mine", "demand_id": "mine"}
    assert (await running.call("POST", "/sonnet/demands", body, Role.APPROVER)).status_code == 200
    assert (await running.call("POST", "/sonnet/demands", {**body, "units": 16})).status_code == 403
    answer = await running.call("POST", "/sonnet/demands/mine/withdraw", {"why": "no"}, Role.ADMIN)
    assert answer.status_code == 200


@on_the_stack
async def test_the_same_key_asks_once(running: Running) -> None:
    body = {"units": 15, "duration": "1h", "reason": "twice"}
    answers = [(await running.call("POST", "/sonnet/demands", body, key="once")).json() for _ in range(2)]
    assert answers[0]["demand_id"] == answers[1]["demand_id"]
    ids = [demand["demand_id"] for demand in (await running.capacity())["demands"]]
    assert ids.count(answers[0]["demand_id"]) == 1
    await running.call("POST", f"/sonnet/demands/{answers[0]['demand_id']}/withdraw", {"why": "over"})


@on_the_stack
@pytest.mark.parametrize(
    ("model", "body", "field", "value", "allowed"),
    [
        ("opus", {}, "model", "opus", "haiku, sonnet"),
        ("haiku", {}, "region", "ap-northeast-1", "us-east-1 (models.haiku.provisioned_regions)"),
        ("sonnet", {"units": 31}, "units", "31", "1 to 30 (models.sonnet.ceiling_units)"),
        ("sonnet", {"units": -3}, "units", "-3", "greater than or equal to 1"),
        ("sonnet", {"reason": "  "}, "reason", "  ", "a text of 1 to 500 characters that is not blank"),
        ("sonnet", {"start": "2026-11-01T00:00+09:00"}, "end", "2026-11-01T01:00:00+09:00", "a moment after now"),
        ("sonnet", {"start": "2026-12-01T00:00"}, "start", "2026-12-01T00:00", ""),
        ("sonnet", {"start": "9999-12-31T23:00Z", "duration": "9999h"}, "start", "9999", "a moment up to"),
        ("sonnet", {"duration": "0m"}, "duration", "0m", "more than 0"),
        ("sonnet", {"demand_id": "a b"}, "demand_id", "a b", ""),
    ],
)
async def test_what_is_not_allowed_is_named_and_nothing_is_changed(
    running: Running, model: str, body: dict[str, object], field: str, value: str, allowed: str
) -> None:
    before = (await running.capacity())["demands"]
    for path in ("demands", "demands/preview"):
        asked = {"units": 16, "duration": "1h", "reason": "x", **body}
        answer = await running.call("POST", f"/{model}/{path}", asked)
        assert answer.status_code in (404, 422), answer.text
        [error] = answer.json()["errors"]
        assert error["field"] == field
        assert error["value"].startswith(value)
        assert allowed in error["allowed"]
    assert (await running.capacity())["demands"] == before


@on_the_stack
async def test_the_kill_switch_and_who_may_end_it(running: Running) -> None:
    """An engineer stops, an approver lets go on; while it is paused nothing is bought, and the dry run says so."""
    answer = await running.call("POST", "/sonnet/pause", {"why": "the bill"}, Role.VIEWER)
    assert answer.status_code == 403
    code, out, _ = await running.cli("pause", "sonnet", "--why", "the bill")
    assert (code, out.startswith("accepted")) == (ExitCode.OK, True)
    assert (await running.capacity())["paused"]["who"] == "engineer@example.com"
    [row, _] = (await running.call("GET", "", role=Role.VIEWER)).json()
    assert row["paused"]["why"] == "the bill"
    plan = (await running.call("GET", "/sonnet/plan", role=Role.VIEWER)).json()
    assert plan["paused"]["why"] == "the bill"
    assert (await running.call("POST", "/sonnet/resume", {"why": "paid"})).status_code == 403
    code, out, _ = await running.cli("resume", "sonnet", "--why", "paid", "--json", role=Role.APPROVER)
    assert (code, json.loads(out)["outcome"]) == (ExitCode.OK, "accepted")
    answer = await running.call("POST", "/sonnet/reconcile", {"why": "mended the role"})
    assert (answer.status_code, answer.json()["problems"]) == (200, [])


@on_the_stack
async def test_over_a_cap_waits_for_an_approver(running: Running) -> None:
    """30 units for twelve hours go over the daily cap: the only thing that waits is approved without its id."""
    body = {"why": "worth it"}
    nothing = await running.call("POST", "/sonnet/approve", body, Role.APPROVER)
    assert nothing.status_code == 409
    asked = {"units": 30, "duration": "12h", "reason": "a festival", "demand_id": "festival"}
    assert (await running.call("POST", "/sonnet/demands", asked)).status_code == 200
    found = await until(running.capacity, lambda found: bool(found["awaiting"]))
    assert found["awaiting"][0]["units"] > 0
    wrong = await running.call("POST", "/sonnet/approve", {**body, "approval_id": "other"}, Role.APPROVER)
    assert wrong.json()["errors"][0]["allowed"] == found["awaiting"][0]["approval_id"]
    assert (await running.call("POST", "/sonnet/approve", body)).status_code == 403
    answer = await running.call("POST", "/sonnet/approve", body, Role.APPROVER)
    assert (answer.status_code, answer.json()["outcome"]) == (200, "accepted")
    await until(running.capacity, lambda found: not found["awaiting"])
    await running.call("POST", "/sonnet/demands/festival/withdraw", {"why": "over"})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "--until TIME or --for DURATION"),
        (("--until", "2026-12-01T00:00"), "it has no zone"),
        (("--until", "2026-03-29T02:30", "--zone", "Europe/Berlin"), "skip it"),
        (("--until", "2026-12-01T00:00", "--zone", "Asia/Kyoto"), "Asia/Kyoto"),
        (("--for", "soon"), "'soon' is no duration"),
    ],
)
def test_wrong_usage_of_the_command_line(more: tuple[str, ...], said: str) -> None:
    asked = ["demand", "set", "sonnet", "20", "--reason", "x", *more]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(commands, asked)
    assert result.exit_code == ExitCode.USAGE
    assert said in re.sub(r"[\s│]+", " ", result.stderr)
