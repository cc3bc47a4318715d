# idunno/scheduler/messages.py: calls about models and jobs, and between workers and the scheduler.
from __future__ import annotations

from typing import Final

import msgspec

from idunno.base.ids import NodeId
from idunno.coordinator.records import Block, ModelFile, Timing
from idunno.wire.calls import Empty, Method, Role

# -- models -----------------------------------------------------------------------------------------------------------


class FileVersion(msgspec.Struct, frozen=True):
    """A file of a model that the client has put already."""

    path: str
    name: str
    version: int


class DeployModel(msgspec.Struct, frozen=True):
    model: str
    runtime: str
    files: list[FileVersion]
    request: str
    workers: int = 0
    batch_size: int = 0
    weight: float = 1.0
    workers_min: int = 0
    workers_max: int = 0


class ModelWorker(msgspec.Struct, frozen=True):
    node: str  # name
    state: str  # assigned | ready | failed | away
    error: str = ""


class ModelInfo(msgspec.Struct, frozen=True):
    model: str
    version: int
    state: str  # undeployed | deployed | failed
    workers: list[ModelWorker]
    batch_size: int
    weight: float
    runtime: str
    reason: str = ""
    failures: list[str] = []


class GetModel(msgspec.Struct, frozen=True):
    """Wait (long poll) until the model differs from `seen`, at most `wait_s`."""

    model: str
    wait_s: float = 0.0
    seen: ModelInfo | None = None


class ListModels(msgspec.Struct, frozen=True):
    after: str = ""  # names greater than this: for paging


class Models(msgspec.Struct, frozen=True):
    """By name."""

    models: list[ModelInfo]
    more: bool = False  # ask again, after the last one's name


class UndeployModel(msgspec.Struct, frozen=True):
    model: str
    request: str


class BatchSize(msgspec.Struct, frozen=True):
    model: str
    batch_size: int
    request: str


DEPLOY: Final = Method("model.deploy", DeployModel, ModelInfo, Role.USER)
GET_MODEL: Final = Method("model.get", GetModel, ModelInfo, Role.READER)
MODELS: Final = Method("model.ls", ListModels, Models, Role.READER)
UNDEPLOY: Final = Method("model.undeploy", UndeployModel, Empty, Role.USER)
BATCH_SIZE: Final = Method("model.batch-size", BatchSize, ModelInfo, Role.USER)

# -- jobs -------------------------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True):
    job: str  # the request id: a retry finds the job
    model: str
    input_name: str  # in SDFS
    input_version: int
    input_kind: str
    batch_size: int = 0


class TaskCounts(msgspec.Struct, frozen=True):
    ready: int = 0
    waiting: int = 0
    success: int = 0
    failed: int = 0


class JobInfo(msgspec.Struct, frozen=True):
    job: str
    client: str
    model: str
    state: str  # planning | running | success | failed | cancelled
    queries: int
    done: int  # queries answered, with an output or an error of their own
    errors: int  # of those, with an error
    tasks: TaskCounts
    submitted: str
    finished: str | None
    seconds: float
    reason: str = ""  # why it failed, or what it waits for


class GetJob(msgspec.Struct, frozen=True):
    """Wait (long poll) until the job has changed since `seen`, at most `wait_s`."""

    job: str
    wait_s: float = 0.0
    seen: JobInfo | None = None


class ListJobs(msgspec.Struct, frozen=True):
    all: bool = False


class Jobs(msgspec.Struct, frozen=True):
    """As submitted; of more than JOBS_SHOWN (scheduler/jobs.py) the newest, and `more`."""

    jobs: list[JobInfo]
    more: bool = False


class JobRequest(msgspec.Struct, frozen=True):
    job: str
    request: str = ""
    first: int = 0  # OUTPUTS only: begin with the task that holds this query


class OutputInfo(msgspec.Struct, frozen=True):
    """A task's part of the results. Failed tasks have no file: each of their queries gets `error`."""

    task: int
    first: int
    last: int
    name: str = ""
    size: int = 0
    error: str = ""


class Outputs(msgspec.Struct, frozen=True):
    """Tasks that have ended, in input order."""

    job: JobInfo
    outputs: list[OutputInfo]
    more: bool = False  # there are later ones: ask again with `first` = the last one's `last`


SUBMIT: Final = Method("job.submit", Submit, JobInfo, Role.USER)
GET_JOB: Final = Method("job.get", GetJob, JobInfo, Role.READER)
JOBS: Final = Method("job.ls", ListJobs, Jobs, Role.READER)
CANCEL: Final = Method("job.cancel", JobRequest, JobInfo, Role.USER)
FORGET: Final = Method("job.forget", JobRequest, Empty, Role.USER)
OUTPUTS: Final = Method("job.outputs", JobRequest, Outputs, Role.READER)

