"""Asking the workflows that people decide on: who asks, what is asked, and what every failure means.

Everything raises `OpsError` and nothing else that is expected: what is wrong, what to do next, and an exit code.
Errors of Temporal are told apart by their status, never by their text.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from difflib import get_close_matches
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

import redis
from pydantic import BaseModel, ValidationError
from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.service import RPCError, RPCStatusCode

from domain.calendar import duration_of
from domain.incident import IncidentRecord
from domain.knobs import Holder, Refusal
from domain.messages import (
    CAPACITY_WORKFLOW,
    INCIDENT_WORKFLOW,
    OVERRIDE_WORKFLOW,
    RECORD,
    PersonRequest,
    UpdateResult,
    capacity_id,
    incident_id,
)
from domain.override import OverrideRecord
from domain.people import Roster
from domain.policy import Policy
from workers.settings import Settings

if TYPE_CHECKING:
    from dataplane.ledger import Ledger

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
P = TypeVar("P", bound=PersonRequest)

MAX_REASON_CHARS = 500
# Technical: how long a person is kept waiting before an error says what is away.
RPC_TIMEOUT = timedelta(seconds=5)
QUERY_TIMEOUT = timedelta(seconds=5)
LIST_QUERY_TIMEOUT = timedelta(seconds=2)
UPDATE_TIMEOUT = timedelta(seconds=20)

_NO_WORKER_STATUSES = (RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED, RPCStatusCode.FAILED_PRECONDITION)


class ExitCode(IntEnum):
    """How a command ends; documented in docs/cli.md."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    NOT_FOUND = 3
    DENIED = 4
    NOT_POSSIBLE = 5
    UNREACHABLE = 6


EXIT_CODES_OF_OUTCOMES: dict[str, ExitCode] = {
    "accepted": ExitCode.OK,
    "already-done": ExitCode.OK,
    "denied": ExitCode.DENIED,
    "not-possible": ExitCode.NOT_POSSIBLE,
}
"""For `UpdateResult.outcome`."""


@dataclass(frozen=True)
class NotAllowed:
    """A value that somebody gave and that is not allowed."""

    field: str
    value: object
    allowed: str
    """What is, in words."""


class OpsError(Exception):
    """What is wrong, what to do next, and how a command ends."""

    def __init__(
        self, message: str, next_step: str, exit_code: ExitCode, not_allowed: NotAllowed | None = None
    ) -> None:
        self.message = message
        self.next_step = next_step
        self.exit_code = exit_code
        self.not_allowed = not_allowed
        """The value that is wrong, if it is one."""
        super().__init__(f"{message} {next_step}")


class Misconfigured(OpsError):
    """The policy or the roster cannot be used."""

    def __init__(self, error: Exception, next_step: str) -> None:
        super().__init__(str(error), next_step, ExitCode.USAGE)


@dataclass(frozen=True)
class Thing:
    """What people decide on."""

    word: str
    """As people and the command line call it."""
    workflow: str
    prefix: str
    """Of its workflow ids."""
    record: type[IncidentRecord] | type[OverrideRecord] | None
    """What it answers once it is over; None: it never is."""

    def name(self, workflow_id: str) -> str:
        """As people type it."""
        return workflow_id if self.word == "override" else workflow_id.removeprefix(self.prefix)


INCIDENT = Thing("incident", INCIDENT_WORKFLOW, incident_id(""), IncidentRecord)
OVERRIDE = Thing("override", OVERRIDE_WORKFLOW, "override-", OverrideRecord)
CAPACITY = Thing("capacity", CAPACITY_WORKFLOW, capacity_id(""), None)


def parse_duration(text: str) -> timedelta:
    """`45m`, `2h` or `1h30m` as a duration.

    Raises:
        OpsError: anything else, or nothing.
    """
    try:
        return duration_of(text)
    except ValueError as error:
        wrong = NotAllowed("duration", text, str(error).removeprefix("give "))
        raise OpsError(f"{text!r} is no duration.", f"{str(error).capitalize()}.", ExitCode.USAGE, wrong) from None


def parse_incident(text: str) -> str:
    """The workflow id for an incident's key or id.

    Raises:
        OpsError: it can be neither.
    """
    if not re.fullmatch(r"[!-~]{1,200}", text):
        raise OpsError(
            f"{text[:80]!r} is no incident.",
            "Give a key like bedrock-throttle:sonnet; `runbooks incident list` shows those there are.",
            ExitCode.USAGE,
            NotAllowed("incident", text, "an incident's key or id"),
        )
    return text if text.startswith(incident_id("")) else incident_id(text)


