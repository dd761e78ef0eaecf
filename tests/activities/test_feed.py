"""Feeds served locally: valid, broken, huge, slow, malicious. The reader says what is wrong and is bounded in all."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from activities import feed
from activities.feed import FeedActivities
from domain.announcements import FeedRead
from domain.policy import FeedPolicy

RSS = """<?xml version="1.0" encoding="utf-8"?>
<rss version="2.0"><channel><title>Publisher</title>
<item><guid>a</guid><title>『海の王』最終回 12月7日</title><link>https://example.com/a</link>
<description>&lt;p&gt;12月7日発売&lt;/p&gt;</description><pubDate>Tue, 24 Nov 2026 12:00:00 +0900</pubDate></item>
<item><title>No id</title></item>
</channel></rss>"""
ATOM = """<feed xmlns="http://www.w3.org/2005/Atom"><title>P</title><id>p</id>
<entry><id>b</id><title>New series</title><updated>2026-11-24T03:00:00Z</updated>
<summary>on December 14</summary></entry>
</feed>"""
BOMB = (
    '<?xml version="1.0"?><!DOCTYPE rss [<!ENTITY a "lol">'
    + "".join(f'<!ENTITY {x} "{f"&{y};" * 10}">' for x, y in zip("bcdefghi", "abcdefgh", strict=True))
    + ']><rss version="2.0"><channel><item><title>&i;</title></item></channel></rss>'
)
FILE = """<!DOCTYPE rss [<!ENTITY x SYSTEM "file:///etc/passwd">]>
<rss version="2.0"><channel><title>&x;</title></channel></rss>"""


class Handler(BaseHTTPRequestHandler):
    """Answers by path."""

    bodies: ClassVar[dict[str, tuple[str, bytes]]] = {
        "/rss": ("application/rss+xml", RSS.encode()),
        "/atom": ("application/atom+xml; charset=UTF-8", ATOM.encode()),
        "/sjis": ("text/xml", RSS.replace("utf-8", "Shift_JIS").encode("cp932")),
        "/bomb": ("text/xml", BOMB.encode()),
        "/bomb16": ("text/xml; charset=utf-16", BOMB.encode("utf-16")),
        "/bomb7": ("text/xml", b'<?xml version="1.0" encoding="utf-7"?>' + BOMB[21:].encode("utf-7")),
        "/file": ("text/xml", FILE.encode()),
        "/deep": ("text/xml", b"<rss>" + b"<a>" * 100_000),
        "/broken": ("text/xml", RSS[:300].encode()),
        "/html": ("text/html", b"<html><body><p>Not found</p></body></html>"),
        "/empty": ("text/xml", b""),
        "/null": ("text/xml", b"\x00\xff" * 50),
        "/huge": ("text/xml", b"<rss>" + b" " * 5_000_000),
    }
    elsewhere = ""
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/slow":
            self._dribble()
        elif self.path == "/loop":
            self._send(302, {"Location": "/loop"})
        elif self.path == "/moved":
            self._send(301, {"Location": "rss"})
        elif self.path.startswith("/to?"):
            self._send(302, {"Location": self.path[4:]})
        elif self.path == "/gzip":
            self._send(200, {"Content-Encoding": "gzip"}, b"\x1f\x8b")
        elif self.path in self.bodies:
            kind, body = self.bodies[self.path]
            self._send(200, {"Content-Type": kind}, body)
        else:
            self._send(404, {})

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _dribble(self) -> None:
        """A byte now and then: never silent for long, and never done."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            try:
                self.wfile.write(b"x-a: b\r\n")
            except OSError:
                return
            time.sleep(0.05)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.daemon_threads = True
        running.shutdown()


@pytest.fixture(autouse=True)
def _nothing_asked() -> None:
    Handler.asked.clear()


async def read(url: str, **policy: Any) -> FeedRead:
    allowed = {"allowed_hosts": ("127.0.0.1",), **policy}
    return await FeedActivities().read_feed(FeedPolicy(url=url, **allowed))


@pytest.mark.parametrize("path", ["/rss", "/sjis", "/moved"])
async def test_rss_is_read(server: str, path: str) -> None:
    found = await read(server + path)
    assert not found.problem
    first, second = found.entries
    assert (first.guid, first.title, first.link) == ("a", "『海の王』最終回 12月7日", "https://example.com/a")
    assert "12月7日発売" in first.summary
    assert first.published == datetime(2026, 11, 24, 3, tzinfo=UTC)
    assert second.guid == "No id"


