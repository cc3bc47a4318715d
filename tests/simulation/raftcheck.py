# tests/simulation/raftcheck.py: the properties of Raft (Ongaro's thesis, figure 3.2), watched inside the nodes of a world.
#
# Rule 1: log matching: an entry is known by index and term, for ever: what it holds, and which term the entry before it has.
# Rule 2: leader completeness: what is committed in a term is in the log of every leader of a later one. That is not the term of
#         the entry: one that a dead leader left behind may be committed by the next but one, while the next never had it.
# Rule 3: an answer goes out only when its entry is synced on as many nodes as it says, and on as many as the roster asks for.
#         What is synced is taken from the flushes that ended, not from what anybody says of it: a flush of the log, and that
#         of what was found on the disk at a start, where what a crash left unsynced may have survived. What a disk held before
#         it was set back counts for a leader until the machine's new process was judged there: it cannot know any earlier. And
#         again when what the old process had sent before arrives after that: so would the word of one that lives, and is copied.
# Rule 4: election safety and state machine safety are in checkers.py.
from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from idunno.base.ids import Index, NodeId
from idunno.consensus.driver import RaftDriver
from idunno.consensus.events import Input, Output, Persist, Persisted, RaftRole, RoleChanged
from idunno.consensus.messages import AppendAnswer, RaftMessage
from idunno.consensus.standing import Claim, Run
from idunno.node.node import Node
from tests.simulation.machine import Machine
from tests.simulation.world import World


@dataclass(slots=True)
class Held:
    """A log on a disk: behind `base` the terms of its entries; `snapshot`: what one covers."""

    base: int
    snapshot: int
    terms: list[int]
    told: set[str] = field(default_factory=set)
    """Once a disk was set back to less: the nodes that judged a process of the machine since, and so know."""
    gone: set[str] = field(default_factory=set)
    """The nodes that hear a process of the machine that came after that."""

    def holds(self, index: int, term: int) -> bool:
        at = index - 1 - self.base
        return at < 0 or index <= self.snapshot or (at < len(self.terms) and self.terms[at] == term)


class Synced:
    """One machine's log as it certainly is on its disk, and what the disk held before it was set back."""

    def __init__(self) -> None:
        self.log = Held(0, 0, [1])  # a voter's genesis; of no account on a learner
        self.lost: list[Held] = []
        self.waiting: list[Persist] = []

    def order(self, order: Persist) -> None:
        self.waiting.append(order)
        self.log.snapshot = max(self.log.snapshot, order.anew or 0)  # it was renamed before

    def done(self, seq: int) -> None:
        log = self.log
        while self.waiting and self.waiting[0].seq <= seq:
            order = self.waiting.pop(0)
            if order.anew is not None:
                log.base, log.terms = int(order.anew), []
            if order.entries:
                del log.terms[max(0, order.first - 1 - log.base) :]
                log.terms += [entry.term for entry in order.entries]

    def opened(self, driver: RaftDriver) -> None:
        terms, before, self.waiting = driver._core.terms, self.log, []
        held = [int(terms.term(Index(index)) or 0) for index in range(terms.base + 1, terms.last + 1)]
        self.log = Held(int(terms.base), int(terms.base), held)
        if not all(self.log.holds(index, term) for index, term in enumerate(before.terms, before.base + 1)):
            self.lost.append(before)

    def judged(self, by: str) -> None:
        for log in self.lost:
            log.told.add(by)

    def believed(self, by: str) -> None:
        for log in self.lost:
            log.gone.add(by)

    def heard(self, by: str) -> None:
        """The process that `by` hears says what it has."""
        for log in self.lost:
            if by not in log.gone:
                log.told.discard(by)

    def counts(self, leader: str, index: int, term: int) -> bool:
        """Whether that leader may count on this copy: it is here, or it was here and the leader cannot know that it is gone."""
        return self.log.holds(index, term) or any(
            leader not in log.told and log.holds(index, term) for log in self.lost
        )


@dataclass(slots=True)
class Leader:
    """A leader's log when it was elected."""

    term: int
    name: str
    base: int
    terms: list[int]


