"""Reads what CloudWatch says about an alarm, in each of the shapes it arrives in.

Three shapes stand in a queue: the SNS envelope with CloudWatch's JSON as a string in `Message`, that JSON alone (raw
delivery), and the EventBridge event. A fourth, DescribeAlarms, is asked for. All become an AlarmChange.

What says which alarm is in which state since when is needed; everything else is taken when it looks right and left
out when it does not: an alarm with an odd trigger must still be seen. Sizes are cut to what CloudWatch itself allows.
Source: AWS's pages on alarm events and notifications, and notifications seen from 2017 to 2026.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic_core import PydanticSerializationError

from domain.alarms import AlarmChange, AlarmMetric, AlarmState

MAX_ALARM_NAME_CHARS = 255
_MAX_REASON_CHARS = 1023
_MAX_METRICS = 10
"""CloudWatch's limit of metrics in one metric-math alarm."""
_MAX_DIMENSIONS = 30
_MAX_DIMENSION_CHARS = 1024
_MAX_CHILDREN = 100
_MAX_ARN_CHARS = 1600

_STATE_CHANGE = "CloudWatch Alarm State Change"
_QUOTED = re.compile(r"""("[^"]*"|'[^']*')""")
_IDENTIFIER = re.compile(r"\b[a-z]\w*")
_ALL_METRICS = re.compile(r"\bMETRICS\(")
_RULE_CHILD = re.compile(r"""\b(?:ALARM|OK|INSUFFICIENT_DATA)\s*\(\s*("[^"]*"|'[^']*'|[^\s"'()]+)\s*\)""")


class NotAnAlarm(ValueError):
    """The text is no alarm message; the message of the error says why, in one short line."""


@dataclass(frozen=True)
class Ignored:
    """A message or alarm that is understood and starts nothing."""

    reason: str


def parse_alarm(body: str) -> AlarmChange | Ignored:
    """What the body of one SQS message says.

    Raises:
        NotAnAlarm: it is neither an alarm nor anything else that CloudWatch or SNS sends.
    """
    message = _json_object(body, "body")
    if isinstance(message.get("detail-type"), str):
        return _eventbridge(message)
    kind = message.get("Type")
    if kind == "Notification":
        inner = _json_object(_text(message, "Message"), "Message")
        if isinstance(inner.get("detail-type"), str):  # an EventBridge rule whose target is the topic
            return _eventbridge(inner)
        return _sns(inner, str(message.get("MessageId") or ""), message.get("Timestamp"))
    if kind in ("SubscriptionConfirmation", "UnsubscribeConfirmation"):
        return Ignored(f"SNS {kind}")
    return _sns(message, "", None)


def described_alarm(alarm: Mapping[str, Any]) -> AlarmChange:
    """One entry of DescribeAlarms' MetricAlarms or CompositeAlarms, as boto3 gives it.

    Raises:
        NotAnAlarm: a field that AWS always sends is missing.
    """
    name = _text(alarm, "AlarmName")
    at = alarm.get("StateTransitionedTimestamp") or alarm.get("StateUpdatedTimestamp")
    if not isinstance(at, datetime):
        raise NotAnAlarm("StateTransitionedTimestamp and StateUpdatedTimestamp are missing")
    suppressed = alarm.get("ActionsEnabled") is False or bool(alarm.get("ActionsSuppressedBy"))
    return _change(
        alarm_name=name,
        alarm_arn=alarm.get("AlarmArn"),
        state=_state(alarm, "StateValue"),
        reason=alarm.get("StateReason"),
        changed_at=at,
        metrics=_trigger_metrics(alarm),
        children=_rule_children(alarm.get("AlarmRule")),
        source="reconcile",
        message_id=f"{name}@{at.isoformat()}",
        suppressed=suppressed,
    )


def _sns(message: Mapping[str, Any], message_id: str, sent_at: object) -> AlarmChange | Ignored:
    if "AlarmName" not in message:
        raise NotAnAlarm(f"no AlarmName; there is {_names(message)}")
    name = _text(message, "AlarmName")
    stated_at = message.get("StateChangeTime", sent_at)
    at = _time(stated_at, "StateChangeTime")
    return _change(
        alarm_name=name,
        alarm_arn=message.get("AlarmArn"),
        state=_state(message, "NewStateValue"),
        previous_state=_known_state(message.get("OldStateValue")),
        reason=message.get("NewStateReason"),
        changed_at=at,
        metrics=_trigger_metrics(_object(message.get("Trigger"))),
        children=_children(message.get("TriggeringChildren"), "Arn") or _rule_children(message.get("AlarmRule")),
        source="sns",
        message_id=message_id or f"{name}@{at.isoformat()}",
    )


