"""CloudTrail's memory: the changing calls that the simulator served, and those a rehearsal adds."""

import json
import threading
import uuid
from collections import deque
from datetime import UTC, datetime
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

RESIDENT_KEY = "MANGAASSISTRESIDENT0"
"""Access key (moto knows one by its 20 capitals) of what lives in the account beside the product: faults spare it."""
RESIDENT_NAME = "AWSServiceRoleForApplicationAutoScaling_ECSService"
"""Its name in the trail: what it changes is the size of its service."""

_RECORDED_SERVICES = frozenset({"bedrock", "cloudwatch", "ecs", "iam", "service-quotas"})
_READS = ("Get", "List", "Describe", "Lookup", "Simulate")
_DATA_EVENTS = frozenset({"PutMetricData"})
"""Not management events: CloudTrail does not have them unless a trail asks for data events."""
_MAX_EVENTS = 10_000
_EVENT_SOURCES = {"cloudwatch": "monitoring.amazonaws.com", "service-quotas": "servicequotas.amazonaws.com"}


class TrailResource(BaseModel):
    """What a call was about."""

    ResourceType: str
    ResourceName: str


class TrailEvent(BaseModel):
    """One recorded call. Body of `POST /_simulator/trail`, where all but the name may be left out."""

    model_config = ConfigDict(extra="forbid")

    event_name: str
    event_source: str = "iam.amazonaws.com"
    event_time: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    event_id: str = Field(default_factory=lambda: str(uuid.uuid4()))
    username: str = "somebody-else"
    read_only: bool = False
    access_key_id: str = "AKIAEXAMPLE"
    resources: list[TrailResource] = []
    request_parameters: dict[str, Any] = {}
    error_code: str | None = None


class Trail:
    """The newest events, in order of arrival. Thread-safe."""

    def __init__(self, region: str, principal_arn: str) -> None:
        self._region = region
        self._principal_arn = principal_arn
        self._lock = threading.Lock()
        self._events: deque[TrailEvent] = deque(maxlen=_MAX_EVENTS)

    def add(self, event: TrailEvent) -> None:
        """Remember it."""
        with self._lock:
            self._events.append(event)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._events.clear()

    @staticmethod
    def records(service: str, operation: str) -> bool:
        """Whether a call changes something that CloudTrail would have as a management event."""
        return service in _RECORDED_SERVICES and not operation.startswith(_READS) and operation not in _DATA_EVENTS

    def record(
        self,
        service: str,
        operation: str,
        access_key_id: str,
        parameters: dict[str, Any],
        error_code: str | None,
    ) -> None:
        """Remember a call that the simulator served."""
        names = [
            str(value)
            for key, value in parameters.items()
            if isinstance(value, str) and key.lower().endswith(("name", "id", "arn", "service")) and "token" not in key
        ]
        self.add(
            TrailEvent(
                event_name=operation,
                event_source=_EVENT_SOURCES.get(service, f"{service}.amazonaws.com"),
                username=RESIDENT_NAME if access_key_id == RESIDENT_KEY else self._principal_arn.rsplit("/", 1)[-1],
                access_key_id=access_key_id,
                resources=[TrailResource(ResourceType=f"AWS::{service}", ResourceName=name) for name in names],
                request_parameters=parameters,
                error_code=error_code,
            )
        )

    def events(self) -> list[TrailEvent]:
        """Newest first."""
        with self._lock:
            return sorted(self._events, key=lambda event: event.event_time, reverse=True)

    def as_record(self, event: TrailEvent) -> str:
        """The event as CloudTrail's own JSON record."""
        return json.dumps(
            {
                "eventVersion": "1.08",
                "userIdentity": {"type": "AssumedRole", "arn": self._principal_arn, "userName": event.username},
                "eventTime": event.event_time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "eventSource": event.event_source,
                "eventName": event.event_name,
                "awsRegion": self._region,
                "requestParameters": event.request_parameters,
                "errorCode": event.error_code,
                "eventID": event.event_id,
                "readOnly": event.read_only,
                "eventType": "AwsApiCall",
            },
            default=str,
        )
