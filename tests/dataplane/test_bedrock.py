"""The Bedrock backend against a server that says anything: what is no answer never reaches a caller as one."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pytest
from botocore.config import Config

from dataplane.bedrock import BedrockBackend
from dataplane.sending import Gone, Rejected, Reply, Target, Throttled, Unavailable

TARGET = Target("sonnet", "arn:aws:bedrock:ap-northeast-1:123456789012:provisioned-model/abc")


def answer(content: Any = None, **usage: Any) -> bytes:
    content = [{"text": "Hello."}] if content is None else content
    used = {"inputTokens": 3, "outputTokens": 5, "totalTokens": 8} | usage
    return json.dumps({"output": {"message": {"role": "assistant", "content": content}}, "usage": used}).encode()


class Server(ThreadingHTTPServer):
    """Says to each request what a test wants: status, headers, body, and how many bytes it claims to have."""

    daemon_threads = True
    status: int
    headers: dict[str, str]
    body: bytes
    claims: int | None
    release: threading.Event

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)

    def says(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, claims: int | None = None
    ) -> None:
        self.body, self.status, self.headers, self.claims = body, status, headers or {}, claims
        self.release = threading.Event()
        self.release.set()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.release.wait(10)
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(self.server.claims or len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def backend(server: Server) -> Iterator[BedrockBackend]:
    client = boto3.client(
        "bedrock-runtime",
        endpoint_url=f"http://127.0.0.1:{server.server_port}",
        region_name="ap-northeast-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(retries={"total_max_attempts": 1}),
    )
    made = BedrockBackend(client, 4)
    yield made
    made.close()


async def call(backend: BedrockBackend, within: float = 10) -> Reply:
    return await backend.call(TARGET, "", "Hi?", 100, within)


async def test_an_answer_has_its_text_and_its_tokens(server: Server, backend: BedrockBackend) -> None:
    server.says(answer([{"text": "Hel"}, {"reasoningContent": {"reasoningText": {"text": "?"}}}, {"text": "lo."}]))
    assert await call(backend) == Reply("Hello.", 3, 5)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Bad gateway</html>",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b"[" * 50_000,
        answer()[:-20],
        answer([]),
        answer([{"text": " \n"}]),
        answer([{"text": 7}]),
        answer("Hello."),
        answer({"text": "Hello."}),
        answer(inputTokens="three"),
        answer(outputTokens=None),
        answer(outputTokens=-5),
        answer(outputTokens=10**12),
    ],
    ids=lambda body: repr(body[:30]),
)
async def test_garbage_and_half_an_answer_are_no_answer(server: Server, backend: BedrockBackend, body: bytes) -> None:
    server.says(body)
    with pytest.raises(Unavailable):
        await call(backend)


async def test_an_answer_that_breaks_off_is_none(server: Server, backend: BedrockBackend) -> None:
    server.says(answer()[:40], claims=len(answer()))
    with pytest.raises(Unavailable):
        await call(backend)


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("ThrottlingException", 429, Throttled),
        ("ServiceQuotaExceededException", 400, Throttled),
        ("ModelNotReadyException", 429, Unavailable),
        ("InternalServerException", 500, Unavailable),
        ("ResourceNotFoundException", 404, Gone),
        ("AccessDeniedException", 403, Gone),
        ("ValidationException", 400, Rejected),
    ],
)
async def test_errors_have_their_kind(
    server: Server, backend: BedrockBackend, code: str, status: int, error: type[Exception]
) -> None:
    server.says(b'{"message": "No."}', status, {"x-amzn-ErrorType": code})
    with pytest.raises(error):
        await call(backend)


@pytest.mark.parametrize(
    "message",
    [
        "The provided model identifier is invalid.",
        "Invocation of model ID x with on-demand throughput isn\u2019t supported.",
    ],
)
async def test_a_target_that_is_no_model_is_gone_and_not_the_requests_fault(
    server: Server, backend: BedrockBackend, message: str
) -> None:
    server.says(json.dumps({"message": message}).encode(), 400, {"x-amzn-ErrorType": "ValidationException"})
    with pytest.raises(Gone):
        await call(backend)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("0", None), ("-1", None), ("soon", None), ("inf", None), ("nan", None)],
)
async def test_when_to_come_again_counts_where_it_is_a_time(
    server: Server, backend: BedrockBackend, header: str, seconds: float | None
) -> None:
    server.says(b'{"message": "No."}', 429, {"x-amzn-ErrorType": "ThrottlingException", "Retry-After": header})
    with pytest.raises(Throttled) as throttled:
        await call(backend)
    assert throttled.value.retry_after_seconds == seconds


async def test_who_never_answers_or_too_late_is_given_up_in_time_and_its_answer_reaches_nobody(
    server: Server, backend: BedrockBackend
) -> None:
    server.says(answer())
    server.release = released = threading.Event()
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"did not answer within 0\.2 s"):
        await call(backend, within=0.2)
    assert time.monotonic() - began < 5
    server.says(answer([{"text": "The next one's."}]))
    released.set()
    assert (await call(backend)).text == "The next one's."


async def test_as_many_calls_as_there_are_threads_and_the_others_are_given_up_in_time(
    server: Server, backend: BedrockBackend
) -> None:
    server.says(answer())
    server.release = released = threading.Event()
    results = await asyncio.gather(*(call(backend, within=0.3) for _ in range(20)), return_exceptions=True)
    assert {type(result) for result in results} == {Unavailable}
    released.set()
    assert (await call(backend)).text == "Hello."
