"""The batcher's process before a Bedrock that does what it should not: everybody hears once, in time, and rightly."""

import asyncio
import json
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from domain.packing import BEGINS
from tests.servers import free_port
from tests.workers.test_batcher_process import Process, ask, until

POLICY = """
batcher:
  {slots: 4, deadline: PT2S, drain: PT2S, controller: fixed, max_bytes: 400000}
knobs: {batch_window_ms: 200}
"""
Act = Callable[[str, bool], bytes | int]
"""What is said to a prompt, packed or not: a text, or the status of a refusal."""


class Bedrock(ThreadingHTTPServer):
    """Converse as a test wants it; every other call of AWS gets an answer that is none."""

    daemon_threads = True
    act: Act
    models: list[str]
    gate: threading.Event

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.does(right)

    def does(self, act: Act, *, opened: bool = True) -> threading.Event:
        """From now on; a gate that is not open lets no answer out."""
        self.act, self.models, self.gate = act, [], threading.Event()
        if opened:
            self.gate.set()
        return self.gate


class _Handler(BaseHTTPRequestHandler):
    server: Bedrock

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        said: bytes | int = b"<html>not what you expect</html>"
        if self.path.endswith("/converse"):
            self.server.models.append(unquote(self.path.split("/")[2]))
            asked = json.loads(body)
            said = self.server.act(asked["messages"][0]["content"][0]["text"], "system" in asked)
            self.server.gate.wait(20)
        self.send_response(said if isinstance(said, int) else 200)
        if isinstance(said, int):
            self.send_header("x-amzn-ErrorType", "ValidationException" if said == 400 else "InternalServerException")
            said = b'{"message": "No."}'
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def reply(text: str) -> bytes:
    message = {"role": "assistant", "content": [{"text": text}]}
    usage = {"inputTokens": 3, "outputTokens": 5, "totalTokens": 8}
    return json.dumps({"output": {"message": message}, "usage": usage}).encode()


def entries(prompt: str) -> list[dict[str, str]]:
    return [
        {"name": name, "begins": question[:BEGINS], "answer": f"about {question}"}
        for name, question in json.loads(prompt).items()
    ]


def right(prompt: str, packed: bool) -> bytes | int:
    return reply(json.dumps(entries(prompt)) if packed else f"about {prompt}")


@pytest.fixture(scope="module")
def bedrock() -> Iterator[Bedrock]:
    server = Bedrock()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def process(bedrock: Bedrock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    aws, nowhere = f"http://127.0.0.1:{bedrock.server_port}", f"127.0.0.1:{free_port()}"
    made = Process(tmp_path_factory.mktemp("faults"), aws, f"redis://{nowhere}/0", nowhere, POLICY)
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture
async def http(process: Process) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=process.url, timeout=30) as client:
        yield client


async def outcomes(http: httpx.AsyncClient, *prompts: str, intent: str = "faq") -> list[str]:
    """The texts of the answers, or the reasons why there are none."""
    answers = await asyncio.gather(*(ask(http, prompt, intent) for prompt in prompts))
    return [answer.json().get("text") or answer.json()["reason"] for answer in answers]


@pytest.mark.parametrize("said", [b"", b"<html>", b"{}", b"\xff", reply(" "), reply("half an answer")[:30], 500])
async def test_garbage_is_no_answer(http: httpx.AsyncClient, bedrock: Bedrock, said: bytes | int) -> None:
    bedrock.does(lambda prompt, packed: said)
    assert await outcomes(http, "alone", intent="search") == ["failed"]
    assert await outcomes(http, "one", "two") == ["failed"] * 2
    bedrock.does(right)
    assert await outcomes(http, "after") == ["about after"]


async def test_an_item_with_two_answers_and_one_with_half_of_it_are_asked_again(
    http: httpx.AsyncClient, bedrock: Bedrock
) -> None:
    def act(prompt: str, packed: bool) -> bytes | int:
        if not packed:
            return right(prompt, packed)
        said = entries(prompt)
        twice = json.dumps([said[0] | {"answer": "another's"}, *said])
        return reply(twice[: twice.rindex("about") + 3])

    bedrock.does(act)
    assert await outcomes(http, "a", "b", "c") == ["about a", "about b", "about c"]
    assert len(bedrock.models) == 3, "packed, and twice alone"


