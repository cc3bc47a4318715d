# idunno/sdfs/asking.py: asking a cluster in which nodes die: again, through another node, until the time is over.
#
# Rule 1: everything asked here is either a question or carries the put's id, so it may be asked twice.
# Rule 2: who gives up after an attempt whose fate is unknown says so (DeadlineExceeded), whatever the last attempt said: the
#         first may still be on its way, held up by a network that is mended just now.
from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import Final

from idunno.base.disk import Buffer
from idunno.base.errors import Cancelled, DeadlineExceeded, IdunnoError, undecided
from idunno.wire.calls import A, Caller, Method, Q

ATTEMPT_S: Final = 10.0
"""For one attempt: a node that is frozen is left for another after this."""
PATIENCE_S: Final = 60.0
"""For an operation's first question: a cluster that is restarted answers within this."""
LAST_ATTEMPT_S: Final = 0.1
"""With less time than this left nothing more is tried: it could only hide the error that says why."""
PAUSE_MIN_S: Final = 0.05
PAUSE_MAX_S: Final = 1.0
"""Between attempts, doubling: an election takes about a second, so several attempts fall into it."""


class Asker:
    """One operation's way to the cluster: `caller()` gives a connection to any living node, each time anew."""

    def __init__(self, caller: Callable[[], Caller], what: str, timeout_s: float, rng: random.Random) -> None:
        self.caller, self.what, self.timeout_s = caller, what, timeout_s
        self.problem = ""  # what keeps the operation from going on; part of the error when the time is over
        self._lost: set[str] = (
            set()
        )  # of what changes: whose answer was lost once, so that it may have happened, or happen yet
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._end_s = self._loop.time() + timeout_s

    def left_s(self, waiting_for: str) -> float:
        """Seconds left. Raises DeadlineExceeded when there are none."""
        left_s = self._end_s - self._loop.time()
        if left_s <= 0:
            raise self.late(waiting_for)
        return left_s

    def late(self, waiting_for: str) -> DeadlineExceeded:
        """The error of an operation whose time is over."""
        return DeadlineExceeded(
            f"{self.what}: not done in {self.timeout_s:g} s, {self.problem or waiting_for}; give a larger --timeout"
        )

    async def pause(self, attempt: int) -> None:
        """Before attempt number `attempt` + 1; with chance, so that many clients do not come back at once."""
        pause_s = min(PAUSE_MIN_S * 2 ** min(attempt, 10), PAUSE_MAX_S) * self._rng.uniform(0.5, 1.0)
        await asyncio.sleep(min(pause_s, max(0.0, self._end_s - self._loop.time())))

    async def ask(
        self,
        method: Method[Q, A],
        request: Q,
        *,
        body: Buffer = b"",
        patience_s: float = math.inf,
        final: bool = True,
    ) -> A:
        """Raises what the handler raised, if asking again cannot help; else, at the end of the time, why it did not work.
        Once its answer was lost a refusal is DeadlineExceeded (`doubt`); unless it is not `final`, for its caller goes on.

        `patience_s`: for an operation's first question. A transfer may take an hour, but that nothing answers at all is
        said sooner.
        """
        end_s = min(self._end_s, self._loop.time() + patience_s)
        attempt = 0
        last: IdunnoError | None = None
        while (left_s := end_s - self._loop.time()) > (LAST_ATTEMPT_S if attempt else 0):
            try:
                answer = await self.caller().call(method, request, timeout_s=min(left_s, ATTEMPT_S), body=body)
            except IdunnoError as error:
                if error.may_have_happened and method.changes:
                    self._lost.add(method.name)
                if not may_repeat(error):
                    if final:
                        self.doubt(method, error)
                    raise
                last = error
            else:
                self._lost.discard(method.name)  # what was lost does nothing more than this has done
                return answer
            await self.pause(attempt)
            attempt += 1
        if last is not None and (last.may_have_happened or not self.lost(method)) and not self.problem:
            raise last
        said = self.problem or f"waiting for {method.name}" + (f" ({last})" if last is not None else "")
        raise DeadlineExceeded(
            f"{self.what}: not done in {min(self.timeout_s, patience_s):g} s, {said}; give a larger --timeout"
        ) from last

    def lost(self, method: Method[Q, A]) -> bool:
        """Whether an answer of it was lost, and none came since."""
        return method.name in self._lost

    def doubt(self, method: Method[Q, A], error: IdunnoError) -> None:
        """Raises DeadlineExceeded if `error` refuses what may have happened, because an answer of `method` was lost."""
        if self.lost(method) and undecided(error):
            raise DeadlineExceeded(f"{self.what}: an answer was lost; asked again: {error}") from error


def may_repeat(error: IdunnoError) -> bool:
    """Whether the same request, which may be asked twice, could go well at another node or a little later."""
    # Cancelled: the node that was asked is stopping. (Who is cancelled himself hears nothing any more.)
    return error.retryable or isinstance(error, (DeadlineExceeded, Cancelled))
