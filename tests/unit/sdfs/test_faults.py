# Machines die, freeze, fill up and rot while files move: what was acknowledged is there, what is read is right.
from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import replace

import pytest

from idunno.base.disk import Buffer
from idunno.base.errors import (
    Conflict,
    DeadlineExceeded,
    Exhausted,
    IdunnoError,
    InvalidArgument,
    NotFound,
)
from idunno.base.ids import NodeId, Term
from idunno.sdfs.asking import PATIENCE_S
from idunno.sdfs.client import source_of
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.hashing import block_id
from idunno.sdfs.messages import (
    BEGIN,
    COMMIT,
    WRITE_BLOCK,
    Begin,
    BlockCopies,
    Commit,
    WriteBlock,
)
from idunno.wire.calls import Peer
from tests.unit.sdfs.world import CONFIG, MB, OTHER, USER, Node, World, content_of, run, until

CONTENT = content_of(9 * MB)
"""Two blocks."""
THREE = content_of(17 * MB)
"""Three: each is written in few steps."""
SMALL = content_of(1000)


def blocks_of(content: bytes) -> list[bytes]:
    return [content[at : at + 8 * MB] for at in range(0, len(content), 8 * MB)]


def check_durable(world: World, content: bytes, copies: int) -> None:
    for block in blocks_of(content):
        assert len(world.durable(block_id(block))) >= copies


# -- replicas die while a block is written --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["create", "write", "sync", "rename", "sync_directory", "block.write ends"])
@pytest.mark.parametrize("place", range(4))
def test_a_replica_that_dies_in_the_middle_is_replaced_unnoticed(place: int, stage: str) -> None:
    async def story() -> None:
        async with World(7) as world:
            chain: list[Node] = []

            def before(node: Node, doing: str, path: str) -> None:
                if doing == "create" and path.startswith("tmp/block-") and node not in chain:
                    chain.append(node)
                if node in chain and chain.index(node) == place and doing == stage:
                    world.kill(node)

            world.before = before
            answer = await world.put(CONTENT, "f", timeout_s=60)
            world.before = None
            assert len(world.living) == 6
            assert (answer.version, answer.copies, answer.degraded) == (1, 4, False)
            check_durable(world, CONTENT, 4)
            assert await world.get("f", entry=3) == CONTENT

    run(story)


@pytest.mark.parametrize("entry", [1, 2], ids=["entry-leads", "entry-follows"])
@pytest.mark.parametrize("content", [SMALL, THREE], ids=["small", "large"])
def test_the_entry_node_dies_at_every_step_of_a_put(entry: int, content: bytes) -> None:
    steps = 0

    async def story(step: int | None) -> None:
        nonlocal steps
        async with World(6) as world:
            count = itertools.count()
            lost = world.node(entry)

            def before(node: Node, doing: str, path: str) -> None:
                if node is lost and next(count) == step:
                    world.kill(node)

            world.before = before
            answer = await world.put(content, "f", entry=entry, timeout_s=60)
            world.before = None
            if step is None:
                steps = next(count)
            else:
                assert not lost.alive
            assert (answer.version, answer.copies) == (1, 4)
            assert [row.version for row in await world.client(entry=3).versions("f")] == [1]
            if content is THREE:
                check_durable(world, content, 4)
            assert await world.get("f", entry=3) == content

    run(lambda: story(None))
    assert steps > (20 if content is THREE else 1)
    for step in range(steps):
        run(lambda step=step: story(step))  # type: ignore[misc]


@pytest.mark.parametrize("content", [SMALL, CONTENT], ids=["small", "large"])
@pytest.mark.parametrize("step", [0, 3, 9])
def test_a_put_goes_on_when_its_entry_node_is_stopped_in_order(step: int, content: bytes) -> None:
    async def story() -> None:
        async with World(6) as world:
            count = itertools.count()
            stopping: list[asyncio.Task[None]] = []

            def before(node: Node, doing: str, path: str) -> None:
                if node.name == "n2" and next(count) == step:
                    stopping.append(asyncio.create_task(node.server.close(0)))

            world.before = before
            client = world.client(entry=2)
            answer = await client.put(source_of(content), "f", timeout_s=60)
            assert (answer.version, answer.copies) == (1, 4)
            await asyncio.gather(*stopping)
            assert await world.get("f", entry=3) == content

    run(story)


