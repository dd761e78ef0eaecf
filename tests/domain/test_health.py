"""The health check's judgement: what it finds, what it mends, whom it tells and when. Each rule broken once."""

import json
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from domain.alarms import AlarmState
from domain.capacity import Demand, DemandKind, ModelStatus
from domain.clock import RehearsalClock
from domain.health import (
    Area,
    Facts,
    Finding,
    FoundModel,
    HealthReport,
    Repair,
    ScheduleSeen,
    Severity,
    Source,
    Writer,
    details,
    headline,
)
from domain.health_rules import judge
from domain.messages import AwaitedApproval, CapacityState, Paused, PolicySnapshot
from domain.permissions import PermissionFinding
from domain.policy import HealthPolicy, Policy

TOKYO = ZoneInfo("Asia/Tokyo")
NOW = datetime(2026, 11, 24, 20, tzinfo=TOKYO)
"""Evening peak: 15 and 5 units."""
NIGHT = datetime(2026, 11, 25, 3, tzinfo=TOKYO)
"""0 units."""
SNAPSHOT = PolicySnapshot(policy=Policy(), clock=RehearsalClock())
HOUR = timedelta(hours=1)


def found(name: str, units: int, model: str | None = "sonnet", **more: Any) -> FoundModel:
    given: dict[str, Any] = {
        "arn": f"arn:{name}",
        "name": name,
        "status": "InService",
        "ours": True,
        "created_at": NOW - 5 * HOUR,
        "model": model,
        "base_model_id": "base",
    }
    return FoundModel(units=units, **{**given, **more})


FLEET = (found("s", 15), found("h", 5, "haiku"))


def world(now: datetime = NOW, fleet: tuple[FoundModel, ...] = FLEET, **states: Any) -> dict[str, Any]:
    """Facts of a healthy system with that fleet, whose writers know it and have routed all of it."""
    routes = {
        model: {item.arn: item.units for item in fleet if item.model == model and item.in_service}
        for model in ("sonnet", "haiku")
    }
    writers = {
        model: Writer(
            running=True,
            state=CapacityState(
                model=model,
                fleet=[item for item in fleet if item.model == model],
                last_reconciled_at=now - timedelta(minutes=5),
                routes=routes[model],
            ).model_copy(update=states.get(model, {})),
        )
        for model in ("sonnet", "haiku")
    }
    return {"now": now, "fleet": fleet, "routes": routes, "writers": writers, "schedules": (), "permissions": ()}


def look(before: HealthReport | None = None, snapshot: PolicySnapshot = SNAPSHOT, **facts: Any) -> HealthReport:
    return judge(Facts(**{**world(), **facts}), snapshot, before)


def only(report: HealthReport) -> Finding:
    [finding] = report.findings
    assert finding.why
    assert finding.do
    return finding


def again(report: HealthReport, **changed: Any) -> HealthReport:
    """The report as the workflow leaves it: mended, told."""
    findings = tuple(
        finding.model_copy(
            update={
                "repaired": "done" if finding.repair else "",
                "incident": finding.incident_key if finding.finding_id in report.to_tell else finding.incident,
                **changed,
            }
        )
        for finding in report.findings
    )
    return report.model_copy(update={"findings": findings})


def test_a_healthy_system_has_no_findings() -> None:
    report = look()
    assert report.findings == ()
    assert headline(report) == "Healthy"
    assert set(report.checked) == set(Area) - {Area.READING}
    # Units that are on the way in time are not missing.
    coming = (found("a", 10), found("b", 5, status="Creating", created_at=NOW - timedelta(minutes=3)), FLEET[1])
    assert look(**world(fleet=coming)).findings == ()
    # At night nothing is wanted, and what is kept for its minimum hold is no surplus.
    assert look(**world(NIGHT, ())).findings == ()
    held = (found("s", 5, created_at=NIGHT - timedelta(minutes=30)),)
    assert look(**world(NIGHT, held)).findings == ()
    # Bought ahead of the evening: not a surplus.
    early = NOW.replace(hour=16, minute=45)
    assert look(**world(early)).findings == ()


