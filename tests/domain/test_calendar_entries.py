"""What people give for an entry of the calendar, checked field by field before it becomes a row."""

from datetime import UTC, datetime, timedelta

import pytest

from domain.calendar import (
    CalendarEvent,
    EntryError,
    EventStatus,
    check_planned,
    check_sold,
    duration_of,
    duration_text,
    entry,
    events_of,
    moment_of,
)
from domain.policy import Policy

POLICY = Policy()
NOW = datetime(2026, 11, 24, 3, tzinfo=UTC)
GIVEN = {"type": "monday_release", "start": "2026-11-30T00:00", "zone": "Asia/Tokyo"}


def entered(_policy: Policy = POLICY, /, **given: str) -> CalendarEvent:
    return entry({**GIVEN, **given}, policy=_policy, now=NOW, asked_by="content-ops")


def with_model(name: str, **changes: object) -> Policy:
    models = {**POLICY.models, name: POLICY.models["sonnet"].model_copy(update=changes)}
    return POLICY.model_copy(update={"models": models})


def test_what_is_left_out_is_the_types_or_the_policys() -> None:
    event = entered()
    assert event.event_id == "monday_release-2026-11-30T0000"
    assert event.starts_at.isoformat() == "2026-11-30T00:00:00+09:00"
    assert (event.multiplier, event.lead_time, event.models) == (4, timedelta(hours=4), ("sonnet", "haiku"))
    assert (event.asked_by, event.source) == ("content-ops", "by hand, content-ops")
    assert event.counts
    given = entered(
        event_id="x",
        multiplier="3.5x",
        models=" sonnet, sonnet",
        lead_time="2h30m",
        source="the publisher",
        zone=" Asia/Tokyo",
    )
    assert (given.event_id, given.multiplier, given.models) == ("x", 3.5, ("sonnet",))
    assert given.lead_time == timedelta(hours=2, minutes=30)


