# Voters follow the roster: from one node to ten by joins and back to one by leaves, through deaths that leave a majority, with
# users at work all along whose history must be linearizable.
from __future__ import annotations

import random

import pytest

from idunno.base.ids import NodeId, Term
from idunno.consensus import events as e
from idunno.coordinator.electorate import next_change, voters_of
from tests.unit.consensus.registers import Registers
from tests.unit.consensus.world import CONFIG, Store

SILENT_MS = 3_000
"""A voter that is silent for so long is replaced; a minute in the product."""


class Growing:
    """A world whose leader does what coordinator/elector.py does."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.world = Registers(10, seed, voters=1, copies=1, loss=0.02)
        self.world.think_ms = 500.0
        self.world.wanted = 1  # that an answer waits for copies is shown elsewhere
        self.names = list(self.world.nodes)
        for name in self.names[1:]:  # not made yet
            self.world.crash(name)
            self.world.nodes[name].store = Store(hard=e.HardState(Term(0)), entries=[])
        self.roster = self.names[:1]
        self.leaving: set[NodeId] = set()
        self.steps = 0

    def run(self, ms: int) -> None:
        """Live on; the leader looks twice a second."""
        end = self.world.now_ms + ms
        while self.world.now_ms < end:
            mark = self._last()
            self.world.run(500)
            self._look(mark)

    def _last(self) -> int:
        leader = self.world.leader()
        return self.world.core(leader).terms.last if leader is not None else 0

    def _look(self, mark: int) -> None:
        world = self.world
        for name in world.up():
            world.step(name, e.SetMembers(frozenset(self.roster)))
        leader = world.leader()
        if leader is None or not mark:
            return
        core = world.core(leader)
        silent_ms = {node: p.unanswered * CONFIG.heartbeat_ms for node, p in core.peers.items()}
        change = next_change(
            self.roster,
            core.voters,
            leader,
            ready={n for n, p in core.peers.items() if silent_ms[n] <= 500 and p.match >= mark and not p.installing},
            silent={n for n in silent_ms if n in core.voters and silent_ms[n] >= SILENT_MS},
            away={n for n in silent_ms if n in core.voters and silent_ms[n] > 500},
            leaving=self.leaving,
        )
        if change is not None:
            self.steps += world.change_voters(leader, core.voters ^ {change.node})

    def until_settled(self) -> None:
        """All live, and as many vote as should."""
        wanted = voters_of(len(set(self.roster) - self.leaving))
        for _ in range(60):
            self.run(500)
            leader = self.world.leader()
            if leader is not None and len(self.world.core(leader).voters - self.leaving) == wanted:
                core = self.world.core(leader)
                if not core.voters & self.leaving and core.named.index <= core.commit:
                    return
        raise AssertionError(f"{self.roster} have not come to {wanted} voters")

    def answers(self) -> None:
        """Users are answered: nobody has to wait for what this world does to it."""
        before = self.world.dose.get("answered", 0)
        self.run(6_000)
        assert self.world.dose["answered"] > before + 10, f"{len(self.roster)} nodes do not answer"

    def deaths(self) -> None:
        """As many voters as leave a majority die, the leader among them by chance; they come back later."""
        leader = self.world.leader()
        assert leader is not None
        voters = sorted(self.world.core(leader).voters)
        dead = self.rng.sample(voters, self.rng.randint(1, (len(voters) - 1) // 2))
        for name in dead:
            self.world.crash(name)
            self.world.count("deaths")
        self.answers()
        for name in dead:
            self.world.start(name)
        self.run(1_000)


@pytest.mark.parametrize("seed", range(1, 3))
def test_from_one_node_to_ten_and_back_through_deaths(seed: int) -> None:
    growing = Growing(seed)
    world = growing.world
    world.begin(6_000)
    growing.run(3_000)
    for name in growing.names[1:]:
        growing.roster.append(name)
        world.start(name)
        growing.until_settled()
        if len(growing.roster) >= 3:
            growing.deaths()
    assert len(world.core(world.elect()).voters) == 7
    growing.answers()
    while len(growing.roster) > 1:
        growing.until_settled()
        gone = growing.rng.choice(growing.roster)
        growing.leaving = {gone}
        growing.until_settled()
        growing.roster.remove(gone)
        growing.run(500)
        world.crash(gone)
        growing.leaving = set()
        if len(growing.roster) >= 3 and growing.rng.random() < 0.5:
            growing.until_settled()
            growing.deaths()
    growing.answers()
    last = growing.roster[0]
    assert world.core(last).voters == {last}
    assert growing.steps >= 14
    assert world.dose["deaths"] >= 8
    world.judge()
    assert world.dose["undecided"] == 0
