"""Whether packing pays for an intent: one that loses too many of its packed answers is not packed for a while."""

import asyncio
from collections import deque
from collections.abc import Callable


class PackingGuard:
    """Hears what became of each packed request. One event loop."""

    def __init__(
        self,
        *,
        max_lost_share: float,
        lost_of: int,
        pass_seconds: float,
        switch: Callable[[str, bool, float], None],
    ) -> None:
        """`switch` is told an intent, whether it may be packed from now on, and the share it has lost."""
        self._max_lost_share = max_lost_share
        self._lost_of = lost_of
        self._pass_seconds = pass_seconds
        self._switch = switch
        self._kept: dict[str, deque[bool]] = {}
        self._resting: set[str] = set()

    def packed(self, intent: str, kept: bool) -> None:
        """A packed request's answer could be used, or was lost and asked again alone."""
        if intent in self._resting:
            return
        seen = self._kept.get(intent)
        if seen is None:
            seen = self._kept[intent] = deque(maxlen=self._lost_of)
        seen.append(kept)
        if kept or len(seen) < self._lost_of:
            return
        lost = len(seen) - sum(seen)
        if lost > self._max_lost_share * len(seen):
            self._resting.add(intent)
            self._switch(intent, False, lost / len(seen))
            seen.clear()
            asyncio.get_running_loop().call_later(self._pass_seconds, self._again, intent)

    def _again(self, intent: str) -> None:
        self._resting.discard(intent)
        self._switch(intent, True, 0.0)
