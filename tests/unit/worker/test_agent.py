# The agent against a scheduler that the test plays, with processes that the test plays too (and real ones in the last story).
from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from idunno.base.disk import Buffer
from idunno.base.errors import DiskFailed, IdunnoError, InvalidArgument, ModelFailed, NotFound, NotLeader
from idunno.base.ids import NodeId
from idunno.coordinator.records import Block, Timing
from idunno.node.disk import RealDisk, ThreadOffload
from idunno.scheduler.messages import (
    AskFiles,
    Assignment,
    AttemptFailed,
    Held,
    Lease,
    ModelFiles,
    PlanDone,
    Poll,
    PollAnswer,
    TaskDone,
    WorkerReport,
)
from idunno.wire.calls import Empty, Method
from idunno.worker import agent, models
from idunno.worker.agent import Agent, WorkerConfig
from idunno.worker.protocol import Ran
from idunno.worker.runner import ChildFactory, Runner, RunnerFactory
from tests.unit.worker.helpers import EXAMPLES, MemoryFiles, labels, rng, until

ME = NodeId("00000000000000aa")


class Scheduler:
    """What the worker talks to: the test sets what it says and reads what it heard."""

    def __init__(self) -> None:
        self.term, self.mark = 1, 0
        self.assignments: list[Assignment] = []
        self.leases: list[Lease] = []
        self.drop: list[Held] = []
        self.polls: list[Poll] = []
        self.reports: list[WorkerReport] = []
        self.files: dict[str, ModelFiles] = {}  # of the models that are assigned without
        self.planned: list[PlanDone] = []
        self.done: list[tuple[TaskDone, bytes]] = []
        self.failed: list[AttemptFailed] = []
        self.refusals: list[IdunnoError] = []  # raised one after another, by whatever is called next but polls
        self.poll_refusals: list[IdunnoError] = []
        self.news = asyncio.Event()

    def assign(self, *assignments: Assignment) -> None:
        self.assignments, self.mark = list(assignments), self.mark + 1
        self.news.set()

    def lend(self, *leases: Lease) -> None:
        self.leases += leases
        self.news.set()

    def void(self, *held: Held) -> None:
        self.drop += held
        self.news.set()

    async def __call__(self, method: Method[Any, Any], request: Any, body: Buffer = b"", *, timeout_s: float) -> Any:
        if isinstance(request, Poll):
            return await self._poll(request, timeout_s)
        if self.refusals:
            raise self.refusals.pop(0)
        match request:
            case AskFiles():
                if request.model not in self.files:
                    raise NotFound(f"no model {request.model}")
                return self.files[request.model]
            case WorkerReport():
                self.reports.append(request)
            case PlanDone():
                self.planned.append(request)
            case TaskDone():
                self.done.append((request, bytes(body)))
            case AttemptFailed():
                self.failed.append(request)
        return Empty()

    async def _poll(self, poll: Poll, timeout_s: float) -> PollAnswer:
        self.polls.append(poll)
        if self.poll_refusals:
            raise self.poll_refusals.pop(0)
        ready = {model for model, _ in poll.ready}
        async with asyncio.timeout(timeout_s):
            while True:
                self.news.clear()
                lent = [lease for lease in self.leases if lease.model in ready][: poll.free]
                if lent or self.drop or poll.assignments_seen != self.mark or poll.wait_s == 0:
                    break
                await self.news.wait()
        self.leases = [lease for lease in self.leases if lease not in lent]
        drop, self.drop = self.drop, []
        new = self.assignments if poll.assignments_seen != self.mark else None
        return PollAnswer(self.term, lent, self.mark, new, drop)


