# idunno/base/descriptors.py: whole reads and writes at an offset of a file descriptor, through the page cache or past it.
#
# Rule 1: `read` and `write` go on after a short step, until all is done or the file ends.
# Rule 2: past the cache (open(2), O_DIRECT) memory, offset and length are multiples of ALIGN_BYTES. So bytes that do not lie so
#         are copied through a room of each thread that does, and where an offset or an end does not fit, or the file system
#         refuses, the file goes through the cache from there on. The system keeps both ways to one file coherent.
# Why: a block is written once and read seldom. Through the cache each byte costs a copy into fresh pages, which push out what
#      the machine's own work has there, and the sync at the end waits for all of them at once.
from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from typing import Final

from idunno.base.disk import Also, Buffer

BUFFERS_MAX: Final = 512
"""Buffers a single pwritev takes; Linux allows 1,024 (IOV_MAX)."""
ALIGN_BYTES: Final = 4096
"""Enough for every disk sold: their sectors have 512 or 4,096 bytes."""
STEP_BYTES: Final = 2 * 1024 * 1024
"""Moved by one call past the cache, and what each thread's room takes of memory: as much as blocks are written in."""
O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)


def read(descriptor: int, offset: int, length: int) -> bytes:
    """Up to `length` bytes from `offset`; fewer only at the end of the file. Raises OSError."""
    data = os.pread(descriptor, length, offset)
    if len(data) == length or not data:
        return data
    parts = [data]
    got = len(data)
    while got < length and (more := os.pread(descriptor, length - got, offset + got)):
        parts.append(more)
        got += len(more)
    return b"".join(parts)


def write(descriptor: int, offset: int, data: Sequence[Buffer], also: Also | None = None) -> None:
    """All of the buffers, one after another; first they are given to `also`. Raises OSError."""
    if also is not None:
        also(data)
    views = [memoryview(part).cast("B") for part in data if len(part)]
    while views:
        written = os.pwritev(descriptor, views[:BUFFERS_MAX], offset)
        offset += written
        _take(views, written)  # a short write ends inside a buffer, when the disk is nearly full


class _Room(threading.local):
    """Each thread's memory for steps past the cache; a mapping begins at a page."""

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, STEP_BYTES))


_room = _Room()


def set_direct(descriptor: int) -> None:
    """From now on past the cache, where the file system knows such a thing."""
    if O_DIRECT:
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | O_DIRECT)


def is_direct(descriptor: int) -> bool:
    return bool(O_DIRECT and fcntl.fcntl(descriptor, fcntl.F_GETFL) & O_DIRECT)


def read_direct(descriptor: int, offset: int, length: int) -> bytes:
    """As `read`, past the cache if the file was opened so."""
    parts: list[bytes] = []
    end = offset + length
    while offset < end:
        skip = offset % ALIGN_BYTES
        wanted = min(STEP_BYTES, -(-(skip + end - offset) // ALIGN_BYTES) * ALIGN_BYTES)
        try:
            got = os.preadv(descriptor, [_room.view[:wanted]], offset - skip)
        except OSError as error:
            if error.errno != errno.EINVAL or not is_direct(descriptor):
                raise
            _through_the_cache(descriptor)
            continue
        piece = bytes(_room.view[skip : min(got, skip + end - offset)])
        parts.append(piece)
        offset += len(piece)
        if got < wanted:  # the end of the file: nothing is left over inside it but at its end
            break
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_direct(descriptor: int, offset: int, data: Sequence[Buffer], also: Also | None = None) -> None:
    """As `write`, past the cache as far as the file was opened so and offset and length allow it."""
    views = [memoryview(part).cast("B") for part in data if len(part)]
    if offset % ALIGN_BYTES == 0 and all(map(_lies_well, views)) and is_direct(descriptor):
        if also is not None:
            also(views)
            also = None
        offset += _write_in_place(descriptor, offset, views)
    while views and offset % ALIGN_BYTES == 0 and is_direct(descriptor):
        filled = _fill(_room.view, views)
        whole = filled - filled % ALIGN_BYTES
        # Here, where they lie in one piece: each call lets the interpreter go and asks for it again.
        if also is not None:
            also([_room.view[:filled]])
        try:
            written = os.pwrite(descriptor, _room.view[:whole], offset) if whole else 0
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            written = 0
        if written < filled:
            _through_the_cache(descriptor)
            write(descriptor, offset + written, [_room.view[written:filled]])
        offset += filled
    if views:
        if is_direct(descriptor):
            _through_the_cache(descriptor)
        write(descriptor, offset, views, also)


def _lies_well(view: memoryview) -> bool:
    """Whether it may be written past the cache from where it lies: most likely at a page of a mapping, and of whole pages."""
    return isinstance(view.obj, mmap.mmap) and len(view) % ALIGN_BYTES == 0


def _write_in_place(descriptor: int, offset: int, views: list[memoryview]) -> int:
    """How many bytes of `views` the system has taken from where they lie, perhaps none. They are gone from `views` then."""
    try:
        written = os.pwritev(descriptor, views[:BUFFERS_MAX], offset) if views else 0
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0
    _take(views, written)
    return written


def _take(views: list[memoryview], count: int) -> None:
    """Let the first `count` bytes of `views` go."""
    whole = 0
    while count and count >= len(views[whole]):
        count -= len(views[whole])
        whole += 1
    del views[:whole]
    if count:
        views[0] = views[0][count:]


def _fill(room: memoryview, views: list[memoryview]) -> int:
    """Move bytes from the front of `views` into `room`; how many."""
    filled = 0
    while views and filled < len(room):
        first = views[0]
        taken = min(len(first), len(room) - filled)
        room[filled : filled + taken] = first[:taken]
        filled += taken
        if taken < len(first):
            views[0] = first[taken:]
        else:
            del views[0]
    return filled


def _through_the_cache(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~O_DIRECT)
