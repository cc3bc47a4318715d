# idunno/coordinator/aged.py: a table in the order in which its items came, whose oldest is found at once.
#
# Rule 1: a list of small tables, the oldest first. What goes out of one large table leaves holes at its front, and whoever looks
#         for the oldest passes all of them: 1 ms a look at half a million.
# Rule 2: a capture holds these tables, not copies of what they hold. Each is copied when it is changed for the first time after.
from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, Final, Generic, TypeVar

import msgspec

from idunno.coordinator.steps import free

PART_MAX: Final = 682
"""What a dict of 1,024 slots takes: copied in 3 us."""

K = TypeVar("K")
V = TypeVar("V")


class _Part(msgspec.Struct, gc=False, eq=False):
    # Not searched for garbage: a table with a million references to these is not either.
    number: int  # rising
    captures: int  # how many there had been: a later one holds these very items
    items: dict[Any, Any]


class Aged(Generic[K, V]):
    """Iterates over its keys, the oldest first. Not to be changed meanwhile."""

    def __init__(self, items: Iterable[tuple[K, V]] = ()) -> None:
        self._part_of: dict[K, _Part] = {}
        self._parts: list[_Part] = []  # by number
        self._captures = 0
        for key, value in items:
            self[key] = value

    def __len__(self) -> int:
        return len(self._part_of)

    def __contains__(self, key: K) -> bool:
        return key in self._part_of

    def __iter__(self) -> Iterator[K]:
        return chain.from_iterable(part.items for part in self._parts)

    def values(self) -> Iterator[V]:
        return chain.from_iterable(part.items.values() for part in self._parts)

    def items(self) -> Iterator[tuple[K, V]]:
        return chain.from_iterable(part.items.items() for part in self._parts)

    def __getitem__(self, key: K) -> V:
        value: V = self._part_of[key].items[key]
        return value

    def get(self, key: K) -> V | None:
        part = self._part_of.get(key)
        return part.items[key] if part is not None else None

    def behind(self, key: Any) -> Iterator[V]:
        """The values whose keys are greater: of a table whose keys rise as they come."""
        first = max(0, bisect_right(self._parts, key, key=lambda part: next(iter(part.items))) - 1)
        for part in islice(self._parts, first, None):
            for other, value in part.items.items():
                if other > key:
                    yield value

    def __setitem__(self, key: K, value: V) -> None:
        """A new key is the youngest; one that is there keeps its age."""
        part = self._part_of.get(key)
        if part is None:
            part = self._part_of[key] = self._youngest()
        self._own(part)[key] = value

    def pop(self, key: K) -> V | None:
        part = self._part_of.pop(key, None)
        if part is None:
            return None
        items = self._own(part)
        value: V = items.pop(key)
        if not items:
            del self._parts[bisect_left(self._parts, part.number, key=lambda part: part.number)]
        return value

    def oldest(self) -> K:
        """Of a table that is not empty."""
        key: K = next(iter(self._parts[0].items))
        return key

    def capture(self) -> list[dict[K, V]]:
        """All items as they are now, the oldest first."""
        self._captures += 1
        return [part.items for part in self._parts]

    def free(self) -> None:
        """Nobody looks at it any more: let go of it, in steps (steps.py)."""
        free(self._part_of)
        while self._parts:
            self._parts.pop()

    def _youngest(self) -> _Part:
        if not self._parts or len(self._parts[-1].items) >= PART_MAX:
            number = self._parts[-1].number + 1 if self._parts else 0
            self._parts.append(_Part(number, self._captures, {}))
        return self._parts[-1]

    def _own(self, part: _Part) -> dict[K, V]:
        """Its items, to be changed."""
        if part.captures != self._captures:
            part.items, part.captures = part.items.copy(), self._captures
        return part.items
