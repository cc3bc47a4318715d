# The machine version: what came with a newer one, who may use it when, and what becomes of a release that does not know it.
from __future__ import annotations

import msgspec
import pytest

from idunno.base.errors import Conflict, Incompatible
from idunno.base.ids import Index
from idunno.coordinator import commands as c
from idunno.coordinator import namespace as ns
from idunno.coordinator.effects import DigestDue, DigestTold, RosterChanged
from idunno.coordinator.machine import Machine
from idunno.coordinator.namespace import small_block
from idunno.coordinator.roster import RosterState
from idunno.coordinator.snapshot import Reader
from idunno.coordinator.trash import RULES_OF_ONE_MAX
from idunno.wire.calls import Actor
from tests.unit.coordinator.world import ADMIN, ALICE, BOB, SYSTEM, World, user

FIRST = "7984087adde103f7e43fe7ef0416ce6358d00fa80046c96eda361a26aad50549"
SECOND = "d2b09a2295b5ffb8545286324c359ccd801fb685d4e10ff5e7ff2ce429fdc53d"
"""What the last release of each version before made of `_what_releases_do_differently`."""


def test_what_came_later_is_refused_until_the_version_is_raised() -> None:
    world = World()
    refused = world.apply(c.TakeDigest(), SYSTEM)
    assert isinstance(refused.error, Conflict)
    assert "`idunno upgrade` raises it" in str(refused.error)
    assert world.apply(c.RaiseVersion(2), ADMIN).effects == (RosterChanged(),)
    assert world.apply(c.TakeDigest(), SYSTEM).effects == (DigestDue(),)
    assert world.apply(c.ConfirmDigest(7, b"d" * 32), SYSTEM).effects == (DigestTold(Index(7), b"d" * 32),)
    for again in (1, 2):
        assert world.apply(c.RaiseVersion(again), ADMIN).effects == ()
        assert world.machine.roster.machine_version == 2


@pytest.mark.parametrize(
    "command", [c.RaiseVersion(2), c.TakeDigest(), c.ConfirmDigest(1, bytes(32)), c.RaiseVersion(9)]
)
def test_a_release_that_does_not_know_a_command_applies_nothing_of_it(command: c.Command) -> None:
    world = World()
    old = Machine(supports=1)
    for index, payload in enumerate(world.log, 1):
        old.apply(Index(index), payload)
    before = old.digest()
    entry = c.encode_entry(c.Entry(c.FORMAT, 10**15, "root", "admin", "r", command))
    with pytest.raises(Incompatible, match=r"upgrade idunno on this node"):
        old.apply(Index(len(world.log) + 1), entry)
    assert old.digest() == before


def test_a_newer_cluster_is_refused_from_its_first_entry_and_from_its_snapshot() -> None:
    world = World()
    world.do(c.RaiseVersion(2), ADMIN)
    with pytest.raises(Incompatible, match="machine version 2"):
        Machine.restored(_read(world.machine), supports=1)
    assert Machine.restored(_read(world.machine), supports=2).roster.machine_version == 2
    first = c.Entry(c.FORMAT, 0, "init", "node", "", c.Genesis("c" * 32, (), bytes(32), machine_version=2))
    with pytest.raises(Incompatible):
        Machine(supports=1).apply(Index(1), c.encode_entry(first))


def _read(machine: Machine) -> Reader:
    reader = Reader()
    reader.feed(machine.snapshot())
    return reader


def test_what_a_snapshot_leaves_out_means_the_same_for_every_release() -> None:
    """A default that followed the release would raise the version of a machine by restarting it."""
    assert RosterState().machine_version == 1
    assert b"machine_version" not in msgspec.msgpack.encode(RosterState(machine_version=1))


def test_every_command_that_is_newer_than_the_first_is_known_as_such() -> None:
    """Commands of machine version 1 are fixed: whoever adds one says in SINCE which version brought it."""
    first = {kind.__name__ for kind in c.Command.__args__} - {kind.__name__ for kind in c.SINCE}
    assert len(first) == 31, sorted(first)


