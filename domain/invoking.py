"""Asking the batcher through Temporal: rehearsals and token tests send prompts as the chatbot does (S5)."""

from datetime import timedelta

from pydantic import BaseModel, ConfigDict

BATCHER_TASK_QUEUE = "batcher"
INVOKE = "invoke"


class Invoke(BaseModel):
    """One prompt for the batcher."""

    model_config = ConfigDict(frozen=True)

    intent: str
    prompt: str
    max_tokens: int | None = None
    """Longest answer; default and upper limit: the knob `max_output_tokens`."""
    within: timedelta | None = None
    """Default: the policy's deadline."""
    audience: str = ""
    """Who may see the answer: equal prompts share one only within it."""


class Invoked(BaseModel):
    """Its answer, with the tokens that the response itself counts."""

    model_config = ConfigDict(frozen=True)

    text: str
    model: str
    input_tokens: int
    output_tokens: int
    batch_size: int
    cached: bool = False
    """From the response cache: it used no tokens."""
