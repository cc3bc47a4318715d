from __future__ import annotations

import asyncio
from typing import Any

import pytest

from idunno.base.errors import (
    IdunnoError,
    InvalidArgument,
    NotFound,
    NotReady,
    PermissionDenied,
)
from idunno.coordinator import commands as c
from idunno.coordinator import ledger
from idunno.coordinator.applier import Applier
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import TaskRecord
from idunno.scheduler import jobs, views
from idunno.scheduler.dispatch import Dispatch
from idunno.scheduler.messages import (
    BATCH_SIZE,
    CANCEL,
    DEPLOY,
    EXPLAIN,
    FORGET,
    GET_JOB,
    GET_MODEL,
    JOBS,
    MODELS,
    OUTPUTS,
    PLAN_DONE,
    RATES,
    TIMES,
    UNDEPLOY,
    WORKER_REPORT,
    BatchSize,
    ByModel,
    DeployModel,
    Explain,
    FileVersion,
    GetJob,
    GetModel,
    JobInfo,
    JobRequest,
    ListJobs,
    ListModels,
    ModelInfo,
    PlanDone,
    UndeployModel,
    WorkerReport,
)
from idunno.wire.calls import HEADER_BYTES_MAX, Actor, Empty, Role, pack
from tests.unit.coordinator.world import done
from tests.unit.scheduler.cluster import ANN, BOB, ROOT, World, node_id, until
from tests.unit.scheduler.users import deploy, deployed, info, planned, put, ready, story, submitted

RITA = Actor("rita", Role.READER)


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_deploy_is_undeployed_until_all_workers_are_ready_and_the_long_poll_sees_each_step() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        first = await deploy(world)
        assert (first.state, [w.node for w in first.workers]) == ("undeployed", ["n2", "n3", "n4", "n5"])
        seen = [first]
        while seen[-1].state != "deployed":
            waiting = asyncio.ensure_future(world.call(GET_MODEL, GetModel("digits", 5.0, seen[-1]), at=4))
            await until(lambda: len(world.nodes[node_id(4)].service._waiters) == 1)
            worker = next(w for w in world.machine.registry.get("digits").workers if w.state == "assigned")
            await world.at_leader(WORKER_REPORT, WorkerReport(worker.node, "digits", 1), int(worker.node, 16))
            seen.append(await waiting)
        assert [sum(w.state == "ready" for w in i.workers) for i in seen] == [0, 1, 2, 3, 4]
        again = await deploy_again(world)
        assert again.version == 1  # a retry of the same request

    async def deploy_again(world: World) -> ModelInfo:
        request = DeployModel("digits", "onnx", [FileVersion("m.onnx", "models/digits", 1)], "deploy-digits")
        found = await world.call(DEPLOY, request)
        assert isinstance(found, ModelInfo)
        return found

    story(test)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "a b"}, InvalidArgument),
        ({"runtime": "cobol"}, InvalidArgument),
        ({"batch_size": 5_000}, InvalidArgument),
        ({"batch_size": -1}, InvalidArgument),
        ({"weight": 0.0}, InvalidArgument),
        ({"weight": float("nan")}, InvalidArgument),
        ({"workers": -1}, InvalidArgument),
        ({"workers_min": 3, "workers_max": 2}, InvalidArgument),
        ({"request": ""}, InvalidArgument),
        ({"files": [FileVersion("m.onnx", "models/digits", 7)]}, NotFound),
        ({"files": []}, InvalidArgument),
    ],
)
def test_a_deploy_that_makes_no_sense_is_refused(change: dict[str, object], error: type[IdunnoError]) -> None:
    async def test(world: World) -> None:
        world.lead(1)
        put(world, "models/digits")
        fields: dict[str, object] = {
            "model": "digits",
            "runtime": "onnx",
            "files": [FileVersion("m.onnx", "models/digits", 1)],
            "request": "r",
        }
        with pytest.raises(error):
            await world.call(DEPLOY, DeployModel(**{**fields, **change}))  # type: ignore[arg-type]
        assert world.machine.registry.models() == []

    story(test)


def test_a_worker_that_fails_is_replaced_and_three_failures_are_the_end() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deploy(world, workers=1)
        tried = []
        for _ in range(3):
            await until(lambda: any(w.state == "assigned" for w in world.machine.registry.get("digits").workers))
            [worker] = [w for w in world.machine.registry.get("digits").workers if w.state == "assigned"]
            tried.append(worker.node)
            report = WorkerReport(worker.node, "digits", 1, "no memory")
            await world.at_leader(WORKER_REPORT, report, int(worker.node, 16))
        assert len(set(tried)) == 3
        [found] = (await world.call(MODELS, ListModels())).models
        assert found.state == "failed"
        assert found.reason.count("no memory") == 3

    story(test)


