# Reading while copies rot, machines die or freeze, and readers stand still: what is handed on is right.
from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest

from idunno.base.disk import Buffer
from idunno.base.errors import (
    Corrupt,
    DeadlineExceeded,
    InvalidArgument,
    NoQuorum,
    NotFound,
    Unavailable,
)
from idunno.base.ids import NodeId
from idunno.coordinator.records import Block
from idunno.sdfs.client import source_of
from idunno.sdfs.hashing import block_id
from idunno.sdfs.messages import (
    READ_BLOCK,
    WRITE_BLOCK,
    ReadBlock,
    WriteBlock,
)
from idunno.wire.calls import Peer
from tests.unit.sdfs.test_faults import CONTENT, SMALL, uploaded
from tests.unit.sdfs.world import CONFIG, MB, USER, Node, World, run


def rot(world: World, node: Node, content: bytes, at: int = 100) -> None:
    block = block_id(content)
    node.disk.flip(f"blocks/{block[:2]}/{block}", at)


async def stored(world: World, content: bytes = CONTENT) -> tuple[list[Node], Node]:
    """Put it; its holders, and a node without a copy."""
    answer = await world.put(content, "f")
    holders = [node for node in world.living if node.name in answer.replicas]
    return holders, next(node for node in world.living if node not in holders)


@pytest.mark.parametrize("rotten", [1, 2, 3])
@pytest.mark.parametrize("through", ["holder", "stranger"])
def test_rotten_copies_are_passed_over_and_put_away(rotten: int, through: str) -> None:
    async def story() -> None:
        async with World(5) as world:
            holders, stranger = await stored(world)
            for node in holders[:rotten]:
                rot(world, node, CONTENT[: 8 * MB], 8 * MB - 1)
            entry = holders[0] if through == "holder" else stranger
            assert await world.get("f", entry=int(entry.id, 16)) == CONTENT
            put_away = [node for node in holders if block_id(CONTENT[: 8 * MB]) not in node.blocks]
            assert set(put_away) <= set(holders[:rotten])
            if through == "holder":
                assert holders[0] in put_away

    run(story)


def test_when_every_copy_is_rotten_the_reader_is_told() -> None:
    async def story() -> None:
        async with World(4) as world:
            await world.put(CONTENT, "f")
            for node in world.living:
                rot(world, node, CONTENT[: 8 * MB])
            with pytest.raises((Corrupt, Unavailable), match=block_id(CONTENT[: 8 * MB])[:16]):
                await world.get("f")

    run(story)


def breaks(world: World, how: Callable[[Node], None], reads: int) -> None:
    """Do `how` to the node that begins the read number `reads` from its disk."""
    count = itertools.count()

    def before(node: Node, doing: str, path: str) -> None:
        if doing == "read" and path.startswith("blocks/") and next(count) == reads:
            how(node)

    world.before = before


@pytest.mark.parametrize("reads", range(9))
@pytest.mark.parametrize("how", ["dies", "freezes", "fails"])
def test_a_replica_lost_while_it_is_read_is_replaced_by_the_next(reads: int, how: str) -> None:
    async def story() -> None:
        async with World(6) as world:
            _, stranger = await stored(world)

            def strike(node: Node) -> None:
                if how == "dies":
                    world.kill(node)
                elif how == "freezes":
                    node.running.clear()
                else:
                    node.disk.faults["read"] = "input/output error"

            breaks(world, strike, reads)
            assert await world.get("f", entry=int(stranger.id, 16), timeout_s=60) == CONTENT

    run(story)


@pytest.mark.parametrize("reads", [0, 3, 8])
def test_a_reader_whose_entry_node_dies_goes_on_through_another(reads: int) -> None:
    async def story() -> None:
        async with World(5) as world:
            holders, _ = await stored(world)
            breaks(world, world.kill, reads)
            assert await world.get("f", entry=int(holders[0].id, 16), timeout_s=60) == CONTENT

    run(story)


def test_reading_needs_no_leader_to_know_where_blocks_are() -> None:
    async def story() -> None:
        async with World(6) as world:
            _, stranger = await stored(world)
            for node in world.living:
                node.data._reporter._report = refuse  # nobody reports to the next leader
            world.lead(world.node(5).id)
            assert world.leading.recovering
            where = await world.client().where("f")
            assert (where.copies_found, where.recovering) == (0, True)
            assert await world.get("f", entry=int(stranger.id, 16)) == CONTENT

    async def refuse(leader: NodeId, page: object) -> None:
        raise Unavailable("not now")

    run(story)


