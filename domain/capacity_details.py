"""A model's capacity at this moment, as Markdown for the Temporal UI. Text from outside stands in code spans."""

from domain.incident import quoted, utc
from domain.messages import RECONCILE_NOW, RESUME_CAPACITY, CapacityState, PurchaseState

SHOWN_LINES = 20
"""Of the timeline: the latest."""


def render_capacity(state: CapacityState, summary: str) -> str:
    """`summary`: the plan in one line; empty: there is none yet."""
    parts = [f"# Provisioned capacity of {quoted(state.model)}"]
    if state.paused is not None:
        parts.append(
            f"**PAUSED** by {quoted(state.paused.who)} since {utc(state.paused.since)}: {quoted(state.paused.why)}. "
            f"Nothing is bought or deleted, routes go on; `{RESUME_CAPACITY}` ends it."
        )
    if summary:
        parts.append(f"**{state.units_in_service} of {state.desired_units} units in service**. {summary}")
    parts += [
        f"**Waiting for an approver** since {utc(asked.since)}: {quoted(asked.text)} "
        f"(`runbooks capacity approve {state.model} {asked.approval_id} --why …`)"
        for asked in state.awaiting
    ]
    if state.rungs:
        since = f" since {utc(state.short_since)}" if state.short_since else ""
        parts.append(_list(f"**Units are missing**{since}; meanwhile:", [rung.text for rung in state.rungs]))
    demands = [
        f"{demand.units} units until {utc(demand.end)} for {quoted(demand.asked_by)}: {quoted(demand.reason)}"
        for demand in state.demands
    ]
    parts.append(_list("**Demands**:", demands) if demands else "**Demands**: none but the policy's")
    bought = {purchase.arn: purchase for purchase in state.bought}
    rows = [
        f"| {quoted(model.name)} | {model.units} | {model.status} | {'yes' if model.arn in state.routes else 'no'} "
        f"| {_whose(bought.get(model.arn), model.ours)} |"
        for model in state.fleet
    ]
    head = [
        "| provisioned model | units | status | gets calls | for whom, until when, cost so far |",
        "|---|---|---|---|---|",
    ]
    parts.append("\n".join([*head, *rows]))
    parts.append(f"**Doing**: {state.doing}")
    if state.problems:
        again = f", tried again at {utc(state.retry_at)} or on `{RECONCILE_NOW}`" if state.retry_at else ""
        parts.append(_list(f"**Not working**{again}:", [quoted(problem) for problem in state.problems]))
    if state.timeline:
        lines = [f"{utc(entry.at)} {entry.kind}: {quoted(entry.text)}" for entry in state.timeline[-SHOWN_LINES:]]
        parts.append(_list("**Lately**:", lines))
    return "\n\n".join(parts) + "\n"


def _list(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"- {line}" for line in lines)])


def _whose(bought: PurchaseState | None, ours: bool) -> str:
    if bought is None:
        return "ours" if ours else "not ours"
    until = f" until {utc(bought.until)}" if bought.until else ""
    price = f"{bought.usd:,.2f} USD" if bought.usd is not None else f"{bought.unit_hours:g} unit-hours"
    return f"{quoted(bought.asked_by)}{until}, {price}"
