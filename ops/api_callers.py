"""Who calls the ops API: the bearer token's subject, its role at this moment, how often it calls, and repeated calls.

Every operation needs a viewer at least; what else a change needs is decided where the command line's changes are.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, NoReturn

import redis
import structlog
from fastapi import Header, Request, Response
from fastapi.routing import APIRoute
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from pydantic import WithJsonSchema
from starlette.requests import ClientDisconnect
from starlette.types import Message

from activities.settings import ConfigurationError, load_yaml
from dataplane import keys
from dataplane.ledger import Ledger
from domain.knobs import Holder, Refusal
from domain.people import Role, Roster
from ops.api_problems import FieldProblem, ProblemError, shown
from workers.settings import Settings
from workers.tokens import KeyUnusable, TokenRefused, identify

REMEMBER_KEYS_SECONDS = 24 * 3600
"""How long an idempotency key may not be used for another request."""

MAX_BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0
"""How long a caller may take to send a body."""

_READS = ("GET", "HEAD")
_log = structlog.get_logger()


@dataclass(frozen=True)
class Caller:
    """Somebody whose token was verified."""

    subject: str
    token: str


class Callers:
    """Admits requests, or says why not."""

    def __init__(self, settings: Settings, ledger: Ledger, connection: redis.Redis) -> None:
        self._settings = settings
        self._ledger = ledger
        self._redis = connection
        self._rates = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def admit(self, request: Request) -> Caller:
        """The caller of `request`.

        Raises:
            ProblemError: 401 without a good token, 403 without a role, 429 too often.
            ConfigurationError: the roster or the key of tokens cannot be read.
        """
        roster = await asyncio.to_thread(load_yaml, Roster, self._settings.roster_file)
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            await self._refuse(request, None, 401, "There is no bearer token.")
        try:
            subject = identify(token, self._settings.token_key_file, lambda: roster)
        except KeyUnusable as error:
            raise ConfigurationError(str(error)) from error
        except TokenRefused as error:
            await self._refuse(request, None, 401, f"Token refused: {error}.")
        if not roster.may(subject, Role.VIEWER):
            await self._refuse(request, subject, 403, f"{subject} is not in the roster; viewer is needed.")
        settings = self._settings
        reads = request.method in _READS
        allowed = settings.api_reads_per_minute if reads else settings.api_changes_per_minute
        self._count("reads" if reads else "changes", allowed, subject)
        return Caller(subject, token)

    async def remember(self, caller: Caller, key: str, asked: str) -> bool:
        """Note what an idempotency key is used for; whether it is new.

        While Redis is away nothing is compared: the key still names the workflow or the update, so that the first
        request's answer is given and nothing is done twice.

        Raises:
            ProblemError: 422, the key was used for something else.
        """
        name, digest = _noted_at(caller, key), hashlib.sha256(asked.encode()).hexdigest()

        def first() -> object:
            if self._redis.set(name, digest, nx=True, ex=REMEMBER_KEYS_SECONDS):
                return None
            return self._redis.get(name) or digest

        try:
            known = await asyncio.to_thread(first)
        except redis.RedisError as error:
            _log.warning("idempotency keys cannot be compared now", error=str(error))
            return False
        if known not in (None, digest):
            allowed = "a new key for each new request, the same only for a repetition"
            raise ProblemError(
                422,
                f"Idempotency-Key {shown(key)} was used for another request within the last 24 h.",
                "Send the request with a new key, or the earlier one again as it was.",
                errors=[FieldProblem(field="header Idempotency-Key", value=shown(key), allowed=allowed)],
            )
        return known is None

    async def forget(self, caller: Caller, key: str) -> None:
        """A key that `remember` called new is as if it had not been used. While Redis is away it stays used."""
        try:
            await asyncio.to_thread(self._redis.delete, _noted_at(caller, key))
        except redis.RedisError as error:
            _log.warning("an idempotency key cannot be freed now", error=str(error))

    async def _refuse(self, request: Request, subject: str | None, status: int, why: str) -> NoReturn:
        """Put a refused change on record beside the ledger's changes; without Redis it stands in the log alone.

        Counted by address, so that guessing tokens is slow and does not flood the record.
        """
        address = request.client.host if request.client else ""
        self._count("refused requests", self._settings.api_refusals_per_minute, subject or address)
        _log.warning("refused", who=subject, method=request.method, path=request.url.path, why=why)
        if request.method not in _READS:
            refusal = Refusal(
                holder=Holder(kind="person", id=subject[:200]) if subject else None,
                action=request.method,
                target=request.url.path[:200],
                why=why[:500],
            )
            try:
                await asyncio.to_thread(self._ledger.record_refusal, refusal)
            except redis.RedisError as error:
                _log.warning("a refusal could not be put on record", error=str(error))
        if status == HTTPStatus.UNAUTHORIZED:
            headers = {"WWW-Authenticate": 'Bearer realm="runbooks"'}
            raise ProblemError(status, why, "Send a header `Authorization: Bearer TOKEN` with yours.", headers=headers)
        raise ProblemError(status, why, "Ask for a role in the roster.")

    def _count(self, what: str, per_minute: int, who: str) -> None:
        limit = RateLimitItemPerMinute(per_minute)
        if self._rates.hit(limit, what, who):
            return
        again_in = max(1, round(self._rates.get_window_stats(limit, what, who).reset_time - time.time()))
        raise ProblemError(
            429,
            f"Too many requests: {per_minute} {what} a minute are allowed.",
            f"Try again in {again_in} s.",
            headers={"Retry-After": str(again_in)},
        )


def _noted_at(caller: Caller, key: str) -> str:
    return f"{keys.IDEMPOTENCY}:{derived_id(caller, key)}"


def derived_id(caller: Caller, key: str) -> str:
    """The same for the same caller and idempotency key."""
    return hashlib.sha256(f"{caller.subject}\0{key}".encode()).hexdigest()[:32]


class Guarded(APIRoute):
    """A route for callers that were admitted, with its body read as JSON whatever its Content-Type says.

    The runbooks' `curl -d` sends a form's. The bearer token, which no browser adds by itself, keeps that safe.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler behind both."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
            headers.append((b"content-type", b"application/json"))
            request = Request({**request.scope, "headers": headers}, request.receive)
            request.state.caller = await request.app.state.callers.admit(request)
            _refuse_unknown(request, {field.alias for field in self.dependant.query_params})
            if self.body_field:
                request = await _with_json(request)
            return await handle(request)

        return guarded


