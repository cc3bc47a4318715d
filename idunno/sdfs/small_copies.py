# idunno/sdfs/small_copies.py: contents of small files that this node lacks, from the nodes that have them.
#
# Rule 1: who asks checks each content against its name, and keeps it like one that came with the log.
# Rule 2: a stream has at most BATCH contents; what is kept is on the disk before the next batch is asked for.
# Rule 3: contents that nobody has are waited for as long as anybody who may have them does not answer. When all have said that
#         they lack it, it is lost: that is logged, and nothing waits.
from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from idunno.base.errors import IdunnoError, InvalidArgument, Unavailable
from idunno.base.ids import BlockId, NodeId
from idunno.sdfs.hashing import block_id, check_block_id
from idunno.sdfs.small import SmallStore
from idunno.wire.calls import Call, Empty, Lane, Method, Peers, Registrar, Role

log = logging.getLogger("idunno.sdfs")

BATCH: Final = 1_024
"""At most 4 MiB of contents, a quarter of what the store's queue takes; their names fit a frame's header."""
BATCH_S: Final = 30.0


class ReadSmall(msgspec.Struct, frozen=True):
    """The contents of these small blocks, as far as they are here: one item each, the name in its note."""

    blocks: list[BlockId]


READ_SMALL: Final = Method("small.read", ReadSmall, Empty, Role.NODE)


class SmallCopies:
    def __init__(self, me: NodeId, small: SmallStore, peers: Peers, registrar: Registrar) -> None:
        self._me, self._small, self._peers = me, small, peers
        registrar.register(READ_SMALL, self._read)

    async def _read(self, call: Call[ReadSmall]) -> Empty:
        blocks = call.request.blocks
        if len(blocks) > BATCH:
            raise InvalidArgument(f"{len(blocks)} small contents at once, at most {BATCH}")
        for block in blocks:
            content = await self._small.get(check_block_id(block))
            if content is not None:
                await call.send(content, block.encode())
        return Empty()

    async def fetch(self, blocks: Iterable[BlockId], sources: Sequence[NodeId]) -> None:
        """Have these contents here, on the disk and synced; asks `sources` one after another for what is still missing.

        Raises Unavailable when some are missing and not every source has answered, DiskFailed.
        """
        missing = dict.fromkeys(block for block in blocks if block not in self._small)
        silent: list[str] = []
        for source in dict.fromkeys(sources):
            if source == self._me or not missing:
                continue
            try:
                await self._fetch_from(source, missing)
            except IdunnoError as error:
                silent.append(f"{source}: {error}")
        await self._small.flush()
        if missing and silent:
            raise Unavailable(f"{len(missing)} small contents are missing, and not all answered: {'; '.join(silent)}")
        if missing:
            log.error("small contents are lost", extra={"count": len(missing), "first": next(iter(missing))})

    async def _fetch_from(self, source: NodeId, missing: dict[BlockId, None]) -> None:
        """Takes out of `missing` what was got."""
        wanted = list(missing)
        for at in range(0, len(wanted), BATCH):
            request = ReadSmall(wanted[at : at + BATCH])
            async with self._peers.to(source, Lane.BULK).open(READ_SMALL, request, timeout_s=BATCH_S) as stream:
                while (item := await stream.receive()) is not None:
                    content = bytes(item.body)
                    block = block_id(content)
                    if block in missing:
                        await self._small.keep_surely(block, content)
                        del missing[block]
                await stream.answer()
            await self._small.flush()
