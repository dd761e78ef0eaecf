"""The timetable of scenario 2: by the clocks of its zone, through midnight and daylight-saving changes."""

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from domain.clock import RehearsalClock
from domain.policy import CapacityPolicy, Policy, TimetablePolicy, TimetableWindow
from domain.timetable import boundaries, changes, demands, moment, units_at, window_at

TOKYO = ZoneInfo("Asia/Tokyo")
POLICY = Policy()
HOUR = timedelta(hours=1)


def tokyo(hour: int, minute: int = 0, day: int = 24) -> datetime:
    return datetime(2026, 11, day, hour, minute, tzinfo=TOKYO)


def window(start: str, end: str, sonnet: int = 5) -> TimetableWindow:
    return TimetableWindow(start=time.fromisoformat(start), end=time.fromisoformat(end), units={"sonnet": sonnet})


@pytest.mark.parametrize(
    ("hour", "minute", "sonnet", "haiku"),
    [
        (1, 59, 15, 5),
        (2, 0, 0, 0),
        (5, 59, 0, 0),
        (6, 0, 5, 3),
        (11, 59, 5, 3),
        (12, 0, 8, 3),
        (16, 59, 8, 3),
        (17, 0, 15, 5),
        (23, 59, 15, 5),
        (0, 0, 15, 5),
    ],
)
def test_the_windows_of_scenario_2_hold_by_default(hour: int, minute: int, sonnet: int, haiku: int) -> None:
    at = tokyo(hour, minute)
    assert (units_at(POLICY, "sonnet", at), units_at(POLICY, "haiku", at)) == (sonnet, haiku)
    assert units_at(POLICY, "sonnet", at.astimezone(UTC)) == sonnet


def test_changes_are_the_moments_from_which_other_units_are_wanted() -> None:
    assert changes(POLICY, "haiku", tokyo(3), tokyo(3, day=25)) == (
        (tokyo(6), 3),
        (tokyo(17), 5),
        (tokyo(2, day=25), 0),
    )
    assert changes(POLICY, "sonnet", tokyo(6), tokyo(12)) == ((tokyo(12), 8),)
    assert changes(POLICY, "sonnet", tokyo(6), tokyo(11)) == ()


def test_without_a_timetable_or_outside_it_the_baseline_stands_in() -> None:
    flat = Policy(timetable=None)
    assert {units_at(flat, "sonnet", tokyo(hour)) for hour in range(24)} == {15}
    assert changes(flat, "sonnet", tokyo(0), tokyo(0, day=26)) == ()
    only = Policy(timetable=TimetablePolicy(windows=(window("00:00", "00:00", 7),)))
    assert (units_at(only, "sonnet", tokyo(3)), units_at(only, "haiku", tokyo(3))) == (7, 5)


def test_demands_are_made_for_the_window_that_holds_and_those_to_come_in_real_time() -> None:
    assert POLICY.timetable is not None
    clock = RehearsalClock(real_start=datetime(2030, 1, 1, tzinfo=UTC), business_start=tokyo(0, 5), speed=60)
    made = demands(POLICY.timetable, "sonnet", clock, clock.real_start, clock.real_start + timedelta(minutes=12))
    assert [(x.units, x.start - clock.real_start, x.end - clock.real_start) for x in made] == [
        (15, timedelta(hours=-7, minutes=-5) / 60, timedelta(hours=1, minutes=55) / 60),
        (5, timedelta(hours=5, minutes=55) / 60, timedelta(hours=11, minutes=55) / 60),
        (8, timedelta(hours=11, minutes=55) / 60, timedelta(hours=16, minutes=55) / 60),
    ]
    assert {x.asked_by for x in made} == {"the timetable"}
    assert "17:00 to 02:00 Asia/Tokyo" in made[0].reason


def of(zone: str) -> TimetablePolicy:
    return TimetablePolicy(
        zone=zone, windows=(window("22:00", "02:30", 1), window("02:30", "12:00", 2), window("12:00", "22:00", 3))
    )


