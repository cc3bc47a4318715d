# idunno/sdfs/upload.py: a put's blocks on their way into the cluster.
#
# Rule 1: BLOCKS_UNDER_WAY blocks are sent while the next is read: four in memory, 32 MiB, whatever the file's size.
# Rule 2: a block is done when a quorum of nodes has said that it is synced there. Nodes that fail are replaced by spares, then
#         by a new placement (`file.begin` with the same put id) for what is left, until the time is over. Where too few nodes
#         can take that for PATIENCE_S, they are full: more time would not help.
# Rule 3: blocks are named by content, so sending one again is harmless, and equal ones are sent once.
from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from idunno.base.disk import Buffer
from idunno.base.errors import DeadlineExceeded, Exhausted, IdunnoError, InvalidArgument, StaleTerm
from idunno.base.ids import BlockId, NodeId
from idunno.coordinator.records import BLOCK_BYTES_MAX, Block
from idunno.sdfs.asking import PATIENCE_S, Asker, may_repeat
from idunno.sdfs.config import FILE_BLOCKS_MAX
from idunno.sdfs.hashing import Offload, block_id
from idunno.sdfs.messages import BEGIN, WRITE_BLOCK, Begin, BeginAnswer, BlockCopies, WriteBlock, WriteBlockAnswer
from idunno.wire.calls import BODY_BYTES_MAX

Source = Callable[[int], Awaitable[Buffer]]
"""The next bytes of the content, at most that many; empty at the end."""

BLOCKS_UNDER_WAY: Final = 2
"""While one waits for four disks to sync, the other uses the network. A third was not faster, and took 8 MiB more."""
BLOCK_S: Final = 60.0
"""One block's writing, above what a chain of four may take until each has blamed the next (config.py)."""
ENTRY_STALL_S: Final = 20.0
"""How long the entry node may take nothing: longer than the first of a chain may wait for the others."""


