"""Names and models of everything that is sent to and between workflows. One model per message.

A handler is declared with the name from here (`@workflow.update(name=APPROVE_REVERT)`), and callers use the same
name, so that neither imports the other.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from domain.alarms import AlarmChange
from domain.calendar import CalendarEvent
from domain.capacity import (
    Demand,
    DemandOutcome,
    ExpectedUnits,
    ModelStatus,
    Order,
    PlanCost,
    ProvisionedModel,
)
from domain.clock import RehearsalClock
from domain.evidence import Check, Evidence
from domain.incident import (
    BudgetRow,
    Decision,
    IncidentRecord,
    Lever,
    LeverName,
    RecoveryCheck,
    RunbookName,
    TimelineEntry,
)
from domain.knobs import Baseline, Holder, KnobName, KnobValue, Lease, LeaseRequest
from domain.ladder import Rung
from domain.load import LoadSnapshot
from domain.mitigation import MitigationPlan
from domain.override import OverrideKind, OverrideRecord
from domain.people import Role
from domain.policy import AlarmRunbook, ModelPolicy, Policy, RecordedPolicy, RecoveryPolicy, Signal
from domain.purchases import Consent, Purchase

TASK_QUEUE = "runbooks"

INCIDENT_WORKFLOW = "IncidentWorkflow"
THROTTLE_MITIGATION_WORKFLOW = "ThrottleMitigationWorkflow"
SCALING_LAG_MITIGATION_WORKFLOW = "ScalingLagMitigationWorkflow"
LATENCY_REGRESSION_WORKFLOW = "LatencyRegressionWorkflow"
CLEANUP_WORKFLOW = "PostIncidentCleanupWorkflow"
CAPACITY_WORKFLOW = "CapacityWorkflow"
OVERRIDE_WORKFLOW = "OverrideWorkflow"


class Message(BaseModel):
    """Base of all messages: immutable, tolerant of fields that a newer sender adds."""

    model_config = ConfigDict(frozen=True)


def incident_id(key: str) -> str:
    """The workflow id of the incident with that key: the same for the same incident."""
    return f"incident-{key}"


def override_id(knob: str, short_id: str) -> str:
    """The workflow id of one override."""
    return f"override-{knob}-{short_id}"


def capacity_id(model: str) -> str:
    """The workflow id of the one writer of a model's capacity."""
    return f"capacity-{model}"


# ---------------------------------------------------------------- incident


class PolicySnapshot(Message):
    """What `load_policy` returns: the policy with business durations already divided by the clock's speed."""

    policy: RecordedPolicy
    clock: RehearsalClock
    broken: str = ""
    """Why the policy file as it is now could not be used; this is the last good one then."""


class IncidentInput(Message):
    """Starts an incident."""

    key: str
    runbook: AlarmRunbook | None
    """None: triage."""
    model: str | None
    alarm: AlarmChange


ALARM_CHANGED = "alarm_changed"
"""Signal, argument AlarmChange: the alarm's state changed (or another alarm with the same key)."""
ALARM_REPEATED = "alarm_repeated"
"""Signal, argument AlarmRepeats."""
CAPACITY_CHANGED = "capacity_changed"
"""Signal, argument DemandOutcome."""
LEASES_LOST = "leases_lost"
"""Signal, no argument: Redis lost its state; put your leases back."""
RECORD = "record"
"""Query of an incident or an override, answers IncidentRecord or OverrideRecord."""


class AlarmRepeats(Message):
    """Duplicates since the last count."""

    count: int = Field(ge=1)


APPROVE_REVERT = "approve_revert"
REJECT = "reject"
EXTEND = "extend"
RELEASE_LEVER = "release_lever"
ABORT = "abort"
ACKNOWLEDGE = "acknowledge"


class PersonRequest(Message):
    """Every update of a person: who (verified subject) and why."""

    who: str = Field(min_length=1, max_length=200)
    why: str = Field(min_length=1, max_length=1000)


class ExtendRequest(PersonRequest):
    """Extend the maximum hold of one lever, or of all that are held."""

    lever: LeverName | None = None
    by: timedelta = Field(gt=timedelta(0))