async def test_atom_is_read(server: str) -> None:
    [entry] = (await read(server + "/atom")).entries
    assert (entry.guid, entry.summary) == ("b", "on December 14")


async def test_of_many_entries_the_newest_are_read(server: str) -> None:
    found = await read(server + "/rss", max_entries=1)
    assert ([entry.guid for entry in found.entries], found.left_out) == (["a"], 1)


def test_the_largest_answer_fits_into_a_message_of_temporal() -> None:
    item = "".join(f"<{name}>{'最' * 2000}</{name}>" for name in ("title", "link", "guid", "description"))
    entries = feed.parse(f'<rss version="2.0"><channel>{f"<item>{item}</item>" * 200}</channel></rss>'.encode())
    assert len(entries) == 200
    assert len(FeedRead(entries=tuple(entries)).model_dump_json().encode()) < 1_400_000


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/bomb", "declares entities"),
        ("/file", "declares entities"),
        ("/bomb16", "encoding 'utf-16' is not taken"),
        ("/bomb7", "encoding 'utf-7' is not taken"),
        ("/deep", "nested more than"),
        ("/broken", "not well-formed"),
        ("/null", "not well-formed"),
        ("/empty", "not well-formed"),
        ("/html", "neither RSS nor Atom"),
        ("/huge", "longer than 1000000 bytes"),
        ("/gzip", "compressed"),
        ("/loop", "more than 5 redirects"),
        ("/missing", "answered 404"),
        ("/to?file:///etc/passwd", "only http and https"),
        ("/to?ftp://127.0.0.1:21/", "only http and https"),
        (f"/to?http://{'a' * 300}.example/", "cannot be read"),
        ("/to?http://127.0.0.1:99999/", "Port out of range"),
        ("/to?http://user:secret@example.com/", "only http and https"),
        ("/to?http://[::1", "Invalid IPv6"),
    ],
)
async def test_what_is_wrong_is_said(server: str, path: str, why: str) -> None:
    started = time.monotonic()
    found = await read(server + path)
    assert why in found.problem
    assert not found.entries
    assert time.monotonic() - started < 8


async def test_a_server_that_dribbles_is_left(server: str) -> None:
    assert "did not answer within 0.5 s" in (await read(server + "/slow", fetch_timeout=timedelta(seconds=0.5))).problem


async def test_nobody_there_is_said() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    assert "cannot be read" in (await read(f"http://127.0.0.1:{port}/")).problem


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "[::1]",
        "[fe80::1]",
        "[fd00::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "2130706433",
        "0x7f.1",
        "224.0.0.1",
        "100.64.0.1",
    ],
)
async def test_private_addresses_are_refused_at_first_and_after_a_redirect(server: str, host: str) -> None:
    port = server.rpartition(":")[2]
    direct = await read(f"http://{host}:{port}/rss", allowed_hosts=())
    assert "not a public address" in direct.problem, direct
    assert Handler.asked == []
    if host != "127.0.0.1":
        redirected = await read(f"{server}/to?http://{host}:{port}/rss")
        assert "not a public address" in redirected.problem
        assert len(Handler.asked) == 1


async def test_the_address_that_was_checked_is_the_one_that_is_asked(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is public when it is checked and private a moment later: it is not asked for again."""
    answers = [[(2, 1, 6, "", ("93.184.216.34", 80))], [(2, 1, 6, "", ("127.0.0.1", 80))]]
    connected = []

    async def resolve(host: str, port: int, **_: Any) -> Any:
        return answers.pop(0)

    async def connect(host: str, port: int, **_: Any) -> Any:
        connected.append(host)
        raise OSError("not in a test")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    monkeypatch.setattr(asyncio, "open_connection", connect)
    await read("http://rebinding.example/rss", allowed_hosts=())
    assert connected == ["93.184.216.34"]


async def test_one_private_address_among_several_refuses_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str, port: int, **_: Any) -> Any:
        return [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    assert "10.0.0.1" in (await read("http://two.example/rss", allowed_hosts=())).problem
