# idunno/scheduler/jobs.py: calls about jobs.
#
# Rule 1: a job is its client's: other users do not see it; admins see all, readers may look at all.
# Rule 2: what only the leader knows (tasks at work, what a job waits for) is asked of it; outputs are read from any machine.
from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import msgspec

from idunno.base.errors import InvalidArgument, NotLeader, PermissionDenied
from idunno.coordinator.commands import CancelJob, ForgetJob, SubmitJob
from idunno.coordinator.ledger import FINISHED
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import JobRecord, TaskRecord
from idunno.scheduler.cluster import Cluster, at_leader
from idunno.scheduler.config import SchedulerConfig
from idunno.scheduler.leading import Leading
from idunno.scheduler.messages import (
    CANCEL,
    FORGET,
    GET_JOB,
    JOBS,
    OUTPUTS,
    SUBMIT,
    GetJob,
    JobInfo,
    JobRequest,
    Jobs,
    ListJobs,
    OutputInfo,
    Outputs,
    Submit,
    TaskCounts,
)
from idunno.scheduler.models import check_batch_size
from idunno.scheduler.views import Work, job_info
from idunno.scheduler.waiters import Waiters
from idunno.wire.answering import left_s
from idunno.wire.calls import HEADER_BYTES_MAX, Actor, Call, Empty, Registrar, Role

JOBS_SHOWN: Final = 1_000
"""In one answer: below 0.5 MiB, and as much again of reasons."""
REASON_BYTES_MAX: Final = 400
"""In a list; of one job all of it is shown, what each of its model's workers says included."""
JOBS_SLICE: Final = 100
"""Rows made in one turn of the loop: 1 to 2 ms."""
OUTPUTS_BYTES_MAX: Final = HEADER_BYTES_MAX - 64 * 1024
"""Of one answer's rows: about 7,000 tasks; what comes after them is asked for with `first`."""
OUTPUT_ROW_BYTES: Final = 80
"""A row without its texts: six keys and four numbers in MessagePack."""
OUTPUT_ERROR_MAX: Final = 300
INPUT_BLOCKS_MAX: Final = 2_000
"""A lease names all blocks of the input: 16 GiB of it are 200 KiB of lease."""
GATHER_S: Final = 0.1
"""A long poll about a running job is answered this long after its first change at the earliest, so that a thousand completions
a second are not a thousand answers."""


def _in_short(row: JobInfo) -> JobInfo:
    reason = row.reason.encode()
    if len(reason) <= REASON_BYTES_MAX:
        return row
    return msgspec.structs.replace(row, reason=reason[:REASON_BYTES_MAX].decode(errors="ignore") + " ...")


