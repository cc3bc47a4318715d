"""Models: deploying, workers that become ready or fail, and when a model serves."""

from __future__ import annotations

import msgspec
import pytest

from idunno.base.errors import Conflict, InvalidArgument, NotFound, NotReady
from idunno.base.ids import NodeId
from idunno.coordinator import commands as c
from idunno.coordinator.effects import BlocksFreed, FileDeleted, ModelChanged
from idunno.coordinator.records import ModelFile, ModelRecord
from tests.unit.coordinator.world import ALICE, N1, N2, N3, SYSTEM, World, block, done


def record(world: World) -> ModelRecord:
    return world.machine.registry.get("digits")


def report(world: World, node: NodeId, error: str = "", version: int = 1) -> str:
    state = world.do(c.ReportWorker("digits", version, node, error), SYSTEM).state
    assert isinstance(state, str)
    return state


def test_a_model_serves_when_every_assigned_worker_is_ready() -> None:
    world = World()
    assert world.deploy(assign=(N1, N2)) == 1
    assert (record(world).state, record(world).reason) == ("undeployed", "waiting for n1, n2 to set it up")
    assert report(world, N1) == "undeployed"
    with pytest.raises(NotReady, match="model digits is undeployed: waiting for n2 to set it up"):
        world.machine.registry.serving("digits")
    assert report(world, N2) == "deployed"
    assert world.machine.registry.serving("digits").reason == ""


def test_a_worker_added_later_does_not_stop_it() -> None:
    world = World()
    world.deployed()
    world.do(c.Assign("digits", 1, N2, "more load"), SYSTEM)
    assert record(world).state == "deployed"
    assert not world.do(c.Assign("digits", 1, N2, "again"), SYSTEM).changed
    with pytest.raises(NotFound):
        world.do(c.Assign("digits", 1, NodeId("f" * 16), "nobody"), SYSTEM)


def test_after_three_failed_workers_and_none_ready_it_failed_with_each_reason() -> None:
    world = World()
    world.deploy(assign=(N1, N2, N3))
    assert report(world, N1, "no memory") == "undeployed"
    assert report(world, N1, "no memory") == "undeployed"  # said twice, counted once
    assert report(world, N2, "bad graph") == "undeployed"
    assert report(world, N3, "no memory") == "failed"
    reason = "3 workers could not set it up: n1: no memory; n2: bad graph; n3: no memory"
    assert record(world).reason == reason
    with pytest.raises(NotReady, match="model digits is failed: 3 workers"):
        world.machine.registry.serving("digits")
    world.do(c.Assign("digits", 1, N1, "an admin added memory"), SYSTEM)
    assert report(world, N1) == "deployed"
    assert record(world).failures == ()


def test_one_failed_worker_is_not_waited_for() -> None:
    world = World()
    world.deploy(assign=(N1, N2))
    report(world, N1)
    assert report(world, N2, "no memory") == "deployed"


def test_a_model_whose_last_ready_worker_is_gone_says_so() -> None:
    world = World()
    world.deployed()
    assert world.do(c.Unassign("digits", 1, N1, "its node failed"), SYSTEM).changed
    assert not world.do(c.Unassign("digits", 1, N1, "its node failed"), SYSTEM).changed
    assert record(world).state == "undeployed"
    assert record(world).reason == "its last worker is gone (n1: its node failed), another is being looked for"
    world.do(c.Assign("digits", 1, N2, "instead of n1"), SYSTEM)
    assert record(world).reason == "waiting for n2 to set it up"
    assert report(world, N2) == "deployed"


def test_failures_kept_are_bounded() -> None:
    world = World()
    world.deploy()
    for i in range(20):
        report(world, N1, f"error {i} " + "x" * 5_000)
        world.do(c.Assign("digits", 1, N1, "again"), SYSTEM)
    assert len(record(world).failures) == 16
    assert len(record(world).reason) < 17 * 1_100


