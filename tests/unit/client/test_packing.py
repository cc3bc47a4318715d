# A job's input, whatever the user hands in, as one file of a kind.
from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from idunno.base.errors import InvalidArgument
from idunno.client.packing import kind_of_file, kind_of_name, kind_of_stored, pack_array, pack_folder, pack_paths


def test_the_suffix_says_the_kind() -> None:
    names = {"a.zip": "zip", "a.TAR": "tar", "a.tar.gz": "tar", "a.tgz": "tar", "x/a.npy": "npy", "a.jsonl": "jsonl"}
    names |= {"a.csv": "csv", "a.png": "image", "a.JPEG": "image", "a.webp": "image"}
    assert {name: kind_of_name(name) for name in names} == names
    assert kind_of_name("a.txt") is None
    with pytest.raises(InvalidArgument, match=r"its name must end in one of \.zip"):
        kind_of_stored("a.txt")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\x03\x04...", "zip"),
        (b"\x93NUMPY\x01", "npy"),
        (b"\xff\xd8\xff\xe0", "image"),
        (b"\0" * 257 + b"ustar", "tar"),
    ],
)
def test_without_a_suffix_the_first_bytes_say_it(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "input").write_bytes(content)
    assert kind_of_file(tmp_path / "input") == kind
    (tmp_path / "input").write_bytes(b"hello")
    with pytest.raises(InvalidArgument, match="is no input this version reads"):
        kind_of_file(tmp_path / "input")


def test_a_folder_becomes_the_same_archive_every_time_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.png", "a/y.png", ".DS_Store", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    with pack_folder(tmp_path) as first, pack_folder(tmp_path) as second:
        assert first.read() == second.read()
        first.seek(0)
        with zipfile.ZipFile(first) as archive:
            assert archive.namelist() == ["a/y.png", "a/z.png", "b.png"]
            assert archive.read("a/z.png") == b"a/z.png"
            assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match="holds no files"):
        pack_folder(tmp_path / "empty")


def test_a_list_of_paths_keeps_its_order_and_all_its_names(tmp_path: Path) -> None:
    for name in ("x/1.png", "y/1.png", "0.png", ".dot.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    paths = [tmp_path / name for name in ("y/1.png", "x/1.png", "0.png", ".dot.png")]
    with pack_paths(paths) as file, zipfile.ZipFile(file) as archive:
        assert archive.namelist() == ["1.png", "1-1.png", "0.png", "3-.dot.png"]
        assert archive.read("1-1.png") == b"x/1.png"
    with pytest.raises(InvalidArgument, match="is empty"):
        pack_paths([])
    with pytest.raises(FileNotFoundError):
        pack_paths([tmp_path / "gone"])


def test_an_array_becomes_npy_and_objects_are_refused() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    with pack_array(array) as file:
        assert (np.load(file, allow_pickle=False) == array).all()
    with pack_array([[1, 2], [3, 4]]) as file:
        assert np.load(file).shape == (2, 2)
    for bad in ([[1], [1, 2]], [object()], np.float64(3)):
        with pytest.raises(InvalidArgument, match="no array of numbers"):
            pack_array(bad)


def test_a_file_that_changes_while_it_is_packed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"old")
    copy = shutil.copyfileobj

    def copy_late(source: IO[bytes], target: IO[bytes], length: int) -> None:
        os.truncate(path, 1)
        copy(source, target, length)

    monkeypatch.setattr(shutil, "copyfileobj", copy_late)
    with pytest.raises(InvalidArgument, match=r"a.jpg changed while it was read \(3 bytes at first, 1 now\)"):
        pack_folder(tmp_path)
