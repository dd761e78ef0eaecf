"""`runbooks capacity`: what was bought for whom, what is planned, and what people may change about it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli_shared import EXIT_CODES, Json, Reason, TokenFile, Why, decide, duration, print_json, with_service

if TYPE_CHECKING:
    from ops.capacity import Outlook
    from ops.service import OpsService
    from workers.settings import Settings

capacity = typer.Typer(
    no_args_is_help=True,
    help="Provisioned throughput: what was bought for whom, what is planned, and people's say in it.",
    epilog=EXIT_CODES,
)
demand = typer.Typer(no_args_is_help=True, help="Ask for units in service for a time, with a reason.")
capacity.add_typer(demand, name="demand")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="As the policy calls it, e.g. sonnet.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show the plan with it, and what it would cost more.")]


@capacity.command()
def show(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="One model; default: a line for each.")] = None,
    as_json: Json = False,
) -> None:
    """What was bought, for whom, until when, what it costs so far, and what waits for an approval."""

    async def work(service: "OpsService", settings: "Settings") -> int:
        if model is None:
            rows = await service.list_capacity()
            if as_json:
                print_json([row.model_dump(mode="json") for row in rows])
                return 0
        else:
            rows = [await service.get_capacity(model)]
            if as_json:
                print_json(rows[0].model_dump(mode="json"))
                return 0
        from ops.capacity_views import capacity_table, capacity_view
        from ops.views import Times, console

        times = Times(datetime.now(UTC), settings.clock)
        console().print(capacity_table(rows, times) if model is None else capacity_view(rows[0], times))
        return 0

    with_service(work, as_json)


@capacity.command("plan")
def plan_(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="One model; default: all of them.")] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Also draw the chart into this file; with several models NAME-MODEL.svg.")
    ] = None,
    as_json: Json = False,
) -> None:
    """A dry run: the steps and why, and the units over the next 48 h against the load to expect. Changes nothing."""

    async def work(service: "OpsService", settings: "Settings") -> int:
        models = [model] if model else [row.model for row in await service.list_capacity()]
        outlooks = [await service.plan_capacity(name) for name in models]
        if svg is not None:
            for outlook in outlooks:
                path = svg if len(outlooks) == 1 else svg.with_name(f"{svg.stem}-{outlook.model}{svg.suffix}")
                _draw(outlook, settings, path)
        if as_json:
            shown = [outlook.model_dump(mode="json") for outlook in outlooks]
            print_json(shown[0] if model else shown)
        else:
            for outlook in outlooks:
                _print_plan(outlook, settings)
        return 0

    with_service(work, as_json)


@capacity.command()
def pause(model: Model, why: Why, token_file: TokenFile = None, as_json: Json = False) -> None:
    """The kill switch: nothing is bought or released until somebody resumes; what is in service stays routed."""
    decide(lambda service, token: service.pause_capacity(model, token, why), token_file, as_json)


@capacity.command()
def resume(model: Model, why: Why, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Buy and release again; needs an approver."""
    decide(lambda service, token: service.resume_capacity(model, token, why), token_file, as_json)


@capacity.command()
def reconcile(model: Model, why: Why, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Compare fleet and demands now, and try again what failed, e.g. after a mended role."""
    decide(lambda service, token: service.reconcile_capacity(model, token, why), token_file, as_json)


@capacity.command()
def approve(
    model: Model,
    why: Why,
    approval_id: Annotated[
        str | None,
        typer.Argument(metavar="APPROVAL", help="What to agree to, as `show` names it; default: the only one."),
    ] = None,
    amount: Annotated[
        float | None, typer.Option(min=0.01, help="At most so much over the cap, in its unit; default: all of it.")
    ] = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Agree to units over a cap of cost, or to what else waits for a person; needs an approver."""
    decide(lambda service, token: service.approve_capacity(model, token, why, approval_id, amount), token_file, as_json)


@demand.command("set")
def set_(
    model: Model,
    units: Annotated[int, typer.Argument(metavar="UNITS", help="Total units wanted in service, not units on top.")],
    reason: Reason,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="TIME", help="With its offset or with --zone: 2026-11-30T18:00+09:00. Default: now."
        ),
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="When they may go; or say --for.")] = None,
    lasts: Annotated[
        timedelta | None,
        typer.Option("--for", parser=duration, metavar="DURATION", help="How long from the start: 45m, 2h, 1h30m."),
    ] = None,
    zone: Annotated[str | None, typer.Option(help="Zone of the times, e.g. Asia/Tokyo.")] = None,
    demand_id: Annotated[str | None, typer.Option("--id", help="Replaces your demand of that id.")] = None,
    dry_run: DryRun = False,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Ask for units from a moment until another, in business time; they are bought ahead of the start."""
    if (until is None) == (lasts is None):
        raise typer.BadParameter("say how long: --until TIME or --for DURATION, one of them.")

    begin = None if start is None else _moment("--from", start, zone)
    end = lasts if lasts is not None else _moment("--until", until or "", zone)

    async def look(service: "OpsService", settings: "Settings") -> int:
        outlook = await service.preview_demand(model, units, begin, end, reason, demand_id)
        _show_plan(outlook, settings, as_json)
        return 0

    if dry_run:
        with_service(look, as_json)
        return
    decide(
        lambda service, token: service.set_demand(model, token, units, begin, end, reason, demand_id),
        token_file,
        as_json,
    )


@demand.command()
def withdraw(
    model: Model,
    demand_id: Annotated[str, typer.Argument(metavar="DEMAND", help="Id, as `capacity show MODEL` lists it.")],
    why: Why,
    dry_run: DryRun = False,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Take a person's demand back; another person's is an approver's to take."""

    async def look(service: "OpsService", settings: "Settings") -> int:
        _show_plan(await service.preview_withdrawal(model, demand_id), settings, as_json)
        return 0

    if dry_run:
        with_service(look, as_json)
    else:
        decide(lambda service, token: service.withdraw_demand(model, token, demand_id, why), token_file, as_json)


def _moment(option: str, text: str, zone: str | None) -> datetime:
    from domain.calendar import EntryError, moment_of

    try:
        return moment_of(text, zone)
    except EntryError as error:
        field = option if error.field == "start" else f"--{error.field}"
        raise typer.BadParameter(f"{error.value!r} is not allowed: {error.allowed}.", param_hint=field) from None


def _show_plan(outlook: "Outlook", settings: "Settings", as_json: bool) -> None:
    if as_json:
        print_json(outlook.model_dump(mode="json"))
    else:
        _print_plan(outlook, settings)


def _print_plan(outlook: "Outlook", settings: "Settings") -> None:
    from ops.capacity_views import plan_view
    from ops.views import console

    out = console()
    out.print(plan_view(outlook, settings.clock, width=out.width, colours=out.is_terminal and not out.no_color))


def _draw(outlook: "Outlook", settings: "Settings", path: Path) -> None:
    from ops.capacity_views import write_svg
    from ops.service import ExitCode, OpsError

    try:
        write_svg(outlook, settings.clock, path)
    except OSError as error:
        raise OpsError(
            f"--svg {path}: {error.strerror}.", "Give a file in a folder that you may write.", ExitCode.USAGE
        ) from None
