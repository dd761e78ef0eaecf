"""Buying and releasing provisioned throughput, and telling the data plane. Every call may run twice."""

import asyncio
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities._polling import elapsed, pause
from activities.cloudwatch import evidence_of
from dataplane.routes import Routes
from domain.capacity import MANAGED_BY, MANAGED_BY_TAG, Order, ProvisionedModel, Survey, Surveyed, merged
from domain.errors import ErrorKind
from domain.evidence import Check, EvidenceKey
from domain.health import FoundModel
from domain.messages import (
    AwaitedModel,
    AwaitModel,
    AwaitUnits,
    CheckCapacity,
    CreateModel,
    DeleteModel,
    FleetUnits,
    PolicySnapshot,
)
from domain.planner import plan
from domain.policy import ModelPolicy
from domain.routes import CapacityRoutes

if TYPE_CHECKING:
    from types_boto3_bedrock.client import BedrockClient
    from types_boto3_bedrock.type_defs import ProvisionedModelSummaryTypeDef, TagTypeDef

ASKED_BY_TAG, UNTIL_TAG = "asked-by", "until"
"""Provenance of what we buy, beside `MANAGED_BY_TAG`."""


class BedrockActivities:
    """The one hand on Bedrock's provisioned throughput. botocore's errors pass through, to be mapped to kinds."""

    def __init__(self, bedrock: "BedrockClient", routes: Routes, owner: str = MANAGED_BY) -> None:
        """`owner`: value of the tag that says what is ours."""
        self._bedrock = bedrock
        self._owner = owner
        self._routes = routes

    @activity.defn
    def survey(self, request: Survey) -> Surveyed:
        """List all provisioned models of a model, whoever made them, and plan: one step, as buying is urgent."""
        situation = request.situation
        known = situation.fleet or ()
        listed = tuple(self.listed(situation.spec, known))
        fleet = merged(known, listed, request.unlisted, request.gone)
        return Surveyed(listed=listed, plan=plan(situation.model_copy(update={"fleet": fleet})))

    @activity.defn
    def check_capacity(self, request: CheckCapacity) -> list[Check]:
        """First-response check 3: is provisioned throughput at the expected level?"""
        started = time.perf_counter()
        fleet = self.units_of(request.spec)
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
        """Poll until exactly `units` are in service and none is in creation, or give up; answers what there is."""
        while True:
            fleet = await asyncio.to_thread(self.units_of, request.spec)
            if (fleet.units == request.units and not fleet.creating) or elapsed() >= request.give_up_after:
                return fleet
            await pause(request.poll_interval, fleet.units)

    def units_of(self, spec: ModelPolicy) -> FleetUnits:
        """Units of a model, whoever made them."""
        fleet = [_model(summary) for summary in self._summaries(spec)]
        return FleetUnits(
            units=sum(model.units for model in fleet if model.status in ("InService", "Updating")),
            creating=sum(model.units for model in fleet if model.status == "Creating"),
        )

    def arns_of(self, spec: ModelPolicy) -> set[str]:
        """ARNs of all provisioned models of a model, whatever their status."""
        return {summary["provisionedModelArn"] for summary in self._summaries(spec)}

    def listed(self, spec: ModelPolicy, known: Iterable[ProvisionedModel]) -> Iterator[ProvisionedModel]:
        """The model's fleet, whoever made it. Tags tell which are ours; those of `known` ones are not read again."""
        before = {model.arn: model for model in known}
        for summary in self._summaries(spec):
            arn = summary["provisionedModelArn"]
            provenance = _provenance_of(before[arn]) if arn in before else self._provenance(arn)
            if provenance is not None:
                yield _model(summary).model_copy(update=provenance)

    @activity.defn
    def look_at_fleet(self, snapshot: PolicySnapshot) -> list[FoundModel]:
        """The health check's look: every provisioned model of the account, of which model, and whether it is ours."""
        found = []
        for summary in self._all():
            names = [name for name, spec in snapshot.policy.models.items() if _is_of(spec, summary)]
            provenance = self._provenance(summary["provisionedModelArn"])
            if provenance is not None:
                base = summary["foundationModelArn"].rpartition("/")[2]
                listed = _model(summary).model_dump() | provenance
                found.append(FoundModel(**listed, model=names[0] if names else None, base_model_id=base))
        return found

    def _summaries(self, spec: ModelPolicy) -> "Iterator[ProvisionedModelSummaryTypeDef]":
        # Listed whole and filtered here: AWS does not say which ARN `modelArnEquals` compares for a context variant.
        return (summary for summary in self._all() if _is_of(spec, summary))

    def _all(self) -> "Iterator[ProvisionedModelSummaryTypeDef]":
        for page in self._bedrock.get_paginator("list_provisioned_model_throughputs").paginate():
            yield from page["provisionedModelSummaries"]

    def _provenance(self, arn: str) -> dict[str, Any] | None:
        """What its tags say of where it comes from; None: it has vanished since it was listed."""
        try:
            tags = self._bedrock.list_tags_for_resource(resourceARN=arn)["tags"]
        except self._bedrock.exceptions.ResourceNotFoundException:
            return None
        said = {tag["key"]: tag["value"] for tag in tags}
        if said.get(MANAGED_BY_TAG) != self._owner:
            return {"ours": False}
        until: datetime | None = None
        with suppress(ValueError):  # somebody edited the tag, or removed it
            until = datetime.fromisoformat(said.get(UNTIL_TAG, ""))
        return {"ours": True, "asked_by": said.get(ASKED_BY_TAG), "until": until if until and until.tzinfo else None}

    @activity.defn
    def create_model(self, request: CreateModel) -> str:
        """Ask for a provisioned model without commitment and answer its ARN; the token makes a repetition harmless."""
        order = request.order
        answer = self._bedrock.create_provisioned_model_throughput(
            clientRequestToken=order.token,
            modelUnits=order.units,
            provisionedModelName=order.name,
            modelId=request.provisioned_model_id,
            tags=_tags(order, self._owner),
        )
        return answer["provisionedModelArn"]

    @activity.defn
    async def await_in_service(self, request: AwaitModel) -> AwaitedModel:
        """Poll until the model has left Creating or is gone, or give up; answers what it is then."""
        return await self._poll(request, until_gone=False)

    @activity.defn
    def delete_model(self, request: DeleteModel) -> None:
        """Delete a provisioned model; one that is gone already is a success."""
        try:
            self._bedrock.delete_provisioned_model_throughput(provisionedModelId=request.arn)
        except self._bedrock.exceptions.ResourceNotFoundException:
            activity.logger.info("%s is gone already", request.arn)

    @activity.defn
    async def await_gone(self, request: AwaitModel) -> AwaitedModel:
        """Poll until AWS does not find the model, or give up; answers what it is then."""
        return await self._poll(request, until_gone=True)

    @activity.defn
    def look_at_routes(self, _: None = None) -> dict[str, dict[str, int]]:
        """The routes as they stand in the control state, by model: ARN to units."""
        return {
            model: {route.provisioned_model_arn: route.units for route in routes.routes}
            for model, routes in self._routes.read_all().items()
        }

    @activity.defn
    def publish_routes(self, routes: CapacityRoutes) -> None:
        """Replace the model's routes in the control state.

        Raises:
            ApplicationError: Conflict, when newer routes are published.
        """
        if not self._routes.publish(routes):
            raise ApplicationError(
                f"routes of {routes.model}: newer ones than version {routes.version} are published",
                type=ErrorKind.CONFLICT,
                non_retryable=True,
            )

    async def _poll(self, request: AwaitModel, until_gone: bool) -> AwaitedModel:
        while True:
            seen = await asyncio.to_thread(self._look, request.arn)
            ended = seen.status is None or (seen.status != "Creating" and not until_gone)
            if ended or elapsed() + request.poll_interval > request.give_up_after:
                return seen
            await pause(request.poll_interval, seen.status)

    def _look(self, arn: str) -> AwaitedModel:
        try:
            answer = self._bedrock.get_provisioned_model_throughput(provisionedModelId=arn)
        except self._bedrock.exceptions.ResourceNotFoundException:
            return AwaitedModel(status=None)
        return AwaitedModel(status=answer["status"], failure=answer.get("failureMessage"))


