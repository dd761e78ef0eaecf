"""`runbooks calendar`: the events that capacity is provisioned for ahead of time."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli_shared import EXIT_CODES, Json, TokenFile, print_json, read_token, with_service

if TYPE_CHECKING:
    from ops.calendar import CalendarChange
    from ops.service import OpsService
    from workers.settings import Settings

calendar = typer.Typer(
    no_args_is_help=True,
    help="The event calendar: what capacity is provisioned for ahead of time.",
    epilog=EXIT_CODES,
)

EventId = Annotated[str, typer.Argument(metavar="EVENT", help="Its id, as `runbooks calendar list` shows it.")]
Type = Annotated[str | None, typer.Option("--type", help="A key of the policy's calendar.event_types.")]
Start = Annotated[
    str | None, typer.Option("--start", help="When it starts: 2026-11-30T00:00, with --zone or with its offset.")
]
Zone = Annotated[str | None, typer.Option("--zone", help="Time zone of the start, e.g. Asia/Tokyo.")]
Multiplier = Annotated[str | None, typer.Option("--multiplier", help="Of traffic, e.g. 4. Default: the type's.")]
Models = Annotated[str | None, typer.Option("--models", help="E.g. sonnet,haiku. Default: all with a forecast.")]
Lead = Annotated[
    str | None,
    typer.Option("--lead-time", help="The units are in service so long before the start: 4h. Default: the type's."),
]
Source = Annotated[str | None, typer.Option("--source", help="Where it comes from. Default: you.")]


@calendar.command("list")
def list_(as_json: Json = False) -> None:
    """Every row, the first to start first: what was planned, and what pre-provisioning did about it."""

    async def work(service: "OpsService", settings: "Settings") -> int:
        rows = await service.list_events()
        if as_json:
            print_json(rows.model_dump(mode="json"))
            return 0
        from ops.views import calendar_table, console, plain

        console().print(calendar_table(rows.events) if rows.events else "The calendar has no event.")
        for text in rows.broken.values():
            console().print(plain(text), style="bold red", soft_wrap=True)
        return 0

    with_service(work, as_json)


@calendar.command()
def show(event_id: EventId, as_json: Json = False) -> None:
    """The pre-provisioning of one event: what it needs, when what happens, what happened, what needs a person."""

    async def work(service: "OpsService", settings: "Settings") -> int:
        found = await service.follow_event(event_id)
        if as_json:
            print_json(found.model_dump(mode="json"))
            return 0
        from rich.markdown import Markdown

        from domain.pre_provisioning import event_details
        from ops.views import cleaned, console

        console().print(Markdown(event_details(cleaned(found.record)), hyperlinks=False))
        return 0

    with_service(work, as_json)


@calendar.command()
def add(
    type_: Annotated[str, typer.Option("--type", help="A key of the policy's calendar.event_types.")],
    start: Annotated[str, typer.Option("--start", help="E.g. 2026-11-30T00:00, with --zone or with its offset.")],
    zone: Zone = None,
    multiplier: Multiplier = None,
    models: Models = None,
    lead_time: Lead = None,
    event_id: Annotated[str | None, typer.Option("--id", help="Default: type and start.")] = None,
    source: Source = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Add an event; needs an engineer."""
    given = _given(
        event_id=event_id,
        type=type_,
        start=start,
        zone=zone,
        multiplier=multiplier,
        models=models,
        lead_time=lead_time,
        source=source,
    )

    async def work(service: "OpsService", settings: "Settings") -> int:
        return _say(await service.add_event(read_token(token_file, settings), given), as_json)

    with_service(work, as_json)


@calendar.command()
def edit(
    event_id: EventId,
    type_: Type = None,
    start: Start = None,
    zone: Zone = None,
    multiplier: Multiplier = None,
    models: Models = None,
    lead_time: Lead = None,
    source: Source = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Change or move an event, also one that is being provisioned for; needs an engineer."""
    given = _given(
        type=type_,
        start=start,
        zone=zone,
        multiplier=multiplier,
        models=models,
        lead_time=lead_time,
        source=source,
    )
    if not given:
        raise typer.BadParameter("give at least one of --type, --start, --multiplier, --models, --lead-time, --source.")

    async def work(service: "OpsService", settings: "Settings") -> int:
        return _say(await service.edit_event(read_token(token_file, settings), event_id, given), as_json)

    with_service(work, as_json)


@calendar.command()
def accept(
    event_id: EventId,
    start: Start = None,
    zone: Zone = None,
    multiplier: Multiplier = None,
    models: Models = None,
    lead_time: Lead = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Accept a proposal of the publisher's feed, changed if wanted; from then on it counts. Needs an engineer."""
    given = _given(start=start, zone=zone, multiplier=multiplier, models=models, lead_time=lead_time)

    async def work(service: "OpsService", settings: "Settings") -> int:
        return _say(await service.accept_event(read_token(token_file, settings), event_id, given), as_json)

    with_service(work, as_json)


@calendar.command()
def remove(event_id: EventId, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Delete an event or a proposal; what was bought for it alone is released. Needs an engineer."""

    async def work(service: "OpsService", settings: "Settings") -> int:
        return _say(await service.remove_event(read_token(token_file, settings), event_id), as_json)

    with_service(work, as_json)


@calendar.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Ends with .ics or .csv; docs/cli.md says what it may have.")],
    type_: Annotated[str | None, typer.Option("--type", help="Of rows without one.")] = None,
    zone: Annotated[str | None, typer.Option("--zone", help="Of starts that have no zone or offset.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Import the good rows of a file that has bad ones.")
    ] = False,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Add the events of a file: all of them, or none where a row is bad; needs an engineer."""

    async def work(service: "OpsService", settings: "Settings") -> int:
        from ops.service import ExitCode, OpsError

        try:
            content = file.read_bytes()
        except OSError as error:
            raise OpsError(f"{file}: {error.strerror}.", "Give a file that can be read.", ExitCode.USAGE) from None
        imported = await service.import_events(
            read_token(token_file, settings), file.name, content, _given(type=type_, zone=zone), skip_bad=skip_bad
        )
        if as_json:
            print_json(imported.model_dump(mode="json"))
        else:
            from ops.views import console, plain

            for bad in imported.bad:
                text = f"{file.name}:{bad.line}: {bad.field}: {bad.value!r} is not allowed: {bad.allowed}"
                console(stderr=True).print(plain(text), style="bold red", soft_wrap=True)
            console().print(plain(imported.message), soft_wrap=True)
        return int(ExitCode.USAGE if imported.bad and not skip_bad else ExitCode.OK)

    with_service(work, as_json)


def _given(**fields: str | None) -> dict[str, str]:
    return {name: text for name, text in fields.items() if text is not None}


def _say(change: "CalendarChange", as_json: bool) -> int:
    if as_json:
        print_json(change.model_dump(mode="json"))
    else:
        from ops.views import console, plain

        console().print(plain(change.message), style="green", soft_wrap=True)
    return 0
