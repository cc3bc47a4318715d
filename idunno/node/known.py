# idunno/node/known.py: whom this node takes for a member: the roster, and before its log is replayed the last one it saw.
#
# Rule 1: the roster decides. The remembered one (`peers.json`) counts only until this node has caught up once.
# Rule 2: `peers.json` follows the roster: written beside the loop, only when it would change, never twice at once.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from idunno.base.disk import Disk
from idunno.base.errors import IdunnoError, Unavailable
from idunno.base.ids import NodeId
from idunno.coordinator.messages import MemberAddress
from idunno.coordinator.roster import Roster
from idunno.node.config import parse_address
from idunno.node.identity import PEERS_FILE, KnownPeers, encode_peers
from idunno.wire.calls import Actor, Peer, Role
from idunno.wire.peers import Endpoint

log = logging.getLogger("idunno.node")


class Known:
    def __init__(self, roster: Callable[[], Roster], remembered: KnownPeers, disk: Disk) -> None:
        self._roster, self._disk = roster, disk
        self._remembered = {member.node: member for member in remembered.members}
        self._by_fingerprint = {member.fingerprint: member.node for member in remembered.members}
        self._heard: dict[NodeId, tuple[int, str]] = {}  # (boot, address) as the member itself says
        self._caught_up = False
        self._written = b""
        self._writing: asyncio.Task[None] | None = None

    @property
    def is_caught_up(self) -> bool:
        return self._caught_up

    def caught_up(self) -> None:
        """The machine has applied everything that was acknowledged before this start: the roster alone counts now."""
        self._caught_up = True
        self._remembered, self._by_fingerprint = {}, {}

    def members(self) -> list[MemberAddress]:
        """All members, the roster's word before the remembered one; each where it is now, as far as that is known."""
        found = {
            member.node: msgspec.structs.replace(member, address=self._address(member.node, -1, member.address))
            for member in self._remembered.values()
        }
        for record in self._roster().nodes():
            address = self._address(record.node, record.boot, record.address)
            found[record.node] = MemberAddress(record.node, record.name, address, record.fingerprint, record.voter)
        return list(found.values())

    def heard(self, node: NodeId, boot: int, address: str) -> None:
        """A member was started where the roster may not know it yet: while there is no leader nobody can tell the roster."""
        if self.is_member(node):
            self._heard[node] = (boot, address)

    def forget(self, node: NodeId) -> None:
        """It was removed."""
        self._heard.pop(node, None)

    def _address(self, node: NodeId, boot: int, address: str) -> str:
        """Where a member is, which the roster knows at `address` from its start number `boot`."""
        heard, remembered = self._heard.get(node), self._remembered.get(node)
        if heard is not None and heard[0] > boot:
            return heard[1]
        if remembered is not None and not self._caught_up:  # the machine may still be behind it
            return remembered.address
        return address

    def meet(self, members: list[MemberAddress]) -> None:
        """Addresses that another member told at the start (`--seed`): they are newer than those remembered."""
        for member in members:
            if member.node in self._remembered:
                self._remembered[member.node] = member

    def meet_newcomers(self, members: list[MemberAddress]) -> bool:
        """Who joined while this node was away, as another member says. The leader may be one of them: its log would tell of it,
        but whose certificate is not known is not heard. Whether there were any; counts only until this node has caught up."""
        new = [m for m in members if not self.is_member(m.node)]
        for member in new:
            self._remembered[member.node] = member
            self._by_fingerprint[member.fingerprint] = member.node
        return bool(new)

    @property
    def has_newcomers(self) -> bool:
        """Whether it takes somebody for a member of whom no log has told it since it caught up."""
        return self._caught_up and bool(self._remembered)

    def name(self, node: NodeId) -> str:
        record = self._roster().find(node)
        if record is not None:
            return record.name
        return self._remembered[node].name if node in self._remembered else node

    def is_member(self, node: NodeId) -> bool:
        return self._roster().find(node) is not None or node in self._remembered

    def identify(self, fingerprint: bytes | None) -> Peer | None:
        """For rpc.Server: who holds the certificate. None for those we do not know. Raises Unavailable while we cannot know."""
        if fingerprint is None:
            return Peer(Actor("", Role.ANYONE))
        peer = self._roster().peer(fingerprint)
        if peer is None and fingerprint in self._by_fingerprint:
            node = self._by_fingerprint[fingerprint]
            peer = Peer(Actor(node, Role.NODE), node=node)
        if peer is None and not self._caught_up:  # the entry that made this user may be one that is not replayed yet
            raise Unavailable(
                "this node has just started and has not heard from a leader who its users are: ask another node, or wait"
            )
        return peer

    def endpoint(self, node: NodeId) -> Endpoint | None:
        """For PeerPool: where a member listens and which certificate it must show."""
        record = self._roster().find(node)
        remembered = self._remembered.get(node)
        if remembered is not None and (record is None or not self._caught_up):
            boot = record.boot if record is not None else -1
            host, port = parse_address(self._address(node, boot, remembered.address))
            return Endpoint(host, port, remembered.fingerprint)
        if record is None:
            return None
        host, port = parse_address(self._address(node, record.boot, record.address))
        return Endpoint(host, port, record.fingerprint)

    # -- peers.json -----------------------------------------------------------------------------------------------

    def remember(self) -> None:
        """The roster changed: bring `peers.json` up to it, unless the machine is still behind what is remembered."""
        if self._caught_up and self._writing is None:
            self._writing = asyncio.create_task(self._write(), name="peers.json")

    async def _write(self) -> None:
        try:
            while (data := encode_peers(KnownPeers(self.members()))) != self._written:
                await self._disk.replace(PEERS_FILE, data)
                self._written = data
        except IdunnoError as error:
            log.warning("roster not remembered", extra={"error": str(error)})
        finally:
            self._writing = None

    async def close(self) -> None:
        if self._writing is not None:
            await self._writing
