# tests/unit/consensus/registers.py: users of many cores: they write and read registers at once, try again when they must, and
# what they heard must be linearizable.
#
# Rule 1: as the driver answers: a write when it is committed, applied and synced on `copies` nodes, by the leader that appended
#         it; a read at the index that the core says is safe, of the machine of the node that was asked.
# Rule 2: a write that is tried again keeps its number, and the machine does it once.
# Rule 3: users ask deposed leaders too.
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from idunno.base.ids import Index, NodeId, Term
from idunno.consensus import events as e
from idunno.consensus.quorum import reached
from idunno.consensus.raft import Raft
from idunno.coordinator.electorate import voters_of
from tests.simulation.linearizable import (
    DONE,
    OPEN,
    Operation,
    Read,
    Verdict,
    Write,
    check,
    plain,
    register,
    told,
)
from tests.unit.consensus.world import Node, World

KEYS: Final = 2
USERS: Final = 6
DEADLINE_MS: Final = 4_000
SIZES: Final = (3, 5, 7, 10)


@dataclass(slots=True, eq=False)
class Asking:
    """One operation of one user, until it is answered or given up."""

    user: int
    key: int
    asked: Write | Read
    number: int
    begin: int
    over: bool = False


@dataclass(slots=True)
class Machine:
    """What a node's applied entries make of the registers."""

    applied: list[Any]
    at: int = 0
    values: dict[int, int] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)


