"""Reading the fleet of provisioned models: the read-only half of Bedrock's management API."""

import asyncio
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from temporalio import activity

from activities.cloudwatch import evidence_of
from domain.evidence import Check, EvidenceKey
from domain.messages import AwaitUnits, CheckCapacity, FleetUnits

if TYPE_CHECKING:
    from types_boto3_bedrock.client import BedrockClient


class FleetActivities:
    """Units of a model, whoever made them."""

    def __init__(self, bedrock: "BedrockClient") -> None:
        self._bedrock = bedrock

    @activity.defn
    def check_capacity(self, request: CheckCapacity) -> list[Check]:
        """First-response check 3: is provisioned throughput at the expected level?"""
        started = time.perf_counter()
        fleet = self._units(request.model_id)
        now = datetime.now(UTC)
        creating = f", {fleet.creating} more are being created" if fleet.creating else ""
        level = "as expected" if fleet.units >= request.expected_units else f"{request.expected_units} are expected"
        return [
            Check(
                name="Provisioned throughput",
                finding=f"{fleet.units} units of {request.model} are in service, {level}{creating}",
                breaching=fleet.units < request.expected_units,
                evidence=evidence_of(
                    {EvidenceKey.UNITS_IN_SERVICE: fleet.units, EvidenceKey.UNITS_CREATING: fleet.creating},
                    "bedrock ListProvisionedModelThroughputs",
                    now,
                    "not in the answer",
                ),
                observed_at=now,
                duration_ms=(time.perf_counter() - started) * 1000,
            )
        ]

    @activity.defn
    async def await_units(self, request: AwaitUnits) -> FleetUnits:
        """Poll until the model has exactly `units` in all, in service or not, or give up; answers what there is."""
        started = time.monotonic()
        while True:
            fleet = await asyncio.to_thread(self._units, request.model_id)
            if fleet.units == request.units and not fleet.creating:
                return fleet
            if time.monotonic() - started >= request.give_up_after.total_seconds():
                return fleet
            activity.heartbeat(fleet.units)
            await asyncio.sleep(request.poll_interval.total_seconds())

    def _units(self, model_id: str) -> FleetUnits:
        units = creating = 0
        for page in self._bedrock.get_paginator("list_provisioned_model_throughputs").paginate():
            for summary in page["provisionedModelSummaries"]:
                if summary["foundationModelArn"].endswith(f"/{model_id}") or summary["modelArn"].endswith(
                    f"/{model_id}"
                ):
                    if summary["status"] == "Creating":
                        creating += summary["desiredModelUnits"]
                    elif summary["status"] != "Failed":
                        units += summary["modelUnits"]
        return FleetUnits(units=units, creating=creating)
