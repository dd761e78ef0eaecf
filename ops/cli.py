"""`runbooks`: the command line. It only presents what `ops/service.py` does.

What takes long to import is imported by the command that needs it, so that help and usage errors come at once.
"""

import asyncio
import os
import sys
import traceback
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ops.cli_batcher import batcher
from ops.cli_calendar import calendar
from ops.cli_capacity import capacity
from ops.cli_health import alarms, health
from ops.cli_iam import iam
from ops.cli_loadtest import loadtest
from ops.cli_override import override
from ops.cli_shared import (
    EXIT_CODES,
    By,
    ClosedWithin,
    For,
    Json,
    Limit,
    TokenFile,
    Why,
    decide,
    duration,
    fail,
    print_json,
    read_settings,
    with_service,
)

if TYPE_CHECKING:
    from ops.service import OpsService
    from workers.settings import Settings

WATCH_EVERY_SECONDS = 1.0
INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Durable, reversible, people-approved incident runbooks for MangaAssist.",
    epilog=EXIT_CODES,
)
incident = typer.Typer(
    no_args_is_help=True, help="Look at incidents, and decide: list, show, approve and more.", epilog=EXIT_CODES
)
app.add_typer(incident, name="incident")
app.add_typer(override, name="override")
app.add_typer(capacity, name="capacity")
app.add_typer(iam, name="iam")
app.add_typer(calendar, name="calendar")
app.add_typer(loadtest, name="loadtest")
app.command()(batcher)
app.command()(health)
app.command()(alarms)


@app.callback()
def _top() -> None:
    """Typer takes the help from `app`."""


_LEVERS = "model_routing, request_coalescing, cache_ttl_seconds, batch_window_ms or capacity"


def _lever(text: str) -> str:
    from domain.incident import LeverName

    if text not in set(LeverName):
        raise typer.BadParameter(f"there is no lever {text!r}; there are {_LEVERS}.")
    return text


Key = Annotated[str, typer.Argument(metavar="INCIDENT", help="Key or id, e.g. bedrock-throttle:sonnet.")]
Run = Annotated[str | None, typer.Option("--run", help="Run id of an earlier incident with that key.")]


