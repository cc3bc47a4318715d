# idunno/fs/files.py: open files.
#
# Rule 1: a file that is read stays at the version it was opened at, whatever is written meanwhile.
# Rule 2: a file that is written becomes a version at `close`, in one step. Left by an exception or dropped it leaves nothing.
# Rule 3: only whole blocks are fetched, because only they can be verified; the one last used is kept.
from __future__ import annotations

import errno
import io
import sys
import warnings
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from fsspec.core import OpenFile
from fsspec.spec import AbstractBufferedFile

from idunno.base.disk import Buffer
from idunno.coordinator.records import BLOCK_BYTES_MAX
from idunno.fs.connection import Connection
from idunno.fs.listing import file_entry
from idunno.fs.streams import Reader, Writer, joined
from idunno.sdfs.messages import FileInfo, PutAnswer
from idunno.sdfs.upload import Source

if TYPE_CHECKING:
    from idunno.fs.filesystem import IdunnoFileSystem

LINE_BYTES: Final = 64 * 1024
"""Looked through at a time for the end of a line."""


class ReadFile(AbstractBufferedFile):  # type: ignore[misc]
    """A version, open for reading. Its block size is what fsspec's own caches use; by default there is none of them."""

    def __init__(
        self,
        fs: IdunnoFileSystem,
        info: FileInfo,
        *,
        block_size: int | None = None,
        cache_type: str = "none",
        cache_options: dict[str, Any] | None = None,
    ) -> None:
        self._info = info
        self._starts = [0, *accumulate(block.size for block in info.blocks)]
        self._reader: Reader | None = None
        self._connection: Connection | None = None  # the reader's
        self._held_at, self._held = 0, memoryview(b"")
        self._details = file_entry(info.name, info)
        super().__init__(
            fs,
            info.name,
            "rb",
            block_size or BLOCK_BYTES_MAX,
            cache_type=cache_type,
            cache_options=cache_options,
            size=info.size,
            version=info.version,  # pickled too: a copy stays at this version
        )

    def readuntil(self, char: bytes = b"\n", blocks: int | None = None) -> bytes:
        found: bytes = super().readuntil(char, blocks or LINE_BYTES)
        return found

    def close(self) -> None:
        if self._reader is not None and self._connection is not None:
            self._connection.post(self._reader.drop)
        self._reader, self._held = None, memoryview(b"")
        super().close()

    def _fetch_range(self, start: int, end: int) -> bytes:
        end = min(end, self._info.size)
        out = io.BytesIO()
        while start < end:
            if not self._held_at <= start < self._held_at + len(self._held):
                self._hold(start, end)
            start += out.write(self._held[start - self._held_at : end - self._held_at])
        return out.getvalue()

    def _hold(self, start: int, end: int) -> None:
        """Fetch the block of the byte at `start`, for a read to `end`."""
        connection = self.fs.connection()
        if self._reader is None or self._connection is not connection:  # the first read, or the first after a fork
            self._reader = Reader(connection.cluster.file_client, self._info, self.fs.transfer_s)
            self._connection = connection
        number, last = (bisect_right(self._starts, at) - 1 for at in (start, end - 1))
        self._held = memoryview(b"")
        self._held = memoryview(connection.run(self.path, self._reader.block(number, last)))
        self._held_at = self._starts[number]


