"""Stands for everything outside of the workflows: activities that record what they are asked and answer what is set.

Decisions are the product's own; time passes nowhere in here, so that a time-skipping server may skip all of it.
"""

import asyncio
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any, Literal

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.cloudwatch import measures
from activities.decisions import DecisionActivities
from activities.latency import KEYS
from domain.alarms import AlarmChange, AlarmState
from domain.calendar import CalendarEvent
from domain.capacity import Demand, DemandOutcome, ProvisionedModel, Survey, Surveyed, merged
from domain.clock import RehearsalClock
from domain.errors import ErrorKind
from domain.evidence import Check, Evidence, EvidenceKey, Reading, Value
from domain.incident import BudgetRow, RecoveryCheck
from domain.knobs import Lease, Refusal, baseline_value
from domain.load import LoadSnapshot, ModelLoad, total_offered
from domain.messages import (
    AssessIncident,
    Authorise,
    Authorised,
    AwaitedModel,
    AwaitedRecovery,
    AwaitModel,
    AwaitRecovery,
    AwaitUnits,
    CapacityState,
    CheckCalendar,
    CheckCapacity,
    CheckChanges,
    CheckSystem,
    CheckTasks,
    CreateModel,
    DeleteModel,
    FleetUnits,
    GuardRelease,
    IncidentAssessment,
    KnobState,
    KnobStates,
    LoadQuery,
    MeasureBudget,
    Page,
    PolicySnapshot,
    ReadKnobs,
    RecoveryQuery,
    ReleaseLeases,
    RenewedStanding,
    RenewStanding,
    ReportInput,
    ReportResult,
    TakeLeases,
    WatchCapacity,
    WatchedRelease,
    WatchRelease,
    WithdrawDemand,
)
from domain.mitigation import Guard, effects
from domain.override import has_caught_up
from domain.people import Role, Roster
from domain.planner import plan as capacity_plan
from domain.policy import Policy
from domain.routes import CapacityRoutes
from domain.runbooks import latency, scaling_lag, throttle

START = datetime(2026, 11, 29, 15, 5, tzinfo=UTC)
"""Monday 00:05 in Tokyo."""
MODEL = "sonnet"
APPROVER, ENGINEER = "approver@example.com", "engineer@example.com"
BASE_ARN = "arn:aws:bedrock:ap-northeast-1:123456789012:provisioned-model/base"

Verdict = tuple[Literal["recovered", "gave-up", "p99-high"], LoadSnapshot]


def load(share_of_peak: float, *, throttles: float) -> LoadSnapshot:
    """Scenario 1's load, or a share of it."""
    offered = {
        "recommendation": 24_000.0,
        "product_question": 8_350.0,
        "faq": 2_000.0,
        "greeting": 950.0,
        "order_status": 2_950.0,
        "search": 2_950.0,
    }
    hurt = throttles > 0
    return LoadSnapshot(
        observed_at=START,
        models={
            "sonnet": ModelLoad(
                sent_tokens_per_second=30_200 * share_of_peak,
                capacity_tokens_per_second=25_500,
                throttles=throttles,
                throttle_shares=(0.1, 0.12) if hurt else (0.0, 0.0),
            ),
            "haiku": ModelLoad(sent_tokens_per_second=5_000 * share_of_peak, capacity_tokens_per_second=15_000),
        },
        offered_tokens_per_second={intent: tokens * share_of_peak for intent, tokens in offered.items()},
        hit_rate=0.15 if hurt else 0.4,
        queue_depth=340 if hurt else 3,
        p99_ms=9_800 if hurt else 1_200,
        fallback_percent=12 if hurt else 0,
        tasks_running=15,
    )


SPIKE = load(1, throttles=500)
"""The alarm's moment: evidence for every lever."""
SLIGHT = load(0.3, throttles=0).model_copy(update={"hit_rate": 0.15})
"""Evidence for the free levers only."""
HELD = load(1, throttles=0)
"""Recovered under load: no lever may go."""
CALM = load(0.3, throttles=0)
"""The traffic has passed: every lever may go."""


def slow(p99_ms: float, queue_wait_ms: float) -> LoadSnapshot:
    """Scenario 3's evening: no throttles, and answers as slow as that."""
    models = {"sonnet": ModelLoad(sent_tokens_per_second=9_000, throttles=0, queue_wait_ms=queue_wait_ms)}
    return CALM.model_copy(update={"p99_ms": p99_ms, "models": {**CALM.models, **models}})


