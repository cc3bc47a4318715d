# idunno/coordinator/references.py: how many things refer to each block: the roots of the sweep and of repair.
#
# Rule 1: one count for each mention: by a version (in a file or in the trash), by a model's files, by a job's input. Contents of
#         small files are not blocks and are not counted here.
# Rule 2: derived from the other parts and never in a snapshot: `recount` gives the same counts as the log did.
# Rule 3: a command pays for the blocks that it names itself, nothing else.
# Rule 4: what only the files of jobs mention is for their clients' eyes (docs/roles.md): for such mentions it is noted whose.
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from idunno.base.ids import BlockId
from idunno.coordinator.records import Block, ModelRecord
from idunno.coordinator.steps import free

_SIZE_BITS: Final = 24  # a block has at most 2**23 bytes
_SIZE_MASK: Final = (1 << _SIZE_BITS) - 1


class References:
    def __init__(self) -> None:
        # count << 24 | size: one small integer a block, for there may be millions
        self._held: dict[BlockId, int] = {}
        self._freed: dict[BlockId, None] = {}
        self._private: dict[BlockId, dict[str, int]] = {}  # mentions by files of jobs, by client

    def add(self, blocks: Iterable[Block], private_to: str | None = None) -> None:
        """`private_to`: the client, when it is a file of a job that mentions them."""
        for block in blocks:
            self._held[block.block] = self._held.get(block.block, block.size & _SIZE_MASK) + (1 << _SIZE_BITS)
            if private_to is not None:
                owners = self._private.setdefault(block.block, {})
                owners[private_to] = owners.get(private_to, 0) + 1

    def remove(self, blocks: Iterable[Block], private_to: str | None = None) -> None:
        for block in blocks:
            if private_to is not None:
                self._forget_private(block.block, private_to)
            left = self._held[block.block] - (1 << _SIZE_BITS)
            if left >> _SIZE_BITS:
                self._held[block.block] = left
            else:
                del self._held[block.block]
                self._freed[block.block] = None

    def _forget_private(self, block: BlockId, owner: str) -> None:
        owners = self._private[block]
        owners[owner] -= 1
        if not owners[owner]:
            del owners[owner]
        if not owners:
            del self._private[block]

    def free(self) -> None:
        """Nobody looks at it any more: let go of it, in steps."""
        free(self._held)

    def is_for(self, block: BlockId, user: str) -> bool:
        """Whether a user may read the block: something mentions it that is his, or that everybody may look at."""
        owners = self._private.get(block)
        if owners is None or user in owners:
            return block in self._held
        return self.count(block) > sum(owners.values())

    def freed(self) -> tuple[BlockId, ...]:
        """The blocks that nothing refers to any more since the last call, in the order in which it happened."""
        if not self._freed:
            return ()
        gone = tuple(block for block in self._freed if block not in self._held)
        self._freed.clear()
        return gone

    def __eq__(self, other: object) -> bool:
        """Whether the same things refer to the same blocks."""
        return isinstance(other, References) and (self._held, self._private) == (other._held, other._private)

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, block: BlockId) -> bool:
        return block in self._held

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[BlockId]:
        """Every block, as first mentioned. Not to be held across awaits."""
        return iter(self._held)

    def size(self, block: BlockId) -> int:
        """In bytes; 0 when nothing refers to it."""
        return self._held.get(block, 0) & _SIZE_MASK

    def count(self, block: BlockId) -> int:
        return self._held.get(block, 0) >> _SIZE_BITS


def model_blocks(record: ModelRecord | None) -> Iterator[Block]:
    """The blocks of a model's files."""
    for file in record.files if record is not None else ():
        yield from file.blocks
