# tests/simulation/copies.py: the copies on the disks, held against what was promised of them, at every moment of a world.
#
# Rule 1: at an acknowledgement as many disks as it says have the block whole, so that no loss of power takes it away, and none
#         that was removed would have to bring it back; and it says no fewer than the nodes that were present could have had.
# Rule 2: after that the store itself never makes them fewer: what the world takes away by hand (`took`) is not held against it.
# Rule 3: a node that lets its copy of something that is referred to go leaves as many others as there are to be.
from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from blake3 import blake3

from idunno.base.ids import BlockId
from idunno.coordinator.records import BLOCK_BYTES_MAX, SMALL_BYTES_MAX
from idunno.node.node import Node
from idunno.sdfs.messages import PutAnswer
from tests.simulation.clients import PUT_S, Promises
from tests.simulation.machine import Machine

if TYPE_CHECKING:
    from tests.simulation.world import World

LOOK_S: Final = 0.25
LATER_S: Final = 1.0
WANTED: Final = 4
MOMENT_S: Final = 1.0
"""Between the verification of four copies and the end of the fifth."""


class Copies:
    def __init__(self, world: World, promises: Promises) -> None:
        self.world = world
        self.acknowledged = 0
        """Blocks whose copies were counted."""
        self._promised: dict[BlockId, tuple[bytes, int]] = {}
        self._took: dict[BlockId, int] = {}
        self._took_when = -MOMENT_S
        self._present: deque[tuple[float, int]] = deque()
        self._judge_later: deque[tuple[float, str, int]] = deque()
        promises.on_acknowledged.append(self._on_acknowledged)
        world.on_made.append(self._made)

    def begin(self) -> None:
        """On the world's loop."""
        self._task = self.world.loop.create_task(self._watch(), name="copies")

    def took(self, path: str) -> None:
        """The world itself spoilt or removed this copy."""
        block = BlockId(path.rpartition("/")[2])
        self._took[block] = self._took.get(block, 0) + 1
        self._took_when = self.world.scheduler.now

    # -- what is checked ------------------------------------------------------------------------------------------

    def whole(self, block: BlockId, content: bytes | None = None) -> list[Machine]:
        """The machines whose disk has the block, and would have it after a loss of power."""
        path, found = f"blocks/{block[:2]}/{block}", []
        for machine in self.world.machines:
            inode = machine.disk.durable.get(path)
            if path not in machine.disk.names:
                continue  # removed; that its name would come back is luck
            if inode is None or (content is not None and inode.synced_size != len(content)):
                continue
            if content is not None and inode.synced == content:
                found.append(machine)
                continue
            kept = bytes(inode.synced).ljust(inode.synced_size, b"\0")
            if kept == content if content is not None else blake3(kept).hexdigest() == block:
                found.append(machine)
        return found

    def _on_acknowledged(self, name: str, content: bytes, answer: PutAnswer) -> None:
        if len(content) <= SMALL_BYTES_MAX:
            return
        self._judge_later.append((self.world.scheduler.now, name, answer.copies))
        for at in range(0, len(content), BLOCK_BYTES_MAX):
            piece = content[at : at + BLOCK_BYTES_MAX]
            block = BlockId(blake3(piece).hexdigest())
            self._promised[block] = (piece, max(answer.copies, self._promised.get(block, (b"", 0))[1]))
            self.acknowledged += 1
            self._check(block, f"{name} version {answer.version} is acknowledged")

    def _judge_quorum(self, when: float, name: str, copies: int) -> None:
        """By the fewest nodes that any node knew to be present while it was put, or heard of just after."""
        fewest = [count for at, count in self._present if when - PUT_S - 1.0 < at < when + LATER_S]
        least = min(WANTED, min(fewest, default=1))
        if copies < max(least, min(2, len(self.world.machines))):
            self.world.found(f"{name} is acknowledged with {copies} copies, {least} nodes or more were present")

    def _check(self, block: BlockId, why: str) -> None:
        content, promised = self._promised[block]
        promised -= self._took.get(block, 0)
        found = [machine.name for machine in self.whole(block, content)]
        if len(found) < promised:
            self.world.found(f"{why}, and block {block[:16]} is durable on {found}: {promised} copies were promised")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            now = self.world.scheduler.now
            rosters = [m.node.machine.roster for m in self.world.machines if m.serving and hasattr(m.node, "machine")]  # type: ignore[union-attr]
            counts = [roster.present for roster in rosters if roster.nodes()]
            self._present.append((now, min(counts, default=1)))
            while self._present[0][0] < now - PUT_S - LATER_S - 2.0:
                self._present.popleft()
            while self._judge_later and self._judge_later[0][0] < now - LATER_S:
                self._judge_quorum(*self._judge_later.popleft())
            for block in self._promised:
                self._check(block, "it was acknowledged before")

    def _made(self, machine: Machine, node: Node) -> None:
        take_out = node.blocks.take_out

        def watched(block: BlockId) -> None:
            take_out(block)
            if block not in node.machine.references:
                return
            others = [m.name for m in self.whole(block) if m is not machine]
            wanted = min(WANTED, len(self.world.machines))
            if self.world.scheduler.now - self._took_when < MOMENT_S:
                wanted -= self._took.get(block, 0)
            if len(others) < wanted:
                self.world.found(f"{machine.name} lets its copy of {block[:16]} go, and it is durable on {others} only")

        node.blocks.take_out = watched  # type: ignore[method-assign]


def watch_copies(cluster: Any) -> Copies:
    """Of a scenario.Cluster that has not begun."""
    return Copies(cluster.world, cluster.promises)
