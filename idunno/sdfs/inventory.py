# idunno/sdfs/inventory.py: tells each new leader which blocks this node holds, then what changes.
#
# Rule 1: a report belongs to one term. A new leader gets everything, in pages; after that only changes and free space.
# Rule 2: changes while a full report is under way come after it. Whatever fails is followed by a full report.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from idunno.base.errors import IdunnoError
from idunno.base.ids import BlockId, NodeId, Term
from idunno.sdfs import tasks
from idunno.sdfs.blocks import BlockStore
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.locator import INVENTORY_BLOCKS_MAX
from idunno.sdfs.messages import Inventory

log = logging.getLogger("idunno.sdfs")

RETRY_S = 0.2
"""A new leader takes reports once its first entry is applied, a commit after the others heard of it; until all have reported
the cluster is `recovering`."""
GATHER_S = 0.2
"""Changes are gathered this long: a put of many blocks makes few reports, and the commit tells the leader anyway."""

Report = Callable[[NodeId, Inventory], Awaitable[None]]
"""Send a page to the leader. Raises an IdunnoError when it did not arrive."""


class Reporter:
    """One node's reports. `changed` and `leader_changed` may be called at any time; `start` and `stop` once."""

    def __init__(self, me: NodeId, blocks: BlockStore, report: Report, config: SdfsConfig) -> None:
        self._me, self._blocks, self._report, self._config = me, blocks, report, config
        self._leader: NodeId | None = None
        self._term = Term(0)
        self._changes: dict[BlockId, bool] = {}  # block -> held; the last word counts
        self._full = True
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = tasks.begin(self._run(), "inventory")

    async def stop(self) -> None:
        await tasks.end(self._task)
        self._task = None

    def leader_changed(self, leader: NodeId | None, term: Term) -> None:
        if (leader, term) != (self._leader, self._term):
            self._leader, self._term, self._full = leader, term, True
            self._wake.set()

    def changed(self, block: BlockId, held: bool) -> None:
        if self._full:
            return  # the full report will say it
        self._changes[block] = held
        if len(self._changes) >= INVENTORY_BLOCKS_MAX:
            self._full = True
            self._changes.clear()
        self._wake.set()

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._config.report_s):
                    await self._wake.wait()
                    await asyncio.sleep(0 if self._full else GATHER_S)
            except TimeoutError:
                pass  # nothing new but, perhaps, the free space
            self._wake.clear()
            leader, term = self._leader, self._term
            if leader is None:
                continue
            try:
                await (self._report_all(leader, term) if self._full else self._report_changes(leader, term))
            except IdunnoError as error:
                log.info("inventory not taken", extra={"leader": leader, "term": term, "error": str(error)})
                self._full = True
                asyncio.get_running_loop().call_later(RETRY_S, self._wake.set)

    async def _report_all(self, leader: NodeId, term: Term) -> None:
        self._full = False  # from here on changes are noted; they are sent after the pages
        self._changes.clear()
        held = self._blocks.held()
        pages = [held[i : i + INVENTORY_BLOCKS_MAX] for i in range(0, len(held), INVENTORY_BLOCKS_MAX)] or [[]]
        for number, page in enumerate(pages):
            await self._send(leader, term, page, [], first=number == 0, last=number == len(pages) - 1)
        log.info("inventory reported", extra={"leader": leader, "term": term, "blocks": len(held)})

    async def _report_changes(self, leader: NodeId, term: Term) -> None:
        changes, self._changes = self._changes, {}
        added = [block for block, held in changes.items() if held]
        removed = [block for block, held in changes.items() if not held]
        await self._send(leader, term, added, removed)

    async def _send(
        self,
        leader: NodeId,
        term: Term,
        added: list[BlockId],
        removed: list[BlockId],
        *,
        first: bool = False,
        last: bool = False,
    ) -> None:
        space = await self._blocks.space()
        page = Inventory(
            self._me,
            term,
            added,
            removed,
            first,
            last,
            space.free_bytes,
            space.total_bytes,
            self._blocks.problem,
            self._blocks.rotten,
            self._config.floor(space),
        )
        await self._report(leader, page)
