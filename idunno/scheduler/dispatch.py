# idunno/scheduler/dispatch.py: which worker works on which task: leases, polls, and what is given back.
#
# Rule 1: leases are soft state of one leader in one term. The ledger alone says what is done and how many attempts ended;
#         this file is told by `completed`, `ended` and `close` once that is applied, and never guesses it.
# Rule 2: a worker gets tasks of models it says are ready, and no more than it says it is free for. As long as there is such
#         a task, it gets one at every poll: the order among models, clients and jobs is in queues.py.
# Rule 3: a lost worker's leases are over at once, but a task is handed out again only when the end of its attempt is
#         applied: so poison is counted by the log, whoever leads.
# Rule 4: a new leader withholds what the log calls ready, because it may be under way somewhere, until every worker it awaits
#         has said what it holds, or GRACE_MS. Handing out twice does no harm (a second completion changes nothing), it is waste.
from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

import msgspec

from idunno.base.errors import Conflict
from idunno.base.ids import NodeId
from idunno.scheduler.explain import Decisions
from idunno.scheduler.messages import Held
from idunno.scheduler.queues import PLAN, JobHead, Pick, Queues, Ready

GRACE_MS: Final = 3_000
"""How long a new leader waits for workers that do not say what they hold: they poll again within one connection's time."""
SILENT_MS: Final = 30_000
"""Without a poll for this long a worker is lost, whatever membership says: three long polls of 10 s."""
LEASES_MAX: Final = 64
"""Leases a poll may ask for: bounds the answer, whatever the worker says."""


class Lease(msgspec.Struct):
    head: JobHead
    task: int
    attempt: int
    node: NodeId
    since_ms: int
    queries: int
    reporting: bool = False  # its end is being written into the log
    ended: bool = False  # given back; waits until the end of its attempt is applied

    @property
    def held(self) -> Held:
        return Held(job=self.head.job, task=self.task, attempt=self.attempt)


class Worker(msgspec.Struct):
    node: NodeId
    name: str
    boot: int
    slots: int
    heard_ms: int
    ready: dict[str, int] = msgspec.field(default_factory=dict)  # model -> version
    free: int = 0
    waiting: bool = False  # a poll of it is unanswered
    leases: dict[tuple[str, int], Lease] = msgspec.field(default_factory=dict)


class Polled(msgspec.Struct, frozen=True):  # input
    node: NodeId
    name: str
    boot: int
    slots: int
    free: int
    ready: tuple[tuple[str, int], ...]
    held: tuple[Held, ...]


class Answer(msgspec.Struct, frozen=True):  # output
    """Answer the unanswered poll of `node`: new leases (each with the version the worker has), and held ones that are void."""

    node: NodeId
    leases: tuple[tuple[Lease, int], ...] = ()
    drop: tuple[Held, ...] = ()


class EndAttempt(msgspec.Struct, frozen=True):  # output
    """Write into the log that this attempt ended without a result; call `ended` when it is applied."""

    job: str
    task: int
    attempt: int
    node: NodeId
    error: str


Output: TypeAlias = Answer | EndAttempt


