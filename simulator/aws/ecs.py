"""ECS: tasks take time to start. Running counts follow the desired count in batches instead of at once."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from moto.core.responses import ActionResult
from moto.ecs import urls
from moto.ecs.models import EC2ContainerServiceBackend
from moto.ecs.responses import EC2ContainerServiceResponse

from simulator.aws.world import ENVIRON_KEY, World


@dataclass(frozen=True)
class Ramp:
    """From `running` tasks at `since` towards the desired count."""

    since: datetime
    running: int

    def running_at(self, now: datetime, desired: int, world: World) -> int:
        """Tasks start a batch at a time; surplus tasks stop at once."""
        batches = int((now - self.since) / world.settings.task_start)
        return min(desired, self.running + batches * world.settings.tasks_per_batch)


class StartingEcsResponse(EC2ContainerServiceResponse):
    """moto's ECS with counts that take time."""

    @property
    def _world(self) -> World:
        world: World = self.normalized_request.environ[ENVIRON_KEY]
        return world

    def create_service(self) -> ActionResult:
        """The first deployment starts from no task."""
        answer = super().create_service()
        service = answer.result["service"]  # type: ignore[index]
        service.__dict__["_simulator_ramp"] = Ramp(datetime.now(UTC), 0)
        _advance(service, self._world)
        return answer

    def update_service(self) -> ActionResult:
        """A new desired count is approached from what runs now."""
        for service in self._services():
            _advance(service, self._world)
        running = {service.arn: service.running_count for service in self._services()}
        answer = super().update_service()
        service = answer.result["service"]  # type: ignore[index]
        service.__dict__["_simulator_ramp"] = Ramp(datetime.now(UTC), running[service.arn])
        _advance(service, self._world)
        return answer

    def describe_services(self) -> ActionResult:
        """With counts as of now."""
        for service in self._services():
            _advance(service, self._world)
        return super().describe_services()

    def _services(self) -> list[Any]:
        return list(self.ecs_backend.services.values())


def _advance(service: Any, world: World) -> None:
    ramp: Ramp = service.__dict__["_simulator_ramp"]
    desired = service.desired_count
    service.running_count = ramp.running_at(datetime.now(UTC), desired, world)
    service.pending_count = min(world.settings.tasks_per_batch, desired - service.running_count)
    done = service.running_count == desired
    for deployment in service.deployments[:1]:
        deployment["desiredCount"] = desired
        deployment["runningCount"] = service.running_count
        deployment["pendingCount"] = service.pending_count
        deployment["rolloutState"] = "COMPLETED" if done else "IN_PROGRESS"
        deployment["rolloutStateReason"] = (
            f"ECS deployment {deployment['id']} {'completed' if done else 'in progress'}."
        )
        deployment["taskDefinition"] = service.task_definition


def settle(world: World, backend: EC2ContainerServiceBackend) -> None:
    """Every service runs what it desires, now."""
    for service in backend.services.values():
        service.__dict__["_simulator_ramp"] = Ramp(datetime.now(UTC), service.desired_count)
        _advance(service, world)


def install() -> None:
    """Put it in moto's place. Before the server starts."""
    for path in urls.url_paths:
        urls.url_paths[path] = StartingEcsResponse.dispatch