class WriteFile(AbstractBufferedFile):  # type: ignore[misc]
    """The next version of a file, while it is written. `version` is its number once it is stored."""

    closed: bool

    def __init__(
        self,
        fs: IdunnoFileSystem,
        path: str,
        mode: str,
        *,
        if_version: int | None,
        before: FileInfo | None = None,
        block_size: int | None = None,
        autocommit: bool = True,
    ) -> None:
        """`before`: what the new version begins with."""
        self.version: int | None = None
        self._if_version, self._before = if_version, before
        self._writer: Writer | None = None
        self._connection: Connection | None = None  # the writer's
        super().__init__(fs, path, mode, block_size or BLOCK_BYTES_MAX, autocommit)
        self.loc = before.size if before is not None else 0

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        for at in range(0, len(view), BLOCK_BYTES_MAX):  # a huge piece is not copied as a whole
            super().write(view[at : at + BLOCK_BYTES_MAX])
        return len(view)

    def commit(self) -> None:
        """Make the version. For files that do not do so when they are closed (fsspec's transactions)."""
        if not self.closed:
            self.discard()
            self.closed = True
            raise ValueError(f"{self.path}: still open at the end of its transaction, so it was not stored")
        if self._writer is not None:
            self._run(final=True)

    def discard(self) -> None:
        """Leave nothing of it."""
        self.forced = True  # nothing is written any more
        writer, self._writer = self._writer, None
        if writer is not None and self._connection is not None and self._connection.alive:
            self._connection.run(self.path, writer.discard())

    def close(self) -> None:
        if not self.closed and _left_by_exception():
            self.discard()
        super().close()

    def __exit__(self, *about: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """As `discard`, by who forgot to close: says so, and never waits."""
        if self.closed:
            return
        self.closed = True
        warnings.warn(f"{self.path}: dropped without close, so it was not stored", ResourceWarning, stacklevel=2)
        if self._writer is not None and self._connection is not None:
            self._connection.post(self._writer.give_up)

    def _upload_chunk(self, final: bool = False) -> None:
        # The buffer is replaced afterwards, never written to again: no copy is needed.
        self._run(self.buffer.getbuffer(), final=final and self.autocommit)

    def _run(self, piece: Buffer = b"", *, final: bool) -> None:
        connection = self._connection = self._connection or self.fs.connection()
        if not connection.alive:
            raise OSError(
                errno.EIO, "this file was opened before a fork or on a closed connection: open it anew", self.path
            )
        try:
            answer = connection.run(self.path, self._send(connection, piece, final=final), create="x" in self.mode)
        except BaseException:  # an interrupt too: whether the piece was taken is unknown, and twice it must not be
            if self._writer is not None:
                connection.post(self._writer.give_up)
            raise
        if answer is not None:
            self._writer = None
            self.version = answer.version

    async def _send(self, connection: Connection, piece: Buffer, *, final: bool) -> PutAnswer | None:
        if self._writer is None:
            files, timeout_s = connection.cluster.file_client, self.fs.transfer_s
            path, before, if_version = self.path, self._before, self._if_version

            async def put(source: Source) -> PutAnswer:  # knows nothing of `self`, so a dropped file is noticed
                if before is not None:
                    source = joined(Reader(files, before, timeout_s).source(), source)
                return await files.put(source, path, if_version=if_version, timeout_s=timeout_s)

            self._writer = Writer(put)
        await self._writer.write(piece)
        return await self._writer.finish() if final else None


class TextFile(io.TextIOWrapper):
    """Text over a file above. Unlike the C class it can be seen that its `with` was left by an exception."""

    def __exit__(self, *about: object) -> None:
        self.close()

    def __del__(self) -> None:
        """Not the base class's, which would close: dropped text stores nothing, and the file behind it says so."""


class CompressedFile(io.BufferedIOBase):
    """Writes through a compressor, and closes the file behind it too, which most compressors leave open."""

    def __init__(self, compressor: Any, file: WriteFile) -> None:
        self._compressor, self._file = compressor, file
        self._ended = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._compressor.write(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        if not self._ended:
            self._compressor.flush()

    def close(self) -> None:
        if self._ended:
            return
        self._ended = True
        try:
            self._compressor.close()
            self._file.close()
        finally:
            super().close()

    def __exit__(self, *about: object) -> None:
        self.close()

    def __del__(self) -> None:
        """Not the base class's, which would close: dropped content stores nothing."""
        if not self._ended:
            self._file.drop()  # before the compressor, when it is dropped, writes its end


_EXITS: Final = {cls.__exit__.__code__ for cls in (OpenFile, WriteFile, TextFile, CompressedFile)}


def _left_by_exception() -> bool:
    """Whether we are called by one of _EXITS because of an exception.

    fsspec's OpenFile and Python's text files only `close` what they hold, whatever has happened: the reason has to be read
    off the stack. A plain `close()`, be it in an `except` clause, always stores.
    """
    error = sys.exception()
    frame = sys._getframe() if error is not None else None
    while frame is not None:
        if frame.f_code in _EXITS:
            about = frame.f_locals.get("args", frame.f_locals.get("about", ()))
            return error in about
        frame = frame.f_back
    return False
