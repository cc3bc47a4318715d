# idunno/client/models.py: deploying models, and the operator's questions about them.
from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from idunno.base.errors import DeadlineExceeded, IdunnoError, InvalidArgument, ModelFailed
from idunno.base.ids import check_file_name, check_label
from idunno.client.base import DEPLOY_S, POLL_PAUSE_S, Deadline, new_request
from idunno.client.files import Files
from idunno.scheduler.messages import (
    ASSIGNMENTS,
    BATCH_SIZE,
    DEPLOY,
    EXPLAIN,
    GET_MODEL,
    MODELS,
    RATES,
    TIMES,
    UNDEPLOY,
    BatchSize,
    ByModel,
    DeployModel,
    Explain,
    Explanation,
    FileVersion,
    GetModel,
    ListAssignments,
    ListModels,
    ModelInfo,
    Rates,
    Times,
    UndeployModel,
    WorkerRow,
)
from idunno.wire.calls import Empty

REASON_CHARS: Final = 240
"""Of a reason within an error, which stays readable as one line."""
RUNTIMES: Final = {".onnx": "onnx"}
"""Which runtime serves a file of that suffix."""


class Models(Files):
    async def deploy(
        self,
        model: str,
        path: str | os.PathLike[str],
        *,
        workers: int = 0,
        batch_size: int = 0,
        weight: float = 1.0,
        workers_min: int = 0,
        workers_max: int = 0,
        sent: Callable[[int, int], None] | None = None,
        progress: Callable[[ModelInfo], None] | None = None,
    ) -> ModelInfo:
        """Put the model's file into SDFS, deploy it, and wait until every assigned worker is ready.

        `sent(done, total)` hears of bytes, `progress` of every change of state. Zero means "the scheduler's choice".
        Raises InvalidArgument, OSError, ModelFailed (with each worker's reason), DeadlineExceeded: it may still succeed.
        """
        deadline = self._deadline(DEPLOY_S)
        file, runtime = _model_file(check_label("model", model), Path(path))
        request = new_request()
        name = check_file_name(f".idunno/models/{model}/{request}/{file.name}", system=True)
        put = await self._put_path(file, name, deadline=deadline, system=True, progress=sent)
        try:
            info = await self._ask(
                DEPLOY,
                DeployModel(
                    model=model,
                    runtime=runtime,
                    files=[FileVersion(path=file.name, name=name, version=put.version)],
                    request=request,
                    workers=workers,
                    batch_size=batch_size,
                    weight=weight,
                    workers_min=workers_min,
                    workers_max=workers_max,
                ),
                deadline,
            )
        except IdunnoError as error:
            await self._discard(name, error)
            raise
        return await self._deployed(info, deadline, progress)

    async def _deployed(
        self, info: ModelInfo, deadline: Deadline, progress: Callable[[ModelInfo], None] | None
    ) -> ModelInfo:
        version = info.version
        while True:
            if progress is not None:
                progress(info)
            if info.version > version:
                raise ModelFailed(f"{info.model} version {version} was replaced by version {info.version} meanwhile")
            if info.state == "deployed":
                return info
            if info.state == "failed":
                raise ModelFailed(
                    f"{info.model} version {version} failed: {shortened(_why(info))}; see `idunno explain {info.model}`"
                )
            new = await self._poll(GET_MODEL, _changed_since(info), deadline)
            if new is None:
                raise DeadlineExceeded(
                    f"{info.model} is not deployed after {deadline.total_s:g} s ({_waits(info)}); "
                    f"it goes on: see `idunno explain {info.model}`"
                )
            if new == info:
                await asyncio.sleep(POLL_PAUSE_S)
            info = new

    async def undeploy(self, model: str) -> None:
        await self._ask(UNDEPLOY, UndeployModel(model, new_request()))

    async def models(self) -> list[ModelInfo]:
        """By name."""
        found: list[ModelInfo] = []
        while True:
            answer = await self._ask(MODELS, ListModels(found[-1].model if found else ""))
            found += answer.models
            if not answer.more or not answer.models:
                return found

    async def model(self, model: str) -> ModelInfo:
        """Raises NotFound."""
        return await self._ask(GET_MODEL, GetModel(model))

    async def batch_size(self, model: str, batch_size: int) -> ModelInfo:
        """Queries a task from now on; 0: chosen from the measured cost."""
        return await self._ask(BATCH_SIZE, BatchSize(model, batch_size, new_request()))

    async def rates(self) -> Rates:
        return await self._ask(RATES, Empty())

    async def times(self, model: str) -> Times:
        return await self._ask(TIMES, ByModel(model))

    async def assignments(self) -> list[WorkerRow]:
        """By the nodes' names."""
        found: list[WorkerRow] = []
        while True:
            answer = await self._ask(ASSIGNMENTS, ListAssignments(found[-1].node if found else ""))
            found += answer.workers
            if not answer.more or not answer.workers:
                return found

    async def explain(self, what: str) -> Explanation:
        """Why a model, job or node is where it is. Raises NotFound."""
        return await self._ask(EXPLAIN, Explain(what))


def _model_file(model: str, path: Path) -> tuple[Path, str]:
    size = path.stat().st_size  # whether it is there at all comes first
    runtime = RUNTIMES.get(path.suffix.lower())
    if runtime is None:
        what = "a folder" if path.is_dir() else f"a {path.suffix or 'suffixless'} file"
        raise InvalidArgument(f"{path} is {what}: only .onnx models in this version, `idunno deploy {model} FILE.onnx`")
    if size == 0:
        raise InvalidArgument(f"{path} is empty (0 bytes): give a .onnx model")
    return path, runtime


def _changed_since(seen: ModelInfo) -> Callable[[float], GetModel]:
    return lambda wait_s: GetModel(seen.model, wait_s, seen)


def shortened(reason: str) -> str:
    """For one line: the whole story is in `idunno explain`."""
    return reason if len(reason) <= REASON_CHARS else reason[:REASON_CHARS].rstrip() + " ..."


def _why(info: ModelInfo) -> str:
    reasons = [f"{worker.node}: {worker.error}" for worker in info.workers if worker.error] or info.failures
    return info.reason or "; ".join(reasons[:3]) or "no reason was given"


def _waits(info: ModelInfo) -> str:
    ready = sum(worker.state == "ready" for worker in info.workers)
    missing = [worker.node for worker in info.workers if worker.state != "ready"]
    return f"{ready} of {len(info.workers)} workers ready" + (f", not {', '.join(missing[:5])}" if missing else "")
