# Reading: ranges, versions, what is fetched and what is not.
from __future__ import annotations

import asyncio
import os
import pickle
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from idunno.base.disk import Buffer
from idunno.base.errors import Corrupt, NoQuorum
from idunno.base.ids import BlockId
from idunno.fs import IdunnoFileSystem
from idunno.fs.streams import AHEAD, Reader
from idunno.sdfs.messages import BlockCopies, FileInfo
from tests.unit.client.fake import FakeCluster

BLOCK = 8 * 1024 * 1024
LARGE = random.Random(1).randbytes(5 * BLOCK + 1000)


def blocks_read(fake: FakeCluster) -> list[str]:
    return [request.block for request in fake.world.asked("block.read")]


@pytest.mark.parametrize("size", [0, 10, 4097])
def test_ranges_are_those_of_a_slice(fake: FakeCluster, fs: IdunnoFileSystem, size: int) -> None:
    content = os.urandom(size)
    fake.world.put("a", content)
    bounds = [None, 0, 1, 5, 4096, 9_999, -1, -5, -9_999]
    for start in bounds:
        for end in bounds:
            assert fs.cat_file("a", start=start, end=end) == content[start:end], (start, end)


def test_a_range_fetches_only_the_blocks_it_lies_in(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fake.world.put("a", LARGE)
    assert fs.cat_file("a", start=2 * BLOCK - 3, end=2 * BLOCK + 4) == LARGE[2 * BLOCK - 3 : 2 * BLOCK + 4]
    assert len(blocks_read(fake)) == 2
    assert fs.cat_file("a", start=-10) == LARGE[-10:]
    assert len(blocks_read(fake)) == 3


def test_random_access_fetches_a_block_once_and_nothing_ahead(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fake.world.put("a", LARGE)
    with fs.open("a") as file:
        for at in (4 * BLOCK + 5, 4 * BLOCK, 4 * BLOCK + 70_000, 7):
            file.seek(at)
            assert file.read(100) == LARGE[at : at + 100]
        file.seek(-100, 2)
        assert file.read() == LARGE[-100:]
        assert file.read() == b""
    assert len(blocks_read(fake)) == 3


def test_a_file_read_in_order_is_read_ahead_and_each_block_once(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fake.world.put("a", LARGE)
    with fs.open("a") as file:
        pieces = list(iter(lambda: file.read(1_000_000), b""))
    assert b"".join(pieces) == LARGE
    assert len(blocks_read(fake)) == 6
    with fs.open("a") as file:
        assert file.read() == LARGE


def test_lines_and_text(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    lines = [b"x" * 100_000 + b"\n", b"short\n", b"\n", "ünë".encode()]
    fake.world.put("a", b"".join(lines))
    with fs.open("a") as file:
        assert list(file) == lines
    with fs.open("a", "r", encoding="utf-8") as text:
        assert text.readlines()[-1] == "ünë"
    assert fs.read_text("a", encoding="utf-8").endswith("ünë")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.integers(0, len(LARGE) + 10), st.integers(0, BLOCK + 10)), max_size=5))
def test_any_seeks_and_reads_give_the_bytes_there(
    fake: FakeCluster, fs: IdunnoFileSystem, steps: list[tuple[int, int]]
) -> None:
    if "large" not in fake.world.files:
        fake.world.put("large", LARGE)
    with fs.open("large") as file:
        for at, length in steps:
            file.seek(at)
            assert file.read(length) == LARGE[at : at + length]


def test_an_open_file_stays_at_its_version(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    old, new = LARGE[: 2 * BLOCK], LARGE[BLOCK : 4 * BLOCK]
    fake.world.put("a", old)
    with fs.open("a") as file:
        assert file.read(10) == old[:10]
        fake.world.put("a", new)
        copy = pickle.loads(pickle.dumps(file))
        assert (file.read(), copy.read()) == (old[10:], old[10:])
        assert file.info()["version"] == copy.info()["version"] == 1
    assert fs.cat_file("a") == new


def test_old_versions(fake: FakeCluster, fs: IdunnoFileSystem, tmp_path: os.PathLike[str]) -> None:
    for content in (b"one", b"second", b"3"):
        fake.world.put("a", content)
    with fs.open("a", version=2) as file:
        assert file.read() == b"second"
    assert fs.cat_file("a", version=1) == b"one"
    assert (fs.info("a", version=2)["size"], fs.info("a")["version"]) == (6, 3)
    assert [(entry["version"], entry["size"]) for entry in fs.versions("a")] == [(3, 1), (2, 6), (1, 3)]
    fs.get_file("a", f"{tmp_path}/back", version=1)
    with open(f"{tmp_path}/back", "rb") as back:
        assert back.read() == b"one"
    with pytest.raises(FileNotFoundError, match="no version 9"):
        fs.open("a", version=9)
    assert not fs.exists("a", version=9)
    fs.cp_file("a", "b", version=2)
    assert fs.cat_file("b") == b"second"


def test_what_is_not_there(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fake.world.put("dir/a", b"")
    fake.world.put(".idunno/jobs/j/input", b"secret")
    for path in ("gone", "dir/gone", ".idunno", ".idunno/jobs/j/input", ".idunno/jobs"):
        for ask in (fs.open, fs.cat_file, fs.info, fs.ls, fs.rm, fs.rm_file, fs.versions, fs.ukey, fs.modified):
            with pytest.raises(FileNotFoundError):
                ask(path)
        assert (fs.exists(path), fs.isfile(path), fs.isdir(path), fs.find(path)) == (False, False, False, [])
    for ask in (fs.open, fs.cat_file, fs.rm, fs.rm_file, fs.ukey, fs.modified):
        with pytest.raises(IsADirectoryError):
            ask("dir")
    assert "dir/a" in fake.world.files


def test_a_cluster_without_a_leader_is_not_an_empty_one(fake: FakeCluster) -> None:
    fs = IdunnoFileSystem("/fake", timeout_s=0.3)
    fake.world.put("a", b"")
    assert fs.exists("a")
    fake.world.trouble = lambda node, method: NoQuorum("no leader")
    for ask in (fs.exists, fs.isfile, fs.isdir, fs.find):
        with pytest.raises(OSError, match="no leader"):
            ask("a")


def test_damage_is_an_error_that_names_the_file(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fake.world.put("a", b"good")
    fake.world.trouble = lambda node, method: Corrupt("a version 1 is damaged")
    with pytest.raises(OSError, match="a version 1 is damaged") as caught:
        fs.cat_file("a")
    assert isinstance(caught.value.__cause__, Corrupt)
    assert caught.value.filename == "a"


class CountingClient:
    """Blocks of one byte; knows how many are held at most."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.gate = asyncio.Event()

    async def read(self, info: FileInfo, offset: int, length: int, *, timeout_s: float) -> Buffer:
        self.asked.append(offset)
        await self.gate.wait()
        return bytes([offset])


@pytest.fixture
def info() -> FileInfo:
    return FileInfo("a", 1, 20, "", "", [BlockCopies(BlockId(f"{i:064x}"), 1, []) for i in range(20)])


def test_reading_ahead_is_bounded_and_stops_with_the_file(info: FileInfo) -> None:
    async def story() -> None:
        client = CountingClient()
        reader = Reader(client, info, 1.0)  # type: ignore[arg-type]
        first = asyncio.create_task(reader.block(0, last=19))
        for _ in range(5):
            await asyncio.sleep(0)
        assert client.asked == list(range(AHEAD + 1))  # a long read fetches AHEAD more, not all
        client.gate.set()
        assert await first == b"\x00"
        assert [await reader.block(number, last=number) for number in range(1, 5)] == [bytes([n]) for n in range(1, 5)]
        await asyncio.sleep(0)
        assert client.asked == list(range(4 + AHEAD + 1))  # each once
        reader.drop()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        assert not reader._under_way

    asyncio.run(story())