class Asking:
    """One Temporal namespace, and how it is asked."""

    def __init__(self, client: Client, settings: Settings, once: str | None = None) -> None:
        self._client = client
        self._settings = settings
        self._once = once

    def _short_id(self) -> str:
        """The end of a new id: the same for a request that comes again."""
        return self._once[:12] if self._once else uuid.uuid4().hex[:8]

    async def check(self) -> None:
        """Raises OpsError: Temporal does not answer."""
        async with self._errors():
            await self._client.service_client.check_health(timeout=RPC_TIMEOUT)

    def url(self, workflow_id: str) -> str:
        """A workflow in the Temporal UI."""
        settings = self._settings
        return (
            f"{settings.temporal_ui_url.rstrip('/')}/namespaces/{settings.temporal_namespace}/workflows/{workflow_id}"
        )

    def _policy(self) -> Policy:
        """As it is configured now, for this process.

        Raises:
            Misconfigured: it cannot be read.
        """
        from activities.settings import ConfigurationError, load_policy

        try:
            return load_policy(self._settings.policy_file, self._settings.clock)
        except ConfigurationError as error:
            raise Misconfigured(error, "Mend the policy file.") from None

    # ------------------------------------------------------------------ who asks

    async def _subject(self, token: str | None, action: str, target: str) -> str:
        """Who asks. An attempt at `action` on `target` without a good token is put on record.

        Raises:
            OpsError: the token is not good.
        """
        from workers.tokens import KeyUnusable, TokenRefused, identify

        how = "Pass --token-file, or set RUNBOOKS_TOKEN_FILE or RUNBOOKS_TOKEN; `runbooks dev` prints a token file."
        why = "Who are you? There is no token."
        if token and token.strip():
            try:
                return identify(token, self._settings.token_key_file, self._roster)
            except KeyUnusable as error:
                raise OpsError(f"Token refused: {error}.", how, ExitCode.DENIED) from None
            except TokenRefused as error:
                why = f"Token refused: {error}."
        await self._record_refusal(None, action, target, why)
        raise OpsError(why, how, ExitCode.DENIED)

    async def _record_refusal(self, who: str | None, action: str, target: str, why: str, value: str = "") -> None:
        """That `who` (None: nobody known) was told `why`. It is refused all the same while Redis is away."""
        holder = None if who is None else Holder(kind="person", id=who)
        refusal = Refusal(holder=holder, action=action, target=target[:200], value=value[:500], why=why[:500])
        with suppress(redis.RedisError):
            await self._with_ledger(lambda ledger: ledger.record_refusal(refusal))

    async def _with_ledger(self, work: "Callable[[Ledger], T]") -> T:
        """What `work` answers. Redis's errors pass."""
        from dataplane.connection import connect
        from dataplane.ledger import Ledger

        def connected() -> T:
            with connect(self._settings.redis_url) as connection:
                return work(Ledger(connection))

        return await asyncio.to_thread(connected)

    def _roster(self) -> Roster:
        from activities.settings import ConfigurationError, load_yaml

        try:
            return load_yaml(Roster, self._settings.roster_file)
        except ConfigurationError as error:
            raise Misconfigured(error, "Mend the roster file.") from None

    # ------------------------------------------------------------------ asking

    async def _ask(
        self,
        thing: Thing,
        workflow_id: str,
        name: str,
        kind: type[PersonRequest],
        token: str | None,
        why: str,
        **more: object,
    ) -> UpdateResult:
        """Ask for something; who asks comes from the verified token, and from nowhere else.

        Raises:
            OpsError: the token is not good, or a value is not allowed; or as `_update`.
        """
        request = await self._request(kind, token, why, name, workflow_id, **more)
        return await self._update(thing, self._client.get_workflow_handle(workflow_id), name, request)

    async def _request(self, kind: type[P], token: str | None, why: str, action: str, target: str, **more: object) -> P:
        """What is sent. Raises as `_subject`; OpsError: a value is not allowed."""
        who = await self._subject(token, action, target)
        try:
            return kind.model_validate({"who": who, "why": why.strip(), **more})
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            allowed = "a text of 1 to 1000 characters" if field == "why" else first["msg"]
            raise OpsError(
                f"{field}: {str(first['input'])[:100]!r} is not allowed; allowed is {allowed}.",
                "Say in a few words why; it stays in the record." if field == "why" else "Give it again.",
                ExitCode.USAGE,
                NotAllowed(field, first["input"], allowed),
            ) from None

    async def _update(
        self, thing: Thing, handle: WorkflowHandle[object, object], name: str, request: PersonRequest
    ) -> UpdateResult:
        """Ask for something; the answer may be a denial.

        Raises:
            OpsError: there is no such thing, it is over, it refuses the request as malformed or stale, or nobody
                answers.
        """
        try:
            async with self._answers(thing, thing.name(handle.id)):
                result: UpdateResult = await handle.execute_update(
                    name,
                    request,
                    result_type=UpdateResult,
                    id=self._once or str(uuid.uuid4()),
                    rpc_timeout=UPDATE_TIMEOUT,
                )
                return result
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
        raise await self._over(thing, handle)

    @asynccontextmanager
    async def _answers(self, thing: Thing, name: str) -> AsyncIterator[None]:
        """Maps what may come instead of an update's answer."""
        show = f"`runbooks {thing.word} show {name}`"
        try:
            async with self._errors(), asyncio.timeout(UPDATE_TIMEOUT.total_seconds()):
                yield
        except WorkflowUpdateFailedError as error:
            reason = getattr(error.cause, "message", None) or str(error.cause)
            raise OpsError(
                f"The {thing.word} refused: {reason}", f"{show} says what it waits for.", ExitCode.NOT_POSSIBLE
            ) from None
        except (WorkflowUpdateRPCTimeoutOrCancelledError, TimeoutError):
            raise OpsError(
                f"No worker answered within {UPDATE_TIMEOUT.total_seconds():g} s; the request may still be carried "
                "out when one comes back.",
                f"See that a worker runs (`runbooks dev` starts one), then {show}.",
                ExitCode.UNREACHABLE,
            ) from None

    async def _over(self, thing: Thing, handle: WorkflowHandle[object, object]) -> OpsError:
        """Why an update found no open workflow: it is over (how and when), or never was."""
        described = await self._describe(thing, handle)
        how = ended(described.status)
        if how is None:
            return OpsError(
                f"The {thing.word} changed at this very moment.", "Give the command again.", ExitCode.NOT_POSSIBLE
            )
        try:
            outcome = (await self._query(handle, RECORD, thing.record)).outcome if thing.record else ""
        except OpsError:
            outcome = ""
        at = described.close_time.astimezone().isoformat(" ", "seconds") if described.close_time else "some time ago"
        return OpsError(
            f"The {thing.word} is over ({how} at {at})." + (f" {outcome}" if outcome else ""),
            f"There is nothing left to decide; `runbooks {thing.word} show` has the record.",
            ExitCode.NOT_POSSIBLE,
        )

    async def _describe(self, thing: Thing, handle: WorkflowHandle[object, object]) -> WorkflowExecutionDescription:
        try:
            async with self._errors():
                return await handle.describe(rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status not in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
                raise
        raise await self._not_found(thing, handle)

    async def _not_found(self, thing: Thing, handle: WorkflowHandle[object, object]) -> OpsError:
        name = thing.name(handle.id)
        since = (datetime.now().astimezone() - timedelta(days=7)).isoformat()
        lately = f"(ExecutionStatus = 'Running' OR CloseTime > '{since}')"
        try:
            async with self._errors():
                query = f"WorkflowType = '{thing.workflow}' AND {lately}"
                found = self._client.list_workflows(query, limit=200, rpc_timeout=RPC_TIMEOUT)
                known = list(dict.fromkeys([thing.name(execution.id) async for execution in found]))
        except RPCError:
            return OpsError(
                f"Temporal has no namespace {self._settings.temporal_namespace!r}.",
                "Set RUNBOOKS_TEMPORAL_NAMESPACE.",
                ExitCode.NOT_FOUND,
            )
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        which = f" with run {handle.run_id}" if handle.run_id else ""
        return OpsError(
            f"There is no {thing.word} {name!r}{which}.",
            (f"Did you mean {' or '.join(near)}? " if near and name not in near else "")
            + f"`runbooks {thing.word} list` shows those there are.",
            ExitCode.NOT_FOUND,
        )

    async def _query(
        self, handle: WorkflowHandle[object, object], name: str, kind: type[M], timeout: timedelta | None = None
    ) -> M:
        """Raises OpsError when no worker answers; RPCError with NOT_FOUND when there is no such workflow."""
        timeout = timeout or QUERY_TIMEOUT
        try:
            async with self._errors():
                answer: M = await handle.query(name, result_type=kind, rpc_timeout=timeout)
                return answer
        except WorkflowQueryFailedError as error:
            raise OpsError(
                f"{handle.id} could not answer: {error}",
                "It may have just started: try again. Otherwise see its workflow in the Temporal UI: "
                f"{self._settings.temporal_ui_url}",
                ExitCode.NOT_POSSIBLE,
            ) from None
        except RPCError as error:
            if error.status not in _NO_WORKER_STATUSES:
                raise
            raise OpsError(
                f"No worker answers for {handle.id} (waited {timeout.total_seconds():g} s).",
                "See that a runbook worker runs on task queue "
                f"{self._settings.task_queue!r} (`runbooks dev` starts one).",
                ExitCode.UNREACHABLE,
            ) from None

    @asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        """Maps what is wrong with Temporal itself; everything else passes."""
        try:
            yield
        except RPCError as error:
            if error.status is RPCStatusCode.UNAVAILABLE:
                raise unreachable(self._settings) from None
            if error.status in (RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED):
                raise OpsError(
                    f"Temporal at {self._settings.temporal_address} refuses us: {error.message}",
                    f"Ask for access to namespace {self._settings.temporal_namespace!r}.",
                    ExitCode.DENIED,
                ) from None
            raise


def unreachable(settings: Settings) -> OpsError:
    """Temporal does not answer."""
    return OpsError(
        f"Temporal at {settings.temporal_address} does not answer.",
        "Start a stack with `runbooks dev`, or set RUNBOOKS_TEMPORAL_ADDRESS to the address of yours.",
        ExitCode.UNREACHABLE,
    )


def ended(status: WorkflowExecutionStatus | None) -> str | None:
    if status is None or status is WorkflowExecutionStatus.RUNNING:
        return None
    return status.name.lower().replace("_", " ")
