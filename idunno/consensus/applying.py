# idunno/consensus/applying.py: hands committed entries to the machine.
#
# Rule 1: one after another, from index 1 or behind the snapshot on, each once, in slices of a few ms between which others run.
# Rule 2: an entry that cannot be applied ends the task, and with it this node's part in the consensus: applying on would make
#         it differ from the others.
# Rule 3: before a slice there is room for what it brings: a replay is faster than a disk. Only this task waits for that.
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from idunno.base.errors import DiskFailed, NotFound
from idunno.base.ids import Index
from idunno.consensus.bell import Bell
from idunno.consensus.health import Health
from idunno.consensus.log import Log
from idunno.consensus.raft import Raft

APPLY_BYTES_MAX: Final = 1024 * 1024
APPLY_ENTRIES_MAX: Final = 1024


class Applying:
    """`apply` makes of an entry what its proposer is told. `settled` is called after each slice, `room` before it: it waits
    until a slice's bytes can be taken in, for a bounded time, and raises nothing."""

    def __init__(
        self,
        apply: Callable[[Index, bytes], Any],
        *,
        slice_s: float,
        settled: Callable[[], None],
        room: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.apply = apply
        self.index = Index(0)
        """The last entry applied."""
        self._slice_s, self._settled, self._room = slice_s, settled, room
        self._due = Bell()

    def bind(self, core: Raft, log: Log, health: Health, index: Index, done: Callable[[Index, Any], None]) -> None:
        """`done` hears of each entry and of what became of it."""
        self._done = done
        self._core, self._log, self._health, self.index = core, log, health, index
        self._now_s = asyncio.get_running_loop().time

    def committed(self) -> None:
        """There is something to apply."""
        self._due.ring()

    def begin_anew(self, index: Index) -> None:
        """A snapshot of `index` took the machine's place."""
        self.index = index

    async def run(self) -> None:
        while True:
            await self._due.rung()
            while await self._more():
                first = self.index + 1
                end, _ = self._core.terms.batch_end(first, APPLY_BYTES_MAX, APPLY_ENTRIES_MAX)
                last = min(end, self._core.commit)
                payloads = self._log.cached(first, last) or await self._read(first, last)
                if payloads is None or self.index + 1 != first:
                    continue  # the disk refused, or a snapshot was installed meanwhile
                self._apply_slice(payloads)
                self._settled()
                if self.index < self._core.commit:
                    await asyncio.sleep(0)  # lets the loop breathe between slices

    async def _more(self) -> bool:
        if self._room is not None and self.index < self._core.commit:
            await self._room()
        return self.index < self._core.commit  # a snapshot may have been installed meanwhile

    async def _read(self, first: int, last: int) -> list[bytes] | None:
        """Committed entries; None when they could not be had, and are to be asked for again."""
        try:
            payloads = await self._log.read(first, last)
        except NotFound:
            if self.index + 1 == first:
                raise
            return None
        except DiskFailed as error:
            self._health.disk_refuses("read", f"its log cannot be read: {error}", error)
            await self._health.pause()
            return None
        self._health.disk_works("read")
        return payloads

    def _apply_slice(self, payloads: list[bytes]) -> None:
        end = self._now_s() + self._slice_s
        for payload in payloads:
            index = Index(self.index + 1)
            value = self.apply(index, payload)
            self.index = index
            self._done(index, value)
            if self._now_s() >= end:
                return
