"""What HTTP adds to a request: `python -m bench.batcher_http` asks the batcher's shell over keep-alive connections.

A process of its own serves the app as the batcher's does, with a backend that answers at once, no cache and no window,
so that what is measured is HTTP, JSON, the checks and the core. CPU is the server's own, so other work on the machine
hardly counts; the best round counts. Both of uvicorn's parsers are measured in the same run.
"""

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Literal, cast

import psutil
import uvicorn

from bench._batchers import AnswersAtOnce
from bench._harness import Figure, percentile, progress, publish
from dataplane.batcher_http import create_app
from dataplane.control_state import ControlState
from dataplane.sending import Reply
from dataplane.service import BatcherService
from domain.policy import Policy
from workers.batcher import BoundedHeads
from workers.lifecycle import listen

PARSERS: dict[str, type[asyncio.Protocol] | Literal["h11"]] = {"httptools": BoundedHeads, "h11": "h11"}
CONNECTIONS = 64
REQUESTS = 200
"""Of each connection, in one round."""
ROUNDS = 5
CALM_CONNECTIONS, CALM_REQUESTS, CALM_EVERY_SECONDS = 4, 300, 0.02
"""For the latency: 200 requests/s, far from what a core can do."""
_BODY = json.dumps({"intent": "search", "prompt": "Which volumes of the series are there? %06d"})
_HEAD = "POST /v1/answer HTTP/1.1\r\nHost: batcher\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


class _World(AnswersAtOnce):
    """No window."""

    batch_window_ms = 0
    reply = Reply("There are twelve, and the thirteenth comes out in May.", 30, 12)


def _serve(parser: str, port: Connection) -> None:
    async def go() -> None:
        world = _World()
        service = BatcherService(Policy(), world, cast(ControlState, world))
        listening = listen("127.0.0.1", 0)
        port.send(listening.getsockname()[1])
        config = uvicorn.Config(
            create_app(service, lambda: True), http=PARSERS[parser], log_config=None, access_log=False
        )
        await uvicorn.Server(config).serve(sockets=[listening])

    asyncio.run(go())


async def _ask(port: int, first: int, count: int, every: float = 0.0) -> list[float]:
    """Seconds of each request of one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took = []
    for number in range(first, first + count):
        body = _BODY % number
        began = time.perf_counter()
        writer.write((_HEAD % len(body) + body).encode())
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        answer = await reader.readexactly(length)
        took.append(time.perf_counter() - began)
        assert head.startswith(b"HTTP/1.1 200"), answer
        await asyncio.sleep(every)
    writer.close()
    return took


async def _round(port: int, connections: int, count: int, every: float = 0.0) -> list[float]:
    asked = await asyncio.gather(*(_ask(port, n * count, count, every) for n in range(connections)))
    return [seconds for one in asked for seconds in one]


def _cpu_seconds(server: psutil.Process) -> float:
    times = server.cpu_times()
    return float(times.user + times.system)


def measure(parser: str) -> Sequence[Figure]:
    """One parser's figures."""
    context = multiprocessing.get_context("spawn")
    told, tells = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(parser, tells), daemon=True)
    child.start()
    port = told.recv()
    server = psutil.Process(child.pid)
    costs, rates = [], []
    try:
        for _ in progress(range(ROUNDS), parser):
            cpu, wall = _cpu_seconds(server), time.perf_counter()
            took = asyncio.run(_round(port, CONNECTIONS, REQUESTS))
            costs.append((_cpu_seconds(server) - cpu) / len(took) * 1e6)
            rates.append(len(took) / (time.perf_counter() - wall))
        calm = asyncio.run(_round(port, CALM_CONNECTIONS, CALM_REQUESTS, CALM_EVERY_SECONDS))
    finally:
        child.terminate()
        child.join()
    return [
        Figure(f"CPU of a request, {parser}", min(costs), "µs"),
        Figure(f"requests a second, {CONNECTIONS} connections, {parser}", max(rates), "/s"),
        Figure(f"added latency P50, {parser}", percentile(calm, 50) * 1000, "ms"),
        Figure(f"added latency P99, {parser}", percentile(calm, 99) * 1000, "ms"),
    ]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m bench.batcher_http", description=__doc__)
    parser.parse_args()
    figures = [figure for name in PARSERS for figure in measure(name)]
    publish(
        "batcher_http", figures, bound_by="CPU of the one process, most of it Python's HTTP and JSON", rounds=ROUNDS
    )


if __name__ == "__main__":
    main()
