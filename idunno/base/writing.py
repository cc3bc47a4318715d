# idunno/base/writing.py: have the device begin to write what was written to a file, so that the sync at its end is short.
#
# Rule 1: this promises nothing: only a sync makes durable. Where the system cannot do it, nothing happens.
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

_WRITE: Final = 2  # SYNC_FILE_RANGE_WRITE of linux/fs.h: start, wait for nothing


@cache
def _find() -> Callable[[int, int, int, int], int] | None:
    import ctypes  # not at the top: a node that starts writes no block yet, and the others wait for it

    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):  # not Linux
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def start_writing(descriptor: int, offset: int, length: int) -> None:
    """Begin to write those bytes of the file to the device. May wait a little while the device's queue is full."""
    if (sync_file_range := _find()) is not None:
        sync_file_range(descriptor, offset, length, _WRITE)
