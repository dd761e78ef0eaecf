"""`runbooks override` as a person types it, against a real Temporal, a real Valkey and the product's own workflow."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.worker import Worker

from activities.leases import LeaseActivities
from activities.pages import PageActivities
from activities.settings import SettingsActivities
from dataplane.connection import connect as connect_redis
from dataplane.ledger import Ledger
from domain.clock import RehearsalClock
from domain.knobs import Holder, KnobName, LeaseRequest
from domain.people import Role
from domain.policy import Policy
from ops.overrides import parse_value
from ops.service import ExitCode, OpsError, OpsService
from ops.stack import Stack
from tests.workflows.fakes import FakeCloudWatch, activities_of
from workers.settings import Settings
from workers.temporal import connect
from workflows.override import OverrideWorkflow

pytestmark = pytest.mark.asyncio(loop_scope="module")
TTL = KnobName.CACHE_TTL_SECONDS


@pytest.fixture(scope="module")
def settings(stack: Stack) -> Settings:
    env = stack.process_env()
    return Settings(
        temporal_address=stack.addresses.temporal,
        redis_url=env["RUNBOOKS_REDIS_URL"],
        roster_file=Path(env["RUNBOOKS_ROSTER_FILE"]),
        token_key_file=stack.state_dir / "token.key",
        state_dir=stack.state_dir,
        aws_endpoint_url="http://127.0.0.1:9",
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ledger(settings: Settings) -> AsyncIterator[Ledger]:
    """And a worker that carries overrides out; CloudWatch is away."""
    client = await connect(settings)
    configured = SettingsActivities(policy_file=None, roster_file=settings.roster_file, clock=RehearsalClock())
    with connect_redis(settings.redis_url) as redis, ThreadPoolExecutor(8) as threads:
        ledger = Ledger(redis)
        pages = PageActivities(None, topic_arn=None, log=settings.state_dir / "p.jsonl")  # type: ignore[arg-type]
        activities = activities_of(LeaseActivities(ledger), configured, pages, FakeCloudWatch())
        queue, workflows = settings.task_queue, [OverrideWorkflow]
        async with Worker(
            client, task_queue=queue, workflows=workflows, activities=activities, activity_executor=threads
        ):
            yield ledger


async def runbooks(stack: Stack, *arguments: str, who: Role = Role.ENGINEER) -> tuple[int | None, str, str]:
    """Runs `runbooks override`; answers exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "ops.cli", "override", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={
            **stack.process_env(),
            "COLUMNS": "200",
            "RUNBOOKS_TOKEN_FILE": str(stack.tokens[who]),
            "RUNBOOKS_AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        },
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


def value(ledger: Ledger) -> Any:
    return ledger.effective(TTL, Policy().baseline)


async def test_a_day_with_an_override(stack: Stack, ledger: Ledger) -> None:
    other = Holder(kind="incident", id="incident-bedrock-throttle:sonnet")
    request = LeaseRequest(lease_id="x", knob=TTL, value=300, holder=other, reason="throttles", duration_ms=600_000)
    ledger.acquire([request])
    asked = ("set", "cache_ttl_seconds", "120", "--for", "45m", "--reason", "release night")
    code, out, err = await runbooks(stack, *asked, "--dry-run")
    assert code == ExitCode.OK, err
    for said in ("DRY RUN", "from 1 to 3600", "held at 300 by incident-bedrock-throttle:sonnet", "calls to Bedrock"):
        assert said in out
    code, out, _ = await runbooks(stack, *asked, "--dry-run", "--json")
    preview = json.loads(out)
    assert [step["value"] for step in preview["assessment"]["course"]] == [300, 120, 30]
    assert len(ledger.leases().leases) == 1, "nothing was changed"

    code, out, _ = await runbooks(stack, *asked, "--json")
    answer = json.loads(out)
    override = answer["record"]["override_id"]
    assert (code, answer["outcome"], override[:27]) == (ExitCode.OK, "accepted", "override-cache_ttl_seconds-")
    ledger.release(["x"], other, "recovered")
    assert value(ledger) == 120

    code, out, _ = await runbooks(stack, "show", override)
    assert code == ExitCode.OK
    for said in ("IN FORCE", "cache_ttl_seconds → 120", "release night, asked by engineer@example.com", override):
        assert said in out
    code, out, _ = await runbooks(stack, "list")
    assert override in out
    code, out, _ = await runbooks(stack, "extend", override, "--by", "30m", "--why", "still busy")
    assert (code, out[:8]) == (ExitCode.OK, "accepted")
    code, out, _ = await runbooks(stack, "hand-over", override, "approver@example.com", "--why", "shift ends")
    assert code == ExitCode.OK
    assert ledger.leases().leases[0].holder.id == "approver@example.com"
    code, out, _ = await runbooks(stack, "release", override, "--why", "x", who=Role.VIEWER)
    assert (code, "approver is needed" in out) == (ExitCode.DENIED, True)
    code, out, _ = await runbooks(stack, "release", override, "--why", "x")
    assert (code, "it is approver@example.com's" in out) == (ExitCode.DENIED, True)
    code, out, _ = await runbooks(stack, "release", override, "--why", "quiet again", "--json", who=Role.APPROVER)
    assert code == ExitCode.OK
    assert "cache_ttl_seconds is 30, as configured" in json.loads(out)["message"]
    code, _, err = await runbooks(stack, "release", override, "--why", "again")
    assert (code, "The override is over (completed" in err) == (ExitCode.NOT_POSSIBLE, True)
    code, _, err = await runbooks(stack, "show", f"{override}x")
    assert (code, f"Did you mean {override}" in err) == (ExitCode.NOT_FOUND, True)


async def test_an_approval_and_a_pin(stack: Stack, ledger: Ledger) -> None:
    flag = ("feature_flag", "taste_profile=off", "--reason", "cost")
    code, out, _ = await runbooks(stack, "set", *flag, "--dry-run")
    assert (code, "It needs an approval" in out) == (ExitCode.OK, True)
    code, out, _ = await runbooks(stack, "set", *flag, "--json")
    waiting = json.loads(out)["record"]
    assert (code, waiting["phase"], waiting["value"]) == (ExitCode.OK, "awaiting-approval", {"taste_profile": False})
    code, out, _ = await runbooks(stack, "approve", waiting["override_id"], "--why", "agreed", who=Role.APPROVER)
    assert code == ExitCode.OK
    assert ledger.effective(KnobName.FEATURE_FLAG, Policy().baseline) == {"taste_profile": False}
    await runbooks(stack, "release", waiting["override_id"], "--why", "done")
    code, out, _ = await runbooks(stack, "set", *flag, "--json")
    denied = json.loads(out)["record"]["override_id"]
    code, out, _ = await runbooks(stack, "deny", denied, "--why", "not tonight", who=Role.APPROVER)
    assert code == ExitCode.OK

    pin = ("pin", "cache_ttl_seconds", "60", "--reason", "stale prices", "--json")
    code, out, _ = await runbooks(stack, *pin)
    assert (code, json.loads(out)["outcome"]) == (ExitCode.DENIED, "denied")
    code, out, _ = await runbooks(stack, *pin, who=Role.APPROVER)
    assert (code, value(ledger)) == (ExitCode.OK, 60)
    await runbooks(stack, "release", json.loads(out)["record"]["override_id"], "--why", "done", who=Role.APPROVER)
    since = datetime.now(UTC) - timedelta(minutes=5)
    assert [refusal.holder and refusal.holder.id for refusal in ledger.refusals(since)][-1] == "engineer@example.com"


@pytest.mark.parametrize(
    ("knob", "asked", "duration", "reason", "said"),
    [
        ("cache_ttl_seconds", 0, None, "x", "a whole number of seconds from 1 to 3600"),
        ("cache_ttl_seconds", -1, None, "x", "a whole number of seconds from 1 to 3600"),
        ("cache_ttl_seconds", 10**12, None, "x", "a whole number of seconds from 1 to 3600"),
        ("cache_ttl_seconds", "two minutes", None, "x", "a whole number of seconds from 1 to 3600"),
        ("model_routing", {"gossip": "haiku"}, None, "x", "there is no intent 'gossip'; there are faq"),
        ("model_routing", {"faq": "opus"}, None, "x", "haiku, sonnet"),
        ("cache_tll", 120, None, "x", "There is no knob 'cache_tll'. There are cache_ttl_seconds"),
        ("cache_ttl_seconds", 120, timedelta(0), "x", "more than 0 and at most 24 h"),
        ("cache_ttl_seconds", 120, timedelta(days=365), "x", "more than 0 and at most 24 h"),
        ("cache_ttl_seconds", 120, None, " ", "1 to 500 are"),
        ("cache_ttl_seconds", 120, None, "x" * 10_000, "1 to 500 are"),
    ],
)
async def test_bad_input_is_refused_with_what_is_allowed_and_changes_nothing(
    stack: Stack,
    settings: Settings,
    ledger: Ledger,
    knob: str,
    asked: object,
    duration: timedelta | None,
    reason: str,
    said: str,
) -> None:
    service = await OpsService.connect(settings)
    with pytest.raises(OpsError) as caught:
        await service.set_override(stack.tokens[Role.ENGINEER].read_text(), knob, asked, reason, duration)
    assert said in str(caught.value)
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.not_allowed is not None
    assert caught.value.not_allowed.field in ("knob", "name", "value", "duration", "reason")
    assert ledger.leases().leases == ()


async def test_without_a_good_token_nothing_is_asked_and_the_attempt_is_on_record(
    stack: Stack, settings: Settings, ledger: Ledger
) -> None:
    since = datetime.now(UTC)
    service = await OpsService.connect(settings)
    for token in (None, "", "not a token"):
        with pytest.raises(OpsError) as caught:
            await service.set_override(token, "cache_ttl_seconds", 120, "x")
        assert caught.value.exit_code is ExitCode.DENIED
        with pytest.raises(OpsError):
            await service.approve("bedrock-throttle:sonnet", token, "x")
    assert ledger.leases().leases == ()
    refusals = ledger.refusals(since)
    assert {one.holder for one in refusals} == {None}
    assert [(one.action, one.target) for one in refusals] == [
        ("set", "cache_ttl_seconds"),
        ("approve_revert", "incident-bedrock-throttle:sonnet"),
    ] * 3
    assert ["no token" in one.why for one in refusals] == [True] * 4 + [False] * 2

    code, out, _ = await runbooks(stack, "set", TTL, "120", "--reason", "x", "--token-file", "/dev/null", "--json")
    assert (code, "no token" in out, len(ledger.refusals(since))) == (ExitCode.DENIED, True, 7)


async def test_a_key_makes_a_repetition_the_same_override(stack: Stack, settings: Settings, ledger: Ledger) -> None:
    service = (await OpsService.connect(settings)).once("0123456789abcdef")
    engineer = stack.tokens[Role.ENGINEER].read_text()
    first, second = [await service.set_override(engineer, TTL, 120, "x") for _ in range(2)]
    assert first.record.run_id == second.record.run_id
    assert len(ledger.leases().leases) == 1
    plain = await OpsService.connect(settings)
    await plain.release_override(first.record.override_id, engineer, "done")


async def test_values_as_typed() -> None:
    typed = ("120", "on", "faq=haiku, greeting=haiku", "taste_profile=off", '{"faq": {"recent": 5, "top": 3}}', "x")
    assert [parse_value(text) for text in typed] == [
        120,
        True,
        {"faq": "haiku", "greeting": "haiku"},
        {"taste_profile": False},
        {"faq": {"recent": 5, "top": 3}},
        "x",
    ]
