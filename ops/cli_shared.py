"""What the groups of `runbooks` share: options, exit codes, a service to work with, and how results are told."""

import asyncio
import json
import os
from collections.abc import Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from domain.messages import UpdateResult
    from domain.policy import Policy
    from ops.service import OpsError, OpsService
    from workers.settings import Settings

EXIT_CODES = """Exit codes:

\b
0    done
1    unexpected, or a stack that failed
2    wrong usage
3    no such incident, override, model or demand
4    denied: no token or a wrong one, or not your role
5    not possible: it is over, or refuses
6    Temporal, its worker or Redis does not answer
130  interrupted"""


def duration(text: str | timedelta) -> timedelta:
    """Parser of options: `45m`, `2h`, `1h30m`. Wrong usage otherwise."""
    if isinstance(text, timedelta):
        return text
    from ops.service import OpsError, parse_duration

    try:
        return parse_duration(text)
    except OpsError as error:
        raise typer.BadParameter(str(error)) from None


Json = Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else, errors included.")]
Why = Annotated[str, typer.Option("--why", help="Why, in a few words; it stays in the record.")]
For = Annotated[
    timedelta,
    typer.Option("--for", parser=duration, metavar="DURATION", help="How long, in business time: 45m, 2h, 1h30m."),
]
ForOrDefault = Annotated[
    timedelta | None,
    typer.Option(
        "--for",
        parser=duration,
        metavar="DURATION",
        help="How long, in business time: 45m, 2h, 1h30m. Default: the policy's; never endless.",
    ),
]
By = Annotated[
    timedelta,
    typer.Option(parser=duration, metavar="DURATION", help="How much longer in business time: 45m, 2h, 1h30m."),
]
ClosedWithin = Annotated[
    timedelta,
    typer.Option(parser=duration, metavar="DURATION", show_default="24h", help="Also those closed so recently."),
]
Limit = Annotated[int, typer.Option(min=1, max=500, help="At most so many.")]
Reason = Annotated[str, typer.Option("--reason", help="Why, in a few words; it stays in the record.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help="File with your token. Without it: RUNBOOKS_TOKEN (the token itself), then RUNBOOKS_TOKEN_FILE.",
    ),
]


def with_service(work: "Callable[[OpsService, Settings], Coroutine[Any, Any, int]]", as_json: bool) -> None:
    """Connect, do `work`, end with its exit code or with that of what went wrong."""
    from ops.service import OpsError, OpsService

    async def connected() -> int:
        settings = read_settings()
        return await work(await OpsService.connect(settings), settings)

    try:
        code = asyncio.run(connected())
    except OpsError as error:
        fail(error, as_json)
    if code:
        raise typer.Exit(code)


def decide(
    action: "Callable[[OpsService, str | None], Coroutine[Any, Any, UpdateResult]]",
    token_file: Path | None,
    as_json: bool,
) -> None:
    """Do what needs a person's token, say the result, end with the exit code of its outcome."""

    async def work(service: "OpsService", settings: "Settings") -> int:
        from ops.service import EXIT_CODES_OF_OUTCOMES
        from ops.views import console, plain

        result = await action(service, read_token(token_file, settings))
        if as_json:
            print_json(result.model_dump(mode="json"))
        else:
            style = "green" if result.outcome in ("accepted", "already-done") else "bold red"
            console().print(f"{result.outcome}: {plain(result.message)}", style=style, soft_wrap=True)
        return EXIT_CODES_OF_OUTCOMES[result.outcome]

    with_service(work, as_json)


def read_settings() -> "Settings":
    """From the environment.

    Raises:
        OpsError: USAGE, a variable has a value that is not allowed.
    """
    from pydantic import ValidationError

    from ops.service import ExitCode, OpsError
    from workers.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"RUNBOOKS_{'_'.join(map(str, first['loc']))}".upper()
        raise OpsError(f"{name}: {first['input']!r} is not allowed.", f"{first['msg']}.", ExitCode.USAGE) from None


def configuration() -> "tuple[Settings, Policy]":
    """The settings and the policy file; what is wrong with them is said, and ends the command."""
    from activities.settings import ConfigurationError, load_policy
    from ops.service import ExitCode, OpsError

    try:
        settings = read_settings()
        return settings, load_policy(settings.policy_file, settings.clock)
    except ConfigurationError as error:
        fail(OpsError(str(error), "Mend the policy file.", ExitCode.USAGE), as_json=False)
    except OpsError as error:
        fail(error, as_json=False)


def read_token(token_file: Path | None, settings: "Settings") -> str | None:
    """The caller's token; None: there is none.

    Raises:
        OpsError: DENIED, its file cannot be read.
    """
    from ops.service import ExitCode, OpsError

    if token_file is None and (token := os.environ.get("RUNBOOKS_TOKEN")):
        return token
    path = token_file or settings.token_file
    if path is None:
        return None
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise OpsError(
            f"Token file {path}: {reason}.", "Give the file with your token as --token-file.", ExitCode.DENIED
        ) from None


def print_json(value: Any, indent: int | None = 2) -> None:
    """ASCII only, so that hostile text is inert even on a terminal."""
    print(json.dumps(value, indent=indent), flush=True)


def fail(error: "OpsError", as_json: bool) -> NoReturn:
    """Say what went wrong and what to do next, and end with its exit code."""
    if as_json:
        said: dict[str, object] = {"message": error.message, "next_step": error.next_step}
        said["exit_code"] = int(error.exit_code)
        if wrong := error.not_allowed:
            said["not_allowed"] = {"field": wrong.field, "value": str(wrong.value)[:100], "allowed": wrong.allowed}
        print_json({"error": said})
    else:
        from ops.views import console, plain

        out = console(stderr=True)
        out.print(plain(error.message), style="bold red", soft_wrap=True)
        out.print(plain(error.next_step), soft_wrap=True)
    raise typer.Exit(int(error.exit_code)) from None
