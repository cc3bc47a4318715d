# What a ledger would say is ready, set by hand.
from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable

from idunno.scheduler.queues import PLAN


class Readies:
    """queues.Ready of a test."""

    def __init__(self) -> None:
        self.tasks: dict[str, list[int]] = {}  # ready ones, rising; PLAN among them
        self.ended: dict[tuple[str, int], int] = {}  # attempts
        self.looks = 0

    def set(self, job: str, tasks: Iterable[int]) -> None:
        self.tasks[job] = sorted(tasks)

    def over(self, job: str, task: int) -> None:
        """It is not ready any more."""
        if task in self.tasks.get(job, ()):
            self.tasks[job].remove(task)

    def again(self, job: str, task: int, attempts: int) -> None:
        self.ended[job, task] = attempts
        if task not in self.tasks[job]:
            insort(self.tasks[job], task)

    def attempts(self, job: str, task: int) -> int:
        self.looks += 1
        tasks = self.tasks.get(job, [])
        at = bisect_right(tasks, task) - 1
        return self.ended.get((job, task), 0) if at >= 0 and tasks[at] == task else -1

    def next(self, job: str, after: int) -> int:
        self.looks += 1
        tasks = self.tasks.get(job, [])
        at = bisect_right(tasks, max(PLAN, after))
        return tasks[at] if at < len(tasks) else -1

    def count(self, job: str) -> int:
        self.looks += 1
        tasks = self.tasks.get(job, [])
        return len(tasks) - (tasks[:1] == [PLAN])
