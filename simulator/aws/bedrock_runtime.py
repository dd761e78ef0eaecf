"""Bedrock's Converse: answers that take as long as a model's, throttles by target, and understands packed questions.

Shapes and error codes are botocore's; how long it takes and what it can carry is `ConverseModel`'s.
"""

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

from moto.bedrock.models import bedrock_backends
from moto.bedrockruntime import urls
from moto.bedrockruntime.responses import BedrockRuntimeResponse
from moto.cloudwatch.models import cloudwatch_backends
from moto.core.responses import ActionResult

from domain.packing import BEGINS, SYSTEM
from simulator.aws.bedrock import fleet_of
from simulator.aws.cloudwatch import state_of
from simulator.aws.errors import AwsError
from simulator.aws.metrics import Sample, SeriesKey
from simulator.aws.world import ENVIRON_KEY, ConverseModel, World

_PATH, _OPERATION = "/model/", "/converse"
_PACKED = SYSTEM.split("\n", 1)[0]
_BURST_SECONDS = 1.0
"""How far a target may be ahead of its rate."""
_CHARACTERS_PER_TOKEN = 4
_NAMESPACE = "AWS/Bedrock"


class ConverseResponse(BedrockRuntimeResponse):
    """moto's Bedrock runtime with Converse. Streaming and tools are not there."""

    def converse(self) -> ActionResult:
        """The answer, after its latency; refused at once where the target is full, gone or not ready."""
        world: World = self.normalized_request.environ[ENVIRON_KEY]
        target = unquote(self.raw_path.split(_PATH, 1)[1].rsplit(_OPERATION, 1)[0])
        body: dict[str, Any] = json.loads(self.body or "{}")
        prompt, system = _text(body["messages"][-1]["content"]), _text(body.get("system", ()))
        most = int(body.get("inferenceConfig", {}).get("maxTokens", 4096))
        if not prompt.strip():
            raise AwsError("ValidationException", "The text field in the ContentBlock object is blank.")
        questions = _questions(prompt) if system.startswith(_PACKED) else None
        count = len(questions) if questions else 1
        with world.lock:
            model, rate = self._target(world, target)
            text = reply(prompt, questions, model.draw_lost(questions or {}, world.converse_draws))
            spent_in = _tokens(system) + _tokens(prompt)
            spent_out = min(most, max(_tokens(text), model.answer_tokens * count))
            refused = not _admits(world, target, rate, spent_in + spent_out)
            latency_ms = model.draw_latency_ms(count, world.converse_draws)
        if refused:
            self._record(world, model.model_id, {"InvocationThrottles": (1, "Count")})
            if model.retry_after_seconds is not None:
                self.response_headers["Retry-After"] = str(model.retry_after_seconds)
            raise AwsError("ThrottlingException", "Too many tokens, please wait before trying again.")
        world.stopping.wait(latency_ms / 1000)
        figures = {
            "Invocations": (1, "Count"),
            "InvocationLatency": (latency_ms, "Milliseconds"),
            "InputTokenCount": (spent_in, "Count"),
            "OutputTokenCount": (spent_out, "Count"),
        }
        self._record(world, model.model_id, figures)
        is_cut = _tokens(text) > most
        return ActionResult(
            {
                "output": {
                    "message": {
                        "role": "assistant",
                        "content": [{"text": text[: most * _CHARACTERS_PER_TOKEN] if is_cut else text}],
                    }
                },
                "stopReason": "max_tokens" if is_cut else "end_turn",
                "usage": {"inputTokens": spent_in, "outputTokens": spent_out, "totalTokens": spent_in + spent_out},
                "metrics": {"latencyMs": round(latency_ms)},
            }
        )

    def _target(self, world: World, target: str) -> tuple[ConverseModel, float]:
        """The model behind what a call names, and the tokens/s that it may have there."""
        if ":provisioned-model/" in target:
            bought = fleet_of(bedrock_backends[self.current_account][self.region]).find(target)
            if bought.status(datetime.now(UTC)) != "InService":
                raise AwsError("ModelNotReadyException", f"The model {target} is not ready for inference.")
            base = bought.foundation_model_arn.rsplit("/", 1)[-1]
            model = _of_id(world.converse, base)
            return model, bought.units * model.tokens_per_second_per_unit
        model = _of_id(world.converse, target)
        return model, model.on_demand_tokens_per_second

    def _record(self, world: World, model_id: str, figures: Mapping[str, tuple[float, str]]) -> None:
        """AWS's own metrics of the call."""
        store = state_of(cloudwatch_backends[self.current_account][self.region], world.settings).store
        now = time.time()
        for name, (value, unit) in figures.items():
            key = SeriesKey(_NAMESPACE, name, (("ModelId", model_id),))
            store.put(key, [Sample(now, value, value, value, 1, unit)], now)


def _of_id(models: Mapping[str, ConverseModel], model_id: str) -> ConverseModel:
    for model in models.values():
        if model.model_id == model_id:
            return model
    raise AwsError("ValidationException", "The provided model identifier is invalid.")


def _admits(world: World, target: str, rate: float, tokens: float) -> bool:
    """Whether the target takes the call; it may be ahead of its rate by one second and one call."""
    now = time.monotonic()
    level, at = world.converse_levels.get(target, (rate * _BURST_SECONDS, now))
    level = min(rate * _BURST_SECONDS, level + (now - at) * rate)
    takes = level > 0
    world.converse_levels[target] = (level - tokens if takes else level, now)
    return takes


def _text(blocks: Any) -> str:
    return "".join(block.get("text", "") for block in blocks)


def _tokens(text: str) -> int:
    return -(-len(text) // _CHARACTERS_PER_TOKEN)


def _questions(prompt: str) -> dict[str, str] | None:
    try:
        asked = json.loads(prompt)
    except ValueError:
        return None
    return asked if isinstance(asked, dict) else None


def reply(prompt: str, questions: dict[str, str] | None, lost: set[str]) -> str:
    """A text that answers the prompt, or all of its packed questions but the lost ones."""
    if questions is None:
        return f"Simulated answer to: {prompt}"
    entries = [
        {"name": name, "begins": question[:BEGINS], "answer": f"Simulated answer to: {question}"}
        for name, question in questions.items()
        if name not in lost
    ]
    return json.dumps(entries, ensure_ascii=False)


def install() -> None:
    """Put it in moto's place. Before the server starts."""
    for path in urls.url_paths:
        urls.url_paths[path] = ConverseResponse.dispatch
