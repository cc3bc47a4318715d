# idunno/client/transfer.py: helpers for moving content: local files as sources and sinks, several at once, their progress.
#
# Rule 1: small files and memory are read in place, large files aside; what may keep us waiting for ever (a terminal, a pipe) is
#         read in a thread that nobody has to wait for, so that Ctrl-C works while nothing comes.
from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import IO, Any, Final, Protocol, TypeVar

from idunno.base.descriptors import set_direct, write_direct
from idunno.base.disk import Buffer
from idunno.base.writing import start_writing
from idunno.client.local import unchanged_check
from idunno.coordinator.records import SMALL_BYTES_MAX
from idunno.sdfs.download import Sink
from idunno.sdfs.upload import Source

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Hears (bytes done, bytes in all; 0 when unknown)."""

TOGETHER: Final = 64
"""Files under way at once that ride in a command each: one round and one sync of the log carry many of them."""
SMALL_FILE_BYTES: Final = 1024 * 1024
"""Files up to this go eight at once, which hides round trips and disk syncs. Larger ones go alone, so that memory stays that
of one transfer."""
ASIDE_BYTES: Final = 256 * 1024
"""More than this is read and written in a thread: it takes longer than the hand-over, and meanwhile the blocks before go on."""


def share_of(size: int) -> int:
    """How many of TOGETHER places a transfer of that size takes."""
    return 1 if size <= SMALL_BYTES_MAX else TOGETHER // 8 if size <= SMALL_FILE_BYTES else TOGETHER


async def several(todo: Iterable[tuple[int, Callable[[], Coroutine[Any, Any, T]]]]) -> list[T]:
    """Run transfers given as (size in bytes, start), small ones together; their results in order.

    The first error cancels the others and is raised as it is.
    """
    slots = asyncio.Semaphore(TOGETHER)

    async def run(start: Callable[[], Coroutine[Any, Any, T]], taken: int) -> T:
        try:
            return await start()
        finally:
            for _ in range(taken):
                slots.release()

    tasks: list[asyncio.Task[T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            for size, start in todo:
                taken = share_of(size)
                for _ in range(taken):  # only this loop acquires, so two large files cannot block each other
                    await slots.acquire()
                tasks.append(group.create_task(run(start, taken)))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


class Writable(Protocol):
    def write(self, data: Any, /) -> object: ...


def source_of(file: IO[bytes]) -> tuple[Source, int | None]:
    """A file's content from where it stands, and how much that is, if that can be told."""
    try:
        about = os.fstat(file.fileno())
    except OSError:  # in memory: there is no descriptor
        return _at_once(file), None
    if stat.S_ISREG(about.st_mode):
        size = max(0, about.st_size - file.tell())
        return _steady(file, aside=size >= ASIDE_BYTES), size

    async def read(length: int) -> Buffer:
        return await _in_daemon(lambda: file.read(length))

    return read, None


def _at_once(file: IO[bytes]) -> Source:
    async def read(length: int) -> Buffer:
        return file.read(length)

    return read


def _steady(file: IO[bytes], *, aside: bool) -> Source:
    """A regular file's, which must not change before its end was read; that read is the last before the commit.

    `aside`: a large one's: while the next block is read, those before go on.
    """
    check = unchanged_check(file)

    def take(length: int) -> Buffer:
        content = file.read(length)
        check()
        return content

    async def read(length: int) -> Buffer:
        return await asyncio.to_thread(take, length) if aside else take(length)

    return read


async def _in_daemon(work: Callable[[], bytes]) -> bytes:
    """Run `work` in a daemon thread: unlike an executor's, it does not hold up the end of the program."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bytes] = loop.create_future()

    def deliver(content: bytes, error: OSError | ValueError | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(content)

    def run() -> None:
        content, failure = b"", None
        try:
            content = work()
        except (OSError, ValueError) as error:  # ValueError: the file was closed meanwhile
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(deliver, content, failure)

    threading.Thread(target=run, name="idunno-read", daemon=True).start()
    return await done


def sink_of(file: Writable) -> Sink:
    """Writes to `file` what comes, in order; to a regular file aside of the loop, and the device begins at once."""

    def write(content: Buffer) -> None:
        view = memoryview(content)
        while view:  # an unbuffered file may take less than it is given
            taken = file.write(view)
            view = view[taken if isinstance(taken, int) else len(view) :]

    def write_and_start(descriptor: int, offset: int, content: Buffer) -> None:
        write(content)
        start_writing(descriptor, offset, len(content))

    async def take(offset: int, content: Buffer) -> None:
        if regular is None or len(content) < ASIDE_BYTES:
            write(content)
        else:
            await asyncio.to_thread(write_and_start, regular, offset, content)

    regular = _regular(file)
    return take


def sink_into(file: IO[bytes]) -> Sink:
    """Makes what comes the whole content of `file`, a new one of our own: a large content goes past the system's cache, as in
    the store: through it, each byte costs a copy into fresh pages, and what the machine's own work has there goes."""
    regular = _regular(file)
    if regular is None:
        return sink_of(file)

    async def take(offset: int, content: Buffer) -> None:
        if len(content) < ASIDE_BYTES:
            write_direct(regular, offset, [content])
            return
        if offset == 0:
            set_direct(regular)
        await asyncio.to_thread(write_direct, regular, offset, [content])

    return take


def _regular(file: object) -> int | None:
    """The descriptor of a regular file; None of anything else."""
    try:
        descriptor: int = file.fileno()  # type: ignore[attr-defined]
        return descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    except (AttributeError, OSError):
        return None


class Tally:
    """Adds up the progress of many transfers into one."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def part(self) -> Progress | None:
        """The progress of one more transfer."""
        report = self._progress
        if report is None:
            return None
        before = 0

        def heard(done: int, _: int) -> None:
            nonlocal before
            self._done += done - before  # a retried block makes it go back, and that is right
            before = done
            report(self._done, self._total)

        return heard


class LineEnds:
    """A binary file that is written to, and remembers whether the last byte ended a line."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._last = b"\n"

    def write(self, data: Buffer, /) -> object:
        self._last = bytes(data[-1:]) or self._last
        return self._file.write(data)

    def end_line(self) -> None:
        if self._last != b"\n":
            self.write(b"\n")
