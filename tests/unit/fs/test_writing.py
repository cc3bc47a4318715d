# Writing: a version appears at `close`, in one step, or never.
from __future__ import annotations

import asyncio
import csv
import gc
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.callbacks import Callback

from idunno.base.errors import Exhausted, PermissionDenied
from idunno.fs import ConflictError, IdunnoFileSystem
from idunno.fs.connection import Connection
from idunno.fs.streams import Writer
from idunno.sdfs.messages import PutAnswer
from idunno.sdfs.upload import Source
from tests.unit.client.fake import FakeCluster

BLOCK = 8 * 1024 * 1024
LARGE = random.Random(2).randbytes(2 * BLOCK + 1000)


def contents(fake: FakeCluster, name: str) -> list[bytes]:
    return [stored.content for stored in fake.world.files.get(name, [])]


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, BLOCK, len(LARGE)])
@pytest.mark.parametrize("step", [1_000_000, 2 * BLOCK])
def test_one_version_appears_at_close(fake: FakeCluster, fs: IdunnoFileSystem, size: int, step: int) -> None:
    with fs.open("a", "wb") as file:
        for at in range(0, size, step):
            assert file.write(LARGE[at : min(size, at + step)]) == min(size, at + step) - at
            file.flush()
        assert file.tell() == size
        assert contents(fake, "a") == []
    assert contents(fake, "a") == [LARGE[:size]]
    assert file.version == 1
    file.close()  # again: nothing
    assert len(contents(fake, "a")) == 1


def write_and_fail(opened: Any, content: bytes | str) -> None:
    with opened as file:
        file.write(content)
        raise KeyError


OPENINGS: list[Callable[[IdunnoFileSystem], Any]] = [
    lambda fs: fs.open("a", "wb"),
    lambda fs: fs.open("a", "xb"),
    lambda fs: fs.open("a.gz", "wb", compression="infer"),
    lambda fs: fsspec.open("idunno://a", "wb", where="/fake"),
    lambda fs: fsspec.open("idunno://a.gz", "wb", where="/fake", compression="infer"),
]


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("content", [b"", b"tiny", LARGE], ids=["empty", "small", "large"])
def test_an_exception_inside_with_leaves_nothing(
    fake: FakeCluster, fs: IdunnoFileSystem, opening: Callable[[IdunnoFileSystem], Any], content: bytes
) -> None:
    with pytest.raises(KeyError):
        write_and_fail(opening(fs), content)
    gc.collect()
    assert fake.world.files == {}
    if fake.world.asked("file.begin"):
        assert len(fake.world.asked("file.abort")) == 1


@pytest.mark.parametrize(
    "door", [lambda fs: fs.open("a", "w"), lambda fs: fsspec.open("idunno://a", "w", where="/fake")]
)
def test_an_exception_inside_with_leaves_no_text_either(
    fake: FakeCluster, fs: IdunnoFileSystem, door: Callable[[IdunnoFileSystem], Any]
) -> None:
    with pytest.raises(KeyError):
        write_and_fail(door(fs), "half a li")
    assert fake.world.files == {}


