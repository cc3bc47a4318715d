from __future__ import annotations

import asyncio
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from idunno.base import descriptors
from idunno.base.descriptors import ALIGN_BYTES, STEP_BYTES, is_direct, read_direct, write_direct
from idunno.base.disk import Buffer
from idunno.node.disk import RealDisk, ThreadOffload

sizes = st.one_of(st.integers(0, 20), st.sampled_from([ALIGN_BYTES - 1, ALIGN_BYTES, 2 * ALIGN_BYTES, STEP_BYTES + 5]))


def opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | descriptors.O_DIRECT, 0o600)
    except OSError:  # a file system without: then this tests that nothing is different
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writes=st.lists(st.lists(sizes, max_size=4), max_size=5), begin=sizes, at=sizes, length=sizes)
def test_whatever_the_sizes_what_is_written_is_read(
    tmp_path: Path, writes: list[list[int]], begin: int, at: int, length: int
) -> None:
    path = tmp_path / "a"
    descriptor = opened(path)
    try:
        content, offset, heard = bytearray(begin), begin, bytearray()
        os.ftruncate(descriptor, begin)
        for number, parts in enumerate(writes):
            data: Sequence[Buffer] = [os.urandom(4) * (size // 4 + 1) for size in parts]
            data = [memoryview(part)[:size] for part, size in zip(data, parts, strict=True)]
            write_direct(descriptor, offset, data, lambda parts: heard.extend(b"".join(parts)))
            content += b"".join(data)
            offset = len(content)
            assert path.stat().st_size == len(content), number
        assert read_direct(descriptor, at, length) == content[at : at + length]
        assert path.read_bytes() == content
        assert heard == content[begin:]
    finally:
        os.close(descriptor)
        path.unlink()


def test_whole_steps_go_past_the_cache_and_the_rest_through_it(tmp_path: Path) -> None:
    descriptor = opened(tmp_path / "a")
    if not is_direct(descriptor):
        pytest.skip("this file system has no other way than through the cache")
    write_direct(descriptor, 0, [bytes(STEP_BYTES), bytes(ALIGN_BYTES)])
    assert is_direct(descriptor)
    assert len(read_direct(descriptor, 17, STEP_BYTES)) == STEP_BYTES  # where it begins is no matter for reading
    assert is_direct(descriptor)
    write_direct(descriptor, STEP_BYTES + ALIGN_BYTES, [b"end"])
    assert not is_direct(descriptor)
    write_direct(descriptor, STEP_BYTES + ALIGN_BYTES + 3, [b"more"])
    assert read_direct(descriptor, STEP_BYTES + ALIGN_BYTES, 100) == b"endmore"
    os.close(descriptor)


def test_a_disk_that_takes_a_part_or_refuses_is_written_to_in_the_usual_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    content = os.urandom(3 * ALIGN_BYTES)
    for number in range(2):

        def a_part(descriptor: int, data: memoryview, offset: int) -> int:
            return real(descriptor, data[:ALIGN_BYTES], offset)

        def refuses(descriptor: int, data: memoryview, offset: int) -> int:
            raise OSError(errno.EINVAL, "invalid argument")

        monkeypatch.setattr(os, "pwrite", (a_part, refuses)[number])
        descriptor = opened(tmp_path / f"{number}")
        write_direct(descriptor, 0, [content])
        assert not is_direct(descriptor)
        assert (tmp_path / f"{number}").read_bytes() == content
        os.close(descriptor)


def mapped(content: bytes) -> memoryview:
    """Read-only bytes that lie at a page."""
    memory = mmap.mmap(-1, len(content))
    memory[:] = content
    return memoryview(memory).toreadonly()


def test_whole_pages_of_a_mapping_are_written_from_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(room: memoryview, views: list[memoryview]) -> int:
        raise AssertionError("there was no need of a copy")

    pieces = [os.urandom(ALIGN_BYTES), os.urandom(3 * ALIGN_BYTES)]
    heard = bytearray()
    descriptor = opened(tmp_path / "a")
    with monkeypatch.context() as patched:
        patched.setattr(descriptors, "_fill", copied)
        write_direct(descriptor, ALIGN_BYTES, list(map(mapped, pieces)), lambda parts: heard.extend(b"".join(parts)))
    assert (tmp_path / "a").read_bytes() == bytes(ALIGN_BYTES) + b"".join(pieces)
    assert heard == b"".join(pieces)
    write_direct(descriptor, ALIGN_BYTES, [mapped(pieces[1])[512:], mapped(pieces[0])[:512]])  # anywhere in their pages
    assert (tmp_path / "a").read_bytes() == bytes(ALIGN_BYTES) + pieces[1][512:] + pieces[0][:512] + pieces[1][
        -ALIGN_BYTES:
    ]
    os.close(descriptor)


@pytest.mark.parametrize("takes", [2 * ALIGN_BYTES, 512, 0])
def test_what_a_disk_does_not_take_from_where_it_lies_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: int
) -> None:
    real = os.pwritev
    content = os.urandom(5 * ALIGN_BYTES)
    calls = 0

    def pwritev(descriptor: int, data: Sequence[Buffer], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            return real(descriptor, data, offset)
        if not takes:
            raise OSError(errno.EINVAL, "invalid argument")
        return real(descriptor, [memoryview(data[0])[:takes]], offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    heard = bytearray()
    descriptor = opened(tmp_path / "a")
    if is_direct(descriptor):
        pieces = [mapped(content[: 3 * ALIGN_BYTES]), mapped(content[3 * ALIGN_BYTES :])]
        write_direct(descriptor, 0, pieces, lambda parts: heard.extend(b"".join(parts)))
        assert (tmp_path / "a").read_bytes() == heard == content
    os.close(descriptor)


def test_a_disk_without_room_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    descriptor = opened(tmp_path / "a")
    if is_direct(descriptor):
        with pytest.raises(OSError, match="no space"):
            write_direct(descriptor, 0, [bytes(ALIGN_BYTES)])
    os.close(descriptor)


def test_a_disk_in_memory_is_a_disk_too(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("no file system in memory here")
    offload = ThreadOffload(1, "test")

    async def story(disk: RealDisk) -> None:
        file = await disk.open(name, create=True, direct=True)
        await file.write(0, [b"abc", bytes(ALIGN_BYTES)], also=lambda data: None)
        assert await file.read(0, 10_000) == b"abc" + bytes(ALIGN_BYTES)
        await file.close()
        await disk.remove(name)

    name = f"idunno-{tmp_path.name}"
    asyncio.run(story(RealDisk(str(shared), offload)))
    offload.close()
