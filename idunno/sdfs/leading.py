# idunno/sdfs/leading.py: what the coordinator's leader alone does for files: it knows where blocks are, and where they may go.
#
# Rule 1: it answers only while it leads (NotLeader otherwise); everything it knows is of its term (locator.py).
# Rule 2: it aborts puts that are open for too long: their clients are gone. Everything else about puts is in the machine.
from __future__ import annotations

import asyncio
import logging
from typing import Final

from idunno.base.errors import IdunnoError, InvalidArgument, NotLeader, PermissionDenied
from idunno.base.ids import BlockId, NodeId, Term
from idunno.coordinator.commands import AbortPut
from idunno.sdfs import tasks
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.locator import LOCATE_BLOCKS_MAX, Locator
from idunno.sdfs.messages import (
    COPIED,
    INVENTORY,
    LOCATE,
    PLACE,
    Copied,
    Inventory,
    Locate,
    LocateAnswer,
    Place,
    PlaceAnswer,
    Replica,
)
from idunno.sdfs.placement import Candidate, place
from idunno.sdfs.ports import Coordination
from idunno.sdfs.rules import quorum
from idunno.wire.calls import Actor, Call, Empty, Registrar, Role

log = logging.getLogger("idunno.sdfs")

LOOK_S: Final = 60.0
"""Between looks for forgotten puts and removed nodes."""
ABORTS_MAX: Final = 100
"""Puts aborted in one look: an hour's failures of a cluster never delay other commands by more than a moment."""
ABORT_S: Final = 10.0
LEFT_OUT_TOLD_MAX: Final = 8


class Leading:
    """Handlers `sdfs.*`. The node tells `role_changed` (RaftDriver.on_role)."""

    def __init__(self, me: NodeId, coordinator: Coordination, *, config: SdfsConfig) -> None:
        self._me, self._coordinator, self._config = me, coordinator, config
        self._locator: Locator | None = None  # only while leading
        self._task: asyncio.Task[None] | None = None

    def register(self, registrar: Registrar) -> None:
        registrar.register(PLACE, self.place)
        registrar.register(LOCATE, self.locate)
        registrar.register(COPIED, self.copied)
        registrar.register(INVENTORY, self.inventory)

    def start(self) -> None:
        self._task = tasks.begin(self._look_after(), "sdfs-leader")

    async def stop(self) -> None:
        await tasks.end(self._task)
        self._task = None

    def role_changed(self, is_leader: bool, term: Term) -> None:
        self._locator = Locator(term) if is_leader else None

    @property
    def recovering(self) -> bool:
        """Whether this leader has not yet heard from every present node. False on others."""
        return self._locator is not None and self._locator.recovering(self._present())

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
        candidates = [Candidate(n.node, n.name, n.zone, n.presence, locator.space(n.node)) for n in roster.nodes()]
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
        return Empty()

    async def inventory(self, call: Call[Inventory]) -> Empty:
        if call.peer.node != call.request.node:
            raise PermissionDenied(
                f"node {call.peer.node} reports for {call.request.node}: nodes report for themselves"
            )
        self._leading().report(call.request)
        return Empty()

    # -- looking after ------------------------------------------------------------------------------------------------

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if self._locator is not None:
                await self.look()

    async def look(self) -> None:
        """Forget removed nodes, abort puts that are open for too long."""
        machine = self._coordinator.machine
        if self._locator is not None:
            for node in self._locator.nodes():
                if machine.roster.find(node) is None:
                    self._locator.forget(node)
        before_ms = machine.now_ms - self._config.put_open_max_ms
        stale = [put for put in machine.namespace.open_puts() if put.started_ms < before_ms]
        for put in stale[:ABORTS_MAX]:
            command = AbortPut(put.put, f"open for more than {self._config.put_open_max_ms // 60_000} minutes")
            try:
                await self._coordinator.propose(command, actor=Actor(self._me, Role.NODE), timeout_s=ABORT_S)
                log.info("open put aborted", extra={"put": put.put, "file": put.name, "reason": command.reason})
            except IdunnoError as error:
                log.warning("open put not aborted", extra={"put": put.put, "error": str(error)})
                return  # another look, or another leader, will
