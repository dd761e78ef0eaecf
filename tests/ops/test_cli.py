"""The command line and its service, against a real Temporal server and a stand-in for the incident workflow."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from domain.clock import RehearsalClock
from domain.incident import Lever, LeverName, LeverStatus, Phase, render_details
from domain.messages import (
    INCIDENT_WORKFLOW,
    TASK_QUEUE,
    incident_id,
)
from domain.people import Role
from ops.cli_shared import EXIT_CODES
from ops.service import ExitCode, Incident, OpsError, OpsService, parse_duration, parse_incident
from ops.stack import Stack
from ops.tokens import issue
from ops.views import Times, cleaned, console, how_to_decide, incident_view, plain
from tests.servers import free_port
from tests.stand_in import HOSTILE, KEY, StandIn, a_record
from workers.settings import Settings
from workers.temporal import connect
from workers.tokens import read_key

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def settings(stack: Stack) -> Settings:
    return Settings(
        temporal_address=stack.addresses.temporal,
        token_key_file=stack.state_dir / "token.key",
        state_dir=stack.state_dir,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(settings: Settings) -> Client:
    return await connect(settings)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(client: Client, settings: Settings) -> OpsService:
    return OpsService(client, settings)


@asynccontextmanager
async def working(client: Client) -> AsyncIterator[None]:
    runner = UnsandboxedWorkflowRunner()
    async with Worker(client, task_queue=TASK_QUEUE, workflows=[StandIn], workflow_runner=runner):
        yield


async def start(client: Client, key: str) -> None:
    await client.start_workflow(INCIDENT_WORKFLOW, a_record(key), id=incident_id(key), task_queue=TASK_QUEUE)


def token(stack: Stack, role: Role) -> str:
    return stack.tokens[role].read_text()


async def spawn(stack: Stack, *arguments: str, env: dict[str, str] | None = None) -> asyncio.subprocess.Process:
    """Starts the command as a person would."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "ops.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**stack.process_env(), "COLUMNS": "160", **(env or {})},
    )


async def runbooks(stack: Stack, *arguments: str, env: dict[str, str] | None = None) -> tuple[int | None, str, str]:
    """Runs the command to its end; answers exit code, stdout, stderr."""
    process = await spawn(stack, *arguments, env=env)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


async def first_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 60)).decode()


async def test_list_show_and_the_decisions(stack: Stack, client: Client) -> None:
    async with working(client):
        await start(client, KEY)

        code, out, _ = await runbooks(stack, "incident", "list")
        assert code == ExitCode.OK
        assert KEY in out
        assert "awaiting-decision" in out
        assert "an approver" in out

        code, out, err = await runbooks(stack, "incident", "list", "--json")
        assert (code, err) == (ExitCode.OK, "")
        [row] = json.loads(out)
        assert (row["key"], row["phase"], row["waiting_for"]) == (KEY, "awaiting-decision", "an approver")

        code, out, _ = await runbooks(stack, "incident", "show", KEY)
        assert code == ExitCode.OK
        assert "30 s → 120 s" in out
        assert "9,800 ms" in out
        assert f"runbooks incident approve {KEY}" in out
        assert "[bold red]alarm[/]" in out
        assert not {"\x1b", "\x07", "\u202e"} & set(out)

        code, out, _ = await runbooks(stack, "incident", "show", incident_id(KEY), "--json")
        assert json.loads(out)["record"]["alarm"]["alarm_name"] == HOSTILE
        assert out.isascii()

        viewer = str(stack.tokens[Role.VIEWER])
        code, out, _ = await runbooks(stack, "incident", "approve", KEY, "--why", "x", "--token-file", viewer, "--json")
        assert code == ExitCode.DENIED
        assert json.loads(out)["outcome"] == "denied"

        extend = ("extend", KEY, "--by", "1h30m", "--lever", "capacity", "--why", "still busy", "--json")
        code, out, _ = await runbooks(stack, "incident", *extend)
        assert code == ExitCode.OK
        assert json.loads(out)["message"] == "capacity by 1:30:00 for approver@example.com"

        keep = ("keep", KEY, "cache_ttl_seconds", "--review-in", "48h", "--why", "the new normal", "--json")
        code, out, _ = await runbooks(stack, "incident", *keep)
        assert (code, json.loads(out)["message"]) == (ExitCode.OK, "cache_ttl_seconds, review in 2 days, 0:00:00")
        take = ("take-over", KEY, "--for", "2h", "--to", "engineer@example.com", "--why", "ours now", "--json")
        code, out, _ = await runbooks(stack, "incident", *take)
        message = "engineer@example.com for 2:00:00 by approver@example.com"
        assert (code, json.loads(out)["message"]) == (ExitCode.OK, message)

        code, _, err = await runbooks(stack, "incident", "approve", KEY, "--why", "stale")
        assert code == ExitCode.NOT_POSSIBLE
        assert "the way back has begun already" in err

        code, out, _ = await runbooks(stack, "incident", "approve", KEY, "--why", "traffic passed")
        assert code == ExitCode.OK
        assert "the way back begins" in out

        code, out, _ = await runbooks(stack, "incident", "abort", KEY, "--why", "late", "--json")
        assert code == ExitCode.NOT_POSSIBLE
        error = json.loads(out)["error"]
        assert error["exit_code"] == code
        assert "over (completed" in error["message"]
        assert "Everything was given back." in error["message"]


