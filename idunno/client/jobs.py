# idunno/client/jobs.py: jobs from input to results.
#
# Rule 1: a job's id is the client's, made before anything is sent: a retry finds the job.
# Rule 2: results come in input order, each query once: the lines of each finished task's file, and one error line for each
#         query that has no other (a failed task's, a cancelled job's).
# Rule 3: bounded memory: a few parts are fetched ahead, each spooled to a temporary file beyond SPOOL_BYTES.
from __future__ import annotations

import asyncio
import os
import tempfile
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from idunno.base.errors import Corrupt, DeadlineExceeded, IdunnoError, InvalidArgument, NotFound, NotReady
from idunno.client.base import JOB_S, POLL_PAUSE_S, TRANSFER_S, Deadline, new_request
from idunno.client.models import Models, shortened
from idunno.client.packing import is_array, kind_of_file, kind_of_stored, pack_array, pack_folder, pack_paths
from idunno.client.transfer import sink_of
from idunno.scheduler.messages import (
    CANCEL,
    FORGET,
    GET_JOB,
    GET_MODEL,
    JOBS,
    MODELS,
    OUTPUTS,
    SUBMIT,
    GetJob,
    GetModel,
    JobInfo,
    JobRequest,
    ListJobs,
    ListModels,
    OutputInfo,
    Submit,
)
from idunno.sdfs.messages import STAT, Stat

FINISHED: Final = frozenset({"success", "failed", "cancelled"})
FETCH_AHEAD: Final = 4
"""Parts under way at once: hides the round trips of small ones."""
SPOOL_BYTES: Final = 4 * 1024 * 1024
"""Of one part in memory; FETCH_AHEAD + 1 of them at most."""
LINE_BYTES_MAX: Final = 64 * 1024 * 1024
"""One query's output as JSON; more is refused instead of filling memory."""

SDFS: Final = "sdfs:"


class Job:
    """A submitted job."""

    def __init__(self, cluster: Jobs, info: JobInfo) -> None:
        self._cluster = cluster
        self.id = info.job
        self.model = info.model

    async def info(self) -> JobInfo:
        return await self._cluster.job(self.id)

    async def wait(self, progress: Callable[[JobInfo], None] | None = None) -> JobInfo:
        """Until it is finished, in whatever way. Raises DeadlineExceeded; the job goes on."""
        return await self._cluster.wait(self.id, progress)

    def results(self) -> AsyncGenerator[dict[str, Any], None]:
        """`{"query": id, "output": ...}` or `{"query": id, "error": "..."}`, in input order, as they become available."""
        return self._cluster.results(self.id)

    async def cancel(self) -> JobInfo:
        return await self._cluster.cancel(self.id)


