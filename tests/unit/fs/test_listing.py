# Directories over flat names: what is listed, and with how few questions.
from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from idunno.fs import IdunnoFileSystem
from tests.unit.client.fake import FakeCluster

PAGE = 3  # rows in a page of the fake cluster


def fill(fake: FakeCluster, *names: str) -> None:
    for name in names:
        fake.world.put(name, name.encode())


def questions(fake: FakeCluster) -> list[tuple[str, str]]:
    """What was asked since the last look, as (method, after)."""
    found = [(method, getattr(request, "after", "")) for _, method, request in fake.world.requests]
    fake.world.requests.clear()
    return found


def test_a_directory_is_listed_as_files_and_directories(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fill(fake, "a", "dir.txt", "dir/x", "dir/sub/y", "dir/sub/z", "dir-2", ".idunno/jobs/j/input")
    assert fs.ls("", detail=False) == ["a", "dir", "dir-2", "dir.txt"]
    assert fs.ls("dir/", detail=False) == ["dir/sub", "dir/x"]
    assert fs.ls("idunno://dir/sub", detail=False) == ["dir/sub/y", "dir/sub/z"]
    assert fs.ls("dir/x", detail=False) == ["dir/x"]
    created = datetime(2026, 11, 20, 12, tzinfo=UTC)
    file = {"name": "dir/x", "size": 5, "type": "file", "version": 1}
    times = {"created": created.timestamp(), "mtime": created.timestamp()}
    assert fs.ls("dir") == [{"name": "dir/sub", "size": 0, "type": "directory"}, {**file, **times}]
    assert fs.info("dir/x") == fs.ls("dir/x")[0] == fs.find("dir", detail=True)["dir/x"]
    assert fs.created("dir/x") == fs.modified("dir/x") == created
    assert (fs.isdir("dir"), fs.isfile("dir"), fs.isdir("di"), fs.isfile("dir.txt")) == (True, False, False, True)


def test_an_empty_cluster_is_an_empty_directory(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    assert (fs.ls(""), fs.find(""), fs.glob("**"), fs.du(""), fs.isdir("")) == ([], [], [], 0, True)


def test_one_question_tells_what_a_name_is(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fill(fake, "a", "dir/x", "dir2-x", "dir2/x")
    for name, count in (("a", 1), ("dir", 1), ("gone", 1), ("dir2", 2)):
        fs.exists(name)
        assert len(questions(fake)) == count, name


def test_finding_asks_once_a_page_and_never_about_a_file(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    names = [f"data/{day}/{part}" for day in range(5) for part in range(4)]
    fill(fake, *names, "database")
    pages = -(-len(names) // PAGE)
    assert fs.find("data") == names
    assert [method for method, _ in questions(fake)] == ["file.ls"] * pages
    assert fs.du("data") == sum(len(name) for name in names)
    assert len(questions(fake)) == pages
    assert fs.glob("data/*/3") == names[3::4]
    assert len(questions(fake)) == pages
    assert next(iter(fs.walk("data"))) == ("data", [str(day) for day in range(5)], [])


def test_listing_skips_what_lies_deeper(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fill(fake, *(f"deep/{number:04}" for number in range(300)), "end")
    assert fs.ls("", detail=False) == ["deep", "end"]
    assert len(questions(fake)) == 2


def test_deleting_a_directory_takes_one_listing_and_deletes_its_files(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fill(fake, *(f"dir/{number}" for number in range(7)), "dir.txt", "other/x")
    with pytest.raises(IsADirectoryError):
        fs.rm("dir")
    fs.rm("dir", recursive=True)
    assert sorted(fake.world.files) == ["dir.txt", "other/x"]
    fill(fake, "log/1", "log/2", "log/keep")
    fs.rm("log/[0-9]")
    assert sorted(fake.world.files) == ["dir.txt", "log/keep", "other/x"]
    fs.rm(["log/keep", "other"], recursive=True)
    assert sorted(fake.world.files) == ["dir.txt"]


def test_a_file_and_a_directory_of_one_name(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fill(fake, "both", "both/x")
    assert fs.isfile("both")
    assert fs.ls("", detail=False) == ["both"]
    assert fs.find("") == ["both", "both/x"]
    fs.rm("both", recursive=True)
    assert fake.world.files == {}


def test_moving_copies_and_deletes(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fill(fake, "dir/a", "dir/sub/b")
    fs.mv("dir", "new", recursive=True)
    assert sorted(fake.world.files) == ["new/a", "new/sub/b"]
    fs.mv("new/a", "a")
    assert fs.cat_file("a") == b"dir/a"


def test_directories_that_are_made_are_not_stored(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fs.mkdir("dir")
    fs.makedirs("dir/sub", exist_ok=True)
    fs.rmdir("dir")
    assert not fs.exists("dir")
    fill(fake, "dir/a")
    with pytest.raises(FileExistsError):
        fs.mkdir("dir")
    with pytest.raises(FileExistsError):
        fs.makedirs("dir/a")
    with pytest.raises(OSError, match="has files"):
        fs.rmdir("dir")
    with pytest.raises(NotADirectoryError):
        fs.rmdir("dir/a")


def test_what_tells_versions_apart(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fill(fake, "a", "b")
    first = (fs.ukey("a"), fs.checksum("a"))
    assert first == (fs.ukey("a"), fs.checksum("a"))
    assert fs.ukey("a") != fs.ukey("b")
    fill(fake, "a")
    assert fs.ukey("a") != first[0]
    assert fs.checksum("a") != first[1]


PARTS = st.sampled_from(["a", "b", "a-", "a0", "\U0010ffff"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map("/".join), max_size=12, unique=True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=NAMES, path=st.sampled_from(["", "a", "a/b", "a/\U0010ffff"]), depth=st.sampled_from([None, 1, 2, 3]))
def test_any_listing_is_what_the_names_say(
    fake: FakeCluster, fs: IdunnoFileSystem, names: list[str], path: str, depth: int | None
) -> None:
    fake.world.files.clear()
    fill(fake, *names)
    prefix = f"{path}/" if path else ""
    files = {name for name in names if name.startswith(prefix)}
    directories = {
        prefix + "/".join(parts[:level])
        for parts in (name[len(prefix) :].split("/") for name in files)
        for level in range(1, len(parts))
    }
    expected = dict.fromkeys(directories, "directory") | dict.fromkeys(files, "file")
    shown = {name: kind for name, kind in expected.items() if depth is None or name[len(prefix) :].count("/") < depth}
    found = fs.find(path, maxdepth=depth, withdirs=True, detail=True)
    if not shown:
        assert set(found) == ({path} if path in names else set())
    else:
        found.pop(path, None)
        assert {name: entry["type"] for name, entry in found.items()} == shown
        assert list(found) == sorted(shown)
        assert fs.find(path, maxdepth=depth) == sorted(name for name, kind in shown.items() if kind == "file")
