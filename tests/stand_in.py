"""A stand-in for the incident workflow: it answers as an incident does, and holds nothing."""

from datetime import UTC, datetime, timedelta

from temporalio import workflow

from domain.alarms import AlarmChange, AlarmState
from domain.incident import IncidentRecord, Lever, LeverName, LeverStatus, Phase, RecoveryCheck, TimelineEntry
from domain.messages import (
    ABORT,
    APPROVE_KEEP,
    APPROVE_REVERT,
    EXTEND,
    INCIDENT_WORKFLOW,
    RECORD,
    TAKE_OVER,
    ExtendRequest,
    KeepRequest,
    PersonRequest,
    TakeOverRequest,
    UpdateResult,
    incident_id,
)
from workflows.search_attributes import PHASE

KEY = "bedrock-throttle:sonnet"
HOSTILE = "[bold red]alarm[/] \x1b[2J\x1b]0;owned\x07 \u202egpj.exe :boom:"


def a_record(key: str) -> IncidentRecord:
    now = datetime.now(UTC)
    return IncidentRecord(
        incident_id=incident_id(key),
        run_id="",
        key=key,
        model="sonnet",
        runbook="throttle",
        phase=Phase.AWAITING_DECISION,
        alarm=AlarmChange(
            alarm_name=HOSTILE, state=AlarmState.ALARM, changed_at=now, source="sns", message_id="1", reason="47 > 0"
        ),
        opened_at=now,
        waiting_for="an approver",
        next_step="the first hold ends",
        next_at=now + timedelta(hours=4),
        levers=[
            Lever(
                name=LeverName.CACHE_TTL,
                status=LeverStatus.IN_FORCE,
                before="30 s",
                after="120 s",
                why="fewer calls",
                applied_at=now,
                hold_until=now + timedelta(hours=24),
            )
        ],
        recovery_checks=[RecoveryCheck(name="P99", value=9800, target=3000, unit="ms", met=False)],
        timeline=[TimelineEntry(at=now, kind="alarm", text="the alarm went on")],
    )


@workflow.defn(name=INCIDENT_WORKFLOW)
class StandIn:
    """Answers as an incident does, and closes when its way back is approved."""

    @workflow.init
    def __init__(self, record: IncidentRecord) -> None:
        self._record = record.model_copy(update={"run_id": workflow.info().run_id})

    @workflow.run
    async def run(self, record: IncidentRecord) -> None:
        workflow.upsert_search_attributes([PHASE.value_set(record.phase)])
        await workflow.wait_condition(lambda: self._record.phase is Phase.CLOSED)
        await workflow.wait_condition(workflow.all_handlers_finished)

    @workflow.query(name=RECORD)
    def record(self) -> IncidentRecord:
        return self._record

    @workflow.update(name=APPROVE_REVERT)
    async def approve(self, request: PersonRequest) -> UpdateResult:
        if request.who.startswith("viewer"):
            return UpdateResult(outcome="denied", message=f"{request.who} is viewer; approver is needed")
        entry = TimelineEntry(at=workflow.now(), kind="decision", text=f"approved: {request.why}", who=request.who)
        self._record.timeline.append(entry)
        self._record.outcome = "Everything was given back."
        self._record.phase = Phase.CLOSED
        return UpdateResult(outcome="accepted", message="the way back begins")

    @approve.validator
    def _validate(self, request: PersonRequest) -> None:
        if request.why == "stale":
            raise ValueError("the way back has begun already")

    @workflow.update(name=EXTEND)
    async def extend(self, request: ExtendRequest) -> UpdateResult:
        return UpdateResult(outcome="already-done", message=f"{request.lever} by {request.by} for {request.who}")

    @workflow.update(name=APPROVE_KEEP)
    async def keep(self, request: KeepRequest) -> UpdateResult:
        return UpdateResult(outcome="accepted", message=f"{request.lever}, review in {request.review_in}")

    @workflow.update(name=TAKE_OVER)
    async def take_over(self, request: TakeOverRequest) -> UpdateResult:
        return UpdateResult(outcome="accepted", message=f"{request.to} for {request.lasts} by {request.who}")

    @workflow.update(name=ABORT)
    async def abort(self, request: PersonRequest) -> UpdateResult:
        return UpdateResult(outcome="not-possible", message="it is being given back already")
