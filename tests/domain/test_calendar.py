"""The event calendar's rows."""

from datetime import datetime, timedelta

import pytest

from domain.calendar import CalendarEvent, CalendarRowError

START = datetime.fromisoformat("2026-11-30T00:00:00+09:00")
EVENT = CalendarEvent(
    event_id="monday-release-2026-11-30",
    type="monday_release",
    starts_at=START,
    multiplier=3.5,
    models=("sonnet", "haiku"),
    units={"sonnet": 15},
    lead_time=timedelta(hours=2),
    provisioning_triggered_at=START - timedelta(hours=2),
    source="publisher",
    asked_by="content-ops",
)


def test_a_row_gives_back_the_event_with_its_zone() -> None:
    item = EVENT.to_item()
    assert item["starts_at"] == {"S": "2026-11-30T00:00:00+09:00"}
    assert "provisioning_completed_at" not in item
    back = CalendarEvent.from_item({**item, "added_later": {"BOOL": True}})
    assert back == EVENT
    assert back.starts_at.utcoffset() == timedelta(hours=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multiplier": {"N": "-1"}}, "multiplier: Input should be greater than 0, got -1.0"),
        ({"starts_at": {"S": "2026-11-30T00:00:00"}}, "starts_at: Input should have timezone info"),
        ({"models": {"L": []}}, "models"),
        ({"lead_time_seconds": {"NULL": True}}, "lead_time"),
    ],
)
def test_a_bad_row_says_which_field_and_why(change: dict[str, object], message: str) -> None:
    with pytest.raises(CalendarRowError, match=r"calendar row 'monday-release-2026-11-30'") as error:
        CalendarEvent.from_item({**EVENT.to_item(), **change})
    assert message in str(error.value)
