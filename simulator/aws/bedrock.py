"""Provisioned throughput of Amazon Bedrock: created, read, renamed, deleted; its units never change.

Shapes, error codes and status codes are those of botocore's service model; which situation gives which error is
documented in `docs/simulator.md`, told apart from what is assumed.
"""

import json
import re
import string
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote

from moto.bedrock import urls
from moto.bedrock.models import BedrockBackend, bedrock_backends
from moto.bedrock.responses import BedrockResponse
from moto.core.responses import ActionResult, BaseResponse, EmptyResult
from pydantic import BaseModel, ConfigDict

from simulator.aws.errors import AwsError
from simulator.aws.world import ENVIRON_KEY, World

_NAME = re.compile(r"([0-9a-zA-Z][_-]?)+")
_MAX_NAME = 63
_MAX_TAGS = 50
_MAX_PAGE = 1000
_TERMS = {"OneMonth": timedelta(days=30), "SixMonths": timedelta(days=182)}
_PATH = "/provisioned-model-throughput/"
_RESOURCE = ":provisioned-model/"
_ID_LENGTH = 12


@dataclass
class ProvisionedModel:
    """One purchase of model units."""

    arn: str
    name: str
    model_arn: str
    foundation_model_arn: str
    units: int
    created_at: datetime
    modified_at: datetime
    in_service_at: datetime
    commitment: str | None
    failure_message: str | None = None
    """Set: the creation failed."""

    def status(self, now: datetime) -> str:
        """AWS's word for where it is in its life."""
        if self.failure_message is not None:
            return "Failed"
        return "InService" if now >= self.in_service_at else "Creating"

    def summary(self, now: datetime) -> dict[str, Any]:
        """As List and Get describe it."""
        described: dict[str, Any] = {
            "provisionedModelName": self.name,
            "provisionedModelArn": self.arn,
            "modelArn": self.model_arn,
            "desiredModelArn": self.model_arn,
            "foundationModelArn": self.foundation_model_arn,
            "modelUnits": self.units,
            "desiredModelUnits": self.units,
            "status": self.status(now),
            "creationTime": self.created_at,
            "lastModifiedTime": max(self.modified_at, min(now, self.in_service_at)),
        }
        if self.commitment is not None:
            described["commitmentDuration"] = self.commitment
            described["commitmentExpirationTime"] = self.created_at + _TERMS[self.commitment]
        return described


@dataclass
class Fleet:
    """An account's provisioned models in one region."""

    by_arn: dict[str, ProvisionedModel] = field(default_factory=dict)
    arn_by_token: dict[str, str] = field(default_factory=dict)

    def find(self, identifier: str) -> ProvisionedModel:
        """By ARN or name, as AWS does, or by the ARN's last part."""
        for model in self.by_arn.values():
            if identifier in (model.arn, model.name, model.arn.rsplit("/", 1)[-1]):
                return model
        raise AwsError("ResourceNotFoundException", f"Could not find the provisioned model {identifier}.")


class ForcedStatus(BaseModel):
    """Body of `POST /_simulator/provisioned-model-throughput/<name, id or ARN>`: AWS's own hand. Given is changed."""

    model_config = ConfigDict(extra="forbid")

    failure_message: str | None = None
    """Its creation has failed, for this reason."""
    in_service_after_seconds: float | None = None
    """Real seconds from now; 0 puts it in service at once."""


def fleet_of(backend: BedrockBackend) -> Fleet:
    """Kept on moto's backend, so that moto's reset empties it."""
    fleet: Fleet = backend.__dict__.setdefault("_simulator_fleet", Fleet())
    return fleet


def provisioned_arn(response: BaseResponse, identifier: str) -> str:
    """The ARN that an ARN, a name or an id means, also of what does not exist."""
    fleet = fleet_of(bedrock_backends[response.current_account][response.region])
    try:
        return fleet.find(identifier).arn
    except AwsError:
        account = f"arn:{response.partition}:bedrock:{response.region}:{response.current_account}"
        return identifier if identifier.startswith("arn:") else f"{account}{_RESOURCE}{identifier}"


def tags_of(response: BaseResponse, arn: str) -> dict[str, str]:
    """Of a provisioned model; none of what does not exist."""
    backend = bedrock_backends[response.current_account][response.region]
    tags: dict[str, str] = backend.tagger.get_tag_dict_for_resource(arn)
    return tags


def force(fleet: Fleet, world: World, identifier: str, forced: ForcedStatus) -> None:
    """What happens to a provisioned model without its owner asking."""
    with world.lock:
        model = fleet.find(identifier)
        if forced.failure_message is not None:
            model.failure_message = forced.failure_message
        if forced.in_service_after_seconds is not None:
            model.in_service_at = datetime.now(UTC) + timedelta(seconds=forced.in_service_after_seconds)


