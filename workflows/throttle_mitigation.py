"""Scenario 1's mitigation: plan the levers for what is known, take them, report each to the incident."""

from temporalio import workflow

from activities.decisions import DecisionActivities
from domain.incident import Lever
from domain.messages import THROTTLE_MITIGATION_WORKFLOW, MitigationInput, MitigationResult, PlanThrottle
from workflows import _mitigation
from workflows._step import decide


@workflow.defn(name=THROTTLE_MITIGATION_WORKFLOW)
class ThrottleMitigationWorkflow:
    """Child of an incident; ends when every lever is in force, not needed, or failed."""

    @workflow.run
    async def run(self, input: MitigationInput) -> MitigationResult:
        plan = await decide(
            DecisionActivities.plan_throttle,
            PlanThrottle(model=input.model, load=input.load, snapshot=input.snapshot, now=workflow.now()),
            summary="Plan: which levers, how many units",
        )
        workflow.set_current_details(_details(plan.levers, plan.arithmetic))
        result = await _mitigation.apply(input, plan)
        workflow.set_current_details(_details(result.levers, result.arithmetic))
        return result


def _details(levers: list[Lever], arithmetic: list[str]) -> str:
    lines = [f"- {lever.name}: {lever.before} → {lever.after}: **{lever.status}**. {lever.why}" for lever in levers]
    return "\n".join([*lines, "", *arithmetic])
