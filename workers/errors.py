"""Maps what botocore and redis-py raise to the domain's error kinds, in one activity interceptor.

botocore's own retries are off (workers/clients.py): Temporal's retry policy is the only one.
"""

import re
from collections.abc import Callable
from typing import Any

import redis.exceptions
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
from pydantic import ValidationError
from temporalio.exceptions import ApplicationError
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor

from domain.errors import RETRYABLE, ErrorKind
from domain.permissions import ACCESS_DENIED, Scope, action_of, as_json, statement_for

_KINDS = {
    **dict.fromkeys(ACCESS_DENIED, ErrorKind.ACCESS_DENIED),
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


def to_application_error(error: Exception, scope: Callable[[], Scope] = Scope) -> ApplicationError | None:
    """`error` as an ApplicationError whose type is an ErrorKind; None when it is not ours to map."""
    if isinstance(error, ClientError):
        return _from_client_error(error, scope)
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


def _from_client_error(error: ClientError, scope: Callable[[], Scope]) -> ApplicationError:
    code = error.response.get("Error", {}).get("Code", "Unknown")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    kind = _KINDS.get(code) or (ErrorKind.UNAVAILABLE if status >= 500 else ErrorKind.UNKNOWN)
    message = str(error)
    if kind is ErrorKind.ACCESS_DENIED:
        message += f" To mend it, add to the role: {missing_statement(error, scope())}"
    if kind is ErrorKind.QUOTA_EXCEEDED:
        message += " Ask AWS Support to raise the quota of model units; automation cannot."
    return _error(kind, message)


def missing_statement(error: ClientError, scope: Scope) -> str:
    """The exact IAM statement that would have allowed the refused call."""
    message = error.response.get("Error", {}).get("Message", "")
    # AWS: "User: arn:aws:sts::ACCOUNT:... is not authorized to perform: ACTION on resource: ..."
    if scope.account == "*" and (account := re.search(r"arn:aws:(?:iam|sts)::(\d{12}):", message)):
        scope = scope.model_copy(update={"account": account[1]})
    action = re.search(r"perform: (\S+:\S+)", message)
    return as_json(statement_for(action[1] if action else action_of(error.operation_name), scope))


def _error(kind: ErrorKind, message: str) -> ApplicationError:
    return ApplicationError(message, type=kind, non_retryable=kind not in RETRYABLE)


class ErrorMapping(Interceptor):
    """Worker interceptor: activities raise SDK errors, workflows see domain kinds."""

    def __init__(self, scope: Callable[[], Scope] = Scope) -> None:
        self._scope = scope

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        return _Inbound(next, self._scope)


class _Inbound(ActivityInboundInterceptor):
    def __init__(self, next: ActivityInboundInterceptor, scope: Callable[[], Scope]) -> None:
        super().__init__(next)
        self._scope = scope

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        try:
            return await self.next.execute_activity(input)
        except ApplicationError:
            raise
        except Exception as error:
            mapped = to_application_error(error, self._scope)
            if mapped is None:
                raise
            raise mapped from error
