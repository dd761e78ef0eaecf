"""Records of incidents as a rehearsal of scenario 1 leaves them, for tests of whatever shows a record."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from domain.alarms import AlarmChange, AlarmMetric, AlarmState
from domain.clock import RehearsalClock, compress
from domain.evidence import Check, Evidence, EvidenceKey, Reading, Value
from domain.incident import (
    CalendarProposal,
    Decision,
    IncidentRecord,
    Lever,
    LeverName,
    LeverStatus,
    Phase,
    RecoveryCheck,
    TimelineEntry,
)
from domain.load import LoadSnapshot, ModelLoad
from domain.messages import PolicySnapshot
from domain.policy import Policy
from domain.trees import Cause, Diagnosis, Step

CLOCK = RehearsalClock(
    real_start=datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=10),
    business_start=datetime(2026, 11, 22, 14, 45, tzinfo=UTC),
    speed=60,
)
"""Ten minutes ago is Sunday 23:45 in Tokyo; a real second is a minute. CloudWatch takes no old points."""


def policy_snapshot(clock: RehearsalClock = CLOCK) -> PolicySnapshot:
    """The default policy under `clock`."""
    return PolicySnapshot(policy=compress(Policy(), clock.speed), clock=clock)


def at(minutes: float, clock: RehearsalClock = CLOCK) -> datetime:
    """The real moment that is so many business minutes after Monday 00:00 in Tokyo."""
    return clock.real(datetime(2026, 11, 22, 15, 0, tzinfo=UTC) + timedelta(minutes=minutes))


def _check(
    name: str, finding: str, breaching: bool | None, age: float, took_ms: float, **read: Value | None
) -> Callable[[Callable[[float], datetime]], Check]:
    def build(when: Callable[[float], datetime]) -> Check:
        observed = when(5.2 - age)
        readings = {
            key: Reading(
                key=key,
                value=value,
                missing="AccessDenied: cloudtrail:LookupEvents" if value is None else None,
                observed_at=observed,
                source=f"source of {name}",
            )
            for key, value in ((EvidenceKey(item), value) for item, value in read.items())
        }
        return Check(
            name=name,
            finding=finding,
            breaching=breaching,
            evidence=Evidence(readings=readings),
            observed_at=None if breaching is None else observed,
            duration_ms=took_ms,
        )

    return build


def finished_record(clock: RehearsalClock = CLOCK) -> IncidentRecord:
    """Mitigated, recovered under load, rejected once, denied once, approved, reverted, closed."""

    def when(minutes: float) -> datetime:
        return at(minutes, clock)

    checks = [
        _check(
            "Which metrics breach",
            "breaching: P99 latency 9800 ms (target 3000); fallback answers 12 % (target 0.1); "
            "queue depth 340 requests (target 50)",
            True, 0.4, 18.2, p99_ms=9800.0, queue_depth=340.0, fallback_percent=12.0, hit_rate_percent=15.0,
        ),
        _check("Bedrock throttles", "47 throttles on sonnet in the newest period, 6.2% of calls", True, 0.4, 18.2,
               throttles_per_period=47, tokens_per_second=25_891.2),
        _check("Provisioned capacity", "15 units of sonnet in service, 15 expected", False, 0.0, 31.0,
               units_in_service=15, units_creating=0),
        _check("ECS tasks", "30 of 30 tasks running, baseline 15: scaled out", False, 0.4, 26.4,
               tasks_running=30, tasks_desired=30),
        _check("Event calendar", "monday-release-2026-11-23, 3x, provisioned by 23:14", False, 0.0, 22.7,
               event_configured=True, event_id="monday-release-2026-11-23", event_multiplier=3),
        _check("Recent changes", "could not be read: AccessDenied: cloudtrail:LookupEvents is missing", None, 0.0,
               412.0, recent_changes=None),
    ]  # fmt: skip
    start = LoadSnapshot(
        observed_at=when(5),
        models={
            "sonnet": ModelLoad(sent_tokens_per_second=35_200, capacity_tokens_per_second=25_500, throttles=47),
            "haiku": ModelLoad(sent_tokens_per_second=3_900, capacity_tokens_per_second=15_000, throttles=0),
        },
        offered_tokens_per_second={
            "recommendation": 19_600,
            "product_question": 9_840,
            "faq": 3_300,
            "greeting": 1_700,
        },
        hit_rate=0.15,
        queue_depth=340,
        p99_ms=9800,
        fallback_percent=12,
        tasks_running=30,
    )
    recovery = start.model_copy(
        update={
            "observed_at": when(18),
            "models": {
                "sonnet": ModelLoad(sent_tokens_per_second=17_670, capacity_tokens_per_second=32_500, throttles=0),
                "haiku": ModelLoad(sent_tokens_per_second=6_930, capacity_tokens_per_second=15_000, throttles=0),
            },
            "hit_rate": 0.40, "queue_depth": 12, "p99_ms": 2_310, "fallback_percent": 0.02, "tasks_running": 38,
        }
    )  # fmt: skip
    routing = Lever(
        name=LeverName.MODEL_ROUTING, status=LeverStatus.RELEASED, before="faq: sonnet, greeting: sonnet",
        after="faq: haiku, greeting: haiku", why="faq, greeting need less quality, and fit in 80% of haiku's capacity",
        applied_at=when(6.1), landed_at=when(6.1), hold_until=when(24 * 60), released_at=when(52),
    )  # fmt: skip
    ttl = Lever(
        name=LeverName.CACHE_TTL, status=LeverStatus.RELEASED, before="30 s", after="120 s",
        why="the hit rate should rise to 40%; it costs nothing", applied_at=when(6.1), landed_at=when(6.1),
        hold_until=when(24 * 60), released_at=when(63),
    )  # fmt: skip
    capacity = Lever(
        name=LeverName.CAPACITY, status=LeverStatus.RELEASED, before="15 units", after="23 units",
        why="35,200 of 25,500 tokens/s is 138% of the capacity, over 80%", applied_at=when(6.6), landed_at=when(18.2),
        hold_until=when(4 * 60), released_at=when(75), detail="8 units in two provisioned models, deleted",
    )  # fmt: skip
    lines: list[tuple[float, str, str, str | None]] = [
        (5.2, "alarm", "BedrockThrottleAlarm is on: InvocationThrottles 47 > 0 for 1 period", None),
        (5.6, "finding", "Cause: the event's multiplier was underestimated", None),
        (6.1, "lever", "model routing: faq, greeting to haiku; cache TTL 120 s: in force", None),
        (6.6, "capacity", "8 more units of sonnet requested (23 in all)", None),
        (9.0, "decision", "acknowledged: looking at it", "engineer-1"),
        (18.2, "capacity", "8 units in service, routed", None),
        (23.0, "recovery", "recovered under load, held for 5 min", None),
        (23.0, "page", "asks for a decision on the way back", None),
        (31.0, "decision", "approve_revert denied: viewer-1 is viewer; approver is needed", "viewer-1"),
        (36.0, "decision", "rejected: the rush is not over", "approver-1"),
        (48.0, "decision", "approved: traffic is back to 9,000", "approver-1"),
        (52.0, "lever", "model routing released; watched for 10 min, clean", None),
        (63.0, "lever", "cache TTL released; watched for 10 min, clean", None),
        (75.0, "lever", "capacity released: route withdrawn, drained, deleted", None),
        (86.0, "phase", "closed after a clean watch", None),
    ]
    return IncidentRecord(
        incident_id="incident-bedrock-throttle:sonnet",
        run_id="019ab3c2-7f10-7c3e-9d55-0f2f6f1a2b3c",
        key="bedrock-throttle:sonnet",
        model="sonnet",
        runbook="throttle",
        phase=Phase.CLOSED,
        alarm=AlarmChange(
            alarm_name="BedrockThrottleAlarm",
            alarm_arn="arn:aws:cloudwatch:ap-northeast-1:123456789012:alarm:BedrockThrottleAlarm",
            state=AlarmState.ALARM,
            previous_state=AlarmState.OK,
            reason="Threshold Crossed: 1 out of the last 1 datapoints [47.0] was greater than the threshold (0.0).",
            changed_at=when(5.1),
            metrics=(
                AlarmMetric(
                    namespace="AWS/Bedrock",
                    name="InvocationThrottles",
                    dimensions={"ModelId": "anthropic.claude-3-sonnet-20240229-v1:0"},
                ),
            ),
            source="sns",
            message_id="3f1a2f0e-6f0b-5a55-8f6e-0d0d8a4f8c11",
        ),
        alarm_times=3,
        alarm_on=False,
        opened_at=when(5.2),
        mitigated_at=when(6.6),
        recovered_at=when(23),
        recovery="recovered under load",
        recovery_detail="recovered under load: offered load was 98% of the incident's peak of 34,440 tokens/s",
        closed_at=when(86),
        outcome="Recovered under load 18 min after opening; every lever was released and the clean watch has passed.",
        load_at_start=start,
        load_at_recovery=recovery,
        peak_offered_tokens_per_second=34_440,
        checks=[build(when) for build in checks],
        diagnosis=Diagnosis(
            causes=[
                Cause(
                    id="multiplier-underestimated",
                    sentence="The event's multiplier was underestimated: traffic outgrew the capacity planned for it.",
                )
            ],
            path=[
                Step(question="Was the event in the calendar?", answer="yes", because="event_configured = True"),
                Step(
                    question="Did provisioning trigger on time?",
                    answer="yes",
                    because="event_triggered_at = 2026-11-22T13:00:00Z, event_starts_at = 2026-11-22T15:00:00Z, "
                    "event_lead_seconds = 7200",
                ),
                Step(
                    question="Was the capacity sufficient for the traffic?",
                    answer="no",
                    because="tokens_per_second = 29274.0, event_capacity_tokens_per_second = 21000",
                ),
            ],
            missing=[],
        ),
        arithmetic=[
            "Evidence for buying: 35,200 of 25,500 tokens/s is 138% of the capacity, over 80%.",
            "Offered to sonnet before cache and retries: 34,440 tokens/s (of 39,000 in all).",
            "Less the downgraded intents (faq, greeting): 29,440 tokens/s.",
            "Less the cache at 40% hits: 17,664 tokens/s.",
            "17,664 ÷ 1,000 tokens/s per unit ÷ 80% target utilisation = 23 units.",
            "8 units over the baseline of 15 for at most 4 h are 32 unit-hours; the cap per incident allows 30 units: "
            "8 units, at most 245 USD.",
        ],
        levers=[routing, ttl, capacity],
        units_bought=8,
        recovery_checks=[
            RecoveryCheck(name="throttles", value=0, target=0, unit="per period", met=True, since=when(18)),
            RecoveryCheck(name="P99 latency", value=2310, target=3000, unit="ms", met=True, since=when(15)),
            RecoveryCheck(name="fallback answers", value=0.02, target=0.1, unit="%", met=True, since=when(16)),
            RecoveryCheck(name="queue depth", value=12, target=50, unit="requests", met=True, since=when(14)),
        ],
        effects=["cache hit rate 40%", "38 ECS tasks running", "17,670 of 32,500 tokens/s on sonnet"],
        timeline=[
            TimelineEntry.model_validate({"at": when(minute), "kind": kind, "text": text, "who": who})
            for minute, kind, text, who in lines
        ],
        decisions=[
            Decision(
                at=when(31), who="viewer-1", action="approve_revert", why="looks fine to me", outcome="denied",
                message="viewer-1 is viewer; approver is needed",
            ),
            Decision(
                at=when(36), who="approver-1", action="reject", why="the rush is not over", outcome="accepted",
                message="the levers stay; the next reminder is at 04:36",
            ),
            Decision(
                at=when(48), who="approver-1", action="approve_revert", why="traffic is back to 9,000 tokens/s",
                outcome="accepted", message="the way back begins with model routing",
            ),
        ],
        acknowledged_by="engineer-1",
        to_do=["Write the post-mortem within 24 hours.", "Raise the default Monday multiplier from 3x to 4x."],
        calendar_proposal=CalendarProposal(
            event_type="final_chapter", multiplier=5, reason="traffic reached 4.9 times the usual level", written=True,
            event_id="final_chapter-2026-11-23",
        ),
        previous_incident="019a1111-2222-7333-8444-555566667777",
        knobs_at_baseline=True,
        capacity_at_baseline=True,
    )  # fmt: skip


def running_record(clock: RehearsalClock = CLOCK) -> IncidentRecord:
    """The same incident while people are asked for the way back: nothing released, one lever failed."""
    record = finished_record(clock)
    held = [
        lever.model_copy(update={"status": LeverStatus.IN_FORCE, "released_at": None, "detail": ""})
        for lever in record.levers[1:]
    ]
    failed = record.levers[0].model_copy(
        update={
            "status": LeverStatus.FAILED, "applied_at": None, "landed_at": None, "released_at": None,
            "detail": "Redis refused the lease: connection refused",
        }
    )  # fmt: skip
    return record.model_copy(
        update={
            "phase": Phase.AWAITING_DECISION,
            "alarm_on": True,
            "closed_at": None,
            "outcome": "",
            "levers": [failed, *held],
            "decisions": record.decisions[:1],
            "timeline": record.timeline[:9],
            "waiting_for": "an approver to approve or reject the way back",
            "next_step": "remind the approvers",
            "next_at": at(23 + 240, clock),
            "calendar_proposal": None if record.calendar_proposal is None
            else record.calendar_proposal.model_copy(update={"written": False, "event_id": None}),
            "knobs_at_baseline": None,
            "capacity_at_baseline": None,
            "to_do": [],
        }
    )  # fmt: skip
