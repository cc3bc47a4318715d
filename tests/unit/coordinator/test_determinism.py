"""Same log, same machine: on two machines, through snapshots at any point, under two hash seeds."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
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

SNAPSHOT = history(5, 200).machine.snapshot()


def test_the_random_log_does_something_of_every_kind() -> None:
    seen, machine = Counter[str](), Machine()
    for index, payload in enumerate(history(2, 2_000).log, 1):
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


def test_a_replay_of_10_000_commands_under_two_hash_seeds_gives_equal_bytes() -> None:
    root = Path(__file__).parents[3]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.coordinator.replay", "11", "10000"],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "4242")
    ]
    said = [process.communicate(timeout=120)[0] for process in running]
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
    with pytest.raises((DecodeError, Corrupt)):
        Machine.restore(data)
    with pytest.raises(DecodeError):
        c.decode_entry(data)
    with pytest.raises(DecodeError):
        c.decode_command(data)


def test_a_newer_snapshot_is_incompatible() -> None:
    head = snapshots.Head(snapshots.FORMAT, 1, 1, 0)
    with pytest.raises(Incompatible, match="upgrade"):
        Machine.restore(b"".join(snapshots.encode(head, [("colour", "red", 1)])))
    for changed in (msgspec.structs.replace(head, format=3), msgspec.structs.replace(head, machine_version=99)):
        with pytest.raises(Incompatible, match="upgrade"):
            Machine.restore(b"".join(snapshots.encode(changed, [])))
    data = b"".join(snapshots.encode(head, [("roster", {"cluster": "x", "colour": "red"}, 1)]))
    with pytest.raises(DecodeError, match="not one this version knows"):
        Machine.restore(data)
    with pytest.raises(DecodeError, match="0 rows of kind roster, not one"):
        Machine.restore(b"".join(snapshots.encode(head, [])))


def test_a_capture_gives_the_machine_as_it_was_whatever_is_applied_meanwhile() -> None:
    """With every kind of command between any two pieces."""
    rng = random.Random(3)
    machine, plain, log = Machine(), Machine(), list(enumerate(history(11, 1_500).log, 1))

    def apply(count: int) -> None:
        for index, payload in log[:count]:
            machine.apply(Index(index), payload)
            plain.apply(Index(index), payload)
        del log[:count]

    while log:
        apply(rng.randrange(300))
        expected, taken = plain.snapshot(), []
        for piece in machine.capture():
            taken.append(piece)
            apply(rng.randrange(30))
        assert b"".join(taken) == expected
    assert machine.digest() == plain.digest()


@given(st.lists(st.integers(0, len(SNAPSHOT)), max_size=20))
def test_a_snapshot_comes_in_pieces_of_any_size(cuts: list[int]) -> None:
    reader = snapshots.Reader()
    for begin, end in pairwise([0, *sorted(cuts), len(SNAPSHOT)]):
        reader.feed(SNAPSHOT[begin:end])
    assert Machine.restored(reader).snapshot() == SNAPSHOT


@given(st.binary(max_size=300), st.integers(0, 10_000))
def test_whatever_follows_a_good_beginning_is_refused_with_a_known_error(rest: bytes, cut_at: int) -> None:
    with pytest.raises((Corrupt, DecodeError, Incompatible)):
        Machine.restore(SNAPSHOT[: cut_at % len(SNAPSHOT)] + rest + b"x")


def test_files_with_many_versions_and_jobs_with_many_tasks_are_cut_into_pages_and_put_together() -> None:
    world = World()
    for number in range(5_000):
        world.put("one/file", f"{number}", put=f"p{number}")
    pieces = list(world.machine.capture())
    assert len(pieces) >= 4
    assert max(len(piece) for piece in pieces) < 1024 * 1024
    restored = Machine.restore(b"".join(pieces))
    assert restored.namespace.state() == world.machine.namespace.state()
    assert len(restored.namespace.history("one/file")) == 5_000


def test_entries_are_applied_once_and_in_order() -> None:
    world = World()
    with pytest.raises(AssertionError):
        world.machine.apply(Index(1), b"")
