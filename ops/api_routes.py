"""The operations of the ops API: the runbooks' own calls, knobs, overrides and incidents."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel

from activities.settings import load_policy
from dataplane.ledger import Ledger
from domain.knobs import AuditEntry, KnobName
from domain.messages import UpdateResult
from domain.override import OverrideKind
from domain.policy import Policy
from ops.api_bodies import (
    AnyKnob,
    BatchWindow,
    CacheTtl,
    Decision,
    ExtendBody,
    HandOverBody,
    Held,
    KeepBody,
    LaterBody,
    ModelRouting,
    PreviewBody,
    ReleaseBody,
    Span,
    TakeOverBody,
    Timed,
)
from ops.api_callers import Caller, Callers, Guarded, IdempotencyKey, derived_id
from ops.api_problems import FieldProblem, ProblemError, documented, shown
from ops.knobs import KnobView, knob_history, knobs_now
from ops.overrides import Override, OverrideRow, Preview
from ops.service import ExitCode, Incident, IncidentRow, OpsError, OpsService
from workers.settings import Settings

MAX_HISTORY = 1000

READ = documented(400, 401, 403, 422, 429, 500, 503)
READ_ONE = READ | documented(404)
CHANGE = documented(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503)
_STATUS_OF_REFUSALS = {
    "denied": (403, "Ask somebody who may."),
    "not-possible": (409, "See how it stands now."),
}
R = TypeVar("R", bound=UpdateResult)

router = APIRouter(route_class=Guarded)


Name = Annotated[str, Path(max_length=100, json_schema_extra={"enum": [*KnobName]}, description="The knob's name.")]
OverrideId = Annotated[
    str, Path(pattern=r"^override-[A-Za-z0-9_-]{1,190}$", description="As the answer to the change names it.")
]
IncidentKey = Annotated[
    str, Path(pattern=r"^[!-.0-~]{1,200}$", description="Key or id, e.g. `bedrock-throttle:sonnet`.")
]


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


async def service_of(request: Request) -> OpsService:
    """Raises OpsError: Temporal cannot be reached."""
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
        async with self._service_for(body) as service:
            result = await action(service, self._caller.token)
        _refuse(result)
        return result

    async def hold(
        self, response: Response, knob: str, value: object, body: Timed, fields: Mapping[str, str], *, pin: bool = False
    ) -> Held:
        """Hold `knob` at `value`; `fields` of the body gave its value and, of a map, its name. Raises as `decide`."""
        kind = OverrideKind.PIN if pin else OverrideKind.TIMED
        async with self._service_for(body) as service:
            with _named(fields):
                answer = await service.set_override(self._caller.token, knob, value, body.reason, body.duration, kind)
        record = answer.record
        done = record.in_force_since is not None
        if not done:
            _refuse(answer)
        response.status_code = 201 if done else 202
        response.headers["Location"] = f"/overrides/{record.override_id}"
        seen = record.assessment
        return Held(
            outcome="already-done" if answer.outcome == "not-possible" else "accepted",
            message=answer.message,
            override_id=record.override_id,
            lease=record.lease,
            ends_at=record.ends_at,
            effective=seen.value_now if seen and not done else record.effective,
            held_by_others=seen.conflicts if seen else [],
            impact=seen.impact.lines if seen and seen.impact else [],
            approval=seen.approval if seen else [],
            workflow=service.url(record.override_id),
        )

    @asynccontextmanager
    async def _service_for(self, body: BaseModel) -> AsyncIterator[OpsService]:
        """The service, under the request's idempotency key; one whose request is found to be wrong is not used up."""
        service = await service_of(self._request)
        if self._key is None:
            yield service
            return
        callers: Callers = self._request.app.state.callers
        asked = f"{self._request.method} {self._request.url.path} {body.model_dump_json()}"
        is_new = await callers.remember(self._caller, self._key, asked)
        try:
            yield service.once(derived_id(self._caller, self._key))
        except OpsError as error:
            if is_new and error.exit_code is ExitCode.USAGE:  # nothing was asked of a workflow
                await callers.forget(self._caller, self._key)
            raise


def _refuse(result: UpdateResult) -> None:
    if result.outcome in _STATUS_OF_REFUSALS:
        status, next_step = _STATUS_OF_REFUSALS[result.outcome]
        raise ProblemError(status, f"{result.message.rstrip('.')}.", next_step)


@contextmanager
def _named(fields: Mapping[str, str]) -> Iterator[None]:
    """What the service finds wrong, under the names that the body has for it."""
    try:
        yield
    except OpsError as error:
        if error.not_allowed is not None:
            name = error.not_allowed.field
            error.not_allowed = replace(error.not_allowed, field=fields.get(name, name))
        raise


ChangeOf = Annotated[Change, Depends()]


HOLDS: dict[str, Any] = {
    "status_code": 201,
    "responses": CHANGE | {202: {"model": Held, "description": "It waits: for an approver, or for Redis."}},
}


# ---------------------------------------------------------------- the runbooks' own calls


@router.post("/cache/ttl", **HOLDS, tags=["runbooks"])
async def set_cache_ttl(change: ChangeOf, response: Response, body: CacheTtl) -> Held:
    """Runbook 1: hold the cache TTL at a value, for a time."""
    return await change.hold(response, KnobName.CACHE_TTL_SECONDS, body.ttl_seconds, body, {"value": "ttl_seconds"})