def alarm(state: AlarmState, at: datetime, message_id: str, alarm_name: str = "BedrockThrottleSonnet") -> AlarmChange:
    """A change of scenario 1's alarm, or another."""
    return AlarmChange(
        alarm_name=alarm_name,
        state=state,
        reason="Threshold Crossed: 3 datapoints were greater than the threshold (10.0).",
        changed_at=at,
        source="sns",
        message_id=message_id,
    )


class FakeWorld:
    """Every activity but those of `FakeEntities`."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.snapshot = PolicySnapshot(policy=policy or Policy(timetable=None), clock=RehearsalClock())
        self.roster = Roster(people={APPROVER: Role.APPROVER, ENGINEER: Role.ENGINEER})
        self.calls: list[tuple[str, Any]] = []
        """Name and argument of every activity, in order."""
        self.load = SPIKE
        self.units = self.expected_units = 15
        """In service when the incident opens, and what the hour expects."""
        self.verdicts: list[Verdict] = []
        """How the next waits for recovery end; a wait without one goes on until there is."""
        self.breaches: list[list[str]] = []
        """What the next watches see; nothing when there is none."""
        self.units_found: list[int] = []
        """What the next waits for units find in the end; what they wait for when there is none."""
        self.capacity: CapacityState | None = None
        """What the capacity workflow says."""
        self.latency = {"queue_wait_ms": 480.0, "queue_depth": 7.0, "window_ms": 500.0, "window_before_ms": 150.0}
        """What the batcher says in a latency incident, ..."""
        self.systems = {"redis_read_us": 400.0, "redis_connections": 900.0, "opensearch_ms": 90.0}
        self.systems |= {"dynamodb_ms": 6.0, "integration_ms": 40.0}
        """... and the other systems."""
        self.refused: dict[str, ErrorKind] = {}
        """Activities that fail, not to be tried again."""
        self.fleet = [
            ProvisionedModel(arn=BASE_ARN, name="base", units=15, status="InService", created_at=START),
        ]

    def asked(self, *names: str) -> list[Any]:
        """Arguments of the calls with these names, in order."""
        return [argument for name, argument in self.calls if name in names]

    def pages(self, to: str) -> list[str]:
        """Texts of the pages to exactly these people."""
        return [page.text for page in self.asked("page") if page.to == to]

    def _saw(self, request: Any) -> None:
        name = activity.info().activity_type
        self.calls.append((name, request))
        if name in self.refused:
            raise ApplicationError(f"{name} was refused", type=self.refused[name], non_retryable=True)

    # ------------------------------------------------------------ settings and people

    @activity.defn
    async def load_policy(self) -> PolicySnapshot:
        return self.snapshot

    @activity.defn
    async def authorise(self, request: Authorise) -> Authorised:
        self._saw(request)
        may = self.roster.may(request.who, request.needed)
        return Authorised(may=may, message=f"{request.who} {'may' if may else f'is no {request.needed}'}")

    @activity.defn
    async def page(self, request: Page) -> None:
        self._saw(request)

    @activity.defn
    async def write_report(self, request: ReportInput) -> ReportResult:
        self._saw(request)
        return ReportResult(html_path="reports/incident.html", markdown_path="reports/incident.md")

    # ------------------------------------------------------------ evidence

    @activity.defn
    async def read_load(self, request: LoadQuery) -> LoadSnapshot:
        self._saw(request)
        return self.load

    @activity.defn
    async def assess_throttle(self, request: AssessIncident) -> IncidentAssessment:
        self._saw(request)
        snapshot = request.snapshot or self.snapshot
        lags, why = scaling_lag.units_lag(self.units, self.expected_units, event_near=False)
        plan = throttle.plan(
            request.model, self.load, snapshot.policy, snapshot.clock, request.now, self.expected_units
        )
        if lags:
            plan = scaling_lag.plan(
                request.model, self.load, snapshot.policy, request.now, self.units, self.expected_units
            )
        return IncidentAssessment(
            snapshot=snapshot,
            load=self.load,
            plan=plan,
            runbook="scaling-lag" if lags else "throttle",
            why=why,
            units_in_service=self.units,
            checks=[self._plumbing()] if lags else [],
        )

    @activity.defn
    async def assess_latency(self, request: AssessIncident) -> IncidentAssessment:
        self._saw(request)
        snapshot, check = request.snapshot or self.snapshot, _check("Batcher", **self.latency)
        return IncidentAssessment(
            snapshot=snapshot,
            load=self.load,
            plan=latency.plan(check.evidence, snapshot.policy, request.now),
            runbook="latency",
            checks=[check],
            budget=self._budget(snapshot.policy),
        )

    @activity.defn
    async def check_system(self, request: CheckSystem) -> list[Check]:
        self._saw(request)
        keys = [KEYS[signal.metric] for signal in request.signals]
        return [_check(request.name, **{key: self.systems[key] for key in keys})]

    @activity.defn
    async def measure_budget(self, request: MeasureBudget) -> list[BudgetRow]:
        self._saw(request)
        return self._budget(request.policy)

    @activity.defn
    async def guard_window(self, request: GuardRelease) -> Guard:
        self._saw(request)
        policy = self.snapshot.policy
        return latency.guard(policy.latency.revert_window_ms, self.latency["window_ms"], request.load, policy)

    def _budget(self, policy: Policy) -> list[BudgetRow]:
        measured = {latency.TOTAL: self.load.p99_ms, latency.QUEUE_WAIT: self.load.model(MODEL).queue_wait_ms}
        return latency.budget(measured, MODEL, policy)

    def _plumbing(self) -> Check:
        return _check(
            "Provisioning",
            units_in_service=self.units,
            units_creating=0,
            units_expected=self.expected_units,
            provisioned_tokens_per_second=8000.0,
            capacity_workflow="running",
            schedules_off=[],
            provisioning_error="AccessDenied",
            provisioning_error_text="not authorized to perform: bedrock:CreateProvisionedModelThroughput",
        )

    @activity.defn
    async def check_metrics(self, request: RecoveryQuery) -> list[Check]:
        self._saw(request)
        return [_check("Breaching metrics", tokens_per_second=30_000.0, throttles_per_period=500.0)]

    @activity.defn
    async def check_capacity(self, request: CheckCapacity) -> list[Check]:
        self._saw(request)
        return [_check("Provisioned throughput", units_in_service=self.units, units_creating=0)]

    @activity.defn
    async def check_tasks(self, request: CheckTasks) -> list[Check]:
        self._saw(request)
        return [_check("ECS tasks", tasks_running=15)]

    @activity.defn
    async def check_calendar(self, request: CheckCalendar) -> list[Check]:
        self._saw(request)
        starts = "2026-11-30T00:05:00+09:00"
        return [
            _check(
                "Event calendar",
                event_configured=True,
                event_starts_at=starts,
                event_multiplier=3.0,
                event_lead_seconds=7200.0,
                event_triggered_at="2026-11-29T22:00:00+09:00",
                event_completed_at="2026-11-29T22:15:00+09:00",
                event_capacity_tokens_per_second=21_000.0,
            )
        ]

    @activity.defn
    async def check_changes(self, request: CheckChanges) -> list[Check]:
        self._saw(request)
        return [_check("Recent changes", recent_changes=[])]

    @activity.defn
    async def await_recovery(self, request: AwaitRecovery) -> AwaitedRecovery:
        self._saw(request)
        while not self.verdicts:
            activity.heartbeat()
            await asyncio.sleep(0.02)
        ended, seen = self.verdicts.pop(0)
        return AwaitedRecovery(
            ended=ended,
            checks=_checks(request.query, seen, request.checks),
            load=seen,
            peak_offered_tokens_per_second=total_offered(seen),
            effects=effects(request.query.model, seen),
        )

    @activity.defn
    async def watch_release(self, request: WatchRelease) -> WatchedRelease:
        self._saw(request)
        breaches = self.breaches.pop(0) if self.breaches else []
        return WatchedRelease(breaches=breaches, checks=_checks(request.query, self.load, ()), load=self.load)

    # ------------------------------------------------------------ leases, calendar, units

    @activity.defn
    async def take_leases(self, request: TakeLeases) -> list[Lease]:
        self._saw(request)
        return []

    @activity.defn
    async def renew_leases(self, request: TakeLeases) -> list[str]:
        self._saw(request)
        return []

    @activity.defn
    async def renew_standing(self, request: RenewStanding) -> RenewedStanding:
        self._saw(request)
        caught_up = has_caught_up(request.lease.knob, request.lease.value, self.snapshot.policy.baseline)
        return RenewedStanding(changed=[], caught_up=caught_up)

    @activity.defn
    async def release_leases(self, request: ReleaseLeases) -> None:
        self._saw(request)

    @activity.defn
    async def record_refusal(self, request: Refusal) -> None:
        self._saw(request)

    @activity.defn
    async def read_knobs(self, request: ReadKnobs) -> KnobStates:
        self._saw(request)
        values = {knob: baseline_value(knob, request.baseline) for knob in request.knobs}
        states = [KnobState(knob=knob, value=value, baseline=value, leases=[]) for knob, value in values.items()]
        return KnobStates(knobs=states, epoch="1")

    @activity.defn
    async def put_event(self, request: CalendarEvent) -> None:
        self._saw(request)

    @activity.defn
    async def await_units(self, request: AwaitUnits) -> FleetUnits:
        self._saw(request)
        return FleetUnits(units=self.units_found.pop(0) if self.units_found else request.units, creating=0)

    # ------------------------------------------------------------ Bedrock

    @activity.defn
    async def survey(self, request: Survey) -> Surveyed:
        self._saw(request)
        situation = request.situation
        fleet = merged(situation.fleet or (), tuple(self.fleet), request.unlisted, request.gone)
        return Surveyed(listed=tuple(self.fleet), plan=capacity_plan(situation.model_copy(update={"fleet": fleet})))

    @activity.defn
    async def watch_capacity(self, request: WatchCapacity) -> str:
        """As the product's: a look that finds nothing new is tried again."""
        self._saw(request)
        known = {(model.arn, model.status) for model in request.fleet}
        if self.snapshot != request.snapshot or known != {(model.arn, model.status) for model in self.fleet}:
            return "something"
        raise ApplicationError("as before", type="AsBefore", next_retry_delay=request.every)

    @activity.defn
    async def create_model(self, request: CreateModel) -> str:
        self._saw(request)
        order = request.order
        arn = BASE_ARN.replace("base", order.name)
        made = ProvisionedModel(
            arn=arn, name=order.name, units=order.units, status="Creating", ours=True, created_at=datetime.now(UTC)
        )
        self.fleet = [*self.fleet, made]
        return arn

    @activity.defn
    async def await_in_service(self, request: AwaitModel) -> AwaitedModel:
        self._saw(request)
        self.fleet = [
            model.model_copy(update={"status": "InService"}) if model.arn == request.arn else model
            for model in self.fleet
        ]
        return AwaitedModel(status="InService")

    @activity.defn
    async def delete_model(self, request: DeleteModel) -> None:
        self._saw(request)
        self.fleet = [model for model in self.fleet if model.arn != request.arn]

    @activity.defn
    async def await_gone(self, request: AwaitModel) -> AwaitedModel:
        self._saw(request)
        return AwaitedModel(status=None)

    @activity.defn
    async def publish_routes(self, request: CapacityRoutes) -> None:
        self._saw(request)


