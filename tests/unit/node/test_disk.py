from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from idunno.base.errors import Corrupt, DiskFailed, NotFound
from idunno.node.disk import RealDisk, ThreadOffload, replace_file

Run = Callable[[Callable[[RealDisk], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    offload = ThreadOffload(1, "test")
    yield lambda story: asyncio.run(story(RealDisk(str(tmp_path), offload)))
    offload.close()


def test_what_is_written_is_read(run: Run) -> None:
    async def story(disk: RealDisk) -> None:
        file = await disk.open("a", create=True)
        parts = [bytes([i % 256]) * (i % 7) for i in range(2000)]  # more buffers than one call takes, some empty
        await file.write(3, parts, sync=True)
        whole = b"".join(parts)
        assert await file.read(3, len(whole)) == whole
        assert await file.read(3, len(whole) + 100) == whole  # short only at the end of the file
        assert await file.size() == 3 + len(whole)
        await file.truncate(10)
        assert await file.size() == 10
        await file.allocate(4096)
        assert await file.size() == 4096
        await file.close()

    run(story)


def test_what_is_in_memory_is_read_at_once_and_only_whole(run: Run) -> None:
    async def story(disk: RealDisk) -> None:
        file = await disk.open("a", create=True)
        hashed: list[bytes] = []
        await file.write(0, [b"abcdef"], also=lambda data: hashed.append(b"".join(data)))
        assert hashed == [b"abcdef"]
        # Not every file system can tell; who cannot gives nothing, and it is read in the usual way.
        assert file.read_now(1, 4) in (b"bcde", None)
        assert file.read_now(4, 4) is None  # two of the four bytes are there
        await file.close()
        assert file.read_now(0, 1) is None

    run(story)


def test_a_short_write_is_continued(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_most_five_bytes(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return os.pwrite(descriptor, b"".join(buffers)[:5], offset)

    monkeypatch.setattr(os, "pwritev", at_most_five_bytes)

    async def story(disk: RealDisk) -> None:
        file = await disk.open("a", create=True)
        await file.write(0, [b"abc", b"", b"defghij", b"klmno"])
        assert await file.read(0, 100) == b"abcdefghijklmno"
        await file.close()

    run(story)


def test_a_file_is_not_closed_under_the_hands_of_a_write_that_nobody_awaits_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next file that is opened gets the number of its descriptor, and with it the bytes."""
    begun, go_on, real = threading.Event(), threading.Event(), os.pwritev

    def slow(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        begun.set()
        go_on.wait(10)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", slow)

    async def story() -> None:
        disk = RealDisk(str(tmp_path), offload)
        file = await disk.open("a", create=True)
        writing = asyncio.create_task(file.write(0, [b"mine"]))
        await asyncio.to_thread(begun.wait, 10)
        writing.cancel()
        await asyncio.wait({writing})
        closing = asyncio.create_task(file.close())
        other = await disk.open("b", create=True)
        go_on.set()
        await closing
        await other.close()
        assert await disk.read_all("b", bytes_max=10) == b""

    offload = ThreadOffload(3, "test")
    asyncio.run(story())
    offload.close()


def test_errors_are_typed_and_carry_the_systems_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(disk: RealDisk) -> None:
        with pytest.raises(NotFound, match="nothing: no such file"):
            await disk.open("nothing")
        with pytest.raises(NotFound):
            await disk.remove("nothing")
        assert await disk.list("nothing") == []
        await disk.replace("small", b"12345")
        with pytest.raises(Corrupt, match="4 bytes"):
            await disk.read_all("small", bytes_max=4)

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(DiskFailed, match=r"No space left on device; free some space"):
            await disk.replace("small", b"6")

    run(story)


def test_replace_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = str(tmp_path / "file")
    replace_file(target, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        replace_file(target, b"new, but never synced")
    assert Path(target).read_bytes() == b"old"


def test_directories_are_made_with_their_parents_and_listed_in_order(run: Run) -> None:
    async def story(disk: RealDisk) -> None:
        await disk.make_directory("x/y/z")
        await disk.make_directory("x/y/z")
        await disk.replace("x/y/b", b"1")
        await disk.replace("x/y/a", b"22")
        found = [(entry.name, entry.size) for entry in await disk.list("x/y") if not entry.is_directory]
        assert found == [("a", 2), ("b", 1)]
        await disk.rename("x/y/a", "x/y/c")
        assert [entry.name for entry in await disk.list("x/y")] == ["b", "c", "z"]
        assert (await disk.space()).free_bytes > 0

    run(story)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../b", "a//b", ""])
def test_a_path_never_leaves_the_data_directory(run: Run, path: str) -> None:
    async def story(disk: RealDisk) -> None:
        with pytest.raises(AssertionError):
            await disk.open(path, create=True)

    run(story)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_an_open_that_nobody_awaits_any_more_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, real = threading.Event(), threading.Event(), os.open

    def slow(*arguments: Any, **more: Any) -> int:
        begun.set()
        go_on.wait(10)
        return real(*arguments, **more)

    async def story() -> None:
        disk = RealDisk(str(tmp_path), offload)
        before = descriptors()
        monkeypatch.setattr(os, "open", slow)
        opening = asyncio.create_task(disk.open("a", create=True))
        await asyncio.to_thread(begun.wait, 10)
        opening.cancel()
        await asyncio.wait({opening})
        monkeypatch.undo()
        go_on.set()
        await offload(lambda: None)  # behind the opening, and what it left to do, in the only thread
        await offload(lambda: None)
        assert descriptors() == before

    offload = ThreadOffload(1, "test")
    asyncio.run(story())
    offload.close()


def test_a_close_that_nobody_awaits_any_more_is_carried_out(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def busy() -> None:
        begun.set()
        go_on.wait(10)

    async def story() -> None:
        disk = RealDisk(str(tmp_path), offload)
        before = descriptors()
        file = await disk.open("a", create=True)
        begun_to_close = asyncio.Event()

        async def begin_to_close() -> None:
            begun_to_close.set()  # whoever waits for it runs when the close stands still
            await file.close()

        blocker = asyncio.create_task(offload(busy))
        await asyncio.to_thread(begun.wait, 10)
        closing = asyncio.create_task(begin_to_close())
        await begun_to_close.wait()
        closing.cancel()
        await asyncio.wait({closing})
        go_on.set()
        await blocker
        await offload(lambda: None)
        assert descriptors() == before

    offload = ThreadOffload(1, "test")
    asyncio.run(story())
    offload.close()


def test_a_device_that_fails_at_the_close_is_an_error_like_any_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.close

    def fails(descriptor: int) -> None:
        real(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    async def story(disk: RealDisk) -> None:
        file = await disk.open("a", create=True)
        monkeypatch.setattr(os, "close", fails)
        with pytest.raises(DiskFailed, match="cannot close a: Input/output error"):
            await file.close()
        monkeypatch.undo()

    run(story)