def test_a_worker_that_dies_is_replaced_and_says_why() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world, workers=2)
        assert [w.node for w in world.machine.registry.get("digits").workers] == [node_id(2), node_id(3)]
        world.member(2, "failed")
        await until(lambda: {w.node for w in world.machine.registry.get("digits").workers} == {node_id(3), node_id(4)})
        assert world.machine.roster.node(node_id(2)).presence == "failed"
        told = await world.call(EXPLAIN, Explain("digits"))
        assert any("n4 replaces n2, which is away" in d.why for d in told.decisions)

    story(test)


def test_what_a_worker_is_to_hold_comes_with_its_poll_and_a_waiting_poll_is_told() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        answer = await world.poll(2, seen=0)
        assert answer.assignments == []
        waiting = asyncio.ensure_future(world.poll(2, seen=answer.assignments_mark, wait_s=5))
        await until(lambda: world.leader is not None and bool(world.leader.service.leading()._polls))  # type: ignore[union-attr]
        await deploy(world)
        told = await waiting
        assert [(a.model, a.version, a.files[0].path) for a in told.assignments or []] == [("digits", 1, "m.onnx")]
        assert (await world.poll(2, seen=told.assignments_mark)).assignments is None
        world.lead(3)  # the mark stands for the content, whoever leads
        assert (await world.poll(2, seen=told.assignments_mark)).assignments is None

    story(test)


def test_batch_size_and_undeploy() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        assert (await world.call(BATCH_SIZE, BatchSize("digits", 17, "b"))).batch_size == 17
        with pytest.raises(InvalidArgument, match="4096"):
            await world.call(BATCH_SIZE, BatchSize("digits", 4_097, "b"))
        with pytest.raises(PermissionDenied):
            await world.call(UNDEPLOY, UndeployModel("digits", "u"), BOB)
        await world.call(UNDEPLOY, UndeployModel("digits", "u"))
        with pytest.raises(NotFound):
            await world.call(GET_MODEL, GetModel("digits"))

    story(test)


# -- jobs -------------------------------------------------------------------------------------------------------------


def test_a_job_from_submit_to_its_outputs() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        with pytest.raises(NotFound):
            await submitted(world, "j0")
        await deploy(world)
        with pytest.raises(NotReady):
            await submitted(world, "j00")
        await ready(world)
        assert (await submitted(world)).state == "planning"
        [plan] = (await world.poll(2)).leases
        assert (plan.task, plan.input_name, plan.input_blocks[0].size) == (-1, ".idunno/jobs/j1/input", 10)
        assert (await info(world)).reason == "planning: n2 counts the input's queries"
        await world.at_leader(PLAN_DONE, PlanDone(node_id(2), "j1", 100), 2)
        found = await info(world)
        assert (found.state, found.queries, found.tasks.ready) == ("running", 100, 4)  # 32 queries a task, unmeasured
        for worker in (2, 3, 4, 5):
            [lease] = (await world.poll(worker)).leases
            if worker == 5:
                found = await info(world)
                assert (found.tasks.ready, found.tasks.waiting, found.tasks.success, found.done) == (0, 1, 3, 96)
                assert (lease.first, lease.last) == (96, 100)
            await world.finish(worker, lease)
        found = await info(world)
        assert (found.state, found.done, found.tasks.success) == ("success", 100, 4)
        outputs = await world.call(OUTPUTS, JobRequest("j1"))
        assert [(o.first, o.last) for o in outputs.outputs] == [(0, 32), (32, 64), (64, 96), (96, 100)]
        assert all(o.name.startswith(".idunno/jobs/j1/") and o.size == 3 * (o.last - o.first) for o in outputs.outputs)
        assert [o.first for o in (await world.call(OUTPUTS, JobRequest("j1", first=70))).outputs] == [64, 96]
        [rate] = (await world.call(RATES, Empty())).models
        assert (rate.rate, rate.queries_done, rate.workers, rate.waiting) == (10.0, 100, 4, 0)
        assert (await world.call(TIMES, ByModel("digits"))).count == 100
        await world.call(FORGET, JobRequest("j1", "f"))
        with pytest.raises(NotFound):
            await info(world)

    story(test)


