# Small contents that nothing refers to go with their segments; what anything refers to is never lost, whatever happens when.
from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest

from idunno.base.errors import DiskFailed, IdunnoError, Unavailable
from idunno.node.disk import RealDisk, ThreadOffload
from idunno.sdfs.hashing import block_id
from idunno.sdfs.marks import Marks
from idunno.sdfs.small import SmallStore
from tests.unit.sdfs.world import ToldDisk, ToldFile, inline, run

SEGMENT_BYTES = 3_000


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.sdfs.small.BATCH_BYTES", 1_000)


async def opened(disk: ToldDisk) -> SmallStore:
    store = SmallStore(disk, inline)
    store.segment_bytes = SEGMENT_BYTES
    await store.open()
    return store


def content(number: int) -> bytes:
    return b"%06d" % number * (10 + number % 40)


def keep(store: SmallStore, numbers: Iterable[int]) -> None:
    for number in numbers:
        store.keep(block_id(content(number)), content(number))


async def filled(count: int) -> tuple[ToldDisk, SmallStore]:
    """With that many contents, synced."""
    disk = ToldDisk()
    store = await opened(disk)
    keep(store, range(count))
    await store.flush()
    return disk, store


async def lacking(store: SmallStore, numbers: Iterable[int]) -> list[int]:
    return [number for number in numbers if await store.get(block_id(content(number))) != content(number)]


async def snapshot(store: SmallStore, live: Iterable[int]) -> None:
    """As consensus does it: all that the machine refers to is held; synced; then what is left may go."""
    store.mark()
    assert all(store.hold(block_id(content(number))) for number in live)
    await store.flush()
    await store.sweep()


def segments(disk: ToldDisk) -> set[str]:
    return {path for path in disk.paths() if path.startswith("small/")}


def test_what_nothing_refers_to_goes_and_its_space_with_it() -> None:
    async def story() -> None:
        disk, store = await filled(200)
        full, before = disk.used_bytes, segments(disk)
        live = range(0, 200, 10)
        await snapshot(store, live)
        assert disk.used_bytes < full / 4
        assert len(segments(disk) & before) == 1  # the one that was not full yet
        assert await lacking(store, live) == []
        gone = [number for number in range(150) if number % 10]
        assert await lacking(store, gone) == gone
        assert len(store._index) < 60
        keep(store, gone[:20])  # the same content once more
        await store.close()
        again = await opened(disk)
        assert await lacking(again, [*live, *gone[:20]]) == []
        assert len(again._index) < 80
        await again.close()

    run(story)


def test_a_segment_of_which_most_is_referred_to_is_left() -> None:
    async def story() -> None:
        disk, store = await filled(200)
        before, disk.story = segments(disk), []
        await snapshot(store, [number for number in range(200) if number % 3])
        assert segments(disk) == before
        assert not [path for doing, path in disk.story if doing in ("write", "create")]
        await store.close()

    run(story)


def test_one_sweep_reads_so_much_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.sdfs.small.SWEEP_BYTES_MAX", 3 * SEGMENT_BYTES + 2_000)

    async def story() -> None:
        disk, counts = ToldDisk(), []
        store = await opened(disk)
        keep(store, range(300))
        await store.flush()
        for _ in range(30):
            counts.append(len(segments(disk)))
            await snapshot(store, ())
        assert max(before - after for before, after in pairwise(counts)) <= 3
        assert counts[-1] == 1
        await store.close()

    run(story)


def test_what_is_kept_or_held_while_the_sweep_goes_on_stays() -> None:
    async def story() -> None:
        disk, store = await filled(200)
        rng, again = random.Random(1), set[int]()

        async def meanwhile(doing: str, path: str) -> None:
            for number in rng.sample(range(200), 3):
                keep(store, [number])
                again.add(number)

        disk.before = meanwhile
        await snapshot(store, range(0, 200, 20))
        disk.before = None
        assert len(again) > 20
        assert await lacking(store, again | set(range(0, 200, 20))) == []
        await store.close()
        reopened = await opened(disk)
        assert await lacking(reopened, again) == []
        await reopened.close()

    run(story)


