"""What every process of ours does alike: logs, readiness, signals, and the way it ends."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import structlog

READY_FILE = "RUNBOOKS_READY_FILE"


def configure_logs() -> None:
    """One JSON line per event, to stderr."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    ours = logging.getLogger("dataplane")  # it installs without structlog
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.handlers = [_ToStructlog()]


class _ToStructlog(logging.Handler):
    """Hands on what is logged by the standard library."""

    def emit(self, record: logging.LogRecord) -> None:
        """One event."""
        structlog.get_logger().log(record.levelno, record.getMessage(), of=record.name, exc_info=record.exc_info)


def say_ready() -> None:
    """Write the file that a supervisor waits for, if it named one."""
    if path := os.environ.get(READY_FILE):
        Path(path).write_text("ready\n")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: any that is free.

    Raises:
        OSError: nothing can listen there.
    """
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    # What it accepts inherits this. asyncio sets it for sockets that it made itself; without it the second packet of an
    # answer waits for the acknowledgement of the first, which a client on a kept connection delays by 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def keep_loaded() -> None:
    """What a process has loaded stays: the garbage collector need not walk it again, a pause of up to 100 ms."""
    gc.collect()
    gc.freeze()


async def run_until_signalled(serve: Coroutine[Any, Any, None]) -> None:
    """Run `serve`; SIGTERM or SIGINT cancels it, and it finishes what is in hand.

    Further ones change nothing: Ctrl-C reaches a process from its terminal and from its supervisor.
    """
    serving = asyncio.create_task(serve)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if not serving.cancelling():
            serving.cancel()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop)
    with suppress(asyncio.CancelledError):
        await serving


def leave(code: int) -> NoReturn:
    """End the process. The Temporal client can crash while the interpreter ends, so that part is left out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
