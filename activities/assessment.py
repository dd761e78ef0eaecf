"""What an incident knows before it acts, read in one step because every step before the levers delays them."""

import asyncio
from datetime import UTC, datetime

from temporalio import activity

from activities._budgeted import budgeted, not_read
from activities.bedrock import BedrockActivities
from activities.calendar import CalendarActivities
from activities.cloudwatch import CloudWatchActivities
from activities.plumbing import Plumbing
from activities.settings import SettingsActivities
from domain import timetable
from domain.coupling import schedules_of
from domain.evidence import Check, EvidenceKey
from domain.load import LoadSnapshot
from domain.messages import (
    AssessIncident,
    CheckPlumbing,
    IncidentAssessment,
    PolicySnapshot,
    calendar_check,
    load_query,
)
from domain.runbooks import scaling_lag, throttle


class AssessmentActivities:
    """The policy, the metrics, the units and the calendar, and the plan that follows from all of them."""

    def __init__(
        self,
        settings: SettingsActivities,
        cloudwatch: CloudWatchActivities,
        bedrock: BedrockActivities,
        calendar: CalendarActivities,
        plumbing: Plumbing,
    ) -> None:
        self._settings = settings
        self._cloudwatch = cloudwatch
        self._bedrock = bedrock
        self._calendar = calendar
        self._plumbing = plumbing

    @activity.defn
    async def assess_throttle(self, request: AssessIncident) -> IncidentAssessment:
        """Which scenario it is, and its levers. What cannot be read within the budget is planned without.

        Without the load nothing is bought; without the units or the calendar it is scenario 1.
        """
        snapshot = request.snapshot or self._settings.snapshot()
        policy, model, now = snapshot.policy, request.model, request.now
        if model not in policy.models:
            nothing = LoadSnapshot(observed_at=datetime.now(UTC))
            return IncidentAssessment(snapshot=snapshot, load=nothing, plan=None)
        budget, spec = policy.evidence.budget, policy.models[model]
        (load, unread), (fleet, _), (near, _) = await asyncio.gather(
            budgeted(budget, lambda: asyncio.to_thread(self._cloudwatch.read_load, load_query(policy, model))),
            budgeted(budget, lambda: asyncio.to_thread(self._bedrock.units_of, spec)),
            budgeted(budget, lambda: asyncio.to_thread(self._event_near, model, snapshot, now)),
        )
        in_service = fleet.units if fleet else None
        expected = timetable.units_at(policy, model, snapshot.clock.business(now))
        lags, why = scaling_lag.units_lag(in_service, expected, near)
        load = load or LoadSnapshot(observed_at=datetime.now(UTC))
        plan, checks = throttle.plan(model, load, policy, snapshot.clock, now, expected), list[Check]()
        if lags and fleet is not None:
            plan = scaling_lag.plan(model, load, policy, now, fleet.units, expected)
            asked = CheckPlumbing(
                model=model, spec=spec, expected_units=expected, fleet=fleet, schedules=schedules_of(policy)
            )
            found, unseen = await budgeted(budget, lambda: self._plumbing.check(asked))
            checks = [found or not_read("Provisioning", unseen)]
        return IncidentAssessment(
            snapshot=snapshot,
            load=load,
            unread=unread,
            plan=plan,
            runbook="scaling-lag" if lags else "throttle",
            why=why,
            units_in_service=in_service,
            checks=checks,
        )

    def _event_near(self, model: str, snapshot: PolicySnapshot, now: datetime) -> bool | None:
        """Whether the incident is within an event's window; None: a row that cannot be read might be one."""
        [check] = self._calendar.check_calendar(calendar_check(snapshot, model, now))
        found = check.evidence.value(EvidenceKey.EVENT_CONFIGURED)
        return found if isinstance(found, bool) else None
