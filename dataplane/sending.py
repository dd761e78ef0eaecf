"""From a batch to its answers: which target is called, what is packed, and what happens when a call fails.

Calls go to the provisioned models in proportion to their units, then to the routes' overflow, then to a smaller model
where the policy names one. A throttled call goes on to the next target; after the last one the batch comes back as
throttled, for the batcher to send again when it may: who waits here would hold a slot. A batch that Bedrock rejects is
halved until the one bad request fails alone.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from domain.batching import Answer, Batch, Refusal, Request, RequestRefused
from domain.packing import pack, split
from domain.routes import CapacityRoutes

_BACKOFF_SECONDS = 0.2
_BACKOFF_MOST_SECONDS = 5.0
_RETRIES = 2
"""Of a call that no target answered, not counting throttles."""
_GONE_SECONDS = 30.0
"""A target that is not there is left alone for so long: routes may lag behind a deletion."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a call names."""

    model: str
    """As in the policy."""
    model_id: str
    """Base model, inference profile or provisioned model's ARN."""
    priority: bool = False
    """On demand in the priority tier."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What one call brought, with the tokens that the response itself counts."""

    text: str
    input_tokens: int
    output_tokens: int


class Backend(Protocol):
    """Calls a model; raises the errors below and no others."""

    async def call(self, target: Target, system: str, prompt: str, max_tokens: int, within_seconds: float) -> Reply: ...


class Throttled(Exception):
    """Too many calls or tokens (429)."""

    def __init__(self, retry_after_seconds: float | None = None) -> None:
        super().__init__("throttled")
        self.retry_after_seconds = retry_after_seconds


class Unavailable(Exception):
    """No answer this time: a timeout, a 5xx, a model that is not ready."""


class Rejected(Exception):
    """The request itself is wrong for the model."""


class Gone(Exception):
    """There is no such target, or it may not be called."""


@dataclass(frozen=True, slots=True)
class ModelTargets:
    """Where calls of one model may go besides its provisioned models."""

    on_demand: Target
    smaller: Target | None = None
    """The smaller model's on-demand target, where the policy lets its intents fall back to it."""


