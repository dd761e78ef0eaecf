"""Messages to long-lived workflows: a workflow itself can only signal and cancel others, so these use the client."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from temporalio import activity
from temporalio.client import Client, RPCError, WithStartWorkflowOperation, WorkflowUpdateFailedError
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, FailureError, WorkflowAlreadyStartedError
from temporalio.service import RPCStatusCode

from activities.settings import ConfigurationError
from domain.capacity import Demand, DemandOutcome
from domain.errors import ErrorKind
from domain.messages import (
    CAPACITY_STATE,
    CAPACITY_WORKFLOW,
    OVERRIDE_WORKFLOW,
    RECORD,
    SET_DEMAND,
    STARTED,
    WITHDRAW_DEMAND,
    CapacityInput,
    CapacityState,
    OverrideAnswer,
    PolicySnapshot,
    StartOverride,
    WithdrawDemand,
    capacity_id,
)
from domain.override import OverrideRecord, answer_of, shown


class EntityActivities:
    """Demands for capacity. A message to the capacity workflow of a model starts it if it does not run."""

    def __init__(self, policy: Callable[[], PolicySnapshot]) -> None:
        self._policy = policy

    @activity.defn
    async def set_demand(self, demand: Demand) -> DemandOutcome:
        """Record a demand, or replace the one with its id; answers what will be done.

        Raises:
            ApplicationError: Invalid, when the demand is refused: its end has passed, there is no such model.
        """
        return await self._update(demand.model, SET_DEMAND, demand)

    @activity.defn
    async def withdraw_demand(self, request: WithdrawDemand) -> DemandOutcome:
        """Take a demand back; one that is not there is a success."""
        return await self._update(request.model, WITHDRAW_DEMAND, request)

    @activity.defn
    async def capacity_state(self, model: str) -> CapacityState:
        """Everything the model's capacity workflow knows; an empty state when it was never started."""
        return await capacity_state(activity.client(), model)

    @activity.defn
    async def start_override(self, request: StartOverride) -> OverrideAnswer:
        """Start an override, or find the one with that id; answers once it holds its lease, waits, or was refused."""
        return await start_override(activity.client(), request, activity.info().task_queue)

    @activity.defn
    async def previous_run(self, workflow_id: str) -> str | None:
        """The run id of the last closed workflow with that id."""
        query = f"WorkflowId = '{workflow_id}' AND ExecutionStatus != 'Running'"
        async for execution in activity.client().list_workflows(query, limit=1):
            return execution.run_id
        return None

    async def _update(self, model: str, name: str, message: Demand | WithdrawDemand) -> DemandOutcome:
        info = activity.info()
        snapshot: PolicySnapshot | None = None
        with suppress(ConfigurationError):  # the workflow reads it, and says what is wrong with it
            snapshot = self._policy()
        start: WithStartWorkflowOperation[Any, Any] = WithStartWorkflowOperation(
            CAPACITY_WORKFLOW,
            CapacityInput(state=CapacityState(model=model), snapshot=snapshot),
            id=capacity_id(model),
            task_queue=info.task_queue,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            static_summary=_capacity_summary(model),
        )
        try:
            outcome: DemandOutcome = await activity.client().execute_update_with_start_workflow(
                name,
                message,
                start_workflow_operation=start,
                # The same for every attempt of this activity: an update whose answer was lost is not made again.
                id=f"{info.workflow_run_id}-{info.activity_id}",
                result_type=DemandOutcome,
            )
        except WorkflowUpdateFailedError as error:
            why = error.cause.message if isinstance(error.cause, FailureError) else str(error.cause)
            raise ApplicationError(why, type=ErrorKind.INVALID, non_retryable=True) from error
        return outcome


async def capacity_state(client: Client, model: str) -> CapacityState:
    """Everything the model's capacity workflow knows; an empty state when it was never started.

    Raises:
        RPCError: Temporal or its worker did not answer.
    """
    handle = client.get_workflow_handle(capacity_id(model))
    try:
        state: CapacityState = await handle.query(CAPACITY_STATE, result_type=CapacityState)
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return CapacityState(model=model)
        raise
    return state


async def start_capacity(client: Client, model: str, task_queue: str) -> None:
    """Start the model's capacity workflow; one that runs is left alone. It routes what there is, also without demands.

    Raises:
        RPCError: Temporal did not answer.
    """
    await client.start_workflow(
        CAPACITY_WORKFLOW,
        CapacityInput(state=CapacityState(model=model)),
        id=capacity_id(model),
        task_queue=task_queue,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        static_summary=_capacity_summary(model),
    )


def _capacity_summary(model: str) -> str:
    return f"The one writer of {model}'s provisioned capacity"


async def start_override(client: Client, request: StartOverride, task_queue: str) -> OverrideAnswer:
    """Start an override, or find the one with that id, open or closed: the same id never holds twice.

    Raises:
        RPCError: Temporal did not answer, or no worker took the update in time.
    """
    input = request.input
    start: WithStartWorkflowOperation[Any, Any] = WithStartWorkflowOperation(
        OVERRIDE_WORKFLOW,
        input,
        id=request.override_id,
        task_queue=task_queue,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
        static_summary=f"{input.knob} at {shown(input.value)[:60]} ({input.kind})".encode("ascii", "replace").decode(),
    )
    try:
        answer: OverrideAnswer = await client.execute_update_with_start_workflow(
            STARTED, start_workflow_operation=start, result_type=OverrideAnswer
        )
    except WorkflowAlreadyStartedError:
        handle = client.get_workflow_handle(request.override_id)
        record: OverrideRecord = await handle.query(RECORD, result_type=OverrideRecord)
        outcome, message = answer_of(record)
        return OverrideAnswer(outcome=outcome, message=message, record=record)
    return answer
