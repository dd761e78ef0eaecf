"""How CloudWatch decides an alarm's state: M of N, missing data, composite rules. Pure.

Sources: CloudWatch user guide, "Alarm evaluation", "Configuring how CloudWatch alarms treat missing data" and its
section "Avoiding premature transitions to alarm state"; API reference, PutCompositeAlarm.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from simulator.aws.errors import AwsError

OK, ALARM, INSUFFICIENT_DATA = "OK", "ALARM", "INSUFFICIENT_DATA"

EXTRA_PERIODS = 2
"""Periods that the evaluation range reaches back beyond the evaluation periods: 5 for N = 3 in AWS's tables."""
_MAX_CHILDREN = 100

COMPARISONS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "GreaterThanOrEqualToThreshold": (operator.ge, "greater than or equal to"),
    "GreaterThanThreshold": (operator.gt, "greater than"),
    "LessThanThreshold": (operator.lt, "less than"),
    "LessThanOrEqualToThreshold": (operator.le, "less than or equal to"),
}
TREATMENTS = ("missing", "ignore", "breaching", "notBreaching")


@dataclass(frozen=True)
class Slot:
    """One period of the evaluation range."""

    at: float
    """Its start, in epoch seconds."""
    value: float | None
    """None: missing."""
    sample_count: float | None = None


@dataclass(frozen=True)
class Rule:
    """What a metric alarm compares, and how."""

    comparison: str
    threshold: float
    evaluation_periods: int
    datapoints_to_alarm: int
    treat_missing: str = "missing"
    min_samples: float = 0
    """A percentile over fewer samples leaves the state as it is (EvaluateLowSampleCountPercentile)."""


@dataclass(frozen=True)
class Verdict:
    """The state that the data asks for, and the datapoints that decided."""

    state: str
    reason: str
    datapoints: tuple[Slot, ...]


def evaluate(rule: Rule, slots: Sequence[Slot]) -> Verdict | None:
    """None: the state stays. `slots` are the periods of the evaluation range, oldest first."""
    compare, _ = COMPARISONS[rule.comparison]
    real = [slot for slot in slots if slot.value is not None][-rule.evaluation_periods :]
    if any((slot.sample_count or 0) < rule.min_samples for slot in real):
        return None
    breaching = [slot for slot in real if slot.value is not None and compare(slot.value, rule.threshold)]
    filled = rule.evaluation_periods - len(real)
    if rule.treat_missing == "breaching":
        state = ALARM if len(breaching) + filled >= rule.datapoints_to_alarm else OK
    elif len(breaching) >= rule.datapoints_to_alarm:
        state = ALARM
    elif filled == 0 or rule.treat_missing == "notBreaching":
        state = OK
    elif rule.treat_missing == "ignore":
        if len(breaching) == len(real):
            return None
        state = OK
    elif not real:
        state = INSUFFICIENT_DATA
    else:
        # A premature alarm: everything there is breaches, and the oldest of it is as old as M periods.
        old = slots[-rule.datapoints_to_alarm :][0].at
        state = ALARM if len(breaching) == len(real) and real[0].at <= old else OK
    return Verdict(state, _reason(rule, state, real, breaching, filled), tuple(real))


