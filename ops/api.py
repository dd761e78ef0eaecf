"""`runbooks api`: the ops API. It only presents what `ops/service.py` does, as the command line does.

The runbooks' own calls work as written, plus an Authorization header. Every error is a problem (`ops/api_problems.py`),
and `/openapi.json` says everything that may be answered.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from activities.settings import load_yaml
from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from domain.people import Roster
from ops import api_capacity
from ops.api_callers import Callers
from ops.api_problems import Edge, Problem, ProblemError, documented, handle_errors
from ops.api_routes import Backends, router
from workers.lifecycle import listen, say_ready
from workers.settings import Settings

DRAIN_SECONDS = 15
"""What a running request may still take after SIGTERM: such as a person waits for."""

_log = structlog.get_logger()


class Health(BaseModel):
    """The process answers."""

    status: str = "ok"


class OpsApi(FastAPI):
    """The application, with the problem's schema in its OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None:
            document = super().openapi()
            schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            document["components"]["schemas"] |= schema.pop("$defs") | {Problem.__name__: schema}
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app(settings: Settings) -> FastAPI:
    """The application. It starts without Temporal and Redis, and says so at /readyz."""
    connection = connect_redis(settings.redis_url)
    ledger = Ledger(connection)
    backends = Backends(settings, ledger)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        connection.close()

    app = OpsApi(
        title="MangaAssist Runbooks",
        summary="Knobs with leases, overrides with an end, incidents and people's decisions.",
        version=version("mangaassist-runbooks"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.backends = backends
    app.state.callers = Callers(settings, ledger, connection)
    handle_errors(app)
    app.add_middleware(Edge)
    for routes in (router, api_capacity.router):
        app.include_router(routes, dependencies=[Security(HTTPBearer(auto_error=False))])

    @app.get("/healthz", responses=documented(500), tags=["health"])
    async def healthz() -> Health:
        """Whether the process answers."""
        return Health()

    @app.get("/readyz", responses=documented(500, 503), tags=["health"])
    async def readyz() -> Health:
        """Whether Temporal and Redis answer and the configuration can be read."""

        async def temporal() -> None:
            await (await backends.service()).check()

        checks = {
            "Temporal": temporal(),
            "Redis": asyncio.to_thread(connection.ping),
            "policy": asyncio.to_thread(backends.policy),
            "roster": asyncio.to_thread(load_yaml, Roster, settings.roster_file),
        }
        found = await asyncio.gather(*checks.values(), return_exceptions=True)
        wrong = {name: error for name, error in zip(checks, found, strict=True) if isinstance(error, BaseException)}
        if wrong:
            _log.warning("not ready", **{name: str(error) for name, error in wrong.items()})
            raise ProblemError(503, f"Not usable now: {', '.join(wrong)}.", "The log says why.")
        return Health()

    return app


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process's own handlers stay."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        say_ready()
        _log.info("ops API is ready", addresses=[listening.getsockname()[:2] for listening in sockets or []])


async def serve(settings: Settings, host: str, port: int) -> None:
    """Serve until cancelled; running requests get `DRAIN_SECONDS` then.

    Raises:
        OSError: nothing can listen there.
    """
    listening = listen(host, port)
    config = uvicorn.Config(
        create_app(settings),
        http="h11",  # it bounds request lines and headers, and is quick enough for people
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
