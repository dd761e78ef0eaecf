"""What the batcher is asked and what it answers (scenario 3).

Bedrock has no synchronous call for several requests, so a batch is several short requests packed into one prompt, or
several identical ones that share one call. Times are seconds on the batcher's own clock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Strategy(StrEnum):
    """How requests of an intent share calls."""

    PACK = "pack"
    """Several requests in one prompt, split and checked afterwards: for intents that are free of personal data."""
    COALESCE = "coalesce"
    """Equal requests in flight share one call."""
    PASS = "pass"
    """A call for each."""


class Refusal(StrEnum):
    """Why a request gets no answer."""

    OVERLOADED = "overloaded"
    """The queue is as long as it may be, or the caller's task calls too often."""
    HOPELESS = "hopeless"
    """Its deadline would pass before an answer could be there."""
    DEADLINE = "deadline"
    """Its deadline has passed."""
    DRAINING = "draining"
    """The batcher is about to stop."""
    THROTTLED = "throttled"
    """Bedrock refuses calls: a sender's word for "not now", and to a caller "not before the deadline"."""
    FAILED = "failed"
    """The call failed, or its answer was none."""
    INVALID = "invalid"
    """The request itself is wrong; the message names field, value and what is allowed."""


class RequestRefused(Exception):
    """A request without an answer, and when to come again, if that may help."""

    def __init__(self, refusal: Refusal, why: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(f"{refusal}: {why}")
        self.refusal = refusal
        self.why = why
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True, slots=True)
class Request:
    """One question of one user."""

    intent: str
    prompt: str
    max_tokens: int
    """Longest answer."""
    deadline: float
    task: str = ""
    """The ECS task that asks; its rate is limited by the knob `invocations_per_second_per_task`."""
    audience: str = ""
    """Who may see the answer: equal requests share one only with the same audience. Empty: everybody."""

    @property
    def key(self) -> tuple[str, str, int, str]:
        """Equal for requests whose answer may be shared."""
        return self.intent, self.prompt, self.max_tokens, self.audience


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one request."""

    text: str
    model: str
    input_tokens: int
    """Of this request: of a packed call its share by length."""
    output_tokens: int
    batch_size: int = 1
    """Requests that shared the call."""
    seconds: float | None = None
    """That this call took, without those before it that were refused or failed, and the waits between; None: the sender
    made no others."""
    cached: bool = False
    """From the response cache: no call was made for it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that are to share one call."""

    model: str
    requests: Sequence[Request]
    deadline: float
    """The latest of the requests': nobody waits for an answer after it."""
    ready: Callable[[Request, Answer], None] = lambda request, answer: None
    """Takes an answer that is there while mates are asked again: nobody waits for another's second call."""


class Sender(Protocol):
    """Sends batches to a model."""

    async def send(self, batch: Batch) -> Sequence[Answer | RequestRefused]:
        """One result for each request, in their order; fails for a batch as a whole by no exception.

        What is refused as throttled is sent again, not before `retry_after_seconds` where it says so.
        """
        ...
