# idunno/coordinator/ledger.py: the jobs and their tasks.
#
# Rule 1: a task's life is ready -> success | failed, a job's planning -> running -> success | failed | cancelled. "Waiting" is
#         a lease on a ready task: soft state of the scheduler, not here.
# Rule 2: a task counts once: its first completion makes the result, later ones change nothing. A failed attempt counts only if
#         it names how many had ended before it.
# Rule 3: a job may have a million tasks. A task costs one byte until something happened to it; nothing here walks over all.
# Rule 4: every method either raises and has changed nothing, or has done all of it.
from __future__ import annotations

from collections.abc import Iterator
from heapq import merge
from itertools import islice
from typing import Final

import msgspec

from idunno.base.errors import Conflict, Exhausted, InvalidArgument, NotFound
from idunno.base.ids import NodeId, check_label
from idunno.coordinator.commands import CompleteTask, FailAttempt, PlanJob, SubmitJob
from idunno.coordinator.records import Attempt, JobRecord, ModelRecord, Output, Record, TaskRecord, VersionRecord
from idunno.coordinator.results import JobResult, TaskResult
from idunno.coordinator.rows import Row, runs

JOBS_MAX: Final = 100_000
"""Jobs held, finished ones included, until they are forgotten."""
TASKS_MAX: Final = 1_000_000  # of one job
QUERIES_MAX: Final = 10**12
ATTEMPTS_ALLOWED: Final = 3
ERROR_MAX: Final = 1_000  # characters kept of an attempt's error
PART_TASKS: Final = 1_024
"""Touched tasks are held in parts of so many numbers: the first change of one behind a capture copies its part, in 10 us."""
PLANNING: Final = -1  # the task number that stands for counting a job's queries

_READY, _SUCCESS, _FAILED = 0, 1, 2
_STATE: Final = {_READY: "ready", _SUCCESS: "success", _FAILED: "failed"}
_CODE: Final = {name: code for code, name in _STATE.items()}
FINISHED: Final = ("success", "failed", "cancelled")


class Counts(msgspec.Struct, frozen=True):
    """Tasks by state, and queries answered: `done` with an output, `errors` with an error of their own."""

    tasks: int = 0
    ready: int = 0
    success: int = 0
    failed: int = 0
    done: int = 0
    errors: int = 0


class JobState(Record, frozen=True):
    record: JobRecord
    task_queries: int = 0  # queries a task; 0 while planning
    tasks: tuple[TaskRecord, ...] = ()  # those that something happened to, rising


class LedgerState(Record, frozen=True):
    jobs: tuple[JobState, ...] = ()  # as submitted