def test_a_new_version_replaces_the_old_at_once_and_reports_of_the_old_change_nothing() -> None:
    world = World()
    world.deployed()
    assert world.deploy(assign=(N2,)) == 2
    assert record(world).state == "undeployed"
    late = world.apply(c.ReportWorker("digits", 1, N1), SYSTEM)
    assert (late.effects, record(world).state) == ((), "undeployed")
    assert not world.do(c.Assign("digits", 1, N3, "late"), SYSTEM).changed
    assert not world.do(c.Unassign("digits", 1, N2, "late"), SYSTEM).changed
    assert report(world, N2, version=2) == "deployed"


def test_a_retried_deploy_is_the_same_version() -> None:
    world = World()
    assert world.deploy(request="d1") == 1
    assert world.deploy(request="d2") == 2
    assert world.deploy(request="d1") == 1
    assert world.deploy(request="d2") == 2
    assert record(world).version == 2


def test_versions_go_on_after_undeploy() -> None:
    world = World()
    world.deployed()
    applied = world.apply(c.Undeploy("digits"), ALICE, "u1")
    assert applied.effects[0] == ModelChanged("digits")
    assert not world.do(c.Undeploy("digits"), ALICE, "u1").changed
    with pytest.raises(NotFound):
        world.do(c.Undeploy("digits"), ALICE, "u2")
    assert world.machine.registry.models() == []
    assert world.deploy() == 2


def test_a_model_with_unfinished_jobs_is_not_undeployed() -> None:
    world = World()
    world.planned(4, 4)
    with pytest.raises(Conflict, match="has 1 unfinished jobs, first job1"):
        world.do(c.Undeploy("digits"))
    world.do(done("job1", 0, 4), SYSTEM)
    world.do(c.Undeploy("digits"))
    assert world.machine.registry.queries_done("digits") == 4  # what it did is remembered


def test_files_that_were_put_for_a_deploy_go_with_it() -> None:
    world = World()
    name = ".idunno/models/digits/d1/model.onnx"
    world.put(name, "m")
    files = (ModelFile("model.onnx", name, 1, 10, (block("m"),)),)
    world.do(c.Deploy("digits", "onnx", files, 0, 0, 1_000, 0, 0, (N1,)), ALICE, "d1")
    with pytest.raises(Conflict, match="is part of model digits"):
        world.do(c.DeleteFile(name))
    applied = world.apply(c.Undeploy("digits"))
    assert [type(e) for e in applied.effects] == [ModelChanged, FileDeleted, BlocksFreed]
    assert world.machine.namespace.find(name) is None


GOOD = c.Deploy("digits", "onnx", (ModelFile("m.onnx", "m", 1, 10, (block("m"),)),), 0, 0, 1_000, 0, 0, (N1,))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "no such name!"}, InvalidArgument),
        ({"runtime": "cobol"}, InvalidArgument),
        ({"files": ()}, InvalidArgument),
        ({"files": GOOD.files * 2}, InvalidArgument),
        ({"files": (ModelFile("m.onnx", "m", 2, 10, (block("m"),)),)}, NotFound),
        ({"files": (ModelFile("m.onnx", "m", 1, 10, (block("z"),)),)}, Conflict),
        ({"workers_wanted": -1}, InvalidArgument),
        ({"batch_size": -1}, InvalidArgument),
        ({"weight": 0}, InvalidArgument),
        ({"workers_min": 3, "workers_max": 2}, InvalidArgument),
        ({"assign": (NodeId("f" * 16),)}, NotFound),
    ],
)
def test_a_deploy_that_cannot_be_is_refused(change: dict[str, object], error: type[Exception]) -> None:
    world = World()
    world.put("m", "m")
    with pytest.raises(error):
        world.do(msgspec.structs.replace(GOOD, **change))
    assert world.machine.registry.models() == []
    assert world.do(GOOD).version == 1


def test_batch_size_is_set_for_jobs_to_come() -> None:
    world = World()
    world.deployed()
    world.submit("job1")
    assert world.do(c.SetBatchSize("digits", 64)).changed
    assert not world.do(c.SetBatchSize("digits", 64)).changed
    world.submit("job2")
    assert [job.batch_size for job in world.machine.ledger.jobs()] == [0, 64]
    with pytest.raises(InvalidArgument):
        world.do(c.SetBatchSize("digits", -1))
    with pytest.raises(NotFound):
        world.do(c.SetBatchSize("nothing", 1))
