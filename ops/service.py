"""What people can do, whoever presents it (command line, HTTP): incidents here, overrides in
`ops/overrides.py`, capacity in `ops/capacity.py`.

Everything raises `OpsError` and nothing else that is expected. What only some actions need is imported by them:
looking at an incident at 3 a.m. should not wait for it.
"""

import asyncio
from collections.abc import Iterable
from datetime import datetime, timedelta

from pydantic import AwareDatetime, BaseModel
from temporalio.client import WorkflowExecution, WorkflowHandle
from temporalio.service import RPCError

from domain.incident import IncidentRecord
from domain.messages import (
    ABORT,
    ACKNOWLEDGE,
    APPROVE_REVERT,
    EXTEND,
    INCIDENT_WORKFLOW,
    RECORD,
    REJECT,
    RELEASE_LEVER,
    ExtendRequest,
    PersonRequest,
    PolicySnapshot,
    ReleaseLeverRequest,
    ReportInput,
    ReportResult,
    UpdateResult,
    incident_id,
)
from ops.asking import EXIT_CODES_OF_OUTCOMES as EXIT_CODES_OF_OUTCOMES
from ops.asking import INCIDENT, LIST_QUERY_TIMEOUT, RPC_TIMEOUT, Misconfigured, ended, unreachable
from ops.asking import ExitCode as ExitCode
from ops.asking import OpsError as OpsError
from ops.asking import parse_duration as parse_duration
from ops.asking import parse_incident as parse_incident
from ops.calendar import Calendar
from ops.capacity import Capacities
from ops.health import HealthChecks
from ops.overrides import Overrides
from workers.settings import Settings
from workers.temporal import connect
from workflows.search_attributes import CAUSE, HOLDS_LEASES, INCIDENT_KEY, PHASE, SEVERITY

# Technical: how long a person is kept waiting before an error says what is away.
CONNECT_TIMEOUT = timedelta(seconds=5)


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


class OpsService(Overrides, Capacities, Calendar, HealthChecks):
    """Actions on one Temporal namespace: incidents, overrides, capacity, the event calendar and the health check."""

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
        described = await self._describe(INCIDENT, handle)
        record = await self._query(handle, RECORD, IncidentRecord)
        return Incident(record=record, ended=ended(described.status), ended_at=described.close_time)

    async def get_record(self, incident: str, run_id: str | None = None) -> IncidentRecord:
        """The incident's own record. Raises as `get`."""
        return (await self.get(incident, run_id)).record

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
            raise Misconfigured(error, "Mend the policy file.") from None
        except OSError as error:
            raise OpsError(
                f"The report could not be written: {error}.",
                "Set RUNBOOKS_STATE_DIR to a folder that you may write.",
                ExitCode.UNEXPECTED,
            ) from None

    # ------------------------------------------------------------------ deciding

    async def approve(self, incident: str, token: str | None, why: str) -> UpdateResult:
        """Approve the way back. Raises as `_ask`."""
        return await self._ask(INCIDENT, parse_incident(incident), APPROVE_REVERT, PersonRequest, token, why)

    async def reject(self, incident: str, token: str | None, why: str) -> UpdateResult:
        """Keep the levers for now. Raises as `_ask`."""
        return await self._ask(INCIDENT, parse_incident(incident), REJECT, PersonRequest, token, why)

    async def extend(
        self, incident: str, token: str | None, why: str, by: timedelta, lever: str | None = None
    ) -> UpdateResult:
        """Extend the maximum hold of one lever, or of all, `by` so much business time. Raises as `_ask`."""
        by /= self._settings.clock.speed
        return await self._ask(
            INCIDENT, parse_incident(incident), EXTEND, ExtendRequest, token, why, by=by, lever=lever
        )

    async def release(self, incident: str, token: str | None, why: str, lever: str) -> UpdateResult:
        """Release one lever ahead of the rest. Raises as `_ask`."""
        return await self._ask(
            INCIDENT, parse_incident(incident), RELEASE_LEVER, ReleaseLeverRequest, token, why, lever=lever
        )

    async def abort(self, incident: str, token: str | None, why: str) -> UpdateResult:
        """Stop the automation and give everything back. Raises as `_ask`."""
        return await self._ask(INCIDENT, parse_incident(incident), ABORT, PersonRequest, token, why)

    async def acknowledge(self, incident: str, token: str | None, why: str) -> UpdateResult:
        """Say that somebody looks at it. Raises as `_ask`."""
        return await self._ask(INCIDENT, parse_incident(incident), ACKNOWLEDGE, PersonRequest, token, why)

    # ------------------------------------------------------------------ inside

    def _handle(self, incident: str, run_id: str | None = None) -> WorkflowHandle[object, object]:
        return self._client.get_workflow_handle(parse_incident(incident), run_id=run_id)

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


def _row(execution: WorkflowExecution) -> IncidentRow:
    attributes = execution.typed_search_attributes
    return IncidentRow(
        key=attributes.get(INCIDENT_KEY) or execution.id.removeprefix(incident_id("")),
        incident_id=execution.id,
        run_id=execution.run_id,
        phase=attributes.get(PHASE) or "",
        severity=attributes.get(SEVERITY) or "",
        cause=attributes.get(CAUSE) or "",
        holds_leases=bool(attributes.get(HOLDS_LEASES)),
        opened_at=execution.start_time,
        closed_at=execution.close_time,
        ended=ended(execution.status),
        waiting_for="",
    )
