# Moving: a copy and a delete, and nothing is deleted that was not copied.
from __future__ import annotations

import pytest

from idunno.base.errors import Unavailable
from idunno.fs import ConflictError, IdunnoFileSystem
from tests.unit.client.fake import FakeCluster


def names(fake: FakeCluster) -> list[str]:
    return sorted(fake.world.files)


def test_files_and_directories_are_moved(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    for name in ("a", "d/x", "d/e/y", "g1", "g2"):
        fake.world.put(name, name.encode())
    fs.mv("a", "b")
    fs.mv("d", "moved", recursive=True)
    fs.mv("g*", "all/")
    fs.mv(["b"], ["c"])
    assert names(fake) == ["all/g1", "all/g2", "c", "moved/e/y", "moved/x"]
    assert fs.cat_file("moved/e/y") == b"d/e/y"


@pytest.mark.parametrize("same", ["a", "/a", "idunno://a", "a/"])
def test_what_is_moved_onto_itself_stays(fake: FakeCluster, fs: IdunnoFileSystem, same: str) -> None:
    fake.world.put("a", b"the only copy")
    fs.mv("a", same)
    assert fs.cat_file(names(fake)[0]) == b"the only copy"


def test_a_directory_moved_below_itself_keeps_its_files(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    fake.world.put("d/x", b"x")
    fs.mv("d", "d/sub", recursive=True)
    assert names(fake) == ["d/sub/x"]
    fake.world.put("d/x", b"other")
    with pytest.raises(OSError, match="written over at once"):
        fs.mv("d", "d/sub", recursive=True)
    assert names(fake) == ["d/sub/x", "d/x"]


def test_only_what_was_copied_is_deleted(
    fake: FakeCluster, fs: IdunnoFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("d/x", "d/z", "d/e/y"):
        fake.world.put(name, b"old")
    fs.mv("d", "shallow", recursive=True, maxdepth=1)
    assert names(fake) == ["d/e/y", "shallow/x", "shallow/z"]

    copy = IdunnoFileSystem._copy

    def copy_slowly(self: IdunnoFileSystem, info: object, path: str) -> None:
        copy(self, info, path)  # type: ignore[arg-type]
        fake.world.put("d/e/late", b"late")

    monkeypatch.setattr(IdunnoFileSystem, "_copy", copy_slowly)
    fs.mv("d", "f", recursive=True)
    assert names(fake) == ["d/e/late", "f/e/y", "shallow/x", "shallow/z"]


def test_a_file_that_was_stored_anew_meanwhile_stays(
    fake: FakeCluster, fs: IdunnoFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.world.put("a", b"old")
    copy = IdunnoFileSystem._copy

    def copy_slowly(self: IdunnoFileSystem, info: object, path: str) -> None:
        copy(self, info, path)  # type: ignore[arg-type]
        fake.world.put("a", b"new")

    monkeypatch.setattr(IdunnoFileSystem, "_copy", copy_slowly)
    with pytest.raises(ConflictError, match="stored anew"):
        fs.mv("a", "b")
    assert (fs.cat_file("a"), fs.cat_file("b")) == (b"new", b"old")


def test_what_cannot_be_moved_stays(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    for name in ("d/x", "d/y"):
        fake.world.put(name, b"1")
    with pytest.raises(IsADirectoryError):
        fs.mv("d", "e")
    with pytest.raises(FileNotFoundError):
        fs.mv("nothing", "e")
    fake.world.trouble = lambda node, method: Unavailable("no leader") if "put" in method else None
    with pytest.raises(OSError, match="no leader"):
        fs.mv("d", "e", recursive=True)
    assert names(fake) == ["d/x", "d/y"]
