"""The process that runs the runbooks' workflows and activities: `python -m workers.runbook_worker`."""

import argparse
import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import structlog
from pydantic import ValidationError
from temporalio.service import RPCError
from temporalio.worker import Worker

from activities.assessment import AssessmentActivities
from activities.bedrock import BedrockActivities
from activities.calendar import CalendarActivities
from activities.capacity_watch import CapacityWatch
from activities.changes import ChangeActivities
from activities.cloudwatch import CloudWatchActivities
from activities.coupling import CouplingActivities
from activities.decisions import DecisionActivities
from activities.ecs import EcsActivities
from activities.entities import EntityActivities, start_capacity
from activities.events import EventActivities
from activities.feed import FeedActivities
from activities.health import HealthActivities
from activities.latency import LatencyActivities
from activities.leases import LeaseActivities
from activities.pages import PageActivities
from activities.permissions import PermissionActivities
from activities.plumbing import Plumbing
from activities.report import ReportActivities
from activities.schedules import ScheduleActivities, ensure_schedules
from activities.settings import ConfigurationError, SettingsActivities, load_policy, load_yaml
from activities.standing import StandingActivities
from dataplane.connection import connect as connect_redis
from dataplane.knobs import Knobs
from dataplane.ledger import Ledger
from dataplane.routes import Routes
from domain.messages import PolicySnapshot
from domain.people import AwsRole, Roster
from workers.clients import AwsClients
from workers.incidents import start_or_join
from workers.lifecycle import configure_logs, keep_loaded, leave, run_until_signalled, say_ready
from workers.permissions import say_missing, scope_of
from workers.redis_loss import watch_redis
from workers.schedules import schedules
from workers.settings import Settings
from workers.temporal import connect
from workflows.calendar_sync import CalendarSyncWorkflow
from workflows.capacity import CapacityWorkflow
from workflows.capacity_coupling import CapacityCouplingWorkflow
from workflows.event_pre_provisioning import EventPreProvisioningWorkflow
from workflows.health_check import HealthCheckWorkflow
from workflows.incident import IncidentWorkflow
from workflows.latency_regression import LatencyRegressionWorkflow
from workflows.override import OverrideWorkflow
from workflows.post_incident_cleanup import PostIncidentCleanupWorkflow
from workflows.publisher_feed import PublisherFeedWorkflow
from workflows.scaling_lag_mitigation import ScalingLagMitigationWorkflow
from workflows.throttle_mitigation import ThrottleMitigationWorkflow

WORKFLOWS: list[type] = [
    IncidentWorkflow,
    ThrottleMitigationWorkflow,
    ScalingLagMitigationWorkflow,
    LatencyRegressionWorkflow,
    CapacityCouplingWorkflow,
    PostIncidentCleanupWorkflow,
    CapacityWorkflow,
    CalendarSyncWorkflow,
    EventPreProvisioningWorkflow,
    OverrideWorkflow,
    HealthCheckWorkflow,
    PublisherFeedWorkflow,
]
ACTIVITY_SLOTS = 1000
"""Every open incident waits in one or two activities at all times; those hold a slot and no thread."""
DRAIN = timedelta(seconds=10)
"""What a running activity may still take after SIGTERM."""

_log = structlog.get_logger()


def activities(settings: Settings, aws: AwsClients, ledger: Ledger, routes: Routes) -> list[Any]:
    """Every activity, its clients injected."""
    names = {"cluster": settings.ecs_cluster, "service": settings.ecs_service}
    cloudwatch = CloudWatchActivities(aws.cloudwatch(), ecs_cluster=names["cluster"], ecs_service=names["service"])
    leases = LeaseActivities(ledger)
    bedrock = BedrockActivities(aws.bedrock(), routes, settings.owner)
    calendar = CalendarActivities(aws.dynamodb(), table=settings.event_table)
    decisions = DecisionActivities()
    configured = SettingsActivities(
        policy_file=settings.policy_file, roster_file=settings.roster_file, clock=settings.clock
    )
    entities = EntityActivities(configured.snapshot)
    ecs = EcsActivities(aws.ecs(), **names)
    changes = ChangeActivities(ledger, aws.ecs(), aws.cloudtrail(), **names)
    pages = PageActivities(aws.sns(), topic_arn=settings.page_topic_arn, log=settings.state_dir / "pages.jsonl")
    health = HealthActivities(aws.cloudwatch(), start_or_join)
    report = ReportActivities(aws.cloudwatch(), settings.state_dir / "reports")
    permissions = PermissionActivities(aws.client, lambda: scope_of(settings, configured.snapshot().policy))
    owners = (
        StandingActivities(configured, leases),
        AssessmentActivities(configured, cloudwatch, bedrock, calendar, Plumbing(bedrock)),
        LatencyActivities(configured, cloudwatch, ledger),
        CouplingActivities(configured, cloudwatch, ecs, entities),
        cloudwatch,
        leases,
        bedrock,
        CapacityWatch(configured.snapshot, bedrock, routes),
        calendar,
        EventActivities(cloudwatch),
        entities,
        decisions,
        configured,
        ecs,
        changes,
        pages,
        permissions,
        report,
        health,
        ScheduleActivities(schedules),
        FeedActivities(),
    )
    return [
        method
        for owner in owners
        for name in dir(owner)
        if hasattr(method := getattr(owner, name), "__temporal_activity_definition")
    ]


async def serve(settings: Settings) -> None:
    """Run the worker until cancelled; running activities get `DRAIN` then."""
    client = await connect(settings)
    connection = connect_redis(settings.redis_url)
    ledger, routes = Ledger(connection), Routes(connection)
    aws = AwsClients(settings)
    with ThreadPoolExecutor(ACTIVITY_SLOTS, thread_name_prefix="activity") as threads:
        worker = Worker(
            client,
            task_queue=settings.task_queue,
            workflows=WORKFLOWS,
            activities=activities(settings, aws, ledger, routes),
            activity_executor=threads,
            max_concurrent_activities=ACTIVITY_SLOTS,
            graceful_shutdown_timeout=DRAIN,
        )
        await asyncio.to_thread(aws.warm)
        policy = load_policy(settings.policy_file, settings.clock)
        async with worker:
            for model in policy.models:
                await start_capacity(client, model, settings.task_queue)
            snapshot = PolicySnapshot(policy=policy, clock=settings.clock)
            await ensure_schedules(client, schedules(snapshot), settings.task_queue)
            say_ready()
            _log.info("runbook worker is ready", task_queue=settings.task_queue)
            await asyncio.to_thread(ReportActivities.warm)
            keep_loaded()
            await asyncio.to_thread(say_missing, AwsRole.WORKER, settings, policy, aws)
            with Knobs(connection, policy.baseline) as knobs:
                await watch_redis(ledger, knobs, client)


def main() -> int:
    """Entry point; the exit code: 0 stopped by a signal, 1 no server, 2 wrong settings."""
    argparse.ArgumentParser(
        prog="python -m workers.runbook_worker",
        description="Runs the runbooks' workflows and activities until SIGTERM.",
        epilog="Settings are the environment variables RUNBOOKS_* of workers/settings.py.",
    ).parse_args()
    configure_logs()
    try:
        settings = Settings()
        load_policy(settings.policy_file, settings.clock)
        load_yaml(Roster, settings.roster_file)
    except (ValidationError, ConfigurationError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        asyncio.run(run_until_signalled(serve(settings)))
    except (RuntimeError, RPCError) as error:
        print(f"Temporal at {settings.temporal_address} cannot be reached: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
