"""What stands between the timetable and Bedrock: the capacity workflow and the schedules that watch over it.

It is scenario 4's Lambda and EventBridge rule, and its own record tells what failed, so no logs are searched.
"""

import asyncio
import time
from datetime import UTC, datetime

from temporalio import activity
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from activities.bedrock import BedrockActivities
from activities.cloudwatch import evidence_of
from activities.decisions import DecisionActivities
from domain.errors import ErrorKind
from domain.evidence import Check, EvidenceKey, Value
from domain.messages import CAPACITY_STATE, CapacityState, CheckPlumbing, capacity_id

ACTING = {
    BedrockActivities.survey.__name__,
    DecisionActivities.plan_capacity.__name__,
    BedrockActivities.create_model.__name__,
}
"""Steps of the capacity workflow on the way to a purchase."""


class Plumbing:
    """Temporal is asked about itself; Bedrock which of the routed models there are. For use within an activity."""

    def __init__(self, bedrock: BedrockActivities) -> None:
        self._bedrock = bedrock

    async def check(self, request: CheckPlumbing) -> Check:
        """Scenario 4's check: did what turns the timetable into units run, and how did it end?

        Read before the levers: their demand starts the capacity workflow and has it try again what failed.

        Raises:
            RPCError: Temporal did not answer.
        """
        started, client = time.perf_counter(), activity.client()
        doing, state, kind, text, acting = await _capacity(client, request.model)
        off = [words for schedule in request.schedules if (words := await _why_off(client, schedule))]
        stale = await self._stale(request, state)
        if stale and not kind and doing == "running":
            kind, text = ErrorKind.NOT_FOUND, f"the routes name models that Bedrock does not have: {', '.join(stale)}"
        units = request.fleet.units
        known = sum(model.units for model in state.fleet if model.status == "Creating")
        # AWS has not answered yet, or the fleet was listed a moment before it did.
        creating = request.fleet.creating or known or (request.expected_units - units if acting else 0)
        values: dict[EvidenceKey, Value | None] = {
            EvidenceKey.UNITS_IN_SERVICE: units,
            EvidenceKey.UNITS_CREATING: creating,
            EvidenceKey.UNITS_EXPECTED: request.expected_units,
            EvidenceKey.PROVISIONED_TOKENS_PER_SECOND: units * request.spec.tokens_per_second_per_unit,
            EvidenceKey.CAPACITY_WORKFLOW: doing,
            EvidenceKey.SCHEDULES_OFF: off,
            EvidenceKey.PROVISIONING_ERROR: kind,
            EvidenceKey.PROVISIONING_ERROR_TEXT: text,
        }
        now = datetime.now(UTC)
        busy = f" ({state.doing})" if state.doing else ""
        finding = (
            f"the capacity workflow of {request.model} is {doing}{busy}, {request.expected_units} units are expected"
        )
        for words in ([text] if text else []) + off:
            finding += f"; {words}"
        return Check(
            name="Provisioning",
            finding=finding,
            breaching=bool(doing != "running" or off or kind),
            evidence=evidence_of(values, f"temporal {capacity_id(request.model)}, schedules", now, "not there"),
            observed_at=now,
            duration_ms=(time.perf_counter() - started) * 1000,
        )

    async def _stale(self, request: CheckPlumbing, state: CapacityState) -> list[str]:
        """Names of routed models that Bedrock does not list any more."""
        listed = await asyncio.to_thread(self._bedrock.arns_of, request.spec)
        return sorted(arn.rpartition("/")[2] for arn in state.routes.keys() - listed)


async def _capacity(client: Client, model: str) -> tuple[str, CapacityState, str, str, bool]:
    """`running`, `paused` or `missing`; its state; the kind of what fails, and the words; whether it acts now."""
    handle = client.get_workflow_handle(capacity_id(model))
    try:
        seen = await handle.describe()
        state: CapacityState = await handle.query(CAPACITY_STATE, result_type=CapacityState)
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        return "missing", CapacityState(model=model), "", "", False
    if seen.status is not WorkflowExecutionStatus.RUNNING:
        return "missing", state, "", "", False
    if state.paused is not None:
        return "paused", state, "", f"paused by {state.paused.who}: {state.paused.why}", False
    failing = _failing(seen) or next(((trouble.kind, trouble.text) for trouble in state.troubles), ("", ""))
    acting = any(one.activity_type.name in ACTING for one in seen.raw_description.pending_activities)
    return "running", state, *failing, acting


def _failing(seen: WorkflowExecutionDescription) -> tuple[str, str] | None:
    """Why a step that is tried again and again failed last; None: no step is."""
    for pending in seen.raw_description.pending_activities:
        failure = pending.last_failure  # one without a kind is Temporal's own: the step took too long
        kind = failure.application_failure_info.type or ErrorKind.UNAVAILABLE
        if pending.HasField("last_failure") and kind in set(ErrorKind):  # a watch says by others that all is as before
            return kind, f"{pending.activity_type.name} was tried {pending.attempt} times: {failure.message}"
    return None


async def _why_off(client: Client, schedule_id: str) -> str:
    """That a schedule is paused or missing, in words; empty: it is on."""
    try:
        seen = await client.get_schedule_handle(schedule_id).describe()
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        return f"the schedule {schedule_id} is missing"
    state = seen.schedule.state
    return f"the schedule {schedule_id} is paused: {state.note or 'no note'}" if state.paused else ""
