"""Recorded histories of every path replay on the workflows as they are now, without a server.

One that no longer does would break incidents in flight at an upgrade: put the change behind `workflow.patched`. Only
as long as nothing is deployed: `python -m tests.workflows.record_histories`.
"""

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest
from temporalio import workflow
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer

import activities.settings
import domain.incident
import domain.mitigation
import domain.planner
import domain.trees
from domain.incident import IncidentRecord
from domain.messages import (
    CAPACITY_WORKFLOW,
    CLEANUP_WORKFLOW,
    INCIDENT_WORKFLOW,
    LATENCY_REGRESSION_WORKFLOW,
    OVERRIDE_WORKFLOW,
    SCALING_LAG_MITIGATION_WORKFLOW,
    THROTTLE_MITIGATION_WORKFLOW,
    CapacityInput,
    IncidentInput,
)
from domain.pre_provisioning import EVENT_WORKFLOW
from domain.runbooks import throttle
from tests.workflows.record_histories import FOLDER, IDENTITY, PATHS, read
from workers.runbook_worker import WORKFLOWS
from workers.temporal import runbook_plugin
from workflows.capacity import CapacityWorkflow
from workflows.incident import IncidentWorkflow

FILES = sorted(FOLDER.glob("*.json"))


async def replay(histories: Iterator[WorkflowHistory], workflows: list[type] = WORKFLOWS) -> set[str]:
    """Raises when one does not replay; answers the types that did."""
    replayer = Replayer(workflows=workflows, plugins=[runbook_plugin(guarded=True)])
    types = set()
    for history in histories:
        await replayer.replay_workflow(history)
        types.add(history.events[0].workflow_execution_started_event_attributes.workflow_type.name)
    return types


def test_every_path_is_recorded() -> None:
    assert [path.stem for path in FILES] == sorted(PATHS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
async def test_a_recorded_history_replays(path: Path) -> None:
    types = await replay(read(path))
    throttled = {INCIDENT_WORKFLOW, THROTTLE_MITIGATION_WORKFLOW, CLEANUP_WORKFLOW, CAPACITY_WORKFLOW}
    slow = {INCIDENT_WORKFLOW, LATENCY_REGRESSION_WORKFLOW, CLEANUP_WORKFLOW}
    special = {
        "triage": {INCIDENT_WORKFLOW},
        "scaling_lag": throttled - {THROTTLE_MITIGATION_WORKFLOW} | {SCALING_LAG_MITIGATION_WORKFLOW},
        "latency_kept": slow | {OVERRIDE_WORKFLOW},
        "latency_elsewhere": slow,
        "override": {OVERRIDE_WORKFLOW},
        "event": {EVENT_WORKFLOW, CAPACITY_WORKFLOW},
        "short_of_units": {CAPACITY_WORKFLOW},
        "kept": throttled | {OVERRIDE_WORKFLOW},
        "taken_over": throttled | {OVERRIDE_WORKFLOW},
    }
    assert types == special.get(path.stem, throttled)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_history_says_nothing_of_the_machine_that_recorded_it(path: Path) -> None:
    text = path.read_text()
    assert set(re.findall(r'"identity": "([^"]*)"', text)) <= {IDENTITY, "history-service"}
    assert re.findall(r"/(?:home|root|usr|tmp|Users|work)/|File \\\"", text) == []


async def test_an_edited_tree_plan_threshold_or_text_does_not_break_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: set[str] = set()

    def edit(module: ModuleType, name: str, answer: object = None) -> None:
        def edited(*arguments: object) -> object:
            ran.add(name)
            return answer

        monkeypatch.setattr(module, name, edited)

    for module, name in (
        (domain.trees, "diagnose"),
        (throttle, "plan"),
        (domain.mitigation, "guard"),
        (domain.planner, "plan"),
        (activities.settings, "load_policy"),
    ):
        edit(module, name)
    edit(domain.mitigation, "recovered_how", ("the demand went away", "edited"))
    edit(domain.incident, "render_details", "edited")
    await replay(read(FOLDER / "alarm_returned.json"))
    assert ran == {"recovered_how", "render_details"}, "decisions come from the history, only texts are made anew"


@workflow.defn(name=INCIDENT_WORKFLOW, sandboxed=False)
class IncidentWithoutReport(IncidentWorkflow):
    """Leaves out its last step."""

    @workflow.init
    def __init__(self, input: IncidentInput) -> None:
        super().__init__(input)

    @workflow.run
    async def run(self, input: IncidentInput) -> IncidentRecord:
        return await super().run(input)

    async def _report(self) -> None:
        pass


@workflow.defn(name=CAPACITY_WORKFLOW, sandboxed=False)
class PatientCapacity(CapacityWorkflow):
    """Waits a moment before it begins."""

    @workflow.init
    def __init__(self, input: CapacityInput) -> None:
        super().__init__(input)

    @workflow.run
    async def run(self, input: CapacityInput) -> None:
        await workflow.sleep(timedelta(seconds=1))
        await super().run(input)


@pytest.mark.parametrize("changed", [IncidentWithoutReport, PatientCapacity])
async def test_a_change_that_is_not_deterministic_is_caught(changed: type) -> None:
    name = changed.__bases__[0].__name__
    workflows = [changed if kind.__name__ == name else kind for kind in WORKFLOWS]
    with pytest.raises(workflow.NondeterminismError):
        await replay(read(FOLDER / "approved.json"), workflows)
