"""Scenario 4's mitigation: the units that the hour expects, and free levers while they are on their way."""

from temporalio import workflow

from domain.messages import SCALING_LAG_MITIGATION_WORKFLOW, MitigationInput, MitigationResult
from workflows import _mitigation


@workflow.defn(name=SCALING_LAG_MITIGATION_WORKFLOW)
class ScalingLagMitigationWorkflow:
    """Child of an incident; ends when every lever is in force, not needed, or failed.

    Its demand has the capacity workflow try again at once what failed, and so may be all that is needed. While the
    cause lasts (a missing permission, a pause) the demand stands: once it is mended, `runbooks capacity reconcile`
    re-runs what failed, and so does the next reconciliation by itself.
    """

    @workflow.run
    async def run(self, input: MitigationInput) -> MitigationResult:
        return await _mitigation.shown(input)
