"""A stack for this folder's tests; with several processes of pytest, one for each."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.e2e.harness import Rehearsal, rehearsal


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rehearsal]:
    """A stack that the tests share, one after the other."""
    async with rehearsal(tmp_path_factory.mktemp("e2e")) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="package")
async def world(shared: Rehearsal) -> AsyncIterator[Rehearsal]:
    """The shared stack at its baseline; what a failed test leaves open is ended."""
    yield shared
    await shared.clear()
