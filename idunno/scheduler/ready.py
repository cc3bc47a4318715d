# idunno/scheduler/ready.py: which tasks the ledger calls ready, as the queues ask.
from __future__ import annotations

from idunno.base.errors import NotFound
from idunno.scheduler.cluster import Cluster
from idunno.scheduler.queues import PLAN


class LedgerReady:
    """queues.Ready, of the machine as it is now."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def attempts(self, job: str, task: int) -> int:
        ledger = self._cluster.machine.ledger
        record = ledger.find(job)
        if record is None:
            return -1
        if task == PLAN:
            return len(record.plan_attempts) if record.state == "planning" else -1
        if record.state != "running":
            return -1
        try:
            found = ledger.task(job, task)
        except NotFound:
            return -1
        return len(found.attempts) if found.state == "ready" else -1

    def next(self, job: str, after: int) -> int:
        return self._cluster.machine.ledger.next_ready(job, after) if self._is_running(job) else -1

    def count(self, job: str) -> int:
        return self._cluster.machine.ledger.counts(job).ready if self._is_running(job) else 0

    def _is_running(self, job: str) -> bool:
        record = self._cluster.machine.ledger.find(job)
        return record is not None and record.state == "running"
