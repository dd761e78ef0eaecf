"""Prepares a Temporal server that we did not start: `python -m ops.namespace`.

Makes the namespace if it is not there, and registers the search attributes that it lacks. Safe to run again, and
before the server answers: it waits.
"""

import asyncio
import os
import sys
from collections.abc import Mapping
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.api.workflowservice.v1 import RegisterNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from workers.settings import Settings
from workflows.search_attributes import SEARCH_ATTRIBUTES

RETENTION = timedelta(days=30)
"""How long closed incidents stay readable."""
_PATIENCE = timedelta(minutes=2)
_TRY_EVERY = timedelta(seconds=1)


async def register_search_attributes(client: Client, attributes: Mapping[str, str]) -> list[str]:
    """Registers those that the client's namespace lacks and returns their names.

    Raises:
        RPCError: among others, when the namespace is not known (yet).
    """
    service = client.operator_service
    there = await service.list_search_attributes(ListSearchAttributesRequest(namespace=client.namespace))
    lacking = {
        name: IndexedValueType.Value(f"INDEXED_VALUE_TYPE_{kind.upper()}")
        for name, kind in attributes.items()
        if name not in there.custom_attributes
    }
    if lacking:
        await service.add_search_attributes(
            AddSearchAttributesRequest(namespace=client.namespace, search_attributes=lacking)
        )
    return list(lacking)


async def register_namespace(client: Client) -> bool:
    """Makes the client's namespace; false when it was there."""
    retention = Duration()
    retention.FromTimedelta(RETENTION)
    request = RegisterNamespaceRequest(namespace=client.namespace, workflow_execution_retention_period=retention)
    try:
        await client.workflow_service.register_namespace(request)
    except RPCError as error:
        if error.status is RPCStatusCode.ALREADY_EXISTS:
            return False
        raise
    return True


async def _prepare(settings: Settings) -> list[str]:
    client = await Client.connect(settings.temporal_address, namespace=settings.temporal_namespace)
    did = [f"made namespace {client.namespace}"] if await register_namespace(client) else []
    # A new namespace is not known everywhere at once: what fails then is tried again.
    added = await register_search_attributes(client, SEARCH_ATTRIBUTES)
    return [*did, *(f"registered {name}" for name in added)]


async def main() -> int:
    """Prepares the server that the settings name; exit code 1 when it did not work within two minutes."""
    settings = Settings()
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + _PATIENCE.total_seconds()
    while True:
        try:
            did = await _prepare(settings)
        except (RPCError, RuntimeError) as error:
            print(f"Temporal at {settings.temporal_address}: {error}", file=sys.stderr)
            if loop.time() > give_up_at:
                return 1
            await asyncio.sleep(_TRY_EVERY.total_seconds())
        else:
            print("\n".join(did) or "everything was there")
            return 0


if __name__ == "__main__":
    code = asyncio.run(main())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process that used a Temporal client may crash at interpreter exit (sdk-python issue 300)
