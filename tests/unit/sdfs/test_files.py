# The file store from the user's side: five nodes, files in and out.
from __future__ import annotations

import asyncio

import pytest

from idunno.base.disk import Buffer
from idunno.base.errors import Conflict, InvalidArgument, NotFound, NotReady, PermissionDenied
from idunno.coordinator.machine import Machine
from idunno.sdfs.client import source_of
from idunno.sdfs.hashing import block_id
from idunno.wire.calls import Actor, Role
from tests.unit.sdfs.world import MB, OTHER, Coordination, World, content_of, read, run


def test_a_large_file_is_stored_four_times_and_read_through_every_node() -> None:
    async def story() -> None:
        async with World(5) as world:
            content = content_of(20 * MB + 17)
            answer = await world.put(content, "videos/one.bin", entry=2)
            assert (answer.version, answer.size, answer.blocks, answer.copies, answer.degraded) == (
                1,
                len(content),
                3,
                4,
                False,
            )
            assert len(answer.replicas) == 4
            assert "n2" in answer.replicas  # the entry node holds a copy of what came through it
            for at in range(0, len(content), 8 * MB):
                assert len(world.durable(block_id(content[at : at + 8 * MB]))) == 4
            for entry in range(1, 6):
                assert await world.get("videos/one.bin", entry=entry) == content

    run(story)


async def taking(offset: int, content: Buffer) -> None:
    """A sink that keeps nothing."""


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_a_small_file_is_on_every_node(size: int) -> None:
    async def story() -> None:
        async with World(5) as world:
            content = content_of(size)
            answer = await world.put(content, "small")
            assert (answer.size, answer.copies, answer.degraded, len(answer.replicas)) == (size, 4, False, 4)
            for node in world.nodes.values():
                assert await node.small.get(block_id(content)) == content
                assert len(node.blocks) == 0
            assert await world.get("small", entry=4) == content
            got = await world.client().get("small", taking)
            assert (got.size, got.content) == (size, None)  # whoever gets a folder keeps what is told of each file
            where = await world.client().where("small")
            assert (where.copies_wanted, where.copies_found) == (4, 5)

    run(story)


def test_versions_are_kept_and_found_by_number_and_time() -> None:
    async def story() -> None:
        async with World(4) as world:
            contents = [content_of(5000 * i, seed=i) for i in (1, 2, 3)]
            times = []
            for content in contents:
                await world.put(content, "f")
                times.append(world.now_ms)
                world.now_ms += 1000
            client = world.client(entry=3)
            rows = await client.versions("f")
            assert [(row.version, row.size) for row in rows] == [(3, 15000), (2, 10000), (1, 5000)]
            assert all(len(row.replicas) == 4 for row in rows)
            assert await world.get("f") == contents[2]
            assert await world.get("f", version=1) == contents[0]
            assert await world.get("f", as_of_ms=times[1] + 500) == contents[1]
            with pytest.raises(NotFound, match="no version 9"):
                await world.get("f", version=9)

    run(story)


def test_listing_where_store_and_delete() -> None:
    async def story() -> None:
        async with World(5) as world:
            big = content_of(9 * MB)
            await world.put(big, "a/big", entry=3)
            await world.put(b"tiny", "a/tiny")
            await world.put(b"x", "b")
            client = world.client()
            assert [row.name for row in await client.ls("a/")] == ["a/big", "a/tiny"]
            assert [row.name for row in await client.ls()] == ["a/big", "a/tiny", "b"]
            where = await client.where("a/big")
            assert [len(block.nodes) for block in where.blocks] == [4, 4]
            assert (where.copies_wanted, where.copies_found, where.recovering) == (4, 4, False)
            without = ({"n1", "n2", "n3", "n4", "n5"} - set(where.blocks[0].nodes)).pop()
            assert [row.name for row in (await client.store(without)).files] == ["a/tiny", "b"]
            assert [row.name for row in (await client.store("n3")).files] == ["a/big", "a/tiny", "b"]
            assert (await client.delete("a/big")).versions == 1
            with pytest.raises(NotFound):
                await world.get("a/big")
            assert (await world.put(big, "a/big")).version == 2  # numbers go on: a version means one content for ever

    run(story)


def test_a_listing_of_many_names_comes_in_pages() -> None:
    async def story() -> None:
        async with World(1) as world:
            client = world.client()
            names = [f"f{i:04}" for i in range(2345)]
            for name in names:
                await client.put(source_of(b"1"), name)
            assert [row.name for row in await client.ls("f")] == names
            assert [row.name for row in (await client.store("n1")).files] == names

    run(story)


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "../a", "a/../b", "a\x00b", "a\nb", "x" * 513, ".idunno/secret", "\ud800"]
)
def test_a_bad_name_is_refused_by_client_and_node(name: str) -> None:
    async def story() -> None:
        async with World(1) as world:
            with pytest.raises(InvalidArgument):
                await world.put(b"x", name)
            with pytest.raises(InvalidArgument):
                await world.put(content_of(5000), name)
            assert world.machine.namespace.files == 0

    run(story)


