"""The whole system on one machine: Temporal with its UI, Redis, the AWS simulator, the runbook worker, the intake.

`runbooks dev`, the demo, the tests and the benchmarks all use it. State, logs, keys and tokens go to one folder.
"""

import asyncio
import fcntl
import json
import os
import random
import secrets
import shlex
import shutil
import socket
import sys
import urllib.request
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from temporalio.client import Client
from temporalio.service import RPCError

from activities.settings import load_policy
from domain.clock import RehearsalClock
from domain.people import Role
from ops import namespace, servers
from ops.supervisor import ChildSpec, Say, Supervisor
from ops.tokens import issue
from workers.settings import Settings
from workers.tokens import read_key
from workflows.search_attributes import SEARCH_ATTRIBUTES

T = TypeVar("T")

TOKYO = ZoneInfo("Asia/Tokyo")
TO_START = timedelta(seconds=10)
"""Real time from the start of the rehearsal's clock to the weekly release: enough for our processes to be ready."""
SHORTEST_METRIC_PERIOD = timedelta(seconds=1)
"""The simulator's alarms and metrics take no shorter periods."""
TOKEN_LIFETIME = timedelta(hours=12)

_DRAIN = timedelta(seconds=20)
"""Longer than the worker's own graceful shutdown."""
_PYTHON_ROOT = Path(__file__).resolve().parents[1]
_USUAL_PORTS = {
    "Temporal": 7233,
    "Temporal UI": 8233,
    "Redis": 6379,
    "AWS simulator": 5566,
    "ops API": 8234,
    "batcher": 8235,
}
# Below the ports that systems hand out to outgoing connections, so that none is taken between choice and use.
_OTHER_PORTS = range(15000, 30000)


