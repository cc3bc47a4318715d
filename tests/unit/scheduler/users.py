# Users of a cluster of schedulers: they put files, deploy models, submit jobs, look.
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from idunno.coordinator import commands as c
from idunno.scheduler.config import SchedulerConfig
from idunno.scheduler.messages import (
    DEPLOY,
    GET_JOB,
    SUBMIT,
    WORKER_REPORT,
    DeployModel,
    FileVersion,
    GetJob,
    JobInfo,
    ModelInfo,
    Submit,
    WorkerReport,
)
from idunno.wire.calls import Actor
from tests.unit.coordinator.world import block
from tests.unit.scheduler.cluster import ANN, World


def story(test: Callable[[World], Awaitable[None]], nodes: int = 5, config: SchedulerConfig | None = None) -> None:
    async def run() -> None:
        world = World(nodes, config)
        try:
            await test(world)
        finally:
            await world.stop()

    asyncio.run(run())


def put(world: World, name: str, actor: Actor = ANN) -> None:
    world.do(c.BeginPut(f"put-{name}", name), actor)
    world.do(c.CommitPut(f"put-{name}", name, 10, (block(name),)), actor)


async def deploy(world: World, model: str = "digits", **more: int) -> ModelInfo:
    put(world, f"models/{model}")
    request = DeployModel(model, "onnx", [FileVersion("m.onnx", f"models/{model}", 1)], f"deploy-{model}", **more)
    info = await world.call(DEPLOY, request)
    assert isinstance(info, ModelInfo)
    return info


async def ready(world: World, model: str = "digits") -> None:
    record = world.machine.registry.get(model)
    for worker in record.workers:
        await world.at_leader(WORKER_REPORT, WorkerReport(worker.node, model, record.version), int(worker.node, 16))


async def deployed(world: World, model: str = "digits", **more: int) -> None:
    await deploy(world, model, **more)
    await ready(world, model)


async def submitted(
    world: World, job: str = "j1", actor: Actor = ANN, model: str = "digits", batch: int = 0
) -> JobInfo:
    name = f".idunno/jobs/{job}/input"
    put(world, name, actor)
    info = await world.call(SUBMIT, Submit(job, model, name, 1, "npy", batch), actor)
    assert isinstance(info, JobInfo)
    return info


async def planned(world: World, queries: int, job: str = "j1", batch: int = 10, actor: Actor = ANN) -> None:
    await submitted(world, job, actor, batch=batch)
    world.do(c.PlanJob(job, queries, batch), world.node)


async def info(world: World, job: str = "j1", actor: Actor = ANN, at: int = 3) -> JobInfo:
    found = await world.call(GET_JOB, GetJob(job), actor, at=at)
    assert isinstance(found, JobInfo)
    return found
