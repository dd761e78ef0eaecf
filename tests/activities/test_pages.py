"""Pages: one line in the log of each, whichever attempt writes it."""

import json
from pathlib import Path
from typing import Any

import pytest

from activities.pages import PageActivities
from domain.messages import Page

PAGE = Page(page_id="run-1", incident_id="incident-x", to="on-call", severity="SEV2", text="throttles")


class Sns:
    """Refuses so many messages, then takes them."""

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals
        self.sent: list[dict[str, Any]] = []

    def publish(self, **message: Any) -> None:
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("SNS is away")
        self.sent.append(message)


def pages(log: Path, sns: Sns, topic_arn: str | None = "topic") -> PageActivities:
    return PageActivities(sns, topic_arn=topic_arn, log=log)  # type: ignore[arg-type]


def test_a_retried_page_is_logged_once_and_sent(tmp_path: Path) -> None:
    log, sns = tmp_path / "state" / "pages.jsonl", Sns(refusals=1)
    with pytest.raises(ConnectionError):
        pages(log, sns).page(PAGE)
    pages(log, sns).page(PAGE)
    pages(log, sns).page(PAGE.model_copy(update={"page_id": "run-11", "text": "like run-1"}))
    assert [json.loads(line)["page_id"] for line in log.read_text().splitlines()] == ["run-1", "run-11"]
    assert [message["Subject"] for message in sns.sent] == ["SEV2 incident-x"] * 2


def test_a_line_that_was_half_written_is_written_again(tmp_path: Path) -> None:
    log = tmp_path / "pages.jsonl"
    pages(log, Sns(), None).page(PAGE)
    whole = log.read_text()
    log.write_text(whole[:-5])
    pages(log, Sns(), None).page(PAGE)
    assert json.loads(log.read_text().splitlines()[-1])["page_id"] == "run-1"
