# idunno/sdfs/sweep.py: removes the blocks on this node that nothing refers to.
#
# Rule 1: a linearizable read comes first, then one step without an await decides by this node's own machine: nothing refers to
#         the block, no open put counts on it, nobody writes it. In that step the node stops saying that it has it.
# Rule 2: what was written before this process began is known to no pin. Until all puts have ended that were open at the first
#         barrier, nothing is removed.
# Rule 3: bounded: BATCH blocks a barrier; a look at all blocks after the start and once an hour, in slices; else only at what was
#         told.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Final

from idunno.base.errors import DiskFailed, IdunnoError
from idunno.base.ids import BlockId
from idunno.coordinator.machine import Machine
from idunno.sdfs import tasks
from idunno.sdfs.blocks import BlockStore
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.ports import Coordination

log = logging.getLogger("idunno.sdfs")

BATCH: Final = 256
"""Removed after one barrier: 2 GB at most, 100 ms of a slow disk."""
SLICE: Final = 5_000
"""Blocks looked at in one turn of the loop: a millisecond or two."""
LOOK_AGAIN_S: Final = 3_600.0
"""Between looks at all blocks: a node that became another's snapshot was told nothing of what was freed in between."""
GATHER_S: Final = 1.0
BARRIER_S: Final = 10.0


class Sweeper:
    def __init__(self, coordinator: Coordination, blocks: BlockStore, *, config: SdfsConfig) -> None:
        self._coordinator, self._blocks, self._config = coordinator, blocks, config
        self._candidates: dict[BlockId, None] = {}
        self._looked = False  # at all blocks, since `_look_again_s` was set
        self._look_again_s = 0.0
        self._first = True
        self._before: list[str] = []  # puts open at the first barrier that have not ended
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = tasks.begin(self._run(), "sweep")

    async def stop(self) -> None:
        await tasks.end(self._task)
        self._task = None

    def freed(self, blocks: Iterable[BlockId]) -> None:
        """Nothing refers to these any more, as of what was just applied."""
        held = [block for block in blocks if block in self._blocks or self._blocks.is_written(block)]
        if held:
            self._candidates.update(dict.fromkeys(held))
            self._wake.set()

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._config.sweep_s):
                    await self._wake.wait()
                await asyncio.sleep(GATHER_S)
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self.sweep()
            except IdunnoError as error:  # no quorum, or the disk: the next look goes on
                log.info("not swept", extra={"code": error.code, "error": str(error)})

    async def sweep(self) -> int:
        """Remove what can be removed now; how many blocks. Raises IdunnoError."""
        if not self._looked or asyncio.get_running_loop().time() >= self._look_again_s:
            await self._look_at_all()
        removed = 0
        while self._candidates or self._ended():
            batch = await self._decide()
            removed += await self._erase(batch)
            if len(batch) < BATCH:
                break
        if removed:
            log.info("blocks swept", extra={"blocks": removed})
        await self._clear_quarantine()
        return removed

    async def _erase(self, batch: list[BlockId]) -> int:
        """Of files held no more; what the disk refuses to remove stays until the next start, and keeps no other from going."""
        removed, refused = 0, None
        for block in batch:
            try:
                await self._blocks.erase(block)
                removed += 1
            except DiskFailed as error:
                refused = error
        if refused is not None:
            log.warning("files not removed", extra={"blocks": len(batch) - removed, "error": str(refused)})
        return removed

    def _ended(self) -> bool:
        """Whether puts that wrote here have ended, as far as this node's machine knows."""
        machine = self._coordinator.machine
        return any(machine.namespace.open_put(put) is None for put in self._blocks.pins.puts())

    async def _look_at_all(self) -> None:
        """Blocks that nothing refers to after the first barrier; what comes later is told."""
        machine = await self._coordinator.read(BARRIER_S)
        if self._first:
            self._first = False
            self._before = [put.put for put in machine.namespace.open_puts()]
            if self._before:
                log.info("nothing is swept before the puts open now have ended", extra={"puts": len(self._before)})
        for number, block in enumerate(self._blocks.held()):
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            if block not in machine.references:
                self._candidates[block] = None
        self._looked = True
        self._look_again_s = asyncio.get_running_loop().time() + LOOK_AGAIN_S

    async def _decide(self) -> list[BlockId]:
        """A barrier; then up to BATCH blocks are held no more, and are to be erased."""
        mark = self._blocks.pins.mark()
        machine = await self._coordinator.read(BARRIER_S)
        # From here to the end there is no await.
        self._before = [put for put in self._before if machine.namespace.open_put(put) is not None]
        free = self._blocks.pins.settle(mark, lambda put: machine.namespace.open_put(put) is not None)
        self._candidates.update(dict.fromkeys(free))
        if self._before:
            return []
        batch: list[BlockId] = []
        written: list[BlockId] = []  # they may be published without a pin: a copy that was ordered
        looks_left = SLICE
        while self._candidates and looks_left and len(batch) < BATCH:
            looks_left -= 1
            block, _ = self._candidates.popitem()  # the last: to the first one steps over all that went before
            if self._blocks.is_written(block):
                written.append(block)
            elif self._is_removable(block, machine):
                self._blocks.take_out(block)
                batch.append(block)
        if self._candidates and not looks_left:
            self._wake.set()  # the next look goes on
        self._candidates.update(dict.fromkeys(written))
        return batch

    def _is_removable(self, block: BlockId, machine: Machine) -> bool:
        # A pinned one is told again when its last put has ended, one that is referred to when it is freed.
        return block in self._blocks and block not in machine.references and block not in self._blocks.pins

    async def _clear_quarantine(self) -> None:
        """Remove rotten files that are of no use any more, or in the way."""
        rotten = await self._blocks.quarantined()
        if not rotten:
            return
        space = await self._blocks.space()
        is_full = space.free_bytes < self._config.floor(space)
        machine = await self._coordinator.read(BARRIER_S)
        for block in rotten:
            if is_full or block in self._blocks or block not in machine.references:
                try:
                    await self._blocks.clear_quarantine(block)
                except DiskFailed as error:
                    log.info("quarantine not cleared", extra={"block": block, "error": str(error)})
                    return
