# idunno/consensus/gathering.py: when what was proposed becomes an append.
#
# Rule 1: an append costs every node a sync, a message and an answer, whatever is in it. Who was answered a moment ago mostly asks
#         again at once (a folder that is copied, a job's results). So while COMPANY_MIN or more of those have not come back, a
#         proposal waits for theirs, and they share one append: what PostgreSQL calls commit_delay and commit_siblings.
# Rule 2: it waits for as long as they keep coming: when none came for QUIET_S those who are there go, and after WAIT_MAX_S in
#         any case. A lone caller, or a few, never wait.
from __future__ import annotations

from typing import Final

COMPANY_MIN: Final = 4
"""With fewer the appends that are saved are not worth a wait."""
QUIET_S: Final = 0.001
"""The least that a loop's timer knows, and less than an append with its syncs takes."""
WAIT_MAX_S: Final = 0.01
"""The leader's processor has done with a hundred callers by then, whose own work is what an append of theirs costs most."""
STALE_S: Final = 0.01
"""Who was answered longer ago is not expected back: it had other things to do, or is further away than a wait is worth."""


class Gathering:
    """Of one append to be. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._expected = 0  # answered, and not back yet
        self._answered_s = float("-inf")
        self._since_s = 0.0
        self._came = 0  # since `on` last said how long to wait

    def answered(self, callers: int, now_s: float) -> None:
        """So many were answered, and may come back."""
        self._forget_stale(now_s)
        self._expected += callers
        self._answered_s = now_s

    def first(self, now_s: float) -> float:
        """The first proposal came: for how many seconds to wait for others; 0: append it at the end of this turn."""
        self._forget_stale(now_s)
        if self._expected < COMPANY_MIN:
            return 0.0
        self._expected -= 1
        self._since_s, self._came = now_s, 0
        return QUIET_S

    def another(self) -> bool:
        """One more came: whether these are all who were expected."""
        self._came += 1
        self._expected -= 1
        return self._expected <= 0

    def on(self, now_s: float) -> float:
        """The wait is over: for how many seconds to wait on; 0: append what is there."""
        if not self._came or now_s - self._since_s >= WAIT_MAX_S:
            return 0.0
        self._came = 0
        return QUIET_S

    def appended(self) -> None:
        """Whoever has not come back is not waited for any more."""
        self._expected = 0

    def _forget_stale(self, now_s: float) -> None:
        if now_s - self._answered_s > STALE_S:
            self._expected = 0
