# Worlds of cores with users whose history must be linearizable; and mistakes, planted one at a time, that must be seen.
from __future__ import annotations

from typing import Any

import pytest

from idunno.base.ids import NodeId
from idunno.consensus import events as e
from idunno.consensus.messages import RaftMessage
from idunno.consensus.raft import Raft
from tests.unit.consensus.registers import SIZES, storm


@pytest.mark.parametrize("nodes", SIZES)
def test_what_users_hear_is_linearizable_whatever_happens(nodes: int) -> None:
    operations = 1_000 if nodes <= 5 else 400
    world = storm(nodes, nodes, operations=operations)
    assert world.dose["answered"] > 0.8 * operations, world.dose
    assert world.dose["undecided"] == 0
    assert world.dose["leaders"] > 1


class VoteNotSynced(Raft):
    """Planted: an answer to a candidate leaves before term and vote are on the disk (3.8)."""

    def _answer(self, to: NodeId, message: RaftMessage) -> None:
        self._out.append(e.Send(to, message))


class NoNoOp(Raft):
    """Planted: a new leader takes what it knows to be committed for all that is (6.4)."""

    def _append_own(self, payloads: tuple[bytes, ...]) -> None:
        if payloads == (b"",):
            self._term_start = 0
        else:
            super()._append_own(payloads)


class ReadsWithoutARound(Raft):
    """Planted: a leader that may be deposed answers reads from what it has (6.4)."""

    def _begin_reads(self) -> None:
        if self.commit >= self._term_start and (reads := self._reads.take_waiting()):
            self._out.append(e.ReadReady(reads, self.commit))


WORLDS_MAX = 40
"""A change of the core changes what a seed does; one that sees is found again nearby."""

PLANTED: dict[
    str, tuple[dict[str, Any], int, int, str]
] = {  # how, nodes, the first seed (one that sees it), what is found
    "a vote that is not synced": ({"maker": VoteNotSynced}, 3, 0, "votes for"),
    "no no-op at the beginning of a term": ({"maker": NoNoOp}, 5, 1, "not linearizable"),
    "reads without a round": ({"maker": ReadsWithoutARound}, 5, 1, "not linearizable"),
    "a retry that is done again": ({"once": False}, 3, 0, "not linearizable"),
    "an answer before it is synced on four": ({"copies": 1}, 5, 0, "answered for with 3 copies"),
}


def storms(seeds: range, nodes: int, planted: dict[str, Any]) -> None:
    for seed in seeds:
        storm(seed, nodes, **planted)


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_mistake_is_seen(what: str) -> None:
    planted, nodes, first, match = PLANTED[what]
    with pytest.raises(AssertionError, match=match):
        storms(range(first, first + WORLDS_MAX), nodes, planted)
