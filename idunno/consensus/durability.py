# idunno/consensus/durability.py: makes durable what the core says must be, and only then sends what that promises.
#
# Rule 1: what a Persist promises is sent only after its flush. All Persists that wait share one flush (group commit).
# Rule 2: the log is written and cut by one task only, this one.
# Rule 3: a disk that refuses is tried again (health.py); nothing that was staged is lost meanwhile.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from idunno.base.errors import DiskFailed, IdunnoError
from idunno.base.ids import Index, NodeId
from idunno.consensus.bell import Bell
from idunno.consensus.events import Compacted, Persist, Persisted
from idunno.consensus.health import Health
from idunno.consensus.log import Log
from idunno.consensus.messages import RaftMessage
from idunno.consensus.terms import Terms

log = logging.getLogger("idunno.consensus")

FLUSHES_BEFORE_CUT: Final = 64
"""So many, one behind the other, a cut waits for a moment without anything to write: some 100 ms. It takes a few ms itself."""


class Durability:
    """`terms` are the core's; `step` hands it Persisted and Compacted."""

    def __init__(
        self,
        log: Log,
        terms: Terms,
        health: Health,
        *,
        send: Callable[[NodeId, RaftMessage], None],
        step: Callable[[Persisted | Compacted], None],
    ) -> None:
        self._log, self._terms, self._health = log, terms, health
        self._send, self._step = send, step
        self._persists: list[Persist] = []
        self._due = Bell()
        self._forget_up_to = Index(0)
        self._ending = False

    def persist(self, order: Persist) -> None:
        if order.hard is not None:
            self._log.stage_hard(order.hard)
        if order.entries:
            self._log.stage(order.first, order.entries)
        self._persists.append(order)

    def begin(self) -> bool:
        """Have what waits written; whether anything does. Behind what else is sent in this turn: what goes out first travels
        while a prompt disk holds the loop."""
        if self._persists:
            self._due.ring()
        return bool(self._persists)

    def forget(self, index: Index) -> None:
        """Cut the log up to `index`, which a durable snapshot covers: when nothing waits to be written, or after some flushes."""
        self._forget_up_to = max(self._forget_up_to, index)
        self._due.ring()

    def end(self) -> None:
        """Let `run` return when what waits is written."""
        self._ending = True
        self._due.ring()

    async def run(self) -> None:
        while True:
            await self._due.rung()
            flushes = 0
            while self._persists:
                if not await self._flush():
                    if self._ending:
                        return
                    await self._health.pause()
                elif self._persists:
                    await asyncio.sleep(0)  # what came meanwhile has its turn
                    flushes += 1
                    if flushes % FLUSHES_BEFORE_CUT == 0:  # callers out of step can leave no moment without a flush
                        await self._cut_if_due()
            await self._cut_if_due()
            if self._ending:
                return

    async def _flush(self) -> bool:
        batch, self._persists = self._persists, []
        try:
            await self._log.flush()
        except IdunnoError as error:
            self._persists = batch + self._persists
            self._health.disk_refuses("write", f"its log cannot be written: {error}", error)
            return False
        promises = [send for persist in batch for send in persist.then]
        for send in promises:
            self._send(send.to, send.message)
        if promises:
            await asyncio.sleep(0)  # they leave before anything else is done: the leader waits for them
        self._step(Persisted(batch[-1].seq))
        self._health.disk_works("write")
        return True

    async def _cut_if_due(self) -> None:
        if self._forget_up_to > self._terms.base and not self._ending:
            await self._cut()

    async def _cut(self) -> None:
        index, self._forget_up_to = self._forget_up_to, Index(0)
        try:
            await self._log.roll()
        except DiskFailed as error:  # a full disk: older segments go all the more
            log.warning("log's segment not ended", extra={"index": index, "problem": str(error)})
        try:
            base = await self._log.forget(index)
        except DiskFailed as error:
            log.warning("log not cut", extra={"index": index, "problem": str(error)})
            return
        if base > self._terms.base:
            self._step(Compacted(base))
