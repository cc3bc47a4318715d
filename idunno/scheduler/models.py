# idunno/scheduler/models.py: calls about models. Any node answers from its machine; the leader picks a deploy's workers.
from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

import msgspec

from idunno.base.errors import Exhausted, IdunnoError, InvalidArgument, NotFound, NotLeader, Unconfirmed
from idunno.base.ids import NodeId, check_label
from idunno.coordinator.commands import Deploy, SetBatchSize, Undeploy
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import ModelFile
from idunno.coordinator.registry import RUNTIMES
from idunno.scheduler import deploy
from idunno.scheduler.cluster import Cluster, at_leader
from idunno.scheduler.config import SchedulerConfig
from idunno.scheduler.leading import Leading
from idunno.scheduler.messages import (
    BATCH_SIZE,
    DEPLOY,
    GET_MODEL,
    MODELS,
    UNDEPLOY,
    BatchSize,
    DeployModel,
    GetModel,
    ListModels,
    ModelInfo,
    Models,
    UndeployModel,
)
from idunno.scheduler.paging import page
from idunno.scheduler.sizing import QUERIES_MAX
from idunno.scheduler.views import model_info
from idunno.scheduler.waiters import Waiters
from idunno.wire.answering import left_s
from idunno.wire.calls import HEADER_BYTES_MAX, Actor, Call, Empty, Registrar

WEIGHT_MIN: Final = 0.001
WEIGHT_MAX: Final = 1000.0
WORKERS_MAX: Final = 10_000
MODELS_MAX: Final = 5_000
"""At one time: a worker is told the names of all its models at once, about 105 bytes each."""
FILES_BYTES_MAX: Final = HEADER_BYTES_MAX - 64 * 1024
"""Of a model's file names and block ids: a worker is told them in one answer. About 12,000 blocks (90 GiB)."""


def check_batch_size(batch_size: int) -> int:
    """Raises InvalidArgument."""
    if not 0 <= batch_size <= QUERIES_MAX:
        raise InvalidArgument(f"batch size {batch_size}: 1 to {QUERIES_MAX} queries a task, or 0 to have it chosen")
    return batch_size


class ModelCalls:
    def __init__(
        self,
        cluster: Cluster,
        me: NodeId,
        config: SchedulerConfig,
        waiters: Waiters,
        leading: Callable[[], Leading | None],
    ) -> None:
        self._cluster, self._me, self._config, self._waiters, self._leading = cluster, me, config, waiters, leading

    def register(self, registrar: Registrar) -> None:
        registrar.register(DEPLOY, self.deploy)
        registrar.register(GET_MODEL, self.get)
        registrar.register(MODELS, self.models)
        registrar.register(UNDEPLOY, self.undeploy)
        registrar.register(BATCH_SIZE, self.batch_size)

    async def deploy(self, call: Call[DeployModel]) -> ModelInfo:
        _check(call.request)
        actor = call.actor

        async def here(timeout_s: float) -> ModelInfo:
            return await self._deploy(call.request, actor, timeout_s)

        return await at_leader(self._cluster, self._leading() is not None, DEPLOY, call, here)

    async def _deploy(self, request: DeployModel, actor: Actor, timeout_s: float) -> ModelInfo:
        if self._leading() is None:
            raise NotLeader("this node is not the scheduler yet")
        machine = self._cluster.machine
        files = tuple(_file(machine, f.path, f.name, f.version) for f in request.files)
        _check_bounds(machine, request.model, files)
        able = deploy.eligible(machine.roster.nodes(), self._me, self._config.scheduler_works)
        wanted = deploy.workers_wanted(request.workers, request.workers_min, request.workers_max, len(able))
        load = deploy.model_load(record for record in machine.registry.models() if record.model != request.model)
        command = Deploy(
            model=request.model,
            runtime=request.runtime,
            files=files,
            workers_wanted=request.workers,
            batch_size=request.batch_size,
            weight=round(request.weight * 1000),
            workers_min=request.workers_min,
            workers_max=request.workers_max,
            assign=deploy.first_workers(wanted, able, load),
        )
        await self._cluster.propose(command, actor=actor, request=request.request, timeout_s=timeout_s)
        return model_info(machine, machine.registry.get(request.model))

    async def get(self, call: Call[GetModel]) -> ModelInfo:
        request = call.request
        machine = await self._cluster.read(left_s(call))
        end_s = asyncio.get_running_loop().time() + min(request.wait_s, self._config.poll_max_s, left_s(call))
        while True:
            info = model_info(machine, machine.registry.get(request.model))
            left = end_s - asyncio.get_running_loop().time()
            if info != request.seen or not await self._waiters.wait(f"model {request.model}", left):
                return info

    async def models(self, call: Call[ListModels]) -> Models:
        machine = await self._cluster.read(left_s(call))
        records = (record for record in machine.registry.models() if record.model > call.request.after)
        return Models(*page(model_info(machine, record) for record in records))

    async def undeploy(self, call: Call[UndeployModel]) -> Empty:
        command = Undeploy(call.request.model)
        await self._cluster.propose(command, actor=call.actor, request=call.request.request, timeout_s=left_s(call))
        return Empty()

    async def batch_size(self, call: Call[BatchSize]) -> ModelInfo:
        request = call.request
        command = SetBatchSize(request.model, check_batch_size(request.batch_size))
        await self._cluster.propose(command, actor=call.actor, request=request.request, timeout_s=left_s(call))
        try:
            machine = await self._cluster.read(left_s(call))
        except IdunnoError as error:
            raise Unconfirmed(f"the batch size is set; {request.model} cannot be read: {error}") from None
        return model_info(machine, machine.registry.get(request.model))


