"""The batcher on Temporal: a prompt from a workflow is answered as the chatbot's are, and a refusal has its kind."""

from datetime import timedelta
from uuid import uuid4

import pytest
from temporalio import workflow
from temporalio.client import Client, WorkflowFailureError
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from activities.invoke import InvokeActivities
from domain.batching import Answer, Refusal, RequestRefused
from domain.errors import ErrorKind
from domain.invoking import BATCHER_TASK_QUEUE, INVOKE, Invoke, Invoked
from tests.servers import TemporalServer
from workers.settings import Settings
from workers.temporal import connect


@workflow.defn
class Ask:
    """Asks the batcher once."""

    @workflow.run
    async def run(self, request: Invoke) -> Invoked:
        answer: Invoked = await workflow.execute_activity(
            INVOKE,
            request,
            result_type=Invoked,
            task_queue=BATCHER_TASK_QUEUE,
            schedule_to_close_timeout=timedelta(seconds=20),
            start_to_close_timeout=timedelta(seconds=10),
            retry_policy=RetryPolicy(initial_interval=timedelta(seconds=10)),
        )
        return answer


class Batcher:
    """Answers what it is told to; shed prompts succeed the second time."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []

    async def ask(self, intent: str, prompt: str, **more: object) -> Answer:
        self.asked.append({"intent": intent, "prompt": prompt, **more})
        if prompt == "bad":
            raise RequestRefused(Refusal.INVALID, "intent: 'x' is none of faq")
        if prompt == "shed" and len(self.asked) == 1:
            raise RequestRefused(Refusal.OVERLOADED, "full", 0.1)
        return Answer("yes", "sonnet", 10, 20, 3)


async def test_invoke(temporal: TemporalServer) -> None:
    client: Client = await connect(Settings(temporal_address=temporal.address))
    batcher, queue, runner = Batcher(), uuid4().hex, UnsandboxedWorkflowRunner()
    serving = Worker(client, task_queue=BATCHER_TASK_QUEUE, activities=[InvokeActivities(batcher.ask).invoke])
    async with Worker(client, task_queue=queue, workflows=[Ask], workflow_runner=runner), serving:
        request = Invoke(intent="faq", prompt="shed", max_tokens=5, within=timedelta(seconds=3))
        answer = await client.execute_workflow(Ask.run, request, id=uuid4().hex, task_queue=queue)
        assert answer == Invoked(text="yes", model="sonnet", input_tokens=10, output_tokens=20, batch_size=3)
        asked = {"intent": "faq", "prompt": "shed", "max_tokens": 5, "within_seconds": 3.0, "audience": ""}
        assert batcher.asked == [asked, asked], "it came again when it was told to, not after ten seconds"
        with pytest.raises(WorkflowFailureError) as failed:
            await client.execute_workflow(Ask.run, Invoke(intent="x", prompt="bad"), id=uuid4().hex, task_queue=queue)
        cause = failed.value.cause
        assert isinstance(cause, ActivityError)
        assert isinstance(cause.cause, ApplicationError)
        assert (cause.cause.type, cause.cause.non_retryable) == (ErrorKind.INVALID, True)
        assert len(batcher.asked) == 3