def test_outputs_of_a_long_job_come_in_pages_that_fit_a_frame() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 9_000, batch=1)
        for task in range(9_000):
            failed = c.FailAttempt("j1", task, node_id(2), 0, "a model's own long message " * 9, fatal=True)
            world.do(failed, world.node)
        first, pages, found = 0, 0, list[int]()
        while True:
            page = await world.call(OUTPUTS, JobRequest("j1", first=first))
            assert len(pack(page)) < HEADER_BYTES_MAX
            found += [output.task for output in page.outputs]
            pages += 1
            if not page.more:
                break
            first = page.outputs[-1].last
        assert found == list(range(9_000))
        assert pages == 3

    story(test)


def test_outputs_look_only_at_tasks_that_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 5_000, batch=1)
        for task in (3, 4_998):
            world.do(c.FailAttempt("j1", task, node_id(2), 0, "broken", fatal=True), world.node)
        world.do(done("j1", 2_000, 1), world.node)
        made = list[int]()

        def make(number: int, *rest: Any, **more: Any) -> TaskRecord:
            made.append(number)
            return TaskRecord(number, *rest, **more)

        monkeypatch.setattr(ledger, "TaskRecord", make)
        page = await world.call(OUTPUTS, JobRequest("j1"))
        assert ([output.task for output in page.outputs], page.more) == ([3, 2_000, 4_998], False)
        page = await world.call(OUTPUTS, JobRequest("j1", first=2_001))
        assert [output.task for output in page.outputs] == [4_998]
        assert made == []  # a record for each task that nothing happened to: half a second for a million

    story(test)


def test_rates_walk_over_no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 100)
        await planned(world, 20, "j2")
        world.do(done("j1", 0, 10), world.node)
        monkeypatch.delattr(ledger.Ledger, "unfinished")  # 100,000 of them: 0.2 s of the loop
        monkeypatch.delattr(ledger.Ledger, "jobs")
        [rate] = (await world.call(RATES, Empty())).models
        assert rate.waiting == 110

    story(test)


def test_jobs_are_their_clients_unless_an_admin_or_reader_looks() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 10)
        await planned(world, 10, "j2", actor=BOB)
        with pytest.raises(PermissionDenied):
            await info(world, "j1", BOB)
        with pytest.raises(PermissionDenied):
            await world.call(OUTPUTS, JobRequest("j1"), BOB)
        with pytest.raises(PermissionDenied):
            await world.call(CANCEL, JobRequest("j1", "x"), BOB)
        with pytest.raises(PermissionDenied):
            await world.call(JOBS, ListJobs(True), BOB)
        with pytest.raises(PermissionDenied):
            await world.call(EXPLAIN, Explain("j1"), BOB)
        assert [j.job for j in (await world.call(JOBS, ListJobs(), BOB)).jobs] == ["j2"]
        assert [j.job for j in (await world.call(JOBS, ListJobs(True), ROOT)).jobs] == ["j1", "j2"]
        assert (await info(world, "j1", RITA)).job == "j1"

    story(test)


def test_a_list_of_jobs_does_not_show_the_job_of_another_who_took_an_id_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "JOBS_SLICE", 1)

    async def work(world: World) -> None:
        world.lead(1)
        await deployed(world)
        for number in range(3):
            await submitted(world, f"j{number}")
        make = views.job_info

        def making(*about: Any) -> JobInfo:
            """Behind the first row, with more to be made, the last job becomes another's."""
            if world.machine.ledger.job("j2").client == "ann":
                world.do(c.CancelJob("j2"), ANN, "1")
                world.do(c.ForgetJob("j2"), ANN, "2")
                put(world, "bobs", BOB)
                world.do(c.SubmitJob("j2", "digits", "bobs", 1, "npy", 3), BOB)
            return make(*about)

        monkeypatch.setattr(jobs, "job_info", making)
        assert [(row.job, row.client) for row in (await world.call(JOBS, ListJobs(), ANN)).jobs] == [
            ("j0", "ann"),
            ("j1", "ann"),
        ]

    story(work)


def test_a_list_of_jobs_is_made_in_slices_and_counts_what_workers_do_once_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 30, "bobs", actor=BOB)
        for number in range(250):
            await planned(world, 10, f"j{number}")
        [lease] = (await world.poll(2)).leases
        asked, slices = list[str](), list[int]()
        all_busy = views._all_busy

        def counted(dispatch: Dispatch, model: str) -> str:
            asked.append(model)
            return all_busy(dispatch, model)

        monkeypatch.setattr(views, "_all_busy", counted)

        class Counted(views.Work):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                slices.append(len(asked))

        async def meanwhile() -> None:
            await until(lambda: len(slices) == 1)
            world.do(c.CancelJob("j249"), ANN)
            world.do(c.ForgetJob("j249"), ANN, "f1")

        monkeypatch.setattr(jobs, "Work", Counted)
        other = asyncio.ensure_future(meanwhile())
        listed = (await world.call(JOBS, ListJobs(True), ROOT)).jobs
        await other
        assert [info.job for info in listed] == ["bobs", *(f"j{number}" for number in range(249))]
        assert [info.job for info in listed if info.tasks.waiting] == [lease.job]
        assert {info.reason for info in listed if not info.tasks.waiting} == {"all 1 workers of digits are busy"}
        assert (len(slices), len(asked)) == (3, 3)  # 251 rows, whatever they wait for
        monkeypatch.setattr(jobs, "JOBS_SHOWN", 2)
        newest = await world.call(JOBS, ListJobs())
        assert ([info.job for info in newest.jobs], newest.more) == (["j247", "j248"], True)

    story(test)


