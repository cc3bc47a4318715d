# idunno/sdfs/repairing.py: carries out, while this node leads, what repair.py decides.
#
# Rule 1: made at the beginning of a term, closed at its end: nothing known or ordered outlives it. What an order did is
#         reported to the next leader by the nodes themselves.
# Rule 2: no copy is made before each present node has reported, or has had `report_wait_ms` to do so; none is let go before
#         each has.
# Rule 3: a copy is let go only when all that are to stay were read again under this term, after the order was decided.
from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final

from idunno.base.errors import Conflict, IdunnoError, NotFound
from idunno.base.ids import BlockId, NodeId
from idunno.coordinator.records import BLOCK_BYTES_MAX, Block, NodeRecord
from idunno.sdfs import tasks
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.locator import Locator
from idunno.sdfs.messages import COPY, DROP, HAVE_BLOCK, Copy, Drop, HaveBlock, RepairAnswer, StoreNode
from idunno.sdfs.placement import Candidate, unable
from idunno.sdfs.ports import Coordination
from idunno.sdfs.repair import Copying, Nodes, RepairCore, Trimming
from idunno.wire.calls import Peers

log = logging.getLogger("idunno.sdfs")

TICK_S: Final = 0.5
"""Between looks when nothing happens: waits end, bounds are lifted."""
SLICE: Final = 200
"""Blocks judged before others may run: 1 ms with 10 nodes, 2 to 6 ms with 100."""
FULL_LOOK_S: Final = 600.0
"""Every block is judged again this often, whatever was or was not told about it."""
COPY_S: Final = 60.0
"""A block over a 2 Mbit/s link, behind another one and its rest."""
ORDER_S: Final = 30.0
LOST_TOLD_MAX: Final = 100
NAMES_SLICE: Final = 100
DRAIN_LOOK_S: Final = 0.5
DRAIN_SLICE: Final = 5_000
"""Blocks of a drained node looked up before others may run: about 2 ms."""
DRAIN_FIRST_S: Final = 1.0
"""What the node took until now it reports within this (inventory.py)."""
DRAINED_MS: Final = 600_000
"""A node that was drained and is still in the roster after this is one like the others again: its leaving was given up."""
DRAIN_SAY_S: Final = 10.0
DRAIN_AWAY_S: Final = 60.0
"""Where too few nodes are there at the beginning that is said at once; later a node may be starting anew."""


