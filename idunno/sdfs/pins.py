# idunno/sdfs/pins.py: which of this node's blocks open puts may still commit.
#
# Rule 1: a block is pinned for its put before the first of its bytes is taken, or before "have it" is said.
# Rule 2: that a put is not open says nothing by itself: this node's machine may not have heard of it yet. A pin goes when its
#         put is not open after a barrier (a linearizable read) that began after the pin was taken.
from __future__ import annotations

from collections.abc import Callable

from idunno.base.ids import BlockId


class Pins:
    """Bounded by what was written for puts that have not ended."""

    def __init__(self) -> None:
        self._puts: dict[str, tuple[int, dict[BlockId, None]]] = {}  # put -> when pinned last, its blocks
        self._count: dict[BlockId, int] = {}  # puts that pin it
        self._serial = 0

    def take(self, block: BlockId, put: str) -> None:
        self._serial += 1
        _, blocks = self._puts.get(put, (0, {}))
        if block not in blocks:
            blocks[block] = None
            self._count[block] = self._count.get(block, 0) + 1
        self._puts[put] = (self._serial, blocks)

    def __contains__(self, block: BlockId) -> bool:
        return block in self._count

    def is_needed(self, block: BlockId, mark: int, is_open: Callable[[str], bool]) -> bool:
        """After the barrier: whether the block is pinned by what `settle` would keep."""
        if block not in self._count:
            return False
        return any(block in blocks and (serial > mark or is_open(put)) for put, (serial, blocks) in self._puts.items())

    def puts(self) -> list[str]:
        return list(self._puts)

    def mark(self) -> int:
        """To be taken before the barrier."""
        return self._serial

    def settle(self, mark: int, is_open: Callable[[str], bool]) -> list[BlockId]:
        """After the barrier: let go what was pinned before `mark` for puts that have ended; the blocks that are free now."""
        free: list[BlockId] = []
        for put, (serial, blocks) in list(self._puts.items()):
            if serial > mark or is_open(put):
                continue
            del self._puts[put]
            for block in blocks:
                self._count[block] -= 1
                if self._count[block] == 0:
                    del self._count[block]
                    free.append(block)
        return free
