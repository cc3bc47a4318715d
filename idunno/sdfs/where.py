# idunno/sdfs/where.py: which nodes to ask for a block, as any node finds out.
#
# Rule 1: the leader knows (leading.py). While it is away or recovering, everybody present may have the block and is asked,
#         in an order of each node's own, so that load spreads.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from idunno.base.errors import WHEN_LOST, IdunnoError, NoQuorum
from idunno.base.ids import BlockId, NodeId
from idunno.sdfs.asking import may_repeat
from idunno.sdfs.locator import LOCATE_BLOCKS_MAX
from idunno.sdfs.messages import (
    COPIED,
    INVENTORY,
    LOCATE,
    PLACE,
    BlockCopies,
    Copied,
    Inventory,
    Locate,
    Place,
    PlaceAnswer,
)
from idunno.sdfs.placement import draw
from idunno.sdfs.ports import Coordination
from idunno.wire.calls import A, Method, Peers, Q

log = logging.getLogger("idunno.sdfs")

ASK_S: Final = 2.0
"""For one question to the leader."""
PAUSE_S: Final = 0.1
"""Before the leader is asked again; an election takes about a second."""
HOLDERS_TOLD_MAX: Final = 6
"""Nodes named for a block: enough to read it, and 4,096 blocks still fit one message."""

ORDER_SLICE: Final = 200
"""Blocks whose holders are put in order in one turn of the loop: with 4 each 1 to 3 ms."""


class Where:
    """This node's questions to the leader about blocks."""

    def __init__(self, me: NodeId, coordinator: Coordination, peers: Peers) -> None:
        self._me, self._coordinator, self._peers = me, coordinator, peers

    async def ask_leader(self, method: Method[Q, A], request: Q, timeout_s: float) -> A:
        """Whoever leads, also through an election. Raises NoQuorum or what the leader raised after `timeout_s`."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while True:
            try:
                leader = self._coordinator.driver.leader
                if leader is None:
                    raise NoQuorum(
                        f"no leader is known: an election is under way, or too many nodes are away; {WHEN_LOST}"
                    )
                left_s = max(0.05, end_s - loop.time())
                return await self._peers.to(leader).call(method, request, timeout_s=min(ASK_S, left_s))
            except IdunnoError as error:
                if not may_repeat(error) or loop.time() + PAUSE_S >= end_s:
                    raise
            await asyncio.sleep(PAUSE_S)

    async def place(self, put: str, size: int | None, timeout_s: float) -> PlaceAnswer:
        return await self.ask_leader(PLACE, Place(put, self._me, size), timeout_s)

    async def copied(self, blocks: Sequence[BlockCopies], timeout_s: float) -> None:
        """Tell the leader what was committed."""
        term = self._coordinator.driver.term
        for at in range(0, len(blocks), LOCATE_BLOCKS_MAX):
            await self.ask_leader(COPIED, Copied(list(blocks[at : at + LOCATE_BLOCKS_MAX]), term), timeout_s)

    async def report(self, leader: NodeId, page: Inventory) -> None:
        """Send an inventory page. Raises an IdunnoError when it did not arrive or was refused."""
        await self._peers.to(leader).call(INVENTORY, page, timeout_s=10.0)

    async def known(self, blocks: Sequence[BlockId], timeout_s: float) -> tuple[dict[BlockId, list[NodeId]], bool]:
        """Who holds each block as far as the leader knows, present nodes only; and whether it is recovering."""
        roster = self._coordinator.machine.roster
        present = {n.node for n in roster.nodes() if n.presence == "present"}
        found: dict[BlockId, list[NodeId]] = {}
        recovering = False
        asked = list(dict.fromkeys(blocks))
        for at in range(0, len(asked), LOCATE_BLOCKS_MAX):
            page = asked[at : at + LOCATE_BLOCKS_MAX]
            answer = await self.ask_leader(LOCATE, Locate(page), timeout_s)
            recovering = recovering or answer.recovering
            for block, nodes in zip(page, answer.nodes, strict=True):
                found[block] = [node for node in nodes if node in present]
        return found, recovering

    async def told(self, blocks: Sequence[BlockId]) -> dict[BlockId, list[NodeId]]:
        """For each block some of its holders, best first; none where that is not known now: then its reader's node asks."""
        try:
            found, _ = await self.known(blocks, ASK_S)
        except IdunnoError as error:
            log.info("holders not known", extra={"code": error.code, "error": str(error)})
            found = {}
        told: dict[BlockId, list[NodeId]] = {}
        for number, block in enumerate(blocks, 1):
            told[block] = self.order(block, found.get(block, []))[:HOLDERS_TOLD_MAX]
            if number % ORDER_SLICE == 0:
                await asyncio.sleep(0)
        return told

    async def locate(self, block: BlockId) -> list[NodeId]:
        """Whom to ask for a block, best first: its holders; while these are not known for sure, everybody else after them."""
        try:
            found, recovering = await self.known([block], ASK_S)
        except IdunnoError as error:
            log.info("holders not known", extra={"block": block, "code": error.code, "error": str(error)})
            found, recovering = {}, True
        known = self.order(block, found.get(block, []))
        if known and not recovering:
            return known
        return known + [node for node in self.everybody(block) if node not in known]

    def everybody(self, block: BlockId) -> list[NodeId]:
        """All present nodes, in the order in which this node asks for the block."""
        roster = self._coordinator.machine.roster
        return self.order(block, [n.node for n in roster.nodes() if n.presence == "present"])

    def order(self, block: BlockId, nodes: Sequence[NodeId]) -> list[NodeId]:
        """This node first; the others by a draw of block, reader and node, so that readers spread over holders."""
        return sorted(nodes, key=lambda node: (node != self._me, -draw(f"{self._me}\0{block}", node)))
