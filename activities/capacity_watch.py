"""Watching capacity while nothing is to be done: no history per look, and no slot held between looks."""

from collections.abc import Callable, Iterable

from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from activities.bedrock import BedrockActivities
from dataplane.routes import Routes
from domain.capacity import ProvisionedModel
from domain.messages import PolicySnapshot, WatchCapacity


class CapacityWatch:
    """Compares fleet, policy and routes with what a capacity workflow knows. Retries are its looks."""

    def __init__(self, policy: Callable[[], PolicySnapshot], bedrock: BedrockActivities, routes: Routes) -> None:
        self._policy = policy
        self._bedrock = bedrock
        self._routes = routes

    @activity.defn
    def watch_capacity(self, request: WatchCapacity) -> str:
        """Answer what is other than known. The first look is one interval after the start: it has just been looked.

        Raises:
            ApplicationError: AsBefore, to be tried again after the interval. What Bedrock or Redis raise passes.
        """
        if activity.info().attempt > 1 and (changed := self._changed(request)):
            return changed
        raise ApplicationError(
            "as before", type="AsBefore", next_retry_delay=request.every, category=ApplicationErrorCategory.BENIGN
        )

    def _changed(self, request: WatchCapacity) -> str:
        if self._policy() != request.snapshot:
            return "the policy"
        spec = request.snapshot.policy.models[request.model]
        if _seen(self._bedrock.listed(spec, request.fleet)) != _seen(request.fleet):
            return "the fleet"
        held = self._routes.read_all().get(request.model)
        if held is None or {route.provisioned_model_arn: route.units for route in held.routes} != request.routes:
            return "the routes"
        return ""


def _seen(models: Iterable[ProvisionedModel]) -> set[tuple[str, int, str]]:
    return {(model.arn, model.units, model.status) for model in models}
