"""What people can do with overrides, whoever presents it: look ahead, set, extend, give back, hand over, decide."""

import asyncio
import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import redis
from pydantic import AwareDatetime, BaseModel
from temporalio.client import WorkflowExecution, WorkflowHandle
from temporalio.service import RPCError

from domain.incident import span
from domain.knobs import KnobName, KnobValue, KnobValueError, Lease, validate_value
from domain.load import LoadSnapshot
from domain.messages import (
    APPROVE,
    APPROVE_KEEP,
    DENY,
    EXTEND,
    HAND_OVER,
    OVERRIDE_WORKFLOW,
    RECORD,
    RELEASE,
    TAKE_OVER,
    HandOverRequest,
    KeepRequest,
    OverrideAnswer,
    OverrideExtendRequest,
    OverrideInput,
    PersonRequest,
    StartOverride,
    TakeOverRequest,
    UpdateResult,
    load_query,
    override_id,
)
from domain.override import Assessment, OverrideKind, OverrideRecord, assess, role_to_set
from domain.policy import Policy
from ops.asking import (
    INCIDENT,
    LIST_QUERY_TIMEOUT,
    MAX_REASON_CHARS,
    OVERRIDE,
    RPC_TIMEOUT,
    Asking,
    ExitCode,
    NotAllowed,
    OpsError,
    ended,
    parse_incident,
)
from workflows.search_attributes import ENDS_AT, KNOB

MAX_ID_CHARS = 200


class OverrideRow(BaseModel):
    """One override in a list."""

    override_id: str
    run_id: str
    knob: str
    until: AwareDatetime | None
    """Its end, or its review date; None: it is not in force yet."""
    asked_at: AwareDatetime
    closed_at: AwareDatetime | None
    ended: str | None
    """How the workflow ended, e.g. `completed`; None: it is open."""
    record: OverrideRecord | None = None
    """Of an open one; None: no worker answers."""


class Override(BaseModel):
    """One override: its own record, and what Temporal says about its workflow."""

    record: OverrideRecord
    ended: str | None
    ended_at: AwareDatetime | None
    url: str
    """Its workflow in the Temporal UI."""


class Preview(BaseModel):
    """What an override would do. Nothing was changed."""

    knob: KnobName
    value: KnobValue
    kind: OverrideKind
    ends_at: AwareDatetime
    allowed: str
    """What the knob takes."""
    needed_role: str
    assessment: Assessment


def parse_knob(text: str) -> KnobName:
    """Raises OpsError: there is no such knob."""
    try:
        return KnobName(text)
    except ValueError:
        names = ", ".join(KnobName)
        wrong = NotAllowed("knob", text, names)
        raise OpsError(f"There is no knob {text[:80]!r}.", f"There are {names}.", ExitCode.USAGE, wrong) from None


def parse_override(text: str) -> str:
    """Raises OpsError: it cannot be an override's id."""
    if not text.startswith(OVERRIDE.prefix) or not text.isprintable() or len(text) > MAX_ID_CHARS:
        raise OpsError(
            f"{text[:80]!r} is no override.",
            "Give an id like override-cache_ttl_seconds-1a2b3c4d; `runbooks override list` shows those there are.",
            ExitCode.USAGE,
            NotAllowed("override", text, "an override's id"),
        )
    return text


