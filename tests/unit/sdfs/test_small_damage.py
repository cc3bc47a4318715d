# Segments of small contents that cannot be read, or hold bytes that nobody wrote: what is good of them stays, wherever it lies.
from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from typing import Any

import pytest

from idunno.base.errors import DiskFailed, NotFound
from idunno.sdfs import segments as layout
from idunno.sdfs.hashing import block_id
from idunno.sdfs.segments import HEAD_BYTES, SEGMENT_MAGIC, path_of
from idunno.sdfs.small import SmallStore
from tests.unit.sdfs.test_small_sweep import content, filled, keep, lacking, opened, segments, snapshot
from tests.unit.sdfs.world import ToldDisk, ToldFile, run, until


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.sdfs.small.BATCH_BYTES", 1_000)


def unreadable(disk: ToldDisk, paths: Iterable[str]) -> None:
    bad = set(paths)

    async def refuse(doing: str, path: str) -> None:
        if doing == "read" and path in bad:
            raise DiskFailed("I/O error")

    disk.before = refuse


def in_segment(store: SmallStore, segment: int, numbers: Iterable[int]) -> list[int]:
    return [number for number in numbers if store._index[bytes.fromhex(block_id(content(number)))][0] == segment]


async def killed(disk: ToldDisk, store: SmallStore) -> SmallStore:
    """The process dies, the machine does not; the next one."""
    store._closing.set()
    store._wake.set()
    return await opened(disk)


# -- at start ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
def test_a_segment_that_cannot_be_read_keeps_no_node_from_starting_and_is_left_as_it_is(last: bool) -> None:
    async def story() -> None:
        disk, store = await filled(200)
        segment = store._segment if last else 2
        there = in_segment(store, segment, range(200))
        before = disk.content(path_of(segment))
        unreadable(disk, [path_of(segment)])
        second = await killed(disk, store)
        assert await lacking(second, range(200)) == there
        keep(second, range(200, 210))
        await snapshot(second, [number for number in range(210) if number not in there])
        assert disk.content(path_of(segment)) == before
        disk.before = None
        third = await killed(disk, second)
        assert await lacking(third, range(210)) == []
        await third.close()

    run(story)


def test_a_full_disk_is_no_reason_not_to_start_either() -> None:
    async def story() -> None:
        disk, store = await filled(50)
        file = await disk.open(path_of(store._segment))
        await file.write(store._end, [b"torn"], sync=True)  # so that another is begun
        disk.faults["write"] = "No space left on device"
        again = await killed(disk, store)
        assert await lacking(again, range(50)) == []
        keep(again, range(50, 60))
        disk.faults.clear()
        await again.flush()
        third = await killed(disk, again)
        assert await lacking(third, range(60)) == []
        await third.close()

    run(story)


def test_what_a_killed_process_left_torn_is_synced_elsewhere_before_anything_counts() -> None:
    async def story() -> None:
        disk, store = await filled(30)
        keep(store, range(30, 40))
        await until(lambda: not store._queue)  # written, not synced
        file = await disk.open(path_of(store._segment))
        await file.write(store._end, [b"\x00"])
        again = await killed(disk, store)
        await again.flush()
        disk.crash()
        third = await killed(disk, again)
        assert await lacking(third, range(40)) == []
        await third.close()

    run(story)


# -- bytes that nobody wrote ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", [0, 7, 8, 12])
@pytest.mark.parametrize("when", ["at start", "while it runs"])
def test_a_length_that_rots_costs_one_content(bit: int, when: str) -> None:
    async def story() -> None:
        disk, store = await filled(50)
        for number in (3, 49):
            segment, offset, _ = store._index[bytes.fromhex(block_id(content(number)))]
            path, at = path_of(segment), offset - HEAD_BYTES + (bit < 8)
            data = bytearray(disk.content(path))
            data[at] ^= 1 << bit % 8
            file = await disk.open(path)
            await file.write(0, [data], sync=True)
        if when == "at start":
            store = await killed(disk, store)
            assert await lacking(store, range(50)) == [3, 49]
        store._doubted |= {1}
        await store.flush()  # moves what is there
        assert path_of(1) not in disk.paths()
        live = [number for number in range(0, 50, 4) if number not in (3, 49)]
        store.mark()
        assert all(store.hold(block_id(content(number))) for number in live)
        await store.sweep()
        assert await lacking(store, live) == []
        await store.close()

    run(story)


