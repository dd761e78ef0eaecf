"""Names and models of everything that is sent to and between workflows. One model per message.

A handler is declared with the name from here (`@workflow.update(name=APPROVE_REVERT)`), and callers use the same
name, so that neither imports the other.
"""

from datetime import timedelta
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from domain.alarms import AlarmChange
from domain.capacity import Demand, DemandOutcome, ProvisionedModel
from domain.clock import RehearsalClock
from domain.incident import IncidentRecord, Lever, LeverName
from domain.load import LoadSnapshot
from domain.policy import Policy

TASK_QUEUE = "runbooks"

INCIDENT_WORKFLOW = "IncidentWorkflow"
THROTTLE_MITIGATION_WORKFLOW = "ThrottleMitigationWorkflow"
CLEANUP_WORKFLOW = "PostIncidentCleanupWorkflow"
CAPACITY_WORKFLOW = "CapacityWorkflow"

# Search attributes: name to type, as the server registers them.
SEARCH_ATTRIBUTES: dict[str, Literal["Keyword", "Bool"]] = {
    "IncidentKey": "Keyword",
    "IncidentPhase": "Keyword",
    "Severity": "Keyword",
    "Cause": "Keyword",
    "Service": "Keyword",
    "HoldsLeases": "Bool",
}


class Message(BaseModel):
    """Base of all messages: immutable, tolerant of fields that a newer sender adds."""

    model_config = ConfigDict(frozen=True)


def incident_id(key: str) -> str:
    """The workflow id of the incident with that key: the same for the same incident."""
    return f"incident-{key}"


def capacity_id(model: str) -> str:
    """The workflow id of the one writer of a model's capacity."""
    return f"capacity-{model}"


# ---------------------------------------------------------------- incident


class PolicySnapshot(Message):
    """What `load_policy` returns: the policy with business durations already divided by the clock's speed."""

    policy: Policy
    clock: RehearsalClock


class IncidentInput(Message):
    """Starts an incident."""

    key: str
    runbook: Literal["throttle"] | None
    """None: triage."""
    model: str | None
    alarm: AlarmChange
    previous_run_id: str | None = None


ALARM_CHANGED = "alarm_changed"
"""Signal, argument AlarmChange: the alarm's state changed (or another alarm with the same key)."""
ALARM_REPEATED = "alarm_repeated"
"""Signal, argument AlarmRepeats."""
CAPACITY_CHANGED = "capacity_changed"
"""Signal, argument DemandOutcome."""
LEASES_LOST = "leases_lost"
"""Signal, no argument: Redis lost its state; put your leases back."""
RECORD = "record"
"""Query of an incident, answers IncidentRecord."""


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


class UpdateResult(Message):
    """The answer to a person. Denied is a result, and stays in the record."""

    outcome: Literal["accepted", "denied", "already-done", "not-possible"]
    message: str


# ---------------------------------------------------------------- throttle mitigation


class MitigationInput(Message):
    """Starts the mitigation of one incident; it returns a MitigationResult once every lever acted or failed."""

    incident_id: str
    model: str
    reason: str
    """For lease and demand: what the incident is about."""
    load: LoadSnapshot
    snapshot: PolicySnapshot
    attempt: int = Field(ge=1)
    """1, and one more each time the alarm returns."""


class MitigationResult(Message):
    """The levers as they stand when the mitigation workflow ends, in the order of the way back."""

    levers: list[Lever]
    arithmetic: list[str]
    """The plan's sums, a line each."""
    demand: Demand | None
    """What was asked of the capacity workflow."""


LEVER_CHANGED = "lever_changed"
"""Signal to an incident, argument Lever: its mitigation moved a lever."""


# ---------------------------------------------------------------- cleanup


class CleanupInput(Message):
    """Starts the cleanup after an incident."""

    record: IncidentRecord
    snapshot: PolicySnapshot
    write_calendar: bool


class CleanupResult(Message):
    """What cleanup proved and wrote."""

    record: IncidentRecord


# ---------------------------------------------------------------- capacity

SET_DEMAND = "set_demand"
"""Update, argument Demand, answers DemandOutcome: recorded, and what will be done."""
WITHDRAW_DEMAND = "withdraw_demand"
"""Update, argument WithdrawDemand, answers DemandOutcome."""
RECONCILE_NOW = "reconcile_now"
"""Signal, no argument: compare the fleet with the demands now (after a mended role, a lost Redis)."""
CAPACITY_STATE = "capacity_state"
"""Query, answers CapacityState."""


class WithdrawDemand(Message):
    """Takes a demand back; unknown ids are a success."""

    demand_id: str
    reason: str


class CapacityState(Message):
    """Everything a capacity workflow knows; also what it carries over continue-as-new."""

    model: str
    demands: list[Demand] = []
    fleet: list[ProvisionedModel] = []
    """As last listed."""
    desired_units: int = 0
    units_in_service: int = 0
    doing: str = ""
    """What it is doing or waiting for, in words."""
    last_error: str = ""
    last_reconciled_at: AwareDatetime | None = None
    told: dict[str, DemandOutcome] = {}
    """The last outcome sent for each demand."""


class CapacityInput(Message):
    """Starts (or continues) the one writer of a model's capacity."""

    state: CapacityState
