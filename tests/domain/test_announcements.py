"""Announcements: recognised in Japanese and English, dated in Tokyo, proposed once."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError

from domain.announcements import FeedEntry, FeedRead, FeedReport, Recognise, details, page_text, recognise
from domain.calendar import EventStatus
from domain.clock import RehearsalClock
from domain.messages import PolicySnapshot
from domain.policy import FeedPolicy, Policy

TOKYO = ZoneInfo("Asia/Tokyo")
NOW = datetime(2026, 11, 24, 5, tzinfo=UTC)
SNAPSHOT = PolicySnapshot(policy=Policy(), clock=RehearsalClock())


def entry(title: str, summary: str = "", guid: str = "1", published: datetime | None = NOW) -> FeedEntry:
    return FeedEntry(guid=guid, title=title, summary=summary, link="https://example.com/1", published=published)


def run(*entries: FeedEntry, before: FeedReport | None = None, problem: str = "") -> FeedReport:
    read = FeedRead(entries=entries, problem=problem)
    return recognise(Recognise(read=read, snapshot=SNAPSHOT, now=NOW, before=before))


@pytest.mark.parametrize(
    ("title", "summary", "event_type", "start"),
    [
        ("『海の王』最終回は12月7日発売号に掲載", "", "final_chapter", "2026-12-07T00:00"),
        ("『海の王』ついに完結", "2026年12月7日(月)午前0時配信", "final_chapter", "2026-12-07T00:00"),
        ("新連載スタート！ １２／７（月）", "", "new_series", "2026-12-07T00:00"),
        ("新連載『星』", "<b>12月14日 25時30分</b>から", "new_series", "2026-12-15T01:30"),
        ("冬の特別号", "発売日は2026/12/21 10:00です", "special_issue", "2026-12-21T10:00"),
        ("増刊のお知らせ", "1月5日発売", "special_issue", "2027-01-05T00:00"),
        ("The final chapter of King of the Sea arrives December 7th, 2026", "", "final_chapter", "2026-12-07T00:00"),
        ("New series announced", "It starts on 14 Dec.", "new_series", "2026-12-14T00:00"),
        ("SPECIAL  ISSUE", "special issue, out May 3", "special_issue", "2027-05-03T00:00"),
        ("完結記念", "11月2日の発表によると、12月7日に最終回", "final_chapter", "2026-12-07T00:00"),
        ("最終回", "2027年2月29日、いや2月28日", "final_chapter", "2027-02-28T00:00"),
    ],
)
def test_an_announcement_becomes_a_proposal(title: str, summary: str, event_type: str, start: str) -> None:
    [proposal] = run(entry(title, summary)).proposed
    event = proposal.event
    assert (event.type, event.status) == (event_type, EventStatus.PROPOSED)
    assert not event.counts
    assert event.starts_at == datetime.fromisoformat(start).replace(tzinfo=TOKYO)
    kind = SNAPSHOT.policy.calendar.event_types[event_type]
    assert (event.multiplier, event.lead_time) == (kind.multiplier, kind.lead_time)
    assert set(event.models) == {"sonnet", "haiku"}
    assert "https://example.com/1" in event.source


@pytest.mark.parametrize(
    "title",
    ["今週の人気投票 12月7日", "Chapter 1/2 of 12/7 is out", "", "<script>alert(1)</script>", "\x00" * 100],
)
def test_other_news_is_none(title: str) -> None:
    assert run(entry(title, guid="x")).proposed == ()


def test_without_a_date_to_come_it_is_only_shown() -> None:
    report = run(
        entry("最終回、本日掲載"),
        entry("完結 11月2日", guid="2"),
        entry("最終回 13月40日", guid="3"),
        entry("New series of 1/2 size", guid="4"),
    )
    assert report.proposed == ()
    assert len(report.undated) == 4
    assert "最終回、本日掲載" in details(report)


def test_the_entry_s_own_date_counts_when_it_is_to_come() -> None:
    [proposal] = run(entry("最終回", published=NOW + timedelta(days=3))).proposed
    assert proposal.event.starts_at == NOW + timedelta(days=3)
    assert "the entry's own" in proposal.note


def test_what_is_doubtful_is_said() -> None:
    [proposal] = run(entry("最終回 12/7(火)", "あるいは12月8日")).proposed
    assert "the text says 火" in proposal.note
    assert "2026-12-08" in proposal.note


def test_the_same_is_proposed_once_and_a_moved_date_anew() -> None:
    first = run(entry("最終回 12月7日"))
    again = run(entry("最終回 12月7日", "あらすじ"), before=first)
    assert again.proposed == ()
    assert again.known == first.known
    broken = run(before=again, problem="away")
    assert broken.known == first.known
    assert run(entry("最終回 12月7日"), before=broken).proposed == ()
    moved = run(entry("最終回 12月14日"), before=again)
    assert [proposal.event.starts_at.day for proposal in moved.proposed] == [14]
    twice = run(entry("最終回 12月7日"), entry("最終回 12月7日"))
    assert len(twice.proposed) == 1


def test_people_are_told_of_proposals_and_once_of_a_feed_that_stays_away() -> None:
    policy = FeedPolicy()
    report = run(entry("『海の王』最終回 12月7日"))
    assert f"runbooks calendar accept {report.proposed[0].event.event_id}" in page_text(report, policy)
    assert page_text(run(entry("今週号")), policy) == ""
    texts = []
    for _ in range(4):
        report = run(before=report, problem="no answer")
        texts.append(page_text(report, policy))
    assert [bool(text) for text in texts] == [False, True, False, False]


def test_text_from_outside_stays_inert() -> None:
    report = run(entry("最終回 12月7日 [click](http://x) `code` # <img>\n# heading"))
    assert "`最終回 12月7日 [click](http://x) 'code' # <img> # heading`" in details(report)


@pytest.mark.parametrize(
    ("feed", "why"),
    [
        ({"url": "ftp://example.com/feed"}, "https?"),
        ({"zone": "Asia/Tokio"}, "did you mean Asia/Tokyo"),
        ({"max_bytes": 0}, "greater than or equal to 1"),
        ({"rules": [{"event_type": "finale", "words": ["x"]}]}, "no event type 'finale'"),
        ({"rules": [{"event_type": "new_series", "words": []}]}, "at least 1 item"),
    ],
)
def test_a_feed_that_cannot_be_is_refused(feed: dict[str, object], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Policy.model_validate({"feed": feed})
