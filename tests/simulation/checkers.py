# tests/simulation/checkers.py: what must hold at every moment of every world, whatever its faults.
#
# Rule 1: a checker listens; it asks nothing of a node that a node would notice.
# Rule 2: machines: the same entry at the same index on every node, applied one after another, and equal digests at equal index.
# Rule 3: consensus: at most one leader in a term; a node's term never goes back, and over restarts never below one it led.
# Rule 4: membership: who is healthy and undisturbed is never called Failed, a dead one is, in time, by all who are undisturbed.
from __future__ import annotations

import hashlib
import logging
from collections import Counter
from typing import TYPE_CHECKING, Final

from idunno.base.ids import Index, NodeId
from idunno.membership.events import Changed
from idunno.membership.messages import State as MemberState
from idunno.node.node import Node
from tests.simulation.loop import State
from tests.simulation.machine import Machine

if TYPE_CHECKING:
    from tests.simulation.world import World

DIGEST_EVERY: Final = 16
"""Entries between two comparisons of whole machines while a world runs; the end of a world compares them again."""
DISTURBED_S: Final = 8.0
"""How long after a fault its echo may still be heard: accusations under way, a detector that waits longer for its own sake."""
COUNTED: Final = frozenset(
    {"snapshot taken", "snapshot taken in", "small contents swept", "copy made", "task given back"}
)
"""What a world's report tells of: faults alone prove little if nothing followed from them."""
NOTICED_S: Final = 6.0
"""A death is known to everybody undisturbed within this."""


class Checkers:
    def __init__(self, world: World) -> None:
        self.world = world
        self.disturbances: list[tuple[float, float, frozenset[str]]] = []
        """(from, until, machines; none means all): when a fault explains that somebody is called dead."""
        self.counts: Counter[str] = Counter()
        """Log lines of COUNTED."""
        self.excuse_accusers = True
        """Whether a fault of who accuses explains that somebody healthy is called dead."""
        self.false_failures = 0
        self.deaths = 0
        """Of which somebody undisturbed had to know."""
        self._entries: dict[int, tuple[bytes, str]] = {}
        self._digests: dict[int, tuple[bytes, str]] = {}
        self._applied: dict[Node, int] = {}
        self._leaders: dict[int, str] = {}
        self._terms: dict[str, int] = {}
        self._quiet: set[str] = set()
        world.on_made.append(self._made)
        world.on_applied.append(self._on_applied)
        world.on_log.append(self._on_log)
        world.on_died.append(self._on_died)

    # -- machines -------------------------------------------------------------------------------------------------

    def _on_applied(self, machine: Machine, node: Node, index: Index, payload: bytes) -> None:
        before = node.driver.applied_index  # more than what was applied before when a snapshot took its place
        if index != before + 1 or index <= self._applied.get(node, 0):
            self.world.found(f"{machine.name} applied entry {index} after {self._applied.get(node, 0)}, at {before}")
        self._applied[node] = index
        self._compare(self._entries, "entry", index, hashlib.blake2b(payload, digest_size=16).digest(), machine.name)
        if index % DIGEST_EVERY == 0:
            self._compare(self._digests, "machine at", index, node.machine.digest(), machine.name)

    def _compare(self, known: dict[int, tuple[bytes, str]], what: str, index: int, value: bytes, who: str) -> None:
        first, by = known.setdefault(index, (value, who))
        if first != value:
            self.world.found(f"{what} {index} differs: {who} has another one than {by}")

    def machines_equal(self) -> None:
        """At the end, when all have applied the same entries."""
        digests = {m.name: m.node.machine.digest() for m in self.world.machines if m.node is not None and m.serving}
        if len(set(digests.values())) > 1:
            told = {name: digest.hex()[:12] for name, digest in digests.items()}
            self.world.found(f"machines differ at equal index: {told}")

    # -- consensus ------------------------------------------------------------------------------------------------

    def _on_log(self, machine: Machine, record: logging.LogRecord) -> None:
        if record.msg in COUNTED:
            self.counts[record.msg] += 1
        if record.msg != "consensus role":
            return
        fields = vars(record)
        term, role = int(fields["term"]), str(fields["role"])
        known = self._terms.get(f"{machine.name}.{machine.starts}", self._terms.get(machine.name, 0))
        if term < known:
            self.world.found(f"the term of {machine.name} goes back from {known} to {term}")
        self._terms[f"{machine.name}.{machine.starts}"] = term
        if role == "leader":
            self._terms[machine.name] = term  # it asked for votes, so the term was on its disk before
            first = self._leaders.setdefault(term, machine.name)
            if first != machine.name:
                self.world.found(f"two leaders in term {term}: {first} and {machine.name}")

    def forget_terms(self, machine: Machine) -> None:
        """Its disk was replaced by an older one: what it promised is lost with the newer."""
        self._terms.pop(machine.name, None)

    @property
    def elections(self) -> int:
        return len(self._leaders)

    # -- membership -----------------------------------------------------------------------------------------------

    def disturb(self, begin: float, end: float, machines: frozenset[str] = frozenset()) -> None:
        self.disturbances.append((begin, end, machines))

    def disturbed(self, since: float, until: float, *machines: str) -> bool:
        return any(
            begin <= until and end >= since and (not about or any(name in about for name in machines))
            for begin, end, about in self.disturbances
        )

    def _made(self, machine: Machine, node: Node) -> None:
        node.membership.subscribe(lambda change: self._changed(machine, change))

    def _changed(self, observer: Machine, change: Changed) -> None:
        world, now = self.world, self.world.scheduler.now
        world.trace.note("member", observer.name, world.name(change.member.node), change.new.value, change.reason)
        if change.new is not MemberState.FAILED:
            return
        subject = world.by_id.get(change.member.node)
        if subject is None or not self._healthy(subject):
            return
        accuser = world.name(change.accuser) if change.accuser else ""
        excused = (subject.name, observer.name, accuser) if self.excuse_accusers else (subject.name,)
        if self.disturbed(now - DISTURBED_S, now, *excused):
            return
        self.false_failures += 1
        world.found(
            f"{observer.name} calls {subject.name} failed, and nothing is wrong with it: {change.reason} ({accuser})"
        )

    def _healthy(self, machine: Machine) -> bool:
        return machine.loop is not None and machine.loop.state is State.RUNNING

    def _on_died(self, machine: Machine, how: str) -> None:
        died = self.world.scheduler.now
        self.disturb(died, died + DISTURBED_S, frozenset({machine.name}))
        if how in ("killed", "lost power"):
            starts = machine.starts
            self.world.loop.call_later(NOTICED_S, self._was_noticed, machine, died, starts)

    def _was_noticed(self, machine: Machine, died: float, starts: int) -> None:
        now = self.world.scheduler.now
        if machine.starts != starts:
            return  # it came back meanwhile
        self.deaths += 1
        for other in self.world.machines:
            if not other.serving or other.node is None or not self._up_since(other, died):
                continue
            if self.disturbed(died - DISTURBED_S, now, other.name):
                continue
            state = _state_of(other.node, machine.id)
            if state in ("active", "suspicious"):
                self.world.found(f"{other.name} takes {machine.name} for {state}, {now - died:.1f} s after its death")

    def _up_since(self, machine: Machine, when: float) -> bool:
        return machine.up_since <= when - 2.0


def _state_of(node: Node, member: NodeId) -> str:
    return next((view.state for view in node.membership.view() if view.node == member), "unknown")
