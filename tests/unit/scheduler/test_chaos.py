"""Workers that die, leaders that change, answers that get lost: every query is answered once, whatever the order."""

from __future__ import annotations

import asyncio
import random

import pytest

from idunno.base.errors import IdunnoError
from idunno.coordinator import commands as c
from idunno.scheduler.config import SchedulerConfig
from idunno.scheduler.messages import (
    ATTEMPT_FAILED,
    DEPLOY,
    WORKER_REPORT,
    AttemptFailed,
    DeployModel,
    FileVersion,
    Lease,
    WorkerReport,
)
from tests.unit.coordinator.world import block
from tests.unit.scheduler.cluster import ANN, World, node_id

WORKERS = (1, 2, 3, 4, 5)


class Chaos:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.world = World(5, SchedulerConfig(scheduler_works="always"))
        self.held: dict[int, list[Lease]] = {n: [] for n in WORKERS}
        self.boot = dict.fromkeys(WORKERS, 0)
        self.jobs = [f"j{n}" for n in range(4)]
        self.failed: set[tuple[str, int]] = set()  # tasks that had an attempt fail on purpose: no second time

    def put(self, name: str) -> None:
        self.world.do(c.BeginPut(f"put-{name}", name), ANN)
        self.world.do(c.CommitPut(f"put-{name}", name, 10, (block(name),)), ANN)

    async def begin(self) -> None:
        world = self.world
        world.lead(1)
        for model in ("a", "b"):
            self.put(f"models/{model}")
            files = [FileVersion("m.onnx", f"models/{model}", 1)]
            await world.call(DEPLOY, DeployModel(model, "onnx", files, f"deploy-{model}"))
            for n in WORKERS:
                await world.at_leader(WORKER_REPORT, WorkerReport(node_id(n), model, 1), n)
        for n, job in enumerate(self.jobs):
            self.put(f".idunno/jobs/{job}/input")
            world.do(c.SubmitJob(job, "ab"[n % 2], f".idunno/jobs/{job}/input", 1, "npy", 3), ANN)
            if n:
                world.do(c.PlanJob(job, 30 + n, 3), world.node)

    async def poll(self, worker: int) -> None:
        held = self.held[worker]
        answer = await self.world.poll(worker, *held, free=self.rng.randint(0, 2), boot=self.boot[worker])
        gone = {(h.job, h.task, h.attempt) for h in answer.drop}
        held[:] = [lease for lease in held if (lease.job, lease.task, lease.attempt) not in gone]
        if self.rng.random() > 0.1:  # else the answer gets lost
            held += answer.leases

    async def step(self, faults: bool) -> None:
        rng, world = self.rng, self.world
        worker = rng.choice(WORKERS)
        held, what = self.held[worker], rng.random()
        if held and what < 0.45:
            lease = held.pop(rng.randrange(len(held)))
            key = (lease.job, lease.task)
            if lease.task < 0:
                world.do(c.PlanJob(lease.job, 31, 3), world.node)
            elif faults and rng.random() < 0.1 and key not in self.failed:
                self.failed.add(key)
                failed = AttemptFailed(node_id(worker), lease.job, lease.task, lease.attempt, "child died")
                await world.at_leader(ATTEMPT_FAILED, failed, worker)
            else:
                await world.finish(worker, lease)
        elif faults and what < 0.47:
            world.lead(rng.choice(WORKERS))
        elif faults and what < 0.49 and not any((lease.job, lease.task) in self.failed for lease in held):
            self.failed |= {(lease.job, lease.task) for lease in held}
            self.boot[worker] += 1
            held.clear()
        else:
            await self.poll(worker)
        for _ in range(rng.randint(0, 3)):
            await asyncio.sleep(0)

    def twice(self) -> list[str]:
        """Tasks that two workers hold, each with a lease that the scheduler thinks good."""
        leading = self.world.leader.service.leading() if self.world.leader is not None else None
        assert leading is not None
        owners = {key: lease.node for key, lease in leading.dispatch.leases.items() if not lease.ended}
        for node, worker in leading.dispatch.workers.items():
            assert all(owners[key] == node for key in worker.leases)
        return [f"{key}" for key in owners if leading.dispatch.queues.is_ready(*key)]


@pytest.mark.parametrize("seed", range(40))
def test_every_query_is_answered_once_whatever_happens(seed: int) -> None:
    async def run() -> None:
        chaos = Chaos(seed)
        world = chaos.world
        try:
            await chaos.begin()
            for step in range(4_000):
                await chaos.step(faults=step < 400)
                assert chaos.twice() == [], f"seed {seed}, step {step}: leased and ready at once"
                if not list(world.machine.ledger.unfinished()):
                    break
            for n, job in enumerate(chaos.jobs):
                record, counts = world.machine.ledger.job(job), world.machine.ledger.counts(job)
                assert record.state == "success", f"seed {seed}: {job} is {record.state} {record.reason} after {step}"
                assert counts.done == record.queries == (30 + n if n else 31)
            assert sum(world.machine.registry.queries_done(m) for m in "ab") == 31 + 31 + 32 + 33
            leading = world.leader.service.leading() if world.leader is not None else None
            assert leading is not None
            assert leading.dispatch.leases == {}
            assert leading._ends == {}
        except IdunnoError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        finally:
            await world.stop()

    asyncio.run(run())
