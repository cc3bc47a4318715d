# What a node tells of itself costs the same however much there is to tell of.
from __future__ import annotations

from unittest.mock import MagicMock

import pytest

from idunno.coordinator.ledger import Ledger
from idunno.node.seat import Seat
from tests.unit.coordinator.world import SYSTEM, World, done


def test_status_counts_the_tasks_of_unfinished_jobs_without_a_walk_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.planned(8, 4)
    world.planned(4, 4, "job2")
    world.do(done("job1", 0, 4), SYSTEM)
    node = MagicMock()  # the rest of a node, of which the tasks say nothing
    node.machine = world.machine
    monkeypatch.delattr(
        Ledger, "unfinished"
    )  # 100,000 of them: 0.3 s of the loop, at each status and each follower's question
    monkeypatch.delattr(Ledger, "jobs")
    assert Seat(node)._seen(None).tasks == {"ready": 2, "success": 1, "failed": 0}