def test_marks_that_were_begun_anew_or_swept_by_let_nothing_go() -> None:
    async def story() -> None:
        disk, store = await filled(100)
        before = segments(disk)
        await store.sweep()  # nothing was marked
        assert segments(disk) == before
        await snapshot(store, range(100))
        await store.sweep()  # once more, by the same marks
        assert segments(disk) == before
        await store.close()

    run(story)


@pytest.mark.parametrize("seed", range(60))
def test_a_crash_or_a_failing_disk_at_any_moment_loses_nothing_that_is_referred_to(seed: int) -> None:
    """The log is what was kept since the last snapshot that counts; the rest must be on the disk."""

    async def story() -> None:
        rng, disk = random.Random(seed), ToldDisk()
        store = await opened(disk)
        live, in_snapshot, in_log = set[int](), set[int](), set[int]()
        for _ in range(12):
            come = {rng.randrange(300) for _ in range(rng.randrange(60))}
            keep(store, come)
            live |= come
            in_log |= come
            live -= set(rng.sample(sorted(live), rng.randrange(len(live) + 1)))
            left, crash = rng.randrange(25), rng.random() < 0.6

            async def fail(doing: str, path: str, crash: bool = crash) -> None:
                nonlocal left
                left -= 1
                if left == 0 and crash:
                    disk.crash(rng)
                elif left == 0:
                    disk.faults = dict.fromkeys(("read", "write", "sync", "open", "remove"), "I/O error")

            disk.before = fail
            losses = store.losses
            store.mark()
            assert all(store.hold(block_id(content(number))) for number in live)
            captured = set(live)
            try:
                await store.flush()
                if store.losses != losses:
                    raise Unavailable("some of it is here no more")  # as keeper.py does
            except IdunnoError:
                captured = set(in_snapshot)  # it does not count, and nothing is swept
            else:
                in_snapshot, in_log = captured, set()
                await store.sweep()
            disk.before, disk.faults = None, {}
            if left <= 0 and crash:
                store._closing.set()
                store._wake.set()
                store = await opened(disk)
                assert await lacking(store, in_snapshot) == []
                keep(store, in_log)
            gone = await lacking(store, live)  # what could be neither synced nor read again: other nodes have it
            assert len(gone) <= store.losses
            assert not any(store.hold(block_id(content(number))) for number in gone)
            keep(store, gone)
            assert store._queue_bytes == sum(map(len, store._queue.values()))
        await snapshot(store, live)
        await store.close()
        last = await opened(disk)
        assert await lacking(last, live) == []
        await last.close()

    run(story)


def test_a_damaged_segment_is_swept_without_what_was_damaged() -> None:
    async def story() -> None:
        disk, store = await filled(60)
        first = "small/0000000001.seg"
        disk.flip(first, disk.content(first).index(content(4)) + 3)
        await snapshot(store, [1, 4])
        assert first not in disk.paths()
        assert await lacking(store, [1, 4]) == [4]
        assert not store.hold(block_id(content(4)))  # so the next snapshot has it fetched
        await store.close()

    run(story)


