# idunno/worker/models.py: a model that this worker is to hold: its files here, its processes running.
#
# Rule 1: a model has one process from the start, and gets more, up to the worker's slots, only when tasks need them.
# Rule 2: a process that dies is replaced with back-off. While none is there the model is not ready, and tasks for it are given
#         back: they wait at the scheduler, where every worker can take them.
# Rule 3: a first set-up that fails is reported at once; a restart that fails, after RESTARTS_MAX in a row.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from idunno.base.errors import IdunnoError, ModelFailed, NotReady
from idunno.coordinator.records import ModelFile
from idunno.scheduler.messages import Assignment
from idunno.worker.cache import Cache, Part, Pin
from idunno.worker.runner import Runner, RunnerFactory

log = logging.getLogger("idunno.worker")

LOAD_S: Final = 120.0
"""For a model of a few GB from a slow disk."""
BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0
RESTARTS_MAX: Final = 3

MODEL: Final[dict[str, dict[str, str]]] = {
    "fetching": {"fetched": "loading", "failed": "failed", "closed": "closed"},
    "loading": {"loaded": "ready", "failed": "failed", "closed": "closed"},
    "ready": {"died": "restarting", "closed": "closed"},
    "restarting": {"loaded": "ready", "failed": "failed", "closed": "closed"},
    "failed": {"closed": "closed"},
    "closed": {"closed": "closed"},
}


class WarmRunners:
    """Starts processes; with `keep_one`, one is always started ahead, its runtime imported."""

    def __init__(self, spawn: RunnerFactory, *, keep_one: bool) -> None:
        self._spawn, self._keep_one = spawn, keep_one
        self._next: asyncio.Task[Runner] | None = None

    def warm(self) -> None:
        if self._keep_one and self._next is None:
            self._next = asyncio.create_task(self._start(), name="warm runner")

    async def take(self) -> Runner:
        """A process without a model; the caller closes it. Raises ModelFailed when none can be started."""
        warm, self._next = self._next, None
        try:
            if warm is not None:
                runner = await warm
                if runner.alive:
                    return runner
                await runner.close()
            return await self._start()
        finally:
            self.warm()

    async def close(self) -> None:
        warm, self._next, self._keep_one = self._next, None, False
        if warm is not None:
            warm.cancel()
            await asyncio.wait([warm])
            if not warm.cancelled() and warm.exception() is None:
                await warm.result().close()

    async def _start(self) -> Runner:
        try:
            return await self._spawn()
        except ModelFailed as error:
            log.error("process for models did not start", extra={"error": str(error)})
            raise


class Host:
    """One version of a model on this worker. `changed` is called after every change of `state`."""

    def __init__(
        self,
        assignment: Assignment,
        cache: Cache,
        runners: WarmRunners,
        *,
        slots: int,
        threads: int,
        local_path: Callable[[str], str],
        files_of: Callable[[Assignment], Awaitable[Sequence[ModelFile]]],
        changed: Callable[[Host], None],
    ) -> None:
        self.assignment, self.state, self.error = assignment, "fetching", ""
        self._cache, self._runners, self._slots, self._threads = cache, runners, slots, threads
        self._local_path, self._files_of, self._changed = local_path, files_of, changed
        self._pin: Pin | None = None
        self._idle: list[Runner] = []
        self._count = 0  # processes, busy and starting ones included
        self._crashes = 0  # in a row, without a task done in between
        self._none_left = asyncio.Event()
        self._life: asyncio.Task[None] | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.assignment.model, self.assignment.version

    def start(self) -> None:
        """Set it up in the background, and keep it up."""
        self._life = asyncio.create_task(self._live(), name=f"model {self.assignment.model}")
        self._life.add_done_callback(self._ended)

    async def acquire(self) -> Runner:
        """A process with the model loaded, for one task; `release` it. Raises NotReady when there is none now, and ModelFailed
        when a further one could not be started."""
        if self.state != "ready":
            raise NotReady(f"model {self.assignment.model} is {self.state} here")
        while self._idle:
            runner = self._idle.pop()
            if runner.alive:
                return runner
            await self._bury(runner, crashed=True)
            if self.state != "ready":
                raise NotReady(f"model {self.assignment.model} died here and is started again")
        if self._count >= self._slots:
            raise AssertionError(f"more tasks than slots: {self._count} processes of {self.assignment.model} are busy")
        return await self._load()

    async def release(self, runner: Runner, *, done: bool) -> None:
        """`done`: the task ended with an answer. Else, if the process is gone, it counts as a crash."""
        if done:
            self._crashes = 0
        if runner.alive and self.state == "ready":
            self._idle.append(runner)
        else:
            await self._bury(runner, crashed=not runner.alive and not done)

    async def close(self) -> None:
        """End its processes and release its files. Tasks that run on it must have ended."""
        self._step("closed")
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait([self._life])
        idle, self._idle = self._idle, []
        for runner in idle:
            await self._bury(runner, crashed=False)
        if self._pin is not None:
            self._pin.release()
            self._pin = None

    # -- inside -------------------------------------------------------------------------------------------------------

    def _step(self, event: str) -> None:
        new = MODEL[self.state].get(event)
        if new is None:
            raise AssertionError(f"model {self.assignment.model}: no {event!r} in {self.state!r}")
        self.state = new
        self._changed(self)

    def _ended(self, life: asyncio.Task[None]) -> None:
        if not life.cancelled() and (error := life.exception()) is not None:
            log.critical("model host failed", extra={"model": self.assignment.model}, exc_info=error)

    async def _live(self) -> None:
        model = self.assignment.model
        try:
            files = await self._files_of(self.assignment)
            self._pin = await self._cache.pin([_part(file) for file in files])
            self._step("fetched")
            self._idle.append(await self._load())
            self._step("loaded")
            log.info("model ready", extra={"model": model, "version": self.assignment.version})
            while True:
                await self._none_left.wait()
                self._none_left.clear()
                await self._restart()
        except IdunnoError as error:
            self.error = str(error)
            log.warning("model not set up", extra={"model": model, "error": self.error})
            self._step("failed")

    async def _restart(self) -> None:
        """Until a process is up again. Raises what the last of RESTARTS_MAX tries raised."""
        for failed in range(1, RESTARTS_MAX + 1):
            if self._crashes:  # a process that we killed ourselves is replaced at once
                await asyncio.sleep(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(self._crashes - 1, 16)))
            try:
                self._idle.append(await self._load())
                self._step("loaded")
                return
            except IdunnoError as error:
                log.warning("model not restarted", extra={"model": self.assignment.model, "error": str(error)})
                if failed == RESTARTS_MAX:
                    raise
                self._crashes += 1

    async def _load(self) -> Runner:
        if self._pin is None:
            raise AssertionError(f"{self.assignment.model} is loaded before it is fetched")
        self._count += 1
        runner: Runner | None = None
        try:
            runner = await self._runners.take()
            folder = self._local_path(self._pin.folder)
            kind, threads = self.assignment.runtime, self._threads
            await runner.load(self.assignment.model, folder, kind, threads=threads, timeout_s=LOAD_S)
            return runner
        except BaseException:
            self._count -= 1
            if runner is not None:
                await runner.close()
            raise

    async def _bury(self, runner: Runner, *, crashed: bool) -> None:
        self._count -= 1
        self._crashes += crashed
        if self._count == 0 and self.state == "ready":
            self._step("died")
            self._none_left.set()
        await runner.close()


def _part(file: ModelFile) -> Part:
    return Part(file.path, f"{file.name} version {file.version}", file.size, file.blocks)
