"""Scenario 4: ECS scales, and Bedrock's provisioned throughput does not match. Two trees of causes, and the plan.

The six causes are diagnosed for our own plumbing (design check 18): the timetable is turned into units by the capacity
workflow, and Temporal Schedules watch over it; there is no Lambda and no EventBridge rule. Everything here is pure.
Sources: scenario 4 of the runbooks; design check 7, 12, 18 and 27.
"""

from datetime import datetime

from domain.errors import ErrorKind
from domain.evidence import Evidence, EvidenceKey
from domain.incident import Lever, LeverName, LeverStatus
from domain.load import LoadSnapshot
from domain.mitigation import MitigationPlan, routing_lever, ttl_lever
from domain.policy import Policy
from domain.trees import Diagnosis, Leaf, Question, diagnose

# ---------------------------------------------------------------- the trees

_RESULT = (
    EvidenceKey.CAPACITY_WORKFLOW,
    EvidenceKey.PROVISIONING_ERROR,
    EvidenceKey.UNITS_CREATING,
    EvidenceKey.UNITS_IN_SERVICE,
    EvidenceKey.UNITS_EXPECTED,
)
"""What tells whether the timetable was acted on: units, units on their way, or an error."""


def _fired(evidence: Evidence) -> bool:
    if evidence.value(EvidenceKey.CAPACITY_WORKFLOW) != "running":
        return False
    on_the_way = bool(evidence.number(EvidenceKey.UNITS_CREATING))
    return _at_level(evidence) or on_the_way or bool(evidence.value(EvidenceKey.PROVISIONING_ERROR))


def _at_level(evidence: Evidence) -> bool:
    expected = evidence.number(EvidenceKey.UNITS_EXPECTED) or 0
    return (evidence.number(EvidenceKey.UNITS_IN_SERVICE) or 0) >= expected


_ERRORS = {
    ErrorKind.ACCESS_DENIED: "permission denied",
    ErrorKind.NOT_FOUND: "resource not found",
    ErrorKind.UNAVAILABLE: "timeout",
    ErrorKind.THROTTLED: "throttled",
}


def _error_type(evidence: Evidence) -> str:
    kind = evidence.value(EvidenceKey.PROVISIONING_ERROR)
    return next((words for known, words in _ERRORS.items() if known == kind), "other")


TREE = Question(
    id="fired",
    text="Was the timetable's change acted on?",
    needs=(*_RESULT, EvidenceKey.SCHEDULES_OFF),
    answer=lambda evidence: "yes" if _fired(evidence) else "no",
    branches={
        "no": Leaf(
            "schedule-off",
            "Nothing acted on the timetable: the capacity workflow or a schedule that watches over it is paused or "
            "missing.",
        ),
        "yes": Question(
            id="succeeded",
            text="Did asking AWS succeed?",
            needs=(EvidenceKey.PROVISIONING_ERROR,),
            answer=lambda evidence: "no" if evidence.value(EvidenceKey.PROVISIONING_ERROR) else "yes",
            branches={
                "no": Question(
                    id="error-type",
                    text="What kind of error?",
                    needs=(EvidenceKey.PROVISIONING_ERROR, EvidenceKey.PROVISIONING_ERROR_TEXT),
                    answer=_error_type,
                    branches={
                        "permission denied": Leaf(
                            "access-denied", "Our role lacks a permission that provisioning needs."
                        ),
                        "resource not found": Leaf(
                            "stale-arn", "A model that we name is gone: its ARN or id changed, or somebody deleted it."
                        ),
                        "timeout": Leaf("timeout", "Bedrock's management API does not answer in time."),
                        "throttled": Leaf(
                            "management-throttled", "Bedrock limits how often its management API may be called."
                        ),
                        "other": Leaf("other-error", "AWS refuses for another reason; its own words tell which."),
                    },
                ),
                "yes": Question(
                    id="active",
                    text="Is the new capacity in service?",
                    needs=(EvidenceKey.UNITS_IN_SERVICE, EvidenceKey.UNITS_EXPECTED, EvidenceKey.UNITS_CREATING),
                    answer=lambda evidence: "yes" if _at_level(evidence) else "no",
                    branches={
                        "no": Leaf("still-creating", "Provisioning is still in progress: the lead time was too short."),
                        "yes": Leaf(
                            "not-provisioning",
                            "Not a provisioning issue: investigate why traffic exceeds what the hour expects.",
                        ),
                    },
                ),
            },
        ),
    },
)
"""Why the units that the timetable wants are not there."""


def _record_says(evidence: Evidence) -> str:
    if evidence.value(EvidenceKey.PROVISIONING_ERROR):
        return "an error"
    return "it asked AWS" if _fired(evidence) else "it did not run"


def _over_capacity(evidence: Evidence) -> str:
    load = evidence.number(EvidenceKey.TOKENS_PER_SECOND) or 0
    return "yes" if load > (evidence.number(EvidenceKey.PROVISIONED_TOKENS_PER_SECOND) or 0) else "no"


