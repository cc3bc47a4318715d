# Worlds of cores with users whose history must be linearizable; and mistakes, planted one at a time, that must be seen.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from idunno.base.ids import NodeId
from idunno.consensus import events as e
from idunno.consensus.messages import RaftMessage
from idunno.consensus.quorum import majority, reached
from idunno.consensus.raft import Raft
from tests.unit.consensus.registers import SIZES, old_image, storm


@pytest.mark.parametrize("nodes", SIZES)
def test_what_users_hear_is_linearizable_whatever_happens(nodes: int) -> None:
    for seed in range(2):
        world = storm(seed, nodes)
        assert world.dose["answered"] > 800, world.dose
        assert world.dose["undecided"] == 0
        assert world.dose["leaders"] > 1


def test_who_starts_with_an_older_disk_takes_nothing_back() -> None:
    told = 0
    for seed in range(10):
        told += old_image(seed).dose.get("told that its disk is old", 0)
    assert told >= 1


class VoteNotSynced(Raft):
    """Planted: an answer to a candidate leaves before term and vote are on the disk (3.8)."""

    def _answer(self, to: NodeId, message: RaftMessage) -> None:
        self._out.append(e.Send(to, message))


class CommitsOldTerms(Raft):
    """Planted: commits an entry of an older term by counting (figure 3.7)."""

    def _advance_commit(self) -> None:
        matches = self._of_voters(self.synced, {node: p.match for node, p in self.peers.items()})
        self._commit_to(reached(matches, majority(len(self.voters))))
        self._begin_reads()


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
        if self._reads and self.commit >= self._term_start:
            reads, self._reads = tuple(self._reads), []
            self._out.append(e.ReadReady(reads, self.commit))


class VotesWithAnOldImage(Raft):
    """Planted: whoever starts votes at once, and does not notice what it lacks."""

    def _may_vote(self) -> bool:
        self.lost = False
        return not self.halted


def first_seen(world: Callable[..., Any], seeds: range, *sizes: int, **planted: Any) -> tuple[int, str]:
    """How many worlds it took, and what was found."""
    for count, seed in enumerate(seeds, 1):
        try:
            world(seed, *sizes, **planted)
        except AssertionError as error:
            return count, str(error)
        except TimeoutError:
            continue  # a mistake may also stop progress; that is not what is looked for here
    raise AssertionError(f"not seen in {len(seeds)} worlds")