async def test_watch_prints_each_change_and_ends_with_the_incident(stack: Stack, client: Client) -> None:
    key = "bedrock-throttle:watched"
    async with working(client):
        await start(client, key)
        watching, as_json = [await spawn(stack, "incident", "watch", key, *more) for more in ((), ("--json",))]
        assert "the alarm went on" in await first_line(watching)
        assert json.loads(await first_line(as_json))["record"]["phase"] == "awaiting-decision"
        approver = token(stack, Role.APPROVER)
        await OpsService(client, Settings(token_key_file=stack.state_dir / "token.key")).approve(key, approver, "done")
        out, _ = await asyncio.wait_for(watching.communicate(), 60)
        assert watching.returncode == ExitCode.OK
        assert b"waiting for an approver" in out
        assert b"approver@example.com: approved: done" in out
        assert b"the alarm went on" not in out
        out, _ = await asyncio.wait_for(as_json.communicate(), 60)
        assert as_json.returncode == ExitCode.OK
        assert json.loads(out.splitlines()[-1])["record"]["phase"] == "closed"


async def test_ctrl_c_ends_only_the_watching(stack: Stack, client: Client) -> None:
    key = "bedrock-throttle:interrupted"
    async with working(client):
        await start(client, key)
        process = await spawn(stack, "incident", "watch", key)
        assert "the alarm went on" in await first_line(process)
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert (process.returncode, err) == (ExitCode.OK, b"")
        await client.get_workflow_handle(incident_id(key)).terminate("test")