class ReleaseLeverRequest(PersonRequest):
    """Release one lever now, ahead of the rest."""

    lever: LeverName


APPROVE_KEEP = "approve_keep"
TAKE_OVER = "take_over"


class KeepRequest(PersonRequest):
    """Turn a lever into a standing override of the person who asks."""

    lever: LeverName
    review_in: timedelta | None = Field(default=None, gt=timedelta(0))
    """None: as the policy says."""


class TakeOverRequest(PersonRequest):
    """Stop the automation; the levers stay with a person until a stated end."""

    to: str | None = Field(default=None, min_length=1, max_length=200)
    """None: the person who asks."""
    lasts: timedelta = Field(gt=timedelta(0))


class UpdateResult(Message):
    """The answer to a person. Denied is a result, and stays in the record."""

    outcome: Literal["accepted", "denied", "already-done", "not-possible"]
    message: str


class Authorise(Message):
    """Asks whether a person may."""

    who: str
    needed: Role


class Authorised(Message):
    """Whether a person may, and why not."""

    may: bool
    message: str


# ---------------------------------------------------------------- leases


class TakeLeases(Message):
    """Take or renew leases in one call."""

    leases: list[LeaseRequest]
    until: AwareDatetime | None = None
    """None of them outlives it, however late the call is carried out; None: each lasts as it says."""


class ReleaseLeases(Message):
    """End leases of one holder in one call."""

    lease_ids: list[str]
    holder: Holder
    reason: str


class ReadKnobs(Message):
    """Asks for knobs' values in force."""

    knobs: list[KnobName]
    baseline: Baseline


class KnobState(Message):
    """One knob now."""

    knob: KnobName
    value: KnobValue
    baseline: KnobValue
    leases: list[Lease]


class KnobStates(Message):
    """Several knobs at one moment."""

    knobs: list[KnobState]
    epoch: str | None
    """Marker of Redis's data set."""


# ---------------------------------------------------------------- overrides

STARTED = "started"
"""Update, no argument, answers OverrideAnswer once the lease is taken, an approval is waited for, or it was refused."""
APPROVE = "approve"
DENY = "deny"
RELEASE = "release"
HAND_OVER = "hand_over"


class OverrideInput(Message):
    """Starts an override: a person sets a knob, for a time, with a reason."""

    knob: KnobName
    value: KnobValue
    kind: OverrideKind
    who: str = Field(min_length=1, max_length=200)
    """Verified subject."""
    reason: str = Field(min_length=1, max_length=500)
    duration: timedelta = Field(gt=timedelta(0))
    """Of a standing one: until its review."""
    incident: str | None = None
    """The incident whose lever it was."""
    approved_by: str | None = None
    """Who approved it there; None: the override asks, if it must."""
    resumed: OverrideRecord | None = None
    """As it stood when the workflow continued as new."""


class StartOverride(Message):
    """Starts the override with that workflow id, or finds it."""

    override_id: str
    input: OverrideInput


class OverrideAnswer(UpdateResult):
    """What became of the wish, and the override as it stands."""

    record: OverrideRecord


class OverrideExtendRequest(PersonRequest):
    """Move the end, or the review date, later."""

    by: timedelta = Field(gt=timedelta(0))


class HandOverRequest(PersonRequest):
    """Give the override to another owner."""

    to: str = Field(min_length=1, max_length=200)


class AssessOverride(Message):
    """What an override would do; see `domain.override.assess`."""

    knob: KnobName
    value: KnobValue
    pin: bool
    now: AwareDatetime
    ends_at: AwareDatetime
    leases: list[Lease]
    load: LoadSnapshot | None
    policy: RecordedPolicy


class RenewStanding(Message):
    """Renew a standing override's lease, and compare it with the configured baseline."""

    lease: LeaseRequest


class RenewedStanding(Message):
    """How a standing override stands."""

    changed: list[str]
    """In words: what was not simply renewed."""
    caught_up: bool
    """Whether the configured baseline is what it asks for."""
    unread: str = ""
    """Why the configured baseline could not be read; empty: it was."""