class Jobs(Models):
    async def infer(
        self,
        model: str,
        data: Any,
        *,
        batch_size: int = 0,
        sent: Callable[[int, int], None] | None = None,
    ) -> Job:
        """Upload `data` and submit it as a job; acknowledged once its whole input is stored.

        `data`: a path (file or folder of images), "sdfs:NAME", a list of image paths, or a numpy array.
        Raises NotFound, NotReady (model not deployed, with the reason), InvalidArgument, OSError.
        """
        deadline = self._deadline(TRANSFER_S)
        stored = data[len(SDFS) :] if isinstance(data, str) and data.startswith(SDFS) else None
        if stored is not None:
            kind_of_stored(stored)
        elif isinstance(data, (str, os.PathLike)):
            os.stat(data)  # before the model is asked about, so that a typing mistake is named first
        await self._check_deployed(model, deadline)
        job = new_request()
        if stored is not None:
            kind = kind_of_stored(stored)
            found = await self._ask(STAT, Stat(stored), deadline)
            name, version = stored, found.versions[0].version
        else:
            file, kind = await _open_input(data)
            name = f".idunno/jobs/{job}/input"
            with file:
                put = await self._put_file(file, name, deadline=deadline, system=True, progress=sent)
            version = put.version
        try:
            info = await self._ask(SUBMIT, Submit(job, model, name, version, kind, batch_size), deadline)
        except IdunnoError as error:
            if stored is None:
                await self._discard(name, error)
            raise
        return Job(self, info)

    async def _check_deployed(self, model: str, deadline: Deadline) -> None:
        try:
            info = await self._ask(GET_MODEL, GetModel(model), deadline)
        except NotFound:
            known = sorted(found.model for found in (await self._ask(MODELS, ListModels(), deadline)).models)
            names = ", ".join(known[:20]) if known else "none"
            raise NotFound(f"no model {model!r}; known are: {names}; see `idunno deploy --help`") from None
        if info.state != "deployed":
            why = f" ({shortened(info.reason)})" if info.reason else ""
            state = "has failed" if info.state == "failed" else f"is {info.state}"
            raise NotReady(f"model {model} {state}{why}: see `idunno explain {model}`")

    async def jobs(self, *, all: bool = False) -> list[JobInfo]:
        """This user's jobs, or everybody's."""
        return (await self._ask(JOBS, ListJobs(all))).jobs

    async def job(self, job: str) -> JobInfo:
        """Raises NotFound."""
        return await self._ask(GET_JOB, GetJob(job))

    async def cancel(self, job: str) -> JobInfo:
        return await self._ask(CANCEL, JobRequest(job, new_request()))

    async def forget(self, job: str) -> None:
        await self._ask(FORGET, JobRequest(job, new_request()))

    async def outputs(self, job: str) -> list[OutputInfo]:
        """The finished tasks' files in SDFS, in input order."""
        found: list[OutputInfo] = []
        while True:
            answer = await self._ask(OUTPUTS, JobRequest(job, first=found[-1].last if found else 0))
            found += answer.outputs
            if not answer.more or not answer.outputs:
                return found

    async def wait(self, job: str, progress: Callable[[JobInfo], None] | None = None) -> JobInfo:
        deadline = self._deadline(JOB_S)
        info = await self._ask(GET_JOB, GetJob(job), deadline)
        while True:
            if progress is not None:
                progress(info)
            if info.state in FINISHED:
                return info
            info = await self._changed(info, deadline)

    async def _changed(self, info: JobInfo, deadline: Deadline) -> JobInfo:
        new = await self._poll(GET_JOB, lambda wait_s: GetJob(info.job, wait_s, info), deadline)
        if new is None:
            raise DeadlineExceeded(
                f"job {info.job} is {info.state} after {deadline.total_s:g} s, {info.done} of {info.queries} queries "
                f"answered; it goes on: see `idunno results {info.job}`"
            )
        if msgspec.structs.replace(new, seconds=info.seconds) == info:  # time passes in any case
            await asyncio.sleep(POLL_PAUSE_S)
        return new

    async def results(self, job: str) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(self.result_lines(job)) as lines:
            async for line in lines:
                yield msgspec.json.decode(line)

    async def result_lines(
        self, job: str, progress: Callable[[JobInfo], None] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The results as JSON lines, each with its newline; waits for what is not there yet."""
        deadline = self._deadline(JOB_S)
        async with aclosing(self._runs(job, deadline, progress)) as runs:
            async for run in runs:
                async with aclosing(self._run_lines(run, deadline)) as lines:
                    async for line in lines:
                        yield line

    async def _runs(
        self, job: str, deadline: Deadline, progress: Callable[[JobInfo], None] | None
    ) -> AsyncGenerator[list[OutputInfo], None]:
        """The job's parts in input order without gaps, as they become available; a finished job's gaps are errors."""
        first = 0  # the first query not yet given out
        while True:
            answer = await self._ask(OUTPUTS, JobRequest(job, first=first), deadline)
            info = answer.job
            if progress is not None:
                progress(info)
            finished = info.state in FINISHED
            more = answer.more and bool(answer.outputs)
            until = answer.outputs[-1].last if more else info.queries
            run = _run_from(first, answer.outputs, info if finished else None, until)
            if run:
                first = run[-1].last
                yield run
            if more and run:
                continue  # the next page may hold parts that are done already
            if finished:
                return
            await self._changed(info, deadline)

    async def _run_lines(self, run: Sequence[OutputInfo], deadline: Deadline) -> AsyncGenerator[bytes, None]:
        waiting: deque[tuple[OutputInfo, asyncio.Task[IO[bytes]] | None]] = deque()
        todo = deque(run)
        try:
            while todo or waiting:
                while todo and len(waiting) < FETCH_AHEAD:
                    part = todo.popleft()
                    waiting.append((part, asyncio.create_task(self._fetch(part, deadline)) if part.name else None))
                part, task = waiting.popleft()
                if task is None:
                    for query in range(part.first, part.last):
                        yield msgspec.json.encode({"query": query, "error": part.error}) + b"\n"
                    continue
                with await task as file:
                    while line := file.readline(LINE_BYTES_MAX):
                        if len(line) == LINE_BYTES_MAX:
                            raise Corrupt(f"{part.name} holds a line over {LINE_BYTES_MAX} bytes: fetch it by `get`")
                        yield line if line.endswith(b"\n") else line + b"\n"
        finally:
            tasks = [task for _, task in waiting if task is not None]
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(outcome, BaseException):
                    outcome.close()

    async def _fetch(self, part: OutputInfo, deadline: Deadline) -> IO[bytes]:
        """One part's content, at its beginning."""
        file = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 - handed to the caller
        try:
            await self._get_file(part.name, sink_of(file), deadline=deadline)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file


def _run_from(first: int, outputs: Sequence[OutputInfo], finished: JobInfo | None, until: int) -> list[OutputInfo]:
    """The parts that follow query `first` without a gap. In a `finished` job the gaps up to `until` are parts with its reason."""
    run: list[OutputInfo] = []
    for part in sorted(outputs, key=lambda part: part.first):
        if part.last <= first or not (part.name or part.error):
            continue  # given out before, or not done yet
        if part.first != first:
            if finished is None:
                break
            run.append(_gap(first, part.first, finished))
        run.append(part)
        first = part.last
    if finished is not None and first < until:
        run.append(_gap(first, until, finished))
    return run


def _gap(first: int, last: int, job: JobInfo) -> OutputInfo:
    why = f"job {job.state}: {job.reason}" if job.reason else f"job {job.state}"
    return OutputInfo(task=-1, first=first, last=last, error=why)


def _open_path(path: Path) -> tuple[IO[bytes], str]:
    if path.is_dir():
        return pack_folder(path), "zip"
    kind = kind_of_file(path)
    return open(path, "rb"), kind


async def _open_input(data: Any) -> tuple[IO[bytes], str]:
    """The input as one open file, and its kind. Packing goes on in a thread: it may take long."""
    if isinstance(data, (str, os.PathLike)):
        return await asyncio.to_thread(_open_path, Path(data))
    if is_array(data):
        return await asyncio.to_thread(pack_array, data), "npy"
    if isinstance(data, Sequence) and not isinstance(data, (bytes, bytearray)):
        if all(isinstance(item, (str, os.PathLike)) for item in data):
            return await asyncio.to_thread(pack_paths, data), "zip"
        return await asyncio.to_thread(pack_array, data), "npy"
    raise InvalidArgument(f"{type(data).__name__} is no input: give a path, a list of image paths or an array")