async def test_a_poisoned_item_fails_alone(http: httpx.AsyncClient, bedrock: Bedrock) -> None:
    bedrock.does(lambda prompt, packed: 400 if "poison" in prompt else right(prompt, packed))
    wanted = ["about a", "about b", "invalid", "about d", "about e"]
    assert await outcomes(http, "a", "b", "poison", "d", "e") == wanted


async def test_what_never_comes_or_comes_late_is_no_answer_to_anybody(
    http: httpx.AsyncClient, bedrock: Bedrock
) -> None:
    gate = bedrock.does(lambda prompt, packed: right(f"late {prompt}", False), opened=False)
    late = asyncio.create_task(outcomes(http, *(f"never {n}" for n in range(4)), intent="recommendation"))
    assert await late == ["deadline"] * 4
    bedrock.does(right)
    gate.set()
    await until(http, lambda state: state["pending"] == 0)
    following = [f"next {n}" for n in range(4)]
    assert await outcomes(http, *following, intent="recommendation") == [f"about {one}" for one in following]


async def test_bodies_that_never_end_hold_no_more_than_they_may(
    process: Process, http: httpx.AsyncClient, bedrock: Bedrock
) -> None:
    """Four clients send 150,000 bytes each and no more: the third and fourth are over what may be in hand."""
    head = b"POST /v1/answer HTTP/1.1\r\nHost: b\r\nContent-Length: 200000\r\n\r\n"
    senders = []
    for _ in range(4):
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
        writer.write(head + b" " * 150_000)
        senders.append((reader, writer))
    heard = [asyncio.create_task(reader.readline()) for reader, _ in senders]
    async with asyncio.timeout(40):
        while sum(one.done() for one in heard) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert {one.result() for one in heard if one.done()} == {b"HTTP/1.1 429 Too Many Requests\r\n"}
    for one, (_, writer) in zip(heard, senders, strict=True):
        one.cancel()
        writer.close()
    async with asyncio.timeout(40):
        while await outcomes(http, "after them") != ["about after them"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert 'batcher_unanswered_total{intent="",reason="overloaded"}' in (await http.get("/metrics")).text


async def test_a_body_of_unknown_length_is_cut_off_too(http: httpx.AsyncClient) -> None:
    async def ten_megabytes() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 100_000

    answer = await http.post("/v1/answer", content=ten_megabytes())
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (413, "body")
    assert (await http.get("/healthz")).status_code == 200


async def test_headers_that_never_end_are_cut_off(process: Process, http: httpx.AsyncClient) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 200_000)
    async with asyncio.timeout(40):
        with suppress(ConnectionResetError):  # which may overtake the 400
            await reader.read()
    writer.close()
    long = await http.get("/healthz", headers={"X": "x" * 30_000})
    assert long.status_code == 200


async def test_sigterm_while_bedrock_never_answers_ends_in_its_budget_and_everybody_hears(
    process: Process, http: httpx.AsyncClient, bedrock: Bedrock
) -> None:
    gate = bedrock.does(right, opened=False)
    asked = [asyncio.create_task(ask(http, f"last {n}", "recommendation", deadline_ms=25_000)) for n in range(8)]
    await until(http, lambda state: state["pending"] == 8)
    process.process.send_signal(signal.SIGTERM)
    answers = await asyncio.gather(*asked)
    assert {(answer.status_code, answer.json()["reason"]) for answer in answers} == {(503, "draining")}
    assert await asyncio.to_thread(process.process.wait, 20) == 0, "it did not wait for the calls"
    gate.set()
    log = process.log.read_text()
    assert '"without_answer": 8' in log
    assert "Traceback" not in log
    assert "Task was destroyed" not in log
