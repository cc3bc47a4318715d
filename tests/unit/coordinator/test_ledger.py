"""Jobs and tasks: cut once, counted once, failed after three; and a model-checked random history."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from idunno.base.errors import Conflict, Exhausted, InvalidArgument, NotFound, NotReady, PermissionDenied
from idunno.coordinator import commands as c
from idunno.coordinator import ledger as led
from idunno.coordinator.effects import FileDeleted, JobChanged, KeepSmall, TaskCompleted, VersionMade
from idunno.coordinator.ledger import Ledger
from idunno.coordinator.machine import Machine
from idunno.coordinator.names import output_name
from idunno.coordinator.namespace import small_block
from idunno.coordinator.records import Timing
from tests.unit.coordinator.world import BOB, N1, N2, SYSTEM, World, block, done, timing


def fail(job: str, task: int, attempt: int, error: str = "it broke", *, fatal: bool = False) -> c.FailAttempt:
    return c.FailAttempt(job, task, N2, attempt, error, fatal)


def test_a_job_is_cut_into_tasks_in_input_order() -> None:
    world = World()
    world.planned(10, 4)
    ledger = world.machine.ledger
    assert [(t.task, t.first, t.last, t.state) for t in ledger.tasks("job1")] == [
        (0, 0, 4, "ready"),
        (1, 4, 8, "ready"),
        (2, 8, 10, "ready"),
    ]
    assert (ledger.job("job1").queries, ledger.task_queries("job1"), ledger.job("job1").state) == (10, 4, "running")
    with pytest.raises(NotFound, match="has 3 tasks, none is number 3"):
        ledger.task("job1", 3)


def test_a_completion_makes_the_output_file_and_success_in_one() -> None:
    world = World()
    world.planned(10, 4)
    world.now_ms = 9_000
    applied = world.apply(done("job1", 2, 2, errors=1), SYSTEM)
    name = ".idunno/jobs/job1/output/000002.jsonl"
    content = small_block(b"{}\n")
    assert applied.effects == (
        KeepSmall(content.block, b"{}\n"),
        VersionMade(name, 1, (content,)),
        TaskCompleted("job1", 2, "digits", 2, 9_000),
        JobChanged("job1"),
    )
    task = world.machine.ledger.task("job1", 2)
    assert task.output is not None
    assert (task.state, task.output.name, task.done, task.errors, task.node) == ("success", name, 1, 1, N2)
    made = world.machine.namespace.latest(name)
    assert (made.owner, made.small, made.blocks) == ("alice", True, (content,))
    assert world.machine.registry.queries_done("digits") == 2
    assert world.machine.registry.timing("digits") == timing(2)


def test_a_large_output_comes_from_its_open_put_which_it_closes() -> None:
    world = World()
    world.planned(4, 4)
    name = output_name("job1", 0)
    world.do(c.BeginPut("p1", name, node=N2), SYSTEM)
    large = done("job1", 0, 4, put="p1", size=10, blocks=(block("out"),), content=b"")
    with pytest.raises(Conflict, match=r"p2 of .* is not open"):
        world.do(msgspec.structs.replace(large, put="p2"), SYSTEM)
    with pytest.raises(InvalidArgument, match="the blocks hold 10 bytes, the version 11"):
        world.do(msgspec.structs.replace(large, size=11), SYSTEM)
    assert world.do(large, SYSTEM).counted
    assert world.machine.namespace.open_puts() == []
    assert not world.machine.namespace.latest(name).small


def test_a_put_of_another_name_is_no_output() -> None:
    world = World()
    world.planned(8, 4)
    world.do(c.BeginPut("p1", output_name("job1", 1), node=N2), SYSTEM)
    with pytest.raises(Conflict):
        world.do(done("job1", 0, 4, put="p1", size=10, blocks=(block("out"),), content=b""), SYSTEM)


def test_a_second_completion_changes_nothing_and_ends_its_put() -> None:
    world = World()
    world.planned(8, 4)
    world.do(done("job1", 0, 4), SYSTEM)
    name = output_name("job1", 0)
    world.do(c.BeginPut("p2", name, node=N1), SYSTEM)
    world.do(c.BeginPut("else", "a file"))
    world.do(done("job1", 0, 4, put="else", size=10, blocks=(block("x"),), content=b""), SYSTEM)
    before = world.machine.ledger.state()
    second = world.apply(done("job1", 0, 4, put="p2", size=10, blocks=(block("other"),), content=b""), SYSTEM)
    assert second.result is not None
    assert (second.result.counted, second.result.duplicate) == (False, True)  # type: ignore[attr-defined]
    assert (second.effects, world.machine.ledger.state()) == ((), before)
    assert [put.put for put in world.machine.namespace.open_puts()] == ["else"]  # not its own to end
    assert world.machine.namespace.latest(name).version == 1
    assert world.machine.registry.queries_done("digits") == 4


@pytest.mark.parametrize(
    "change",
    [
        {"done": 3},
        {"done": 5, "errors": -1},
        {"errors": 1},
        {"size": 9},
        {"content": bytes(4097), "size": 4097},
        {"timing": Timing(1, 1, 1, ())},
    ],
)
def test_a_completion_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    world = World()
    world.planned(4, 4)
    before = world.machine.ledger.state(), world.machine.namespace.state(), world.machine.registry.state()
    with pytest.raises(InvalidArgument):
        world.do(msgspec.structs.replace(done("job1", 0, 4), **change), SYSTEM)
    assert (world.machine.ledger.state(), world.machine.namespace.state(), world.machine.registry.state()) == before


def test_no_such_task() -> None:
    world = World()
    world.planned(4, 4)
    with pytest.raises(NotFound):
        world.do(done("job1", 7, 4), SYSTEM)
    assert world.do(done("job9", 0, 4), SYSTEM).why == "the job is gone"


def test_three_attempts_fail_a_task_and_its_job_says_how_many_and_why() -> None:
    world = World()
    world.planned(8, 4)
    assert world.do(fail("job1", 1, 0, "died"), SYSTEM).counted
    assert not world.do(fail("job1", 1, 0, "died"), SYSTEM).counted  # the same report again
    assert not world.do(fail("job1", 1, 2, "died"), SYSTEM).counted
    world.do(fail("job1", 1, 1, "died again"), SYSTEM)
    assert world.machine.ledger.task("job1", 1).state == "ready"
    assert world.do(fail("job1", 1, 2, "out of memory"), SYSTEM).state == "failed"
    late = world.do(done("job1", 1, 4), SYSTEM)
    assert (late.counted, late.duplicate, late.state) == (False, False, "failed")
    assert world.machine.ledger.job("job1").state == "running"
    world.now_ms = 7_000
    world.do(done("job1", 0, 4), SYSTEM)
    job = world.machine.ledger.job("job1")
    assert (job.state, job.reason, job.finished_ms) == ("failed", "1 of 2 tasks failed: out of memory", 7_000)
    assert [a.error for a in world.machine.ledger.task("job1", 1).attempts] == ["died", "died again", "out of memory"]
    assert world.machine.namespace.find(output_name("job1", 0)) is not None  # what was answered stays readable


def test_a_fatal_error_fails_at_once() -> None:
    world = World()
    world.planned(4, 4)
    assert world.do(fail("job1", 0, 0, "wrong shape", fatal=True), SYSTEM).state == "failed"
    assert world.machine.ledger.job("job1").reason == "1 of 1 tasks failed: wrong shape"


def test_a_job_succeeds_when_all_tasks_did() -> None:
    world = World()
    world.planned(6, 4)
    world.do(done("job1", 1, 2), SYSTEM)
    world.do(done("job1", 0, 4, errors=4), SYSTEM)
    job, counts = world.machine.ledger.job("job1"), world.machine.ledger.counts("job1")
    assert (job.state, job.reason) == ("success", "")
    assert (counts.tasks, counts.ready, counts.success, counts.done, counts.errors) == (2, 0, 2, 2, 4)
    assert list(world.machine.ledger.unfinished()) == []


def test_planning_counts_its_attempts_too() -> None:
    world = World()
    world.deployed()
    world.submit()
    assert world.do(done("job1", 0, 4), SYSTEM).why == "the job is not planned yet"
    world.do(fail("job1", -1, 0), SYSTEM)
    assert not world.do(fail("job1", -1, 0), SYSTEM).counted
    world.do(fail("job1", -1, 1), SYSTEM)
    assert world.do(fail("job1", -1, 2, "not an archive"), SYSTEM).state == "failed"
    job = world.machine.ledger.job("job1")
    assert (job.state, job.reason) == ("failed", "its input could not be read: not an archive")
    assert not world.do(c.PlanJob("job1", 4, 4), SYSTEM).changed
    assert not world.do(fail("job1", -1, 3), SYSTEM).counted
    world.submit("job2")
    assert world.do(fail("job2", -1, 0, "cannot be", fatal=True), SYSTEM).state == "failed"


def test_a_job_is_planned_once() -> None:
    world = World()
    world.planned(8, 4)
    assert not world.do(c.PlanJob("job1", 100, 1), SYSTEM).changed
    assert world.machine.ledger.counts("job1").tasks == 2
    assert not world.do(c.PlanJob("gone", 1, 1), SYSTEM).changed


@pytest.mark.parametrize(("queries", "size"), [(-1, 1), (1, 0), (1, -4), (1_000_001, 1), (10**12 + 1, 10**9)])
def test_a_plan_that_cannot_be_is_refused(queries: int, size: int) -> None:
    world = World()
    world.deployed()
    world.submit()
    with pytest.raises(InvalidArgument):
        world.do(c.PlanJob("job1", queries, size), SYSTEM)
    assert world.machine.ledger.job("job1").state == "planning"


def test_a_job_without_queries_is_done_at_once() -> None:
    world = World()
    world.planned(0, 1)
    assert world.machine.ledger.job("job1").state == "success"


def test_a_million_tasks_are_cheap_until_something_happens_to_them() -> None:
    world = World()
    world.planned(1_000_000, 1)
    ledger = world.machine.ledger
    for task in (0, 1, 999_998):
        world.do(done("job1", task, 1), SYSTEM)
    assert (ledger.next_ready("job1"), ledger.next_ready("job1", 999_997)) == (2, 999_999)
    assert ledger.next_ready("job1", 999_999) == -1
    assert len(world.machine.snapshot()) < 10_000


def test_totals_are_of_the_unfinished_jobs_of_all_models() -> None:
    world = World()

    def totals() -> tuple[int, int, int, int, int]:
        ledger = Machine.restore(world.machine.snapshot()).ledger
        assert ledger.unfinished_tasks() == world.machine.ledger.unfinished_tasks()
        assert ledger.unanswered("digits") == world.machine.ledger.unanswered("digits")
        tasks = ledger.unfinished_tasks()
        return tasks.tasks, tasks.ready, tasks.success, tasks.failed, ledger.unanswered("digits")

    world.planned(10, 4)
    world.planned(8, 4, "job2")
    world.submit("job3")
    assert totals() == (5, 5, 0, 0, 18)
    world.do(done("job1", 2, 2), SYSTEM)
    world.do(fail("job1", 0, 0), SYSTEM)
    assert totals() == (5, 4, 1, 0, 16)
    world.do(fail("job1", 0, 1, fatal=True), SYSTEM)
    assert totals() == (5, 3, 1, 1, 12)
    world.do(done("job1", 1, 4), SYSTEM)
    assert totals() == (2, 2, 0, 0, 8)
    world.do(c.CancelJob("job2"))
    world.do(c.CancelJob("job3"))
    assert totals() == (0, 0, 0, 0, 0)
    assert world.machine.ledger.unanswered("letters") == 0


def test_a_change_behind_a_capture_copies_a_part_of_the_tasks_and_leaves_the_capture_as_it_was() -> None:
    world = World()
    world.planned(4 * led.PART_TASKS, 1)
    ledger = world.machine.ledger
    for task in range(0, 4 * led.PART_TASKS, 2):
        world.do(done("job1", task, 1), SYSTEM)
    before = ledger._jobs["job1"]
    captures = []
    for task in (1, led.PART_TASKS + 1, 3):
        captures.append((ledger.capture(), list(Ledger(ledger.state()).capture())))
        world.do(done("job1", task, 1), SYSTEM)
        if task == 1:
            after = ledger._jobs["job1"]
            assert [new is old for new, old in zip(after.parts, before.parts, strict=True)] == [False, True, True, True]
    for taken, expected in captures:
        assert list(taken) == expected
    assert [task.task for task in ledger.ended("job1")][:4] == [0, 1, 2, 3]


def test_the_newest_jobs_of_all_and_of_one_client() -> None:
    world = World()
    world.planned(4, 4)
    for number in range(2, 5):
        world.submit(f"job{number}")
    world.put("in", actor=BOB)
    world.do(c.SubmitJob("bobs", "digits", "in", 1, "lines"), BOB)
    world.do(c.CancelJob("job3"))
    world.do(c.ForgetJob("job3"), request="f1")
    for ledger in (world.machine.ledger, Machine.restore(world.machine.snapshot()).ledger):
        assert ledger.newest(3) == ["job2", "job4", "bobs"]
        assert (ledger.newest(2, "alice"), ledger.newest(9, "bob")) == (["job2", "job4"], ["bobs"])
        assert ledger.newest(9, "nobody") == []


def test_a_job_needs_a_model_that_serves_and_an_input_that_is_there() -> None:
    world = World()
    world.put(".idunno/jobs/job1/input")
    submit = c.SubmitJob("job1", "digits", ".idunno/jobs/job1/input", 1, "lines")
    with pytest.raises(NotFound, match="no model 'digits'"):
        world.do(submit)
    version = world.deploy()
    with pytest.raises(NotReady, match="model digits is undeployed: waiting for n1"):
        world.do(submit)
    world.do(c.ReportWorker("digits", version, N1), SYSTEM)
    for change in ({"input_name": "nothing"}, {"input_version": 2}):
        with pytest.raises(NotFound):
            world.do(msgspec.structs.replace(submit, **change))
    for bad in ({"job": "no such!"}, {"batch_size": -1}, {"input_kind": ""}):
        with pytest.raises(InvalidArgument):
            world.do(msgspec.structs.replace(submit, **bad))
    assert world.do(submit).state == "planning"


def test_a_retried_submit_finds_its_job() -> None:
    world = World()
    world.planned(4, 4)
    submit = c.SubmitJob("job1", "digits", ".idunno/jobs/job1/input", 1, "lines")
    again = world.do(submit)
    assert (again.state, again.changed) == ("running", False)
    with pytest.raises(Conflict, match="another job job1"):
        world.do(msgspec.structs.replace(submit, model="else"))
    with pytest.raises(PermissionDenied):
        world.do(submit, BOB)


def test_a_completion_times_no_more_queries_than_it_answers() -> None:
    world = World()
    world.planned(4, 4)
    with pytest.raises(InvalidArgument, match="times 5 of 4 queries"):
        world.do(done("job1", 0, 4, timing=timing(5)), SYSTEM)
    assert world.machine.registry.timing("digits").count == 0


def test_jobs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(led, "JOBS_MAX", 1)
    world = World()
    world.planned(4, 4)
    world.put("in")
    with pytest.raises(Exhausted, match="idunno forget"):
        world.do(c.SubmitJob("job2", "digits", "in", 1, "lines"))


def test_after_a_cancel_late_completions_are_refused_quietly() -> None:
    world = World()
    world.planned(8, 4)
    world.do(done("job1", 0, 4), SYSTEM)
    world.do(c.BeginPut("p1", output_name("job1", 1), node=N2), SYSTEM)
    assert world.do(c.CancelJob("job1")).state == "cancelled"
    assert not world.do(c.CancelJob("job1")).changed
    late = world.do(done("job1", 1, 4, put="p1", size=10, blocks=(block("x"),), content=b""), SYSTEM)
    assert (late.counted, late.duplicate, late.why) == (False, False, "the job was cancelled by alice")
    assert world.machine.namespace.open_puts() == []
    assert not world.do(fail("job1", 1, 0), SYSTEM).counted
    assert world.machine.ledger.next_ready("job1") == -1


def test_cancel_leaves_a_finished_job_as_it_is() -> None:
    world = World()
    world.planned(0, 1)
    assert world.do(c.CancelJob("job1")).state == "success"
    with pytest.raises(NotFound):
        world.do(c.CancelJob("job9"))


def test_forget_removes_a_finished_job_with_its_files_and_open_puts() -> None:
    world = World()
    world.planned(8, 4)
    with pytest.raises(Conflict, match="job job1 is running; `idunno cancel job1` first"):
        world.do(c.ForgetJob("job1"), request="f1")
    for task in (0, 1):
        world.do(done("job1", task, 4), SYSTEM)
    world.do(c.BeginPut("straggler", output_name("job1", 1), node=N2), SYSTEM)
    world.put(".idunno/jobs/job10/input")
    applied = world.apply(c.ForgetJob("job1"), request="f1")
    assert applied.effects[0] == JobChanged("job1")
    assert [e.name for e in applied.effects if isinstance(e, FileDeleted)] == [
        ".idunno/jobs/job1/input",
        ".idunno/jobs/job1/output/000000.jsonl",
        ".idunno/jobs/job1/output/000001.jsonl",
    ]
    assert world.machine.namespace.names(".idunno/", "", 9)[0] == [".idunno/jobs/job10/input"]
    assert world.machine.namespace.open_puts() == []
    assert not world.do(c.ForgetJob("job1"), request="f1").changed
    with pytest.raises(NotFound):
        world.do(c.ForgetJob("job1"), request="f2")


class Jobs(RuleBasedStateMachine):
    """One job at a time, all reports in any order and as often as you like, against a list of task states."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.job = ""
        self.sizes: list[int] = []
        self.states: list[str] = []
        self.attempts: list[int] = []
        self.answered = 0
        self.cancelled = False
        self.serial = 0

    @initialize()
    def begin(self) -> None:
        self.world.deployed()
        self.next_job(7, 3)

    @precondition(lambda self: self.job and (self.cancelled or "ready" not in self.states))
    @rule(queries=st.integers(1, 12), size=st.integers(1, 5))
    def next_job(self, queries: int, size: int) -> None:
        self.serial += 1
        self.job, self.cancelled = f"job{self.serial}", False
        self.world.planned(queries, size, self.job)
        self.sizes = [min(size, queries - first) for first in range(0, queries, size)]
        self.states = ["ready"] * len(self.sizes)
        self.attempts = [0] * len(self.sizes)

    @precondition(lambda self: self.sizes)
    @rule(data=st.data(), lie=st.sampled_from([0, 0, 0, 1]))
    def complete(self, data: Any, lie: int) -> None:
        task = data.draw(st.integers(0, len(self.sizes) - 1))
        applied = self.world.apply(done(self.job, task, self.sizes[task] + lie), SYSTEM)
        if self.cancelled or self.states[task] != "ready":
            assert not applied.result.counted  # type: ignore[union-attr]
        elif lie:
            assert isinstance(applied.error, InvalidArgument)
        else:
            assert applied.result.counted  # type: ignore[union-attr]
            self.states[task] = "success"
            self.answered += self.sizes[task]

    @precondition(lambda self: self.sizes)
    @rule(data=st.data(), fatal=st.booleans())
    def fail(self, data: Any, fatal: bool) -> None:
        task = data.draw(st.integers(0, len(self.sizes) - 1))
        attempt = data.draw(st.integers(0, 2))
        result = self.world.do(fail(self.job, task, attempt, fatal=fatal), SYSTEM)
        counts = not self.cancelled and self.states[task] == "ready" and attempt == self.attempts[task]
        assert result.counted == counts
        if counts:
            self.attempts[task] += 1
            if fatal or self.attempts[task] == 3:
                self.states[task] = "failed"

    @precondition(lambda self: "ready" in self.states and not self.cancelled)
    @rule(sure=st.sampled_from([False, False, False, True]))
    def cancel(self, sure: bool) -> None:
        if sure:
            self.world.do(c.CancelJob(self.job))
            self.cancelled = True

    @rule()
    def restart_from_a_snapshot(self) -> None:
        restored = Machine.restore(self.world.machine.snapshot())
        assert restored.digest() == self.world.machine.digest()
        self.world.machine = restored

    @invariant()
    def the_ledger_says_the_same(self) -> None:
        if not self.job:
            return
        ledger = self.world.machine.ledger
        assert [t.state for t in ledger.tasks(self.job)] == self.states
        over = self.cancelled or "ready" not in self.states
        assert [j.job for j in ledger.unfinished()] == ([] if over else [self.job])
        state = "cancelled" if self.cancelled else "running" if not over else "success"
        if state == "success" and "failed" in self.states:
            state = "failed"
        assert ledger.job(self.job).state == state
        ready = [i for i, s in enumerate(self.states) if s == "ready"] if not over else []
        found, task = [], -1
        while (task := ledger.next_ready(self.job, task)) >= 0:
            found.append(task)
        assert found == ready
        ended = [i for i, state in enumerate(self.states) if state != "ready"]
        for first in (0, 2):
            assert [t.task for t in ledger.ended(self.job, first)] == [i for i in ended if i >= first]
        counts = ledger.counts(self.job)
        assert counts.ready == self.states.count("ready")
        left = min(counts.ready * ledger.task_queries(self.job), sum(self.sizes) - counts.done)
        assert ledger.unanswered("digits") == (0 if over else left)
        all_tasks = ledger.unfinished_tasks()
        told = (all_tasks.tasks, all_tasks.ready, all_tasks.success, all_tasks.failed)
        assert told == ((0, 0, 0, 0) if over else (counts.tasks, counts.ready, counts.success, counts.failed))
        assert counts.done == sum(n for n, s in zip(self.sizes, self.states, strict=True) if s == "success")
        assert self.world.machine.registry.queries_done("digits") == self.answered


TestJobs = Jobs.TestCase
TestJobs.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
