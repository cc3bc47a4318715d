# idunno/node/prompt.py: whether a disk answers so fast that its syncs are waited for on the loop itself.
#
# Rule 1: handing a sync to a thread costs two changes of thread, and the thread's end waits for the interpreter lock: more than
#         the sync itself takes on a good disk. So a prompt disk is waited for; any other has its thread.
# Rule 2: a disk that once took long is not waited for again before it has been fast for REST_S: the loop stands still at most
#         once for each time that the disk becomes slow.
from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

LOOK_BACK: Final = 16
FAST_S: Final = 0.001
"""The quickest of the last LOOK_BACK syncs took less: the others waited for the processor, not for the disk."""
SLOW_S: Final = 0.02
"""A twentieth of what a sliced snapshot may hold the loop for all in all, and a seventh of a heartbeat."""
REST_S: Final = 10.0
BYTES_MAX: Final = 256 * 1024
"""Written with one sync; more takes its time on any disk."""


class Promptness:
    def __init__(self, clock_s: Callable[[], float]) -> None:
        self.clock_s = clock_s
        self._took = deque[float](maxlen=LOOK_BACK)
        self._not_before_s = clock_s()

    def is_prompt(self) -> bool:
        return len(self._took) == LOOK_BACK and min(self._took) < FAST_S and self.clock_s() >= self._not_before_s

    def took(self, seconds: float) -> None:
        """A sync took so long, from the call to its return."""
        self._took.append(seconds)
        if seconds > SLOW_S:
            self._not_before_s = self.clock_s() + REST_S
