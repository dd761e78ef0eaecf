"""Calls Bedrock's Converse for the batcher, a thread for each call in flight."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from dataplane.sending import Gone, Rejected, Reply, Target, Throttled, Unavailable

if TYPE_CHECKING:
    from types_boto3_bedrock_runtime.client import BedrockRuntimeClient

_THROTTLED = {"ThrottlingException", "TooManyRequestsException", "ServiceQuotaExceededException"}
_GONE = {"ResourceNotFoundException", "AccessDeniedException"}
_REJECTED = {"ValidationException", "ModelErrorException"}


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
            if code in _GONE:
                raise Gone(f"{request['modelId']}: {code}: {message}") from error
            if code in _REJECTED:
                raise Rejected(f"{code}: {message}") from error
            raise Unavailable(f"{code}: {message}") from error
        except BotoCoreError as error:
            raise Unavailable(str(error)) from error
        try:
            parts = answer["output"]["message"]["content"]
            text = "".join(part["text"] for part in parts if "text" in part)
            usage = answer["usage"]
            return Reply(text, usage["inputTokens"], usage["outputTokens"])
        except (KeyError, TypeError) as error:
            raise Unavailable(f"the answer has no {error}") from error


def _seconds(header: str | None) -> float | None:
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None
