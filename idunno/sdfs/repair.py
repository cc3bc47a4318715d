# idunno/sdfs/repair.py: which copies to make next, and which to let go. Soft state of one leader's term.
#
# Rule 1: a copy counts when its node is present, has reported in full since it was last away, and is not being drained.
# Rule 2: fewest copies first, then the longest short. With 2 copies or fewer, and the first 256 MB of the others, at once; the
#         rest after 60 s, for a reboot is no storm. They are counted anew when nothing is short, and when none of the others
#         was copied for 60 s: what can never be copied makes nobody wait for good, and reboots in a row get 256 MB a minute.
#         A node that announced `stopped` is waited for while 3 copies are left.
# Rule 3: who changes something says which blocks are concerned (`touch`), and `judge` looks at a bounded number of them. Long
#         lists are only walked over there: a node with a million blocks comes and goes, and others have their turns.
# Rule 4: a block is in one thing at a time: a copy under way, or a trim.
from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from idunno.base.ids import BlockId, NodeId
from idunno.coordinator.records import BLOCK_BYTES_MAX, COPIES_WANTED
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.placement import Candidate, rank, spread, unable

SOURCES_MAX: Final = 6
LOOKED_AT_MAX: Final = 256
"""Blocks of one urgency that are looked at for one order. Those that only failing nodes could take go to the end of their queue:
behind them may be some for others."""
RATE_WINDOW_MS: Final = 10_000
NAMED_MAX: Final = 10_000
"""Blocks touched at once that are noted one by one, as many as a report has: about 1 ms. A longer list is walked over."""
WALKS_MAX: Final = 16
"""Lists that are walked over; for one more all blocks are. Of 8 MB each when they name a million."""


@dataclass(frozen=True, slots=True)
class Copying:
    """Order: `target` is to get the block from one of `sources`."""

    block: BlockId
    size: int
    target: NodeId
    sources: tuple[NodeId, ...]
    copies: int  # that there are now


@dataclass(frozen=True, slots=True)
class Trimming:
    """Order: when all of `keep` are verified, `drop` may go."""

    block: BlockId
    keep: tuple[NodeId, ...]
    drop: NodeId


@dataclass(slots=True)
class _Short:
    size: int
    copies: int
    missing: int  # to the number wanted
    to_make: int  # now: not more than there are nodes for, less those that are waited for
    lost: bool  # nobody can give it
    since_ms: int


@dataclass(frozen=True, slots=True)
class Nodes:
    """The roster as repair needs it."""

    candidates: tuple[Candidate, ...]
    giving: frozenset[NodeId]  # who is present and has reported in full: their copies can be read
    waited: frozenset[NodeId]  # announced `stopped` and expected back
    unheard: int  # of these, how many have told this leader nothing: they may hold anything
    draining: frozenset[NodeId]

    @property
    def counting(self) -> frozenset[NodeId]:
        """Whose copies count."""
        return self.giving - self.draining

    @property
    def wanted(self) -> int:
        return max(1, min(COPIES_WANTED, sum(c.node not in self.draining for c in self.candidates)))


NOBODY: Final = Nodes((), frozenset(), frozenset(), 0, frozenset())


