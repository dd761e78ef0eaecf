"""Scenario 3: answers are slow although Bedrock is not. The tree of causes, the plan, and the latency budget.

Only the batch window is ours to change, so only its leaf has a lever; what else is found is told to people, with what
to do. Everything here is pure. Sources: scenario 3 of the runbooks; design check 9, 20 and 28.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime

from domain.evidence import Evidence, EvidenceKey
from domain.incident import BudgetRow, Lever, LeverName, LeverStatus, RecoveryCheck, span
from domain.load import LoadSnapshot
from domain.mitigation import Guard, MitigationPlan, measured
from domain.policy import Policy
from domain.trees import Diagnosis, Leaf, Question, diagnose

WINDOW_INCREASED = "window-increased"

# ---------------------------------------------------------------- the tree


def tree(policy: Policy) -> Question:
    """The runbook's tree, with its six leaves and one for what none of them explains; `policy` says what is high."""
    systems, backlog = policy.latency.systems, policy.recovery.max_queue_depth
    return _is_high(
        "queue-wait",
        "Check the queue wait: how long do requests wait for a batch?",
        {EvidenceKey.QUEUE_WAIT_MS: policy.longest_usual_wait_ms},
        high=Question(
            id="window",
            text="Was the batch window recently increased?",
            needs=(EvidenceKey.WINDOW_MS, EvidenceKey.WINDOW_BEFORE_MS),
            answer=lambda evidence: "yes" if _grew(evidence) else "no",
            branches={
                "yes": Leaf(
                    WINDOW_INCREASED,
                    "The batch window was increased: requests wait longer for mates than the latency budget allows.",
                ),
                "no": _is_high(
                    "queue-depth",
                    "Check the queue depth: are requests waiting for Bedrock?",
                    {EvidenceKey.QUEUE_DEPTH: backlog},
                    high=Leaf(
                        "batching-backlog",
                        "Batching backlog: more requests arrive than batches can be sent. See whether Bedrock "
                        "throttles or is slow, then raise the batcher's slots or the units, or let it shed.",
                    ),
                    normal=Leaf(
                        "other-stages",
                        "Requests wait although neither the window grew nor a queue: investigate the other stages "
                        "(Redis, OpenSearch, DynamoDB) and the batcher's own host.",
                    ),
                ),
            },
        ),
        normal=_is_high(
            "redis-latency",
            "Check Redis: read latency and connections?",
            {
                EvidenceKey.REDIS_READ_US: systems.redis.high,
                EvidenceKey.REDIS_CONNECTIONS: systems.redis_connections.high,
            },
            high=Leaf(
                "redis",
                "Redis is slow: a hot key, or the connection pool is exhausted. Look for the key (`--hotkeys`, the "
                "slow log) and at who holds the connections.",
            ),
            normal=_is_high(
                "opensearch-latency",
                "Check OpenSearch: search latency?",
                {EvidenceKey.OPENSEARCH_MS: systems.opensearch.high},
                high=Leaf(
                    "opensearch",
                    "OpenSearch's queries are slow: look at its slow log, JVM memory pressure and shards.",
                ),
                normal=_is_high(
                    "dynamodb-api-gateway-latency",
                    "Check DynamoDB and API Gateway: latency?",
                    {
                        EvidenceKey.DYNAMODB_MS: systems.dynamodb.high,
                        EvidenceKey.INTEGRATION_MS: systems.api_gateway.high,
                    },
                    high=Leaf(
                        "dynamodb-api-gateway",
                        "DynamoDB or API Gateway is slow: see which by its check; look for throttled or hot "
                        "partitions, and at the integration.",
                    ),
                    normal=Leaf(
                        "elsewhere",
                        "No system is slow by its own metric: the budget table says which stage is over, Bedrock "
                        "included.",
                    ),
                ),
            ),
        ),
    )


