"""Nodes, users and tokens: who gets in, who is refused and why, and how copies are counted."""

from __future__ import annotations

import msgspec
import pytest

from idunno.base.errors import Conflict, IdunnoError, Incompatible, InvalidArgument, NotFound, Unauthenticated
from idunno.base.ids import Index, NodeId
from idunno.coordinator import commands as c
from idunno.coordinator import roster as r
from idunno.coordinator.effects import RosterChanged
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import NodeRecord
from idunno.wire.calls import Actor, Role
from tests.unit.coordinator.world import ADMIN, HOUR_MS, N1, N2, SYSTEM, World, genesis, node, token, user


def update(i: int, boot: int, address: str = "127.0.0.1:9000") -> c.UpdateNode:
    return c.UpdateNode(NodeId(f"{i:016x}"), address, boot, 2, "rack1", "0.1.0")


def test_genesis_begins_the_log_once() -> None:
    world = World(begun=False)
    assert world.apply(genesis(), SYSTEM).effects == (RosterChanged(),)
    roster = world.machine.roster
    assert (roster.cluster, roster.present, len(roster.nodes())) == ("c" * 32, 3, 3)
    with pytest.raises(Conflict, match="belongs to cluster"):
        world.do(genesis(), SYSTEM)


def test_genesis_of_a_newer_machine_stops_this_one() -> None:
    machine = Machine()
    newer = msgspec.structs.replace(genesis(), machine_version=99)
    entry = c.encode_entry(c.Entry(c.FORMAT, 1, N1, "node", "", newer))
    with pytest.raises(Incompatible, match="upgrade"):
        machine.apply(Index(1), entry)
    assert machine.index == 0


def test_genesis_with_a_name_twice_is_refused_whole() -> None:
    world = World(begun=False)
    twice = msgspec.structs.replace(genesis(), nodes=(node(1), node(2, name="n1")))
    with pytest.raises(Conflict):
        world.do(twice, SYSTEM)
    assert world.machine.roster.nodes() == []


def test_a_newcomer_is_found_by_id_name_and_certificate() -> None:
    world = World()
    added = world.do(c.AddNode(node(4), "t-node"), SYSTEM)
    assert added.changed
    roster = world.machine.roster
    assert roster.resolve("n4") == roster.resolve(f"{4:016x}") == added.node
    peer = roster.peer(bytes([4]) * 32)
    assert peer is not None
    assert (peer.actor, peer.node) == (Actor(f"{4:016x}", Role.NODE), f"{4:016x}")
    assert not added.node.voter
    with pytest.raises(NotFound):
        roster.resolve("n9")


def test_the_same_key_joins_again_with_its_first_certificate() -> None:
    world = World()
    first = world.do(c.AddNode(node(4, certificate=b"first"), "t-node"), SYSTEM)
    world.now_ms = 2 * HOUR_MS  # the token has expired: the answer was promised before
    again = world.do(c.AddNode(node(4, certificate=b"second", fingerprint=b"z" * 32), "t-node"), SYSTEM)
    assert (again.node, again.changed) == (first.node, False)


def test_ids_names_and_certificates_are_used_once() -> None:
    world = World()
    refusals = [
        (node(1, name="other", key=b"k" * 32), r"node id 0+1 belongs to n1 at 127.0.0.1:7401, and 127.0.0.1:7401"),
        (node(4, name="n2"), r"n2 is in use by the node at 127.0.0.1:7402; the one at 127.0.0.1:7404"),
        (node(4, fingerprint=bytes([2]) * 32), "certificate of n4 is in use"),
    ]
    for record, text in refusals:
        with pytest.raises(Conflict, match=text):
            world.do(c.AddNode(record, "t-node"), SYSTEM)


