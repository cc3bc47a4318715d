# idunno/coordinator/history.py: the versions of one file, rising by number; never changed, only made anew.
#
# Rule 1: few are a tuple: there are millions of such files. Many are full parts and a tail, and one more version copies the tail:
#         with one tuple, a put copied as many references as its file had versions, 1.8 ms at 100,000.
# Rule 2: which of the two it is shows nowhere: a snapshot has the same bytes.
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Final, overload

from idunno.coordinator.records import VersionRecord

PART: Final = 256
"""Versions in a full part: copied in a microsecond."""

Part = tuple[VersionRecord, ...]


class History(Sequence[VersionRecord]):
    """More than a part of them."""

    __slots__ = ("_begins", "_tail", "full")

    def __init__(self, full: tuple[Part, ...], tail: Part, begins: tuple[int, ...] | None = None) -> None:
        """`begins`: where each full part begins, and the tail."""
        self.full, self._tail = full, tail
        self._begins = begins if begins is not None else tuple(accumulate(map(len, full), initial=0))

    def parts(self) -> tuple[Part, ...]:
        return (*self.full, self._tail)

    def and_one(self, record: VersionRecord) -> History:
        if len(self._tail) < PART:
            return History(self.full, (*self._tail, record), self._begins)
        return History(self.parts(), (record,), (*self._begins, len(self)))

    def __len__(self) -> int:
        return self._begins[-1] + len(self._tail)

    def __iter__(self) -> Iterator[VersionRecord]:
        return chain.from_iterable(self.parts())

    @overload
    def __getitem__(self, at: int) -> VersionRecord: ...
    @overload
    def __getitem__(self, at: slice) -> Part: ...
    def __getitem__(self, at: int | slice) -> VersionRecord | Part:
        if isinstance(at, slice):
            places = range(len(self))[at]
            few = len(places) < len(self) // 8
            return tuple([self[place] for place in places]) if few else tuple(self)[at]
        place = at + len(self) if at < 0 else at
        if not 0 <= place < len(self):
            raise IndexError(f"no version at {at} of {len(self)}")
        part = bisect_right(self._begins, place) - 1
        return (self.full[part] if part < len(self.full) else self._tail)[place - self._begins[part]]


Versions = Part | History


def of(records: Iterable[VersionRecord]) -> Versions:
    """As few or as many as they are."""
    every = tuple(records)
    if len(every) <= PART:
        return every
    parts = tuple(every[at : at + PART] for at in range(0, len(every), PART))
    return History(parts[:-1], parts[-1])


def and_one(versions: Versions, record: VersionRecord) -> Versions:
    """With one more, whose number is higher."""
    if isinstance(versions, History):
        return versions.and_one(record)
    return (*versions, record) if len(versions) < PART else History((versions,), (record,))


def without(versions: Versions, numbers: frozenset[int]) -> tuple[Versions, Part]:
    """Those that do not have these numbers, and those that do. Parts without any of them stay as they are."""
    if not numbers:
        return versions, ()
    low, high = min(numbers), max(numbers)
    kept, gone = list[Part](), list[VersionRecord]()
    for part in versions.parts() if isinstance(versions, History) else (versions,):
        if not part or part[-1].version < low or high < part[0].version:
            kept.append(part)
            continue
        gone += [record for record in part if record.version in numbers]
        kept.append(tuple([record for record in part if record.version not in numbers]))
    parts = tuple(part for part in kept if part)
    if sum(map(len, parts)) <= PART:
        return tuple(chain.from_iterable(parts)), tuple(gone)
    return History(parts[:-1], parts[-1]), tuple(gone)
