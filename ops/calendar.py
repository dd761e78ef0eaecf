"""What people can do with the event calendar, whoever presents it: look, add, edit, remove, accept, import.

Everything given is checked before anything is written. The table is small and read whole.
"""

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from botocore.exceptions import BotoCoreError, ClientError
from pydantic import BaseModel
from temporalio.client import ScheduleOverlapPolicy, WorkflowHandle
from temporalio.service import RPCError, RPCStatusCode

from domain.calendar import (
    EVENT_TABLE_KEY,
    CalendarEvent,
    EntryError,
    EventStatus,
    check_sold,
    duration_text,
    entry,
    events_of,
)
from domain.calendar_sync import CALENDAR_SCHEDULE
from domain.clock import RehearsalClock
from domain.messages import RECORD
from domain.people import Role
from domain.permissions import ACCESS_DENIED
from domain.policy import Policy
from domain.pre_provisioning import EventRecord, event_workflow_id
from ops.asking import RPC_TIMEOUT, Asking, ExitCode, Misconfigured, NotAllowed, OpsError, ended
from ops.calendar_files import Row, rows_of

if TYPE_CHECKING:
    from types_boto3_dynamodb.client import DynamoDBClient
    from types_boto3_dynamodb.type_defs import AttributeValueTypeDef

T = TypeVar("T")

_OFFSET = re.compile(r"(Z|[+-]\d\d:?\d\d)\s*$")
LOOK = "`runbooks calendar list` shows those there are."


class CalendarRows(BaseModel):
    """The table."""

    events: list[CalendarEvent]
    broken: dict[str, str]
    """Rows that are no events: id to what is wrong."""


class CalendarChange(BaseModel):
    """What was done to one row."""

    event: CalendarEvent
    message: str


class FollowedEvent(BaseModel):
    """An event's pre-provisioning: its own record, and what Temporal says about its workflow."""

    record: EventRecord
    ended: str | None
    """How the workflow ended, e.g. `completed`; None: it runs."""


class BadRow(BaseModel):
    """A row of a file that cannot be imported."""

    line: int
    field: str
    value: str
    allowed: str


class Imported(BaseModel):
    """What became of a file."""

    added: list[CalendarEvent]
    there_already: list[str]
    """Ids of rows that say the same already."""
    bad: list[BadRow]
    message: str


