# A snapshot's file: what was written is read, every damage is seen; and the log that goes on behind it.
from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idunno.base.errors import Corrupt, DiskFailed, Incompatible
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus import snapshot as files
from idunno.consensus.events import HardState
from idunno.consensus.log import RESERVE_PATH, STATE_PATH, Log
from idunno.consensus.messages import Entry
from idunno.consensus.records import encode_state
from idunno.consensus.voters import Voters, decode_voters, encode_voters, names_voters
from tests.unit.fakes import MemoryDisk

T = TypeVar("T")
A, B, C = (NodeId(name) for name in "abc")
HEAD = files.Head(Index(7), Term(3), (A, B), Index(5))
SMALL = 4096


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def written(*parts: bytes) -> MemoryDisk:
    disk = MemoryDisk()
    await disk.make_directory("log")
    await files.write(disk, files.NEW_PATH, HEAD, pieces(*parts))
    await files.replace(disk, files.NEW_PATH)
    return disk


async def read(disk: MemoryDisk) -> tuple[files.Head, bytes]:
    reader = await files.Reader.open(disk, files.PATH)
    content = b"".join([piece async for piece in reader.content()])
    return reader.head, content


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=3000), max_size=5), st.integers(0, 3))
def test_what_was_written_is_read_again_after_a_crash(parts: list[bytes], large: int) -> None:
    async def story() -> None:
        content = [*parts, bytes(large * files.PIECE_BYTES)]
        disk = await written(*content)
        disk.crash()
        assert await read(disk) == (HEAD, b"".join(content))

    run(story())


def test_every_flipped_bit_and_every_cut_is_seen() -> None:
    async def story() -> None:
        whole = (await written(b"some content", bytes(300))).content(files.PATH)
        for at in range(len(whole)):
            disk = await written(b"some content", bytes(300))
            disk.flip(files.PATH, at, 1 << at % 8)
            with pytest.raises((Corrupt, Incompatible)):
                await read(disk)
        for length in range(len(whole)):
            disk = await written(b"some content", bytes(300))
            file = await disk.open(files.PATH)
            await file.truncate(length)
            with pytest.raises(Corrupt):
                await read(disk)
        disk = await written(b"some content")
        file = await disk.open(files.PATH)
        await file.write(await file.size(), [b"more"])
        with pytest.raises(Corrupt):
            await read(disk)

    run(story())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_what_is_no_snapshot_is_refused_with_a_known_error(data: bytes) -> None:
    for candidate in (data, files.MAGIC + data):
        with pytest.raises((Corrupt, Incompatible)):
            files.decode_head(candidate, files.PATH)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=20), min_size=1, max_size=15))
def test_voters_are_read_as_they_were_named(names: set[str]) -> None:
    payload = encode_voters(NodeId(name) for name in names)
    assert names_voters(payload)
    assert decode_voters(payload) == names


def test_voters_come_and_go_with_their_entries() -> None:
    voters = Voters([A])
    both, all_three = frozenset({A, B}), frozenset({A, B, C})
    voters.append(5, both)
    voters.append(9, all_three)
    assert [voters.now, voters.before] == [all_three, both]
    assert voters.index == 9
    assert voters.at(8) == (5, both)
    voters.truncate(9)
    assert (voters.now, int(voters.index)) == (both, 5)
    voters.compact(6)
    assert (voters.now, int(voters.index), voters.before) == (both, 5, frozenset())
    voters.truncate(6)
    assert voters.now == both


# -- the log behind a snapshot -----------------------------------------------------------------------------------------


