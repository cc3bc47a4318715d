# idunno/client/local.py: files on the user's own machine.
#
# Rule 1: a fetched file appears whole or not at all: temporary file in the target's directory, sync, rename, sync. Where the
#         file system can, the temporary one has no name before it is whole: what is killed leaves nothing behind.
# Rule 2: what is no regular file (a device, a pipe) is written to directly, never replaced.
# Rule 3: a regular file that changes while it is read is refused: a mix of old and new was never anybody's content.
from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Final

from idunno.base.errors import InvalidArgument
from idunno.base.naming import naming


def target_path(name: str, local: Path) -> Path:
    """Where to write the file `name`: `local`, or below it when it is a directory, like cp."""
    return local / PurePosixPath(name).name if local.is_dir() else local


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write; on success it takes the place of `path`, on any error nothing is left. Raises OSError."""
    place = _Place(path)
    try:
        with naming(path):
            yield place.file
            place.finish()
    except BaseException:
        place.discard()
        raise


@contextlib.asynccontextmanager
async def replacing_aside(path: Path) -> AsyncIterator[IO[bytes]]:
    """The same for asyncio programs: the loop goes on while the device syncs, so that many files do so at once."""
    place = _Place(path)
    try:
        with naming(path):
            yield place.file
            finishing = asyncio.ensure_future(asyncio.to_thread(place.finish))
            try:
                await asyncio.shield(finishing)
            except asyncio.CancelledError:
                # Its thread goes on: the file is there, or is not, before anybody is told.
                await asyncio.wait([finishing])
                raise
    except BaseException:
        place.discard()
        raise


_WRITE_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_COPY_BYTES: Final = 1024 * 1024
_NO_NAMELESS: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
"""What file systems and old kernels say that know no files without a name."""


def _nameless(directory: Path) -> int | None:
    """A new file there that has no name yet; None where that cannot be, or could not be given a name. Raises OSError."""
    flag = getattr(os, "O_TMPFILE", None)  # Linux has it
    if flag is None or not os.path.exists("/proc/self/fd"):
        return None
    try:
        return os.open(directory, flag | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in _NO_NAMELESS:
            return None
        raise


def check_place(path: Path) -> None:
    """Raises OSError if no file could be written to `path` now: for what comes only after long work."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.is_file() or not path.exists():  # a pipe is not opened twice: its reader would take that for the end
        _Place(path).discard()


class _Place:
    """A file on its way to `path`."""

    def __init__(self, path: Path) -> None:
        self._temporary: Path | None = None
        try:
            mode: int | None = path.stat().st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None and not stat.S_ISREG(mode):
            # By the name that was given: /dev/stdout leads to a pipe, which no other name opens.
            self.file: IO[bytes] = open(path, "wb")  # noqa: SIM115 (closed by finish or discard)
            return
        self._path = Path(os.path.realpath(path))  # a link stays a link
        self._temporary = self._path.with_name(f".{self._path.name[:100]}.{secrets.token_hex(6)}.part")
        try:
            nameless = _nameless(self._path.parent)
            self._named = nameless is None
            # Not mkstemp: this way the new file has the mode that the user's umask asks for.
            handle = os.open(self._temporary, _WRITE_NEW, 0o666) if nameless is None else nameless
        except OSError as error:  # about the name that was given, not about ours
            raise OSError(error.errno, error.strerror, str(path)) from None
        self.file = os.fdopen(handle, "wb")
        if mode is not None:
            os.fchmod(handle, stat.S_IMODE(mode))

    def finish(self) -> None:
        """Durably in its place when this returns."""
        with self.file as file:
            file.flush()
            if self._temporary is None:
                return
            os.fsync(file.fileno())
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if not self._named:
                    self._give_name(file.fileno(), self._temporary, directory)
                os.replace(self._temporary, self._path)
                self._temporary = None
                os.fsync(directory)
            except OSError as error:  # about the name that was given, not about ours
                raise OSError(error.errno, error.strerror, str(self._path)) from None
            finally:
                os.close(directory)

    def _give_name(self, content: int, name: Path, directory: int) -> None:
        self._named = True
        entry = f"/proc/self/fd/{content}"
        try:
            # With a directory's descriptor: only then what the link in /proc leads to is what gets the name.
            os.link(entry, name.name, dst_dir_fd=directory)
        except OSError:  # whatever forbids it here, the content need not be fetched again
            with open(entry, "rb") as source, open(os.open(name, _WRITE_NEW, 0o600), "wb") as copy:
                shutil.copyfileobj(source, copy, _COPY_BYTES)
                copy.flush()
                os.fchmod(copy.fileno(), stat.S_IMODE(os.fstat(content).st_mode))
                os.fsync(copy.fileno())

    def discard(self) -> None:
        try:
            self.file.close()
        finally:
            if self._temporary is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._temporary)


def open_file(path: Path) -> IO[bytes]:
    """For reading. Raises InvalidArgument for a folder, OSError."""
    if path.is_dir():
        raise InvalidArgument(f"{path} is a folder: name a file, or give the folder where one may stand")
    return open(path, "rb")


def unchanged_check(file: IO[bytes]) -> Callable[[], None]:
    """To call after each read: raises InvalidArgument once the regular file `file` is not as it was when this was called.

    An append counts too: by size and time it looks like a file that is written anew in place. A file that another one takes
    the place of (`mv`) stays as it is for who has it open.
    """
    descriptor, first = file.fileno(), os.fstat(file.fileno())
    name = file.name if isinstance(file.name, (str, bytes)) else "what is put"  # opened by number: standard input

    def check() -> None:
        now = os.fstat(descriptor)
        if (now.st_size, now.st_mtime_ns) != (first.st_size, first.st_mtime_ns):
            raise InvalidArgument(
                f"{os.fsdecode(name)} changed while it was read ({first.st_size:,} bytes at first, {now.st_size:,} now): "
                "put it again when nobody writes to it"
            )

    return check


def files_below(folder: Path) -> list[tuple[str, Path]]:
    """Every file below `folder` as (path relative to it with '/', path), sorted. Links to directories are not followed.

    Raises InvalidArgument for what is no file (a pipe, a broken link), OSError.
    """
    found = []
    for root, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = Path(root, name)
            if not path.is_file():
                raise InvalidArgument(f"{path} is no regular file: put the folder without it")
            found.append((path.relative_to(folder).as_posix(), path))
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error
