"""Reading the publisher's feed: an untrusted address and untrusted bytes, so everything about both is bounded.

What is wrong with a feed is an answer, not a failure: the next run of the schedule reads it again.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from codecs import BOM_UTF8
from datetime import UTC, datetime
from time import struct_time
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit
from xml.parsers import expat

import feedparser
import h11
from temporalio import activity

from domain.announcements import FeedEntry, FeedRead
from domain.policy import FeedPolicy

MAX_DEPTH = 100
"""Of nested elements; feeds have about ten."""
MAX_TEXT, MAX_SUMMARY = 300, 1_000
"""Characters that are kept: of 200 entries at most 1.4 MB, as Temporal takes 2 MB."""
CHUNK_BYTES = 16_384
ENCODINGS = frozenset(
    ("utf-8", "us-ascii", "shift_jis", "shift-jis", "cp932", "windows-31j", "euc-jp", "iso-8859-1", "windows-1252")
)
"""In which `<` is `<`; others could hide what is refused."""
_DECLARED = re.compile(rb"""<\?xml\s[^>]{0,200}?encoding\s*=\s*["']([\x21-\x7e]{1,40}?)["']""")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_REDIRECTS = frozenset((301, 302, 303, 307, 308))


class FeedRefused(ValueError):
    """The feed, or the way to it, is not taken; the message says why."""


class FeedActivities:
    """One feed, read anew each time."""

    @activity.defn
    async def read_feed(self, policy: FeedPolicy) -> FeedRead:
        """The newest entries of the feed, or why there are none."""
        assert policy.url is not None
        try:
            body, charset = await fetch(policy.url, policy)
            entries = await asyncio.to_thread(parse, body, charset)
        except FeedRefused as error:
            return FeedRead(problem=str(error))
        except TimeoutError:
            return FeedRead(problem=f"{policy.url} did not answer within {policy.fetch_timeout.total_seconds():g} s")
        except (OSError, UnicodeError, h11.ProtocolError) as error:
            return FeedRead(problem=f"{policy.url} cannot be read: {error}")
        newest = sorted(entries, key=lambda entry: entry.published or _LONG_AGO, reverse=True)
        return FeedRead(entries=tuple(newest[: policy.max_entries]), left_out=max(0, len(newest) - policy.max_entries))


_LONG_AGO = datetime.min.replace(tzinfo=UTC)


# ---------------------------------------------------------------- fetching


async def fetch(url: str, policy: FeedPolicy) -> tuple[bytes, str | None]:
    """The body at `url`, and the charset that the server says it has.

    Raises:
        FeedRefused: an address, an answer or a size that is not allowed.
        TimeoutError: not within the policy's time, redirects and a server that dribbles included.
        OSError, UnicodeError, h11.ProtocolError: the network, a name that cannot be, or not HTTP.
    """
    async with asyncio.timeout(policy.fetch_timeout.total_seconds()):
        for _ in range(policy.max_redirects + 1):
            parts = _split(url)
            answer = await _get(parts, await _address(parts, policy), policy)
            if isinstance(answer, tuple):
                return answer
            url = answer
    raise FeedRefused(f"more than {policy.max_redirects} redirects")


def _split(url: str, base: str = "") -> SplitResult:
    try:
        return urlsplit(urljoin(base, url))
    except ValueError as error:
        raise FeedRefused(f"{url[:200]!r}: {error}") from None


async def _address(parts: SplitResult, policy: FeedPolicy) -> tuple[str, int]:
    """The one address to connect to. Every address of the host's must be allowed, so that none is a matter of luck."""
    try:
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as error:
        raise FeedRefused(f"{parts.geturl()!r}: {error}") from None
    if parts.scheme not in ("http", "https") or port is None or not host or parts.username is not None:
        raise FeedRefused(f"{parts.geturl()!r}: only http and https addresses without a user are allowed")
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(sockaddr[0]) for *_, sockaddr in found]
    forbidden = [address for address in addresses if not _is_public(address)]
    if forbidden and host not in policy.allowed_hosts:
        raise FeedRefused(
            f"{host} is at {forbidden[0]}, which is not a public address; feed.allowed_hosts may name the host"
        )
    return addresses[0], port


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        ip = inner or ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else ip)
    return ip.is_global and not ip.is_multicast


