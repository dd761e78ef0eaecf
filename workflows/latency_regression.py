"""Scenario 3's mitigation: back to the batch window that is known to be good, where the window is the cause."""

from temporalio import workflow

from domain.messages import LATENCY_REGRESSION_WORKFLOW, MitigationInput, MitigationResult
from workflows import _mitigation


@workflow.defn(name=LATENCY_REGRESSION_WORKFLOW)
class LatencyRegressionWorkflow:
    """Child of an incident; ends when the lever is in force, not needed, or failed.

    Any other cause leaves it without a lever: people are told what was found and what to do, and the incident waits for
    recovery. Capacity is never touched.
    """

    @workflow.run
    async def run(self, input: MitigationInput) -> MitigationResult:
        return await _mitigation.shown(input)
