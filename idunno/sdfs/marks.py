# idunno/sdfs/marks.py: which records of the small store's segments something refers to: the marks of mark and sweep.
#
# Rule: a bit a record, exact and bounded: 270 KB a segment, however small its contents and however many refer to one.
from __future__ import annotations

from collections import Counter
from typing import Final

GRAIN_BYTES: Final = 32
"""No two records begin within so many bytes: a head is longer."""

Place = tuple[int, int, int]
"""Segment, offset of the content, length."""


class Marks:
    """Of the segments below `before`: the others were not full yet when marking began."""

    def __init__(self, before: int, head_bytes: int) -> None:
        """`head_bytes`: of a record, before its content."""
        self.before, self._head_bytes = before, head_bytes
        self._bits: dict[int, bytearray] = {}
        self.live_bytes: Counter[int] = Counter()
        """Of marked records, by segment."""

    def add(self, place: Place) -> None:
        segment, offset, length = place
        if segment >= self.before or place in self:
            return
        at, bit = divmod(offset // GRAIN_BYTES, 8)
        bits = self._bits.setdefault(segment, bytearray())
        if at >= len(bits):
            bits.extend(bytes(at + 1 - len(bits)))
        bits[at] |= 1 << bit
        self.live_bytes[segment] += self._head_bytes + length

    def __contains__(self, place: Place) -> bool:
        at, bit = divmod(place[1] // GRAIN_BYTES, 8)
        bits = self._bits.get(place[0], b"")
        return at < len(bits) and bool(bits[at] & 1 << bit)