class FakeRunner:
    """A process whose tasks end when the test says so."""

    def __init__(self, world: Processes) -> None:
        self.world, self.alive = world, True
        self.ending: asyncio.Future[Ran] | None = None

    async def load(self, model: str, folder: str, runtime: str, *, threads: int, timeout_s: float) -> str:
        self.world.loads.append(model)
        if self.world.load_errors:
            raise self.world.load_errors.pop(0)
        return "x -> y"

    async def count(self, path: str, kind: str, *, timeout_s: float) -> int:
        if self.world.count_error is not None:
            raise self.world.count_error
        return len(await asyncio.to_thread(Path(path).read_bytes))

    async def run(self, path: str, kind: str, first: int, last: int, out_path: str, *, timeout_s: float) -> Ran:
        self.world.running.append((first, last))
        self.world.runners.append(self)
        self.ending = asyncio.get_running_loop().create_future()
        try:
            if self.world.automatic:
                self.world.finish(self, last - first)
            ran = await self.ending
            await asyncio.to_thread(Path(out_path).write_bytes, b"x" * ran.size)
            return ran
        except BaseException:
            self.alive = False
            raise
        finally:
            self.world.running.remove((first, last))

    async def close(self) -> None:
        self.alive = False
        self.world.closed += 1


class Processes:
    def __init__(self) -> None:
        self.loads: list[str] = []
        self.load_errors: list[IdunnoError] = []
        self.count_error: IdunnoError | None = None
        self.running: list[tuple[int, int]] = []
        self.runners: list[FakeRunner] = []
        self.automatic, self.size, self.spawned, self.closed = True, 10, 0, 0

    async def __call__(self) -> Runner:
        self.spawned += 1
        return FakeRunner(self)

    def finish(self, runner: FakeRunner, queries: int) -> None:
        assert runner.ending is not None
        runner.ending.set_result(
            Ran(queries, 0, self.size, Timing(queries, 5 * queries, 25 * queries, ((5, queries),)))
        )

    def die(self, runner: FakeRunner) -> None:
        assert runner.ending is not None
        runner.ending.set_exception(ModelFailed("model m died: signal 9 (killed)"))


class World:
    def __init__(self, folder: Path, agent: Agent, scheduler: Scheduler, files: MemoryFiles) -> None:
        self.folder, self.agent, self.scheduler, self.files = folder, agent, scheduler, files

    def lease(
        self, task: int, *, job: str = "job", attempt: int = 0, content: bytes = b"12345", model: str = "m"
    ) -> Lease:
        blocks = list(self.files.add(content))
        first = max(0, task * 10)
        return Lease(job, task, attempt, model, 1, first, first + 10, "npy", len(content), blocks, f"in/{job}", 1)


@asynccontextmanager
async def world(
    folder: Path, processes: RunnerFactory | None = None, *, model: bool = True, **config: Any
) -> AsyncIterator[World]:
    """A running agent that holds the model m."""
    offload = ThreadOffload(2, "test")
    scheduler, files = Scheduler(), MemoryFiles()
    settings = WorkerConfig(**{"warm_runner": False, **config})
    disk = RealDisk(str(folder / "node"), offload)
    (folder / "node").mkdir()
    agent = Agent(ME, 3, scheduler, files, disk, processes or Processes(), rng=rng(), config=settings)
    try:
        await agent.start()
        if model:
            (folder / "m").mkdir()
            (folder / "m" / "m.onnx").write_bytes(b"weights")
            scheduler.assign(files.model("m", folder / "m"))
            await until(lambda: agent.models == [("m", 1, "ready")])
        yield World(folder, agent, scheduler, files)
        await agent.stop(5.0)
    finally:
        offload.close()


