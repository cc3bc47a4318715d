# The durable log: what was flushed is there again, a torn tail is cut, damage is named, a full disk loses nothing.
from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idunno.base.disk import Buffer
from idunno.base.errors import Conflict, Corrupt, DiskFailed, Incompatible, NotFound
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.events import HardState
from idunno.consensus.log import STATE_PATH, Log
from idunno.consensus.messages import Entry
from idunno.consensus.records import (
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    SEGMENT_HEADER_BYTES,
    decode_record,
    decode_segment_header,
    decode_state,
    encode_record,
    encode_state,
)
from tests.unit.fakes import MemoryDisk
from tests.unit.fakes import _MemoryFile as MemoryFile

T = TypeVar("T")
SEGMENT = "log/00000001.seg"
SMALL = 4096  # bytes of a segment: small, so that tests cross its border


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def made(first: bytes | None = b"first") -> MemoryDisk:
    disk = MemoryDisk()
    await Log.create(disk, first, segment_bytes=SMALL)
    return disk


async def opened(disk: MemoryDisk, **options: Any) -> Log:
    return await Log.open(disk, segment_bytes=SMALL, **options)


async def add(log: Log, first: int, *entries: tuple[int, bytes], flush: bool = True) -> None:
    """As the core and its driver do: terms, stage, flush."""
    if first <= log.terms.last:
        log.terms.truncate(first)
    for term, payload in entries:
        log.terms.append(Term(term), len(payload))
    log.stage(Index(first), [Entry(Term(term), payload) for term, payload in entries])
    if flush:
        await log.flush()


async def content(log: Log) -> list[tuple[int, bytes]]:
    payloads = await log.read(1, log.terms.last)
    return [(log.terms.term(i) or 0, payload) for i, payload in enumerate(payloads, 1)]


def test_a_new_log_holds_its_first_entry_at_index_1_and_term_1() -> None:
    async def story() -> None:
        log = await opened(await made())
        assert await content(log) == [(1, b"first")]
        assert log.hard == HardState(Term(1))

    run(story())


def test_the_log_of_a_node_that_joins_is_empty() -> None:
    async def story() -> None:
        log = await opened(await made(None))
        assert log.terms.last == 0
        await add(log, 1, (1, b"a"), (1, b"b"))
        assert await content(log) == [(1, b"a"), (1, b"b")]

    run(story())


def test_small_writes_go_where_one_before_them_left_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        written: list[tuple[int, int]] = []  # offset, bytes
        plain = MemoryFile.write

        async def write(self: MemoryFile, offset: int, data: Sequence[Buffer], **options: Any) -> None:
            written.append((offset, sum(map(len, data))))
            await plain(self, offset, data, **options)

        monkeypatch.setattr(MemoryFile, "write", write)
        disk, segment_bytes, record = MemoryDisk(), 1 << 20, RECORD_HEADER_BYTES + 4096
        await Log.create(disk, None, segment_bytes=segment_bytes)
        log = await Log.open(disk, segment_bytes=segment_bytes)
        log.stage_hard(HardState(Term(1)))
        written.clear()
        for index in range(1, 101):
            await add(log, index, (1, bytes(4096)))
        sizes = [size for _, size in written]
        assert [at for at, size in enumerate(sizes) if size > record] == [0, 32, 64, 96]
        await add(log, 101, *[(1, bytes(4096))] * 40)
        assert written[-1][1] == 40 * record  # what is large by itself brings none
        for index in range(141, 401):  # into the next segment
            await add(log, index, (1, bytes(4096)))
        assert max(offset + size for offset, size in written) <= segment_bytes
        await log.close()
        again = await Log.open(disk, segment_bytes=segment_bytes)
        assert await content(again) == [(1, bytes(4096))] * 400

    run(story())


def test_there_is_no_log_before_it_is_made_and_it_is_made_once() -> None:
    async def story() -> None:
        with pytest.raises(NotFound, match="never initialised"):
            await opened(MemoryDisk())
        disk = await made()
        with pytest.raises(Conflict):
            await Log.create(disk, b"again")

    run(story())


def test_a_creation_that_was_cut_off_is_begun_again() -> None:
    async def story() -> None:
        disk = MemoryDisk()
        disk.faults["replace"] = "power lost"
        with pytest.raises(DiskFailed):
            await Log.create(disk, b"a longer first attempt", segment_bytes=SMALL)
        disk.faults.clear()
        with pytest.raises(NotFound):
            await opened(disk)
        await Log.create(disk, b"second", segment_bytes=SMALL)
        assert await content(await opened(disk)) == [(1, b"second")]

    run(story())


