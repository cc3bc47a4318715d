# idunno/scheduler/paging.py: lists that may not fit one answer: rows of known order, and whether there are more.
from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

import msgspec

PAGE_BYTES_MAX: Final = 256 * 1024
"""Of a page's rows, but for the last: about 10 ms of the loop. A row itself is far below the rest of an answer."""

R = TypeVar("R", bound=msgspec.Struct)


def page(rows: Iterable[R]) -> tuple[list[R], bool]:
    """The first of `rows`, at least one if there is any, and whether there are more. Rows of later pages are not made."""
    found: list[R] = []
    left_bytes = PAGE_BYTES_MAX
    for row in rows:
        if left_bytes <= 0:
            return found, True
        left_bytes -= len(msgspec.msgpack.encode(row))
        found.append(row)
    return found, False
