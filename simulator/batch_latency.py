"""Scenario 3 in the simulator: an evening at which a batch window of 500 ms is too long. What it rests on.

Real time: windows and latencies are never compressed. `docs/simulator.md` has the table that it gives, and why.
"""

from simulator.aws.world import ConverseModel, converse_models

REQUESTS_PER_SECOND = 18.0
"""Messages: about 14 of them ask the batcher's packing lane, the others are answered by the cache and by Haiku."""
BURST_TIMES, BURST_SECONDS, BURST_EVERY_SECONDS = 1.5, 3.0, 20.0
"""So many times the usual rate, for so long, so often; the mean stays."""
MAX_LOST_SHARE = 0.15
"""The policy's `batcher.max_lost_share` that this is set for: with its default the batcher stops packing by itself."""
HAIKU_SHARE = 0.08
"""Of messages; they wait for nobody."""
_SONNET = {
    "median_ms": 1750,
    "p99_ms": 1955,
    "growth_per_question": 0.012,
    "lost_share": 0.07,
    "lost_from": 8,
}
"""P99 is 2,000 ms for calls of 3 questions and 2,100 for those of 7. A full prompt of 8 gets answers that leave out 7 %
of its questions: the batcher asks those again, alone, and their users wait for two calls, one after the other."""


def converse() -> dict[str, ConverseModel]:
    """The models as they answer that evening."""
    usual = converse_models()
    return usual | {"sonnet": ConverseModel.model_validate(usual["sonnet"].model_dump() | _SONNET)}
