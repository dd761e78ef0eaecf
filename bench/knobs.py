"""What a read of a knob costs and how soon a change is seen: `python -m bench.knobs`.

With 1, 10 and 100 readers in up to 10 processes, in one run: our asyncio reader; a plain Redis GET for each read, which
is never behind and pays for it each time; and LaunchDarkly's client, a feature-flag client that evaluates locally and
is told of changes by a stream (here from a small server in this process, `.venv/bin/pip install -e '.[bench]'`).

One reader's reads are timed while all the others read 100 times a second. A change is timed from just before it is
made (the lease taken; the flag written to the first stream) until the value can be read, in every reader.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from bench._harness import Figure, console, percentile, progress, publish
from dataplane.connection import connect, connect_async
from dataplane.knobs import AsyncKnobs
from dataplane.ledger import Ledger, LedgerView
from domain.knobs import Holder, KnobName, LeaseRequest
from domain.policy import Policy
from tests.servers import ValkeyServer

READERS = (1, 10, 100)
MOST_PROCESSES = 10
CHANGES = 200
BETWEEN_CHANGES_SECONDS = 0.12
READING_SECONDS = 2.0
BATCH = 1000
"""Reads timed together, where one is too short to be timed."""
PACE_SECONDS = 0.01
READ_AIM_US = 1.0
VISIBLE_AIM_MS = 50.0
PEER = "launchdarkly-server-sdk"

KNOB = KnobName.CACHE_TTL_SECONDS
HOLDER = Holder(kind="person", id="bench")
VALUES = range(100, 100 + CHANGES)
"""The value of each change."""

Seen = list[tuple[int, float]]
"""Values as they came to be readable, each with the system's monotonic seconds."""


class Reader(Protocol):
    """One reader of one knob."""

    seen: Seen

    async def open(self) -> None:
        """Be ready to read."""

    async def read(self) -> Any:
        """Read the knob once."""

    def time_reads(self) -> float | None:
        """Microseconds of a read, by a batch of them; None: each has to be awaited, and timed, by itself."""

    async def close(self) -> None:
        """Let go of what `open` took."""


