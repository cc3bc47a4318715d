# idunno/coordinator/rows.py: how the parts of the machine give what they hold to a snapshot: in rows, each with its weight.
#
# Rule: a part's `capture` copies its tables at once (not what they hold, and large ones not at all: aged.py), gives their rows
#       later, as they were. Records never change; what does (a file's versions, some of a job's tasks) is copied by the first
#       command that changes it after.
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

PAGE_WEIGHT = 2_000
"""Records (versions, blocks, tasks) in a page: about 2 ms to make or read, and 200 KB."""

Row = tuple[str, Any, int]
"""Kind, record, weight."""

T = TypeVar("T")


def runs(items: Iterable[T], weigh: Callable[[T], int]) -> Iterator[tuple[tuple[T, ...], int]]:
    """`items` in runs that fill a page, each with its weight; one empty run when there are none."""
    run, weight, any_run = list[T](), 1, False
    for item in items:
        one = weigh(item)
        if run and weight + one > PAGE_WEIGHT:
            yield tuple(run), weight
            run, weight, any_run = [], 1, True
        run.append(item)
        weight += one
    if run or not any_run:
        yield tuple(run), weight