def test_missing_units_are_bought_again_first_and_told_when_they_stay_missing() -> None:
    fleet = (found("s", 8), FLEET[1])
    report = look(**world(fleet=fleet))
    short = only(report)
    assert (short.finding_id, short.severity) == ("capacity-short:sonnet", Severity.CRITICAL)
    assert short.what == "8 units of sonnet are in service, 15 are expected."
    assert "7000 tokens/s" in short.why
    assert short.repair == Repair(kind="reconcile", about="sonnet")
    assert report.to_tell == ()

    second = look(again(report), **world(NOW + timedelta(minutes=15), fleet))
    assert second.to_tell == (short.finding_id,)
    assert only(second).since == NOW
    assert only(second).incident_key == "capacity-health:sonnet"

    third = look(again(second), **world(NOW + timedelta(minutes=30), fleet))
    assert third.to_tell == ()
    assert third.open

    mended = look(again(third), **world(NOW + timedelta(minutes=45)))
    assert [finding.finding_id for finding in mended.over] == [short.finding_id]
    news = mended.over[0].news(AlarmState.OK, mended.checked_at)
    assert (news.target.key, news.change.state) == ("capacity-health:sonnet", AlarmState.OK)


@pytest.mark.parametrize(
    ("kind", "units", "expected"),
    [(DemandKind.EMERGENCY, 25, 25), (DemandKind.EMERGENCY, 10, 15), (DemandKind.FEATURE, 4, 19)],
)
def test_demands_count_as_they_combine(kind: DemandKind, units: int, expected: int) -> None:
    demand = Demand(
        demand_id="d",
        model="sonnet",
        kind=kind,
        units=units,
        start=NOW - HOUR,
        end=NOW + HOUR,
        reason="r",
        asked_by="a",
    )
    report = look(**world(fleet=(found("s", 3), FLEET[1]), sonnet={"demands": [demand]}))
    assert f"{expected} are expected" in only(report).what


def test_a_refused_order_is_told_at_once_where_units_are_missing() -> None:
    error = {"last_error": 'denied. To mend it, add to the role: {"Action": "bedrock:Create..."}'}
    report = look(**world(fleet=(found("s", 8), FLEET[1]), sonnet=error))
    assert "capacity-error:sonnet" in report.to_tell
    assert report.failed_provisioning == {"sonnet": 1, "haiku": 0}
    # Not yet missing: another try may do.
    assert look(**world(sonnet=error)).to_tell == ()


def test_creations_that_failed_or_never_end() -> None:
    failed = found("f", 5, status="Failed", failure="no capacity")
    report = look(**world(fleet=(*FLEET, failed)))
    assert only(report).what == "AWS failed to create f (5 units of sonnet): no capacity."
    assert report.failed_provisioning["sonnet"] == 1
    stuck: ModelStatus = "Creating"
    late = found("l", 7, status=stuck, created_at=NOW - HOUR)
    assert "l is in creation since" in only(look(**world(fleet=(found("s", 8), late, FLEET[1])))).what


def test_units_that_nobody_asks_for() -> None:
    report = look(**world(fleet=(*FLEET, found("extra", 2))))
    surplus = only(report)
    assert surplus.finding_id == "capacity-surplus:sonnet"
    assert surplus.what == "2 units of sonnet could go: extra."
    assert "15.34 USD an hour" in surplus.why
    # Others' and committed ones are not ours to release.
    for extra in (found("extra", 2, ours=False), found("extra", 2, committed=True)):
        assert look(**world(fleet=(*FLEET, extra))).findings == ()


def test_writers_that_ended_hang_or_wait_for_people() -> None:
    writers = {**world()["writers"], "haiku": Writer(running=False)}
    ended = {finding.finding_id: finding for finding in look(writers=writers).findings}
    assert ended.keys() == {"capacity-writer:haiku"}
    assert ended["capacity-writer:haiku"].repair == Repair(kind="start-capacity", about="haiku")
    silent = {**world()["writers"], "sonnet": Writer(running=True, unanswered="timeout")}
    mute = look(**{**world(fleet=(found("s", 25), FLEET[1])), "writers": silent})
    assert (only(mute).finding_id, mute.to_tell) == ("capacity-writer:sonnet", ())
    assert "does not answer: timeout" in only(mute).what
    hangs = look(**world(sonnet={"last_reconciled_at": NOW - 2 * HOUR, "doing": "planning"}))
    assert "is planning, and last looked 2 h ago" in only(hangs).what
    rests = look(**world(sonnet={"last_reconciled_at": NOW - 2 * HOUR, "doing": "idle"}))
    assert rests.findings == ()
    paused = look(**world(sonnet={"paused": Paused(who="eve", why="bill", since=NOW - HOUR)}))
    assert (only(paused).severity, paused.to_tell) == (Severity.NOTICE, ())
    awaited = AwaitedApproval(approval_id="a1", text="20 units cost 400 USD", asked_by="x", since=NOW, until=NOW + HOUR)
    assert "runbooks capacity approve sonnet a1" in only(look(**world(sonnet={"awaiting": [awaited]}))).do