def test_a_list_of_jobs_tells_its_reasons_in_short_and_one_job_in_full() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await submitted(world)
        files = [FileVersion("m.onnx", "models/digits", 1)]
        await world.call(DEPLOY, DeployModel("digits", "onnx", files, "again"))
        said = "\u00fc" * 1_000
        workers = world.machine.registry.get("digits").workers
        for worker in workers:
            world.do(c.ReportWorker("digits", 2, worker.node, said), Actor(worker.node, Role.NODE))
        [listed] = (await world.call(JOBS, ListJobs())).jobs
        assert len(listed.reason.encode()) <= jobs.REASON_BYTES_MAX + 4
        assert listed.reason.endswith(" ...")
        assert said in (await info(world)).reason

    story(test)


def test_a_long_poll_about_a_job_ends_with_its_change_and_not_before() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 10)
        seen = await info(world)
        waiting = asyncio.ensure_future(world.call(GET_JOB, GetJob("j1", 5.0, seen), at=4))
        [lease] = (await world.poll(2)).leases  # leases come and go without ending it
        assert not waiting.done()
        await world.finish(2, lease)
        assert (await waiting).state == "success"
        same = await world.call(GET_JOB, GetJob("j1", 0.01, await info(world)))
        assert same.state == "success"  # nothing changed: answered when the time was over

    story(test)


def test_why_a_job_waits_is_said() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world, workers=2)
        await planned(world, 100)
        assert (await info(world)).reason == (
            "no worker has model digits loaded: n2: has not polled this scheduler yet; "
            "n3: has not polled this scheduler yet"
        )
        held = {n: (await world.poll(n)).leases for n in (2, 3)}
        assert (await info(world)).reason == "all 2 workers of digits are busy"
        for n in (2, 3):
            report = WorkerReport(node_id(n), "digits", 1, "child died")
            await world.at_leader(WORKER_REPORT, report, n)
        await until(lambda: len(world.machine.registry.get("digits").workers) == 4)
        told = await world.call(EXPLAIN, Explain("digits"))
        assert "model digits is undeployed: 0 of 4 workers ready; n2: child died" in told.waits_for
        assert "n4: loading" in told.waits_for
        assert held

    story(test)


def test_a_snapshot_that_is_taken_in_tells_which_models_have_work_now() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        for model in ("digits", "letters"):
            await deployed(world, model)
        await planned(world, 10)
        there = Machine.restore(world.machine.snapshot())
        world.do(c.CancelJob("j1"), ANN)
        await submitted(world, "j2", model="letters")
        world.do(c.PlanJob("j2", 10, 10), world.node)
        service = world.nodes[node_id(3)].service
        assert list(service._window._waiting_since) == ["letters"]
        applier = Applier(world.machine)
        applier.subscribe(service.follow)
        applier.replace(there)
        assert list(service._window._waiting_since) == ["digits"]

    story(test)


def test_cancel_stops_the_work_at_once() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 100)
        [lease] = (await world.poll(2)).leases
        waiting = asyncio.ensure_future(world.poll(2, lease, free=0, wait_s=5))
        await until(lambda: world.leader is not None and bool(world.leader.service.leading()._polls))  # type: ignore[union-attr]
        assert (await world.call(CANCEL, JobRequest("j1", "c"))).state == "cancelled"
        assert [(h.job, h.task) for h in (await waiting).drop] == [("j1", lease.task)]
        assert (await world.poll(3)).leases == []
        await world.finish(2, lease)  # too late, and harmless
        assert world.machine.ledger.counts("j1").done == 0

    story(test)


def test_an_input_that_cannot_be_planned_fails_the_job_with_the_reason() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await submitted(world, batch=1)
        await world.poll(2)
        await world.at_leader(PLAN_DONE, PlanDone(node_id(2), "j1", 2_000_000), 2)
        found = await info(world)
        assert found.state == "failed"
        assert "at most 1000000" in found.reason

    story(test)
