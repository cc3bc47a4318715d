# idunno/node/lateness.py: how late this process's event loop runs: the longest that anything here has to wait for its turn.
#
# Rule 1: a timer that should have fired at t and fired at t + d says that the loop was held (by work, by the interpreter's lock,
#         by a machine with too few cores) for d. It fires often while blocks are under way, seldom otherwise.
# Rule 2: only counts are kept, by upper bounds, so that two looks can be subtracted from each other.
from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Final

BOUNDS_MS: Final = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1_000)
BUSY_S: Final = 0.02
"""Between two samples while blocks are under way: each is as likely to meet a stall as anything else that happens."""
SNAPSHOT_S: Final = 0.005
"""Likewise snapshots, which are few: a stall of theirs comes once, and is told but for so much."""
IDLE_S: Final = 0.25
"""Between two samples otherwise, and the longest until a busy time is noticed: four wake-ups a second cost nothing."""


class Lateness:
    """Counts of samples by how late they were."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_MS) + 1)
        self.worst_ms = 0.0

    def add(self, late_ms: float) -> None:
        self._counts[bisect_left(BOUNDS_MS, late_ms)] += 1
        self.worst_ms = max(self.worst_ms, late_ms)

    def counts(self) -> dict[str, int]:
        """Samples that were at most so many ms late, but later than the bound before; "inf" is beyond all bounds."""
        names = [*map(str, BOUNDS_MS), "inf"]
        return {name: count for name, count in zip(names, self._counts, strict=True) if count}


def percentile_ms(counts: dict[str, int], share: float) -> float:
    """The bound that `share` of the samples keep; infinite beyond the last bound, 0 without samples."""
    wanted, seen = share * sum(counts.values()), 0
    for bound in BOUNDS_MS:
        seen += counts.get(str(bound), 0)
        if seen >= wanted:
            return float(bound) if wanted else 0.0
    return math.inf


async def watch(lateness: Lateness, pause_s: Callable[[], float]) -> None:
    """Sample until cancelled; `pause_s`: how long until the next one, as things are."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + pause_s()
        await asyncio.sleep(due - loop.time())
        lateness.add(max(0.0, loop.time() - due) * 1000)
