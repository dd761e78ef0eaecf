"""What provisioned units cost, and from which load on they pay."""

from datetime import UTC, date, datetime, timedelta

import pytest

from domain.capacity import Situation
from domain.clock import RehearsalClock
from domain.cost import Meter, breakeven_tokens_per_second, breakevens
from domain.fleet import Spell
from domain.policy import Policy

POLICY = Policy()
SONNET = POLICY.models["sonnet"]
NOW = datetime(2026, 11, 24, 14, 0, tzinfo=UTC)  # 23:00 in Tokyo
HOUR = timedelta(hours=1)


@pytest.mark.parametrize(("units", "tokens_per_second"), [(8, 4250), (11, 5844), (20, 10626)])
def test_the_breakeven_depends_on_the_units(units: int, tokens_per_second: float) -> None:
    """Design check 5: the runbook's one figure of 5,000 would do for nine units or so."""
    found = breakeven_tokens_per_second(units, SONNET)
    assert found == pytest.approx(tokens_per_second, abs=1)


def test_each_window_has_its_breakeven_and_none_without_a_price() -> None:
    assert [(x.window, x.units, round(x.tokens_per_second or 0)) for x in breakevens(POLICY, "sonnet")] == [
        ("02:00 to 06:00", 0, 0),
        ("06:00 to 12:00", 5, 2657),
        ("12:00 to 17:00", 8, 4250),
        ("17:00 to 02:00", 15, 7970),
    ]
    assert breakevens(Policy(timetable=None), "sonnet") == ()
    assert breakeven_tokens_per_second(5, SONNET.model_copy(update={"usd_per_million_tokens": None})) is None


def meter(clock: RehearsalClock | None = None) -> Meter:
    clock = clock or RehearsalClock()
    situation = Situation(
        model="sonnet",
        spec=SONNET,
        policy=POLICY.capacity,
        timetable=POLICY.timetable,
        clock=clock,
        now=clock.real(NOW),
        fleet=(),
    )
    return Meter(situation)


def test_an_hour_that_was_begun_is_paid_on_the_day_it_began_in_the_timetables_zone() -> None:
    long = Spell(5, NOW - 3 * HOUR, NOW + timedelta(hours=2, minutes=1))
    short = Spell(2, NOW, NOW + timedelta(minutes=1))
    assert meter().unit_hours([long, short]) == 5 * 6 + 2
    assert meter().by_day([long, short]) == {date(2026, 11, 24): 5 * 4 + 2, date(2026, 11, 25): 5 * 2}
    old = Spell(1, NOW - timedelta(days=30), NOW)
    assert meter().by_day([old]) == {date(2026, 11, 24): 23}


def test_a_rehearsal_pays_by_the_business_clock() -> None:
    clock = RehearsalClock(real_start=datetime(2030, 1, 1, tzinfo=UTC), business_start=NOW, speed=60)
    spell = Spell(3, clock.real_start, clock.real_start + timedelta(minutes=2, seconds=30))
    assert meter(clock).by_day([spell]) == {date(2026, 11, 24): 3, date(2026, 11, 25): 6}
