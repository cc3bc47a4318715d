# tests/unit/consensus/reigns.py: worlds in which whoever leads is cut off a few appends later, and comes back when the next is.
#
# Rule 1: an append holds one entry, as when entries are large, so a reign may end between any two of them. Then logs end in
#         many terms, and a leader begins with what another left on few nodes: figure 3.7 of the thesis comes about by chance.
from __future__ import annotations

import random
from typing import Any, Final
from unittest.mock import patch

from idunno.base.ids import NodeId, Term
from idunno.consensus.config import RaftConfig
from idunno.consensus.messages import Append, RaftMessage
from tests.unit.consensus.registers import Registers, finish
from tests.unit.consensus.world import World

REIGNS_MS: Final = 10_000
"""Fifteen to forty reigns."""
QUICK: Final = RaftConfig(heartbeat_ms=50, election_timeout_ms=150, election_spread_ms=150)
"""A leader is missed soon: these worlds are about many terms, not about long waits."""
ROUNDS_MAX: Final = 2
"""Appends of a reign, for each node, at most: its no-op, which some cannot take yet, and an old entry that they lack."""
AWAY_MS: Final = 600
"""Then who was cut off comes back, if no other was meanwhile."""


class Reigns:
    """Cuts off the leader of each term behind an append by chance; some of them crash as well."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world, self._rng = world, rng
        self._term, self._left = Term(0), 0
        world.swallows = self._ends_with

    def _ends_with(self, sender: NodeId, message: RaftMessage) -> bool:
        if not isinstance(message, Append) or not message.entries or message.term < self._term:
            return False
        if message.term > self._term:
            self._term, self._left = message.term, self._rng.randint(0, ROUNDS_MAX * len(self._world.nodes))
        if self._left == 0:
            self._cut_off(sender)
            return True
        self._left -= 1
        return False

    def _cut_off(self, leader: NodeId) -> None:
        world, term = self._world, self._term
        others = [name for name in sorted(world.nodes) if name != leader]
        world.split([leader], others)
        world.count("short reigns")
        if self._rng.random() < 0.3:
            world.at(self._rng.randint(0, 100), lambda: self._restart(leader))
        world.at(AWAY_MS, lambda: world.heal() if self._term == term else None)

    def _restart(self, name: NodeId) -> None:
        self._world.crash(name)
        self._world.start(name)
        self._world.count("crashes")


def short_reigns(seed: int, nodes: int, *, operations: int = 400, **planted: Any) -> Registers:
    """Users at work while no leader lasts, then peace; raises AssertionError for whatever must not be."""
    rng = random.Random(seed ^ 0x4E16)
    options: dict[str, Any] = {"loss": rng.choice([0.0, 0.02, 0.1]), "sync_ms": rng.choice([2, 8, 20]), "config": QUICK}
    with patch("idunno.consensus.raft.APPEND_ENTRIES_MAX", 1):
        world = Registers(nodes, seed, **{**options, **planted})
        world.begin(operations)
        Reigns(world, rng)
        world.run(REIGNS_MS)
        world.swallows = lambda sender, message: False
        finish(world)
    return world