@pytest.mark.parametrize("seed", range(20))
def test_what_was_acknowledged_survives_any_three_of_seven(seed: int) -> None:
    async def story() -> None:
        rng = random.Random(seed)
        async with World(7) as world:
            first = rng.randrange(60)  # one dies while it is put, at any step of anybody
            count = itertools.count()

            def before(node: Node, doing: str, path: str) -> None:
                if next(count) == first:
                    world.kill(node)

            world.before = before
            answer = await world.put(CONTENT, "f", entry=rng.randint(1, 7), timeout_s=60)
            small = await world.put(SMALL, "g", entry=rng.randint(1, 7), timeout_s=60)
            world.before = None
            assert answer.copies == 4
            assert small.version == 1
            for node in rng.sample(world.living, 2):  # and two more at the same moment, after it
                world.kill(node)
            for node in world.living:
                entry = int(node.id, 16)
                assert await world.get("f", entry=entry) == CONTENT
                assert await world.get("g", entry=entry) == SMALL

    run(story)


def test_all_nodes_lose_power_and_the_files_are_there() -> None:
    async def story() -> None:
        async with World(5) as world:
            await world.put(CONTENT, "f")
            await world.put(SMALL, "g")
            for node in list(world.living):
                world.kill(node)
            for node in list(world.nodes.values()):
                await world.restart(node)
            world.lead(world.node(2).id)
            for entry in (1, 5):
                assert await world.get("f", entry=entry) == CONTENT
                assert await world.get("g", entry=entry) == SMALL

    run(story)


@pytest.mark.parametrize("place", range(1, 4))
def test_a_frozen_replica_is_blamed_alone_and_replaced(place: int) -> None:
    async def story() -> None:
        async with World(6) as world:
            chain: list[Node] = []

            def before(node: Node, doing: str, path: str) -> None:
                if doing == "create" and path.startswith("tmp/block-") and node not in chain:
                    chain.append(node)
                    if len(chain) == place + 1:
                        node.running.clear()

            world.before = before
            started_s = asyncio.get_running_loop().time()
            answer = await world.put(CONTENT, "f", timeout_s=120)
            assert answer.copies == 4
            assert chain[place].name not in answer.replicas
            assert set(answer.replicas) >= {node.name for i, node in enumerate(chain[:4]) if i != place}
            assert asyncio.get_running_loop().time() - started_s < 60

    run(story)


def test_a_full_node_is_passed_over_and_named_when_it_is_missed() -> None:
    async def story() -> None:
        config = SdfsConfig(floor_bytes=20 * MB, floor_percent=0)
        async with World(5, config=config, capacity_bytes=1000 * MB) as world:
            world.node(2).disk.capacity_bytes = 20 * MB  # fills up after it has reported
            answer = await world.put(CONTENT, "f")
            assert (answer.copies, "n2" in answer.replicas) == (4, False)
            world.node(3).disk.capacity_bytes = 20 * MB
            await asyncio.sleep(30)  # both have reported it since
            with pytest.raises(Exhausted, match=r"4 copies.*3 nodes can take.*n2: .* bytes free.*--write-quorum"):
                await world.put(content_of(9 * MB, 1), "g")
            assert world.machine.namespace.open_puts() == []
            less = await world.put(content_of(9 * MB, 2), "h", write_quorum=3)
            assert (less.copies, less.degraded, less.why) == (3, True, "3 of 4 copies")

    run(story)


def test_a_put_that_no_node_can_take_ends_and_keeps_nothing_from_being_removed() -> None:
    """A node's first look removes nothing before all puts have ended that are open then; an open one would do for an hour."""

    async def story() -> None:
        config = replace(CONFIG, floor_bytes=20 * MB, floor_percent=0)
        async with World(4, config=config, capacity_bytes=100 * MB) as world:
            await world.put(CONTENT, "f")
            with pytest.raises(Exhausted, match=r"no node can take 500,000,000 bytes.*bytes free"):
                await world.put(CONTENT, "g", size=500_000_000)
            assert world.machine.namespace.open_puts() == []
            await world.client().delete("f")
            await world.client().empty_trash()
            await until(lambda: not any(node.blocks.held() for node in world.living))

    run(story)


