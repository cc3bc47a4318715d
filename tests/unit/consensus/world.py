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
from idunno.consensus.messages import Append, AppendAnswer, Entry, Install, RaftMessage, VoteAnswer
from idunno.consensus.raft import Raft
from idunno.consensus.terms import Terms
from idunno.consensus.voters import Voters, decode_voters, names_voters

CONFIG = RaftConfig()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`content` stands for the machine: everything applied up to `index`."""

    index: Index
    term: Term
    voters: frozenset[NodeId]
    voters_index: Index
    content: tuple[Entry, ...]


@dataclass(slots=True)
class Store:
    """What survives a crash: synced state only."""

    hard: e.HardState = field(default_factory=lambda: e.HardState(Term(1)))
    base: int = 0
    base_term: int = 0
    entries: list[Entry] = field(default_factory=lambda: [Entry(Term(1), b"first")])  # behind the base
    snapshot: Snapshot | None = None

    def save(self, persist: e.Persist) -> None:
        if persist.hard is not None:
            self.hard = persist.hard
        if persist.anew is not None:
            assert self.snapshot is not None
            self._restart(int(persist.anew))
        if persist.entries:
            del self.entries[persist.first - 1 - self.base :]
            self.entries.extend(persist.entries)

    def reconcile(self) -> None:
        """At start: a log that does not reach the snapshot, or differs there, gives way to it (as Log.open does)."""
        taken = self.snapshot
        if taken is None:
            return
        last = self.base + len(self.entries)
        if taken.index > last or (
            taken.index > self.base and self.entries[taken.index - 1 - self.base].term != taken.term
        ):
            self._restart(int(taken.index))
        if self.hard.term < taken.term:
            self.hard = e.HardState(taken.term)

    def _restart(self, base: int) -> None:
        assert self.snapshot is not None
        self.base, self.base_term, self.entries = base, self.snapshot.content[base - 1].term, []

    def compact(self, base: int) -> None:
        self.base_term = self.entries[base - 1 - self.base].term if base > self.base else self.base_term
        del self.entries[: base - self.base]
        self.base = base

    def whole(self) -> list[Entry]:
        before = self.snapshot.content[: self.base] if self.snapshot is not None else ()
        return [*before, *self.entries]


class Node:
    def __init__(self, name: NodeId) -> None:
        self.name, self.store, self.boot = name, Store(), 0
        self.core: Raft | None = None
        self.waiting: deque[e.Persist] = deque()
        self.live: list[Entry] = []  # the log as the core sees it, synced or not, behind `base`
        self.base = 0
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
        self.voters, self.learners = names[:voters], names[voters:]  # at first
        self.nodes = {name: Node(name) for name in names}
        self.frozen: dict[NodeId, list[Callable[[], None]]] = {}  # with what they have yet to do
        self.cut: set[tuple[NodeId, NodeId]] = set()  # from, to: what is sent there is lost
        self.swallows: Callable[[NodeId, RaftMessage], bool] = lambda sender, message: False
        self.sent: list[tuple[NodeId, NodeId, RaftMessage]] = []
        self.reads: dict[int, Index | None] = {}
        self.leaders: dict[Term, NodeId] = {}
        self.chosen: list[Entry] = []  # what any node ever applied, by index
        self.chosen_in: list[Term] = []  # and in which term it was then
        self.dose: dict[str, int] = {}
        self._entries: dict[tuple[int, Term], tuple[Entry, Term]] = {}  # (index, term) -> it, and the term before
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = self._reads = 0
        self._offers: dict[tuple[NodeId, Index], Snapshot] = {}
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
        store = node.store
        store.reconcile()
        taken = store.snapshot
        terms = Terms(store.base, store.base_term)
        named = Voters(self.voters) if taken is None else Voters(taken.voters, taken.voters_index)
        for index, entry in enumerate(store.entries, store.base + 1):
            terms.append(entry.term, len(entry.payload))
            if names_voters(entry.payload) and index > named.index:
                named.append(index, decode_voters(entry.payload))
        node.live, node.base = list(store.entries), store.base
        node.applied = list(taken.content) if taken is not None else []
        node.core = self.maker(
            name,
            named,
            self.nodes.keys(),
            terms,
            store.hard,
            self.config,
            random.Random(self.rng.random()),
            self.now_ms,
            Index(len(node.applied)),
        )
        self._wind(node)

    def crash(self, name: NodeId) -> None:
        node = self.nodes[name]
        self.count("unsynced lost", len(node.waiting))
        self.frozen.pop(name, None)
        node.core = None
        node.waiting.clear()

    def freeze(self, name: NodeId) -> None:
        """It does nothing and hears later."""
        if self.nodes[name].core is not None and name not in self.frozen:
            self.frozen[name] = []
            self.count("freezes")

    def thaw(self, name: NodeId) -> None:
        for do in self.frozen.pop(name, []):
            do()

    def awake(self, name: NodeId, do: Callable[[], None]) -> None:
        """Now, or when it thaws."""
        if name in self.frozen:
            self.frozen[name].append(do)
        else:
            do()

    def step(self, name: NodeId, event: e.Input) -> None:
        node = self.nodes[name]
        if name in self.frozen:
            self.frozen[name].append(lambda: self.step(name, event))
            return
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
                entries = tuple(node.live[first - 1 - node.base : last - node.base])
                self._send(node.name, to, Append(term, Index(first - 1), prev_term, commit, round_, entries))
            case e.Persist():
                if output.anew is not None:
                    assert node.store.snapshot is not None
                    node.live, node.base = [], int(output.anew)
                    node.applied = list(node.store.snapshot.content[: output.anew])
                    self.count("installed")
                if output.entries:
                    del node.live[output.first - 1 - node.base :]
                    node.live.extend(output.entries)
                    self._match(node, output)
                if not self.sync_first:
                    for send in output.then:
                        self._send(node.name, send.to, send.message)
                node.waiting.append(output)
                self._sync_soon(node)
            case e.Committed(index):
                self._apply(node, index)
            case e.SendSnapshot(to, term):
                self._send_snapshot(node, to, term)
            case e.TakeInstall(sender, message):
                self._take_snapshot_in(node, sender, message)
            case e.RoleChanged(e.RaftRole.LEADER, term, _):
                assert self.leaders.setdefault(term, node.name) == node.name, (
                    f"seed {self.seed}: two leaders in term {term}"
                )
                self.count("leaders")
                self._complete(node, term)
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
            if node.name in self.frozen:  # nobody takes the disk's answer
                self.at(50, synced)
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

    # -- snapshots --------------------------------------------------------------------------------------------------

    def take_snapshot(self, name: NodeId, keep: int) -> None:
        """Of what `name` has applied; its log keeps up to `keep` entries before it, and what is not synced."""
        node, core = self.nodes[name], self.core(name)
        index = core.commit
        if node.store.snapshot is None or node.store.snapshot.index < index:
            term = core.terms.term(index)
            assert term is not None
            at, voters = core.named.at(index)
            node.store.snapshot = Snapshot(index, term, voters, Index(at), tuple(node.applied[:index]))
            self.count("snapshots")
        base = min(node.store.snapshot.index - keep, node.store.base + len(node.store.entries), core.synced)
        if base > node.base:
            node.store.compact(base)
            del node.live[: base - node.base]
            node.base = base
            self.step(name, e.Compacted(Index(base)))

    def _send_snapshot(self, node: Node, to: NodeId, term: Term) -> None:
        """Again and again, as long as it is needed: messages get lost."""
        core, boot = node.core, node.boot
        if core is None or not core.is_leader or core.term != term:
            return
        progress, taken = core.peers.get(to), node.store.snapshot
        if progress is None or not progress.installing:
            return
        assert taken is not None, f"seed {self.seed}: {node.name} has cut its log without a snapshot"
        message = Install(term, taken.index, taken.term, 1, 0, b"")
        self._offers[node.name, taken.index] = taken
        self._send(node.name, to, message)
        self.at(300, lambda: self._send_snapshot(node, to, term) if node.boot == boot else None)

    def _take_snapshot_in(self, node: Node, sender: NodeId, message: Install) -> None:
        taken, boot = self._offers[sender, message.index], node.boot

        def durable() -> None:
            old = node.store.snapshot
            if node.core is None or node.boot != boot or node.core.commit >= taken.index:
                return
            if old is None or old.index < taken.index:
                node.store.snapshot = taken
            # A crash may come between the snapshot and the new log behind it; and more messages.
            self.at(0 if self.rng.random() < 0.5 else self.rng.randint(1, 50), install)

        def install() -> None:
            if node.core is not None and node.boot == boot:
                event = e.Installed(sender, taken.index, taken.term, taken.voters, taken.voters_index)
                self.step(node.name, event)

        self.at(self.rng.randint(1, 100), durable)

    def _send(self, sender: NodeId, to: NodeId, message: RaftMessage) -> None:
        self._check_promise(self.nodes[sender], to, message)
        self.sent.append((sender, to, message))
        if (sender, to) in self.cut or self.swallows(sender, message) or self.rng.random() < self.loss:
            return
        copies = 2 if self.rng.random() < self.loss / 2 else 1  # duplicated and, by their delays, reordered
        for _ in range(copies):
            delay = self.rng.randint(1, 60 if self.rng.random() < self.loss else 5)
            self.at(delay, lambda: self.step(to, e.Received(sender, message)))

    def _check_promise(self, node: Node, to: NodeId, message: RaftMessage) -> None:
        """What a message promises is on its sender's disk (3.8)."""
        store, core = node.store, node.core
        match message:
            case VoteAnswer(term, True, False):
                kept = (store.hard.term, store.hard.voted_for) == (term, to) or store.hard.term > term
                assert kept, f"seed {self.seed}: {node.name} votes for {to} in term {term}, its disk says {store.hard}"
            case AppendAnswer(term, True, index) if core is not None and term == core.term:
                end = max(store.base + len(store.entries), store.snapshot.index if store.snapshot is not None else 0)
                assert index <= end, f"seed {self.seed}: {node.name} acknowledges {index}, synced up to {end}"

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

    def change_voters(self, name: NodeId, voters: Iterable[NodeId]) -> bool:
        wanted = frozenset(voters)
        if name not in self.up() or self.core(name).change_refused(wanted):
            return False
        self.step(name, e.ChangeVoters(wanted))
        self.count("changes of voters")
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
        assert index <= node.base + len(node.live), f"seed {self.seed}: {node.name} commits {index} of {len(node.live)}"
        for at in range(len(node.applied), index):
            entry = node.live[at - node.base]
            if at < len(self.chosen):
                assert entry == self.chosen[at], (
                    f"seed {self.seed}: {node.name} applies {entry} at {at + 1}, not {self.chosen[at]}"
                )
            else:
                self.chosen.append(entry)
                assert node.core is not None
                self.chosen_in.append(node.core.term)
            node.applied.append(entry)

    def _match(self, node: Node, persist: e.Persist) -> None:
        """Log matching: index and term say what an entry holds, and with the term before it all that lies before."""
        at = persist.first - 2 - node.base
        before = node.live[at].term if at >= 0 else Term(-1)
        for index, entry in enumerate(persist.entries, persist.first):
            known, known_before = self._entries.setdefault((index, entry.term), (entry, before))
            same = known == entry and (before == known_before or -1 in (before, known_before))
            assert same, f"seed {self.seed}: logs differ: {node.name} has another entry {index} of term {entry.term}"
            before = entry.term

    def _complete(self, node: Node, term: Term) -> None:
        """Leader completeness: what any node applied is in the log of the leader of every later term. One of an earlier term
        may win when it is over: its votes were late."""
        for index in range(node.base, len(self.chosen)):
            entry = self.chosen[index]
            held = node.live[index - node.base] if index - node.base < len(node.live) else None
            assert self.chosen_in[index] >= term or held == entry, (
                f"seed {self.seed}: {node.name} leads term {term} without entry {index + 1}, which was applied"
            )

    def chosen_voters(self) -> frozenset[NodeId]:
        """The voters as of all that was ever applied."""
        named = [decode_voters(entry.payload) for entry in self.chosen if names_voters(entry.payload)]
        return named[-1] if named else frozenset(self.voters)

    def check(self) -> None:
        """Log matching, and nothing that was ever applied is missing on a majority of the voters' disks."""
        for a in self.nodes.values():
            for b in self.nodes.values():
                begin, end = max(a.base, b.base), min(a.base + len(a.live), b.base + len(b.live))
                for at in range(end - 1, begin - 1, -1):
                    if a.live[at - a.base].term == b.live[at - b.base].term:
                        same = a.live[begin - a.base : at + 1 - a.base] == b.live[begin - b.base : at + 1 - b.base]
                        assert same, f"seed {self.seed}: logs differ below {at + 1}"
                        break
        last = len(self.chosen)
        voters = self.chosen_voters()
        holders = [n for n in voters if self.nodes[n].store.whole()[:last] == self.chosen]
        assert len(holders) > len(voters) // 2, f"seed {self.seed}: {last} entries applied, synced on {holders} only"
