"""The report as a stranger meets it: complete, the same twice, and inert whatever the alarm is called."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.config import Config
from botocore.stub import ANY, Stubber
from markdown_it import MarkdownIt
from temporalio.testing import ActivityEnvironment

from activities._report_plots import marks_of, plotted_models, query_period, read
from activities.report import ReportActivities, clean, folder_name
from domain.alarms import AlarmChange
from domain.clock import RehearsalClock
from domain.incident import IncidentRecord, TimelineEntry
from domain.messages import PolicySnapshot, ReportInput
from domain.metrics import CATALOGUE, MetricName
from domain.runbooks.latency import budget
from tests.activities.records import CLOCK, at, finished_record, policy_snapshot, running_record
from tests.servers import AwsServer

if TYPE_CHECKING:
    from types_boto3_cloudwatch.client import CloudWatchClient

FAST = Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1})
UNREACHABLE = "http://127.0.0.1:9"
SONNET_ID = policy_snapshot().policy.models["sonnet"].model_id

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)><svg onload=alert(1)>',
    "</title></style><script src=https://evil.example/x.js></script>",
    "[click](javascript:alert(1)) ![i](https://evil.example/p.png) <https://evil.example> https://evil.example",
    "`code` ``` ~~~ | a | b |\n|---|---|\n# heading\n- item\n<div>\n\n    indented",
    "# heading",
    "- item",
    "1. item",
    "= under",
    "a\\|b \\<script> &lt;script&gt; $\\frac{1}{2}$ {{ 7*7 }} {% for %}",
    "\u202egnp.exe\u2066\u200f\x1b[31m\x00",
    "A" * 1_000_000,
]


def client(endpoint: str) -> "CloudWatchClient":
    """A CloudWatch client of that endpoint, which gives up soon."""
    return boto3.client(
        "cloudwatch",
        region_name="ap-northeast-1",
        endpoint_url=endpoint,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=FAST,
    )


@pytest.fixture(scope="module")
def cloudwatch(tmp_path_factory: pytest.TempPathFactory) -> Iterator["CloudWatchClient"]:
    """A real server with the metrics of the finished record: an hour and a half, with a hole of ten minutes in P99."""
    server = AwsServer(tmp_path_factory.mktemp("aws")).start()
    try:
        ready = client(server.endpoint)
        for minute in range(-10, 90):
            spike = 1 if 3 <= minute < 18 else 0
            values: list[tuple[MetricName, list[tuple[str, str]], float]] = [
                (MetricName.INVOCATION_THROTTLES, [("ModelId", SONNET_ID)], 47 * spike),
                (MetricName.TOKENS_PER_SECOND, [("Model", "sonnet")], 7_000 + 28_200 * spike),
                (MetricName.CAPACITY_TOKENS_PER_SECOND, [("Model", "sonnet")], 25_500 if minute < 18 else 33_500),
                (MetricName.CACHE_HIT_RATE, [], 15 if minute < 8 else 40),
            ]
            if not 30 <= minute < 40:
                values.append((MetricName.REQUEST_LATENCY_P99, [], 2_100 + 7_700 * spike))
            for namespace in {CATALOGUE[name].namespace for name, _, _ in values}:
                ready.put_metric_data(
                    Namespace=namespace,
                    MetricData=[
                        {
                            "MetricName": name,
                            "Dimensions": [{"Name": key, "Value": value} for key, value in dimensions],
                            "Timestamp": at(minute),
                            "Value": amount,
                        }
                        for name, dimensions, amount in values
                        if CATALOGUE[name].namespace == namespace
                    ],
                )
        yield ready
    finally:
        server.kill()


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


async def write(
    cloudwatch: "CloudWatchClient",
    folder: Path,
    record: IncidentRecord,
    snapshot: PolicySnapshot | None = None,
    now: datetime | None = None,
) -> tuple[str, str]:
    """Run the activity; the HTML and the Markdown it wrote."""
    activities = ReportActivities(cloudwatch, folder, now=lambda: now or at(40))
    request = ReportInput(record=record, snapshot=snapshot or policy_snapshot())
    result = await ActivityEnvironment().run(activities.write_report, request)
    return text_of(result.html_path), text_of(result.markdown_path)


def text_of(path: str) -> str:
    """The file's text."""
    return Path(path).read_text()