@pytest.mark.parametrize("seed", range(40))
def test_a_page_of_nothing_costs_what_lay_in_it(seed: int) -> None:
    rng = random.Random(seed)
    blocks = {}
    data = bytearray(SEGMENT_MAGIC)
    for _ in range(400):
        body = rng.randbytes(rng.choice([1, 20, 300, 4096]))
        blocks[len(data)] = bytes.fromhex(block_id(body))
        data += layout.head_of(block_id(body), body) + body
    begin = rng.randrange(len(SEGMENT_MAGIC), len(data))
    length = rng.choice([1, 512, 4096])
    data[begin : begin + length] = bytes(len(data[begin : begin + length])) if seed % 2 else rng.randbytes(length)
    parsed = layout.parse(bytes(data), len(SEGMENT_MAGIC), True)
    ends = [*list(blocks)[1:], len(data)]
    whole = {key for (at, key), end in zip(blocks.items(), ends, strict=True) if end <= begin or at >= begin + length}
    assert whole <= {record.key for record in parsed.records} <= set(blocks.values())


# -- syncs and reads that fail ----------------------------------------------------------------------------------------------


def test_a_copy_that_is_found_bad_counts_for_nothing_while_the_one_before_is_there() -> None:
    async def story() -> None:
        disk, store = await filled(50)
        keep(store, [60])
        disk.faults["sync"] = "I/O error"
        for _ in range(2):
            with pytest.raises(DiskFailed):
                await store.flush()
        disk.faults.clear()
        unreadable(disk, map(path_of, store._hollow))  # what was written anew
        await store.flush()
        assert await lacking(store, range(50)) == []
        assert store.losses == 0
        await snapshot(store, range(50))
        disk.before = None
        disk.crash()
        again = await killed(disk, store)
        assert await lacking(again, range(50)) == []
        await again.close()

    run(story)


def test_a_swept_segment_stays_when_what_was_written_anew_of_it_is_found_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        disk, store = await filled(200)
        live = range(0, 200, 10)
        store.mark()
        assert all(store.hold(block_id(content(number))) for number in live)
        await store.flush()
        real, bad = SmallStore._move, set[str]()

        async def move(self: SmallStore, segment: int, size: int, marks: Any) -> bool:
            moved = await real(self, segment, size, marks)
            if marks is not None and self._older[segment] and not bad:
                bad.add(path_of(self._segment))
                disk.faults["sync"] = "I/O error"
                with pytest.raises(DiskFailed):
                    await self.flush()  # somebody else's
                disk.faults.clear()
                unreadable(disk, bad)
            return moved

        monkeypatch.setattr(SmallStore, "_move", move)
        await store.sweep()
        assert bad
        assert await lacking(store, live) == []
        disk.before = None
        disk.crash()
        again = await killed(disk, store)
        assert await lacking(again, live) == []
        await again.close()

    run(story)


def test_a_content_that_cannot_be_read_does_not_count_as_here_and_is_not_forgotten() -> None:
    async def story() -> None:
        disk, store = await filled(50)
        block = block_id(content(3))
        unreadable(disk, segments(disk))
        assert await store.get(block) is None
        assert block not in store
        assert not store.hold(block)
        assert store.losses == 1
        store.keep(block, content(3))  # somebody else had it
        assert await store.get(block) == content(3)
        assert await store.get(block_id(content(4))) is None
        disk.before = None
        assert await lacking(store, range(50)) == []  # the disk was out of sorts
        assert store.hold(block_id(content(4)))
        await store.close()

    run(story)


