# idunno/wire/deadlines.py: the deadlines of all calls of one side of a connection, kept by one timer.
#
# Rule 1: a call hears of its deadline when it is over, not a moment earlier, however many calls there are.
# Rule 2: nearly all calls end long before their deadline. So there is no timer for each, which cost more than reading its frame:
#         the one timer fires at the earliest deadline it was set for, mostly finds nothing late, and is set for the next.
from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar


class Timed(Protocol):
    """A call under way."""

    @property
    def deadline(self) -> float:
        """In loop time."""
        ...


T = TypeVar("T", bound=Timed)


class Deadlines(Generic[T]):
    """Tells `late` of each of `calls` whose deadline is over; of one that is still among them then, perhaps again."""

    def __init__(self, calls: Mapping[int, T], late: Callable[[T], None]) -> None:
        self._calls, self._late = calls, late
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._at = math.inf  # when the timer fires, in loop time

    def added(self, deadline: float) -> None:
        """There is a call with this deadline."""
        if deadline < self._at:
            self._set(deadline)

    def stop(self) -> None:
        """Nobody waits for any of them any more."""
        self._set(math.inf)

    def _set(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._at = at
        self._timer = self._loop.call_at(at, self._fire) if at < math.inf else None

    def _fire(self) -> None:
        now = max(self._at, self._loop.time())  # a loop may round a timer down
        late = [call for call in self._calls.values() if call.deadline <= now]
        self._set(min((call.deadline for call in self._calls.values() if call.deadline > now), default=math.inf))
        for call in late:
            self._loop.call_soon(self._late, call)  # an error in one is not the others'