async def test_errors_say_what_is_wrong_and_what_to_do(
    stack: Stack, client: Client, service: OpsService, settings: Settings, tmp_path: Path
) -> None:
    key, approver = "bedrock-throttle:haiku", token(stack, Role.APPROVER)
    async with working(client):
        await start(client, key)
        await wait_listed(service, key)

        with pytest.raises(OpsError, match="There is no incident 'bedrock-throtle:haiku'") as caught:
            await service.get("bedrock-throtle:haiku")
        assert caught.value.exit_code is ExitCode.NOT_FOUND
        assert f"Did you mean {key}" in caught.value.next_step
        with pytest.raises(OpsError) as caught:
            await service.approve("nothing-like-it", approver, "x")
        assert caught.value.exit_code is ExitCode.NOT_FOUND
        for run_id in ("00000000-0000-4000-8000-000000000000", "no run id"):
            with pytest.raises(OpsError, match="with run") as caught:
                await service.get(key, run_id)
            assert caught.value.exit_code is ExitCode.NOT_FOUND
        with pytest.raises(OpsError, match="Nothing has asked for capacity"):
            await service.capacity_state("sonnet")

        other = tmp_path / "other.key"
        other.write_text("k" * 32)
        bad_tokens = {
            "There is no token": None,
            "has expired": issue(read_key(stack.state_dir / "token.key"), "a", timedelta(seconds=-1)),
            "another key": issue(read_key(other), "approver@example.com", timedelta(hours=1)),
            "not a usable token": "rubbish",
        }
        for said, bad in bad_tokens.items():
            with pytest.raises(OpsError, match=said) as caught:
                await service.approve(key, bad, "x")
            assert caught.value.exit_code is ExitCode.DENIED
        for why in ("", "  ", "x" * 1001):
            with pytest.raises(OpsError, match=r"why: .* a text of 1 to 1000 characters") as caught:
                await service.reject(key, approver, why)
            assert caught.value.exit_code is ExitCode.USAGE

        assert (await service.abort(key, approver, "x")).outcome == "not-possible"

        elsewhere = Settings(temporal_address=f"127.0.0.1:{free_port()}")
        with pytest.raises(OpsError, match=elsewhere.temporal_address) as caught:
            await OpsService.connect(elsewhere)
        assert caught.value.exit_code is ExitCode.UNREACHABLE
        nowhere = Settings(temporal_address=stack.addresses.temporal, temporal_namespace="nowhere")
        with pytest.raises(OpsError, match="no namespace 'nowhere'") as caught:
            await (await OpsService.connect(nowhere)).get(key)
        assert caught.value.exit_code is ExitCode.NOT_FOUND

        await client.get_workflow_handle(incident_id(key)).terminate("test")
        with pytest.raises(OpsError, match="over \\(terminated at") as caught:
            await service.approve(key, approver, "x")
        assert caught.value.exit_code is ExitCode.NOT_POSSIBLE
        code, out, _ = await runbooks(stack, "incident", "show", key)
        assert code == ExitCode.OK
        assert "Its workflow was terminated" in out


async def wait_listed(service: OpsService, key: str) -> None:
    """The list lags a little behind."""
    while key not in [row.key for row in await service.list_incidents()]:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def test_without_a_worker(
    stack: Stack, client: Client, service: OpsService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.asking.QUERY_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr("ops.asking.UPDATE_TIMEOUT", timedelta(seconds=1))
    key = "bedrock-throttle:alone"
    await start(client, key)
    with pytest.raises(OpsError, match="No worker answers") as caught:
        await service.get(key)
    assert caught.value.exit_code is ExitCode.UNREACHABLE
    with pytest.raises(OpsError, match="No worker answered") as caught:
        await service.approve(key, token(stack, Role.APPROVER), "x")
    assert caught.value.exit_code is ExitCode.UNREACHABLE
    await wait_listed(service, key)
    [row] = [row for row in await service.list_incidents() if row.key == key]
    assert row.waiting_for == "no worker answers"
    await client.get_workflow_handle(incident_id(key)).terminate("test")


@pytest.mark.timeout(300)
async def test_a_dozen_runs_end_with_no_exit_code_but_their_own(stack: Stack) -> None:
    """A process that used a Temporal client often crashes at interpreter exit (sdk-python issue 300)."""
    limit = asyncio.Semaphore(os.cpu_count() or 1)

    async def once() -> tuple[int | None, str]:
        async with limit:
            code, _, err = await runbooks(stack, "incident", "list", "--json")
            return code, err

    assert set(await asyncio.gather(*(once() for _ in range(12)))) == {(0, "")}


@pytest.mark.parametrize(
    ("arguments", "env", "code", "said"),
    [
        (("incident", "approve", KEY), {}, ExitCode.USAGE, "--why"),
        (("incident", "extend", KEY, "--by", "soon", "--why", "x"), {}, ExitCode.USAGE, "45m, 2h or 1h30m"),
        (("incident", "release", KEY, "everything", "--why", "x"), {}, ExitCode.USAGE, "model_routing"),
        (("incident", "show", "two words"), {}, ExitCode.USAGE, "is no incident"),
        (("incident", "list"), {"RUNBOOKS_REHEARSAL_SPEED": "fast"}, ExitCode.USAGE, "REHEARSAL_SPEED: 'fast'"),
        (("incident", "reject", KEY, "--why", "x"), {"RUNBOOKS_TOKEN_FILE": "/nowhere"}, ExitCode.DENIED, "/nowhere"),
        (("incident", "reject", KEY, "--why", "x"), {"RUNBOOKS_TOKEN": "rubbish"}, ExitCode.DENIED, "not a usable"),
    ],
)  # fmt: skip
async def test_wrong_usage(
    stack: Stack, arguments: tuple[str, ...], env: dict[str, str], code: ExitCode, said: str
) -> None:
    got, out, err = await runbooks(stack, *arguments, env=env)
    assert got == code
    assert out == ""
    assert said in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("45m", timedelta(minutes=45)),
        ("2h", timedelta(hours=2)),
        (" 1h30m ", timedelta(minutes=90)),
        *((text, None) for text in ("", "0m", "2", "h", "m", "1.5h", "30m1h", "-1h", "PT1H", "٢h", "99999h")),
    ],
)
async def test_durations(text: str, expected: timedelta | None) -> None:
    if expected is not None:
        assert parse_duration(text) == expected
    else:
        with pytest.raises(OpsError, match="is no duration"):
            parse_duration(text)


