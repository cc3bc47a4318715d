# idunno/client/sync.py: `idunno.connect`: the same cluster for programs without asyncio.
#
# Rule 1: an event loop of its own runs in one private thread; every method hands its work over and waits for it.
# Rule 2: nothing is decided here: names, arguments, results and errors are those of api.py.
from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

from idunno.client import api
from idunno.client.backups import Snapshot
from idunno.client.dumps import DumpMade
from idunno.client.files import FolderGot, FolderPut
from idunno.client.transfer import Progress
from idunno.coordinator.messages import (
    GoneNode,
    Member,
    MemberEvent,
    NewTokenAnswer,
    StatusAnswer,
    TokenRow,
    UpgradeAnswer,
    UserRow,
)
from idunno.grep.messages import Line, QueryAnswer
from idunno.scheduler.messages import Explanation, JobInfo, ModelInfo, OutputInfo, Rates, Times, WorkerRow
from idunno.sdfs.messages import (
    DeleteAnswer,
    EmptyTrashAnswer,
    FileInfo,
    ListRow,
    PutAnswer,
    RepairAnswer,
    RestoreAnswer,
    RetainRow,
    ScrubAnswer,
    StoreAnswer,
    TrashRow,
    VersionRow,
    WhereAnswer,
)

T = TypeVar("T")


