# idunno/consensus/health.py: whether a node can keep what it promises in the consensus, and if not, why.
#
# Rule 1: a disk that refuses does not end the node: it steps aside (Halt), its work is tried again, and it comes back.
# Rule 2: a node that could not apply an entry, or met a mistake of its own, steps aside for good.
# Rule 3: a node that has just started stands aside until others have confirmed that its log is no old one (standing.py).
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from idunno.consensus.events import Halt

log = logging.getLogger("idunno.consensus")

DISK_RETRY_S: Final = 1.0
"""Between attempts at a disk that refused: soon enough for a person who just freed space."""
KINDS: Final = ("broken", "write", "read", "unproved")
"""Of problems, the one to tell first first."""


class Health:
    """`step` hands the core a Halt."""

    def __init__(self, step: Callable[[Halt], None]) -> None:
        self.stuck = False
        """Halted for good."""
        self._step = step
        self._problems: dict[str, str] = {}  # by kind: "broken", "write", "read", "unproved"

    @property
    def problem(self) -> str | None:
        """Why this node takes no part at the moment; None if it does."""
        return next((self._problems[kind] for kind in KINDS if kind in self._problems), None)

    def disk_refuses(self, doing: str, problem: str, error: BaseException) -> None:
        self._begin(doing, problem, error)

    async def pause(self) -> None:
        """Before the disk is tried again."""
        await asyncio.sleep(DISK_RETRY_S)

    def disk_works(self, doing: str) -> None:
        if self._problems:
            self._end(doing)

    def broken(self, problem: str, error: BaseException | None) -> None:
        self.stuck = True
        self._begin("broken", problem, error)

    def unproved(self, problem: str) -> None:
        """Whether its log is what it acknowledged is not known yet; `proved` when it is. May be said again in other words."""
        new = "unproved" not in self._problems
        self._problems["unproved"] = problem
        if new and len(self._problems) == 1:
            self._step(Halt(True))

    def proved(self) -> None:
        self._end("unproved")

    def _begin(self, kind: str, problem: str, error: BaseException | None) -> None:
        if kind in self._problems:
            return
        self._problems[kind] = problem
        log.error("node takes no part in consensus", extra={"problem": problem}, exc_info=error)
        if len(self._problems) == 1:
            self._step(Halt(True))

    def _end(self, kind: str) -> None:
        if self._problems.pop(kind, None) is not None and not self._problems:
            log.info("node takes part in consensus")
            self._step(Halt(False))
