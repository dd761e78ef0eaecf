"""What every answer of the ops API has in common: errors as problem details (RFC 9457), a request id, a log line.

A problem says what is wrong and what to do next, and names each field with its value and what is allowed. It never
holds a stack trace: that is in the log, under the same request id.
"""

import re
import time
import uuid
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

import redis
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from activities.settings import ConfigurationError
from ops.asking import Misconfigured
from ops.service import ExitCode, OpsError

MEDIA_TYPE = "application/problem+json"
REQUEST_ID = "X-Request-Id"
RETRY_AFTER_SECONDS = 5
"""When to try again after a 503."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SHOWN_CHARS = 100
_SHOULD = re.compile(r"^(Value error, |\w+ should (be|have|match) )")
_STATUS_OF_EXIT_CODES = {
    ExitCode.USAGE: HTTPStatus.UNPROCESSABLE_ENTITY,
    ExitCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    ExitCode.DENIED: HTTPStatus.FORBIDDEN,
    ExitCode.NOT_POSSIBLE: HTTPStatus.CONFLICT,
    ExitCode.UNREACHABLE: HTTPStatus.SERVICE_UNAVAILABLE,
}

_log = structlog.get_logger()


class FieldProblem(BaseModel):
    """One thing in the request that is not allowed."""

    field: str
    """A field of the body, or `path`, `query` or `header` and a name."""
    value: str
    """As it was given, at most 100 characters of it."""
    allowed: str
    """What is, in words."""


class Problem(BaseModel):
    """Problem details (RFC 9457)."""

    type: str = "about:blank"
    title: str
    """The status in words."""
    status: int
    detail: str
    """What is wrong with this request."""
    next_step: str = ""
    """What to do about it."""
    errors: list[FieldProblem] = []
    request_id: str


class ProblemError(Exception):
    """Ends a request with a problem."""

    def __init__(
        self,
        status: int,
        detail: str,
        next_step: str = "",
        *,
        errors: Iterable[FieldProblem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.detail = detail
        self.next_step = next_step
        self.errors = list(errors)
        self.headers = dict(headers or {})
        super().__init__(detail)


def shown(value: object) -> str:
    """`value` for a person, not too long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For an operation's `responses`: these statuses answer with a `Problem`."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in sorted(statuses)}


def handle_errors(app: FastAPI) -> None:
    """Every error of `app` becomes a problem."""

    @app.exception_handler(ProblemError)
    async def problem(request: Request, error: ProblemError) -> JSONResponse:
        return _answer(request.scope, error)

    @app.exception_handler(OpsError)
    async def ops(request: Request, error: OpsError) -> JSONResponse:
        status, wrong = _STATUS_OF_EXIT_CODES.get(error.exit_code, HTTPStatus.INTERNAL_SERVER_ERROR), error.not_allowed
        found = wrong and FieldProblem(field=wrong.field, value=shown(wrong.value), allowed=wrong.allowed)
        errors = [found] if found else []
        return _answer(request.scope, ProblemError(status, error.message, error.next_step, errors=errors))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        said, errors = zip(*(_field_problem(found) for found in error.errors()), strict=True)
        return _answer(request.scope, ProblemError(422, f"{'; '.join(said)}.", errors=errors))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        detail, next_step = str(error.detail), ""
        if error.status_code == HTTPStatus.NOT_FOUND:
            detail, next_step = f"There is nothing at {shown(request.url.path)}.", "/openapi.json says what there is."
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "nothing")
            detail = f"{shown(request.method)} is not allowed for {shown(request.url.path)}; {allowed} is."
        return _answer(request.scope, ProblemError(error.status_code, detail, next_step, headers=error.headers))

    @app.exception_handler(redis.ConnectionError)
    @app.exception_handler(redis.TimeoutError)
    async def no_redis(request: Request, error: redis.RedisError) -> JSONResponse:
        _log.warning("redis does not answer", error=str(error))
        problem = ProblemError(503, "Redis does not answer, so the knobs cannot be read.", "Try again; see /readyz.")
        return _answer(request.scope, problem)

    @app.exception_handler(ConfigurationError)
    @app.exception_handler(Misconfigured)
    async def misconfigured(request: Request, error: Exception) -> JSONResponse:
        _log.error("configuration cannot be used", error=str(error))
        said = "The policy, the roster or the key of tokens cannot be read."
        problem = ProblemError(503, said, "Mend the file that the log names.")
        return _answer(request.scope, problem)


class Edge:
    """Around the whole application: request ids in and out, the access log, and a problem for what nobody caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        began = time.monotonic()
        status: int | None = None

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = state["request_id"]
                headers["Cache-Control"] = "no-store"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=state["request_id"]):
            try:
                await self._app(scope, receive, send_marked)
            except Exception:
                _log.exception("a request failed")
                if status is not None:
                    raise
                problem = ProblemError(500, "Something unexpected went wrong here.", "Report it with the request id.")
                await _answer(scope, problem)(scope, receive, send_marked)
            finally:
                _log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    duration_ms=round((time.monotonic() - began) * 1000, 1),
                    who=getattr(state.get("caller"), "subject", None),
                )


def _answer(scope: Scope, error: ProblemError) -> JSONResponse:
    problem = Problem(
        title=HTTPStatus(error.status).phrase,
        status=error.status,
        detail=error.detail,
        next_step=error.next_step,
        errors=error.errors,
        request_id=scope["state"]["request_id"],
    )
    headers = dict(error.headers)
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
    return JSONResponse(problem.model_dump(mode="json"), error.status, headers, media_type=MEDIA_TYPE)


def _field_problem(error: Mapping[str, Any]) -> tuple[str, FieldProblem]:
    """What pydantic found, in a sentence and as data."""
    where, *names = map(str, error["loc"])
    place = ".".join(names)
    field = (place or "body") if where == "body" else f"{where} {place}"
    if error["type"] == "missing":
        return f"{field} is missing", FieldProblem(field=field, value="", allowed="not to leave it out")
    if error["type"] == "extra_forbidden":
        return f"there is no field {field}", FieldProblem(
            field=field, value=shown(error["input"]), allowed="no such field"
        )
    value, allowed = shown(error["input"]), _SHOULD.sub("", error["msg"])
    return f"{field}: {value!r} is not allowed; allowed is {allowed}", FieldProblem(
        field=field, value=value, allowed=allowed
    )
