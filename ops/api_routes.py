"""The operations of the ops API: the runbooks' own calls, knobs, overrides and incidents."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from activities.settings import load_policy
from dataplane.ledger import Ledger
from domain.incident import LeverName
from domain.knob_spec import Whole
from domain.knobs import AuditEntry, KnobName
from domain.messages import UpdateResult
from domain.policy import Policy
from ops.api_callers import Caller, Callers, Guarded, IdempotencyKey, derived_id
from ops.api_problems import FieldProblem, ProblemError, documented, shown
from ops.knobs import KnobView, knob_history, knobs_now
from ops.service import Incident, IncidentRow, OpsError, OpsService, parse_duration
from workers.settings import Settings

MAX_HISTORY = 1000
MAX_REASON_CHARS, MAX_WHY_CHARS = 500, 1000

READ = documented(400, 401, 403, 422, 429, 500, 503)
READ_ONE = READ | documented(404)
CHANGE = documented(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503)

_STATUS_OF_REFUSALS = {
    "denied": (403, "Ask somebody who may."),
    "not-possible": (409, "See how it stands now."),
}
R = TypeVar("R", bound=UpdateResult)

router = APIRouter(route_class=Guarded)


def _parse_span(value: object) -> timedelta:
    try:
        return parse_duration(value if isinstance(value, str) else "")
    except OpsError:
        raise ValueError("hours and minutes like 45m, 2h or 1h30m, more than 0") from None


_SPAN = {"type": "string", "pattern": "^(?=[0-9hm]*[1-9])([0-9]{1,4}h)?([0-9]{1,4}m)?$", "examples": ["45m", "1h30m"]}
Span = Annotated[timedelta, PlainValidator(_parse_span), WithJsonSchema(_SPAN)]
"""A duration in business time."""


def _takes(knob: KnobName) -> PlainValidator:
    """Says what is allowed as the knob's declaration does."""
    spec = knob.spec

    def check(value: object) -> object:
        if not spec.kind.takes(value, {}):
            raise ValueError(spec.kind.allowed(spec.unit, {}))
        return value

    return PlainValidator(check)


def _bounds(knob: KnobName) -> WithJsonSchema:
    kind = knob.spec.kind
    assert isinstance(kind, Whole)
    return WithJsonSchema({"type": "integer", "minimum": kind.minimum, "maximum": kind.maximum})


def _words(most: int) -> PlainValidator:
    def check(value: object) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= most or not value.strip():
            raise ValueError(f"a text of 1 to {most} characters that is not blank")
        return value.strip()

    return PlainValidator(
        check, json_schema_input_type=Annotated[str, Field(min_length=1, max_length=most, pattern=r"\S")]
    )


TtlSeconds = Annotated[int, _takes(KnobName.CACHE_TTL_SECONDS), _bounds(KnobName.CACHE_TTL_SECONDS)]
WindowMs = Annotated[int, _takes(KnobName.BATCH_WINDOW_MS), _bounds(KnobName.BATCH_WINDOW_MS)]
Reason = Annotated[str, _words(MAX_REASON_CHARS)]
Why = Annotated[str, _words(MAX_WHY_CHARS)]
Name = Annotated[str, Path(max_length=100, json_schema_extra={"enum": [*KnobName]}, description="The knob's name.")]
OverrideId = Annotated[str, Path(max_length=200, description="As the answer to the change names it.")]
IncidentKey = Annotated[str, Path(max_length=200, description="Key or id, e.g. `bedrock-throttle:sonnet`.")]


class Backends:
    """What the operations work with; connects to Temporal when it is first needed, so that a start does not wait."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        self._service: OpsService | None = None
        self._connecting = asyncio.Lock()

    async def service(self) -> OpsService:
        """Raises OpsError: Temporal cannot be reached."""
        async with self._connecting:
            self._service = self._service or await OpsService.connect(self.settings)
        return self._service

    def policy(self) -> Policy:
        """As it is configured now. Raises ConfigurationError."""
        return load_policy(self.settings.policy_file, self.settings.clock)


async def _service(request: Request) -> OpsService:
    backends: Backends = request.app.state.backends
    return await backends.service()


class Change:
    """One call that changes something, for the caller whose token was verified."""

    def __init__(self, request: Request, key: IdempotencyKey = None) -> None:
        self._request = request
        self._key = key
        self._caller: Caller = request.state.caller

    async def decide(self, action: Callable[[OpsService, str], Awaitable[R]], body: BaseModel) -> R:
        """The result of `action`, unless it is a refusal.

        Raises:
            ProblemError: 403 denied, which is on record; 409 not possible; 422 the idempotency key is another's.
            OpsError: as `action`.
        """
        service = await _service(self._request)
        if self._key is not None:
            callers: Callers = self._request.app.state.callers
            asked = f"{self._request.method} {self._request.url.path} {body.model_dump_json()}"
            await callers.remember(self._caller, self._key, asked)
            service = service.once(derived_id(self._caller, self._key))
        result = await action(service, self._caller.token)
        if result.outcome in _STATUS_OF_REFUSALS:
            status, next_step = _STATUS_OF_REFUSALS[result.outcome]
            raise ProblemError(status, f"{result.message.rstrip('.')}.", next_step)
        return result


ChangeOf = Annotated[Change, Depends()]


class Body(BaseModel):
    """What is sent: names that are not known are refused, so that a typo is an error."""

    model_config = ConfigDict(extra="forbid")


class Timed(Body):
    """What every change of a knob says."""

    reason: Reason
    duration: Span | None = None
    """How long, in business time; without one as long as the policy's default, never endless."""


