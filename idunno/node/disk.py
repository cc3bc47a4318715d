# idunno/node/disk.py: the real disk below one data directory, its calls carried out by a pool of threads.
#
# Rule 1: only the composition root makes one. The log has a pool of its own, so that its sync never waits behind blocks.
# Rule 2: paths stay inside the root: '..', absolute paths and empty parts are a bug of the caller.
# Rule 3: every OSError leaves as DiskFailed (or NotFound), with the system's words and the path.
from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

from idunno.base.descriptors import O_DIRECT, is_direct, read, read_direct, write, write_direct
from idunno.base.disk import Also, Buffer, Entry, File, Space
from idunno.base.errors import Corrupt, DiskFailed, IdunnoError, NotFound
from idunno.base.naming import naming
from idunno.base.writing import start_writing
from idunno.node.prompt import BYTES_MAX, Promptness

P = ParamSpec("P")
T = TypeVar("T")

MUCH_BYTES: Final = 64 * 1024
"""A write of so much begins on the device at once: 64 MiB that a sync finds in memory hold up the log's syncs for a second."""
_RWF_NOWAIT: Final[int] = getattr(os, "RWF_NOWAIT", 0)


class ThreadOffload:
    """Runs functions in a pool: `await offload(function, *arguments)`."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if kwargs:
            raise AssertionError("offload takes positional arguments only")
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def close(self) -> None:
        """Returns when the running functions have ended."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _translate(error: OSError, what: str, path: str) -> IdunnoError:
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{path}: no such file ({what})")
    words = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFailed(f"cannot {what} {path}: {words}; free some space, then try again")
    return DiskFailed(f"cannot {what} {path}: {words}")


class RealFile:
    """A file descriptor, its calls carried out in the disk's pool."""

    def __init__(
        self,
        offload: ThreadOffload,
        descriptor: int,
        path: str,
        promptness: Promptness | None = None,
        *,
        direct: bool = False,
    ) -> None:
        self._offload, self._descriptor, self._path, self._promptness = offload, descriptor, path, promptness
        self._read, self._write = (read_direct, write_direct) if direct else (read, write)
        # Who was cancelled while it awaited a call may close the file while a thread still carries that call out: the
        # number of the descriptor must not go to another file under its hands.
        self._in_use = threading.Lock()

    async def _do(self, what: str, function: Callable[[], T]) -> T:
        if self._descriptor < 0:
            raise AssertionError(f"{self._path} is closed")
        try:
            return await self._offload(self._use, function)
        except OSError as error:
            raise _translate(error, what, self._path) from error

    async def _do_here(self, what: str, function: Callable[[], None]) -> None:
        """On the loop, unless a thread still uses the file."""
        if not self._in_use.acquire(blocking=False):
            await self._do(what, function)
            return
        try:
            if self._descriptor < 0:
                raise AssertionError(f"{self._path} is closed")
            function()
        except OSError as error:
            raise _translate(error, what, self._path) from error
        finally:
            self._in_use.release()

    def _use(self, function: Callable[[], T]) -> T:
        with self._in_use:
            return function()

    async def read(self, offset: int, length: int, *, also: Also | None = None) -> bytes:
        def carry_out() -> bytes:
            data = self._read(self._descriptor, offset, length)
            if also is not None:
                also([data])
            return data

        return await self._do("read", carry_out)

    def read_now(self, offset: int, length: int) -> bytes | None:
        if not _RWF_NOWAIT or not self._in_use.acquire(blocking=False):
            return None
        try:
            room = bytearray(length)
            got = os.preadv(self._descriptor, [room], offset, _RWF_NOWAIT)
            return bytes(room) if got == length else None
        except OSError:  # it would have to wait (EAGAIN), or the file system cannot tell; what is wrong, `read` says
            return None
        finally:
            self._in_use.release()

    async def write(self, offset: int, data: Sequence[Buffer], *, sync: bool = False, also: Also | None = None) -> None:
        promptness, length = self._promptness if sync else None, sum(map(len, data))

        def carry_out() -> None:
            begun = promptness.clock_s() if promptness is not None else 0.0
            self._write(self._descriptor, offset, data, also)
            if sync:
                os.fdatasync(self._descriptor)
            elif length >= MUCH_BYTES and not is_direct(self._descriptor):
                start_writing(self._descriptor, offset, length)
            if promptness is not None:
                promptness.took(promptness.clock_s() - begun)

        if promptness is not None and promptness.is_prompt() and length <= BYTES_MAX:
            await self._do_here("write", carry_out)
        else:
            await self._do("write", carry_out)

    async def sync(self) -> None:
        await self._do("sync", lambda: os.fsync(self._descriptor))

    async def allocate(self, length: int) -> None:
        await self._do("reserve space for", lambda: _allocate(self._descriptor, length))

    async def truncate(self, length: int) -> None:
        await self._do("truncate", lambda: os.ftruncate(self._descriptor, length))

    async def size(self) -> int:
        return await self._do("look at", lambda: os.fstat(self._descriptor).st_size)

    async def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                # Shielded: whoever is cancelled here, nobody else would close it.
                await asyncio.shield(self._offload(self._use, lambda: os.close(descriptor)))
            except OSError as error:
                raise _translate(error, "close", self._path) from error


