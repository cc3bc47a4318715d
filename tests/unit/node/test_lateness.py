# tests/unit/node/test_lateness.py: how late a loop runs is counted, and can be told for a stretch of time.
from __future__ import annotations

import asyncio
import contextlib
import math
import time

from idunno.node.lateness import Lateness, percentile_ms, watch


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
        lateness = Lateness()
        asyncio.get_running_loop().call_soon(time.sleep, 0.05)  # what no code on the loop should do
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await watch(lateness, lambda: True)
        return lateness.worst_ms

    assert asyncio.run(main()) > 15
