# idunno/consensus/voters.py: who votes: the entries of the log that say so.
#
# Rule 1: the newest such entry in the log counts, committed or not (Raft thesis, 4.1); when it is cut, the one before it does.
# Rule 2: an entry names all voters. It begins with a byte that no MessagePack begins with, so it is nobody's command.
from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from idunno.base.errors import DecodeError
from idunno.base.ids import Index, NodeId

MARK: Final = 0xC1
VOTERS_MAX: Final = 15
"""Far above what anybody should want: it bounds what is decoded."""


def encode_voters(voters: Iterable[NodeId]) -> bytes:
    return bytes([MARK]) + msgspec.msgpack.encode(sorted(voters))


def names_voters(payload: bytes | memoryview) -> bool:
    return payload[0] == MARK if payload else False


def named_in(payloads: Iterable[bytes]) -> dict[int, frozenset[NodeId]]:
    """The voters that some of these entries name, by their places. Raises DecodeError."""
    return {at: decode_voters(payload) for at, payload in enumerate(payloads) if payload and payload[0] == MARK}


def decode_voters(payload: bytes | memoryview) -> frozenset[NodeId]:
    """Raises DecodeError for anything but 1 to VOTERS_MAX different ids, sorted."""
    try:
        names = msgspec.msgpack.decode(payload[1:], type=list[str])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"entry of {len(payload)} bytes names no voters: {error}") from error
    if not 1 <= len(names) <= VOTERS_MAX or sorted(set(names)) != names or payload[0] != MARK:
        raise DecodeError(
            f"entry of {len(payload)} bytes names {len(names)} voters: 1 to {VOTERS_MAX}, sorted, are possible"
        )
    return frozenset(NodeId(name) for name in names)


class Voters:
    """The voters as the log names them, by index; `first` are those before any entry does, as of index `at`."""

    def __init__(self, first: Iterable[NodeId], at: int = 0) -> None:
        self._named: list[tuple[int, frozenset[NodeId]]] = [(at, frozenset(first))]
        self.now = self._named[-1][1]
        """Those of the newest entry."""

    @property
    def index(self) -> Index:
        """Of the entry that named them."""
        return Index(self._named[-1][0])

    @property
    def before(self) -> frozenset[NodeId]:
        """Those before the newest change, if the log still says."""
        return self._named[-2][1] if len(self._named) > 1 else frozenset()

    def at(self, index: int) -> tuple[int, frozenset[NodeId]]:
        """Those that an entry at or before `index` named, with its index."""
        return next((item for item in reversed(self._named) if item[0] <= index), self._named[0])

    def append(self, index: int, voters: frozenset[NodeId]) -> None:
        self._named.append((index, voters))
        self.now = voters

    def truncate(self, first: int) -> None:
        """The entries from `first` on are gone."""
        while len(self._named) > 1 and self._named[-1][0] >= first:
            self._named.pop()
        self.now = self._named[-1][1]

    def compact(self, index: int) -> None:
        """The entries up to `index` are committed, and no longer in the log."""
        keep = sum(at <= index for at, _ in self._named[1:])
        del self._named[:keep]
