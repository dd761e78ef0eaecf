"""The batcher as it is configured: policy, knobs, routes, cache and core put together.

Embed it (`docs/batcher.md` has it in ten lines), or serve it over HTTP.
"""

import asyncio
import logging
import math
from collections.abc import Mapping

from dataplane.batcher import Batcher, IntentPlan, Limits
from dataplane.control_state import ControlState
from dataplane.meter import BatchMeter
from dataplane.packing_guard import PackingGuard
from dataplane.response_cache import ResponseCache
from dataplane.sending import Backend, ModelTargets, Sending, Target
from domain.batching import Answer, Refusal, Request, RequestRefused, Strategy
from domain.knob_spec import Whole
from domain.knobs import KnobName
from domain.policy import Policy
from domain.windows import FixedWindow, SloWindow, TableRow, TableWindow, WindowController

_PUBLIC = "public"
"""The one group of intents whose requests may share a packed call: those free of personal data."""

_log = logging.getLogger(__name__)


class BatcherService:
    """Answers requests. Made inside the running loop; `drain` ends it."""

    def __init__(
        self,
        policy: Policy,
        backend: Backend,
        control: ControlState,
        cache: ResponseCache | None = None,
        meter: BatchMeter | None = None,
    ) -> None:
        self.policy = policy
        self.meter = meter or BatchMeter()
        self._control = control
        self._cache = cache
        self._loop = asyncio.get_running_loop()
        settings = policy.batcher
        self._plans = {name: IntentPlan(intent.strategy, _PUBLIC) for name, intent in policy.intents.items()}
        self._cacheable = {
            name
            for name, intent in policy.intents.items()
            if not intent.personal_data and intent.strategy is not Strategy.PASS
        }
        self._asking: set[tuple[str, str, int, str]] = set()
        guard = PackingGuard(
            max_lost_share=settings.max_lost_share,
            lost_of=settings.lost_of,
            pass_seconds=settings.pass_for.total_seconds(),
            switch=self._switch,
        )
        models, may_fall_back = _targets(policy)
        sending = Sending(self.meter.watched(backend), control.routes, models, may_fall_back, guard.packed)
        limits = Limits(
            slots=settings.slots,
            max_pending=settings.max_pending,
            max_wait_seconds=settings.max_slot_wait.total_seconds(),
            burst_seconds=settings.task_burst.total_seconds(),
        )
        self.core = Batcher(
            sending, control, self._plans, limits, self._window, self.meter, largest_batch=policy.latency.max_batch
        )
        control.changed = self.core.follow_knobs
        self.meter.depth = lambda: self.core.waiting

    async def ask(
        self,
        intent: str,
        prompt: str,
        *,
        max_tokens: int | None = None,
        within_seconds: float | None = None,
        task: str = "",
        audience: str = "",
    ) -> Answer:
        """The answer to one request; one from the cache has used no tokens.

        `max_tokens` and `within_seconds` default to the knob `max_output_tokens` and the policy's deadline, and are
        never more than the knob and the policy's longest. `audience`: who may see the answer, empty for everybody;
        equal requests share one only within an audience.

        Raises:
            RequestRefused: there is no answer; it says why, and when to come again.
        """
        settings, now = self.policy.batcher, self._loop.time()
        most_tokens = self._checked(intent, prompt, max_tokens, within_seconds)
        seconds = settings.deadline.total_seconds() if within_seconds is None else within_seconds
        request = Request(intent, prompt, most_tokens, now + seconds, task, audience)
        cache = self._cache
        if cache is None or intent not in self._cacheable:
            return await self.core.submit(request)
        kept = await cache.get(request)
        self.meter.looked_up(intent, kept is not None)
        if kept is not None:
            return kept
        first = request.key not in self._asking
        if first:
            self._asking.add(request.key)
        try:
            answer = await self.core.submit(request)
            if first:
                cache.put(request, answer, self._loop.time() - now)
            return answer
        finally:
            if first:
                self._asking.discard(request.key)

    async def drain(self) -> int:
        """Take nothing new, answer what is there within the policy's budget: how many requests got no answer."""
        lost = await self.core.drain(self.policy.batcher.drain.total_seconds())
        if self._cache is not None:
            await self._cache.close()
        return lost

    def _checked(self, intent: str, prompt: str, max_tokens: int | None, within_seconds: float | None) -> int:
        """The longest answer asked for and allowed.

        Raises:
            RequestRefused: `INVALID`; the message names field, value and what is allowed.
        """
        if intent not in self._plans:
            raise self._invalid("intent", intent, f"one of {', '.join(sorted(self._plans))}")
        if not prompt.strip():
            raise self._invalid("prompt", prompt, "a text that is not empty")
        try:
            size = len(prompt.encode())
        except UnicodeEncodeError:
            raise self._invalid("prompt", prompt, "text that UTF-8 can encode") from None
        if size > self.policy.batcher.max_request_bytes:
            raise self._invalid("prompt", prompt, f"at most {self.policy.batcher.max_request_bytes} bytes")
        tokens = KnobName.MAX_OUTPUT_TOKENS.spec.kind
        assert isinstance(tokens, Whole)
        if max_tokens is not None and not tokens.minimum <= max_tokens <= tokens.maximum:
            raise self._invalid("max_tokens", max_tokens, tokens.allowed("tokens", {}))
        longest = self.policy.batcher.max_deadline.total_seconds()
        if within_seconds is not None and not 0 < within_seconds <= longest:
            allowed = f"a time to come, within {longest * 1000:g} ms"
            raise self._invalid("deadline_ms", round(within_seconds * 1000, 3), allowed)
        knob = self._control.max_output_tokens(intent)
        return knob if max_tokens is None else min(knob, max_tokens)

    def _invalid(self, field: str, value: object, allowed: str) -> "InvalidField":
        self.meter.refused("", Refusal.INVALID)
        return InvalidField(field, value, allowed)

    def _switch(self, intent: str, may_pack: bool, lost_share: float) -> None:
        plan = self._plans[intent]
        strategy = self.policy.intents[intent].strategy if may_pack else Strategy.PASS
        self._plans[intent] = IntentPlan(strategy, plan.group)
        self.meter.packing(intent, may_pack)
        if may_pack:
            _log.info("%s is packed again", intent)
        else:
            _log.warning(
                "%s has lost %.0f %% of its last packed answers: each of its requests has a call of its own for %s",
                intent,
                lost_share * 100,
                self.policy.batcher.pass_for,
            )

    def _window(self, model: str, group: str) -> WindowController:
        """A controller for one model's lane. What is not packed waits for nobody."""
        size, latency, settings = self.policy.latency.max_batch, self.policy.latency, self.policy.batcher
        fixed = sum(stage.p99_ms for stage in latency.stages) / 1000
        longest = KnobName.BATCH_WINDOW_MS.spec.kind
        assert isinstance(longest, Whole)
        if not group:
            return FixedWindow(0, 1)
        if settings.controller == "fixed":
            return FixedWindow(longest.maximum / 1000, size)  # which the knob caps
        if settings.controller == "table":
            return TableWindow(
                [TableRow(row.below_tokens_per_second or math.inf, row.window_ms / 1000) for row in settings.table],
                breach_p99_seconds=settings.table_breach_p99_ms / 1000,
                breach_window_seconds=settings.table_breach_window_ms / 1000,
                size=size,
                fixed_seconds=fixed,
            )
        return SloWindow(
            slo_seconds=settings.slo_ms / 1000,
            over_share=settings.over_share,
            fixed_seconds=fixed,
            size=size,
            most_seconds=longest.maximum / 1000,
        )