def test_only_the_owner_writes_and_deletes() -> None:
    async def story() -> None:
        async with World(4) as world:
            await world.put(content_of(5000), "mine")
            bob = world.client(OTHER)
            with pytest.raises(PermissionDenied, match="alice"):
                await bob.delete("mine")
            with pytest.raises(PermissionDenied, match="alice"):
                await bob.put(source_of(content_of(6000)), "mine")
            with pytest.raises(PermissionDenied, match="system's own"):
                await bob.put(source_of(b"x"), ".idunno/jobs/j/output/1", system=True)
            assert len(await read(bob, "mine")) == 5000

    run(story)


def test_a_conditional_put_is_refused_when_somebody_was_faster() -> None:
    async def story() -> None:
        async with World(3) as world:
            await world.put(b"1", "f", if_version=0)
            with pytest.raises(Conflict, match="version 1"):
                await world.put(b"2", "f", if_version=0)
            with pytest.raises(Conflict, match="version 1"):
                await world.put(content_of(5000), "f", if_version=7)
            assert (await world.put(content_of(5000), "f", if_version=1)).version == 2

    run(story)


def test_the_same_put_again_makes_no_second_version() -> None:
    async def story() -> None:
        async with World(5) as world:
            for content in (content_of(100), content_of(9 * MB)):
                name = f"f{len(content)}"
                first = await world.put(content, name, put=f"put-{name}")
                again = await world.put(content, name, put=f"put-{name}", entry=4)
                assert (again.version, again.size, again.copies) == (1, first.size, first.copies)

    run(story)


def test_equal_blocks_are_sent_and_kept_once() -> None:
    async def story() -> None:
        async with World(4) as world:
            answer = await world.put(bytes(40 * MB), "zeros")
            assert answer.blocks == 5
            assert all(len(node.blocks) == 1 for node in world.nodes.values())
            written = [step for step in world.node(1).disk.story if step[0] == "rename"]
            assert len(written) == 1
            assert await world.get("zeros") == bytes(40 * MB)

    run(story)


def test_a_worker_uploads_blocks_and_reads_them_without_a_name() -> None:
    async def story() -> None:
        async with World(4) as world:
            client, content = world.worker(2), content_of(9 * MB)
            uploaded = await client.upload(source_of(content), ".idunno/jobs/j1/input")
            assert (uploaded.size, len(uploaded.blocks)) == (len(content), 2)
            put = world.machine.namespace.open_put(uploaded.put)
            assert put is not None
            assert (put.owner, put.node) == (world.node(2).id, world.node(2).id)
            got = bytearray()

            async def sink(offset: int, piece: object) -> None:
                got.extend(memoryview(piece))  # type: ignore[arg-type]

            await world.worker(3).fetch(uploaded.blocks, sink, what="input of j1")
            assert got == content
            assert (await world.worker(3).store("n2")).node == "n2"

    run(story)


def test_the_files_of_a_job_are_hidden_from_other_users() -> None:
    async def story() -> None:
        async with World(4) as world:
            name = ".idunno/jobs/j1/input"
            await world.put(content_of(10), name, system=True)
            await world.client(OTHER).put(source_of(b"mine"), ".idunno/jobs/j2/input", system=True)
            other = world.client(OTHER, entry=2)
            for look in (other.stat(name), other.versions(name), other.where(name), other.get(name, _nowhere)):
                with pytest.raises(PermissionDenied, match="somebody else's job"):
                    await look
            assert [row.name for row in await other.ls(".idunno/jobs/")] == [".idunno/jobs/j2/input"]
            assert [row.name for row in await world.client().ls(".idunno/jobs/")] == [name]

    run(story)


async def _nowhere(offset: int, content: object) -> None:
    raise AssertionError("somebody else's bytes came")


def test_a_node_that_has_not_replayed_its_log_takes_a_small_file_all_the_same() -> None:
    class Behind(Coordination):
        """Its machine has applied nothing yet, until a read has waited for it."""

        caught_up = False

        @property
        def machine(self) -> Machine:
            return super().machine if self.caught_up else Machine()

        async def read(self, timeout_s: float) -> Machine:
            self.caught_up = True
            return await super().read(timeout_s)

    async def story() -> None:
        async with World(4) as world:
            world.node(2).files._coordinator = Behind(world)
            assert (await world.put(b"small", "f", entry=2)).copies == 4
            assert await world.get("f") == b"small"

    run(story)


def test_what_only_a_node_that_is_away_could_tell_is_refused_at_once() -> None:
    async def story() -> None:
        async with World(5) as world:
            away = world.node(5)
            world.kill(away, noticed_after_s=None)
            world.set_presence(away.id, "failed")
            began_s = asyncio.get_running_loop().time()
            with pytest.raises(NotReady, match=r"n5 is failed since .*; ask it when it is back"):
                await world.client().store("n5")
            with pytest.raises(NotReady, match="n5 is failed since"):
                await world.client(Actor("root", Role.ADMIN)).scrub("n5")
            answer = await world.client(Actor("root", Role.ADMIN)).scrub()
            assert (answer.nodes, answer.failed) == (["n1", "n2", "n3", "n4"], ["n5: it is failed"])
            assert asyncio.get_running_loop().time() - began_s < 1

    run(story)