# ---------------------------------------------------------------- evidence


class LoadQuery(Message):
    """What one GetMetricData call should say."""

    models: dict[str, str]
    """Model name to its `ModelId` dimension."""
    intents: list[str]
    period: timedelta
    lookback: timedelta


def load_query(policy: Policy, model: str | None) -> LoadQuery:
    """The query of `model`, the models its intents may be downgraded to, and every intent of theirs; None: of all."""
    targets = {intent.downgrade_to for intent in policy.intents.values() if intent.model == model}
    models = [name for name in policy.models if model is None or name == model or name in targets]
    return LoadQuery(
        models={name: policy.models[name].model_id for name in models},
        intents=[name for name, intent in policy.intents.items() if intent.model in models],
        period=policy.metrics.period,
        lookback=policy.evidence.metric_lookback,
    )


class RecoveryQuery(Message):
    """What recovery is judged by."""

    load: LoadQuery
    model: str
    intents_of_model: list[str]
    """Intents configured for the model."""
    recovery: RecoveryPolicy
    p99_before_ms: float | None
    """The incident's P99 target is at least this: back at its value before counts."""
    latency: "LatencyTargets | None" = None
    """What a latency incident is judged by; None: throttling's measures."""


class LatencyTargets(Message):
    """Recovered is a P99 under, and a queue wait at most, these."""

    p99_ms: float
    queue_wait_ms: float


class AwaitRecovery(Message):
    """Wait until every measure of recovery has been met for the hold, or `give_up_after`."""

    query: RecoveryQuery
    checks: list[RecoveryCheck] = []
    """As they stood before, so that `since` goes on."""
    give_up_after: timedelta
    page_p99_ms: float | None
    """Return early when P99 stays over this for `page_p99_for`; None: do not."""
    page_p99_for: timedelta


class AwaitedRecovery(Message):
    """How the wait ended."""

    ended: Literal["recovered", "gave-up", "p99-high"]
    checks: list[RecoveryCheck]
    load: LoadSnapshot | None
    """As last read; None: CloudWatch never answered."""
    peak_offered_tokens_per_second: float
    effects: list[str]
    unread: str = ""
    """Why the last poll could not read; empty: it could."""


class WatchRelease(Message):
    """Watch the service after a lever was released, for `watch` or until it breaches."""

    query: RecoveryQuery
    watch: timedelta
    poll_interval: timedelta
    breach_polls: int = 2
    """Polls in a row that must breach: one blip is none."""
    blind_polls: int = 5
    """Polls in a row without anything new, at the end of the watch, that make it a blind one."""


class WatchedRelease(Message):
    """What the watch saw."""

    breaches: list[str]
    """Empty: clean."""
    checks: list[RecoveryCheck]
    load: LoadSnapshot | None


class CheckCapacity(Message):
    """First-response check 3."""

    model: str
    spec: ModelPolicy
    expected_units: int


class FleetUnits(Message):
    """Units of one model, whoever made them."""

    units: int
    """In service."""
    creating: int


class AwaitUnits(Message):
    """Wait until a model has exactly so many units."""

    model: str
    spec: ModelPolicy
    units: int
    poll_interval: timedelta
    give_up_after: timedelta


class CheckPlumbing(Message):
    """What stands between the timetable and the units of a model."""

    model: str
    spec: ModelPolicy
    expected_units: int
    fleet: FleetUnits
    schedules: list[str]
    """Ids of the schedules that should be there."""


class CheckTasks(Message):
    """First-response check 4."""

    baseline_tasks: int


class CheckCalendar(Message):
    """First-response check 5."""

    model: str
    at: AwareDatetime
    """Business time."""
    match_before: timedelta
    """Business durations, uncompressed."""
    match_after: timedelta
    tokens_per_second_per_unit: float


