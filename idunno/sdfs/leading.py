# idunno/sdfs/leading.py: what the coordinator's leader alone does for files: it knows where blocks are, and where they may go.
#
# Rule 1: it answers only while it leads (NotLeader otherwise); everything it knows is of its term (locator.py).
# Rule 2: it aborts puts that are open for too long: their clients are gone. Everything else about puts is in the machine.
# Rule 3: it proposes what expires and what is purged (expiry.py), and keeps the copies at their number (repairing.py).
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from idunno.base.errors import WHEN_LOST, IdunnoError, InvalidArgument, NoQuorum, NotLeader, PermissionDenied
from idunno.base.ids import BlockId, NodeId, Term
from idunno.coordinator.commands import AbortPut
from idunno.coordinator.effects import BlocksFreed, Effect, RetentionChanged, RosterChanged, VersionMade
from idunno.sdfs import tasks
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.expiry import Expiry
from idunno.sdfs.locator import LOCATE_BLOCKS_MAX, Locator
from idunno.sdfs.messages import (
    COPIED,
    INVENTORY,
    LOCATE,
    PLACE,
    REPAIR,
    Copied,
    Inventory,
    Locate,
    LocateAnswer,
    Place,
    PlaceAnswer,
    Repair,
    RepairAnswer,
    Replica,
)
from idunno.sdfs.placement import place, unable
from idunno.sdfs.ports import Coordination
from idunno.sdfs.repairing import Repairing
from idunno.sdfs.rules import quorum
from idunno.wire.answering import left_s
from idunno.wire.calls import Actor, Call, Empty, Peers, Registrar, Role

log = logging.getLogger("idunno.sdfs")

LOOK_S: Final = 60.0
"""Between looks for forgotten puts."""
ABORTS_MAX: Final = 100
"""Puts aborted in one look: an hour's failures of a cluster never delay other commands by more than a moment."""
ABORT_S: Final = 10.0
LEFT_OUT_TOLD_MAX: Final = 8