class JobCalls:
    def __init__(
        self,
        cluster: Cluster,
        config: SchedulerConfig,
        waiters: Waiters,
        leading: Callable[[], Leading | None],
        machine_ms: Callable[[], int],
    ) -> None:
        self._cluster, self._config, self._waiters = cluster, config, waiters
        self._leading, self._machine_ms = leading, machine_ms

    def register(self, registrar: Registrar) -> None:
        registrar.register(SUBMIT, self.submit)
        registrar.register(GET_JOB, self.get)
        registrar.register(JOBS, self.jobs)
        registrar.register(CANCEL, self.cancel)
        registrar.register(FORGET, self.forget)
        registrar.register(OUTPUTS, self.outputs)

    async def submit(self, call: Call[Submit]) -> JobInfo:
        request = call.request
        check_batch_size(request.batch_size)
        machine = await self._cluster.read(left_s(call))
        if machine.ledger.find(request.job) is None:
            stored = machine.namespace.version(request.input_name, request.input_version)
            if len(stored.blocks) > INPUT_BLOCKS_MAX:
                raise InvalidArgument(
                    f"input {request.input_name} has {stored.size} bytes in {len(stored.blocks)} blocks, at most "
                    f"{INPUT_BLOCKS_MAX} fit a job: split it into several"
                )
        command = SubmitJob(
            job=request.job,
            model=request.model,
            input_name=request.input_name,
            input_version=request.input_version,
            input_kind=request.input_kind,
            batch_size=request.batch_size,
        )
        await self._cluster.propose(command, actor=call.actor, request=request.job, timeout_s=left_s(call))
        return await self._read(call, request.job)

    async def get(self, call: Call[GetJob]) -> JobInfo:
        request, actor = call.request, call.actor

        async def here(timeout_s: float) -> JobInfo:
            return await self._get(request, actor, timeout_s)

        return await at_leader(self._cluster, self._leading() is not None, GET_JOB, call, here)

    async def _get(self, request: GetJob, actor: Actor, timeout_s: float) -> JobInfo:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + min(request.wait_s, self._config.poll_max_s, timeout_s)
        machine = await self._cluster.read(timeout_s)
        while True:
            leading = self._lead()
            record = visible(machine, request.job, actor)
            info = job_info(machine, record, Work(machine, leading.dispatch), self._machine_ms())
            if request.seen is None or _hard(info) != _hard(request.seen):
                return info
            if not await self._waiters.wait(f"job {request.job}", end_s - loop.time()):
                return info
            now = machine.ledger.find(request.job)
            if now is not None and now.state not in FINISHED:
                await self._waiters.wait(f"end of {request.job}", min(GATHER_S, end_s - loop.time()))

    async def jobs(self, call: Call[ListJobs]) -> Jobs:
        request, actor = call.request, call.actor
        if request.all and actor.role is Role.USER:
            raise PermissionDenied(f"{actor.name} is a user and sees the jobs of {actor.name}; ask an admin for all")

        async def here(timeout_s: float) -> Jobs:
            machine = await self._cluster.read(timeout_s)
            newest = machine.ledger.newest(JOBS_SHOWN + 1, None if request.all else actor.name)
            shown, rows = newest[-JOBS_SHOWN:], list[JobInfo]()
            for first in range(0, len(shown), JOBS_SLICE):
                if first:
                    await asyncio.sleep(0)
                found = [machine.ledger.find(job) for job in shown[first : first + JOBS_SLICE]]
                work, now_ms = Work(machine, self._lead().dispatch), self._machine_ms()
                # An id may have been forgotten, and be another client's, since the rows before were made.
                theirs = [r for r in found if r is not None and (request.all or r.client == actor.name)]
                rows += [_in_short(job_info(machine, record, work, now_ms)) for record in theirs]
            return Jobs(rows, more=len(newest) > JOBS_SHOWN)

        return await at_leader(self._cluster, self._leading() is not None, JOBS, call, here)

    async def cancel(self, call: Call[JobRequest]) -> JobInfo:
        request = call.request
        await self._cluster.propose(
            CancelJob(request.job), actor=call.actor, request=request.request, timeout_s=left_s(call)
        )
        return await self._read(call, request.job)

    async def forget(self, call: Call[JobRequest]) -> Empty:
        request = call.request
        await self._cluster.propose(
            ForgetJob(request.job), actor=call.actor, request=request.request, timeout_s=left_s(call)
        )
        return Empty()

    async def outputs(self, call: Call[JobRequest]) -> Outputs:
        request = call.request
        machine = await self._cluster.read(left_s(call))
        record = visible(machine, request.job, call.actor)
        size = machine.ledger.task_queries(request.job)
        ended = machine.ledger.ended(request.job, max(0, request.first) // size if size else 0)
        found: list[OutputInfo] = []
        left_bytes = OUTPUTS_BYTES_MAX
        for row in ended:
            if left_bytes <= 0:
                return Outputs(self._info(machine, record), found, more=True)
            output = _output(row)
            left_bytes -= OUTPUT_ROW_BYTES + len(output.name) + len(output.error.encode())
            found.append(output)
        return Outputs(self._info(machine, record), found)

    async def _read(self, call: Call[Any], job: str) -> JobInfo:
        machine = await self._cluster.read(left_s(call))
        return self._info(machine, machine.ledger.job(job))

    def _info(self, machine: Machine, record: JobRecord) -> JobInfo:
        leading = self._leading()
        work = Work(machine, leading.dispatch) if leading is not None else None
        return job_info(machine, record, work, self._machine_ms())

    def _lead(self) -> Leading:
        leading = self._leading()
        if leading is None:
            raise NotLeader("this node is not the scheduler (any more)")
        return leading


def visible(machine: Machine, job: str, actor: Actor) -> JobRecord:
    """Raises NotFound, and PermissionDenied for another user's."""
    record = machine.ledger.job(job)
    if actor.role is Role.USER and record.client != actor.name:
        raise PermissionDenied(f"job {job} is of {record.client}; users see their own: `idunno jobs`")
    return record


def _hard(info: JobInfo) -> JobInfo:
    """Without what changes by itself or is only known to the leader: a long poll waits for the rest to change."""
    tasks = TaskCounts(info.tasks.ready + info.tasks.waiting, 0, info.tasks.success, info.tasks.failed)
    return msgspec.structs.replace(info, tasks=tasks, seconds=0.0, reason="")


def _output(row: TaskRecord) -> OutputInfo:
    if row.output is not None:
        return OutputInfo(row.task, row.first, row.last, row.output.name, row.output.size)
    error = row.attempts[-1].error if row.attempts else "no reason given"
    tried = f"failed {len(row.attempts)} times, last: " if len(row.attempts) > 1 else ""
    return OutputInfo(row.task, row.first, row.last, error=f"{tried}{error}"[:OUTPUT_ERROR_MAX])