class CacheTtl(Timed):
    """Runbook 1: serve answers from the cache for longer."""

    ttl_seconds: TtlSeconds


class ModelRouting(Timed):
    """Runbook 1: let a model answer some intents."""

    intents: Annotated[list[str], Field(min_length=1, max_length=100)]
    model: str


class BatchWindow(Timed):
    """Runbook 3: how long the batcher waits for a batch to fill."""

    batch_window_ms: WindowMs


class Decision(Body):
    """Why somebody decides; it stays in the record."""

    why: Why


class ExtendBody(Decision):
    """How much longer an incident's levers are held."""

    by: Span
    lever: LeverName | None = None
    """None: all that are held."""


class ReleaseBody(Decision):
    """Which of an incident's levers is released."""

    lever: LeverName


# ---------------------------------------------------------------- knobs


@router.get("/knobs", responses=READ, tags=["knobs"])
async def list_knobs(request: Request) -> list[KnobView]:
    """Every knob: its value in force, its baseline, and who holds it until when."""
    back: Backends = request.app.state.backends
    return await asyncio.to_thread(lambda: knobs_now(back.ledger, back.policy()))


@router.get("/knobs/{name}", responses=READ_ONE, tags=["knobs"])
async def show_knob(request: Request, name: Name) -> KnobView:
    """One knob: its value in force, its baseline, and who holds it until when."""
    knob = _knob(name)
    return next(view for view in await list_knobs(request) if view.knob is knob)


@router.get("/knobs/{name}/history", responses=READ_ONE, tags=["knobs"])
async def knob_changes(
    request: Request,
    name: Name,
    within: Annotated[Span, Query(description="How far back, in real time.")] = timedelta(days=1),
    limit: Annotated[int, Query(ge=1, le=MAX_HISTORY)] = 100,
) -> list[AuditEntry]:
    """What happened to the knob's leases: who, what, why, until when; the newest last."""
    back: Backends = request.app.state.backends
    return await asyncio.to_thread(knob_history, back.ledger, _knob(name), within, limit)


def _knob(name: str) -> KnobName:
    try:
        return KnobName(name)
    except ValueError:
        allowed = ", ".join(KnobName)
        raise ProblemError(
            404,
            f"There is no knob {shown(name)}; there are {allowed}.",
            errors=[FieldProblem(field="path name", value=shown(name), allowed=allowed)],
        ) from None


# ---------------------------------------------------------------- incidents


@router.get("/incidents", responses=READ, tags=["incidents"])
async def list_incidents(
    request: Request,
    closed_within: Annotated[Span, Query(description="Also those closed so recently.")] = timedelta(days=1),
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> list[IncidentRow]:
    """Open incidents and recently closed ones, with what each waits for."""
    return await (await _service(request)).list_incidents(closed_within, limit)


@router.get("/incidents/{incident}", responses=READ_ONE, tags=["incidents"])
async def show_incident(
    request: Request, incident: IncidentKey, run: Annotated[str | None, Query(max_length=100)] = None
) -> Incident:
    """One incident: what is wrong, what was changed, who is waited for, what comes next."""
    return await (await _service(request)).get(incident, run)


@router.post("/incidents/{incident}/approve", responses=CHANGE, tags=["incidents"])
async def approve_incident(change: ChangeOf, incident: IncidentKey, body: Decision) -> UpdateResult:
    """Approve the way back: levers are released in stages, each one guarded and watched."""
    return await change.decide(lambda service, token: service.approve(incident, token, body.why), body)


@router.post("/incidents/{incident}/reject", responses=CHANGE, tags=["incidents"])
async def reject_incident(change: ChangeOf, incident: IncidentKey, body: Decision) -> UpdateResult:
    """Keep the levers for now; the incident goes on waiting."""
    return await change.decide(lambda service, token: service.reject(incident, token, body.why), body)


@router.post("/incidents/{incident}/extend", responses=CHANGE, tags=["incidents"])
async def extend_incident(change: ChangeOf, incident: IncidentKey, body: ExtendBody) -> UpdateResult:
    """Hold one lever, or all of them, longer than their maximum hold."""
    return await change.decide(
        lambda service, token: service.extend(incident, token, body.why, body.by, body.lever), body
    )


@router.post("/incidents/{incident}/release", responses=CHANGE, tags=["incidents"])
async def release_lever(change: ChangeOf, incident: IncidentKey, body: ReleaseBody) -> UpdateResult:
    """Release one lever now, ahead of the rest."""
    return await change.decide(lambda service, token: service.release(incident, token, body.why, body.lever), body)


@router.post("/incidents/{incident}/abort", responses=CHANGE, tags=["incidents"])
async def abort_incident(change: ChangeOf, incident: IncidentKey, body: Decision) -> UpdateResult:
    """Stop the automation and give everything back; needs an approver while the service has not recovered."""
    return await change.decide(lambda service, token: service.abort(incident, token, body.why), body)


@router.post("/incidents/{incident}/acknowledge", responses=CHANGE, tags=["incidents"])
async def acknowledge_incident(change: ChangeOf, incident: IncidentKey, body: Decision) -> UpdateResult:
    """Say that somebody looks at it."""
    return await change.decide(lambda service, token: service.acknowledge(incident, token, body.why), body)