def story(work: Callable[[], Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(bounded())


def test_an_assigned_model_is_fetched_set_up_and_reported_and_one_not_assigned_is_dropped(tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes) as w:
            await until(lambda: w.scheduler.reports == [WorkerReport(ME, "m", 1)])
            await until(lambda: w.scheduler.polls[-1].ready == [("m", 1)])
            assert w.scheduler.polls[-1].free == 2  # the slot, and one ahead
            w.scheduler.assign()
            await until(lambda: w.agent.models == [] and processes.closed == 1)

    story(run)


def test_a_model_that_cannot_be_set_up_is_reported_and_tried_again_when_it_stays_assigned(tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes()
        processes.load_errors = [ModelFailed("m.onnx cannot be loaded")]
        async with world(tmp_path, processes) as w:
            await until(lambda: len(w.scheduler.reports) == 2)
            assert w.scheduler.reports == [
                WorkerReport(ME, "m", 1, "m.onnx cannot be loaded"),
                WorkerReport(ME, "m", 1),
            ]

    story(run)


def test_the_files_of_a_model_that_is_told_without_them_are_asked_for(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as w:
            (tmp_path / "n").mkdir()
            (tmp_path / "n" / "n.onnx").write_bytes(b"many weights")
            full = w.files.model("n", tmp_path / "n")
            w.scheduler.files["n"] = ModelFiles(full.files)
            w.scheduler.refusals = [NotLeader("just elected another")]  # asked again
            bare = [Assignment(model, 1, "onnx", []) for model in ("m", "n", "gone")]
            w.scheduler.assign(*bare)  # m it has, whatever is told of it
            await until(lambda: w.scheduler.polls[-1].ready == [("m", 1), ("n", 1)])
            assert "n.onnx" in w.files.fetches[-1]
            await until(lambda: WorkerReport(ME, "gone", 1, "no model gone") in w.scheduler.reports)

    story(run)


def test_planning_counts_the_queries(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as w:
            w.scheduler.lend(w.lease(-1, content=b"1234567"))
            await until(lambda: w.scheduler.planned == [PlanDone(ME, "job", 7)])

    story(run)


def test_an_input_that_cannot_be_read_fails_for_good_and_a_dead_model_only_this_attempt(tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes) as w:
            processes.count_error = InvalidArgument("the input is no zip archive")
            w.scheduler.lend(w.lease(-1))
            await until(lambda: len(w.scheduler.failed) == 1)
            assert w.scheduler.failed[0] == AttemptFailed(ME, "job", -1, 0, "the input is no zip archive", fatal=True)

            processes.automatic = False
            w.scheduler.lend(w.lease(4, attempt=1))
            await until(lambda: len(processes.running) == 1)
            processes.die(processes.runners[-1])
            await until(lambda: len(w.scheduler.failed) == 2)
            assert w.scheduler.failed[1] == AttemptFailed(
                ME, "job", 4, 1, "model m died: signal 9 (killed)", fatal=False
            )

    story(run)


def test_a_worker_whose_disk_refuses_leaves_the_tasks_to_others_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "UNWELL_S", 0.2)

    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes) as w:
            await until(lambda: w.scheduler.polls[-1].free == 2)
            processes.count_error = DiskFailed("cannot write tmp/out: No space left on device")
            w.scheduler.lend(w.lease(-1))
            await until(lambda: len(w.scheduler.failed) == 1)
            assert not w.scheduler.failed[0].fatal
            await until(lambda: w.scheduler.polls[-1].free == 0 and w.scheduler.polls[-1].ready == [("m", 1)])
            await until(lambda: w.scheduler.polls[-1].free == 2)

    story(run)


def test_a_dead_process_is_replaced_with_back_off_and_tasks_wait_at_the_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "BACKOFF_FIRST_S", 0.05)

    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes) as w:
            processes.automatic = False
            w.scheduler.lend(w.lease(0))
            await until(lambda: len(processes.running) == 1)
            processes.die(processes.runners[-1])
            await until(lambda: w.agent.models == [("m", 1, "restarting")])
            await until(lambda: w.scheduler.polls[-1].ready == [])
            await until(lambda: w.scheduler.polls[-1].ready == [("m", 1)])
            assert processes.loads == ["m", "m"]
            assert w.scheduler.reports[-1] == WorkerReport(ME, "m", 1)

    story(run)


def test_a_small_output_rides_in_the_report_and_a_large_one_is_stored_under_an_open_put(tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes) as w:
            processes.size = 4096
            w.scheduler.lend(w.lease(0))
            await until(lambda: len(w.scheduler.done) == 1)
            small, body = w.scheduler.done[0]
            assert (small.put, small.blocks, small.size, body) == ("", [], 4096, b"x" * 4096)
            assert (small.done, small.errors, small.timing.count) == (10, 0, 10)

            processes.size = 4097
            w.scheduler.lend(w.lease(1, attempt=2))
            await until(lambda: len(w.scheduler.done) == 2)
            large, body = w.scheduler.done[1]
            assert body == b""
            assert w.files.names == {large.put: ".idunno/jobs/job/output/000001.jsonl"}
            assert w.files.uploads[large.put] == b"x" * 4097
            assert (large.put, sum(b.size for b in large.blocks)) == (f"job-1-2-{ME}-3", 4097)
            await until(lambda: w.agent.running == [] and list((tmp_path / "node" / "tmp").iterdir()) == [])

    story(run)


def test_while_one_task_computes_the_next_ones_input_is_fetched_and_no_more(tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes) as w:
            processes.automatic = False
            w.scheduler.lend(*(w.lease(task, job=f"job{task}", content=b"content %d" % task) for task in range(4)))

            def fetched() -> list[str]:
                return sorted(name for name in w.files.fetches if name.startswith("in/"))

            for computed in range(4):
                expected = [f"in/job{n} version 1" for n in range(min(4, computed + 2))]
                await until(lambda n=computed: len(processes.runners) == n + 1 and len(processes.running) == 1)  # type: ignore[misc]
                await until(lambda expected=expected: fetched() == expected)  # type: ignore[misc]
                if computed < 3:
                    await until(lambda: w.scheduler.polls[-1].free == 0 and len(w.scheduler.polls[-1].held) >= 2)
                    assert fetched() == expected
                processes.finish(processes.runners[-1], 10)
            await until(lambda: len(w.scheduler.done) == 4)

    story(run)


def test_two_slots_compute_two_tasks_of_one_model_in_two_processes(tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes, slots=2) as w:
            assert processes.spawned == 1
            processes.automatic = False
            w.scheduler.lend(w.lease(0), w.lease(1), w.lease(2))
            await until(lambda: len(processes.running) == 2)
            assert processes.spawned == 2
            assert len(w.files.fetches) == 2  # the model's file, and the input once for all tasks
            for runner in list(processes.runners):
                processes.finish(runner, 10)
            await until(lambda: processes.running == [(20, 30)])
            processes.finish(processes.runners[-1], 10)
            await until(lambda: len(w.scheduler.done) == 3)
            assert processes.spawned == 2

    story(run)


def test_a_result_is_reported_until_a_leader_takes_it_and_never_computed_twice(tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes) as w:
            w.scheduler.refusals = [NotLeader("election") for _ in range(3)]
            w.scheduler.lend(w.lease(0))
            await until(lambda: len(w.scheduler.done) == 1)
            assert len(processes.runners) == 1

    story(run)


def test_after_a_change_of_leader_the_first_poll_names_what_is_held(tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes) as w:
            processes.automatic = False
            w.scheduler.lend(w.lease(0, attempt=1))
            await until(lambda: len(processes.running) == 1)
            w.scheduler.poll_refusals = [NotLeader("election")] * 2
            w.scheduler.term = 2
            heard = len(w.scheduler.polls)
            w.agent.leader_changed()
            await until(lambda: len(w.scheduler.polls) >= heard + 3)
            assert w.scheduler.polls[-1].held == [Held("job", 0, 1)]
            processes.finish(processes.runners[-1], 10)
            await until(lambda: len(w.scheduler.done) == 1)

    story(run)


def test_the_answer_of_a_deposed_scheduler_is_ignored(tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes) as w:
            w.scheduler.term = 0
            w.scheduler.lend(w.lease(0))
            heard = len(w.scheduler.polls)
            await until(lambda: len(w.scheduler.polls) > heard and not w.scheduler.leases)
            assert w.agent.running == []
            assert processes.running == []

    story(run)


def test_what_the_scheduler_drops_is_stopped_and_the_model_is_there_again_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes) as w:
            processes.automatic = False
            w.scheduler.lend(w.lease(0))
            await until(lambda: len(processes.running) == 1)
            w.scheduler.void(Held("job", 0, 0))
            await until(lambda: processes.running == [] and processes.closed == 1)
            await until(lambda: w.agent.models == [("m", 1, "ready")])
            processes.automatic = True
            w.scheduler.lend(w.lease(1))
            await until(lambda: len(w.scheduler.done) == 1)
            assert w.scheduler.done[0][0].task == 1
            assert w.scheduler.failed == []

    story(run)


