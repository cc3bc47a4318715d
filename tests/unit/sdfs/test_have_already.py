# A block that a node has already is not written again: but only if it is there, whole and synced, when it is put.
from __future__ import annotations

from idunno.sdfs.blocks import READ_BYTES
from idunno.sdfs.hashing import block_id
from idunno.sdfs.messages import BEGIN, WRITE_BLOCK, Begin, WriteBlock
from idunno.wire.calls import Peer
from tests.unit.sdfs.world import MB, USER, Node, World, content_of, run

CONTENT = content_of(9 * MB)
"""Two blocks."""
BLOCKS = [block_id(CONTENT[: 8 * MB]), block_id(CONTENT[8 * MB :])]


def created(world: World) -> list[str]:
    """The nodes that have begun to write a block, once a block."""
    return [
        node.name
        for node in world.nodes.values()
        for doing, path in node.disk.story
        if doing == "create" and path.startswith("tmp/block-")
    ]


def test_a_file_that_is_put_again_is_read_and_not_written() -> None:
    async def story() -> None:
        async with World(4) as world:
            await world.put(CONTENT, "f")
            written = len(created(world))
            read = sum(node.disk.story.count(("read", path_of(0))) for node in world.nodes.values())
            pieces = -(-8 * MB // READ_BYTES)

            answer = await world.put(CONTENT, "g", entry=2)

            assert (written, len(created(world))) == (8, 8)
            assert (
                sum(node.disk.story.count(("read", path_of(0))) for node in world.nodes.values()) == read + 4 * pieces
            )
            assert (answer.version, answer.copies, answer.degraded) == (1, 4, False)
            assert await world.get("g", entry=3) == CONTENT

    run(story)


def path_of(number: int) -> str:
    return f"blocks/{BLOCKS[number][:2]}/{BLOCKS[number]}"


def test_a_rotten_copy_is_no_copy_and_is_written_again() -> None:
    async def story() -> None:
        async with World(4) as world:
            await world.put(CONTENT, "f")
            world.node(3).disk.flip(path_of(0), 5_000_000)
            before = created(world)

            answer = await world.put(CONTENT, "g")

            assert sorted(created(world)) == sorted([*before, "n3"])
            assert answer.copies == 4
            assert len(world.durable(BLOCKS[0])) == 4
            assert world.node(3).blocks.rotten == 1

    run(story)


def test_a_block_is_pinned_for_the_put_before_it_is_looked_at() -> None:
    """From then on the sweep keeps it: otherwise it could go between "have it" and the commit."""

    async def story() -> None:
        async with World(1) as world:
            await world.put(CONTENT, "f")
            node, seen = world.node(1), list[bool]()
            put = "1" * 32
            caller = world.caller(node.id, Peer(USER))
            opened = await caller.call(BEGIN, Begin(put, "g"), timeout_s=5)

            def before(each: Node, doing: str, path: str) -> None:
                if doing == "open" and path == path_of(0):
                    seen.append(put in each.blocks.pins.puts())

            world.before = before
            request = WriteBlock(put, BLOCKS[0], 8 * MB, [node.id], opened.term)
            async with caller.open(WRITE_BLOCK, request, timeout_s=5) as stream:
                answer = await stream.answer()  # not a byte of it was sent

            assert seen == [True]
            assert answer.stored == [node.id]

    run(story)
