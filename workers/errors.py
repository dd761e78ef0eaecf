"""Maps what botocore and redis-py raise to the domain's error kinds, in one activity interceptor.

botocore's own retries are off (workers/clients.py): Temporal's retry policy is the only one.
"""

from typing import Any

import redis.exceptions
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
from pydantic import ValidationError
from temporalio.exceptions import ApplicationError
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor

from domain.errors import RETRYABLE, ErrorKind

_KINDS = {
    "AccessDenied": ErrorKind.ACCESS_DENIED,
    "AccessDeniedException": ErrorKind.ACCESS_DENIED,
    "UnauthorizedOperation": ErrorKind.ACCESS_DENIED,
    "ServiceQuotaExceededException": ErrorKind.QUOTA_EXCEEDED,
    "LimitExceededException": ErrorKind.QUOTA_EXCEEDED,
    "ThrottlingException": ErrorKind.THROTTLED,
    "Throttling": ErrorKind.THROTTLED,
    "TooManyRequestsException": ErrorKind.THROTTLED,
    "RequestLimitExceeded": ErrorKind.THROTTLED,
    "ProvisionedThroughputExceededException": ErrorKind.THROTTLED,
    "ResourceNotFoundException": ErrorKind.NOT_FOUND,
    "ConflictException": ErrorKind.CONFLICT,
    "ValidationException": ErrorKind.INVALID,
    "ValidationError": ErrorKind.INVALID,
}

# What one call needs, where the resource is not simply everything. List takes `*` (design check 13).
_RESOURCES = {
    "bedrock:CreateProvisionedModelThroughput": (
        '["arn:aws:bedrock:*::foundation-model/*", "arn:aws:bedrock:*:*:provisioned-model/*"]'
    ),
    "bedrock:GetProvisionedModelThroughput": '"arn:aws:bedrock:*:*:provisioned-model/*"',
    "bedrock:DeleteProvisionedModelThroughput": '"arn:aws:bedrock:*:*:provisioned-model/*"',
    "bedrock:ListTagsForResource": '"arn:aws:bedrock:*:*:provisioned-model/*"',
    "bedrock:TagResource": '"arn:aws:bedrock:*:*:provisioned-model/*"',
}


def to_application_error(error: Exception) -> ApplicationError | None:
    """`error` as an ApplicationError whose type is an ErrorKind; None when it is not ours to map."""
    if isinstance(error, ClientError):
        return _from_client_error(error)
    if isinstance(error, ParamValidationError):
        return _error(ErrorKind.INVALID, f"the call is not one that AWS has: {error}")
    if isinstance(error, BotoCoreError):
        return _error(ErrorKind.UNAVAILABLE, f"AWS did not answer: {error}")
    if isinstance(error, (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)):
        return _error(ErrorKind.UNAVAILABLE, f"Redis did not answer: {error}")
    if isinstance(error, redis.exceptions.RedisError):
        return _error(ErrorKind.UNKNOWN, f"Redis refused: {error}")
    if isinstance(error, (ValidationError, ValueError)):
        return _error(ErrorKind.INVALID, str(error))
    return None


def _from_client_error(error: ClientError) -> ApplicationError:
    code = error.response.get("Error", {}).get("Code", "Unknown")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    kind = _KINDS.get(code) or (ErrorKind.UNAVAILABLE if status >= 500 else ErrorKind.UNKNOWN)
    message = str(error)
    if kind is ErrorKind.ACCESS_DENIED:
        message += f" To mend it, add to the role: {missing_statement(error)}"
    if kind is ErrorKind.QUOTA_EXCEEDED:
        message += " Ask AWS Support to raise the quota of model units; automation cannot."
    return _error(kind, message)


def missing_statement(error: ClientError) -> str:
    """The exact IAM statement that would have allowed the refused call."""
    message = error.response.get("Error", {}).get("Message", "")
    words = message.split("perform: ", 1)
    action = words[1].split()[0] if len(words) == 2 and words[1] else f"?:{error.operation_name}"
    resource = _RESOURCES.get(action, '"*"')
    return f'{{"Effect": "Allow", "Action": "{action}", "Resource": {resource}}}'


def _error(kind: ErrorKind, message: str) -> ApplicationError:
    return ApplicationError(message, type=kind, non_retryable=kind not in RETRYABLE)


class ErrorMapping(Interceptor):
    """Worker interceptor: activities raise SDK errors, workflows see domain kinds."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        return _Inbound(next)


class _Inbound(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        try:
            return await self.next.execute_activity(input)
        except ApplicationError:
            raise
        except Exception as error:
            mapped = to_application_error(error)
            if mapped is None:
                raise
            raise mapped from error