def test_a_new_leader_hears_of_all_copies() -> None:
    async def story() -> None:
        async with World(4) as world:
            await world.put(CONTENT, "f")
            world.kill(world.node(1))
            await asyncio.sleep(10)
            where = await world.client().where("f")
            assert not where.recovering
            assert where.copies_found == 3

    run(story)


def test_a_small_content_that_rotted_is_fetched_from_another_node_and_kept_again() -> None:
    async def story() -> None:
        async with World(3) as world:
            await world.put(SMALL, "g")
            node = world.node(2)
            await node.small.flush()
            path = "small/0000000001.seg"
            node.disk.flip(path, node.disk.content(path).index(SMALL))
            assert await world.get("g", entry=2) == SMALL
            assert await node.small.get(block_id(SMALL)) == SMALL

    run(story)


@pytest.mark.parametrize(("offset", "length"), [(-1, 10), (0, 8 * MB + 1), (8 * MB, 1), (10, -5), (0, 1001), (1000, 1)])
def test_a_range_outside_the_block_is_refused(offset: int, length: int) -> None:
    async def story() -> None:
        async with World(1) as world:
            await uploaded(world, SMALL)
            caller = world.caller(world.node(1).id, Peer(USER))
            request = ReadBlock(block_id(SMALL), offset, length, local_only=True)
            with pytest.raises((InvalidArgument, Corrupt)):
                async with caller.open(READ_BLOCK, request, timeout_s=5) as stream:
                    await stream.answer()

    run(story)


def test_callers_that_stand_still_lose_their_places() -> None:
    async def story() -> None:
        async with World(1) as world:
            await world.put(CONTENT, "f")
            put, node = await uploaded(world, SMALL), world.node(1)
            caller = world.caller(node.id, Peer(USER))
            block = block_id(CONTENT[: 8 * MB])
            reads = caller.open(READ_BLOCK, ReadBlock(block, 0, 8 * MB), timeout_s=3600)
            new = block_id(bytes(8 * MB))
            writes = caller.open(WRITE_BLOCK, WriteBlock(put[0], new, 8 * MB, [node.id], world.term), timeout_s=3600)
            async with reads, writes:
                await asyncio.sleep(CONFIG.idle_s / 2)
                assert (node.data._reads, node.blocks._reserved_bytes) == (1, 8 * MB)
                await asyncio.sleep(CONFIG.idle_s)
                assert (node.data._reads, node.blocks._reserved_bytes) == (0, 0)
                with pytest.raises(DeadlineExceeded, match="nothing came of block"):
                    await writes.answer()

    run(story)


def test_a_reader_who_stops_reading_leaves_nothing_behind() -> None:
    async def story() -> None:
        async with World(4) as world:
            await world.put(CONTENT, "f")

            async def sink(offset: int, content: Buffer) -> None:
                raise OSError("disk of the user is full")

            with pytest.raises(OSError, match="full"):
                await world.client().get("f", sink)
            await asyncio.sleep(1)
            assert [node.data._reads for node in world.living] == [0, 0, 0, 0]

    run(story)


def test_a_client_that_goes_away_leaves_no_block_half_written() -> None:
    async def story() -> None:
        async with World(4) as world:
            task = asyncio.create_task(world.client().put(source_of(CONTENT), "f"))
            steps = itertools.count()

            def before(node: Node, doing: str, path: str) -> None:
                if doing == "write" and next(steps) == 3:
                    task.cancel()

            world.before = before
            with pytest.raises(asyncio.CancelledError):
                await task
            world.before = None
            await asyncio.sleep(1)
            for node in world.living:
                assert not any(path.startswith("tmp/") for path in node.disk.paths())
                assert node.blocks._reserved_bytes == 0
            with pytest.raises(NotFound):
                await world.get("f")

    run(story)


def test_a_block_reported_by_nobody_is_no_block() -> None:
    async def story() -> None:
        async with World(2) as world:
            unknown = Block(block_id(b"never stored"), 12)

            async def sink(offset: int, content: Buffer) -> None:
                raise AssertionError("there is nothing to hand on")

            with pytest.raises(Unavailable, match=unknown.block[:16]):
                await world.worker(1).fetch([unknown], sink, what="model m", timeout_s=100)

    run(story)


@pytest.mark.parametrize("content", [SMALL, CONTENT], ids=["small", "large"])
def test_that_nobody_leads_is_said_long_before_an_hour_has_passed(content: bytes) -> None:
    async def story() -> None:
        async with World(3) as world:
            await world.put(content, "f")
            world.lead(None)
            for operation in (world.put(content, "g"), world.get("f")):
                started_s = asyncio.get_running_loop().time()
                with pytest.raises((NoQuorum, DeadlineExceeded)):
                    await operation
                assert 60 <= asyncio.get_running_loop().time() - started_s < 80

    run(story)
