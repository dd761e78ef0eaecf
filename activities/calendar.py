"""The event calendar in DynamoDB: read as it is, asked for an incident's event, and written when rows are learnt."""

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from temporalio import activity

from activities.cloudwatch import evidence_of
from domain.calendar import EVENT_TABLE_KEY, CalendarEvent, events_of
from domain.calendar_sync import CalendarTable
from domain.evidence import Check, EvidenceKey, Value
from domain.messages import CheckCalendar
from domain.pre_provisioning import MarkEvent

if TYPE_CHECKING:
    from types_boto3_dynamodb.client import DynamoDBClient
    from types_boto3_dynamodb.type_defs import AttributeValueTypeDef


class CalendarActivities:
    """One DynamoDB table; small, and read by Scan."""

    def __init__(self, dynamodb: "DynamoDBClient", *, table: str) -> None:
        self._dynamodb = dynamodb
        self._table = table

    @activity.defn
    def check_calendar(self, request: CheckCalendar) -> list[Check]:
        """First-response check 5: is there an event that should have been pre-provisioned for?

        Of several events the one with the largest multiplier counts. No event is an answer, not missing evidence; a
        row that cannot be read makes the answer missing if no other event fits, for it might be the one.
        """
        started = time.perf_counter()
        now = datetime.now(UTC)
        events, broken = self._events()
        fitting = [
            event
            for event in events
            if request.model in event.models
            and event.counts
            and event.starts_at - request.match_before <= request.at <= event.starts_at + request.match_after
        ]
        event = max(fitting, key=lambda candidate: candidate.multiplier, default=None)
        values: dict[EvidenceKey, Value | None]
        if event is None:
            finding = "no event in the calendar" + (f"; {'; '.join(broken.values())}" if broken else "")
            values = {EvidenceKey.EVENT_CONFIGURED: None if broken else False}
        else:
            units = event.units.get(request.model, 0)
            triggered, completed = event.provisioning_triggered_at, event.provisioning_completed_at
            finding = (
                f"{event.event_id} ({event.type}, {event.multiplier:g}x) starts {event.starts_at.isoformat()}; "
                f"provisioning triggered {triggered.isoformat() if triggered else 'never'}, "
                f"completed {completed.isoformat() if completed else 'never'}, {units} units of {request.model}"
            )
            values = {
                EvidenceKey.EVENT_CONFIGURED: True,
                EvidenceKey.EVENT_ID: event.event_id,
                EvidenceKey.EVENT_STARTS_AT: event.starts_at.isoformat(),
                EvidenceKey.EVENT_MULTIPLIER: event.multiplier,
                EvidenceKey.EVENT_TRIGGERED_AT: triggered.isoformat() if triggered else "",
                EvidenceKey.EVENT_COMPLETED_AT: completed.isoformat() if completed else "",
                EvidenceKey.EVENT_UNITS: units,
                EvidenceKey.EVENT_CAPACITY_TOKENS_PER_SECOND: units * request.tokens_per_second_per_unit,
                EvidenceKey.EVENT_LEAD_SECONDS: event.lead_time.total_seconds(),
            }
        return [
            Check(
                name="Event calendar",
                finding=finding,
                breaching=None if broken and event is None else event is not None,
                evidence=evidence_of(values, f"dynamodb Scan {self._table}", now, "; ".join(broken.values())),
                observed_at=now,
                duration_ms=(time.perf_counter() - started) * 1000,
            )
        ]

    @activity.defn
    def put_event(self, event: CalendarEvent) -> None:
        """Write the event; writing it again writes the same row."""
        self._dynamodb.put_item(TableName=self._table, Item=event.to_item())

    @activity.defn
    def propose_event(self, event: CalendarEvent) -> bool:
        """Write a proposal; False, and nothing changed, where a row of its id stands, whatever became of it."""
        try:
            self._dynamodb.put_item(
                TableName=self._table,
                Item=event.to_item(),
                ConditionExpression=f"attribute_not_exists({EVENT_TABLE_KEY})",
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return False
        return True

    # ------------------------------------------------------------------ pre-provisioning

    @activity.defn
    def read_calendar(self, _: None = None) -> CalendarTable:
        """Every row, as it is at this moment: what is missing is gone."""
        events, broken = self._events(consistent=True)
        return CalendarTable(events=events, broken=broken)

    @activity.defn
    def mark_event(self, request: MarkEvent) -> bool:
        """Write what pre-provisioning did into the row; False: it is gone, or starts at another time by now."""
        key: dict[str, AttributeValueTypeDef] = {EVENT_TABLE_KEY: {"S": request.event_id}}
        item = self._dynamodb.get_item(TableName=self._table, Key=key, ConsistentRead=True).get("Item")
        if item is None or CalendarEvent.from_item(item).starts_at != request.starts_at:
            return False
        values: dict[str, AttributeValueTypeDef] = {
            ":as_read": item["starts_at"],
            ":units": {"M": {model: {"N": str(units)} for model, units in request.units.items()}},
            ":triggered": {"S": request.triggered_at.isoformat()},
        }
        change = "SET #units = :units, provisioning_triggered_at = :triggered"
        if request.completed_at is None:
            change += " REMOVE provisioning_completed_at"
        else:
            change += ", provisioning_completed_at = :completed"
            values[":completed"] = {"S": request.completed_at.isoformat()}
        try:
            self._dynamodb.update_item(
                TableName=self._table,
                Key=key,
                UpdateExpression=change,
                ConditionExpression="starts_at = :as_read",
                ExpressionAttributeNames={"#units": "units"},
                ExpressionAttributeValues=values,
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return False
        return True

    def _events(self, *, consistent: bool = False) -> tuple[list[CalendarEvent], dict[str, str]]:
        pages = self._dynamodb.get_paginator("scan").paginate(TableName=self._table, ConsistentRead=consistent)
        return events_of(item for page in pages for item in page["Items"])