@incident.command("list")
def list_(
    closed_within: ClosedWithin = timedelta(hours=24),
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """Open incidents and recently closed ones, with what each waits for."""

    async def work(service: "OpsService", settings: "Settings") -> int:
        rows = await service.list_incidents(closed_within, limit)
        if as_json:
            print_json([row.model_dump(mode="json") for row in rows])
            return 0
        from domain.incident import span
        from ops.views import Times, console, incident_table

        if rows:
            console().print(incident_table(rows, Times(datetime.now(UTC), settings.clock)))
        else:
            console().print(f"No incident is open, and none was closed within {span(closed_within)}.")
        return 0

    with_service(work, as_json)


@incident.command()
def show(
    key: Key,
    run: Run = None,
    whole: Annotated[bool, typer.Option("--all", help="The whole timeline, not only its end.")] = False,
    as_json: Json = False,
) -> None:
    """One incident: what is wrong, what was changed, who is waited for, what comes next."""

    async def work(service: "OpsService", settings: "Settings") -> int:
        found = await service.get(key, run)
        if as_json:
            print_json(found.model_dump(mode="json"))
            return 0
        from ops.views import SHOWN_TIMELINE, Times, console, incident_view

        capacity = await _capacity(service, found.record.model)
        times = Times(datetime.now(UTC), settings.clock)
        lines = len(found.record.timeline) if whole else SHOWN_TIMELINE
        console().print(incident_view(found, times, capacity, timeline=lines))
        return 0

    with_service(work, as_json)


@incident.command()
def watch(key: Key, as_json: Json = False) -> None:
    """Follow one incident until it is over; Ctrl-C ends only the watching.

    On a terminal the view is kept up to date; otherwise a line is printed for each change (with --json: the incident
    as one line of JSON for each change).
    """
    try:
        with_service(lambda service, settings: _watch(service, settings, key, as_json), as_json)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


async def _watch(service: "OpsService", settings: "Settings", key: str, as_json: bool) -> int:
    from rich.live import Live

    from ops.service import Incident
    from ops.views import Times, cleaned, console, incident_view, timeline_line

    out = console()
    live = Live(console=out, auto_refresh=False, transient=True) if out.is_terminal and not as_json else None
    last: Incident | None = None
    seen: set[tuple[datetime, str]] = set()

    def changed(found: Incident, times: Times) -> None:
        if as_json:
            print_json(found.model_dump(mode="json"), indent=None)
            return
        record = cleaned(found.record)
        for entry in record.timeline:
            if (entry.at, entry.text) not in seen:
                seen.add((entry.at, entry.text))
                out.print(timeline_line(entry, times), soft_wrap=True)
        if record.waiting_for and (last is None or found.record.waiting_for != last.record.waiting_for):
            out.print(f"{times.at(times.now)}  now      waiting for {record.waiting_for}", soft_wrap=True)

    run_id: str | None = None
    with live or nullcontext():
        while True:
            found = await _try_get(service, key, run_id) if run_id else await service.get(key)
            times = Times(datetime.now(UTC), settings.clock)
            if found is not None:
                run_id = found.record.run_id
                if live is not None:
                    live.update(incident_view(found, times, await _capacity(service, found.record.model)), refresh=True)
                elif found != last:
                    changed(found, times)
                last = found
                if found.ended is not None:
                    break
            await asyncio.sleep(WATCH_EVERY_SECONDS)
    if not as_json:
        out.print(incident_view(found, times, timeline=0 if live is None else len(found.record.timeline)))
    return 0


async def _try_get(service: "OpsService", key: str, run_id: str) -> Any:
    """None, with a word on stderr, while nobody answers: a watch outlives a restart of the worker or the server."""
    from ops.service import ExitCode, OpsError

    try:
        return await service.get(key, run_id)
    except OpsError as error:
        if error.exit_code is not ExitCode.UNREACHABLE:
            raise
        from ops.views import console, plain

        console(stderr=True).print(f"{plain(error.message)} Still trying.", style="yellow")
        return None


@incident.command()
def approve(key: Key, why: Why, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Approve the way back: levers are released in stages, each one guarded and watched."""
    decide(lambda service, token: service.approve(key, token, why), token_file, as_json)


@incident.command()
def reject(key: Key, why: Why, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Keep the levers for now; the incident goes on waiting."""
    decide(lambda service, token: service.reject(key, token, why), token_file, as_json)


@incident.command()
def extend(
    key: Key,
    why: Why,
    by: By,
    lever: Annotated[
        str | None,
        typer.Option(parser=_lever, metavar="LEVER", help=f"One lever: {_LEVERS}. Default: all that are held."),
    ] = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Hold one lever, or all of them, longer than their maximum hold."""

    decide(lambda service, token: service.extend(key, token, why, by, lever), token_file, as_json)


@incident.command()
def release(
    key: Key,
    lever: Annotated[str, typer.Argument(parser=_lever, metavar="LEVER", help=_LEVERS)],
    why: Why,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Release one lever now, ahead of the rest."""

    decide(lambda service, token: service.release(key, token, why, lever), token_file, as_json)


@incident.command()
def abort(key: Key, why: Why, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Stop the automation and give everything back; needs an approver while the service has not recovered."""
    decide(lambda service, token: service.abort(key, token, why), token_file, as_json)


@incident.command()
def acknowledge(key: Key, why: Why, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Say that you are looking at it."""
    decide(lambda service, token: service.acknowledge(key, token, why), token_file, as_json)


@incident.command()
def report(key: Key, run: Run = None, as_json: Json = False) -> None:
    """Write the report as things stand now, for a running incident too, and say where it lies."""

    async def work(service: "OpsService", settings: "Settings") -> int:
        written = await service.report(key, run)
        if as_json:
            print_json(written.model_dump(mode="json"))
        else:
            print(written.html_path)
            print(written.markdown_path)
        return 0

    with_service(work, as_json)


@incident.command()
def keep(
    key: Key,
    lever: Annotated[str, typer.Argument(parser=_lever, metavar="LEVER", help="Any lever but capacity.")],
    why: Why,
    review_in: Annotated[
        timedelta | None,
        typer.Option(parser=duration, metavar="DURATION", help="When to look at it again; default: the policy's."),
    ] = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Turn a lever into a standing override of yours: for when the configured baseline was the fault."""
    decide(lambda service, token: service.keep_lever(key, token, why, lever, review_in), token_file, as_json)


@incident.command("take-over")
def take_over(
    key: Key,
    why: Why,
    lasts: For,
    to: Annotated[str | None, typer.Option(help="Who gets the levers; default: you.")] = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Stop the automation; the levers stay with a person until a stated end."""
    decide(lambda service, token: service.take_over(key, token, why, lasts, to), token_file, as_json)


@app.command()
def api(
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine behind a proxy that speaks TLS.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8234,
) -> None:
    """Serve the ops API until Ctrl-C: the runbooks' own calls, knobs, overrides and incidents over HTTP."""
    from ops.api import serve
    from ops.service import ExitCode, OpsError
    from workers.lifecycle import configure_logs, run_until_signalled

    configure_logs()
    try:
        asyncio.run(run_until_signalled(serve(read_settings(), host, port)))
    except OpsError as error:
        fail(error, as_json=False)
    except OSError as error:
        said = f"Nothing can listen on {host}, port {port}: {error.strerror}."
        fail(OpsError(said, "Give another --host or --port.", ExitCode.UNEXPECTED), as_json=False)


def main() -> NoReturn:
    """The one place where each command ends.

    A process that used a Temporal client often crashes while the interpreter shuts down, after its work is done:
    it leaves without that, so that its exit code is its own.
    """
    try:
        if not {"api", "batcher", *(group.name for group in app.registered_groups)} & set(sys.argv[1:2]):
            _add_stack_commands()
        app()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


# ---------------------------------------------------------------- inside


def _add_stack_commands() -> None:
    """`dev` and `demo` bring all that a stack needs, which nobody should wait for who only looks or decides."""
    from ops.demo import demo
    from ops.dev import dev

    app.command()(dev)
    app.command()(demo)


async def _capacity(service: "OpsService", model: str | None) -> Any:
    """The capacity's state beside an incident, if there is any."""
    from ops.service import OpsError

    if model is None:
        return None
    try:
        return await service.capacity_state(model)
    except OpsError:
        return None


if __name__ == "__main__":
    main()
