# Files from and to the user's machine.
from __future__ import annotations

import asyncio
import errno
import io
import os
import stat
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from idunno.base.errors import Conflict, Corrupt, DeadlineExceeded, InvalidArgument, NotFound, Unavailable
from idunno.client import local
from idunno.client.api import Cluster
from idunno.client.local import check_place, replacing
from idunno.client.transfer import source_of
from idunno.sdfs.messages import ListRow
from tests.unit.client.fake import FakeCluster


def play(fake: FakeCluster, body: Callable[[Cluster], Awaitable[None]], *, timeout_s: float | None = None) -> None:
    async def story() -> None:
        async with await fake.connect(timeout_s) as cluster:
            await body(cluster)

    asyncio.run(story())


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 9 * 1024 * 1024])
def test_what_was_put_is_what_is_got(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    heard: list[tuple[int, int]] = []

    async def body(cluster: Cluster) -> None:
        answer = await cluster.put(tmp_path / "a", "a", progress=lambda done, total: heard.append((done, total)))
        assert (answer.version, answer.size) == (1, size)
        info = await cluster.get("a", tmp_path / "b")
        assert info.size == size

    play(FakeCluster(), body)
    assert (tmp_path / "b").read_bytes() == content
    assert not heard or heard[-1] == (size, size)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_pipe_is_stored_as_it_comes() -> None:
    read, write = os.pipe()
    content = os.urandom(50_000)
    os.write(write, content)
    os.close(write)
    fake = FakeCluster()

    with open(read, "rb", buffering=0) as pipe:
        play(fake, lambda cluster: _discard(cluster.put(pipe, "piped")))
    assert fake.world.newest("piped").content == content


def _cut(path: Path) -> None:
    os.truncate(path, 100)


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"new")
    os.utime(path, ns=(0, 0))  # another time than before, however coarse the clock


