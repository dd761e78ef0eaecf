"""Real requests to a real batcher, as MangaAssist's tasks make them, each measured from message to answer (scenario 3).

Each message waits for the stages, asks the batcher over HTTP and waits for the last stage. Everything is real time:
windows, latencies and arrivals are not compressed, whatever the rehearsal's speed.
"""

import asyncio
import json
import logging
import math
import random
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from domain.batching import Strategy
from domain.metrics import BATCHERS, MetricName
from domain.policy import Policy
from simulator.batch_latency import BURST_EVERY_SECONDS, BURST_SECONDS, BURST_TIMES, HAIKU_SHARE, REQUESTS_PER_SECOND
from simulator.mangaassist import Parameters
from simulator.stages import Stages
from simulator.traffic import MIX

BATCHER = "batcher"
"""The stage that the batcher answers in: its queue wait and Bedrock's latency."""
MEASURED = BATCHERS | {
    MetricName.REQUEST_LATENCY_P99,
    MetricName.FALLBACK_RATE,
    MetricName.STAGE_LATENCY,
    MetricName.INVOCATIONS,
    MetricName.INVOCATION_LATENCY,
    MetricName.INVOCATION_THROTTLES,
}
"""What is measured where requests are real: here, by the batcher, or by the simulated Bedrock."""
MOST_PER_SECOND = 500.0
_REMEMBERED = 100_000
_LATE_SECONDS = 1.0
"""Messages that are due longer than this are left out: the process has been stopped meanwhile."""
_LOOK_SECONDS = 0.5
_ANSWER_LATE_SECONDS = 2.0
"""The batcher keeps deadlines; after so long more it is not waited for."""

_log = logging.getLogger(__name__)


class Batcher(Protocol):
    """Who answers."""

    async def answer(self, intent: str, prompt: str, within_seconds: float) -> str | None:
        """None if it did; otherwise why it did not."""
        ...


