# idunno/scheduler/leading.py: what the scheduler does while this node leads, for one term: the shell around the cores.
#
# Rule 1: it decides nothing: the cores do. It answers polls, proposes commands, and tells the cores what was applied.
# Rule 2: what it wants written is recomputed from the machine, at every tick or, for a model, when it or the roster changed or a
#         proposal about it is over: so one that failed is made again by itself, and one that became pointless is not. One
#         proposal about the same thing is under way at a time.
# Rule 3: nothing of it survives the term: on `stop` all polls are answered NotLeader, all tasks are cancelled.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable
from itertools import islice
from typing import Any

import msgspec

from idunno.base.errors import IdunnoError, InvalidArgument, NotFound, NotLeader, PermissionDenied
from idunno.base.ids import NodeId, Term
from idunno.coordinator.commands import Assign, FailAttempt, SetPresence, Unassign
from idunno.coordinator.ledger import FINISHED
from idunno.coordinator.records import JobRecord
from idunno.membership.events import Changed, MemberView
from idunno.scheduler import deploy
from idunno.scheduler.assigned import Assigned
from idunno.scheduler.cluster import Cluster
from idunno.scheduler.config import SchedulerConfig
from idunno.scheduler.dispatch import Answer, Dispatch, EndAttempt, Lease, Output, Polled
from idunno.scheduler.explain import Decisions
from idunno.scheduler.messages import Lease as LeaseMessage
from idunno.scheduler.messages import Poll, PollAnswer
from idunno.scheduler.presence import Presence
from idunno.scheduler.queues import PLAN, JobHead
from idunno.scheduler.ready import LedgerReady
from idunno.wire.calls import HEADER_BYTES_MAX, Actor, Role

log = logging.getLogger("idunno.scheduler")

ANSWER_BYTES_MAX = HEADER_BYTES_MAX - 64 * 1024
"""Of a poll's leases and assignments: a lease names up to 2,000 blocks, and a worker with many slots asks for many."""
JOBS_A_TURN = 200
"""Opened in one turn of the loop: about 2 ms."""
MODELS_A_TURN = 20
"""Whose workers are looked at in one turn of the loop: about 2 ms with 100 nodes."""
GONE = ("failed", "deleted", "stopped", "left")


class _Waiting(msgspec.Struct):
    future: asyncio.Future[Answer]
    seen: int  # the assignments' mark that the worker has