def names_below(folder: Path) -> list[str]:
    """Names of all files and folders, sorted."""
    return sorted(path.name for path in folder.rglob("*"))


def svg_of(html: str) -> ElementTree.Element:
    """The figure of a page, which must be well-formed by itself."""
    text = html[html.index("<svg") : html.index("</svg>") + len("</svg>")]
    return ElementTree.fromstring(text.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))


async def test_finished_incident_is_told_completely_and_the_same_twice(
    cloudwatch: "CloudWatchClient", tmp_path: Path
) -> None:
    html, markdown = await write(cloudwatch, tmp_path, finished_record())
    page = Page(html)
    for fact in (
        "On Monday 23 November 2026 at 00:05:12 Tokyo time alarm BedrockThrottleAlarm opened this incident",
        "cache TTL (30 s → 120 s)",
        "1 min 24 s (1.4 s real)",
        "8 units for 56 min 48 s (57 s real) = 7.6 unit-hours, about 58 USD",
        "Was the capacity sufficient for the traffic?",
        "17,664 ÷ 1,000 tokens/s per unit ÷ 80% target utilisation = 23 units.",
        "viewer-1 is viewer; approver is needed",
        "runbook; released after approve_revert by approver-1",
        "Raise the default Monday multiplier from 3x to 4x.",
        "Mon 00:48:00",
        f"{at(63):%a %H:%M:%S}.0 UTC",
        "019ab3c2-7f10-7c3e-9d55-0f2f6f1a2b3c",
        "missing: AccessDenied: cloudtrail:LookupEvents",
    ):
        assert fact in " ".join(page.text.split()), fact
    assert Page(MarkdownIt("commonmark").enable("table").render(markdown)).text.count("approve_revert") >= 3
    figure = " ".join(text for text in svg_of(html).itertext())
    for label in (
        "Throttled calls per minute",
        "sonnet: capacity",
        "limit 3,000 ms",
        "model routing set, cache TTL set",
        "capacity landed",
        "approved",
        "rejected",
        "capacity released",
        "closed",
    ):
        assert label in figure, label

    again = await write(cloudwatch, tmp_path, finished_record())
    assert again == (html, markdown)
    assert names_below(tmp_path) == [
        "incident-bedrock-throttle-sonnet-019ab3c2",
        "report.html",
        "report.md",
    ]


async def test_page_asks_nothing_of_the_network(cloudwatch: "CloudWatchClient", tmp_path: Path) -> None:
    html, _ = await write(cloudwatch, tmp_path, finished_record())
    page = Page(html)
    assert not page.tags & {"script", "link", "iframe", "img", "object", "embed", "image", "foreignobject"}
    references = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "srcset", "data")]
    assert references
    assert all(value.startswith("#") and value[1:] in page.ids for value in references)
    assert "@import" not in html
    assert all(part.startswith("#") for part in html.split("url(")[1:])


async def test_running_incident_is_reported_as_of_now(cloudwatch: "CloudWatchClient", tmp_path: Path) -> None:
    html, markdown = await write(cloudwatch, tmp_path, running_record(), now=at(40))
    for text in (" ".join(Page(html).text.split()), markdown):
        assert "open: awaiting-decision" in text
        assert "As of Mon 00:40:00" in text
        assert "waiting for an approver to approve or reject the way back" in text
        assert "it failed to set model routing (Redis refused the lease: connection refused)" in text
        assert "Held: capacity at 23 units, at most until Mon 04:00:00" in text
        assert "2.9 unit-hours, about 22 USD so far, and running" in text
        assert "4,250 tokens/s" in text  # from there on the afternoon's 8 units are cheaper than on demand
    assert "closed" not in " ".join(svg_of(html).itertext())


async def test_in_production_times_are_tokyo_and_utc_of_the_same_moment(tmp_path: Path) -> None:
    clock = RehearsalClock()
    html, _ = await write(client(UNREACHABLE), tmp_path, finished_record(clock), policy_snapshot(clock))
    text = " ".join(Page(html).text.split())
    assert "rehearsal" not in text
    assert "Mon 00:48:00 Sun 15:48:00 UTC" in text
    assert "mitigate1 min 24 s Time" in text


