"""The batcher over HTTP, on the internal network: a question in JSON, its answer, or a problem (RFC 9457).

POST /v1/answer   {"intent", "prompt", "max_tokens"?, "deadline_ms"?, "task"?, "audience"?}
GET  /v1/state    windows and why they changed, what waits, which intents are not packed
GET  /healthz, /readyz, /metrics
"""

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dataplane.meter import BatchMeter
from dataplane.service import BatcherService, InvalidField
from domain.batching import Answer, Refusal, RequestRefused

MEDIA_TYPE = "application/problem+json"
_SHOWN_CHARS = 100
_FULL_SECONDS = 1.0
"""When to come again to a process that is full."""
_STATUS = {
    Refusal.OVERLOADED: HTTPStatus.TOO_MANY_REQUESTS,
    Refusal.HOPELESS: HTTPStatus.SERVICE_UNAVAILABLE,
    Refusal.DRAINING: HTTPStatus.SERVICE_UNAVAILABLE,
    Refusal.THROTTLED: HTTPStatus.SERVICE_UNAVAILABLE,
    Refusal.FAILED: HTTPStatus.BAD_GATEWAY,
    Refusal.DEADLINE: HTTPStatus.GATEWAY_TIMEOUT,
    Refusal.INVALID: HTTPStatus.UNPROCESSABLE_ENTITY,
}


class AnswerRequest(BaseModel):
    """Body of `POST /v1/answer`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    intent: str
    prompt: str
    max_tokens: int | None = None
    """Longest answer; default and upper limit: the knob `max_output_tokens`."""
    deadline_ms: Annotated[float | None, Field(allow_inf_nan=False)] = None
    """From now; default: the policy's."""
    task: Annotated[str, Field(max_length=200)] = ""
    """The ECS task that asks."""
    audience: Annotated[str, Field(max_length=200)] = ""
    """Who may see the answer; empty: everybody."""


def create_app(service: BatcherService, is_ready: Callable[[], bool]) -> Starlette:
    """The application; `is_ready` turns false when the process is about to stop."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service.meter))

    async def state(_: HttpRequest) -> JSONResponse:
        meter = service.meter
        return JSONResponse(
            {
                "pending": service.core.pending,
                "controller": service.policy.batcher.controller,
                "windows": [
                    {
                        "model": model,
                        "group": group,
                        "window_ms": round(window.seconds * 1000, 1),
                        "size": window.size,
                        "why": window.why,
                    }
                    for (model, group), window in meter.windows.items()
                ],
                "changes": [asdict(change) for change in meter.changes],
                "not_packed": sorted(meter.not_packed),
            }
        )

    async def health(_: HttpRequest) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def ready(_: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"}) if is_ready() else problem(503, "the batcher is not ready, or stops")

    async def metrics(_: HttpRequest) -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return Starlette(
        routes=[
            Route("/v1/answer", _Answering(service), methods=["POST"]),
            Route("/v1/state", state),
            Route("/healthz", health),
            Route("/readyz", ready),
            Route("/metrics", metrics),
        ]
    )


class _Answering:
    """`POST /v1/answer`."""

    def __init__(self, service: BatcherService) -> None:
        self._service = service
        self._settings = service.policy.batcher
        self._requests = 0
        """In hand, ..."""
        self._bytes = 0
        """... and of their bodies."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._requests >= self._settings.max_pending:
            response: Response | None = self._full(f"{self._requests} requests are in hand, as many as may")
        else:
            self._requests += 1
            body = bytearray()
            try:
                response = await self._respond(HttpRequest(scope, receive), receive, body)
            finally:
                self._requests -= 1
                self._bytes -= len(body)
        if response is not None:
            await response(scope, receive, send)

    async def _respond(self, http: HttpRequest, receive: Receive, body: bytearray) -> Response | None:
        """The response; None if the client has gone. `body` is filled, and counted by its length."""
        most = self._settings.max_request_bytes
        if int(http.headers.get("content-length") or 0) > most:
            return _too_large(http.headers["content-length"], most)
        more = True
        try:
            async with asyncio.timeout(self._settings.max_deadline.total_seconds()):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    body += part
                    self._bytes += len(part)
                    if len(body) > most:
                        return _too_large("more", most)
                    if self._bytes > self._settings.max_bytes:
                        return self._full(f"requests of {self._bytes} bytes are in hand, more than may")
                    more = message.get("more_body", False)
        except TimeoutError:
            return problem(408, f"body: it did not come within {self._settings.max_deadline.total_seconds():g} s")
        try:
            asked = AnswerRequest.model_validate_json(body.decode())
        except UnicodeDecodeError as error:
            detail = f"body: byte {error.start} is not UTF-8; a JSON object in UTF-8 is allowed"
            return problem(400, detail, "body", repr(bytes(body[error.start : error.end])), "a JSON object in UTF-8")
        except ValidationError as error:
            return _wrong(error)
        asking = asyncio.ensure_future(
            self._service.ask(
                asked.intent,
                asked.prompt,
                max_tokens=asked.max_tokens,
                within_seconds=None if asked.deadline_ms is None else asked.deadline_ms / 1000,
                task=asked.task,
                audience=asked.audience,
            )
        )
        leaving = asyncio.ensure_future(receive())
        leaving.add_done_callback(lambda _: asking.cancel())  # its place is free again
        try:
            return _answered(await asking)
        except RequestRefused as refused:
            return _refused(refused)
        except asyncio.CancelledError:
            if leaving.done():
                return None
            raise
        finally:
            leaving.cancel()
            asking.cancel()

    def _full(self, why: str) -> Response:
        refusal = Refusal.OVERLOADED
        self._service.meter.refused("", refusal)
        return _refused(RequestRefused(refusal, why, _FULL_SECONDS))


