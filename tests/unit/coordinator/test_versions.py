# The machine version: what came with a newer one, who may use it when, and what becomes of a release that does not know it.
from __future__ import annotations

import msgspec
import pytest

from idunno.base.errors import Conflict, Incompatible
from idunno.base.ids import Index
from idunno.coordinator import commands as c
from idunno.coordinator.effects import DigestDue, DigestTold, RosterChanged
from idunno.coordinator.machine import Machine
from idunno.coordinator.roster import RosterState
from idunno.coordinator.snapshot import Reader
from tests.unit.coordinator.world import ADMIN, SYSTEM, World


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
