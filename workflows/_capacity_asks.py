"""Asks approvers for what automation may not decide: money over a cap, and rungs that need consent."""

import math

from temporalio import workflow

from domain.capacity import CapacityPlan, Demand
from domain.clock import HOUR
from domain.incident import utc
from domain.messages import ApproveCapacity, AwaitedApproval
from domain.purchases import Consent
from workflows._capacity import Capacity

APPROVERS = "approvers"
MUCH_DEARER = 1.5
"""Technical: so much more than people were told is said again; an approval is for the amount of its moment."""


class AsksPeople(Capacity):
    """Pages once for each thing to agree to; the best there is without it stands meanwhile."""

    def ask_for_money(self, plan: CapacityPlan) -> None:
        """Ask for what passes a cap, per day or per incident; what does so no longer is asked for no longer."""
        asks = [wish for demand in self.demands.values() if (wish := self._over_its_cap(demand))]
        if (excess := plan.excess) is not None:
            asks.append(
                AwaitedApproval(
                    approval_id=excess.excess_id,
                    text=excess.text,
                    asked_by=excess.asked_by,
                    units=excess.units,
                    amount=excess.amount,
                    unit=excess.unit,
                    since=workflow.now(),
                    until=excess.until,
                )
            )
        for name, asked in list(self.awaiting.items()):
            if asked.amount is not None and name not in {ask.approval_id for ask in asks}:
                del self.awaiting[name]
                self.note("capacity", f"no longer waits for an approval: {asked.text}")
        for ask in asks:
            self.ask(ask)

    def _over_its_cap(self, demand: Demand) -> AwaitedApproval | None:
        extra = (demand.uncapped_units or 0) - demand.units
        if extra <= 0 or demand.demand_id in self.raised:
            return None
        price, unit = self._price_of_unit(demand)
        return AwaitedApproval(
            approval_id=f"incident-cap-{demand.demand_id}",
            text=(
                f"{demand.asked_by} needs {demand.uncapped_units} units of {self.model} until {utc(demand.end)}, "
                f"{extra} more than the cap per incident allows: up to {extra * price:,.2f} {unit} more"
            ),
            asked_by=demand.asked_by,
            units=extra,
            amount=extra * price,
            unit=unit,
            since=workflow.now(),
            until=demand.end,
        )

    def _price_of_unit(self, demand: Demand) -> tuple[float, str]:
        """Of one unit until the demand's end, in the cap's unit."""
        hours = math.ceil(self.now_snapshot.clock.business_duration(demand.end - workflow.now()) / HOUR)
        price = self.now_snapshot.policy.models[self.model].usd_per_unit_hour
        if price is None or self.policy.max_usd_per_incident is None:
            return hours, "unit-hours"
        return hours * price, "USD"

    def ask(self, asked: AwaitedApproval) -> None:
        """Page the approvers, once for each thing to agree to; again when it has become much dearer meanwhile."""
        known = self.awaiting.get(asked.approval_id)
        told = known.paged_amount if known else None
        dearer = asked.amount is not None and told is not None and asked.amount > told * MUCH_DEARER
        paged = asked.amount if known is None or dearer else told
        since = known.since if known else asked.since
        self.awaiting[asked.approval_id] = asked.model_copy(update={"since": since, "paged_amount": paged})
        if known is None or dearer:
            how = f"`runbooks capacity approve {self.model} {asked.approval_id} --why …`"
            self.page(APPROVERS, f"{asked.text}. To agree: {how}")

    def grant(self, asked: AwaitedApproval, request: ApproveCapacity) -> str:
        """What was agreed to counts from now on; answers in words."""
        del self.awaiting[asked.approval_id]
        if asked.amount is None:
            self.agreed.add(asked.approval_id)
            return f"it is done: {asked.text}"
        amount = asked.amount if request.amount is None else request.amount
        for demand in self.demands.values():
            if asked.approval_id == f"incident-cap-{demand.demand_id}":
                more = math.floor(asked.units * min(1, amount / asked.amount))
                self.raised[demand.demand_id] = demand.units + more
                self.demands[demand.demand_id] = self.as_raised(demand)
                break
        else:
            self.consents[asked.approval_id] = Consent(
                excess_id=asked.approval_id, who=request.who, amount=amount, at=workflow.now(), until=asked.until
            )
        self.try_again()
        return f"up to {amount:,.2f} {asked.unit} over the cap may be spent until {utc(asked.until)}"

    def as_raised(self, demand: Demand) -> Demand:
        """With the units that an approver agreed to for it."""
        agreed = min(self.raised.get(demand.demand_id, 0), demand.uncapped_units or 0)
        return demand.model_copy(update={"units": max(demand.units, agreed)})