class Leading:
    def __init__(
        self,
        cluster: Cluster,
        me: NodeId,
        term: Term,
        members: Callable[[], list[MemberView]],
        config: SchedulerConfig,
        machine_ms: Callable[[], int],
    ) -> None:
        """`machine_ms`: machine time as it is now, for people."""
        self.term, self.me = term, me
        self._cluster, self._members, self._config, self._machine_ms = cluster, members, config, machine_ms
        self._loop = asyncio.get_running_loop()
        self._actor = Actor(me, Role.NODE)
        self.decisions = Decisions()
        self._ready = LedgerReady(cluster)
        self.dispatch = Dispatch(self._now(), self._may_hold_tasks(), self.decisions, self._ready)
        self._presence = Presence(me)
        self._polls: dict[NodeId, _Waiting] = {}
        self._ends: dict[tuple[str, int, int], EndAttempt] = {}
        self._tasks: dict[Hashable, asyncio.Task[bool]] = {}
        # Jobs of older terms that the dispatcher does not know yet, with their place in the order; the oldest is the last.
        self._unopened: dict[str, int] = {}
        self._order = 0
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        # What a turn of the loop has to look at again; `_look` does it once for all changes of the turn.
        self._rejudge = self._retell = True
        models = cluster.machine.registry.models()
        self.assigned = Assigned(models)
        # Models whose workers are to be looked at: now, and with the next tick, because a proposal came to nothing.
        self._rearrange = {record.model: None for record in models}
        self._retry: set[str] = set()
        self._present = {record.node: (record.presence, record.boot) for record in cluster.machine.roster.nodes()}
        self._stopped = False

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        machine = self._cluster.machine
        for record in machine.registry.models():
            self.dispatch.queues.set_weight(record.model, record.weight)
        jobs = [record.job for record in machine.ledger.unfinished()]
        self._order = len(jobs)
        self._unopened = dict(zip(reversed(jobs), range(len(jobs), 0, -1), strict=True))
        log.info(
            "scheduler began",
            extra={"term": self.term, "jobs": len(jobs), "awaited": len(self.dispatch.awaited)},
        )
        self._tick()

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        for waiting in self._polls.values():
            if not waiting.future.done():
                waiting.future.set_exception(NotLeader("this node does not lead any more"))
        self._polls.clear()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        log.info("scheduler ended", extra={"term": self.term})

    # -- what is heard ------------------------------------------------------------------------------------------------

    def model_changed(self, model: str) -> None:
        record = self._cluster.machine.registry.find(model)
        if record is not None:
            self.dispatch.queues.set_weight(model, record.weight)
        else:
            self.dispatch.queues.drop_model(model)
        self.assigned.changed(model, record)
        self._rearrange[model] = None
        self._retell = True
        self._soon_again()

    def roster_changed(self) -> None:
        now = {record.node: (record.presence, record.boot) for record in self._cluster.machine.roster.nodes()}
        for node in self._present.keys() - now.keys():
            self._lost(node, f"worker {self._name(node)} left the cluster")
        for node, (presence, boot) in now.items():
            worker = self.dispatch.workers.get(node)
            if presence != "present" and self._present.get(node, ("", 0))[0] == "present":
                self._lost(node, f"worker {self._name(node)} is {presence}")
            elif worker is not None and worker.boot < boot:
                self._lost(node, f"worker {worker.name} was restarted")
        self._present = now
        # Those that wait keep their place: with a roster that changes all the time the last by name would have no turn.
        self._rearrange.update(dict.fromkeys(record.model for record in self._cluster.machine.registry.models()))
        self._rejudge = True
        self._soon_again()

    def member_changed(self, changed: Changed) -> None:
        """Membership's verdict: leases come back before the roster has it."""
        if changed.member.state in GONE:
            self._lost(changed.member.node, f"worker {changed.member.name} is {changed.member.state}: {changed.reason}")
        self._rejudge = True
        self._soon_again()

    def look_at_members(self) -> None:
        self._rejudge = True
        self._soon_again()

    def job_changed(self, job: str, task: int | None = None) -> None:
        """`task`: an attempt of it ended. A completion is told by `task_completed` as well."""
        record, known = self._cluster.machine.ledger.find(job), self.dispatch.queues.head(job)
        if record is None or record.state in FINISHED:
            self._unopened.pop(job, None)
            self._carry_out(self.dispatch.close(job))
        elif job in self._unopened:
            pass  # what the ledger says when it is opened counts
        elif known is None or (record.state == "running" and not known.planned):
            self._carry_out(self.dispatch.completed(job, PLAN, self._now()))
            self._order += 1
            self._open(record, known.order if known is not None else self._order, old=False)
        elif task is not None:
            self.sync_task(job, task)
        self._soon_again()

    def task_completed(self, job: str, task: int) -> None:
        self._stamp()
        self._carry_out(self.dispatch.completed(job, task, self._now()))

    def sync_task(self, job: str, task: int) -> None:
        """Tell the dispatcher what the ledger says of a task that somebody reported on."""
        record = self._cluster.machine.ledger.find(job)
        if record is None or record.state in FINISHED:
            self._carry_out(self.dispatch.close(job))
            return
        attempts = self._ready.attempts(job, task)
        if attempts >= 0:
            self._carry_out(self.dispatch.ended(job, task, attempts, again=True))
        elif task != PLAN and record.state == "running":
            found = self._cluster.machine.ledger.task(job, task)
            if found.state == "success":
                self._carry_out(self.dispatch.completed(job, task, self._now()))
            else:
                self._carry_out(self.dispatch.ended(job, task, len(found.attempts), again=False))
        self._soon_again()

    def reported(self, job: str, task: int, node: NodeId) -> None:
        """A worker's report about the task is written, or came to nothing; what the ledger says counts."""
        self.sync_task(job, task)
        self._carry_out(self.dispatch.reported(job, task, node))

    def end_attempt(self, end: EndAttempt) -> None:
        """Write that the attempt ended without a result, until it is written or void."""
        self._ends[end.job, end.task, end.attempt] = end
        self._spawn(("end", end.job, end.task, end.attempt), self._end(end))

    # -- polls --------------------------------------------------------------------------------------------------------

    async def poll(self, request: Poll, remaining_s: float) -> PollAnswer:
        """Raises NotLeader when the term ends meanwhile, Conflict for a process that was replaced, NotFound."""
        record = self._cluster.machine.roster.node(request.node)
        self._supersede(request.node)
        waiting = _Waiting(self._loop.create_future(), request.assignments_seen)
        # Known to the loop before the core speaks: its outputs may answer this very poll.
        self._polls[request.node] = waiting
        try:
            self._stamp()
            for item in request.held:
                self._open_old(item.job)
            polled = Polled(
                request.node,
                record.name,
                request.boot,
                record.slots,
                request.free,
                tuple(request.ready),
                tuple(request.held),
            )
            self._carry_out(self.dispatch.poll(polled, self._now()))
            mark, _ = self.assigned.of(request.node)
            answer = Answer(request.node)
            if mark == request.assignments_seen or waiting.future.done():
                limit_s = min(request.wait_s, self._config.poll_max_s, remaining_s - 0.2)
                answer = await self._wait(waiting, max(0.0, limit_s))
            return self._answer(request, answer)
        finally:
            if self._polls.get(request.node) is waiting:
                del self._polls[request.node]
                self.dispatch.poll_over(request.node)

    async def _wait(self, waiting: _Waiting, limit_s: float) -> Answer:
        try:
            async with asyncio.timeout(limit_s if not waiting.future.done() else None):
                return await waiting.future
        except TimeoutError:
            # Both may have come in one turn of the loop: an answer with leases must not get lost.
            if waiting.future.done() and not waiting.future.cancelled():
                return waiting.future.result()
            return Answer(NodeId(""))

    def _answer(self, request: Poll, answer: Answer) -> PollAnswer:
        mark, assignments = self.assigned.of(request.node)
        told = assignments if mark != request.assignments_seen else None
        left_bytes = ANSWER_BYTES_MAX - len(msgspec.msgpack.encode(told))
        leases: list[LeaseMessage] = []
        for lease, version in answer.leases:
            message = self._message(lease, version)
            if message is None:
                continue
            left_bytes -= len(msgspec.msgpack.encode(message))
            if left_bytes < 0 and leases:
                break  # as if the answer had got lost: the next poll does not name them, and gets them again
            leases.append(message)
        return PollAnswer(
            term=self.term, leases=leases, assignments_mark=mark, assignments=told, drop=list(answer.drop)
        )

    def _message(self, lease: Lease, version: int) -> LeaseMessage | None:
        """The lease as the worker needs it; None when its job ended in this very moment."""
        record = self._cluster.machine.ledger.find(lease.head.job)
        if record is None or record.state in FINISHED:
            return None
        first = last = 0
        if lease.task != PLAN:
            task = self._cluster.machine.ledger.task(record.job, lease.task)
            first, last = task.first, task.last
        return LeaseMessage(
            job=record.job,
            task=lease.task,
            attempt=lease.attempt,
            model=record.model,
            model_version=version,
            first=first,
            last=last,
            input_kind=record.input_kind,
            input_size=record.input_size,
            input_blocks=list(record.input_blocks),
            input_name=record.input_name,
            input_version=record.input_version,
        )

    def _supersede(self, node: NodeId) -> None:
        """A node has one poll: an older one is of a connection that broke, or of an older process."""
        old = self._polls.pop(node, None)
        if old is not None and not old.future.done():
            self.dispatch.poll_over(node)
            old.future.set_result(Answer(node))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _now(self) -> int:
        return int(self._loop.time() * 1000)

    def _stamp(self) -> None:
        self.dispatch.wall_ms = self._machine_ms()

    def _name(self, node: NodeId) -> str:
        return self._cluster.machine.roster.name(node)

    def _open_old(self, job: str) -> None:
        """A job of an older term, if the dispatcher does not know it yet."""
        order = self._unopened.pop(job, None)
        if order is not None:
            self._open(self._cluster.machine.ledger.job(job), order, old=True)

    def _open_some(self) -> None:
        """Nothing of older terms is lent while the dispatcher recovers: they are opened after it, many in several turns."""
        if self.dispatch.recovering:
            return
        for _ in range(min(JOBS_A_TURN, len(self._unopened))):
            job, order = self._unopened.popitem()
            self._open(self._cluster.machine.ledger.job(job), order, old=True)

    def _open(self, record: JobRecord, order: int, *, old: bool) -> None:
        queries, planned = self._cluster.machine.ledger.task_queries(record.job) or 1, record.state == "running"
        self.dispatch.open(JobHead(record.job, record.model, record.client, order, queries, planned), old=old)

    def _may_hold_tasks(self) -> set[NodeId]:
        """Who may work on something a leader before this one lent: workers of models, but for those that are gone."""
        machine = self._cluster.machine
        gone = {member.node for member in self._members() if member.state in GONE}
        workers = {w.node for record in machine.registry.models() for w in record.workers if w.state == "ready"}
        present = {record.node for record in machine.roster.nodes() if record.presence == "present"}
        return (workers & present) - gone

    def _lost(self, node: NodeId, why: str) -> None:
        self._stamp()
        self._carry_out(self.dispatch.lost(node, why))
        self._carry_out(self.dispatch.not_awaited(node, self._now()))

    def _carry_out(self, outputs: list[Output]) -> None:
        for output in outputs:
            if isinstance(output, EndAttempt):
                log.warning(
                    "task given back",
                    extra={"job": output.job, "task": output.task, "node": output.node, "reason": output.error},
                )
                self.end_attempt(output)
                continue
            waiting = self._polls.pop(output.node, None)
            if waiting is not None and not waiting.future.done():
                waiting.future.set_result(output)
        if self._unopened and not self.dispatch.recovering:
            self._soon_again()

    # -- periodic work ------------------------------------------------------------------------------------------------

    def _soon_again(self) -> None:
        """Look once in the next turn of the loop, however much changed in this one."""
        if self._soon is None and not self._stopped:
            self._soon = self._loop.call_soon(self._look)

    def _tick(self) -> None:
        if self._stopped:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._config.tick_s, self._tick)
        self._stamp()
        self._carry_out(self.dispatch.tick(self._now()))
        for key, end in list(self._ends.items()):
            self._spawn(("end", *key), self._end(end))
        self._rearrange.update(dict.fromkeys(sorted(self._retry)))
        self._retry.clear()
        self._rejudge = True
        self._look()

    def _look(self) -> None:
        self._soon = None
        self._stamp()
        self._open_some()
        self._carry_out(self.dispatch.wake(self._now()))
        if self._retell:
            self._retell = False
            self._tell_assignments()
        if self._rejudge:
            self._rejudge = False
            self._write_presence()
        if self._rearrange:
            self._arrange()

    def _tell_assignments(self) -> None:
        """Answer the polls of workers whose assignments changed."""
        for node, waiting in list(self._polls.items()):
            if self.assigned.of(node)[0] != waiting.seen and not waiting.future.done():
                self._supersede(node)

    def _write_presence(self) -> None:
        roster = self._cluster.machine.roster.nodes()
        for command in self._presence.decide(roster, self._members(), self._now()):
            self._spawn(("presence", command.node), self._propose(command))

    def _arrange(self) -> None:
        """Look at who holds the models that wait for it, or at some of them: there may be a thousand, and a hundred nodes."""
        nodes = self._cluster.machine.roster.nodes()
        able = deploy.eligible(nodes, self.me, self._config.scheduler_works)
        present = {record.node for record in nodes if record.presence == "present"}
        load = self.assigned.load()
        busy = {key[1] for key in self._tasks if isinstance(key, tuple) and key[0] == "deploy"}
        for model in list(islice(self._rearrange, MODELS_A_TURN)):
            del self._rearrange[model]
            record = self._cluster.machine.registry.find(model)
            if record is None or model in busy:
                continue  # decided anew when what is under way is over
            for command in deploy.changes(record, able, present, load, self._name):
                self._spawn(("deploy", model, command.node), self._propose(command))
        if self._rearrange:
            self._soon_again()

    async def _propose(self, command: SetPresence | Assign | Unassign) -> bool:
        about = [command.node] if isinstance(command, SetPresence) else [command.model, command.node]
        what = type(command).__struct_config__.tag
        state = f" {command.presence}" if isinstance(command, SetPresence) else f" {command.model} v{command.version}"
        why = f"{what}{state} {self._name(command.node)}: {command.reason}"
        self.decisions.record(self._machine_ms(), why, *about)
        log.info("scheduler decided", extra={"what": str(what), "node": command.node, "reason": why})
        done, _ = await self._cluster.propose(command, actor=self._actor, timeout_s=self._config.propose_s)
        return bool(done.changed)

    async def _end(self, end: EndAttempt) -> bool:
        command = FailAttempt(end.job, end.task, end.node, end.attempt, end.error)
        try:
            await self._cluster.propose(command, actor=self._actor, timeout_s=self._config.propose_s)
        except (NotFound, InvalidArgument, PermissionDenied) as error:  # it will never be written
            log.warning("end of attempt refused", extra={"job": end.job, "task": end.task, "error": str(error)})
        self._ends.pop((end.job, end.task, end.attempt), None)
        self.sync_task(end.job, end.task)
        return False

    def _spawn(self, key: Hashable, work: Coroutine[Any, Any, bool]) -> None:
        """Run `work` unless work of the same key is under way. Errors are logged; the next tick tries again.

        When it is no longer under way, what it is about is looked at again: at once if it returned True, it changed something.
        """
        if key in self._tasks or self._stopped:
            work.close()
            return
        task = self._loop.create_task(work)
        self._tasks[key] = task

        def over(done: asyncio.Task[bool]) -> None:
            del self._tasks[key]
            if done.cancelled():
                return
            error = done.exception()
            if isinstance(error, IdunnoError):
                log.warning(
                    "scheduler's command failed", extra={"what": str(key), "error": str(error), "code": error.code}
                )
            elif error is not None:
                log.error("scheduler's command failed by a bug", extra={"what": str(key)}, exc_info=error)
            if isinstance(key, tuple) and key[0] == "deploy":
                if error is None and done.result():
                    self._rearrange[key[1]] = None
                    self._soon_again()
                else:
                    self._retry.add(key[1])

        task.add_done_callback(over)