class Calendar(Asking):
    """Actions on the event calendar."""

    async def list_events(self) -> CalendarRows:
        """Every row, the next one to start first.

        Raises:
            OpsError: the table cannot be read.
        """
        events, broken = await asyncio.to_thread(self._rows)
        return CalendarRows(events=sorted(events, key=lambda event: event.starts_at), broken=broken)

    async def follow_event(self, event_id: str) -> FollowedEvent:
        """The latest pre-provisioning of an event.

        Raises:
            OpsError: nothing follows it or ever did, or no worker answers.
        """
        handle: WorkflowHandle[object, object] = self._client.get_workflow_handle(event_workflow_id(event_id))
        try:
            async with self._errors():
                described = await handle.describe(rpc_timeout=RPC_TIMEOUT)
            record = await self._query(handle, RECORD, EventRecord)
        except RPCError as error:
            if error.status not in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
                raise
            raise OpsError(f"Nothing follows an event {event_id[:200]!r}.", LOOK, ExitCode.NOT_FOUND) from None
        return FollowedEvent(record=record, ended=ended(described.status))

    async def add_event(self, token: str | None, given: Mapping[str, str]) -> CalendarChange:
        """A new row from what a person gives, by the names of `domain.calendar.FIELDS`.

        Raises:
            OpsError: not an engineer; a field is not allowed; there is a row with that id; the table does not answer.
        """
        who = await self._may(token, "add", given.get("event_id", given.get("type", "event")))
        with _as_ops_error():
            policy = self._policy_as_written()
            event = entry(given, policy=policy, now=self._now(), asked_by=who)
            check_sold(event, policy, self._settings.aws_region)
        if not await asyncio.to_thread(self._put, event):
            raise OpsError(
                f"There is an event {event.event_id!r} already.",
                "Edit it with `runbooks calendar edit`, or give another --id.",
                ExitCode.NOT_POSSIBLE,
            )
        return await self._changed(event, "added")

    async def edit_event(self, token: str | None, event_id: str, given: Mapping[str, str]) -> CalendarChange:
        """Change what is planned; what pre-provisioning did about the former plan is forgotten, and done anew.

        Raises:
            OpsError: as `add_event`; or there is no such row, or it is over.
        """
        return await self._replan(token, event_id, given, accept=False)

    async def accept_event(self, token: str | None, event_id: str, given: Mapping[str, str]) -> CalendarChange:
        """Accept a proposal, changed if wanted. Raises as `edit_event`."""
        return await self._replan(token, event_id, given, accept=True)

    async def remove_event(self, token: str | None, event_id: str) -> CalendarChange:
        """Delete a row: its demand is withdrawn, and units that nobody else wants are released.

        Raises:
            OpsError: not an engineer; there is no such row; the table does not answer.
        """
        await self._may(token, "remove", event_id)
        event = await self._get(event_id)
        await asyncio.to_thread(self._delete, event_id)
        return await self._changed(event, "removed")

    async def import_events(
        self, token: str | None, name: str, content: bytes, defaults: Mapping[str, str], *, skip_bad: bool
    ) -> Imported:
        """Add the rows of an ICS or CSV file: all of them, or none where one is bad unless `skip_bad`.

        Args:
            token: of whoever asks.
            name: of the file; its ending says what it is.
            content: of the file.
            defaults: for fields that a row does not have.
            skip_bad: import the good rows of a file that has bad ones.

        Raises:
            OpsError: not an engineer; it is no such file; the table does not answer.
        """
        who = await self._may(token, "import", name)
        with _as_ops_error():
            rows = rows_of(name, content)
        events, _ = await asyncio.to_thread(self._rows)
        good, same, bad = self._check(rows, defaults, who, name, {event.event_id: event for event in events})
        if bad and not skip_bad:
            good = []
        added = [event for event in good if await asyncio.to_thread(self._put, event)]
        parts = [f"{len(added)} added"]
        parts += [f"{len(same)} there already"] if same else []
        parts += [f"{len(bad)} bad" + ("" if skip_bad else ", so nothing was imported")] if bad else []
        if added:
            parts.append(await self._sync())
        return Imported(added=added, there_already=same, bad=bad, message="; ".join(parts))

    def _check(
        self, rows: Sequence[Row], defaults: Mapping[str, str], who: str, name: str, there: Mapping[str, CalendarEvent]
    ) -> tuple[list[CalendarEvent], list[str], list[BadRow]]:
        policy, now = self._policy_as_written(), self._now()
        good: dict[str, CalendarEvent] = {}
        same: list[str] = []
        bad: list[BadRow] = []
        for row in rows:
            try:
                if row.wrong is not None:
                    raise row.wrong
                given = {field: text for field, text in row.given.items() if text.strip()}
                own_offset = bool(_OFFSET.search(given.get("start", "")))
                usual = {field: text for field, text in defaults.items() if field != "zone" or not own_offset}
                event = entry({"source": name, **usual, **given}, policy=policy, now=now, asked_by=who)
                check_sold(event, policy, self._settings.aws_region)
                known = there.get(event.event_id) or good.get(event.event_id)
                if known is not None and known.fingerprint != event.fingerprint:
                    said = "there is one already that is planned otherwise; `runbooks calendar edit` changes it"
                    raise EntryError("event_id", event.event_id, said)
            except EntryError as error:
                value = str(error.value)[:200]
                bad.append(BadRow(line=row.line, field=error.field, value=value, allowed=error.allowed))
                continue
            if known is None:
                good[event.event_id] = event
            else:
                same.append(event.event_id)
        return list(good.values()), same, bad

    # ------------------------------------------------------------------ inside

    async def _replan(
        self, token: str | None, event_id: str, given: Mapping[str, str], *, accept: bool
    ) -> CalendarChange:
        who = await self._may(token, "accept" if accept else "edit", event_id)
        before = await self._get(event_id)
        if accept and before.status is not EventStatus.PROPOSED:
            raise OpsError(f"{event_id} is no proposal: it counts already.", LOOK, ExitCode.NOT_POSSIBLE)
        policy, now = self._policy_as_written(), self._now()
        lasts = policy.calendar.event_types[before.type].lasts if before.type in policy.calendar.event_types else None
        if lasts is not None and before.starts_at + lasts <= now and "start" not in given:
            raise OpsError(f"{event_id} is over.", "Add a new event.", ExitCode.NOT_POSSIBLE)
        with _as_ops_error():
            after = _merged(before, given, policy, now, who)
            check_sold(after, policy, self._settings.aws_region)
        after = after.model_copy(update={"status": EventStatus.ACCEPTED if accept else before.status})
        if not await asyncio.to_thread(self._write_plan, before, after):
            raise OpsError(f"{event_id} was removed at this very moment.", LOOK, ExitCode.NOT_FOUND)
        return await self._changed(after, "accepted" if accept else "changed")

    async def _changed(self, event: CalendarEvent, what: str) -> CalendarChange:
        starts = event.starts_at.isoformat(timespec="minutes")
        plan = f"{event.type}, {event.multiplier:g}x from {starts}, {duration_text(event.lead_time)} ahead"
        return CalendarChange(event=event, message=f"{event.event_id} {what} ({plan}); {await self._sync()}")

    async def _sync(self) -> str:
        """Have the table read now; otherwise the next sync does."""
        try:
            handle = self._client.get_schedule_handle(CALENDAR_SCHEDULE)
            await handle.trigger(overlap=ScheduleOverlapPolicy.SKIP, rpc_timeout=RPC_TIMEOUT)
        except RPCError:
            return "pre-provisioning follows once the schedule calendar-sync runs"
        return "pre-provisioning is told now"

    async def _may(self, token: str | None, action: str, target: str) -> str:
        """Who asks. A refusal is put on record.

        Raises:
            OpsError: nobody, or no engineer.
        """
        action = f"calendar {action}"
        who = await self._subject(token, action, target)
        if self._roster().may(who, Role.ENGINEER):
            return who
        why = f"{who} may not change the calendar: it is not an engineer's role."
        await self._record_refusal(who, action, target, why)
        raise OpsError(why, "Ask an engineer, or for the role in the roster.", ExitCode.DENIED)

    def _policy_as_written(self) -> Policy:
        from activities.settings import ConfigurationError, load_policy

        try:
            return load_policy(self._settings.policy_file, RehearsalClock())
        except ConfigurationError as error:
            raise Misconfigured(error, "Mend the policy file.") from None

    def _now(self) -> datetime:
        """Business time."""
        return self._settings.clock.business(datetime.now(UTC))

    # ------------------------------------------------------------------ the table

    @cached_property
    def _dynamodb(self) -> "DynamoDBClient":
        from workers.clients import AwsClients

        return AwsClients(self._settings).dynamodb()

    def _asked(self, call: "Callable[[DynamoDBClient], T]") -> T:
        """The call's answer.

        Raises:
            OpsError: AWS refuses it, or does not answer.
        """
        table = self._settings.event_table
        try:
            return call(self._dynamodb)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code == "ResourceNotFoundException":
                said = "Create it with the string key event_id, or set RUNBOOKS_EVENT_TABLE."
                raise OpsError(f"There is no DynamoDB table {table!r}.", said, ExitCode.NOT_FOUND) from None
            exit_code = ExitCode.DENIED if code in ACCESS_DENIED else ExitCode.UNREACHABLE
            said = "Your AWS credentials need `runbooks iam policy --role api`."
            raise OpsError(f"The event calendar {table!r}: {error}", said, exit_code) from None
        except BotoCoreError as error:
            said = "Set RUNBOOKS_AWS_ENDPOINT_URL and credentials; `source .runbooks/env` does for a local stack."
            raise OpsError(f"AWS does not answer: {error}", said, ExitCode.UNREACHABLE) from None

    async def _get(self, event_id: str) -> CalendarEvent:
        events, broken = await asyncio.to_thread(self._rows)
        if event_id in broken:
            raise OpsError(broken[event_id], "Mend or delete the row in DynamoDB.", ExitCode.NOT_POSSIBLE)
        for event in events:
            if event.event_id == event_id:
                return event
        raise OpsError(f"There is no event {event_id[:200]!r}.", LOOK, ExitCode.NOT_FOUND)

    def _rows(self) -> tuple[list[CalendarEvent], dict[str, str]]:
        table = self._settings.event_table

        def read(dynamodb: "DynamoDBClient") -> tuple[list[CalendarEvent], dict[str, str]]:
            pages = dynamodb.get_paginator("scan").paginate(TableName=table, ConsistentRead=True)
            return events_of(item for page in pages for item in page["Items"])

        return self._asked(read)

    def _put(self, event: CalendarEvent) -> bool:
        """False: there is a row with that id."""

        def put(dynamodb: "DynamoDBClient") -> bool:
            try:
                dynamodb.put_item(
                    TableName=self._settings.event_table,
                    Item=event.to_item(),
                    ConditionExpression=f"attribute_not_exists({EVENT_TABLE_KEY})",
                )
            except dynamodb.exceptions.ConditionalCheckFailedException:
                return False
            return True

        return self._asked(put)

    def _write_plan(self, before: CalendarEvent, after: CalendarEvent) -> bool:
        """False: the row is gone."""
        item = after.to_item()
        planned = ("type", "starts_at", "multiplier", "models", "lead_time_seconds", "source", "asked_by", "status")
        names = {f"#{name}": name for name in planned}
        change = "SET " + ", ".join(f"#{name} = :{name}" for name in planned)
        if before.fingerprint != after.fingerprint:
            names["#units"] = "units"
            change += " REMOVE #units, provisioning_triggered_at, provisioning_completed_at"
        values: dict[str, AttributeValueTypeDef] = {f":{name}": item[name] for name in planned}

        def write(dynamodb: "DynamoDBClient") -> bool:
            try:
                dynamodb.update_item(
                    TableName=self._settings.event_table,
                    Key={EVENT_TABLE_KEY: {"S": before.event_id}},
                    UpdateExpression=change,
                    ConditionExpression=f"attribute_exists({EVENT_TABLE_KEY})",
                    ExpressionAttributeNames=names,
                    ExpressionAttributeValues=values,
                )
            except dynamodb.exceptions.ConditionalCheckFailedException:
                return False
            return True

        return self._asked(write)

    def _delete(self, event_id: str) -> None:
        def delete(dynamodb: "DynamoDBClient") -> None:
            dynamodb.delete_item(TableName=self._settings.event_table, Key={EVENT_TABLE_KEY: {"S": event_id}})

        self._asked(delete)


