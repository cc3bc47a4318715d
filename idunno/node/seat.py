# idunno/node/seat.py: `cluster.members` and `cluster.status`: what a node tells of itself and of its cluster.
from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING, Final

from idunno.base.errors import IdunnoError
from idunno.base.ids import BlockId
from idunno.coordinator.messages import (
    MEMBER_EVENTS,
    MEMBERS,
    STATUS,
    MemberEvent,
    MemberEvents,
    Members,
    MembersAnswer,
    Status,
    StatusAnswer,
)
from idunno.coordinator.views import iso_time
from idunno.node.status import LeaderView, Seen, members, status
from idunno.wire.calls import Call, Empty

if TYPE_CHECKING:
    from idunno.node.node import Node

log = logging.getLogger("idunno.node")

LEADER_S: Final = 1.0
"""How long the leader may take to complete the answer: a person waits, and may be asking because it is frozen."""
SLICE: Final = 2_000
"""Versions looked at before others may run: about 2 ms."""
KEPT_S: Final = 5.0
"""How long the count of missing copies is kept: looking takes a millisecond for each thousand versions."""


class Seat:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._missing = 0
        self._counted_s = float("-inf")
        node.server.register(MEMBERS, self._members)
        node.server.register(MEMBER_EVENTS, self._events)
        node.server.register(STATUS, self._status)

    async def _members(self, call: Call[Members]) -> MembersAnswer:
        node = self._node
        view = {member.node: member for member in node.membership.view()}
        return MembersAnswer(members(node.machine.roster.nodes(), view, node.me, node.driver.leader))

    async def _events(self, call: Call[Empty]) -> MemberEvents:
        return MemberEvents(
            [
                MemberEvent(iso_time(event.at_ms), event.kind, event.name, event.node, event.reason, event.accuser)
                for event in self._node.membership.events()
            ]
        )

    async def _status(self, call: Call[Status]) -> StatusAnswer:
        node = self._node
        leader_view = None
        if node.driver.is_leader:
            leader_view = await self._leader_view()
        elif node.driver.leader is not None and not call.request.own:
            leader_view = await self._ask_leader()
        return status(self._seen(leader_view))

    async def _ask_leader(self) -> LeaderView | None:
        leader = self._node.driver.leader
        assert leader is not None
        try:
            answer = await self._node.peers.to(leader).call(STATUS, Status(own=True), timeout_s=LEADER_S)
        except IdunnoError as error:
            log.info("leader did not complete status", extra={"error": str(error)})
            return None
        return LeaderView(answer.copies_missing, answer.lag, answer.recovering, answer.queue.get("waiting", 0))

    async def _leader_view(self) -> LeaderView:
        node = self._node
        lag = {node.known.name(follower): behind for follower, behind in node.driver.lag().items()}
        recovering = node.files.leading.recovering or node.scheduler.recovering
        missing = 0 if recovering else await self._copies_missing()
        return LeaderView(missing, lag, recovering, node.scheduler.waiting)

    async def _copies_missing(self) -> int:
        """Copies of blocks below the wanted number, over all blocks that files refer to."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._counted_s < KEPT_S:
            return self._missing
        roster = self._node.machine.roster
        wanted = roster.copies_wanted()
        present = {record.node for record in roster.nodes() if record.presence == "present"}
        seen: set[BlockId] = set()
        missing = 0
        for place, (_, version) in enumerate(list(self._node.machine.namespace.each())):
            if place % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            for block in () if version.small else version.blocks:
                if block.block not in seen:
                    seen.add(block.block)
                    holders = sum(holder in present for holder in self._node.files.leading.holders(block.block))
                    missing += max(0, wanted - holders)
        self._missing, self._counted_s = missing, loop.time()
        return missing

    def _seen(self, leader_view: LeaderView | None) -> Seen:
        node = self._node
        machine = node.machine
        tasks: Counter[str] = Counter()
        for job in machine.ledger.unfinished():
            counts = machine.ledger.counts(job.job)
            tasks.update(ready=counts.ready, success=counts.success, failed=counts.failed)
        return Seen(
            cluster=machine.roster.cluster,
            me=node.me,
            leader=node.driver.leader,
            term=node.driver.term,
            commit=node.driver.commit,
            applied=node.driver.applied_index,
            roster=machine.roster.nodes(),
            view={member.node: member for member in node.membership.view()},
            files=machine.namespace.files,
            models=dict(Counter(model.state for model in machine.registry.models())),
            tasks=dict(tasks),
            rates=node.scheduler.rates(),
            stopped_applying=node.driver.problem or "",
            leader_view=leader_view,
        )
