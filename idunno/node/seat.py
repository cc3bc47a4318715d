# idunno/node/seat.py: `cluster.members` and `cluster.status`: what a node tells of itself and of its cluster.
from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Final

from idunno.base.errors import IdunnoError, Unavailable
from idunno.coordinator.messages import (
    KNOWN_MEMBERS,
    MEMBER_EVENTS,
    MEMBERS,
    STATUS,
    KnownMembers,
    MemberEvent,
    MemberEvents,
    Members,
    MembersAnswer,
    Status,
    StatusAnswer,
)
from idunno.coordinator.views import iso_time
from idunno.node.status import BLOCKS_TOLD_MAX, LeaderView, Seen, members, status
from idunno.wire.calls import Call, Empty

if TYPE_CHECKING:
    from idunno.node.node import Node

log = logging.getLogger("idunno.node")

LEADER_S: Final = 1.0
"""How long the leader may take to complete the answer: a person waits, and may be asking because it is frozen."""


class Seat:
    def __init__(self, node: Node) -> None:
        self._node = node
        node.server.register(MEMBERS, self._members)
        node.server.register(MEMBER_EVENTS, self._events)
        node.server.register(STATUS, self._status)
        node.server.register(KNOWN_MEMBERS, self._known_members)

    def own_status(self) -> StatusAnswer:
        """What this node knows by itself."""
        return status(self._seen(self._leader_view() if self._node.driver.is_leader else None))

    def own_members(self) -> MembersAnswer:
        node = self._node
        view = {member.node: member for member in node.membership.view()}
        return MembersAnswer(members(node.machine.roster.nodes(), view, node.me, node.driver.leader))

    async def _members(self, call: Call[Members]) -> MembersAnswer:
        answer = self.own_members()
        if not answer.members:  # not even this node: an empty table would be taken for the truth
            raise Unavailable(
                f"node {self._node.config.name} has heard nothing of the cluster since its start, so it does not know who is a "
                "member; ask another node, or see `idunno status`"
            )
        return answer

    async def _known_members(self, call: Call[Empty]) -> KnownMembers:
        return KnownMembers(self._node.known.members())

    async def _events(self, call: Call[Empty]) -> MemberEvents:
        return self.own_events()

    def own_events(self) -> MemberEvents:
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
            leader_view = self._leader_view()
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
        return LeaderView(
            answer.copies_missing,
            answer.lag,
            answer.recovering,
            answer.queue.get("waiting", 0),
            tuple(answer.blocks_lost),
            answer.disk_problems,
            answer.blocks_rotten,
        )

    def _leader_view(self) -> LeaderView:
        node = self._node
        lag = {node.known.name(follower): behind for follower, behind in node.driver.lag().items()}
        leading = node.files.leading
        # Until it has taken over, its machine is perhaps that of its start: an old roster, or none.
        recovering = not leading.begun or leading.recovering or node.scheduler.recovering
        missing = 0 if recovering else node.files.leading.copies_missing
        lost = tuple(node.files.leading.lost()[:BLOCKS_TOLD_MAX])
        disks = {node.known.name(of): why for of, why in node.files.leading.disk_problems().items()}
        rotten = {node.known.name(of): count for of, count in leading.blocks_rotten().items()}
        return LeaderView(missing, lag, recovering, node.scheduler.waiting, lost, disks, rotten)

    def _seen(self, leader_view: LeaderView | None) -> Seen:
        node = self._node
        machine = node.machine
        tasks = machine.ledger.unfinished_tasks()
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
            tasks={"ready": tasks.ready, "success": tasks.success, "failed": tasks.failed},
            rates=node.scheduler.rates(),
            stopped_applying=node.driver.problem or "",
            leader_view=leader_view,
            machine_version=machine.roster.machine_version,
            loop_late=node.lateness.counts(),
        )
