# idunno/consensus/waiting.py: callers that wait for the replicated log.
#
# Rule: every wait ends: by what was waited for, by its deadline, or by an error that says how far things had come.
from __future__ import annotations

import asyncio
import heapq
from dataclasses import dataclass, field
from typing import Any

import msgspec

from idunno.base.errors import IdunnoError
from idunno.base.ids import Index


class Proposal(msgspec.Struct, eq=False):
    """A payload on its way into the log, and who waits for it."""

    payload: bytes
    answer: asyncio.Future[tuple[Index, int, Any]]
    timeout_s: float
    end_s: float  # by the loop's clock
    index: Index | None = None  # None: not appended yet
    applied: bool = False
    value: Any = None  # what apply returned

    def fail(self, error: IdunnoError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(slots=True)
class IndexWaiters:
    """Waiters for an index to be reached. Its length: how many wait."""

    _heap: list[tuple[int, int, asyncio.Future[None]]] = field(default_factory=list)  # by index; also who gave up
    _number: int = 0
    _waiting: int = 0

    def __len__(self) -> int:
        return self._waiting

    async def wait(self, index: int, timeout_s: float) -> None:
        """Raises TimeoutError."""
        self._number += 1
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._heap, (index, self._number, waiter))
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        finally:
            self._waiting -= 1
            waiter.cancel()  # does nothing to one that was answered
            # Who gave up stays until they are more than half: rebuilt for each, the heap of ten thousand cost them 4.6 s.
            if len(self._heap) > 2 * self._waiting:
                self._heap = [item for item in self._heap if not item[2].done()]
                heapq.heapify(self._heap)

    def reached(self, index: int) -> None:
        while self._heap and self._heap[0][0] <= index:
            waiter = heapq.heappop(self._heap)[2]
            if not waiter.done():
                waiter.set_result(None)

    def fail(self, error: IdunnoError) -> None:
        heap, self._heap = self._heap, []
        for _, _, waiter in heap:
            if not waiter.done():
                waiter.set_exception(error)
