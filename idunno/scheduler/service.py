# idunno/scheduler/service.py: the scheduler as the node sees it: handlers, effects in, the leader's work begun and ended.
#
# Rule 1: every node answers what its machine knows; what only the leader knows is asked of it, on behalf of the same actor.
# Rule 2: it acts as the scheduler exactly from role_changed(True) to role_changed(False).
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from idunno.base.ids import Index, NodeId, Term
from idunno.coordinator.effects import Effect, JobChanged, JobsReplaced, ModelChanged, RosterChanged, TaskCompleted
from idunno.coordinator.ledger import FINISHED
from idunno.membership.events import Changed, MemberView
from idunno.scheduler.cluster import Cluster
from idunno.scheduler.config import SchedulerConfig
from idunno.scheduler.jobs import JobCalls
from idunno.scheduler.leading import Leading
from idunno.scheduler.models import ModelCalls
from idunno.scheduler.rates import RateWindow
from idunno.scheduler.stats import StatsCalls
from idunno.scheduler.waiters import Waiters
from idunno.scheduler.workers import WorkerCalls
from idunno.wire.calls import Registrar

log = logging.getLogger("idunno.scheduler")


class SchedulerService:
    """Construct it with the machine restored, `start` it before the first effect, and feed it.

    `members`: membership's view. Everything must be called on the one event loop that `start` ran on.
    """

    def __init__(
        self,
        cluster: Cluster,
        registrar: Registrar,
        me: NodeId,
        members: Callable[[], list[MemberView]],
        config: SchedulerConfig | None = None,
    ) -> None:
        self._cluster, self._me, self._members = cluster, me, members
        self._config = config if config is not None else SchedulerConfig()
        self._window = RateWindow()
        self._waiters = Waiters(self._config.waiters_max)
        self._leading: Leading | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls = (
            WorkerCalls(cluster, self.leading),
            ModelCalls(cluster, me, self._config, self._waiters, self.leading),
            JobCalls(cluster, self._config, self._waiters, self.leading, self._machine_ms),
            StatsCalls(cluster, self._window, self._clock_ms, self.leading),
        )
        for calls in self._calls:
            calls.register(registrar)

    # -- for the node -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        machine = self._cluster.machine
        self._window.observe(machine.now_ms, self._clock_ms())
        for record in machine.registry.models():
            self._look_at_work(record.model)

    async def stop(self) -> None:
        """Long polls are answered, the scheduler's work is cancelled. Its handlers may be called on: they answer NotLeader."""
        self.role_changed(False, Term(0))
        self._waiters.close()
        await asyncio.gather(*self._ending, return_exceptions=True)

    def follow(self, index: Index, effect: Effect) -> None:
        """For coordinator.applier.Applier.subscribe."""
        self.applied((effect,))

    def applied(self, effects: Iterable[Effect]) -> None:
        """The machine's effects, in order, right after each apply."""
        clock_ms = self._clock_ms()
        self._window.observe(self._cluster.machine.now_ms, clock_ms)
        leading = self._leading
        for effect in effects:
            match effect:
                case TaskCompleted(job, task, model, queries, at_ms):
                    self._window.completed(model, queries, at_ms, clock_ms)
                    if leading is not None:
                        leading.task_completed(job, task)
                case JobChanged(job, task):
                    self._job_changed(job)
                    if leading is not None:
                        leading.job_changed(job, task)
                case ModelChanged(model):
                    self._look_at_work(model)
                    self._waiters.tell(f"model {model}")
                    if leading is not None:
                        leading.model_changed(model)
                case JobsReplaced():  # not where this node leads; each model that there is or was is told as changed
                    self._waiters.close()
                case RosterChanged():
                    if leading is not None:
                        leading.roster_changed()
                case _:
                    pass  # files are not our business

    def role_changed(self, is_leader: bool, term: Term) -> None:
        """This node leads in `term` (its no-op is applied), or does not lead any more."""
        old, self._leading = self._leading, None
        if old is not None:
            if is_leader and old.term == term:
                self._leading = old
                return
            assert self._loop is not None
            ending = self._loop.create_task(old.stop())
            self._ending.add(ending)
            ending.add_done_callback(self._ended)
            self._waiters.close()  # who waits for what only the scheduler knows must look for the new one
        if is_leader:
            self._leading = Leading(self._cluster, self._me, term, self._members, self._config, self._machine_ms)
            self._leading.start()

    def look_at_members(self) -> None:
        """What `members` tells has changed."""
        if self._leading is not None:
            self._leading.look_at_members()

    def member_changed(self, changed: Changed) -> None:
        if self._leading is not None:
            self._leading.member_changed(changed)

    # -- for status ---------------------------------------------------------------------------------------------------

    def leading(self) -> Leading | None:
        """The scheduler's work, where this node leads."""
        return self._leading

    @property
    def recovering(self) -> bool:
        """This node leads, and has not yet heard from every worker what it holds."""
        return self._leading is not None and self._leading.dispatch.recovering

    @property
    def waiting(self) -> int:
        """Tasks at workers; 0 where this node does not lead."""
        return len(self._leading.dispatch.leases) if self._leading is not None else 0

    def rates(self) -> dict[str, float]:
        """Queries/s of each model over the last 10 s."""
        return self._window.rates(self._clock_ms())

    # -- inside -------------------------------------------------------------------------------------------------------

    def _clock_ms(self) -> int:
        assert self._loop is not None, "start() comes first"
        return int(self._loop.time() * 1000)

    def _machine_ms(self) -> int:
        return self._window.machine_ms(self._clock_ms())

    def _job_changed(self, job: str) -> None:
        record = self._cluster.machine.ledger.find(job)
        if record is not None:
            self._look_at_work(record.model)
        if record is None or record.state in FINISHED:
            self._waiters.tell(f"end of {job}")
        self._waiters.tell(f"job {job}")

    def _look_at_work(self, model: str) -> None:
        machine = self._cluster.machine
        self._window.waiting(model, machine.ledger.unanswered(model) > 0, machine.now_ms)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("scheduler did not end cleanly", exc_info=task.exception())
