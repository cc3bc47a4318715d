# idunno/scheduler/workers.py: what workers call: polls and reports. Answered by the leader only; the agent asks again elsewhere.
#
# Rule 1: a node speaks for itself: the node named in a request is the one that sent it.
# Rule 2: a report is answered when it is in the log. An error that no retry can mend ends the attempt, so that a result which
#         is refused again and again is counted like any other poison.
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from idunno.base.errors import Conflict, InvalidArgument, NotFound, NotLeader, PermissionDenied
from idunno.base.ids import NodeId
from idunno.coordinator.commands import CompleteTask, FailAttempt, PlanJob, ReportWorker
from idunno.coordinator.ledger import TASKS_MAX
from idunno.scheduler.cluster import Cluster
from idunno.scheduler.dispatch import EndAttempt
from idunno.scheduler.leading import Leading
from idunno.scheduler.messages import (
    ATTEMPT_FAILED,
    MODEL_FILES,
    PLAN_DONE,
    POLL,
    TASK_DONE,
    WORKER_REPORT,
    AskFiles,
    AttemptFailed,
    ModelFiles,
    PlanDone,
    Poll,
    PollAnswer,
    TaskDone,
    WorkerReport,
)
from idunno.scheduler.queues import PLAN
from idunno.scheduler.sizing import task_queries
from idunno.wire.answering import left_s
from idunno.wire.calls import Call, Empty, Registrar, Role

REFUSED: Final = (InvalidArgument, Conflict, PermissionDenied, NotFound)


class WorkerCalls:
    def __init__(self, cluster: Cluster, leading: Callable[[], Leading | None]) -> None:
        self._cluster, self._leading = cluster, leading

    def register(self, registrar: Registrar) -> None:
        registrar.register(POLL, self.poll)
        registrar.register(MODEL_FILES, self.model_files)
        registrar.register(PLAN_DONE, self.plan_done)
        registrar.register(TASK_DONE, self.task_done)
        registrar.register(ATTEMPT_FAILED, self.attempt_failed)
        registrar.register(WORKER_REPORT, self.worker_report)

    async def poll(self, call: Call[Poll]) -> PollAnswer:
        leading = self._leader_for(call, call.request.node)
        return await leading.poll(call.request, call.remaining_s())

    async def model_files(self, call: Call[AskFiles]) -> ModelFiles:
        """Raises NotFound for a version that is not the model's present one: the next poll tells the worker so."""
        request = call.request
        self._leader_for(call, request.node)
        record = (await self._cluster.read(left_s(call))).registry.get(request.model)
        if record.version != request.version:
            raise NotFound(f"model {request.model} is at version {record.version}, not {request.version} any more")
        return ModelFiles(list(record.files))

    async def plan_done(self, call: Call[PlanDone]) -> Empty:
        request, leading = call.request, self._leader_for(call, call.request.node)
        machine = self._cluster.machine
        job = machine.ledger.find(request.job)
        if job is None or job.state != "planning":
            return Empty()  # told before, or not wanted any more
        timing = machine.registry.timing(job.model)
        model = machine.registry.find(job.model)
        size = task_queries(job.batch_size, model.batch_size if model is not None else 0, timing.count, timing.sum_us)
        if not job.batch_size:  # a chosen size grows as needed; a given one is kept, or refused with the numbers
            size = max(size, -(-request.queries // TASKS_MAX))
        command = PlanJob(request.job, request.queries, size)
        leading.dispatch.reporting(request.job, PLAN, request.node)
        try:
            await self._cluster.propose(command, actor=call.actor, timeout_s=left_s(call))
        except REFUSED as error:
            await self._cluster.propose(
                FailAttempt(request.job, PLAN, request.node, len(job.plan_attempts), str(error), fatal=True),
                actor=call.actor,
                timeout_s=left_s(call),
            )
        finally:
            self._reported(leading, request.job, PLAN, request.node)
        return Empty()

    async def task_done(self, call: Call[TaskDone]) -> Empty:
        request, leading = call.request, self._leader_for(call, call.request.node)
        command = CompleteTask(
            job=request.job,
            task=request.task,
            node=request.node,
            put=request.put,
            size=request.size,
            blocks=tuple(request.blocks),
            content=bytes(call.body),
            done=request.done,
            errors=request.errors,
            timing=request.timing,
        )
        lease = leading.dispatch.leases.get((request.job, request.task))
        attempt = lease.attempt if lease is not None and lease.node == request.node and not lease.ended else None
        leading.dispatch.reporting(request.job, request.task, request.node)
        try:
            await self._cluster.propose(command, actor=call.actor, timeout_s=left_s(call))
        except REFUSED as error:
            if attempt is not None and self._leading() is leading:
                why = f"its result was refused: {error}"
                leading.end_attempt(EndAttempt(request.job, request.task, attempt, request.node, why))
            raise
        finally:
            self._reported(leading, request.job, request.task, request.node)
        return Empty()

    async def attempt_failed(self, call: Call[AttemptFailed]) -> Empty:
        request, leading = call.request, self._leader_for(call, call.request.node)
        command = FailAttempt(
            request.job, request.task, request.node, request.attempt, request.error, fatal=request.fatal
        )
        leading.dispatch.reporting(request.job, request.task, request.node)
        try:
            await self._cluster.propose(command, actor=call.actor, timeout_s=left_s(call))
        finally:
            self._reported(leading, request.job, request.task, request.node)
        return Empty()

    async def worker_report(self, call: Call[WorkerReport]) -> Empty:
        request = call.request
        self._leader_for(call, request.node)
        command = ReportWorker(request.model, request.version, request.node, request.error)
        await self._cluster.propose(command, actor=call.actor, timeout_s=left_s(call))
        return Empty()

    def _leader_for(self, call: Call[Any], node: NodeId) -> Leading:
        """Raises NotLeader, and PermissionDenied when the sender is not `node`."""
        if call.actor.role is not Role.NODE or call.actor.name != node:
            raise PermissionDenied(f"a worker reports for itself: {call.actor.name or 'the sender'} is not node {node}")
        leading = self._leading()
        if leading is None:
            raise NotLeader("this node is not the scheduler: ask the coordinator's leader")
        return leading

    def _reported(self, leading: Leading, job: str, task: int, node: NodeId) -> None:
        """The report is written or came to nothing: what the ledger says counts."""
        if self._leading() is leading:
            leading.reported(job, task, node)
