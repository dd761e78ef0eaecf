"""The ways a workflow touches the world: read, mutate, wait, watch. A summary is mandatory: it is the UI's line.

`decide` is another kind of step: a pure decision that chooses or counts commands. It runs as an activity so that
its result is in the history, and editing the domain later cannot break replay. A regular one: a local activity that
runs beside other steps does not always come in the same order in a replay (sdk-python issues 1578 and 1881), and the
incident fails with a nondeterminism error after a worker's restart.
"""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar, overload

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError

from activities.settings import SettingsActivities
from domain.errors import ErrorKind
from domain.messages import PolicySnapshot

S = TypeVar("S")
A = TypeVar("A")
R = TypeVar("R")

# A read may be tried often and is soon pointless; an effect must come through, however long its system is away.
READ_TIMEOUT = timedelta(seconds=5)
READ_TOTAL = timedelta(seconds=30)
READ_RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_interval=timedelta(seconds=2))
MUTATE_TIMEOUT = timedelta(seconds=10)
MUTATE_TOTAL = timedelta(minutes=10)
MUTATE_RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_interval=timedelta(seconds=5))
WAIT_HEARTBEAT = timedelta(seconds=20)
WAIT_MARGIN = timedelta(minutes=1)
WAIT_RETRY = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=10))
DECIDE_TIMEOUT = timedelta(seconds=10)


@overload
async def read(
    activity: Callable[[S, A], Awaitable[R]], arg: A, *, summary: str, within: timedelta = READ_TOTAL
) -> R: ...
@overload
async def read(activity: Callable[[S, A], R], arg: A, *, summary: str, within: timedelta = READ_TOTAL) -> R: ...
async def read(activity: Callable[..., Any], arg: Any, *, summary: str, within: timedelta = READ_TOTAL) -> Any:
    """Read the world: seconds at most. Raises ActivityError when it cannot be read `within` that time."""
    return await workflow.execute_activity_method(
        activity,
        arg,
        start_to_close_timeout=READ_TIMEOUT,
        schedule_to_close_timeout=within,
        retry_policy=READ_RETRY,
        summary=summary,
    )


@overload
async def mutate(
    activity: Callable[[S, A], Awaitable[R]], arg: A, *, summary: str, within: timedelta = MUTATE_TOTAL
) -> R: ...
@overload
async def mutate(activity: Callable[[S, A], R], arg: A, *, summary: str, within: timedelta = MUTATE_TOTAL) -> R: ...
async def mutate(activity: Callable[..., Any], arg: Any, *, summary: str, within: timedelta = MUTATE_TOTAL) -> Any:
    """Change the world by an idempotent activity, tried again for `within`. Raises ActivityError when it failed."""
    return await workflow.execute_activity_method(
        activity,
        arg,
        start_to_close_timeout=MUTATE_TIMEOUT,
        schedule_to_close_timeout=within,
        retry_policy=MUTATE_RETRY,
        summary=summary,
    )


@overload
async def wait(activity: Callable[[S, A], Awaitable[R]], arg: A, *, summary: str, at_most: timedelta) -> R: ...
@overload
async def wait(activity: Callable[[S, A], R], arg: A, *, summary: str, at_most: timedelta) -> R: ...
async def wait(activity: Callable[..., Any], arg: Any, *, summary: str, at_most: timedelta) -> Any:
    """Wait for the world by one activity that polls, heartbeats and returns within `at_most`.

    A worker that dies is noticed by the missing heartbeat, and the wait goes on elsewhere; no history per poll.
    """
    return await workflow.execute_activity_method(
        activity,
        arg,
        start_to_close_timeout=at_most + WAIT_MARGIN,
        heartbeat_timeout=WAIT_HEARTBEAT,
        retry_policy=WAIT_RETRY,
        summary=summary,
    )


async def watch(activity: Callable[[S, A], R], arg: A, *, summary: str, every: timedelta) -> R:
    """Look at the world every so often until it is other than known: retries are the looks.

    No history per look, and no slot held between looks. Raises ActivityError when a look fails with a kind.
    """
    return await workflow.execute_activity_method(
        activity,
        arg,
        start_to_close_timeout=READ_TOTAL,
        retry_policy=RetryPolicy(
            initial_interval=every, backoff_coefficient=1, non_retryable_error_types=[kind.value for kind in ErrorKind]
        ),
        summary=summary,
    )


@overload
async def decide(activity: Callable[[S, A], Awaitable[R]], arg: A, *, summary: str) -> R: ...
@overload
async def decide(activity: Callable[[S, A], R], arg: A, *, summary: str) -> R: ...
async def decide(activity: Callable[..., Any], arg: Any, *, summary: str) -> Any:
    """A recorded decision."""
    return await workflow.execute_activity_method(
        activity,
        arg,
        start_to_close_timeout=DECIDE_TIMEOUT,
        schedule_to_close_timeout=READ_TOTAL,
        retry_policy=READ_RETRY,
        summary=summary,
    )


async def load_policy() -> PolicySnapshot:
    """A snapshot of the policy; recorded, so that two workers on different versions replay alike."""
    return await workflow.execute_activity_method(
        SettingsActivities.load_policy,
        start_to_close_timeout=DECIDE_TIMEOUT,
        retry_policy=MUTATE_RETRY,
        summary="Policy snapshot",
    )


def last_result(kind: type[R]) -> R | None:
    """What the last completed run of this workflow's schedule answered; None: there was none, or this version cannot
    read it."""
    if not workflow.has_last_completion_result():
        return None
    try:
        return workflow.get_last_completion_result(kind)
    except (ValueError, RuntimeError):
        return None


def failure(error: ActivityError) -> tuple[str, str]:
    """What went wrong, as (error kind, message a person can act on). Kinds are those of `domain.errors`."""
    cause = error.cause
    if isinstance(cause, ApplicationError):
        return cause.type or "Unknown", cause.message
    return "Unavailable", str(cause) if cause else str(error)