class Registers(World):
    """`copies`: on how many nodes a write is synced before it is answered. `once`: the machine does a write once."""

    def __init__(
        self,
        nodes: int,
        seed: int,
        *,
        maker: Callable[..., Raft] = Raft,
        copies: int | None = None,
        once: bool = True,
        voters: int = 0,
        **options: Any,
    ) -> None:
        self.operations: dict[int, list[Operation]] = {key: [] for key in range(KEYS)}
        self.wanted = min(4, nodes)
        self.copies, self.once = self.wanted if copies is None else copies, once
        self._waiting: dict[tuple[NodeId, int], list[tuple[Index, Term, Asking]]] = {}  # (node, its boot)
        self._readers: dict[int, Asking] = {}
        self._machines: dict[NodeId, Machine] = {}
        self.think_ms = 60.0
        self._asking: dict[int, Asking] = {}  # of each user, the last
        self._numbers = 0
        voters = voters or voters_of(nodes)
        super().__init__(voters, seed, learners=nodes - voters, maker=maker, **options)
        self.people = random.Random(seed ^ 0xB0B)

    # -- users ------------------------------------------------------------------------------------------------------

    def begin(self, operations: int) -> None:
        for user in range(USERS):
            self._soon(user, operations // USERS)

    def _soon(self, user: int, left: int) -> None:
        if left:
            self.at(int(self.people.expovariate(1 / self.think_ms)), lambda: self._ask(user, left))

    def _ask(self, user: int, left: int) -> None:
        self._numbers += 1
        writes = self.people.random() < 0.5
        asked = Write(self._numbers) if writes else Read()
        asking = Asking(user, self.people.randrange(KEYS), asked, self._numbers, self.now_ms)
        self._asking[user] = asking
        self._try(asking)

        def look() -> None:
            if asking.over or self.now_ms >= asking.begin + DEADLINE_MS:
                if not asking.over:
                    self._end(asking, OPEN)
                self._soon(user, left - 1)
            else:
                self.at(10, look)

        self.at(10, look)

    def _try(self, asking: Asking) -> None:
        if asking.over:
            return
        leaders = [name for name in self.up() if self.core(name).accepts_proposals]
        if not leaders:
            self.at(50, lambda: self._try(asking))
            return
        leaders.sort(key=lambda name: self.core(name).term)
        name = leaders[-1] if self.people.random() < 0.6 else self.people.choice(leaders)
        if isinstance(asking.asked, Read):
            self._reads += 1
            self._readers[self._reads] = asking
            self.step(name, e.Read(self._reads))
        else:
            self.awake(name, lambda: self._give(name, asking))
        self.at(1_500, lambda: self._try(asking) if isinstance(asking.asked, Read) else None)

    def _give(self, name: NodeId, asking: Asking) -> None:
        core = self.nodes[name].core
        if core is None or not core.accepts_proposals or asking.over:
            self.at(50, lambda: self._try(asking))
            return
        assert isinstance(asking.asked, Write)
        place = Index(core.terms.last + 1), core.term, asking
        self._waiting.setdefault((name, self.nodes[name].boot), []).append(place)
        payload = f"{asking.key} {asking.asked.value} {asking.number}".encode()
        self.step(name, e.Propose((payload,)))

    def _end(self, asking: Asking, answer: Any) -> None:
        if asking.over:
            return
        asking.over = True
        if answer is OPEN and isinstance(asking.asked, Read):
            return
        end = None if answer is OPEN else float(self.now_ms)
        self.count("open" if end is None else "answered")
        operation = Operation(float(asking.begin), end, asking.asked, answer, f"u{asking.user}")
        self.operations[asking.key].append(operation)

    # -- what nodes say ---------------------------------------------------------------------------------------------

    def step(self, name: NodeId, event: e.Input) -> None:
        super().step(name, event)
        node = self.nodes[name]
        if node.core is not None:
            self._settle(node)

    def crash(self, name: NodeId) -> None:
        waiting = self._waiting.pop((name, self.nodes[name].boot), [])
        super().crash(name)
        self._again(waiting)

    def _again(self, waiting: list[tuple[Index, Term, Asking]]) -> None:
        """Who asked is told that nobody knows, and mostly tries again."""
        for _, _, asking in waiting:
            if self.people.random() < 0.75:
                self.at(self.people.randint(5, 400), partial(self._try, asking))
            else:
                self._end(asking, OPEN)

    def _settle(self, node: Node) -> None:
        core, key = node.core, (node.name, node.boot)
        waiting = self._waiting.get(key)
        if core is None or not waiting:
            return
        if not core.is_leader or core.term != waiting[0][1]:
            del self._waiting[key]
            self._again(waiting)
            return
        ready = min(len(node.applied), reached(core.copies(), self.copies))
        while waiting and waiting[0][0] <= ready:
            index, term, asking = waiting.pop(0)
            self._check_copies(index, term)
            self._end(asking, DONE)

    def _check_copies(self, index: Index, term: Term) -> None:
        stores = [node.store for node in self.nodes.values()]
        holders = sum(
            index <= s.base
            or (s.snapshot is not None and index <= s.snapshot.index)
            or (index - s.base <= len(s.entries) and s.entries[index - 1 - s.base].term == term)
            for s in stores
        )
        assert holders >= self.wanted, f"seed {self.seed}: entry {index} was answered for with {holders} copies"

    def _do(self, node: Node, output: e.Output) -> None:
        super()._do(node, output)
        match output:
            case e.ReadReady(reads, index):
                for read in reads:
                    if (asking := self._readers.pop(read, None)) is not None:
                        assert len(node.applied) >= index
                        self._end(asking, self._machine(node).values.get(asking.key, 0))
            case e.ReadFailed(reads):
                for read in reads:
                    if (asking := self._readers.pop(read, None)) is not None:
                        self.at(self.people.randint(5, 200), partial(self._try, asking))

    def _machine(self, node: Node) -> Machine:
        machine = self._machines.get(node.name)
        if machine is None or machine.applied is not node.applied:  # it started again, or a snapshot was installed
            machine = self._machines[node.name] = Machine(node.applied)
        for entry in node.applied[machine.at :]:
            words = entry.payload.split()
            if len(words) == 3:
                key, value, number = map(int, words)
                if number not in machine.done or not self.once:
                    machine.done.add(number)
                    machine.values[key] = value
        machine.at = len(node.applied)
        return machine

    # -- judged -----------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        for asking in self._asking.values():
            self._end(asking, OPEN)
        for key, operations in self.operations.items():
            history = plain(operations)
            found = check(register, 0, history)
            assert found.verdict is not Verdict.ILLEGAL, (
                f"seed {self.seed}: register {key} is not linearizable: {told(found, history)}"
            )
            self.count("undecided", found.verdict is Verdict.UNDECIDED)


def storm(seed: int, nodes: int, *, operations: int = 1_000, **planted: Any) -> Registers:
    """Users at work while everything goes wrong at once, then peace; raises AssertionError for whatever must not be."""
    rng = random.Random(seed ^ 0x57013)
    options: dict[str, Any] = {"loss": rng.choice([0.0, 0.02, 0.1, 0.2]), "sync_ms": rng.choice([2, 20, 100])}
    world = Registers(nodes, seed, **{**options, **planted})
    world.begin(operations)
    end = world.now_ms + 20_000
    while world.now_ms < end:
        world.run(rng.randint(50, 400))
        _strike(world, rng)
    finish(world)
    return world


def finish(world: Registers) -> None:
    """Peace, and then the judgement."""
    _mend(world)
    world.run(12_000)
    world.elect()
    world.run(3_000)
    world.check()
    world.judge()


def _strike(world: Registers, rng: random.Random) -> None:
    names = sorted(world.nodes.keys() - world.frozen.keys())
    if len(names) < 2:
        return
    dice = rng.random()
    if rng.random() < 0.04:
        taker = rng.choice(names)
        if world.nodes[taker].core is not None and world.core(taker).commit > 0:
            world.take_snapshot(taker, rng.choice([0, 3, 30]))
    if rng.random() < 0.02 and len(names) > 3:
        for name in [name for name in names if name in world.up()]:
            world.change_voters(name, world.core(name).voters ^ {rng.choice(names)})
    if dice < 0.12:
        _split(world, rng, names)
    elif dice < 0.16:
        a, b = rng.sample(names, 2)
        world.cut |= {(a, b)}
        world.at(rng.randint(200, 2_000), world.heal)
    elif dice < 0.22:
        name = rng.choice(names)
        world.crash(name)
        world.count("crashes")
        world.at(rng.randint(100, 3_000), lambda: _start(world, name))
    elif dice < 0.24:
        for name in names:
            world.crash(name)
        for name in names:
            world.start(name)
        world.count("power losses")
    elif dice < 0.28:
        leader = world.leader()
        if leader in names and leader is not None:
            world.step(leader, e.Transfer())
            world.count("transfers")
    elif dice < 0.32:
        name = world.leader() or rng.choice(names)
        world.freeze(name)
        world.at(rng.randint(200, 4_000), lambda: world.thaw(name))


def _split(world: Registers, rng: random.Random, names: list[NodeId]) -> None:
    """Often with the leader in the smaller part; and often the connections to it are closed, so that the others elect another
    at once, while the old one does not know."""
    rng.shuffle(names)
    leader = world.leader()
    if leader in names and leader is not None and rng.random() < 0.7:
        names.remove(leader)
        names.insert(0, leader)
    at = rng.randint(1, len(names) // 2)
    world.split(names[:at], names[at:])
    world.at(rng.randint(300, 3_000), world.heal)
    if leader == names[0] and rng.random() < 0.6:
        for name in names[at:]:
            world.step(name, e.PeerLost(leader))


def _start(world: Registers, name: NodeId) -> None:
    if world.nodes[name].core is None:
        world.start(name)


def _mend(world: Registers) -> None:
    world.heal()
    world.loss = 0.0
    for name in list(world.frozen):
        world.thaw(name)
    for name in world.nodes:
        if world.nodes[name].core is None:
            world.start(name)
