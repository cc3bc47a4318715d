# The cache: one fetch for all who want it, what is in use stays, the bound holds.
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from idunno.base.errors import Exhausted, InvalidArgument, Unavailable
from idunno.node.disk import RealDisk, ThreadOffload
from idunno.worker import cache as cache_module
from idunno.worker.cache import Cache, Part
from tests.unit.worker.helpers import MemoryFiles, until


@asynccontextmanager
async def opened(folder: Path, files: MemoryFiles, bytes_max: int = 1_000) -> AsyncIterator[Cache]:
    offload = ThreadOffload(2, "test")
    cache = Cache(RealDisk(str(folder), offload), files, bytes_max=bytes_max)
    try:
        await cache.open()
        yield cache
        await cache.close()
    finally:
        offload.close()


def part(files: MemoryFiles, content: bytes, path: str = "input") -> Part:
    return Part(path, f"file {content[:4]!r}", len(content), files.add(content, block_bytes=100))


def on_disk(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in (folder / "cache").rglob("*") if p.is_file()}


def test_many_who_want_the_same_share_one_fetch(tmp_path: Path) -> None:
    async def run() -> None:
        files = MemoryFiles()
        files.gate.clear()
        async with opened(tmp_path, files) as cache:
            wants = [asyncio.create_task(cache.pin([part(files, b"a" * 300)])) for _ in range(5)]
            await until(lambda: files.fetches != [])
            wants[0].cancel()  # one who stops waiting does not take it from the others
            files.gate.set()
            pins = await asyncio.gather(*wants[1:])
            assert len(files.fetches) == 1
            assert len({pin.folder for pin in pins}) == 1
            assert list(on_disk(tmp_path).values()) == [b"a" * 300]
            again = await cache.pin([part(files, b"a" * 300)])
            assert len(files.fetches) == 1
            for pin in [*pins, again]:
                pin.release()

    asyncio.run(run())


def test_the_longest_unused_goes_and_what_is_pinned_stays(tmp_path: Path) -> None:
    async def run() -> None:
        files = MemoryFiles()
        async with opened(tmp_path, files) as cache:
            a, b, c = (part(files, letter * 400) for letter in (b"a", b"b", b"c"))
            pin_a = await cache.pin([a])
            (await cache.pin([b])).release()
            (await cache.pin([c])).release()  # b was not in use, a is older but pinned
            await until(lambda: sorted(on_disk(tmp_path).values()) == [b"a" * 400, b"c" * 400])
            assert cache.bytes_used == 800
            pin_a.release()
            (await cache.pin([a])).release()
            assert len(files.fetches) == 3

    asyncio.run(run())


def test_a_want_waits_for_room_and_is_refused_when_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        files = MemoryFiles()
        async with opened(tmp_path, files) as cache:
            pin = await cache.pin([part(files, b"a" * 900)])
            waiting = asyncio.create_task(cache.pin([part(files, b"b" * 500)]))
            await asyncio.sleep(0)
            pin.release()
            second = await waiting
            assert cache.bytes_used == 500

            monkeypatch.setattr(cache_module, "ROOM_S", 0.05)
            with pytest.raises(
                Exhausted, match="needs 600 bytes, but of the 1000 of the worker's cache 500 are in use"
            ):
                await cache.pin([part(files, b"c" * 600)])
            with pytest.raises(Exhausted, match="has 1001 bytes, the worker's cache holds 1000"):
                await cache.pin([part(files, b"d" * 1001)])
            second.release()
            assert cache.bytes_used == 500

    asyncio.run(run())


def test_a_fetch_that_fails_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    async def run() -> None:
        files = MemoryFiles()
        async with opened(tmp_path, files) as cache:
            wanted = part(files, b"a" * 100 + b"b" * 100)
            lost = files.content.pop(wanted.blocks[1].block)
            with pytest.raises(Unavailable):
                await cache.pin([wanted])
            await until(lambda: on_disk(tmp_path) == {})
            assert cache.bytes_used == 0
            files.content[wanted.blocks[1].block] = lost
            (await cache.pin([wanted])).release()
            assert list(on_disk(tmp_path).values()) == [b"a" * 100 + b"b" * 100]

    asyncio.run(run())


def test_when_nobody_waits_any_more_the_fetch_ends(tmp_path: Path) -> None:
    async def run() -> None:
        files = MemoryFiles()
        files.gate.clear()
        async with opened(tmp_path, files) as cache:
            want = asyncio.create_task(cache.pin([part(files, b"a" * 300)]))
            await until(lambda: files.fetches != [])
            want.cancel()
            await until(lambda: cache.bytes_used == 0 and on_disk(tmp_path) == {})

    asyncio.run(run())


def test_a_folder_holds_all_parts_and_none_leaves_it(tmp_path: Path) -> None:
    async def run() -> None:
        files = MemoryFiles()
        async with opened(tmp_path, files) as cache:
            pin = await cache.pin([part(files, b"m", "model.onnx"), part(files, b"w", "weights/w.bin")])
            assert on_disk(tmp_path) == {f"{pin.folder}/model.onnx": b"m", f"{pin.folder}/weights/w.bin": b"w"}
            pin.release()
            for path in ("../x", "/etc/x", "a/../../x", "", "a\nb"):
                with pytest.raises(InvalidArgument):
                    await cache.pin([part(files, b"x", path)])

    asyncio.run(run())


def test_what_an_earlier_process_left_is_removed_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "cache" / "7" / "sub").mkdir(parents=True)
    (tmp_path / "cache" / "7" / "sub" / "torn").write_bytes(b"x")

    async def run() -> None:
        async with opened(tmp_path, MemoryFiles()):
            assert on_disk(tmp_path) == {}

    asyncio.run(run())