def calendar_check(snapshot: PolicySnapshot, model: str, now: datetime) -> CheckCalendar:
    """The check of an incident of `model` at workflow time `now`."""
    policy, clock = snapshot.policy, snapshot.clock
    return CheckCalendar(
        model=model,
        at=clock.business(now),
        match_before=clock.business_duration(policy.calendar.match_before),
        match_after=clock.business_duration(policy.calendar.match_after),
        tokens_per_second_per_unit=policy.models[model].tokens_per_second_per_unit,
    )


class CheckChanges(Message):
    """First-response check 6."""

    since: timedelta
    incident_id: str
    """Its own changes are left out."""


# ---------------------------------------------------------------- decisions and pages


class DiagnoseIncident(Message):
    """The tree of scenario 1 or 3, or the two of scenario 4, over what is known."""

    evidence: Evidence
    runbook: RunbookName = "throttle"
    policy: RecordedPolicy = Policy()
    """Its thresholds."""


class AssessIncident(Message):
    """Asks for the levers in view of the world as it is; of throttling also which scenario it is."""

    model: str
    now: AwareDatetime
    snapshot: PolicySnapshot | None
    """None: the policy is read, too."""


class IncidentAssessment(Message):
    """What is known, and the levers for it."""

    snapshot: PolicySnapshot
    load: LoadSnapshot
    unread: str = ""
    """Why the load could not be read, and is empty."""
    plan: MitigationPlan | None
    """None: the policy does not have the model."""
    runbook: RunbookName = "throttle"
    """Which runbook made the plan, ..."""
    why: str = ""
    """... and why."""
    units_in_service: int | None = None
    """None: they could not be read."""
    checks: list[Check] = []
    """What had to be read before the levers, as they change it."""
    budget: list[BudgetRow] = []
    """The latency budget as measured, of a latency incident."""


class MeasureBudget(Message):
    """Asks for the latency budget as measured now."""

    model: str
    policy: RecordedPolicy


class CheckSystem(Message):
    """Asks whether a system on an answer's way is slow (scenario 3)."""

    name: str
    """In words, e.g. `OpenSearch`."""
    signals: list[Signal]
    period: timedelta
    lookback: timedelta


class GuardRelease(Message):
    """Whether a lever may be released."""

    lever: LeverName
    held: list[Lever]
    model: str
    load: LoadSnapshot
    policy: RecordedPolicy
    base_units: int
    """What is there without the incident's own."""


class Page(Message):
    """A page to people."""

    page_id: str
    """The same for a retry."""
    incident_id: str
    severity: str
    to: str
    """Who should come, e.g. `senior on-call and AWS TAM`."""
    text: str


# ---------------------------------------------------------------- throttle mitigation


class MitigationInput(Message):
    """Starts the mitigation of one incident; it returns a MitigationResult once every lever acted or failed."""

    incident_id: str
    run_id: str
    """The incident's, part of every lease id."""
    model: str
    reason: str
    """For lease and demand: what the incident is about."""
    plan: MitigationPlan
    snapshot: PolicySnapshot
    held: list[Lever] = []
    """Levers in force already; they are kept."""
    attempt: int = Field(ge=1)
    """1, and one more each time levers are taken, so that no lease id is used twice."""


class MitigationResult(Message):
    """The levers as they stand when the mitigation workflow ends, in the order of the way back."""

    levers: list[Lever]
    arithmetic: list[str]
    """The plan's sums, a line each."""


LEVERS_CHANGED = "levers_changed"
"""Signal to an incident, argument LeversChanged."""


class LeversChanged(Message):
    """A mitigation moved these levers together."""

    levers: list[Lever]


# ---------------------------------------------------------------- cleanup


class CleanupInput(Message):
    """Starts the cleanup after an incident: gives back all that it may hold and proves the baseline."""

    incident_id: str
    model: str
    lease_ids: list[str]
    """Every lease that the incident may ever have taken."""
    demand_id: str | None
    """None: capacity was never touched, and is not."""
    reason: str
    event: CalendarEvent | None
    """To be written into the calendar; None: nothing was approved."""
    snapshot: PolicySnapshot