class RepairCore:
    """`size_of(block)`: its bytes, 0 when nothing refers to it. `everything()`: all blocks that something refers to, listed.
    `holders(block)`: who is known to have it, counting or not. `is_small(block)`: whether it is the content of a small file,
    which all nodes have beside their blocks."""

    def __init__(
        self,
        size_of: Callable[[BlockId], int],
        everything: Callable[[], list[BlockId]],
        holders: Callable[[BlockId], list[NodeId]],
        config: SdfsConfig,
        is_small: Callable[[BlockId], bool] = lambda block: False,
    ) -> None:
        self._is_small, self._everything = is_small, everything
        self._size_of, self._holders, self._config = size_of, holders, config
        self._nodes, self._counting = NOBODY, NOBODY.counting
        self._dirty: dict[BlockId, None] = {}  # touched, to be judged
        self._walks: deque[Iterator[BlockId]] = deque()  # likewise, after these: what is left of long lists
        self._held_back: dict[BlockId, int] = {}  # until when it is not looked at
        self._later: list[tuple[int, BlockId]] = []  # the same, soonest first
        self._short: dict[BlockId, _Short] = {}
        self._queues: tuple[dict[BlockId, None], ...] = tuple({} for _ in range(COPIES_WANTED))  # by copies
        self._lost: dict[BlockId, None] = {}
        self._surplus: dict[BlockId, int] = {}  # since when
        self._busy: dict[BlockId, Copying | Trimming] = {}
        self._load: dict[NodeId, int] = {}  # copies under way by node, as target or first source
        self._avoid: dict[NodeId, int] = {}  # targets that failed: until when they get nothing
        self._early_made, self._early_begun = (
            0,
            0,
        )  # bytes of what had 3 copies: copied since it last began anew; under way
        self._early_made_ms = 0  # when the last of these was copied
        self._done: deque[tuple[int, int]] = deque()  # (when, bytes) of copies made lately
        self.missing = 0
        """Copies that are missing, of all blocks."""
        self.bytes_left = 0
        """That have to be copied for them, as far as there are nodes for them."""

    # -- what changes -------------------------------------------------------------------------------------------------

    def set_nodes(self, nodes: Nodes) -> None:
        """The blocks of nodes that came or went are the caller's to touch."""
        if nodes.wanted != self._nodes.wanted:
            self.touch_all()
        elif self._abilities(nodes) != self._abilities(self._nodes):
            self.touch(list(self._short))  # how many of the missing copies can be made
        self._nodes, self._counting = nodes, nodes.counting

    def _abilities(self, nodes: Nodes) -> object:
        able = tuple((c.node, unable(c, self._config, BLOCK_BYTES_MAX) == "") for c in nodes.candidates)
        return able, nodes.giving, nodes.waited, nodes.unheard, nodes.draining

    def touch(self, blocks: Sequence[BlockId]) -> None:
        """Something may have changed about these. The list is not to be changed any more."""
        if len(blocks) <= NAMED_MAX:
            self._dirty.update(dict.fromkeys(blocks))
        elif len(self._walks) < WALKS_MAX:
            self._walks.append(iter(blocks))
        else:
            self.touch_all()

    def touch_all(self) -> None:
        # What nothing refers to any more may be short or left over, until it is looked at.
        self._walks = deque([iter([*self._short, *self._surplus, *self._everything()])])

    @property
    def unjudged(self) -> bool:
        """Whether blocks were touched that were not judged since."""
        return bool(self._dirty or self._walks)

    def hold_back(self, blocks: Iterable[BlockId], until_ms: int) -> None:
        """Not to be looked at before: what is known of them is about to change. Who is held back already waits no longer."""
        for block in blocks:
            if block not in self._held_back:
                self._held_back[block] = until_ms
                heapq.heappush(self._later, (until_ms, block))

    def judge(self, now_ms: int, limit: int) -> bool:
        """Look at up to `limit` of the touched blocks; whether there are more."""
        while self._later and self._later[0][0] <= now_ms:
            _, block = heapq.heappop(self._later)
            del self._held_back[block]
            self._dirty[block] = None
        looked_at = list(islice(self._dirty, limit))  # not one at a time: each would step over what went before it
        for block in looked_at:
            del self._dirty[block]
        while self._walks and len(looked_at) < limit:
            of_walk = list(islice(self._walks[0], limit - len(looked_at)))
            if not of_walk:
                self._walks.popleft()
            looked_at += of_walk
        for block in looked_at:
            if block not in self._held_back:
                self._judge(block, now_ms)
        if self.unjudged:
            return True  # one node's blocks are whole again, and another's may be short
        if not self._short or now_ms - self._early_made_ms >= self._config.repair_wait_ms:
            self._early_made = 0
        return False

    def _judge(self, block: BlockId, now_ms: int) -> None:
        old = self._short.pop(block, None)
        if old is not None:
            self.missing -= old.missing
            self.bytes_left -= old.to_make * old.size
        new = self._account(block, old.since_ms if old is not None else now_ms)
        for copies, queue in enumerate(self._queues):
            if new is not None and new.to_make and copies == new.copies:
                queue.setdefault(block)  # it keeps its place
            else:
                queue.pop(block, None)
        if new is not None and new.lost:
            self._lost.setdefault(block)
        else:
            self._lost.pop(block, None)
        if new is not None:
            self._short[block] = new
            self.missing += new.missing
            self.bytes_left += new.to_make * new.size

    def _account(self, block: BlockId, now_ms: int) -> _Short | None:
        """What the block lacks."""
        size, nodes = self._size_of(block), self._nodes
        holders = self._holders(block) if size else []
        copies = sum(node in self._counting for node in holders)
        missing = nodes.wanted - copies if size else 0
        if missing < 0:
            self._surplus.setdefault(block, now_ms)
        else:
            self._surplus.pop(block, None)
        if missing <= 0:
            return None
        lost = not any(node in nodes.giving for node in holders)
        if lost and self._is_small(block):
            return None  # the content of a small file that a model refers to: it is in every node's small store
        to_make = missing
        if copies > 2:
            to_make -= sum(node in nodes.waited for node in holders) + nodes.unheard
        room = sum(1 for _ in self._able(size, holders))
        return _Short(size, copies, missing, 0 if lost else max(0, min(to_make, room)), lost, now_ms)

    def _able(self, size: int, holders: Sequence[NodeId]) -> Iterator[Candidate]:
        """Who could take a copy."""
        for candidate in self._nodes.candidates:
            if candidate.node in holders or candidate.node in self._nodes.draining:
                continue
            if not unable(candidate, self._config, size):
                yield candidate

    # -- copying ------------------------------------------------------------------------------------------------------

    def next_copies(self, now_ms: int) -> list[Copying]:
        """Orders to give now. Each is to be ended by `copied` or `not_copied`."""
        orders: list[Copying] = []
        for queue in self._queues:
            looked = 0
            for block in list(islice(queue, LOOKED_AT_MAX + self._config.repair_copies_max)):
                if block in self._busy or block in self._dirty:
                    continue
                if block in self._held_back:
                    queue[block] = queue.pop(block)
                    continue
                if len(self._busy) >= self._config.repair_copies_max or looked >= LOOKED_AT_MAX:
                    break
                looked += 1
                short = self._short[block]
                if not self._is_due(short, now_ms):
                    continue
                targets = self._targets(block, short, now_ms)
                if not targets:
                    queue[block] = queue.pop(block)
                order = self._order(block, short, targets)
                if order is not None:
                    if order.copies > 2:
                        self._early_begun += order.size
                    self._begin(order, order.target, order.sources[0])
                    orders.append(order)
        return orders

    def _is_due(self, short: _Short, now_ms: int) -> bool:
        return (
            short.copies <= 2
            or now_ms - short.since_ms >= self._config.repair_wait_ms
            or self._early_made + self._early_begun + short.size <= self._config.repair_early_bytes
        )

    def _targets(self, block: BlockId, short: _Short, now_ms: int) -> list[Candidate]:
        """Who could take a copy and does not fail, the best first."""
        holders = self._holders(block)
        able = [c for c in self._able(short.size, holders) if self._avoid.get(c.node, 0) <= now_ms]
        zones = {c.zone for c in self._nodes.candidates if c.node in holders}
        return sorted(rank(block, able), key=lambda c: c.zone in zones)  # stable: by the draw within

    def _order(self, block: BlockId, short: _Short, targets: list[Candidate]) -> Copying | None:
        sources = sorted(
            (node for node in self._holders(block) if node in self._nodes.giving),
            key=lambda node: (self._load.get(node, 0), node),
        )
        for candidate in targets if sources else ():
            if self._load.get(candidate.node, 0) < self._config.repair_copies_per_node:
                return Copying(block, short.size, candidate.node, tuple(sources[:SOURCES_MAX]), short.copies)
        return None

    def copied(self, order: Copying, now_ms: int) -> None:
        self._end_copy(order)
        if order.copies > 2:
            self._early_made += order.size
            self._early_made_ms = now_ms
        self._done.append((now_ms, order.size))

    def not_copied(self, order: Copying, now_ms: int, *, blame_target: bool) -> None:
        self._end_copy(order)
        if blame_target:
            self._avoid[order.target] = now_ms + self._config.repair_again_ms
        else:
            self.hold_back([order.block], now_ms + self._config.repair_again_ms // 10)

    def _end_copy(self, order: Copying) -> None:
        self._end(order, order.target, order.sources[0])
        if order.copies > 2:
            self._early_begun -= order.size

    def _begin(self, order: Copying | Trimming, *loaded: NodeId) -> None:
        self._busy[order.block] = order
        for node in loaded:
            self._load[node] = self._load.get(node, 0) + 1

    def _end(self, order: Copying | Trimming, *loaded: NodeId) -> None:
        del self._busy[order.block]
        self.touch([order.block])
        for node in loaded:
            self._load[node] -= 1
            if not self._load[node]:
                del self._load[node]

    # -- trimming -----------------------------------------------------------------------------------------------------

    def next_trims(self, now_ms: int) -> list[Trimming]:
        """Only when nothing more urgent is to be done: orders to be ended by `trimmed`."""
        if any(self._queues[:3]) or self.unjudged:
            return []
        orders: list[Trimming] = []
        for block, since_ms in list(islice(self._surplus.items(), LOOKED_AT_MAX)):
            if len(orders) + len(self._busy) >= self._config.trims_max:
                break
            if block in self._busy or now_ms - since_ms < self._config.trim_wait_ms:
                continue
            order = self._trim(block)
            if order is not None:
                self._begin(order)
                orders.append(order)
        return orders

    def _trim(self, block: BlockId) -> Trimming | None:
        nodes = self._nodes
        counted = [node for node in self._holders(block) if node in self._counting]
        if len(counted) <= nodes.wanted:
            return None
        by_rank = rank(block, [c for c in nodes.candidates if c.node in counted])
        keep, others = spread(by_rank, nodes.wanted)
        return Trimming(block, tuple(c.node for c in keep), others[-1].node)

    def trimmed(self, order: Trimming, now_ms: int, *, done: bool) -> None:
        self._end(order)
        if not done and self._surplus.pop(order.block, None) is not None:
            self._surplus[order.block] = now_ms  # again, after the others

    # -- what is told -------------------------------------------------------------------------------------------------

    @property
    def short(self) -> int:
        """Blocks below their copies."""
        return len(self._short)

    @property
    def surplus(self) -> int:
        return len(self._surplus)

    @property
    def running(self) -> int:
        return sum(isinstance(order, Copying) for order in self._busy.values())

    def lost(self) -> list[BlockId]:
        """Blocks that nobody can give."""
        return list(self._lost)

    def is_short(self, block: BlockId) -> bool:
        """Also when that is not known for sure yet."""
        return bool(self._walks) or block in self._short or block in self._dirty or block in self._held_back

    def begins_s(self, now_ms: int) -> float:
        """Until the next copy is begun: more than 0 when nothing is under way, for what is left has 3 copies and waits."""
        waiting = self._queues[-1]
        if self._busy or self.unjudged or not waiting or any(self._queues[:-1]):
            return 0.0
        short = self._short[next(iter(waiting))]  # the longest short
        if self._is_due(short, now_ms):
            return 0.0
        since_ms = min(short.since_ms, self._early_made_ms) if self._early_made else short.since_ms
        return max(0, since_ms + self._config.repair_wait_ms - now_ms) / 1000

    def estimate_s(self, now_ms: int) -> float | None:
        """Until `bytes_left` is 0, by what was copied in the last 10 s; None when that was nothing."""
        while self._done and self._done[0][0] < now_ms - RATE_WINDOW_MS:
            self._done.popleft()
        if not self.bytes_left:
            return 0.0
        if not self._done:
            return None
        window_ms = max(100, now_ms - self._done[0][0])
        return round(self.bytes_left * window_ms / 1000 / sum(size for _, size in self._done), 1)