def test_what_was_flushed_survives_a_crash_across_segments_and_what_was_not_is_gone() -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk)
        expected = [(1, b"first")]
        for number in range(60):
            entry = (1 + number // 20, b"%d" % number * 50)
            await add(log, len(expected) + 1, entry)
            expected.append(entry)
        await add(log, len(expected) + 1, (9, b"never flushed"), flush=False)
        disk.crash()
        # The hard state must be at least of the log's term: the driver saves it first.
        await disk.replace(STATE_PATH, encode_state(HardState(Term(3), NodeId("n2"))))
        log = await opened(disk)
        assert await content(log) == expected
        assert log.hard == HardState(Term(3), NodeId("n2"))
        assert len([p for p in disk.paths() if p.endswith(".seg")]) >= 2

    run(story())


def test_what_a_killed_process_wrote_and_did_not_sync_is_synced_before_it_counts() -> None:
    """The next process reads it from the kernel's memory, acknowledges it, and loses it with the power."""

    async def story() -> None:
        disk = await made()
        log = await opened(disk)
        await add(log, 2, (1, b"written"), flush=False)
        disk.faults["sync"] = "killed"
        with pytest.raises(DiskFailed):
            await log.flush()
        disk.faults.clear()
        found = await content(await opened(disk))
        assert found == [(1, b"first"), (1, b"written")]
        disk.crash()
        assert await content(await opened(disk)) == found

    run(story())


def test_one_flush_is_one_write_and_one_sync_for_all_that_waits() -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk)
        for index in range(2, 12):
            await add(log, index, (1, b"x"), flush=False)
        before = disk.syncs
        await log.flush()
        assert disk.syncs == before + 1

    run(story())


def test_a_replaced_suffix_stays_replaced_and_the_later_entries_too() -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk)
        await add(log, 2, (1, b"a"), (1, b"b"), (1, b"c"))
        log.stage_hard(HardState(Term(2)))
        await add(log, 3, (2, b"B"))
        disk.crash()
        log = await opened(disk)
        assert await content(log) == [(1, b"first"), (1, b"a"), (2, b"B")]
        await add(log, 4, (2, b"C"))
        assert await content(await opened(disk)) == [(1, b"first"), (1, b"a"), (2, b"B"), (2, b"C")]

    run(story())


def test_a_replacement_that_was_torn_leaves_the_old_suffix() -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk)
        await add(log, 2, (1, b"a"), (1, b"b"))
        await add(log, 2, (1, b"A" * 1000), flush=False)
        disk.faults["sync"] = "power lost"
        with pytest.raises(DiskFailed):
            await log.flush()
        disk.faults.clear()
        disk.crash()
        assert await content(await opened(disk)) == [(1, b"first"), (1, b"a"), (1, b"b")]

    run(story())


def test_a_torn_write_of_several_records_is_cut_and_the_log_goes_on() -> None:
    """Sectors of one write survive by chance: a whole record may stand behind a torn one. No seed may lose what was synced."""

    async def story(seed: int) -> int:
        rng = random.Random(seed)
        disk = await made()
        log = await opened(disk)
        expected = [(1, b"first")]
        torn = 0
        for _ in range(6):
            for _ in range(rng.randint(0, 3)):
                entry = (1, b"x" + rng.randbytes(rng.randint(0, 900)))
                expected.append(entry)
                await add(log, len(expected), entry)
            batch = [(1, b"x" + rng.randbytes(rng.randint(0, 900))) for _ in range(rng.randint(1, 4))]
            await add(log, len(expected) + 1, *batch, flush=False)
            disk.faults["sync"] = "power lost"
            with pytest.raises(DiskFailed):
                await log.flush()
            disk.faults.clear()
            disk.crash(rng)
            log = await opened(disk)
            found = await content(log)
            assert found[: len(expected)] == expected, f"seed {seed}"
            assert found == (expected + batch)[: len(found)], f"seed {seed}"
            torn += len(found) < len(expected) + len(batch)
            expected = found
        return torn

    assert sum(run(story(seed)) for seed in range(60)) > 100


