# idunno/coordinator/steps.py: work on a million things that other threads are not kept waiting for.
#
# Rule 1: one call into the interpreter's own code (a sort, the freeing of a table) holds the interpreter's lock from beginning to
#         end: half a second for a million names. So it is done for a few thousand at a time, with Python in between.
from __future__ import annotations

from bisect import bisect_right
from typing import Any, Final

AT_ONCE: Final = 10_000
"""A sort of so many names, or the freeing of so many records, takes 5 ms at most."""


def in_order(names: list[str]) -> list[str]:
    """Sorted."""
    if len(names) <= AT_ONCE:
        return sorted(names)
    drawn = sorted(names[:: max(1, len(names) // AT_ONCE)])
    borders = drawn[
        :: max(1, 2 * len(drawn) * AT_ONCE // len(names) // 3)
    ]  # parts of two thirds of AT_ONCE, for some are larger
    parts: list[list[str]] = [[] for _ in range(len(borders) + 1)]
    for name in names:
        parts[bisect_right(borders, name)].append(name)
    found: list[str] = []
    for part in parts:
        found += in_order(part) if len(part) < len(names) else sorted(part)
    return found


def free(table: dict[Any, Any] | list[Any]) -> None:
    """Empty it."""
    if isinstance(table, dict):
        while table:
            table.popitem()
    else:
        while table:
            del table[-AT_ONCE:]