class CleanupResult(Message):
    """What cleanup proved."""

    knobs_at_baseline: bool
    capacity_at_baseline: bool | None
    """None: it was not touched."""
    still_held: list[str]
    event_written: bool
    to_do: list[str]


# ---------------------------------------------------------------- report


class ReportInput(Message):
    """Asks for the report of an incident as its record stands; while it runs, a report as of now."""

    record: IncidentRecord
    snapshot: PolicySnapshot


class ReportResult(Message):
    """Where the report lies: absolute paths on the machine of the worker."""

    html_path: str
    markdown_path: str


# ---------------------------------------------------------------- capacity

SET_DEMAND = "set_demand"
"""Update, argument Demand, answers DemandOutcome: recorded, and what will be done."""
WITHDRAW_DEMAND = "withdraw_demand"
"""Update, argument WithdrawDemand, answers DemandOutcome."""
RECONCILE_NOW = "reconcile_now"
"""Update, argument PersonRequest, answers Reconciled: compare the fleet with the demands now and try again what failed
(after a mended role). Nothing is spent that would not be at the next reconciliation, so everybody may."""
PAUSE_CAPACITY = "pause_capacity"
"""Update, argument PersonRequest, answers UpdateResult. The kill switch: nothing is bought or deleted; routes go on."""
RESUME_CAPACITY = "resume_capacity"
"""Update, argument PersonRequest, answers UpdateResult."""
APPROVE_CAPACITY = "approve_capacity"
"""Update, argument ApproveCapacity, answers UpdateResult."""
CAPACITY_STATE = "capacity_state"
"""Query, answers CapacityState."""


class WithdrawDemand(Message):
    """Takes a demand back; unknown ids are a success."""

    model: str
    demand_id: str
    reason: str


class DemandAnswer(UpdateResult):
    """What became of a person's demand."""

    demand_id: str
    result: DemandOutcome | None = None
    """None: it was refused."""


class ApproveCapacity(PersonRequest):
    """Agrees to something that waits for a person: units over a cap, or a rung of the ladder that needs consent."""

    approval_id: str
    """`CapacityState.awaiting[].approval_id`."""
    amount: float | None = Field(default=None, gt=0)
    """At most so much over the cap, in its unit (USD, or unit-hours without a price); None: what was asked for."""


class Reconciled(UpdateResult):
    """What a reconciliation found; `message` is the plan's summary, or why the fleet could not be listed."""

    desired_units: int = 0
    units_in_service: int = 0
    problems: list[str] = []
    """What does not work, each with what to do; empty: all is well."""


class Paused(Message):
    """The kill switch is on."""

    who: str
    why: str
    since: AwareDatetime


class AwaitedApproval(Message):
    """Something that a person has been asked to agree to."""

    approval_id: str
    text: str
    """What it would do and cost."""
    asked_by: str
    """For whom."""
    units: int = 0
    amount: float | None = None
    """Over the cap, in `unit`; None: it is not about money."""
    paged_amount: float | None = None
    """`amount` as people were paged about it last."""
    unit: str = ""
    since: AwareDatetime
    until: AwareDatetime
    """It is given back then; an approval does not count any longer."""


class PurchaseState(Message):
    """Something bought, as `runbooks capacity show` prints it."""

    name: str
    arn: str
    units: int
    status: str
    """As Bedrock says."""
    asked_by: str
    until: AwareDatetime | None
    bought_at: AwareDatetime
    unit_hours: float
    """Paid for so far, in business hours."""
    usd: float | None
    """None: the policy has no price."""


def still_paid(
    purchases: Iterable[Purchase],
    fleet: Iterable[ProvisionedModel],
    at: datetime,
    clock: RehearsalClock,
    usd_per_unit_hour: float | None,
) -> list[PurchaseState]:
    """The purchases that had not ended when last looked at, with what they cost until `at`."""
    status = {model.arn: model.status for model in fleet}
    found = []
    for purchase in purchases:
        if purchase.ended_at is not None:
            continue
        hours = purchase.unit_hours(at, clock)
        found.append(
            PurchaseState(
                name=purchase.name,
                arn=purchase.arn,
                units=purchase.units,
                status=status.get(purchase.arn, "Creating"),
                asked_by=purchase.asked_by,
                until=purchase.until,
                bought_at=purchase.bought_at,
                unit_hours=hours,
                usd=None if usd_per_unit_hour is None else hours * usd_per_unit_hour,
            )
        )
    return found