def test_a_report_that_will_never_be_taken_ends_the_task(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as w:
            w.scheduler.refusals = [NotFound("no job job")]
            w.scheduler.lend(w.lease(0))
            await until(lambda: w.scheduler.refusals == [] and w.agent.running == [])
            assert (w.scheduler.done, w.scheduler.failed) == ([], [])

    story(run)


def test_an_input_that_nobody_has_fails_the_attempt_with_its_name(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as w:
            lease = w.lease(0)
            w.files.content.clear()
            w.scheduler.lend(lease)
            await until(lambda: len(w.scheduler.failed) == 1)
            assert w.scheduler.failed[0].error.startswith("in/job version 1: nobody has block")
            assert not w.scheduler.failed[0].fatal

    story(run)


def test_a_task_of_a_model_not_held_here_is_given_back_uncounted(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as w:
            w.agent._begin(w.lease(0, model="other"))
            await until(lambda: w.agent.running == [])
            heard = len(w.scheduler.polls)  # one that went before may still name the task
            w.agent.leader_changed()
            await until(lambda: len(w.scheduler.polls) > heard)
            assert (w.scheduler.polls[-1].held, w.scheduler.failed) == ([], [])

    story(run)


def test_stopping_lets_a_task_end_and_gives_the_rest_back(tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes) as w:
            processes.automatic = False
            w.scheduler.lend(w.lease(0), w.lease(1))
            await until(lambda: len(processes.running) == 1 and len(w.agent.running) == 2)
            stopping = asyncio.create_task(w.agent.stop(0.2))
            await asyncio.sleep(0)
            processes.finish(processes.runners[-1], 10)
            await stopping
            assert [done.task for done, _ in w.scheduler.done] == [0]
            last = w.scheduler.polls[-1]
            assert (last.held, last.free, last.wait_s) == ([], 0, 0.0)
            assert w.scheduler.failed == []
            assert processes.closed == processes.spawned

    story(run)


def test_one_warm_process_waits_and_is_replaced_when_it_is_taken(tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes()
        async with world(tmp_path, processes, model=False, warm_runner=True) as w:
            await until(lambda: processes.spawned == 1)
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "m.onnx").write_bytes(b"weights")
            w.scheduler.assign(w.files.model("m", tmp_path / "m"))
            await until(lambda: w.agent.models == [("m", 1, "ready")] and processes.spawned == 2)
        assert processes.closed == 2

    story(run)


def test_the_digits_are_served_by_a_real_process(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, ChildFactory(str(tmp_path)), model=False) as w:
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "digits.onnx").write_bytes((EXAMPLES / "digits.onnx").read_bytes())
            w.scheduler.assign(w.files.model("digits", tmp_path / "m"))
            await until(lambda: w.agent.models == [("digits", 1, "ready")])
            content = (EXAMPLES / "digits.zip").read_bytes()
            blocks: list[Block] = list(w.files.add(content))

            def lease(task: int, first: int, last: int) -> Lease:
                return Lease("j", task, 0, "digits", 1, first, last, "zip", len(content), blocks, "in", 1)

            w.scheduler.lend(lease(-1, 0, 0))
            await until(lambda: w.scheduler.planned == [PlanDone(ME, "j", 1797)])
            w.scheduler.lend(*(lease(i, 600 * i, min(1797, 600 * i + 600)) for i in range(3)))
            await until(lambda: len(w.scheduler.done) == 3)
            parts = sorted((done.task, w.files.uploads[done.put]) for done, _ in w.scheduler.done)
            lines = [json.loads(line) for _, part in parts for line in part.splitlines()]
            truth = labels()
            assert [line["query"] for line in lines] == list(truth)
            assert sum(line["output"]["label"] == truth[line["query"]] for line in lines) / 1797 > 0.95

    story(run)
