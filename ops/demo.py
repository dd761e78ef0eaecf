"""`runbooks demo`: a scenario on a real stack, checked against Redis, Bedrock and the disk. See `ops/demo_stage.py`."""

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ops.demo_batch_latency import BatchLatency
from ops.demo_pre_provisioning import PreProvisioning
from ops.demo_scaling_lag import ScalingLag
from ops.demo_stage import DemoFailed, DemoResult, Options, Scenario, Show, run
from ops.demo_throttle import Throttle
from ops.servers import ServerNotFound
from ops.service import OpsError
from ops.stack import StackError
from ops.supervisor import ChildFailed


class ScenarioName(StrEnum):
    """What can be played."""

    THROTTLE = "throttle"
    SCALING_LAG = "scaling-lag"
    PRE_PROVISIONING = "pre-provisioning"
    BATCH_LATENCY = "batch-latency"


SCENARIOS: dict[ScenarioName, type[Scenario]] = {
    ScenarioName.THROTTLE: Throttle,
    ScenarioName.SCALING_LAG: ScalingLag,
    ScenarioName.PRE_PROVISIONING: PreProvisioning,
    ScenarioName.BATCH_LATENCY: BatchLatency,
}


def demo(
    scenario: Annotated[ScenarioName, typer.Option(help="What to play.")] = ScenarioName.THROTTLE,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack up afterwards, until Ctrl-C.")] = False,
    interactive: Annotated[bool, typer.Option("--interactive", help="Leave the approval to you.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Progress on stderr; one JSON object as the only line of stdout.")
    ] = False,
    state_dir: Annotated[Path, typer.Option(help="Folder for state, logs, tokens and the report.")] = Path(".runbooks"),
    speed: Annotated[
        float | None, typer.Option(help="Business seconds per real second.", show_default="60; batch-latency: 2.5")
    ] = None,
) -> None:
    """Play a scenario on a stack of its own, from its first sign to the report, and check how it ended.

    throttle: alarm, mitigation, approval, way back; about 100 s.

    scaling-lag: missing units, mitigation, a mended role, approval, way back; about 90 s.

    pre-provisioning: an event in the calendar, its units in service hours before it, released after it; about 7 min.

    batch-latency: a batch window that is too long, on the real batcher, kept short and then configured so; about 6 min.
    """
    show = Show(as_json)
    played = SCENARIOS[scenario]
    result = DemoResult(incident_id=played.WORKFLOW_ID)
    options = Options(keep, interactive, as_json, state_dir, played.SPEED if speed is None else speed)
    code = 0
    try:
        asyncio.run(run(played, options, show, result))
    except (StackError, ServerNotFound, ChildFailed) as error:
        code = show.failed(result, str(error), "Mend this and start again.")
    except OpsError as error:
        code = show.failed(result, error.message, error.next_step)
    except DemoFailed as error:
        code = show.failed(result, error.message, error.next_step)
    except (KeyboardInterrupt, asyncio.CancelledError):
        show.line("Interrupted: everything is stopped.", "yellow")
        code = 130
        result.error = "interrupted"
    if as_json and not (keep and code == 0):
        print(result.model_dump_json(), flush=True)
    raise typer.Exit(code)
