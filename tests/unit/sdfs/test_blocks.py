# What a node's disk keeps of blocks: whole ones, synced before anybody hears of them.
from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from idunno.base.errors import Corrupt, DecodeError, DiskFailed, Exhausted, InvalidArgument, NotFound
from idunno.base.ids import BlockId
from idunno.sdfs.blocks import BUFFERED_BYTES_MAX, CROWDED_WRITE_BYTES, QUARANTINE_FILES_MAX, WRITE_BYTES, BlockStore
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.hashing import block_id
from tests.unit.sdfs.world import CONFIG, MB, ToldDisk, ToldFile, content_of, run, until

CONTENT = content_of(WRITE_BYTES + MB)  # two writes
BLOCK = block_id(CONTENT)
PATH = f"blocks/{BLOCK[:2]}/{BLOCK}"


class PowerLoss(Exception):
    pass


async def opened(disk: ToldDisk, config: SdfsConfig = CONFIG) -> BlockStore:
    store = BlockStore(disk, config)
    await store.open()
    return store


async def keep(
    store: BlockStore, content: bytes = CONTENT, *, named: BlockId | None = None, step: int = 100_000
) -> None:
    writer = await store.begin(named or block_id(content), len(content))
    try:
        for at in range(0, len(content), step):
            await writer.append(content[at : at + step])
        await writer.finish()
    finally:
        await writer.close()


async def read(store: BlockStore, block: BlockId = BLOCK, offset: int = 0, length: int = len(CONTENT)) -> bytes:
    return b"".join([piece async for piece in store.read(block, offset, length)])


def test_a_block_is_synced_then_named_then_its_directory_synced_before_it_is_held() -> None:
    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        heard: list[tuple[int, bool]] = []
        store.on_change = lambda block, held: heard.append((len(disk.story), held))
        await keep(store)
        temporary = disk.story[0][1]
        assert temporary.startswith("tmp/block-")
        assert disk.story == [
            ("create", temporary),
            *[("write", temporary)] * 2,
            ("sync", temporary),
            ("rename", PATH),
            ("sync_directory", f"blocks/{BLOCK[:2]}"),
        ]
        assert heard == [(len(disk.story), True)]  # told after all of it, not before
        assert await read(store) == CONTENT
        assert disk.paths() == [PATH]

    run(story)


STEPS = 6
"""create, two writes, sync, rename, sync of the directory."""


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("seed", range(3))
def test_power_lost_before_any_step_leaves_nothing_or_the_whole_block(step: int, seed: int) -> None:
    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)

        async def lose(doing: str, path: str) -> None:
            if len(disk.story) == step + 1:
                disk.crash(random.Random(seed))
                raise PowerLoss

        disk.before = lose
        with pytest.raises(PowerLoss):
            await keep(store)
        assert len(disk.story) == step + 1
        assert BLOCK not in store
        disk.before = None

        again = await opened(disk)
        assert [path for path in disk.paths() if path.startswith("tmp/")] == []
        assert BLOCK not in again  # the name was never synced; had it been, the content was before
        await keep(again)
        disk.crash(random.Random(seed))
        assert await read(await opened(disk)) == CONTENT

    run(story)


@pytest.mark.parametrize("doing", ["write", "sync", "rename", "sync_directory"])
def test_a_failing_disk_leaves_no_partial_file(doing: str) -> None:
    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        disk.faults[doing] = "input/output error"
        with pytest.raises(DiskFailed, match="input/output"):
            await keep(store)
        assert BLOCK not in store
        assert not any(path.startswith("tmp/") for path in disk.paths())
        with pytest.raises(Exhausted, match=r"no block is taken while the disk fails: .*input/output error"):
            await keep(store)
        await store.probe()
        assert (store.problem != "") == (doing in ("write", "sync"))  # what the probe does itself
        del disk.faults[doing]
        await store.probe()
        await keep(store)
        assert await read(store) == CONTENT

    run(story)