@pytest.mark.parametrize(
    ("routes", "finding_id"),
    [
        ({"arn:s": 15, "arn:gone": 5}, "routes-stale:sonnet"),
        ({"arn:s": 10}, "routes-stale:sonnet"),
        ({}, "routes-missing:sonnet"),
        (None, "routes-missing:sonnet"),
    ],
)
def test_routes_against_what_is_in_service(routes: dict[str, int] | None, finding_id: str) -> None:
    published = {"haiku": {"arn:h": 5}} | ({} if routes is None else {"sonnet": routes})
    finding = only(look(routes=published))
    assert (finding.finding_id, finding.severity) == (finding_id, Severity.CRITICAL)
    assert finding.repair == Repair(kind="reconcile", about="sonnet")


def test_a_model_that_is_drained_is_out_of_the_routes_on_purpose() -> None:
    leaving = found("leaving", 2, created_at=NOW - timedelta(minutes=50))
    facts = world(fleet=(*FLEET, leaving), sonnet={"routes": {"arn:s": 15}})
    facts["routes"]["sonnet"] = {"arn:s": 15}
    assert look(**facts).findings == ()


def test_what_the_quota_cannot_give_is_told_ahead() -> None:
    event = Demand(
        demand_id="e",
        model="sonnet",
        kind=DemandKind.EVENT,
        units=35,
        start=NOW + timedelta(days=3),
        end=NOW + timedelta(days=4),
        reason="final chapter",
        asked_by="event-final",
    )
    report = look(**world(sonnet={"demands": [event]}))
    quota = only(report)
    assert "event-final wants 35 units" in quota.what
    assert "the policy's ceiling is 30" in quota.what
    assert "Ask AWS Support for 35 model units" in quota.do
    assert report.to_tell == (quota.finding_id,)


def test_an_orphan_is_told_at_once_and_deleted_after_the_policy_s_time() -> None:
    fleet = (*FLEET, found("left", 3, None, base_model_id="anthropic.old"))
    report = look(**world(fleet=fleet))
    orphan = only(report)
    assert (orphan.incident_key, orphan.repair, report.to_tell) == (
        "capacity-health:orphans",
        None,
        (orphan.finding_id,),
    )
    assert "--provisioned-model-id arn:left; the health check deletes it 24 h" in orphan.do
    later = look(again(report), **world(NOW + timedelta(hours=23), fleet))
    assert only(later).repair is None
    due = look(again(later), **world(NOW + timedelta(hours=24), fleet))
    assert only(due).repair == Repair(kind="delete-orphan", about="arn:left")


@pytest.mark.parametrize("how", ["committed", "routed", "not allowed"])
def test_an_orphan_that_is_never_deleted(how: str) -> None:
    facts = world(fleet=(*FLEET, found("left", 3, None, committed=how == "committed")))
    if how == "routed":
        facts["routes"]["old"] = {"arn:left": 3}
    repairs = () if how == "not allowed" else HealthPolicy().repairs
    health = HealthPolicy(repairs=repairs, delete_orphans_after=timedelta(0))
    snapshot = SNAPSHOT.model_copy(update={"policy": Policy(health=health)})
    orphan = only(look(snapshot=snapshot, **facts))
    assert orphan.repair is None
    assert "deletes it" not in orphan.do