class StackError(Exception):
    """The stack cannot be started as asked; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """What to start, and what is there already."""

    state_dir: Path = Path(".runbooks")
    temporal_address: str | None = None
    """A Temporal server that is there already; none: our own."""
    temporal_ui_url: str | None = None
    """The UI of that server."""
    redis_url: str | None = None
    aws_endpoint_url: str | None = None
    simulator: bool = True
    """Start the AWS simulator, unless an endpoint is given. Without both, the account of boto3's credentials."""
    speed: float = 60
    """Business seconds in one real second while the simulator is ours."""
    business_start: datetime | None = None
    """None: `TO_START` (in real time) ahead of the next Monday 00:00 in Tokyo."""
    api: bool = False
    """Start the ops API."""
    batcher: bool = False
    """Start the batcher."""
    batcher_url: str | None = None
    """A batcher that is there already; none: our own, if one is started."""
    real_requests: bool = False
    """The simulator's users ask the batcher, and are measured; without: its model says what they would see."""
    control_plane: bool = True
    """Start Temporal, the worker and the intake; without them: what a load test of the data plane needs."""
    policy: str | None = None
    """A policy file of the stack's own, as text; None: the one that is configured."""
    usual_ports: bool = True
    """Take the ports people know when they are free; otherwise any."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of our processes; wins over what the stack sets."""


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where everything answers."""

    temporal: str
    temporal_ui: str | None
    redis_url: str
    aws_endpoint_url: str | None
    """None: AWS itself."""
    api_url: str
    """Where the ops API answers, if it is started."""
    batcher_url: str
    """Where the batcher answers, if there is one."""


class Stack:
    """An async context manager: everything is ready inside, and nothing is left after it.

    Args:
        options: what to start.
        say: receives one line of progress at a time.
        processes: each makes a group of our processes when its turn comes; those of a group start together.

    Raises on entering:
        StackError, servers.ServerNotFound: something is missing or cannot be used.
        supervisor.ChildFailed: a process died or did not become ready.
    """

    addresses: Addresses
    env: dict[str, str]
    """What the stack adds to the environment of its processes, and of anyone who wants to talk to them."""
    tokens: dict[Role, Path]
    """A file with a token for each role; its bearer is `ROLE@example.com`."""

    def __init__(
        self,
        options: StackOptions | None = None,
        *,
        say: Say = print,
        processes: "Sequence[Processes] | None" = None,
    ) -> None:
        self.options = options or StackOptions()
        self.state_dir = self.options.state_dir.resolve()
        self.log_dir = self.state_dir / "logs"
        self.policy_file = self.state_dir / "policy.yaml"
        """Of the stack's own, if it has one."""
        self._say = say
        self._processes = (simulator, control_plane, ops_api, batcher) if processes is None else processes
        self._lock: IO[str] | None = None
        self.own_simulator = self.options.simulator and self.options.aws_endpoint_url is None
        """Whether the simulator is started here."""
        self._supervisor: Supervisor

    async def __aenter__(self) -> Self:
        if self.own_simulator:
            _check_speed(self.options)
        self._prepare_folder()
        self._choose_addresses()
        self._supervisor = Supervisor(self.log_dir, self._say)
        try:
            await self._supervisor.start(*await self._servers())
            await self._check_given()
            self.env = self._make_env()
            for group in self._processes:
                children = group(self)
                await self._supervisor.start(*children)
                if any(child.name == "simulator" for child in children):
                    await self._ask_simulator()
            self._write_env_file()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._leave()

    async def _leave(self) -> None:
        await self._supervisor.stop()
        if self._lock is not None:
            self._lock.close()

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` on the stack; a child that dies meanwhile ends it with `supervisor.ChildFailed`."""
        return await self._supervisor.guard(work)

    def kill(self, name: str) -> None:
        """SIGKILL to one child, as a crash would; `restart` brings it back."""
        self._supervisor.kill(name)

    async def restart(self, name: str) -> None:
        """Stops one child in order if it runs, starts it again on the same data, waits until it is ready."""
        await self._supervisor.restart(name)

    @property
    def pids(self) -> dict[str, int]:
        """Name to process id of the children that run."""
        return self._supervisor.pids

    def log(self, name: str) -> Path:
        """Where a child's output goes."""
        return self._supervisor.log(name)

    def process_env(self) -> dict[str, str]:
        """The whole environment of a process of ours."""
        env = dict(os.environ)
        if self.own_simulator:
            env.pop("AWS_PROFILE", None)
            env.pop("AWS_SESSION_TOKEN", None)
        paths = [str(_PYTHON_ROOT), *filter(None, [env.get("PYTHONPATH")])]
        return {**env, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **self.env}

    def ready_file(self, name: str) -> Path:
        """The file a process writes when it is ready to work."""
        return self.state_dir / "ready" / f"{name}.ready"

    # ------------------------------------------------------------------ folder

    def _prepare_folder(self) -> None:
        for folder in (self.state_dir, self.log_dir, self.state_dir / "ready", self.state_dir / "tokens"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (self.state_dir / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StackError(
                f"another stack (pid {lock.read().strip() or 'unknown'}) runs in {self.state_dir}: stop it, "
                "or give another folder with --state-dir"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        if self.own_simulator:
            # The simulator forgets everything when it ends; what points into its world must go with it.
            for database in self.state_dir.glob("temporal.db*"):
                database.unlink()
            shutil.rmtree(self.state_dir / "redis", ignore_errors=True)
        self._write_people()
        if self.options.policy is not None:
            self.policy_file.write_text(self.options.policy)

    def _write_people(self) -> None:
        key_file, roster_file = self.state_dir / "token.key", self.state_dir / "roster.yaml"
        if not key_file.exists():
            _write_private(key_file, secrets.token_hex(32))
        if not roster_file.exists():
            people = "".join(f"  {role}@example.com: {role}\n" for role in Role)
            roster_file.write_text(f"# Token subject to role; read at the moment of each decision.\npeople:\n{people}")
        key = read_key(key_file)
        self.tokens = {role: self.state_dir / "tokens" / role for role in Role}
        for role, path in self.tokens.items():
            _write_private(path, issue(key, f"{role}@example.com", TOKEN_LIFETIME))

    # ------------------------------------------------------------------ servers

    def _choose_addresses(self) -> None:
        options = self.options
        temporal, ui = options.temporal_address, options.temporal_ui_url
        if temporal is None:
            temporal, ui = f"127.0.0.1:{self._port('Temporal')}", f"http://127.0.0.1:{self._port('Temporal UI')}"
        endpoint = options.aws_endpoint_url
        if self.own_simulator:
            endpoint = f"http://127.0.0.1:{self._port('AWS simulator')}"
        self.addresses = Addresses(
            temporal=temporal,
            temporal_ui=ui,
            redis_url=options.redis_url or f"redis://127.0.0.1:{self._port('Redis')}/0",
            aws_endpoint_url=endpoint,
            api_url=f"http://127.0.0.1:{self._port('ops API')}",
            batcher_url=options.batcher_url or f"http://127.0.0.1:{self._port('batcher')}",
        )

    def _port(self, what: str) -> int:
        if self.options.usual_ports:
            usual = _USUAL_PORTS[what]
            if _is_free(usual):
                return usual
        port = free_port()
        if self.options.usual_ports:
            self._say(f"port {usual} is taken: {what} uses {port}")
        return port

    async def _servers(self) -> list[ChildSpec]:
        specs = []
        address, url = self.addresses.temporal, self.addresses.redis_url
        if self.options.temporal_address is None and self.options.control_plane:
            assert self.addresses.temporal_ui is not None
            temporal = await servers.find_temporal(self.state_dir / "bin", self._say)
            self._say(f"Temporal from {temporal.source}: {temporal.path}")
            command = servers.temporal_command(
                temporal,
                port=_port_of(f"//{address}"),
                ui_port=_port_of(self.addresses.temporal_ui),
                database=self.state_dir / "temporal.db",
                search_attributes=SEARCH_ATTRIBUTES,
            )
            specs.append(
                ChildSpec(
                    name="temporal", command=command, env=os.environ, ready=lambda: servers.temporal_ready(address)
                )
            )
        if self.options.redis_url is None:
            redis = servers.find_redis()
            self._say(f"Redis-protocol server from {redis.source}: {redis.path}")
            data_dir = self.state_dir / "redis"
            data_dir.mkdir(exist_ok=True)
            command = servers.redis_command(redis, port=_port_of(url), data_dir=data_dir)
            specs.append(
                ChildSpec(name="redis", command=command, env=os.environ, ready=lambda: servers.redis_ready(url))
            )
        return specs

    async def _check_given(self) -> None:
        """What was given must answer, and know our search attributes."""
        options = self.options
        if options.temporal_address is not None:
            named = Settings().temporal_namespace
            try:
                await servers.temporal_ready(options.temporal_address, named)
                client = await Client.connect(options.temporal_address, namespace=named)
                added = await namespace.register_search_attributes(client, SEARCH_ATTRIBUTES)
            except (RuntimeError, RPCError) as error:
                raise StackError(
                    f"Temporal at {options.temporal_address}, namespace {named}, cannot be used: {error}"
                ) from error
            if added:
                self._say(f"registered search attributes at {options.temporal_address}: {', '.join(added)}")
        if options.redis_url is not None:
            try:
                await servers.redis_ready(options.redis_url)
            except Exception as error:
                raise StackError(f"Redis at {options.redis_url} does not answer: {error}") from error

    # ------------------------------------------------------------------ environment

    def _make_env(self) -> dict[str, str]:
        addresses = self.addresses
        env = {
            "RUNBOOKS_TEMPORAL_ADDRESS": addresses.temporal,
            "RUNBOOKS_REDIS_URL": addresses.redis_url,
            "RUNBOOKS_STATE_DIR": str(self.state_dir),
            "RUNBOOKS_TOKEN_KEY_FILE": str(self.state_dir / "token.key"),
            "RUNBOOKS_ROSTER_FILE": str(self.state_dir / "roster.yaml"),
            "RUNBOOKS_TOKEN_FILE": str(self.tokens[Role.APPROVER]),
        }
        if self.options.temporal_address is None:
            env["RUNBOOKS_TEMPORAL_NAMESPACE"] = "default"
        if self.options.policy is not None:
            env["RUNBOOKS_POLICY_FILE"] = str(self.policy_file)
        if addresses.temporal_ui is not None:
            env["RUNBOOKS_TEMPORAL_UI_URL"] = addresses.temporal_ui
        if addresses.aws_endpoint_url is not None:
            env["RUNBOOKS_AWS_ENDPOINT_URL"] = addresses.aws_endpoint_url
        if self.own_simulator:
            real_start = datetime.now(UTC)
            business_start = self.options.business_start or before_next_release(
                real_start, TO_START * self.options.speed
            )
            env |= {
                "AWS_ACCESS_KEY_ID": "simulator",
                "AWS_SECRET_ACCESS_KEY": "simulator",
                "AWS_EC2_METADATA_DISABLED": "true",
                "RUNBOOKS_REHEARSAL_REAL_START": real_start.isoformat(),
                "RUNBOOKS_REHEARSAL_BUSINESS_START": business_start.isoformat(),
                "RUNBOOKS_REHEARSAL_SPEED": f"{self.options.speed:g}",
            }
        return env | dict(self.options.env)

    async def _ask_simulator(self) -> None:
        """The simulator's ready answer may name what it made: `{"env": {"RUNBOOKS_ALARM_QUEUE_URL": ...}}`."""
        answer = json.loads(await asyncio.to_thread(_get, f"{self.addresses.aws_endpoint_url}/_simulator/ready"))
        self.env |= answer.get("env", {}) | dict(self.options.env)

    def _write_env_file(self) -> None:
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in sorted(self.env.items())]
        _write_private(self.state_dir / "env", "".join(lines))


Processes = Callable[[Stack], Sequence[ChildSpec]]


def simulator(stack: Stack) -> list[ChildSpec]:
    """The AWS simulator, if it is ours."""
    if not stack.own_simulator:
        return []
    endpoint = str(stack.addresses.aws_endpoint_url)

    async def ready() -> None:
        await asyncio.to_thread(_get, f"{endpoint}/_simulator/ready")

    command: tuple[str, ...] = (*_python("simulator"), "--port", str(_port_of(endpoint)))
    if stack.options.real_requests:
        command += ("--batcher-url", stack.addresses.batcher_url)
    return [ChildSpec(name="simulator", command=command, env=stack.process_env(), ready=ready)]


def control_plane(stack: Stack) -> list[ChildSpec]:
    """The runbook worker and the alarm intake, unless only the data plane is wanted."""
    if not stack.options.control_plane:
        return []
    return [
        ChildSpec(
            name=name,
            command=_python(module),
            env=stack.process_env(),
            ready=stack.ready_file(name),
            stop_within=_DRAIN,
        )
        for name, module in (("worker", "workers.runbook_worker"), ("intake", "workers.intake"))
    ]


def ops_api(stack: Stack) -> list[ChildSpec]:
    """The ops API, if it is asked for."""
    if not stack.options.api:
        return []
    command = (*_python("ops.cli"), "api", "--port", str(_port_of(stack.addresses.api_url)))
    ready = stack.ready_file("api")
    return [ChildSpec(name="api", command=command, env=stack.process_env(), ready=ready, stop_within=_DRAIN)]


def batcher(stack: Stack) -> list[ChildSpec]:
    """The batcher, if it is asked for."""
    if not stack.options.batcher:
        return []
    command = (*_python("workers.batcher"), "--port", str(_port_of(stack.addresses.batcher_url)))
    ready = stack.ready_file("batcher")
    return [ChildSpec(name="batcher", command=command, env=stack.process_env(), ready=ready, stop_within=_DRAIN)]


MONDAY = 0


def before_next_release(now: datetime, ahead: timedelta) -> datetime:
    """The business time so long ahead of the next Monday 00:00 in Tokyo."""
    return coming(MONDAY, now) - ahead


def coming(weekday: int, now: datetime) -> datetime:
    """The begin of the next such day in Tokyo (0 is Monday) that is not today."""
    today = now.astimezone(TOKYO).replace(hour=0, minute=0, second=0, microsecond=0)
    return today + timedelta(days=1 + (weekday - today.weekday() - 1) % 7)


def _check_speed(options: StackOptions) -> None:
    file = options.env.get("RUNBOOKS_POLICY_FILE", Settings().policy_file)
    period = load_policy(Path(file) if file else None, RehearsalClock()).metrics.period
    if options.speed < 1 or period / options.speed < SHORTEST_METRIC_PERIOD:
        raise StackError(
            f"speed {options.speed:g}: from 1 to {period / SHORTEST_METRIC_PERIOD:g} is allowed, because the policy's "
            f"metrics.period of {period.total_seconds():g} s, divided by it, must be at least "
            f"{SHORTEST_METRIC_PERIOD.total_seconds():g} s"
        )


def _python(module: str) -> tuple[str, ...]:
    # -P: a folder named like one of our packages in the current folder must not be taken for it.
    return (sys.executable, "-P", "-m", module)


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=1) as answer:
        body: bytes = answer.read()
    return body


def _port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


def free_port() -> int:
    """A port on the loopback that nobody uses, from a range where nobody gets one by chance."""
    return next(port for port in random.sample(_OTHER_PORTS, len(_OTHER_PORTS)) if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
