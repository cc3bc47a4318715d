# Small contents: at once readable, behind on the disk, again there after any crash.
from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idunno.base.errors import DiskFailed, Exhausted
from idunno.base.ids import Index, Term
from idunno.consensus.applying import Applying
from idunno.consensus.health import Health
from idunno.consensus.log import Log
from idunno.consensus.raft import Raft
from idunno.consensus.terms import Terms
from idunno.node.disk import RealDisk, ThreadOffload
from idunno.sdfs.hashing import block_id
from idunno.sdfs.segments import SEGMENT_MAGIC
from idunno.sdfs.small import QUEUE_BYTES_MAX, STALL_S, SmallStore
from tests.unit.sdfs.world import ToldDisk, inline, run, until

FIRST = "small/0000000001.seg"


async def opened(disk: ToldDisk) -> SmallStore:
    store = SmallStore(disk, inline)
    await store.open()
    return store


def contents(count: int, size: int = 50) -> list[bytes]:
    return [f"{i:06}".encode() * (size // 6) for i in range(count)]


def keep_all(store: SmallStore, all_of: list[bytes]) -> None:
    for content in all_of:
        store.keep(block_id(content), content)


async def missing(store: SmallStore, all_of: list[bytes]) -> list[bytes]:
    return [content for content in all_of if await store.get(block_id(content)) != content]


def test_a_content_is_readable_at_once_and_after_a_restart() -> None:
    async def story() -> None:
        disk, all_of = ToldDisk(), contents(1000)
        store = await opened(disk)
        keep_all(store, all_of)
        assert await missing(store, all_of) == []  # before anything was written
        assert disk.used_bytes == len(SEGMENT_MAGIC)
        await until(lambda: disk.used_bytes > 50_000)
        assert await missing(store, all_of) == []
        await store.close()
        disk.crash()
        again = await opened(disk)
        assert await missing(again, all_of) == []
        await again.close()

    run(story)


def test_kept_twice_is_written_once() -> None:
    async def story() -> None:
        disk, all_of = ToldDisk(), contents(10)
        store = await opened(disk)
        for _ in range(3):
            keep_all(store, all_of)
            await store.flush()
        size = disk.used_bytes
        await store.close()
        again = await opened(disk)
        keep_all(again, all_of)  # the log is replayed
        await again.close()
        assert disk.used_bytes == size

    run(story)


@pytest.mark.parametrize("seed", range(10))
def test_what_a_crash_tore_is_not_believed_and_comes_again_with_the_log(seed: int) -> None:
    async def story() -> None:
        disk, all_of = ToldDisk(), contents(400, 600)
        store = await opened(disk)
        keep_all(store, all_of[:100])
        await store.flush()
        keep_all(store, all_of[100:])
        await until(lambda: disk.used_bytes > 400 * 600)  # written, not synced
        disk.crash(random.Random(seed))
        again = await opened(disk)
        assert await missing(again, all_of[:100]) == []
        lost = await missing(again, all_of)
        assert all([await again.get(block_id(content)) is None for content in lost])
        keep_all(again, all_of)
        await again.close()
        third = await opened(disk)
        assert await missing(third, all_of) == []
        await third.close()

    run(story)


def test_a_rotten_record_is_not_handed_out_and_can_be_kept_anew() -> None:
    async def story() -> None:
        disk, all_of = ToldDisk(), contents(3)
        store = await opened(disk)
        keep_all(store, all_of)
        await store.flush()
        disk.flip(FIRST, disk.content(FIRST).index(all_of[1]) + 3)
        assert await missing(store, all_of) == [all_of[1]]
        assert block_id(all_of[1]) not in store
        keep_all(store, all_of)
        assert await missing(store, all_of) == []
        await store.close()
        again = await opened(disk)
        assert await missing(again, all_of) == []
        await again.close()

    run(story)


def test_a_full_disk_fills_the_queue_to_its_bound_and_no_further() -> None:
    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        disk.faults["write"] = "No space left on device"
        all_of = contents(QUEUE_BYTES_MAX // 4096 + 50, 4096)
        keep_all(store, all_of)
        await asyncio.sleep(5)
        with pytest.raises(Exhausted, match="wait for the disk"):
            store.check_room()
        assert store.dropped > 0
        assert sum(map(len, store._queue.values())) <= QUEUE_BYTES_MAX
        disk.faults.clear()
        await until(lambda: not store._queue)
        store.check_room()
        assert len(await missing(store, all_of)) == store.dropped
        await store.close()

    run(story)


@pytest.mark.parametrize("slow_s", [0.03, 3.0])
def test_a_log_that_is_replayed_faster_than_the_disk_writes_loses_nothing(slow_s: float) -> None:
    async def story() -> None:
        disk, all_of = ToldDisk(), contents(2 * QUEUE_BYTES_MAX // 4096, 4096)
        store = await opened(disk)

        async def slow(doing: str, path: str) -> None:
            if doing == "write":
                await asyncio.sleep(slow_s)

        disk.before = slow
        core = SimpleNamespace(commit=len(all_of), terms=Terms())
        core.terms.extend(Term(1), [4096] * len(all_of))
        log = SimpleNamespace(cached=lambda first, last: all_of[first - 1 : last])
        applying = Applying(
            lambda index, content: store.keep(block_id(content), content),
            slice_s=1.0,
            settled=lambda: None,
            room=store.room,
        )
        applying.bind(cast(Raft, core), cast(Log, log), cast(Health, None), Index(0), lambda index, value: None)
        task = asyncio.create_task(applying.run())
        applying.committed()
        await until(lambda: applying.index == len(all_of))
        task.cancel()
        assert store.dropped == 0
        await store.flush()
        assert await missing(store, all_of) == []
        await store.close()

    run(story)


@pytest.mark.parametrize("fails", [True, False])
def test_a_disk_that_fails_or_stands_still_is_waited_for_once_until_it_writes_again(fails: bool) -> None:
    async def story() -> None:
        disk, all_of = ToldDisk(), contents(3 * QUEUE_BYTES_MAX // 4 // 4096, 4096)
        store, stands, loop = await opened(disk), asyncio.Event(), asyncio.get_running_loop()

        async def still(doing: str, path: str) -> None:
            if doing == "write" and not stands.is_set():
                if fails:
                    raise DiskFailed("No space left on device")
                await stands.wait()

        disk.before = still
        keep_all(store, all_of)
        began_s = loop.time()
        await store.room()
        assert loop.time() - began_s <= (1 if fails else STALL_S)
        again_s = loop.time()
        for _ in range(100):
            await store.room()
        assert loop.time() == again_s
        assert store.dropped == 0
        stands.set()
        await until(lambda: not store._queue)
        await store.room()
        assert await missing(store, all_of) == []
        await store.close()

    run(story)


def test_few_segments_are_open_at_once_and_each_is_opened_once_while_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("idunno.sdfs.small.SEGMENT_BYTES_MAX", 10_000)
    monkeypatch.setattr("idunno.sdfs.small.BATCH_BYTES", 5_000)
    monkeypatch.setattr("idunno.sdfs.readers.READERS_MAX", 2)

    async def story() -> None:
        disk, all_of = ToldDisk(), contents(200, 600)
        store = await opened(disk)
        keep_all(store, all_of)
        await store.flush()
        disk.story.clear()
        assert await missing(store, all_of) == []  # in the order in which they were written
        assert disk.story.count(("open", FIRST)) == 1
        assert len(store._readers._files) == 2
        both = await asyncio.gather(store.get(block_id(all_of[0])), store.get(block_id(all_of[1])))
        assert list(both) == all_of[:2]
        assert len(store._readers._files) == 2
        await store.close()

    run(story)


def test_many_readers_of_a_segment_at_once_leave_one_descriptor_open(tmp_path: Path) -> None:
    def descriptors() -> int:
        links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return sum(str(tmp_path) in os.path.realpath(link) for link in links)

    async def story() -> None:
        offload = ThreadOffload(4, "readers")
        disk = RealDisk(str(tmp_path), offload)
        store = SmallStore(disk, offload)
        await store.open()
        contents = [b"content %d" % number for number in range(64)]
        for content in contents:
            store.keep(block_id(content), content)
        await store.flush()
        await store.close()
        store = SmallStore(disk, offload)
        await store.open()
        before = descriptors()
        assert await asyncio.gather(*(store.get(block_id(content)) for content in contents)) == contents
        assert descriptors() <= before + 1
        await store.close()
        assert descriptors() == 0
        offload.close()

    asyncio.run(story())


def test_segments_roll_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.sdfs.small.SEGMENT_BYTES_MAX", 10_000)
    monkeypatch.setattr("idunno.sdfs.small.BATCH_BYTES", 5_000)

    async def story() -> None:
        disk, all_of = ToldDisk(), contents(200, 600)
        store = await opened(disk)
        keep_all(store, all_of)
        await store.flush()
        assert len(disk.paths()) > 5
        assert await missing(store, all_of) == []
        await store.close()
        again = await opened(disk)
        assert await missing(again, all_of) == []
        await again.close()

    run(story)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_in_a_segment_are_survived(junk: bytes, with_magic: bool) -> None:
    async def story() -> None:
        disk, all_of = ToldDisk(), contents(3)
        await disk.make_directory("small")
        file = await disk.open(FIRST, create=True)
        await file.write(0, [SEGMENT_MAGIC if with_magic else b"", junk], sync=True)
        store = await opened(disk)
        keep_all(store, all_of)
        await store.close()
        again = await opened(disk)
        assert await missing(again, all_of) == []
        await again.close()

    run(story)
