"""Fixtures for all tests: the real servers they run against."""

from collections.abc import Iterator

import pytest
import redis
from hypothesis import HealthCheck, settings

from dataplane.connection import connect
from tests.servers import TemporalServer, ValkeyServer

# A busy machine is no finding.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A Redis-protocol server for the whole session; a test that stops it makes one of its own."""
    server = ValkeyServer(tmp_path_factory.mktemp("valkey")).start()
    yield server
    server.kill()


@pytest.fixture
def redis_client(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    """A client of the session's server, emptied."""
    with connect(valkey.url) as client:
        client.flushall()
        yield client


@pytest.fixture(scope="session")
def temporal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TemporalServer]:
    """A Temporal server for the whole session; a test that stops it makes one of its own."""
    server = TemporalServer(tmp_path_factory.mktemp("temporal")).start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def time_skipping_temporal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TemporalServer]:
    """A Temporal server on which `TimeSkipper` works; a skip takes a tenth of a second with these settings."""
    settings = {
        "frontend.WorkflowTimeSkippingEnabled": "true",
        "history.timerProcessorMaxTimeShift": '"1ms"',
        "history.timerProcessorMaxPollRPS": "10000",
    }
    server = TemporalServer(tmp_path_factory.mktemp("time-skipping"), settings).start()
    yield server
    server.kill()