def _merged(before: CalendarEvent, given: Mapping[str, str], policy: Policy, now: datetime, who: str) -> CalendarEvent:
    """The row with what is given changed; a start that is not moved may be past.

    Raises:
        EntryError: a field is not allowed.
    """
    moved = "start" in given or "zone" in given
    kept = {
        "event_id": before.event_id,
        **({} if moved else {"start": before.starts_at.isoformat()}),
        "type": before.type,
        "multiplier": f"{before.multiplier:g}",
        "models": ",".join(before.models),
        "lead_time": duration_text(before.lead_time),
        "source": before.source,
    }
    if given.get("type", before.type) != before.type:
        kept = {name: text for name, text in kept.items() if name not in ("multiplier", "lead_time")}
    if not moved:
        now = min(now, before.starts_at - timedelta(seconds=1))
    return entry({**kept, **given}, policy=policy, now=now, asked_by=who)


@contextmanager
def _as_ops_error() -> Iterator[None]:
    try:
        yield
    except EntryError as error:
        raise OpsError(
            f"{error.field}: {str(error.value)[:200]!r} is not allowed.",
            f"{error.allowed[:1].upper()}{error.allowed[1:]}.",
            ExitCode.USAGE,
            NotAllowed(error.field, error.value, error.allowed),
        ) from None
