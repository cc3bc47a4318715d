# idunno/scheduler/queues.py: the tasks that are ready, in the order in which they are to be handed out.
#
# Rule 1: model by virtual time, within it client by virtual time, within it job by submission, within it task by number.
# Rule 2: planning (PLAN) goes before all else of its model, because nobody knows how much work a job is until it is planned;
#         but one client has one planning under way at a time, so that a flood of jobs delays nobody.
# Rule 3: choosing costs the number of models and clients with work, never the number of tasks.
# Rule 4: queued is what the ledger calls ready and nobody has. A job of a million tasks is a cursor here, and what is out.
from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Collection
from typing import Final, Protocol

import msgspec

from idunno.scheduler.fairness import WEIGHT_ONE, FairClock

PLAN: Final = -1
"""The task number that stands for counting the queries of a job's input."""


class JobHead(msgspec.Struct, frozen=True):
    """What the order depends on. `order` rises with submission; `task_queries` is what a task is charged for."""

    job: str
    model: str
    client: str
    order: int
    task_queries: int
    planned: bool = True  # its tasks are cut; before that its planning is all there is to hand out


class Pick(msgspec.Struct, frozen=True):
    head: JobHead
    task: int
    attempt: int  # how many attempts of it have ended before
    queries: int  # what it is charged for


class Ready(Protocol):
    """What the ledger says now. Whoever applies a change to it tells the queues at once: `take`, `put` or `drop_job`."""

    def attempts(self, job: str, task: int) -> int:
        """How many attempts of the task, or of PLAN, have ended; -1: it is not ready."""
        ...

    def next(self, job: str, after: int) -> int:
        """The lowest ready task above `after`; -1: none."""
        ...

    def count(self, job: str) -> int:
        """Tasks that are ready; planning is none."""
        ...


class _Job(msgspec.Struct):
    head: JobHead
    withheld: bool
    out: set[int] = msgspec.field(default_factory=set)  # ready, but taken: not queued
    low: int = 0  # every queued task below is in `back`
    back: list[int] = msgspec.field(default_factory=list)  # a heap of what came back below `low`, and of stale numbers
    listed: int = 0  # how many are queued, as its model's lists and clocks know it


class _Model(msgspec.Struct):
    weight: int = WEIGHT_ONE
    ready: int = 0  # tasks and plannings that are queued
    clients: FairClock[str] = msgspec.field(default_factory=FairClock)
    jobs: dict[str, list[tuple[int, str]]] = msgspec.field(
        default_factory=dict
    )  # client -> (order, job) with ready tasks
    plans: dict[str, list[tuple[int, str]]] = msgspec.field(default_factory=dict)