def _eventbridge(event: Mapping[str, Any]) -> AlarmChange | Ignored:
    kind = event["detail-type"]
    if kind != _STATE_CHANGE:
        # "CloudWatch Alarm Contributor State Change" (the parent's own event follows) and "CloudWatch Alarm
        # Configuration Change" (nothing changed its state) carry a state too, and must not start anything.
        if str(event.get("source")).startswith("aws."):
            return Ignored(f"EventBridge event {kind[:100]!r} is no change of an alarm's state")
        raise NotAnAlarm(f"detail-type is {kind[:100]!r}, not {_STATE_CHANGE!r}")
    detail = _object(event.get("detail"))
    name = _text(detail, "alarmName")
    state = _object(detail.get("state"))
    configuration = _object(detail.get("configuration"))
    at = _time(state.get("timestamp", event.get("time")), "state.timestamp")
    resources = event.get("resources")
    return _change(
        alarm_name=name,
        alarm_arn=resources[0] if isinstance(resources, list) and resources else None,
        state=_state(state, "value"),
        previous_state=_known_state(_object(detail.get("previousState")).get("value")),
        reason=state.get("reason"),
        changed_at=at,
        metrics=_metrics(configuration.get("metrics")),
        children=_triggering_alarms(state.get("reasonData")) or _rule_children(configuration.get("alarmRule")),
        source="eventbridge",
        message_id=str(event.get("id") or f"{name}@{at.isoformat()}"),
        suppressed=bool(detail.get("muteDetail")) or bool(state.get("actionsSuppressedBy")),
    )


def _change(*, alarm_name: str, alarm_arn: object, reason: object, message_id: str, **known: Any) -> AlarmChange:
    if not alarm_name.strip() or len(alarm_name) > MAX_ALARM_NAME_CHARS:
        raise NotAnAlarm(f"the alarm's name has {len(alarm_name)} characters; 1 to {MAX_ALARM_NAME_CHARS} are allowed")
    change = AlarmChange(
        alarm_name=alarm_name,
        alarm_arn=alarm_arn[:_MAX_ARN_CHARS] if isinstance(alarm_arn, str) else None,
        reason=reason[:_MAX_REASON_CHARS] if isinstance(reason, str) else "",
        message_id=message_id[:_MAX_ARN_CHARS],
        **known,
    )
    try:
        change.model_dump_json()
    except PydanticSerializationError:
        raise NotAnAlarm("a text holds half a surrogate pair, which no UTF-8 can carry") from None
    return change


# ---------------------------------------------------------------- metrics


def _trigger_metrics(trigger: Mapping[str, Any]) -> tuple[AlarmMetric, ...]:
    """The metrics of SNS's `Trigger` or of a described alarm: one by name, or metric math."""
    own = _metric(trigger.get("MetricName"), trigger.get("Namespace"), trigger.get("Dimensions"))
    return (own,) if own else _metrics(trigger.get("Metrics"))


def _metrics(entries: object) -> tuple[AlarmMetric, ...]:
    """The metrics that the returning entries are about, found through their expressions, in order of appearance."""
    by_id: dict[str, Mapping[str, Any]] = {}
    for index, entry in enumerate(_objects(entries)):
        lower = {str(key).lower(): value for key, value in entry.items()}
        by_id.setdefault(str(lower.get("id") or f"#{index}"), lower)
    returning = [name for name, entry in by_id.items() if _is_true(entry.get("returndata", True))]
    found: list[AlarmMetric] = []
    seen: set[str] = set()
    waiting = list(reversed(returning or list(by_id)))
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        entry = by_id[name]
        metric = _stat_metric(_object(entry.get("metricstat")))
        if metric and metric not in found:
            found.append(metric)
        if metric is None and isinstance(entry.get("expression"), str):
            waiting.extend(reversed(list(_used(entry["expression"], by_id))))
    return tuple(found[:_MAX_METRICS])


