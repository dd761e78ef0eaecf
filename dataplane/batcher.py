"""The micro-batcher's core: every accepted request is answered once, or gets a typed error, within its deadline.

Equal requests share one place; a lane per model and class of intents holds what waits; a batch leaves when its window
ends or it is full, and a slot of its model is free. What is in a batch is decided when it leaves, so one that waits for
a slot goes on filling. A batch that Bedrock throttles goes back to the head of its lane, and holds no slot: the lane
sends no faster than it is let. One event loop; nothing here blocks, and no task is made per request.
"""

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Protocol

from domain.batching import Answer, Batch, Refusal, Request, RequestRefused, Sender, Strategy
from domain.knobs import KnobName
from domain.windows import Window, WindowController

_LOOK_SECONDS = 1.0
"""How often a lane's controller is asked."""
_SMOOTHING = 0.2
"""Weight of the newest call in a model's running latency."""
_SWEEP_SECONDS, _SWEEP_SECONDS_EACH = 0.01, 5e-6
"""Deadlines are noticed this early at most, and for each request that is looked at: it keeps sweeps under a tenth of
the time."""
_CANCEL_SECONDS = 1.0
"""For calls that are given up at the end of a drain."""
_TASKS_REMEMBERED = 10_000
_PACE_SECONDS = 0.1, 2.0
"""Between two calls of a lane that is throttled, at least and at most, ..."""
_SLOWER, _FASTER = 1.2, 0.8
"""... times so much at a throttle and at a call that is let through; under the least the lane is free again."""
_AGAIN = 0.4, 0.6
"""What is throttled is tried again after such a part of the pace: Bedrock may take it a little later."""
_DRAIN_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Limits:
    """What the batcher may hold."""

    slots: int
    """Calls in flight to one model."""
    max_pending: int
    """Requests waiting or in flight, over all lanes."""
    max_wait_seconds: float
    """A request that would wait longer for a slot is refused; one that has is, once others can fill its batch."""
    burst_seconds: float
    """How far a task may run ahead of its rate."""


@dataclass(frozen=True, slots=True)
class IntentPlan:
    """How requests of one intent are treated."""

    strategy: Strategy
    group: str
    """Intents of one group and model may share a packed call."""


class KnobReader(Protocol):
    """What the batcher reads of the knobs; `dataplane.knobs.AsyncKnobs` is one."""

    @property
    def batch_window_ms(self) -> int: ...
    @property
    def request_coalescing(self) -> bool: ...
    @property
    def invocations_per_second_per_task(self) -> int | None: ...
    def model_for(self, intent: str) -> str: ...


class Meter(Protocol):
    """Counts what happens."""

    def sent(self, model: str, group: str, waits: Sequence[float]) -> None:
        """A batch left and was not throttled; `waits` are its requests' seconds in the queue."""
        ...

    def served(
        self,
        model: str,
        group: str,
        requests: Sequence[Request],
        results: Sequence[Answer | RequestRefused],
        seconds: float,
    ) -> None:
        """A batch came back, a result for each of its requests that has one."""
        ...

    def coalesced(self, intent: str) -> None:
        """A request joined an equal one."""
        ...

    def refused(self, intent: str, refusal: Refusal) -> None:
        """A request was refused before it left."""
        ...

    def window(self, model: str, group: str, window: Window) -> None:
        """A lane's window changed."""
        ...