async def filled(entries: int) -> tuple[MemoryDisk, Log]:
    disk = MemoryDisk()
    await Log.create(disk, b"first", segment_bytes=SMALL)
    log = await Log.open(disk, segment_bytes=SMALL)
    await add(log, 2, *((1 + i // 20, b"%d" % i * 40) for i in range(2, entries + 1)))
    await disk.replace(STATE_PATH, encode_state(HardState(Term(20))))
    return disk, log


async def add(log: Log, first: int, *entries: tuple[int, bytes]) -> None:
    if first <= log.terms.last:
        log.terms.truncate(first)
    for term, payload in entries:
        log.terms.append(Term(term), len(payload))
    log.stage(Index(first), [Entry(Term(term), payload) for term, payload in entries])
    await log.flush()


async def content(log: Log) -> dict[int, bytes]:
    first = log.terms.base + 1
    return dict(enumerate(await log.read(first, log.terms.last), first)) if log.terms.last >= first else {}


def test_a_log_that_was_cut_goes_on_and_opens_behind_its_snapshot() -> None:
    async def story() -> None:
        disk, log = await filled(300)
        before = await content(log)
        base = await log.forget(Index(200))
        assert 100 < base <= 200
        log.terms.compact(base)
        assert await content(log) == {at: payload for at, payload in before.items() if at > base}
        await add(log, 301, (16, b"301"))
        disk.crash()
        term = log.terms.term(200)
        assert term is not None
        opened = await Log.open(disk, snapshot=(Index(200), term), segment_bytes=SMALL)
        found = await content(opened)
        assert list(found) == list(range(opened.terms.base + 1, 302))
        assert opened.terms.base <= 200
        assert {at: before[at] for at in found if at <= 300} == {at: p for at, p in found.items() if at <= 300}
        await opened.roll()
        await opened.forget(Index(301))
        assert (await opened.forget(Index(301))) == 301
        last = await Log.open(disk, snapshot=(Index(301), Term(16)), segment_bytes=SMALL)
        assert (last.terms.base, last.terms.last, last.terms.last_term) == (301, 301, 16)
        await add(last, 302, (16, b"302"))
        assert await content(last) == {302: b"302"}

    run(story())


def test_a_log_without_its_snapshot_is_corrupt() -> None:
    async def story() -> None:
        disk, log = await filled(300)
        await log.forget(Index(200))
        for snapshot in (None, (Index(50), Term(3))):
            with pytest.raises(Corrupt, match="begins behind entry"):
                await Log.open(disk, snapshot=snapshot, segment_bytes=SMALL)

    run(story())


@pytest.mark.parametrize(("index", "term"), [(400, 9), (300, 9), (150, 9)])
def test_a_log_that_ends_before_the_snapshot_or_differs_there_gives_way(index: int, term: int) -> None:
    async def story() -> None:
        disk, _ = await filled(300)
        log = await Log.open(disk, snapshot=(Index(index), Term(term)), segment_bytes=SMALL)
        assert (log.terms.base, log.terms.last, log.terms.last_term) == (index, index, term)
        await add(log, index + 1, (term, b"next"))
        for _ in range(2):
            log = await Log.open(disk, snapshot=(Index(index), Term(term)), segment_bytes=SMALL)
            assert await content(log) == {index + 1: b"next"}
        assert sum(path.endswith(".seg") for path in disk.paths()) == 1

    run(story())


def test_a_log_that_agrees_with_the_snapshot_keeps_what_follows() -> None:
    async def story() -> None:
        disk, log = await filled(300)
        term = log.terms.term(150)
        assert term is not None
        log = await Log.open(disk, snapshot=(Index(150), term), segment_bytes=SMALL)
        assert (log.terms.base, log.terms.last) == (0, 300)

    run(story())


def test_a_crash_at_any_moment_of_a_cut_or_of_a_new_beginning_leaves_a_log_that_opens() -> None:
    async def story(seed: int) -> None:
        rng = random.Random(seed)
        disk, log = await filled(200)
        fresh = rng.random() < 0.5
        index, term = (Index(260), Term(9)) if fresh else (Index(180), log.terms.term(180) or Term(0))
        disk.faults[rng.choice(["remove", "open", "write", "sync", "allocate", "sync_directory"])] = "power lost"
        try:
            if fresh:
                log.begin_anew(index)
                await log.flush()
            else:
                await log.roll()
                await log.forget(index)
        except DiskFailed:
            pass
        disk.faults.clear()
        disk.crash(rng)
        log = await Log.open(disk, snapshot=(index, term), segment_bytes=SMALL)
        assert log.terms.last == (260 if fresh else 200)
        await add(log, log.terms.last + 1, (21, b"next"))
        await disk.replace(STATE_PATH, encode_state(HardState(Term(21))))
        log = await Log.open(disk, snapshot=(index, term), segment_bytes=SMALL)
        assert (await content(log))[log.terms.last] == b"next"

    for seed in range(100):
        run(story(seed))


def test_the_voters_of_a_log_are_those_of_its_entries_behind_the_snapshot() -> None:
    async def story() -> None:
        disk, log = await filled(10)
        await add(log, 11, (5, encode_voters([A, B])), (5, b"x"), (5, encode_voters([A, B, C])))
        log = await Log.open(disk, segment_bytes=SMALL)
        assert log.voters(Voters([A])).now == {A, B, C}
        assert log.voters(Voters([A])).before == {A, B}
        assert log.voters(Voters([A, C], 13)).now == {A, C}
        await add(log, 13, (6, b"replaced"))
        assert (await Log.open(disk, segment_bytes=SMALL)).voters(Voters([A])).now == {A, B}

    run(story())


def test_a_log_that_was_short_of_space_is_not_when_there_is_space_again_although_nothing_new_is_written() -> None:
    """Nothing new is proposed while it is short, so it must not take a new snapshot to look again."""

    async def story() -> None:
        disk, log = await filled(40)
        assert await log.keep_reserve()
        capacity, disk.capacity_bytes = disk.capacity_bytes, disk.used_bytes
        await add(log, 41, *((3, b"more" * 100) for _ in range(12)))
        await log.regain_reserve()
        assert log.short
        disk.capacity_bytes = capacity
        await log.regain_reserve()
        assert (log.short, RESERVE_PATH in disk.paths()) == (False, True)

    run(story())


def test_the_reserve_is_given_free_once_and_stays_the_reserve_when_the_disk_refuses_that_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story() -> None:
        disk, log = await filled(40)
        assert await log.keep_reserve()
        disk.faults["remove"] = "Input/output error"
        assert (await log.use_reserve(), log.short) == (False, False)
        disk.faults.clear()
        remove = disk.remove

        async def slowly(path: str) -> None:
            await asyncio.sleep(0)
            await remove(path)

        monkeypatch.setattr(disk, "remove", slowly)
        assert sorted(await asyncio.gather(log.use_reserve(), log.use_reserve())) == [False, True]
        assert log.short
        await log.regain_reserve()
        await disk.remove(RESERVE_PATH)  # by somebody who needed the space
        assert await log.use_reserve()

    run(story())


def test_on_a_full_disk_the_reserve_takes_the_next_segment_and_a_cut_gives_it_back() -> None:
    async def story() -> None:
        disk, log = await filled(40)
        assert await log.keep_reserve()
        disk.capacity_bytes = disk.used_bytes
        await add(log, 41, *((3, b"more" * 100) for _ in range(12)))
        assert log.short
        assert RESERVE_PATH not in disk.paths()
        with pytest.raises(DiskFailed):
            await add(log, 53, *((3, b"more" * 100) for _ in range(40)))
        log.terms.compact(await log.forget(Index(52)))
        assert RESERVE_PATH in disk.paths()
        assert [log.short] == [False]
        disk.capacity_bytes *= 10  # somebody freed space
        await log.flush()
        assert (await content(log))[log.terms.last] == b"more" * 100

    run(story())
