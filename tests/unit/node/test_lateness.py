# tests/unit/node/test_lateness.py: how late a loop runs is counted, and can be told for a stretch of time.
from __future__ import annotations

import asyncio
import math
import time

from idunno.node.lateness import BUSY_S, Lateness, percentile_ms, watch


def test_counts_are_by_upper_bound_and_can_be_subtracted() -> None:
    lateness = Lateness()
    for late_ms in (0.2, 1.0, 4.0, 5_000.0):
        lateness.add(late_ms)
    assert lateness.counts() == {"1": 2, "5": 1, "inf": 1}
    assert percentile_ms(lateness.counts(), 0.5) == 1
    assert percentile_ms(lateness.counts(), 0.75) == 5
    assert percentile_ms(lateness.counts(), 0.999) == math.inf
    assert percentile_ms({}, 0.999) == 0


def test_a_loop_that_is_held_is_seen_late() -> None:
    async def main() -> float:
        sampled = asyncio.Event()

        class Told(Lateness):
            def add(self, late_ms: float) -> None:
                super().add(late_ms)
                sampled.set()

        lateness = Told()
        watching = asyncio.create_task(watch(lateness, lambda: BUSY_S))
        asyncio.get_running_loop().call_soon(time.sleep, 0.05)  # what no code on the loop should do
        async with asyncio.timeout(5):
            await sampled.wait()  # the first sample meets it
        watching.cancel()
        return lateness.worst_ms

    assert asyncio.run(main()) > 15
