# idunno/sdfs/chain.py: the two places a block goes to while a node receives it: its own disk, and the rest of the chain.
#
# Rule 1: either may fail at any moment without holding up the other: the error is kept, later bytes are let go.
# Rule 2: only IdunnoErrors are kept so. A bug is a bug.
# Rule 3: nobody is waited for without end: a node that takes nothing is given up, the last of the chain first.
from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from idunno.base.disk import Buffer
from idunno.base.errors import DeadlineExceeded, IdunnoError
from idunno.base.ids import BlockId, NodeId
from idunno.sdfs.blocks import BlockStore, BlockWriter
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.messages import WRITE_BLOCK, CopyFailure, WriteBlock, WriteBlockAnswer
from idunno.wire.calls import Lane, Peers, Stream

log = logging.getLogger("idunno.sdfs")


class Copy(Protocol):
    """Where a block is going. Methods are called in order; `close` always, last."""

    @property
    def wants(self) -> bool:
        """Whether more of the block's bytes are of use: it has not failed, and has not got the block without them."""
        ...

    async def begin(self) -> None: ...
    async def append(self, body: Buffer) -> None: ...
    async def finish(self) -> WriteBlockAnswer: ...
    async def close(self) -> None: ...


class LocalCopy:
    """The copy on this node's disk. A block that is here already is read again from end to end instead of written again."""

    def __init__(self, me: NodeId, blocks: BlockStore, request: WriteBlock) -> None:
        self._me, self._blocks, self._request = me, blocks, request
        self._writer: BlockWriter | None = None
        self._error: IdunnoError | None = None
        self._held = False

    @property
    def wants(self) -> bool:
        return self._error is None and not self._held

    async def begin(self) -> None:
        block, size, put = self._request.block, self._request.size, self._request.put
        try:
            if not self._request.whole and await self._have(block, size, put):
                self._held = True
            else:
                self._writer = await self._blocks.begin(block, size, put)
        except IdunnoError as error:
            self._fail(error)

    async def _have(self, block: BlockId, size: int, put: str) -> bool:
        """Whether the block is here, synced, and on the disk as its name says. It is pinned before the first look."""
        if block not in self._blocks or self._blocks.size(block) != size:
            return False
        self._blocks.pins.take(block, put)
        return await self._blocks.verify(block) and block in self._blocks

    async def append(self, body: Buffer) -> None:
        if self._error is None and self._writer is not None:
            try:
                await self._writer.append(body)
            except IdunnoError as error:
                self._fail(error)

    async def finish(self) -> WriteBlockAnswer:
        if self._error is None and self._writer is not None:
            try:
                await self._writer.finish()
            except IdunnoError as error:
                self._fail(error)
        if self._error is not None:
            return WriteBlockAnswer([], [CopyFailure(self._me, str(self._error))])
        return WriteBlockAnswer([self._me], [])

    async def close(self) -> None:
        if self._writer is not None:
            await self._writer.close()

    def _fail(self, error: IdunnoError) -> None:
        log.warning("block not stored", extra={"block": self._request.block, "code": error.code, "error": str(error)})
        self._error = error


class RemoteCopies:
    """The copies further down the chain: `request.chain` are those nodes, the next one first.

    Their answer is waited for from the beginning: it comes early when they all have the block already, or have failed.
    """

    def __init__(self, peers: Peers, request: WriteBlock, config: SdfsConfig, timeout_s: float) -> None:
        self._peers, self._request, self._timeout_s = peers, request, timeout_s
        self._stall_s = config.stall_s * len(request.chain)
        self._answer_s = config.answer_s * len(request.chain)
        self._stream: Stream[WriteBlockAnswer] | None = None
        self._answering: asyncio.Task[WriteBlockAnswer] | None = None
        self._error: IdunnoError | None = None

    @property
    def wants(self) -> bool:
        return self._answering is not None and not self._answering.done()

    async def begin(self) -> None:
        caller = self._peers.to(self._request.chain[0], Lane.BULK)
        try:
            async with asyncio.timeout(self._stall_s):
                stream = caller.open(WRITE_BLOCK, self._request, timeout_s=self._timeout_s)
                self._stream = await stream.__aenter__()
        except (IdunnoError, TimeoutError) as error:
            await self._fail(error, f"could not be reached in {self._stall_s:.0f} s")
        else:
            self._answering = asyncio.create_task(self._stream.answer(), name=f"copies of {self._request.block[:16]}")
            # Seen also when this is cancelled in `close`, and nobody comes to ask for it any more.
            self._answering.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def append(self, body: Buffer) -> None:
        if self._stream is not None and self.wants:
            try:
                async with asyncio.timeout(self._stall_s):
                    await self._stream.send(body)
            except (IdunnoError, TimeoutError) as error:
                await self._fail(error, f"took nothing for {self._stall_s:.0f} s")

    async def finish(self) -> WriteBlockAnswer:
        if self._stream is not None and self._answering is not None:
            try:
                async with asyncio.timeout(self._answer_s):
                    await self._stream.end()
                    return self._believed(await self._answering)
            except (IdunnoError, TimeoutError) as error:
                await self._fail(error, f"did not say in {self._answer_s:.0f} s that the block is stored")
        head, *others = self._request.chain
        behind = [CopyFailure(node, f"behind {head} in the chain", reached=False) for node in others]
        return WriteBlockAnswer([], [CopyFailure(head, str(self._error)), *behind])

    async def close(self) -> None:
        stream, self._stream = self._stream, None
        answering, self._answering = self._answering, None
        if stream is not None:
            await stream.__aexit__(None, None, None)
        if answering is not None:
            answering.cancel()
            await asyncio.wait([answering])
            if not answering.cancelled():
                answering.exception()  # looked at, so that nobody is told of it: whoever closes has no use for it

    async def _fail(self, error: IdunnoError | TimeoutError, late: str) -> None:
        head = self._request.chain[0]
        self._error = error if isinstance(error, IdunnoError) else DeadlineExceeded(f"node {head} {late}")
        extra = {"block": self._request.block, "node": head, "code": self._error.code, "error": str(self._error)}
        log.warning("replica failed", extra=extra)
        await self.close()

    def _believed(self, answer: WriteBlockAnswer) -> WriteBlockAnswer:
        """Only nodes of this chain count, each once; one that is not mentioned has failed."""
        chain = self._request.chain
        stored = [node for node in chain if node in answer.stored]
        said = {failure.node: failure for failure in answer.failed}
        failed = [said.get(n, CopyFailure(n, "gave no answer")) for n in chain if n not in stored]
        return WriteBlockAnswer(stored, failed)
