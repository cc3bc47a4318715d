# idunno/consensus/health.py: whether a node can keep what it promises in the consensus, and if not, why.
#
# Rule 1: a disk that refuses does not end the node: it steps aside (Halt), its work is tried again, and it comes back.
# Rule 2: a node that could not apply an entry, or met a mistake of its own, steps aside for good.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from idunno.consensus.events import Halt

log = logging.getLogger("idunno.consensus")

DISK_RETRY_S: Final = 1.0
"""Between attempts at a disk that refused: soon enough for a person who just freed space."""


class Health:
    """`step` hands the core a Halt."""

    def __init__(self, step: Callable[[Halt], None]) -> None:
        self.problem: str | None = None
        """Why this node takes no part at the moment; None if it does."""
        self.stuck = False
        """Halted for good."""
        self._step = step
        self._disk_refuses: set[str] = set()  # halted for as long as the disk refuses these: "write", "read"

    def disk_refuses(self, doing: str, problem: str, error: BaseException) -> None:
        self._disk_refuses.add(doing)
        self._halt(problem, error)

    async def pause(self) -> None:
        """Before the disk is tried again."""
        await asyncio.sleep(DISK_RETRY_S)

    def disk_works(self, doing: str) -> None:
        if doing not in self._disk_refuses:
            return
        self._disk_refuses.remove(doing)
        if not self.stuck and not self._disk_refuses:
            self.problem = None
            log.warning("node takes part in consensus again")
            self._step(Halt(False))

    def broken(self, problem: str, error: BaseException) -> None:
        self.stuck = True
        self._halt(problem, error)

    def _halt(self, problem: str, error: BaseException) -> None:
        if self.problem is None:
            self.problem = problem
            log.error("node takes no part in consensus", extra={"problem": problem}, exc_info=error)
            self._step(Halt(True))