async def test_cloudwatch_away_costs_only_the_plots(tmp_path: Path) -> None:
    html, markdown = await write(client(UNREACHABLE), tmp_path, finished_record())
    assert "<svg" not in html
    for text in (html, markdown):
        assert "There are no plots: the metrics could not be read" in text
        assert "Recovered under load" in text


def hostile(record: IncidentRecord, text: str) -> IncidentRecord:
    """`record` with `text` in every field that comes from outside."""
    alarm = AlarmChange.model_validate(
        {**record.alarm.model_dump(), "alarm_name": text, "reason": text, "alarm_arn": text, "message_id": text}
    )
    return record.model_copy(
        update={
            "key": text,
            "incident_id": f"incident-{text}",
            "alarm": alarm,
            "diagnosis": None,
            "outcome": text,
            "recovery_detail": text,
            "acknowledged_by": text,
            "to_do": [text],
            "still_held": [text],
            "effects": [text],
            "arithmetic": [text],
            "levers": [lever.model_copy(update={"why": text, "detail": text}) for lever in record.levers],
            "checks": [check.model_copy(update={"name": text, "finding": text}) for check in record.checks],
            "decisions": [item.model_copy(update={"who": text, "why": text}) for item in record.decisions],
            "timeline": [TimelineEntry(at=record.opened_at, kind="note", text=text, who=text)],
        }
    )


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
async def test_hostile_text_is_inert(text: str, tmp_path: Path) -> None:
    plain_html, plain_markdown = await write(client(UNREACHABLE), tmp_path, hostile(finished_record(), "harmless"))
    html, markdown = await write(client(UNREACHABLE), tmp_path, hostile(finished_record(), text))
    allowed = Page(plain_html)
    found = Page(html)
    assert found.tags == allowed.tags
    assert len(found.attributes) == len(allowed.attributes)
    assert len(html) < 400_000

    render = MarkdownIt("commonmark").enable("table").enable("strikethrough")
    shown, expected = Page(render.render(markdown)), Page(render.render(plain_markdown))
    assert shown.tags == expected.tags
    assert len(shown.attributes) == len(expected.attributes)
    kinds = [token.type for token in _flat(render.parse(markdown)) if token.type not in ("text", "text_special")]
    assert kinds == [
        token.type for token in _flat(render.parse(plain_markdown)) if token.type not in ("text", "text_special")
    ]
    assert not any(token.type.startswith("html") for token in _flat(render.parse(markdown)))
    for page in (found, shown):
        assert "{{ 7*7 }}" in page.text or "7*7" not in text
        assert not set(page.text) & set("\u202e\u2066\u200f\x1b\x00")
    if text == HOSTILE[0]:
        assert text in found.text
        assert text in shown.text
    folders = {name for name in names_below(tmp_path) if not name.startswith("report.")}
    assert folders == {
        folder_name(record.incident_id, record.run_id)
        for record in (hostile(finished_record(), "harmless"), hostile(finished_record(), text))
    }
    assert all(len(name) < 120 and name.isascii() and not name.startswith((".", "-")) for name in folders)


def _flat(tokens: Any) -> list[Any]:
    return [token for outer in tokens for token in (outer, *_flat(outer.children or ()))]


@pytest.mark.parametrize("key", ["../../etc/passwd", "..", "", "東京", "a/b\\c:d", "x" * 500])
def test_folder_name_is_one_safe_component(key: str) -> None:
    name = folder_name(key, finished_record().run_id)
    assert Path(name).name == name
    assert name.endswith("-019ab3c2")
    assert len(name) <= 110


def test_cut_text_says_so() -> None:
    assert clean("é" * 5000).endswith("… (cut, 5,000 characters in all)")
    assert clean("a\n\tb\u2028c") == "a b c"