@pytest.mark.parametrize(
    ("zone", "day", "hours", "half_past_two"),
    [
        # Skipped: the clocks go from 02:00 to 03:00 at 01:00 UTC in Berlin, at 07:00 UTC in New York.
        ("Europe/Berlin", date(2026, 3, 29), 23, datetime(2026, 3, 29, 1, tzinfo=UTC)),
        ("America/New_York", date(2026, 3, 8), 23, datetime(2026, 3, 8, 7, tzinfo=UTC)),
        # Shown twice in Berlin: the first time counts. Not touched in New York, whose clocks repeat 01:00 to 02:00.
        ("Europe/Berlin", date(2026, 10, 25), 25, datetime(2026, 10, 25, 0, 30, tzinfo=UTC)),
        ("America/New_York", date(2026, 11, 1), 25, datetime(2026, 11, 1, 7, 30, tzinfo=UTC)),
        ("Asia/Tokyo", date(2026, 10, 25), 24, datetime(2026, 10, 24, 17, 30, tzinfo=UTC)),
    ],
)
def test_a_day_of_23_or_25_hours_has_each_window_once(
    zone: str, day: date, hours: int, half_past_two: datetime
) -> None:
    timetable, name = of(zone), ZoneInfo(zone)
    begin, end = (moment(day + timedelta(days=n), time(0), name) for n in (0, 1))
    assert (end - begin) / HOUR == hours
    found = list(boundaries(timetable, begin, end))
    assert [x.units["sonnet"] for _, x in found] == [2, 3, 1]
    assert found[0][0] == half_past_two
    assert window_at(timetable, half_past_two - timedelta(seconds=1)).units == {"sonnet": 1}
    assert window_at(timetable, half_past_two).units == {"sonnet": 2}
    if hours == 25:  # the hour that the clocks show again does not bring the window before back
        assert window_at(timetable, half_past_two + HOUR - timedelta(minutes=10)).units == {"sonnet": 2}


