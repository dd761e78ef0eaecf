"""The incident at work: its record, the flags that people and alarms set, and the small acts every part uses."""

from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.cloudwatch import CloudWatchActivities
from domain import timetable
from domain.incident import IncidentRecord, Lever, LeverName, LeverStatus, Phase, render_details
from domain.load import LoadSnapshot, total_offered
from domain.messages import load_query
from workflows._mitigation import lease_id
from workflows._people import ON_CALL as ON_CALL
from workflows._people import OnRecord
from workflows._step import failure, read
from workflows.search_attributes import CAUSE, HOLDS_LEASES, INCIDENT_KEY, PHASE, SERVICE, SEVERITY

SENIOR = "senior on-call"
SENIOR_AND_TAM = "senior on-call and AWS TAM"
AWS_SUPPORT = "on-call: contact AWS Support (Severity 1)"


class Incident(OnRecord):
    """Base of the incident workflow. `_recovery` and `_way_back` work on it."""

    record: IncidentRecord

    def __init__(self, record: IncidentRecord) -> None:
        super().__init__(record.severity)
        self.record = record
        self.approved_by: str | None = None
        """Who approved the revert that runs or is about to; None: nobody, or it is over."""
        self.release_asked: LeverName | None = None
        self.abort_asked = False
        self.alarm_returned = False
        self.stuck_paged = self.p99_paged = False
        self.late_page_at: datetime | None = None
        """When people are paged next because the incident has not recovered."""
        self.holds_ended_until: datetime | None = None
        """Maximum holds up to then have been dealt with."""
        self.attempt = 0
        """How often levers were taken; part of every lease id."""
        self.undo: list[str] = []
        """Every lease that may ever have been taken, known before it is taken."""
        self._shown: tuple[object, ...] = ()

    @property
    def model(self) -> str:
        """The model the incident is about; triage incidents have none and never ask."""
        assert self.record.model is not None
        return self.record.model

    @property
    def units_of_the_hour(self) -> int:
        """What the timetable wants of the model now."""
        at = self.now_snapshot.clock.business(workflow.now())
        return timetable.units_at(self.now_snapshot.policy, self.model, at)

    @property
    def p99_before_ms(self) -> float | None:
        """P99 before the incident, as far as the first look at the metrics reached back."""
        return self.record.load_at_start.p99_before_ms if self.record.load_at_start else None

    @property
    def next_hold(self) -> datetime | None:
        """When the next maximum hold ends."""
        holds = (lever.hold_until for lever in self.record.held)
        done = self.holds_ended_until
        return min((hold for hold in holds if hold and (done is None or hold > done)), default=None)

    def next_attempt(self, *levers: LeverName) -> int:
        """Count an attempt to take levers, and remember the leases it may take, so that they can be undone."""
        self.attempt += 1
        self.undo += [lease_id(self.record.run_id, lever, self.attempt) for lever in levers]
        return self.attempt

    # ------------------------------------------------------------ the record

    def enter(self, phase: Phase, *, waiting_for: str, next_step: str, next_at: datetime | None = None) -> None:
        """Say where the incident stands, who waits for whom, and what comes next and when."""
        self.record.waiting_for, self.record.next_step, self.record.next_at = waiting_for, next_step, next_at
        if phase is not self.record.phase:
            self.record.phase = phase
            self.note("phase", f"now {phase}")
        self.show()

    def set_lever(self, lever: Lever) -> None:
        """Replace the lever of that name."""
        kept = [other for other in self.record.levers if other.name is not lever.name]
        order = list(LeverName)
        self.record.levers = sorted([*kept, lever], key=lambda item: order.index(item.name))

    def show(self) -> None:
        """The record as the UI's details, and its search attributes when they changed."""
        how_to = (
            f"Decide with `runbooks incident approve {self.record.key} --why …` (or reject, extend, release, abort)."
        )
        workflow.set_current_details(render_details(self.record, how_to))
        causes = self.record.diagnosis.causes if self.record.diagnosis else []
        cause = causes[0].id if causes else ("unknown" if self.record.diagnosis else "")
        holds = any(lever.lease for lever in self.record.held)
        shown = (self.record.phase, cause, holds)
        if shown == self._shown:
            return
        self._shown = shown
        workflow.upsert_search_attributes(
            [
                INCIDENT_KEY.value_set(self.record.key),
                PHASE.value_set(self.record.phase),
                SEVERITY.value_set(self.record.severity),
                SERVICE.value_set(self.record.service),
                HOLDS_LEASES.value_set(holds),
                *([CAUSE.value_set(cause)] if cause else []),
            ]
        )

    # ------------------------------------------------------------ small acts

    async def reread(self) -> LoadSnapshot:
        """The load now. Unreadable within the budget: an empty one, on which free levers act and nothing is bought."""
        policy = self.now_snapshot.policy
        try:
            load = await read(
                CloudWatchActivities.read_load,
                load_query(policy, self.model),
                summary="Re-read the metrics of the alarm",
                within=policy.evidence.budget,
            )
        except ActivityError as error:
            self.note("finding", f"the metrics could not be read, so nothing is bought: {failure(error)[1]}")
            return LoadSnapshot(observed_at=workflow.now())
        self.read(load)
        return load

    def read(self, load: LoadSnapshot) -> None:
        """Remember the first load that was read, and the peak."""
        self.record.load_at_start = self.record.load_at_start or load
        self.saw(total_offered(load))

    def saw(self, offered_tokens_per_second: float) -> None:
        """Remember the incident's peak."""
        peak = self.record.peak_offered_tokens_per_second
        self.record.peak_offered_tokens_per_second = max(peak, offered_tokens_per_second)

    # ------------------------------------------------------------ cost and progress, in words

    def price_of(self, hold: timedelta) -> str:
        """What holding the bought units for `hold` costs, e.g. `40.0 unit-hours, about 307 USD`; empty: none bought."""
        if self.snapshot is None or not self.record.units_bought:
            return ""
        price = self.snapshot.policy.models[self.model].usd_per_unit_hour
        return str(self.record.cost(hold, self.snapshot.clock, price))

    @property
    def running_cost(self) -> str:
        """What the incident's capacity has cost so far."""
        lever = self.record.lever(LeverName.CAPACITY)
        if lever is None or lever.landed_at is None or lever not in self.record.held:
            return "No bought capacity is running."
        return f"Running cost so far: {self.price_of(self.record.capacity_held(workflow.now()))}."

    @property
    def capacity_progress(self) -> str:
        """Which step of the capacity lever is in progress, and when it should land (design check 17)."""
        lever = self.record.lever(LeverName.CAPACITY)
        if lever is None or lever.applied_at is None or lever.status is not LeverStatus.IN_FORCE:
            return "No capacity is on its way."
        if lever.landed_at is not None:
            return f"{self.record.units_bought} units landed at {lever.landed_at:%H:%M:%S} UTC."
        lands = lever.applied_at + self.now_snapshot.policy.capacity.provisioning_lag
        return f"{self.record.units_bought} units are being created and should land by {lands:%H:%M:%S} UTC."