@pytest.mark.parametrize("change", [_cut, _append, _rewrite])
def test_a_file_that_changes_while_it_is_put_is_refused_not_stored_as_a_mix(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    size = 40 * 1024 * 1024  # five blocks: the fourth is read when one is stored
    path = tmp_path / "a"
    path.write_bytes(os.urandom(size))
    fake = FakeCluster()
    changed: list[bool] = []

    def after(method: str) -> None:
        if method == "block.write" and not changed:
            changed.append(True)
            change(path)

    fake.world.after = after

    async def body(cluster: Cluster) -> None:
        with pytest.raises(
            InvalidArgument, match=rf"{path} changed while it was read \({size:,} bytes at first"
        ) as told:
            await cluster.put(path, "a")
        assert not told.value.may_have_happened

    play(fake, body)
    assert "a" not in fake.world.files
    assert fake.world.asked("file.abort")


def test_a_small_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    fake = FakeCluster()

    async def body(cluster: Cluster) -> None:
        source, _ = source_of(file)
        _append(path)
        with pytest.raises(InvalidArgument, match="changed while it was read"):
            await cluster.file_client.put(source, "a")

    with open(path, "rb") as file:
        play(fake, body)
    assert "a" not in fake.world.files


def test_a_file_that_is_replaced_while_it_is_put_is_stored_as_it_was(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "other"
    path.write_bytes(b"old")
    other.write_bytes(b"new one")
    fake = FakeCluster()
    with open(path, "rb") as file:
        os.replace(other, path)
        play(fake, lambda cluster: _discard(cluster.put(file, "a")))
    assert fake.world.newest("a").content == b"old"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="only where there is /proc")
def test_a_file_of_the_system_that_does_not_say_its_size_is_stored() -> None:
    fake = FakeCluster()
    play(fake, lambda cluster: _discard(cluster.put("/proc/cpuinfo", "cpuinfo")))
    assert fake.world.newest("cpuinfo").content


def test_a_file_that_is_being_written_never_shows_half(tmp_path: Path) -> None:
    fake = FakeCluster()
    fake.world.put("big", bytes(100_000))
    target = tmp_path / "target"
    target.write_bytes(b"before")
    fake.world.trouble = lambda node, method: InvalidArgument("no") if method == "block.read" else None

    async def body(cluster: Cluster) -> None:
        with pytest.raises(InvalidArgument):
            await cluster.get("big", target)

    play(fake, body)
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_fetched_file_keeps_the_mode_and_the_link_of_the_one_it_replaces(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    with replacing(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with replacing(fifo) as file:
            file.write(b"through")
        assert os.read(reader, 100) == b"through"
        assert stat.S_ISFIFO(fifo.stat().st_mode)
    finally:
        os.close(reader)


def test_getting_into_a_directory_keeps_the_name(tmp_path: Path) -> None:
    fake = FakeCluster()
    fake.world.put("photos/1.jpg", b"jpg")
    play(fake, lambda cluster: _discard(cluster.get("photos/1.jpg", tmp_path)))
    assert (tmp_path / "1.jpg").read_bytes() == b"jpg"


async def _discard(work: Awaitable[object]) -> None:
    await work


def test_a_folder_goes_there_and_comes_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = {"a.txt": b"a", "deep/er/b.bin": os.urandom(2_000_000), "deep/c": b"", ".hidden": b"h"}
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    fake = FakeCluster()

    async def body(cluster: Cluster) -> None:
        put = await cluster.put_folder(source, "backup/")
        assert [file.name for file in put.files] == sorted(f"backup/{name}" for name in files)
        assert put.size == sum(map(len, files.values()))
        got = await cluster.get_folder("backup/", tmp_path / "target")
        assert (len(got.files), got.size) == (4, put.size)

    play(fake, body)
    for name, content in files.items():
        assert (tmp_path / "target" / name).read_bytes() == content


def test_the_first_error_of_a_folder_is_the_one_that_is_raised(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"{i:03}").write_bytes(b"x")
    fake = FakeCluster()
    served = 0

    def trouble(node: str, method: str) -> Conflict | None:
        nonlocal served
        served += 1
        return Conflict("the name is taken") if served > 5 else None

    fake.world.trouble = trouble

    async def body(cluster: Cluster) -> None:
        with pytest.raises(Conflict, match="the name is taken"):
            await cluster.put_folder(tmp_path, "x")

    play(fake, body)
    assert len(fake.world.requests) < 200


def test_a_folder_with_something_that_is_no_file_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "broken").symlink_to("nowhere")
    fake = FakeCluster()

    async def body(cluster: Cluster) -> None:
        with pytest.raises(InvalidArgument, match="broken is no regular file"):
            await cluster.put_folder(tmp_path, "x")
        with pytest.raises(InvalidArgument, match="is a folder"):
            await cluster.put(tmp_path, "x")
        with pytest.raises(NotFound, match="no file below nothing/"):
            await cluster.get_folder("nothing/", tmp_path)
        with pytest.raises(InvalidArgument, match="end it with '/'"):
            await cluster.get_folder("nothing", tmp_path)

    play(fake, body)
    assert fake.world.asked("file.put-small") == []


def test_the_last_versions_stand_in_one_file_newest_first_each_behind_a_line(tmp_path: Path) -> None:
    fake = FakeCluster()
    for content in (b"first\n", b"no newline", b"", b"fourth\n"):
        fake.world.put("notes.txt", content)
    target = io.BytesIO()

    async def body(cluster: Cluster) -> None:
        assert [info.version for info in await cluster.get_versions("notes.txt", 3, target)] == [4, 3, 2]
        assert len(await cluster.get_versions("notes.txt", 99, tmp_path / "all")) == 4

    play(fake, body)
    assert target.getvalue() == (
        b"=== notes.txt version 4 ===\nfourth\n=== notes.txt version 3 ===\n=== notes.txt version 2 ===\nno newline"
    )
    assert (tmp_path / "all").read_bytes() == target.getvalue() + b"\n=== notes.txt version 1 ===\nfirst\n"


def test_listing_follows_all_pages() -> None:
    fake = FakeCluster()
    for i in range(10):
        fake.world.put(f"f{i}", b"x")
    fake.world.put(".idunno/jobs/1/input", b"x")

    async def body(cluster: Cluster) -> None:
        assert [row.name for row in await cluster.ls("f")] == [f"f{i}" for i in range(10)]
        assert len(await cluster.ls()) == 10
        assert len(await cluster.ls(system=True)) == 11

    play(fake, body)


def test_a_transfer_ends_with_the_time_it_was_given(tmp_path: Path) -> None:
    fake = FakeCluster()
    fake.world.trouble = lambda node, method: Unavailable("nobody is there")

    async def body(cluster: Cluster) -> None:
        with pytest.raises(Unavailable, match="nobody is there"):
            await cluster.get("a", tmp_path / "a")

    play(fake, body, timeout_s=0.3)
    assert list(tmp_path.iterdir()) == []


def test_a_listing_that_names_what_was_not_asked_for_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        fake = FakeCluster()
        outside = tmp_path / "outside"
        async with await fake.connect() as cluster:
            prefix = "ab/"

            async def lies(*_: object, **__: object) -> list[ListRow]:
                return [ListRow(f"xyz{outside}", 1, 3, "")]

            fake.world.put(f"xyz{outside}", b"bad")
            monkeypatch.setattr(cluster.file_client, "ls", lies)
            with pytest.raises(Corrupt, match="xyz"):
                await cluster.get_folder(prefix, tmp_path / "here")
        assert not outside.exists()

    asyncio.run(story())


def test_a_target_that_cannot_be_is_named_as_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "none" / "a"):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "a")


