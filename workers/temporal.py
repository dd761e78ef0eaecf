"""One plugin for every process: data converter, sandbox passthrough, error mapping, failure types."""

from collections.abc import Callable

from pydantic import ValidationError
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.plugin import SimplePlugin
from temporalio.worker import WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from domain.permissions import Scope
from workers.errors import ErrorMapping
from workers.permissions import scope_of
from workers.settings import Settings

# `domain` is pure and `activities` is only referenced by workflows, so both may be shared with the sandbox;
# activities bring redis-py, for reports Jinja2 and for the publisher's feed feedparser along.
_PASSED_THROUGH = ("domain", "dataplane", "activities", "redis", "jinja2", "markdown_it", "feedparser", "h11")


def runbook_plugin(*, guarded: bool = False, scope: Callable[[], Scope] = Scope) -> SimplePlugin:
    """For clients (their workers inherit it) and for the replayer.

    `guarded`: the sandbox imports the workflows' own modules anew for every run and refuses what is not deterministic
    (clocks, randomness, I/O). For tests: it makes every lever a third later. `scope`: where the IAM statements apply
    that refused calls name.
    """
    passed_through = _PASSED_THROUGH if guarded else (*_PASSED_THROUGH, "workflows")

    def runner(existing: WorkflowRunner | None) -> WorkflowRunner:
        if existing is None or isinstance(existing, SandboxedWorkflowRunner):
            base = existing.restrictions if existing else SandboxRestrictions.default
            return SandboxedWorkflowRunner(restrictions=base.with_passthrough_modules(*passed_through))
        return existing

    return SimplePlugin(
        "mangaassist.runbooks",
        data_converter=pydantic_data_converter,
        workflow_runner=runner,
        interceptors=[ErrorMapping(scope)],
        # Bad input fails the workflow instead of retrying its task for ever.
        workflow_failure_exception_types=[ValidationError],
    )


async def connect(settings: Settings) -> Client:
    """A client with the plugin.

    Raises:
        RuntimeError: from the SDK, when the server cannot be reached.
    """
    plugin = runbook_plugin(scope=lambda: scope_of(settings))
    return await Client.connect(settings.temporal_address, namespace=settings.temporal_namespace, plugins=[plugin])