def flips(path: str, count: int) -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk)
        for index in range(2, 40):
            await add(log, index, (1, b"%d" % index * 60))
        pristine, rng = disk.content(path), random.Random(5)
        used = len(pristine.rstrip(b"\0"))
        for offset in {*range(SEGMENT_HEADER_BYTES), *rng.sample(range(used), count)}:
            mask = 1 << rng.randrange(8)
            disk.flip(path, offset, mask)
            with pytest.raises(Corrupt, match=r"damaged|wrong checksum|no state file") as caught:
                await opened(disk)
            assert "join it again" in str(caught.value) or "join again" in str(caught.value)
            disk.flip(path, offset, mask)
        assert disk.content(path) == pristine
        assert len(await content(await opened(disk))) == 39

    run(story())


def test_a_flipped_bit_in_an_older_segment_is_corrupt() -> None:
    flips(SEGMENT, 200)


def test_a_flipped_bit_before_a_later_write_in_the_last_segment_is_corrupt_and_says_where() -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk)
        await add(log, 2, (1, b"two" * 30), (1, b"three" * 30))
        at = log._tail - 10  # inside entry 3
        await add(log, 4, (1, b"four"))
        disk.flip(SEGMENT, at)
        with pytest.raises(Corrupt, match=r"log/00000001\.seg: damaged at offset \d+, entry 3 .*entry 4.*join again"):
            await opened(disk)

    run(story())


def test_a_flipped_bit_in_the_last_write_is_a_torn_tail_after_a_crash_and_corrupt_after_a_clean_end() -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk)
        await add(log, 2, (1, b"two"))
        disk.flip(SEGMENT, log._tail - 1)
        assert (await opened(disk)).terms.last == 1  # a crash might have left this
        log = await opened(disk)
        await add(log, 2, (1, b"two"))
        await log.close()
        disk.flip(SEGMENT, log._tail - 1)
        with pytest.raises(
            Corrupt, match=r"00000001\.seg: the log ends or is damaged at offset \d+, but was synced up to"
        ):
            await opened(disk)

    run(story())


def test_a_record_of_the_log_inside_a_payload_is_no_record() -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk)
        await add(log, 2, (1, b"x"))
        start = disk.content(SEGMENT).rindex(RECORD_MAGIC)
        copy = disk.content(SEGMENT)[start : log._tail]
        await add(log, 3, (1, copy * 5))
        disk.flip(SEGMENT, log._tail - 1)  # rot or a torn tail: nothing behind it proves that it was synced
        log = await opened(disk)
        assert log.terms.last == 2

    run(story())


def test_a_state_file_with_a_flipped_bit_is_corrupt_and_an_older_one_too() -> None:
    async def story() -> None:
        disk = await made()
        for offset in range(len(disk.content(STATE_PATH))):
            disk.flip(STATE_PATH, offset)
            with pytest.raises((Corrupt, Incompatible)):
                await opened(disk)
            disk.flip(STATE_PATH, offset)
        await disk.replace(STATE_PATH, encode_state(HardState(Term(0))))
        with pytest.raises(Corrupt, match="an old copy was restored"):
            await opened(disk)

    run(story())


def test_a_missing_segment_is_corrupt() -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk)
        for index in range(2, 60):
            await add(log, index, (1, b"x" * 300))
        await disk.remove("log/00000002.seg")
        with pytest.raises(Corrupt, match=r"00000002\.seg is missing"):
            await opened(disk)

    run(story())


def test_a_format_of_another_version_is_incompatible() -> None:
    async def story() -> None:
        disk = await made()
        from idunno.consensus import records

        was = records.FORMAT
        records.FORMAT = 2  # type: ignore[misc]
        try:
            with pytest.raises(Incompatible, match="log format 1, this version of idunno reads 2"):
                await opened(disk)
        finally:
            records.FORMAT = was  # type: ignore[misc]

    run(story())


def test_a_full_disk_refuses_loses_nothing_and_goes_on_when_there_is_room() -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk)
        disk.capacity_bytes = disk.used_bytes
        index, refused = 1, ""
        try:
            for index in range(2, 100):
                await add(log, index, (1, b"%03d" % index * 100))
        except DiskFailed as error:
            refused = str(error)
        assert "No space left" in refused
        acknowledged = index - 1
        assert acknowledged > 5  # what was reserved before is used to its end
        with pytest.raises(DiskFailed):
            await log.flush()
        disk.capacity_bytes *= 10
        await log.flush()
        disk.crash()
        found = await content(await opened(disk))
        assert len(found) == index
        assert found[1:] == [(1, b"%03d" % i * 100) for i in range(2, index + 1)]

    run(story())


