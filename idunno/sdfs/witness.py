# idunno/sdfs/witness.py: who has really stored the blocks of a put, as nodes say it: a commit takes no client's word for it.
#
# Rule 1: what a node heard from a chain while it passed a client's block on (datanode.py) is remembered until the commit; what it
#         did not hear, because the client came from another entry node, it asks those whom the commit names.
# Rule 2: a node attests a block with its size when it wrote, verified and synced it for that very put; when it cannot tell that
#         any more, for it was started anew since, when it has read it from end to end.
# Rule 3: bounded: so many blocks are remembered, the put that was heard of longest ago is forgotten first, and asked about.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Container, Sequence
from typing import Final

from idunno.base.errors import IdunnoError, InvalidArgument
from idunno.base.ids import BlockId, NodeId
from idunno.coordinator.namespace import BLOCKS_MAX
from idunno.coordinator.roster import Roster
from idunno.sdfs.blocks import BlockStore
from idunno.sdfs.hashing import check_block_id
from idunno.sdfs.messages import ATTEST, Attest, AttestAnswer, BlockCopies
from idunno.wire.calls import Call, Peers, Registrar

log = logging.getLogger("idunno.sdfs")

REMEMBERED_MAX: Final = 20_000
"""Blocks of puts under way, 160 GB: about 10 MB at the most."""
ATTEST_BLOCKS_MAX: Final = 1_000
"""In one question."""
CHECKED_MAX: Final = 16
"""Of those, read again before an answer is given: 128 MB. Who asks goes on from there."""
ASK_S: Final = 10.0
"""For one question: its node has to read CHECKED_MAX blocks at worst."""


class Witness:
    def __init__(self, me: NodeId, blocks: BlockStore, peers: Peers) -> None:
        self._me, self._blocks, self._peers = me, blocks, peers
        self._puts: dict[str, dict[BlockId, tuple[int, dict[NodeId, None]]]] = {}  # heard of longest ago first
        self._count = 0

    def register(self, registrar: Registrar) -> None:
        registrar.register(ATTEST, self.attest)

    def heard(self, put: str, block: BlockId, size: int, stored: Sequence[NodeId]) -> None:
        """Nodes said that they have synced this block of the put."""
        if not stored:
            return
        blocks = self._puts.pop(put, {})
        self._puts[put] = blocks
        if block not in blocks:
            if len(blocks) >= BLOCKS_MAX:
                return  # no commit can name so many
            self._count += 1
            blocks[block] = (size, {})
        blocks[block][1].update(dict.fromkeys(stored))
        while self._count > REMEMBERED_MAX and len(self._puts) > 1:
            self.forget(next(iter(self._puts)))

    def knows(self, put: str, block: BlockId) -> bool:
        """Whether a client's block of that put was stored through this node."""
        return block in self._puts.get(put, ())

    def forget(self, put: str) -> None:
        self._count -= len(self._puts.pop(put, ()))

    async def proven(
        self,
        put: str,
        claimed: Sequence[BlockCopies],
        roster: Roster,
        needed: int,
        timeout_s: float,
        *,
        heard_only: Container[BlockId] = (),
    ) -> dict[BlockId, list[NodeId]]:
        """For each block the nodes of the roster that have it, as they say themselves, of those claimed or heard of.

        Raises InvalidArgument when a block has another size than its commit says.
        """
        sizes: dict[BlockId, int] = {}
        found: dict[BlockId, dict[NodeId, None]] = {}
        to_ask: dict[NodeId, dict[BlockId, None]] = {}
        heard = self._puts.get(put, {})
        for copies in claimed:
            block = check_block_id(copies.block)
            size, nodes = heard.get(block, (0, {}))
            known = found.setdefault(block, {node: None for node in nodes if roster.find(node) is not None})
            sizes[block] = size
            if len(known) < needed and block not in heard_only:
                for node in copies.nodes[:ATTEST_BLOCKS_MAX]:
                    if node not in known and roster.find(node) is not None:
                        to_ask.setdefault(node, {})[block] = None
        answers = await asyncio.gather(
            *(self._ask(node, put, list(asked), timeout_s) for node, asked in to_ask.items())
        )
        for node, answer in zip(to_ask, answers, strict=True):
            for block, size in answer.items():
                found[block][node] = None
                sizes[block] = size
        for copies in claimed:
            if sizes[copies.block] not in (0, copies.size):
                raise InvalidArgument(
                    f"block {copies.block[:16]} has {sizes[copies.block]:,} bytes, not {copies.size:,} as the commit says"
                )
        return {block: list(nodes) for block, nodes in found.items()}

    async def _ask(self, node: NodeId, put: str, blocks: list[BlockId], timeout_s: float) -> dict[BlockId, int]:
        """The sizes of those that the node attests; who does not answer attests nothing."""
        loop, attested = asyncio.get_running_loop(), dict[BlockId, int]()
        end_s = loop.time() + timeout_s
        while blocks and loop.time() < end_s:
            asked = Attest(put, blocks[:ATTEST_BLOCKS_MAX])
            try:
                if node == self._me:
                    answer = await self._attested(asked)
                else:
                    left_s = min(ASK_S, max(0.05, end_s - loop.time()))
                    answer = await self._peers.to(node).call(ATTEST, asked, timeout_s=left_s)
            except IdunnoError as error:
                log.info("holder did not attest", extra={"put": put, "holder": node, "error": str(error)})
                break
            if not 0 < len(answer.sizes) <= len(asked.blocks):
                break
            attested.update((b, size) for b, size in zip(asked.blocks, answer.sizes, strict=False) if size)
            blocks = blocks[len(answer.sizes) :]
        return attested

    async def attest(self, call: Call[Attest]) -> AttestAnswer:
        if len(call.request.blocks) > ATTEST_BLOCKS_MAX:
            raise InvalidArgument(f"{len(call.request.blocks):,} blocks in one question, at most {ATTEST_BLOCKS_MAX:,}")
        return await self._attested(call.request)

    async def _attested(self, asked: Attest) -> AttestAnswer:
        sizes: list[int] = []
        checked = 0
        for block in map(check_block_id, asked.blocks):
            whole = block in self._blocks
            if whole:
                self._blocks.pins.take(block, asked.put)  # before it is said: somebody will count on it
                if not self._blocks.was_written_here(block):
                    if checked == CHECKED_MAX:
                        break
                    checked += 1
                    whole = await self._blocks.verify(block)  # False also for one that is held and cannot be read
            sizes.append(self._blocks.size(block) if whole and block in self._blocks else 0)
        return AttestAnswer(sizes)
