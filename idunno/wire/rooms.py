# idunno/wire/rooms.py: memory for large frames, used again and again.
#
# Rule 1: a room is lent again only when no view of it is left, whoever held one: a transport, a thread that writes to a disk.
# Rule 2: a process keeps at most ROOMS_MAX. While all of them are lent, a frame gets memory of its own.
# Why: fresh memory is filled with zeros before a frame's bytes are put over them, and lies anywhere. A room begins at a page,
#      so a disk takes what is in it past the system's cache without a copy (base/descriptors.py).
from __future__ import annotations

import mmap
from collections import deque
from typing import Final

from idunno.wire.calls import BODY_BYTES_MAX

ROOM_BYTES: Final = BODY_BYTES_MAX
ROOMS_MAX: Final = 32
"""16 MiB: what the blocks that a node takes in hold of frames at most (sdfs/blocks.py)."""

_rooms: Final[deque[mmap.mmap]] = deque()  # the one that was lent last is the last


def room(size: int) -> memoryview:
    """Writable memory of `size` bytes, whatever stands in it."""
    if not ROOM_BYTES // 2 < size <= ROOM_BYTES:
        return memoryview(bytearray(size))
    for _ in range(len(_rooms)):
        try:
            found = _rooms.popleft()
        except IndexError:  # a loop in another thread looks through them, too
            break
        view = memoryview(found)[:size] if _is_free(found) else None
        _rooms.append(found)
        if view is not None:
            return view
    if len(_rooms) >= ROOMS_MAX:
        return memoryview(bytearray(size))
    _rooms.append(made := mmap.mmap(-1, ROOM_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return memoryview(made)[:size]


def _is_free(held: mmap.mmap) -> bool:
    """Whether there is no view of it: memory that somebody has a view of cannot be given a size, not even the one it has."""
    try:
        held.resize(ROOM_BYTES)
    except (
        BufferError,
        SystemError,
    ):  # SystemError: this system gives no memory another size, so no room is lent twice
        return False
    return True