def _is_high(
    id: str, text: str, most: Mapping[EvidenceKey, float], *, high: Question | Leaf, normal: Question | Leaf
) -> Question:
    """Whether any of the readings is over its limit."""
    limits = dict(most)

    def answer(evidence: Evidence) -> str:
        return "high" if any((evidence.number(key) or 0) > limit for key, limit in limits.items()) else "normal"

    return Question(id=id, text=text, needs=tuple(limits), answer=answer, branches={"high": high, "normal": normal})


def _grew(evidence: Evidence) -> bool:
    return (evidence.number(EvidenceKey.WINDOW_MS) or 0) > (evidence.number(EvidenceKey.WINDOW_BEFORE_MS) or 0)


def diagnosed(evidence: Evidence, policy: Policy) -> Diagnosis:
    """The tree over what is known."""
    return diagnose(tree(policy), evidence)


# ---------------------------------------------------------------- was the window changed


def window_before(
    series: Mapping[datetime, float], now_ms: float, since: datetime, until: datetime, known_good_ms: float
) -> tuple[float, datetime | None, bool] | None:
    """What the window was before it last grew, when it did, and whether that is measured; None: no data.

    Args:
        series: the window as published.
        now_ms: the window now, published or not yet.
        since: the begin of the time that was looked at; ...
        until: ... its end.
        known_good_ms: see below.

    A batcher that has published for less than half of the time tells no older value: the known-good one stands for it.
    """
    if not series:
        return None
    first = min(series)
    smaller = [at for at, window_ms in series.items() if window_ms < now_ms]
    if smaller:
        return series[max(smaller)], min((at for at in series if at > max(smaller)), default=None), True
    if first - since <= (until - since) / 2 or known_good_ms >= now_ms:
        return now_ms, None, True
    return known_good_ms, first, False


# ---------------------------------------------------------------- the plan


def plan(evidence: Evidence, policy: Policy, now: datetime) -> MitigationPlan:
    """Back to the known-good window by a lease, where the window is the cause, or where it may be and nothing better
    is known: it costs only calls. No other leaf has a lever, and capacity is never touched."""
    latency = policy.latency
    good, window = latency.revert_window_ms, evidence.number(EvidenceKey.WINDOW_MS)
    found = diagnosed(evidence, policy)
    causes = [cause.id for cause in found.causes]
    longer = window is None or window > good
    wait = evidence.readings.get(EvidenceKey.QUEUE_WAIT_MS)
    wanted = False
    if not longer:
        why = f"the window is {window:g} ms already"
    elif causes:
        wanted = causes == [WINDOW_INCREASED]
        why = (
            "the window was increased; less waiting for mates costs only more calls"
            if wanted
            else f"the window is not the cause ({', '.join(causes)})"
        )
    elif found.path[0].answer == "normal":
        why = "requests wait for a batch no longer than usual: the window is not the cause"
    elif wait is not None and wait.value is None:
        why = "no batcher says how long requests wait for a batch"
    else:
        wanted = True
        why = (
            f"what is missing might say that the window is the cause ({'; '.join(found.missing)}); it costs only calls"
        )
    lever = Lever(
        name=LeverName.BATCH_WINDOW,
        status=LeverStatus.APPLYING if wanted else LeverStatus.NOT_NEEDED,
        before="unknown" if window is None else f"{window:g} ms",
        after=f"{good} ms",
        why=why,
        hold_until=now + policy.way_back.lever_max_hold if wanted else None,
    )
    return MitigationPlan(levers=[lever], batch_window_ms=good, arithmetic=_arithmetic(evidence, policy))


