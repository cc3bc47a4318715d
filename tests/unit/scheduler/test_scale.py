# What one change costs the scheduler does not grow with what there is besides it. Looks are counted, nothing is timed.
from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
import pytest

from idunno.base.errors import NoQuorum
from idunno.coordinator import commands as c
from idunno.coordinator.records import ModelRecord, WorkerRecord
from idunno.scheduler import deploy
from idunno.scheduler.assigned import Assigned
from idunno.scheduler.fairness import CREDIT_GRAINS, FairClock
from idunno.scheduler.leading import JOBS_A_TURN, MODELS_A_TURN, Leading
from idunno.scheduler.queues import Queues
from tests.unit.scheduler.cluster import ANN, ROOT, World, node_id, until
from tests.unit.scheduler.users import deployed, info, planned, put, story


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


def test_whose_turn_it_is_costs_the_same_with_a_thousand_clients_as_with_ten() -> None:
    looks = 0

    class Counting(dict[str, object]):
        def __getitem__(self, key: str) -> object:
            nonlocal looks
            looks += 1
            return super().__getitem__(key)

        def get(self, key: str, default: object = None) -> object:
            nonlocal looks
            looks += 1
            return super().get(key, default)

    def turns(clients: int) -> int:
        nonlocal looks
        clock: FairClock[str] = FairClock()
        for n in range(clients):
            clock.wake(f"c{n}")
        clock._shares = Counting(clock._shares)  # type: ignore[assignment]
        looks = 0
        for turn in range(3 * clients):
            clock.charge(clock.first(), 1 + turn % 7)
        return looks // clients

    assert turns(1_000) == turns(10)


@pytest.mark.parametrize("seed", range(20))
def test_the_order_is_that_of_looking_at_every_client(seed: int) -> None:
    rng = random.Random(seed)
    clock: FairClock[str] = FairClock()
    keys = [f"c{n}" for n in range(12)]
    for _ in range(2_000):
        key, queries = rng.choice(keys), rng.randint(1, 50)
        what = rng.choice(("wake", "rest", "charge", "charge", "refund"))
        if what == "wake":
            clock.wake(key, rng.choice((500, 1_000, 4_000)))
        elif what == "rest":
            clock.rest(key)
        elif what == "charge":
            clock.charge(rng.choice(clock.order() or keys), queries)
        else:
            clock.refund(key, queries)
        active = {k: share for k, share in clock._shares.items() if share.active}
        times = {k: share.time for k, share in active.items()}
        if len(active) > 1:
            least = max(times.values()) - CREDIT_GRAINS * max(share.grain for share in active.values())
            times = {k: max(time, least) for k, time in times.items()}
        assert clock.order() == sorted(times, key=lambda k: (times[k], k))
        assert {k: clock.time(k) for k in times} == times
        assert len(clock) == len(active)
        if active:
            assert clock.first() == clock.order()[0]
            assert clock.lag(key) == max(0.0, max(times.values()) - clock.time(key))


def test_a_new_leader_opens_many_jobs_in_slices_and_in_order_and_takes_over_what_workers_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    add_job = Queues.add_job

    def counted(self: Queues, *args: Any, **more: Any) -> None:
        opened.append(args[0].job)
        add_job(self, *args, **more)

    slices: list[int] = []
    open_some = Leading._open_some

    def sliced(self: Leading) -> None:
        before = len(opened)
        open_some(self)
        slices.append(len(opened) - before)

    monkeypatch.setattr(Leading, "_open_some", sliced)

    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        put(world, "input")
        jobs = [f"j{n}" for n in range(JOBS_A_TURN * 2 + 100)]
        for job in jobs:
            world.do(c.SubmitJob(job, "digits", "input", 1, "npy", 10), ANN)
            world.do(c.PlanJob(job, 20, 10), world.node)
        held = (await world.poll(2, free=3)).leases
        assert [(lease.job, lease.task) for lease in held] == [("j0", 0), ("j0", 1), ("j1", 0)]
        monkeypatch.setattr(Queues, "add_job", counted)
        world.lead(4)
        await asyncio.sleep(0)
        assert opened == []  # nothing of it is lent before the workers have spoken
        assert (await info(world, "j7")).reason.startswith("recovering: the new scheduler waits for")
        assert (await world.poll(2, *held, free=0)).drop == []
        world.do(c.CancelJob("j9"), ANN)
        for worker in (3, 4):
            assert (await world.poll(worker, free=0)).leases == []
        assert opened == ["j0", "j1"]
        leading = world.nodes[node_id(4)].service.leading()
        assert leading is not None
        waiting = asyncio.ensure_future(world.poll(3, wait_s=5))
        await asyncio.sleep(0)
        answer = await world.poll(5, free=0)
        assert answer.leases == []
        assert not leading.dispatch.recovering
        assert [(lease.job, lease.task) for lease in (await waiting).leases] == [("j1", 1)]
        await until(lambda: len(opened) == len(jobs) - 1)
        assert opened == [job for job in jobs if job != "j9"]
        assert max(slices) == JOBS_A_TURN
        assert leading.dispatch.queues.ready_of_model("digits") == 2 * (len(jobs) - 1) - 4

    story(test)


