"""`runbooks health` and `runbooks alarms`: is what stands what should stand, and who is woken when it is not."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli_shared import Json, configuration, fail, print_json, with_service

if TYPE_CHECKING:
    from ops.service import OpsService
    from workers.settings import Settings

UNHEALTHY = 1


def health(
    now: Annotated[bool, typer.Option("--now", help="Check now, instead of showing the last result.")] = False,
    as_json: Json = False,
) -> None:
    """What is not as it should be: what, why it matters, what to do. Exit code 1 when anything is open.

    Checked are capacity, routes, quotas, permissions, schedules and orphans, every 15 minutes by itself.
    """

    async def work(service: "OpsService", settings: "Settings") -> int:
        found = await (service.check_now() if now else service.last_check())
        if as_json:
            print_json(found.model_dump(mode="json"))
        else:
            from datetime import UTC, datetime

            from ops.views import Times, console, health_view

            console().print(health_view(found, Times(datetime.now(UTC), settings.clock)))
        return 0 if found.healthy else UNHEALTHY

    with_service(work, as_json)


class AlarmFormat(StrEnum):
    """How the alarms are printed."""

    CLOUDFORMATION = "cloudformation"
    CLI = "cli"


def alarms(
    shape: Annotated[
        AlarmFormat,
        typer.Option(
            "--format",
            help="A CloudFormation template, or a list of inputs for aws cloudwatch put-metric-alarm "
            "--cli-input-json, which needs the topics.",
        ),
    ] = AlarmFormat.CLOUDFORMATION,
    alarm_topic: Annotated[str | None, typer.Option(help="ARN of the SNS topic that feeds the intake's queue.")] = None,
    page_topic: Annotated[
        str | None, typer.Option(help="ARN of the on-call tool's SNS topic. Default: RUNBOOKS_PAGE_TOPIC_ARN.")
    ] = None,
) -> None:
    """Print the CloudWatch alarms that the product needs, as JSON: throttles, failed provisioning, waits, heartbeat.

    The heartbeat's alarm goes to the on-call tool directly, past everything of ours.
    """
    from domain.alarm_definitions import alarm_definitions, put_metric_alarm, template
    from ops.service import ExitCode, OpsError

    settings, policy = configuration()
    if shape is AlarmFormat.CLOUDFORMATION:
        print_json(template(policy))
        return
    topics = {"intake": alarm_topic, "on-call": page_topic or settings.page_topic_arn}
    if missing := [
        name for name, topic in (("--alarm-topic", topics["intake"]), ("--page-topic", topics["on-call"])) if not topic
    ]:
        said = f"{' and '.join(missing)}: not given."
        fail(OpsError(said, "Give the ARNs of the topics.", ExitCode.USAGE), as_json=False)
    print_json([put_metric_alarm(item, topics[item.tells]) for item in alarm_definitions(policy)])