class Trouble(Message):
    """Why there are not more units."""

    kind: str
    """Of `domain.errors`; or `late`: a creation never ends, `failed`: AWS failed to create."""
    text: str


AT_REST = "idle"


class CapacityState(Message):
    """Everything a capacity workflow knows; also what it carries over continue-as-new."""

    model: str
    demands: list[Demand] = []
    fleet: list[ProvisionedModel] = []
    """As last listed."""
    unlisted: list[str] = []
    """ARNs that were bought and are in no list yet."""
    gone: list[str] = []
    """ARNs that were proven gone, while lists may still have them."""
    desired_units: int = 0
    units_in_service: int = 0
    doing: str = ""
    """What it is doing or waiting for, in words; `AT_REST`: nothing."""
    last_error: str = ""
    last_reconciled_at: AwareDatetime | None = None
    told: dict[str, DemandOutcome] = {}
    """The last outcome sent for each demand."""
    routes: dict[str, int] = {}
    """ARN to units, as last published."""
    unanswered: list[Order] = []
    """Asked of AWS without an answer."""
    next_sequence: int = 1
    """Number of the next order."""
    paused: Paused | None = None
    awaiting: list[AwaitedApproval] = []
    """What a person has been asked to agree to."""
    consents: list[Consent] = []
    """What a person agreed to pay, while it counts."""
    agreed: list[str] = []
    """Approval ids of rungs that a person agreed to."""
    raised: dict[str, int] = {}
    """Units that a person agreed to for a demand, over the cap per incident."""
    purchases: list[Purchase] = []
    """What costs or did lately: the caps look back."""
    bought: list[PurchaseState] = []
    """What we have bought and still pay for."""
    cost: PlanCost = PlanCost()
    """Of all that was bought, as last planned."""
    expected: list[ExpectedUnits] = []
    """Units over the plan's horizon, as last planned."""
    short_since: AwareDatetime | None = None
    """Units that are wanted now are missing since then, and are not on their way."""
    overloaded_since: AwareDatetime | None = None
    """Since then the load has been more than the other quotas carry, and the ladder climbs."""
    rungs: list[Rung] = []
    """Rungs of the ladder in force while units are missing, the first one first."""
    leases: list[LeaseRequest] = []
    """What the rungs hold."""
    paged_for: list[str] = []
    """What kept units away when people were paged about it last."""
    problems: list[str] = []
    """What does not work, one by one; `last_error` has them in one line."""
    troubles: list[Trouble] = []
    """Those that keep units away, with their kinds."""
    retry_at: AwareDatetime | None = None
    """When what failed is tried again; None: nothing failed."""
    decisions: list[Decision] = []
    """The latest ones of people, denials too."""
    timeline: list[TimelineEntry] = []


class CapacityInput(Message):
    """Starts (or continues) the one writer of a model's capacity."""

    state: CapacityState
    snapshot: PolicySnapshot | None = None
    """The policy as whoever starts it has just read it; None: it is read first."""


class WatchCapacity(Message):
    """Looks at a model's capacity, every so often, until something is other than known."""

    model: str
    snapshot: PolicySnapshot
    fleet: list[ProvisionedModel]
    routes: dict[str, int]
    """ARN to units, as published."""
    every: timedelta


class CreateModel(Message):
    """Asks AWS for a provisioned model."""

    provisioned_model_id: str
    order: Order


class AwaitModel(Message):
    """Watches one provisioned model."""

    arn: str
    poll_interval: timedelta
    give_up_after: timedelta


class AwaitedModel(Message):
    """How the watch ended."""

    status: ModelStatus | None
    """None: it does not exist (any more)."""
    failure: str | None = None


class DeleteModel(Message):
    """Asks AWS to delete a provisioned model."""

    arn: str
