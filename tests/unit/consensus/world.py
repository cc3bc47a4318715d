# tests/unit/consensus/world.py: many Raft cores on one virtual clock, with a network and disks that fail, and the checkers.
#
# Rule 1: two worlds with the same arguments are the same run. Whatever fails is found again by its seed.
# Rule 2: the checkers know only what a user may rely on: what was applied, what was acknowledged, who led which term.
from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from idunno.base.ids import Index, NodeId, Term
from idunno.consensus import events as e
from idunno.consensus.config import RaftConfig
from idunno.consensus.messages import Append, Entry, RaftMessage
from idunno.consensus.raft import Raft
from idunno.consensus.terms import Terms

CONFIG = RaftConfig()


@dataclass(slots=True)
class Store:
    """What survives a crash: synced state only."""

    hard: e.HardState = field(default_factory=lambda: e.HardState(Term(1)))
    entries: list[Entry] = field(default_factory=lambda: [Entry(Term(1), b"first")])

    def save(self, persist: e.Persist) -> None:
        if persist.hard is not None:
            self.hard = persist.hard
        if persist.entries:
            del self.entries[persist.first - 1 :]
            self.entries.extend(persist.entries)


class Node:
    def __init__(self, name: NodeId) -> None:
        self.name, self.store, self.boot = name, Store(), 0
        self.core: Raft | None = None
        self.waiting: deque[e.Persist] = deque()
        self.live: list[Entry] = []  # the log as the core sees it, synced or not
        self.applied: list[Entry] = []
        self.ticks_at = -1
        self.syncing = False


