# Inputs of every kind, good and hostile.
from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idunno.base.errors import InvalidArgument
from idunno.worker import data
from idunno.worker.data import KINDS, Bad, Budget, Picture, open_source
from tests.unit.worker.helpers import npy, png, zipped


def read(path: Path, kind: str, content: bytes, first: int = 0, last: int | None = None) -> tuple[list[Any], list[Any]]:
    """(ids, rows) of [first, last) of `content`."""
    path.write_bytes(content)
    source = open_source(str(path), kind)
    try:
        chunk = source.read(first, source.count() if last is None else last, Budget())
        return chunk.ids, list(chunk.rows)
    finally:
        source.close()


def refused(path: Path, kind: str, content: bytes) -> str:
    with pytest.raises(InvalidArgument) as caught:
        read(path, kind, content)
    return str(caught.value)


def tarred(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


MEMBERS = {"b/2.png": b"two", "a/1.png": b"one", ".hidden": b"x", "a/.DS_Store": b"x", "__MACOSX/a.png": b"x"}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_gives_its_members_in_order_without_hidden_ones(tmp_path: Path, kind: str) -> None:
    content = zipped(MEMBERS) if kind == "zip" else tarred(MEMBERS)
    content = gzip.compress(content) if kind == "tar.gz" else content
    ids, rows = read(tmp_path / "input", kind[:3], content)
    assert ids == ["b/2.png", "a/1.png"]
    assert rows == [Picture(b"two"), Picture(b"one")]


def test_a_part_of_an_archive_can_be_read_again_and_backwards(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(gzip.compress(tarred({f"{i}.png": bytes([i]) * 600 for i in range(9)})))
    source = open_source(str(path), "tar")
    for first, last in ((6, 9), (0, 3), (3, 6), (0, 3)):
        rows = list(source.read(first, last, Budget()).rows)
        assert rows == [Picture(bytes([i]) * 600) for i in range(first, last)]
    source.close()


def test_an_image_is_one_query(tmp_path: Path) -> None:
    assert read(tmp_path / "input", "image", png()) == ([0], [Picture(png())])


def test_npy_rows_are_numbered_from_0(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int16).reshape(4, 3)
    ids, rows = read(tmp_path / "input", "npy", npy(array), 1, 3)
    assert ids == [1, 2]
    assert np.array_equal(rows, array[1:3])


def test_jsonl_reports_a_bad_line_in_its_place(tmp_path: Path) -> None:
    ids, rows = read(tmp_path / "input", "jsonl", b'[1, 2]\n\n{"x": 1}\n[1,\n"text"')
    assert ids == [0, 1, 2, 3]
    assert rows[:2] == [[1, 2], {"x": 1}]
    assert isinstance(rows[2], Bad)
    assert rows[3] == "text"


def test_csv_with_and_without_a_header(tmp_path: Path) -> None:
    assert read(tmp_path / "a", "csv", b"1,2.5\n3,4\n") == ([0, 1], [[1, 2.5], [3, 4]])
    with_header = b'\xef\xbb\xbfage,name\r\n7,"Ann\r\nLee"\r\n8\r\n9,x\r\n'
    ids, rows = read(tmp_path / "b", "csv", with_header)
    assert ids == [0, 1, 2]
    assert rows == [{"age": 7, "name": "Ann\r\nLee"}, Bad("has 1 fields, the header has 2"), {"age": 9, "name": "x"}]


@given(st.lists(st.sampled_from([b"[1]\n", b"\n", b'"x"\n']), max_size=40), st.integers(0, 40), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_any_part_of_a_text_file_is_that_part_of_the_whole(lines: list[bytes], first: int, every: int) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"idunno-data-{os.getpid()}.jsonl"
    old, data.INDEX_EVERY = data.INDEX_EVERY, every  # type: ignore[misc]
    try:
        _, whole = read(path, "jsonl", b"".join(lines))
        first = min(first, len(whole))
        source = open_source(str(path), "jsonl")
        assert list(source.read(first, len(whole), Budget()).rows) == whole[first:]
        assert source.count() == len(whole)
        assert list(source.read(0, first, Budget()).rows) == whole[:first]
        source.close()
    finally:
        data.INDEX_EVERY = old  # type: ignore[misc]
        path.unlink()


# -- hostile ----------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(KINDS),
    st.binary(max_size=300),
    st.sampled_from([b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"\x1f\x8b\x08"]),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(kind: str, content: bytes, magic: bytes) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"idunno-data-{os.getpid()}"
    try:
        ids, rows = read(path, kind, magic + content)
        assert len(rows) == len(ids)
    except InvalidArgument as error:
        assert str(error)  # noqa: PT017 - either outcome is right, an empty message is not
    finally:
        path.unlink()


def test_a_truncated_archive_is_refused_in_one_line(tmp_path: Path) -> None:
    for kind, whole in (
        ("zip", zipped({"a.png": b"x" * 5000})),
        ("tar", gzip.compress(tarred({"a.png": os.urandom(5000)}))),
    ):
        message = refused(tmp_path / "input", kind, whole[: len(whole) // 2])
        assert "cut off" in message
        assert "\n" not in message


def test_a_pickled_array_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    assert "Python objects" in refused(tmp_path / "input", "npy", npy(np.array([Evil()], dtype=object)))
    assert not (tmp_path / "owned").exists()


def test_a_zip_bomb_is_a_bad_row_or_the_end_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = b"\0" * 3_000_000
    bomb = zipped({f"{i}.png": large for i in range(5)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 20_000
    monkeypatch.setattr(data, "MEMBER_BYTES_MAX", 2_000_000)
    _, rows = read(tmp_path / "input", "zip", bomb)
    assert rows == [Bad("has 3000000 bytes, more than 2000000")] * 5

    monkeypatch.setattr(data, "MEMBER_BYTES_MAX", 64_000_000)
    source = open_source(str(tmp_path / "input"), "zip")
    with pytest.raises(InvalidArgument, match="expands by more than 10000000 bytes"):
        list(source.read(0, 5, Budget(10_000_000)).rows)
    source.close()


def test_a_member_that_is_longer_than_it_says_is_cut_to_what_it_says(tmp_path: Path) -> None:
    whole = bytearray(zipped({"a.png": b"\0" * 1_000_000}, zipfile.ZIP_DEFLATED))
    directory = whole.rindex(b"PK\1\2")
    struct.pack_into("<L", whole, directory + 24, 10)  # its uncompressed size, in the index
    _, rows = read(tmp_path / "input", "zip", bytes(whole))
    assert isinstance(rows[0], Bad) or rows[0] == Picture(b"\0" * 10)


def test_an_index_of_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "INDEX_BYTES_MAX", 70_000)
    many = zipped({f"{i:060}": b"" for i in range(1_000)})
    assert "at most 70000 are read" in refused(tmp_path / "input", "zip", many)
    monkeypatch.setattr(data, "INDEX_BYTES_MAX", 64_000_000)
    monkeypatch.setattr(data, "MEMBERS_MAX", 999)
    assert "more than 999 members" in refused(tmp_path / "input", "zip", many)
    assert "more than 999 members" in refused(tmp_path / "input", "tar", tarred({f"{i}": b"" for i in range(1_000)}))


def test_a_gzip_bomb_ends_at_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "TAR_GZ_BYTES_MAX", 1_000_000)
    bomb = gzip.compress(tarred({"a.png": b"\0" * 2_000_000, "b.png": b"x"}))
    assert "expands to more than 1000000 bytes" in refused(tmp_path / "input", "tar", bomb)


def test_an_array_without_rows_and_one_of_records_are_refused(tmp_path: Path) -> None:
    assert "first axis" in refused(tmp_path / "input", "npy", npy(np.array(1.0)))
    assert "only numbers and text" in refused(tmp_path / "input", "npy", npy(np.zeros(3, dtype=[("a", "f4")])))


def test_an_unknown_kind_names_the_known_ones(tmp_path: Path) -> None:
    assert "image, zip, tar, npy, jsonl, csv" in refused(tmp_path / "input", "parquet", b"")