class Queues:
    def __init__(self, ready: Ready) -> None:
        self._ready = ready
        self.clock: FairClock[str] = FairClock()
        self._jobs: dict[str, _Job] = {}
        self._models: dict[str, _Model] = {}

    # -- what there is ------------------------------------------------------------------------------------------------

    def head(self, job: str) -> JobHead | None:
        known = self._jobs.get(job)
        return known.head if known is not None else None

    def is_ready(self, job: str, task: int) -> bool:
        """The task is queued, or withheld."""
        known = self._jobs.get(job)
        return known is not None and task not in known.out and self._ready.attempts(job, task) >= 0

    def ready_of_job(self, job: str) -> int:
        """Tasks and plannings queued, or withheld, or of a job that is yet to be added."""
        known = self._jobs.get(job)
        if known is not None:
            return self._queued(known)
        return self._ready.count(job) + (self._ready.attempts(job, PLAN) >= 0)

    def ready_of_model(self, model: str) -> int:
        """Tasks and plannings queued; those withheld are not."""
        known = self._models.get(model)
        return known.ready if known is not None else 0

    def __bool__(self) -> bool:
        return len(self.clock) > 0

    # -- changes ------------------------------------------------------------------------------------------------------

    def set_weight(self, model: str, weight: int) -> None:
        queue = self._models.setdefault(model, _Model())
        queue.weight = weight
        if queue.ready:
            self.clock.wake(model, weight)

    def drop_model(self, model: str) -> None:
        """The model is gone; it has no jobs any more."""
        known = self._models.get(model)
        if known is not None and not known.ready:
            del self._models[model]

    def add_job(self, head: JobHead, *, withheld: bool = False) -> None:
        """All that is ready of the job is queued. Known already: its head is replaced (planning knew no task size)."""
        known = self._jobs.get(head.job)
        if known is None:
            known = self._jobs[head.job] = _Job(head, withheld)
        else:
            self._list(known, 0)
            known.head = head
        self._relist(known)

    def put(self, job: str, task: int) -> None:
        """The task, which was taken, is to be handed out again. One that is queued stays where it is."""
        known = self._jobs.get(job)
        if known is None:
            return
        if task in known.out:
            known.out.discard(task)
            if task < known.low:
                heapq.heappush(known.back, task)
        self._relist(known)

    def take(self, job: str, task: int) -> Pick | None:
        """Remove a ready task, queued or withheld: somebody works on it, or it is done.

        None when it is not here, or the ledger says it is not ready (any more).
        """
        known = self._jobs.get(job)
        if known is None:
            return None
        attempt = self._ready.attempts(job, task)
        taken = attempt >= 0 and task not in known.out
        if taken:
            known.out.add(task)
            if known.back and known.back[0] == task:  # else it were there twice when it comes back
                heapq.heappop(known.back)
        elif attempt < 0:
            known.out.discard(task)
        self._relist(known)
        return Pick(known.head, task, attempt, 1 if task == PLAN else known.head.task_queries) if taken else None

    def drop_job(self, job: str) -> set[int]:
        """Nothing of it is handed out any more. Returns which of its tasks were taken."""
        known = self._jobs.pop(job, None)
        if known is None:
            return set()
        self._list(known, 0)
        return known.out

    def release(self) -> None:
        """What was withheld is queued from now on."""
        for known in self._jobs.values():
            if known.withheld:
                known.withheld = False
                self._relist(known)

    def charge(self, pick: Pick) -> None:
        self.clock.charge(pick.head.model, pick.queries)
        self._models.setdefault(pick.head.model, _Model()).clients.charge(pick.head.client, pick.queries)

    def refund(self, head: JobHead, queries: int) -> None:
        self.clock.refund(head.model, queries)
        model = self._models.get(head.model)
        if model is not None:
            model.clients.refund(head.client, queries)

    def weight(self, model: str) -> int:
        known = self._models.get(model)
        return known.weight if known is not None else WEIGHT_ONE

    # -- choosing -----------------------------------------------------------------------------------------------------

    def order(self) -> list[str]:
        """Models with queued tasks, the one furthest behind first."""
        return self.clock.order()

    def peek(self, model: str, planning: Collection[str]) -> tuple[str, int] | None:
        """(job, task) that `model` would hand out next; no planning of a client in `planning`. None when there is none."""
        queue = self._models.get(model)
        if queue is None:
            return None
        plans = [listed[0] for client, listed in queue.plans.items() if client not in planning]
        if plans:
            return min(plans)[1], PLAN
        if not queue.clients:
            return None
        job = self._jobs[queue.jobs[queue.clients.first()][0][1]]
        return job.head.job, self._lowest(job)

    def _lowest(self, job: _Job) -> int:
        """The lowest queued task of a job that has one."""
        name = job.head.job
        while job.back:
            if self.is_ready(name, job.back[0]):
                return job.back[0]
            heapq.heappop(job.back)
        # What is taken lies just above `low`, mostly: it is stepped over once, for `low` goes with it.
        task = self._ready.next(name, job.low - 1)
        while task in job.out:
            task = self._ready.next(name, task)
        assert task >= 0, f"job {name} has {job.listed} tasks queued, and none is found"
        job.low = task
        return task

    # -- the lists ----------------------------------------------------------------------------------------------------
    # A job stands in its client's lists exactly while something of it is queued: every change ends with `_relist`, which keeps
    # one rule in one place.

    def _queued(self, job: _Job) -> int:
        """How much of the job is queued or withheld."""
        name = job.head.job
        ready = self._ready.count(name) if job.head.planned else int(self._ready.attempts(name, PLAN) >= 0)
        return ready - len(job.out)

    def _relist(self, job: _Job) -> None:
        self._list(job, 0 if job.withheld else self._queued(job))

    def _list(self, job: _Job, queued: int) -> None:
        if queued == job.listed:
            return
        head, model = job.head, self._models.setdefault(job.head.model, _Model())
        model.ready += queued - job.listed
        if not queued or not job.listed:
            lists, entry = model.jobs if head.planned else model.plans, (head.order, head.job)
            listed = lists.setdefault(head.client, [])
            if queued:
                insort(listed, entry)
            else:
                del listed[bisect_left(listed, entry)]
            if not listed:
                del lists[head.client]
        job.listed = queued
        self._settle(head, model)

    def _settle(self, head: JobHead, model: _Model) -> None:
        """Who has nothing left rests, who has something competes."""
        if head.client in model.jobs:
            model.clients.wake(head.client)
        else:
            model.clients.rest(head.client)
        if model.ready:
            self.clock.wake(head.model, model.weight)
        else:
            self.clock.rest(head.model)