@pytest.mark.parametrize(
    "record",
    [
        node(4, name="-x"),
        node(4, name="a b"),
        node(4, fingerprint=b"short"),
        node(4, slots=0),
        node(4, zone="z" * 64),
        node(4, zone="a\x1b[2J"),
        msgspec.structs.replace(node(4), node=NodeId("short")),
        msgspec.structs.replace(node(4), address="nowhere"),
        msgspec.structs.replace(node(4), address="host:0"),
        msgspec.structs.replace(node(4), address="host:99999"),
        msgspec.structs.replace(node(4), presence="perhaps"),
    ],
)
def test_a_node_that_cannot_be_is_refused(record: NodeRecord) -> None:
    with pytest.raises(InvalidArgument):
        World().do(c.AddNode(record, "t-node"), SYSTEM)


def test_a_token_lets_in_whom_it_is_for_until_it_expires_or_is_revoked() -> None:
    world = World()
    with pytest.raises(Unauthenticated, match="no token t-none"):
        world.do(c.AddNode(node(4), "t-none"), SYSTEM)
    with pytest.raises(Unauthenticated, match="is for a user, not for a node"):
        world.do(c.AddNode(node(4), "t-user"), SYSTEM)
    with pytest.raises(Unauthenticated, match="is for a user, not for a admin"):
        world.do(c.AddUser(user("eve", role="admin"), "t-user"), SYSTEM)
    world.do(c.AddUser(user("carol"), "t-user"), SYSTEM)
    world.do(c.AddUser(user("dave", i=51), "t-user"), SYSTEM)  # a token works many times
    assert world.do(c.RevokeToken("t-user"), ADMIN).changed
    assert not world.do(c.RevokeToken("t-user"), ADMIN).changed
    with pytest.raises(Unauthenticated, match="was revoked"):
        world.do(c.AddUser(user("erin", i=52), "t-user"), SYSTEM)
    world.now_ms = HOUR_MS
    with pytest.raises(Unauthenticated, match="has expired"):
        world.do(c.AddNode(node(4), "t-node"), SYSTEM)
    with pytest.raises(NotFound, match="token ls"):
        world.do(c.RevokeToken("t-none"), ADMIN)


def test_a_token_is_added_once_in_the_name_of_who_made_it() -> None:
    world = World()
    assert world.do(c.AddToken(token("t1", "user")), ADMIN).changed
    assert not world.do(c.AddToken(token("t1", "user")), ADMIN).changed
    stored = world.machine.roster.token("t1")
    assert stored is not None
    assert stored.created_by == "root"
    with pytest.raises(Conflict):
        world.do(c.AddToken(msgspec.structs.replace(token("t1", "user"), secret_hash=b"o" * 32)), ADMIN)
    for bad in (token("t2", "king"), msgspec.structs.replace(token("t2", "user"), secret_hash=b"x")):
        with pytest.raises(InvalidArgument):
            world.do(c.AddToken(bad), ADMIN)


def test_tokens_are_bounded_and_long_expired_ones_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r, "TOKENS_MAX", 3)
    world = World()
    world.do(c.AddToken(token("t3", "user")), ADMIN)
    with pytest.raises(IdunnoError, match="3 tokens, the bound"):
        world.do(c.AddToken(token("t4", "user")), ADMIN)
    world.now_ms = HOUR_MS + r.TOKEN_KEPT_MS + 1
    world.do(c.AddToken(token("t4", "user", expires_ms=10**13)), ADMIN)
    assert [t.token for t in world.machine.roster.tokens()] == ["t4"]


def test_users_come_and_go() -> None:
    world = World()
    first = world.do(c.AddUser(user("carol"), "t-user"), SYSTEM)
    assert world.do(c.AddUser(user("carol"), "t-user"), SYSTEM).user == first.user
    peer = world.machine.roster.peer(bytes([50]) * 32)
    assert peer is not None
    assert (peer.actor, peer.node) == (Actor("carol", Role.USER), None)
    with pytest.raises(Conflict, match="users revoke carol"):
        world.do(c.AddUser(user("carol", i=51), "t-user"), SYSTEM)
    with pytest.raises(Conflict, match="is a node's id"):
        world.do(c.AddUser(user(N1, i=51), "t-user"), SYSTEM)
    with pytest.raises(Conflict, match="certificate of dave is in use by carol"):
        world.do(c.AddUser(msgspec.structs.replace(user("dave"), key=b"d" * 32), "t-user"), SYSTEM)
    assert world.do(c.RevokeUser("carol"), ADMIN, "r1").changed
    assert not world.do(c.RevokeUser("carol"), ADMIN, "r1").changed  # a retry is no error
    assert world.machine.roster.peer(bytes([50]) * 32) is None


