"""`runbooks iam`: what the product's processes may do in AWS."""

import re
from collections.abc import Callable
from typing import Annotated

import typer

from domain.people import AwsRole
from ops.cli_shared import EXIT_CODES, configuration, print_json

iam = typer.Typer(no_args_is_help=True, help="The IAM policies that the processes need.", epilog=EXIT_CODES)


@iam.callback()
def _top() -> None:
    """Typer takes the help from `iam`."""


def _checked(pattern: str, allowed: str) -> Callable[[str | None], str | None]:
    def check(value: str | None) -> str | None:
        if value is not None and not re.fullmatch(pattern, value):
            raise typer.BadParameter(f"{value!r} is not allowed; allowed is {allowed}.")
        return value

    return check


@iam.command()
def policy(
    role: Annotated[AwsRole, typer.Option(help="Whose policy; each process has a role of its own.")],
    account: Annotated[
        str | None,
        typer.Option(
            callback=_checked(r"\d{12}", "12 digits"),
            help="The AWS account's number. Default: that of the page topic, else any.",
        ),
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            callback=_checked(r"[a-z]{2}(-[a-z]+)+-\d", "a region's name, e.g. ap-northeast-1"),
            help="Default: RUNBOOKS_AWS_REGION.",
        ),
    ] = None,
    role_name: Annotated[
        str | None,
        typer.Option(
            callback=_checked(r"[\w+=,.@/-]{1,512}", "an IAM role's name, with its path"),
            help="The role's name: lets the process ask IAM what it may do, for calls that cannot be tried.",
        ),
    ] = None,
) -> None:
    """Print the least IAM policy of a process as JSON, ready to paste; what is left out, and why, on stderr.

    Generated from the calls that the process makes. The names of table, service, topic and queues are those of the
    RUNBOOKS_* variables, the models those of the policy file.
    """
    from domain.permissions import left_out, policy_document
    from ops.views import console
    from workers.permissions import scope_of

    settings, numbers = configuration()
    if region is not None:
        settings = settings.model_copy(update={"aws_region": region})
    scope = scope_of(settings, numbers)
    if account is not None:
        scope = scope.model_copy(update={"account": account})
    if role_name is not None:
        scope = scope.model_copy(update={"role_arn": f"arn:aws:iam::{scope.account}:role/{role_name}"})
    for line in left_out(role, scope):
        console(stderr=True).print(line, soft_wrap=True)
    document = policy_document(role, scope)
    if not document["Statement"]:
        console(stderr=True).print(f"{role} needs no policy: it makes no call to AWS that IAM judges.")
        return
    print_json(document)