def test_an_orphan_of_a_model_that_the_policy_has() -> None:
    facts = world(fleet=(*FLEET, found("left", 2, created_at=NOW - HOUR)))
    known = facts["writers"]["sonnet"].state
    unaware = known.model_copy(update={"fleet": [FLEET[0]]})
    facts["writers"]["sonnet"] = Writer(running=True, state=unaware)
    assert "orphan:left" in {finding.finding_id for finding in look(**facts).findings}
    # Made since the last look: not yet known.
    fresh = world(fleet=(*FLEET, found("left", 2, created_at=NOW - timedelta(minutes=1))))
    fresh["writers"]["sonnet"] = Writer(running=True, state=unaware)
    assert "orphan:left" not in {finding.finding_id for finding in look(**fresh).findings}


QUARTER = timedelta(minutes=15)
RUNS = {"schedule_id": "calendar-sync", "every": QUARTER, "exists": True, "changed_at": NOW - 9 * HOUR}


@pytest.mark.parametrize(
    ("seen", "kind", "words"),
    [
        ({"exists": False}, "missing", "is missing"),
        ({"paused": "freeze"}, "paused", "paused: freeze"),
        ({"as_wanted": False}, "differs", "not what the policy says"),
        ({"runs": ("completed", "failed", "timed_out"), "last_run_at": NOW}, "fails", "failed, timed_out"),
        ({"runs": ("completed",), "last_run_at": NOW - HOUR}, "silent", "no run has begun"),
        ({"runs": ("running",), "last_run_at": NOW - HOUR}, "silent", "the run of then has not ended"),
        ({"runs": ("failed", "completed"), "last_run_at": NOW}, None, ""),
        ({"runs": ("failed", "running"), "last_run_at": NOW}, None, ""),
        ({"changed_at": NOW - timedelta(minutes=20)}, None, ""),
    ],
)
def test_schedules(seen: dict[str, Any], kind: str | None, words: str) -> None:
    report = look(schedules=(ScheduleSeen.model_validate({**RUNS, **seen}),))
    if kind is None:
        assert report.findings == ()
        return
    finding = only(report)
    assert finding.finding_id == f"schedule-{kind}:calendar-sync"
    assert words in finding.what
    assert (finding.repair is not None) == (kind in ("missing", "differs"))
    assert finding.incident_key == "control-health:schedules"


def test_a_missing_permission_names_the_statement() -> None:
    statement = json.dumps({"Effect": "Allow", "Action": "bedrock:X", "Resource": "*"})
    missing = PermissionFinding(action="bedrock:X", verdict="denied", detail="", statement=statement)
    report = look(permissions=(missing,))
    assert statement in only(report).do
    assert report.to_tell == ("permission:bedrock:X",)


def test_what_cannot_be_read_is_neither_well_nor_over() -> None:
    first = again(look(**world(fleet=(found("s", 15, ours=False), FLEET[1], found("left", 3, None)))))
    blind = look(first, fleet=(), unread={Source.BEDROCK: "denied"}, now=NOW + QUARTER)
    ids = {finding.finding_id for finding in blind.findings}
    assert ids == {"orphan:left", "unread:bedrock"}
    assert blind.over == ()
    assert blind.to_tell == ()
    assert set(blind.checked) == {Area.QUOTA, Area.SCHEDULES, Area.PERMISSIONS}
    assert blind.failed_provisioning == {}
    assert "capacity, routes, orphans" in next(f for f in blind.findings if f.area is Area.READING).why
    # Still so at the next check: people are told.
    assert look(again(blind), fleet=(), unread={Source.BEDROCK: "denied"}).to_tell == ("unread:bedrock",)
    nothing = look(unread=dict.fromkeys(Source, "away"))
    assert nothing.checked == ()
    assert "Checked" in details(nothing)


def test_a_repair_that_failed_stays_open_and_is_told_next() -> None:
    report = look(**world(fleet=(found("s", 8), FLEET[1])))
    failed = report.model_copy(
        update={"findings": tuple(x.model_copy(update={"repair_error": "no answer"}) for x in report.findings)}
    )
    assert failed.open
    assert "Repair failed" in details(failed)
    assert again(report).open == []
    assert "Repaired" in details(again(report))


def test_text_from_elsewhere_stays_inert_in_the_details() -> None:
    report = look(schedules=(ScheduleSeen.model_validate({**RUNS, "paused": "`x`\n# head <script>"}),))
    assert "# head" not in [line for line in details(report).splitlines() if line.startswith("# head")]
    assert "<script>" not in details(report)