class _Item:
    """A place in a lane, and everybody who waits for its answer."""

    __slots__ = ("arrived", "key", "request", "throttled", "waiters")

    def __init__(
        self, request: Request, key: tuple[str, str, int, str] | None, arrived: float, waiter: asyncio.Future[Answer]
    ) -> None:
        self.request = request
        self.key = key
        """Of the requests that may join it; None: none may."""
        self.arrived = arrived
        self.throttled = False
        """Bedrock has refused it before."""
        self.waiters = [(request.deadline, waiter)]

    @property
    def wanted(self) -> bool:
        waiters = self.waiters
        if len(waiters) == 1:
            return not waiters[0][1].done()
        return any(not waiter.done() for _, waiter in waiters)

    @property
    def deadline(self) -> float:
        latest = -math.inf
        for deadline, waiter in self.waiters:
            if deadline > latest and not waiter.done():
                latest = deadline
        return latest

    def late(self, what: str) -> RequestRefused:
        """Why there was no answer until the deadline."""
        if self.throttled:
            return RequestRefused(Refusal.THROTTLED, f"Bedrock refused it before; {what}", _PACE_SECONDS[1])
        return RequestRefused(Refusal.DEADLINE, what)

    def settle(self, result: Answer | RequestRefused) -> None:
        if isinstance(result, RequestRefused) and result.refusal is Refusal.DEADLINE:
            result = self.late(result.why)
        for _, waiter in self.waiters:
            if not waiter.done():
                if isinstance(result, Answer):
                    waiter.set_result(result)
                else:
                    waiter.set_exception(result)


class _Lane:
    """What waits for one model and group: a queue for each intent, served in turn."""

    __slots__ = (
        "arrived",
        "called_at",
        "controller",
        "decided",
        "due",
        "group",
        "intents",
        "length",
        "looked_at",
        "model",
        "next_call",
        "pace",
        "queues",
        "single",
        "slowed_at",
        "timer",
        "window",
    )

    def __init__(self, model: str, group: str, single: bool, controller: WindowController, now: float) -> None:
        self.model = model
        self.group = group
        self.single = single
        self.controller = controller
        self.decided = self.window = Window(0, 1, "nothing is known yet")
        """By the controller, and what the knob leaves of it."""
        self.looked_at = -math.inf
        self.arrived = 0
        self.intents: dict[str, deque[_Item]] = {}
        self.queues: deque[deque[_Item]] = deque()
        """Those that are not empty, the next to be served first."""
        self.length = 0
        self.due = False
        """It waits for a slot, or for its pace."""
        self.timer: asyncio.TimerHandle | None = None
        """Ends the window, or the pause that the pace makes."""
        self.pace = 0.0
        """Seconds between two calls; 0: it is not throttled."""
        self.next_call = self.called_at = self.slowed_at = -math.inf

    def put(self, item: _Item) -> None:
        queue = self.intents.get(item.request.intent)
        if queue is None:
            queue = self.intents[item.request.intent] = deque()
        if not queue:
            self.queues.append(queue)
        queue.append(item)
        self.length += 1

    def put_back(self, items: Sequence[_Item]) -> None:
        """What was taken, before all that has come since."""
        for item in reversed(items):
            queue = self.intents[item.request.intent]
            if not queue:
                self.queues.append(queue)
            queue.appendleft(item)
        self.length += len(items)

    def take(self, most: int, came_after: float) -> tuple[list[_Item], list[_Item]]:
        """The next up to `most` that somebody still waits for, one of each intent in turn; and whom that leaves out.

        Who came before is left out while there are others for the place: he has waited too long to be answered in time,
        and would only make them late too.
        """
        items: list[_Item] = []
        late: list[_Item] = []
        queues = self.queues
        while queues and len(items) < most:
            queue = queues[0]
            item = queue.popleft()
            self.length -= 1
            if queue:
                queues.rotate(-1)
            else:
                queues.popleft()
            if item.wanted:
                spare = item.arrived < came_after and self.length >= most - len(items)
                (late if spare else items).append(item)
        return items, late

    @property
    def size(self) -> int:
        """Of a full batch."""
        return 1 if self.single else self.window.size

    def oldest(self) -> float:
        """When the longest waiting request arrived."""
        return min((queue[0].arrived for queue in self.queues), default=math.inf)

    def drop_gone(self) -> int:
        """Free the places of those whom nobody waits for any more: how many."""
        before = self.length
        for queue in self.queues:
            if not all(item.wanted for item in queue):
                kept = [item for item in queue if item.wanted]
                queue.clear()
                queue.extend(kept)
        self.queues = deque(queue for queue in self.queues if queue)
        self.length = sum(map(len, self.queues))
        return before - self.length

    def __iter__(self) -> Iterator[_Item]:
        for queue in self.queues:
            yield from queue