def test_a_plain_close_stores_also_while_an_exception_is_handled(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    file = fs.open("a", "wb")
    try:
        raise KeyError
    except KeyError:
        file.write(b"the report")
        file.close()
        with fs.open("b", "w") as text:
            text.write("another")
    assert (contents(fake, "a"), contents(fake, "b")) == ([b"the report"], [b"another"])


def test_a_file_that_is_dropped_stores_nothing_and_says_so(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    def write_and_forget() -> None:
        fs.open("a", "wb").write(LARGE)

    with pytest.warns(ResourceWarning, match="a: dropped without close"):
        write_and_forget()
    fs.pipe_file("b", b"")  # the loop has gone on
    assert list(fake.world.files) == ["b"]


def test_compression_and_text_are_whole_when_closed(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    with fs.open("a.csv.gz", "w", compression="infer", newline="") as file:
        csv.writer(file).writerows([["x", 1], ["y", 2]])
    with fs.open("a.csv.gz", "r", compression="infer") as file:
        assert list(csv.reader(file)) == [["x", "1"], ["y", "2"]]
    with fsspec.open("idunno://a.csv.gz", "rt", where="/fake", compression="infer") as file:
        assert file.readline() == "x,1\n"
    assert len(contents(fake, "a.csv.gz")) == 1


def test_numpy_writes_and_reads(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    array = np.arange(3_000_000, dtype=np.float64).reshape(3, -1)
    with fs.open("a.npy", "wb") as file:
        np.save(file, array)
    with fs.open("a.npy") as file:
        assert np.array_equal(np.load(file), array)
    with fs.open("a.npz", "wb") as file:
        np.savez(file, first=array[0], second=array[1])
    with fs.open("a.npz") as file:
        assert np.array_equal(np.load(file)["second"], array[1])


@pytest.mark.parametrize("old", [None, b"", b"old", LARGE])
@pytest.mark.parametrize("more", [b"", b"more", LARGE])
def test_appending_makes_a_new_version_of_both(
    fake: FakeCluster, fs: IdunnoFileSystem, old: bytes | None, more: bytes
) -> None:
    if old is not None:
        fake.world.put("a", old)
    with fs.open("a", "ab") as file:
        assert file.tell() == len(old or b"")
        file.write(more)
    assert contents(fake, "a")[-1] == (old or b"") + more
    assert len(contents(fake, "a")) == (1 if old is None else 2)


@pytest.mark.parametrize("old", [None, b"old", LARGE])
def test_appending_to_what_has_changed_meanwhile_is_refused(
    fake: FakeCluster, fs: IdunnoFileSystem, old: bytes | None
) -> None:
    if old is not None:
        fake.world.put("a", old)
    file = fs.open("a", "ab")
    file.write(b"mine")
    fake.world.put("a", b"theirs")
    with pytest.raises(ConflictError, match="wanted version"):
        file.close()
    assert contents(fake, "a")[-1] == b"theirs"
    assert file.closed


@pytest.mark.parametrize("content", [b"mine", LARGE])
def test_creating_is_a_compare_and_set(fake: FakeCluster, fs: IdunnoFileSystem, tmp_path: Path, content: bytes) -> None:
    file = fs.open("a", "xb")
    file.write(content[:10])
    fake.world.put("a", b"theirs")  # after our look, before our close

    def go_on() -> None:
        file.write(content[10:])
        file.close()

    with pytest.raises(FileExistsError, match="wanted version 0"):
        go_on()
    file.discard()
    file.close()
    with pytest.raises(FileExistsError):
        fs.open("a", "xb")
    with pytest.raises(FileExistsError):
        fs.pipe_file("a", content, mode="create")
    (tmp_path / "local").write_bytes(content)
    with pytest.raises(FileExistsError):
        fs.put_file(tmp_path / "local", "a", mode="create")
    assert contents(fake, "a") == [b"theirs"]


def test_of_many_creators_one_wins(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    won: list[int] = []
    lost: list[int] = []

    def create(number: int) -> None:
        try:
            fs.pipe_file("a", bytes([number]), mode="create")
            won.append(number)
        except FileExistsError:
            lost.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    assert contents(fake, "a") == [bytes(won)]


def test_touch(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fs.touch("a")
    fs.pipe_file("a", b"content")
    fs.touch("a", truncate=False)
    assert contents(fake, "a") == [b"", b"content"]
    fs.touch("a")
    fs.touch("b", truncate=False)
    assert (contents(fake, "a")[-1], contents(fake, "b")) == (b"", [b""])


def test_a_transaction_stores_all_or_nothing_of_its_files(
    fake: FakeCluster, fs: IdunnoFileSystem, tmp_path: Path
) -> None:
    (tmp_path / "local").write_bytes(b"local")
    with fs.transaction:
        with fs.open("a", "wb") as file:
            file.write(LARGE)
        fs.pipe_file("b", b"b")
        fs.put_file(tmp_path / "local", "c")
        assert fake.world.files == {}
    assert sorted(fake.world.files) == ["a", "b", "c"]

    def fail_in_the_middle() -> None:
        with fs.transaction:
            with fs.open("a", "wb") as file:
                file.write(LARGE)
            fs.pipe_file("d", b"d")
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_the_middle()
    assert {name: len(stored) for name, stored in fake.world.files.items()} == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("name", ["a//b", "a/../b", "x" * 513, "a\nb", ".idunno/jobs/j/input"])
def test_what_cannot_name_a_file_is_refused_at_once(fake: FakeCluster, fs: IdunnoFileSystem, name: str) -> None:
    fake.world.put("good", b"")
    for write in (lambda: fs.open(name, "wb"), lambda: fs.pipe_file(name, b""), lambda: fs.cp_file("good", name)):
        with pytest.raises(OSError, match=r"file name|system's own"):
            write()
    assert list(fake.world.files) == ["good"]


def test_modes_that_cannot_be_are_refused(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fake.world.put("a", b"")
    for mode, version in (("r+b", None), ("wb", 1), ("ab", 1)):
        with pytest.raises(ValueError, match="modes are"):
            fs.open("a", mode, version=version)


def test_who_may_only_read_is_told(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fake.world.trouble = lambda node, method: PermissionDenied("bob is a reader") if "put" in method else None
    with pytest.raises(PermissionError, match="bob is a reader"):
        fs.pipe_file("a", b"")
    file = fs.open("a", "wb")
    with pytest.raises(PermissionError, match="bob is a reader"):
        file.close()


def test_an_upload_that_fails_says_so_where_it_is_written(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fake.world.trouble = lambda node, method: Exhausted("all disks are full") if method == "file.begin" else None
    file = fs.open("a", "wb")

    def write_much() -> None:
        for _ in range(10):
            file.write(LARGE[:BLOCK])

    with pytest.raises(OSError, match="all disks are full"):
        write_much()
    file.discard()
    file.close()
    assert fake.world.files == {}


def test_put_and_get_tell_how_far_they_are(fake: FakeCluster, fs: IdunnoFileSystem, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(LARGE)
    put, get = Callback(), Callback()
    fs.put_file(tmp_path / "local", "a", callback=put)
    fs.get_file("a", tmp_path / "sub" / "back", callback=get)
    for callback in (put, get):
        assert (callback.size, callback.value) == (len(LARGE), len(LARGE))
    assert (tmp_path / "sub" / "back").read_bytes() == LARGE
    assert os.listdir(tmp_path / "sub") == ["back"]
    with open(tmp_path / "file", "wb") as target:
        fs.get_file("a", target)
    assert (tmp_path / "file").read_bytes() == LARGE


def test_a_writer_waits_while_its_piece_before_is_not_taken() -> None:
    async def story() -> None:
        gate = asyncio.Event()
        taken: list[bytes] = []

        async def put(source: Source) -> PutAnswer:
            await gate.wait()
            while len(piece := await source(4)):
                taken.append(bytes(piece))
            return PutAnswer("a", 7, 0, 1, [], False, 1)

        writer = Writer(put)
        await writer.write(b"123456")
        second = asyncio.create_task(writer.write(b"789"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not second.done()
        gate.set()
        await second
        assert (await writer.finish()).version == 7
        assert taken == [b"1234", b"56", b"789"]

    asyncio.run(story())


def test_a_file_still_open_at_the_end_of_its_transaction_is_not_stored(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    def forget_to_close() -> None:
        with fs.transaction:
            file = fs.open("a", "wb")
            file.write(LARGE)  # its first blocks are sent, its end is still here

    with pytest.raises(ValueError, match="a: still open"):
        forget_to_close()
    assert fake.world.files == {}


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_text_and_compressed_files_that_are_dropped_store_nothing_either(
    fake: FakeCluster, fs: IdunnoFileSystem, name: str
) -> None:
    def write_and_forget(mode: str, content: bytes | str) -> None:
        fs.open(name, mode, compression="infer").write(content)
        gc.collect()

    for mode, content in (("w", "half a li"), ("wb", b"half")):
        with pytest.warns(ResourceWarning, match="dropped without close"):
            write_and_forget(mode, content)
    fs.pipe_file("b", b"")  # the loop has gone on
    assert list(fake.world.files) == ["b"]


def test_a_piece_whose_sending_was_interrupted_is_never_sent_twice(
    fake: FakeCluster, fs: IdunnoFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = fs.open("a", "wb")
    run = Connection.run

    def interrupted(self: Connection, path: str, work: Any, **options: Any) -> Any:
        run(self, path, work, **options)
        raise KeyboardInterrupt  # the piece was taken, but that is not known here

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            file.write(LARGE[:BLOCK])
    with pytest.raises(OSError, match="given up"):
        file.close()
    assert fake.world.files == {}