class FakeEntities:
    """The capacity workflow, which accepts every demand; on record in `world`."""

    def __init__(self, world: FakeWorld) -> None:
        self._world = world

    @activity.defn
    async def set_demand(self, request: Demand) -> DemandOutcome:
        self._world.calls.append(("set_demand", request))
        return self._outcome(request.demand_id, "requested", request.units)

    @activity.defn
    async def withdraw_demand(self, request: WithdrawDemand) -> DemandOutcome:
        self._world.calls.append(("withdraw_demand", request))
        return self._outcome(request.demand_id, "withdrawn", 15)

    @activity.defn
    async def capacity_state(self, model: str) -> CapacityState:
        return self._world.capacity or CapacityState(model=model)

    @activity.defn
    async def previous_run(self, workflow_id: str) -> str | None:
        return None

    @staticmethod
    def _outcome(demand_id: str, status: Literal["requested", "withdrawn"], units: int) -> DemandOutcome:
        return DemandOutcome(
            demand_id=demand_id, status=status, units_in_service=15, units_wanted=units, detail=f"{units} units"
        )


class FakeCloudWatch:
    """The load as set; None: it cannot be read."""

    load: LoadSnapshot | None = HELD

    @activity.defn
    async def read_load(self, query: LoadQuery) -> LoadSnapshot:
        if self.load is None:
            raise RuntimeError("CloudWatch is away")
        return self.load


def activities_of(*owners: object) -> list[Any]:
    """Every activity of these, and the decisions."""
    return [
        method
        for owner in (*owners, DecisionActivities())
        for name in dir(owner)
        if hasattr(method := getattr(owner, name), "__temporal_activity_definition")
    ]


def _check(name: str, **values: Value) -> Check:
    readings = {
        EvidenceKey(key): Reading(key=EvidenceKey(key), value=value, observed_at=START, source="fake")
        for key, value in values.items()
    }
    return Check(name=name, finding="as set", breaching=False, evidence=Evidence(readings=readings), duration_ms=1)


def _checks(query: RecoveryQuery, seen: LoadSnapshot, before: Collection[RecoveryCheck]) -> list[RecoveryCheck]:
    return measures(query, seen, before)