def test_a_crash_while_a_segment_is_made_leaves_the_log_whole() -> None:
    async def story(operation: str, seed: int) -> None:
        disk = await made()
        log = await opened(disk)
        index = 1
        while len([p for p in disk.paths() if p.endswith(".seg")]) == 1 and index < 50:
            index += 1
            if log._tail + RECORD_HEADER_BYTES + 300 > SMALL:
                disk.faults[operation] = "power lost"
            try:
                await add(log, index, (1, bytes([index]) * 300))
            except DiskFailed:
                break
        disk.faults.clear()
        disk.crash(random.Random(seed))
        log = await opened(disk)
        assert log.terms.last == index - 1
        for more in range(index, index + 30):
            await add(log, more, (1, bytes([more]) * 300))
        disk.crash()
        assert await content(await opened(disk)) == [
            (1, b"first"),
            *((1, bytes([i]) * 300) for i in range(2, index + 30)),
        ]

    for operation in ("open", "allocate", "write", "sync", "sync_directory"):
        for seed in range(4):
            run(story(operation, seed))


def test_recent_payloads_are_in_memory_within_the_bound_and_older_ones_come_from_disk() -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk, cache_bytes_max=2_000)
        for index in range(2, 60):
            await add(log, index, (1, b"%02d" % index * 100))
        assert log._cache_bytes <= 2_000
        assert log.cached(55, 59) == [b"%02d" % i * 100 for i in range(55, 60)]
        assert log.cached(40, 59) is None
        assert (await log.read(1, 59))[1:] == [b"%02d" % i * 100 for i in range(2, 60)]
        with pytest.raises(NotFound):
            await log.read(59, 61)

    run(story())


def test_damage_met_while_reading_is_named() -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk, cache_bytes_max=0)
        await add(log, 2, (1, b"x" * 100), (1, b"y" * 100))
        disk.flip(SEGMENT, log._tail - 1)
        with pytest.raises(Corrupt, match=r"log/00000001\.seg: entry 3 at offset"):
            await log.read(1, 3)

    run(story())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_history_of_appends_cuts_flushes_and_crashes_reads_back(data: st.DataObject) -> None:
    async def story() -> None:
        disk = await made()
        log = await opened(disk, cache_bytes_max=500)
        model, synced, term = [(1, b"first")], [(1, b"first")], 1
        for _ in range(data.draw(st.integers(1, 12))):
            match data.draw(st.sampled_from(["append", "replace", "flush", "crash", "read"])):
                case "append" | "replace" as how:
                    first = (
                        data.draw(st.integers(2, len(model))) if how == "replace" and len(model) > 1 else len(model) + 1
                    )
                    if first <= len(model):
                        term += 1
                        log.stage_hard(HardState(Term(term)))
                    new = [
                        (term, b"x" + p) for p in data.draw(st.lists(st.binary(max_size=700), min_size=1, max_size=4))
                    ]
                    await add(log, first, *new, flush=False)
                    model[first - 1 :] = new
                case "flush":
                    await log.flush()
                    synced = list(model)
                case "crash":
                    disk.crash(random.Random(data.draw(st.integers(0, 9))))
                    log = await opened(disk, cache_bytes_max=500)
                    model = list(synced)
                    term = log.hard.term
                case "read":
                    assert await content(log) == model
        await log.flush()
        assert await content(await opened(disk)) == model

    run(story())


@given(st.binary(max_size=300), st.integers(0, 10))
def test_decoders_take_any_bytes(data: bytes, at: int) -> None:
    assert decode_record(data, at, 1, at) is None
    assert decode_segment_header(data, "x") is None
    with pytest.raises(Corrupt):
        decode_state(data, "x")


def test_a_record_is_valid_only_in_its_own_place() -> None:
    header, checksum = encode_record(3, 100, 7, 90, 5, 2, b"payload")
    record = decode_record(header + b"payload", 0, 3, 100)
    assert record is not None
    assert (record.index, record.term, record.payload, record.previous, record.batch) == (5, 2, b"payload", 7, 90)
    assert record.checksum == checksum
    assert decode_record(header + b"payload", 0, 3, 101) is None
    assert decode_record(header + b"payload", 0, 4, 100) is None
    assert len(header) == RECORD_HEADER_BYTES