def _reason(rule: Rule, state: str, real: Sequence[Slot], breaching: Sequence[Slot], filled: int) -> str:
    """AWS's sentence for the transition. It reads "OK -> ALARM" also when the state before was INSUFFICIENT_DATA."""
    if state == INSUFFICIENT_DATA:
        return f"Insufficient Data: {_counted(filled, 'datapoint')} {'was' if filled == 1 else 'were'} unknown."
    if not real:
        return (
            f"Threshold Crossed: no datapoints were received for {_counted(filled, 'period')} and "
            f"{_counted(filled, 'missing datapoint')} {'was' if filled == 1 else 'were'} treated as "
            f"[{'Breaching' if state == ALARM else 'NonBreaching'}]."
        )
    deciding = breaching if state == ALARM else [slot for slot in real if slot not in breaching]
    _, words = COMPARISONS[rule.comparison]
    listed = ", ".join(
        f"{slot.value} ({datetime.fromtimestamp(slot.at, UTC):%d/%m/%y %H:%M:%S})" for slot in reversed(deciding)
    )
    needed = rule.datapoints_to_alarm if state == ALARM else rule.evaluation_periods - rule.datapoints_to_alarm + 1
    was = "was" if len(deciding) == 1 else "were"
    change = "OK -> ALARM" if state == ALARM else "ALARM -> OK"
    return (
        f"Threshold Crossed: {len(deciding)} out of the last {rule.evaluation_periods} datapoints [{listed}] "
        f"{was}{'' if state == ALARM else ' not'} {words} the threshold ({rule.threshold}) "
        f"(minimum {_counted(needed, 'datapoint')} for {change} transition)."
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


_TOKEN = re.compile(
    r'\s*(?:(?P<state>ALARM|OK|INSUFFICIENT_DATA)\s*\(\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>[^\s()"]+))\s*\)'
    r"|(?P<word>AND|OR|NOT|TRUE|FALSE)\b|(?P<paren>[()]))"
)

Predicate = Callable[[Mapping[str, str]], bool]


class CompositeRule:
    """An AlarmRule: `ALARM("name or ARN")`, `OK(...)`, `INSUFFICIENT_DATA(...)`, TRUE, FALSE, NOT, AND, OR, ( )."""

    def __init__(self, text: str) -> None:
        self.children: set[str] = set()
        self._tokens = self._tokenize(text)
        self._holds = self._either()
        if self._tokens:
            raise _malformed(text)
        if len(self.children) > _MAX_CHILDREN:
            raise AwsError("ValidationError", f"AlarmRule names {len(self.children)} alarms; {_MAX_CHILDREN} may be.")

    def holds(self, states: Mapping[str, str]) -> bool:
        """Whether the rule is true, given the children's states by name."""
        return self._holds(states)

    def _tokenize(self, text: str) -> list[re.Match[str]]:
        tokens, at = [], 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise _malformed(text)
            tokens.append(match)
            at = match.end()
        tokens.reverse()
        return tokens

    def _next_is(self, group: str, value: str) -> bool:
        if self._tokens and self._tokens[-1][group] == value:
            self._tokens.pop()
            return True
        return False

    def _either(self) -> Predicate:
        left = self._both()
        while self._next_is("word", "OR"):
            left = _any_of(left, self._both())
        return left

    def _both(self) -> Predicate:
        left = self._single()
        while self._next_is("word", "AND"):
            left = _all_of(left, self._single())
        return left

    def _single(self) -> Predicate:
        if self._next_is("word", "NOT"):
            inner = self._single()
            return lambda states: not inner(states)
        if self._next_is("paren", "("):
            inner = self._either()
            if not self._next_is("paren", ")"):
                raise _malformed("missing )")
            return inner
        for word, truth in (("TRUE", True), ("FALSE", False)):
            if self._next_is("word", word):
                return _always(truth)
        if not self._tokens or self._tokens[-1]["state"] is None:
            raise _malformed("an alarm's state is missing")
        token = self._tokens.pop()
        state = token["state"]
        name = token["bare"] or re.sub(r"\\(.)", r"\1", token["quoted"])
        name = re.sub(r"^arn:[^:]*:cloudwatch:[^:]*:[^:]*:alarm:", "", name)
        self.children.add(name)
        return lambda states: states.get(name) == state


def _always(truth: bool) -> Predicate:
    return lambda _: truth


def _any_of(left: Predicate, right: Predicate) -> Predicate:
    return lambda states: left(states) or right(states)


def _all_of(left: Predicate, right: Predicate) -> Predicate:
    return lambda states: left(states) and right(states)


def _malformed(text: str) -> AwsError:
    return AwsError("ValidationError", f"AlarmRule is malformed: {text}")


def reason_data(rule: Rule, verdict: Verdict, *, statistic: str | None, period: int, now: datetime) -> dict[str, Any]:
    """`stateReasonData` as CloudWatch writes it, before it is made JSON."""
    data: dict[str, Any] = {"version": "1.0", "queryDate": aws_time(now)}
    if verdict.datapoints:
        data["startDate"] = aws_time(datetime.fromtimestamp(verdict.datapoints[0].at, UTC))
    if statistic is not None:
        data["statistic"] = statistic
    evaluated = [
        {"timestamp": aws_time(datetime.fromtimestamp(slot.at, UTC)), "value": slot.value}
        | ({} if slot.sample_count is None else {"sampleCount": slot.sample_count})
        for slot in reversed(verdict.datapoints)
    ]
    return data | {
        "period": period,
        "recentDatapoints": [slot.value for slot in verdict.datapoints],
        "threshold": rule.threshold,
        "evaluatedDatapoints": evaluated,
    }


def aws_time(at: datetime) -> str:
    """As alarm messages write it: milliseconds and `+0000`."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}+0000"