def fills_up_behind_the_first_block(world: World, number: int) -> None:
    """That node's disk has room for less than a block as soon as it has one whole block."""
    full = world.node(number)

    def before(node: Node, doing: str, path: str) -> None:
        if node is full and doing == "rename" and path.startswith("blocks/"):
            full.disk.capacity_bytes = (20 + 8 + 7) * MB

    world.before = before


@pytest.mark.parametrize(("size", "room"), [(30 * MB, 16 * MB), (60 * MB, 58 * MB)])
def test_a_node_that_fills_up_in_the_middle_is_replaced_by_one_that_has_room_for_the_rest_only(
    size: int, room: int
) -> None:
    async def story() -> None:
        config = SdfsConfig(floor_bytes=20 * MB, floor_percent=0)
        async with World(5, config=config, capacity_bytes=1000 * MB) as world:
            world.node(5).disk.capacity_bytes = 20 * MB + room
            await asyncio.sleep(60)
            fills_up_behind_the_first_block(world, 1)
            content, begun_s = content_of(size), asyncio.get_running_loop().time()
            answer = await world.put(content, "f", size=len(content), write_quorum=4)
            assert answer.copies == 4
            assert asyncio.get_running_loop().time() - begun_s < PATIENCE_S
            assert await world.get("f", entry=2) == content

    run(story)


@pytest.mark.parametrize("known", [True, False], ids=["a file", "a pipe"])
def test_a_put_for_whose_rest_too_few_nodes_have_room_says_so_after_a_minute(known: bool) -> None:
    async def story() -> None:
        config = SdfsConfig(floor_bytes=20 * MB, floor_percent=0)
        async with World(4, config=config, capacity_bytes=1000 * MB) as world:
            fills_up_behind_the_first_block(world, 1)
            content, begun_s = content_of(30 * MB), asyncio.get_running_loop().time()
            with pytest.raises(Exhausted, match=r"f: 4 copies are asked for, and 3 nodes can take .*n1: .* bytes free"):
                await world.put(content, "f", size=len(content) if known else None)
            assert asyncio.get_running_loop().time() - begun_s < 3 * PATIENCE_S
            assert world.machine.namespace.open_puts() == []

    run(story)


@pytest.mark.parametrize("whole", [True, False], ids=["a put", "a task's output"])
def test_a_put_that_its_client_gives_up_pins_nothing(whole: bool) -> None:
    async def story() -> None:
        async with World(4) as world:
            stored = asyncio.Event()

            def before(node: Node, doing: str, path: str) -> None:
                if doing == "rename" and path.startswith("blocks/"):
                    stored.set()

            world.before = before
            content = content_of(40 * MB)

            async def put() -> None:
                if whole:
                    await world.put(content, "f")
                else:
                    await world.client().upload(source_of(content), "f", system=False)

            putting = asyncio.create_task(put())
            await stored.wait()
            putting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await putting
            assert world.machine.namespace.open_puts() == []
            await until(lambda: not any(node.blocks.held() for node in world.living))
            with pytest.raises(NotFound):
                await world.get("f")

    run(story)


def test_a_put_whose_time_is_over_before_its_commit_was_sent_pins_nothing() -> None:
    async def story() -> None:
        config = replace(CONFIG, floor_bytes=20 * MB, floor_percent=0)
        async with World(4, config=config, capacity_bytes=1000 * MB) as world:
            world.node(2).disk.capacity_bytes = 20 * MB  # fills up after it has reported
            with pytest.raises(DeadlineExceeded, match=r"3 of 4 copies .*bytes free"):
                await world.put(CONTENT, "f", timeout_s=1.0)
            assert world.machine.namespace.open_puts() == []
            await asyncio.sleep(2 * config.sweep_s)
            assert not any(node.blocks.held() for node in world.living)

    run(story)


