# idunno/worker/data.py: a job's input as queries, read in the model's child process and never in the agent.
#
# Rule 1: an input is one file of one of KINDS; its queries are numbered in input order. A query's id is the member's name
#         in an archive, and the row number, from 0, in everything else.
# Rule 2: inputs are hostile until proved. Every length is bounded before anything is read, nothing is unpickled.
# Rule 3: what is wrong with the whole input is one InvalidArgument; what is wrong with one row is a Bad in its place.
# Rule 4: rows come one at a time: memory holds one member, not the archive.
from __future__ import annotations

import csv
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from gzip import BadGzipFile, GzipFile
from itertools import islice
from typing import IO, Any, Final, Protocol, TypeAlias, cast

import msgspec
import numpy as np
import numpy.typing as npt

from idunno.base.errors import InvalidArgument

MEMBERS_MAX: Final = 1_000_000
"""Of an archive: about 150 MB of index in the child."""
MEMBER_BYTES_MAX: Final = 64 * 1024 * 1024
"""Of one member after decompression, one .jsonl line and one .csv record; a 24 Mpx photo as PNG fits."""
EXPANSION_BYTES_MAX: Final = 1024**3
"""What decompression may add in one task. Pictures are compressed already and add nothing."""
TAR_GZ_BYTES_MAX: Final = 8 * 1024**3
"""A .tar.gz after decompression: it has no index and is read from its start."""
INDEX_BYTES_MAX: Final = 64 * 1024 * 1024
"""Of a zip's own index, read at once: MEMBERS_MAX members with names of 20 bytes."""
ROWS_MAX: Final = 1_000_000_000
INDEX_EVERY: Final = 1024
"""Every so many records of a text file its offset is kept: 8 MB for ROWS_MAX."""

Array: TypeAlias = npt.NDArray[Any]
QueryId: TypeAlias = str | int


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file's bytes, not yet decoded."""

    content: bytes


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that cannot be read, and why."""

    error: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some queries in order. `rows` is an array (first axis = queries), or yields one value (or Bad) an id, once."""

    ids: list[QueryId]
    rows: Array | Iterable[object]


class Budget:
    """What decompression may still add while one task is read."""

    def __init__(self, bytes_max: int = EXPANSION_BYTES_MAX) -> None:
        self._left, self._max = bytes_max, bytes_max

    def spend(self, size: int) -> None:
        """Raises InvalidArgument when the bound is passed."""
        self._left -= max(0, size)
        if self._left < 0:
            raise InvalidArgument(
                f"the archive expands by more than {self._max} bytes in one task: use a smaller batch, or store the "
                "members uncompressed"
            )


class Source(Protocol):
    """An open input."""

    def count(self) -> int:
        """How many queries it has. Raises InvalidArgument when it is not what its kind says."""
        ...

    def read(self, first: int, last: int, budget: Budget) -> Chunk:
        """Queries [first, last), within the count."""
        ...

    def close(self) -> None: ...


def open_source(path: str, kind: str) -> Source:
    """Raises InvalidArgument for an unknown kind and for a file that is not of its kind."""
    make = _MAKERS.get(kind)
    if make is None:
        raise InvalidArgument(f"unknown input kind {kind[:40]!r}: known are {', '.join(KINDS)}")
    try:
        return make(path)
    except FileNotFoundError as error:
        raise InvalidArgument(f"the input is gone from the worker's cache: {error.filename}") from error


def wanted(name: str) -> bool:
    """Whether an archive's member is a query: no dot-file, nothing in a dot-folder or in __MACOSX."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/") if part not in ("", "."))


def _clean(name: str) -> str:
    """A member's name as valid Unicode: archives may hold any bytes."""
    return name.encode("utf-8", "replace").decode()


class _Picture:
    """kind "image": one file, one query."""

    def __init__(self, path: str) -> None:
        self._path = path

    def count(self) -> int:
        return 1

    def read(self, first: int, last: int, budget: Budget) -> Chunk:
        with open(self._path, "rb") as file:
            content = file.read(MEMBER_BYTES_MAX + 1)
        if len(content) > MEMBER_BYTES_MAX:
            return Chunk([0], [Bad(f"has more than {MEMBER_BYTES_MAX} bytes")])
        return Chunk([0], [Picture(content)])

    def close(self) -> None:
        return


