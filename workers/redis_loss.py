"""Redis that lost writes: noticed, told to those who keep leases or routes there, cleared of leases without owner."""

import asyncio
import re
import time
from datetime import timedelta

import redis
import structlog
from temporalio.client import Client
from temporalio.service import RPCError

from dataplane.knob_copy import KnobCopy
from dataplane.ledger import LeaseRefusedError, Ledger
from domain.messages import CAPACITY_WORKFLOW, LEASES_LOST
from workflows.search_attributes import HOLDS_LEASES

POLL = timedelta(seconds=1)
TELL_AGAIN = timedelta(seconds=5)
_RUN_OF_LEASE = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}):.*")
"""Lease ids begin with the run id of the workflow that owns them."""
_RUNS_IN_ONE_QUERY = 50

_log = structlog.get_logger()


async def watch_redis(ledger: Ledger, knobs: KnobCopy, client: Client) -> None:
    """Notice a lost Redis, and see that what is in force is what the workflows hold. Runs until cancelled.

    Lost: the epoch marker is missing, or `knobs`, which follows every change, saw another data set or an older one (a
    failover to a replica that had lost the last writes). The marker is made anew only once the holders were told. They
    are told a second time, because a workflow that took its leases a moment ago is not in the visibility store yet.
    Redis away: nothing is known, and nothing is told.
    """
    losses = 0
    tell_again_at: float | None = None
    while True:
        try:
            epoch, seen = (await asyncio.to_thread(ledger.leases)).epoch, knobs.status().losses
            lost = epoch is None or seen != losses
            if lost or (tell_again_at is not None and time.monotonic() >= tell_again_at):
                _log.warning(
                    "redis lost writes; those who keep leases or routes there are told", epoch=epoch, losses=seen
                )
                await _tell_holders(client)
                await _release_orphans(ledger, client)
                losses, tell_again_at = seen, time.monotonic() + TELL_AGAIN.total_seconds() if lost else None
            if epoch is None:
                await asyncio.to_thread(ledger.ensure_epoch)
        except (redis.RedisError, RPCError) as error:
            _log.warning("leases cannot be looked after now", error=str(error))
        await asyncio.sleep(POLL.total_seconds())


async def _tell_holders(client: Client) -> None:
    holders = f"({HOLDS_LEASES.name} = true OR WorkflowType = '{CAPACITY_WORKFLOW}') AND ExecutionStatus = 'Running'"
    async for execution in client.list_workflows(holders):
        try:
            # Not to the run that was found: it may have been continued as new since.
            await client.get_workflow_handle(execution.id).signal(LEASES_LOST)
        except RPCError as error:
            _log.warning("a workflow could not be told", workflow=execution.id, error=str(error))


async def _release_orphans(ledger: Ledger, client: Client) -> None:
    """End what a stale replica brought back although its owner is over. An owner not known to be over keeps its own."""
    leases = (await asyncio.to_thread(ledger.leases)).leases
    owned = [(lease, match[1]) for lease in leases if (match := _RUN_OF_LEASE.fullmatch(lease.lease_id))]
    over = await _over(client, sorted({run for _, run in owned}))
    for lease, run in owned:
        if run in over:
            _log.warning("a lease came back whose owner is over; it is released", lease=lease.lease_id, knob=lease.knob)
            try:
                await asyncio.to_thread(ledger.release, [lease.lease_id], lease.holder, "its owner is over")
            except LeaseRefusedError as error:
                _log.warning("a lease without an owner could not be released", error=str(error))


async def _over(client: Client, runs: list[str]) -> set[str]:
    """Those of these runs that are known to be over, and were not continued."""
    over = "ExecutionStatus != 'Running' AND ExecutionStatus != 'ContinuedAsNew'"
    found: set[str] = set()
    for start in range(0, len(runs), _RUNS_IN_ONE_QUERY):
        some = ", ".join(f"'{run}'" for run in runs[start : start + _RUNS_IN_ONE_QUERY])
        found |= {run.run_id async for run in client.list_workflows(f"RunId IN ({some}) AND {over}")}
    return found