# -- quorum -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "away", "copies", "degraded"),
    [
        (1, 0, 1, False),
        (2, 0, 2, False),
        (3, 0, 3, False),
        (4, 0, 4, False),
        (4, 1, 3, True),
        (5, 1, 4, False),
        (7, 3, 4, False),
    ],
)
@pytest.mark.parametrize("content", [SMALL, CONTENT], ids=["small", "large"])
def test_a_put_needs_the_smaller_of_four_and_the_nodes_present(
    size: int, away: int, copies: int, degraded: bool, content: bytes
) -> None:
    async def story() -> None:
        async with World(size) as world:
            for number in range(size - away + 1, size + 1):
                world.kill(world.node(number), noticed_after_s=None)
                world.set_presence(world.node(number).id, "failed")
            answer = await world.put(content, "f")
            assert (answer.copies, answer.degraded, len(answer.replicas)) == (copies, degraded, copies)
            assert answer.why == (f"{copies} of 4 copies; n{size} failed" if degraded else "")

    run(story)


@pytest.mark.parametrize("content", [SMALL, CONTENT], ids=["small", "large"])
def test_one_copy_alone_is_refused_where_there_could_be_two_unless_asked_for(content: bytes) -> None:
    async def story() -> None:
        async with World(2) as world:
            world.kill(world.node(2), noticed_after_s=None)
            world.set_presence(world.node(2).id, "failed")
            with pytest.raises(Exhausted, match=r"2 (copies|nodes)"):
                await world.put(content, "f")
            assert (await world.put(content, "f", write_quorum=1)).why == "1 of 2 copies; n2 failed"

    run(story)


@pytest.mark.parametrize("bad", [0, 5, -1])
@pytest.mark.parametrize("content", [SMALL, CONTENT], ids=["small", "large"])
def test_a_write_quorum_outside_one_to_four_is_refused(bad: int, content: bytes) -> None:
    async def story() -> None:
        async with World(1) as world:
            with pytest.raises(InvalidArgument, match="1 to 4"):
                await world.put(content, "f", write_quorum=bad)
            caller = world.caller(world.node(1).id, Peer(USER))
            with pytest.raises(InvalidArgument, match="1 to 4"):
                await caller.call(COMMIT, Commit("p", "f", 0, [], bad), timeout_s=1)

    run(story)


def test_a_lower_write_quorum_does_not_wait_for_the_dead() -> None:
    async def story() -> None:
        async with World(4) as world:
            world.kill(world.node(3), noticed_after_s=None)  # and nobody notices
            answer = await world.put(CONTENT, "f", write_quorum=2, timeout_s=30)
            assert 2 <= answer.copies <= 3
            assert answer.degraded
            with pytest.raises(DeadlineExceeded, match=r"3 of 4 copies.*0000000000000003 is dead"):
                await world.put(content_of(5000), "g", timeout_s=10)
            world.set_presence(world.node(3).id, "failed")
            assert (await world.put(content_of(5000), "g", timeout_s=10)).copies == 3

    run(story)


def test_a_node_that_comes_during_a_put_gets_its_copies_before_the_commit() -> None:
    async def story() -> None:
        async with World(4) as world:
            world.set_presence(world.node(4).id, "failed")
            read = 0

            async def source(length: int) -> Buffer:
                nonlocal read
                read += length
                if read == 16 * MB:  # the first block is on its way to three
                    await asyncio.sleep(1)
                    world.set_presence(world.node(4).id, "present")
                return CONTENT[read - length : read]

            answer = await world.client().put(source, "f")
            assert (answer.copies, answer.degraded) == (4, False)
            check_durable(world, CONTENT, 4)

    run(story)


async def uploaded(world: World, content: bytes) -> tuple[str, list[BlockCopies]]:
    """An open put of alice whose one block is stored."""
    caller = world.caller(world.node(1).id, Peer(USER))
    begun = await caller.call(BEGIN, Begin("p1", "f"), timeout_s=5)
    block = block_id(content)
    chain = [replica.node for replica in begun.replicas]
    async with caller.open(
        WRITE_BLOCK, WriteBlock("p1", block, len(content), chain, begun.term), timeout_s=5
    ) as stream:
        await stream.send(content)
        await stream.end()
        answer = await stream.answer()
    assert set(answer.stored) == set(chain)
    return "p1", [BlockCopies(block, len(content), answer.stored)]


