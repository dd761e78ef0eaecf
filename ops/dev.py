"""`runbooks dev`: the whole system on this machine, until Ctrl-C."""

import asyncio
import signal
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from activities.settings import ConfigurationError
from ops.servers import ServerNotFound
from ops.stack import TOKYO, Stack, StackError, StackOptions
from ops.supervisor import ChildFailed
from workers.tokens import TokenRefused


def dev(
    temporal_address: Annotated[
        str | None, typer.Option(help="A Temporal server to use, HOST:PORT, instead of starting one.")
    ] = None,
    temporal_ui_url: Annotated[str | None, typer.Option(help="The UI of that server.")] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="A Redis-protocol server to use, redis://HOST:PORT/DB, instead of starting one.")
    ] = None,
    aws_endpoint_url: Annotated[
        str | None, typer.Option(help="An AWS endpoint to use instead of starting the simulator.")
    ] = None,
    simulator: Annotated[
        bool, typer.Option(help="Start the AWS simulator; without it and without an endpoint: your AWS account.")
    ] = True,
    batcher: Annotated[bool, typer.Option(help="Start the batcher, too.")] = False,
    state_dir: Annotated[Path, typer.Option(help="Folder for state, logs, keys and tokens.")] = Path(".runbooks"),
    speed: Annotated[float, typer.Option(help="Business seconds per real second on the simulator.")] = 60,
    business_start: Annotated[
        str | None,
        typer.Option(
            help="Business time at the start, ISO 8601, in Tokyo without an offset. Default: just before a Monday."
        ),
    ] = None,
) -> None:
    """Start Temporal, Redis, the AWS simulator, the worker, the intake and the ops API; Ctrl-C stops them all."""
    console = Console()
    try:
        options = StackOptions(
            state_dir=state_dir,
            temporal_address=temporal_address,
            temporal_ui_url=temporal_ui_url,
            redis_url=redis_url,
            aws_endpoint_url=aws_endpoint_url,
            simulator=simulator,
            speed=speed,
            business_start=_moment(business_start) if business_start else None,
            api=True,
            batcher=batcher,
        )
        asyncio.run(_run(options, console))
    except (StackError, ServerNotFound, ChildFailed, TokenRefused, ConfigurationError, ValidationError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


async def _run(options: StackOptions, console: Console) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        async with Stack(options, say=say) as stack:
            show(stack, console)
            say("Ctrl-C stops everything.")
            await stack.guard(asyncio.Event().wait())
    except asyncio.CancelledError:
        say("stopped")


def show(stack: Stack, console: Console) -> None:
    """Prints where everything is and how to use it."""
    addresses, env = stack.addresses, stack.env
    table = Table(show_header=False, box=None)
    table.add_row("Temporal UI", addresses.temporal_ui or "(of the given server)")
    table.add_row("Temporal", addresses.temporal)
    table.add_row("ops API", addresses.api_url)
    if stack.options.batcher:
        table.add_row("batcher", addresses.batcher_url)
    table.add_row("Redis", addresses.redis_url)
    table.add_row("AWS", addresses.aws_endpoint_url or "the account of your credentials")
    if start := env.get("RUNBOOKS_REHEARSAL_BUSINESS_START"):
        began = datetime.fromisoformat(start).astimezone(TOKYO)
        table.add_row("Business clock", f"from {began:%A %Y-%m-%d %H:%M} in Tokyo, {stack.options.speed:g} times real")
    table.add_row("Logs", str(stack.log_dir))
    console.print(table, highlight=False, soft_wrap=True)
    console.print("\nIn another shell, as an approver:", highlight=False)
    console.print(f"  source {stack.state_dir / 'env'}", markup=False, highlight=False, soft_wrap=True)
    console.print("  runbooks incident list", highlight=False)
    console.print("As somebody else, with one of these tokens:", highlight=False)
    for role, path in stack.tokens.items():
        lines = f"  export RUNBOOKS_TOKEN_FILE={path}  # {role}@example.com\n    {path.read_text()}"
        console.print(lines, markup=False, highlight=False, soft_wrap=True)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise StackError(f"--business-start {text}: give a moment like 2026-11-29T23:55 ({error})") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=TOKYO)