def test_what_cannot_be_read_is_tried_a_few_times_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        disk, store = await filled(200)
        there = in_segment(store, 2, range(200))
        unreadable(disk, [path_of(2)])
        disk.story.clear()
        store._doubted.add(2)
        await store.flush()
        assert len([1 for doing, path in disk.story if doing == "read" and path == path_of(2)]) <= 10
        assert store.losses == len(there)
        assert not any(store.hold(block_id(content(number))) for number in there)
        disk.before = None
        assert await lacking(store, range(200)) == []
        await store.close()

    monkeypatch.setattr("idunno.sdfs.small.FAILED_READS_MAX", 5)
    run(story)


def test_a_disk_that_fails_to_sync_is_not_filled_with_copies_because_another_segment_cannot_be_read() -> None:
    async def story() -> None:
        disk, store = await filled(50)
        keep(store, range(50, 60))
        disk.faults["sync"] = "I/O error"
        with pytest.raises(DiskFailed):
            await store.flush()
        unreadable(disk, map(path_of, store._doubted))
        keep(store, range(200, 240))
        used = []
        for _ in range(20):
            with pytest.raises(DiskFailed):
                await store.flush()
            used.append(disk.used_bytes)
        assert max(used[10:]) <= max(used[:10])
        disk.faults.clear()
        disk.before = None
        await store.close()

    run(story)


def test_a_failing_disk_is_tried_once_a_second() -> None:
    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        disk.faults["write"] = "No space left on device"
        for number in range(2_000):
            keep(store, [number])
            await asyncio.sleep(0.01)
        tries = sum(doing == "write" for doing, _ in disk.story)
        assert tries <= 22
        await asyncio.sleep(20)
        assert sum(doing == "write" for doing, _ in disk.story) <= tries + 21
        disk.faults.clear()
        await until(lambda: not store._queue)
        assert await lacking(store, range(2_000)) == []
        await store.close()

    run(story)


def test_the_writer_outlives_a_directory_that_is_gone() -> None:
    async def story() -> None:
        disk, store = await filled(50)

        async def refuse(doing: str, path: str) -> None:
            if doing == "create":
                disk.before = None
                raise NotFound("no such directory")

        disk.before = refuse
        keep(store, range(50, 200))
        await until(lambda: not store._queue)
        await store.close()
        again = await opened(disk)
        assert await lacking(again, range(200)) == []
        await again.close()

    run(story)


def test_a_flush_that_is_cancelled_while_it_syncs_does_not_hide_how_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        disk, store = await filled(20)
        keep(store, range(20, 40))
        reached, goes_on = asyncio.Event(), asyncio.Event()

        async def sync(file: ToldFile) -> None:
            async def in_thread() -> None:
                reached.set()
                await goes_on.wait()
                file._inode.unsynced = []  # as the system does: the pages are clean now
                raise DiskFailed("I/O error")

            thread = asyncio.ensure_future(in_thread())
            thread.add_done_callback(lambda ended: ended.exception())
            await asyncio.shield(thread)

        with monkeypatch.context() as lying:
            lying.setattr(ToldFile, "sync", sync)
            flush = asyncio.ensure_future(store.flush())
            await reached.wait()
            flush.cancel()
            with pytest.raises(asyncio.CancelledError):
                await flush
            goes_on.set()
            await asyncio.sleep(0.1)
        await store.flush()
        disk.crash()
        again = await killed(disk, store)
        assert await lacking(again, range(40)) == []
        await again.close()

    run(story)


# -- sweeping ---------------------------------------------------------------------------------------------------------------


def test_segments_that_cannot_be_swept_keep_no_others_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        disk, store = await filled(400)
        bad = sorted(segments(disk))[:4]
        live = [in_segment(store, segment, range(400))[0] for segment in (1, 2, 3, 4)]
        unreadable(disk, bad)
        for _ in range(12):
            store.mark()
            for number in live:
                store.hold(block_id(content(number)))
            await store.flush()
            await store.sweep()
        assert segments(disk) - {path_of(store._segment)} == set(bad)  # something in them is referred to
        disk.before = None
        assert await lacking(store, live) == []
        await snapshot(store, live)
        assert not segments(disk) & set(bad)
        assert await lacking(store, live) == []
        await store.close()

    monkeypatch.setattr("idunno.sdfs.small.SWEEP_BYTES_MAX", 4 * 3_600)
    run(story)
