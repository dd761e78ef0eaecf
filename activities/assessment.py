"""What an incident knows before it acts, read in one step because every step before the levers delays them."""

import asyncio
from datetime import UTC, datetime, timedelta

from temporalio import activity

from activities.cloudwatch import CloudWatchActivities
from activities.settings import SettingsActivities
from domain.load import LoadSnapshot
from domain.messages import AssessThrottle, LoadQuery, ThrottleAssessment, load_query
from domain.runbooks import throttle

_TRY_AGAIN = timedelta(milliseconds=100)


class AssessmentActivities:
    """The policy, the metrics, and the plan that follows from both."""

    def __init__(self, settings: SettingsActivities, cloudwatch: CloudWatchActivities) -> None:
        self._settings = settings
        self._cloudwatch = cloudwatch

    @activity.defn
    async def assess_throttle(self, request: AssessThrottle) -> ThrottleAssessment:
        """Scenario 1's levers for the load as it is now; when it cannot be read within the budget, for none."""
        snapshot = request.snapshot or self._settings.snapshot()
        policy = snapshot.policy
        if request.model not in policy.models:
            nothing = LoadSnapshot(observed_at=datetime.now(UTC))
            return ThrottleAssessment(snapshot=snapshot, load=nothing, plan=None)
        load, unread = await self._load(load_query(policy, request.model), policy.evidence.budget)
        plan = throttle.plan(request.model, load, policy, snapshot.clock, request.now)
        return ThrottleAssessment(snapshot=snapshot, load=load, unread=unread, plan=plan)

    async def _load(self, query: LoadQuery, budget: timedelta) -> tuple[LoadSnapshot, str]:
        why = f"no answer within {budget.total_seconds():g} s"
        try:
            async with asyncio.timeout(budget.total_seconds()):
                while True:
                    try:
                        return await asyncio.to_thread(self._cloudwatch.read_load, query), ""
                    except Exception as error:
                        why = str(error)
                    await asyncio.sleep(_TRY_AGAIN.total_seconds())
        except TimeoutError:
            return LoadSnapshot(observed_at=datetime.now(UTC)), why
