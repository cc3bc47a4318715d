# Workers die, leaders change, reports are late or lost.
from __future__ import annotations

import asyncio

import pytest

from idunno.base.errors import (
    Conflict,
    InvalidArgument,
    NoQuorum,
    NotFound,
    NotLeader,
    PermissionDenied,
)
from idunno.coordinator import commands as c
from idunno.coordinator.records import Attempt
from idunno.scheduler.config import SchedulerConfig
from idunno.scheduler.messages import (
    ASSIGNMENTS,
    ATTEMPT_FAILED,
    EXPLAIN,
    GET_JOB,
    OUTPUTS,
    SUBMIT,
    TASK_DONE,
    WORKER_REPORT,
    AttemptFailed,
    Explain,
    GetJob,
    JobRequest,
    Lease,
    ListAssignments,
    Submit,
    TaskDone,
    WorkerReport,
)
from idunno.wire.calls import HEADER_BYTES_MAX, pack
from tests.unit.coordinator.world import block, timing
from tests.unit.scheduler.cluster import ANN, World, node_id, until
from tests.unit.scheduler.users import deploy, deployed, info, planned, story


def test_a_lost_worker_gives_its_task_back_and_poison_is_counted_across_leaders() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 10)
        for attempt, worker in enumerate((2, 3, 4)):
            [lease] = (await world.poll(worker)).leases
            assert lease.attempt == attempt
            world.member(worker, "failed")
            await until(lambda n=attempt: len(attempts(world)) == n + 1)  # type: ignore[misc]
            world.lead(1 if attempt else 5)
            for other in (1, 2, 3, 4, 5):  # all workers that live tell the new leader that they hold nothing
                if world.states[node_id(other)] == "active":
                    await world.poll(other, free=0)
        found = await info(world)
        assert (found.state, found.tasks.failed) == ("failed", 1)
        assert [a.node for a in attempts(world)] == [node_id(2), node_id(3), node_id(4)]
        [output] = (await world.call(OUTPUTS, JobRequest("j1"))).outputs
        assert "failed 3 times, last: worker n4 is failed: no answer" in output.error

    def attempts(world: World) -> tuple[Attempt, ...]:
        return world.machine.ledger.task("j1", 0).attempts

    story(test, config=SchedulerConfig(scheduler_works="always"))


def test_a_new_leader_takes_over_and_hands_nothing_out_twice() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 30)
        held = {n: (await world.poll(n)).leases for n in (2, 3)}
        world.lead(4)
        service = world.nodes[node_id(4)].service
        assert service.leading() is not None
        assert bool(service.recovering)
        assert (await info(world)).reason.startswith("recovering: the new scheduler waits for n2, n3, n4, n5")
        assert (await world.poll(5)).leases == []
        assert (await world.poll(4)).leases == []
        assert (await world.poll(2, *held[2], free=0)).drop == []
        answer = await world.poll(3, *held[3], free=0)
        assert (answer.drop, answer.term) == ([], 2)
        assert not world.nodes[node_id(4)].service.recovering
        assert service.waiting == 2
        [last] = (await world.poll(5)).leases
        assert {lease.task for lease in [last, *held[2], *held[3]]} == {0, 1, 2}
        await world.finish(2, held[2][0])
        await world.finish(3, held[3][0])
        await world.finish(5, last)
        assert (await info(world)).done == 30
        assert all(not world.machine.ledger.task("j1", n).attempts for n in range(3))

    story(test)


def test_a_leader_that_is_deposed_answers_its_polls_and_refuses_new_ones() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        old = world.leader
        assert old is not None
        waiting = asyncio.ensure_future(world.poll(2, wait_s=5))
        await until(lambda: bool(old.service.leading() and old.service.leading()._polls))  # type: ignore[union-attr]
        world.lead(3)
        with pytest.raises(NotLeader):
            await waiting
        world.leader = old
        with pytest.raises(NotLeader):
            await world.poll(2)
        with pytest.raises(NotLeader):
            await world.call(GET_JOB, GetJob("j1"), at=1, forwarded=True)

    story(test)


def test_what_could_not_be_written_is_written_when_the_log_takes_it_again() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 10)
        await world.poll(2)
        world.failing = NoQuorum("a majority is away")
        world.member(2, "failed")
        for _ in range(20):
            await asyncio.sleep(0)
        assert world.machine.ledger.task("j1", 0).attempts == ()
        assert (await world.poll(3)).leases == []  # not handed out before its attempt is counted
        world.failing = None
        leading = world.nodes[node_id(1)].service.leading()
        assert leading is not None
        leading._tick()
        await until(lambda: len(world.machine.ledger.task("j1", 0).attempts) == 1)
        await until(lambda: world.machine.roster.node(node_id(2)).presence == "failed")
        assert [lease.attempt for lease in (await world.poll(3)).leases] == [1]

    story(test)