class LoopThread:
    """A running event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="idunno-client", daemon=True)
        self._thread.start()
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run in the loop and wait; an interrupt here (Ctrl-C) cancels the work there."""
        if self._closed:
            work.close()
            raise RuntimeError("this connection is closed: call idunno.connect again")
        assert threading.current_thread() is not self._thread, "a callback called back: use connect_async there"
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def post(self, work: Callable[[], object]) -> None:
        """Run in the loop soon, without waiting: for finalisers, which may run in any thread."""
        with contextlib.suppress(RuntimeError):  # closed: nothing runs there any more
            self._loop.call_soon_threadsafe(work)

    def close(self) -> None:
        if self._closed:
            return
        self.run(_finish())
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _finish() -> None:
    """End what still runs in this loop, async generators that were left half-way included."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


class Job:
    """A submitted job."""

    def __init__(self, thread: LoopThread, job: api.Job) -> None:
        self._thread = thread
        self._job = job
        self.id = job.id
        self.model = job.model

    def info(self) -> JobInfo:
        return self._thread.run(self._job.info())

    def wait(self, progress: Callable[[JobInfo], None] | None = None) -> JobInfo:
        """Until it is finished, in whatever way."""
        return self._thread.run(self._job.wait(progress))

    def results(self) -> Iterator[dict[str, Any]]:
        """`{"query": id, "output": ...}` or `{"query": id, "error": "..."}`, in input order, as they become available."""
        return _iterate(self._thread, self._job.results())

    def cancel(self) -> JobInfo:
        return self._thread.run(self._job.cancel())


def _iterate(thread: LoopThread, items: AsyncGenerator[T, None]) -> Iterator[T]:
    async def next_item() -> tuple[T] | None:
        try:
            return (await items.__anext__(),)
        except StopAsyncIteration:
            return None

    try:
        while (item := thread.run(next_item())) is not None:
            yield item[0]
    finally:
        if not thread.closed:  # closing it has ended the items too
            thread.run(_close(items))


async def _close(items: AsyncGenerator[T, None]) -> None:
    await items.aclose()


class Cluster:
    """A connection to a cluster; goes on through the loss of nodes. Use with `with`. See api.Cluster for each method."""

    def __init__(self, thread: LoopThread, cluster: api.Cluster) -> None:
        self._thread = thread
        self._cluster = cluster

    def close(self) -> None:
        try:
            self._thread.run(self._cluster.close())
        finally:
            self._thread.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def snapshot(self, target: str | os.PathLike[str], *, passphrase: str | None = None) -> Snapshot:
        return self._thread.run(self._cluster.snapshot(target, passphrase=passphrase))

    def dump(self, target: str | os.PathLike[str]) -> DumpMade:
        return self._thread.run(self._cluster.dump(target))

    # -- files --------------------------------------------------------------------------------------------------------

    def put(
        self,
        source: str | os.PathLike[str] | IO[bytes],
        name: str,
        *,
        write_quorum: int | None = None,
        if_version: int | None = None,
        progress: Progress | None = None,
    ) -> PutAnswer:
        work = self._cluster.put(source, name, write_quorum=write_quorum, if_version=if_version, progress=progress)
        return self._thread.run(work)

    def put_folder(
        self,
        folder: str | os.PathLike[str],
        name: str,
        *,
        write_quorum: int | None = None,
        progress: Progress | None = None,
    ) -> FolderPut:
        return self._thread.run(self._cluster.put_folder(folder, name, write_quorum=write_quorum, progress=progress))

    def get(
        self,
        name: str,
        target: str | os.PathLike[str] | IO[bytes],
        *,
        version: int | None = None,
        as_of_ms: int | None = None,
        progress: Progress | None = None,
    ) -> FileInfo:
        work = self._cluster.get(name, target, version=version, as_of_ms=as_of_ms, progress=progress)
        return self._thread.run(work)

    def get_folder(self, prefix: str, folder: str | os.PathLike[str], *, progress: Progress | None = None) -> FolderGot:
        return self._thread.run(self._cluster.get_folder(prefix, folder, progress=progress))

    def get_versions(
        self, name: str, count: int, target: str | os.PathLike[str] | IO[bytes], *, progress: Progress | None = None
    ) -> list[FileInfo]:
        return self._thread.run(self._cluster.get_versions(name, count, target, progress=progress))

    def stat(self, name: str, *, version: int | None = None) -> FileInfo:
        return self._thread.run(self._cluster.stat(name, version=version))

    def versions(self, name: str) -> list[VersionRow]:
        return self._thread.run(self._cluster.versions(name))

    def ls(self, prefix: str = "", *, system: bool = False, long: bool = False) -> list[ListRow]:
        return self._thread.run(self._cluster.ls(prefix, system=system, long=long))

    def where(self, name: str) -> WhereAnswer:
        return self._thread.run(self._cluster.where(name))

    def store(self, node: str = "") -> StoreAnswer:
        return self._thread.run(self._cluster.store(node))

    def delete(self, name: str) -> DeleteAnswer:
        return self._thread.run(self._cluster.delete(name))

    def retain(self, prefix: str, *, versions: int = 0, age_s: float = 0.0, show: bool = False) -> list[RetainRow]:
        return self._thread.run(self._cluster.retain(prefix, versions=versions, age_s=age_s, show=show))

    def trash(self, prefix: str = "") -> list[TrashRow]:
        return self._thread.run(self._cluster.trash(prefix))

    def restore(self, name: str) -> RestoreAnswer:
        return self._thread.run(self._cluster.restore(name))

    def empty_trash(self, prefix: str = "") -> EmptyTrashAnswer:
        return self._thread.run(self._cluster.empty_trash(prefix))

    def repair(self) -> RepairAnswer:
        return self._thread.run(self._cluster.repair())

    def scrub(self, node: str = "") -> ScrubAnswer:
        return self._thread.run(self._cluster.scrub(node))

    # -- models -------------------------------------------------------------------------------------------------------

    def deploy(
        self,
        model: str,
        path: str | os.PathLike[str],
        *,
        workers: int = 0,
        batch_size: int = 0,
        weight: float = 1.0,
        workers_min: int = 0,
        workers_max: int = 0,
        sent: Progress | None = None,
        progress: Callable[[ModelInfo], None] | None = None,
    ) -> ModelInfo:
        return self._thread.run(
            self._cluster.deploy(
                model,
                path,
                workers=workers,
                batch_size=batch_size,
                weight=weight,
                workers_min=workers_min,
                workers_max=workers_max,
                sent=sent,
                progress=progress,
            )
        )

    def undeploy(self, model: str) -> None:
        self._thread.run(self._cluster.undeploy(model))

    def models(self) -> list[ModelInfo]:
        return self._thread.run(self._cluster.models())

    def model(self, model: str) -> ModelInfo:
        return self._thread.run(self._cluster.model(model))

    def batch_size(self, model: str, batch_size: int) -> ModelInfo:
        return self._thread.run(self._cluster.batch_size(model, batch_size))

    def rates(self) -> Rates:
        return self._thread.run(self._cluster.rates())

    def times(self, model: str) -> Times:
        return self._thread.run(self._cluster.times(model))

    def assignments(self) -> list[WorkerRow]:
        return self._thread.run(self._cluster.assignments())

    def explain(self, what: str) -> Explanation:
        return self._thread.run(self._cluster.explain(what))

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def infer(self, model: str, data: Any, *, batch_size: int = 0, sent: Progress | None = None) -> Job:
        return Job(self._thread, self._thread.run(self._cluster.infer(model, data, batch_size=batch_size, sent=sent)))

    def jobs(self, *, all: bool = False) -> list[JobInfo]:
        return self._thread.run(self._cluster.jobs(all=all))

    def job(self, job: str) -> JobInfo:
        return self._thread.run(self._cluster.job(job))

    def wait(self, job: str, progress: Callable[[JobInfo], None] | None = None) -> JobInfo:
        return self._thread.run(self._cluster.wait(job, progress))

    def results(self, job: str) -> Iterator[dict[str, Any]]:
        return _iterate(self._thread, self._cluster.results(job))

    def outputs(self, job: str) -> list[OutputInfo]:
        return self._thread.run(self._cluster.outputs(job))

    def cancel(self, job: str) -> JobInfo:
        return self._thread.run(self._cluster.cancel(job))

    def forget(self, job: str) -> None:
        self._thread.run(self._cluster.forget(job))

    # -- the cluster --------------------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        return self._thread.run(self._cluster.members())

    def member_events(self) -> list[MemberEvent]:
        return self._thread.run(self._cluster.member_events())

    def status(self) -> StatusAnswer:
        return self._thread.run(self._cluster.status())

    def new_token(self, role: str, *, ttl_s: int = 86_400) -> NewTokenAnswer:
        return self._thread.run(self._cluster.new_token(role, ttl_s=ttl_s))

    def tokens(self) -> list[TokenRow]:
        return self._thread.run(self._cluster.tokens())

    def revoke_token(self, token_id: str) -> None:
        self._thread.run(self._cluster.revoke_token(token_id))

    def users(self) -> list[UserRow]:
        return self._thread.run(self._cluster.users())

    def revoke_user(self, name: str) -> None:
        self._thread.run(self._cluster.revoke_user(name))

    def leave(self, node: str) -> GoneNode:
        return self._thread.run(self._cluster.leave(node))

    def remove(self, node: str) -> GoneNode:
        return self._thread.run(self._cluster.remove(node))

    def upgrade(self, *, check: bool = False) -> UpgradeAnswer:
        return self._thread.run(self._cluster.upgrade(check=check))

    def grep(
        self,
        pattern: str,
        heard: Callable[[list[Line]], None],
        *,
        ignore_case: bool = False,
        invert: bool = False,
        count_only: bool = False,
        before: int = 0,
        after: int = 0,
        since_ms: int | None = None,
        until_ms: int | None = None,
        level: str = "",
        nodes: Sequence[str] = (),
        limit: int = 10_000,
    ) -> QueryAnswer:
        return self._thread.run(
            self._cluster.grep(
                pattern,
                heard,
                ignore_case=ignore_case,
                invert=invert,
                count_only=count_only,
                before=before,
                after=after,
                since_ms=since_ms,
                until_ms=until_ms,
                level=level,
                nodes=nodes,
                limit=limit,
            )
        )


def connect(where: str | Path | None = None, *, timeout_s: float | None = None) -> Cluster:
    """Connect to WHERE (docs/commands.md); `timeout_s` bounds every call, by default each kind has its own.

    Raises NotFound (no cluster there), Unauthenticated (no login), Unavailable (no node answers).
    """
    return _connect(lambda: api.connect_async(where, timeout_s=timeout_s))


def _connect(opening: Callable[[], Coroutine[Any, Any, api.Cluster]]) -> Cluster:
    thread = LoopThread()
    try:
        return Cluster(thread, thread.run(opening()))
    except BaseException:
        thread.close()
        raise