def _used(expression: str, by_id: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Ids of the entries that an expression uses; `METRICS()` uses every metric."""
    bare = _QUOTED.sub("", expression)
    if _ALL_METRICS.search(bare):
        yield from (name for name, entry in by_id.items() if _object(entry.get("metricstat")))
    yield from (name for name in _IDENTIFIER.findall(bare) if name in by_id)


def _stat_metric(stat: Mapping[str, Any]) -> AlarmMetric | None:
    lower = {str(key).lower(): value for key, value in stat.items()}
    metric = {str(key).lower(): value for key, value in _object(lower.get("metric")).items()}
    return _metric(
        metric.get("metricname") or metric.get("name"),  # SNS and DescribeAlarms, EventBridge
        metric.get("namespace"),
        metric.get("dimensions"),
    )


def _metric(name: object, namespace: object, dimensions: object) -> AlarmMetric | None:
    if not isinstance(name, str) or not name:
        return None
    return AlarmMetric(
        namespace=namespace[:MAX_ALARM_NAME_CHARS] if isinstance(namespace, str) else "",
        name=name[:MAX_ALARM_NAME_CHARS],
        dimensions=dict(list(_dimensions(dimensions))[:_MAX_DIMENSIONS]),
    )


def _dimensions(dimensions: object) -> Iterator[tuple[str, str]]:
    """From `{name: value}` (EventBridge) or a list of name and value, in lower case (SNS) or not (DescribeAlarms)."""
    pairs: Iterable[tuple[object, object]]
    if isinstance(dimensions, Mapping):
        pairs = dimensions.items()
    else:
        entries = _objects(dimensions)
        pairs = ((e.get("name", e.get("Name")), e.get("value", e.get("Value"))) for e in entries)
    for name, value in pairs:
        if isinstance(name, str) and isinstance(value, str):
            yield name[:_MAX_DIMENSION_CHARS], value[:_MAX_DIMENSION_CHARS]


# ---------------------------------------------------------------- composite alarms


def _triggering_alarms(reason_data: object) -> tuple[str, ...]:
    """ARNs in an event's `reasonData`, a JSON string that may be absent."""
    if not isinstance(reason_data, str):
        return ()
    try:
        return _children(_json_object(reason_data, "reasonData").get("triggeringAlarms"), "arn")
    except NotAnAlarm:
        return ()


def _children(entries: object, key: str) -> tuple[str, ...]:
    arns = (entry.get(key) for entry in _objects(entries))
    return tuple(arn[:_MAX_ARN_CHARS] for arn in arns if isinstance(arn, str))[:_MAX_CHILDREN]


def _rule_children(rule: object) -> tuple[str, ...]:
    """Names or ARNs of the alarms that a composite alarm's rule mentions."""
    if not isinstance(rule, str):
        return ()
    names = (name.strip("\"'")[:_MAX_ARN_CHARS] for name in _RULE_CHILD.findall(rule))
    return tuple(dict.fromkeys(name for name in names if name))[:_MAX_CHILDREN]


# ---------------------------------------------------------------- pieces


def _json_object(text: str, what: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:120]
        raise NotAnAlarm(f"{what} is not JSON: {why}") from None
    if not isinstance(value, dict):
        raise NotAnAlarm(f"{what} is a JSON {type(value).__name__}, not an object")
    return value


def _text(message: Mapping[str, Any], name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str):
        raise NotAnAlarm(f"{name} is {'missing' if value is None else f'a {type(value).__name__}'}, not a text")
    return value


def _state(message: Mapping[str, Any], name: str) -> AlarmState:
    state = _known_state(_text(message, name))
    if state is None:
        raise NotAnAlarm(f"{name} is {message[name][:40]!r}; allowed are {', '.join(AlarmState)}")
    return state


def _known_state(value: object) -> AlarmState | None:
    return AlarmState(value) if isinstance(value, str) and value in list(AlarmState) else None


def _time(value: object, name: str) -> datetime:
    """ISO 8601 as CloudWatch writes it, `+0000` or `Z`; without a zone it is UTC."""
    if not isinstance(value, str):
        raise NotAnAlarm(f"{name} is {'missing' if value is None else f'a {type(value).__name__}'}, not a time")
    try:
        at = datetime.fromisoformat(value)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise NotAnAlarm(f"{name} is {value[:40]!r}, not a time in ISO 8601") from None


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _is_true(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.strip().lower() == "true")


def _names(message: Mapping[str, Any]) -> str:
    return ", ".join(sorted(name[:30] for name in message)[:8]) or "nothing"