def test_a_full_device_is_named(tmp_path: Path) -> None:
    async def story() -> None:
        fake = FakeCluster()
        fake.world.put("a", b"content")
        async with await fake.connect() as cluster:
            with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
                await cluster.get("a", "/dev/full")

    asyncio.run(story())


def test_a_pipe_is_written_to_by_the_only_name_it_has(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as reader, open(writing, "wb") as writer, replacing(Path(f"/dev/fd/{writing}")) as file:
        file.write(b"through")
        file.flush()
        writer.close()
        assert reader.read(7) == b"through"


def test_a_place_for_later_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    check_place(tmp_path / "old")
    check_place(tmp_path / "new")
    check_place(Path("/dev/null"))
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"
    for wrong in (tmp_path, tmp_path / "gone" / "x", tmp_path / "old" / "x"):
        with pytest.raises(OSError, match=str(wrong)):
            check_place(wrong)


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="only Linux knows files without a name")
def test_what_is_killed_while_it_fetches_leaves_nothing_behind(tmp_path: Path) -> None:
    """Here the kill is a look from outside, while the file is being written: there is no name that could stay."""
    (tmp_path / "old").write_bytes(b"old")
    for name, before in (("old", ["old"]), ("new", ["old"])):
        with replacing(tmp_path / name) as file:
            file.write(b"fetched")
            file.flush()
            assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert (tmp_path / name).read_bytes() == b"fetched"


def test_what_was_fetched_is_not_lost_where_a_descriptor_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", forbidden)
    (tmp_path / "a").touch(mode=0o640)
    with replacing(tmp_path / "a") as file:
        file.write(b"fetched")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"fetched"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_where_files_need_names_they_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_nameless", lambda directory: None)
    with replacing(tmp_path / "a") as file:
        file.write(b"fetched")
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("before", [b"", b"x" * (9 << 20)])
def test_a_put_whose_content_stands_still_ends_with_its_time(before: bytes) -> None:
    reading, writing = os.pipe()
    feeding = threading.Thread(target=os.write, args=(writing, before))

    source = open(reading, "rb", buffering=0)  # noqa: SIM115 - open until the thread that reads it has its end

    async def body(cluster: Cluster) -> None:
        feeding.start()
        with pytest.raises(DeadlineExceeded, match="has not come"):
            await cluster.put(source, "a")

    began_s = time.monotonic()
    play(FakeCluster(), body, timeout_s=1.0)
    assert time.monotonic() - began_s < 10
    feeding.join()
    os.close(writing)


def test_a_name_that_is_a_file_and_a_folder_is_told_before_anything_is_written(tmp_path: Path) -> None:
    fake = FakeCluster()
    fake.world.put("p/a", b"x")
    fake.world.put("p/a.txt", b"x")
    fake.world.put("p/a/b/c", b"x")

    async def body(cluster: Cluster) -> None:
        with pytest.raises(InvalidArgument, match="p/a is a file, and p/a/b/c is below it"):
            await cluster.get_folder("p/", tmp_path / "o")
        assert (await cluster.get_folder("p/a/", tmp_path / "o")).size == 1

    play(fake, body)
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_what_cannot_take_its_place_is_named_as_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught, replacing(tmp_path / "a"):
        (tmp_path / "a" / "b").mkdir(parents=True)  # meanwhile
    assert caught.value.filename == str(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