def _allocate(descriptor: int, length: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        # A file system without reservations (some network ones): at least the length is right.
        if os.fstat(descriptor).st_size < length:
            os.ftruncate(descriptor, length)


class RealDisk:
    """The Disk (base/disk.py) of the directory `root`.

    With `promptness` a small write with a sync is carried out on the loop itself while the disk is prompt: for the log.
    """

    def __init__(self, root: str, offload: ThreadOffload, promptness: Promptness | None = None) -> None:
        self._root, self._offload, self._promptness = os.path.abspath(root), offload, promptness

    def local_path(self, path: str) -> str:
        if path.startswith("/") or any(part in ("", "..") for part in path.split("/")):
            raise AssertionError(f"{path!r} is not inside the data directory")
        return os.path.join(self._root, path)

    async def _do(self, what: str, path: str, function: Callable[[], T]) -> T:
        try:
            return await self._offload(function)
        except OSError as error:
            raise _translate(error, what, path) from error

    async def open(self, path: str, *, create: bool = False, direct: bool = False) -> File:
        full = self.local_path(path)
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        opening = asyncio.ensure_future(self._do("open", path, lambda: _open(full, flags, direct=direct)))
        try:
            descriptor = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unwanted)  # its thread goes on and opens the file
            raise
        return RealFile(self._offload, descriptor, path, self._promptness, direct=direct)

    async def read_all(self, path: str, *, bytes_max: int) -> bytes:
        full = self.local_path(path)

        def read() -> bytes:
            with open(full, "rb") as file:
                return file.read(bytes_max + 1)

        data = await self._do("read", path, read)
        if len(data) > bytes_max:
            raise Corrupt(f"{path} has more than the {bytes_max} bytes it may have")
        return data

    async def replace(self, path: str, data: Buffer, *, mode: int = 0o600) -> None:
        full = self.local_path(path)
        await self._do("replace", path, lambda: replace_file(full, data, mode))

    async def rename(self, source: str, target: str) -> None:
        old, new = self.local_path(source), self.local_path(target)
        await self._do("rename", source, lambda: os.rename(old, new))

    async def remove(self, path: str) -> None:
        full = self.local_path(path)
        await self._do("remove", path, lambda: os.unlink(full))

    async def list(self, path: str) -> list[Entry]:
        full = self.local_path(path)

        def scan() -> list[Entry]:
            entries = []
            try:
                with os.scandir(full) as found:
                    for item in found:
                        try:
                            status = item.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue  # removed since the scan began: it is not there
                        entries.append(
                            Entry(item.name, status.st_size, status.st_mtime, item.is_dir(follow_symlinks=False))
                        )
            except FileNotFoundError:
                return []
            return sorted(entries, key=lambda entry: entry.name)

        return await self._do("list", path, scan)

    async def make_directory(self, path: str) -> None:
        parts = path.split("/")

        def make() -> None:
            for depth in range(1, len(parts) + 1):
                full = self.local_path("/".join(parts[:depth]))
                try:
                    os.mkdir(full, 0o700)
                except FileExistsError:
                    continue
                sync_directory(os.path.dirname(full))

        await self._do("make", path, make)

    async def sync_directory(self, path: str) -> None:
        full = self.local_path(path)
        await self._do("sync", path, lambda: sync_directory(full))

    async def space(self) -> Space:
        def look() -> Space:
            found = os.statvfs(self._root)
            return Space(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)

        return await self._do("look at", ".", look)


def _open(full: str, flags: int, *, direct: bool) -> int:
    if direct:
        try:
            return os.open(full, flags | O_DIRECT, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system in memory: it has nothing but the cache
                raise
    return os.open(full, flags, 0o600)


def _close_unwanted(opening: asyncio.Future[int]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())


def sync_directory(full: str) -> None:
    descriptor = os.open(full, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(full: str, data: Buffer, mode: int = 0o600) -> None:
    """Make `full` hold `data`, durably and atomically. For set-up code before there is a loop; raises OSError."""
    temporary = f"{full}.new"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with naming(full):
            write(descriptor, 0, [data])
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(temporary, full)
    sync_directory(os.path.dirname(full))
