# Whole clusters with users whose history must be linearizable; tests/simulation/prove runs thousands.
from __future__ import annotations

from typing import Any

import pytest

from idunno.consensus.quorum import majority, reached
from idunno.consensus.raft import Raft
from idunno.coordinator.namespace import Namespace
from tests.simulation.consistency import consistent


@pytest.mark.parametrize("nodes", [3, 5])
def test_what_users_hear_is_linearizable_whatever_happens(nodes: int) -> None:
    proof = consistent(1, nodes, operations=300, storm_s=8.0)
    assert proof.counts["undecided"] == 0
    assert proof.counts["put"] > 60
    assert proof.counts["answers"] > 150


def test_an_answer_before_it_is_synced_on_four_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_a_majority(self: Raft) -> list[int]:
        synced = [self.synced, *(p.match for p in self.peers.values())]
        return [reached(synced, majority(len(self.voters)))] * len(synced)

    monkeypatch.setattr(Raft, "copies", of_a_majority)
    with pytest.raises(AssertionError, match=r"answered for entry \d+ with . copies of 4"):
        consistent(1, 5, operations=100, kinds=[])


def test_a_put_that_a_retry_does_again_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(self: Namespace, put: str, name: str, owner: str) -> Any:
        return None

    monkeypatch.setattr(Namespace, "_made_by", forgets)

    def worlds() -> None:  # it is seen in 6 of 14
        for seed in range(1, 13):
            consistent(seed, 3, operations=300, storm_s=8.0, kinds=["kill", "reset", "freeze"])

    with pytest.raises(AssertionError, match=r"made 2 versions|not linearizable"):
        worlds()