class Dispatch:
    """The dispatcher of one term. Same calls in the same order, same outputs; times are in ms of one steady clock.

    `wall_ms` beside `now_ms` is only written into decisions, for people.
    """

    def __init__(self, now_ms: int, awaited: Iterable[NodeId], decisions: Decisions, ready: Ready) -> None:
        self.queues = Queues(ready)
        self._ready = ready
        self.workers: dict[NodeId, Worker] = {}
        self.leases: dict[tuple[str, int], Lease] = {}
        self.decisions = decisions
        self.wall_ms = 0
        self._planning: dict[str, int] = {}  # client -> plannings under way
        self._awaited = set(awaited)
        self._grace_until_ms = now_ms + GRACE_MS
        self.recovering = bool(self._awaited)

    @property
    def awaited(self) -> frozenset[NodeId]:
        """Workers that have not yet said what they hold."""
        return frozenset(self._awaited)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def open(self, head: JobHead, *, old: bool) -> None:
        """A job of which something may be ready; `old`: it was there before this leader was. Call `wake` after."""
        self.queues.add_job(head, withheld=old and self.recovering)

    def close(self, job: str) -> list[Output]:
        """The job is finished, cancelled or gone: nothing of it is handed out any more, and who works on it is told to stop."""
        outputs: list[Output] = []
        for task in sorted(self.queues.drop_job(job)):
            lease = self.leases[job, task]
            self._end(lease)
            outputs += self._tell_void(lease)
        return outputs

    def completed(self, job: str, task: int, now_ms: int) -> list[Output]:
        """The task has a result, from whomever."""
        self.queues.take(job, task)
        lease = self.leases.get((job, task))
        if lease is None:
            return []
        node, told = lease.node, [] if lease.reporting else self._tell_void(lease)
        self._end(lease)
        worker = self.workers.get(node)
        # Its poll may wait because it had enough; now it has one less.
        return told or (self._serve(worker, now_ms) if worker is not None else [])

    def ended(self, job: str, task: int, attempts: int, *, again: bool) -> list[Output]:
        """`attempts` attempts of the task have ended, as applied. `again`: it is ready for another. Call `wake` after."""
        lease = self.leases.get((job, task))
        outputs: list[Output] = []
        if lease is not None:
            if lease.attempt >= attempts:
                return []  # the lease is of a later attempt
            self.queues.refund(lease.head, lease.queries)
            if not lease.reporting and not lease.ended:
                outputs = self._tell_void(lease)
            self._end(lease)
        if again:
            self.queues.put(job, task)
        else:
            self.queues.take(job, task)
        return outputs

    def reporting(self, job: str, task: int, node: NodeId) -> None:
        """`node` has brought an end for the task, which is on its way into the log: it is not given back meanwhile."""
        lease = self.leases.get((job, task))
        if lease is not None and lease.node == node:
            lease.reporting = True

    def reported(self, job: str, task: int, node: NodeId) -> list[Output]:
        """What `reporting` announced is over. A lease that is still here: it came to nothing, and the worker reports again."""
        lease = self.leases.get((job, task))
        if lease is None or lease.node != node or not lease.reporting:
            return []
        lease.reporting = False
        worker = self.workers.get(node)
        if worker is not None and (job, task) in worker.leases:
            return []
        return [self._give_back(lease, f"worker {node} was lost while it reported")]

    # -- workers ------------------------------------------------------------------------------------------------------

    def poll(self, polled: Polled, now_ms: int) -> list[Output]:
        """A worker asks. It counts as waiting until an Answer for it comes out, or `poll_over`. Raises Conflict."""
        outputs: list[Output] = []
        self.poll_over(polled.node)
        worker = self.workers.get(polled.node)
        if worker is not None and polled.boot != worker.boot:
            if polled.boot < worker.boot:
                raise Conflict(
                    f"node {polled.name} polled as process {polled.boot}, but its process {worker.boot} works already: "
                    "is its data directory in use twice?"
                )
            outputs += self.lost(polled.node, f"worker {polled.name} was restarted")
            worker = None
        if worker is None:
            worker = self.workers[polled.node] = Worker(polled.node, polled.name, polled.boot, polled.slots, now_ms)
        worker.heard_ms, worker.slots, worker.name = now_ms, max(1, polled.slots), polled.name
        worker.ready, worker.free = dict(sorted(polled.ready)), max(0, min(LEASES_MAX, polled.free))
        drop, gave_back = self._reconcile(worker, polled.held, now_ms)
        outputs += self._heard_from(worker.node, now_ms)
        worker.waiting = True  # only now: its answer must carry `drop`
        outputs += self._serve(worker, now_ms, drop)
        return outputs + self.wake(now_ms) if gave_back else outputs

    def poll_over(self, node: NodeId) -> None:
        """Its poll was answered otherwise, timed out, or was cut."""
        worker = self.workers.get(node)
        if worker is not None:
            worker.waiting = False

    def lost(self, node: NodeId, why: str) -> list[Output]:
        """The worker is gone, or counts as gone: all it held is given back."""
        worker = self.workers.pop(node, None)
        outputs: list[Output] = []
        if worker is not None:
            # If it lives after all, its poll should not sleep on with a scheduler that has forgotten it.
            outputs = [Answer(node)] if worker.waiting else []
            held = list(worker.leases.values())
            worker.leases.clear()
            outputs += [self._give_back(lease, why) for lease in held if not lease.reporting]
            self._decided(f"{why}: {len(held)} tasks given back", node)
        return outputs

    def not_awaited(self, node: NodeId, now_ms: int) -> list[Output]:
        """A new leader need not wait for what this node says it holds: it failed."""
        return self._heard_from(node, now_ms)

    def tick(self, now_ms: int) -> list[Output]:
        """Call about once a second: ends the grace, and gives back what silent workers hold."""
        outputs: list[Output] = []
        if self.recovering and now_ms >= self._grace_until_ms:
            self._awaited.clear()
            outputs += self._heard_from(None, now_ms)
        silent = [w for w in self.workers.values() if now_ms - w.heard_ms > SILENT_MS]
        for worker in sorted(silent, key=lambda w: w.node):
            outputs += self.lost(worker.node, f"worker {worker.name} has not polled for {SILENT_MS // 1000} s")
        return outputs

    def wake(self, now_ms: int) -> list[Output]:
        """Hand out what has become ready: one task a waiting worker and round, the least loaded first."""
        if not self.queues:
            return []
        waiting = [w for w in self.workers.values() if w.waiting and w.free > 0]
        given: dict[NodeId, list[tuple[Lease, int]]] = {}
        todo = sorted(waiting, key=lambda w: (len(w.leases), w.node))
        while todo:
            still = []
            for worker in todo:
                granted = self._grant(worker, now_ms)
                if granted is not None:
                    given.setdefault(worker.node, []).append(granted)
                    if len(given[worker.node]) < worker.free:
                        still.append(worker)
            todo = still
        for node in given:
            self.workers[node].waiting = False
        return [Answer(node, tuple(leases)) for node, leases in given.items()]

    # -- inside -------------------------------------------------------------------------------------------------------

    def _serve(self, worker: Worker, now_ms: int, drop: tuple[Held, ...] = ()) -> list[Output]:
        if not worker.waiting:
            return []
        leases: list[tuple[Lease, int]] = []
        while len(leases) < worker.free and (granted := self._grant(worker, now_ms)) is not None:
            leases.append(granted)
        if not leases and not drop:
            return []
        worker.waiting = False
        return [Answer(worker.node, tuple(leases), drop)]

    def _grant(self, worker: Worker, now_ms: int) -> tuple[Lease, int] | None:
        """The next task for `worker`, leased to it, with the version of the model that it will run; None when there is none."""
        order = self.queues.order()
        for model in order:
            if model not in worker.ready:
                continue
            if len(worker.leases) >= worker.slots and self._scarce(model):
                continue  # a stock for later must not take what another worker could start on now
            pick: Pick | None = None
            while pick is None and (found := self.queues.peek(model, self._planning)) is not None:
                pick = self.queues.take(*found)
            if pick is None:
                continue
            lease = self._lease(pick, worker, now_ms)
            what = "planning" if pick.task == PLAN else f"task {pick.task}"
            self._decided(
                f"{what} of job {pick.head.job}, attempt {pick.attempt + 1}, went to {worker.name}: {model} is first of "
                f"{len(order)} models with work, {self.queues.ready_of_model(model)} more of its tasks ready, "
                f"{self.queues.clock.lag(model):.0f} queries behind the most served",
                model,
                pick.head.job,
                worker.node,
            )
            return lease, worker.ready[model]
        return None

    def _scarce(self, model: str) -> bool:
        able = sum(1 for w in self.workers.values() if model in w.ready)
        return self.queues.ready_of_model(model) <= able

    def _lease(self, pick: Pick, worker: Worker, now_ms: int) -> Lease:
        head = pick.head
        lease = Lease(head, pick.task, pick.attempt, worker.node, now_ms, pick.queries)
        self.leases[head.job, pick.task] = worker.leases[head.job, pick.task] = lease
        self.queues.charge(pick)
        if pick.task == PLAN:
            self._planning[head.client] = self._planning.get(head.client, 0) + 1
        return lease

    def _end(self, lease: Lease) -> None:
        key = (lease.head.job, lease.task)
        del self.leases[key]
        worker = self.workers.get(lease.node)
        if worker is not None and worker.leases.get(key) is lease:
            del worker.leases[key]
        if lease.task == PLAN:
            left = self._planning[lease.head.client] - 1
            if left:
                self._planning[lease.head.client] = left
            else:
                del self._planning[lease.head.client]

    def _give_back(self, lease: Lease, why: str) -> EndAttempt:
        lease.ended = True
        return EndAttempt(lease.head.job, lease.task, lease.attempt, lease.node, why)

    def _reconcile(self, worker: Worker, held: Iterable[Held], now_ms: int) -> tuple[tuple[Held, ...], bool]:
        """Bring what `worker` holds in line with what we lent it. What it is to drop; whether others may have what it had."""
        gave_back = False
        drop: list[Held] = []
        kept: set[tuple[str, int]] = set()
        for item in held:
            key = (item.job, item.task)
            lease = self.leases.get(key)
            if lease is not None:
                if lease.node == worker.node and lease.attempt == item.attempt and not lease.ended:
                    worker.leases[key] = lease  # also after it counted as lost while its report was on the way
                    kept.add(key)
                else:
                    drop.append(item)
                continue
            pick = self.queues.take(*key) if self._ready.attempts(*key) == item.attempt else None
            if pick is None:
                drop.append(item)
                continue
            self._lease(pick, worker, now_ms)
            kept.add(key)
            self._decided(
                f"task {item.task} of job {item.job} stays with {worker.name}, which works on it since before this leader",
                pick.head.job,
                worker.node,
            )
        for key, lease in list(worker.leases.items()):
            if key not in kept and not lease.reporting:
                # The answer that lent it got lost, so nobody has begun: no attempt ended, the task is as ready as it was.
                self._end(lease)
                self.queues.refund(lease.head, lease.queries)
                self.queues.put(*key)
                gave_back = True
        return tuple(drop), gave_back

    def _heard_from(self, node: NodeId | None, now_ms: int) -> list[Output]:
        if not self.recovering:
            return []
        if node is not None:
            self._awaited.discard(node)
        if self._awaited:
            return []
        self.recovering = False
        self.queues.release()
        return self.wake(now_ms)

    def _tell_void(self, lease: Lease) -> list[Output]:
        """Who works on it in vain hears it now if its poll is open, else at its next poll, which names what it holds."""
        worker = self.workers.get(lease.node)
        if worker is None or not worker.waiting or lease.ended:
            return []
        worker.waiting = False
        return [Answer(worker.node, (), (lease.held,))]

    def _decided(self, why: str, *about: str) -> None:
        self.decisions.record(self.wall_ms, why, *about)
