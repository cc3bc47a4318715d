# idunno/fs/filesystem.py: `idunno://`: the file store for whatever speaks fsspec (pandas, numpy, pyarrow, dask).
#
# Rule 1: an instance holds only its arguments: it is cached and pickled by them, and safe in threads and after a fork.
# Rule 2: nothing is cached: every answer is what the cluster says now. Only an open file stays at its version.
# Rule 3: that something is not there is said only when the cluster has said so, never because it did not answer.
from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from fsspec.callbacks import DEFAULT_CALLBACK, Callback
from fsspec.compression import compr
from fsspec.core import get_compression
from fsspec.spec import AbstractFileSystem
from fsspec.utils import isfilelike

from idunno.base.disk import Buffer
from idunno.base.errors import IdunnoError, NotFound
from idunno.base.ids import check_file_name
from idunno.client.base import QUESTION_S, TRANSFER_S
from idunno.client.transfer import Progress, several
from idunno.fs.connection import Connection, connection
from idunno.fs.errors import ConflictError, os_error
from idunno.fs.files import CompressedFile, ReadFile, TextFile, WriteFile
from idunno.fs.listing import Info, below, directory_entry, file_entry, hidden, look
from idunno.fs.streams import Reader
from idunno.sdfs.client import FileClient, source_of
from idunno.sdfs.messages import FileInfo

T = TypeVar("T")


class IdunnoFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The files of a cluster. See docs/fs.md.

    `where`: the cluster, as the commands take it (docs/commands.md); by default $IDUNNO_CLUSTER, then the local one.
    `timeout_s`: for every call; by default 30 s for a question and an hour for a file's content.
    """

    protocol = "idunno"
    root_marker = ""

    def __init__(self, where: str | None = None, timeout_s: float | None = None, **storage_options: Any) -> None:
        super().__init__(where=where, timeout_s=timeout_s, **storage_options)
        self.where = os.fspath(where) if where is not None else None
        self.timeout_s = timeout_s
        self.question_s = timeout_s if timeout_s is not None else QUESTION_S
        self.transfer_s = timeout_s if timeout_s is not None else TRANSFER_S

    def connection(self) -> Connection:
        """Raises OSError when the cluster cannot be reached."""
        return connection(self.where, self.timeout_s)

    @property
    def fsid(self) -> str:
        found = self.connection()
        return f"idunno_{found.run('', found.cluster.status()).cluster}"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        stripped = super()._strip_protocol(path)
        return stripped.lstrip("/") if isinstance(stripped, str) else stripped  # a list went through here name by name

    # -- looking ------------------------------------------------------------------------------------------------------

    def info(self, path: str, version: int | None = None, **_: Any) -> Info:
        """Of the current version, or of that one. Raises FileNotFoundError."""
        path = self._strip_protocol(path)
        if version is not None:
            return file_entry(path, self._stat(path, version))
        found = self._ask(path, partial(look, path=path, timeout_s=self.question_s))
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no file and no directory of that name in the cluster", path)
        return found

    def exists(self, path: str, **options: Any) -> bool:
        return self._type(path, **options) is not None

    def isfile(self, path: str) -> bool:
        return self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        return self._type(path) == "directory"

    def _type(self, path: str, **options: Any) -> str | None:
        try:
            return str(self.info(path, **options)["type"])
        except FileNotFoundError:
            return None

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        entries = self._below(path, 1)
        if not entries and path:
            entries = {path: self.info(path)}
        return list(entries.values()) if detail else list(entries)

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **_: Any
    ) -> Any:
        """Names of all files below, sorted; with `detail` a dict of name and entry."""
        if maxdepth is not None and maxdepth < 1:
            raise ValueError("maxdepth must be at least 1")
        path = self._strip_protocol(path)
        entries = self._below(path, maxdepth)
        if entries and path and withdirs:
            entries = {path: directory_entry(path), **entries}
        elif not entries and self.isfile(path):
            entries = {path: self.info(path)}
        if not withdirs:
            entries = {name: entry for name, entry in entries.items() if entry["type"] == "file"}
        return entries if detail else list(entries)

    def du(
        self, path: str, total: bool = True, maxdepth: int | None = None, withdirs: bool = False, **_: Any
    ) -> int | dict[str, int]:
        """Bytes of the current versions, one copy each."""
        found: dict[str, Info] = self.find(path, maxdepth=maxdepth, withdirs=withdirs, detail=True)
        sizes = {name: int(entry["size"]) for name, entry in found.items()}
        return sum(sizes.values()) if total else sizes

    def versions(self, path: str) -> list[Info]:
        """Every version of a file, newest first, at most the last 1,000. Raises FileNotFoundError."""
        path = self._visible(path)
        rows = self._ask(path, lambda files: files.versions(path, timeout_s=self.question_s))
        return [file_entry(path, row) for row in rows]

    def created(self, path: str) -> datetime:
        """When the current version was stored; a version never changes."""
        return datetime.fromtimestamp(self._file(path)["created"], UTC)

    modified = created

    def ukey(self, path: str) -> str:
        entry = self._file(path)
        return hashlib.sha256(f"{entry['name']}\n{entry['version']}\n{entry['created']}".encode()).hexdigest()

    def checksum(self, path: str) -> int:
        """Names the version: equal while nothing new was stored."""
        return int(self.ukey(path), 16)

    # -- reading ------------------------------------------------------------------------------------------------------

    def open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        cache_options: dict[str, Any] | None = None,
        compression: str | None = None,
        **options: Any,
    ) -> Any:
        """As fsspec's; `version=N` opens an old version for reading."""
        text = {key: options.pop(key) for key in ("encoding", "errors", "newline") if key in options}
        binary = mode if "b" in mode else mode.replace("t", "") + "b"
        file = super().open(path, binary, block_size=block_size, cache_options=cache_options, **options)
        if (kind := get_compression(path, compression)) is not None:
            packed = compr[kind](file, mode=binary[0])
            file = CompressedFile(packed, file) if isinstance(file, WriteFile) else packed
        return file if "b" in mode else TextFile(file, **text)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        *,
        cache_type: str = "none",
        version: int | None = None,
        **_: Any,
    ) -> ReadFile | WriteFile:
        if mode == "rb":
            info = self._stat(path, version)
            return ReadFile(self, info, block_size=block_size, cache_type=cache_type, cache_options=cache_options)
        if mode not in ("wb", "ab", "xb") or version is not None:
            raise ValueError(f"{path}: modes are rb (any version), wb, ab and xb (the next version), not {mode}")
        self._new_name(path)
        before: FileInfo | None = None
        if mode == "ab":
            try:
                before = self._stat(path)
            except FileNotFoundError:
                before = None
        elif mode == "xb" and self.isfile(path):
            raise FileExistsError(errno.EEXIST, "there is such a file already", path)
        if_version = None if mode == "wb" else before.version if before is not None else 0
        return WriteFile(
            self, path, mode, if_version=if_version, before=before, block_size=block_size, autocommit=autocommit
        )

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, version: int | None = None, **_: Any
    ) -> bytes:
        """Bytes [start, end) of a file, counted from its end when negative."""
        path = self._strip_protocol(path)
        info = self._stat(path, version)
        first, last, _step = slice(start, end).indices(info.size)
        if first >= last:
            return b""
        found = self._ask(path, lambda files: files.read(info, first, last - first, timeout_s=self.transfer_s))
        return bytes(found)

    def get_file(
        self,
        rpath: str,
        lpath: str | os.PathLike[str] | IO[bytes] | None = None,
        callback: Callback = DEFAULT_CALLBACK,
        outfile: IO[bytes] | None = None,
        version: int | None = None,
        **_: Any,
    ) -> None:
        """A local file appears whole or not at all."""
        rpath = self._visible(rpath)
        if outfile is not None or isfilelike(lpath):
            super().get_file(rpath, lpath, callback=callback, outfile=outfile, version=version)
            return
        assert isinstance(lpath, (str, os.PathLike)), "neither a path nor a file to write to"
        target = Path(lpath)
        target.parent.mkdir(parents=True, exist_ok=True)
        found = self.connection()
        try:
            found.run(rpath, found.cluster.get(rpath, target, version=version, progress=_progress(callback)))
        except FileNotFoundError:
            if version is not None or not self.isdir(rpath):
                raise
            target.mkdir(exist_ok=True)  # its files come by themselves

    # -- writing ------------------------------------------------------------------------------------------------------

    def pipe_file(self, path: str, value: Buffer, mode: str = "overwrite", **_: Any) -> None:
        """mode "create": raises FileExistsError when there is such a file, also when another writer was faster."""
        path = self._new_name(path)
        create = mode == "create"
        if self._intrans:
            with self.open(path, "xb" if create else "wb") as file:
                file.write(value)
            return
        view = memoryview(value).cast("B")
        self._ask(
            path,
            lambda files: files.put(
                source_of(view), path, size=len(view), if_version=0 if create else None, timeout_s=self.transfer_s
            ),
            create=create,
        )

    def put_file(
        self,
        lpath: str | os.PathLike[str],
        rpath: str,
        callback: Callback = DEFAULT_CALLBACK,
        mode: str = "overwrite",
        **options: Any,
    ) -> None:
        if os.path.isdir(lpath):
            return  # a directory comes with its files
        rpath = self._new_name(rpath)
        create = mode == "create"
        if self._intrans:
            super().put_file(lpath, rpath, callback=callback, mode=mode, **options)
            return
        found = self.connection()
        put = found.cluster.put(lpath, rpath, if_version=0 if create else None, progress=_progress(callback))
        found.run(rpath, put, create=create)

    def cp_file(
        self,
        path1: str,
        path2: str,
        version: int | None = None,
        *,
        planned: list[tuple[str, str]] | None = None,
        **_: Any,
    ) -> None:
        """Copies one version, the current one by default, as the next version of `path2`.

        With `planned` nothing is copied: what would be is added to it (`mv`).
        """
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        if planned is not None:
            if self.info(path1)["type"] == "file":  # a directory comes with its files
                planned.append((path1, self._new_name(path2)))
            return
        try:
            info = self._stat(path1, version)
        except IsADirectoryError:
            return  # it comes with its files
        self._copy(info, self._new_name(path2))

    def _copy(self, info: FileInfo, path: str) -> None:
        async def copy(files: FileClient) -> None:
            reader = Reader(files, info, self.transfer_s)
            try:
                await files.put(reader.source(), path, size=info.size, timeout_s=self.transfer_s)
            finally:
                reader.drop()

        self._ask(path, copy)

    def mv(
        self,
        path1: str | list[str],
        path2: str | list[str],
        recursive: bool = False,
        maxdepth: int | None = None,
        **_: Any,
    ) -> None:
        """Copies each file, and deletes it when all are copied and it has still the version that was copied.

        Names are as in `copy`. An error while copying deletes nothing. A file that was stored anew meanwhile stays where it
        is, and ConflictError names it. What nobody listed, because it came later or lies below `maxdepth`, stays too.
        """
        planned: list[tuple[str, str]] = []
        self.copy(path1, path2, recursive=recursive, maxdepth=maxdepth, on_error="raise", planned=planned)
        if not planned and not recursive:
            raise IsADirectoryError(errno.EISDIR, "no files, only directories: give recursive=True", str(path1))
        planned = [(source, target) for source, target in planned if source != target]
        targets = {target for _, target in planned}
        if both := next((source for source, _ in planned if source in targets), None):
            raise OSError(errno.EINVAL, "this would be moved and written over at once: move it first", both)
        copied: dict[str, int] = {}
        for source, target in planned:
            info = self._stat(source)
            self._copy(info, target)
            copied[source] = info.version
        changed: list[str] = []

        async def delete(files: FileClient, name: str, version: int) -> None:
            try:
                if (await files.stat(name, timeout_s=self.question_s)).version != version:
                    changed.append(name)
                    return
                await files.delete(name, timeout_s=self.question_s)
            except NotFound:
                return  # somebody else was faster

        async def delete_all(files: FileClient) -> None:
            await several((0, partial(delete, files, name, version)) for name, version in copied.items())

        self._ask(", ".join(list(copied)[:3]), delete_all)
        if changed:
            raise ConflictError(
                errno.ESTALE, f"{len(changed)} of the files copied were stored anew meanwhile, and stay", min(changed)
            )

    def touch(self, path: str, truncate: bool = True, **_: Any) -> None:
        """An empty new version; with truncate=False only where no file is."""
        try:
            self.pipe_file(path, b"", mode="overwrite" if truncate else "create")
        except FileExistsError:
            assert not truncate, "nothing was to be created"

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Only looks that nothing is there: a directory is stored with its first file."""
        if self.exists(path):
            raise FileExistsError(errno.EEXIST, "there is such a file or directory already", path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        if not exist_ok:
            self.mkdir(path)

    def rmdir(self, path: str) -> None:
        """Only looks that nothing is in it."""
        path = self._strip_protocol(path)
        kind = self._type(path)
        if kind == "file":
            raise NotADirectoryError(errno.ENOTDIR, "this is a file: use rm", path)
        if kind == "directory" and path:
            raise OSError(errno.ENOTEMPTY, "the directory has files: use rm with recursive=True", path)

    def rm_file(self, path: str) -> None:
        """Deletes all versions."""
        path = self._visible(path)
        try:
            self._ask(path, lambda files: files.delete(path, timeout_s=self.question_s))
        except FileNotFoundError:
            if self.isdir(path):
                raise IsADirectoryError(errno.EISDIR, "this is a directory: give recursive=True", path) from None
            raise

    def rm(self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        """Deletes all versions of files, and with `recursive` of all that lies below."""
        chosen = self.expand_path(path)
        if not recursive:
            for one in chosen:
                self.rm_file(one)
            return
        names: dict[str, None] = {}
        for one in chosen:
            names.update(dict.fromkeys(self.find(one, maxdepth=maxdepth)))
            if one not in names and self.info(one)["type"] == "file":
                names[one] = None

        async def delete(files: FileClient, name: str) -> None:
            try:
                await files.delete(name, timeout_s=self.question_s)
            except NotFound:
                return  # somebody else was faster

        async def delete_all(files: FileClient) -> None:
            await several((0, partial(delete, files, name)) for name in names)

        self._ask(", ".join(chosen[:3]), delete_all)

    # -----------------------------------------------------------------------------------------------------------------

    def _ask(self, path: str, work: Callable[[FileClient], Coroutine[Any, Any, T]], *, create: bool = False) -> T:
        found = self.connection()
        return found.run(path, work(found.cluster.file_client), create=create)

    def _below(self, path: str, depth: int | None) -> dict[str, Info]:
        return self._ask(path, partial(below, path=path, depth=depth, timeout_s=self.question_s))

    def _stat(self, path: str, version: int | None = None) -> FileInfo:
        """Raises FileNotFoundError, IsADirectoryError."""
        path = self._visible(path)
        try:
            return self._ask(path, lambda files: files.stat(path, version=version, timeout_s=self.question_s))
        except FileNotFoundError:
            if self.isdir(path):
                raise IsADirectoryError(errno.EISDIR, "this is a directory", path) from None
            raise

    def _file(self, path: str) -> Info:
        """Raises FileNotFoundError, IsADirectoryError."""
        entry = self.info(path)
        if entry["type"] != "file":
            raise IsADirectoryError(errno.EISDIR, "this is a directory: it has no version", path)
        return entry

    def _visible(self, path: str) -> str:
        path = self._strip_protocol(path)
        if hidden(path):
            raise FileNotFoundError(errno.ENOENT, "files below .idunno/ are the system's own", path)
        return path

    def _new_name(self, path: str) -> str:
        """Raises OSError (EINVAL) for what cannot name a file."""
        path = self._strip_protocol(path)
        try:
            return check_file_name(path)
        except IdunnoError as error:
            raise os_error(error, path) from error


def _progress(callback: Callback) -> Progress:
    def heard(done: int, total: int) -> None:
        if callback.size is None:
            callback.set_size(total)
        callback.absolute_update(done)

    return heard