async def test_incidents_are_named_by_key_or_id() -> None:
    assert parse_incident(KEY) == parse_incident(incident_id(KEY)) == incident_id(KEY)
    for text in ("", "a b", "x" * 201, "a\nb", "\x1b[2J", "東京"):
        with pytest.raises(OpsError, match="is no incident"):
            parse_incident(text)


async def test_text_from_outside_is_inert() -> None:
    assert plain("a\x1b[31mb\r\nc\td\u202e\u200be\x9b漫画") == "a\N{REPLACEMENT CHARACTER}[31mb c d" + (
        "\N{REPLACEMENT CHARACTER}" * 2 + "e\N{REPLACEMENT CHARACTER}漫画"
    )
    record = a_record(KEY)
    record.waiting_for = record.next_step = record.outcome = HOSTILE
    record.levers[0].detail = HOSTILE
    clean = cleaned(record)
    assert clean.opened_at == record.opened_at
    out = console()
    with out.capture() as capture:
        times = Times(record.opened_at, RehearsalClock())
        out.print(incident_view(Incident(record=record, ended=None, ended_at=None), times))
    assert not {"\x1b", "\x07", "\u202e"} & set(capture.get())
    assert "[/]" in capture.get()


async def test_what_is_proposed_is_shown_while_somebody_has_to_decide() -> None:
    record = a_record(KEY)
    record.keep_proposal = "Default: keep."
    for phase, said in ((Phase.AWAITING_DECISION, True), (Phase.CLOSED, False)):
        record.phase = phase
        out = console()
        with out.capture() as capture:
            shown = Incident(record=record, ended=None, ended_at=None)
            out.print(incident_view(shown, Times(record.opened_at, RehearsalClock())))
        assert (record.keep_proposal in capture.get()) is said
        assert (record.keep_proposal in render_details(record, "Decide.")) is said


async def test_the_default_way_to_decide_stands_first() -> None:
    record = a_record(KEY)
    assert "incident approve" in how_to_decide(record).splitlines()[1]
    window = Lever(name=LeverName.BATCH_WINDOW, status=LeverStatus.IN_FORCE, before="500 ms", after="150 ms", why="")
    record.levers = [window]
    first, command = how_to_decide(record).splitlines()[:2]
    assert first == "  # make 150 ms your standing override"
    assert command == f'  runbooks incident keep {KEY} batch_window_ms --why "..."'
    window.status = LeverStatus.KEPT
    assert "incident keep" not in how_to_decide(record)


async def test_exit_codes_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for code in ExitCode:
        assert f"\n{int(code):<5}" in EXIT_CODES
        assert f"| {int(code)} |" in page