def test_every_page_of_metrics_is_read_and_gaps_stay(cloudwatch: "CloudWatchClient") -> None:
    snapshot = policy_snapshot()
    second = timedelta(seconds=1)
    series = read(cloudwatch, snapshot, ["sonnet"], at(-5), at(86), second)
    throttles = series[MetricName.INVOCATION_THROTTLES, "sonnet"]
    assert len(throttles) == 91
    assert throttles[at(5)] == 47
    p99 = series[MetricName.REQUEST_LATENCY_P99, ""]
    assert [at(minute) in p99 for minute in (29, 30, 39, 40)] == [True, False, False, True]

    paged = client(UNREACHABLE)
    with Stubber(paged) as stub:
        for token, value in (("more", 1.0), (None, 2.0)):
            answer: dict[str, Any] = {
                "MetricDataResults": [{"Id": "q0", "Timestamps": [at(value)], "Values": [value]}],
                **({"NextToken": token} if token else {}),
            }
            expected = {"MetricDataQueries": ANY, "StartTime": at(0), "EndTime": at(3), "ScanBy": "TimestampAscending"}
            stub.add_response("get_metric_data", answer, expected if token else {**expected, "NextToken": "more"})
        series = read(paged, snapshot, ["sonnet"], at(0), at(3), second)
    assert series[MetricName.INVOCATION_THROTTLES, "sonnet"] == {at(1): 1.0, at(2): 2.0}


@pytest.mark.parametrize(
    ("span", "period_seconds", "expected_seconds"),
    [(5400, 60, 60), (1440, 1, 1), (1441, 1, 5), (90_000, 60, 120), (3600 * 12, 1, 30), (3600 * 13, 1, 60)],
)
def test_long_incidents_are_read_in_coarser_periods(span: int, period_seconds: int, expected_seconds: int) -> None:
    found = query_period(timedelta(seconds=span), timedelta(seconds=period_seconds))
    assert found == timedelta(seconds=expected_seconds)


def test_figure_shows_the_incident_model_and_where_its_intents_go() -> None:
    record, snapshot = finished_record(), policy_snapshot()
    assert plotted_models(record, snapshot) == ["sonnet", "haiku"]
    assert plotted_models(record.model_copy(update={"model": None}), snapshot) == ["haiku", "sonnet"]
    assert plotted_models(record.model_copy(update={"model": "opus"}), snapshot) == []
    assert [mark.text for mark in marks_of(record)][:3] == ["alarm", "model routing set", "cache TTL set"]


async def test_labels_of_marks_neither_overlap_nor_cross(cloudwatch: "CloudWatchClient", tmp_path: Path) -> None:
    html, _ = await write(cloudwatch, tmp_path, finished_record())
    texts = {mark.text for mark in marks_of(finished_record())}
    boxes = []
    for element in svg_of(html).iter("text"):
        text = "".join(element.itertext()).strip()
        if text.split(", ")[0] in texts:
            x, y = float(element.attrib["x"]), float(element.attrib["y"])
            boxes.append((x, x + 4.9 * len(text), y))
    assert len(boxes) >= 9
    for left, _, y in boxes:
        for other_left, other_right, other_y in boxes:
            # a label to the right of another's start, within its width, stands lower: its line never crosses it
            assert not (other_left < left < other_right and y <= other_y)


def test_cost_follows_the_business_clock() -> None:
    record = finished_record()
    running = running_record()
    assert record.cost(record.capacity_held(at(86)), CLOCK, 2).usd == pytest.approx(2 * 8 * 56.8 / 60)
    assert running.cost(running.capacity_held(at(78.2)), CLOCK, None).unit_hours == pytest.approx(8)
    assert record.model_copy(update={"levers": []}).capacity_held(at(86)) == timedelta(0)


async def test_a_latency_incident_shows_its_budget_before_and_after(
    cloudwatch: "CloudWatchClient", tmp_path: Path
) -> None:
    policy = policy_snapshot().policy
    before, after = (
        budget({"gateway": 50.0, "queue wait": wait, "total": total}, "sonnet", policy)
        for wait, total in ((480.0, 4_200.0), (140.0, 2_600.0))
    )
    record = finished_record().model_copy(
        update={"runbook": "latency", "budget_before": before, "budget_after": after, "capacity_at_baseline": None}
    )
    page, text = await write(cloudwatch, tmp_path, record)
    assert "| Queue wait | 140 ms | **480 ms** | 140 ms |" in text
    assert "| Total | 3,000 ms | **4,200 ms** | 2,600 ms |" in text
    assert "| Delivery | 80 ms | no data | no data |" in text
    assert "Capacity: not touched" in text
    assert Page(page).ids.count("budget") == 1
    _, other = await write(cloudwatch, tmp_path, finished_record())
    assert "Latency budget" not in other
