# idunno/worker/work.py: one task from its lease to its report.
#
# Rule 1: fetch, wait for a slot, compute, store, report: a table below. Only `compute` holds a slot and a process.
# Rule 2: a task ends in one of four ways: its result is taken; its failed attempt is taken; it is dropped (cancelled from
#         outside); or it is given back untouched, because this worker does not hold its model now.
# Rule 3: an output of at most SMALL_BYTES_MAX rides in the report. A larger one is stored under an open put, whose id depends
#         only on the attempt; the scheduler's one command commits it with the task. A put that nobody commits is aborted by
#         the leader in time.
from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Final, Protocol, TypeVar

import msgspec

from idunno.base.disk import Buffer, Disk
from idunno.base.errors import DiskFailed, Exhausted, IdunnoError, InvalidArgument, ModelFailed, NotFound, NotReady
from idunno.base.ids import NodeId
from idunno.coordinator.names import output_name
from idunno.coordinator.records import SMALL_BYTES_MAX
from idunno.scheduler.messages import (
    ATTEMPT_FAILED,
    PLAN_DONE,
    TASK_DONE,
    AttemptFailed,
    Held,
    Lease,
    PlanDone,
    TaskDone,
)
from idunno.sdfs.client import Uploaded
from idunno.sdfs.upload import Source
from idunno.wire.calls import Method
from idunno.worker.cache import Cache, Fetcher, Part, Pin
from idunno.worker.models import Host
from idunno.worker.protocol import Ran, one_line

log = logging.getLogger("idunno.worker")

PLAN: Final = -1
"""The task number that stands for counting the queries of a job's input."""
STORE_S: Final = 300.0
"""For an output to be stored; it waits out elections and restarts of nodes."""
ERROR_CHARACTERS_MAX: Final = 1_000
"""What the ledger keeps of an attempt's error."""

TASK: Final[dict[str, dict[str, str]]] = {
    "fetching": {"fetched": "queued", "failed": "reporting", "ended": "over"},
    "queued": {"slot": "computing", "failed": "reporting", "ended": "over"},
    "computing": {"computed": "storing", "failed": "reporting", "ended": "over"},
    "storing": {"stored": "reporting", "failed": "reporting", "ended": "over"},
    "reporting": {"ended": "over"},
    "over": {},
}

Q = TypeVar("Q", bound=msgspec.Struct)
A = TypeVar("A", bound=msgspec.Struct)


class Files(Fetcher, Protocol):
    """What is needed of sdfs/client.py."""

    async def upload(
        self, source: Source, name: str, *, size: int | None, timeout_s: float, system: bool, put: str
    ) -> Uploaded:
        """Store blocks under an open put, and leave it open."""
        ...


class Insist(Protocol):
    async def __call__(self, method: Method[Q, A], request: Q, body: Buffer = b"") -> A: ...


class Workplace(msgspec.Struct, frozen=True, kw_only=True):
    """What the tasks of one worker share."""

    me: NodeId
    boot: int
    cache: Cache
    files: Files
    disk: Disk
    slots: asyncio.Semaphore
    task_limit_s: float
    temporary: str  # the folder for outputs on their way
    host: Callable[[tuple[str, int]], Host | None]
    insist: Insist
    freed: Callable[[], None]  # called when a task has computed: another may be asked for
    ailing: Callable[[], None]  # called when this worker itself failed, not the model or the input
    numbers: Iterator[int] = msgspec.field(
        default_factory=itertools.count
    )  # of output files: job ids cannot name files