def test_a_commit_counts_only_different_nodes_of_the_roster() -> None:
    async def story() -> None:
        async with World(4) as world:
            put, [copies] = await uploaded(world, SMALL)
            caller = world.caller(
                world.node(2).id, Peer(USER)
            )  # which did not hear who stored it, and asks those named
            for nodes in (copies.nodes[:3], copies.nodes[:3] * 2, [*copies.nodes[:3], NodeId("f" * 16)]):
                lacking = [BlockCopies(copies.block, copies.size, nodes)]
                with pytest.raises(IdunnoError, match="3 copies, 4 are needed"):
                    await caller.call(COMMIT, Commit(put, "f", 1000, lacking), timeout_s=5)
            with pytest.raises(NotFound):
                await world.get("f")
            await caller.call(COMMIT, Commit(put, "f", 1000, [copies]), timeout_s=5)
            assert await world.get("f") == SMALL

    run(story)


# -- orders and rights --------------------------------------------------------------------------------------------------------


async def write(world: World, request: WriteBlock, *, actor: Peer | None = None, content: bytes = SMALL) -> None:
    caller = world.caller(world.node(1).id, actor or Peer(USER))
    async with caller.open(WRITE_BLOCK, request, timeout_s=5) as stream:
        await stream.send(content)
        await stream.end()
        answer = await stream.answer()
    assert answer.stored, answer.failed


def test_blocks_are_taken_only_for_an_open_put_of_the_writer_and_of_this_term() -> None:
    async def story() -> None:
        async with World(3) as world:
            await uploaded(world, SMALL)
            chain, block, term = [world.node(1).id], block_id(SMALL), world.term
            good = WriteBlock("p1", block, len(SMALL), chain, term)
            await write(world, good)
            with pytest.raises(Conflict, match="not open"):
                await write(world, WriteBlock("p2", block, len(SMALL), chain, term))
            with pytest.raises(IdunnoError, match="belongs to alice"):
                await write(world, good, actor=Peer(OTHER))
            with pytest.raises(IdunnoError, match="term 1"):
                await write(world, WriteBlock("p1", block, len(SMALL), chain, Term(1)))
            for bad in ([], chain * 2, [NodeId(str(i)) for i in range(9)]):
                with pytest.raises(InvalidArgument, match="chain"):
                    await write(world, WriteBlock("p1", block, len(SMALL), bad, term))
            for size in (0, 8 * MB + 1, -1):
                with pytest.raises(InvalidArgument):
                    await write(world, WriteBlock("p1", block, size, chain, term))
            for size in (999, 1001):
                with pytest.raises(InvalidArgument, match=r"ended after|announced"):
                    await write(world, WriteBlock("p1", block, size, chain, term))

    run(story)


def test_a_new_leader_during_a_put_places_it_anew() -> None:
    async def story() -> None:
        async with World(5) as world:
            written = itertools.count()

            def before(node: Node, doing: str, path: str) -> None:
                if doing == "block.write begins" and next(written) == 2:
                    world.lead(world.node(4).id)

            world.before = before
            answer = await world.put(CONTENT, "f", entry=2, timeout_s=60)
            assert answer.copies == 4
            check_durable(world, CONTENT, 4)

    run(story)


def test_an_aborted_put_cannot_be_committed_and_old_open_puts_are_aborted() -> None:
    async def story() -> None:
        async with World(4) as world:
            put, copies = await uploaded(world, SMALL)
            await world.leading.look()
            assert world.machine.namespace.open_put(put) is not None
            world.now_ms += CONFIG.put_open_max_ms + 1
            await world.put(b"time goes on", "other")
            await world.leading.look()
            assert world.machine.namespace.open_put(put) is None
            caller = world.caller(world.node(1).id, Peer(USER))
            with pytest.raises(Conflict, match="not open"):
                await caller.call(COMMIT, Commit(put, "f", 1000, copies), timeout_s=5)
            with pytest.raises(NotFound):
                await world.get("f")

    run(story)


def test_too_many_writes_at_once_wait_and_then_are_refused_and_all_puts_succeed() -> None:
    async def story() -> None:
        config = SdfsConfig(floor_bytes=0, floor_percent=0, writes_max=2, writes_waiting_max=2, forwards_max=4)
        async with World(4, config=config) as world:
            contents = [content_of(5000, seed) for seed in range(12)]
            answers = await asyncio.gather(
                *(world.put(content, f"f{i}", entry=i % 4 + 1) for i, content in enumerate(contents))
            )
            assert [answer.copies for answer in answers] == [4] * 12
            assert all(node.data._forwards == node.data._writes_waiting == 0 for node in world.living)

    run(story)