class World:
    """`maker` builds the cores: a test may plant a mistake in them."""

    def __init__(
        self,
        voters: int,
        seed: int,
        *,
        learners: int = 0,
        loss: float = 0.0,
        maker: Callable[..., Raft] = Raft,
        sync_first: bool = True,
        sync_ms: int = 8,
        config: RaftConfig = CONFIG,
    ) -> None:
        self.config = config
        self.seed, self.rng, self.now_ms, self.loss, self.maker = seed, random.Random(seed), 0, loss, maker
        self.sync_first, self.sync_ms = sync_first, sync_ms
        names = [NodeId(f"n{i}") for i in range(1, voters + learners + 1)]
        self.voters, self.learners = names[:voters], names[voters:]
        self.nodes = {name: Node(name) for name in names}
        self.cut: set[tuple[NodeId, NodeId]] = set()  # from, to: what is sent there is lost
        self.swallows: Callable[[NodeId, RaftMessage], bool] = lambda sender, message: False
        self.sent: list[tuple[NodeId, NodeId, RaftMessage]] = []
        self.reads: dict[int, Index | None] = {}
        self.leaders: dict[Term, NodeId] = {}
        self.chosen: list[Entry] = []  # what any node ever applied, by index
        self.dose: dict[str, int] = {}
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = self._reads = 0
        for name in names:
            self.start(name)

    # -- time -------------------------------------------------------------------------------------------------------

    def at(self, after_ms: int, do: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._queue, (self.now_ms + after_ms, self._serial, do))

    def run(self, ms: int) -> None:
        end = self.now_ms + ms
        while self._queue and self._queue[0][0] <= end:
            self.now_ms, _, do = heapq.heappop(self._queue)
            do()
        self.now_ms = end

    def run_until(self, condition: Callable[[], object], ms_max: int = 20_000) -> None:
        end = self.now_ms + ms_max
        while not condition():
            if not self._queue or self._queue[0][0] > end:
                raise TimeoutError(f"seed {self.seed}: not within {ms_max} ms")
            self.now_ms, _, do = heapq.heappop(self._queue)
            do()

    # -- nodes ------------------------------------------------------------------------------------------------------

    def start(self, name: NodeId) -> None:
        node = self.nodes[name]
        node.boot += 1
        node.ticks_at, node.syncing = -1, False
        terms = Terms()
        for entry in node.store.entries:
            terms.append(entry.term, len(entry.payload))
        node.live, node.applied = list(node.store.entries), []
        node.core = self.maker(
            name,
            self.voters,
            self.learners,
            terms,
            node.store.hard,
            self.config,
            random.Random(self.rng.random()),
            self.now_ms,
        )
        self._wind(node)

    def crash(self, name: NodeId) -> None:
        node = self.nodes[name]
        self.count("unsynced lost", len(node.waiting))
        node.core = None
        node.waiting.clear()

    def step(self, name: NodeId, event: e.Input) -> None:
        node = self.nodes[name]
        if node.core is None:
            return
        for output in node.core.handle(event, self.now_ms):
            self._do(node, output)
        self._wind(node)

    def _wind(self, node: Node) -> None:
        assert node.core is not None
        at, boot = node.core.deadline_ms(), node.boot
        if at == node.ticks_at:
            return
        node.ticks_at = at

        def tick() -> None:
            if node.core is not None and node.boot == boot and node.core.deadline_ms() <= self.now_ms:
                node.ticks_at = -1
                self.step(node.name, e.Tick())

        self.at(max(0, at - self.now_ms), tick)

    def _do(self, node: Node, output: e.Output) -> None:
        match output:
            case e.Send(to, message):
                self._send(node.name, to, message)
            case e.SendEntries(to, term, prev_term, first, last, commit, round_):
                entries = tuple(node.live[first - 1 : last])
                self._send(node.name, to, Append(term, Index(first - 1), prev_term, commit, round_, entries))
            case e.Persist():
                if output.entries:
                    del node.live[output.first - 1 :]
                    node.live.extend(output.entries)
                if not self.sync_first:
                    for send in output.then:
                        self._send(node.name, send.to, send.message)
                node.waiting.append(output)
                self._sync_soon(node)
            case e.Committed(index):
                self._apply(node, index)
            case e.RoleChanged(e.RaftRole.LEADER, term, _):
                assert self.leaders.setdefault(term, node.name) == node.name, (
                    f"seed {self.seed}: two leaders in term {term}"
                )
                self.count("leaders")
            case e.ReadReady(reads, index):
                for read in reads:
                    self.reads[read] = index
            case _:
                pass

    def _sync_soon(self, node: Node) -> None:
        if node.syncing or not node.waiting:
            return
        node.syncing, boot, count = True, node.boot, len(node.waiting)

        def synced() -> None:
            if node.boot != boot or node.core is None:
                return
            node.syncing = False
            done = [node.waiting.popleft() for _ in range(count)]
            for persist in done:
                node.store.save(persist)
            if self.sync_first:
                for persist in done:
                    for send in persist.then:
                        self._send(node.name, send.to, send.message)
            self.step(node.name, e.Persisted(done[-1].seq))
            self._sync_soon(node)

        self.at(self.rng.randint(1, self.sync_ms), synced)

    def _send(self, sender: NodeId, to: NodeId, message: RaftMessage) -> None:
        self.sent.append((sender, to, message))
        if (sender, to) in self.cut or self.swallows(sender, message) or self.rng.random() < self.loss:
            return
        copies = 2 if self.rng.random() < self.loss / 2 else 1  # duplicated and, by their delays, reordered
        for _ in range(copies):
            delay = self.rng.randint(1, 60 if self.rng.random() < self.loss else 5)
            self.at(delay, lambda: self.step(to, e.Received(sender, message)))

    # -- what a test does -------------------------------------------------------------------------------------------

    def core(self, name: str) -> Raft:
        core = self.nodes[NodeId(name)].core
        assert core is not None
        return core

    def up(self) -> list[NodeId]:
        return [name for name, node in self.nodes.items() if node.core is not None]

    def leader(self) -> NodeId | None:
        """The leader of the highest term, once the no-op of its term is committed."""
        leaders = [n for n in self.up() if self.core(n).is_leader]
        best = max(leaders, key=lambda n: self.core(n).term, default=None)
        return best if best is not None and self.core(best).commit >= self.core(best).term_start else None

    def elect(self) -> NodeId:
        self.run_until(self.leader)
        leader = self.leader()
        assert leader is not None
        return leader

    def propose(self, name: NodeId, payload: bytes) -> bool:
        if name not in self.up() or not self.core(name).accepts_proposals:
            return False
        self.step(name, e.Propose((payload,)))
        return True

    def read(self, name: NodeId) -> int:
        self._reads += 1
        self.reads[self._reads] = None
        self.step(name, e.Read(self._reads))
        return self._reads

    def split(self, *groups: Iterable[str]) -> None:
        side = {NodeId(name): number for number, group in enumerate(groups) for name in group}
        self.cut = {(a, b) for a in side for b in side if side[a] != side[b]}
        self.count("partitions")

    def heal(self) -> None:
        self.cut = set()

    def count(self, what: str, n: int = 1) -> None:
        self.dose[what] = self.dose.get(what, 0) + n

    # -- checkers ---------------------------------------------------------------------------------------------------

    def _apply(self, node: Node, index: Index) -> None:
        """State machine safety, and leader completeness with it: one entry an index, for ever, on every node."""
        assert index <= len(node.live), f"seed {self.seed}: {node.name} commits {index} of {len(node.live)}"
        for at in range(len(node.applied), index):
            entry = node.live[at]
            if at < len(self.chosen):
                assert entry == self.chosen[at], (
                    f"seed {self.seed}: {node.name} applies {entry} at {at + 1}, not {self.chosen[at]}"
                )
            else:
                self.chosen.append(entry)
            node.applied.append(entry)

    def check(self) -> None:
        """Log matching, and nothing that was ever applied is missing on a majority of the voters' disks."""
        for a in self.nodes.values():
            for b in self.nodes.values():
                shared = min(len(a.live), len(b.live))
                for at in range(shared - 1, -1, -1):
                    if a.live[at].term == b.live[at].term:
                        assert a.live[: at + 1] == b.live[: at + 1], f"seed {self.seed}: logs differ below {at + 1}"
                        break
        last = len(self.chosen)
        holders = [n for n in self.voters if self.nodes[n].store.entries[:last] == self.chosen]
        assert len(holders) > len(self.voters) // 2, (
            f"seed {self.seed}: {last} entries applied, synced on {holders} only"
        )
