"""Pages: a line in the notification log, and an SNS message when an on-call topic is configured."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from temporalio import activity

from domain.messages import Page

if TYPE_CHECKING:
    from types_boto3_sns.client import SNSClient

MAX_SUBJECT = 100
"""SNS allows 100 ASCII characters."""


class PageActivities:
    """Paging. A retried page may reach people twice: its `page_id` tells so."""

    def __init__(self, sns: "SNSClient", *, topic_arn: str | None, log: Path) -> None:
        self._sns = sns
        self._topic_arn = topic_arn
        self._log = log

    @activity.defn
    def page(self, page: Page) -> None:
        """Page people. The log has one line of it, written first: a page is on record even if SNS is away."""
        line = json.dumps({"at": datetime.now(UTC).isoformat(), **page.model_dump(mode="json")}, ensure_ascii=False)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a+") as log:
            log.seek(0)
            written = log.read()
            if not any(_is_of(page, entry) for entry in written.splitlines()):
                log.write("\n" * (written[-1:] not in ("", "\n")) + line + "\n")
        if self._topic_arn is not None:
            subject = f"{page.severity} {page.incident_id}".encode("ascii", "replace").decode()[:MAX_SUBJECT]
            self._sns.publish(TopicArn=self._topic_arn, Subject=subject, Message=line)


def _is_of(page: Page, entry: str) -> bool:
    if page.page_id not in entry:
        return False
    try:
        return bool(json.loads(entry)["page_id"] == page.page_id)
    except (ValueError, LookupError, TypeError):  # half a line: its writer died, or the disk was full
        return False
