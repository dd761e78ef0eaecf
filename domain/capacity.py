"""Capacity: who asks for how many provisioned units until when, what there is, and the steps from one to the other.

AWS cannot change the units of a provisioned throughput; capacity is a *set* of provisioned models that a planner
creates and deletes (design check 1).
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from domain.clock import RehearsalClock
from domain.policy import CapacityPolicy, ModelPolicy, TimetablePolicy
from domain.purchases import Consent, Excess, Purchase

MANAGED_BY_TAG = "managed-by"
MANAGED_BY = "runbooks"
"""A provisioned model is ours when `MANAGED_BY_TAG` says so; nothing else is ever deleted. Of several deployments in
one account and region each has a value of its own."""


class DemandKind(StrEnum):
    """The largest of all holds, except that features add to it (design idea 2)."""

    TIMETABLE = "timetable"
    """Of the policy; the planner makes them, nobody sets them."""
    EVENT = "event"
    EMERGENCY = "emergency"
    """Also coupled scaling and the 80 % alarm."""
    PERSON = "person"
    FEATURE = "feature"
    """Units on top of what the others want."""


class Demand(BaseModel):
    """Somebody's dated wish for units of one model. Setting the same `demand_id` again replaces it."""

    model_config = ConfigDict(frozen=True)

    demand_id: str = Field(min_length=1, max_length=200)
    model: str
    kind: DemandKind
    units: int = Field(ge=0)
    """Total units wanted in service, not units on top; of a feature: units on top."""
    uncapped_units: int | None = Field(default=None, ge=0)
    """What would be wanted without the cap per incident: an approver may agree to it."""
    start: AwareDatetime
    """When they must be in service: they are bought `provisioning_lead` ahead of it."""
    end: AwareDatetime
    reason: str = Field(min_length=1, max_length=500)
    asked_by: str
    """Incident id or person."""

    @model_validator(mode="after")
    def _ends(self) -> "Demand":
        if self.end <= self.start:
            raise ValueError(f"end {self.end.isoformat()} must be after start {self.start.isoformat()}")
        return self


ModelStatus = Literal["Creating", "InService", "Updating", "Failed"]


class ProvisionedModel(BaseModel):
    """One provisioned throughput as Bedrock lists it."""

    model_config = ConfigDict(frozen=True)

    arn: str
    name: str
    units: int
    status: ModelStatus
    committed: bool = False
    ours: bool = False
    """Made by us: it carries our tag."""
    created_at: AwareDatetime
    failure: str | None = None
    asked_by: str | None = None
    """For whom we bought it, as its tags say; None: it is not ours, or they do not say."""
    until: AwareDatetime | None = None
    """End of the demand that it was bought for, as its tags say."""

    @property
    def in_service(self) -> bool:
        """It answers calls; also while its name is being changed."""
        return self.status in ("InService", "Updating")


class DemandOutcome(BaseModel):
    """What became of a demand; sent to the incident that asked."""

    model_config = ConfigDict(frozen=True)

    demand_id: str
    status: Literal["requested", "in_service", "failed", "withdrawn"]
    units_in_service: int
    """In service and routed: the data plane uses them."""
    units_wanted: int
    """Within floor, ceiling and quota."""
    detail: str
    """In words, for the timeline: what was requested, landed, refused and why."""


