"""What the report of a calendar event says: made from its record as `_report_content` does for incidents."""

from collections.abc import Iterator
from datetime import datetime, timedelta

from activities._report_content import Block, Cell, Content, Section, Times, Toned
from domain.messages import PolicySnapshot
from domain.pre_provisioning import EventPhase, EventRecord, how_in_time


def event_content(record: EventRecord, snapshot: PolicySnapshot, as_of: datetime) -> Content:
    """The report of `record` as of the real moment `as_of` (its end, or now)."""
    times = Times(snapshot.clock, record.timeline[0].at if record.timeline else as_of, as_of)
    event = record.event
    over = record.phase in (EventPhase.DONE, EventPhase.WITHDRAWN)
    good = record.in_time and record.released_at is not None
    told = "Times are Tokyo, with UTC beside them."
    if times.rehearsed:
        told = (
            f"This is a rehearsal at {times.clock.speed:g} times real speed: times are business time in Tokyo, "
            "with real UTC beside them."
        )
    starts_at = times.clock.real(event.starts_at)
    return Content(
        title=f"Event {record.event_id}",
        status=Toned(record.phase, "good" if good else "bad" if over and record.in_time is False else "plain"),
        subtitle=f"{event.type}, {event.multiplier:g}x, {times.date(starts_at)}. {told}",
        summary=[
            ("What was planned", "; ".join(size.arithmetic for size in record.sizes) or "nothing"),
            ("In time", how_in_time(record)),
            ("How it ended" if over else "Where it stands", record.outcome or f"waiting for {record.waiting_for}"),
        ],
        facts=[
            ("Starts", event.starts_at.isoformat(timespec="minutes")),
            ("Lead time", _hours(event.lead_time)),
            ("Asked by", event.asked_by),
            ("Source", event.source),
        ],
        sections=[
            Section("to-do", "What needs a person", [Block("bullets", items=record.findings or ["Nothing."])]),
            Section("plots", "Plots", [Block("plots")]),
            Section("units", "Units and load", [_units(record)]),
            Section("notes", "Arithmetic, cost and other events", [Block("bullets", items=record.notes or ["None."])]),
            Section("times", "Times", [Block("table", headers=["What", "When"], rows=list(_times(record, times)))]),
            Section("timeline", "Timeline", [_timeline(record, times)]),
        ],
    )


def _units(record: EventRecord) -> Block:
    rows: list[list[Cell]] = []
    for size in record.sizes:
        outcome, seen = record.outcomes.get(size.model), record.watched.get(size.model)
        rows.append(
            [
                size.model,
                f"{size.forecast_tokens_per_second:,.0f}",
                f"{size.tokens_per_second:,.0f}",
                Toned(f"{size.needed_units}", "plain" if size.feasible else "bad"),
                f"{size.units}",
                outcome.detail if outcome else Toned("not asked for", "quiet"),
                f"{seen.peak_tokens_per_second:,.0f} of {seen.capacity_tokens_per_second:,.0f}"
                if seen
                else "not watched",
                Toned(f"{seen.throttles:,.0f}", "bad" if seen.throttles else "good") if seen else "not watched",
            ]
        )
    headers = ["Model", "Forecast", "With the event", "Units needed", "Units to have", "Capacity said last"]
    return Block("table", headers=[*headers, "Peak tokens/s of capacity", "Calls throttled"], rows=rows)


def _times(record: EventRecord, times: Times) -> Iterator[list[Cell]]:
    planned = record.times
    if planned is not None:
        yield ["Preflight planned", times.stamp(planned.preflight_at)]
        yield ["Buying planned", times.stamp(planned.buy_at)]
    yield ["Provisioning triggered", times.stamp(record.triggered_at)]
    if planned is not None:
        yield ["Should be in service", times.stamp(planned.needed_at)]
    yield ["All in service and routed", times.stamp(record.in_service_at)]
    if planned is not None:
        yield ["In time until", times.stamp(planned.verify_by)]
        yield ["Event starts", times.stamp(planned.starts_at)]
        yield ["Event ends", times.stamp(planned.ends_at)]
    yield ["Units released", times.stamp(record.released_at)]


def _timeline(record: EventRecord, times: Times) -> Block:
    rows: list[list[Cell]] = [
        [times.stamp(entry.at), entry.kind, Toned(entry.text, "plain")] for entry in record.timeline
    ]
    return Block("table", headers=["When", "What", "Event"], rows=rows)


def _hours(duration: timedelta) -> str:
    return f"{duration / timedelta(hours=1):g} h"
