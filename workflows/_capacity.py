"""What a capacity workflow knows, and the small acts every part of it uses."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow

from domain.capacity import CapacityPlan, Demand, DemandOutcome, Order, PlanCost, Situation, Step
from domain.capacity_details import render_capacity
from domain.incident import Decision, TimelineEntry, utc
from domain.messages import (
    AT_REST,
    CapacityInput,
    CapacityState,
    Paused,
    PolicySnapshot,
    PurchaseState,
    Trouble,
    still_paid,
)
from domain.policy import CapacityPolicy
from domain.purchases import Purchase
from domain.routes import Overflow
from workflows._people import OnRecord
from workflows.search_attributes import HOLDS_LEASES, SERVICE

CREATE, LIST, FAILED = "create", "list", "failed"
KEPT_LINES, KEPT_DECISIONS = 100, 50
"""Of timeline and decisions, when the workflow continues as new."""
KEPT_PURCHASES = 500
PAST = timedelta(hours=48)
"""Business time that a purchase is remembered after its end: caps look back a day."""


@dataclass
class CapacityRecord:
    """What people did and were told."""

    timeline: list[TimelineEntry] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)


class Capacity(OnRecord):
    """Base of the capacity workflow."""

    record: CapacityRecord

    def __init__(self, input: CapacityInput) -> None:
        super().__init__("SEV3")
        state = input.state
        self.record = CapacityRecord(state.timeline, state.decisions)
        self.model = state.model
        known = input.snapshot is not None and self.model in input.snapshot.policy.models
        self.snapshot = input.snapshot if known else None
        self.demands = {demand.demand_id: demand for demand in state.demands}
        self.fleet = {model.arn: model for model in state.fleet}
        self.purchases = {purchase.arn: purchase for purchase in state.purchases}
        self.listed_at = state.last_reconciled_at
        self.unlisted = set(state.unlisted)
        """Created, and in no list yet."""
        self.gone = set(state.gone)
        """Deleted: a list that was under way may still have them."""
        self.sending: dict[str, Order] = {}
        self.unanswered = state.unanswered
        self.next_sequence = state.next_sequence
        self.watching: set[str] = set()
        self.retiring: dict[str, Step] = {}
        self.deleting: set[str] = set()
        self.effects: list[asyncio.Task[Any]] = []
        """Creations and deletions that AWS has not answered, in order: a set of tasks has another one in a replay."""
        self.routes: dict[str, int] = {}
        """As they should be."""
        self.routed = state.routes
        """As published last."""
        self.overflow: tuple[Overflow, ...] = ()
        self.reachable: set[str] | None = None
        """ARNs that calls may still go to; None: this run has not published yet."""
        self.route_version = 0
        self.republish = True
        self.publishing = False
        self.plan: CapacityPlan | None = None
        self.planned_for: list[Demand] = []
        self.told = state.told
        self.news: list[tuple[str, DemandOutcome]] = []
        self.unlistable: list[tuple[str, str]] = []
        """Why the fleet cannot be listed, as kind and words; empty: it can."""
        self.shortage: dict[str, tuple[str, str]] = {}
        """Why there are not more units, as kind and words, by order, by ARN, or `FAILED`: AWS failed to create."""
        self.settled: set[str] = set()
        """Orders in `shortage` of before those that are being sent: forgotten once these have ended."""
        self.told_kinds: dict[str, frozenset[str]] = {}
        """What kept units away when a demand's asker was told last."""
        self.errors: dict[str, str] = {}
        """What else fails, by what it is about."""
        self.held: set[str] = set()
        """What failed and waits for the next reconciliation: watching an ARN, its `deletion`, `CREATE`, `LIST`."""
        self.paused = state.paused
        self.awaiting = {asked.approval_id: asked for asked in state.awaiting}
        self.consents = {consent.excess_id: consent for consent in state.consents}
        self.agreed = set(state.agreed)
        self.raised = state.raised
        self.missing = 0
        """Units that are wanted now and neither in service nor on their way in time."""
        self.short_since = state.short_since
        self.overloaded_since = state.overloaded_since
        self.rungs = state.rungs
        self.leases = state.leases
        self.leases_lost_at: datetime | None = None
        self.stepping = False
        self.paged_for = state.paged_for
        self.look = True
        self.replan = False
        self.planning = False
        self.rounds = 0
        """That have ended."""
        self.reconcile_at: datetime | None = None
        self.refused = ""
        """Why this workflow cannot work at all."""
        self.tasks: set[asyncio.Task[None]] = set()
        self._holds_leases: bool | None = None

    @property
    def policy(self) -> CapacityPolicy:
        """Of capacity; only after `run` has loaded it."""
        return self.now_snapshot.policy.capacity

    # ------------------------------------------------------------ small acts

    def try_again(self) -> None:
        """Look at the fleet now, and try what failed."""
        self.forgive()
        self.look = True

    def forgive(self) -> None:
        """What failed may be tried again."""
        self.held.clear()
        for arn in self.fleet:
            self.errors.pop(arn, None)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the main loop."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def forget_demand(self, demand_id: str) -> Demand | None:
        """The demand, if it was known."""
        self.raised.pop(demand_id, None)
        self.told.pop(demand_id, None)
        self.told_kinds.pop(demand_id, None)
        return self.demands.pop(demand_id, None)

    def forget_model(self, arn: str) -> None:
        """It is proven gone."""
        self.fleet.pop(arn, None)
        self.unlisted.discard(arn)
        self.gone.add(arn)
        self.held -= {arn, deletion(arn)}
        self.errors.pop(arn, None)
        self.shortage.pop(arn, None)
        self.keep_purchases()

    def keep_purchases(self) -> None:
        """What was bought, in step with the fleet; what ended long ago is forgotten."""
        now = workflow.now()
        for model in self.fleet.values():
            if model.ours and model.arn not in self.purchases:
                self.purchases[model.arn] = Purchase(
                    arn=model.arn,
                    name=model.name,
                    units=model.units,
                    asked_by=model.asked_by or "unknown",
                    until=model.until,
                    bought_at=model.created_at,
                )
        for arn, purchase in self.purchases.items():
            failed = arn in self.fleet and self.fleet[arn].status == "Failed"
            if purchase.ended_at is None and (failed or arn not in self.fleet):
                self.purchases[arn] = purchase.model_copy(update={"ended_at": now, "failed": failed})
        kept = now - PAST / self.now_snapshot.clock.speed
        lately = [item for item in self.purchases.items() if item[1].ended_at is None or item[1].ended_at > kept]
        self.purchases = dict(lately[-KEPT_PURCHASES:])

    # ------------------------------------------------------------ what is known

    def situation(self) -> Situation:
        """What the planner looks at."""
        snapshot, now = self.now_snapshot, workflow.now()
        self.consents = {name: consent for name, consent in self.consents.items() if consent.until > now}
        return Situation(
            model=self.model,
            spec=snapshot.policy.models[self.model],
            policy=self.policy,
            timetable=snapshot.policy.timetable,
            clock=snapshot.clock,
            now=now,
            demands=tuple(self.demands.values()),
            fleet=tuple(self.fleet.values()) if self.listed_at else None,
            sending=tuple(self.sending.values()),
            unanswered=tuple(self.unanswered),
            next_sequence=self.next_sequence,
            leaving=frozenset(self.deleting),
            routed=frozenset(self.routed),
            troubles=tuple(self._troubles()),
            purchases=tuple(self.purchases.values()),
            consents=tuple(self.consents.values()),
            paused=_paused(self.paused),
        )

    def state(self, at: datetime) -> CapacityState:
        """Everything that is known; what a continued run starts from. `at`: the moment that costs are reckoned for."""
        plan = self.plan
        return CapacityState(
            model=self.model,
            demands=list(self.demands.values()),
            fleet=list(self.fleet.values()),
            unlisted=sorted(self.unlisted),
            gone=sorted(self.gone),
            desired_units=plan.desired_units if plan else 0,
            units_in_service=plan.units_in_service if plan else 0,
            doing=self._doing(),
            last_error="; ".join(self.problems()),
            last_reconciled_at=self.listed_at,
            told=self.told,
            routes=self.routed,
            unanswered=self.unanswered,
            next_sequence=self.next_sequence,
            paused=self.paused,
            awaiting=list(self.awaiting.values()),
            consents=list(self.consents.values()),
            agreed=sorted(self.agreed),
            raised=self.raised,
            purchases=list(self.purchases.values()),
            bought=self._bought(self.snapshot, at) if self.snapshot else [],
            cost=plan.cost if plan else PlanCost(),
            expected=list(plan.expected) if plan else [],
            short_since=self.short_since,
            overloaded_since=self.overloaded_since,
            rungs=self.rungs,
            leases=self.leases,
            paged_for=self.paged_for,
            problems=list(self.problems()),
            troubles=[Trouble(kind=kind, text=why) for kind, why in [*self.unlistable, *self.shortage.values()]],
            retry_at=self.reconcile_at if self.problems() else None,
            decisions=self.record.decisions[-KEPT_DECISIONS:],
            timeline=self.record.timeline[-KEPT_LINES:],
        )

    def _bought(self, snapshot: PolicySnapshot, at: datetime) -> list[PurchaseState]:
        price = snapshot.policy.models[self.model].usd_per_unit_hour
        return still_paid(self.purchases.values(), self.fleet.values(), at, snapshot.clock, price)

    def kinds(self) -> frozenset[str]:
        """What keeps units away, as kinds."""
        return frozenset([*(kind for kind, _ in self.shortage.values()), *self.errors.keys() & {"fleet", "routes"}])

    def _troubles(self) -> Sequence[str]:
        other = [self.errors[name] for name in ("fleet", "routes") if name in self.errors]
        return list(dict.fromkeys([*self._why_short(), *other]))

    def problems(self) -> Sequence[str]:
        """What does not work, in words."""
        return list(dict.fromkeys([*self._why_short(), *self.errors.values()]))

    def _why_short(self) -> list[str]:
        return [*(why for _, why in self.shortage.values())]

    def _doing(self) -> str:
        names = {arn: model.name for arn, model in self.fleet.items()}
        parts = [f"asking AWS for {order.units} units" for order in self.sending.values()]
        parts += [f"waiting until {names.get(arn, arn)} is in service" for arn in sorted(self.watching)]
        parts += [
            f"{'deleting' if arn in self.deleting else 'draining'} {step.name}" for arn, step in self.retiring.items()
        ]
        parts += ["publishing routes"] if self.publishing else []
        parts += ["climbing the ladder"] if self.stepping else []
        parts += ["planning"] if self.planning or self.look or self.replan else []
        return ", ".join(parts) or AT_REST

    def show(self) -> None:
        """The state as the UI's details, and its search attributes when they changed."""
        if self.snapshot is not None:
            summary = self.plan.summary if self.plan else ""
            workflow.set_current_details(render_capacity(self.state(workflow.now()), summary))
        else:
            workflow.set_current_details(f"# Provisioned capacity of `{self.model}`\n\n" + "\n".join(self.problems()))
        if self._holds_leases != bool(self.leases):
            self._holds_leases = bool(self.leases)
            workflow.upsert_search_attributes(
                [SERVICE.value_set("mangaassist"), HOLDS_LEASES.value_set(self._holds_leases)]
            )


def deletion(arn: str | None) -> str:
    """In `held`: it could not be deleted."""
    return f"deletion of {arn}"


def _paused(paused: Paused | None) -> str:
    return f"{paused.who}, since {utc(paused.since)}: {paused.why}" if paused else ""