class Order(BaseModel):
    """A provisioned model as AWS is asked for it. Sent again it has the same token, so that it is bought once."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(max_length=63, pattern=r"^([0-9a-zA-Z][_-]?)+$")
    token: str = Field(max_length=256, pattern=r"^[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?$")
    units: int = Field(ge=1)
    asked_by: str
    until: AwareDatetime
    """End of the demand."""
    sequence: int = Field(ge=1)
    """Counts the orders for one model; never used twice."""


class StepKind(StrEnum):
    """What is done to one provisioned model, in the order of its life."""

    CREATE = "create"
    AWAIT = "wait until in service"
    PUBLISH = "publish route"
    WITHDRAW = "withdraw route"
    DRAIN = "drain"
    DELETE = "delete"


class Step(BaseModel):
    """One step of a plan."""

    model_config = ConfigDict(frozen=True)

    kind: StepKind
    name: str
    arn: str | None = None
    """None: not created yet."""
    units: int
    why: str
    ready: bool = True
    """May be taken now; otherwise a step before it has to end first."""
    order: Order | None = None
    """What to create."""


class Situation(BaseModel):
    """Everything the planner looks at."""

    model_config = ConfigDict(frozen=True)

    model: str
    spec: ModelPolicy
    policy: CapacityPolicy
    timetable: TimetablePolicy | None = None
    """None, or without this model: the baseline stands in, which is others' to provide."""
    clock: RehearsalClock = RehearsalClock()
    now: AwareDatetime
    demands: tuple[Demand, ...] = ()
    """All but the timetable's."""
    fleet: tuple[ProvisionedModel, ...] | None
    """None: not listed yet, or Bedrock does not answer."""
    sending: tuple[Order, ...] = ()
    """Asked of AWS at this moment."""
    unanswered: tuple[Order, ...] = ()
    """Asked of AWS without an answer: perhaps bought. They are asked for again before any new order is made."""
    next_sequence: int = Field(default=1, ge=1)
    """Number of the next new order."""
    leaving: frozenset[str] = frozenset()
    """ARNs whose deletion has been asked for."""
    routed: frozenset[str] = frozenset()
    """ARNs in the published routes."""
    troubles: tuple[str, ...] = ()
    """What keeps us from getting more units, in words."""
    purchases: tuple[Purchase, ...] = ()
    """What we bought for this model and counts for the caps, also what is gone."""
    consents: tuple[Consent, ...] = ()
    """What people agreed to."""
    paused: str = ""
    """Who stopped buying and releasing, and why; empty: nobody did."""


class Survey(BaseModel):
    """Asks to list the fleet and plan for it."""

    model_config = ConfigDict(frozen=True)

    situation: Situation
    """With the fleet as known before."""
    unlisted: frozenset[str] = frozenset()
    """ARNs that were bought and are in no list yet."""
    gone: frozenset[str] = frozenset()
    """ARNs that were proven gone, while lists may still have them."""


class ExpectedUnits(BaseModel):
    """Units of one model from a moment on."""

    model_config = ConfigDict(frozen=True)

    at: AwareDatetime
    units: int
    """In service, whoever made them."""
    wanted: int
    """By the demands, within floor, ceiling and quota."""


class PlanCost(BaseModel):
    """What our provisioned models cost; hours that were begun count whole."""

    model_config = ConfigDict(frozen=True)

    unit_hours_so_far: int = 0
    """Of those that stand, and of `Situation.purchases`."""
    unit_hours_ahead: int = 0
    """Within the plan's horizon."""
    usd_so_far: float | None = None
    """None: the model has no price."""
    usd_ahead: float | None = None


class CapacityPlan(BaseModel):
    """The way from the fleet to the units that are wanted at this moment."""

    model_config = ConfigDict(frozen=True)

    desired_units: int
    """What is wanted in service now or within the lead time."""
    wanted_for: str = ""
    """Who wants that, in words: who won, what it was larger than, what features add."""
    units_in_service: int
    ends_at_units: int
    """Units once every step has been taken."""
    why_not: str = ""
    """Why the steps do not end at `desired_units`, or not with the baseline's own; empty when they do."""
    summary: str
    """The state and the steps, in one line."""
    steps: tuple[Step, ...] = ()
    routes: dict[str, int] = {}
    """ARN to units: the routes that should stand now."""
    outcomes: tuple[DemandOutcome, ...] = ()
    """One for each demand that has not ended."""
    ended: tuple[str, ...] = ()
    """Ids of demands whose end has passed."""
    next_change_at: AwareDatetime | None = None
    """When time alone changes the plan."""
    expected: tuple[ExpectedUnits, ...] = ()
    """The units to expect from now to the horizon, at each change."""
    cost: PlanCost = PlanCost()
    excess: Excess | None = None
    """What would pass a cap and waits for a person; the steps do without it."""


class Surveyed(BaseModel):
    """The list, and the plan for it."""

    model_config = ConfigDict(frozen=True)

    listed: tuple[ProvisionedModel, ...]
    plan: CapacityPlan


def merged(
    known: Iterable[ProvisionedModel],
    listed: Iterable[ProvisionedModel],
    unlisted: Iterable[str],
    gone: Iterable[str],
) -> tuple[ProvisionedModel, ...]:
    """The fleet after a list, which may be older than what watching single models has shown."""
    before = {model.arn: model for model in known}
    after = {model.arn: model for model in listed if model.arn not in set(gone)}
    for arn, model in after.items():
        if arn in before and model.status in ("Creating", before[arn].status):
            after[arn] = before[arn]
    return tuple((after | {arn: before[arn] for arn in sorted(unlisted) if arn not in after}).values())
