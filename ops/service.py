"""What people can do with incidents, whoever presents it (command line, HTTP).

Everything raises `OpsError` and nothing else that is expected: what is wrong, what to do next, and an exit code.
Errors of Temporal are told apart by their status, never by their text. What only some actions need is imported by them:
looking at an incident at 3 a.m. should not wait for it.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from difflib import get_close_matches
from enum import IntEnum
from typing import TypeVar

from pydantic import AwareDatetime, BaseModel, ValidationError
from temporalio.client import (
    Client,
    WorkflowExecution,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import SearchAttributeKey
from temporalio.service import RPCError, RPCStatusCode

from domain.incident import IncidentRecord
from domain.messages import (
    ABORT,
    ACKNOWLEDGE,
    APPROVE_REVERT,
    CAPACITY_STATE,
    EXTEND,
    INCIDENT_WORKFLOW,
    RECORD,
    REJECT,
    RELEASE_LEVER,
    CapacityState,
    ExtendRequest,
    PersonRequest,
    PolicySnapshot,
    ReleaseLeverRequest,
    ReportInput,
    ReportResult,
    UpdateResult,
    capacity_id,
    incident_id,
)
from domain.people import Roster
from workers.settings import Settings
from workers.temporal import connect

M = TypeVar("M", bound=BaseModel)

# Technical: how long a person is kept waiting before an error says what is away.
CONNECT_TIMEOUT = timedelta(seconds=5)
RPC_TIMEOUT = timedelta(seconds=5)
QUERY_TIMEOUT = timedelta(seconds=5)
LIST_QUERY_TIMEOUT = timedelta(seconds=2)
UPDATE_TIMEOUT = timedelta(seconds=20)

_KEY, _PHASE, _SEVERITY, _CAUSE = (
    SearchAttributeKey.for_keyword(name) for name in ("IncidentKey", "IncidentPhase", "Severity", "Cause")
)
_HOLDS_LEASES = SearchAttributeKey.for_bool("HoldsLeases")
_DURATION = re.compile(r"(?:(\d{1,4})h)?(?:(\d{1,4})m)?", re.ASCII)
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


class OpsError(Exception):
    """What is wrong, what to do next, and how a command ends."""

    def __init__(self, message: str, next_step: str, exit_code: ExitCode) -> None:
        self.message = message
        self.next_step = next_step
        self.exit_code = exit_code
        super().__init__(f"{message} {next_step}")


class IncidentRow(BaseModel):
    """One incident in a list."""

    key: str
    incident_id: str
    run_id: str
    phase: str
    severity: str
    cause: str
    """Id of the cause found; empty: none yet."""
    holds_leases: bool
    opened_at: AwareDatetime
    closed_at: AwareDatetime | None
    ended: str | None
    """How the workflow ended, e.g. `completed`, `terminated`; None: it is open."""
    waiting_for: str
    """Who or what it waits for; empty once closed."""


class Incident(BaseModel):
    """One incident: its own record, and what Temporal says about its workflow."""

    record: IncidentRecord
    ended: str | None
    """How the workflow ended, e.g. `completed`, `terminated`; None: it runs."""
    ended_at: AwareDatetime | None


def parse_duration(text: str) -> timedelta:
    """`45m`, `2h` or `1h30m` as a duration.

    Raises:
        OpsError: anything else, or nothing.
    """
    match = _DURATION.fullmatch(text.strip())
    hours, minutes = (int(group or 0) for group in match.groups()) if match else (0, 0)
    if not hours and not minutes:
        raise OpsError(
            f"{text!r} is no duration.", "Give hours and minutes like 45m, 2h or 1h30m, more than 0.", ExitCode.USAGE
        )
    return timedelta(hours=hours, minutes=minutes)


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
        )
    return text if text.startswith(incident_id("")) else incident_id(text)


class OpsService:
    """Actions on the incidents of one Temporal namespace."""

    def __init__(self, client: Client, settings: Settings, once: str | None = None) -> None:
        self._client = client
        self._settings = settings
        self._once = once

    @staticmethod
    async def connect(settings: Settings) -> "OpsService":
        """A service on a fresh connection.

        Raises:
            OpsError: Temporal cannot be reached.
        """
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT.total_seconds()):
                return OpsService(await connect(settings), settings)
        except (RuntimeError, TimeoutError):  # the SDK raises a plain RuntimeError, without a status
            raise unreachable(settings) from None

    def once(self, key: str) -> "OpsService":
        """The same service for one change: asked for again with that key, it is answered again and not done again."""
        return OpsService(self._client, self._settings, key)

    async def check(self) -> None:
        """Raises OpsError: Temporal does not answer."""
        async with self._errors():
            await self._client.service_client.check_health(timeout=RPC_TIMEOUT)

    # ------------------------------------------------------------------ looking

    async def list_incidents(self, closed_within: timedelta = timedelta(days=1), limit: int = 50) -> list[IncidentRow]:
        """Open incidents, and those that closed within `closed_within`; the newest first, open ones before closed.

        `waiting_for` is asked of each open incident; it says so where no worker answers.
        """
        async with self._errors():
            now = datetime.now().astimezone()
            since = (now - closed_within).isoformat()
            kind = f"WorkflowType = '{INCIDENT_WORKFLOW}'"
            found = [
                execution
                for condition in ("ExecutionStatus = 'Running'", f"CloseTime > '{since}'")
                async for execution in self._client.list_workflows(
                    f"{kind} AND {condition}", limit=limit, rpc_timeout=RPC_TIMEOUT
                )
            ]
        rows = {execution.run_id: _row(execution) for execution in found}
        ordered = sorted(rows.values(), key=lambda row: (row.ended is None, row.opened_at), reverse=True)[:limit]
        await self._add_waiting([row for row in ordered if row.ended is None])
        return ordered

    async def get(self, incident: str, run_id: str | None = None) -> Incident:
        """The latest incident with that key or id (or one of its earlier runs), open or closed.

        Raises:
            OpsError: there is none, or no worker answers.
        """
        handle = self._handle(incident, run_id)
        described = await self._describe(handle)
        record = await self._query(handle, RECORD, IncidentRecord)
        return Incident(record=record, ended=_ended(described.status), ended_at=described.close_time)

    async def get_record(self, incident: str, run_id: str | None = None) -> IncidentRecord:
        """The incident's own record. Raises as `get`."""
        return (await self.get(incident, run_id)).record

    async def capacity_state(self, model: str) -> CapacityState:
        """What the one writer of a model's capacity knows and does.

        Raises:
            OpsError: no such workflow runs, or no worker answers.
        """
        handle = self._client.get_workflow_handle(capacity_id(model))
        try:
            return await self._query(handle, CAPACITY_STATE, CapacityState)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            raise OpsError(
                f"Nothing has asked for capacity of model {model!r} yet.",
                "The capacity workflow of a model starts with its first demand.",
                ExitCode.NOT_FOUND,
            ) from None

    async def report(self, incident: str, run_id: str | None = None) -> ReportResult:
        """Write the report from the record as it stands, here and now, as the worker does when the incident ends.

        Raises:
            OpsError: as `get`; or the policy cannot be read, or the folder not be written.
        """
        from activities.report import ReportActivities
        from activities.settings import ConfigurationError, load_policy
        from workers.clients import AwsClients

        record = await self.get_record(incident, run_id)
        settings = self._settings
        try:
            snapshot = PolicySnapshot(policy=load_policy(settings.policy_file, settings.clock), clock=settings.clock)
            reports = ReportActivities(AwsClients(settings).cloudwatch(), settings.state_dir / "reports")
            return await reports.write_report(ReportInput(record=record, snapshot=snapshot))
        except ConfigurationError as error:
            raise OpsError(str(error), "Mend the policy file.", ExitCode.USAGE) from None
        except OSError as error:
            raise OpsError(
                f"The report could not be written: {error}.",
                "Set RUNBOOKS_STATE_DIR to a folder that you may write.",
                ExitCode.UNEXPECTED,
            ) from None

    # ------------------------------------------------------------------ deciding

    async def approve(self, incident: str, token: str | None, why: str) -> UpdateResult:
        """Approve the way back. Raises as `_update`."""
        return await self._update(incident, APPROVE_REVERT, self._request(PersonRequest, token, why))

    async def reject(self, incident: str, token: str | None, why: str) -> UpdateResult:
        """Keep the levers for now. Raises as `_update`."""
        return await self._update(incident, REJECT, self._request(PersonRequest, token, why))

    async def extend(
        self, incident: str, token: str | None, why: str, by: timedelta, lever: str | None = None
    ) -> UpdateResult:
        """Extend the maximum hold of one lever, or of all, `by` so much business time. Raises as `_update`."""
        by /= self._settings.clock.speed
        return await self._update(incident, EXTEND, self._request(ExtendRequest, token, why, by=by, lever=lever))

    async def release(self, incident: str, token: str | None, why: str, lever: str) -> UpdateResult:
        """Release one lever ahead of the rest. Raises as `_update`."""
        return await self._update(incident, RELEASE_LEVER, self._request(ReleaseLeverRequest, token, why, lever=lever))

    async def abort(self, incident: str, token: str | None, why: str) -> UpdateResult:
        """Stop the automation and give everything back. Raises as `_update`."""
        return await self._update(incident, ABORT, self._request(PersonRequest, token, why))

    async def acknowledge(self, incident: str, token: str | None, why: str) -> UpdateResult:
        """Say that somebody looks at it. Raises as `_update`."""
        return await self._update(incident, ACKNOWLEDGE, self._request(PersonRequest, token, why))

    # ------------------------------------------------------------------ inside

    def _handle(self, incident: str, run_id: str | None = None) -> WorkflowHandle[object, object]:
        return self._client.get_workflow_handle(parse_incident(incident), run_id=run_id)

    def _request(self, kind: type[M], token: str | None, why: str, **more: object) -> M:
        """Who comes from the verified token, and from nowhere else."""
        who = self._subject(token)
        try:
            return kind.model_validate({"who": who, "why": why.strip(), **more})
        except ValidationError as error:
            field = ".".join(map(str, error.errors()[0]["loc"]))
            said = "from 1 to 1000 characters are allowed" if field == "why" else error.errors()[0]["msg"]
            raise OpsError(
                f"{field}: {said}.", "Say in a few words why; it stays in the record.", ExitCode.USAGE
            ) from None

    def _subject(self, token: str | None) -> str:
        from workers.tokens import TokenRefused, identify

        how = "Pass --token-file, or set RUNBOOKS_TOKEN_FILE or RUNBOOKS_TOKEN; `runbooks dev` prints a token file."
        if not token or not token.strip():
            raise OpsError("Who are you? There is no token.", how, ExitCode.DENIED)
        try:
            return identify(token, self._settings.token_key_file, self._roster)
        except TokenRefused as error:
            raise OpsError(f"Token refused: {error}.", how, ExitCode.DENIED) from None

    def _roster(self) -> Roster:
        from activities.settings import ConfigurationError, load_yaml

        try:
            return load_yaml(Roster, self._settings.roster_file)
        except ConfigurationError as error:
            raise OpsError(str(error), "Mend the roster file.", ExitCode.USAGE) from None

    async def _update(self, incident: str, name: str, request: PersonRequest) -> UpdateResult:
        """Ask the incident for something; the answer may be a denial.

        Raises:
            OpsError: there is no such incident, it is over, it refuses the request as malformed or stale, or nobody
                answers.
        """
        handle = self._handle(incident)
        try:
            async with self._errors(), asyncio.timeout(UPDATE_TIMEOUT.total_seconds()):
                result: UpdateResult = await handle.execute_update(
                    name,
                    request,
                    result_type=UpdateResult,
                    id=self._once or str(uuid.uuid4()),
                    rpc_timeout=UPDATE_TIMEOUT,
                )
                return result
        except WorkflowUpdateFailedError as error:
            cause = error.cause
            reason = getattr(cause, "message", None) or str(cause)
            raise OpsError(
                f"The incident refused: {reason}",
                f"`runbooks incident show {incident}` says what it waits for.",
                ExitCode.NOT_POSSIBLE,
            ) from None
        except (WorkflowUpdateRPCTimeoutOrCancelledError, TimeoutError):
            raise OpsError(
                f"No worker answered within {UPDATE_TIMEOUT.total_seconds():g} s; the request may still be carried "
                "out when one comes back.",
                f"See that a worker runs (`runbooks dev` starts one), then `runbooks incident show {incident}`.",
                ExitCode.UNREACHABLE,
            ) from None
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
        raise await self._over(handle)

    async def _over(self, handle: WorkflowHandle[object, object]) -> OpsError:
        """Why an update found no open workflow: it is over (how and when), or never was."""
        described = await self._describe(handle)
        ended = _ended(described.status)
        if ended is None:
            return OpsError(
                "The incident changed at this very moment.", "Give the command again.", ExitCode.NOT_POSSIBLE
            )
        try:
            outcome = (await self._query(handle, RECORD, IncidentRecord)).outcome
        except OpsError:
            outcome = ""
        at = described.close_time.astimezone().isoformat(" ", "seconds") if described.close_time else "some time ago"
        return OpsError(
            f"The incident is over ({ended} at {at})." + (f" {outcome}" if outcome else ""),
            "There is nothing left to decide; `runbooks incident show` has the record, `report` writes it out.",
            ExitCode.NOT_POSSIBLE,
        )

    async def _describe(self, handle: WorkflowHandle[object, object]) -> WorkflowExecutionDescription:
        try:
            async with self._errors():
                return await handle.describe(rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status not in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
                raise
        raise await self._not_found(handle)

    async def _not_found(self, handle: WorkflowHandle[object, object]) -> OpsError:
        key = handle.id.removeprefix(incident_id(""))
        try:
            known = [row.key for row in await self.list_incidents(closed_within=timedelta(days=7))]
        except RPCError:
            return OpsError(
                f"Temporal has no namespace {self._settings.temporal_namespace!r}.",
                "Set RUNBOOKS_TEMPORAL_NAMESPACE.",
                ExitCode.NOT_FOUND,
            )
        near = get_close_matches(key, list(dict.fromkeys(known)), n=3, cutoff=0.5)
        which = f" with run {handle.run_id}" if handle.run_id else ""
        return OpsError(
            f"There is no incident {key!r}{which}.",
            (f"Did you mean {' or '.join(near)}? " if near and key not in near else "")
            + "`runbooks incident list` shows those there are.",
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

    async def _add_waiting(self, rows: Iterable[IncidentRow]) -> None:
        few = asyncio.Semaphore(20)

        async def ask(row: IncidentRow) -> None:
            async with few:
                handle: WorkflowHandle[object, object] = self._client.get_workflow_handle(
                    row.incident_id, run_id=row.run_id
                )
                try:
                    record = await self._query(handle, RECORD, IncidentRecord, timeout=LIST_QUERY_TIMEOUT)
                except (OpsError, RPCError):
                    row.waiting_for = "no worker answers"
                else:
                    row.waiting_for, row.phase = record.waiting_for, record.phase

        await asyncio.gather(*(ask(row) for row in rows))

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


def _row(execution: WorkflowExecution) -> IncidentRow:
    attributes = execution.typed_search_attributes
    return IncidentRow(
        key=attributes.get(_KEY) or execution.id.removeprefix(incident_id("")),
        incident_id=execution.id,
        run_id=execution.run_id,
        phase=attributes.get(_PHASE) or "",
        severity=attributes.get(_SEVERITY) or "",
        cause=attributes.get(_CAUSE) or "",
        holds_leases=bool(attributes.get(_HOLDS_LEASES)),
        opened_at=execution.start_time,
        closed_at=execution.close_time,
        ended=_ended(execution.status),
        waiting_for="",
    )


def _ended(status: WorkflowExecutionStatus | None) -> str | None:
    if status is None or status is WorkflowExecutionStatus.RUNNING:
        return None
    return status.name.lower().replace("_", " ")
