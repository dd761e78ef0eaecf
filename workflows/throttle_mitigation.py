"""Scenario 1's mitigation: take the levers of the plan, and report them to the incident."""

from temporalio import workflow

from domain.incident import Lever
from domain.messages import THROTTLE_MITIGATION_WORKFLOW, MitigationInput, MitigationResult
from workflows import _mitigation


@workflow.defn(name=THROTTLE_MITIGATION_WORKFLOW)
class ThrottleMitigationWorkflow:
    """Child of an incident; ends when every lever is in force, not needed, or failed."""

    @workflow.run
    async def run(self, input: MitigationInput) -> MitigationResult:
        workflow.set_current_details(_details(input.plan.levers, input.plan.arithmetic))
        result = await _mitigation.apply(input)
        workflow.set_current_details(_details(result.levers, result.arithmetic))
        return result


def _details(levers: list[Lever], arithmetic: list[str]) -> str:
    lines = [f"- {lever.name}: {lever.before} → {lever.after}: **{lever.status}**. {lever.why}" for lever in levers]
    return "\n".join([*lines, "", *arithmetic])
