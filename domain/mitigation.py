"""What every mitigation shares: the plan's shape and sums, the recovery checks and the guard of the way back.

Everything here is pure. Sources: scenarios 1, 3 and 4 of the runbooks; design check 2, 3, 19, 21 and 27.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta

from pydantic import BaseModel

from domain.clock import RehearsalClock
from domain.incident import Lever, LeverName, LeverStatus, Recovery, RecoveryCheck
from domain.load import LoadSnapshot, load_on, remaining_tokens_per_second, total_offered
from domain.policy import Policy, RecoveryPolicy

# ---------------------------------------------------------------- the plan


class MitigationPlan(BaseModel):
    """What to do, with the sums. Pure result; the workflow only carries it out."""

    levers: list[Lever]
    """In the order of the way back; those not needed say why."""
    routing: dict[str, str] = {}
    """Intents to downgrade, with the model; empty: none fits."""
    cache_ttl_seconds: int | None = None
    batch_window_ms: int | None = None
    units: int | None = None
    """Total units wanted in service; None: no evidence for buying, or none needed."""
    uncapped_units: int | None = None
    """The same without the cap per incident."""
    arithmetic: list[str]


def buying_evidence(model: str, load: LoadSnapshot, policy: Policy) -> str | None:
    """Why buying is justified, in words; None when it is not (design check 21: one retried 429 buys nothing)."""
    throttle = policy.throttle
    now = load.model(model)
    if now.sent_tokens_per_second is not None and now.capacity_tokens_per_second:
        utilisation = now.sent_tokens_per_second / now.capacity_tokens_per_second
        if utilisation > throttle.buy_utilisation:
            return (
                f"{now.sent_tokens_per_second:,.0f} of {now.capacity_tokens_per_second:,.0f} tokens/s is "
                f"{utilisation:.0%} of the capacity, over {throttle.buy_utilisation:.0%}"
            )
    shares = now.throttle_shares[-throttle.buy_periods :]
    if len(shares) == throttle.buy_periods and min(shares) >= throttle.buy_throttle_share:
        return (
            f"throttles were at least {min(shares):.1%} of calls for {len(shares)} periods, "
            f"over {throttle.buy_throttle_share:.0%}"
        )
    return None


def downgrades(model: str, load: LoadSnapshot, policy: Policy) -> tuple[dict[str, str], str]:
    """Intents of `model` that may move to a smaller model with room for them, smallest load first, and why, in words.

    Room is judged at the present hit rate, so that a longer TTL that fails to help does not move the outage, and in
    what the target really has: a target that throttles or lost its units takes nothing.
    """
    routing = dict(policy.baseline.model_routing)
    hit_rate = load.hit_rate if load.hit_rate is not None else policy.throttle.hit_rate_at_baseline
    offered = load.offered_tokens_per_second
    moved: dict[str, str] = {}
    notes: list[str] = []
    candidates = [
        (offered[name], name, intent.downgrade_to)
        for name, intent in policy.intents.items()
        if name in offered and intent.downgrade_to and intent.model == model
    ]
    for _, name, target in sorted(candidates):
        after = load_on(target, offered, {**routing, name: target}, hit_rate)
        room = _room(target, load, policy)
        fits = after <= room
        notes.append(
            f"{name} to {target}: {after:,.0f} tokens/s on {target}, {'fits' if fits else 'does not fit'} "
            f"in {room:,.0f} ({policy.throttle.downgrade_headroom:.0%} of its provisioned capacity)"
        )
        if fits:
            routing[name] = moved[name] = target
    if not notes:
        return moved, f"no intent of {model} with a known load may be answered by a smaller model"
    return moved, "; ".join(notes)


def _room(target: str, load: LoadSnapshot, policy: Policy) -> float:
    """Tokens/s that `target` may carry: its headroom's share of what it has in service, on-demand left out."""
    spec, now = policy.models[target], load.model(target)
    if now.throttles:
        return 0
    usable = remaining_tokens_per_second(spec.baseline_units, spec)
    if now.capacity_tokens_per_second is not None and spec.baseline_units:
        usable = max(0.0, now.capacity_tokens_per_second - spec.on_demand_tokens_per_second)
    return policy.throttle.downgrade_headroom * usable


