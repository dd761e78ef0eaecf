"""Who asks the capacity loops for units in the year: calendar events, and emergencies."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial

from bench._capacity_loop import CapacityLoop, VirtualTime
from bench._random_year import BEGIN, MINUTE, Entry
from domain.calendar import CalendarEvent
from domain.capacity import Demand, DemandKind
from domain.clock import RehearsalClock
from domain.load import remaining_tokens_per_second, units_for
from domain.messages import PolicySnapshot
from domain.policy import Policy
from domain.pre_provisioning import EventPlan, EventTimes, PlanEvent, event_workflow_id, plan_event
from domain.timetable import units_at

PROMPT = MINUTE
"""Buying that begins so long after the units were needed is told."""


class EventDesk:
    """What `EventPreProvisioningWorkflow` does, for each entry of the calendar, with `plan_event`.

    Each change of an entry is seen by the next sync. At the preflight the event is planned, its demands are set, and
    what stands against it is escalated; so is buying that begins only after the units were needed, and what is not in
    service when it is needed, or a margin ahead of the start.
    """

    def __init__(
        self, time: VirtualTime, policy: Policy, loops: Mapping[str, CapacityLoop], entries: Sequence[Entry]
    ) -> None:
        self.escalated: dict[str, list[datetime]] = {}
        """When, by event."""
        self._time, self._loops, self._policy = time, loops, policy
        self._snapshot = PolicySnapshot(policy=policy, clock=RehearsalClock())
        self._current: dict[str, CalendarEvent] = {}
        interval = policy.calendar.sync_interval
        for entry in entries:
            for at, event in entry.versions:
                time.at(BEGIN + -(-(at - BEGIN) // interval) * interval, partial(self._sync, entry.event_id, event))

    def _sync(self, event_id: str, event: CalendarEvent | None) -> None:
        self._current.pop(event_id, None)
        if event is None:
            for loop in self._loops.values():
                loop.withdraw_demand(event_workflow_id(event_id))
        elif event.starts_at > self._time.now:
            self._current[event_id] = event
            self._time.at(self._plan(event).times.preflight_at, partial(self._preflight, event))

    def _plan(self, event: CalendarEvent) -> EventPlan:
        return plan_event(PlanEvent(event=event, snapshot=self._snapshot, now=self._time.now))

    def _preflight(self, event: CalendarEvent) -> None:
        if not self._holds(event):
            return
        times = self._ask(event)
        self._time.at(times.buy_at, partial(self._trigger, event))

    def _trigger(self, event: CalendarEvent) -> None:
        if not self._holds(event):
            return
        times, now = self._ask(event), self._time.now
        if now > times.needed_at + PROMPT:
            self._escalate(event)
        for deadline in (times.needed_at, times.verify_by):
            if deadline > now:
                self._time.at(deadline, partial(self._verify, event))

    def _ask(self, event: CalendarEvent) -> EventTimes:
        planned = self._plan(event)
        for demand in planned.demands:
            self._loops[demand.model].set_demand(demand)
        if planned.findings:
            self._escalate(event)
        return planned.times

    def _verify(self, event: CalendarEvent) -> None:
        sizes = self._plan(event).sizes
        if self._holds(event) and any(self._loops[size.model].units < size.units for size in sizes):
            self._escalate(event)

    def _holds(self, event: CalendarEvent) -> bool:
        """Whether the entry is neither moved nor cancelled."""
        return self._current.get(event.event_id) is event

    def _escalate(self, event: CalendarEvent) -> None:
        self.escalated.setdefault(event.event_id, []).append(self._time.now)


class EmergencyDesk:
    """What throttle mitigation does with one model's capacity, without its other levers.

    After two periods over capacity it asks for what carries the load at the unplanned target utilisation, and more
    when that is not enough; people agree to the way back once the guard has held for an hour.
    """

    def __init__(self, time: VirtualTime, policy: Policy, model: str, loop: CapacityLoop) -> None:
        self.count = 0
        self._time, self._policy, self._model, self._loop = time, policy, model, loop
        self._spec = policy.models[model]
        self._periods_over = 0
        self._minutes_guarded = 0
        self._demand: Demand | None = None

    def minute(self, load: float) -> None:
        """A minute has passed with this load, in tokens/s."""
        over = load > remaining_tokens_per_second(self._loop.units, self._spec)
        self._periods_over = self._periods_over + 1 if over else 0
        if self._periods_over >= self._policy.throttle.buy_periods:
            self._buy(load)
        if self._demand is not None:
            self._watch(load, self._demand)

    def _buy(self, load: float) -> None:
        units = self._spec.clamped(units_for(load, self._spec, self._policy.capacity.unplanned_target_utilisation))
        if self._loop.plan is None or units <= self._loop.plan.desired_units:
            return  # they are wanted already
        self.count += self._demand is None
        self._minutes_guarded = 0
        incident = f"incident-bedrock-throttle:{self._model}"
        self._demand = Demand(
            demand_id=incident,
            model=self._model,
            kind=DemandKind.EMERGENCY,
            units=units,
            start=self._time.now,
            end=self._time.now + self._policy.way_back.capacity_max_hold,
            reason="load over capacity",
            asked_by=incident,
        )
        self._loop.set_demand(self._demand)

    def _watch(self, load: float, demand: Demand) -> None:
        way_back, now = self._policy.way_back, self._time.now
        others = [x.units for x in self._loop.demands.values() if x is not demand and x.start <= now < x.end]
        without = self._spec.clamped(max([units_at(self._policy, self._model, now), *others]))
        limit = way_back.max_utilisation_without_lever * remaining_tokens_per_second(without, self._spec)
        self._minutes_guarded = self._minutes_guarded + 1 if load <= limit else 0
        if self._minutes_guarded * MINUTE >= way_back.recovered_for:
            self._loop.withdraw_demand(demand.demand_id)
            self._demand = None
        elif demand.end - now <= MINUTE:
            self._demand = demand.model_copy(update={"end": now + way_back.recovered_for})
            self._loop.set_demand(self._demand)