class Work:
    """A lease being worked on. Run `run` as a task of its own; cancel it to drop it."""

    def __init__(self, lease: Lease, place: Workplace) -> None:
        self.held = Held(lease.job, lease.task, lease.attempt)
        self.model = (lease.model, lease.model_version)
        self.state = "fetching"
        self.task: asyncio.Task[None] | None = None
        self._lease, self._place = lease, place
        self._out = f"{place.temporary}/out-{next(place.numbers)}.jsonl"

    @property
    def computed(self) -> bool:
        """Whether it needs no slot any more."""
        return self.state in ("storing", "reporting", "over")

    async def run(self) -> None:
        """To the end. Raises nothing but CancelledError."""
        try:
            await self._run()
        except NotReady as error:
            log.info("task given back", extra=self._fields(error))
        except IdunnoError as error:
            log.warning("report not taken", extra=self._fields(error))
        finally:
            self._step("ended")
            await self._remove_output()

    async def _run(self) -> None:
        try:
            result, body = await self._attempt()
        except NotReady:
            raise
        except IdunnoError as error:
            self._step("failed")
            log.warning("attempt failed", extra=self._fields(error))
            if isinstance(error, (DiskFailed, Exhausted)):
                self._place.ailing()
            await self._fail(error)
            return
        if isinstance(result, TaskDone):
            await self._place.insist(TASK_DONE, result, body)
        else:
            await self._place.insist(PLAN_DONE, result)

    async def _attempt(self) -> tuple[TaskDone | PlanDone, bytes]:
        """What to report, and its body. Raises NotReady to give it back, any other IdunnoError for a failed attempt."""
        lease, place = self._lease, self._place
        if self._host() is None:
            raise NotReady(f"model {lease.model} version {lease.model_version} is not held here")
        pin = await self._fetch()
        try:
            self._step("fetched")
            path = place.disk.local_path(f"{pin.folder}/{_input_file(lease)}")
            async with place.slots:
                self._step("slot")
                outcome = await self._compute(path)
        finally:
            pin.release()
        self._step("computed")
        place.freed()
        if isinstance(outcome, int):
            self._step("stored")
            return PlanDone(place.me, lease.job, outcome), b""
        done = await self._store(outcome)
        self._step("stored")
        return done

    def _host(self) -> Host | None:
        host = self._place.host(self.model)
        return host if host is not None and host.state == "ready" else None

    async def _fetch(self) -> Pin:
        lease = self._lease
        name = f"{lease.input_name} version {lease.input_version}"
        return await self._place.cache.pin(
            [Part(_input_file(lease), name, lease.input_size, tuple(lease.input_blocks))]
        )

    async def _compute(self, path: str) -> Ran | int:
        """The number of queries for a planning, else what the child says of the task it ran."""
        lease, limit_s = self._lease, self._place.task_limit_s
        host = self._host()
        if host is None:
            raise NotReady(f"model {lease.model} version {lease.model_version} is not held here any more")
        runner = await host.acquire()
        done = False
        try:
            if lease.task == PLAN:
                outcome: Ran | int = await runner.count(path, lease.input_kind, timeout_s=limit_s)
            else:
                out = self._place.disk.local_path(self._out)
                outcome = await runner.run(path, lease.input_kind, lease.first, lease.last, out, timeout_s=limit_s)
                if outcome.done + outcome.errors != lease.last - lease.first:
                    raise ModelFailed(
                        f"the process of model {lease.model} answered {outcome.done + outcome.errors} queries of a task "
                        f"of {lease.last - lease.first}"
                    )
            done = True
            return outcome
        except asyncio.CancelledError:
            done = True  # we killed it: no crash of the model
            raise
        finally:
            await host.release(runner, done=done)

    async def _store(self, ran: Ran) -> tuple[TaskDone, bytes]:
        lease, place = self._lease, self._place
        put, blocks, body = "", [], b""
        if ran.size <= SMALL_BYTES_MAX:
            body = await place.disk.read_all(self._out, bytes_max=SMALL_BYTES_MAX)
        else:
            file = await place.disk.open(self._out)
            offset = 0

            async def source(length: int) -> Buffer:
                nonlocal offset
                piece = await file.read(offset, length)
                offset += len(piece)
                return piece

            try:
                uploaded = await place.files.upload(
                    source,
                    output_name(lease.job, lease.task),
                    size=ran.size,
                    timeout_s=STORE_S,
                    system=True,
                    put=f"{lease.job[:64]}-{lease.task}-{lease.attempt}-{place.me}-{place.boot}",
                )
            finally:
                await file.close()
            put, blocks = uploaded.put, list(uploaded.blocks)
        return TaskDone(place.me, lease.job, lease.task, put, ran.size, blocks, ran.done, ran.errors, ran.timing), body

    async def _fail(self, error: IdunnoError) -> None:
        lease = self._lease
        failed = AttemptFailed(
            self._place.me,
            lease.job,
            lease.task,
            lease.attempt,
            one_line(str(error), characters_max=ERROR_CHARACTERS_MAX),
            # An input that cannot be read cannot be read elsewhere either.
            fatal=isinstance(error, InvalidArgument),
        )
        await self._place.insist(ATTEMPT_FAILED, failed)

    async def _remove_output(self) -> None:
        try:
            await self._place.disk.remove(self._out)
        except NotFound:
            return
        except IdunnoError as error:
            log.warning("output of a task not removed", extra=self._fields(error))

    def _step(self, event: str) -> None:
        new = TASK[self.state].get(event)
        if new is None:
            raise AssertionError(f"task {self.held}: no {event!r} in {self.state!r}")
        self.state = new

    def _fields(self, error: IdunnoError) -> dict[str, object]:
        return {"job": self._lease.job, "task": self._lease.task, "attempt": self._lease.attempt, "error": str(error)}


def _input_file(lease: Lease) -> str:
    """The input's name in its cache entry: equal for all tasks of all jobs with this input, and for no other content, for
    a child keeps inputs open by path."""
    digest = hashlib.sha256(" ".join(block.block for block in lease.input_blocks).encode())
    return f"input-{digest.hexdigest()[:32]}.{lease.input_kind}"
