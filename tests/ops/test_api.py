"""The ops API as a process of its own, with a real Temporal, Redis, AWS simulator and worker behind it."""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import schemathesis
from hypothesis import Phase, given, settings
from hypothesis.strategies import booleans
from schemathesis import GenerationMode
from schemathesis.core.parameters import ParameterLocation
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from domain.knobs import KnobName
from domain.messages import INCIDENT_WORKFLOW, incident_id
from domain.people import Role
from domain.policy import Policy
from ops.api import create_app
from ops.api_callers import MAX_BODY_BYTES
from ops.stack import TOKYO, Stack, StackOptions
from ops.tokens import issue
from tests.servers import free_port
from tests.stand_in import StandIn, a_record
from workers.settings import Settings
from workers.temporal import connect
from workers.tokens import read_key

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPEED = 60
QUIET = datetime(2026, 11, 30, 8, tzinfo=TOKYO)
"""A business time at which no release brings an incident of its own."""
OPAQUE = "0123456789abcdef" * 4


@dataclass
class Api:
    """A running stack with the API, and people who call it."""

    stack: Stack
    settings: Settings
    ledger: Ledger
    http: httpx.AsyncClient

    def bearer(self, role: Role) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.stack.tokens[role].read_text()}"}

    async def get(self, path: str, role: Role = Role.VIEWER, **query: str) -> httpx.Response:
        return await self.http.get(path, headers=self.bearer(role), params=query)

    async def post(
        self, path: str, body: object, role: Role = Role.ENGINEER, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """As `curl -d` does: JSON that says it is a form."""
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        content = body if isinstance(body, (str, bytes)) else json.dumps(body)
        return await self.http.post(path, content=content, headers={**self.bearer(role), **form, **(headers or {})})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    limits = {f"RUNBOOKS_API_{kind}_PER_MINUTE": "100000" for kind in ("READS", "CHANGES", "REFUSALS")}
    folder = tmp_path_factory.mktemp("state")
    policy = folder / "policy.yaml"
    policy.write_text("batcher: {controller: fixed}\nknobs: {batch_window_ms: 150}")  # as in scenario 3
    limits["RUNBOOKS_POLICY_FILE"] = str(policy)
    options = StackOptions(state_dir=folder, usual_ports=False, api=True, speed=SPEED, business_start=QUIET, env=limits)
    async with Stack(options, say=lambda _: None) as stack:
        roster = folder / "roster.yaml"
        hashed = sha256(OPAQUE.encode()).hexdigest()
        robot = "robot@example.com"
        roster.write_text(f"{roster.read_text()}  {robot}: engineer\napi_tokens:\n  {hashed}: {robot}\n")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in stack.env.items():
                patch.setenv(name, value)
            settings = Settings()
        with connect_redis(settings.redis_url) as connection:
            async with httpx.AsyncClient(base_url=stack.addresses.api_url, timeout=30) as http:
                yield Api(stack, settings, Ledger(connection), http)


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem that `answer` is."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = answer.json()
    assert (found["type"], found["status"]) == ("about:blank", status)
    assert found["request_id"] == answer.headers["x-request-id"]
    assert found["detail"]
    assert "Traceback" not in answer.text
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def incident(api: Api) -> AsyncIterator[str]:
    """The key of an incident that waits for a decision."""
    client = await connect(api.settings)
    key, queue = "bedrock-throttle:stand-in", "stand-in"
    runner = UnsandboxedWorkflowRunner()
    async with Worker(client, task_queue=queue, workflows=[StandIn], workflow_runner=runner):
        await client.start_workflow(INCIDENT_WORKFLOW, a_record(key), id=incident_id(key), task_queue=queue)
        yield key


# ---------------------------------------------------------------- who calls


async def test_only_health_and_the_document_are_open(api: Api) -> None:
    assert (await api.http.get("/healthz")).json() == {"status": "ok"}
    assert (await api.http.get("/readyz")).json() == {"status": "ok"}
    document = (await api.http.get("/openapi.json")).json()
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for path, operations in document["paths"].items():
        assert all(f"/{part}" in page or f"`{part}`" in page for part in path.split("/")[1:] if "{" not in part), path
        for method, operation in operations.items():
            is_open = path in ("/healthz", "/readyz")
            assert ("security" in operation) != is_open
            answer = await api.http.request(method, path.replace("{", "").replace("}", ""))
            if not is_open:
                assert "no bearer token" in problem(answer, 401)["detail"], path
                assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_a_token_that_is_wrong_or_has_no_role_is_refused_and_on_record(api: Api) -> None:
    since = datetime.now(UTC)
    key = read_key(api.stack.state_dir / "token.key")
    refused = {
        "rubbish": (401, "the roster does not know it"),
        issue(b"k" * 32, "admin@example.com", timedelta(hours=1)): (401, "another key"),
        issue(key, "engineer@example.com", timedelta(seconds=-1)): (401, "has expired"),
        issue(key, "stranger@example.com", timedelta(hours=1)): (403, "stranger@example.com is not in the roster"),
        issue(key, "x" * 300, timedelta(hours=1)): (403, "is not in the roster"),
    }
    for token, (status, said) in refused.items():
        headers = {"Authorization": f"Bearer {token}"}
        assert said in problem(await api.http.get("/knobs", headers=headers), status)["detail"]
        answer = await api.http.post("/incidents/any/approve", json={"why": "x"}, headers=headers)
        assert said in problem(answer, status)["detail"]
    basic = {"Authorization": "Basic cm9vdDpyb290"}
    problem(await api.http.get("/knobs", headers=basic), 401)

    entries = [entry for entry in api.ledger.refusals(since) if entry.target == "/incidents/any/approve"]
    assert [entry.holder and entry.holder.id for entry in entries][:4] == [None, None, None, "stranger@example.com"]
    assert "another key" in entries[1].why


async def test_an_opaque_token_works_until_its_line_goes(api: Api) -> None:
    roster = api.stack.state_dir / "roster.yaml"
    headers = {"Authorization": f"bearer {OPAQUE}"}
    assert (await api.http.get("/knobs", headers=headers)).status_code == 200
    before = roster.read_text()
    roster.write_text(before.partition("api_tokens")[0])
    try:
        problem(await api.http.get("/knobs", headers=headers), 401)
        roster.write_text("people: nobody")
        assert "roster" in problem(await api.get("/knobs"), 503)["detail"]
        assert "roster" in problem(await api.http.get("/readyz"), 503)["detail"]
    finally:
        roster.write_text(before)


# ---------------------------------------------------------------- what every answer has


async def test_request_ids_come_back(api: Api) -> None:
    answer = await api.http.get("/healthz", headers={"X-Request-Id": "from-the-proxy:1"})
    assert answer.headers["x-request-id"] == "from-the-proxy:1"
    given = await api.http.get("/healthz", headers={"X-Request-Id": 'a"} {"event": "forged'})
    assert given.headers["x-request-id"].isalnum()
    assert answer.headers["cache-control"] == "no-store"
    logged = [json.loads(line) for line in api.stack.log("api").read_text().splitlines()]
    [line] = [line for line in logged if line.get("request_id") == "from-the-proxy:1"]
    assert (line["method"], line["path"], line["status"]) == ("GET", "/healthz", 200)
    assert OPAQUE not in api.stack.log("api").read_text()


async def test_errors_of_every_kind_are_problems(api: Api, incident: str) -> None:
    path = f"/incidents/{incident}/approve"
    assert "/openapi.json" in problem(await api.get("/nothing"), 404)["next_step"]
    answer = await api.http.put("/knobs", headers=api.bearer(Role.ADMIN))
    assert "GET is" in problem(answer, 405)["detail"]
    assert answer.headers["allow"] == "GET"
    said = problem(await api.post(path, b" " * (MAX_BODY_BYTES + 1)), 413)["detail"]
    assert str(MAX_BODY_BYTES) in said

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * (MAX_BODY_BYTES // 10)

    problem(await api.http.post(path, content=endless(), headers=api.bearer(Role.ENGINEER)), 413)
    problem(await api.post(path, {"why": "x"}, headers={"Content-Encoding": "gzip"}), 415)
    for body in ("", "{", "why=x", "[" * 20_000, '{"why": NaN}', '{"why": "a", "why": "b"}', b"\xff"):
        assert "is no JSON" in problem(await api.post(path, body), 400)["detail"]
    for body in ("1", "null", "[]", '"x"'):
        assert problem(await api.post(path, body), 422)["errors"][0]["field"] == "body"
    [nothing, other] = problem(await api.post(path, {"because": "x"}), 422)["errors"]
    assert (nothing["field"], other["field"]) == ("why", "because")
    found = problem(await api.get("/knobs/volume"), 404)
    assert found["errors"][0]["value"] == "volume"
    assert "cache_ttl_seconds" in found["errors"][0]["allowed"]
    found = problem(await api.get("/incidents", closed_within="0m", limit="501"), 422)
    assert [error["field"] for error in found["errors"]] == ["query closed_within", "query limit"]
    assert problem(await api.get("/incidents", limti="5"), 422)["errors"][0]["allowed"] == "closed_within, limit"
    assert "Did you mean" in problem(await api.get("/incidents/bedrock-throtle:stand-in"), 404)["next_step"]


async def test_too_many_requests_are_refused_for_that_caller_alone(api: Api) -> None:
    limits = {"api_reads_per_minute": 3, "api_changes_per_minute": 1, "api_refusals_per_minute": 2}
    app = create_app(api.settings.model_copy(update=limits))
    transport = httpx.ASGITransport(app)
    left_seconds = 60 - time.time() % 60
    if left_seconds < 10:
        await asyncio.sleep(left_seconds)  # the limiter forgets some at a full minute
    async with httpx.AsyncClient(transport=transport, base_url="http://ops.example.com") as http:

        async def statuses(times: int, method: str, role: Role | None) -> list[int]:
            headers = api.bearer(role) if role else {}
            return [(await http.request(method, "/knobs", headers=headers)).status_code for _ in range(times)]

        assert await statuses(4, "GET", Role.VIEWER) == [200, 200, 200, 429]
        assert await statuses(1, "GET", Role.ENGINEER) == [200]
        assert await statuses(3, "GET", None) == [401, 401, 429]
        assert await statuses(1, "GET", Role.APPROVER) == [200]
        answer = await http.get("/knobs", headers=api.bearer(Role.VIEWER))
        assert "3 reads a minute" in problem(answer, 429)["detail"]
        assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_what_is_away_is_named(api: Api, tmp_path: Path) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    settings = api.settings.model_copy(update={"temporal_address": nowhere, "redis_url": f"redis://{nowhere}/0"})
    transport = httpx.ASGITransport(create_app(settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://ops.example.com") as http:
        headers = api.bearer(Role.ENGINEER)
        assert (await http.get("/healthz")).status_code == 200
        assert problem(await http.get("/readyz"), 503)["detail"] == "Not usable now: Temporal, Redis."
        answer = await http.get("/knobs", headers=headers)
        assert "Redis" in problem(answer, 503)["detail"]
        assert answer.headers["retry-after"]
        assert nowhere in problem(await http.get("/incidents", headers=headers), 503)["detail"]
        problem(await http.post("/incidents/any/approve", json={"why": "x"}), 401)

    broken = tmp_path / "policy.yaml"
    broken.write_text("cache_ttl_seconds: 0")
    transport = httpx.ASGITransport(create_app(api.settings.model_copy(update={"policy_file": broken})))
    async with httpx.AsyncClient(transport=transport, base_url="http://ops.example.com") as http:
        body = {"ttl_seconds": 60, "reason": "x"}
        for answer in (
            await http.get("/knobs", headers=headers),
            await http.post("/cache/ttl", json=body, headers=headers),
        ):
            assert "policy" in problem(answer, 503)["detail"]
            assert str(tmp_path) not in answer.text


# ---------------------------------------------------------------- incidents


async def test_incidents_are_seen_and_decided_as_with_the_command_line(api: Api, incident: str) -> None:
    rows = (await api.get("/incidents")).json()
    assert [row["waiting_for"] for row in rows if row["key"] == incident] == ["an approver"]
    found = (await api.get(f"/incidents/{incident}")).json()
    assert found["record"]["levers"][0]["after"] == "120 s"

    said = problem(await api.post(f"/incidents/{incident}/approve", {"why": "x"}, Role.VIEWER), 403)
    assert "approver is needed" in said["detail"]
    problem(await api.post(f"/incidents/{incident}/abort", {"why": "x"}), 409)
    body = {"why": "busy", "by": "1h30m", "lever": "capacity"}
    answer = await api.post(f"/incidents/{incident}/extend", body)
    by = timedelta(minutes=90) / SPEED
    assert answer.json() == {"outcome": "already-done", "message": f"capacity by {by} for engineer@example.com"}
    body = {"why": "the new normal", "lever": "cache_ttl_seconds", "review_in": "48h"}
    answer = await api.post(f"/incidents/{incident}/keep", body, Role.APPROVER)
    assert answer.json()["message"] == f"cache_ttl_seconds, review in {timedelta(hours=48) / SPEED}"
    body = {"why": "ours now", "duration": "2h", "to": "approver@example.com"}
    answer = await api.post(f"/incidents/{incident}/take-over", body)
    taken = f"approver@example.com for {timedelta(hours=2) / SPEED} by engineer@example.com"
    assert answer.json() == {"outcome": "accepted", "message": taken}
    assert "stale" not in problem(await api.post(f"/incidents/{incident}/approve", {"why": "stale"}), 409)["detail"]


async def test_a_decision_with_a_key_is_carried_out_once(api: Api, incident: str) -> None:
    key = {"Idempotency-Key": "decision-1"}
    path = f"/incidents/{incident}/extend"
    first = await api.post(path, {"why": "busy", "by": "2h"}, headers=key)
    again = await api.post(path, '{"by": "2h",  "why": "busy"}', headers=key)
    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    found = problem(await api.post(path, {"why": "busy", "by": "3h"}, headers=key), 422)
    assert found["errors"][0]["field"] == "header Idempotency-Key"
    problem(await api.post(f"/incidents/{incident}/reject", {"why": "busy"}, headers=key), 422)
    assert (await api.post(path, {"why": "busy", "by": "3h"}, Role.APPROVER, headers=key)).status_code == 200
    problem(await api.post(path, {"why": "busy", "by": "3h"}, headers={"Idempotency-Key": "x" * 201}), 422)


# ---------------------------------------------------------------- the runbooks' calls


async def test_the_runbooks_calls_hold_a_knob_and_give_it_back_by_themselves(api: Api) -> None:
    calls: dict[KnobName, tuple[str, dict[str, object], object]] = {
        KnobName.CACHE_TTL_SECONDS: ("/cache/ttl", {"ttl_seconds": 120}, 120),
        KnobName.MODEL_ROUTING: (
            "/model-routing/override",
            {"intents": ["faq", "greeting"], "model": "haiku"},
            {"faq": "haiku", "greeting": "haiku"},
        ),
        KnobName.BATCH_WINDOW_MS: ("/config/batch-window", {"batch_window_ms": 100}, 100),
    }
    for knob, (path, body, value) in calls.items():
        answer = await api.post(path, body | {"reason": "throttle_mitigation", "duration": "2m"})
        assert answer.status_code == 201, answer.text
        held = answer.json()
        assert (held["lease"]["knob"], held["lease"]["value"]) == (knob, value)
        assert held["lease"]["holder"] == {"kind": "person", "id": "engineer@example.com"}
        assert any("calls to Bedrock" in line for line in held["impact"])
        location = answer.headers["location"]
        assert held["workflow"].endswith(location.rpartition("/")[2])
        found = (await api.get(f"/knobs/{knob}")).json()
        assert found["value"] == held["effective"]
        shown = (await api.get(location)).json()
        assert shown["record"]["reason"] == "throttle_mitigation"
        lasts = datetime.fromisoformat(held["ends_at"]) - datetime.fromisoformat(shown["record"]["asked_at"])
        assert timedelta(minutes=2) / SPEED <= lasts < timedelta(seconds=10)

        async def ended(location: str = location) -> bool:
            return bool((await api.get(location)).json()["record"]["phase"] == "ended")

        await until(ended)
        found = (await api.get(f"/knobs/{knob}")).json()
        assert (found["value"], found["leases"]) == (found["baseline"], [])
        history = (await api.get(f"/knobs/{knob}/history", within="1h")).json()
        assert history[0]["action"] == "acquired"
        assert history[-1]["action"] in ("released", "expired")


async def test_without_a_duration_the_policy_says_how_long(api: Api) -> None:
    answer = await api.post("/cache/ttl", {"ttl_seconds": 60, "reason": "x"})
    held = answer.json()
    path = answer.headers["location"]
    since = datetime.fromisoformat((await api.get(path)).json()["record"]["in_force_since"])
    lasts = datetime.fromisoformat(held["ends_at"]) - since
    assert abs(lasts - Policy().overrides.default_duration / SPEED) < timedelta(seconds=10)
    rows = (await api.get("/overrides")).json()
    assert [row["knob"] for row in rows if row["override_id"] == held["override_id"]] == ["cache_ttl_seconds"]

    await decided(api, f"{path}/extend", {"why": "still busy", "by": "30m"})
    await decided(api, f"{path}/hand-over", {"why": "end of my day", "to": "approver@example.com"})
    assert (await api.get(path)).json()["record"]["owner"] == "approver@example.com"
    problem(await api.post(f"{path}/release", {"why": "curious"}, Role.VIEWER), 403)
    await decided(api, f"{path}/release", {"why": "calm again"}, Role.APPROVER)
    assert (await api.get("/knobs/cache_ttl_seconds")).json()["leases"] == []
    problem(await api.post(f"{path}/release", {"why": "again"}, Role.APPROVER), 409)


async def test_a_change_that_needs_an_approver_waits_for_one(api: Api) -> None:
    body = {"batch_window_ms": 1000, "reason": "latency_regression", "duration": "10m"}
    preview = {"knob": "batch_window_ms", "value": 1000, "duration": "10m"}
    seen = await api.post("/overrides/preview", preview)
    assert seen.status_code == 200, seen.text
    needs = seen.json()["assessment"]["approval"]
    assert needs
    answer = await api.post("/config/batch-window", body)
    assert answer.status_code == 202, answer.text
    held = answer.json()
    assert (held["lease"], held["ends_at"], held["effective"]) == (None, None, 150)
    asked_for = [[re.sub(r"[\d,]+ ms", "", why) for why in whys] for whys in (held["approval"], needs)]
    assert asked_for[0] == asked_for[1], "but for what was measured meanwhile"
    assert (await api.get("/knobs/batch_window_ms")).json()["leases"] == []
    path = answer.headers["location"]
    problem(await api.post(f"{path}/approve", {"why": "I asked"}), 403)
    await decided(api, f"{path}/approve", {"why": "go on"}, Role.APPROVER)
    await decided(api, f"{path}/release", {"why": "enough"})


async def test_a_pin_outranks_the_merge_and_needs_an_approver(api: Api) -> None:
    body = {"knob": "cache_ttl_seconds", "value": 45, "reason": "stale prices", "duration": "30m", "pin": True}
    problem(await api.post("/overrides", body), 403)
    pinned = await api.post("/overrides", body, Role.APPROVER)
    lower = await api.post("/cache/ttl", {"ttl_seconds": 300, "reason": "throttle_mitigation"})
    assert (pinned.status_code, lower.status_code) == (201, 201)
    assert lower.json()["effective"] == 45
    for answer, role in ((pinned, Role.APPROVER), (lower, Role.ENGINEER)):
        await decided(api, f"{answer.headers['location']}/release", {"why": "done"}, role)


async def test_bad_input_is_refused_with_what_is_allowed_and_changes_nothing(api: Api) -> None:
    ttl, routing, window = "/cache/ttl", "/model-routing/override", "/config/batch-window"
    before = (await api.get("/knobs")).json()
    why: dict[str, object] = {"reason": "x"}
    faq = why | {"intents": ["faq"]}
    refused: list[tuple[str, Mapping[str, object], str, str]] = [
        *(
            (ttl, why | {"ttl_seconds": bad}, "ttl_seconds", "from 1 to 3600")
            for bad in (0, -1, 10**12, 1.5, True, None)
        ),
        (ttl, why | {"ttl_seconds": "two minutes"}, "ttl_seconds", "a whole number of seconds from 1 to 3600"),
        (window, why | {"batch_window_ms": 1001}, "batch_window_ms", "from 0 to 1000"),
        (routing, why | {"intents": ["faq", "horoscope"], "model": "haiku"}, "intents", "greeting"),
        (routing, faq | {"model": "gpt"}, "model", "haiku, sonnet"),
        (routing, why | {"intents": [], "model": "haiku"}, "intents", "at least 1"),
        (routing, why | {"intents": "faq", "model": "haiku"}, "intents", "valid list"),
        *(
            (ttl, why | {"ttl_seconds": 60, "duration": bad}, "duration", "more than 0")
            for bad in ("0m", "", "-5m", 45)
        ),
        (ttl, why | {"ttl_seconds": 60, "duration": "8760h"}, "duration", "at most 24 h"),
        *(
            (ttl, {"ttl_seconds": 60, "reason": bad}, "reason", "1 to 500 characters")
            for bad in ("", " ", "x" * 10_000, 7)
        ),
        (ttl, {"ttl_seconds": 60}, "reason", "not to leave it out"),
        ("/overrides", why | {"knob": "volume", "value": 11}, "knob", "cache_ttl_seconds"),
        ("/overrides", why | {"knob": "request_coalescing", "value": "on"}, "value", "true or false"),
        ("/overrides", why | {"knob": "max_output_tokens", "value": {"faq": 0}}, "value", "from 1 to 4096"),
    ]
    for path, body, field, allowed in refused:
        found = problem(await api.post(path, body), 422)
        [error] = found["errors"]
        assert error["field"] == field, (body, found)
        assert allowed in error["allowed"], (body, found)
    assert (await api.get("/knobs")).json() == before
    found = problem(await api.post(routing, why | {"intents": ["faq", "horoscope"], "model": "haiku"}), 422)
    assert found["errors"][0]["value"] == "horoscope", "what is wrong of it"
    preview = {"knob": "cache_ttl_seconds", "value": 0}
    assert problem(await api.post("/overrides/preview", preview), 422)["errors"][0]["field"] == "value"

    since = datetime.now(UTC)
    said = problem(await api.post(ttl, {"ttl_seconds": 60, "reason": "x"}, Role.VIEWER), 403)
    assert "engineer is needed" in said["detail"]
    assert [entry.holder.id for entry in api.ledger.refusals(since) if entry.holder] == ["viewer@example.com"]
    assert (await api.get("/knobs")).json() == before


async def test_a_change_with_a_key_is_made_once(api: Api) -> None:
    key, body = {"Idempotency-Key": "change-1"}, {"ttl_seconds": 90, "reason": "x", "duration": "30m"}
    first, again = await asyncio.gather(*(api.post("/cache/ttl", body, headers=key) for _ in range(2)))
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert len((await api.get("/knobs/cache_ttl_seconds")).json()["leases"]) == 1
    problem(await api.post("/cache/ttl", body | {"ttl_seconds": 91}, headers=key), 422)
    assert (await api.post("/cache/ttl", body, headers=key)).json() == first.json(), "still the first request's"
    path = first.headers["location"]
    for _ in range(2):
        answer = await api.post(f"{path}/release", {"why": "done"}, headers={"Idempotency-Key": "change-2"})
        assert (answer.status_code, answer.json()["outcome"]) == (200, "accepted"), answer.text
    later = await api.post("/cache/ttl", body, headers=key)
    assert (later.status_code, later.json()["outcome"]) == (201, "already-done")
    assert later.headers["location"] == path

    for wrong in ({"duration": "8760h"}, {"ttl_seconds": 0}, {"duration": "later"}):
        problem(await api.post("/cache/ttl", body | wrong, headers={"Idempotency-Key": "change-3"}), 422)
    mended = await api.post("/cache/ttl", body, headers={"Idempotency-Key": "change-3"})
    assert mended.status_code == 201, "what was found to be wrong has not used up the key"
    await decided(api, f"{mended.headers['location']}/release", {"why": "done"})
    assert (await api.get("/knobs/cache_ttl_seconds")).json()["leases"] == []


# ---------------------------------------------------------------- everything else


async def test_whatever_is_sent_is_answered_as_the_document_says(api: Api, incident: str) -> None:
    held = (await api.post("/cache/ttl", {"ttl_seconds": 60, "reason": "x"})).json()
    known = {"override": held["override_id"], "incident": incident, "model": "sonnet"}
    headers = api.bearer(Role.ADMIN)
    seen: Counter[int] = Counter()

    def fuzz() -> None:
        schema = schemathesis.openapi.from_url(f"{api.stack.addresses.api_url}/openapi.json")
        for found in schema.get_all_operations():
            assert isinstance(found, Ok)
            operation = found.ok()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                if mode is GenerationMode.NEGATIVE and operation.path in ("/healthz", "/readyz"):
                    continue  # nothing can be wrong there

                @given(case=operation.as_strategy(generation_mode=mode), real=booleans())
                @settings(max_examples=8, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
                def whatever(case: schemathesis.Case[Any], real: bool) -> None:
                    if real:
                        case.path_parameters |= {name: known[name] for name in case.path_parameters if name in known}
                    answer = case.call(headers=headers)
                    seen[answer.status_code] += 1
                    # What the policy says, such as which intents there are, stands in no schema.
                    excluded: list[Any] = [positive_data_acceptance]
                    assert case.meta is not None
                    wrong = {place for place, part in case.meta.components.items() if part.mode.is_negative}
                    if wrong <= {ParameterLocation.PATH, ParameterLocation.HEADER}:
                        excluded.append(negative_data_rejection)  # a name and a token of ours may have taken its place
                    case.validate_response(answer, headers=headers, excluded_checks=excluded)

                whatever()

    await asyncio.to_thread(fuzz)
    assert {200, 201, 400, 401, 404, 409, 422} <= seen.keys(), seen
    assert not [status for status in seen if status >= 500]


async def decided(api: Api, path: str, body: object, role: Role = Role.ENGINEER) -> None:
    answer = await api.post(path, body, role)
    assert (answer.status_code, answer.json()["outcome"]) == (200, "accepted"), answer.text


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    give_up_at = time.monotonic() + 40
    while not await condition():
        assert time.monotonic() < give_up_at, "did not happen in time"
        await asyncio.sleep(0.1)
