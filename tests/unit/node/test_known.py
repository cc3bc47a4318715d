# Whom a node takes for a member or a user, before and after it has heard from a leader.
from __future__ import annotations

import pytest

from idunno.base.errors import Unavailable
from idunno.base.ids import NodeId
from idunno.coordinator.messages import MemberAddress
from idunno.coordinator.roster import Roster
from idunno.node.identity import KnownPeers
from idunno.node.known import Known
from idunno.wire.calls import Role
from tests.unit.fakes import MemoryDisk

NODE = NodeId("0" * 16)
REMEMBERED = KnownPeers([MemberAddress(NODE, "n1", "10.0.0.1:7400", b"n" * 32, True)])


def test_a_node_that_has_just_started_does_not_call_an_unknown_user_revoked() -> None:
    known = Known(Roster, REMEMBERED, MemoryDisk())
    with pytest.raises(Unavailable, match="just started"):
        known.identify(b"u" * 32)
    known.caught_up()
    assert known.identify(b"u" * 32) is None


def test_remembered_nodes_and_strangers_are_let_in_at_once() -> None:
    known = Known(Roster, REMEMBERED, MemoryDisk())
    node, stranger = known.identify(b"n" * 32), known.identify(None)
    assert node is not None
    assert (node.node, node.actor.role) == (NODE, Role.NODE)
    assert stranger is not None
    assert stranger.actor.role is Role.ANYONE
