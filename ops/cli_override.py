"""`runbooks override`: a person holds a knob at a value for a time."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli_shared import (
    EXIT_CODES,
    By,
    ClosedWithin,
    ForOrDefault,
    Json,
    Limit,
    Reason,
    TokenFile,
    Why,
    decide,
    print_json,
    with_service,
)

if TYPE_CHECKING:
    from domain.messages import UpdateResult
    from ops.service import OpsService
    from workers.settings import Settings

override = typer.Typer(
    no_args_is_help=True,
    help="Hold a knob at a value for a time, with a reason; it reverts by itself.",
    epilog=EXIT_CODES,
)

Knob = Annotated[str, typer.Argument(metavar="KNOB", help="E.g. cache_ttl_seconds; a wrong name is told all of them.")]
Value = Annotated[
    str, typer.Argument(metavar="VALUE", help="E.g. 120, on, faq=haiku,greeting=haiku, or JSON; the knob says what.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Only show what it would do: bounds, other leases, values until when, impact."),
]
OverrideId = Annotated[str, typer.Argument(metavar="OVERRIDE", help="Id, e.g. override-cache_ttl_seconds-1a2b3c4d.")]


@override.command("set")
def set_(
    knob: Knob,
    value: Value,
    reason: Reason,
    lasts: ForOrDefault = None,
    dry_run: DryRun = False,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Hold a knob at a value; other leases of it merge with yours."""
    _set(knob, value, reason, lasts, "timed", dry_run, token_file, as_json)


@override.command()
def pin(
    knob: Knob,
    value: Value,
    reason: Reason,
    lasts: ForOrDefault = None,
    dry_run: DryRun = False,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Hold a knob at a value whatever other leases ask for; needs an approver."""
    _set(knob, value, reason, lasts, "pin", dry_run, token_file, as_json)


@override.command("list")
def list_overrides(
    closed_within: ClosedWithin = timedelta(hours=24),
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """Open overrides, the first to end first, and recently closed ones."""

    async def work(service: "OpsService", settings: "Settings") -> int:
        rows = await service.list_overrides(closed_within, limit)
        if as_json:
            print_json([row.model_dump(mode="json") for row in rows])
            return 0
        from domain.incident import span
        from ops.views import Times, console, override_table

        if rows:
            console().print(override_table(rows, Times(datetime.now(UTC), settings.clock)))
        else:
            console().print(f"No override is open, and none was closed within {span(closed_within)}.")
        return 0

    with_service(work, as_json)


@override.command("show")
def show_override(override_id: OverrideId, as_json: Json = False) -> None:
    """One override: what it holds for whom until when, what it does, what happened, what still holds the knob."""

    async def work(service: "OpsService", settings: "Settings") -> int:
        found = await service.get_override(override_id)
        if as_json:
            print_json(found.model_dump(mode="json"))
            return 0
        from ops.views import Times, console, override_view

        console().print(override_view(found, Times(datetime.now(UTC), settings.clock)))
        return 0

    with_service(work, as_json)


@override.command("extend")
def extend_override(
    override_id: OverrideId,
    why: Why,
    by: By,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Move its end, or the review date of a standing one."""
    decide(lambda service, token: service.extend_override(override_id, token, why, by), token_file, as_json)


@override.command("release")
def release_override(override_id: OverrideId, why: Why, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Give the knob back now, or withdraw what waits for an approval."""
    decide(lambda service, token: service.release_override(override_id, token, why), token_file, as_json)


@override.command("hand-over")
def hand_over(
    override_id: OverrideId,
    to: Annotated[str, typer.Argument(metavar="PERSON", help="As in the roster.")],
    why: Why,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Give it to another owner."""
    decide(lambda service, token: service.hand_over_override(override_id, token, why, to), token_file, as_json)


@override.command("approve")
def approve_override(override_id: OverrideId, why: Why, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Agree to an override that waits for it; whoever asked for it cannot."""
    decide(lambda service, token: service.approve_override(override_id, token, why), token_file, as_json)


@override.command("deny")
def deny_override(override_id: OverrideId, why: Why, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Say no to an override that waits for an approval."""
    decide(lambda service, token: service.deny_override(override_id, token, why), token_file, as_json)


def _set(
    knob: str,
    value: str,
    reason: str,
    lasts: timedelta | None,
    kind: str,
    dry_run: bool,
    token_file: Path | None,
    as_json: bool,
) -> None:
    async def look(service: "OpsService", settings: "Settings") -> int:
        from domain.override import OverrideKind
        from ops.overrides import parse_value

        preview = await service.preview_override(knob, parse_value(value), lasts, OverrideKind(kind))
        if as_json:
            print_json(preview.model_dump(mode="json"))
            return 0
        from ops.views import Times, console, preview_view

        console().print(preview_view(preview, Times(datetime.now(UTC), settings.clock)))
        return 0

    async def act(service: "OpsService", token: str | None) -> "UpdateResult":
        from domain.override import OverrideKind
        from ops.overrides import parse_value

        return await service.set_override(token, knob, parse_value(value), reason, lasts, OverrideKind(kind))

    if dry_run:
        with_service(look, as_json)
    else:
        decide(act, token_file, as_json)