async def _get(parts: SplitResult, address: tuple[str, int], policy: FeedPolicy) -> tuple[bytes, str | None] | str:
    """Body and charset, or where a redirect leads."""
    assert parts.hostname is not None
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    reader, writer = await asyncio.open_connection(
        *address, ssl=tls, server_hostname=parts.hostname if tls else None, limit=CHUNK_BYTES
    )
    try:
        connection = h11.Connection(h11.CLIENT)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        request = h11.Request(
            method="GET",
            target=target.encode("ascii", "strict"),
            headers=[
                ("Host", parts.netloc.encode("idna").decode()),
                ("Accept", "application/rss+xml, application/atom+xml, application/xml, text/xml"),
                ("Accept-Encoding", "identity"),
                ("User-Agent", "mangaassist-runbooks"),
                ("Connection", "close"),
            ],
        )
        writer.write(connection.send(request))
        writer.write(connection.send(h11.EndOfMessage()))
        await writer.drain()
        return await _answer(connection, reader, parts.geturl(), policy)
    except UnicodeError as error:
        raise FeedRefused(f"{parts.geturl()!r}: {error}") from None
    finally:
        writer.close()


async def _answer(
    connection: h11.Connection, reader: asyncio.StreamReader, url: str, policy: FeedPolicy
) -> tuple[bytes, str | None] | str:
    body = bytearray()
    charset: str | None = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(CHUNK_BYTES))
        elif isinstance(event, h11.Response):
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
            if event.status_code in _REDIRECTS and "location" in headers:
                return _split(headers["location"], url).geturl()
            if event.status_code != 200:
                raise FeedRefused(f"the server answered {event.status_code}")
            if headers.get("content-encoding", "identity").lower() != "identity":
                raise FeedRefused("the answer is compressed, which was not asked for")
            charset = _charset(headers.get("content-type", ""))
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > policy.max_bytes:
                raise FeedRefused(f"the feed is longer than {policy.max_bytes} bytes")
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            return bytes(body), charset


def _charset(content_type: str) -> str | None:
    for part in content_type.lower().split(";")[1:]:
        name, _, value = part.strip().partition("=")
        if name == "charset":
            return value.strip("\"' ")
    return None


# ---------------------------------------------------------------- parsing


def parse(body: bytes, charset: str | None = None) -> list[FeedEntry]:
    """The entries of an RSS or Atom feed.

    Raises:
        FeedRefused: it is no well-formed feed, declares entities, or nests deeper than any feed does.
    """
    text = _decoded(body, charset)
    _check(text)
    # Its strict parser: what is not well-formed has been refused.
    feed: Any = feedparser.parse(text.encode(), response_headers={"content-type": "application/xml; charset=utf-8"})
    if not feed.version:
        raise FeedRefused("it is neither RSS nor Atom")
    return [entry for found in feed.entries if (entry := _entry(found)) is not None]


def _decoded(body: bytes, charset: str | None) -> str:
    """The text, without its XML declaration: what says the encoding need not be believed twice."""
    body = body.removeprefix(BOM_UTF8).lstrip()
    declared = _DECLARED.match(body)
    encoding = charset or (declared[1].decode().lower() if declared else "utf-8")
    if encoding not in ENCODINGS:
        raise FeedRefused(f"encoding {encoding[:40]!r} is not taken; there are {', '.join(sorted(ENCODINGS))}")
    text = body.decode(encoding, "replace")
    return text.partition("?>")[2] if text.startswith("<?xml") else text


def _check(text: str) -> None:
    depth = 0

    def start(name: str, attributes: object) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise FeedRefused(f"elements are nested more than {MAX_DEPTH} deep")

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1

    def entity(*_: object) -> None:
        raise FeedRefused("it declares entities, which feeds do not need")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.EntityDeclHandler = entity
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise FeedRefused(f"it is not well-formed XML: {error}") from None


def _entry(found: Any) -> FeedEntry | None:
    """None: it has nothing that tells it from others."""
    title, link = (str(found.get(name) or "")[:MAX_TEXT] for name in ("title", "link"))
    summary = str(found.get("summary") or "")[:MAX_SUMMARY]
    guid = str(found.get("id") or link or title)[:MAX_TEXT]
    if not guid:
        return None
    at: struct_time | None = found.get("published_parsed") or found.get("updated_parsed")
    return FeedEntry(guid=guid, title=title, summary=summary, link=link, published=_moment(at))


def _moment(at: struct_time | None) -> datetime | None:
    try:
        return datetime(*at[:6], tzinfo=UTC) if at else None
    except ValueError:
        return None