def parse_value(text: str) -> Any:
    """A knob's value as typed: JSON, `on` and `off`, or `faq=haiku,greeting=haiku`; the knob says what it takes."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    if text in ("on", "off"):
        return text == "on"
    if "=" in text:
        return {name.strip(): parse_value(one.strip()) for name, _, one in (p.partition("=") for p in text.split(","))}
    return text


class Overrides(Asking):
    """Actions on overrides."""

    # ------------------------------------------------------------------ looking

    async def list_overrides(self, closed_within: timedelta = timedelta(days=1), limit: int = 50) -> list[OverrideRow]:
        """Open overrides, the first to end first, and then those that closed within `closed_within`."""
        async with self._errors():
            since = (datetime.now(UTC) - closed_within).isoformat()
            found = [
                _row(execution)
                for condition in ("ExecutionStatus = 'Running'", f"CloseTime > '{since}'")
                async for execution in self._client.list_workflows(
                    f"WorkflowType = '{OVERRIDE_WORKFLOW}' AND {condition}", limit=limit, rpc_timeout=RPC_TIMEOUT
                )
                if execution.status is None or execution.status.name != "CONTINUED_AS_NEW"
            ]
        rows = list({row.run_id: row for row in found}.values())
        await self._add_records(rows)
        last = datetime.max.replace(tzinfo=UTC)
        rows.sort(key=lambda row: (row.ended is not None, row.until or last))
        return rows[:limit]

    async def get_override(self, override: str) -> Override:
        """One override, open or closed.

        Raises:
            OpsError: there is none, or no worker answers.
        """
        handle: WorkflowHandle[object, object] = self._client.get_workflow_handle(parse_override(override))
        described = await self._describe(OVERRIDE, handle)
        record = await self._query(handle, RECORD, OverrideRecord)
        return Override(
            record=record, ended=ended(described.status), ended_at=described.close_time, url=self.url(handle.id)
        )

    async def preview_override(
        self, knob: str, value: object, duration: timedelta | None = None, kind: OverrideKind = OverrideKind.TIMED
    ) -> Preview:
        """What it would do: bounds, other leases, the values in force until when, and the impact. Changes nothing.

        Raises:
            OpsError: the knob, the value or the duration is not allowed; Redis does not answer.
        """
        policy = self._policy()
        name = parse_knob(knob)
        checked, lasts = self._checked(name, value, duration, policy)
        leases, load = await asyncio.gather(self._leases(), self._load(policy))
        now = datetime.now(UTC)
        assessment = assess(
            name,
            checked,
            pin=kind is OverrideKind.PIN,
            now=now,
            ends_at=now + lasts,
            leases=leases,
            load=load,
            policy=policy,
        )
        return Preview(
            knob=name,
            value=checked,
            kind=kind,
            ends_at=now + lasts,
            allowed=name.spec.kind.allowed(name.spec.unit, policy.baseline.model_ranks),
            needed_role=role_to_set(name, kind),
            assessment=assessment,
        )

    # ------------------------------------------------------------------ setting

    async def set_override(
        self,
        token: str | None,
        knob: str,
        value: object,
        reason: str,
        duration: timedelta | None = None,
        kind: OverrideKind = OverrideKind.TIMED,
    ) -> OverrideAnswer:
        """Hold a knob for `duration` of business time (the policy's default without one); the answer may be a denial.

        Raises:
            OpsError: the knob, value, reason or duration is not allowed, the token is not good, or nobody answers.
        """
        from activities.entities import start_override

        who = await self._subject(token, "set", knob)
        policy = self._policy()
        name = parse_knob(knob)
        checked, lasts = self._checked(name, value, duration, policy)
        reason = reason.strip()
        if not 1 <= len(reason) <= MAX_REASON_CHARS:
            raise OpsError(
                f"reason: {len(reason)} characters are not allowed; 1 to {MAX_REASON_CHARS} are.",
                "Say in a few words why; it stays in the record.",
                ExitCode.USAGE,
                NotAllowed("reason", reason, f"a text of 1 to {MAX_REASON_CHARS} characters"),
            )
        request = StartOverride(
            override_id=override_id(name, self._short_id()),
            input=OverrideInput(knob=name, value=checked, kind=kind, who=who, reason=reason, duration=lasts),
        )
        async with self._answers(OVERRIDE, request.override_id):
            return await start_override(self._client, request, self._settings.task_queue)

    # ------------------------------------------------------------------ deciding

    async def extend_override(self, override: str, token: str | None, why: str, by: timedelta) -> UpdateResult:
        """Move its end, or its review date, `by` so much business time later. Raises as `_ask`."""
        by /= self._settings.clock.speed
        return await self._ask(OVERRIDE, parse_override(override), EXTEND, OverrideExtendRequest, token, why, by=by)

    async def release_override(self, override: str, token: str | None, why: str) -> UpdateResult:
        """Give the knob back now, or withdraw what waits for an approval. Raises as `_ask`."""
        return await self._ask(OVERRIDE, parse_override(override), RELEASE, PersonRequest, token, why)

    async def hand_over_override(self, override: str, token: str | None, why: str, to: str) -> UpdateResult:
        """Give it to another owner. Raises as `_ask`."""
        return await self._ask(OVERRIDE, parse_override(override), HAND_OVER, HandOverRequest, token, why, to=to)

    async def approve_override(self, override: str, token: str | None, why: str) -> UpdateResult:
        """Agree to it; whoever asked for it cannot. Raises as `_ask`."""
        return await self._ask(OVERRIDE, parse_override(override), APPROVE, PersonRequest, token, why)

    async def deny_override(self, override: str, token: str | None, why: str) -> UpdateResult:
        """Say no to it. Raises as `_ask`."""
        return await self._ask(OVERRIDE, parse_override(override), DENY, PersonRequest, token, why)

    async def keep_lever(
        self, incident: str, token: str | None, why: str, lever: str, review_in: timedelta | None = None
    ) -> UpdateResult:
        """Turn an incident's lever into a standing override of whoever asks. Raises as `_ask`."""
        review = None if review_in is None else review_in / self._settings.clock.speed
        return await self._ask(
            INCIDENT, parse_incident(incident), APPROVE_KEEP, KeepRequest, token, why, lever=lever, review_in=review
        )

    async def take_over(
        self, incident: str, token: str | None, why: str, lasts: timedelta, to: str | None = None
    ) -> UpdateResult:
        """Stop the automation; the levers stay with a person (whoever asks) for so long. Raises as `_ask`."""
        lasts /= self._settings.clock.speed
        return await self._ask(
            INCIDENT, parse_incident(incident), TAKE_OVER, TakeOverRequest, token, why, lasts=lasts, to=to
        )

    # ------------------------------------------------------------------ inside

    def _checked(
        self, knob: KnobName, value: object, duration: timedelta | None, policy: Policy
    ) -> tuple[KnobValue, timedelta]:
        """The value if its knob takes it, and the duration in real time."""
        speed, most = self._settings.clock.speed, policy.overrides.max_duration
        lasts = policy.overrides.default_duration if duration is None else duration / speed
        if not timedelta(0) < lasts <= most:
            asked, allowed = span(lasts * speed), f"more than 0 and at most {span(most * speed)}"
            raise OpsError(
                f"duration: {asked} is not allowed; {allowed} is.",
                "An override can be extended while it lasts; what should stay for good belongs into the policy.",
                ExitCode.USAGE,
                NotAllowed("duration", asked, allowed),
            )
        try:
            return validate_value(knob, value, policy.baseline), lasts
        except KnobValueError as error:
            wrong = NotAllowed("name" if error.is_name else "value", error.asked, error.allowed)
            raise OpsError(f"{error}.", f"{knob}: {knob.spec.meaning}.", ExitCode.USAGE, wrong) from None

    async def _leases(self) -> tuple[Lease, ...]:
        try:
            return await self._with_ledger(lambda ledger: ledger.leases().leases)
        except redis.RedisError as error:
            raise OpsError(
                f"Redis does not answer, so who holds the knob is not known: {error}.",
                "Set RUNBOOKS_REDIS_URL to the address of yours.",
                ExitCode.UNREACHABLE,
            ) from None

    async def _load(self, policy: Policy) -> LoadSnapshot | None:
        """The present metrics; None: they cannot be read, whyever."""
        from activities.cloudwatch import CloudWatchActivities
        from workers.clients import AwsClients

        def read() -> LoadSnapshot:
            settings = self._settings
            names = {"ecs_cluster": settings.ecs_cluster, "ecs_service": settings.ecs_service}
            return CloudWatchActivities(AwsClients(settings).cloudwatch(), **names).read_load(load_query(policy, None))

        try:
            return await asyncio.to_thread(read)
        except Exception:
            return None

    async def _add_records(self, rows: Iterable[OverrideRow]) -> None:
        few = asyncio.Semaphore(20)

        async def ask(row: OverrideRow) -> None:
            async with few:
                handle: WorkflowHandle[object, object] = self._client.get_workflow_handle(
                    row.override_id, run_id=row.run_id
                )
                try:
                    row.record = await self._query(handle, RECORD, OverrideRecord, timeout=LIST_QUERY_TIMEOUT)
                except (OpsError, RPCError):
                    return
                row.until = row.record.until

        await asyncio.gather(*(ask(row) for row in rows))


def _row(execution: WorkflowExecution) -> OverrideRow:
    attributes = execution.typed_search_attributes
    return OverrideRow(
        override_id=execution.id,
        run_id=execution.run_id,
        knob=attributes.get(KNOB) or "",
        until=attributes.get(ENDS_AT),
        asked_at=execution.start_time,
        closed_at=execution.close_time,
        ended=ended(execution.status),
    )