def test_a_revoked_name_and_its_files_are_nobody_elses_until_it_is_freed() -> None:
    world = World.newest()
    world.do(c.AddUser(user("carol"), "t-user"), SYSTEM)
    world.do(c.RevokeUser("carol"), ADMIN, "r1")
    thief = msgspec.structs.replace(user("carol", i=51), key=b"t" * 32)
    for _ in range(2):
        with pytest.raises(Conflict, match="a second time"):
            world.do(c.AddUser(thief, "t-user"), SYSTEM)
        world.machine = Machine.restore(world.machine.snapshot())
    assert [(u.name, u.fingerprint) for u in world.machine.roster.users() if u.name == "carol"] == [("carol", b"")]
    assert world.machine.roster.peer(b"") is None
    assert world.do(c.RevokeUser("carol"), ADMIN, "r2").changed
    with pytest.raises(NotFound):
        world.do(c.RevokeUser("carol"), ADMIN, "r3")
    assert world.do(c.AddUser(thief, "t-user"), SYSTEM).changed


def test_a_node_describes_itself_at_each_start() -> None:
    world = World()
    assert world.do(update(1, boot=3), SYSTEM).changed
    assert not world.do(update(1, boot=3), SYSTEM).changed
    record = world.machine.roster.node(N1)
    assert (record.boot, record.slots, record.zone, record.address) == (3, 2, "rack1", "127.0.0.1:9000")
    with pytest.raises(Conflict, match="says boot 2, but boot 3 of it was seen"):
        world.do(update(1, boot=2), SYSTEM)


def test_presence_follows_the_newest_process_only() -> None:
    world = World()
    world.do(update(1, boot=3), SYSTEM)
    gone = c.SetPresence(N1, "failed", 3, "no answer")
    assert world.do(gone, SYSTEM).changed
    assert not world.do(gone, SYSTEM).changed
    assert world.do(update(1, boot=4), SYSTEM).changed  # back
    assert world.machine.roster.node(N1).presence == "present"
    assert not world.do(gone, SYSTEM).changed  # a late verdict on the old process
    with pytest.raises(InvalidArgument):
        world.do(c.SetPresence(N1, "asleep", 4, ""), SYSTEM)
    with pytest.raises(NotFound):
        world.do(c.SetPresence(NodeId("f" * 16), "failed", 1, ""), SYSTEM)


def test_copies_count_present_nodes_of_the_roster() -> None:
    world = World()
    roster = world.machine.roster
    assert (roster.acknowledge_copies(), roster.copies_wanted()) == (3, 3)
    for i in (4, 5):
        world.do(c.AddNode(node(i), "t-node"), SYSTEM)
    assert (roster.acknowledge_copies(), roster.copies_wanted()) == (
        3,
        4,
    )  # enrolled, not started: no reply waits for it
    for i in (4, 5):
        world.do(update(i, boot=1), Actor(f"{i:016x}", Role.NODE))
    assert (roster.acknowledge_copies(), roster.copies_wanted(), roster.present) == (4, 4, 5)
    for i in (1, 2, 3, 4, 5):
        world.do(c.SetPresence(NodeId(f"{i:016x}"), "failed", 1, "test"), SYSTEM)
    assert (roster.acknowledge_copies(), roster.copies_wanted(), roster.present) == (1, 4, 0)
    world.do(c.SetPresence(N2, "present", 1, "heard again"), SYSTEM)
    assert roster.present == 1
    assert Machine.restore(world.machine.snapshot()).roster.present == 1