def test_a_disk_that_fills_up_on_the_way_leaves_no_partial_file() -> None:
    async def story() -> None:
        disk = ToldDisk(capacity_bytes=len(CONTENT))
        store = await opened(disk)

        async def fill(doing: str, path: str) -> None:
            disk.capacity_bytes = MB  # somebody else's data

        disk.before = fill
        with pytest.raises(DiskFailed, match="No space"):
            await keep(store)
        assert disk.paths() == []
        assert (await store.space()).free_bytes == MB  # nothing stays promised

    run(story)


def test_below_the_floor_blocks_are_refused_and_blocks_under_way_count() -> None:
    async def story() -> None:
        disk = ToldDisk(capacity_bytes=10 * MB)
        store = await opened(disk, SdfsConfig(floor_bytes=4 * MB, floor_percent=5))
        first = await store.begin(BLOCK, 4 * MB)
        with pytest.raises(Exhausted, match="10,485,760 bytes free"):
            await store.begin(BLOCK, 4 * MB)
        await first.close()
        second = await store.begin(BLOCK, 4 * MB)
        await second.close()

    run(story)


@pytest.mark.parametrize(
    "spoil",
    [lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: c[:-1], lambda c: b"", lambda c: c[:WRITE_BYTES]],
    ids=["flipped", "short", "empty", "cut"],
)
def test_bytes_that_are_not_the_block_are_not_kept(spoil: Callable[[bytes], bytes]) -> None:
    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        writer = await store.begin(BLOCK, len(CONTENT))
        try:
            if spoiled := spoil(CONTENT):
                await writer.append(spoiled)
            with pytest.raises(DecodeError):
                await writer.finish()
        finally:
            await writer.close()
        assert BLOCK not in store
        assert disk.paths() == []

    run(story)


def test_more_bytes_than_announced_are_refused_at_once() -> None:
    async def story() -> None:
        store = await opened(ToldDisk())
        writer = await store.begin(BLOCK, 10)
        with pytest.raises(InvalidArgument, match="10 bytes"):
            await writer.append(bytes(11))
        await writer.close()

    run(story)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 64, "g" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n"])
def test_what_names_no_block_never_becomes_a_path(name: str) -> None:
    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        with pytest.raises(InvalidArgument, match="names no block"):
            await store.begin(BlockId(name), 10)
        assert disk.story == []

    run(story)


def test_a_rotten_block_is_found_by_its_reader_and_put_away() -> None:
    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        await keep(store)
        gone: list[bool] = []
        store.on_change = lambda block, held: gone.append(held)
        disk.flip(PATH, 1_500_000)
        assert not await store.verify(BLOCK)
        assert gone == [False]
        assert disk.paths() == [f"quarantine/{BLOCK}"]
        with pytest.raises(NotFound):
            await read(store)
        await keep(store)  # it can be stored anew
        assert await store.verify(BLOCK)

    run(story)


def test_a_partial_read_does_not_judge_and_a_truncated_file_is_corrupt() -> None:
    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        await keep(store)
        disk.flip(PATH, 5)
        assert await read(store, offset=10, length=MB) == CONTENT[10 : 10 + MB]
        file = await disk.open(PATH)
        await file.truncate(MB)
        with pytest.raises(Corrupt, match="ends at"):
            await read(store)

    run(story)


def test_a_reader_of_an_old_file_does_not_put_away_the_block_written_meanwhile() -> None:
    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        await keep(store)
        disk.flip(PATH, 5)
        reader = store.read(BLOCK, 0, len(CONTENT))
        await anext(reader)
        await keep(store)  # somebody puts the block again, and it replaces the rotten file
        with pytest.raises(Corrupt):
            async for _ in reader:
                pass
        assert BLOCK in store
        assert await store.verify(BLOCK)

    run(story)