def problem(status: int, detail: str, field: str = "", value: str = "", allowed: str = "", **more: Any) -> Response:
    """Problem details (RFC 9457); a field that is wrong with its value and what is allowed."""
    errors = [{"field": field, "value": value, "allowed": allowed}] if field else []
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    headers = {"Retry-After": more.pop("retry_after")} if "retry_after" in more else None
    return JSONResponse(body | {"errors": errors} | more, status, headers, MEDIA_TYPE)


def _answered(answer: Answer) -> Response:
    return JSONResponse(
        {
            "text": answer.text,
            "model": answer.model,
            "input_tokens": answer.input_tokens,
            "output_tokens": answer.output_tokens,
            "batch_size": answer.batch_size,
            "cached": answer.cached,
        }
    )


def _refused(refused: RequestRefused) -> Response:
    after = refused.retry_after_seconds
    more: dict[str, Any] = {"reason": refused.refusal}
    if after is not None:
        more |= {"retry_after": str(max(1, math.ceil(after))), "retry_after_ms": round(after * 1000)}
    status = _STATUS[refused.refusal]
    if isinstance(refused, InvalidField):
        return problem(status, refused.why, refused.field, refused.value, refused.allowed, **more)
    return problem(status, refused.why, **more)


def _too_large(length: str, most: int) -> Response:
    return problem(413, f"body: {length} bytes; at most {most} are allowed", "body", f"{length} bytes", f"{most} bytes")


def _wrong(error: ValidationError) -> Response:
    """400 for what is no JSON object, 422 for a field that is not allowed."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"])) or "body"
    value = repr(first["input"])
    shown = value if len(value) <= _SHOWN_CHARS else f"{value[:_SHOWN_CHARS]}..."
    status = 422 if first["loc"] else 400
    return problem(status, f"{field}: {shown}: {first['msg']}", field, shown, first["msg"])


class _Collector:
    """What the meter has counted, as Prometheus reads it."""

    def __init__(self, meter: BatchMeter) -> None:
        self._meter = meter

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        meter, totals = self._meter, self._meter.totals()
        histograms = (
            ("batcher_queue_wait_seconds", "wait in the queue", ("model",), totals.waits_ms, _WAITS, 1e-3),
            ("batcher_batch_size", "requests in a batch", ("model",), totals.sizes, _SIZES, 1),
            ("batcher_batch_seconds", "from slot to answer", ("model", "intent"), totals.latency_ms, _SECONDS, 1e-3),
            ("batcher_tokens", "tokens of an answer", ("intent", "direction"), totals.tokens, _TOKENS, 1),
        )
        for name, text, labels, series, edges, unit in histograms:
            family = HistogramMetricFamily(name, text, labels=labels)
            for key, counts in series.items():
                values = key if isinstance(key, tuple) else (key,)
                family.add_metric(values, *_cumulative(counts, edges, unit))
            yield family
        counters = (
            ("batcher_calls", "calls to Bedrock", ("model",), totals.calls),
            ("batcher_throttles", "calls that Bedrock refused", ("model",), totals.throttles),
            ("batcher_coalesced", "requests that shared an equal one's call", ("intent",), totals.coalesced),
            ("batcher_window_changes", "of the window, and who decided", ("model", "cause"), totals.window_changes),
            ("batcher_unanswered", "requests without an answer", ("intent", "reason"), totals.shed),
            (
                "batcher_cache_lookups",
                "lookups in the response cache",
                ("intent", "result"),
                {
                    (intent, "hit" if value else "miss"): count
                    for intent, counts in totals.cache.items()
                    for value, count in counts.items()
                },
            ),
        )
        for name, text, labels, counts_by in counters:
            counter = CounterMetricFamily(name, text, labels=labels)
            for key, count in counts_by.items():
                counter.add_metric(key if isinstance(key, tuple) else (key,), count)
            yield counter
        yield GaugeMetricFamily("batcher_waiting", "requests that wait for a call", meter.depth())
        window = GaugeMetricFamily("batcher_window_seconds", "longest wait for mates", labels=("model", "group"))
        size = GaugeMetricFamily("batcher_window_size", "a batch that has so many goes", labels=("model", "group"))
        for lane, now in meter.windows.items():
            window.add_metric(lane, now.seconds)
            size.add_metric(lane, now.size)
        yield window
        yield size
        rests = GaugeMetricFamily("batcher_not_packed", "1: lost too many packed answers", labels=("intent",))
        for intent in meter.not_packed:
            rests.add_metric((intent,), 1)
        yield rests


_LONG = (1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 5, 7.5, 10, 20)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, *_LONG)
_WAITS = (
    *(ms / 1000 for ms in (5, *range(10, 200, 10), *range(200, 600, 25), *range(600, 1001, 50))),
    *_LONG,
)
"""Narrow where windows are, so that their P99 can be told."""
_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32)
_TOKENS = (10, 25, 50, 100, 250, 500, 1000, 2000, 4000)


def _cumulative(
    counts: dict[float, int], edges: tuple[float, ...], unit: float
) -> tuple[list[tuple[str, float]], float]:
    """A histogram's buckets and its sum."""
    buckets = [(str(edge), float(sum(n for value, n in counts.items() if value * unit <= edge))) for edge in edges]
    total = sum(value * unit * n for value, n in counts.items())
    return [*buckets, ("+Inf", float(sum(counts.values())))], total