def _what_releases_do_differently(world: World) -> None:
    """Every command that the second machine version does in another way than the first."""

    def put(request: str, content: bytes, name: str = "f") -> c.PutSmall:
        return c.PutSmall(request, name, small_block(content).block, content)

    steps: list[tuple[c.Command, Actor, str]] = [
        (c.AddUser(user("carol", i=50), "t-user"), SYSTEM, ""),
        (c.RevokeUser("carol"), ADMIN, ""),
        (c.AddUser(user("carol", i=51), "t-user"), SYSTEM, ""),
        *((c.SetRetention(f"p{i}/", 1, 0), ALICE, "") for i in range(RULES_OF_ONE_MAX + 1)),
        *((c.BeginPut(f"open-{i}", "o"), ALICE, "") for i in range(ns.OPEN_PUTS_OF_ONE_MAX + 1)),
        (c.SetRetention("q/", 1, 0), ADMIN, "set"),
        (c.SetRetention("q/", 2, 0), ADMIN, ""),
        (c.SetRetention("q/", 1, 0), ADMIN, "set"),
        (put("p1", b"1"), BOB, ""),
        (put("p2", b"2"), BOB, ""),
        (c.Expire("f", (1,)), SYSTEM, ""),
        (put("p1", b"1"), BOB, ""),
        (put("p3", b"3"), BOB, ""),
        (c.Purge((1,)), ADMIN, ""),
        (c.BeginPut("p1", "f"), BOB, ""),
        (c.Expire("f", (3,)), SYSTEM, ""),
        (c.BeginPut("p1", "f"), BOB, ""),
        (put("g1", b"1", "g"), BOB, ""),
        (c.DeleteFile("g"), BOB, "first"),
        (put("g2", b"2", "g"), BOB, ""),
        (c.DeleteFile("g"), BOB, "second"),
        (put("g3", b"3", "g"), BOB, ""),
        (c.DeleteFile("g"), BOB, "first"),
    ]
    world.deployed(actor=ADMIN)
    for size, request in ((3, "size"), (4, ""), (3, "size")):
        steps.append((c.SetBatchSize("digits", size), ADMIN, request))
    for command, actor, request in steps:
        world.now_ms += 1
        world.apply(command, actor, request)


def test_until_the_version_is_raised_everything_is_done_as_the_first_release_did_it() -> None:
    """Releases side by side, and a log that another release applied: they must agree. The first release computed this digest."""
    first, second = World(), World.newest()
    for world in (first, second):
        _what_releases_do_differently(world)
    assert first.machine.digest().hex() == FIRST
    roster, namespace = first.machine.roster, first.machine.namespace
    carol = roster.user("carol")
    assert carol is not None
    assert carol.fingerprint == bytes([51]) * 32
    assert len(namespace.retention.rules()) == RULES_OF_ONE_MAX + 2
    assert namespace.open_put(f"open-{ns.OPEN_PUTS_OF_ONE_MAX}") is not None

    revoked = second.machine.roster.user("carol")
    assert revoked is not None
    assert revoked.fingerprint == b""
    assert len(second.machine.namespace.retention.rules()) == RULES_OF_ONE_MAX + 1
    assert second.machine.namespace.open_put(f"open-{ns.OPEN_PUTS_OF_ONE_MAX}") is None


def test_until_the_third_version_everything_is_done_as_the_second_did_it() -> None:
    world = World()
    world.do(c.RaiseVersion(2), ADMIN)
    _what_releases_do_differently(world)
    assert world.machine.digest().hex() == SECOND


def test_a_put_that_is_retried_behind_two_deletes_makes_no_second_version() -> None:
    def put(request: str) -> c.PutSmall:
        return c.PutSmall(request, "f", small_block(b"x").block, b"x")

    def story(world: World) -> list[int]:
        versions = [world.do(put("lost"), BOB).version]
        for round_ in range(3):
            for number in range(10):
                world.do(put(f"other-{round_}-{number}"), BOB)
            world.do(c.DeleteFile("f"), BOB)
        world.do(put("last"), BOB)
        versions.append(world.do(put("lost"), BOB).version)
        world.machine = Machine.restore(world.machine.snapshot())
        versions.append(world.do(put("lost"), BOB).version)
        world.do(c.RestoreTrash("f"), BOB)
        versions.append(world.do(put("lost"), BOB).version)
        return versions

    assert story(World.newest()) == [1, 1, 1, 1]
    second = World()
    second.do(c.RaiseVersion(2), ADMIN)
    assert story(second)[1] != 1, "else there is nothing that the third version does better"


@pytest.mark.parametrize("version", [2, 3])
def test_who_replayed_the_raise_and_who_has_a_snapshot_from_behind_it_agree(version: int) -> None:
    world = World()
    _what_releases_do_differently(world)
    world.do(c.RaiseVersion(version), ADMIN)
    at = len(world.log)
    restored = Machine.restore(world.machine.snapshot())
    _what_releases_do_differently(world)
    for index, payload in enumerate(world.log[at:], at + 1):
        restored.apply(Index(index), payload)
    assert restored.digest() == world.machine.digest()