class Leading:
    """Handlers `sdfs.*`. The node tells `role_changed` (RaftDriver.on_role)."""

    def __init__(
        self,
        me: NodeId,
        coordinator: Coordination,
        peers: Peers,
        *,
        config: SdfsConfig,
        is_small: Callable[[BlockId], bool],
    ) -> None:
        self._is_small = is_small  # whether a block is the content of a small file
        self._me, self._coordinator, self._peers, self._config = me, coordinator, peers, config
        self._locator: Locator | None = None  # only while leading
        self._repairing: Repairing | None = None  # likewise
        self._expiry = Expiry(me, coordinator, config=config)
        self._task: asyncio.Task[None] | None = None

    def register(self, registrar: Registrar) -> None:
        registrar.register(PLACE, self.place)
        registrar.register(LOCATE, self.locate)
        registrar.register(COPIED, self.copied)
        registrar.register(INVENTORY, self.inventory)
        registrar.register(REPAIR, self.repair)

    def start(self) -> None:
        self._task = tasks.begin(self._look_after(), "sdfs-leader")
        self._expiry.start(lambda: self._repairing is not None)

    async def stop(self) -> None:
        await tasks.end(self._task)
        self._task = None
        await self._expiry.stop()
        self._locator = None
        if self._repairing is not None:
            self._repairing.close()
            await self._repairing.closed()
            self._repairing = None

    def role_changed(self, is_leader: bool, term: Term) -> None:
        if self._repairing is not None:
            self._repairing.close()
        self._locator = self._repairing = None
        if is_leader:
            self._locator = Locator(term)
            self._repairing = Repairing(
                self._me, self._coordinator, self._peers, self._locator, config=self._config, is_small=self._is_small
            )

    def follow(self, effect: Effect) -> None:
        """What was applied here, in order."""
        if self._repairing is None:
            return
        if isinstance(effect, VersionMade):
            self._repairing.made(effect.blocks)
        elif isinstance(effect, BlocksFreed):
            self._repairing.touch(effect.blocks)
        elif isinstance(effect, RosterChanged):
            self._repairing.roster_changed()
        elif isinstance(effect, RetentionChanged):
            self._expiry.wake()

    @property
    def begun(self) -> bool:
        """Whether this node leads, has applied all that was committed before, and has taken over."""
        return self._repairing is not None

    @property
    def recovering(self) -> bool:
        """Whether this leader has not yet heard from every present node. False on others."""
        return self._repairing is not None and self._repairing.recovering

    @property
    def copies_missing(self) -> int:
        """Of all blocks that something refers to, on present nodes; 0 where this node does not lead."""
        return self._repairing.core.missing if self._repairing is not None else 0

    def lost(self) -> list[BlockId]:
        """Blocks of which no present node has a copy."""
        return self._repairing.core.lost() if self._repairing is not None and not self.recovering else []

    def disk_problems(self) -> dict[NodeId, str]:
        """Nodes that take no blocks, and why: a full or failing disk."""
        if self._repairing is None:
            return {}
        found = [(c.node, unable(c, self._config, 0)) for c in self._repairing.candidates() if c.presence == "present"]
        return {node: why for node, why in found if why}

    def blocks_rotten(self) -> dict[NodeId, int]:
        """Nodes that found blocks rotten or unreadable since their start, and how many."""
        if self._repairing is None or self._locator is None:
            return {}
        found = {candidate.node: self._locator.rotten(candidate.node) for candidate in self._repairing.candidates()}
        return {node: count for node, count in found.items() if count}

    async def drain(self, node: NodeId) -> str:
        """Move the copies of a node that is to leave; returns, with a line to show, when each has its copies elsewhere.

        Until then, and after it, this leader counts no copy on that node and places none there. Ask again, of the new leader,
        after NotLeader. Cancelling gives it up. Raises NotFound, Conflict when there are too few nodes for the copies.
        """
        repairing = self._leading_repair()
        work = asyncio.ensure_future(repairing.drain(node))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=1.0)
                if self._repairing is not repairing:
                    raise NotLeader(f"node {self._me} does not lead any more: ask the new leader to drain {node}")
            return work.result()
        finally:
            work.cancel()

    def undrain(self, node: NodeId) -> None:
        """The node stays after all."""
        if self._repairing is not None:
            self._repairing.undrain(node)

    def _leading_repair(self) -> Repairing:
        self._leading()
        assert self._repairing is not None, "who leads repairs"
        return self._repairing

    def holders(self, block: BlockId) -> list[NodeId]:
        """Nodes that are known to hold the block; [] where this node does not lead."""
        return self._locator.holders(block) if self._locator is not None else []

    def _leading(self) -> Locator:
        if self._locator is None:
            raise NotLeader(
                f"node {self._me} does not lead; the leader is {self._coordinator.driver.leader or 'not known'}"
            )
        return self._locator

    def _present(self) -> list[NodeId]:
        return [n.node for n in self._coordinator.machine.roster.nodes() if n.presence == "present"]

    # -- handlers -----------------------------------------------------------------------------------------------------

    async def place(self, call: Call[Place]) -> PlaceAnswer:
        locator, roster = self._leading(), self._coordinator.machine.roster
        candidates = self._leading_repair().candidates()
        placed = place(
            call.request.put, candidates, config=self._config, size=call.request.size or 0, entry=call.request.entry
        )
        left_out = [f"{name}: {why}" for name, why in sorted(placed.left_out.items())]
        return PlaceAnswer(
            quorum(roster),
            [Replica(c.node, c.name) for c in placed.replicas],
            [Replica(c.node, c.name) for c in placed.spares],
            locator.term,
            left_out[:LEFT_OUT_TOLD_MAX],
        )

    async def locate(self, call: Call[Locate]) -> LocateAnswer:
        locator, blocks = self._leading(), call.request.blocks
        if len(blocks) > LOCATE_BLOCKS_MAX:
            raise InvalidArgument(f"{len(blocks):,} blocks in one question, at most {LOCATE_BLOCKS_MAX:,}")
        recovering = locator.recovering(self._present())
        return LocateAnswer([locator.holders(block) for block in blocks], recovering)

    async def copied(self, call: Call[Copied]) -> Empty:
        locator, roster = self._leading(), self._coordinator.machine.roster
        if call.request.term == locator.term:
            for copies in call.request.blocks:
                locator.stored(copies.block, [node for node in copies.nodes if roster.find(node) is not None])
            self._leading_repair().touch([copies.block for copies in call.request.blocks])
        return Empty()

    async def inventory(self, call: Call[Inventory]) -> Empty:
        if call.peer.node != call.request.node:
            raise PermissionDenied(
                f"node {call.peer.node} reports for {call.request.node}: nodes report for themselves"
            )
        changed = self._leading().report(call.request)
        self._leading_repair().touch(changed)
        return Empty()

    async def repair(self, call: Call[Repair]) -> RepairAnswer:
        """Asked of any node; the leader knows."""
        if self._repairing is None:
            leader = self._coordinator.driver.leader
            if leader is None or leader == self._me:
                raise NoQuorum(f"no leader is known: an election is under way, or too many nodes are away; {WHEN_LOST}")
            return await self._peers.to(leader).call(REPAIR, call.request, timeout_s=left_s(call))
        return await self._repairing.answer()

    # -- looking after ------------------------------------------------------------------------------------------------

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if self._locator is not None:
                await self.look()

    async def look(self) -> None:
        """Abort puts that are open for too long."""
        machine = self._coordinator.machine
        before_ms = max(machine.now_ms, self._coordinator.now_ms()) - self._config.put_open_max_ms
        stale = [put for put in machine.namespace.open_puts() if put.started_ms < before_ms]
        for put in stale[:ABORTS_MAX]:
            command = AbortPut(put.put, f"open for more than {self._config.put_open_max_ms // 60_000} minutes")
            try:
                await self._coordinator.propose(command, actor=Actor(self._me, Role.NODE), timeout_s=ABORT_S)
                log.info("open put aborted", extra={"put": put.put, "file": put.name, "reason": command.reason})
            except IdunnoError as error:
                log.warning("open put not aborted", extra={"put": put.put, "error": str(error)})
                return  # another look, or another leader, will