class RaftChecks:
    def __init__(self, world: World) -> None:
        self.world = world
        self.counts: Counter[str] = Counter()
        self._entries: dict[tuple[int, int], tuple[bytes, int]] = {}  # (index, term) -> content, term before
        self._committed: dict[int, tuple[int, int]] = {}  # index -> its term, and the term in which it was committed
        self._leaders: list[Leader] = []
        self._synced: dict[str, Synced] = {}
        world.on_made.append(self._made)
        world.on_applied.append(self._applied)

    def _made(self, machine: Machine, node: Node) -> None:
        """Around methods of the driver: what it opened, what the core says, what it hears, what callers are answered."""
        driver, callers = node.driver, node.driver._callers
        settle = callers.settle
        needed: dict[int, int] = {}  # entry -> copies needed when it was answered, a turn before its caller hears of it
        start, carry_out, step, propose = driver.start, driver._carry_out, driver._step, driver.propose
        witness = node.vouching.witness
        judge, believe, heard = witness.judge, witness.believe, witness.heard
        synced = self._synced.setdefault(machine.name, Synced())

        async def started() -> None:
            await start()
            synced.opened(driver)

        def carried_out(output: Output) -> None:
            if isinstance(output, Persist):
                synced.order(output)
                self._staged(machine, driver, output)
            elif isinstance(output, RoleChanged) and output.role is RaftRole.LEADER:
                self._elected(machine, driver, output)
            carry_out(output)

        def stepped(event: Input) -> None:
            if isinstance(event, Persisted):
                synced.done(event.seq)
            step(event)

        def settled() -> None:
            before, copies = list(callers._proposals), callers.copies_needed
            settle()
            needed.update((index, copies) for index in before if index not in callers._proposals)

        async def proposed(payload: bytes, timeout_s: float) -> tuple[Index, int, Any]:
            index, copies, value = await propose(payload, timeout_s)
            self._answered(machine, driver, index, copies, needed.pop(index))
            return index, copies, value

        def judged(sender: NodeId, run: Run, claim: Claim, boot_seen: int = 0) -> str:
            self._synced[self.world.by_id[sender].name].judged(by=machine.name)
            return judge(sender, run, claim, boot_seen)

        def believed(sender: NodeId, run: Run) -> str:
            self._synced[self.world.by_id[sender].name].believed(by=machine.name)
            return believe(sender, run)

        def told(sender: NodeId, message: RaftMessage) -> None:
            if isinstance(message, AppendAnswer) and message.ok:
                self._synced[self.world.by_id[sender].name].heard(by=machine.name)
            heard(sender, message)

        vars(witness).update(judge=judged, believe=believed, heard=told)
        vars(callers).update(settle=settled)
        vars(driver).update(start=started, _carry_out=carried_out, _step=stepped, propose=proposed)

    # -- logs -----------------------------------------------------------------------------------------------------

    def _staged(self, machine: Machine, driver: RaftDriver, order: Persist) -> None:
        before = driver._core.terms.term(order.first - 1) if order.entries else None
        for index, entry in enumerate(order.entries, order.first):
            content = hashlib.blake2b(entry.payload, digest_size=8).digest()
            known = self._entries.setdefault((index, entry.term), (content, int(before or 0)))
            if known != (content, int(before or 0)):
                self.world.found(f"logs do not match: {machine.name} has another entry {index} of term {entry.term}")
            before = entry.term
            self.counts["entries"] += 1

    def _elected(self, machine: Machine, driver: RaftDriver, change: RoleChanged) -> None:
        terms = driver._core.terms
        held = [int(terms.term(index) or 0) for index in range(terms.base + 1, terms.last + 1)]
        leader = Leader(change.term, machine.name, terms.base, held)
        self._leaders.append(leader)
        self.counts["elections"] += 1
        for index, (term, by) in self._committed.items():
            self._complete(leader, index, term, by)

    def _applied(self, machine: Machine, node: Node, index: Index, payload: bytes) -> None:
        term = node.driver._core.terms.term(index)
        if term is None or index in self._committed:
            return
        by = node.driver.term  # whose leader applies it first, at once
        self._committed[index] = (term, by)
        for leader in self._leaders:
            self._complete(leader, index, term, by)

    def _complete(self, leader: Leader, index: int, term: int, by: int) -> None:
        at = index - 1 - leader.base
        if leader.term > by and at >= 0 and (at >= len(leader.terms) or leader.terms[at] != term):
            self.world.found(
                f"{leader.name} led term {leader.term} without entry {index} of term {term}, which is committed"
            )

    # -- answers --------------------------------------------------------------------------------------------------

    def _answered(self, machine: Machine, driver: RaftDriver, index: Index, copies: int, needed: int) -> None:
        term = driver._core.terms.term(index)
        self.counts["answers"] += 1
        if term is None:
            return  # a snapshot has taken its place by now
        really = sum(synced.counts(machine.name, index, term) for synced in self._synced.values())
        if really < copies or copies < min(needed, len(self.world.machines)):
            self.world.found(
                f"{machine.name} answered for entry {index} with {copies} copies of {needed}, "
                f"and it is synced on {really}"
            )


def made_once(node: Node) -> list[str]:
    """Exactly once: what each put made, deleted or not. At the end of a world, on any node's machine."""
    names = node.machine.namespace
    made = Counter(record.request for _, record in names.each() if record.request)
    made.update(r.request for entry in names.trash.entries.values() for r in entry.versions if r.request)
    return [f"put {put} made {count} versions" for put, count in made.items() if count > 1]
