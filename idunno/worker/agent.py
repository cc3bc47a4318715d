# idunno/worker/agent.py: the worker of a node: asks the scheduler for work, holds the models it is told to, runs tasks.
#
# Rule 1: the scheduler is whoever leads the coordinator. Every report is repeated until it is taken, or the scheduler says that
#         it is void (`drop`); reports are idempotent. Answers of a lower term than the highest seen are ignored.
# Rule 2: a poll names all that is held, so a new scheduler learns it. What is not named is as if it had never been lent: that
#         is how a task is given back that nothing was done for (no attempt is counted).
# Rule 3: at most `slots` tasks compute; AHEAD more may wait with their input fetched; outputs are stored beside that. All
#         together never more than HELD_PER_SLOT a slot.
# Rule 4: a worker whose own disk or cache refused takes nothing for UNWELL_S: it would fail all tasks faster than the others,
#         which are well, can do them.
# Rule 5: an open poll that offers nothing is cut short when there is something to offer. Leases that are lost with it come back
#         by rule 2.
from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

import msgspec

from idunno.base.disk import Buffer, Disk
from idunno.base.errors import Exhausted, IdunnoError, InternalError, NotReady, StaleTerm
from idunno.base.ids import NodeId, Term
from idunno.coordinator.records import ModelFile
from idunno.scheduler.messages import (
    MODEL_FILES,
    POLL,
    WORKER_REPORT,
    AskFiles,
    Assignment,
    Held,
    Lease,
    Poll,
    PollAnswer,
    WorkerReport,
)
from idunno.wire.calls import Method
from idunno.worker.cache import BYTES_MAX, Cache
from idunno.worker.models import Host, WarmRunners
from idunno.worker.protocol import one_line
from idunno.worker.runner import RunnerFactory
from idunno.worker.work import Files, Work, Workplace

log = logging.getLogger("idunno.worker")

POLL_S: Final = 10.0
"""A long poll: rare enough to cost nothing, short enough that the scheduler soon misses a worker that hangs."""
POLL_MARGIN_S: Final = 5.0
"""For the answer of a poll to arrive."""
REPORT_S: Final = 10.0
GOODBYE_S: Final = 1.0
"""For the last poll: the node has 10 s to stop in all. Without it the scheduler finds out by itself, a little later."""
AHEAD: Final = 1
"""Tasks whose input is fetched while the slots compute."""
HELD_PER_SLOT: Final = 4
"""Computing, ahead, and two outputs being stored or reported; more wait at the scheduler, where others may take them."""
UNWELL_S: Final = 10.0
"""Long enough that the attempts which a task has left go to others; short enough for a person who just freed space."""
RETRY_FIRST_S: Final = 0.05
RETRY_MAX_S: Final = 2.0
ASKED_AT_ONCE: Final = 4
"""Models whose files are asked for: an answer may have 1 MiB, and the scheduler has many workers."""
TEMPORARY: Final = "tmp"

Q = TypeVar("Q", bound=msgspec.Struct)
A = TypeVar("A", bound=msgspec.Struct)


class CallScheduler(Protocol):
    async def __call__(self, method: Method[Q, A], request: Q, body: Buffer = b"", *, timeout_s: float) -> A:
        """Call the present leader. Raises Unavailable or NotLeader when there is none, and what the handler raised."""
        ...


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    slots: int = 1
    """Tasks that compute at once."""
    threads: int = 1
    """Of the runtime, for each task: cores / slots, so that the slots together use the machine once."""
    cache_bytes: int = BYTES_MAX
    task_limit_s: float = 300.0
    warm_runner: bool = True


