"""What the batcher counts, and that CloudWatch takes it: its limits, and figures that come back right."""

import json
from collections import Counter
from datetime import UTC, datetime

import botocore.session
from botocore.validate import ParamValidator

from dataplane.meter import BatchMeter, Totals, bucket
from dataplane.metric_data import MOST_BYTES, MOST_METRICS, MOST_VALUES, Datum, calls_of, metric_data
from domain.batching import Answer, Refusal, Request, RequestRefused
from domain.metrics import CATALOGUE, MANGA_ASSIST, MetricName
from domain.windows import Window

NOW = datetime(2026, 11, 24, 20, tzinfo=UTC)


def batch(meter: BatchMeter, *intents: str, wait: float = 0.2, tokens: int = 40) -> None:
    """One batch of sonnet's, sent and answered in 2 s."""
    requests = [Request(intent, "q", 100, 10) for intent in intents]
    meter.sent("sonnet", "public", [wait] * len(intents))
    meter.served("sonnet", "public", requests, [Answer("a", "sonnet", 10, tokens, len(intents))] * len(intents), 2.0)


def by_name(data: list[Datum]) -> dict[tuple[str, ...], dict[float, float]]:
    found: dict[tuple[str, ...], dict[float, float]] = {}
    for datum in data:
        key = (datum["MetricName"], *(dimension["Value"] for dimension in datum["Dimensions"]))
        found.setdefault(key, {}).update(zip(datum["Values"], datum["Counts"], strict=True))
    return found


def test_a_period_says_what_happened_in_it_and_nothing_before() -> None:
    meter = BatchMeter()
    pending = 3
    meter.depth = lambda: pending
    meter.window("sonnet", "public", Window(0.25, 8, "12.0/s"))
    batch(meter, "faq", "faq", "greeting")
    before = meter.totals()
    batch(meter, "faq", wait=0.3, tokens=41)
    meter.window("sonnet", "public", Window(0.15, 8, "capped by batch_window_ms", capped=True))
    meter.served("sonnet", "", [Request("search", "q", 1, 1)], [RequestRefused(Refusal.THROTTLED, "x")], 1.0)
    meter.refused("search", Refusal.OVERLOADED)
    meter.coalesced("faq")
    for hit in (True, False, False):
        meter.looked_up("faq", hit)
    meter.packing("greeting", may_pack=False)
    pending = 1
    found = by_name(metric_data(meter, meter.totals().since(before), NOW, 1))
    [wait] = found["QueueWaitTime", "sonnet"]
    assert abs(wait - 300) <= 6
    assert found["BatchFillRate", "sonnet"] == {1: 1}
    assert found["BatchWindow", "sonnet"] == {150: 1}
    assert found["BatchWindowChanges", "sonnet", "knob"] == {1: 1}
    assert ("BatchWindowChanges", "sonnet", "controller") not in found, "that was before"
    assert found["BatchSize", "sonnet"] == {8: 1}
    assert found["TokensPerIntent", "faq", "output"] == {41: 1}
    assert ("TokensPerIntent", "greeting", "output") not in found
    assert found["CoalescedRequests", "faq"] == {1: 1}
    assert found["ShedRequests", "throttled"] == found["ShedRequests", "overloaded"] == {1: 1}
    assert found["CacheHitRate",] == {0: 2, 100: 1}
    assert found["PackingSuspended", "greeting"] == {1: 1}
    assert found["BedrockQueueDepth",] == {3: 1}, "the deepest of the period"
    nothing = by_name(metric_data(meter, meter.totals().since(meter.totals()), NOW, 1))
    assert {key[0] for key in nothing} == {"BatchWindow", "BatchSize", "PackingSuspended", "BedrockQueueDepth"}


def test_a_percentile_is_within_three_per_cent_and_memory_is_bounded() -> None:
    meter = BatchMeter()
    for n in range(30_000):
        meter.sent("sonnet", "public", [0.0001 * n])
    counts = meter.totals().waits_ms["sonnet"]
    assert sum(counts.values()) == 30_000
    assert len(counts) < 350
    assert all(abs(bucket(value) - value) <= 0.026 * value for value in range(1, 30_000, 7))
    assert bucket(0) == bucket(-1) == 0


def test_aws_takes_every_call_however_much_there_is() -> None:
    meter = BatchMeter()
    tokens = Counter({float(n): 1 for n in range(20_000)})
    many = Totals(tokens={(f"intent-{n}" * 20, "output"): tokens for n in range(12)})
    data = metric_data(meter, many, NOW, 1)
    calls = list(calls_of(data))
    assert [datum for call in calls for datum in call] == data
    shape = botocore.session.get_session().get_service_model("cloudwatch").operation_model("PutMetricData").input_shape
    assert shape is not None
    for call in calls:
        assert len(call) <= MOST_METRICS
        assert len(json.dumps(call, default=str)) <= MOST_BYTES + len(call) * 2
        assert all(0 < len(datum["Values"]) == len(datum["Counts"]) <= MOST_VALUES for datum in call)
        report = ParamValidator().validate({"Namespace": MANGA_ASSIST, "MetricData": call}, shape)
        assert not report.has_errors(), report.generate_report()
    assert by_name(data)["TokensPerIntent", "intent-0" * 20, "output"] == tokens


def test_every_metric_stands_in_the_catalogue() -> None:
    assert all(
        CATALOGUE[name].namespace == MANGA_ASSIST and CATALOGUE[name].meaning
        for name in MetricName
        if name.startswith(("Batch", "Queue", "TokensPer", "Shed", "Coalesced", "Packing"))
    )