def test_a_job_of_a_million_tasks_is_opened_and_closed_without_looking_at_them() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 1_000_000, batch=1)
        leading = world.nodes[node_id(1)].service.leading()
        assert leading is not None
        [lease] = (await world.poll(2)).leases
        kept = leading.dispatch.queues._jobs["j1"]
        assert (lease.task, kept.out, kept.back) == (0, {0}, [])
        assert leading.dispatch.queues.ready_of_job("j1") == 999_999

    story(test)


def test_a_model_that_changes_is_looked_at_alone_and_a_tick_without_changes_looks_at_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[str] = []
    turns: list[int] = []
    changes, arrange = deploy.changes, Leading._arrange

    def counted(record: ModelRecord, *args: Any) -> Any:
        looked.append(record.model)
        return changes(record, *args)

    def arranged(self: Leading) -> None:
        before = len(looked)
        arrange(self)
        turns.append(len(looked) - before)

    async def test(world: World) -> None:
        world.lead(1)
        models = [f"m{n:02}" for n in range(2 * MODELS_A_TURN + 5)]
        for model in models:
            await deployed(world, model, workers=2)
        leading = world.nodes[node_id(1)].service.leading()
        assert leading is not None
        await until(lambda: not leading._rearrange)
        monkeypatch.setattr(deploy, "changes", counted)
        monkeypatch.setattr(Leading, "_arrange", arranged)
        leading._tick()
        await asyncio.sleep(0)
        assert looked == []
        world.do(c.SetBatchSize("m07", 4), ROOT)
        await until(lambda: not leading._rearrange)
        assert looked == ["m07"]
        looked.clear()
        world.do(c.SetPresence(node_id(5), "stopped", 0, "it stopped"), world.node)
        await until(lambda: not any(node_id(5) == w.node for r in world.machine.registry.models() for w in r.workers))
        assert set(looked) == set(models)
        assert max(turns) == MODELS_A_TURN

    story(test)


def test_what_nodes_hold_is_the_same_kept_or_counted_anew_and_a_change_leaves_the_others_as_they_were() -> None:
    rng = random.Random(7)
    nodes = [node_id(n) for n in range(1, 7)]
    records: dict[str, ModelRecord] = {}
    kept = Assigned([])

    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        base = world.machine.registry.get("digits")
        for step in range(600):
            model = f"m{rng.randrange(6)}"
            before = {node: kept.of(node) for node in nodes}
            concerned = {worker.node for worker in records[model].workers} if model in records else set()
            records.pop(model, None)
            if rng.random() < 0.8:
                workers = tuple(
                    WorkerRecord(node, rng.choice(("assigned", "ready", "failed")), rng.randrange(3))
                    for node in rng.sample(nodes, rng.randint(0, 3))
                )
                concerned |= {worker.node for worker in workers}
                records[model] = msgspec.structs.replace(base, model=model, version=step // 50 + 1, workers=workers)
            kept.changed(model, records.get(model))
            anew = Assigned([records[name] for name in sorted(records)])
            for node in nodes:
                assert kept.of(node) == anew.of(node)
                assert kept.load().get(node, 0) == len(kept.of(node)[1])
                if node not in concerned:
                    assert kept.of(node) is before[node]

    story(test)


def test_a_command_about_a_model_that_came_to_nothing_is_decided_anew_with_the_next_tick() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world, workers=2)
        leading = world.nodes[node_id(1)].service.leading()
        assert leading is not None
        [first, second] = [w.node for w in world.machine.registry.get("digits").workers]
        world.failing = NoQuorum("a majority is away")
        world.do(c.SetPresence(first, "stopped", 0, "it stopped"), world.node)
        await until(lambda: bool(leading._retry))
        assert first in {w.node for w in world.machine.registry.get("digits").workers}
        world.failing = None
        leading._tick()
        await until(lambda: first not in {w.node for w in world.machine.registry.get("digits").workers})
        assert second in {w.node for w in world.machine.registry.get("digits").workers}

    story(test)
