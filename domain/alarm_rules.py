"""Which incident an alarm belongs to: the policy's rules, the first that fits."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from pydantic import BaseModel, ConfigDict

from domain.alarm_messages import Ignored
from domain.alarms import AlarmChange, AlarmMetric
from domain.policy import AlarmRule, AlarmRunbook, Policy

_UNSAFE = re.compile(r"[^A-Za-z0-9._:-]+")
_MAX_NAME_CHARS = 100
_MODEL = "{model}"


class IncidentTarget(BaseModel):
    """The incident that an alarm starts or joins."""

    model_config = ConfigDict(frozen=True)

    key: str
    runbook: AlarmRunbook | None
    """None: a triage incident, for an alarm that no rule fits."""
    model: str | None
    """The policy's name of the model it is about; of a latency incident the alarm's, or else the one that answers most
    intents."""
    part_of: str | None = None
    """See `AlarmRule`."""


def target_of(
    change: AlarmChange, policy: Policy, models_by_arn: Mapping[str, str] | None = None
) -> IncidentTarget | Ignored:
    """The incident that `change` belongs to, in whatever state the alarm is.

    Args:
        change: the alarm.
        policy: its rules, models and ignored alarms.
        models_by_arn: base model ids by the ARN of their provisioned model; a rule whose `{model}` is an ARN that is
            not among them does not fit.
    """
    if any(fnmatchcase(change.alarm_name, pattern) for pattern in policy.intake.ignored_alarms):
        return Ignored("intake.ignored_alarms has its name")
    children = [child.rpartition(":alarm:")[2] for child in change.children]
    # A composite alarm that no rule knows belongs where the first of its children does.
    for names, metrics in (([change.alarm_name], change.metrics), (children, ())):
        for rule in policy.alarm_rules:
            key = _fit(rule, names, metrics, policy, models_by_arn or {})
            if key is not None:
                named = [key.rpartition(":")[2]]
                if rule.runbook == "latency":  # of the whole service: the key names no model, the alarm may
                    named = [value for metric in change.metrics for value in metric.dimensions.values()]
                    named.append(policy.main_model)
                model = next((name for name in named if name in policy.models), None)
                return IncidentTarget(key=key, runbook=rule.runbook, model=model, part_of=rule.part_of)
    return IncidentTarget(key=f"triage:{safe_name(change.alarm_name)}", runbook=None, model=None)


def safe_name(name: str) -> str:
    """`name` as a part of a workflow id: letters, digits and `._:-`; a short hash keeps changed names apart."""
    safe = _UNSAFE.sub("-", name)[:_MAX_NAME_CHARS].strip("-")
    if safe == name:
        return name
    return f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("-")


def model_named(value: str, policy: Policy, models_by_arn: Mapping[str, str] | None = None) -> str | None:
    """The policy's name of the model that a dimension's value means: a model id, its ARN, or the name itself."""
    if value in policy.models:
        return value
    model_id = (models_by_arn or {}).get(value, value).rpartition("/")[2]
    ids = ((name, {model.model_id, model.provisioned_model_id}) for name, model in policy.models.items())
    return next((name for name, known in ids if model_id in known), None)


def _fit(
    rule: AlarmRule,
    names: Sequence[str],
    metrics: Sequence[AlarmMetric],
    policy: Policy,
    models_by_arn: Mapping[str, str],
) -> str | None:
    """The key of the first thing that `rule` fits, or None."""
    if rule.alarm_name is not None and not any(fnmatchcase(name, rule.alarm_name) for name in names):
        return None
    if rule.metric is None and rule.dimension is None:
        return None if _MODEL in rule.key else rule.key
    for metric in metrics:
        if rule.metric not in (None, metric.name) or (rule.dimension and rule.dimension not in metric.dimensions):
            continue
        if _MODEL not in rule.key:
            return rule.key
        model = model_named(metric.dimensions.get(rule.dimension or "", ""), policy, models_by_arn)
        if model:
            return rule.key.replace(_MODEL, model)
    return None