def _check(request: DeployModel) -> None:
    """What can be said without the machine. Raises InvalidArgument."""
    check_label("model", request.model)
    if request.runtime not in RUNTIMES:
        raise InvalidArgument(f"no runtime {request.runtime[:40]!r}: there is {', '.join(RUNTIMES)}")
    check_batch_size(request.batch_size)
    if not (math.isfinite(request.weight) and WEIGHT_MIN <= request.weight <= WEIGHT_MAX):
        raise InvalidArgument(f"weight {request.weight:g}: {WEIGHT_MIN:g} to {WEIGHT_MAX:g} is possible")
    for what, count in (("workers", request.workers), ("least", request.workers_min), ("most", request.workers_max)):
        if not 0 <= count <= WORKERS_MAX:
            raise InvalidArgument(f"{what} workers {count}: 0 to {WORKERS_MAX} is possible")
    if request.workers_max and request.workers_min > request.workers_max:
        raise InvalidArgument(
            f"at least {request.workers_min} and at most {request.workers_max} workers cannot both hold"
        )
    if not request.request:
        raise InvalidArgument("a deploy needs a request id, so that a retry does not deploy twice")


def _check_bounds(machine: Machine, model: str, files: tuple[ModelFile, ...]) -> None:
    """Whether workers can be told of it. Raises InvalidArgument, Exhausted."""
    if len(msgspec.msgpack.encode(files)) > FILES_BYTES_MAX:
        blocks, size = sum(len(file.blocks) for file in files), sum(file.size for file in files)
        raise InvalidArgument(
            f"model {model} has {size} bytes in {len(files)} files and {blocks} blocks, too many to name to a worker "
            f"({FILES_BYTES_MAX} bytes of names): make it of fewer files and blocks"
        )
    if machine.registry.find(model) is None and sum(1 for _ in machine.registry.each()) >= MODELS_MAX:
        raise Exhausted(f"{MODELS_MAX} models are deployed, as many as there can be: undeploy one first")


def _file(machine: Machine, path: str, name: str, version: int) -> ModelFile:
    try:
        stored = machine.namespace.version(name, version)
    except NotFound:
        raise NotFound(f"the model's file {name} version {version} is not in the file store: put it first") from None
    return ModelFile(path, name, version, stored.size, stored.blocks)