# -- the operator's questions -----------------------------------------------------------------------------------------


class ModelRate(msgspec.Struct, frozen=True):
    model: str
    rate: float  # queries/s over the last 10 s
    queries_done: int
    workers: int
    waiting: int  # queries not yet answered


class Rates(msgspec.Struct, frozen=True):
    models: list[ModelRate]
    spread: float


class ByModel(msgspec.Struct, frozen=True):
    model: str


class Times(msgspec.Struct, frozen=True):
    """Processing time of a query, in seconds."""

    model: str
    count: int
    mean: float
    std: float
    median: float
    p90: float
    p95: float
    p99: float


class WorkerRow(msgspec.Struct, frozen=True):
    node: str
    role: str
    models: list[str]
    task: str | None  # "JOB/TASK" running now
    since: str | None
    state: str = "active"


class ListAssignments(msgspec.Struct, frozen=True):
    after: str = ""  # nodes of greater names than this: for paging


class Assignments(msgspec.Struct, frozen=True):
    """By name."""

    workers: list[WorkerRow]
    more: bool = False  # ask again, after the last one's name


class Explain(msgspec.Struct, frozen=True):
    what: str


class Decision(msgspec.Struct, frozen=True):
    time: str
    about: str
    why: str


class Explanation(msgspec.Struct, frozen=True):
    what: str
    waits_for: str
    decisions: list[Decision]


RATES: Final = Method("stats.rates", Empty, Rates, Role.READER)
TIMES: Final = Method("stats.times", ByModel, Times, Role.READER)
ASSIGNMENTS: Final = Method("stats.assignments", ListAssignments, Assignments, Role.READER)
EXPLAIN: Final = Method("stats.explain", Explain, Explanation, Role.READER)

# -- worker to scheduler ----------------------------------------------------------------------------------------------


class Lease(msgspec.Struct, frozen=True):
    """A task handed to a worker. task -1: count the queries of the job's input (PlanDone)."""

    job: str
    task: int
    attempt: int
    model: str
    model_version: int
    first: int
    last: int
    input_kind: str
    input_size: int
    input_blocks: list[Block]
    input_name: str
    input_version: int


class Assignment(msgspec.Struct, frozen=True):
    """A model that the worker is to hold ready. A model has files: without any, MODEL_FILES tells them."""

    model: str
    version: int
    runtime: str
    files: list[ModelFile]


class AskFiles(msgspec.Struct, frozen=True):
    node: NodeId
    model: str
    version: int


class ModelFiles(msgspec.Struct, frozen=True):
    files: list[ModelFile]


class Held(msgspec.Struct, frozen=True):
    job: str
    task: int
    attempt: int


class Poll(msgspec.Struct, frozen=True):
    """A worker asks for tasks, and says what it has. Answered when there is something to say, or after `wait_s`."""

    node: NodeId
    boot: int
    free: int  # leases it would take now
    ready: list[tuple[str, int]]  # (model, version) loaded and ready
    held: list[Held]  # what it works on: a new scheduler takes these leases over
    assignments_seen: int  # `assignments_mark` of the last answer
    wait_s: float


class PollAnswer(msgspec.Struct, frozen=True):
    term: int
    leases: list[Lease]
    assignments_mark: int
    assignments: list[Assignment] | None = None  # None: unchanged
    drop: list[Held] = []  # held ones that are void: cancelled, or done by somebody else


class PlanDone(msgspec.Struct, frozen=True):
    node: NodeId
    job: str
    queries: int


class TaskDone(msgspec.Struct, frozen=True):
    """Body: the output's content when it is small; otherwise `put` and `blocks` name what was written."""

    node: NodeId
    job: str
    task: int
    put: str
    size: int
    blocks: list[Block]
    done: int
    errors: int
    timing: Timing


class AttemptFailed(msgspec.Struct, frozen=True):
    node: NodeId
    job: str
    task: int
    attempt: int
    error: str
    fatal: bool = False


class WorkerReport(msgspec.Struct, frozen=True):
    node: NodeId
    model: str
    version: int
    error: str = ""  # "" ready


POLL: Final = Method("worker.poll", Poll, PollAnswer, Role.NODE)
MODEL_FILES: Final = Method("worker.model-files", AskFiles, ModelFiles, Role.NODE)
PLAN_DONE: Final = Method("worker.plan-done", PlanDone, Empty, Role.NODE)
TASK_DONE: Final = Method("worker.task-done", TaskDone, Empty, Role.NODE)
ATTEMPT_FAILED: Final = Method("worker.attempt-failed", AttemptFailed, Empty, Role.NODE)
WORKER_REPORT: Final = Method("worker.report", WorkerReport, Empty, Role.NODE)
