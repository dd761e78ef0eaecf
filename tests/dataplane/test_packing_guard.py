"""An intent that loses too many packed answers goes back to a call for each, for a while."""

import asyncio

from dataplane.packing_guard import PackingGuard
from tests.virtual_time import run_virtually


def test_an_intent_rests_after_too_many_losses_and_is_tried_again() -> None:
    switched: list[tuple[float, str, bool]] = []

    async def go() -> None:
        loop = asyncio.get_running_loop()

        def switch(intent: str, may_pack: bool, share: float) -> None:
            switched.append((loop.time(), intent, may_pack))

        guard = PackingGuard(max_lost_share=0.05, lost_of=100, pass_seconds=600, switch=switch)
        for n in range(1000):
            guard.packed("faq", n % 20 > 0)
        assert switched == [], "a twentieth may be lost"
        for _ in range(50):
            guard.packed("greeting", False)
        assert switched == [], "fifty say nothing yet"
        for _ in range(3):
            guard.packed("faq", False)
        assert switched == [(0, "faq", False)]
        await asyncio.sleep(601)
        assert switched == [(0, "faq", False), (600, "faq", True)]
        for _ in range(99):
            guard.packed("faq", False)
        assert len(switched) == 2, "it starts anew"

    run_virtually(go())
