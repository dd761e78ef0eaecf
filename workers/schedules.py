"""What runs again and again: the one list of our Temporal Schedules."""

from activities.schedules import ScheduledWorkflow
from domain.announcements import FEED_SCHEDULE, PUBLISHER_FEED_WORKFLOW
from domain.calendar_sync import CALENDAR_SCHEDULE, CALENDAR_SYNC_WORKFLOW
from domain.coupling import CAPACITY_COUPLING, CAPACITY_COUPLING_WORKFLOW
from domain.health import HEALTH_CHECK_WORKFLOW, HEALTH_SCHEDULE
from domain.messages import PolicySnapshot


def schedules(snapshot: PolicySnapshot) -> tuple[ScheduledWorkflow, ...]:
    """All of ours, as the policy says. A new one is one entry here."""
    policy = snapshot.policy
    health = ScheduledWorkflow(
        HEALTH_SCHEDULE,
        HEALTH_CHECK_WORKFLOW,
        every=policy.health.interval,
        catch_up=policy.health.interval,
        note="Is what stands what should stand: capacity, routes, quotas, permissions, schedules, orphans",
    )
    calendar = ScheduledWorkflow(
        CALENDAR_SCHEDULE,
        CALENDAR_SYNC_WORKFLOW,
        every=policy.calendar.sync_interval,
        catch_up=min([policy.calendar.sync_interval, *(x.lead_time for x in policy.calendar.event_types.values())]),
        note="Start, move and end the pre-provisioning of calendar events, as the table says",
    )
    wanted = [health, calendar]
    if policy.coupling:
        coupling = ScheduledWorkflow(
            CAPACITY_COUPLING,
            CAPACITY_COUPLING_WORKFLOW,
            every=policy.coupling.every,
            catch_up=policy.coupling.every,
            note="Capacity follows ECS tasks and utilisation before calls are throttled",
        )
        wanted.append(coupling)
    if policy.feed.url:
        feed = ScheduledWorkflow(
            FEED_SCHEDULE,
            PUBLISHER_FEED_WORKFLOW,
            every=policy.feed.interval,
            catch_up=policy.feed.interval,
            note="Read the publisher's feed, and propose calendar entries for what it announces",
        )
        wanted.append(feed)
    return tuple(wanted)
