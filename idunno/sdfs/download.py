# idunno/sdfs/download.py: blocks on their way out of the cluster.
#
# Rule 1: nothing is handed on before it is verified: a block is what hashes to its name, whoever sent it.
# Rule 2: BLOCKS_UNDER_WAY blocks are fetched at once and handed on in order: 32 MiB in memory, whatever the file's size. Once
#         one is handed on, its memory is that of a later one: fresh pages for every block cost a tenth of a get.
# Rule 3: who sent wrong bytes is not asked again before everybody else was; a broken read goes on at the offset reached.
# Rule 4: a block that nobody can give is waited for PATIENCE_S, not for the whole of the caller's time.
from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from idunno.base.disk import Buffer
from idunno.base.errors import Corrupt, DeadlineExceeded, Exhausted, IdunnoError, NotFound
from idunno.base.ids import NodeId
from idunno.coordinator.records import BLOCK_BYTES_MAX
from idunno.sdfs.asking import Asker, may_repeat
from idunno.sdfs.hashing import Offload, block_id
from idunno.sdfs.messages import READ_BLOCK, BlockCopies, ReadBlock

Sink = Callable[[int, Buffer], Awaitable[None]]
"""Takes the bytes at an offset; called in order, one call at a time. As with io.RawIOBase.write, they are the caller's again
when it returns: what is kept is copied."""

BLOCKS_UNDER_WAY: Final = 4
"""One is being written locally, one is being verified, one is arriving, one is being asked for: a tenth faster than three."""
BLOCK_S: Final = 60.0
ENTRY_STALL_S: Final = 20.0
"""How long the entry node may send nothing: it tries several replicas, each for 3 s (config.py)."""
PATIENCE_S: Final = 30.0
"""A restart of a node and several elections fit into it."""
SOURCES_MAX: Final = 16


async def download(asker: Asker, blocks: Sequence[BlockCopies], sink: Sink, offload: Offload) -> None:
    """Give the blocks' bytes to `sink`, in order. Raises Unavailable, Corrupt, DeadlineExceeded, what `sink` raises."""
    under_way: deque[asyncio.Task[Buffer]] = deque()
    largest = min(BLOCK_BYTES_MAX, max((block.size for block in blocks), default=0))
    rooms = [bytearray(max(0, largest)) for _ in blocks[:BLOCKS_UNDER_WAY]]  # used again when the block was handed on
    offset = 0
    try:
        for number in range(len(blocks) + BLOCKS_UNDER_WAY):
            if number >= BLOCKS_UNDER_WAY and under_way:
                content = await under_way.popleft()
                await sink(offset, content)
                offset += len(content)
            if number < len(blocks):
                block = blocks[number]
                fetching = fetch(asker, block, offload, rooms[number % BLOCKS_UNDER_WAY])
                under_way.append(asyncio.create_task(fetching, name=f"block {block.block[:16]}"))
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def fetch(asker: Asker, block: BlockCopies, offload: Offload, room: bytearray | None = None) -> Buffer:
    """One block, verified, in the first bytes of `room` if that is given.

    Raises Unavailable or Corrupt after PATIENCE_S without success, DeadlineExceeded.
    """
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + PATIENCE_S
    if not 0 < block.size <= BLOCK_BYTES_MAX:
        raise Corrupt(f"{asker.what}: block {block.block[:16]} is said to have {block.size} bytes: ask another node")
    reading = _Reading(block, memoryview(room or bytearray(block.size))[: block.size])
    attempt = 0
    while True:
        asker.left_s(f"reading block {block.block[:16]}")  # raised here it is told as it is, not as a read that failed
        try:
            await reading.run(asker)
            if await offload(lambda: block_id(reading.content)) == block.block:
                return reading.content
            reading.wrong()
            error: IdunnoError = Corrupt(
                f"{asker.what}: block {block.block[:16]} came with other content than its name says, "
                f"from {', '.join(reading.excluded) or 'nobody known'}"
            )
        except Corrupt as corrupt:  # the node that holds it has seen it itself
            reading.wrong()
            error = corrupt
        except IdunnoError as other:
            # NotFound: the holder has lost it since; Exhausted: too many readers. Both may be otherwise at once.
            if not (may_repeat(other) or isinstance(other, (NotFound, Exhausted))):
                raise
            error = other
        if loop.time() >= give_up_s:
            raise error
        asker.left_s(f"block {block.block[:16]} cannot be read ({error})")
        await asker.pause(attempt)
        attempt += 1


class _Reading:
    """What has arrived of a block, and from whom."""

    def __init__(self, block: BlockCopies, content: memoryview) -> None:
        self.content = content
        self.excluded: list[NodeId] = []  # they sent wrong bytes
        self._block = block
        self._at = self._runs = 0
        self._sources: dict[NodeId, None] = {}  # of the bytes so far

    async def run(self, asker: Asker) -> None:
        """Read on from where the last run ended."""
        block = self._block
        # Those that were named at first may have gone since: later attempts let the entry node ask who has it now.
        relay = block.nodes[:SOURCES_MAX] if self._runs == 0 else []
        self._runs += 1
        request = ReadBlock(block.block, self._at, block.size - self._at, relay, self.excluded)
        timeout_s = min(BLOCK_S, asker.left_s(f"reading block {block.block[:16]}"))
        async with asker.caller().open(READ_BLOCK, request, timeout_s=timeout_s) as stream:
            while True:
                try:
                    async with asyncio.timeout(ENTRY_STALL_S):
                        item = await stream.receive()
                except TimeoutError:
                    raise DeadlineExceeded(f"{asker.what}: nothing came for {ENTRY_STALL_S:g} s") from None
                if item is None:
                    break
                if item.note:
                    self._sources[NodeId(item.note.decode("ascii", "replace"))] = None
                end = self._at + len(item.body)
                if end > block.size:
                    raise Corrupt(f"block {block.block[:16]} came with more than its {block.size} bytes")
                self.content[self._at : end] = item.body
                self._at = end
            await stream.answer()
        if self._at != block.size:
            raise Corrupt(f"block {block.block[:16]} ended after {self._at} of {block.size} bytes")

    def wrong(self) -> None:
        """What came is not the block: forget it, and do not ask its senders again before everybody else."""
        fresh = [node for node in self._sources if node not in self.excluded]
        # When those that were left have failed too, all get another chance.
        self.excluded = [*self.excluded, *fresh][-SOURCES_MAX:] if fresh else []
        self._sources.clear()
        self._at = 0
