# idunno/membership/gossip.py: the news that rides on every message.
#
# Rule 1: one piece of news per member, the newest; so the queue is bounded by the number of members.
# Rule 2: least-sent first, among equals the newest; each is sent about 3 * ceil(log2(n + 1)) times and then dropped: after
#         that, all but about n^-4 of the members have heard it (SWIM, section 4.1, with lambda = 3).
# Rule 3: what is taken fits into one datagram.
from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from idunno.base.ids import NodeId
from idunno.membership.messages import RUMOR_BYTES_BUDGET, RUMORS_MAX, Rumor, rumor_bytes


def sends_wanted(others: int) -> int:
    """How often one change is sent by one node that knows `others` members: 3 * ceil(log2(n + 1)), n with itself."""
    return 3 * max(1, (others + 1).bit_length())


@dataclass(slots=True)
class _News:
    rumor: Rumor
    size: int
    serial: int
    sent: int = 0


class News:
    def __init__(self) -> None:
        self._queue: dict[NodeId, _News] = {}
        self._serial = 0

    def __bool__(self) -> bool:
        return bool(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, rumor: Rumor) -> None:
        self._serial += 1
        self._queue[rumor.node] = _News(rumor, rumor_bytes(rumor), self._serial)

    def discard(self, node: NodeId) -> None:
        self._queue.pop(node, None)

    def take(self, others: int, first: Sequence[Rumor] = ()) -> tuple[Rumor, ...]:
        """Rumors for one datagram to be sent now: `first` in any case, then the most urgent news that still fits."""
        if not self._queue:
            return tuple(first)
        taken = list(first)
        room = RUMOR_BYTES_BUDGET - sum(map(rumor_bytes, first))
        limit = sends_wanted(others)
        urgent = heapq.nsmallest(RUMORS_MAX, self._queue.values(), key=lambda news: (news.sent, -news.serial))
        for news in urgent:
            if len(taken) == RUMORS_MAX:
                break
            if news.size > room or news.rumor in first:
                continue
            room -= news.size
            taken.append(news.rumor)
            news.sent += 1
            if news.sent >= limit:
                del self._queue[news.rumor.node]
        return tuple(taken)


def pieces(rumors: Sequence[Rumor]) -> list[tuple[Rumor, ...]]:
    """A whole list cut into what fits one datagram each, in order."""
    cut: list[tuple[Rumor, ...]] = []
    piece: list[Rumor] = []
    room = RUMOR_BYTES_BUDGET
    for rumor in rumors:
        size = rumor_bytes(rumor)
        if piece and (size > room or len(piece) == RUMORS_MAX):
            cut.append(tuple(piece))
            piece, room = [], RUMOR_BYTES_BUDGET
        piece.append(rumor)
        room -= size
    if piece:
        cut.append(tuple(piece))
    return cut