def mismatch_tree(policy: Policy) -> Question:
    """What to do about tasks that outgrow capacity; `policy` says how many calls are too many for one task."""
    most = policy.scaling_lag.most_calls_per_second_per_task

    def calls(evidence: Evidence) -> str:
        return "too many" if (evidence.number(EvidenceKey.CALLS_PER_SECOND_PER_TASK) or 0) > most else "normal"

    return Question(
        id="at-level",
        text="Is provisioned throughput at the expected level for this hour?",
        needs=(EvidenceKey.UNITS_IN_SERVICE, EvidenceKey.UNITS_EXPECTED),
        answer=lambda evidence: "yes" if _at_level(evidence) else "no, it is lower",
        branches={
            "no, it is lower": Question(
                id="record",
                text="What does the capacity workflow's record say?",
                needs=_RESULT,
                answer=_record_says,
                branches={
                    "an error": Leaf("mend-and-re-run", "Mend the error, then reconcile: nothing else is needed."),
                    "it did not run": Leaf(
                        "switch-on",
                        "Resume the capacity workflow or the schedule; a worker's start makes a missing one.",
                    ),
                    "it asked AWS": Leaf("wait-for-creation", "Bedrock is still creating: wait, the levers hold."),
                },
            ),
            "yes": Question(
                id="over-capacity",
                text="Does demand exceed provisioned capacity?",
                needs=(EvidenceKey.TOKENS_PER_SECOND, EvidenceKey.PROVISIONED_TOKENS_PER_SECOND),
                answer=_over_capacity,
                branches={
                    "yes": Leaf("increase-units", "Traffic is higher than planned: more units are needed."),
                    "no": Question(
                        id="calls-per-task",
                        text="How often does one task call Bedrock?",
                        needs=(EvidenceKey.CALLS_PER_SECOND_PER_TASK,),
                        answer=calls,
                        branches={
                            "too many": Leaf(
                                "rate-limit-per-task", "Tasks amplify bursts: limit how often one may call Bedrock."
                            ),
                            "normal": Leaf("ask-aws", "Bedrock throttles below what was bought: contact AWS Support."),
                        },
                    ),
                },
            ),
        },
    )


def diagnosed(evidence: Evidence, policy: Policy) -> Diagnosis:
    """Both trees: why the units are missing, then what to do about it. What is missing is told once."""
    why, remedy = diagnose(TREE, evidence), diagnose(mismatch_tree(policy), evidence)
    return Diagnosis(
        causes=[*why.causes, *remedy.causes],
        path=[*why.path, *remedy.path],
        missing=list(dict.fromkeys([*why.missing, *remedy.missing])),
    )


# ---------------------------------------------------------------- which of the two


def units_lag(in_service: int | None, expected: int, event_near: bool | None) -> tuple[bool, str]:
    """Whether throttling is scenario 4's, and why: units below what the timetable expects, and no event's window.

    What could not be read is None, and makes it scenario 1's.
    """
    if in_service is None or event_near is None:
        unread = "the units in service" if in_service is None else "the event calendar"
        return False, f"{unread} could not be read: handled as a throttle"
    if event_near:
        return False, "a calendar event is near: handled as a throttle, whatever the units"
    if in_service >= expected:
        return False, f"{in_service} units are in service, and the hour expects {expected}: demand is the trouble"
    return True, f"{in_service} units are in service, and the hour expects {expected}: capacity lags behind"


# ---------------------------------------------------------------- the plan


def plan(
    model: str, load: LoadSnapshot, policy: Policy, now: datetime, in_service: int, expected_units: int
) -> MitigationPlan:
    """Scenario 4's levers: the units that the hour expects, and free levers while they are on their way.

    Nothing is sized: the timetable has said what the hour needs, which is asked for within floor and ceiling.
    """
    spec, until = policy.models[model], now + policy.way_back.lever_max_hold
    ttl = policy.scaling_lag.cache_ttl_seconds
    routing, moved = routing_lever(model, load, policy, until)
    units = spec.clamped(expected_units)
    coalescing = Lever(
        name=LeverName.REQUEST_COALESCING,
        status=LeverStatus.APPLYING,
        before="off",
        after="on",
        why="identical requests in flight share one answer; it costs nothing. No data plane obeys it yet",
        hold_until=until,
    )
    capacity = Lever(
        name=LeverName.CAPACITY,
        status=LeverStatus.APPLYING,
        before=f"{in_service} units",
        after=f"{units} units",
        why="the timetable wants them at this hour; asking again re-runs what failed",
        hold_until=now + policy.way_back.capacity_max_hold,
    )
    return MitigationPlan(
        levers=[
            routing,
            coalescing,
            ttl_lever(ttl, "fewer calls reach Bedrock; it costs nothing", policy, until),
            capacity,
        ],
        routing=moved,
        cache_ttl_seconds=ttl,
        units=units,
        arithmetic=[f"The timetable expects {expected_units} units of {model} at this hour: {units} are asked for."],
    )
