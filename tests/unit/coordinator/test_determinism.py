"""Same log, same machine: on two machines, through snapshots at any point, under two hash seeds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idunno.base.errors import Corrupt, DecodeError, Incompatible
from idunno.base.ids import Index
from idunno.coordinator import commands as c
from idunno.coordinator import snapshot as snapshots
from idunno.coordinator.machine import Machine
from tests.unit.coordinator.replay import history
from tests.unit.coordinator.world import World


def test_the_random_log_does_something_of_every_kind() -> None:
    seen, machine = Counter[str](), Machine()
    for index, payload in enumerate(history(1, 2_000).log, 1):
        command = c.decode_entry(payload).command
        if machine.apply(Index(index), payload).error is None:
            seen[type(command).__name__] += 1
    assert set(seen) == {kind.__name__ for kind in c.Command.__args__}
    assert {job.state for job in machine.ledger.jobs()} >= {"success", "failed", "cancelled"}


@pytest.mark.parametrize("seed", range(3))
def test_two_machines_and_one_restored_half_way_are_equal(seed: int) -> None:
    world = history(seed, 600)
    other = Machine()
    for index, payload in enumerate(world.log, 1):
        if index % 97 == 0:
            other = Machine.restore(other.snapshot())
        other.apply(Index(index), payload)
    assert other.digest() == world.machine.digest()
    assert other.snapshot() == world.machine.snapshot()


def test_a_replay_under_two_hash_seeds_gives_equal_bytes() -> None:
    root = Path(__file__).parents[3]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.coordinator.replay", "11"],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "4242")
    ]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said[0] == said[1] != ""


def test_a_digest_sees_one_changed_byte_and_one_more_entry() -> None:
    world, other = World(), World()
    assert world.machine.digest() == other.machine.digest()
    world.put("a", "x", put="p")
    other.put("a", "y", put="p")
    assert world.machine.digest() != other.machine.digest()


def test_a_damaged_snapshot_is_refused() -> None:
    good = history(5, 100).machine.snapshot()
    for at in range(0, len(good), 97):
        bad = bytearray(good)
        bad[at] ^= 1
        with pytest.raises((Corrupt, DecodeError)):
            Machine.restore(bytes(bad))
    with pytest.raises(Corrupt):
        Machine.restore(good[:-1])


@given(st.binary(max_size=200))
def test_what_is_no_snapshot_or_entry_is_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        Machine.restore(data)
    with pytest.raises(DecodeError):
        c.decode_entry(data)
    with pytest.raises(DecodeError):
        c.decode_command(data)


def test_a_newer_snapshot_is_incompatible() -> None:
    taken = World().machine._snapshot()
    newer = [
        msgspec.structs.replace(taken, format=2),
        msgspec.structs.replace(taken, machine_version=2),
        msgspec.structs.replace(taken, parts=taken.parts[:-1]),
        msgspec.structs.replace(taken, parts=(msgspec.structs.replace(taken.parts[0], format=2), *taken.parts[1:])),
    ]
    for snapshot in newer:
        with pytest.raises(Incompatible, match="upgrade"):
            Machine.restore(snapshots.encode(snapshot))
    unknown = msgspec.msgpack.encode({"cluster": "x", "colour": "red"})
    part = msgspec.structs.replace(taken.parts[0], content=unknown)
    with pytest.raises(DecodeError, match="part roster"):
        Machine.restore(snapshots.encode(msgspec.structs.replace(taken, parts=(part, *taken.parts[1:]))))


def test_entries_are_applied_once_and_in_order() -> None:
    world = World()
    with pytest.raises(AssertionError):
        world.machine.apply(Index(1), b"")