class Upload:
    """The blocks of one put. `begin`, then `send`; then `copies` names blocks and holders for the commit."""

    def __init__(
        self, asker: Asker, request: Begin, offload: Offload, *, write_quorum: int | None, sent: Callable[[int], None]
    ) -> None:
        self.blocks: list[Block] = []
        self.size = 0
        self._asker, self._request, self._offload, self._sent = asker, request, offload, sent
        self._write_quorum = write_quorum
        self._stored: dict[BlockId, dict[NodeId, None]] = {}
        self._placement: BeginAnswer | None = None
        self._generation = 0
        self._failed: dict[NodeId, str] = {}  # under this placement; a new one gives them another chance
        self._lacking_since_s: float | None = None  # loop time; since when too few nodes can take what is left
        self._renewing = asyncio.Lock()

    async def begin(self, *, proven: bool = False) -> BeginAnswer:
        """Open the put, or ask again where its blocks should go; with `proven` also which of their copies count.

        Raises Exhausted when too few nodes could take what is left for PATIENCE_S.
        """
        request, patience_s = self._request, PATIENCE_S
        if self._placement is not None:
            request, patience_s = msgspec.structs.replace(request, size=self._left_bytes()), math.inf
        if proven:
            request = msgspec.structs.replace(request, claimed=self.copies())
        self._placement = await self._asker.ask(BEGIN, request, patience_s=patience_s)
        self._stored.update((copies.block, dict.fromkeys(copies.nodes)) for copies in self._placement.proven)
        self._generation += 1
        self._failed.clear()
        if self._placement.committed is None and (not proven or self.short()):
            self._look_at_room()
        return self._placement

    def lacking(self) -> str:
        """Why too few nodes can take blocks, and what to do; "" if there are enough."""
        placed = self._placement
        assert placed is not None, "begin comes first"
        able, wanted = len(placed.replicas) + len(placed.spares), self._quorum()
        if able >= wanted:
            return ""
        return (
            f"{self._request.name}: {wanted} copies are asked for, and {able} nodes can take blocks now "
            f"({'; '.join(placed.left_out) or 'there are no others'}); free some space, add nodes, or give --write-quorum"
        )

    def _look_at_room(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if not (why := self.lacking()):
            self._lacking_since_s = None
        elif self._lacking_since_s is None:
            self._lacking_since_s = now_s
        elif now_s - self._lacking_since_s >= PATIENCE_S:
            raise Exhausted(why)

    def _left_bytes(self) -> int:
        """Of the content: what has yet to be stored, as far as is known."""
        under_way = sum(block.size for block in self.short())
        return max(0, (self._request.size or 0) - self.size) + under_way

    async def send(self, first: Buffer, source: Source) -> None:
        """Send `first`, which is a whole block or all there is, and what `source` gives after it."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            content = first
            while len(content):
                block = await self._offload(lambda content=content: block_id(content))  # type: ignore[misc]
                self._note(Block(block, len(content)))
                if block in self._stored:
                    self._sent(len(content))
                else:
                    self._stored[block] = {}
                    while len(tasks) >= BLOCKS_UNDER_WAY:
                        tasks = await _one_done(tasks)
                    tasks.add(asyncio.create_task(self.store(block, content), name=f"block {block[:16]}"))
                content = await next_block(self._asker, source) if len(content) == BLOCK_BYTES_MAX else b""
            while tasks:
                tasks = await _one_done(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _note(self, block: Block) -> None:
        self.blocks.append(block)
        self.size += block.size
        if len(self.blocks) > FILE_BLOCKS_MAX:
            raise InvalidArgument(
                f"{self._request.name} has more than {FILE_BLOCKS_MAX * BLOCK_BYTES_MAX:,} bytes, the most a file can have; "
                "put it in parts"
            )

    def copies(self) -> list[BlockCopies]:
        """For each block, in order, who has it."""
        return [BlockCopies(b.block, b.size, list(self._stored[b.block])) for b in self.blocks]

    def short(self) -> list[Block]:
        """Blocks, each once, with fewer copies than the quorum of the last placement."""
        return [b for b in dict.fromkeys(self.blocks) if len(self._stored[b.block]) < self._quorum()]

    async def store(self, block: BlockId, content: Buffer) -> None:
        """Until a quorum has the block. Raises what cannot be helped, DeadlineExceeded."""
        stored = self._stored[block]
        attempt = 0
        while True:
            generation, why = self._generation, ""
            self._asker.left_s(
                f"sending block {block[:16]}"
            )  # raised here it is told as it is, not as a node's failure
            if chain := self._choose(stored):
                try:
                    answer = await self._write(block, content, chain)
                except IdunnoError as error:
                    # Who of the chain has it is not known: it is sent again. Exhausted: the entry node is busy. StaleTerm:
                    # there is another leader since, who has to place it.
                    if not (may_repeat(error) or isinstance(error, (Exhausted, StaleTerm))):
                        raise
                    why = str(error)
                else:
                    stored.update(dict.fromkeys(answer.stored))
                    self._failed.update({failure.node: failure.error for failure in answer.failed if failure.reached})
                    if len(stored) < self._quorum() and self._choose(stored):
                        continue
            if len(stored) >= self._quorum():  # perhaps by a new placement: fewer nodes are present than before
                self._asker.problem, self._lacking_since_s = "", None
                self._sent(len(content))
                return
            why = why or "; ".join(f"{node}: {error}" for node, error in self._failed.items())
            self._asker.problem = self._story(block, stored, why)
            self._asker.left_s("sending blocks")
            await self._asker.pause(attempt)
            attempt += 1
            await self._renew(generation)

    def _quorum(self) -> int:
        assert self._placement is not None, "begin comes first"
        return self._write_quorum or self._placement.quorum

    def _choose(self, stored: dict[NodeId, None]) -> list[NodeId]:
        """Who gets the block next: all replicas at first, then as many as the quorum lacks."""
        assert self._placement is not None, "begin comes first"
        order = [replica.node for replica in (*self._placement.replicas, *self._placement.spares)]
        fresh = [node for node in order if node not in stored and node not in self._failed]
        wanted = self._quorum() if stored else len(self._placement.replicas)
        return fresh[: max(0, wanted - len(stored))]

    async def _renew(self, generation: int) -> None:
        """A new placement, unless another block has asked for one meanwhile."""
        async with self._renewing:
            if self._generation == generation:
                await self.begin()

    async def _write(self, block: BlockId, content: Buffer, chain: list[NodeId]) -> WriteBlockAnswer:
        assert self._placement is not None, "begin comes first"
        request = WriteBlock(self._request.put, block, len(content), chain, self._placement.term)
        timeout_s = min(BLOCK_S, self._asker.left_s(f"sending block {block[:16]}"))
        async with self._asker.caller().open(WRITE_BLOCK, request, timeout_s=timeout_s) as stream:
            try:
                view = memoryview(content)
                for start in range(0, len(view), BODY_BYTES_MAX):
                    async with asyncio.timeout(ENTRY_STALL_S):
                        await stream.send(view[start : start + BODY_BYTES_MAX])
                await stream.end()
                async with asyncio.timeout(timeout_s):
                    answer = await stream.answer()
            except TimeoutError:
                raise DeadlineExceeded(f"the node that took block {block[:16]} stands still") from None
        # Only those asked count; a node that says nothing has failed.
        said = {failure.node for failure in answer.failed} | set(answer.stored)
        self._failed.update({node: "gave no answer" for node in chain if node not in said})
        return WriteBlockAnswer([node for node in chain if node in answer.stored], answer.failed)

    def _story(self, block: BlockId, stored: dict[NodeId, None], why: str) -> str:
        return f"block {block[:16]} has {len(stored)} of {self._quorum()} copies ({why or 'no node could take it'})"


async def next_block(asker: Asker, source: Source) -> Buffer:
    """`read_block` within the operation's time: what the content comes from may stand still, or never end.

    Raises DeadlineExceeded.
    """
    limit = asyncio.timeout(asker.left_s("reading the content"))
    try:
        async with limit:
            return await read_block(source)
    except TimeoutError:
        if not limit.expired():  # the source's own
            raise
        raise asker.late("the rest of the content has not come") from None


async def read_block(source: Source) -> Buffer:
    """The next BLOCK_BYTES_MAX bytes; fewer only at the end of the content."""
    piece = await source(BLOCK_BYTES_MAX)
    if len(piece) in (0, BLOCK_BYTES_MAX):
        return piece
    pieces, length = [piece], len(piece)
    while length < BLOCK_BYTES_MAX and len(piece := await source(BLOCK_BYTES_MAX - length)):
        pieces.append(piece)
        length += len(piece)
    assert length <= BLOCK_BYTES_MAX, "the source gave more than it was asked for"
    return b"".join(pieces)


async def _one_done(tasks: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Wait for one; the others. Raises its error."""
    done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return others
