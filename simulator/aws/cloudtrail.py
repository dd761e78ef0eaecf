"""CloudTrail's LookupEvents, which moto lacks: what the simulator served, and what a rehearsal added."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from moto.cloudtrail import urls
from moto.cloudtrail.responses import CloudTrailResponse

from simulator.aws.errors import AwsError
from simulator.aws.trail import TrailEvent
from simulator.aws.world import ENVIRON_KEY, World

_MAX_RESULTS = 50
_ATTRIBUTES: dict[str, Callable[[TrailEvent], list[str]]] = {
    "EventId": lambda event: [event.event_id],
    "EventName": lambda event: [event.event_name],
    "ReadOnly": lambda event: [str(event.read_only).lower()],
    "Username": lambda event: [event.username],
    "ResourceType": lambda event: [resource.ResourceType for resource in event.resources],
    "ResourceName": lambda event: [resource.ResourceName for resource in event.resources],
    "EventSource": lambda event: [event.event_source],
    "AccessKeyId": lambda event: [event.access_key_id],
}


class LookupCloudTrailResponse(CloudTrailResponse):
    """moto's CloudTrail with its memory."""

    def lookup_events(self) -> str:
        """Newest first, in pages; by time and at most one attribute."""
        world: World = self.normalized_request.environ[ENVIRON_KEY]
        asked: dict[str, Any] = json.loads(self.body or "{}")
        attributes = asked.get("LookupAttributes", [])
        if len(attributes) > 1 or any(item["AttributeKey"] not in _ATTRIBUTES for item in attributes):
            raise AwsError("InvalidLookupAttributesException", f"One of {', '.join(_ATTRIBUTES)} may be given.")
        start, end = _time(asked.get("StartTime")), _time(asked.get("EndTime"))
        if start and end and start > end:
            raise AwsError("InvalidTimeRangeException", "The start time is after the end time.")
        limit = int(asked.get("MaxResults", _MAX_RESULTS))
        if not 1 <= limit <= _MAX_RESULTS:
            raise AwsError("InvalidMaxResultsException", f"MaxResults {limit} must be from 1 to {_MAX_RESULTS}.")
        found = [
            event
            for event in world.trail.events()
            if (start is None or event.event_time >= start)
            and (end is None or event.event_time <= end)
            and all(item["AttributeValue"] in _ATTRIBUTES[item["AttributeKey"]](event) for item in attributes)
        ]
        first = int(asked.get("NextToken", 0))
        answer: dict[str, Any] = {"Events": [_described(event, world) for event in found[first : first + limit]]}
        if first + limit < len(found):
            answer["NextToken"] = str(first + limit)
        return json.dumps(answer)


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _described(event: TrailEvent, world: World) -> dict[str, Any]:
    return {
        "EventId": event.event_id,
        "EventName": event.event_name,
        "ReadOnly": str(event.read_only).lower(),
        "AccessKeyId": event.access_key_id,
        "EventTime": event.event_time.timestamp(),
        "EventSource": event.event_source,
        "Username": event.username,
        "Resources": [resource.model_dump() for resource in event.resources],
        "CloudTrailEvent": world.trail.as_record(event),
    }


def install() -> None:
    """Put it in moto's place. Before the server starts."""
    for path in urls.url_paths:
        urls.url_paths[path] = LookupCloudTrailResponse.dispatch
