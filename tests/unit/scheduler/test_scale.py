# What one change costs the scheduler does not grow with what there is besides it. Looks are counted, nothing is timed.
from __future__ import annotations

import pytest

from idunno.coordinator import commands as c
from idunno.scheduler.leading import Leading
from tests.unit.scheduler.cluster import World, node_id
from tests.unit.scheduler.users import deployed, planned, story


def test_a_task_that_ends_is_looked_at_alone_however_many_of_its_job_are_at_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []
    sync_task = Leading.sync_task

    def counted(self: Leading, job: str, task: int) -> None:
        looked.append(task)
        sync_task(self, job, task)

    monkeypatch.setattr(Leading, "sync_task", counted)

    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 200)
        held = (await world.poll(2, free=10)).leases
        assert len(held) == 10
        looked.clear()
        await world.finish(2, held[3])
        assert looked == [3]
        # Written by the leader before this one, say: nobody here asked for it.
        world.do(c.FailAttempt("j1", 5, node_id(2), 0, "it broke"), world.node)
        assert looked == [3, 5]
        [again] = (await world.poll(3)).leases
        assert (again.task, again.attempt) == (5, 1)

    story(test)
