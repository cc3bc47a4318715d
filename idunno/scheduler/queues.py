# idunno/scheduler/queues.py: the tasks that are ready, in the order in which they are to be handed out.
#
# Rule 1: model by virtual time, within it client by virtual time, within it job by submission, within it task by number.
# Rule 2: planning (PLAN) goes before all else of its model, because nobody knows how much work a job is until it is planned;
#         but one client has one planning under way at a time, so that a flood of jobs delays nobody.
# Rule 3: choosing costs the number of models and clients with work, never the number of tasks.
from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterable
from typing import Final

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


class Pick(msgspec.Struct, frozen=True):
    head: JobHead
    task: int
    attempt: int  # how many attempts of it have ended before
    queries: int  # what it is charged for


class _Job(msgspec.Struct):
    head: JobHead
    withheld: bool
    ready: set[int] = msgspec.field(default_factory=set)
    heap: list[int] = msgspec.field(default_factory=list)  # holds every number of `ready`, and stale ones


class _Model(msgspec.Struct):
    weight: int = WEIGHT_ONE
    ready: int = 0  # tasks and plannings that are queued
    clients: FairClock[str] = msgspec.field(default_factory=FairClock)
    jobs: dict[str, list[tuple[int, str]]] = msgspec.field(
        default_factory=dict
    )  # client -> (order, job) with ready tasks
    plans: dict[str, list[tuple[int, str]]] = msgspec.field(default_factory=dict)


class Queues:
    def __init__(self, attempts: Callable[[str, int], int]) -> None:
        """`attempts(job, task)`: how many attempts the ledger says have ended; -1: the task is not ready at all."""
        self._attempts = attempts
        self.clock: FairClock[str] = FairClock()
        self._jobs: dict[str, _Job] = {}
        self._models: dict[str, _Model] = {}

    # -- what there is ------------------------------------------------------------------------------------------------

    def knows(self, job: str) -> bool:
        return job in self._jobs

    def head(self, job: str) -> JobHead | None:
        known = self._jobs.get(job)
        return known.head if known is not None else None

    def is_ready(self, job: str, task: int) -> bool:
        known = self._jobs.get(job)
        return known is not None and task in known.ready

    def ready_of_job(self, job: str) -> int:
        known = self._jobs.get(job)
        return len(known.ready) if known is not None else 0

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
        """A job whose tasks will be put. Known already: its head is replaced (planning knew no task size)."""
        known = self._jobs.get(head.job)
        if known is None:
            self._jobs[head.job] = _Job(head, withheld)
        else:
            known.head = head

    def put(self, job: str, tasks: Iterable[int]) -> None:
        """Tasks of `job` are ready. One that is ready already stays where it is."""
        known = self._jobs.get(job)
        if known is None:
            return
        # A planned job has no planning left, so a job's heap never mixes the two.
        fresh = [task for task in tasks if task not in known.ready]
        if not fresh:
            return
        if not known.withheld:
            self._unlist(known)
        known.ready.update(fresh)
        if len(fresh) > 8:
            known.heap = sorted(known.ready)  # a sorted list is a heap
        else:
            for task in fresh:
                heapq.heappush(known.heap, task)
        if not known.withheld:
            self._list(known)

    def take(self, job: str, task: int) -> Pick | None:
        """Remove a ready task, queued or withheld: somebody works on it, or it is done.

        None when it is not here, or here by mistake: the ledger says it is not ready.
        """
        known = self._jobs.get(job)
        if known is None or task not in known.ready:
            return None
        if not known.withheld:
            self._unlist(known)
        known.ready.discard(task)
        while known.heap and known.heap[0] not in known.ready:
            heapq.heappop(known.heap)
        if not known.withheld:
            self._list(known)
        head, attempt = known.head, self._attempts(job, task)
        return None if attempt < 0 else Pick(head, task, attempt, 1 if task == PLAN else head.task_queries)

    def drop_job(self, job: str) -> None:
        known = self._jobs.pop(job, None)
        if known is not None and not known.withheld:
            self._unlist(known)
            self._settle(known.head, self._models[known.head.model])

    def release(self) -> None:
        """What was withheld is queued from now on."""
        for known in self._jobs.values():
            if known.withheld:
                known.withheld = False
                self._list(known)

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
        return job.head.job, job.heap[0]

    # -- the lists ----------------------------------------------------------------------------------------------------
    # A job stands in its client's lists exactly while it has ready tasks and is not withheld: every change takes it out,
    # changes it, puts it back and settles the clocks, which keeps one rule in one place.

    def _list(self, job: _Job) -> None:
        head, count = job.head, len(job.ready)
        model = self._models.setdefault(head.model, _Model())
        model.ready += count
        if PLAN in job.ready:
            insort(model.plans.setdefault(head.client, []), (head.order, head.job))
            count -= 1
        if count:
            insort(model.jobs.setdefault(head.client, []), (head.order, head.job))
        self._settle(head, model)

    def _unlist(self, job: _Job) -> None:
        head, model = job.head, self._models.setdefault(job.head.model, _Model())
        model.ready -= len(job.ready)
        for lists in (model.jobs, model.plans):
            listed = lists.get(head.client, [])
            at = bisect_left(listed, (head.order, head.job))
            if at < len(listed) and listed[at] == (head.order, head.job):
                del listed[at]
                if not listed:
                    del lists[head.client]

    def _settle(self, head: JobHead, model: _Model) -> None:
        """Who has nothing left rests, who has something competes. Never in between: resting gives credit away."""
        if head.client in model.jobs:
            model.clients.wake(head.client)
        else:
            model.clients.rest(head.client)
        if model.ready:
            self.clock.wake(head.model, model.weight)
        else:
            self.clock.rest(head.model)