class HttpBatcher:
    """The batcher at a URL; a connection for each request."""

    def __init__(self, url: str) -> None:
        """Raises ValueError if it is none."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"batcher URL {url!r}: http://HOST:PORT is allowed")
        self._host, self._port = parts.hostname, parts.port or 80

    async def is_ready(self) -> bool:
        """Whether it takes requests."""
        try:
            async with asyncio.timeout(_ANSWER_LATE_SECONDS):
                return (await self._exchange("GET", "/readyz", b""))[0] == 200
        except OSError:
            return False

    async def answer(self, intent: str, prompt: str, within_seconds: float) -> str | None:
        """See `Batcher`."""
        body = {"intent": intent, "prompt": prompt, "deadline_ms": round(within_seconds * 1000)}
        try:
            async with asyncio.timeout(within_seconds + _ANSWER_LATE_SECONDS):
                status, content = await self._exchange("POST", "/v1/answer", json.dumps(body).encode())
        except TimeoutError:
            return "silent"
        except OSError:
            return "unreachable"
        if status == 200:
            return None
        try:
            return str(json.loads(content)["reason"])
        except (ValueError, KeyError, TypeError):
            return f"status {status}"

    async def _exchange(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body. Raises OSError where there is no HTTP answer."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            answer, _, content = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        words = answer.split(maxsplit=2)
        if len(words) < 2 or not words[1].isdigit():
            raise OSError("the connection ended without an answer")
        return int(words[1]), content


class Message(NamedTuple):
    """What became of one."""

    took_ms: tuple[float, ...]
    """By stage, in order."""
    total_ms: float
    fallback: str | None
    """Why the user got the fallback text; None: an answer."""


class Requests:
    """Messages to `batcher` at a rate with bursts; what they took. One event loop, except where it says otherwise."""

    def __init__(
        self, policy: Policy, stages: Stages, batcher: Batcher, seed: int, parameters: Parameters | None = None
    ) -> None:
        """`policy.intents` that are packed are asked for, as users do, and a few of Haiku's.

        Raises:
            ValueError: no intent is packed, so nobody would wait.
        """
        self._policy = policy
        self._stages = stages
        self._batcher = batcher
        self._parameters = parameters or Parameters()
        self._chance = random.Random(seed)
        self._rate = REQUESTS_PER_SECOND
        *before, last = stages.budgets_ms
        self._before, self._last = before, last
        self.names = (*before, BATCHER, last)
        packed = {name: MIX.get(name, 0.0) for name, one in policy.intents.items() if one.strategy is Strategy.PACK}
        if not sum(packed.values()):
            raise ValueError("intents: none that users ask for has the strategy pack, so no request would wait")
        waits = 1 - HAIKU_SHARE
        self._mix = {name: waits * share / sum(packed.values()) for name, share in packed.items()} | {
            "search": HAIKU_SHARE
        }
        self._number = 0
        self._lock = threading.Lock()
        self._since = datetime.now(UTC)
        self._all: deque[Message] = deque(maxlen=_REMEMBERED)
        self._period: list[Message] = []
        self._has_begun = False

    # ------------------------------------------------------------ from any thread

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self._rate

    @rate.setter
    def rate(self, requests_per_second: float) -> None:
        self._rate = requests_per_second

    def forget(self) -> None:
        """The summary begins anew."""
        with self._lock:
            self._all.clear()
            self._since = datetime.now(UTC)

    def summary(self) -> dict[str, Any]:
        """Of all messages that ended since `forget`: how many, and how long they took."""
        with self._lock:
            messages, since = list(self._all), self._since
        latency, fallbacks = self._policy.latency, Counter(one.fallback for one in messages if one.fallback)
        budgets = self._stages.budgets_ms | {
            BATCHER: latency.queue_wait_p99_ms + max(latency.invocation_p99_ms.values())
        }
        totals = sorted(one.total_ms for one in messages)
        return {
            "requests_per_second": self._rate,
            "since": since.isoformat(),
            "count": len(messages),
            "errors": sum(fallbacks.values()),
            "errors_by_reason": dict(fallbacks),
            "stages": {
                name: _percentiles(sorted(one.took_ms[n] for one in messages), budgets[name])
                for n, name in enumerate(self.names)
            },
            "total": _percentiles(totals, latency.max_p99_ms)
            | {"alarm_ms": latency.alarm_p99_ms, "over_alarm_share": _over(totals, latency.alarm_p99_ms)},
        }

    def figures(self) -> Iterator[tuple[MetricName, dict[str, str], float | Mapping[float, int]]]:
        """What has ended since the last call, as metrics: a value, or values with counts.

        The first time there is something it is left out: of what had just begun, only the quick ones have ended.
        """
        with self._lock:
            messages, self._period = self._period, []
            is_first, self._has_begun = not self._has_begun, self._has_begun or bool(messages)
        if is_first or not messages:
            return
        yield MetricName.REQUEST_LATENCY_P99, {}, percentile(sorted(one.total_ms for one in messages), 99)
        fallbacks = sum(one.fallback is not None for one in messages)
        yield MetricName.FALLBACK_RATE, {}, 100 * fallbacks / len(messages)
        for n, name in enumerate(self.names):
            if name != BATCHER:
                yield (
                    MetricName.STAGE_LATENCY,
                    {"Stage": name},
                    Counter(float(round(one.took_ms[n])) for one in messages),
                )

    # ------------------------------------------------------------ in the loop

    async def run(self) -> None:
        """Send messages until cancelled; those under way are cancelled, too."""
        clock = asyncio.get_running_loop().time
        due = clock()
        async with asyncio.TaskGroup() as messages:
            while True:
                due = max(due + self._gap(due), clock() - _LATE_SECONDS)
                await asyncio.sleep(due - clock())
                messages.create_task(self._live())

    def _gap(self, at: float) -> float:
        """Until the next message: a Poisson process whose rate rises in bursts."""
        usual = self._rate / (1 + (BURST_TIMES - 1) * BURST_SECONDS / BURST_EVERY_SECONDS)
        gap = 0.0
        while True:
            gap += self._chance.expovariate(usual * BURST_TIMES)
            if (at + gap) % BURST_EVERY_SECONDS < BURST_SECONDS or self._chance.random() < 1 / BURST_TIMES:
                return gap

    async def _live(self) -> None:
        """One message from its begin to its answer."""
        intent, prompt = self._question()
        clock = asyncio.get_running_loop().time
        moments = [clock()]
        for name in self._before:
            await asyncio.sleep(self._stages.draw_ms(name, self._chance) / 1000)
            moments.append(clock())
        limits = self._parameters
        left_ms = limits.gateway_limit_ms - limits.gateway_margin_ms - self._stages.p99_ms(self._last)
        left_seconds = left_ms / 1000 - (moments[-1] - moments[0])
        late = left_seconds <= 0
        fallback = "late" if late else await self._batcher.answer(intent, prompt, left_seconds)
        moments.append(clock())
        await asyncio.sleep(self._stages.draw_ms(self._last, self._chance) / 1000)
        moments.append(clock())
        took = tuple(1000 * (after - before) for before, after in pairwise(moments))
        message = Message(took, sum(took), fallback)
        with self._lock:
            self._all.append(message)
            self._period.append(message)

    def _question(self) -> tuple[str, str]:
        """Intent and text: most come again after a while, so that the response cache has what it has in the model."""
        (intent,) = self._chance.choices(list(self._mix), list(self._mix.values()))
        self._number += 1
        number = self._number
        if self._chance.random() < self._parameters.repeatable_share:
            asked = self._rate * self._mix[intent] * self._parameters.repeatable_share * self._parameters.repeat_seconds
            number = -self._chance.randrange(max(1, round(asked)))
        return intent, f"Question {number} about {intent.replace('_', ' ')}?"


def live(requests: Requests, batcher: HttpBatcher, stop: threading.Event) -> None:
    """In a thread of its own: as soon as the batcher is ready, until `stop`."""

    async def until_stopped() -> None:
        while not await batcher.is_ready():
            if await asyncio.to_thread(stop.wait, _LOOK_SECONDS):
                return
        _log.info("the batcher is ready: %g requests/s", requests.rate)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(requests.run())
            while not await asyncio.to_thread(stop.wait, _LOOK_SECONDS):
                pass
            running.cancel()

    asyncio.run(until_stopped())


def percentile(ordered: Sequence[float], percent: float) -> float:
    """By nearest rank, as the simulated CloudWatch."""
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def _percentiles(ordered: Sequence[float], budget_ms: float) -> dict[str, float | None]:
    found = {f"p{percent}_ms": round(percentile(ordered, percent), 1) if ordered else None for percent in (50, 99)}
    return {"budget_ms": budget_ms, **found, "over_budget_share": _over(ordered, budget_ms)}


def _over(values: Iterable[float], limit: float) -> float | None:
    all_of_them = list(values)
    return round(sum(one > limit for one in all_of_them) / len(all_of_them), 4) if all_of_them else None
