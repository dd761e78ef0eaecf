"""Scenario 1's mitigation: take the levers of the plan, and report them to the incident."""

from temporalio import workflow

from domain.messages import THROTTLE_MITIGATION_WORKFLOW, MitigationInput, MitigationResult
from workflows import _mitigation


@workflow.defn(name=THROTTLE_MITIGATION_WORKFLOW)
class ThrottleMitigationWorkflow:
    """Child of an incident; ends when every lever is in force, not needed, or failed."""

    @workflow.run
    async def run(self, input: MitigationInput) -> MitigationResult:
        return await _mitigation.shown(input)