@pytest.mark.parametrize("which", range(6))
def test_a_sync_that_fails_once_and_then_says_nothing_loses_nothing(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux does it: what a failed fsync could not write counts as written for the next one."""
    real, synced = ToldFile.sync, 0

    async def sync(self: ToldFile) -> None:
        nonlocal synced
        if any(data is not None for _, data in self._inode.unsynced):
            synced += 1
            if synced == which + 1:
                self._inode.unsynced = []
                raise DiskFailed("I/O error")
        await real(self)

    async def story() -> None:
        disk, live = ToldDisk(), range(0, 200, 10)
        store = await opened(disk)
        keep(store, range(200))
        await store.flush()
        store.mark()
        assert all(store.hold(block_id(content(number))) for number in live)
        await store.flush()
        monkeypatch.setattr(ToldFile, "sync", sync)
        await store.sweep()
        for _ in range(3):
            await snapshot(store, live)
        keep(store, range(200, 240))
        await store.flush()
        disk.crash(random.Random(1))
        again = await opened(disk)
        assert await lacking(again, [*live, *range(200, 240)]) == []
        await snapshot(again, live)
        assert len(segments(disk)) < 6

    run(story)


@pytest.mark.parametrize("which", range(9))
def test_what_a_failed_sync_did_not_write_is_written_anew_before_anything_counts_as_synced(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a snapshot counted, and the log let go of contents that were in memory only."""
    real, synced, done = ToldFile.sync, 0, set[int]()
    looking: ToldDisk | None = None

    async def sync(self: ToldFile) -> None:
        nonlocal synced
        synced += looking is None
        if looking is None and synced in (which + 1, which + 2):
            self._inode.unsynced = []
            raise DiskFailed("I/O error")
        await real(self)

    async def after_a_crash(disk: ToldDisk) -> None:
        nonlocal looking
        looking = copy.deepcopy(disk)
        looking.crash(random.Random(which))
        store = await opened(looking)
        assert await lacking(store, done) == []
        await store.close()
        looking = None

    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        monkeypatch.setattr(ToldFile, "sync", sync)
        failed = 0
        for begin in range(0, 200, 20):
            keep(store, range(begin, begin + 20))
            while begin not in done:
                try:
                    await store.flush()
                except DiskFailed:
                    failed += 1
                else:
                    done.update(range(begin + 20))
            await after_a_crash(disk)
        assert 1 <= failed <= 2
        assert store._doubted == set()
        await snapshot(store, range(0, 200, 10))
        done.intersection_update(range(0, 200, 10))
        await after_a_crash(disk)
        await store.close()

    run(story)


def test_a_disk_that_goes_on_failing_to_sync_is_not_filled_with_copies_of_what_it_did_not_sync() -> None:
    async def story() -> None:
        disk, store = await filled(50)
        keep(store, range(50, 100))
        disk.faults["sync"] = "I/O error"
        for _ in range(20):
            with pytest.raises(DiskFailed):
                await store.flush()
        assert len(segments(disk)) <= 8  # those of before, and one copy
        disk.faults.clear()
        await store.flush()
        assert await lacking(store, range(100)) == []
        disk.crash(random.Random(1))
        again = await opened(disk)
        assert await lacking(again, range(100)) == []
        store._closing.set()
        store._wake.set()
        await again.close()

    run(story)


@pytest.mark.parametrize("fault", ["read", "remove"])
def test_a_doubted_segment_that_cannot_be_read_or_went_half_is_no_reason_to_fail_for_ever(fault: str) -> None:
    async def story() -> None:
        disk, store = await filled(50)
        keep(store, range(50, 60))
        disk.faults["sync"] = "I/O error"
        with pytest.raises(DiskFailed):
            await store.flush()
        disk.faults.clear()
        if fault == "read":
            disk.faults["read"] = "I/O error"
            await store.flush()
            gone = [number for number in range(60) if not store.hold(block_id(content(number)))]
            assert len(gone) == store.losses > 0
            disk.faults.clear()
        else:
            real = disk.remove

            async def remove(path: str) -> None:
                await real(path)
                raise asyncio.CancelledError  # while its thread went on

            disk.remove = remove  # type: ignore[method-assign]
            with pytest.raises(asyncio.CancelledError):
                await store.flush()
            disk.remove = real  # type: ignore[method-assign]
        await store.flush()
        assert await lacking(store, range(60)) == []  # also what could not be read for a while
        assert all(store.hold(block_id(content(number))) for number in range(60))
        await store.close()

    run(story)


def test_a_segment_that_cannot_be_read_keeps_no_other_from_being_swept() -> None:
    async def story() -> None:
        disk, store = await filled(200)
        before, bad = segments(disk), "small/0000000002.seg"

        async def refuse(doing: str, path: str) -> None:
            if path == bad:
                raise DiskFailed("I/O error")

        disk.before = refuse
        live = next(n for n in range(200) if store._index[bytes.fromhex(block_id(content(n)))][0] == 2)
        await snapshot(store, [live])
        assert segments(disk) & before == {bad, max(before)}
        await snapshot(store, ())
        assert segments(disk) & before <= {max(before)}  # nothing refers to anything in it: it need not be read
        await store.close()

    run(story)


def test_nothing_is_swept_while_somebody_reads_what_was() -> None:
    async def story() -> None:
        disk, store = await filled(200)
        before = segments(disk)
        with store.pinned(), store.pinned():
            await snapshot(store, ())
            assert segments(disk) == before
        await snapshot(store, ())
        assert len(segments(disk)) == 1
        await store.close()

    run(story)


def test_who_reads_a_segment_that_goes_reads_on_and_nothing_stays_open(tmp_path: Path) -> None:
    async def story() -> None:
        offload = ThreadOffload(4, "test")
        store = SmallStore(RealDisk(str(tmp_path), offload), offload)
        store.segment_bytes = SEGMENT_BYTES
        await store.open()
        keep(store, range(200))
        await store.flush()
        stop = False

        async def read() -> int:
            rounds = 0
            while not stop:
                assert await lacking(store, range(0, 200, 25)) == []
                rounds += 1
                await asyncio.sleep(0)
            return rounds

        readers = [asyncio.create_task(read()) for _ in range(4)]
        for _ in range(5):
            await snapshot(store, range(0, 200, 25))
            keep(store, range(200))
            await store.flush()
        stop = True
        assert min(await asyncio.gather(*readers)) > 0
        await snapshot(store, range(0, 200, 25))
        assert set(store._readers._files) <= {int(path.stem) for path in (tmp_path / "small").iterdir()}
        assert not store._readers._gone
        await store.close()
        offload.close()

    asyncio.run(story())


def test_who_comes_to_a_segment_that_is_gone_finds_its_content_where_it_went() -> None:
    async def story() -> None:
        disk, waiting, go_on = ToldDisk(), asyncio.Event(), asyncio.Event()
        store = await opened(disk)
        keep(store, range(60))
        await store.flush()

        async def hold_up(doing: str, path: str) -> None:
            disk.before = None  # the first who comes; the sweep is not held up
            waiting.set()
            await go_on.wait()

        disk.before = hold_up
        reading = asyncio.create_task(lacking(store, [1]))
        await waiting.wait()
        await snapshot(store, [1])
        assert "small/0000000001.seg" not in disk.paths()
        go_on.set()
        assert await reading == []
        await store.close()

    run(story)


def test_who_comes_to_a_segment_that_is_gone_finds_what_was_kept_anew() -> None:
    async def story() -> None:
        disk, waiting, go_on = ToldDisk(), asyncio.Event(), asyncio.Event()
        store = await opened(disk)
        keep(store, range(60))
        await store.flush()

        async def hold_up(doing: str, path: str) -> None:
            disk.before = None
            waiting.set()
            await go_on.wait()

        disk.before = hold_up
        reading = asyncio.create_task(lacking(store, [1]))
        await waiting.wait()
        await snapshot(store, ())  # nothing refers to it
        keep(store, [1])  # and then something does
        go_on.set()
        assert await reading == []
        await store.close()

    run(story)


def test_marks_are_exact() -> None:
    rng, marks = random.Random(3), Marks(4, 38)
    places, at = [], 8
    for _ in range(2_000):
        length = rng.randint(1, 200)
        places.append((rng.randint(1, 3), at + 38, length))
        at += 38 + length
    marked = set(rng.sample(places, 700))
    for place in [*marked, *marked, (4, 46, 10)]:
        marks.add(place)
    assert {place for place in places if place in marks} == marked
    assert sum(marks.live_bytes.values()) == sum(38 + length for _, _, length in marked)
    assert (4, 46, 10) not in marks
