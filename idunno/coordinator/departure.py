# idunno/coordinator/departure.py: how a node goes for good: `idunno leave` and `idunno remove`. The leader's part.
#
# Rule 1: first its copies are elsewhere (leave), then it votes no more, then it is out of the roster: its certificate opens
#         nothing, its connections are cut. Then the cluster's key is renewed (elector.py).
# Rule 2: whoever asks again gets on from where it stopped: each step finds what is done already. The request's id finds a
#         removal that is over.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from idunno.base.errors import Conflict, DeadlineExceeded, IdunnoError, NotLeader
from idunno.base.ids import NodeId
from idunno.coordinator.client import Coordinator
from idunno.coordinator.commands import RemoveNode
from idunno.coordinator.elector import Elector
from idunno.coordinator.messages import LEFT, NODE_LEAVE, NODE_REMOVE, GoneNode, LeaveNode, RemoveDead
from idunno.coordinator.records import NodeRecord
from idunno.wire.answering import left_s
from idunno.wire.calls import A, Actor, Call, Empty, Lane, Method, Peers, Q, Registrar

log = logging.getLogger("idunno.coordinator")

LOOK_S: Final = 0.1
ANSWER_S: Final = 1.0
"""For an answer to get back to whoever asked, by way of another node."""
TELL_S: Final = 2.0

Drained = Callable[[NodeId], Awaitable[str]]
"""Moves what only that node has, and says in a few words what was moved; raises IdunnoError when that cannot be done."""


async def _nothing_to_move(node: NodeId) -> str:
    return ""


