"""The publisher's feed from its schedule to the calendar: proposed once, told once, and no proposal counts."""

import json
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from temporalio.client import Client
from temporalio.worker import Worker

from activities.calendar import CalendarActivities
from activities.feed import FeedActivities
from activities.pages import PageActivities
from activities.schedules import ScheduledWorkflow
from activities.settings import SettingsActivities
from domain.announcements import PUBLISHER_FEED_WORKFLOW, FeedReport
from domain.calendar import EVENT_TABLE_KEY, CalendarEvent
from domain.clock import RehearsalClock
from domain.policy import FeedPolicy
from ops.health import run_now
from tests.aws_account import Account
from tests.scheduled import replays
from tests.servers import AwsServer, TemporalServer
from tests.workflows.fakes import activities_of
from workers.clients import AwsClients
from workers.settings import Settings
from workers.temporal import connect
from workflows.publisher_feed import PublisherFeedWorkflow

TABLE = "events"


class Publisher(ThreadingHTTPServer):
    """Serves the items as they are now."""

    daemon_threads = True
    items: tuple[str, ...] = ()
    broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            publisher = self.server
            assert isinstance(publisher, Publisher)
            items = "".join(f"<item><guid>{n}</guid><title>{t}</title></item>" for n, t in enumerate(publisher.items))
            self.send_response(500 if publisher.broken else 200)
            self.end_headers()
            self.wfile.write(f'<rss version="2.0"><channel>{items}</channel></rss>'.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with Publisher(("127.0.0.1", 0), Publisher.Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = AwsServer(tmp_path).start()
    account = Account(server.endpoint)
    account.event_table(TABLE)
    yield account
    server.kill()


@dataclass
class Stack:
    client: Client
    account: Account
    log: Path
    schedule_id: str = field(default_factory=lambda: f"feed-{uuid4()}")

    async def run(self) -> FeedReport:
        return await run_now(self.client, self.schedule_id, FeedReport, timedelta(seconds=40))

    def rows(self) -> list[CalendarEvent]:
        items = self.account.client("dynamodb").scan(TableName=TABLE)["Items"]
        return [CalendarEvent.from_item(item) for item in items]

    def pages(self) -> list[str]:
        return [json.loads(line)["text"] for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
async def stack(
    tmp_path: Path, temporal: TemporalServer, account: Account, publisher: Publisher
) -> AsyncIterator[Stack]:
    policy = tmp_path / "policy.yaml"
    feed = FeedPolicy(url=publisher.url, allowed_hosts=("127.0.0.1",))
    policy.write_text(json.dumps({"feed": feed.model_dump(mode="json")}))
    settings = Settings(
        temporal_address=temporal.address, aws_endpoint_url=account.endpoint_url, task_queue=f"feed-{uuid4()}"
    )
    client, aws = await connect(settings), AwsClients(settings)
    stack = Stack(client, account, tmp_path / "pages.jsonl")
    tools = activities_of(
        FeedActivities(),
        CalendarActivities(aws.dynamodb(), table=TABLE),
        PageActivities(aws.sns(), topic_arn=None, log=stack.log),
        SettingsActivities(policy_file=policy, roster_file=None, clock=RehearsalClock()),
    )
    seldom = timedelta(days=1000)  # never but when the test asks for it
    item = ScheduledWorkflow(
        stack.schedule_id, PUBLISHER_FEED_WORKFLOW, every=seldom, catch_up=seldom, note="Read the feed"
    )
    with ThreadPoolExecutor(10) as threads:
        async with Worker(
            client,
            task_queue=settings.task_queue,
            workflows=[PublisherFeedWorkflow],
            activities=tools,
            activity_executor=threads,
        ):
            handle = await client.create_schedule(stack.schedule_id, item.schedule(settings.task_queue))
            yield stack
            await handle.delete()


async def test_what_is_announced_is_proposed_once(stack: Stack, publisher: Publisher) -> None:
    publisher.items = ("『海の王』最終回 2099年12月7日", "今週の人気投票")
    report = await stack.run()
    [row] = stack.rows()
    assert (row.type, row.counts) == ("final_chapter", False)
    assert [proposal.event for proposal in report.proposed] == [row]
    [page] = stack.pages()
    assert f"runbooks calendar accept {row.event_id}" in page

    # Accepted by a person, then read again: the row stays as the person left it.
    accepted = row.model_copy(update={"status": "accepted", "multiplier": 6})
    stack.account.client("dynamodb").put_item(TableName=TABLE, Item=accepted.to_item())
    assert (await stack.run()).proposed == ()
    assert [(known.counts, known.multiplier) for known in stack.rows()] == [(True, 6)]

    # Removed by a person: not proposed again either, also after the feed was away, of which people are told once.
    stack.account.client("dynamodb").delete_item(TableName=TABLE, Key={EVENT_TABLE_KEY: {"S": row.event_id}})
    publisher.broken = True
    for _ in range(3):
        assert "500" in (await stack.run()).problem
    publisher.broken = False
    publisher.items += ("新連載 2099/12/21",)
    report = await stack.run()
    assert [proposal.event.type for proposal in report.proposed] == ["new_series"]
    assert [known.type for known in stack.rows()] == ["new_series"]
    assert len(stack.pages()) == 3
    assert "could not be read 2 times in a row" in stack.pages()[1]
    assert await replays(stack.client, stack.schedule_id, PublisherFeedWorkflow) == 6