class _BoundedReader:
    """A file for zipfile and tarfile, which read headers and indexes whole, however long the archive says they are."""

    def __init__(self, file: IO[bytes] | GzipFile, what: str) -> None:
        self._file, self._what = file, what

    def read(self, size: int = -1) -> bytes:
        if size > INDEX_BYTES_MAX:
            raise InvalidArgument(f"the {self._what} has a header of {size} bytes: at most {INDEX_BYTES_MAX} are read")
        return self._file.read(INDEX_BYTES_MAX if size < 0 else size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset > TAR_GZ_BYTES_MAX and isinstance(self._file, GzipFile):
            raise InvalidArgument(f"the {self._what} expands to more than {TAR_GZ_BYTES_MAX} bytes: use a zip")
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        return


def _bounded(file: IO[bytes] | GzipFile, what: str) -> IO[bytes]:
    return cast(IO[bytes], _BoundedReader(file, what))


class _Zip:
    """kind "zip": members stored or deflated."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        try:
            self._zip = zipfile.ZipFile(_bounded(self._file, "zip archive"))
            if len(self._zip.infolist()) > MEMBERS_MAX:
                raise InvalidArgument(f"the zip archive has more than {MEMBERS_MAX} members: split it")
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
            self._file.close()
            if isinstance(error, InvalidArgument):
                raise
            raise InvalidArgument(f"the input is no zip archive, or it is cut off: {error}") from error
        self._members = [m for m in self._zip.infolist() if not m.is_dir() and wanted(m.filename)]

    def count(self) -> int:
        return len(self._members)

    def read(self, first: int, last: int, budget: Budget) -> Chunk:
        members = self._members[first:last]
        return Chunk([_clean(m.filename) for m in members], (self._one(m, budget) for m in members))

    def _one(self, member: zipfile.ZipInfo, budget: Budget) -> Picture | Bad:
        if member.flag_bits & 0x1:
            return Bad("is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return Bad("is compressed in a way that is not supported: use deflate or none")
        if member.file_size > MEMBER_BYTES_MAX:
            return Bad(f"has {member.file_size} bytes, more than {MEMBER_BYTES_MAX}")
        budget.spend(member.file_size - member.compress_size)
        try:
            with self._zip.open(member) as content:
                # Never more than the index says, whatever the compressed bytes would give.
                return Picture(content.read(member.file_size))
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError) as error:
            return Bad(f"cannot be read from the archive: {error}")

    def close(self) -> None:
        self._zip.close()
        self._file.close()


@dataclass(frozen=True, slots=True)
class _TarMember:
    name: str
    offset: int
    size: int


class _Tar:
    """kind "tar": plain or gzip. A .tar.gz is unpacked as it is read, again for each part that lies before the last."""

    def __init__(self, path: str) -> None:
        self._raw = open(path, "rb")  # noqa: SIM115 - closed by close()
        try:
            packed = self._raw.read(2) == b"\x1f\x8b"
            self._raw.seek(0)
            self._file: IO[bytes] | GzipFile = GzipFile(fileobj=self._raw) if packed else self._raw
            self._packed = packed
            self._members = self._index()
        except (tarfile.TarError, BadGzipFile, zlib.error, EOFError, OSError, ValueError, OverflowError) as error:
            self._raw.close()
            if isinstance(error, InvalidArgument):
                raise
            raise InvalidArgument(f"the input is no tar archive, or it is cut off: {error}") from error

    def _index(self) -> list[_TarMember]:
        members: list[_TarMember] = []
        with tarfile.open(fileobj=_bounded(self._file, "tar archive"), mode="r:") as archive:
            seen = 0
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined] # tarfile keeps them all: 1 GB for a million
                seen += 1
                if info.size < 0:
                    raise InvalidArgument("the tar archive has a member of negative size")
                if seen > MEMBERS_MAX:
                    raise InvalidArgument(f"the archive has more than {MEMBERS_MAX} members: split it")
                if info.isreg() and wanted(info.name):
                    # A sparse member's bytes do not stand one after another: it is reported as too large.
                    size = MEMBER_BYTES_MAX + 1 if info.issparse() else info.size
                    members.append(_TarMember(_clean(info.name), info.offset_data, size))
        return members

    def count(self) -> int:
        return len(self._members)

    def read(self, first: int, last: int, budget: Budget) -> Chunk:
        members = self._members[first:last]
        return Chunk([m.name for m in members], (self._one(m, budget) for m in members))

    def _one(self, member: _TarMember, budget: Budget) -> Picture | Bad:
        if member.size > MEMBER_BYTES_MAX:
            return Bad(f"has {member.size} bytes or is sparse: at most {MEMBER_BYTES_MAX} are read")
        if self._packed:
            budget.spend(member.size)
        try:
            self._file.seek(member.offset)
            content = self._file.read(member.size)
        except (BadGzipFile, zlib.error, EOFError, OSError) as error:
            return Bad(f"cannot be read from the archive: {error}")
        return Picture(content) if len(content) == member.size else Bad("is cut off")

    def close(self) -> None:
        self._file.close()
        self._raw.close()


class _Npy:
    """kind "npy": the first axis is the queries; memory mapped, so a task reads only its part."""

    def __init__(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                np.lib.format.read_magic(file)
            # Never pickled objects: loading those would run the sender's code.
            self._array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError, SyntaxError, TypeError, OverflowError, RecursionError) as error:
            raise InvalidArgument(f"the input is no .npy array that can be read: {error}") from error
        if self._array.ndim == 0:
            raise InvalidArgument("the .npy array has no axes: its first axis must be the queries")
        if self._array.dtype.kind not in "biufU":
            raise InvalidArgument(f"the .npy array is of {self._array.dtype}: only numbers and text are read")
        if len(self._array) > ROWS_MAX:
            raise InvalidArgument(f"the .npy array has {len(self._array)} rows: at most {ROWS_MAX} are read")

    def count(self) -> int:
        return len(self._array)

    def read(self, first: int, last: int, budget: Budget) -> Chunk:
        return Chunk(list(range(first, last)), np.asarray(self._array[first:last]))

    def close(self) -> None:
        del self._array


class _Records:
    """A text file of records, and where every INDEX_EVERY-th begins. The index grows as far as it was read."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._offsets: list[int] = [0]
        self._count: int | None = None

    def _parse(self, lines: Iterator[bytes]) -> Iterator[object]:
        raise NotImplementedError

    def _from(self, number: int) -> Iterator[object]:
        """Records from `number`, a multiple of INDEX_EVERY that the index has reached; extends the index."""
        at = self._offsets[number // INDEX_EVERY]
        self._file.seek(at)

        def lines() -> Iterator[bytes]:
            nonlocal at
            while line := self._file.readline(MEMBER_BYTES_MAX + 1):
                if len(line) > MEMBER_BYTES_MAX:
                    raise InvalidArgument(f"a line of the input has more than {MEMBER_BYTES_MAX} bytes")
                at += len(line)
                yield line

        for record in self._parse(lines()):
            number += 1
            if number > ROWS_MAX:
                raise InvalidArgument(f"the input has more than {ROWS_MAX} rows: split it")
            if number == len(self._offsets) * INDEX_EVERY:
                self._offsets.append(at)
            yield record
        self._count = number

    def count(self) -> int:
        if self._count is None:
            for _ in self._from((len(self._offsets) - 1) * INDEX_EVERY):
                pass
            assert self._count is not None
        return self._count

    def read(self, first: int, last: int, budget: Budget) -> Chunk:
        start = min(first // INDEX_EVERY, len(self._offsets) - 1) * INDEX_EVERY
        records = islice(self._from(start), first - start, last - start)
        return Chunk(list(range(first, last)), records)

    def close(self) -> None:
        self._file.close()


class _JsonLines(_Records):
    """kind "jsonl": one JSON value a line: a row, or an object of the model's inputs by name. Blank lines are skipped."""

    def _parse(self, lines: Iterator[bytes]) -> Iterator[object]:
        for line in lines:
            if line.strip():
                try:
                    yield msgspec.json.decode(line)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    yield Bad(f"is no JSON: {error}")


class _Csv(_Records):
    """kind "csv": a record a query, numbers or text. A first record that is not all numbers is the header."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        bom = 3 if self._file.read(3) == b"\xef\xbb\xbf" else 0
        self._file.seek(bom)
        read = bom

        def lines() -> Iterator[str]:
            nonlocal read
            while line := self._file.readline(MEMBER_BYTES_MAX + 1):
                read += len(line)
                yield line.decode("utf-8", "replace")

        try:
            fields = next(csv.reader(lines()), [])
        except csv.Error as error:
            self._file.close()
            raise InvalidArgument(f"the input is no CSV that can be read: {error}") from error
        self._header = fields if any(isinstance(_number(field), str) for field in fields) else None
        self._offsets = [bom if self._header is None else read]

    def _parse(self, lines: Iterator[bytes]) -> Iterator[object]:
        try:
            for fields in csv.reader(line.decode("utf-8", "replace") for line in lines):
                if not fields:
                    continue
                values = [_number(field) for field in fields]
                if self._header is None:
                    yield values
                elif len(values) == len(self._header):
                    yield dict(zip(self._header, values, strict=True))
                else:
                    yield Bad(f"has {len(values)} fields, the header has {len(self._header)}")
        except csv.Error as error:
            raise InvalidArgument(f"the input is no CSV that can be read: {error}") from error


def _number(text: str) -> int | float | str:
    """The number that `text` writes, else the text."""
    if "_" in text:  # Python alone takes 1_000 for a number
        return text
    for kind in (int, float) if len(text) <= 18 else (float,):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


_MAKERS: Final[dict[str, Callable[[str], Source]]] = {
    "image": _Picture,
    "zip": _Zip,
    "tar": _Tar,
    "npy": _Npy,
    "jsonl": _JsonLines,
    "csv": _Csv,
}
KINDS: Final = tuple(_MAKERS)