class Departures:
    """Registers its handlers."""

    def __init__(
        self,
        coordinator: Coordinator,
        elector: Elector,
        peers: Peers,
        registrar: Registrar,
        *,
        drained: Drained = _nothing_to_move,
    ) -> None:
        self._coordinator, self._elector, self._peers = coordinator, elector, peers
        self.drained = drained
        self._left = asyncio.Event()  # this node is out of the cluster
        self._last_steps: set[asyncio.Task[None]] = set()
        registrar.register(NODE_LEAVE, self._leave)
        registrar.register(NODE_REMOVE, self._remove)

    async def _leave(self, call: Call[LeaveNode]) -> GoneNode:
        node = await self._named(call, call.request.node)
        request = LeaveNode(node, call.request.request)  # the id: another node's machine may not know the name any more

        async def here(timeout_s: float) -> GoneNode:
            return await self._go(node, request.request, call.actor, timeout_s, leave=True)

        asked = self._at_leader(NODE_LEAVE, request, call, here)
        return await (asked if node != self._coordinator.me else self._or_left(asked))

    def has_left(self) -> None:
        """The leader's last word to this node came."""
        self._left.set()

    async def _or_left(self, asked: Coroutine[Any, Any, GoneNode]) -> GoneNode:
        """Of this node's own leaving: its connections are cut with the last step, and the leader's answer is lost with them."""
        me = self._coordinator.me
        name = self._coordinator.machine.roster.name(me)
        asking, left = asyncio.create_task(asked), asyncio.create_task(self._left.wait())
        try:
            await asyncio.wait({asking, left}, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                return GoneNode(me, name, "its copies are on other nodes; it is safe to switch it off")
            return await asking
        finally:
            asking.cancel()
            left.cancel()
            await asyncio.gather(asking, left, return_exceptions=True)

    async def _remove(self, call: Call[RemoveDead]) -> GoneNode:
        node = await self._named(call, call.request.node)
        request = RemoveDead(node, call.request.request)

        async def here(timeout_s: float) -> GoneNode:
            return await self._go(node, request.request, call.actor, timeout_s, leave=False)

        return await self._at_leader(NODE_REMOVE, request, call, here)

    async def _named(self, call: Call[Any], name: str) -> NodeId:
        """Whom an admin means. Raises NotFound, but never because this node is behind."""
        if _passed_on(call):
            return NodeId(name)  # it is the id already, which may be out by now: then that was done before
        machine = await self._coordinator.read(left_s(call))
        return machine.roster.resolve(name).node

    async def _at_leader(
        self, method: Method[Q, A], request: Q, call: Call[Q], here: Callable[[float], Awaitable[A]]
    ) -> A:
        """`here` at the leader; a call that a node passed on already is not passed on again."""
        if _passed_on(call):
            if self._coordinator.driver.leader != self._coordinator.me:
                raise NotLeader(f"{self._coordinator.me} does not lead")
            return await here(left_s(call))
        return await self._coordinator.ask_leader(
            method, request, here, timeout_s=left_s(call), actor=call.actor, again=True
        )

    async def _go(self, node: NodeId, request: str, actor: Actor, timeout_s: float, *, leave: bool) -> GoneNode:
        machine = await self._coordinator.read(timeout_s)
        record = machine.roster.find(node)
        if record is None:
            return GoneNode(node, node, "it is out of the cluster")
        self._check(record, leave=leave)
        # What keeps it waiting is to be told before whoever asked hears of nothing but the end of the time.
        end_s = asyncio.get_running_loop().time() + max(timeout_s - ANSWER_S, timeout_s / 2)
        moved = await self._drain(node, end_s) if leave else ""
        self._elector.begin_leaving(node)
        try:
            await self._until_no_voter(record, end_s)
            if leave:  # what a put that was open then has brought it meanwhile
                moved = await self._drain(node, end_s)
            left_s = max(0.1, end_s - asyncio.get_running_loop().time())
            # To its end whoever asked: the node itself did, perhaps, and this call is cut off with its connections.
            last = asyncio.create_task(self._end(node, request, actor, left_s, leave=leave), name=f"{node} goes")
            self._last_steps.add(last)
            last.add_done_callback(self._ended)
            await asyncio.shield(last)
        finally:
            self._elector.end_leaving(node)
        safe = "it is safe to switch it off" if leave else "its certificate no longer works"
        return GoneNode(node, record.name, "; ".join(filter(None, [moved, safe])))

    async def _end(self, node: NodeId, request: str, actor: Actor, timeout_s: float, *, leave: bool) -> None:
        await self._coordinator.propose_here(RemoveNode(node), actor=actor, request=request, timeout_s=timeout_s)
        if leave:
            await self._tell(node)

    def _ended(self, last: asyncio.Task[None]) -> None:
        self._last_steps.discard(last)
        if not last.cancelled():
            last.exception()  # whoever asked was told, if he is still there

    def _check(self, record: NodeRecord, *, leave: bool) -> None:
        if len(self._coordinator.machine.roster.nodes()) == 1:
            raise Conflict(
                f"{record.name} is the last node: stop it, and delete its directory when nothing is needed any more"
            )
        if not leave and record.presence == "present":
            raise Conflict(
                f"{record.name} is up: `idunno leave {record.name}` moves its data first; stop it to remove it as it is"
            )

    async def _drain(self, node: NodeId, end_s: float) -> str:
        try:
            async with asyncio.timeout_at(end_s):
                return await self.drained(node)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{node} still holds copies that are nowhere else; ask again to go on, with a larger --timeout"
            ) from None

    async def _until_no_voter(self, record: NodeRecord, end_s: float) -> None:
        """The elector takes the steps; its roster follows its log."""
        driver, machine = self._coordinator.driver, self._coordinator.machine
        term = driver.term
        while (now := machine.roster.find(record.node)) is not None and now.voter:
            if not driver.is_leader or driver.term != term:
                raise NotLeader(f"the leader changed while {record.name} was leaving")
            if asyncio.get_running_loop().time() >= end_s:
                raise DeadlineExceeded(
                    f"{record.name} still votes: no other node can take its place yet; see `idunno status`"
                )
            await asyncio.sleep(LOOK_S)

    async def _tell(self, node: NodeId) -> None:
        """It is out, and cannot hear of that by its log."""
        try:
            await self._peers.to(node, Lane.CONSENSUS).call(LEFT, Empty(), timeout_s=TELL_S)
        except IdunnoError as error:
            log.info("node did not hear that it has left", extra={"node_id": node, "problem": str(error)})


def _passed_on(call: Call[Any]) -> bool:
    """By another node."""
    return call.peer.node is not None and not call.peer.local