class _Job:
    __slots__ = ("captures", "done", "errors", "failed", "own", "parts", "record", "states", "success", "task_queries")

    def __init__(self, state: JobState, captures: int = 0) -> None:
        self.captures = captures  # how many captures there had been: a later one holds this very object
        self.record, self.task_queries = state.record, state.task_queries
        self.cut(_tasks(state.record.queries, state.task_queries))
        self.success = self.failed = self.done = self.errors = 0
        for task in state.tasks:
            self.put(task)

    def cut(self, tasks: int) -> None:
        self.states = bytearray(tasks)
        # Tasks that something happened to, by number // PART_TASKS, and a bit for each part that nobody else holds.
        self.parts: list[dict[int, TaskRecord]] = [{}] * -(-tasks // PART_TASKS)
        self.own = 0

    def copy(self, captures: int) -> _Job:
        """To be changed while a capture holds this one: the parts are shared until they are changed."""
        new = object.__new__(_Job)
        for name in self.__slots__:
            setattr(new, name, getattr(self, name))
        new.states, new.parts, new.own, new.captures = self.states.copy(), self.parts.copy(), 0, captures
        return new

    def count(self, task: TaskRecord) -> None:
        self.success += task.state == "success"
        self.failed += task.state == "failed"
        self.done += task.done
        self.errors += task.errors

    def task(self, number: int) -> TaskRecord:
        known = self.parts[number // PART_TASKS].get(number)
        if known is not None:
            return known
        first = number * self.task_queries
        return TaskRecord(number, first, min(first + self.task_queries, self.record.queries), "ready")

    def put(self, task: TaskRecord) -> None:
        part = task.task // PART_TASKS
        if not self.own >> part & 1:
            self.own |= 1 << part
            self.parts[part] = self.parts[part].copy()
        self.parts[part][task.task] = task
        self.states[task.task] = _CODE[task.state]
        self.count(task)

    def touched(self) -> Iterator[TaskRecord]:
        """Those that something happened to, in order. A part at a time is sorted: of a million, no step takes long."""
        for part in self.parts:
            for number in sorted(part):
                yield part[number]


class _Totals:
    """Of all unfinished jobs, so that who asks for them does not walk over a hundred thousand jobs."""

    __slots__ = ("failed", "ready", "success", "unanswered")

    def __init__(self) -> None:
        self.ready = self.success = self.failed = 0  # tasks
        self.unanswered: dict[str, int] = {}  # model -> queries; none that has 0

    def add(self, held: _Job, sign: int) -> None:
        """The job counts from now on (1), or no more (-1): both around each change of it."""
        ready = len(held.states) - held.success - held.failed
        self.ready += sign * ready
        self.success += sign * held.success
        self.failed += sign * held.failed
        # A failed task's queries are answered by its error. The last task may have fewer queries than the others.
        model, unanswered = held.record.model, held.record.queries - held.done - held.errors
        left = self.unanswered.pop(model, 0) + sign * min(unanswered, ready * held.task_queries)
        if left:
            self.unanswered[model] = left


class Ledger:
    def __init__(self, state: LedgerState | None = None) -> None:
        jobs = state.jobs if state is not None else ()
        self._jobs = {job.record.job: _Job(job) for job in jobs}
        self._of_client: dict[str, dict[str, None]] = {}  # client -> jobs, as submitted
        for name, job in self._jobs.items():
            self._of_client.setdefault(job.record.client, {})[name] = None
        self._captures = 0
        self._unfinished = {name: None for name, job in self._jobs.items() if job.record.state not in FINISHED}
        self._totals = _Totals()
        for name in self._unfinished:
            self._totals.add(self._jobs[name], 1)

    def state(self) -> LedgerState:
        return LedgerState(
            tuple(JobState(job.record, job.task_queries, tuple(job.touched())) for job in self._jobs.values())
        )

    def capture(self) -> Iterator[Row]:
        """Rows for a snapshot, as things are now."""
        self._captures += 1
        return _rows(list(self._jobs.values()))

    def _own(self, job: str) -> _Job:
        """The job, to be changed: a copy of it when a capture holds it."""
        held = self._job(job)
        if held.captures != self._captures:
            held = self._jobs[job] = held.copy(self._captures)
        return held

    # -- reading ------------------------------------------------------------------------------------------------------

    def find(self, job: str) -> JobRecord | None:
        held = self._jobs.get(job)
        return held.record if held is not None else None

    def job(self, job: str) -> JobRecord:
        """Raises NotFound."""
        return self._job(job).record

    def jobs(self) -> Iterator[JobRecord]:
        """All jobs, as submitted. Not to be held across awaits."""
        return (job.record for job in self._jobs.values())

    def newest(self, limit: int, client: str | None = None) -> list[str]:
        """The last jobs submitted, at most `limit`, of all or of one client, the oldest of them first. O(limit)."""
        names = self._jobs if client is None else self._of_client.get(client, {})
        return list(islice(reversed(names), limit))[::-1]

    def unfinished(self) -> Iterator[JobRecord]:
        """Jobs in planning or running, as submitted. Not to be held across awaits."""
        return (self._jobs[job].record for job in self._unfinished)

    def counts(self, job: str) -> Counts:
        held = self._job(job)
        ready = len(held.states) - held.success - held.failed
        return Counts(len(held.states), ready, held.success, held.failed, held.done, held.errors)

    def unfinished_tasks(self) -> Counts:
        """Of all unfinished jobs together. O(1)."""
        t = self._totals
        return Counts(t.ready + t.success + t.failed, t.ready, t.success, t.failed)

    def unanswered(self, model: str) -> int:
        """Queries of the model's unfinished jobs that have no answer yet. O(1)."""
        return self._totals.unanswered.get(model, 0)

    def task_queries(self, job: str) -> int:
        """Queries a task (the last may have fewer); 0 while planning."""
        return self._job(job).task_queries

    def task(self, job: str, task: int) -> TaskRecord:
        """Raises NotFound."""
        held = self._job(job)
        if not 0 <= task < len(held.states):
            raise NotFound(f"job {job} has {len(held.states)} tasks, none is number {task}")
        return held.task(task)

    def tasks(self, job: str) -> Iterator[TaskRecord]:
        """All tasks in order. Not to be held across awaits."""
        held = self._job(job)
        return (held.task(number) for number in range(len(held.states)))

    def next_ready(self, job: str, after: int = -1) -> int:
        """The lowest ready task above `after`; -1: none. A search through one byte a task, in C. Raises NotFound."""
        held = self._job(job)
        return held.states.find(_READY, after + 1) if held.record.state == "running" else -1

    def ended(self, job: str, first: int = 0) -> Iterator[TaskRecord]:
        """Tasks from number `first` on that succeeded or failed, in order: two searches through one byte a task, in C. Not to
        be held across awaits. Raises NotFound."""
        held = self._job(job)
        numbers = merge(_each(held.states, _SUCCESS, first), _each(held.states, _FAILED, first))
        return map(held.task, numbers)

    def _job(self, job: str) -> _Job:
        held = self._jobs.get(job)
        if held is None:
            raise NotFound(f"no job {job[:80]!r}; see `idunno jobs`")
        return held

    # -- life of a job ------------------------------------------------------------------------------------------------

    def submitted(self, command: SubmitJob, client: str) -> JobResult | None:
        """The job that this submit made before, if it did. Raises Conflict when the id stands for another job."""
        old = self.find(command.job)
        if old is None:
            return None
        same = (old.client, old.model, old.input_name, old.input_version)
        if same != (client, command.model, command.input_name, command.input_version):
            raise Conflict(f"there is another job {command.job} already; a new job needs a new id")
        return JobResult(old.job, old.state, changed=False)

    def submit(
        self, command: SubmitJob, client: str, model: ModelRecord, given: VersionRecord, now_ms: int
    ) -> JobResult:
        """`given`: the input's version. Ask `submitted` first."""
        check_label("job", command.job)
        if not 0 <= command.batch_size <= 1_000_000:
            raise InvalidArgument(f"batch size is {command.batch_size}: 0 (chosen) to 1000000 is possible")
        if not 1 <= len(command.input_kind) <= 64:
            raise InvalidArgument(f"{command.input_kind[:80]!r} is no kind of input")
        if len(self._jobs) >= JOBS_MAX:
            raise Exhausted(f"the ledger holds {JOBS_MAX} jobs, its bound; `idunno forget JOB` removes a finished one")
        self._jobs[command.job] = _Job(
            JobState(
                JobRecord(
                    job=command.job,
                    client=client,
                    model=command.model,
                    model_version=model.version,
                    input_name=command.input_name,
                    input_version=command.input_version,
                    input_size=given.size,
                    input_kind=command.input_kind,
                    input_blocks=given.blocks,
                    input_small=given.small,
                    batch_size=command.batch_size or model.batch_size,
                    state="planning",
                    submitted_ms=now_ms,
                )
            ),
            self._captures,
        )
        self._unfinished[command.job] = None
        self._of_client.setdefault(client, {})[command.job] = None
        return JobResult(command.job, "planning")

    def plan(self, command: PlanJob, now_ms: int) -> JobResult:
        """Cut the job. The first plan counts; one for a job that is planned, cancelled or gone changes nothing."""
        held = self._jobs.get(command.job)
        if held is None or held.record.state != "planning":
            return JobResult(command.job, held.record.state if held is not None else "", changed=False)
        if not 0 <= command.queries <= QUERIES_MAX or not 1 <= command.task_queries <= QUERIES_MAX:
            raise InvalidArgument(f"{command.queries} queries in tasks of {command.task_queries} cannot be planned")
        tasks = _tasks(command.queries, command.task_queries)
        if tasks > TASKS_MAX:
            least = -(-command.queries // TASKS_MAX)
            raise InvalidArgument(
                f"job {command.job} would have {tasks} tasks, at most {TASKS_MAX}: at least {least} queries a task"
            )
        held = self._own(command.job)
        held.task_queries = command.task_queries
        held.cut(tasks)
        held.record = msgspec.structs.replace(held.record, state="running", queries=command.queries)
        self._totals.add(held, 1)  # while planning it had nothing to count
        self._finish_if_done(held, now_ms)
        return JobResult(command.job, held.record.state)

    def cancel(self, job: str, by: str, now_ms: int) -> JobResult:
        """Idempotent; a job that has finished stays as it is."""
        held = self._job(job)
        if held.record.state in FINISHED:
            return JobResult(job, held.record.state, changed=False)
        self._finish(self._own(job), "cancelled", f"cancelled by {by}", now_ms)
        return JobResult(job, "cancelled")

    def forget(self, job: str) -> JobRecord:
        """Remove a finished job; its files are the caller's to remove. Raises NotFound, Conflict."""
        record = self.job(job)
        if record.state not in FINISHED:
            raise Conflict(f"job {job} is {record.state}; `idunno cancel {job}` first")
        del self._jobs[job]
        of_client = self._of_client[record.client]
        del of_client[job]
        if not of_client:
            del self._of_client[record.client]
        return record

    # -- tasks --------------------------------------------------------------------------------------------------------

    def refused(self, job: str, task: int) -> TaskResult | None:
        """Why a completion or failure of that task comes too late, None when it does not. Raises NotFound for no such task."""
        held = self._jobs.get(job)
        if held is None:
            return TaskResult(job, task, "", counted=False, why="the job is gone")
        if held.record.state == "cancelled":
            return TaskResult(job, task, "", counted=False, why=f"the job was {held.record.reason}")
        if held.record.state == "planning":
            return TaskResult(job, task, "", counted=False, why="the job is not planned yet")
        now = self.task(job, task)
        if now.state == "ready":
            return None
        return TaskResult(
            job, task, now.state, counted=False, duplicate=now.state == "success", why=f"the task is {now.state}"
        )

    def check_completion(self, command: CompleteTask) -> None:
        """Raises InvalidArgument unless every query of the task is answered."""
        task = self.task(command.job, command.task)
        queries = task.last - task.first
        if command.done < 0 or command.errors < 0 or command.done + command.errors != queries:
            raise InvalidArgument(
                f"task {command.task} of job {command.job} has {queries} queries; {command.done} outputs and "
                f"{command.errors} errors do not answer each once"
            )
        if command.timing.count > queries:
            raise InvalidArgument(
                f"task {command.task} of job {command.job} times {command.timing.count} of {queries} queries"
            )

    def complete(self, command: CompleteTask, output: Output, now_ms: int) -> TaskResult:
        """The task has its result. Ask `refused` and `check_completion` first."""
        held = self._own(command.job)
        task = msgspec.structs.replace(
            held.task(command.task),
            state="success",
            output=output,
            done=command.done,
            errors=command.errors,
            node=command.node,
        )
        self._put(held, task, now_ms)
        return TaskResult(command.job, command.task, "success", counted=True)

    def fail_attempt(self, command: FailAttempt, now_ms: int) -> TaskResult:
        """An attempt ended without a result; after the last allowed one, or a fatal one, so does the task (or the planning)."""
        if command.task == PLANNING:
            return self._fail_planning(command, now_ms)
        late = self.refused(command.job, command.task)
        if late is not None:
            return late
        held = self._own(command.job)
        task = held.task(command.task)
        if command.attempt != len(task.attempts):
            why = f"{len(task.attempts)} attempts have ended, this was number {command.attempt}"
            return TaskResult(command.job, command.task, task.state, counted=False, why=why)
        attempts = (*task.attempts, _attempt(command.node, command.error))
        over = command.fatal or len(attempts) >= ATTEMPTS_ALLOWED
        self._put(held, msgspec.structs.replace(task, attempts=attempts, state="failed" if over else "ready"), now_ms)
        return TaskResult(command.job, command.task, "failed" if over else "ready", counted=True)

    def _fail_planning(self, command: FailAttempt, now_ms: int) -> TaskResult:
        held = self._jobs.get(command.job)
        if held is None or held.record.state != "planning":
            why = f"the job is {held.record.state}" if held is not None else "the job is gone"
            return TaskResult(command.job, PLANNING, "", counted=False, why=why)
        if command.attempt != len(held.record.plan_attempts):
            why = f"{len(held.record.plan_attempts)} attempts have ended, this was number {command.attempt}"
            return TaskResult(command.job, PLANNING, "ready", counted=False, why=why)
        attempts = (*held.record.plan_attempts, _attempt(command.node, command.error))
        held = self._own(command.job)
        held.record = msgspec.structs.replace(held.record, plan_attempts=attempts)
        if not command.fatal and len(attempts) < ATTEMPTS_ALLOWED:
            return TaskResult(command.job, PLANNING, "ready", counted=True)
        self._finish(held, "failed", f"its input could not be read: {attempts[-1].error}", now_ms)
        return TaskResult(command.job, PLANNING, "failed", counted=True)

    def _put(self, held: _Job, task: TaskRecord, now_ms: int) -> None:
        self._totals.add(held, -1)
        held.put(task)
        self._totals.add(held, 1)
        self._finish_if_done(held, now_ms)

    def _finish_if_done(self, held: _Job, now_ms: int) -> None:
        tasks = len(held.states)
        if held.success + held.failed < tasks:
            return
        if not held.failed:
            self._finish(held, "success", "", now_ms)
            return
        first = held.task(held.states.find(_FAILED))
        self._finish(held, "failed", f"{held.failed} of {tasks} tasks failed: {first.attempts[-1].error}", now_ms)

    def _finish(self, held: _Job, state: str, reason: str, now_ms: int) -> None:
        held.record = msgspec.structs.replace(held.record, state=state, reason=reason, finished_ms=now_ms)
        del self._unfinished[held.record.job]
        self._totals.add(held, -1)


def _rows(jobs: list[_Job]) -> Iterator[Row]:
    yield "ledger", LedgerState(), 1
    for job in jobs:
        for tasks, weight in runs(job.touched(), _weight):
            yield "job", JobState(job.record, job.task_queries, tasks), weight + len(job.record.input_blocks)


def _each(states: bytearray, state: int, at: int) -> Iterator[int]:
    """Where `state` stands, from `at` on."""
    while (at := states.find(state, at)) >= 0:
        yield at
        at += 1


def _weight(task: TaskRecord) -> int:
    return 1 + len(task.attempts) + (len(task.output.blocks) if task.output is not None else 0)


def _attempt(node: NodeId, error: str) -> Attempt:
    return Attempt(node, error[:ERROR_MAX] or "no reason given")


def _tasks(queries: int, task_queries: int) -> int:
    return -(-queries // task_queries) if task_queries else 0