def remove(fleet: Fleet, world: World, identifier: str) -> None:
    """Somebody else deleted it; no rule stands in the way."""
    with world.lock:
        del fleet.by_arn[fleet.find(identifier).arn]


def settle(fleet: Fleet, world: World) -> None:
    """Whatever is being created is in service now."""
    with world.lock:
        now = datetime.now(UTC)
        for model in fleet.by_arn.values():
            model.in_service_at = min(model.in_service_at, now)


def _invalid(message: str) -> AwsError:
    return AwsError("ValidationException", message)


class ProvisionedBedrockResponse(BedrockResponse):
    """moto's Bedrock with the five operations on provisioned throughput, and tags on it."""

    @property
    def _world(self) -> World:
        world: World = self.normalized_request.environ[ENVIRON_KEY]
        return world

    @property
    def _fleet(self) -> Fleet:
        return fleet_of(self.bedrock_backend)

    @property
    def _identifier(self) -> str:
        return unquote(self.raw_path.split(_PATH, 1)[1])

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.body or "{}")
        return body

    def create_provisioned_model_throughput(self) -> ActionResult:
        """201 with the ARN; the model is `Creating` until the lag has passed."""
        body, world, fleet = self._body(), self._world, self._fleet
        name = _checked_name(body.get("provisionedModelName"))
        units = body.get("modelUnits")
        if not isinstance(units, int) or units < 1:
            raise _invalid(f"modelUnits {units!r} must be a whole number of at least 1.")
        commitment = body.get("commitmentDuration")
        if commitment is not None and commitment not in _TERMS:
            raise _invalid(f"commitmentDuration {commitment!r} must be one of {', '.join(_TERMS)}.")
        tags = body.get("tags", [])
        if len(tags) > _MAX_TAGS:
            raise AwsError("TooManyTagsException", f"{len(tags)} tags; a resource has at most {_MAX_TAGS}.")
        token = body.get("clientRequestToken")
        with world.lock:
            if token is not None and token in fleet.arn_by_token:
                return ActionResult({"provisionedModelArn": fleet.arn_by_token[token]})
            model_id = self._model_id(str(body.get("modelId")))
            if any(model.name == name for model in fleet.by_arn.values()):
                raise _invalid(f"A provisioned model named {name} exists already.")
            self._check_quota(model_id, units)
            model = self._new(name, model_id, units, commitment)
            fleet.by_arn[model.arn] = model
            if token is not None:
                fleet.arn_by_token[token] = model.arn
            self.bedrock_backend.tagger.tag_resource(model.arn, _moto_tags(tags))
        return ActionResult({"provisionedModelArn": model.arn})

    def _model_id(self, model: str) -> str:
        """The id of a model that can be bought, from an id or a foundation model's ARN."""
        model_id = model.rsplit(":foundation-model/", 1)[-1]
        if model_id in self._world.quotas:
            return model_id
        if model.startswith("arn:"):
            raise AwsError("ResourceNotFoundException", f"Could not find the model {model}.")
        raise _invalid("The provided model identifier is invalid.")

    def _check_quota(self, model_id: str, units: int) -> None:
        held = sum(model.units for model in self._fleet.by_arn.values() if model.model_arn.endswith(f"/{model_id}"))
        granted = self._world.quotas[model_id]
        if held + units > granted:
            raise AwsError(
                "ServiceQuotaExceededException",
                f"The request of {units} model units for {model_id} exceeds the account's quota: "
                f"{granted} granted, {held} in use.",
            )

    def _new(self, name: str, model_id: str, units: int, commitment: str | None) -> ProvisionedModel:
        now = datetime.now(UTC)
        account = f"arn:{self.partition}:bedrock:{self.region}:{self.current_account}"
        foundation = f"arn:{self.partition}:bedrock:{self.region}::foundation-model"
        random_id = "".join(self._world.ids.choices(string.ascii_lowercase + string.digits, k=_ID_LENGTH))
        return ProvisionedModel(
            arn=f"{account}{_RESOURCE}{random_id}",
            name=name,
            model_arn=f"{foundation}/{model_id}",
            foundation_model_arn=f"{foundation}/{re.sub(r':[0-9]+k$', '', model_id)}",
            units=units,
            created_at=now,
            modified_at=now,
            in_service_at=now + self._world.provisioning_lag,
            commitment=commitment,
        )

    def get_provisioned_model_throughput(self) -> ActionResult:
        """One, by ARN or name."""
        with self._world.lock:
            model = self._fleet.find(self._identifier)
            described = model.summary(datetime.now(UTC))
        if model.failure_message is not None:
            described["failureMessage"] = model.failure_message
        return ActionResult(described)

    def list_provisioned_model_throughputs(self) -> ActionResult:
        """All that pass the filters, newest first unless asked otherwise, in pages."""
        query = {key: values[0] for key, values in self.querystring.items()}
        limit = int(query.get("maxResults", _MAX_PAGE))
        if not 1 <= limit <= _MAX_PAGE:
            raise _invalid(f"maxResults {limit} must be from 1 to {_MAX_PAGE}.")
        now = datetime.now(UTC)
        with self._world.lock:
            found = [model.summary(now) for model in self._fleet.by_arn.values()]
        found = [item for item in found if _passes(item, query)]
        found.sort(key=lambda item: item["creationTime"], reverse=query.get("sortOrder") != "Ascending")
        start = int(query.get("nextToken", 0))
        page: dict[str, Any] = {"provisionedModelSummaries": found[start : start + limit]}
        if start + limit < len(found):
            page["nextToken"] = str(start + limit)
        return ActionResult(page)

    def update_provisioned_model_throughput(self) -> ActionResult:
        """Renames. The model of a base model's throughput cannot be changed, nor can units."""
        body = self._body()
        with self._world.lock:
            model = self._fleet.find(self._identifier)
            if "desiredModelId" in body:
                raise _invalid("desiredModelId cannot be set for a base model's Provisioned Throughput.")
            if "desiredProvisionedModelName" in body:
                name = _checked_name(body["desiredProvisionedModelName"])
                if any(other.name == name and other is not model for other in self._fleet.by_arn.values()):
                    raise _invalid(f"A provisioned model named {name} exists already.")
                model.name = name
            model.modified_at = datetime.now(UTC)
        return EmptyResult()

    def delete_provisioned_model_throughput(self) -> ActionResult:
        """Refused while it is being created and until a commitment's term is over."""
        now = datetime.now(UTC)
        with self._world.lock:
            model = self._fleet.find(self._identifier)
            if model.status(now) == "Creating":
                raise AwsError("ConflictException", f"{model.name} is being created; it cannot be deleted yet.")
            if model.commitment is not None and now < model.created_at + _TERMS[model.commitment]:
                raise AwsError(
                    "ConflictException", f"{model.name} cannot be deleted before its commitment's term ends."
                )
            del self._fleet.by_arn[model.arn]
            self.bedrock_backend.tagger.delete_all_tags_for_resource(model.arn)
        return EmptyResult()

    def tag_resource(self) -> Any:
        """Tags of provisioned models here, of everything else in moto."""
        body = self._body()
        if _RESOURCE not in body["resourceARN"]:
            return super().tag_resource()
        arn = self._fleet.find(body["resourceARN"]).arn
        tagger = self.bedrock_backend.tagger
        tags = tagger.get_tag_dict_for_resource(arn) | {tag["key"]: tag["value"] for tag in body["tags"]}
        if len(tags) > _MAX_TAGS:
            raise AwsError("TooManyTagsException", f"{len(tags)} tags; a resource has at most {_MAX_TAGS}.")
        tagger.tag_resource(arn, _moto_tags(body["tags"]))
        return EmptyResult()

    def untag_resource(self) -> Any:
        """Likewise."""
        body = self._body()
        if _RESOURCE not in body["resourceARN"]:
            return super().untag_resource()
        arn = self._fleet.find(body["resourceARN"]).arn
        self.bedrock_backend.tagger.untag_resource_using_names(arn, body["tagKeys"])
        return EmptyResult()

    def list_tags_for_resource(self) -> Any:
        """Likewise."""
        body = self._body()
        if _RESOURCE not in body["resourceARN"]:
            return super().list_tags_for_resource()
        arn = self._fleet.find(body["resourceARN"]).arn
        tags = self.bedrock_backend.tagger.get_tag_dict_for_resource(arn)
        return ActionResult({"tags": [{"key": key, "value": value} for key, value in tags.items()]})


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= _MAX_NAME or not _NAME.fullmatch(name):
        raise _invalid(f"The name {name!r} must have 1 to {_MAX_NAME} characters and match {_NAME.pattern}.")
    return name


def _moto_tags(tags: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"Key": tag["key"], "Value": tag["value"]} for tag in tags]


def _passes(item: dict[str, Any], query: dict[str, str]) -> bool:
    after, before = query.get("creationTimeAfter"), query.get("creationTimeBefore")
    return (
        query.get("statusEquals") in (None, item["status"])
        and query.get("modelArnEquals") in (None, item["modelArn"])
        and query.get("nameContains", "") in item["provisionedModelName"]
        and (after is None or item["creationTime"] > datetime.fromisoformat(after))
        and (before is None or item["creationTime"] < datetime.fromisoformat(before))
    )


def install() -> None:
    """Put it in moto's place. Before the server starts."""
    for path, handler in urls.url_paths.items():
        if getattr(handler, "__self__", None) is BedrockResponse:
            urls.url_paths[path] = ProvisionedBedrockResponse.dispatch
