# idunno/sdfs/scrub.py: reads this node's blocks again, slowly, so that rot is found before the last good copy is needed.
#
# Rule 1: a set rate, and every block at most once in a period, whatever the store's size. A pass that was asked for (`begin`)
#         keeps the rate and does not wait for the period.
# Rule 2: what is found is the block store's to deal with (quarantine, no longer held); the report and repair follow from that.
# Rule 3: a pass goes through the blocks as they lie in the store and begins at a place drawn anew, so that a node which restarts
#         every day reaches all its blocks in the end.
from __future__ import annotations

import asyncio
import logging
import random
from typing import Final

from idunno.base.errors import DiskFailed
from idunno.sdfs import tasks
from idunno.sdfs.blocks import BlockStore
from idunno.sdfs.config import SdfsConfig

log = logging.getLogger("idunno.sdfs")

FIRST_S: Final = 60.0
"""After the start: the node has more urgent things to do."""
SLEEP_MIN_S: Final = 0.05
"""Debts of time are paid from this on: thousands of small blocks are not thousands of timers."""


class Scrubber:
    def __init__(self, blocks: BlockStore, rng: random.Random, *, config: SdfsConfig) -> None:
        self._blocks, self._rng, self._config = blocks, rng, config
        self._asked = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [tasks.begin(self._run(), "scrub"), tasks.begin(self._probe(), "disk-probe")]

    async def stop(self) -> None:
        for task in self._tasks:
            await tasks.end(task)
        self._tasks = []

    def begin(self) -> None:
        """A pass over all blocks, as soon as the one under way is done."""
        self._asked.set()

    async def _run(self) -> None:
        wait_s = FIRST_S
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    await self._asked.wait()
            except TimeoutError:
                pass
            asked = self._asked.is_set()
            self._asked.clear()
            began_s = asyncio.get_running_loop().time()
            if asked or self._config.scrub_bytes_per_s:
                await self.scrub()
            wait_s = max(1.0, began_s + self._config.scrub_period_s - asyncio.get_running_loop().time())

    async def scrub(self) -> int:
        """One pass; how many blocks were bad."""
        loop = asyncio.get_running_loop()
        held = self._blocks.held()
        first = self._rng.randrange(len(held)) if held else 0
        rate = self._config.scrub_bytes_per_s or SdfsConfig().scrub_bytes_per_s
        due_s, seen_bytes, bad = loop.time(), 0, 0
        for at in range(len(held)):
            block = held[(first + at) % len(held)]
            if block not in self._blocks:
                continue
            size = self._blocks.size(block)
            try:
                bad += not await self._blocks.verify(block) and block not in self._blocks
            except DiskFailed as error:  # it cannot even be opened
                log.warning("block not scrubbed", extra={"block": block, "error": str(error)})
            seen_bytes += size
            due_s += size / rate
            if due_s - loop.time() > SLEEP_MIN_S:
                await asyncio.sleep(due_s - loop.time())
        log.info("blocks scrubbed", extra={"blocks": len(held), "bytes": seen_bytes, "rotten": bad})
        return bad

    async def _probe(self) -> None:
        """A disk that failed is tried again now and then."""
        while True:
            await asyncio.sleep(self._config.probe_s)
            if self._blocks.problem:
                await self._blocks.probe()