class InvalidField(RequestRefused):
    """A request with a field that is not allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = repr(value) if len(repr(value)) <= _SHOWN_CHARS else f"{repr(value)[:_SHOWN_CHARS]}..."
        super().__init__(Refusal.INVALID, f"{field}: {shown} is not allowed; {allowed} is")
        self.field = field
        self.value = shown
        self.allowed = allowed


_SHOWN_CHARS = 100


def _targets(policy: Policy) -> tuple[Mapping[str, ModelTargets], frozenset[str]]:
    """Where each model's calls may go besides its provisioned models, and the intents that a smaller model may answer.

    A model's smaller one is the largest that the policy names for any of its intents.
    """
    on_demand = {name: Target(name, model.model_id) for name, model in policy.models.items()}
    named = {name: set[str]() for name in policy.models}
    for intent in policy.intents.values():
        if intent.downgrade_to is not None:
            named[intent.model].add(intent.downgrade_to)
    smaller = {
        name: max(models, key=lambda model: policy.models[model].rank) for name, models in named.items() if models
    }
    targets = {name: ModelTargets(target, on_demand.get(smaller.get(name, ""))) for name, target in on_demand.items()}
    may = {name for name, one in policy.intents.items() if one.downgrade_to and one.downgrade_to == smaller[one.model]}
    return targets, frozenset(may)
