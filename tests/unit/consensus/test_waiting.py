# Callers that wait for the log (waiting.py, callers.py): what many of them that give up cost.
from __future__ import annotations

import asyncio
import heapq
from types import SimpleNamespace
from typing import Any, cast

import pytest

from idunno.base.errors import DeadlineExceeded, Unavailable
from idunno.base.ids import NodeId
from idunno.consensus import waiting
from idunno.consensus.applying import Applying
from idunno.consensus.callers import EXPIRE_REST_S, Callers
from idunno.consensus.config import RaftConfig
from idunno.consensus.events import Propose, Read
from idunno.consensus.health import Health
from idunno.consensus.raft import Raft
from idunno.consensus.waiting import IndexWaiters
from tests.unit.sdfs.world import run

MANY = 1_000


class Core:
    """A leader whose followers are silent."""

    accepts_proposals = is_leader = True
    leader, voters, peers = NodeId("n1"), ("n1", "n2", "n3"), dict[NodeId, Any]()
    commit = term_start = 0

    def __init__(self) -> None:
        self.terms = SimpleNamespace(last=0)

    def step(self, event: Propose | Read) -> None:
        assert isinstance(event, Propose)
        self.terms.last += len(event.payloads)

    def answering(self, _: int) -> int:
        return 3

    def copies(self) -> list[int]:
        return [self.terms.last, 0, 0]


class CountedCallers(Callers):
    looked = 0

    def _expire(self) -> None:
        self.looked += len(self._proposals)
        super()._expire()


def test_many_who_give_up_together_cost_what_they_are() -> None:
    moved = 0

    def heapify(heap: list[Any]) -> None:
        nonlocal moved
        moved += len(heap)
        heapq.heapify(heap)

    async def work() -> None:
        waiters = IndexWaiters()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(waiting, "heapq", SimpleNamespace(heappush=heapq.heappush, heapify=heapify))
            answers = await asyncio.gather(*(waiters.wait(9, 1.0) for _ in range(MANY)), return_exceptions=True)
        assert all(isinstance(answer, TimeoutError) for answer in answers)
        assert len(waiters) == 0
        assert waiters._heap == []

    run(work)
    assert moved <= MANY


def test_those_who_gave_up_keep_nobody_from_being_answered_and_nobody_out() -> None:
    async def work() -> None:
        waiters = IndexWaiters()
        tasks = [asyncio.create_task(waiters.wait(index, 1.0 if index % 3 else 9.0)) for index in range(1, MANY + 1)]
        await asyncio.sleep(2.0)
        assert len(waiters) == MANY // 3
        assert len(waiters._heap) <= 2 * len(waiters)
        waiters.reached(MANY // 2)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(waiters) == MANY // 3 - MANY // 6
        waiters.fail(Unavailable("nothing is applied here"))
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = [type(answer) for answer in answers[2::3]]
        assert kinds == [type(None)] * (MANY // 6) + [Unavailable] * (MANY // 3 - MANY // 6)
        assert len(waiters) == 0
        assert waiters._heap == []

    run(work)


@pytest.mark.parametrize("count", [3, MANY])
def test_deadlines_that_lie_apart_take_few_looks_and_a_few_are_told_on_the_dot(count: int) -> None:
    async def work() -> None:
        core, config, health = Core(), RaftConfig(), SimpleNamespace(problem=None, stuck=False)
        applying = Applying(lambda index, payload: None, slice_s=1.0, settled=lambda: None)
        callers = CountedCallers(NodeId("n1"), config, applying, cast(Health, health), core.step, 1)
        callers.bind(cast(Raft, core))
        loop = asyncio.get_running_loop()

        async def late_s(timeout_s: float) -> float:
            with pytest.raises(DeadlineExceeded, match=f"no answer after {timeout_s:g} s"):
                await callers.propose(b"x", timeout_s)
            return loop.time() - timeout_s

        began_s = loop.time()
        late = await asyncio.gather(*(late_s(1 + at / 50 / MANY) for at in range(count)))
        assert 0 <= max(late) - began_s <= 2 * EXPIRE_REST_S * count
        assert callers.looked <= 20 * count

    run(work)
