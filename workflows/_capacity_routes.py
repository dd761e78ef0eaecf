"""Publishes a model's capacity routes: in order, whenever they change, and again at each reconciliation."""

from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.bedrock import BedrockActivities
from domain.routes import CapacityRoute, CapacityRoutes, Overflow
from workflows._capacity import Capacity
from workflows._step import failure, mutate

PUBLISH_WITHIN = timedelta(seconds=30)
"""Short, so that a list made meanwhile goes out instead of an old one that Redis did not take."""


class PublishesRoutes(Capacity):
    """One list at a time; what a list says is reachable until the next one is published."""

    def set_overflow(self, overflow: tuple[Overflow, ...]) -> None:
        """Where calls go that the provisioned models do not take."""
        if overflow != self.overflow:
            self.overflow, self.republish = overflow, True

    @property
    def must_publish(self) -> bool:
        """The routes are not, or not known to be, as they should be."""
        known = self.listed_at is not None and self.plan is not None
        return known and (self.republish or self.publishing or self.routes != self.routed)

    async def keep_routes(self) -> None:
        """Runs for ever."""
        while True:
            await workflow.wait_condition(lambda: self.must_publish)
            routes, self.republish, self.publishing = self.routes, False, True
            if self.reachable is not None:
                self.reachable |= routes.keys()
            self.route_version = max(self.route_version + 1, round(workflow.now().timestamp() * 1000))
            message = CapacityRoutes(
                model=self.model,
                routes=tuple(
                    CapacityRoute(provisioned_model_arn=arn, units=units) for arn, units in sorted(routes.items())
                ),
                overflow=self.overflow,
                version=self.route_version,
            )
            try:
                await mutate(
                    BedrockActivities.publish_routes,
                    message,
                    summary=f"Publish routes: {sum(routes.values())} units in {len(routes)} models",
                    within=PUBLISH_WITHIN,
                )
            except ActivityError as error:
                self.errors["routes"] = f"routes are not published: {failure(error)[1]}"
                self.republish = self.replan = True
                self.publishing = False
                await workflow.sleep(self.policy.poll_interval, summary="Publish the routes again")
            else:
                self.errors.pop("routes", None)
                self.replan = self.replan or self.routed != routes
                self.routed, self.reachable = routes, set(routes)
                self.publishing = False
