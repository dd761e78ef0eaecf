"""What tests of the command line and its service run against."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from ops.stack import Stack, StackOptions


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Temporal and Redis alone, for the module."""
    options = StackOptions(state_dir=tmp_path_factory.mktemp("state"), simulator=False, usual_ports=False)
    async with Stack(options, say=lambda _: None, processes=[]) as stack:
        yield stack
