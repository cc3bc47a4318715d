# idunno/sdfs/hashing.py: a block's name is the BLAKE3 of its content, in 64 hex digits.
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

from blake3 import blake3

from idunno.base.disk import Buffer
from idunno.base.errors import InvalidArgument
from idunno.base.ids import BlockId

T = TypeVar("T")

_BLOCK_ID: Final = re.compile(r"[0-9a-f]{64}")


class Offload(Protocol):
    """Runs work that would hold the event loop for more than about a millisecond somewhere else, and waits for it."""

    async def __call__(self, work: Callable[[], T], /) -> T: ...


def block_id(content: Buffer) -> BlockId:
    return BlockId(blake3(content).hexdigest())


def check_block_id(block: str) -> BlockId:
    """`block` itself if it is a block's name; it becomes part of a path. Raises InvalidArgument."""
    if not _BLOCK_ID.fullmatch(block):
        raise InvalidArgument(f"{block[:80]!r} names no block: 64 hex digits do")
    return BlockId(block)


class Digest:
    """The BLAKE3 of bytes that come in pieces."""

    def __init__(self) -> None:
        self._hash = blake3()

    def update(self, pieces: Sequence[Buffer]) -> None:
        for piece in pieces:
            self._hash.update(piece)

    def block(self) -> BlockId:
        return BlockId(self._hash.hexdigest())
