"""What runs again and again: the one list of our Temporal Schedules."""

from activities.schedules import ScheduledWorkflow
from domain.coupling import CAPACITY_COUPLING, CAPACITY_COUPLING_WORKFLOW
from domain.health import HEALTH_CHECK_WORKFLOW, HEALTH_SCHEDULE
from domain.messages import PolicySnapshot


def schedules(snapshot: PolicySnapshot) -> tuple[ScheduledWorkflow, ...]:
    """All of ours, as the policy says. A new one is one entry here."""
    policy = snapshot.policy
    return (
        ScheduledWorkflow(
            HEALTH_SCHEDULE,
            HEALTH_CHECK_WORKFLOW,
            every=policy.health.interval,
            catch_up=policy.health.interval,
            note="Is what stands what should stand: capacity, routes, quotas, permissions, schedules, orphans",
        ),
        *(
            [
                ScheduledWorkflow(
                    CAPACITY_COUPLING,
                    CAPACITY_COUPLING_WORKFLOW,
                    every=policy.coupling.every,
                    catch_up=policy.coupling.every,
                    note="Capacity follows ECS tasks and utilisation before calls are throttled",
                )
            ]
            if policy.coupling
            else []
        ),
    )
