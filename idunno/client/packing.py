# idunno/client/packing.py: what a user hands in as a job's input, as one file of a kind that workers can read.
#
# Rule 1: a kind is decided by the suffix, and by the first bytes where there is no known suffix.
# Rule 2: packing is streamed through a temporary file: memory does not grow with the input.
# Rule 3: the same folder gives the same bytes (sorted, stored, no times), so that its blocks are stored once.
from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final

from idunno.base.errors import InvalidArgument
from idunno.client.local import unchanged_check

KINDS: Final = ("zip", "tar", "npy", "jsonl", "csv", "image")

_SUFFIXES: Final = {
    ".zip": "zip",
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".npy": "npy",
    ".jsonl": "jsonl",
    ".csv": "csv",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"), "image"),
}
_MAGIC: Final = (
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),  # an empty one
    (b"\x93NUMPY", "npy"),
    (b"\x89PNG\r\n\x1a\n", "image"),
    (b"\xff\xd8\xff", "image"),
)
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the first date a zip can hold: equal content, equal archive
_COPY_BYTES: Final = 256 * 1024


def kind_of_name(name: str) -> str | None:
    """The kind that a file's name says, None when it says nothing."""
    lower = name.lower()
    return next((kind for suffix, kind in _SUFFIXES.items() if lower.endswith(suffix)), None)


def kind_of_file(path: Path) -> str:
    """The kind of a local file. Raises InvalidArgument, OSError."""
    kind = kind_of_name(path.name)
    if kind is None:
        with open(path, "rb") as file:
            first = file.read(512)
        kind = next((known for magic, known in _MAGIC if first.startswith(magic)), None)
        if first[257:262] == b"ustar":
            kind = "tar"
    if kind is None:
        raise InvalidArgument(f"{path} is no input this version reads: use {_known()}, or a folder of such images")
    return kind


def kind_of_stored(name: str) -> str:
    """The kind of a file in SDFS, by its name alone. Raises InvalidArgument."""
    kind = kind_of_name(name)
    if kind is None:
        raise InvalidArgument(f"sdfs:{name} does not say what it holds: its name must end in one of {_known()}")
    return kind


def _known() -> str:
    return ", ".join(_SUFFIXES)


def pack_folder(folder: Path) -> IO[bytes]:
    """A zip of all files below `folder`, hidden ones left out, as an open temporary file at its beginning.

    Names are the paths relative to `folder`, in sorted order: that is the order of the queries.
    Raises InvalidArgument when there is no file, OSError.
    """
    members = []
    for root, directories, names in os.walk(folder, onerror=_raise):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                members.append((path.relative_to(folder).as_posix(), path))
    if not members:
        raise InvalidArgument(f"{folder} holds no files: give a folder of images")
    return _zip(sorted(members))


def pack_paths(paths: Sequence[str | os.PathLike[str]]) -> IO[bytes]:
    """A zip of these files in the given order, under their names (with a number in front where two are equal)."""
    if not paths:
        raise InvalidArgument("the list of paths is empty: give at least one image")
    members: list[tuple[str, Path]] = []
    seen: set[str] = set()
    for place, given in enumerate(paths):
        path = Path(given)
        name = path.name
        if name in seen or name.startswith(".") or name == "__MACOSX":  # workers skip the latter two in archives
            name = f"{place}-{name}"
        seen.add(name)
        members.append((name, path))
    return _zip(members)


def pack_array(array: Any) -> IO[bytes]:
    """A numpy array (or nested lists of numbers) as .npy; its first axis counts the queries. Raises InvalidArgument."""
    import numpy  # only who has arrays has it loaded anyway

    try:
        rows = numpy.asarray(array)
        if rows.dtype.hasobject or rows.ndim == 0:
            raise ValueError(f"dtype {rows.dtype} with {rows.ndim} axes")
    except ValueError as error:
        raise InvalidArgument(f"this is no array of numbers with one row a query: {error}") from None
    file = tempfile.TemporaryFile()  # noqa: SIM115 - handed to the caller
    try:
        numpy.save(file, rows, allow_pickle=False)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def is_array(value: Any) -> bool:
    return hasattr(value, "__array_interface__") or hasattr(value, "__array__")


def _zip(members: Sequence[tuple[str, Path]]) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - handed to the caller
    try:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, path in members:
                try:
                    name.encode()
                except UnicodeEncodeError:
                    raise InvalidArgument(f"{name!r} is not valid Unicode: rename the file") from None
                entry = zipfile.ZipInfo(name, _EPOCH)
                entry.external_attr = 0o644 << 16
                with open(path, "rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                    check = unchanged_check(source)
                    shutil.copyfileobj(source, target, _COPY_BYTES)
                    check()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _raise(error: OSError) -> None:
    raise error