def _arithmetic(evidence: Evidence, policy: Policy) -> list[str]:
    latency, wait = policy.latency, evidence.number(EvidenceKey.QUEUE_WAIT_MS)
    lines = [
        f"{latency.revert_window_ms} ms is the window that is known to be good; P99 stays under "
        f"{latency.max_p99_ms:,.0f} ms with it."
    ]
    if wait is not None:
        lines.append(
            f"Queue wait P99 {wait:,.0f} ms; its budget is {latency.queue_wait_p99_ms:g} ms, high is over "
            f"{policy.longest_usual_wait_ms:g} ms."
        )
    if policy.batcher.controller != "fixed":
        lines.append(
            f"The batcher chooses its window itself (controller {policy.batcher.controller}): the knob is only an "
            "upper limit, so the lever shortens a wait only where the batcher had chosen a longer one."
        )
    return lines


# ---------------------------------------------------------------- recovery


def recovery_checks(
    model: str, load: LoadSnapshot, p99_ms: float, queue_wait_ms: float, before: Iterable[RecoveryCheck]
) -> list[RecoveryCheck]:
    """P99 in its budget, and the wait in the batcher, where one says it, no longer than usual. No P99 is never met."""
    wait = load.model(model).queue_wait_ms
    rows = [("P99 latency", load.p99_ms, p99_ms, "ms", load.p99_ms is not None and load.p99_ms < p99_ms)]
    if wait is not None:
        rows.append(("queue wait", wait, queue_wait_ms, "ms", wait <= queue_wait_ms))
    return measured(rows, load, before)


# ---------------------------------------------------------------- the way back


def guard(held_ms: float, without_ms: float, load: LoadSnapshot, policy: Policy) -> Guard:
    """Whether the window may go back to what it is without the lever: only where P99 stays in its budget.

    Each request may wait that much longer. A controller that chooses the window itself answers for its own SLO.
    """
    longer, budget = max(0.0, without_ms - held_ms), policy.latency.max_p99_ms
    back = f"without the lever the window is {without_ms:g} ms"
    if not longer:
        return Guard(may=True, why=f"{back}, no longer than with it")
    if policy.batcher.controller == "slo":
        return Guard(may=True, why=f"{back}, an upper limit: the slo controller keeps P99 by itself")
    if load.p99_ms is None:
        return Guard(may=False, why=f"{back}, and P99 could not be read")
    expected = load.p99_ms + longer
    may = expected < budget
    return Guard(
        may=may,
        why=f"{back}: P99 {load.p99_ms:,.0f} + {longer:g} ms = {expected:,.0f} ms; the limit is {budget:,.0f} ms: "
        f"it {'may be released' if may else 'must stay'}",
    )


def keep_proposal(key: str, lever: Lever, policy: Policy) -> str:
    """The default (design check 20): where the configured window is the fault, going back restores it."""
    return (
        f"Default: keep. Without the lever the window goes back from {lever.after} to {lever.before}, which was the "
        f"fault. `runbooks incident keep {key} {lever.name} --why …` makes {lever.after} your standing override, "
        f"reviewed after {span(policy.overrides.review_after)}; it ends by itself once the policy's {lever.name} is "
        f"{lever.after} or less, which the batcher reads at its start. Held by somebody's override instead: ask them "
        f"to release it, then `runbooks incident approve {key} --why …`, guarded and watched."
    )


# ---------------------------------------------------------------- the latency budget

QUEUE_WAIT, INVOCATION, TOTAL = "queue wait", "Bedrock invocation", "total"


def budget(measured_ms: Mapping[str, float | None], model: str, policy: Policy) -> list[BudgetRow]:
    """The runbook's table: each stage's P99 against its budget, in the order of an answer's way, and the total."""
    latency = policy.latency
    rows: list[tuple[str, float | None]] = [(stage.name, stage.p99_ms) for stage in latency.stages]
    rows[2:2] = [(QUEUE_WAIT, latency.queue_wait_p99_ms)]
    rows[-1:-1] = [(INVOCATION, latency.invocation_p99_ms.get(model))]
    rows.append((TOTAL, latency.max_p99_ms))
    return [BudgetRow(stage=name, budget_ms=limit, measured_ms=measured_ms.get(name)) for name, limit in rows]
