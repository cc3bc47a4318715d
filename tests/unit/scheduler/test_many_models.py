# More models than fit one message, and than are looked at in one turn of the loop.
from __future__ import annotations

import pytest

from idunno.base.errors import Exhausted, InvalidArgument, NotFound, PermissionDenied
from idunno.base.ids import Index
from idunno.coordinator import commands as c
from idunno.coordinator.effects import RosterChanged
from idunno.coordinator.records import Block, ModelFile
from idunno.scheduler import models
from idunno.scheduler.config import SchedulerConfig
from idunno.scheduler.messages import (
    ASSIGNMENTS,
    MODEL_FILES,
    MODELS,
    POLL,
    AskFiles,
    Assignments,
    ListAssignments,
    ListModels,
    Models,
    Poll,
    WorkerRow,
)
from idunno.wire.calls import HEADER_BYTES_MAX, pack
from tests.unit.coordinator.world import block
from tests.unit.scheduler.cluster import ANN, World, node_id, until
from tests.unit.scheduler.users import deploy, deployed, planned, story


def put_blocks(world: World, name: str, count: int) -> tuple[Block, ...]:
    blocks = tuple(block(f"{name} {i}") for i in range(count))
    world.do(c.BeginPut(f"put-{name}", name), ANN)
    world.do(c.CommitPut(f"put-{name}", name, sum(b.size for b in blocks), blocks), ANN)
    return blocks


def deploy_large(world: World, model: str, blocks: int) -> ModelFile:
    """On all nodes but the first."""
    stored = put_blocks(world, f"models/{model}", blocks)
    file = ModelFile("m.onnx", f"models/{model}", 1, sum(b.size for b in stored), stored)
    nodes = tuple(world.nodes)[1:]
    world.do(c.Deploy(model, "onnx", (file,), 0, 0, 1000, 0, 0, nodes), ANN, f"deploy-{model}")
    return file


@pytest.mark.parametrize(("count", "blocks"), [(100, 200), (1_000, 20)])
def test_a_poll_is_answered_whatever_is_assigned_and_the_files_that_do_not_fit_are_told_when_asked(
    count: int, blocks: int
) -> None:
    async def test(world: World) -> None:
        files = {f"m{k:04}": deploy_large(world, f"m{k:04}", blocks) for k in range(count)}
        world.lead(1)
        answer = await world.poll(2, seen=0)
        assert len(pack(answer)) < HEADER_BYTES_MAX
        assert answer.assignments is not None
        assert [one.model for one in answer.assignments] == sorted(files)  # the whole list at once
        bare = [one for one in answer.assignments if not one.files]
        assert 0 < len(bare) < count
        assert all(one.files in ([], [files[one.model]]) for one in answer.assignments)
        for one in bare[:3]:
            told = await world.at_leader(MODEL_FILES, AskFiles(node_id(2), one.model, one.version), 2)
            assert told.files == [files[one.model]]
        # The next leader says the same by the same mark.
        world.lead(3)
        assert (await world.poll(2, seen=answer.assignments_mark)).assignments is None

    story(test)


def test_a_task_is_leased_beside_as_many_models_as_fit() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        await deployed(world)
        await planned(world, 10)
        for k in range(100):
            deploy_large(world, f"m{k:04}", 200)
        answer = await world.poll(2, seen=0)
        assert len(answer.leases) == 1
        assert answer.assignments is not None
        assert len(answer.assignments) == 101
        assert len(pack(answer)) < HEADER_BYTES_MAX

    story(test)


def test_files_are_told_to_the_worker_itself_and_of_the_present_version_only() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        deploy_large(world, "digits", 2)
        with pytest.raises(PermissionDenied):
            await world.at_leader(MODEL_FILES, AskFiles(node_id(3), "digits", 1), 2)
        for model, version in (("digits", 2), ("other", 1)):
            with pytest.raises(NotFound, match=model):
                await world.at_leader(MODEL_FILES, AskFiles(node_id(2), model, version), 2)

    story(test)


def test_a_model_that_no_message_can_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        world.lead(1)
        monkeypatch.setattr(models, "FILES_BYTES_MAX", 50)
        with pytest.raises(InvalidArgument, match="model digits has 10 bytes in 1 files and 1 blocks, too many"):
            await deploy(world)
        assert world.machine.registry.find("digits") is None
        monkeypatch.undo()
        monkeypatch.setattr(models, "MODELS_MAX", 1)
        await deployed(world)
        with pytest.raises(Exhausted, match="1 models are deployed"):
            await deploy(world, "other")

    story(test)


def test_all_models_and_assignments_are_listed_in_pages_that_fit() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        for k in range(600):
            deploy_large(world, f"m{k:03}-{'x' * 50}", 1)
        models_listed: list[str] = []
        rows: list[WorkerRow] = []
        pages = 0
        listed = Models([], more=True)
        while listed.more:
            listed = await world.call(MODELS, ListModels(models_listed[-1] if models_listed else ""))
            assert len(pack(listed)) < HEADER_BYTES_MAX
            models_listed += [row.model for row in listed.models]
        assert models_listed == [record.model for record in world.machine.registry.models()]
        for i in range(2, 61):
            loaded = [(model, 1) for model in models_listed]
            await world.at_leader(POLL, Poll(node_id(i), 0, 0, loaded, [], 0, 0.0), i)
        told = Assignments([], more=True)
        while told.more:
            told = await world.call(ASSIGNMENTS, ListAssignments(rows[-1].node if rows else ""))
            assert len(pack(told)) < HEADER_BYTES_MAX
            rows, pages = rows + told.workers, pages + 1
        assert pages > 1
        assert [row.node for row in rows] == sorted(node.name for node in world.machine.roster.nodes())
        assert {len(row.models) for row in rows} == {0, 600}

    story(test, nodes=60)


def test_with_a_roster_that_never_rests_the_last_model_has_its_turn_too() -> None:
    async def test(world: World) -> None:
        world.lead(1)
        for k in range(200):
            stored = put_blocks(world, f"models/m{k:04}", 1)
            file = ModelFile("m.onnx", f"models/m{k:04}", 1, stored[0].size, stored)
            world.do(c.Deploy(f"m{k:04}", "onnx", (file,), 0, 0, 1000, 0, 0, ()), ANN, f"deploy-{k}")

        def all_have_workers() -> bool:
            for node in world.nodes.values():
                node.service.follow(Index(world.index), RosterChanged())
            return all(record.workers for record in world.machine.registry.models())

        await until(all_have_workers, turns=300)

    story(test, config=SchedulerConfig(scheduler_works="always"))
