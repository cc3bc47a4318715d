# Clients that mean harm or break off, and the last corners of "synced".
from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, cast

import pytest

from idunno.base.disk import Buffer
from idunno.base.errors import (
    Cancelled,
    Conflict,
    ConnectionLost,
    Corrupt,
    DeadlineExceeded,
    DiskFailed,
    Exhausted,
    IdunnoError,
    InvalidArgument,
    NotFound,
    NotReady,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from idunno.base.ids import NodeId
from idunno.sdfs.asking import Asker
from idunno.sdfs.blocks import PIECES_MAX, BlockStore
from idunno.sdfs.client import FileClient, source_of
from idunno.sdfs.download import fetch
from idunno.sdfs.hashing import block_id
from idunno.sdfs.messages import (
    BEGIN,
    COMMIT,
    DELETE,
    READ_BLOCK,
    WRITE_BLOCK,
    Begin,
    BlockCopies,
    Commit,
    Delete,
    ReadBlock,
    WriteBlock,
)
from idunno.wire.calls import Actor, Caller, Peer, Role
from tests.unit.sdfs.world import CONFIG, MB, OTHER, USER, Node, ToldDisk, World, content_of, inline, run


class Died(Exception):
    pass


def test_a_block_found_at_a_start_is_durable_before_it_is_said_to_be_held() -> None:
    """The process died between naming a block and syncing its name; the next one finds it; then the power fails."""

    async def story() -> None:
        content = content_of(1000)
        disk = ToldDisk()
        store = BlockStore(disk, CONFIG)
        await store.open()

        async def die(doing: str, path: str) -> None:
            if doing == "sync_directory" and path != "blocks":
                raise Died

        disk.before = die
        writer = await store.begin(block_id(content), len(content))
        await writer.append(content)
        with pytest.raises(Died):
            await writer.finish()
        disk.before = None

        second = BlockStore(disk, CONFIG)
        await second.open()
        held = block_id(content) in second
        disk.crash(random.Random(1))
        third = BlockStore(disk, CONFIG)
        await third.open()
        assert held
        assert block_id(content) in third

    run(story)


def test_a_block_that_comes_byte_by_byte_costs_no_more_memory() -> None:
    async def story() -> None:
        content = content_of(5_000)
        store = BlockStore(ToldDisk(), CONFIG)
        await store.open()
        writer = await store.begin(block_id(content), len(content))
        for at in range(len(content)):
            await writer.append(content[at : at + 1])
            assert len(writer._pieces) < PIECES_MAX
        await writer.finish()
        await writer.close()
        assert block_id(content) in store

    run(story)


@pytest.mark.parametrize("drop", [b"", b"x"])
def test_a_client_that_dribbles_loses_its_place(drop: bytes) -> None:
    async def story() -> None:
        async with World(1) as world:
            loop = asyncio.get_running_loop()
            node = world.node(1)
            caller = world.caller(node.id, Peer(USER))
            await caller.call(BEGIN, Begin("p1", "f"), timeout_s=5)
            request = WriteBlock("p1", block_id(b""), 8 * MB, [node.id], world.term)
            began = loop.time()

            async def dribble() -> None:
                async with caller.open(WRITE_BLOCK, request, timeout_s=100_000) as stream:
                    while True:
                        await stream.send(drop)
                        await asyncio.sleep(CONFIG.idle_s - 1)

            with pytest.raises(DeadlineExceeded):
                await dribble()
            assert loop.time() - began <= CONFIG.block_s + CONFIG.idle_s
            assert node.blocks._reserved_bytes == 0

    run(story)


@pytest.mark.parametrize("how", ["conflict", "source fails"])
def test_a_put_that_failed_for_certain_does_not_stay_open(how: str) -> None:
    content = content_of(9 * MB)

    async def story() -> None:
        async with World(4) as world:
            await world.put(b"first", "f")
            caller = world.caller(world.node(1).id, Peer(USER))
            client = FileClient(lambda: caller, offload=inline, rng=random.Random(1))
            left = [content[: 8 * MB], content[8 * MB :], b""]

            async def source(length: int) -> Buffer:
                if len(left) == 2:  # the first block is under way
                    if how == "source fails":
                        raise OSError("input/output error")
                    await world.put(b"somebody was faster", "f")
                return left.pop(0)

            with pytest.raises(Conflict if how == "conflict" else OSError):
                await client.put(source, "f", if_version=1)
            assert world.machine.namespace.open_puts() == []

    run(story)


@pytest.mark.parametrize(
    "story_of_answers",
    [
        [ConnectionLost("broke"), Exhausted("busy")],
        [ConnectionLost("broke"), Unauthenticated("revoked")],
        [ConnectionLost("broke"), NotFound("no file f")],
        [Cancelled("its node stops"), *[Unavailable("gone")] * 1000],
    ],
)
def test_what_may_have_happened_is_not_said_to_have_failed(story_of_answers: list[IdunnoError]) -> None:
    class Answers:
        async def call(self, *_: Any, **__: Any) -> Any:
            raise story_of_answers.pop(0)

    async def story() -> None:
        asker = Asker(lambda: cast(Caller, Answers()), "delete of f", 5.0, random.Random(1))
        with pytest.raises(DeadlineExceeded):
            await asker.ask(DELETE, Delete("f", "r"))

    run(story)


class Troubled:
    """A caller whose questions meet these troubles first, method by method."""

    def __init__(self, caller: Caller, troubles: dict[str, list[Exception]]) -> None:
        self._caller, self._troubles = caller, troubles

    async def call(self, method: Any, request: Any, **more: Any) -> Any:
        if troubles := self._troubles.get(method.name):
            raise troubles.pop(0)
        return await self._caller.call(method, request, **more)

    def open(self, *asked: Any, **more: Any) -> Any:
        return self._caller.open(*asked, **more)


@pytest.mark.parametrize(
    ("troubles", "said"),
    [
        # Where a commit's answer was lost, it may still come, whoever refuses what is asked after it.
        ({COMMIT.name: [ConnectionLost("broke"), Conflict("at version 3")]}, DeadlineExceeded),
        ({COMMIT.name: [ConnectionLost("broke"), *[NotReady("copies")] * 200]}, DeadlineExceeded),
        ({COMMIT.name: [RuntimeError("a bug")]}, RuntimeError),
        # Refused each time: nothing was lost, so nothing comes.
        ({COMMIT.name: [NotReady("copies")] * 200}, IdunnoError),
        # To open a put makes nothing.
        ({BEGIN.name: [ConnectionLost("broke")], COMMIT.name: [Conflict("at version 3")]}, Conflict),
        ({BEGIN.name: [ConnectionLost("broke"), Exhausted("all are full")]}, DeadlineExceeded),
    ],
)
def test_only_a_lost_commit_leaves_a_put_in_doubt_and_none_stays_open(
    troubles: dict[str, list[Exception]], said: type[Exception]
) -> None:
    async def story() -> None:
        async with World(4) as world:
            client = world.client()
            caller = client._caller
            client._caller = lambda: cast(Caller, Troubled(caller(), troubles))
            with pytest.raises(said):
                await client.put(source_of(content_of(MB)), "f", if_version=0)
            assert world.machine.namespace.open_puts() == []

    run(story)


def test_no_memory_is_taken_for_a_block_of_impossible_size() -> None:
    async def story() -> None:
        nobody: Callable[[], Caller] = lambda: pytest.fail("nobody is to be asked")  # noqa: E731
        asker = Asker(nobody, "get of f", 5.0, random.Random(1))
        with pytest.raises(Corrupt, match="1099511627776 bytes"):
            await fetch(asker, BlockCopies(block_id(b""), 1 << 40, [NodeId("a" * 16)]), inline)

    run(story)


# -- commits that lie --------------------------------------------------------------------------------------------------


async def _begun(world: World, content: bytes, *, holders: int, entry: int = 1) -> tuple[Caller, BlockCopies]:
    """A put of one block that so many nodes have stored, and what an honest commit would say of it."""
    caller = world.caller(world.node(entry).id, Peer(USER))
    await caller.call(BEGIN, Begin("p1", "f"), timeout_s=5)
    chain = [world.node(number).id for number in range(1, holders + 1)]
    request = WriteBlock("p1", block_id(content), len(content), chain, world.term)
    if holders:
        async with caller.open(WRITE_BLOCK, request, timeout_s=10) as stream:
            await stream.send(content)
            await stream.end()
            assert (await stream.answer()).stored == chain
    return caller, BlockCopies(block_id(content), len(content), chain)


@pytest.mark.parametrize("holders", [0, 3])
def test_a_commit_is_refused_whose_holders_have_nothing(holders: int) -> None:
    async def story() -> None:
        async with World(5) as world:
            content = content_of(50_000)
            caller, copies = await _begun(world, content, holders=holders)
            everybody = BlockCopies(copies.block, copies.size, [node.id for node in world.living])
            with pytest.raises(NotReady, match=f"a block has {holders} copies, 4 are needed"):
                await caller.call(COMMIT, Commit("p1", "f", len(content), [everybody]), timeout_s=5)
            assert world.machine.namespace.find("f") is None

    run(story)


@pytest.mark.parametrize("entry", [1, 5])
def test_a_commit_is_refused_that_says_another_size(entry: int) -> None:
    async def story() -> None:
        async with World(5) as world:
            content = content_of(50_000)
            _, copies = await _begun(world, content, holders=4)
            caller = world.caller(world.node(entry).id, Peer(USER))
            lie = BlockCopies(copies.block, 8 * MB, copies.nodes)
            with pytest.raises(InvalidArgument, match="has 50,000 bytes, not 8,388,608"):
                await caller.call(COMMIT, Commit("p1", "f", 8 * MB, [lie]), timeout_s=5)
            honest = Commit("p1", "f", len(content), [copies])
            assert (await caller.call(COMMIT, honest, timeout_s=5)).copies == 4

    run(story)


def test_a_commit_through_another_node_asks_the_holders_and_a_rotten_copy_does_not_count() -> None:
    async def story() -> None:
        async with World(5) as world:
            content = content_of(50_000)
            _, copies = await _begun(world, content, holders=4)
            await world.put(b"let its log have something", "g")
            holder = world.node(2)
            world.kill(holder)
            holder.disk.flip(f"blocks/{copies.block[:2]}/{copies.block}", 40_000)
            await world.restart(holder)
            caller = world.caller(world.node(5).id, Peer(USER))
            commit = Commit("p1", "f", len(content), [copies])
            with pytest.raises(NotReady, match="a block has 3 copies, 4 are needed"):
                await caller.call(COMMIT, commit, timeout_s=5)
            weaker = Commit("p1", "f", len(content), [copies], write_quorum=3)
            assert (await caller.call(COMMIT, weaker, timeout_s=5)).copies == 3
            assert (await caller.call(COMMIT, weaker, timeout_s=5)).version == 1  # its answer was lost

    run(story)


def test_a_copy_that_cannot_be_read_any_more_does_not_count() -> None:
    async def story() -> None:
        async with World(5) as world:
            content = content_of(50_000)
            _, copies = await _begun(world, content, holders=4)
            world.kill(world.node(2))
            await world.restart(world.node(2))
            path = f"blocks/{copies.block[:2]}/{copies.block}"

            def before(node: Node, doing: str, where: str) -> None:
                if node.name == "n2" and doing == "read" and where == path:
                    raise DiskFailed("input/output error")

            world.before = before
            caller = world.caller(world.node(5).id, Peer(USER))
            with pytest.raises(NotReady, match="a block has 3 copies, 4 are needed"):
                await caller.call(COMMIT, Commit("p1", "f", len(content), [copies]), timeout_s=5)

    run(story)


def test_who_only_knows_the_name_of_anothers_block_does_not_get_it_into_a_file_of_his() -> None:
    async def story() -> None:
        async with World(4) as world:
            content = content_of(50_000)
            await world.put(content, ".idunno/jobs/j1/input", system=True)
            caller = world.caller(world.node(2).id, Peer(OTHER))
            await caller.call(BEGIN, Begin("p9", "stolen"), timeout_s=5)
            everybody = [node.id for node in world.nodes.values()]
            commit = Commit("p9", "stolen", len(content), [BlockCopies(block_id(content), len(content), everybody)])
            with pytest.raises(NotReady):
                await caller.call(COMMIT, commit, timeout_s=5)
            request = WriteBlock("p9", block_id(content), len(content), everybody, world.term)

            async def without_bytes() -> None:
                async with caller.open(WRITE_BLOCK, request, timeout_s=5) as stream:
                    await stream.end()
                    await stream.answer()

            with pytest.raises(InvalidArgument, match="ended after 0 of 50000 bytes"):  # nobody "has it already"
                await without_bytes()
            with pytest.raises(NotReady):
                await caller.call(COMMIT, commit, timeout_s=5)
            await world.client(OTHER).put(source_of(content), "the-same")  # who has the bytes may store them
            assert await _read_block(world, OTHER, content) == content

    run(story)


def test_a_small_content_is_not_read_by_its_name_while_some_put_is_open() -> None:
    async def story() -> None:
        async with World(4) as world:
            content = content_of(500)
            await world.put(content, ".idunno/jobs/j1/input", system=True)
            caller = world.caller(world.node(2).id, Peer(OTHER))
            await caller.call(BEGIN, Begin("p9", "any"), timeout_s=5)
            with pytest.raises(PermissionDenied):
                await _read_block(world, OTHER, content)

    run(story)


def test_what_is_remembered_of_puts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.sdfs.witness.REMEMBERED_MAX", 10)

    async def story() -> None:
        async with World(1) as world:
            witness = world.node(1).files.witness
            for number in range(100):
                for at in range(4):
                    witness.heard(f"p{number}", block_id(b"%d" % at), 1, [world.node(1).id])
            assert witness._count == sum(map(len, witness._puts.values())) <= 10
            assert "p99" in witness._puts
            witness.forget("p99")
            assert "p99" not in witness._puts

    run(story)


# -- blocks that are not for everybody -------------------------------------------------------------------------------------


async def _read_block(world: World, actor: Actor, content: bytes) -> bytes:
    caller = world.caller(world.node(2).id, Peer(actor))
    async with caller.open(READ_BLOCK, ReadBlock(block_id(content), 0, len(content)), timeout_s=10) as stream:
        got = bytearray()
        while (item := await stream.receive()) is not None:
            got += item.body
        await stream.answer()
    return bytes(got)


@pytest.mark.parametrize("size", [500, 50_000])
def test_a_block_of_a_job_is_for_its_client_whoever_knows_its_name(size: int) -> None:
    async def story() -> None:
        async with World(4) as world:
            content = content_of(size)
            await world.put(content, ".idunno/jobs/j1/input", system=True)
            with pytest.raises(PermissionDenied, match="no file that bob may look at"):
                await _read_block(world, OTHER, content)
            if size > 4096:  # smaller ones come with `stat`, never by their name
                assert await _read_block(world, USER, content) == content
            assert await _read_block(world, Actor("root", Role.ADMIN), content) == content
            assert await _read_block(world, Actor("rita", Role.READER), content) == content
            await world.put(content_of(50_000, 1), "public")
            assert await _read_block(world, OTHER, content_of(50_000, 1)) == content_of(50_000, 1)
            if size > 4096:
                await world.client(OTHER).put(source_of(content), "the-same")  # then he knows it anyhow
                assert await _read_block(world, OTHER, content) == content

    run(story)
