"""Prompts from workflows, answered by the batcher that this process runs."""

from collections.abc import Awaitable, Callable
from datetime import timedelta

from temporalio import activity
from temporalio.exceptions import ApplicationError

from domain.batching import Answer, Refusal, RequestRefused
from domain.errors import RETRYABLE, ErrorKind
from domain.invoking import INVOKE, Invoke, Invoked

_KINDS = {
    Refusal.OVERLOADED: ErrorKind.THROTTLED,
    Refusal.THROTTLED: ErrorKind.THROTTLED,
    Refusal.INVALID: ErrorKind.INVALID,
}
"""Any other: unavailable for now."""


class InvokeActivities:
    """`ask` is a batcher's `BatcherService.ask`. An attempt that is repeated asks, and pays, again."""

    def __init__(self, ask: Callable[..., Awaitable[Answer]]) -> None:
        self._ask = ask

    @activity.defn(name=INVOKE)
    async def invoke(self, request: Invoke) -> Invoked:
        """The answer. A refusal is the error of its kind, tried again when the batcher said it may help."""
        within = request.within.total_seconds() if request.within is not None else None
        try:
            answer = await self._ask(
                request.intent,
                request.prompt,
                max_tokens=request.max_tokens,
                within_seconds=within,
                audience=request.audience,
            )
        except RequestRefused as refused:
            kind = _KINDS.get(refused.refusal, ErrorKind.UNAVAILABLE)
            after = refused.retry_after_seconds
            raise ApplicationError(
                refused.why,
                type=kind,
                non_retryable=kind not in RETRYABLE,
                next_retry_delay=timedelta(seconds=after) if after else None,
            ) from refused
        return Invoked(
            text=answer.text,
            model=answer.model,
            input_tokens=answer.input_tokens,
            output_tokens=answer.output_tokens,
            batch_size=answer.batch_size,
            cached=answer.cached,
        )