class Sending:
    """The batcher's sender. One event loop."""

    def __init__(
        self,
        backend: Backend,
        routes: Callable[[str], CapacityRoutes | None],
        models: Mapping[str, ModelTargets],
        may_fall_back: frozenset[str],
        packed: Callable[[str, bool], None],
        random: Random | None = None,
    ) -> None:
        """`routes`: a model's published ones, without I/O. `may_fall_back`: intents that a smaller model may answer.

        `packed` hears for each packed request whether its answer could be used.
        """
        self._backend = backend
        self._routes = routes
        self._models = models
        self._may_fall_back = may_fall_back
        self._packed = packed
        self._random = random or Random()
        self._credit: dict[str, dict[str, int]] = {}
        """By model and ARN: smooth weighted round robin."""
        self._gone: dict[str, float] = {}
        """Until when a target is left alone."""

    async def send(self, batch: Batch) -> Sequence[Answer | RequestRefused]:
        """One result for each request."""
        if len(batch.requests) == 1:
            return [await self._alone(batch.requests[0], batch)]
        return await self._together(batch)

    async def _alone(self, request: Request, batch: Batch) -> Answer | RequestRefused:
        try:
            target, reply, seconds = await self._call(
                [request], batch.model, "", request.prompt, request.max_tokens, batch.deadline
            )
        except RequestRefused as refused:
            return refused
        return Answer(reply.text, target.model, reply.input_tokens, reply.output_tokens, 1, seconds)

    async def _together(self, batch: Batch) -> Sequence[Answer | RequestRefused]:
        requests = batch.requests
        named = {f"{self._random.getrandbits(48):012x}": request for request in requests}
        questions = {name: request.prompt for name, request in named.items()}
        one = pack(questions, sum(request.max_tokens for request in requests))
        try:
            target, reply, seconds = await self._call(
                requests, batch.model, one.system, one.prompt, one.max_tokens, batch.deadline
            )
        except RequestRefused as refused:
            if refused.refusal is not Refusal.INVALID:
                return [refused] * len(requests)
            half = len(requests) // 2
            parts = (replace(batch, requests=part) for part in (requests[:half], requests[half:]))
            first, second = await asyncio.gather(*map(self.send, parts))
            return [*first, *second]
        answers = split(reply.text, questions)
        letters = sum(map(len, answers.values())) or 1
        asked = sum(map(len, questions.values())) or 1
        results: dict[str, Answer | RequestRefused] = {
            name: Answer(
                text,
                target.model,
                round(reply.input_tokens * len(questions[name]) / asked),
                round(reply.output_tokens * len(text) / letters),
                len(requests),
                seconds,
            )
            for name, text in answers.items()
        }
        for name, request in named.items():
            self._packed(request.intent, name in answers)
        again = [(name, request) for name, request in named.items() if name not in answers]
        for name, answer in results.items() if again else ():
            if isinstance(answer, Answer):
                batch.ready(named[name], answer)
        singles = await asyncio.gather(*(self._alone(request, batch) for _, request in again))
        results |= dict(zip((name for name, _ in again), singles, strict=True))
        return [results[name] for name in named]

    async def _call(
        self, requests: Sequence[Request], model: str, system: str, prompt: str, max_tokens: int, deadline: float
    ) -> tuple[Target, Reply, float]:
        """The first target that answers, and how long that call took.

        Raises:
            RequestRefused: all are throttled, none answered in some attempts, or the request is wrong.
        """
        now = asyncio.get_running_loop().time
        round_ = 0
        while True:
            throttled, told = False, []
            failed: Unavailable | None = None
            for target in self._targets(model, requests):
                left = deadline - now()
                if left <= 0:
                    break
                try:
                    begun = now()
                    reply = await self._backend.call(target, system, prompt, max_tokens, left)
                    return target, reply, now() - begun
                except Throttled as error:
                    throttled = True
                    told += [] if error.retry_after_seconds is None else [error.retry_after_seconds]
                except Gone:
                    self._gone[target.model_id] = now() + _GONE_SECONDS
                except Rejected as error:
                    raise RequestRefused(Refusal.INVALID, f"prompt: {model} does not take it: {error}") from error
                except Unavailable as error:
                    failed = error
            if throttled:
                raise RequestRefused(Refusal.THROTTLED, f"{model} takes no more calls now", min(told, default=None))
            if failed is not None and round_ >= _RETRIES:
                raise RequestRefused(Refusal.FAILED, f"{model}: {failed}", _BACKOFF_SECONDS) from failed
            most = min(_BACKOFF_MOST_SECONDS, _BACKOFF_SECONDS * 2**round_)
            pause = self._random.uniform(most / 2, most)
            round_ += 1
            if now() + pause >= deadline:
                raise RequestRefused(Refusal.FAILED, f"{model}: no target answered until the deadline", pause)
            await asyncio.sleep(pause)

    def _targets(self, model: str, requests: Sequence[Request]) -> list[Target]:
        """In the order in which they are tried."""
        routes = self._routes(model)
        targets = [Target(model, arn) for arn in self._spread(routes)] if routes else []
        overflow = [
            Target(model, one.model_id, one.kind == "priority_tier") for one in (routes.overflow if routes else ())
        ]
        known = self._models[model]
        targets += overflow or [known.on_demand]
        if known.smaller is not None and all(request.intent in self._may_fall_back for request in requests):
            targets.append(known.smaller)
        now = asyncio.get_running_loop().time()
        there = [target for target in targets if self._gone.get(target.model_id, 0.0) <= now]
        return there or targets

    def _spread(self, routes: CapacityRoutes) -> list[str]:
        """The provisioned models, the one whose turn it is first."""
        units = {route.provisioned_model_arn: route.units for route in routes.routes}
        if not units:
            return []
        before = self._credit.get(routes.model, {})
        credit = {arn: before.get(arn, 0) + count for arn, count in units.items()}
        turn = max(credit, key=lambda arn: credit[arn])
        credit[turn] -= sum(units.values())
        self._credit[routes.model] = credit
        return [turn, *(arn for arn in units if arn != turn)]
