"""The event calendar as people change it and as its sync follows it: real Temporal, DynamoDB over HTTP."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError
from temporalio.worker import Worker

from activities.calendar import CalendarActivities
from activities.cloudwatch import CloudWatchActivities
from activities.events import EventActivities
from activities.schedules import ScheduledWorkflow, ensure_schedules
from domain.calendar import EVENT_TABLE_KEY, CalendarEvent, EventStatus
from domain.calendar_sync import CALENDAR_SCHEDULE, CALENDAR_SYNC_WORKFLOW, CalendarSynced
from domain.errors import ErrorKind
from domain.people import Role
from domain.pre_provisioning import EventPhase, EventRecord, MarkEvent
from ops.service import ExitCode, OpsError, OpsService
from ops.stack import Stack
from tests.aws_account import Account
from tests.servers import AwsServer
from tests.workflows.fake_events import FakeEvents
from tests.workflows.fakes import activities_of
from workers.settings import Settings
from workers.temporal import connect
from workflows.calendar_sync import MOST_PAGES, CalendarSyncWorkflow
from workflows.event_pre_provisioning import EventPreProvisioningWorkflow

pytestmark = pytest.mark.asyncio(loop_scope="module")
TABLE = "calendar-of-tests"
START = (datetime.now(UTC) + timedelta(days=20)).replace(hour=15, minute=0, second=0, microsecond=0)
"""A midnight in Tokyo, long ahead."""
TEXT = START.isoformat()
PATIENCE_SECONDS = 40


@pytest.fixture(scope="module")
def settings(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Any:
    server = AwsServer(tmp_path_factory.mktemp("aws")).start()
    env = stack.process_env()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield Settings(
            temporal_address=stack.addresses.temporal,
            redis_url=env["RUNBOOKS_REDIS_URL"],
            roster_file=Path(env["RUNBOOKS_ROSTER_FILE"]),
            token_key_file=stack.state_dir / "token.key",
            state_dir=stack.state_dir,
            aws_endpoint_url=server.endpoint,
            event_table=TABLE,
            task_queue=f"calendar-{uuid4().hex[:8]}",
        )
    server.kill()


@pytest.fixture(scope="module")
def account(settings: Settings) -> Account:
    account = Account(str(settings.aws_endpoint_url))
    account.event_table(TABLE)
    return account


class Lab:
    """The service, the fakes around the workflows, and the sync, run when it is asked for."""

    def __init__(
        self, service: OpsService, fakes: FakeEvents, token: str, account: Account, settings: Settings
    ) -> None:
        self.service = service
        self.fakes = fakes
        self.token = token
        self.dynamodb = account.client("dynamodb")
        self.settings = settings

    async def sync(self) -> CalendarSynced:
        client = self.service._client
        handle = await client.start_workflow(
            CALENDAR_SYNC_WORKFLOW,
            id=f"sync-{uuid4()}",
            task_queue=self.settings.task_queue,
            result_type=CalendarSynced,
        )
        result: CalendarSynced = await handle.result()
        return result

    async def until(self, event_id: str, what: Any) -> EventRecord:
        give_up_at = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while True:
            with suppress(OpsError):  # not started yet
                record = (await self.service.follow_event(event_id)).record
                if what(record):
                    return record
            assert asyncio.get_running_loop().time() < give_up_at, f"it never came true of {event_id}"
            await asyncio.sleep(0.05)

    async def followed(self, *, without: str = "") -> set[str]:
        """Ids of running event workflows, once visibility has them and no more of `without`."""
        give_up_at = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while True:
            query = "WorkflowType = 'EventPreProvisioningWorkflow' AND ExecutionStatus = 'Running'"
            found = {execution.id async for execution in self.service._client.list_workflows(query)}
            if f"event-{without}" not in found:
                return found
            assert asyncio.get_running_loop().time() < give_up_at
            await asyncio.sleep(0.05)

    async def rows(self) -> dict[str, CalendarEvent]:
        return {event.event_id: event for event in (await self.service.list_events()).events}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_lab(stack: Stack, settings: Settings, account: Account) -> AsyncIterator[Lab]:
    client = await connect(settings)
    fakes = FakeEvents()
    calendar = CalendarActivities(account.client("dynamodb"), table=TABLE)
    cloudwatch = CloudWatchActivities(account.client("cloudwatch"), ecs_cluster="c", ecs_service="s")
    by_name: dict[str, Any] = {}
    for method in activities_of(calendar, EventActivities(cloudwatch), fakes):  # the fakes win
        by_name[method.__temporal_activity_definition.name] = method
    with ThreadPoolExecutor(8) as threads:
        async with Worker(
            client,
            task_queue=settings.task_queue,
            workflows=[CalendarSyncWorkflow, EventPreProvisioningWorkflow],
            activities=list(by_name.values()),
            activity_executor=threads,
        ):
            token = stack.tokens[Role.ENGINEER].read_text()
            yield Lab(await OpsService.connect(settings), fakes, token, account, settings)


@pytest_asyncio.fixture(loop_scope="module")
async def lab(module_lab: Lab) -> Lab:
    """With an empty table and no event followed."""
    for event_id in await module_lab.rows():
        module_lab.dynamodb.delete_item(TableName=TABLE, Key={EVENT_TABLE_KEY: {"S": event_id}})
    for workflow_id in await module_lab.followed():
        with suppress(RPCError):  # the list is behind: it has ended by itself
            await module_lab.service._client.get_workflow_handle(workflow_id).terminate()
    module_lab.fakes.calls.clear()
    return module_lab


def given(**more: str) -> dict[str, str]:
    return {"type": "monday_release", "start": TEXT, **more}


async def test_an_entry_is_followed_moved_and_given_up_as_its_row_says(lab: Lab) -> None:
    event_id = f"e-{uuid4().hex[:8]}"
    added = await lab.service.add_event(lab.token, given(event_id=event_id, multiplier="3"))
    assert added.event.asked_by == "engineer@example.com"
    assert event_id in (await lab.sync()).summary
    record = await lab.until(event_id, lambda record: record.times)
    assert record.event.multiplier == 3
    give_up_at = asyncio.get_running_loop().time() + PATIENCE_SECONDS
    while await lab.followed() != {f"event-{event_id}"}:  # the list is behind
        assert asyncio.get_running_loop().time() < give_up_at

    later = (START + timedelta(days=1)).isoformat()
    await lab.service.edit_event(lab.token, event_id, {"multiplier": "4", "start": later})
    await lab.sync()
    record = await lab.until(event_id, lambda record: record.event.multiplier == 4)
    assert record.event.starts_at == START + timedelta(days=1)
    assert "changed" not in (await lab.sync()).summary  # told once: its memo says what it follows

    await lab.service.remove_event(lab.token, event_id)
    await lab.sync()
    record = await lab.until(event_id, lambda record: record.phase is EventPhase.WITHDRAWN)
    assert record.outcome == "given up: its row is gone from the calendar"


async def test_a_proposal_counts_once_it_is_accepted(lab: Lab) -> None:
    event_id = f"p-{uuid4().hex[:8]}"
    event = (await lab.service.add_event(lab.token, given(event_id=event_id))).event
    lab.dynamodb.put_item(TableName=TABLE, Item=event.model_copy(update={"status": EventStatus.PROPOSED}).to_item())
    await lab.sync()
    assert await lab.followed() == set()
    accepted = await lab.service.accept_event(lab.token, event_id, {"multiplier": "2"})
    assert (accepted.event.status, accepted.event.multiplier) == (EventStatus.ACCEPTED, 2)
    assert (await lab.rows())[event_id] == accepted.event
    await lab.sync()
    await lab.until(event_id, lambda record: record.times)
    with pytest.raises(OpsError, match="counts already"):
        await lab.service.accept_event(lab.token, event_id, {})


async def test_the_row_is_marked_only_while_it_says_what_was_provisioned_for(lab: Lab, account: Account) -> None:
    calendar = CalendarActivities(account.client("dynamodb"), table=TABLE)
    event = (await lab.service.add_event(lab.token, given(event_id="marked"))).event
    mark = MarkEvent(
        event_id="marked",
        starts_at=START,
        units={"sonnet": 30},
        triggered_at=START - timedelta(hours=5),
        completed_at=None,
    )
    for request in (mark, mark, mark.model_copy(update={"completed_at": START - timedelta(hours=4)})):
        assert calendar.mark_event(request)
    row = (await lab.rows())["marked"]
    assert (row.units, row.provisioning_triggered_at) == ({"sonnet": 30}, mark.triggered_at)
    assert row.provisioning_completed_at == START - timedelta(hours=4)
    # Moved by a person: what was done for the old time is forgotten, and a late mark does not come back.
    await lab.service.edit_event(lab.token, "marked", {"start": (START + timedelta(days=7)).isoformat()})
    row = (await lab.rows())["marked"]
    assert (row.units, row.provisioning_triggered_at, row.provisioning_completed_at) == ({}, None, None)
    assert not calendar.mark_event(mark)
    await lab.service.remove_event(lab.token, "marked")
    assert not calendar.mark_event(mark)
    assert event.event_id not in await lab.rows()


async def test_what_is_wrong_is_paged_once_by_the_schedules_runs(lab: Lab) -> None:
    item = (await lab.service.add_event(lab.token, given(event_id="wild"))).event.to_item()
    lab.dynamodb.put_item(TableName=TABLE, Item={**item, "multiplier": {"N": "1000"}})
    client = lab.service._client
    schedule = ScheduledWorkflow(
        CALENDAR_SCHEDULE, CALENDAR_SYNC_WORKFLOW, every=timedelta(seconds=1), catch_up=timedelta(seconds=10), note="x"
    )
    await ensure_schedules(client, [schedule], lab.settings.task_queue)
    try:
        give_up_at = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while (await client.get_schedule_handle(CALENDAR_SCHEDULE).describe()).info.num_actions < 4:
            assert asyncio.get_running_loop().time() < give_up_at
            await asyncio.sleep(0.1)
        [page] = lab.fakes.asked("page")
        assert "multiplier: '1000' is not allowed: from 1 (calendar.min_multiplier) to 10" in page.text
        changed = await lab.service.edit_event(lab.token, "wild", {"multiplier": "2"})
        assert changed.message.endswith("pre-provisioning is told now")
        await lab.until("wild", lambda record: record.event.multiplier == 2)
    finally:
        await client.get_schedule_handle(CALENDAR_SCHEDULE).delete()


async def test_one_event_that_cannot_be_told_does_not_keep_the_others_from_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Client.start_workflow

    async def refuses(client: Client, *args: Any, **more: Any) -> Any:
        if more["id"] == "event-a-bad-one":
            raise ApplicationError("no such thing", type=ErrorKind.INVALID, non_retryable=True)
        return await start(client, *args, **more)

    monkeypatch.setattr(Client, "start_workflow", refuses)
    for event_id in ("a-bad-one", "b-good-one"):
        item = (await lab.service.add_event(lab.token, given(event_id="x"))).event.to_item()
        await lab.service.remove_event(lab.token, "x")
        lab.dynamodb.put_item(TableName=TABLE, Item={**item, "event_id": {"S": event_id}})
    await lab.sync()
    await lab.until("b-good-one", lambda record: True)
    [page] = lab.fakes.asked("page")
    assert page.text.startswith("a-bad-one (monday_release, 4x, ")
    assert page.text.endswith(" could not be handed to its workflow: no such thing. The next sync tries again")


async def test_a_table_full_of_nonsense_is_no_storm_of_pages(lab: Lab) -> None:
    item = (await lab.service.add_event(lab.token, given(event_id="z"))).event.to_item()
    for number in range(MOST_PAGES + 2):
        bad = {"event_id": {"S": f"bad-{number}"}, "multiplier": {"N": "1000"}}
        lab.dynamodb.put_item(TableName=TABLE, Item={**item, **bad})
    synced = await lab.sync()
    texts = [page.text for page in lab.fakes.asked("page")]
    assert len(texts) == MOST_PAGES + 1
    assert texts[-1] == "calendar: 2 more rows need a person; the details of this calendar-sync run name each"
    assert len(synced.told) == MOST_PAGES + 3


CSV = f"""event_id,type,start,zone,multiplier,models
good-1,monday_release,{TEXT},,4,sonnet
good-2,final_chapter,{(START + timedelta(days=3)).isoformat()},,,"sonnet,haiku"
"""
ICS = f"""BEGIN:VCALENDAR
VERSION:2.0
PRODID:-//publisher//releases//EN
BEGIN:VEVENT
UID:good-3@publisher
SUMMARY:最終回の配信
CATEGORIES:final_chapter
DTSTART;TZID=Asia/Tokyo:{START.astimezone(UTC) + timedelta(hours=9):%Y%m%dT%H%M%S}
END:VEVENT
BEGIN:VEVENT
UID:{{second}}
DTSTART:{START:%Y%m%dT%H%M%SZ}
{{more}}
END:VEVENT
END:VCALENDAR
"""
ICS_OF_A_DAY = ICS.format(second="x", more="").replace(f"DTSTART:{START:%Y%m%dT%H%M%SZ}", "DTSTART:20300107")
ICS_OF_NOWHERE = ICS.format(second="x", more="").replace("=Asia/Tokyo", "=Asia/Nowhere")


async def test_a_file_is_imported_whole_and_again_without_effect(lab: Lab) -> None:
    ics = ICS.format(second="good-4", more="X-RUNBOOKS-MULTIPLIER:2.5").replace("\n", "\r\n").encode()
    files = ("a.csv", CSV.encode(), {"good-1", "good-2"}), ("b.ics", ics, {"good-3@publisher", "good-4"})
    for name, content, ids in files:
        imported = await lab.service.import_events(lab.token, name, content, {"type": "monday_release"}, skip_bad=False)
        assert imported.bad == []
        assert {event.event_id for event in imported.added} == ids
        again = await lab.service.import_events(lab.token, name, content, {"type": "monday_release"}, skip_bad=False)
        assert (again.added, set(again.there_already)) == ([], ids)
    rows = await lab.rows()
    assert {rows[name].starts_at for name in ("good-1", "good-3@publisher", "good-4")} == {START}
    assert (rows["good-2"].multiplier, rows["good-3@publisher"].type) == (5, "final_chapter")
    assert (rows["good-4"].multiplier, rows["good-4"].type) == (2.5, "monday_release")
    assert rows["good-3@publisher"].source == "b.ics: 最終回の配信"


@pytest.mark.parametrize(
    ("name", "content", "line", "field", "allowed"),
    [
        ("a.csv", CSV + f"bad,monday_release,{TEXT},,1000,sonnet\n", 4, "multiplier", "from 1"),
        ("a.csv", CSV + "bad,monday_release,2027-01-04T00:00,,4,sonnet\n", 4, "start", "it has no zone"),
        ("a.csv", CSV + "bad,monday_release\n", 4, "row", "6 cells"),
        ("a.csv", CSV + f"good-1,monday_release,{TEXT},,3,sonnet\n", 4, "event_id", "planned otherwise"),
        ("b.ics", ICS.format(second="x", more="RRULE:FREQ=WEEKLY"), 10, "RRULE", "does not repeat"),
        ("b.ics", ICS.format(second="x y", more=""), 10, "event_id", "letters, digits"),
        ("b.ics", ICS_OF_A_DAY, 10, "DTSTART", "a time as well"),
        ("b.ics", ICS_OF_A_DAY.replace("20300107", "soon"), 10, "DTSTART", "like 20261130T000000"),
        ("b.ics", ICS_OF_NOWHERE, 4, "zone", "there is no time zone"),
    ],
)  # fmt: skip
async def test_a_bad_row_names_line_field_value_and_what_is_allowed_and_nothing_is_imported(
    lab: Lab, name: str, content: str, line: int, field: str, allowed: str
) -> None:
    usual = {"type": "monday_release"}
    imported = await lab.service.import_events(lab.token, name, content.encode(), usual, skip_bad=False)
    [bad] = imported.bad
    assert (bad.line, bad.field) == (line, field)
    assert allowed in bad.allowed
    assert await lab.rows() == {}
    imported = await lab.service.import_events(lab.token, name, content.encode(), usual, skip_bad=True)
    assert len(imported.added) == len(await lab.rows()) == (2 if name == "a.csv" else 1)


@pytest.mark.parametrize(
    ("name", "content", "allowed"),
    [
        ("a.txt", b"", "end with .ics or .csv"),
        ("a.csv", b"", "at least one row"),
        ("a.csv", b"colour\nred\n", "event_id, type, start"),
        ("a.csv", b"\xff\xfe", "text in UTF-8"),
        ("a.ics", b"BEGIN:VCALENDAR\nfoo\n", "an iCalendar file"),
        ("a.ics", b"BEGIN:VCALENDAR\nEND:VCALENDAR\n", "at least one VEVENT"),
    ],
)
async def test_what_is_no_calendar_file_is_refused(lab: Lab, name: str, content: bytes, allowed: str) -> None:
    with pytest.raises(OpsError) as error:
        await lab.service.import_events(lab.token, name, content, {}, skip_bad=True)
    assert error.value.exit_code is ExitCode.USAGE
    assert error.value.not_allowed is not None
    assert error.value.not_allowed.field in ("file", "column")
    assert allowed in error.value.not_allowed.allowed


async def test_only_an_engineer_may_and_what_is_not_there_is_said(lab: Lab, stack: Stack) -> None:
    viewer = stack.tokens[Role.VIEWER].read_text()
    with pytest.raises(OpsError, match="may not change the calendar") as error:
        await lab.service.add_event(viewer, given())
    assert error.value.exit_code is ExitCode.DENIED
    with pytest.raises(OpsError) as error:
        await lab.service.remove_event(lab.token, "nothing")
    assert error.value.exit_code is ExitCode.NOT_FOUND
    await lab.service.add_event(lab.token, given(event_id="twice"))
    with pytest.raises(OpsError, match="already"):
        await lab.service.add_event(lab.token, given(event_id="twice", multiplier="2"))
    with pytest.raises(OpsError) as error:
        await lab.service.edit_event(lab.token, "twice", {"multiplier": "0"})
    assert error.value.not_allowed is not None
    assert error.value.not_allowed.field == "multiplier"
    assert (await lab.rows())["twice"].multiplier == 4


async def test_as_a_person_types_it(lab: Lab, stack: Stack, tmp_path: Path) -> None:
    async def runbooks(*arguments: str) -> tuple[int | None, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "ops.cli", "calendar", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                **stack.process_env(),
                "COLUMNS": "200",
                "RUNBOOKS_TOKEN_FILE": str(stack.tokens[Role.ENGINEER]),
                "RUNBOOKS_AWS_ENDPOINT_URL": str(lab.settings.aws_endpoint_url),
                "RUNBOOKS_EVENT_TABLE": TABLE,
            },
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode, out.decode(), err.decode()

    local = f"{START.astimezone(UTC) + timedelta(hours=9):%Y-%m-%dT%H:%M}"
    when = ("--start", local, "--zone", "Asia/Tokyo")
    code, out, err = await runbooks("add", "--type", "monday_release", *when, "--id", "typed")
    assert (code, err) == (0, "")
    assert out.startswith("typed added (monday_release, 4x from ")
    code, out, err = await runbooks("edit", "typed", "--multiplier", "1000", "--json")
    assert code == ExitCode.USAGE
    assert json.loads(out)["error"]["not_allowed"]["field"] == "multiplier"
    (tmp_path / "bad.csv").write_text("type,start\nmonday_release,soon\n")
    code, out, err = await runbooks("import", str(tmp_path / "bad.csv"))
    assert code == ExitCode.USAGE
    assert "bad.csv:2: start: 'soon' is not allowed: give date and time" in err
    code, out, err = await runbooks("list")
    assert code == 0
    assert "typed" in out
    assert "planned" in out
