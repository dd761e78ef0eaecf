"""What the meter counted, as CloudWatch's PutMetricData takes it: values with counts, within the limits of one call."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from dataplane.meter import BatchMeter, Totals
from domain.metrics import CATALOGUE, MetricName

MOST_METRICS = 1000
MOST_VALUES = 150
MOST_BYTES = 400_000
"""Of JSON; AWS takes 1 MB of what the client makes of it."""

Datum = dict[str, Any]
Counted = Mapping[float, int] | Mapping[int, int]
"""Values, and how often each came."""


def metric_data(meter: BatchMeter, since: Totals, at: datetime, resolution_seconds: int) -> list[Datum]:
    """One period's metrics: `since` is what was counted in it."""
    lanes = meter.windows.items()
    packing = {model: window for (model, group), window in lanes if group}
    lookups: dict[float, int] = {}
    for counts in since.cache.values():
        for value, count in counts.items():
            lookups[value] = lookups.get(value, 0) + count
    shed: dict[str, int] = {}
    for (_, reason), count in since.shed.items():
        shed[reason] = shed.get(reason, 0) + count
    found: list[tuple[MetricName, tuple[str, ...], Counted]] = [
        *((MetricName.QUEUE_WAIT_TIME, (model,), counts) for model, counts in since.waits_ms.items()),
        *((MetricName.BATCH_FILL_RATE, (model,), counts) for model, counts in since.sizes.items()),
        *((MetricName.BATCH_SIZE, (model,), {window.size: 1}) for model, window in packing.items()),
        *((MetricName.BATCH_WINDOW, (model,), {window.seconds * 1000: 1}) for model, window in packing.items()),
        *((MetricName.BATCH_WINDOW_CHANGES, key, {count: 1}) for key, count in since.window_changes.items()),
        *((MetricName.BATCH_LATENCY, key, counts) for key, counts in since.latency_ms.items()),
        *((MetricName.TOKENS_PER_INTENT, key, counts) for key, counts in since.tokens.items()),
        *((MetricName.BATCHER_CALLS, (model,), {count: 1}) for model, count in since.calls.items()),
        *((MetricName.BATCHER_THROTTLES, (model,), {count: 1}) for model, count in since.throttles.items()),
        *((MetricName.COALESCED_REQUESTS, (intent,), {count: 1}) for intent, count in since.coalesced.items()),
        *((MetricName.SHED_REQUESTS, (reason,), {count: 1}) for reason, count in shed.items()),
        *((MetricName.PACKING_SUSPENDED, (intent,), {1: 1}) for intent in sorted(meter.not_packed)),
        (MetricName.CACHE_HIT_RATE, (), lookups),
        (MetricName.BEDROCK_QUEUE_DEPTH, (), {meter.take_deepest(): 1}),
    ]
    return [datum for name, named, counts in found for datum in data_of(name, named, counts, at, resolution_seconds)]


def data_of(
    name: MetricName, named: Sequence[str], counts: Counted, at: datetime, resolution_seconds: int
) -> Iterator[Datum]:
    """One metric's values, in data that AWS takes; `named` are its dimensions' values, in order."""
    metric, ordered = CATALOGUE[name], sorted(counts.items())
    for start in range(0, len(ordered), MOST_VALUES):
        part = ordered[start : start + MOST_VALUES]
        yield {
            "MetricName": str(name),
            "Dimensions": [{"Name": key, "Value": value} for key, value in zip(metric.dimensions, named, strict=True)],
            "Timestamp": at,
            "Unit": metric.unit,
            "StorageResolution": resolution_seconds,
            "Values": [float(value) for value, _ in part],
            "Counts": [float(count) for _, count in part],
        }


def calls_of(data: Iterable[Datum]) -> Iterator[list[Datum]]:
    """The data in calls that AWS takes."""
    call: list[Datum] = []
    size = 0
    for datum in data:
        length = len(json.dumps(datum, default=str))
        if call and (len(call) >= MOST_METRICS or size + length > MOST_BYTES):
            yield call
            call, size = [], 0
        call.append(datum)
        size += length
    if call:
        yield call
