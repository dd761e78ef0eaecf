"""An incident around fakes whose levers are in a real ledger, on a real Temporal."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import redis
from temporalio.client import Client
from temporalio.worker import Worker

from activities.entities import EntityActivities
from activities.leases import LeaseActivities
from dataplane.ledger import Ledger
from domain.incident import IncidentRecord
from domain.knobs import KnobName, KnobValue
from domain.messages import RECORD
from tests.servers import TemporalServer
from tests.workflows.fakes import MODEL, activities_of
from tests.workflows.record_histories import Play
from workers.runbook_worker import WORKFLOWS
from workers.temporal import runbook_plugin


class Handing(Play):
    """An incident whose levers are in a real ledger."""

    def __init__(self, client: Client, ledger: Ledger) -> None:
        super().__init__(client)
        self.ledger = ledger

    def value(self, knob: KnobName) -> KnobValue:
        return self.ledger.effective(knob, self.world.snapshot.policy.baseline)

    async def record(self) -> IncidentRecord:
        record: IncidentRecord = await self.incident.query(RECORD, result_type=IncidentRecord)
        return record

    async def soon(self, what: Callable[[], object]) -> None:
        give_up_at = time.monotonic() + 40
        while not what():
            assert time.monotonic() < give_up_at, "it never came true"
            await asyncio.sleep(0.02)


@asynccontextmanager
async def handing(temporal: TemporalServer, redis_client: redis.Redis) -> AsyncIterator[Handing]:
    """The incident's worker; in the end all that took part is at rest."""
    client = await Client.connect(temporal.address, plugins=[runbook_plugin()])
    play = Handing(client, Ledger(redis_client))
    leases = LeaseActivities(play.ledger)
    around = [
        getattr(leases, one.__name__, one)
        for one in activities_of(play.world, EntityActivities(lambda: play.world.snapshot))
    ]
    with ThreadPoolExecutor(8) as threads:
        worker = Worker(client, task_queue=MODEL, workflows=WORKFLOWS, activities=around, activity_executor=threads)
        async with worker:
            yield play
            await play.histories()