def routing_lever(model: str, load: LoadSnapshot, policy: Policy, until: datetime) -> tuple[Lever, dict[str, str]]:
    """The downgrade, held until then at most, and the intents it moves; not needed where none fits."""
    moved, why = downgrades(model, load, policy)
    names, configured = ", ".join(sorted(moved)), policy.baseline.model_routing
    lever = Lever(
        name=LeverName.MODEL_ROUTING,
        status=LeverStatus.APPLYING if moved else LeverStatus.NOT_NEEDED,
        before=", ".join(f"{name}: {configured[name]}" for name in sorted(moved)) or "as configured",
        after=", ".join(f"{name}: {target}" for name, target in sorted(moved.items())) or "as configured",
        why=f"{names} need less quality, and fit ({why})" if moved else why,
        hold_until=until if moved else None,
    )
    return lever, moved


def ttl_lever(seconds: int, why: str, policy: Policy, until: datetime) -> Lever:
    """A longer cache TTL, held until then at most."""
    return Lever(
        name=LeverName.CACHE_TTL,
        status=LeverStatus.APPLYING,
        before=f"{policy.cache_ttl_seconds} s",
        after=f"{seconds} s",
        why=why,
        hold_until=until,
    )


def cap_cost(
    units: int, base_units: int, model: str, policy: Policy, clock: RehearsalClock, lines: list[str]
) -> tuple[int, list[str]]:
    """Clamp by the incident's cost cap over the maximum hold; unit-hours where no price is configured."""
    spec, capacity = policy.models[model], policy.capacity
    hours = clock.business_duration(policy.way_back.capacity_max_hold) / timedelta(hours=1)
    extra = max(0, units - base_units)
    affordable = int(capacity.max_unit_hours_per_incident / hours)
    if spec.usd_per_unit_hour is not None and capacity.max_usd_per_incident is not None:
        affordable = min(affordable, int(capacity.max_usd_per_incident / (hours * spec.usd_per_unit_hour)))
    bought = min(extra, affordable)
    price = (
        f", at most {bought * hours * spec.usd_per_unit_hour:,.0f} USD" if spec.usd_per_unit_hour is not None else ""
    )
    lines.append(
        f"{extra} units over the {base_units} of this hour for at most {hours:g} h are "
        f"{extra * hours:g} unit-hours; the cap per incident allows {affordable} units: {bought} units{price}."
    )
    if bought < extra:
        lines.append(f"An approver is asked for the other {extra - bought}.")
    return base_units + bought, lines


# ---------------------------------------------------------------- recovery

THROTTLES = "throttles"
"""The name of the check that decides whether a plan is made anew."""


def recovery_checks(
    model: str,
    load: LoadSnapshot,
    recovery: RecoveryPolicy,
    before: Iterable[RecoveryCheck],
    p99_before_ms: float | None,
) -> list[RecoveryCheck]:
    """The measures of recovery now; `before` tells since when each has been met.

    No data counts as no throttles only while calls were made; elsewhere no data is never met.
    """
    calls_made = (load.model(model).sent_tokens_per_second or 0) > 0
    throttles = load.model(model).throttles
    if throttles is None and calls_made:
        throttles = 0
    p99_target = max(recovery.max_p99_ms, p99_before_ms or 0)
    rows: list[Row] = [
        (
            THROTTLES,
            throttles,
            recovery.max_throttles,
            "per period",
            throttles is not None and throttles <= recovery.max_throttles,
        ),
        ("P99 latency", load.p99_ms, p99_target, "ms", load.p99_ms is not None and load.p99_ms < p99_target),
        (
            "fallback answers",
            load.fallback_percent,
            recovery.max_fallback_percent,
            "%",
            load.fallback_percent is not None and load.fallback_percent < recovery.max_fallback_percent,
        ),
        (
            "queue depth",
            load.queue_depth,
            recovery.max_queue_depth,
            "requests",
            load.queue_depth is not None and load.queue_depth < recovery.max_queue_depth,
        ),
    ]
    return measured(rows, load, before)


Row = tuple[str, float | None, float, str, bool]
"""Of a recovery check: name, value, target, unit, met."""