def _is_of(spec: ModelPolicy, summary: "ProvisionedModelSummaryTypeDef") -> bool:
    ids = {summary["modelArn"].rpartition("/")[2], summary["foundationModelArn"].rpartition("/")[2]}
    return bool(ids & {spec.model_id, spec.provisioned_model_id})


def _provenance_of(model: ProvisionedModel) -> dict[str, Any]:
    return {"ours": model.ours, "asked_by": model.asked_by, "until": model.until}


def _model(summary: "ProvisionedModelSummaryTypeDef") -> ProvisionedModel:
    """Not ours as far as the list says: it has no tags."""
    status = summary["status"]
    return ProvisionedModel(
        arn=summary["provisionedModelArn"],
        name=summary["provisionedModelName"],
        units=summary["desiredModelUnits"] if status == "Creating" else summary["modelUnits"],
        status=status,
        committed="commitmentDuration" in summary,
        created_at=summary["creationTime"],
    )


def _tags(order: Order, owner: str) -> "list[TagTypeDef]":
    tags = {MANAGED_BY_TAG: owner, ASKED_BY_TAG: order.asked_by, UNTIL_TAG: order.until.isoformat()}
    return [{"key": key, "value": re.sub(r"[^a-zA-Z0-9\s._:/=+@-]", "_", value)[:256]} for key, value in tags.items()]
