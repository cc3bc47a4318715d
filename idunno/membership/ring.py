# idunno/membership/ring.py: who watches whom.
#
# Rule 1: members sorted by id form a ring. A node watches its predecessor, its successor and its super-successor among the
#         Active ones, so every Active member is watched by three others.
# Rule 2: Suspicious members passed on the way are watched as well: they are told of it, and a second accuser can be heard.
#         Whoever else is passed is skipped, so that a run of adjacent dead members of any length is seen across.
from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Final

from idunno.base.ids import NodeId
from idunno.membership.messages import State

SUSPECTS_MAX: Final = 8
"""Suspicious members watched in passing: enough for the three deaths that are survived, and no storm when a switch dies."""


class Ring:
    def __init__(self, me: NodeId) -> None:
        self.me = me
        self.ids: list[NodeId] = []  # sorted, without `me`

    def add(self, node: NodeId) -> None:
        at = bisect_left(self.ids, node)
        if at == len(self.ids) or self.ids[at] != node:
            insort(self.ids, node)

    def discard(self, node: NodeId) -> None:
        at = bisect_left(self.ids, node)
        if at < len(self.ids) and self.ids[at] == node:
            del self.ids[at]

    def watched(self, state_of: Callable[[NodeId], State]) -> tuple[list[NodeId], list[NodeId]]:
        """(predecessor, successor, super-successor without repetition; suspects passed on the way to them)."""
        at = bisect_left(self.ids, self.me)
        size = len(self.ids)
        suspects: list[NodeId] = []

        def walk(order: range, wanted: int) -> list[NodeId]:
            found: list[NodeId] = []
            for step in order:
                node = self.ids[step % size]
                state = state_of(node)
                if state is State.ACTIVE:
                    found.append(node)
                    if len(found) == wanted:
                        break
                elif state is State.SUSPICIOUS and node not in suspects and len(suspects) < SUSPECTS_MAX:
                    suspects.append(node)
            return found

        before = walk(range(at - 1, at - 1 - size, -1), 1)
        after = walk(range(at, at + size), 2)
        return before + [node for node in after if node not in before], suspects
