"""Decisions that choose or count commands, run as activities: their results stand in the history, so that an
edited tree, plan or threshold never breaks the replay of a workflow in flight."""

from temporalio import activity

from domain import planner
from domain.announcements import FeedReport, Recognise, recognise
from domain.calendar_sync import CalendarPlan, PlanCalendar, plan_calendar
from domain.capacity import CapacityPlan, Situation
from domain.health import HealthReport, JudgeHealth
from domain.health_rules import judge
from domain.ladder import Ladder, Shortage, ladder
from domain.messages import AssessOverride, DiagnoseIncident, GuardRelease
from domain.mitigation import Guard, guard
from domain.override import Assessment, assess
from domain.pre_provisioning import (
    EndEvent,
    EventEnd,
    EventPlan,
    PlanEvent,
    end_event,
    plan_event,
)
from domain.runbooks import latency, scaling_lag, throttle
from domain.trees import Diagnosis, diagnose


class DecisionActivities:
    """Pure functions of the domain, recorded."""

    @activity.defn
    async def diagnose_throttle(self, request: DiagnoseIncident) -> Diagnosis:
        """The runbook's trees over what is known."""
        if request.runbook == "scaling-lag":
            return scaling_lag.diagnosed(request.evidence, request.policy)
        return diagnose(throttle.TREE, request.evidence)

    @activity.defn
    async def diagnose_latency(self, request: DiagnoseIncident) -> Diagnosis:
        """Scenario 3's tree over what is known."""
        return latency.diagnosed(request.evidence, request.policy)

    @activity.defn
    async def guard_release(self, request: GuardRelease) -> Guard:
        """Whether a lever may be released now."""
        return guard(request.lever, request.held, request.model, request.load, request.policy, request.base_units)

    @activity.defn
    async def plan_capacity(self, request: Situation) -> CapacityPlan:
        """The steps from the fleet to the units that are wanted."""
        return planner.plan(request)

    @activity.defn
    async def climb_ladder(self, request: Shortage) -> Ladder:
        """The rungs that are due while units are missing."""
        return ladder(request)

    @activity.defn
    async def plan_event(self, request: PlanEvent) -> EventPlan:
        """Sizes, times and demands of a calendar event, and what stands against it."""
        return plan_event(request)

    @activity.defn
    async def end_event(self, request: EndEvent) -> EventEnd:
        """Whether the units may go at the event's end, or stay for a while."""
        return end_event(request)

    @activity.defn
    async def plan_calendar(self, request: PlanCalendar) -> CalendarPlan:
        """Which events are to be followed, moved or given up."""
        return plan_calendar(request)

    @activity.defn
    async def assess_override(self, request: AssessOverride) -> Assessment:
        """What an override would do, and whether an approver must agree.

        Raises:
            ValueError: the knob does not take the value.
        """
        return assess(
            request.knob,
            request.value,
            pin=request.pin,
            now=request.now,
            ends_at=request.ends_at,
            leases=request.leases,
            load=request.load,
            policy=request.policy,
        )

    @activity.defn
    async def judge_health(self, request: JudgeHealth) -> HealthReport:
        """What is not as it should be, what to mend, whom to tell."""
        return judge(request.facts, request.snapshot, request.before)

    @activity.defn
    async def recognise_announcements(self, request: Recognise) -> FeedReport:
        """What the publisher's feed announces, as proposals for the calendar."""
        return recognise(request)
