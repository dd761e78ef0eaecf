"""What stands around the batcher's answers: its socket, and what goes on beside them."""

import asyncio
import socket

from tests.virtual_time import run_virtually
from workers.batcher import _again_and_again
from workers.lifecycle import listen


def test_an_accepted_connection_sends_without_delay() -> None:
    """Else each answer on a kept connection takes 40 ms longer."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_fails_beside_the_answers_is_started_again() -> None:
    begun: list[float] = []

    async def fails() -> None:
        begun.append(asyncio.get_running_loop().time())
        raise ValueError("a fault of ours")

    async def go() -> None:
        task = asyncio.create_task(_again_and_again("metrics", fails))
        await asyncio.sleep(12)
        task.cancel()

    run_virtually(go())
    assert begun == [0, 5, 10]