def measured(rows: Iterable[Row], load: LoadSnapshot, before: Iterable[RecoveryCheck]) -> list[RecoveryCheck]:
    """The rows as checks; `before` tells since when each has been met."""
    since = {check.name: check.since for check in before if check.met}
    return [
        RecoveryCheck(
            name=name,
            value=value,
            target=target,
            unit=unit,
            met=met,
            since=(since.get(name) or load.observed_at) if met else None,
        )
        for name, value, target, unit, met in rows
    ]


def held_since(checks: list[RecoveryCheck]) -> datetime | None:
    """Since when all measures have been met together; None while one is not."""
    times = [check.since for check in checks]
    return max((t for t in times if t is not None), default=None) if all(t is not None for t in times) else None


def breaching(checks: Iterable[RecoveryCheck]) -> list[str]:
    """Measures that have data and are off target, in words. Used while a released lever is watched."""
    return [
        f"{check.name} {check.value:g} {check.unit} (target {check.target:g})"
        for check in checks
        if check.value is not None and not check.met
    ]


def effects(model: str, load: LoadSnapshot) -> list[str]:
    """Effects of levers, reported beside recovery and never part of it."""
    now = load.model(model)
    lines = []
    if load.hit_rate is not None:
        lines.append(f"cache hit rate {load.hit_rate:.0%}")
    if load.tasks_running is not None:
        lines.append(f"{load.tasks_running:g} ECS tasks running")
    if now.sent_tokens_per_second is not None and now.capacity_tokens_per_second is not None:
        lines.append(f"{now.sent_tokens_per_second:,.0f} of {now.capacity_tokens_per_second:,.0f} tokens/s on {model}")
    return lines


def recovered_how(load: LoadSnapshot, peak: float, recovery: RecoveryPolicy) -> tuple[Recovery, str]:
    """Whether the mitigation held under load or the demand went away, and at which share of the peak."""
    share = total_offered(load) / peak if peak else 0.0
    kind: Recovery = "recovered under load" if share >= recovery.under_load_share else "the demand went away"
    return kind, f"{kind}: offered load was {share:.0%} of the incident's peak of {peak:,.0f} tokens/s"


# ---------------------------------------------------------------- the way back


class Guard(BaseModel):
    """Whether a lever may be released now."""

    may: bool
    why: str


def guard(
    lever: LeverName, held: Iterable[Lever], model: str, load: LoadSnapshot, policy: Policy, base_units: int
) -> Guard:
    """A lever is released only if the projected load without it is at most 80 % of what remains.

    What remains in force is read from the levers themselves: the intents that were moved, the units that landed.
    `base_units`: what is there without the capacity lever.
    """
    offered = load.offered_tokens_per_second
    if not offered:
        return Guard(may=False, why="the offered load could not be read, so the load without the lever is unknown")
    after = {other.name: other for other in held if other.name is not lever}
    throttle, spec = policy.throttle, policy.models[model]
    routing = dict(policy.baseline.model_routing)
    moved = after.get(LeverName.MODEL_ROUTING)
    if moved is not None and moved.lease is not None and isinstance(moved.lease.value, dict):
        routing |= {intent: str(target) for intent, target in moved.lease.value.items()}
    hit_rate = throttle.hit_rate_at_baseline
    if LeverName.CACHE_TTL in after:
        hit_rate = load.hit_rate if load.hit_rate is not None else throttle.hit_rate_at_mitigation
    projected = load_on(model, offered, routing, hit_rate)
    bought = after.get(LeverName.CAPACITY)
    landed = bought is not None and bought.demand is not None and bought.landed_at is not None
    units = bought.demand.units if landed and bought and bought.demand else base_units
    remaining = remaining_tokens_per_second(units, spec)
    limit = policy.way_back.max_utilisation_without_lever
    share = projected / remaining if remaining else float("inf")
    verdict = "may be released" if share <= limit else "must stay"
    return Guard(
        may=share <= limit,
        why=f"without {lever}: {projected:,.0f} of {remaining:,.0f} provisioned tokens/s on {model} is {share:.0%}; "
        f"the limit is {limit:.0%}: it {verdict}",
    )