@pytest.mark.parametrize(
    ("given", "field", "allowed"),
    [
        ({"multiplier": "0"}, "multiplier", "from 1 (calendar.min_multiplier) to 10"),
        ({"multiplier": "-3"}, "multiplier", "from 1"),
        ({"multiplier": "1000"}, "multiplier", "from 1"),
        ({"multiplier": "nan"}, "multiplier", "from 1"),
        ({"multiplier": "inf"}, "multiplier", "from 1"),
        ({"multiplier": "four"}, "multiplier", "a number like 4"),
        ({"start": "2026-11-24T11:59"}, "start", "later than 2026-11-24T12:00+09:00, which is now"),
        ({"start": "Monday"}, "start", "like 2026-11-30T00:00"),
        ({"start": "9999-12-31T23:59"}, "start", "a year from 2000 to 2999"),
        ({"zone": ""}, "start", "it has no zone"),
        ({"zone": "Asia/Tokio"}, "zone", "did you mean Asia/Tokyo"),
        ({"zone": "Mars/Olympus"}, "zone", "there is no time zone 'Mars/Olympus'"),
        ({"start": "2027-03-14T02:30", "zone": "America/New_York"}, "start", "skip it"),
        ({"start": "2027-11-07T01:30", "zone": "America/New_York"}, "start", "its offset, -04:00 or -05:00"),
        ({"start": "2026-11-30T00:00+00:00"}, "start", "its offset is not that of Asia/Tokyo then, which is +09:00"),
        ({"models": "opus"}, "models", "there are haiku, sonnet"),
        ({"lead_time": "5m"}, "lead_time", "from 30m (calendar.verify_margin) to 24h"),
        ({"lead_time": "25h"}, "lead_time", "from 30m"),
        ({"lead_time": "soon"}, "lead_time", "like 45m, 2h or 1h30m"),
        ({"type": "mondayrelease"}, "type", "did you mean monday_release?"),
        ({"type": ""}, "type", "there are final_chapter, monday_release"),
        ({"event_id": "a b"}, "event_id", "letters, digits"),
        ({"event_id": "x" * 151}, "event_id", "1 to 150"),
        ({"source": "incident-x"}, "source", "not begun with 'incident-'"),
        ({"colour": "red"}, "colour", "there is no such field"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_names_field_value_and_what_is(given: dict[str, str], field: str, allowed: str) -> None:
    with pytest.raises(EntryError) as error:
        entered(**given)
    assert error.value.field == field
    assert str(error.value.value) in (*given.values(), GIVEN["start"])
    assert allowed in error.value.allowed


def test_an_hour_shown_twice_is_told_apart_by_its_offset() -> None:
    first = moment_of("2027-11-07T01:30-04:00", "America/New_York")
    second = moment_of("2027-11-07T01:30-05:00", "America/New_York")
    assert second - first == timedelta(hours=1)
    assert moment_of("2026-11-30T00:00+09:00", None).utcoffset() == timedelta(hours=9)


def test_a_model_that_cannot_have_units_or_a_forecast_is_refused() -> None:
    with pytest.raises(EntryError, match=r"models.new.quota_units is 0"):
        entered(
            with_model("new", quota_units=0).model_copy(
                update={
                    "forecast": POLICY.forecast.model_copy(
                        update={"tokens_per_second": {**POLICY.forecast.tokens_per_second, "new": (1.0,) * 24}}
                    )
                }
            ),
            models="new",
        )
    with pytest.raises(EntryError, match=r"no load to expect on it \(forecast.tokens_per_second\)"):
        entered(with_model("new"), models="new")


def test_what_stands_in_the_table_is_checked_by_the_same_rules() -> None:
    event = entered()
    later = {"event_id": {"S": "date to be told"}, "starts_at": {"S": "9999-12-31T23:59:59+00:00"}}
    events, broken = events_of([{**event.to_item(), **later}, event.to_item()])
    assert events == [event], "hours after it cannot be reckoned with, and those of other rows can"
    assert "a year from 2000 to 2999 is allowed" in broken["date to be told"]
    check_planned(event, POLICY)
    for change in ({"multiplier": 1000.0}, {"models": ("opus",)}, {"lead_time": timedelta(0)}, {"type": "x"}):
        with pytest.raises(EntryError):
            check_planned(event.model_copy(update=change), POLICY)


def test_models_that_the_region_does_not_sell_are_refused() -> None:
    event, sold = entered(), {"provisioned_regions": ("us-east-1", "us-west-2")}
    sonnet = POLICY.models["sonnet"].model_copy(update=sold)
    policy = POLICY.model_copy(update={"models": {**POLICY.models, "sonnet": sonnet}})
    check_sold(event, POLICY, "ap-northeast-1")
    check_sold(event, policy, "us-east-1")
    with pytest.raises(EntryError, match=r"models: 'sonnet' .* not sold in ap-northeast-1 but in us-east-1, us-west-2"):
        check_sold(event, policy, "ap-northeast-1")


def test_only_accepted_rows_count_and_none_that_an_incident_taught() -> None:
    event = entered()
    assert not event.model_copy(update={"status": EventStatus.PROPOSED}).counts
    assert not event.model_copy(update={"source": "incident-bedrock-throttle:sonnet"}).counts
    item = event.to_item()
    assert CalendarEvent.from_item({name: value for name, value in item.items() if name != "status"}).counts
    events, broken = events_of([item, {**item, "event_id": {"S": "b"}, "status": {"S": "maybe"}}])
    assert events == [event]
    assert "calendar row 'b': status" in broken["b"]


def test_the_fingerprint_follows_the_plan_and_nothing_else() -> None:
    event = entered()
    utc, models = event.starts_at.astimezone(UTC), ("haiku", "sonnet")
    same = event.model_copy(update={"starts_at": utc, "units": {"sonnet": 30}, "source": "x", "models": models})
    assert same.fingerprint == event.fingerprint
    for change in ({"multiplier": 3.0}, {"models": ("sonnet",)}, {"lead_time": timedelta(hours=3)}, {"type": "x"}):
        assert event.model_copy(update=change).fingerprint != event.fingerprint


@pytest.mark.parametrize("text", ["45m", "2h", "1h30m", "24h"])
def test_durations_are_written_as_they_are_read(text: str) -> None:
    assert duration_text(duration_of(text)) == text
