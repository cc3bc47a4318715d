# idunno/sdfs/orders.py: the leader's orders as a node carries them out: take a copy, verify one, let one go.
#
# Rule 1: an order of an older term than this node has seen is refused; before a copy is made or let go the node makes a barrier,
#         so that it has seen whatever was acknowledged before: another leader's term too.
# Rule 2: a copy is let go only when no open put counts on it (pins.py); the decision and the end of "have it" are one step.
# Rule 3: copies are taken one at a time, and the node rests between them, so that repair has its share of the link and no more.
#         The rest of the first few is owed: the loss of a few blocks is repaired as fast as it can be.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Final, TypeVar

from idunno.base.errors import (
    Conflict,
    Corrupt,
    DeadlineExceeded,
    DecodeError,
    DiskFailed,
    Exhausted,
    IdunnoError,
    NotFound,
    StaleTerm,
)
from idunno.base.ids import NodeId, Term
from idunno.sdfs.blocks import BlockStore, BlockWriter
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.hashing import check_block_id
from idunno.sdfs.messages import (
    COPY,
    DROP,
    HAVE_BLOCK,
    READ_BLOCK,
    Copy,
    CopyAnswer,
    Drop,
    HaveBlock,
    HaveBlockAnswer,
    ReadBlock,
)
from idunno.sdfs.ports import Coordination
from idunno.wire.calls import Call, Empty, Lane, Peers, Registrar

log = logging.getLogger("idunno.sdfs")

T = TypeVar("T")

BARRIER_S: Final = 5.0
REST_MAX_S: Final = 10.0
"""However slow a copy was: a link that recovers is used again soon."""
REST_OWED_S: Final = 2.0
"""Of rest that a node may owe: at 30 % that is 0.9 s of copying, a hundred megabytes of a gigabit link."""
ORDERS_MAX: Final = 8
"""Copies that wait for their turn here; the leader gives two at once, an old and a new one four."""


class Orders:
    def __init__(
        self, me: NodeId, coordinator: Coordination, blocks: BlockStore, peers: Peers, *, config: SdfsConfig
    ) -> None:
        self._me, self._coordinator, self._blocks, self._peers, self._config = me, coordinator, blocks, peers, config
        self._term = Term(0)
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._rested_s = 0.0  # when it will have rested from all copies so far

    def register(self, registrar: Registrar) -> None:
        registrar.register(COPY, self.copy)
        registrar.register(DROP, self.drop)
        registrar.register(HAVE_BLOCK, self.have)

    def _check_term(self, term: int) -> None:
        """Raises StaleTerm. An order's term is seen by it."""
        seen = max(self._term, self._coordinator.driver.term)
        if term < seen:
            raise StaleTerm(f"order of term {term}, this is term {seen}")
        self._term = Term(term)

    # -- verifying ----------------------------------------------------------------------------------------------------

    async def have(self, call: Call[HaveBlock]) -> HaveBlockAnswer:
        """Synced, and read again from end to end."""
        request = call.request
        block = check_block_id(request.block)
        if request.term:
            self._check_term(request.term)
        if request.put:
            self._blocks.pins.take(block, request.put)  # before it is said: somebody will count on it
        return HaveBlockAnswer(await self._blocks.verify(block))

    # -- letting go ---------------------------------------------------------------------------------------------------

    async def drop(self, call: Call[Drop]) -> Empty:
        block = check_block_id(call.request.block)
        self._check_term(call.request.term)
        mark = self._blocks.pins.mark()
        namespace = (await self._coordinator.read(BARRIER_S)).namespace
        # From here to `take_out` there is no await.
        self._check_term(call.request.term)
        needed = self._blocks.pins.is_needed(block, mark, lambda put: namespace.open_put(put) is not None)
        if needed or self._blocks.is_written(block):
            raise Conflict(f"block {block[:16]} is being put here: it stays")
        if block in self._blocks:
            self._blocks.take_out(block)
            await self._blocks.erase(block)
        return Empty()

    # -- taking a copy ------------------------------------------------------------------------------------------------

    async def copy(self, call: Call[Copy]) -> CopyAnswer:
        request = call.request
        check_block_id(request.block)
        self._check_term(request.term)
        if self._waiting >= ORDERS_MAX:
            raise Exhausted(f"{self._waiting} copies wait for their turn here, the most at once")
        self._waiting += 1
        try:
            async with self._turn:
                await self._rest()
                await self._coordinator.read(BARRIER_S)
                self._check_term(request.term)
                if request.block not in self._coordinator.machine.references:
                    raise Conflict(f"nothing refers to block {request.block[:16]} any more")
                return await self._copy(request)
        finally:
            self._waiting -= 1

    async def _rest(self) -> None:
        wait_s = self._rested_s - REST_OWED_S - asyncio.get_running_loop().time()
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    async def _copy(self, request: Copy) -> CopyAnswer:
        loop = asyncio.get_running_loop()
        if await self._blocks.verify(request.block):
            return CopyAnswer(True)
        lacking: list[NodeId] = []
        problems: list[str] = []
        for source in request.sources:
            began_s = loop.time()
            try:
                await self._copy_from(source, request)
            except (NotFound, Corrupt) as error:
                lacking.append(source)
                problems.append(f"{source}: {error}")
            except (DiskFailed, Exhausted):
                raise  # this node's own disk, or a source that is busy: another target, or another time
            except IdunnoError as error:
                problems.append(f"{source}: {error}")
            else:
                busy_s = loop.time() - began_s
                rest_s = busy_s * (100 - self._config.repair_link_percent) / self._config.repair_link_percent
                self._rested_s = max(self._rested_s, began_s) + busy_s + min(rest_s, REST_MAX_S)
                return CopyAnswer(True, lacking)
        return CopyAnswer(False, lacking, "; ".join(problems) or "no source was named")

    async def _copy_from(self, source: NodeId, request: Copy) -> None:
        """Raises Corrupt when it sent something else, NotFound, DeadlineExceeded, DiskFailed, ..."""
        ask = ReadBlock(request.block, 0, request.size, local_only=True)
        writer = await self._blocks.begin(request.block, request.size)
        try:
            async with self._peers.to(source, Lane.BULK).open(READ_BLOCK, ask, timeout_s=self._config.copy_s) as stream:
                received = 0
                while received < request.size:
                    item = await self._in_time(stream.receive(), source)
                    if item is None:
                        break
                    received += len(item.body)
                    if received > request.size:
                        raise Corrupt(f"node {source} sent more than block {request.block[:16]} has")
                    await writer.append(item.body)
                await self._in_time(stream.answer(), source)
            await _finish(writer)
        finally:
            await writer.close()

    async def _in_time(self, step: Awaitable[T], source: NodeId) -> T:
        try:
            async with asyncio.timeout(self._config.stall_s):
                return await step
        except TimeoutError:
            raise DeadlineExceeded(f"node {source} sent nothing for {self._config.stall_s:.0f} s") from None


async def _finish(writer: BlockWriter) -> None:
    try:
        await writer.finish()
    except DecodeError as error:
        raise Corrupt(str(error)) from error