def _refuse_unknown(request: Request, known: set[str]) -> None:
    if unknown := [name for name in request.query_params if name not in known]:
        allowed = ", ".join(sorted(known)) or "nothing"
        found = [FieldProblem(field="query", value=shown(name), allowed=allowed) for name in unknown]
        raise ProblemError(422, f"query: {shown(unknown[0])} is not allowed; allowed is {allowed}.", errors=found)


async def _with_json(request: Request) -> Request:
    """`request` with its body at hand, which is JSON."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        allowed = {"Accept-Encoding": "identity"}
        raise ProblemError(415, f"Content-Encoding {shown(encoding)} is not allowed; identity is.", headers=allowed)
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise ProblemError(413, f"The body is too large; {MAX_BODY_BYTES} bytes are allowed.")
    except TimeoutError:
        raise ProblemError(408, f"The body did not come within {BODY_SECONDS:g} s.", "Send it again.") from None
    except ClientDisconnect:
        raise ProblemError(400, "The body did not come to its end.") from None
    try:
        json.loads(body, object_pairs_hook=_no_name_twice, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProblemError(400, f"The body is no JSON: {error}.", "Send one JSON object.") from None

    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    return Request(request.scope, receive)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has one of its names twice: {', '.join(name for name, _ in pairs)[:100]}")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_KEY = r"^[!-~]{1,200}$"
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=_KEY,
        description="The same key with the same request gives the same answer and is carried out once.",
    ),
    WithJsonSchema({"type": "string", "pattern": _KEY}),
]
