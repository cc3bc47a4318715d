# idunno/base/memory.py: have the C library give large blocks of memory back to the system as soon as they are freed.
#
# Why: glibc learns from the first large block that is freed to keep those after it, in an arena for each thread. A transfer
#      reads its blocks in several threads, and so held twice the memory that it uses.
# Rule: only a process that is all ours does so (the command), never a program that uses the library: it changes every
#       allocation of the process.
from __future__ import annotations

from typing import Final

_M_MMAP_THRESHOLD: Final = -3  # malloc.h
_LARGE_BYTES: Final = 1024 * 1024
"""An eighth of a block: fresh pages cost little beside what is done with so many bytes."""


def give_back_large_blocks() -> None:
    """Where the C library knows no such setting, nothing happens."""
    import ctypes  # not at the top: most commands move no content

    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    set_option(_M_MMAP_THRESHOLD, _LARGE_BYTES)
