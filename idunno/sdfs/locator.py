# idunno/sdfs/locator.py: which node holds which block, as far as the leader knows.
#
# Rule 1: soft state of one term: a new leader begins with nothing and hears it from the nodes; until every present node
#         has reported in full, it is `recovering`, and "nobody holds it" means nothing.
# Rule 2: a node's word about itself is taken; a commit's word is added to it. Reports of another term are refused.
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


class Locator:
    """Copies by node, and each node's free space."""

    def __init__(self, term: Term) -> None:
        self.term = term
        self._held: dict[NodeId, set[BlockId]] = {}
        self._coming: dict[NodeId, set[BlockId]] = {}  # full reports under way; they replace `_held` at their end
        self._complete: set[NodeId] = set()
        self._space: dict[NodeId, Space] = {}

    def report(self, page: Inventory) -> None:
        """Raises StaleTerm for a report to another term's leader, InvalidArgument beyond the bound."""
        if page.term != self.term:
            raise StaleTerm(f"report for term {page.term}, this is term {self.term}: report anew")
        if len(page.added) + len(page.removed) > INVENTORY_BLOCKS_MAX:
            raise InvalidArgument(f"a report has at most {INVENTORY_BLOCKS_MAX:,} blocks")
        if page.first:
            self._coming[page.node] = set()
        for known in (self._held.setdefault(page.node, set()), self._coming.get(page.node)):
            if known is not None:
                known.difference_update(page.removed)
                known.update(page.added)
        if page.last and (whole := self._coming.pop(page.node, None)) is not None:
            self._held[page.node] = whole
            self._complete.add(page.node)
        self._space[page.node] = Space(page.free_bytes, page.total_bytes)

    def stored(self, block: BlockId, nodes: Iterable[NodeId]) -> None:
        """A commit says that these nodes have synced the block."""
        for node in nodes:
            self._held.setdefault(node, set()).add(block)
            if (coming := self._coming.get(node)) is not None:
                coming.add(block)

    def forget(self, node: NodeId) -> None:
        """The node is out of the roster."""
        for known in (self._held, self._coming, self._space):
            known.pop(node, None)
        self._complete.discard(node)

    def holders(self, block: BlockId) -> list[NodeId]:
        """Sorted by node id."""
        return sorted(node for node, blocks in self._held.items() if block in blocks)

    def nodes(self) -> list[NodeId]:
        """Who is known to have anything."""
        return [*self._held, *(node for node in self._space if node not in self._held)]

    def space(self, node: NodeId) -> Space | None:
        return self._space.get(node)

    def recovering(self, present: Iterable[NodeId]) -> bool:
        """Whether a present node has not yet reported in full to this term's leader."""
        return any(node not in self._complete for node in present)
