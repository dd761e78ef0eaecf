"""The alarms as data: AWS's own model of PutMetricAlarm takes them, and they lead where they should."""

from datetime import UTC, datetime

import botocore.session
import pytest
from botocore.validate import ParamValidator

from domain.alarm_definitions import PARAMETERS, AlarmDefinition, alarm_definitions, put_metric_alarm, template
from domain.alarm_messages import Ignored
from domain.alarm_rules import IncidentTarget, target_of
from domain.alarms import AlarmChange, AlarmMetric, AlarmState
from domain.metrics import CATALOGUE
from domain.policy import Policy

POLICY = Policy()
TOPIC = "arn:aws:sns:ap-northeast-1:123456789012:alarms"
DEFINITIONS = {definition.name: definition for definition in alarm_definitions(POLICY)}


@pytest.mark.parametrize("definition", DEFINITIONS.values(), ids=DEFINITIONS)
def test_cloudwatch_takes_it(definition: AlarmDefinition) -> None:
    given = put_metric_alarm(definition, TOPIC)
    shape = botocore.session.get_session().get_service_model("cloudwatch").operation_model("PutMetricAlarm").input_shape
    assert shape is not None
    report = ParamValidator().validate(given, shape)
    assert not report.has_errors(), report.generate_report()
    # Not in the model, but in the API reference.
    assert given["Period"] in (10, 30) or given["Period"] % 60 == 0
    assert given["Period"] * given["EvaluationPeriods"] <= 86_400


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("BedrockThrottleAlarm-sonnet", "bedrock-throttle:sonnet"),
        ("RunbooksProvisioningFailed-haiku", "capacity-health:haiku"),
        ("RunbooksHeartbeatMissing", None),
    ],
)
def test_the_intake_knows_whose_it_is(name: str, target: str | None) -> None:
    definition = DEFINITIONS[name]
    metric = CATALOGUE[definition.metric]
    change = AlarmChange(
        alarm_name=name,
        state=AlarmState.ALARM,
        changed_at=datetime.now(UTC),
        metrics=(
            AlarmMetric(
                namespace=metric.namespace,
                name=metric.name,
                dimensions=dict(zip(metric.dimensions, definition.dimensions, strict=True)),
            ),
        ),
        source="sns",
        message_id="1",
    )
    found = target_of(change, POLICY)
    assert isinstance(found, Ignored) if target is None else isinstance(found, IncidentTarget) and found.key == target


def test_the_template_has_every_alarm_once() -> None:
    resources = template(POLICY)["Resources"]
    assert {item["Properties"]["AlarmName"] for item in resources.values()} == DEFINITIONS.keys()
    assert all(name.isalnum() for name in resources)
    heartbeat = resources["RunbooksHeartbeatMissing"]["Properties"]
    assert heartbeat["AlarmActions"] == [{"Ref": PARAMETERS["on-call"]}]
    assert heartbeat["TreatMissingData"] == "breaching"