def test_a_result_that_is_refused_ends_the_attempt() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 10)
        for attempt in range(3):
            [lease] = (await world.poll(2)).leases
            assert lease.attempt == attempt
            wrong = TaskDone(node_id(2), "j1", lease.task, "", 2, [], 7, 0, timing(7))  # 7 answers to 10 queries
            with pytest.raises(InvalidArgument):
                await world.at_leader(TASK_DONE, wrong, 2, b"{}")
            await until(lambda n=attempt: len(world.machine.ledger.task("j1", 0).attempts) == n + 1)  # type: ignore[misc]
        assert (await info(world)).state == "failed"

    story(test)


def test_an_attempt_reported_failed_is_tried_elsewhere_and_a_fatal_one_is_not() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 20)
        [first] = (await world.poll(2)).leases
        await world.at_leader(ATTEMPT_FAILED, AttemptFailed(node_id(2), "j1", first.task, 0, "child died"), 2)
        [again] = (await world.poll(3)).leases
        assert (again.task, again.attempt) == (first.task, 1)
        fatal = AttemptFailed(node_id(3), "j1", again.task, 1, "wrong shape", fatal=True)
        await world.at_leader(ATTEMPT_FAILED, fatal, 3)
        assert (await info(world)).tasks.failed == 1
        [other] = (await world.poll(4)).leases
        assert other.task == 1

    story(test)


def test_workers_speak_for_themselves_only() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        with pytest.raises(PermissionDenied, match="for itself"):
            await world.at_leader(WORKER_REPORT, WorkerReport(node_id(3), "digits", 1), 2)
        await world.poll(2, boot=3)
        with pytest.raises(Conflict, match="in use twice"):
            await world.poll(2, boot=2)

    story(test)


def test_a_second_poll_of_a_worker_ends_its_first() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        first = asyncio.ensure_future(world.poll(2, wait_s=5))
        leading = world.nodes[node_id(1)].service.leading()
        assert leading is not None
        await until(lambda: bool(leading._polls))
        second = asyncio.ensure_future(world.poll(2, wait_s=5))
        assert (await first).leases == []
        await deployed(world)
        assert (await second).assignments is not None
        assert leading._polls == {}

    story(test)


def test_a_poll_that_is_cut_leaves_its_worker_out_of_what_is_handed_out() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        waiting = asyncio.ensure_future(world.poll(2, wait_s=5))
        leading = world.nodes[node_id(1)].service.leading()
        assert leading is not None
        await until(lambda: bool(leading._polls))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await planned(world, 10)
        for _ in range(5):
            await asyncio.sleep(0)
        assert leading.dispatch.leases == {}

    story(test)


def test_three_nodes_work_with_their_scheduler_and_five_without() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        assert [w.node for w in (await deploy(world)).workers] == ["n1", "n2", "n3"]
        rows = (await world.call(ASSIGNMENTS, ListAssignments())).workers
        assert [(r.node, r.role, r.state) for r in rows] == [
            ("n1", "scheduler", "active"),
            ("n2", "worker", "active"),
            ("n3", "worker", "active"),
        ]

    story(test, nodes=3)


def test_assignments_say_what_runs_where_since_when() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 100)
        [lease] = (await world.poll(3)).leases
        assert isinstance(lease, Lease)
        row = next(r for r in (await world.call(ASSIGNMENTS, ListAssignments(), at=5)).workers if r.node == "n3")
        assert (row.models, row.task) == (["digits"], f"j1/{lease.task}")
        assert row.since is not None
        assert row.since.startswith("2023-11-14T22:13:2")
        told = await world.call(EXPLAIN, Explain("n3"))
        assert "went to n3" in told.decisions[0].why
        with pytest.raises(NotFound):
            await world.call(EXPLAIN, Explain("nobody"))

    story(test)


def test_a_node_that_could_not_set_a_model_up_is_not_said_to_be_loading_it() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world, workers=2)
        for n in (2, 3):
            await world.poll(n)
            await world.at_leader(WORKER_REPORT, WorkerReport(node_id(n), "digits", 1, "no such operator"), n)
        await until(lambda: all(w.state == "failed" for w in world.machine.registry.get("digits").workers[:2]))
        told = await world.call(EXPLAIN, Explain("n2"))
        assert told.waits_for == "idle: it could not set up digits, see `idunno explain digits`"

    story(test)


def test_the_leases_of_a_worker_with_many_slots_fit_an_answer_and_the_rest_comes_with_the_next_poll() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world, workers=1)
        [worker] = [int(w.node, 16) for w in world.machine.registry.get("digits").workers]
        blocks = tuple(block(f"b{i}", 1) for i in range(2_000))
        world.do(c.BeginPut("p", "large"), ANN)
        world.do(c.CommitPut("p", "large", 2_000, blocks), ANN)
        await world.call(SUBMIT, Submit("j1", "digits", "large", 1, "npy", 10), ANN)
        world.do(c.PlanJob("j1", 300, 10), world.node)
        held: list[Lease] = []
        polls = 0
        while len(held) < 20:
            answer = await world.poll(worker, *held, free=20 - len(held))
            assert len(pack(answer)) < HEADER_BYTES_MAX
            assert answer.leases
            held += answer.leases
            polls += 1
        assert (polls > 1, sorted(lease.task for lease in held)) == (True, list(range(20)))

    story(test)