ZONES = ["Asia/Tokyo", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Santiago", "UTC"]


@settings(max_examples=60, deadline=None)
@given(
    zone=st.sampled_from(ZONES),
    starts=st.sets(st.integers(0, 95), min_size=1, max_size=6),
    day=st.dates(date(2026, 1, 1), date(2027, 12, 31)),
)
def test_every_moment_of_any_year_has_exactly_the_window_that_began_last(
    zone: str, starts: set[int], day: date
) -> None:
    times = [(datetime(2000, 1, 1) + n * timedelta(minutes=15)).time() for n in sorted(starts)]  # noqa: DTZ001
    windows = tuple(
        TimetableWindow(start=start, end=end, units={"sonnet": number})
        for number, (start, end) in enumerate(zip(times, [*times[1:], times[0]], strict=True))
    )
    timetable = TimetablePolicy(zone=zone, windows=windows)
    begin = moment(day, time(0), ZoneInfo(zone))
    found = list(boundaries(timetable, begin, begin + timedelta(days=3)))
    moments = [at for at, _ in found]
    assert moments == sorted(moments)
    for at, held in found:
        same = [x for other, x in found if other == at]
        assert window_at(timetable, at) == same[-1]
        local = at.astimezone(ZoneInfo(zone))
        skipped = (local - timedelta(minutes=1)).time() > local.time() or local.time() != held.start
        assert local.time() == held.start or skipped


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([("02:00", "06:00"), ("07:00", "02:00")], "none covers 06:00 to 07:00"),
        ([("02:00", "06:00"), ("06:00", "01:00")], "none covers 01:00 to 02:00"),
        ([("02:00", "07:00"), ("06:00", "02:00")], "02:00 to 07:00 and 06:00 to 02:00 overlap"),
        ([("22:00", "06:00"), ("06:00", "23:00")], "06:00 to 23:00 and 22:00 to 06:00 overlap"),
        ([("00:00", "00:00"), ("06:00", "12:00")], "overlap"),
        ([("06:00", "12:00"), ("06:00", "12:00")], "overlap"),
        ([("06:00", "12:00")], "none covers 12:00 to 06:00"),
        ([], "at least 1 item"),
    ],
)
def test_gaps_and_overlaps_are_refused_with_the_windows(windows: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TimetablePolicy(windows=tuple(window(start, end) for start, end in windows))


def refusal(**sections: object) -> str:
    with pytest.raises(ValidationError) as refused:
        Policy.model_validate(sections)
    return str(refused.value)


def day(units: dict[str, int]) -> dict[str, object]:
    return {"windows": [{"start": "00:00", "end": "00:00", "units": units}]}


def test_what_a_timetable_may_not_say_is_refused_with_field_value_and_what_is_allowed() -> None:
    assert "there is no time zone 'Asia/Tokio'; did you mean Asia/Tokyo" in refusal(timetable={"zone": "Asia/Tokio"})
    unknown = refusal(timetable=day({"opus": 3}))
    assert "00:00 to 00:00: units.opus: there is no such model; there are ['haiku', 'sonnet']" in unknown
    assert "units.sonnet: 31; 0 to 30 are allowed" in refusal(timetable=day({"sonnet": 31}))
    offset = {"windows": [{"start": "00:00+09:00", "end": "00:00", "units": {}}]}
    assert "the timetable's zone holds" in refusal(timetable=offset)
    uneven = day({"sonnet": 3}) | {}
    uneven["windows"] = [
        {"start": "00:00", "end": "12:00", "units": {"sonnet": 3}},
        {"start": "12:00", "end": "00:00", "units": {"haiku": 3}},
    ]
    assert "every window must name the same models" in refusal(timetable=uneven)
    none_granted = {name: spec.model_dump() for name, spec in POLICY.models.items()}
    none_granted["sonnet"]["quota_units"] = 0
    assert "units.sonnet: 5; 0 to 0 are allowed (floor_units; ceiling_units and quota_units)" in refusal(
        models=none_granted
    )


def test_0_units_only_where_on_demand_carries_the_window() -> None:
    """Design check 24."""
    spec = POLICY.models["sonnet"]
    little = {**POLICY.models, "sonnet": spec.model_copy(update={"on_demand_tokens_per_second": 3799})}
    words = refusal(models={name: model.model_dump() for name, model in little.items()})
    assert "02:00 to 06:00: units.sonnet: 0, but 1,900 tokens/s are to be expected then" in words
    assert "up to 1,900 of its quota of 3,799, if under 2,000" in words
    assert "12:00 to 17:00: units.sonnet: 0, but 8,500 tokens/s" in refusal(
        timetable={
            "windows": [
                {"start": "12:00", "end": "17:00", "units": {"sonnet": 0}},
                {"start": "17:00", "end": "12:00", "units": {"sonnet": 5}},
            ]
        }
    )
    forecast = {"tokens_per_second": {"haiku": [0] * 24}}
    assert "forecast.tokens_per_second has none for sonnet" in refusal(forecast=forecast)


def test_a_cap_below_what_is_planned_anyway_is_refused() -> None:
    assert "capacity.max_unit_hours_per_day: 200; at least 228 are needed, for the timetable alone" in refusal(
        capacity={"max_unit_hours_per_day": 200}
    )
    assert "capacity.max_usd_per_day: 1000; at least" in refusal(capacity={"max_usd_per_day": 1000})
    floor = POLICY.models["sonnet"].model_dump() | {"floor_units": 10}
    models = {"sonnet": floor, "haiku": POLICY.models["haiku"].model_dump()}
    assert "max_unit_hours_per_day: 239; at least 240 are needed, for floor_units 10 alone" in refusal(
        models=models, timetable=None, capacity={"max_unit_hours_per_day": 239}
    )
    with pytest.raises(ValidationError, match=r"provisioning_lead 0:05:00 must be at least provisioning_lag 0:15:00"):
        CapacityPolicy(provisioning_lead=timedelta(minutes=5))