def _batch(read: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(BATCH):
        read()
    return (time.perf_counter() - start) / BATCH * 1e6


class _NotingKnobs(AsyncKnobs):
    seen: Seen

    def take(self, view: LedgerView, asked_at: float) -> None:
        super().take(view, asked_at)
        self.seen.append((self.cache_ttl_seconds, time.monotonic()))


class Ours:
    """The data plane's own."""

    def __init__(self, url: str) -> None:
        self._client = connect_async(url)
        self._knobs = _NotingKnobs(self._client, Policy().baseline)
        self.seen: Seen = []
        self._knobs.seen = self.seen

    async def open(self) -> None:
        self._knobs.start()
        while not self._knobs.status().connected:  # noqa: ASYNC110 - there is nothing else to wait for
            await asyncio.sleep(0.01)

    async def read(self) -> Any:
        return self._knobs.cache_ttl_seconds

    def time_reads(self) -> float | None:
        knobs = self._knobs
        return _batch(lambda: knobs.cache_ttl_seconds)

    async def close(self) -> None:
        await self._knobs.close()
        await self._client.aclose()


class PlainGet:
    """Redis asked at each read."""

    def __init__(self, url: str) -> None:
        self._client = connect_async(url)
        self.seen: Seen = []

    async def open(self) -> None:
        await self._client.set("bench", "30")

    async def read(self) -> Any:
        return int(await self._client.get("bench") or 0)

    def time_reads(self) -> float | None:
        return None

    async def close(self) -> None:
        await self._client.aclose()


class Peer:
    """LaunchDarkly's client."""

    def __init__(self, url: str) -> None:
        import ldclient
        from ldclient.config import Config

        config = Config(
            sdk_key="bench", stream_uri=url, base_uri=url, events_uri=url, send_events=False, diagnostic_opt_out=True
        )
        self._client = ldclient.LDClient(config)
        self._context = ldclient.Context.create("bench")
        self.seen: Seen = []

    async def open(self) -> None:
        assert self._client.is_initialized(), "the peer's client has no flags"
        self._client.flag_tracker.add_flag_value_change_listener(
            KNOB.value, self._context, lambda change: self.seen.append((change.new_value, time.monotonic()))
        )

    async def read(self) -> Any:
        return self._client.variation(KNOB.value, self._context, 30)

    def time_reads(self) -> float | None:
        client, context, name = self._client, self._context, KNOB.value
        return _batch(lambda: client.variation(name, context, 30))

    async def close(self) -> None:
        self._client.close()


KINDS: dict[str, Callable[[str], Reader]] = {"ours": Ours, "plain GET": PlainGet, "LaunchDarkly": Peer}


# ---------------------------------------------------------------- a process of readers


async def read_in_child(kind: str, count: int, url: str) -> None:
    """`count` readers that do what standard input says: `time`, `pace`, `quiet`, or `stop` and tell what was seen."""
    readers = [KINDS[kind](url) for _ in range(count)]
    await asyncio.gather(*(reader.open() for reader in readers))
    paced: list[asyncio.Task[None]] = []
    _say("ready")
    while (order := (await asyncio.to_thread(sys.stdin.readline)).strip()) != "stop":
        if order == "pace":
            paced = [asyncio.create_task(_pace(reader)) for reader in readers]
            _say("paced")
        elif order == "time":
            paced = [asyncio.create_task(_pace(reader)) for reader in readers[1:]]
            _say(json.dumps(await _time_reads(readers[0])))
        elif order == "quiet":
            for task in paced:
                task.cancel()
            _say("quiet")
    _say(json.dumps([reader.seen for reader in readers]))
    await asyncio.gather(*(reader.close() for reader in readers))


async def _time_reads(reader: Reader) -> list[float]:
    until = time.monotonic() + READING_SECONDS
    found = []
    while time.monotonic() < until:
        cost = reader.time_reads()
        if cost is None:
            start = time.perf_counter()
            await reader.read()
            cost = (time.perf_counter() - start) * 1e6
        found.append(cost)
        await asyncio.sleep(0)
    return found


async def _pace(reader: Reader) -> None:
    while True:
        await reader.read()
        await asyncio.sleep(PACE_SECONDS)


def _say(line: str) -> None:
    print(line, flush=True)


# ---------------------------------------------------------------- the measurement


@asynccontextmanager
async def children(kind: str, readers: int, url: str) -> AsyncIterator[list[Process]]:
    """Processes that share the readers, ready."""
    processes = min(readers, MOST_PROCESSES)
    command = (sys.executable, "-m", "bench.knobs", "--child", kind, str(readers // processes), url)
    started = [
        await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, limit=1 << 26) for _ in range(processes)
    ]
    try:
        for child in started:
            assert await _answer(child) == "ready"
        yield started
    finally:
        for child in started:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()


async def _answer(child: Process) -> str:
    assert child.stdout is not None
    line = (await asyncio.wait_for(child.stdout.readline(), 60)).decode().strip()
    if not line:
        raise SystemExit("a process of readers has ended; it says why above")
    return line


async def _ask(child: Process, order: str) -> str:
    assert child.stdin is not None
    child.stdin.write(f"{order}\n".encode())
    return await _answer(child)


async def measure(
    kind: str, readers: int, url: str, change: Callable[[int], None] | None
) -> tuple[list[float], list[float]]:
    """Microseconds of each read (or batch), and milliseconds of each change in each reader; `change` makes one."""
    async with children(kind, readers, url) as (first, *others):
        await asyncio.gather(*(_ask(child, "pace") for child in others))
        reads = json.loads(await _ask(first, "time"))
        await asyncio.gather(*(_ask(child, "quiet") for child in (first, *others)))
        if change is None:
            return reads, []
        made: dict[int, float] = {}
        for value in progress(VALUES, f"{kind}, {readers} readers"):
            made[value] = time.monotonic()
            await asyncio.to_thread(change, value)
            await asyncio.sleep(BETWEEN_CHANGES_SECONDS)
        answers = await asyncio.gather(*(_ask(child, "stop") for child in (first, *others)))
        visible = []
        for seen in (one for answer in answers for one in json.loads(answer)):
            for value, made_at in made.items():  # one that the next has overtaken was visible with it
                visible.append((min(at for now, at in seen if now >= value) - made_at) * 1000)
        return reads, visible


class _Flags(ThreadingHTTPServer):
    """The peer's server: all flags at first, then each change, to every stream."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Stream)
        self.streams: list[_Stream] = []
        self.version = 1

    def flag(self, value: int) -> dict[str, Any]:
        """A flag that has `value` for everybody."""
        self.version += 1
        served = {"on": True, "variations": [value], "fallthrough": {"variation": 0}, "offVariation": 0}
        return {"key": KNOB.value, "version": self.version, "salt": "bench", **served}

    def change(self, value: int) -> None:
        """Tell every stream."""
        flag = {"path": f"/flags/{KNOB.value}", "data": self.flag(value)}
        for stream in list(self.streams):
            try:
                stream.event("patch", flag)
            except OSError:
                self.streams.remove(stream)


class _Stream(BaseHTTPRequestHandler):
    server: _Flags
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.event("put", {"path": "/", "data": {"flags": {KNOB.value: self.server.flag(30)}, "segments": {}}})
        self.server.streams.append(self)
        threading.Event().wait()

    def event(self, name: str, data: dict[str, Any]) -> None:
        """Send one."""
        text = f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(text), text))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def flags_server() -> Iterator[tuple[str, _Flags]]:
    """The peer's server, and its URL."""
    server = _Flags()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", server
    server.shutdown()


def lease_change(ledger: Ledger) -> Callable[[int], None]:
    """Makes a change: a lease that outbids those before it, which end by themselves."""
    run = time.monotonic_ns()

    def change(value: int) -> None:
        one = LeaseRequest(
            lease_id=f"{run}:{value}",
            knob=KNOB,
            value=value,
            holder=HOLDER,
            reason="bench",
            duration_ms=round(3 * BETWEEN_CHANGES_SECONDS * 1000),
        )
        ledger.acquire([one])

    return change


async def run(readers: tuple[int, ...]) -> list[Figure]:
    """Everything, in one run."""
    found = []
    with tempfile.TemporaryDirectory(prefix="runbooks-bench-") as folder:
        server = ValkeyServer(Path(folder)).start()
        with ExitStack() as stack:
            stack.callback(server.kill)
            client = stack.enter_context(connect(server.url))
            peer_url, flags = stack.enter_context(flags_server())
            for count in readers:
                for kind in KINDS:
                    client.flushall()
                    flags.streams.clear()
                    changes = {"ours": lease_change(Ledger(client)), "LaunchDarkly": flags.change}
                    url = peer_url if kind == "LaunchDarkly" else server.url
                    reads, visible = await measure(kind, count, url, changes.get(kind))
                    found += figures(kind, count, reads, visible)
    return found


def figures(kind: str, readers: int, reads: list[float], visible: list[float]) -> list[Figure]:
    """The percentiles; only ours have aims."""
    where = f"{kind}, {readers} reader{'s' if readers > 1 else ''}"
    ours = kind == "ours"
    found = [
        Figure(f"a read, {where}, p50", percentile(reads, 50), "µs", READ_AIM_US if ours else None),
        Figure(f"a read, {where}, p99", percentile(reads, 99), "µs"),
    ]
    if visible:
        found += [
            Figure(f"change visible, {where}, p50", percentile(visible, 50), "ms"),
            Figure(f"change visible, {where}, p99", percentile(visible, 99), "ms", VISIBLE_AIM_MS if ours else None),
        ]
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m bench.knobs", description=__doc__)
    parser.add_argument("--readers", type=int, nargs="+", default=READERS, help="numbers of readers")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        kind, count, url = given.child
        asyncio.run(read_in_child(kind, int(count), url))
        sys.stdout.flush()
        os._exit(0)  # the peer's threads are not waited for
    try:
        peer = version(PEER)
    except PackageNotFoundError:
        raise SystemExit(f"{PEER} is missing; install it: .venv/bin/pip install -e '.[bench]'") from None
    load_before = round(os.getloadavg()[0], 2)
    found = asyncio.run(run(tuple(given.readers)))
    publish("knobs", found, changes=CHANGES, peer=f"{PEER} {peer}", load_average_before=load_before)
    missed = [figure.name for figure in found if figure.met is False]
    if missed:
        console.print(f"over its aim: {'; '.join(missed)}", style="bold red")


if __name__ == "__main__":
    main()
