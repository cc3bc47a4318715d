# idunno/membership/service.py: the detector's two calls between nodes: one that only answers, one that exchanges lists.
#
# Rule 1: both are for nodes alone; whose list it is, the caller's certificate says.
from __future__ import annotations

from typing import Final

from idunno.base.errors import PermissionDenied
from idunno.base.ids import NodeId
from idunno.membership.talks import EXCHANGE_S
from idunno.membership.transport import Membership
from idunno.wire.calls import Call, Empty, Method, Peers, Registrar, Reply, Role

PROBE: Final = Method("membership.probe", Empty, Empty, Role.NODE)
EXCHANGE: Final = Method("membership.exchange", Empty, Empty, Role.NODE)
"""The lists are the bodies: messages.WholeList, both ways."""
PROBE_S: Final = 5.0
"""The detector itself waits for less; this only ends what it no longer waits for."""


class OverTcp:
    """What Membership takes as `tcp_probe` and `exchange`; `register` is the other end."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def probe(self, node: NodeId) -> bool:
        """True when the member answers; raises what the call raises."""
        await self._peers.to(node).call(PROBE, Empty(), timeout_s=PROBE_S)
        return True

    async def exchange(self, node: NodeId, ours: bytes) -> bytes:
        _, theirs = await self._peers.to(node).call_with_body(EXCHANGE, Empty(), timeout_s=EXCHANGE_S, body=ours)
        return theirs


def register(registrar: Registrar, membership: Membership) -> None:
    async def probe(_: Call[Empty]) -> Empty:
        return Empty()

    async def exchange(call: Call[Empty]) -> Reply[Empty]:
        if call.peer.node is None:
            raise PermissionDenied("lists of members are exchanged between nodes only")
        return Reply(Empty(), membership.exchanged(call.peer.node, bytes(call.body)))

    registrar.register(PROBE, probe)
    registrar.register(EXCHANGE, exchange)
