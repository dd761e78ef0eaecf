"""The batcher's process: `python -m workers.batcher` answers requests over HTTP and, once Temporal is there, `invoke`.

It starts without Redis and without Temporal, and uses them when they come. Policy and settings are read once; knobs and
capacity routes are followed. SIGTERM: nothing new is taken, what is there is answered within the policy's budget.
"""

import argparse
import asyncio
import resource
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial

import stamina.instrumentation
import structlog
import uvicorn
from pydantic import ValidationError
from temporalio.service import RPCError
from temporalio.worker import Worker
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from activities.invoke import InvokeActivities
from activities.settings import ConfigurationError, load_policy
from dataplane.batcher_http import create_app
from dataplane.bedrock import BedrockBackend
from dataplane.connection import connect_async
from dataplane.control_state import ControlState
from dataplane.response_cache import ResponseCache
from dataplane.service import BatcherService
from domain.invoking import BATCHER_TASK_QUEUE
from domain.people import AwsRole
from domain.policy import Policy
from workers.batcher_metrics import Publisher
from workers.clients import AwsClients
from workers.lifecycle import configure_logs, keep_loaded, leave, listen, run_until_signalled, say_ready
from workers.outages import Outage, insist
from workers.permissions import say_missing
from workers.settings import Settings
from workers.temporal import connect

_CALLS_PER_SLOT = 2
"""Answers that a packed call has lost are asked again alone, so a slot may have more than one call in flight."""
_CONNECTIONS_PER_REQUEST = 2
"""Some are kept and idle, or ask how we are; who comes after that is cut off without a reason."""
_MOST_HEAD_BYTES = 64 * 1024
_KEEP_ALIVE_SECONDS = 75
"""Longer than clients and load balancers keep an idle connection (AWS: 60 s), so that it is they who end it."""
_OTHER_FILES = 2000
"""Connections to Bedrock and Redis among them."""
_FAILED_SECONDS = 5
"""Until what has failed by a fault of ours is started again."""
_LAST_ANSWERS_SECONDS = 2
"""After the drain, for what is on its way to the clients."""

_log = structlog.get_logger("batcher")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._has_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._has_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process's own handlers stay."""
        yield


class BoundedHeads(HttpToolsProtocol):
    """uvicorn's, whose parser takes a request line and headers of any length, with a bound to them."""

    _in_head = False
    _head_bytes = 0

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its body follows."""
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Some bytes of it."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_HEAD_BYTES:
                self.send_400_response(f"More than {_MOST_HEAD_BYTES} bytes of headers.")


class BatcherProcess:
    """Everything built from settings and policy; `serve` runs it until cancelled."""

    def __init__(self, settings: Settings, policy: Policy, listening: socket.socket) -> None:
        self._settings = settings
        self._policy = policy
        self._listening = listening
        self._ready = False
        self._temporal = Outage("Temporal")

    async def serve(self) -> None:
        """Answer until cancelled; then what is there is answered within the budget, and metrics go out."""
        settings, policy = self._settings, self._policy
        aws = AwsClients(settings)
        async with AsyncExitStack() as stack:
            redis = connect_async(settings.redis_url)
            stack.push_async_callback(redis.aclose)
            control = await stack.enter_async_context(ControlState(redis, policy.baseline))
            calls = policy.batcher.slots * len(policy.models) * _CALLS_PER_SLOT
            runtime = await asyncio.to_thread(aws.bedrock_runtime, calls, policy.batcher.max_deadline.total_seconds())
            backend = BedrockBackend(runtime, calls)
            stack.callback(backend.close)
            cache = ResponseCache(
                redis,
                lambda: control.cache_ttl_seconds,
                max_bytes=policy.batcher.max_cached_bytes,
                timeout_seconds=policy.batcher.cache_timeout.total_seconds(),
            )
            service = BatcherService(policy, backend, control, cache)
            publisher = Publisher(
                service.meter,
                await asyncio.to_thread(aws.cloudwatch),
                policy.batcher.publish_every,
                policy.metrics.period,
            )
            config = uvicorn.Config(
                create_app(service, lambda: self._ready),
                http=BoundedHeads,
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=policy.batcher.max_pending * _CONNECTIONS_PER_REQUEST,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS,
            )
            server = _Server(config, self._started)
            serving = asyncio.create_task(server.serve(sockets=[self._listening]))
            others = [
                asyncio.create_task(_again_and_again("metrics", publisher.run)),
                asyncio.create_task(_again_and_again("invoke", partial(self._invoke, service))),
            ]
            try:
                await asyncio.to_thread(say_missing, AwsRole.BATCHER, settings, policy, aws)
                await asyncio.shield(serving)
            finally:
                self._ready = False
                for other in others:
                    other.cancel()
                lost, *_ = await asyncio.gather(service.drain(), *others, return_exceptions=True)
                server.should_exit = True
                await serving
                await publisher.publish()
                _log.info("stopped", without_answer=lost)

    def _started(self) -> None:
        self._ready = True
        keep_loaded()
        say_ready()
        _log.info("batcher is ready", address=self._listening.getsockname()[:2])

    async def _invoke(self, service: BatcherService) -> None:
        """Work on the task queue once Temporal is there; what runs at the end is drained with everything else."""
        client = await insist(
            partial(connect, self._settings),
            self._temporal,
            lambda error: isinstance(error, (RuntimeError, RPCError)),
        )
        worker = Worker(
            client,
            task_queue=BATCHER_TASK_QUEUE,
            activities=[InvokeActivities(service.ask).invoke],
            max_concurrent_activities=self._policy.batcher.slots,
            graceful_shutdown_timeout=self._policy.batcher.drain,
        )
        _log.info("Temporal is there", task_queue=BATCHER_TASK_QUEUE)
        await worker.run()


async def _again_and_again(what: str, run: Callable[[], Awaitable[None]]) -> None:
    """Until cancelled; answers go on whatever becomes of it."""
    while True:
        try:
            await run()
        except Exception:
            _log.exception("failed", what=what, again_after_seconds=_FAILED_SECONDS)
        await asyncio.sleep(_FAILED_SECONDS)


def _allow_connections(most: int) -> None:
    """Let the process have so many, as far as the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def main() -> int:
    """Entry point; the exit code: 0 stopped by a signal, 1 nothing can listen there, 2 wrong settings."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.batcher",
        description="Answers the chatbot's requests with as few calls to Bedrock as their latency allows.",
        epilog="Settings are the environment variables RUNBOOKS_* of workers/settings.py. SIGTERM drains.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the internal network's")
    parser.add_argument("--port", type=int, default=8235, help="port to listen on; 0: any that is free")
    given = parser.parse_args()
    return run(given.host, given.port)


def run(host: str, port: int) -> int:
    """The process until a signal; its exit code as `main` says."""
    configure_logs()
    stamina.instrumentation.set_on_retry_hooks([])  # an outage is logged once, not at each try
    try:
        settings = Settings()
        policy = load_policy(settings.policy_file, settings.clock)
    except (ValidationError, ConfigurationError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        listening = listen(host, port)
    except OSError as error:
        print(f"nothing can listen on {host}, port {port}: {error.strerror}", file=sys.stderr)
        return 1
    _allow_connections(policy.batcher.max_pending * _CONNECTIONS_PER_REQUEST + _OTHER_FILES)
    asyncio.run(run_until_signalled(BatcherProcess(settings, policy, listening).serve()))
    return 0


if __name__ == "__main__":
    leave(main())
