"""Fixtures of the tests around the capacity workflow."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis

from tests.servers import TemporalServer
from tests.workflows.capacity_stack import Stack, running
from tests.workflows.handing import Handing, handing


@pytest.fixture(scope="module")
def aws_server() -> Iterator[str]:
    """Endpoint of a simulated AWS in a process of its own."""
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
    command = [sys.executable, "-m", "simulator.aws", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.kill()


@pytest.fixture
async def stack(
    temporal: TemporalServer, redis_client: redis.Redis, aws_server: str, tmp_path: Path
) -> AsyncIterator[Stack]:
    async with running(temporal, redis_client, aws_server, tmp_path) as made:
        yield made


@pytest.fixture
async def play(temporal: TemporalServer, redis_client: redis.Redis) -> AsyncIterator[Handing]:
    """An incident whose levers are in a real ledger."""
    async with handing(temporal, redis_client) as play:
        yield play
