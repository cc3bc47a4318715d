# idunno/node/vacant.py: members that are gone, known sooner than the detector of silence can be sure of it.
#
# Rule 1: silence takes the detector its second, and until then every reply waits for a copy on a node that is gone. Two things
#         say more than silence, and the leader writes them into the roster at once:
#         - a connection that is refused where the member listened until now: the word of its own kernel that the process ended;
#         - a deposed leader that the detector accuses too: a majority of the voters has not heard it for an election timeout.
# Rule 2: both are about one process (boot), and about now: they hold for HOLDS_S, by when the detector has its verdict. Were they
#         wrong (an address that went to another machine, a leader that thaws), the detector's word is what counts again.
from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
from msgspec.structs import replace

from idunno.base.ids import NodeId
from idunno.membership.events import MemberView

HOLDS_S: Final = 5.0
"""Over twice what the detector takes for a death."""


class _Word(msgspec.Struct, frozen=True):
    boot: int
    until_s: float
    states: tuple[str, ...]  # of the detector's, in which it counts
    reason: str


class Vacant:
    """`view` is the detector's."""

    def __init__(self, view: Callable[[], list[MemberView]], now_s: Callable[[], float]) -> None:
        self._detector, self._now_s = view, now_s
        self._words: dict[NodeId, _Word] = {}  # at most one a member

    def refused(self, node: NodeId) -> bool:
        """A connection to it was refused. Whether that says anything new."""
        reason = "its process has ended: nothing listens at its address any more"
        return self._keep(node, ("active", "suspicious"), reason)

    def deposed(self, node: NodeId) -> None:
        """It led until a majority of the voters elected another because it was silent."""
        self._keep(node, ("suspicious",), "neither the voters nor the detector hear it")

    def connected(self, node: NodeId) -> None:
        """It listens after all, or again."""
        self._words.pop(node, None)

    def view(self) -> list[MemberView]:
        """The detector's, but for those that are gone."""
        members = self._detector()
        return [self._judge(member) for member in members] if self._words else members

    def _keep(self, node: NodeId, states: tuple[str, ...], reason: str) -> bool:
        for member in self._detector():
            if member.node == node and member.state in ("active", "suspicious"):
                known = self._words.get(node)
                self._words[node] = _Word(member.boot, self._now_s() + HOLDS_S, states, reason)
                return known is None or (known.boot, known.reason) != (member.boot, reason)
        return False

    def _judge(self, member: MemberView) -> MemberView:
        word = self._words.get(member.node)
        if word is None:
            return member
        if member.boot != word.boot or self._now_s() > word.until_s:
            del self._words[member.node]
            return member
        return replace(member, state="failed", reason=word.reason) if member.state in word.states else member