class Agent:
    """`start` once, then `stop`. `files` is the node's FileClient; `spawn` makes model processes (runner.ChildFactory)."""

    def __init__(
        self,
        me: NodeId,
        boot: int,
        call_scheduler: CallScheduler,
        files: Files,
        disk: Disk,
        spawn: RunnerFactory,
        *,
        rng: random.Random,
        config: WorkerConfig | None = None,
    ) -> None:
        self._me, self._boot, self._call, self._disk, self._rng = me, boot, call_scheduler, disk, rng
        self._config = config or WorkerConfig()
        self._cache = Cache(disk, files, bytes_max=self._config.cache_bytes)
        self._warm = WarmRunners(spawn, keep_one=self._config.warm_runner)
        self._place = Workplace(
            me=me,
            boot=boot,
            cache=self._cache,
            files=files,
            disk=disk,
            slots=asyncio.Semaphore(self._config.slots),
            task_limit_s=self._config.task_limit_s,
            temporary=TEMPORARY,
            host=lambda key: self._hosts.get(key),
            insist=self.insist,
            freed=self._slot_freed,
            ailing=self._ailing,
        )
        self._hosts: dict[tuple[str, int], Host] = {}
        self._asking = asyncio.Semaphore(ASKED_AT_ONCE)
        self._works: dict[tuple[str, int], Work] = {}
        self._reports: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._term, self._mark = Term(0), 0
        self._leader_news = asyncio.Event()
        self._poll_news = asyncio.Event()
        self._offered = 0  # `free` of the poll under way
        self._polling: asyncio.Task[None] | None = None
        self._well_again: asyncio.TimerHandle | None = None  # while it is unwell
        self._stopping = False

    # -- what the node calls ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises DiskFailed."""
        await self._cache.open()
        await self._disk.make_directory(TEMPORARY)
        for entry in await self._disk.list(TEMPORARY):
            if entry.name.startswith("out-"):
                await self._disk.remove(f"{TEMPORARY}/{entry.name}")
        self._warm.warm()
        self._polling = asyncio.create_task(self._poll_for_ever(), name="worker poll")
        self._polling.add_done_callback(_look)

    async def stop(self, grace_s: float) -> None:
        """Take no more, let what runs end for `grace_s` seconds, then give the rest back and end all processes."""
        self._stopping = True
        if self._well_again is not None:
            self._well_again.cancel()
        await _cancel([self._polling] if self._polling is not None else [])
        works = [work.task for work in self._works.values() if work.task is not None]
        if works:
            await asyncio.wait(works, timeout=grace_s)
        left = [task for task in works if not task.done()]
        await _cancel(left)
        if left:
            await self._give_back()
        await _cancel([*self._reports.values()])
        if self._closing:
            await asyncio.wait(self._closing)
        for host in list(self._hosts.values()):
            await host.close()
        await self._warm.close()
        await self._cache.close()

    async def _give_back(self) -> None:
        """A last poll that names nothing held: by rule 2 no attempt is counted for what we did not finish."""
        try:
            await self._call(POLL, Poll(self._me, self._boot, 0, [], [], self._mark, 0.0), timeout_s=GOODBYE_S)
        except IdunnoError as error:
            log.info("tasks not given back", extra={"error": str(error)})

    def leader_changed(self) -> None:
        """There is another leader (or one again): whoever waits to try again does it now."""
        self._leader_news.set()
        self._leader_news = asyncio.Event()
        self._poll_news.set()

    @property
    def running(self) -> list[Held]:
        """What this worker holds, for status."""
        return [work.held for work in self._works.values()]

    @property
    def models(self) -> list[tuple[str, int, str]]:
        """(model, version, state) of each model it is to hold."""
        return [(*key, host.state) for key, host in self._hosts.items()]

    # -- polling ------------------------------------------------------------------------------------------------------

    async def _poll_for_ever(self) -> None:
        tries = 0
        while True:
            try:
                answer = await self._poll()
                if answer is not None:
                    self._take(answer)
            except IdunnoError as error:
                log.debug("poll failed", extra={"error": str(error)})
                await self._pause(tries)
                tries += 1
                continue
            tries = 0

    def _free(self) -> int:
        if self._stopping or self._well_again is not None:
            return 0
        slots = self._config.slots
        unfinished = sum(not work.computed for work in self._works.values())
        return max(0, min(slots + AHEAD - unfinished, HELD_PER_SLOT * slots - len(self._works)))

    async def _poll(self) -> PollAnswer | None:
        """The scheduler's answer; None when there was something new to offer before it came."""
        self._poll_news.clear()
        self._offered = self._free()
        ready = [host.key for host in self._hosts.values() if host.state == "ready"]
        held = [work.held for work in self._works.values()]
        request = Poll(self._me, self._boot, self._offered, ready, held, self._mark, POLL_S)
        call = asyncio.create_task(self._call(POLL, request, timeout_s=POLL_S + POLL_MARGIN_S))
        news = asyncio.create_task(self._poll_news.wait())
        try:
            await asyncio.wait([call, news], return_when=asyncio.FIRST_COMPLETED)
            return await call if call.done() else None
        finally:
            call.cancel()
            news.cancel()
            await asyncio.gather(call, news, return_exceptions=True)  # its error is told by the next poll

    def _slot_freed(self) -> None:
        if self._offered == 0 and self._free() > 0:
            self._poll_news.set()

    def _ailing(self) -> None:
        if self._well_again is not None:
            self._well_again.cancel()
        self._well_again = asyncio.get_running_loop().call_later(UNWELL_S, self._better)
        self._poll_news.set()

    def _better(self) -> None:
        self._well_again = None
        self._slot_freed()

    def _take(self, answer: PollAnswer) -> None:
        """Raises StaleTerm for the answer of a deposed scheduler."""
        if answer.term < self._term:
            raise StaleTerm(f"the answer is of term {answer.term}, term {self._term} was seen")
        if answer.term > self._term:
            self._term, self._mark = Term(answer.term), 0
        if answer.assignments is not None:
            self._mark = answer.assignments_mark
            self._assign(answer.assignments)
        for held in answer.drop:
            work = self._works.get((held.job, held.task))
            if work is not None and work.held.attempt == held.attempt:
                self._drop(work, "the scheduler dropped it")
        for lease in answer.leases:
            self._begin(lease)

    # -- tasks --------------------------------------------------------------------------------------------------------

    def _begin(self, lease: Lease) -> None:
        key = (lease.job, lease.task)
        known = self._works.get(key)
        if known is not None:
            if known.held.attempt >= lease.attempt:
                return  # an answer that came twice
            self._drop(known, f"attempt {lease.attempt} replaces it")
        if len(self._works) >= HELD_PER_SLOT * self._config.slots + AHEAD:
            log.warning("lease not taken", extra={"job": lease.job, "task": lease.task, "held": len(self._works)})
            return
        work = Work(lease, self._place)
        self._works[key] = work
        work.task = asyncio.create_task(work.run(), name=f"task {lease.job}/{lease.task}")
        work.task.add_done_callback(lambda task: self._over(work, task))

    def _over(self, work: Work, task: asyncio.Task[None]) -> None:
        key = (work.held.job, work.held.task)
        if self._works.get(key) is work:
            del self._works[key]
        _look(task)
        self._slot_freed()

    def _drop(self, work: Work, why: str) -> None:
        log.info("task dropped", extra={"job": work.held.job, "task": work.held.task, "why": why})
        del self._works[work.held.job, work.held.task]
        if work.task is not None:
            self._closing.add(work.task)
            work.task.add_done_callback(self._closing.discard)
            work.task.cancel()

    # -- models -------------------------------------------------------------------------------------------------------

    def _assign(self, assignments: list[Assignment]) -> None:
        wanted = {(one.model, one.version): one for one in assignments}
        for key, host in list(self._hosts.items()):
            if key not in wanted:
                del self._hosts[key]
                self._close(host)
        for key, assignment in wanted.items():
            host_known = self._hosts.get(key)
            if host_known is None:
                self._set_up(assignment)
            else:
                self._report(host_known)  # the scheduler may have missed it, or assigned it a second time

    def _set_up(self, assignment: Assignment) -> None:
        host = Host(
            assignment,
            self._cache,
            self._warm,
            slots=self._config.slots,
            threads=self._config.threads,
            local_path=self._disk.local_path,
            files_of=self._files_of,
            changed=self._host_changed,
        )
        self._hosts[host.key] = host
        host.start()

    async def _files_of(self, assignment: Assignment) -> Sequence[ModelFile]:
        """Raises NotFound when the model has another version meanwhile, or none."""
        if assignment.files:
            return assignment.files
        async with self._asking:
            request = AskFiles(self._me, assignment.model, assignment.version)
            return (await self.insist(MODEL_FILES, request)).files

    def _host_changed(self, host: Host) -> None:
        if self._hosts.get(host.key) is host:
            self._poll_news.set()
            self._report(host)

    def _close(self, host: Host) -> None:
        """End it once the tasks that run on it have ended."""

        async def close() -> None:
            works = [
                w.task for w in self._works.values() if w.task is not None and w.model == host.key and not w.computed
            ]
            if works:
                await asyncio.wait(works)
            await host.close()

        task = asyncio.create_task(close(), name=f"close model {host.assignment.model}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        task.add_done_callback(_look)

    def _report(self, host: Host) -> None:
        if host.state not in ("ready", "failed") or self._stopping:
            return
        error = one_line(host.error or "no reason given", characters_max=1000) if host.state == "failed" else ""
        old = self._reports.pop(host.key, None)
        if old is not None:
            old.cancel()
        task = asyncio.create_task(self._send(host, error), name=f"report of model {host.assignment.model}")
        self._reports[host.key] = task
        task.add_done_callback(lambda task: self._reported(host.key, task))

    async def _send(self, host: Host, error: str) -> None:
        model, version = host.key
        try:
            await self.insist(WORKER_REPORT, WorkerReport(self._me, model, version, error))
        except IdunnoError as refusal:
            log.info("report of a model not taken", extra={"model": model, "error": str(refusal)})
            return
        if error and self._hosts.get(host.key) is host:
            # It may be assigned here again at once, as the last worker left: ask anew what is to be held.
            del self._hosts[host.key]
            self._close(host)
            self._mark = 0
            self._poll_news.set()

    def _reported(self, key: tuple[str, int], task: asyncio.Task[None]) -> None:
        if self._reports.get(key) is task:
            del self._reports[key]
        _look(task)

    # -- talking to the scheduler, whoever it is ----------------------------------------------------------------------

    async def insist(self, method: Method[Q, A], request: Q, body: Buffer = b"") -> A:
        """Call until it is answered, through changes of leader. The request must be idempotent. Raises what says that it will
        never be taken."""
        tries = 0
        while True:
            try:
                return await self._call(method, request, body, timeout_s=REPORT_S)
            except IdunnoError as error:
                # A failure that may pass: nobody leads, its fate is unknown, something is full or not ready yet.
                if not (error.retryable or error.may_have_happened or isinstance(error, (NotReady, Exhausted))):
                    raise
                if isinstance(error, InternalError):
                    log.warning("scheduler failed at a report", extra={"method": method.name, "error": str(error)})
            await self._pause(tries)
            tries += 1

    async def _pause(self, tries: int) -> None:
        """A jittered back-off, cut short by a new leader."""
        longest_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(tries, 10))
        try:
            async with asyncio.timeout(longest_s * self._rng.uniform(0.5, 1.0)):
                await self._leader_news.wait()
        except TimeoutError:
            return


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def _look(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("task of the worker failed", extra={"task": task.get_name()}, exc_info=error)