class Repairing:
    def __init__(
        self,
        me: NodeId,
        coordinator: Coordination,
        peers: Peers,
        locator: Locator,
        *,
        config: SdfsConfig,
        is_small: Callable[[BlockId], bool],
    ) -> None:
        self._me, self._coordinator, self._peers, self._locator = me, coordinator, peers, locator
        self._config = config
        self.core = RepairCore(self._size_of, self._everything, locator.holders, config, is_small)
        self.draining: set[NodeId] = set()
        self._drains: dict[NodeId, int] = {}  # how many have a node drained
        self._drained_ms: dict[NodeId, int] = {}  # since when nothing is left on them that others lack
        self._counting: frozenset[NodeId] = frozenset()
        self._presence: dict[NodeId, str] = {}
        self._stopped_ms: dict[NodeId, int] = {}  # since when, by this loop's clock
        self._loop = asyncio.get_running_loop()
        self._began_ms = self._now_ms()
        self._looked_s = self._loop.time()
        self._wake = asyncio.Event()
        self._orders: set[asyncio.Task[None]] = set()
        self._task = tasks.begin(self._run(), "repair")
        self.core.touch_all()
        self._wake.set()

    def close(self) -> None:
        """The term is over. What was ordered goes on where it is carried out."""
        for task in (self._task, *self._orders):
            task.cancel()

    async def closed(self) -> None:
        await asyncio.gather(self._task, *self._orders, return_exceptions=True)

    def _now_ms(self) -> int:
        return int(self._loop.time() * 1000)

    def _size_of(self, block: BlockId) -> int:
        return self._coordinator.machine.references.size(block)

    def _everything(self) -> list[BlockId]:
        return list(self._coordinator.machine.references)

    # -- what changes -------------------------------------------------------------------------------------------------

    def touch(self, blocks: Sequence[BlockId]) -> None:
        """See RepairCore.touch."""
        self.core.touch(blocks)
        self._wake.set()

    def made(self, blocks: Iterable[Block]) -> None:
        """A version refers to these since just now: reports about them are under way, but of a small content nobody reports."""
        references = self._coordinator.machine.references
        stored = [block.block for block in blocks if block.block in references]
        if stored:
            self.core.hold_back(stored, self._now_ms() + self._config.settle_ms)

    def roster_changed(self) -> None:
        roster = self._coordinator.machine.roster
        for node in self._locator.nodes():
            if roster.find(node) is None:
                self.touch(self._locator.forget(node))
                self.undrain(node)
        for record in roster.nodes():
            was = self._presence.get(record.node)
            if record.presence != "present" and was != record.presence:
                self.touch(self._locator.doubt(record.node))
            if record.presence == "stopped" and was != "stopped":
                # A leader that is new to this counts from when the machine knew, as far as machine time has gone on since.
                age_ms = max(0, self._coordinator.machine.now_ms - record.since_ms) if was is None else 0
                self._stopped_ms[record.node] = self._now_ms() - age_ms
            if record.presence != "stopped":
                self._stopped_ms.pop(record.node, None)
        self._presence = {record.node: record.presence for record in roster.nodes()}
        # Who was removed while it was stopped is not expected back.
        self._stopped_ms = {node: since_ms for node, since_ms in self._stopped_ms.items() if node in self._presence}
        self._wake.set()

    # -- what is known ------------------------------------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        locator = self._locator
        return [
            Candidate(
                n.node,
                n.name,
                n.zone,
                n.presence,
                locator.space(n.node),
                "it is leaving" if n.node in self.draining else locator.problem(n.node),
                locator.floor_bytes(n.node),
            )
            for n in self._roster()
        ]

    def _roster(self) -> list[NodeRecord]:
        return self._coordinator.machine.roster.nodes()

    def present(self) -> list[NodeId]:
        return [record.node for record in self._roster() if record.presence == "present"]

    @property
    def recovering(self) -> bool:
        return self._locator.recovering(self.present())

    def waited(self) -> list[NodeId]:
        """Stopped nodes that are expected back."""
        before_ms = self._now_ms() - self._config.stopped_wait_ms
        return [node for node, since_ms in self._stopped_ms.items() if since_ms > before_ms]

    def _nodes(self) -> Nodes:
        waited = frozenset(self.waited())
        unheard = sum(self._locator.space(node) is None for node in waited)
        giving = frozenset(node for node in self.present() if self._locator.is_complete(node))
        return Nodes(tuple(self.candidates()), giving, waited, unheard, frozenset(self.draining))

    # -- working ------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        self.roster_changed()
        while True:
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            await self.look()

    async def look(self) -> None:
        """Judge what was touched, then order what can be done now."""
        for node, since_ms in list(self._drained_ms.items()):
            if since_ms < self._now_ms() - DRAINED_MS and node not in self._drains:
                self.undrain(node)
        self._see_nodes()
        if self._loop.time() - self._looked_s > FULL_LOOK_S:
            self._looked_s = self._loop.time()
            self.core.touch_all()
        more = True
        while more:
            more = self.core.judge(self._now_ms(), SLICE)
            await asyncio.sleep(0)
        self._see_nodes()
        recovering = self.recovering
        if recovering and self._now_ms() - self._began_ms < self._config.report_wait_ms:
            return
        for copying in self.core.next_copies(self._now_ms()):
            self._begin(self._copy(copying), f"copy {copying.block[:16]}")
        if not recovering:
            for trimming in self.core.next_trims(self._now_ms()):
                self._begin(self._trim(trimming), f"trim {trimming.block[:16]}")

    def _see_nodes(self) -> None:
        nodes = self._nodes()
        came_or_went = sorted(nodes.counting ^ self._counting)
        self._counting = nodes.counting
        for node in came_or_went:
            self.core.touch(self._locator.held_by(node))
        self.core.set_nodes(nodes)

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = tasks.begin(work, name)
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)

    async def _copy(self, order: Copying) -> None:
        extra: dict[str, Any] = {"block": order.block, "holder": order.target, "copies": order.copies}
        request = Copy(order.block, order.size, list(order.sources), self._locator.term)
        began_ms = self._now_ms()
        try:
            answer = await self._peers.to(order.target).call(COPY, request, timeout_s=COPY_S)
        except IdunnoError as error:
            log.warning("copy not made", extra={**extra, "code": error.code, "error": str(error)})
            self.core.not_copied(order, self._now_ms(), blame_target=not isinstance(error, Conflict))
            self._wake.set()
            return
        for node in answer.lacking:
            self._locator.lacks(order.block, node)
        if answer.made:
            self._locator.stored(order.block, [order.target])
            self.core.copied(order, self._now_ms())
            took_ms = self._now_ms() - began_ms
            log.info("copy made", extra={**extra, "copies": order.copies + 1, "bytes": order.size, "ms": took_ms})
        else:
            log.warning("copy not made", extra={**extra, "code": "no-source", "error": answer.why})
            self.core.not_copied(order, self._now_ms(), blame_target=False)
        self._wake.set()

    async def _trim(self, order: Trimming) -> None:
        done = False
        try:
            done = await self._verified(order)
            if done:
                request = Drop(order.block, self._locator.term)
                await self._peers.to(order.drop).call(DROP, request, timeout_s=ORDER_S)
                self._locator.lacks(order.block, order.drop)
                log.info("surplus copy dropped", extra={"block": order.block, "holder": order.drop})
        except IdunnoError as error:
            done = False
            log.info("surplus copy kept", extra={"block": order.block, "holder": order.drop, "error": str(error)})
        self.core.trimmed(order, self._now_ms(), done=done)
        self._wake.set()

    async def _verified(self, order: Trimming) -> bool:
        """Whether each of those that are to keep the block has read it again, under this term."""
        request = HaveBlock(order.block, "", self._locator.term)
        answers = await asyncio.gather(
            *(self._peers.to(node).call(HAVE_BLOCK, request, timeout_s=ORDER_S) for node in order.keep)
        )
        for node, answer in zip(order.keep, answers, strict=True):
            if not answer.have:
                log.warning("copy is not what was reported", extra={"block": order.block, "holder": node})
                self._locator.lacks(order.block, node)
        return all(answer.have for answer in answers)

    # -- what is told -------------------------------------------------------------------------------------------------

    async def answer(self) -> RepairAnswer:
        core, machine, locator = self.core, self._coordinator.machine, self._locator
        recovering, now_ms = self.recovering, self._now_ms()
        lost = [] if recovering else core.lost()
        nodes = []
        for candidate in self.candidates():
            node, space = candidate.node, candidate.space
            why = unable(candidate, self._config, BLOCK_BYTES_MAX) if candidate.presence == "present" else ""
            free = space.free_bytes if space is not None else 0
            nodes.append(
                StoreNode(candidate.name, candidate.presence, locator.count(node), free, locator.rotten(node), why)
            )
        return RepairAnswer(
            blocks=core.short,
            copies=core.missing,
            bytes=core.bytes_left,
            seconds=core.estimate_s(now_ms),
            running=core.running,
            surplus=core.surplus,
            recovering=recovering,
            lost=lost[:LOST_TOLD_MAX],
            lost_blocks=len(lost),
            lost_files=await self._files_of(frozenset(lost)),
            waiting_for=[machine.roster.name(node) for node in self.waited()],
            nodes=nodes,
            begins_s=core.begins_s(now_ms),
        )

    async def _files_of(self, blocks: frozenset[BlockId]) -> list[str]:
        """Names of the first files that refer to any of these. Looks through all names: only for what should never happen."""
        found: list[str] = []
        after, more = "", bool(blocks)
        while more and len(found) < LOST_TOLD_MAX:
            namespace = (
                self._coordinator.machine.namespace
            )  # a snapshot may take its place while others have their turn
            names, more = namespace.names("", after, NAMES_SLICE, system=True)
            for name in names:
                if any(block.block in blocks for record in namespace.history(name) for block in record.blocks):
                    found.append(name)
            after = names[-1] if names else after
            await asyncio.sleep(0)
        return found[:LOST_TOLD_MAX]

    # -- draining -----------------------------------------------------------------------------------------------------

    async def drain(self, node: NodeId) -> str:
        """See Leading.drain."""
        name = self._coordinator.machine.roster.node(node).name
        self.draining.add(node)
        self._drains[node] = self._drains.get(node, 0) + 1
        self._drained_ms.pop(node, None)
        try:
            await asyncio.sleep(DRAIN_FIRST_S)
            said = await self._drained(node, name)
            self._drained_ms[node] = self._now_ms()
            return said
        finally:
            self._drains[node] -= 1
            if not self._drains[node]:
                del self._drains[node]
                if node not in self._drained_ms:  # all gave up on it: whoever did wants the node as it was
                    self.undrain(node)

    def undrain(self, node: NodeId) -> None:
        self.draining.discard(node)
        self._drained_ms.pop(node, None)
        self.touch(self._locator.held_by(node))

    async def _drained(self, node: NodeId, name: str) -> str:
        self.touch(self._locator.held_by(node))
        said_s, able_s, judged = self._loop.time(), -math.inf, False
        while True:
            judged = judged or not self.core.unjudged  # until then all of it counts as left
            look_s = self._loop.time()
            left, size, held = await self._left_of(node)
            look_s = self._loop.time() - look_s
            if not left and not self.recovering:
                return f"each of its {held:,} blocks ({size:,} bytes) has its copies on other nodes"
            if self._loop.time() - said_s > DRAIN_SAY_S:
                said_s = self._loop.time()
                log.info("draining", extra={"holder": node, "blocks": held, "left": left})
            if not (why := self._undrainable(node, name, left)):
                able_s = self._loop.time()
            elif judged and self._loop.time() - able_s >= DRAIN_AWAY_S:
                raise Conflict(why)
            await asyncio.sleep(
                min(DRAIN_SAY_S, max(DRAIN_LOOK_S, 9 * look_s))
            )  # looks take a tenth of the time at most

    async def _left_of(self, node: NodeId) -> tuple[int, int, int]:
        """Of the blocks of a node that is drained: how many have too few copies elsewhere; the bytes and number of all."""
        left = size = held = 0
        for number, block in enumerate(self._locator.held_by(node)):
            if number % DRAIN_SLICE == DRAIN_SLICE - 1:
                await asyncio.sleep(0)
            if block_size := self._size_of(block):
                left += self.core.is_short(block)
                size += block_size
                held += 1
        return left, size, held

    def _undrainable(self, node: NodeId, name: str, left: int) -> str:
        """Why the copies cannot be moved, for lack of nodes, and what to do; "" if they can. Raises NotFound."""
        roster = self._coordinator.machine.roster
        if roster.find(node) is None:
            raise NotFound(f"{name} is out of the roster already")
        others = [n for n in self._roster() if n.node not in self.draining]
        present = [n for n in others if n.presence == "present"]
        wanted = max(1, min(len(others), roster.copies_wanted()))
        if left and len(present) < wanted:
            away = ", ".join(f"{n.name} ({n.presence})" for n in others if n.presence != "present")
            return (
                f"{left:,} blocks on {name} need {wanted} other nodes that are present, and {len(present)} are; away: "
                f"{away or 'none'}; bring them back or `idunno remove` them"
            )
        able = [c for c in self.candidates() if c.node not in self.draining]
        full = [f"{c.name}: {why}" for c in able if (why := unable(c, self._config, BLOCK_BYTES_MAX))]
        if left and len(full) == len(able):
            return (
                f"{left:,} blocks on {name} have no room elsewhere ({'; '.join(full)}): free some space, or add a node"
            )
        return ""