class Batcher:
    """Ask it; `drain` and leave."""

    def __init__(
        self,
        sender: Sender,
        knobs: KnobReader,
        plans: dict[str, IntentPlan],
        limits: Limits,
        controller: Callable[[str, str], WindowController],
        meter: Meter,
        largest_batch: int,
        random: Random | None = None,
    ) -> None:
        """`controller` makes one for a model and a group. Made inside the running loop."""
        self._sender = sender
        self._knobs = knobs
        self._plans = plans
        self._limits = limits
        self._make_controller = controller
        self._meter = meter
        self._largest_batch = largest_batch
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[tuple[str, str, bool], _Lane] = {}
        """By model, group or intent, and whether each request has a call of its own."""
        self._free: dict[str, int] = {}
        self._due: dict[str, deque[_Lane]] = {}
        """Lanes that wait for a slot of their model, in order."""
        self._latency: dict[str, float] = {}
        """By model: running mean of its calls, in seconds."""
        self._flights: dict[tuple[str, str, int, str], _Item] = {}
        self._batches: dict[asyncio.Task[None], list[_Item]] = {}
        self._pending = 0
        self._joined = 0
        """Who shares another's place; some may have gone since the last sweep."""
        self._swept_at = -math.inf
        self._next_sweep = math.inf
        self._sweeper: asyncio.TimerHandle | None = None
        self._next_call: OrderedDict[str, float] = OrderedDict()
        """By task: when its rate allows the next call; the last to ask is the last."""
        self._draining = False
        self._random = random or Random()
        self._cap_ms = knobs.batch_window_ms

    # ------------------------------------------------------------ asking

    async def ask(self, request: Request) -> Answer:
        """The answer to one request.

        Raises:
            RequestRefused: there is none; which says why, and when to come again.
        """
        return await self.submit(request)

    def submit(self, request: Request) -> asyncio.Future[Answer]:
        """The future answer; cancelling it frees the request's place and touches no other.

        Raises:
            RequestRefused: at once, without any wait.
        """
        now = self._loop.time()
        if self._knobs.batch_window_ms != self._cap_ms:
            self.follow_knobs()
        plan = self._plans.get(request.intent)
        if plan is None:
            self._meter.refused("", Refusal.INVALID)
            raise RequestRefused(Refusal.INVALID, f"intent: {request.intent!r} is none of {_names(self._plans)}")
        if self._draining:
            raise self._refusal(request, Refusal.DRAINING, "the batcher is about to stop", 1.0)
        if request.deadline <= now:
            raise self._refusal(request, Refusal.DEADLINE, f"deadline: it passed {now - request.deadline:.3f} s ago")
        if self._is_full(now):
            why = f"{self._pending + self._joined} requests are pending, as many as may"
            raise self._refusal(request, Refusal.OVERLOADED, why, max(self._latency.values(), default=1.0))
        shares = plan.strategy is not Strategy.PASS or self._knobs.request_coalescing
        future: asyncio.Future[Answer] = self._loop.create_future()
        key = request.key if shares else None
        if key is not None and (item := self._flights.get(key)) is not None and item.wanted:
            item.waiters.append((request.deadline, future))
            self._joined += 1
            self._watch(request.deadline)
            self._meter.coalesced(request.intent)
            return future
        lane = self._lane(self._knobs.model_for(request.intent), request.intent, plan, now)
        self._admit(lane, request, now)
        item = _Item(request, key, now, future)
        if key is not None:
            self._flights[key] = item
        lane.put(item)
        lane.arrived += 1
        self._pending += 1
        self._watch(request.deadline)
        if now - lane.looked_at >= _LOOK_SECONDS:
            self._look(lane, now)
        window = lane.window
        if lane.due:
            pass
        elif lane.length >= lane.size or window.seconds <= 0:
            self._make_due(lane)
        elif lane.timer is None:
            lane.timer = self._loop.call_at(now + window.seconds, self._make_due, lane)
        return future

    def _lane(self, model: str, intent: str, plan: IntentPlan, now: float) -> _Lane:
        single = plan.strategy is not Strategy.PACK
        # Single ones have a lane for each intent: one may have a smaller model to go to where another is throttled.
        name = intent if single else plan.group
        lane = self._lanes.get((model, name, single))
        if lane is None:
            group = "" if single else plan.group
            lane = _Lane(model, group, single, self._make_controller(model, group), now)
            self._lanes[(model, name, single)] = lane
            self._free.setdefault(model, self._limits.slots)
            self._due.setdefault(model, deque())
            self._look(lane, now)
        return lane

    def _is_full(self, now: float) -> bool:
        """Whether no more may wait."""
        most = self._limits.max_pending
        if self._pending + self._joined < most:
            return False
        self._free_places(now)
        return self._pending + self._joined >= most

    def _free_places(self, now: float) -> None:
        """Of those who have gone, so that nobody is refused for them; not oftener than it may cost."""
        if now - self._swept_at >= _SWEEP_SECONDS + _SWEEP_SECONDS_EACH * self._limits.max_pending:
            self._sweep()

    def _admit(self, lane: _Lane, request: Request, now: float) -> None:
        rate = self._knobs.invocations_per_second_per_task
        if rate is not None and request.task:
            due = max(self._next_call.get(request.task, now), now)
            if due - now > self._limits.burst_seconds:
                why = f"task {request.task!r} asks more than {rate} times a second"
                raise self._refusal(request, Refusal.OVERLOADED, why, due - now - self._limits.burst_seconds)
            self._next_call[request.task] = due + 1 / rate
            self._next_call.move_to_end(request.task)
            if len(self._next_call) > _TASKS_REMEMBERED:
                self._next_call.popitem(last=False)
        latency = self._latency.get(lane.model)
        paused = lane.next_call > now
        if latency is None or (self._free[lane.model] > 0 and not paused):
            return
        self._free_places(now)
        own = lane.length // lane.size
        wait = max(0.0, lane.next_call - now) + lane.pace * own if paused else 0.0
        if self._free[lane.model] <= 0:
            others = sum(min(-(-one.length // one.size), own + 1) for one in self._due[lane.model] if one is not lane)
            wait = max(wait, latency * (own + others + 1) / self._limits.slots)
        if wait > self._limits.max_wait_seconds:
            over = wait - self._limits.max_wait_seconds
            raise self._refusal(request, Refusal.OVERLOADED, f"a slot is free in about {wait:.1f} s", over)
        if now + wait + latency > request.deadline:
            why = f"an answer takes about {wait + latency:.1f} s, the deadline is in {request.deadline - now:.1f} s"
            raise self._refusal(request, Refusal.HOPELESS, why, wait)

    def _refusal(
        self, request: Request, refusal: Refusal, why: str, retry_after: float | None = None
    ) -> RequestRefused:
        self._meter.refused(request.intent, refusal)
        return RequestRefused(refusal, why, retry_after)

    # ------------------------------------------------------------ sending

    def _look(self, lane: _Lane, now: float) -> None:
        lane.decided = lane.controller.look(now, lane.arrived, self._limits.slots)
        lane.looked_at, lane.arrived = now, 0
        self._cap(lane)

    def _cap(self, lane: _Lane) -> None:
        decided, cap = lane.decided, self._cap_ms / 1000
        if decided.seconds > cap:
            decided = Window(cap, decided.size, f"capped by {KnobName.BATCH_WINDOW_MS}", capped=True)
        if decided.size > self._largest_batch:
            decided = Window(decided.seconds, self._largest_batch, decided.why, decided.capped)
        if (decided.seconds, decided.size) != (lane.window.seconds, lane.window.size):
            self._meter.window(lane.model, lane.group, decided)
        lane.window = decided

    def follow_knobs(self) -> None:
        """Let the knob's window count at once, also for what waits; otherwise it counts from the next request on."""
        self._cap_ms = self._knobs.batch_window_ms
        for lane in self._lanes.values():
            self._cap(lane)
            if lane.timer is not None and not lane.due:
                lane.timer.cancel()
                lane.timer = None
                self._arm(lane)
                self._pump(lane.model)

    def _make_due(self, lane: _Lane) -> None:
        if not lane.due:
            if lane.timer is not None:
                lane.timer.cancel()
                lane.timer = None
            if lane.length:
                lane.due = True
                self._due[lane.model].append(lane)
        self._pump(lane.model)

    def _resume(self, lane: _Lane) -> None:
        """Its pace allows another call."""
        lane.timer = None
        self._due[lane.model].append(lane)
        self._pump(lane.model)

    def _pump(self, model: str) -> None:
        """Send what is due while there are slots."""
        due = self._due[model]
        while due and self._free[model] > 0:
            lane = due.popleft()
            now = self._loop.time()
            if lane.next_call > now:
                lane.timer = self._loop.call_at(lane.next_call, self._resume, lane)
                continue
            lane.due = False
            queued = lane.length
            items, late = lane.take(lane.size, now - self._limits.max_wait_seconds)
            self._pending -= queued - lane.length - len(items)  # who is late, and whose callers have gone
            for item in late:
                self._refuse_late(item, now)
            if items:
                self._free[model] -= 1
                if lane.pace:
                    if lane.called_at > lane.slowed_at:  # the last call was let through
                        lane.pace = lane.pace * _FASTER if lane.pace > _PACE_SECONDS[0] else 0.0
                    lane.next_call = now + lane.pace
                lane.called_at = now
                self._start(lane, items, now)
            self._arm(lane)

    def _refuse_late(self, item: _Item, now: float) -> None:
        self._forget(item)
        why = f"a slot was not free within {now - item.arrived:.1f} s, and others wait for it"
        item.settle(self._refusal(item.request, Refusal.OVERLOADED, why, self._limits.max_wait_seconds))

    def _forget(self, item: _Item) -> None:
        """Nobody may join it any more."""
        if item.key is not None and self._flights.get(item.key) is item:
            del self._flights[item.key]

    def _arm(self, lane: _Lane) -> None:
        """What a batch has left behind waits for its own window, or is due already."""
        if not lane.length:
            return
        ends = lane.oldest() + lane.window.seconds
        if lane.length >= lane.size or ends <= self._loop.time():
            lane.due = True
            self._due[lane.model].append(lane)
        else:
            lane.timer = self._loop.call_at(ends, self._make_due, lane)

    def _start(self, lane: _Lane, items: list[_Item], now: float) -> None:
        task = self._loop.create_task(self._serve(lane, items, now))
        self._batches[task] = items
        task.add_done_callback(self._batches.pop)

    async def _serve(self, lane: _Lane, items: list[_Item], sent_at: float) -> None:
        deadline = max(item.deadline for item in items)
        requests = [item.request for item in items]
        results: Sequence[Answer | RequestRefused]
        early: dict[int, Answer] = {}
        ended = False

        def ready(request: Request, answer: Answer) -> None:
            for place, item in enumerate(items):
                if item.request is request:
                    early[place] = answer
                    item.settle(answer)

        def all_but_early(refused: RequestRefused) -> list[Answer | RequestRefused]:
            return [early.get(place, refused) for place in range(len(items))]

        try:
            async with asyncio.timeout_at(deadline):
                results = await self._sender.send(Batch(lane.model, requests, deadline, ready))
            if len(results) != len(items):
                raise ValueError(f"{len(results)} results for {len(items)} requests")
        except TimeoutError:
            ended = True
            results = all_but_early(RequestRefused(Refusal.DEADLINE, "no answer came until the deadline"))
        except asyncio.CancelledError:  # the end of a drain
            self._pending -= len(items)
            raise
        except Exception as error:  # whatever it is, those who wait must hear of it
            results = all_but_early(RequestRefused(Refusal.FAILED, f"{type(error).__name__}: {error}"))
        finally:
            self._free[lane.model] += 1
        now = self._loop.time()
        taken = now - sent_at
        waits = [
            sent_at - item.arrived for item, result in zip(items, results, strict=True) if not _is_throttled(result)
        ]
        if len(waits) < len(items):
            items, requests, results = self._slow_down(lane, items, results, sent_at)
        elif ended:
            items, requests, results = self._ask_again(lane, items, results)
        self._pending -= len(items)
        for item, result in zip(items, results, strict=True):
            self._forget(item)
            item.settle(result)
        if waits:
            self._meter.sent(lane.model, lane.group, waits)
        if waits and items:
            self._learn(lane, items, results, now, taken)
        if items:
            self._meter.served(lane.model, lane.group, requests, results, taken)
        self._pump(lane.model)

    def _learn(
        self, lane: _Lane, items: list[_Item], results: Sequence[Answer | RequestRefused], now: float, taken: float
    ) -> None:
        """What a call says of the backend."""
        before = self._latency.get(lane.model, taken)
        self._latency[lane.model] = before + _SMOOTHING * (taken - before)
        if (seconds := _call_seconds(results, taken)) is not None:
            lane.controller.served(now, len(items), seconds)
        tokens = sum(result.input_tokens + result.output_tokens for result in results if isinstance(result, Answer))
        lane.controller.answered(now, now - items[0].arrived, tokens)

    def _slow_down(
        self, lane: _Lane, items: list[_Item], results: Sequence[Answer | RequestRefused], sent_at: float
    ) -> tuple[list[_Item], list[Request], list[Answer | RequestRefused]]:
        """Put back what was throttled and may still be answered in time; returns the others, who have a result.

        The lane pauses for its pace, which gets longer, or as long as it was told.
        """
        now = self._loop.time()
        if sent_at >= lane.slowed_at:  # several calls in flight that are throttled are one reason to slow down
            lane.slowed_at = now
            least, most = _PACE_SECONDS
            lane.pace = min(max(lane.pace * _SLOWER, least), most)
            lane.next_call = now + lane.pace * self._random.uniform(*_AGAIN)
        told = max(result.retry_after_seconds or 0.0 for result in results if isinstance(result, RequestRefused))
        if told:  # others were told the same: not all at once
            lane.next_call = max(lane.next_call, now + told + lane.pace * self._random.random())
        pause = lane.next_call - now
        why = f"{lane.model} takes no call before the deadline, nor for {pause:.1f} s"
        again: list[_Item] = []
        settled: list[tuple[_Item, Answer | RequestRefused]] = []
        for item, result in zip(items, results, strict=True):
            if not _is_throttled(result):
                settled.append((item, result))
            elif item.deadline > lane.next_call:
                item.throttled = True
                again.append(item)
            else:
                settled.append((item, RequestRefused(Refusal.THROTTLED, why, pause)))
        for item in lane:
            if item.wanted and item.deadline <= lane.next_call:
                item.settle(self._refusal(item.request, Refusal.THROTTLED, why, pause))
        lane.put_back(again)
        self._make_due(lane)
        return _split(settled)

    def _ask_again(
        self, lane: _Lane, items: list[_Item], results: Sequence[Answer | RequestRefused]
    ) -> tuple[list[_Item], list[Request], list[Answer | RequestRefused]]:
        """Put back what somebody has joined whose own deadline is still to come; returns the others."""
        now = self._loop.time()
        again = [item for item in items if item.deadline > now]
        settled = [(item, result) for item, result in zip(items, results, strict=True) if item.deadline <= now]
        lane.put_back(again)
        self._make_due(lane)
        return _split(settled)

    # ------------------------------------------------------------ deadlines and the end

    def _watch(self, deadline: float) -> None:
        if deadline < self._next_sweep:
            if self._sweeper is not None:
                self._sweeper.cancel()
            self._next_sweep = deadline
            self._sweeper = self._loop.call_at(deadline, self._sweep)

    def _sweep(self) -> None:
        """Everybody whose deadline is now hears of it, and the places of all who have gone are free."""
        waiting = [item for lane in self._lanes.values() for item in lane]
        flying = [item for items in self._batches.values() for item in items]
        now = self._swept_at = self._loop.time()
        soon = now + _SWEEP_SECONDS + _SWEEP_SECONDS_EACH * (len(waiting) + len(flying))
        following = math.inf
        joined = 0
        for items, what in ((waiting, "a slot was not free in time"), (flying, "the call did not end in time")):
            for item in items:
                for deadline, waiter in item.waiters:
                    if waiter.done():
                        continue
                    if deadline <= soon:
                        late = item.late(what)
                        waiter.set_exception(late)
                        self._meter.refused(item.request.intent, late.refusal)
                    else:
                        following = min(following, deadline)
                if len(item.waiters) > 1:
                    item.waiters = [one for one in item.waiters if not one[1].done()]
                    joined += max(0, len(item.waiters) - 1)
        self._joined = joined
        for lane in self._lanes.values():
            self._pending -= lane.drop_gone()
        self._flights = {key: item for key, item in self._flights.items() if item.wanted}
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._next_sweep, self._sweeper = math.inf, None
        if following < math.inf:
            self._watch(following)

    async def drain(self, within_seconds: float) -> int:
        """Take nothing new, send what waits, and return once all are answered: how many were not, within the time."""
        self._draining = True
        for lane in self._lanes.values():
            self._make_due(lane)
        with suppress(TimeoutError):
            async with asyncio.timeout(within_seconds):
                while self._batches or any(lane.length for lane in self._lanes.values()):
                    if self._batches:
                        await asyncio.shield(asyncio.gather(*self._batches, return_exceptions=True))
                    else:  # throttled: a lane waits for its pace
                        await asyncio.sleep(_DRAIN_POLL_SECONDS)
        lost = 0
        late = RequestRefused(Refusal.DRAINING, "the batcher stopped before an answer came")
        waiting = [item for lane in self._lanes.values() for item in lane]
        for items in (waiting, *self._batches.values()):
            lost += sum(item.wanted for item in items)
            for item in items:
                item.settle(late)
        for lane in self._lanes.values():
            self._pending -= lane.drop_gone()
        given_up = list(self._batches)
        for task in given_up:
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CANCEL_SECONDS):
                await asyncio.gather(*given_up, return_exceptions=True)
        return lost

    @property
    def pending(self) -> int:
        """Requests that wait or are in flight; coalesced ones count once."""
        return self._pending

    @property
    def waiting(self) -> int:
        """Those of them that no call has taken yet."""
        return sum(lane.length for lane in self._lanes.values())


def _call_seconds(results: Sequence[Answer | RequestRefused], taken: float) -> float | None:
    """What the batch's own call took; None where that is not known: its answers came from other calls, or from none."""
    for result in results:
        if isinstance(result, Answer):
            if result.seconds is None:
                return taken
            if result.batch_size == len(results):
                return result.seconds
    return None


def _split(
    settled: Sequence[tuple[_Item, Answer | RequestRefused]],
) -> tuple[list[_Item], list[Request], list[Answer | RequestRefused]]:
    items = [item for item, _ in settled]
    return items, [item.request for item in items], [result for _, result in settled]


def _is_throttled(result: Answer | RequestRefused) -> bool:
    return isinstance(result, RequestRefused) and result.refusal is Refusal.THROTTLED


def _names(plans: dict[str, IntentPlan]) -> str:
    return ", ".join(sorted(plans))