def test_many_writers_on_a_disk_that_stands_still_hold_less_each() -> None:
    async def story() -> None:
        goes_on, count = asyncio.Event(), 12
        contents = [content_of(2 * WRITE_BYTES, seed) for seed in range(count)]
        assert count * CROWDED_WRITE_BYTES > BUFFERED_BYTES_MAX

        async def wait(doing: str, path: str) -> None:
            if doing == "write":
                await goes_on.wait()

        async def one(content: bytes) -> None:
            writer = await store.begin(block_id(content), len(content))
            try:
                for at in range(0, len(content), MB // 2):
                    await writer.append(content[at : at + MB // 2])
                    await asyncio.sleep(0)
                await writer.finish()
            finally:
                await writer.close()

        disk = ToldDisk()
        store = await opened(disk)
        disk.before = wait
        async with asyncio.TaskGroup() as group:
            for content in contents:
                group.create_task(one(content))
            for _ in range(500):
                await asyncio.sleep(0)
            held = store.buffered_bytes
            goes_on.set()
        assert BUFFERED_BYTES_MAX < held <= count * (CROWDED_WRITE_BYTES + MB // 2)
        assert store.buffered_bytes == 0
        assert all([await read(store, block_id(content), 0, len(content)) == content for content in contents])

    run(story)


def closed_from_now_on(monkeypatch: pytest.MonkeyPatch) -> list[ToldFile]:
    """The files that are closed, in order."""
    closed: list[ToldFile] = []

    async def close(file: ToldFile) -> None:
        closed.append(file)

    monkeypatch.setattr(ToldFile, "close", close)
    return closed


@pytest.mark.parametrize("cancels", [1, 2])
def test_a_reader_that_is_cancelled_closes_the_file_however_slow_the_disk(
    cancels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        await keep(store)
        reads, slow = asyncio.Event(), asyncio.Event()

        async def wait(doing: str, path: str) -> None:
            if doing == "read":
                reads.set()
                await slow.wait()
                raise DiskFailed("at last")

        disk.before = wait
        closed = closed_from_now_on(monkeypatch)
        reading = asyncio.create_task(store.verify(BLOCK))
        await reads.wait()
        for _ in range(cancels):
            reading.cancel()
            await asyncio.sleep(0)
        slow.set()
        await asyncio.wait([reading])
        assert reading.cancelled()
        assert len(closed) == 1

    run(story)


@pytest.mark.parametrize("cancels", [1, 2, 3])
def test_a_writer_that_is_cancelled_while_its_block_gets_its_name_lets_go_of_everything(
    cancels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First its caller gives up, then the time for a block is over, then the node stops."""

    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        naming, slow = asyncio.Event(), asyncio.Event()

        async def wait(doing: str, path: str) -> None:
            if doing == "rename":
                naming.set()
                await slow.wait()

        disk.before = wait
        closed = closed_from_now_on(monkeypatch)
        before = (await store.space()).free_bytes
        writing = asyncio.create_task(keep(store))
        await naming.wait()
        for _ in range(cancels):
            writing.cancel()
            await asyncio.sleep(0)
        slow.set()
        await asyncio.wait([writing])
        assert writing.cancelled()
        await until(lambda: bool(closed))
        assert len(closed) == 1
        assert not store.is_written(BLOCK)
        assert BLOCK in store  # it has its name
        assert (await store.space()).free_bytes == before - len(CONTENT)

    run(story)


def test_the_quarantine_is_bounded() -> None:
    async def story() -> None:
        disk = ToldDisk()
        store = await opened(disk)
        for number in range(QUARANTINE_FILES_MAX + 5):
            content = number.to_bytes(4, "big")
            await keep(store, content)
            block = block_id(content)
            disk.flip(f"blocks/{block[:2]}/{block}", 0)
            assert not await store.verify(block)
        assert len(disk.paths()) == QUARANTINE_FILES_MAX

    run(story)


def test_a_start_finds_blocks_and_only_blocks() -> None:
    async def story() -> None:
        disk = ToldDisk()
        await keep(await opened(disk))
        await disk.make_directory("blocks/zz")
        for path in (
            "blocks/zz/readme.txt",
            f"blocks/zz/{'a' * 64}",
            f"blocks/{BLOCK[:2]}/{'0' * 63}",
            "tmp/other.part",
        ):
            file = await disk.open(path, create=True)
            await file.write(0, [b"x"])
        again = await opened(disk)
        assert again.held() == [BLOCK]
        assert again.size(BLOCK) == len(CONTENT)
        assert "tmp/other.part" in disk.paths()  # the folder is shared; that file is somebody else's

    run(story)
