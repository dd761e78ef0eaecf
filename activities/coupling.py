"""What coupled scaling looks at, read in one step."""

import asyncio

from temporalio import activity

from activities.cloudwatch import CloudWatchActivities
from activities.ecs import EcsActivities
from activities.entities import EntityActivities
from activities.settings import SettingsActivities
from domain.coupling import AssessCoupling, CouplingPlan, plan
from domain.messages import load_query


class CouplingActivities:
    """ECS, CloudWatch and the capacity workflows, and the plan that follows from them."""

    def __init__(
        self,
        settings: SettingsActivities,
        cloudwatch: CloudWatchActivities,
        ecs: EcsActivities,
        entities: EntityActivities,
    ) -> None:
        self._settings = settings
        self._cloudwatch = cloudwatch
        self._ecs = ecs
        self._entities = entities

    @activity.defn
    async def assess_coupling(self, request: AssessCoupling) -> CouplingPlan:
        """The demands, the per-task rate and the proposals of this minute.

        AWS's, Temporal's and the policy's errors pass through: the minute is left out, and the next one looks again.
        """
        snapshot = self._settings.snapshot()
        models = list(snapshot.policy.models)
        load, tasks, states = await asyncio.gather(
            asyncio.to_thread(self._cloudwatch.read_load, load_query(snapshot.policy, None)),
            asyncio.to_thread(self._ecs.running_tasks),
            asyncio.gather(*(self._entities.capacity_state(model) for model in models)),
        )
        capacity = dict(zip(models, states, strict=True))
        return plan(snapshot, request.now, load, tasks, capacity, request.state)
