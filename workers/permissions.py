"""Where the IAM statements of this installation apply, and what a process says at its start about missing ones."""

from typing import Any
from urllib.parse import urlsplit

import structlog

from activities.permissions import check
from activities.settings import ConfigurationError, load_policy
from domain.people import AwsRole
from domain.permissions import Scope
from domain.policy import Policy
from workers.clients import AwsClients
from workers.settings import Settings

_log = structlog.get_logger()


def scope_of(settings: Settings, policy: Policy | None = None) -> Scope:
    """As configured. The account is that of the page topic, until somebody says better.

    Without a `policy` its file is read; while that is broken, statements are for every model.
    """
    if policy is None:
        try:
            policy = load_policy(settings.policy_file, settings.clock)
        except ConfigurationError:
            policy = None
    topic = settings.page_topic_arn
    given: dict[str, Any] = {} if policy is None else {"model_ids": _model_ids(policy)}
    return Scope(
        account=parts[4] if len(parts := (topic or "").split(":")) == 6 else "*",
        region=settings.aws_region,
        owner=settings.owner,
        ecs_cluster=settings.ecs_cluster,
        ecs_service=settings.ecs_service,
        event_table=settings.event_table,
        page_topic_arn=topic,
        alarm_queue_arn=_queue_arn(settings.alarm_queue_url, settings.aws_region),
        dead_letter_queue_arn=_queue_arn(settings.dead_letter_queue_url, settings.aws_region),
        **given,
    )


def _model_ids(policy: Policy) -> tuple[str, ...]:
    bought = {model_id for model in policy.models.values() for model_id in (model.model_id, model.provisioned_model_id)}
    return tuple(sorted(bought))


def _queue_arn(url: str | None, region: str) -> str | None:
    """A queue's URL ends in its account and name."""
    if not url:
        return None
    account, _, name = urlsplit(url).path.strip("/").partition("/")
    return f"arn:aws:sqs:{region}:{account}:{name}"


def say_missing(role: AwsRole, settings: Settings, policy: Policy, aws: AwsClients) -> None:
    """Log each permission that `role` lacks, with the statement to add; the process serves on with what it may do."""
    try:
        checked = check(role, scope_of(settings, policy), aws.client)
    except Exception as error:
        _log.warning("permissions are not checked", error=str(error)[:500])
        return
    for finding in checked.denied:
        _log.error("a permission is missing", action=finding.action, add=finding.statement, why=finding.detail)
    unknown = [finding.action for finding in checked.findings if finding.verdict == "not verifiable"]
    _log.info("permissions are checked", missing=len(checked.denied), not_verifiable=unknown)
