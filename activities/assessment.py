"""What an incident knows before it acts, read in one step because every step before the levers delays them."""

from temporalio import activity

from activities.cloudwatch import CloudWatchActivities
from activities.settings import SettingsActivities
from domain.messages import AssessThrottle, ThrottleAssessment, load_query
from domain.runbooks import throttle


class AssessmentActivities:
    """The policy, the metrics, and the plan that follows from both."""

    def __init__(self, settings: SettingsActivities, cloudwatch: CloudWatchActivities) -> None:
        self._settings = settings
        self._cloudwatch = cloudwatch

    @activity.defn
    def assess_throttle(self, request: AssessThrottle) -> ThrottleAssessment:
        """Scenario 1's levers for the load as it is now."""
        snapshot = request.snapshot or self._settings.snapshot()
        load = self._cloudwatch.read_load(load_query(snapshot.policy, request.model))
        plan = throttle.plan(request.model, load, snapshot.policy, snapshot.clock, request.now)
        return ThrottleAssessment(snapshot=snapshot, load=load, plan=plan)