@router.post("/model-routing/override", **HOLDS, tags=["runbooks"])
async def override_model_routing(change: ChangeOf, response: Response, body: ModelRouting) -> Held:
    """Runbook 1: let a model answer some intents, for a time."""
    value = dict.fromkeys(body.intents, body.model)
    return await change.hold(response, KnobName.MODEL_ROUTING, value, body, {"name": "intents", "value": "model"})


@router.post("/config/batch-window", **HOLDS, tags=["runbooks"])
async def set_batch_window(change: ChangeOf, response: Response, body: BatchWindow) -> Held:
    """Runbook 3: hold the batch window at a value, for a time."""
    return await change.hold(
        response, KnobName.BATCH_WINDOW_MS, body.batch_window_ms, body, {"value": "batch_window_ms"}
    )


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


# ---------------------------------------------------------------- overrides


@router.get("/overrides", responses=READ, tags=["overrides"])
async def list_overrides(
    request: Request,
    closed_within: Annotated[Span, Query(description="Also those closed so recently.")] = timedelta(days=1),
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> list[OverrideRow]:
    """Open overrides, the first to end first, and recently closed ones."""
    return await (await service_of(request)).list_overrides(closed_within, limit)


@router.post("/overrides", **HOLDS, tags=["overrides"])
async def set_override(change: ChangeOf, response: Response, body: AnyKnob) -> Held:
    """Hold any knob at a value for a time, or pin it there."""
    return await change.hold(response, body.knob, body.value, body, {"name": "value"}, pin=body.pin)


@router.post("/overrides/preview", responses=CHANGE, tags=["overrides"])
async def preview_override(request: Request, body: PreviewBody) -> Preview:
    """What it would do: other leases, the values in force until when, the impact. Changes nothing."""
    kind = OverrideKind.PIN if body.pin else OverrideKind.TIMED
    with _named({"name": "value"}):
        return await (await service_of(request)).preview_override(body.knob, body.value, body.duration, kind)


@router.get("/overrides/{override}", responses=READ_ONE, tags=["overrides"])
async def show_override(request: Request, override: OverrideId) -> Override:
    """One override: what it holds, for whom, until when, and all that happened to it."""
    return await (await service_of(request)).get_override(override)


@router.post("/overrides/{override}/extend", responses=CHANGE, tags=["overrides"])
async def extend_override(change: ChangeOf, override: OverrideId, body: LaterBody) -> UpdateResult:
    """Move its end, or its review date, later."""
    return await change.decide(lambda service, token: service.extend_override(override, token, body.why, body.by), body)


@router.post("/overrides/{override}/release", responses=CHANGE, tags=["overrides"])
async def release_override(change: ChangeOf, override: OverrideId, body: Decision) -> UpdateResult:
    """Give the knob back now, or withdraw what waits for an approval."""
    return await change.decide(lambda service, token: service.release_override(override, token, body.why), body)


@router.post("/overrides/{override}/hand-over", responses=CHANGE, tags=["overrides"])
async def hand_over_override(change: ChangeOf, override: OverrideId, body: HandOverBody) -> UpdateResult:
    """Give it to another owner."""
    return await change.decide(
        lambda service, token: service.hand_over_override(override, token, body.why, body.to), body
    )


@router.post("/overrides/{override}/approve", responses=CHANGE, tags=["overrides"])
async def approve_override(change: ChangeOf, override: OverrideId, body: Decision) -> UpdateResult:
    """Agree to it; whoever asked for it cannot."""
    return await change.decide(lambda service, token: service.approve_override(override, token, body.why), body)


@router.post("/overrides/{override}/deny", responses=CHANGE, tags=["overrides"])
async def deny_override(change: ChangeOf, override: OverrideId, body: Decision) -> UpdateResult:
    """Say no to it."""
    return await change.decide(lambda service, token: service.deny_override(override, token, body.why), body)


# ---------------------------------------------------------------- incidents


@router.get("/incidents", responses=READ, tags=["incidents"])
async def list_incidents(
    request: Request,
    closed_within: Annotated[Span, Query(description="Also those closed so recently.")] = timedelta(days=1),
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> list[IncidentRow]:
    """Open incidents and recently closed ones, with what each waits for."""
    return await (await service_of(request)).list_incidents(closed_within, limit)


@router.get("/incidents/{incident}", responses=READ_ONE, tags=["incidents"])
async def show_incident(
    request: Request, incident: IncidentKey, run: Annotated[str | None, Query(max_length=100)] = None
) -> Incident:
    """One incident: what is wrong, what was changed, who is waited for, what comes next."""
    return await (await service_of(request)).get(incident, run)


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


@router.post("/incidents/{incident}/keep", responses=CHANGE, tags=["incidents"])
async def keep_lever(change: ChangeOf, incident: IncidentKey, body: KeepBody) -> UpdateResult:
    """Turn one lever into a standing override of the caller, with a review date."""
    return await change.decide(
        lambda service, token: service.keep_lever(incident, token, body.why, body.lever, body.review_in), body
    )


@router.post("/incidents/{incident}/take-over", responses=CHANGE, tags=["incidents"])
async def take_over_incident(change: ChangeOf, incident: IncidentKey, body: TakeOverBody) -> UpdateResult:
    """Stop the automation; the levers stay with a person until a stated end."""
    return await change.decide(
        lambda service, token: service.take_over(incident, token, body.why, body.duration, body.to), body
    )
