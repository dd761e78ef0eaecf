"""What is around the workflow of a calendar event, as a recording fake."""

from typing import Any, Literal

from temporalio import activity

from domain.capacity import Demand, DemandOutcome
from domain.clock import RehearsalClock
from domain.messages import CapacityState, Page, PolicySnapshot, ReportResult, WithdrawDemand
from domain.permissions import CheckPermissions, PermissionFinding, PermissionsChecked
from domain.policy import Policy
from domain.pre_provisioning import (
    AwaitRelease,
    EventReportInput,
    MarkEvent,
    Released,
    WatchedEvent,
    WatchedModel,
    WatchEvent,
)

POLICY = Policy()
Status = Literal["requested", "in_service", "failed", "withdrawn"]


class FakeEvents:
    """Everything around the workflow, on record."""

    def __init__(self) -> None:
        self.policy = POLICY
        self.calls: list[tuple[str, Any]] = []
        self.status: dict[str, Status] = {}
        """By model, what its capacity workflow says; without: requested."""
        self.detail = "15 of 30 units in service"
        self.others: list[Demand] = []
        self.standing: dict[str, Demand] = {}
        """Demands of the workflow."""
        self.denied: list[str] = []
        self.row = True
        self.loads: list[float] = []
        """Tokens/s at the end of the next watches; then none."""

    def asked(self, *names: str) -> list[Any]:
        return [argument for name, argument in self.calls if name in names]

    def pages(self, to: str) -> list[str]:
        return [page.text for page in self.asked("page") if page.to == to]

    def _saw(self, request: Any) -> None:
        self.calls.append((activity.info().activity_type, request))

    def outcome(self, demand_id: str, model: str) -> DemandOutcome:
        status = self.status.get(model, "requested")
        return DemandOutcome(
            demand_id=demand_id, status=status, units_in_service=15, units_wanted=30, detail=f"{model} {self.detail}"
        )

    @activity.defn
    async def load_policy(self) -> PolicySnapshot:
        return PolicySnapshot(policy=self.policy, clock=RehearsalClock())

    @activity.defn
    async def page(self, request: Page) -> None:
        self._saw(request)

    @activity.defn
    async def check_permissions(self, request: CheckPermissions) -> PermissionsChecked:
        self._saw(request)
        return PermissionsChecked(
            findings=tuple(
                PermissionFinding(action=name, verdict="denied", detail="refused.", statement='{"Effect": "Allow"}')
                for name in self.denied
            )
        )

    @activity.defn
    async def capacity_state(self, model: str) -> CapacityState:
        standing = [*self.others, *self.standing.values()]
        return CapacityState(
            model=model,
            demands=[demand for demand in standing if demand.model == model],
            told={x.demand_id: self.outcome(x.demand_id, model) for x in standing if x.model == model},
        )

    @activity.defn
    async def set_demand(self, request: Demand) -> DemandOutcome:
        self._saw(request)
        self.standing[request.demand_id] = request
        return self.outcome(request.demand_id, request.model)

    @activity.defn
    async def withdraw_demand(self, request: WithdrawDemand) -> DemandOutcome:
        self._saw(request)
        self.standing.pop(request.demand_id, None)
        return self.outcome(request.demand_id, request.model).model_copy(update={"status": "withdrawn"})

    @activity.defn
    async def await_release(self, request: AwaitRelease) -> Released:
        self._saw(request)
        return Released(done=True, detail=f"15 units of {request.model} in service, 15 wanted")

    @activity.defn
    async def watch_event(self, request: WatchEvent) -> WatchedEvent:
        self._saw(request)
        last = self.loads.pop(0) if self.loads else 0
        seen = WatchedModel(
            peak_tokens_per_second=24_000, capacity_tokens_per_second=40_500, tokens_per_second=last, throttles=0
        )
        return WatchedEvent(models=dict.fromkeys(request.load.models, seen))

    @activity.defn
    async def mark_event(self, request: MarkEvent) -> bool:
        self._saw(request)
        return self.row

    @activity.defn
    async def write_event_report(self, request: EventReportInput) -> ReportResult:
        self._saw(request)
        return ReportResult(html_path="reports/event.html", markdown_path="reports/event.md")
