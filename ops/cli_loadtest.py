"""`runbooks loadtest`: a change at peak traffic before it is deployed."""

import asyncio
import signal
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli_shared import EXIT_CODES, Json, configuration, fail, print_json

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from domain.incident import BudgetRow
    from ops.loadtest import LoadTest, Plan


class Controller(StrEnum):
    """As `batcher.controller` of the policy."""

    FIXED = "fixed"
    TABLE = "table"
    SLO = "slo"


OVER_BUDGET = 1
INTERRUPTED = 130

loadtest = typer.Typer(
    no_args_is_help=True, help="Run a change at peak traffic before it is deployed.", epilog=EXIT_CODES
)


@loadtest.callback()
def _top() -> None:
    """Typer takes the help from `loadtest`."""


@loadtest.command()
def window(
    window_ms: Annotated[int | None, typer.Option(help="The batch window to try.")] = None,
    against: Annotated[
        int | None, typer.Option(help="The window to compare it with. Default: the configured one.")
    ] = None,
    controller: Annotated[
        Controller | None,
        typer.Option(help="What the batcher runs with. Default: the configured one; slo waits less where it must."),
    ] = None,
    batcher_url: Annotated[
        str | None,
        typer.Option(help="Instead of all that: ask a batcher that is there, as it is. Its calls are real, and cost."),
    ] = None,
    requests_per_second: Annotated[
        float, typer.Option(help="Users' messages; 18 are the evening peak, of which 14 ask for a batch.")
    ] = 18,
    seconds: Annotated[float, typer.Option(help="How long, for each window.")] = 60,
    as_json: Json = False,
) -> None:
    """Try a batch window: a real batcher, real requests, simulated stages and Bedrock. Exit code 1: over the budget.

    Everything that it needs is started, for each window anew, and stopped again. Nothing of yours is touched.
    """
    from ops.asking import OpsError
    from ops.loadtest import planned
    from ops.servers import ServerNotFound
    from ops.stack import StackError
    from ops.supervisor import ChildFailed

    _, policy = configuration()
    try:
        plan = planned(policy, window_ms, against, controller, batcher_url, requests_per_second, seconds)
        done = asyncio.run(_run(plan))
    except OpsError as error:
        fail(error, as_json)
    except (StackError, ServerNotFound, ChildFailed) as error:
        from ops.asking import ExitCode

        fail(OpsError(str(error), "Mend this and start again.", ExitCode.UNEXPECTED), as_json)
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo("Interrupted: everything is stopped.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(done.model_dump(mode="json"))
    else:
        from rich.text import Text

        from ops.views import console

        console().print(_table(done))
        style = "bold green" if done.verdict.within_budget else "bold red"
        console().print(Text(_sentence(done), style), soft_wrap=True)
    if not done.verdict.within_budget:
        raise typer.Exit(OVER_BUDGET)


async def _run(plan: "Plan") -> "LoadTest":
    """Progress goes to stderr; a signal stops everything in order."""
    from ops.demo_stage import Show
    from ops.loadtest import run

    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    show = Show(as_json=True)
    with show.status:
        return await run(plan, show.line, lambda doing: show.now(None, doing))


def _sentence(done: "LoadTest") -> str:
    said = "Within the budget" if done.verdict.within_budget else "Over the budget"
    proposed, against = done.proposed, done.against
    if proposed.window_ms is None or against is None:
        return f"{said}: {done.verdict.why}."
    calls, before = proposed.calls_per_request, against.calls_per_request
    spared = f" {calls / before - 1:+.0%} calls against {against.window_ms} ms." if before else ""
    return f"{said}: with a window of {proposed.window_ms} ms {done.verdict.why}.{spared}"


def _table(done: "LoadTest") -> "Table":
    """The windows side by side."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    runs = [run for run in (done.against, done.proposed) if run is not None]
    title = f"{done.requests_per_second:g} requests/s for {done.seconds:g} s"
    if done.against is not None:
        title += f", controller {done.controller}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column("as it is" if run.window_ms is None else f"{run.window_ms} ms", justify="right")
    table.add_column("budget", justify="right")
    table.add_row("requests answered", *(f"{run.requests:,}" for run in runs))
    table.add_row("without an answer", *(f"{run.unanswered:,}" for run in runs))
    table.add_row("calls per request", *(f"{run.calls_per_request:.2f}" for run in runs))
    table.add_row("requests in a batch", *(f"{run.fill:.1f}" for run in runs))
    table.add_row("window in force", *(f"{run.window_in_force_ms:,.0f} ms" for run in runs))
    table.add_row("queue wait P50", *(f"{run.queue_wait_p50_ms:,.0f} ms" for run in runs))
    table.add_row("total P50", *(f"{run.total_p50_ms:,.0f} ms" for run in runs), end_section=True)
    for rows in zip(*(run.budget for run in runs), strict=True):
        budget = "" if rows[0].budget_ms is None else f"{rows[0].budget_ms:,.0f} ms"
        table.add_row(f"{rows[0].stage} P99", *map(_measured, rows), budget)
    table.add_row("over the budget", *(f"{run.over_budget_share:.1%}" for run in runs))
    return table


def _measured(row: "BudgetRow") -> "Text":
    from rich.text import Text

    return Text("no data" if row.measured_ms is None else f"{row.measured_ms:,.0f} ms", "red" if row.over else "")
