# idunno/sdfs/locator.py: which node holds which block, as far as the leader knows.
#
# Rule 1: soft state of one term: a new leader begins with nothing and hears it from the nodes; until every present node
#         has reported in full, it is `recovering`, and "nobody holds it" means nothing.
# Rule 2: a node's word about itself is taken. Reports of another term are refused, and changes by a node that has not reported
#         in full since it was away.
# Rule 3: a commit's word is a hint: it lapses at the node's second report after it, which has to say the same.
# Rule 4: whatever changes is answered with the blocks concerned, so that repair need not look at all.
from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from idunno.base.disk import Space
from idunno.base.errors import InvalidArgument, StaleTerm
from idunno.base.ids import BlockId, NodeId, Term
from idunno.sdfs.messages import Inventory

INVENTORY_BLOCKS_MAX: Final = 10_000
"""Blocks in one report: 660 KB, below a message header's 1 MiB."""
LOCATE_BLOCKS_MAX: Final = 1_000
"""Blocks in one question: with 100 nodes 100,000 look-ups, about 5 ms."""


class _Hints:
    """What commits said of a node: since its last report, and before that."""

    __slots__ = ("fresh", "old")

    def __init__(self) -> None:
        self.fresh: dict[BlockId, None] = {}
        self.old: dict[BlockId, None] = {}


class Locator:
    """Copies by node, and what each node said of its disk."""

    def __init__(self, term: Term) -> None:
        self.term = term
        # Sets in order of arrival (dicts without values): what follows from walking them is the same in every run.
        self._held: dict[NodeId, dict[BlockId, None]] = {}
        self._hints: dict[NodeId, _Hints] = {}
        # Full reports under way; they replace `_held` at their end.
        self._coming: dict[NodeId, dict[BlockId, None]] = {}
        self._complete: set[NodeId] = set()
        self._space: dict[NodeId, Space] = {}
        self._floor_bytes: dict[NodeId, int] = {}
        self._problem: dict[NodeId, str] = {}
        self._rotten: dict[NodeId, int] = {}

    def report(self, page: Inventory) -> list[BlockId]:
        """The blocks about which something may have changed.

        Raises StaleTerm for a report to another term's leader or of changes to nothing, InvalidArgument beyond the bound.
        """
        if page.term != self.term:
            raise StaleTerm(f"report for term {page.term}, this is term {self.term}: report anew")
        if len(page.added) + len(page.removed) > INVENTORY_BLOCKS_MAX:
            raise InvalidArgument(f"a report has at most {INVENTORY_BLOCKS_MAX:,} blocks")
        node = page.node
        if not page.first and node not in self._coming and node not in self._complete:
            raise StaleTerm(f"changes from {node}, which has not reported in full in term {self.term}: report anew")
        if page.first:
            self._coming[node] = {}
        for known in (self._held.setdefault(node, {}), self._coming.get(node)):
            if known is not None:
                _take_off(known, page.removed)
                known.update(dict.fromkeys(page.added))
        self._space[node] = Space(page.free_bytes, page.total_bytes)
        if page.floor_bytes >= 0:
            self._floor_bytes[node] = page.floor_bytes
        self._problem[node], self._rotten[node] = page.problem, page.rotten
        changed, gone = dict.fromkeys((*page.added, *page.removed)), list[BlockId]()
        hints = self._hints.get(node)
        if hints is not None:
            _take_off(hints.fresh, page.removed)
            _take_off(hints.old, page.removed)
        if page.last and (whole := self._coming.pop(node, None)) is not None:
            # Page by page both became the same, but for what the node had before and does not say again.
            gone = list(self._held[node]) if len(self._held[node]) > len(whole) else []
            self._held[node] = whole
            self._complete.add(node)
        if hints is not None and node not in self._coming:
            changed.update((block, None) for block in hints.old if block not in self._held[node])
            hints.old, hints.fresh = hints.fresh, {}
            if not hints.old:
                del self._hints[node]
        return [*changed, *gone]

    def stored(self, block: BlockId, nodes: Iterable[NodeId]) -> None:
        """A commit, or the node to which a copy was ordered, says that these have synced the block."""
        for node in nodes:
            self._hints.setdefault(node, _Hints()).fresh[block] = None

    def lacks(self, block: BlockId, node: NodeId) -> None:
        """Who was asked for the block there did not get it. (Its next full report is believed again.)"""
        for known in (self._held.get(node), self._coming.get(node)):
            if known is not None:
                known.pop(block, None)
        if (hints := self._hints.get(node)) is not None:
            hints.fresh.pop(block, None)
            hints.old.pop(block, None)

    def doubt(self, node: NodeId) -> list[BlockId]:
        """The node is away: what it holds counts again when it has reported in full. The blocks concerned."""
        # What commits said of it included: it may come back with all of that.
        self._held.setdefault(node, {}).update(dict.fromkeys(self._hinted(node)))
        self._complete.discard(node)
        self._coming.pop(node, None)
        self._hints.pop(node, None)
        return self.held_by(node)

    def forget(self, node: NodeId) -> list[BlockId]:
        """The node is out of the roster. The blocks concerned."""
        gone = self.doubt(node)
        for known in (self._held, self._space, self._floor_bytes, self._problem, self._rotten):
            known.pop(node, None)
        return gone

    def holders(self, block: BlockId) -> list[NodeId]:
        """Sorted by node id."""
        found = [node for node, blocks in self._held.items() if block in blocks]
        for node, hints in self._hints.items():
            if (block in hints.fresh or block in hints.old) and node not in found:
                found.append(node)
        return sorted(found)

    def held_by(self, node: NodeId) -> list[BlockId]:
        """Each once. Made anew; of a million blocks in 20 ms."""
        return [*self._held.get(node, ()), *self._hinted(node)]

    def _hinted(self, node: NodeId) -> list[BlockId]:
        """What only commits say that it has."""
        held, hints = self._held.get(node, {}), self._hints.get(node) or _Hints()
        return [block for block in dict.fromkeys((*hints.fresh, *hints.old)) if block not in held]

    def count(self, node: NodeId) -> int:
        return len(self._held.get(node, ()))

    def nodes(self) -> list[NodeId]:
        """Who is known to have anything."""
        return list(dict.fromkeys((*self._held, *self._hints, *self._space)))

    def space(self, node: NodeId) -> Space | None:
        return self._space.get(node)

    def floor_bytes(self, node: NodeId) -> int | None:
        """What it keeps free; None when it has not said."""
        return self._floor_bytes.get(node)

    def problem(self, node: NodeId) -> str:
        return self._problem.get(node, "")

    def rotten(self, node: NodeId) -> int:
        return self._rotten.get(node, 0)

    def is_complete(self, node: NodeId) -> bool:
        """Whether the node has reported in full since it was last away."""
        return node in self._complete

    def recovering(self, present: Iterable[NodeId]) -> bool:
        """Whether a present node has not yet reported in full to this term's leader."""
        return any(node not in self._complete for node in present)


def _take_off(known: dict[BlockId, None], blocks: Iterable[BlockId]) -> None:
    for block in blocks:
        known.pop(block, None)
