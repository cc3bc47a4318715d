# idunno/scheduler/rates.py: queries per second of each model over the last 10 s, and how far apart they are.
#
# Rule 1: counted from what the replicated machine completed, in machine time, so every node can answer and all agree.
# Rule 2: the present machine time between two entries is the newest stamp plus what this node's own clock says has passed.
# Rule 3: the spread is taken over models with work waiting during the whole window (design.md, section 8).
from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

WINDOW_MS: Final = 10_000
BUCKET_MS: Final = 100
"""Completions of a tenth of a second are kept as one sum: 101 pairs a model at most, 1 % of the window."""
WEIGHT_ONE: Final = 1_000


class RateWindow:
    """Feed it with `completed` and `waiting`; ask with the node's own steady clock in ms."""

    def __init__(self) -> None:
        self._sums: dict[str, deque[list[int]]] = {}  # model -> [bucket, queries], rising
        self._waiting_since: dict[str, int] = {}  # machine time since when the model has had work without a pause
        self._offset_ms: int | None = (
            None  # machine time minus own clock, the largest seen: machine time never goes back
        )

    def observe(self, at_ms: int, clock_ms: int) -> None:
        """The machine's time was `at_ms` when this node's clock said `clock_ms`."""
        offset = at_ms - clock_ms
        self._offset_ms = offset if self._offset_ms is None else max(self._offset_ms, offset)

    def machine_ms(self, clock_ms: int) -> int:
        return clock_ms + (self._offset_ms or 0)

    def completed(self, model: str, queries: int, at_ms: int, clock_ms: int) -> None:
        self.observe(at_ms, clock_ms)
        sums = self._sums.setdefault(model, deque())
        bucket = at_ms // BUCKET_MS
        if sums and sums[-1][0] >= bucket:
            sums[-1][1] += queries
        else:
            sums.append([bucket, queries])
            self._drop_old(sums, at_ms)

    def waiting(self, model: str, has_work: bool, at_ms: int) -> None:
        """Whether `model` has unanswered queries, from machine time `at_ms` on."""
        if has_work:
            self._waiting_since.setdefault(model, at_ms)
        else:
            self._waiting_since.pop(model, None)

    def rates(self, clock_ms: int) -> dict[str, float]:
        """Queries/s of every model that completed any in the window."""
        now_ms = self.machine_ms(clock_ms)
        found: dict[str, float] = {}
        for model in sorted(self._sums):
            sums = self._sums[model]
            self._drop_old(sums, now_ms)
            if sums:
                found[model] = sum(queries for _, queries in sums) * 1000 / WINDOW_MS
            else:
                del self._sums[model]
        return found

    def spread(self, weights: Mapping[str, int], clock_ms: int) -> float:
        """1 - min/max of rate / weight over the models of `weights` that had work during the whole window. 0 below two."""
        now_ms, rates = self.machine_ms(clock_ms), self.rates(clock_ms)
        whole = [m for m, since in self._waiting_since.items() if now_ms - since >= WINDOW_MS and m in weights]
        if len(whole) < 2:
            return 0.0
        weighted = [rates.get(m, 0.0) * WEIGHT_ONE / max(1, weights[m]) for m in whole]
        return 1 - min(weighted) / max(weighted) if max(weighted) > 0 else 0.0

    def _drop_old(self, sums: deque[list[int]], now_ms: int) -> None:
        first = (now_ms - WINDOW_MS) // BUCKET_MS
        while sums and sums[0][0] <= first:
            sums.popleft()
