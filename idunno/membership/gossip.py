# idunno/membership/gossip.py: the news that rides on every message, and members drawn at random to hear it.
#
# Rule 1: one piece of news per member, the newest; so the queue is bounded by the number of members.
# Rule 2: least-sent first, among equals the newest; each is sent about 3 * ceil(log2(n + 1)) times and then dropped: after
#         that, all but about n^-4 of the members have heard it (SWIM, section 4.1, with lambda = 3).
# Rule 3: what is taken fits into one datagram.
# Rule 4: nothing here takes time in proportion to the number of members.
from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from idunno.base.ids import NodeId
from idunno.membership.messages import RUMOR_BYTES_BUDGET, RUMORS_MAX, Rumor, rumor_bytes


def sends_wanted(others: int) -> int:
    """How often one change is sent by one node that knows `others` members: 3 * ceil(log2(n + 1)), n with itself."""
    return 3 * max(1, (others + 1).bit_length())


class _Item(msgspec.Struct):
    rumor: Rumor
    size: int
    sent: int = 0


class News:
    def __init__(self) -> None:
        self._queue: dict[NodeId, _Item] = {}
        self._by_sent: list[dict[NodeId, None]] = []  # how often sent -> members, the newest last

    def __bool__(self) -> bool:
        return bool(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, rumor: Rumor) -> None:
        self.discard(rumor.node)
        self._queue[rumor.node] = _Item(rumor, rumor_bytes(rumor))
        self._sent(0)[rumor.node] = None

    def discard(self, node: NodeId) -> None:
        item = self._queue.pop(node, None)
        if item is not None:
            del self._by_sent[item.sent][node]

    def take(self, others: int, first: Sequence[Rumor] = ()) -> tuple[Rumor, ...]:
        """Rumors for one datagram to be sent now: `first` in any case, then the most urgent news that still fits."""
        if not self._queue:
            return tuple(first)
        taken = list(first)
        room = RUMOR_BYTES_BUDGET - sum(map(rumor_bytes, first))
        limit = sends_wanted(others)
        chosen: list[_Item] = []
        for nodes in self._by_sent:
            for node in reversed(nodes):
                item = self._queue[node]
                if len(taken) == RUMORS_MAX or item.size > room:
                    break
                if item.rumor not in first:
                    room -= item.size
                    taken.append(item.rumor)
                    chosen.append(item)
            else:
                continue
            break
        for item in reversed(chosen):  # so that the newest stays the last of its level
            node = item.rumor.node
            del self._by_sent[item.sent][node]
            item.sent += 1
            if item.sent >= limit:
                del self._queue[node]
            else:
                self._sent(item.sent)[node] = None
        return tuple(taken)

    def _sent(self, times: int) -> dict[NodeId, None]:
        while len(self._by_sent) <= times:
            self._by_sent.append({})
        return self._by_sent[times]


class Pool:
    """A set of members from which some are drawn at random; every operation takes constant time."""

    def __init__(self) -> None:
        self._nodes: list[NodeId] = []
        self._at: dict[NodeId, int] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node: NodeId) -> bool:
        return node in self._at

    def keep(self, node: NodeId, wanted: bool) -> None:
        """Have `node` in the set, or not."""
        if wanted == (node in self._at):
            return
        if wanted:
            self._at[node] = len(self._nodes)
            self._nodes.append(node)
        else:
            at, last = self._at.pop(node), self._nodes.pop()
            if last != node:
                self._nodes[at] = last
                self._at[last] = at

    def draw(self, rng: random.Random, count: int, without: Sequence[NodeId] = ()) -> list[NodeId]:
        """Up to `count` different members, none of `without`."""
        drawn = rng.sample(self._nodes, min(len(self._nodes), count + len(without)))
        return [node for node in drawn if node not in without][:count]


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
