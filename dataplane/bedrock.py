"""Calls Bedrock's Converse for the batcher, a thread for each call in flight."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from dataplane.sending import Gone, Rejected, Reply, Target, Throttled, Unavailable

if TYPE_CHECKING:
    from types_boto3_bedrock_runtime.client import BedrockRuntimeClient

_THROTTLED = {"ThrottlingException", "TooManyRequestsException", "ServiceQuotaExceededException"}
_GONE = {"ResourceNotFoundException", "AccessDeniedException"}
_REJECTED = {"ValidationException", "ModelErrorException"}
_NO_SUCH_MODEL = ("model identifier is invalid", "with on-demand throughput isn")
"""Of a ValidationException that speaks of the target, not of the request."""
_MOST_TOKENS = 10_000_000
"""More than any model takes or gives."""


class BedrockBackend:
    """One Bedrock account and region.

    The client must not retry by itself and must have at least `most_calls` connections. A call that outlasts its time
    is given up, though its thread ends only with the client's own read timeout.
    """

    def __init__(self, client: "BedrockRuntimeClient", most_calls: int) -> None:
        self._bedrock_runtime = client
        self._threads = ThreadPoolExecutor(most_calls, thread_name_prefix="bedrock")

    async def call(self, target: Target, system: str, prompt: str, max_tokens: int, within_seconds: float) -> Reply:
        """One call; raises the errors of `dataplane.sending` and no others."""
        request: dict[str, Any] = {
            "modelId": target.model_id,
            "messages": [{"role": "user", "content": [{"text": prompt}]}],
            "inferenceConfig": {"maxTokens": max_tokens},
        }
        if system:
            request["system"] = [{"text": system}]
        if target.priority:
            request["serviceTier"] = {"type": "priority"}
        running = asyncio.get_running_loop().run_in_executor(self._threads, self._converse, request)
        try:
            async with asyncio.timeout(within_seconds):
                return await running
        except TimeoutError:
            raise Unavailable(f"{target.model_id} did not answer within {within_seconds:.1f} s") from None

    def close(self) -> None:
        """Take no more calls."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _converse(self, request: dict[str, Any]) -> Reply:
        try:
            answer = self._bedrock_runtime.converse(**request)
        except ClientError as error:
            code, message = error.response["Error"]["Code"], error.response["Error"]["Message"]
            if code in _THROTTLED:
                headers = error.response["ResponseMetadata"].get("HTTPHeaders", {})
                raise Throttled(_seconds(headers.get("retry-after"))) from error
            if code in _GONE or (code == "ValidationException" and any(part in message for part in _NO_SUCH_MODEL)):
                raise Gone(f"{request['modelId']}: {code}: {message}") from error
            if code in _REJECTED:
                raise Rejected(f"{code}: {message}") from error
            raise Unavailable(f"{code}: {message}") from error
        except Exception as error:  # botocore's, and what its parser says of an answer that is none
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        return _reply(answer)


def _reply(answer: Any) -> Reply:
    """What the answer says, believed only if it is one: text, and tokens that are counted."""
    try:
        text = "".join(part["text"] for part in answer["output"]["message"]["content"] if "text" in part)
        used = answer["usage"]["inputTokens"], answer["usage"]["outputTokens"]
    except (KeyError, TypeError) as error:
        raise Unavailable(f"the answer is none: {type(error).__name__}: {error}") from error
    if not text.strip():
        raise Unavailable("the answer has no text")
    if not all(type(tokens) is int and 0 <= tokens <= _MOST_TOKENS for tokens in used):
        raise Unavailable(f"the answer used {used} tokens")
    return Reply(text, *used)


def _seconds(header: str | None) -> float | None:
    """Of a Retry-After header. AWS documents none for Bedrock and asks for backoff with jitter (Bedrock user guide,
    "Troubleshooting API error codes"); a proxy or a later Bedrock may send one."""
    try:
        seconds = float(header) if header is not None else -1.0
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None
