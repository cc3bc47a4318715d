# Nodes die, come back, rot and fill up; leaders change in the middle: there are four good copies again, and never fewer for it.
from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest

from idunno.base.errors import Conflict, NotLeader, StaleTerm, Unavailable
from idunno.base.ids import BlockId, NodeId, Term
from idunno.coordinator.commands import RemoveNode
from idunno.sdfs import repairing
from idunno.sdfs.hashing import block_id
from idunno.sdfs.messages import DROP, HAVE_BLOCK, REPAIR, Copy, Drop, HaveBlock, Repair, RepairAnswer
from idunno.sdfs.orders import Orders
from idunno.wire.calls import Actor, Peer, Role
from tests.unit.coordinator import world as coordinator
from tests.unit.sdfs.world import MB, USER, Node, World, content_of, run, until

CONTENT = content_of(9 * MB)
"""Two blocks."""
BLOCKS = [block_id(CONTENT[: 8 * MB]), block_id(CONTENT[8 * MB :])]


def good(world: World, block: BlockId) -> list[Node]:
    """Living nodes that hold the block, and would have it whole after a loss of power."""
    return [node for node in world.durable(block) if node.alive and block in node.blocks]


def held(world: World, block: BlockId) -> list[Node]:
    return [node for node in world.living if block in node.blocks]


async def repaired(world: World) -> None:
    await until(lambda: all(len(held(world, block)) >= 4 for block in BLOCKS))
    for _ in range(600):
        if all(len(good(world, block)) >= 4 for block in BLOCKS):  # it reads all of them: dear
            return
        await asyncio.sleep(0.2)
    raise AssertionError("there are not four good copies")


async def at_rest(world: World) -> None:
    """The leader knows of four copies of everything, and of no fifth."""

    def rests() -> bool:
        core = world.leading._repairing.core
        return not (world.leading.recovering or core.missing or core.surplus or core.running or core.unjudged)

    await asyncio.sleep(5)
    await until(rests)


async def asked(world: World) -> RepairAnswer:
    return await world.caller(world.living[-1].id, Peer(USER)).call(REPAIR, Repair(), timeout_s=5)


def victim_of(world: World, *, leader: bool) -> Node:
    return next(node for node in held(world, BLOCKS[0]) if (node.id == world.leader) == leader)


# -- a node is gone -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leader", [False, True], ids=["worker", "leader"])
def test_a_killed_nodes_copies_are_made_again_within_seconds(leader: bool) -> None:
    async def story() -> None:
        async with World(6) as world:
            await world.put(CONTENT, "f")
            world.kill(victim_of(world, leader=leader))
            began_s = asyncio.get_running_loop().time()
            await repaired(world)
            assert asyncio.get_running_loop().time() - began_s < 3.0 + 1.0  # 3 s until the death is noticed
            await asyncio.sleep(3)
            assert world.leading.copies_missing == 0
            assert await world.get("f", entry=3) == CONTENT

    run(story)


def test_the_first_copies_are_made_at_once_and_then_a_node_rests_so_that_users_keep_the_link() -> None:
    """Each copy takes a tenth of a second here, so at 30 % of the time three are made in a second."""

    async def story() -> None:
        async with World(5) as world:
            orders, began_s = world.node(5).files.orders, asyncio.get_running_loop().time()
            made: list[float] = []

            async def slow(source: NodeId, request: Copy) -> None:
                await asyncio.sleep(0.1)

            orders._copy_from = slow  # type: ignore[method-assign]
            for _ in range(40):
                await orders._rest()
                assert (await orders._copy(Copy(BLOCKS[0], 8 * MB, [world.node(1).id], world.term))).made
                made.append(asyncio.get_running_loop().time() - began_s)
            assert made[7] < 0.9  # nobody waits for the repair of a few
            assert 2.9 < (made[39] - made[19]) / (20 * 0.1) < 3.6

    run(story)


def test_a_cluster_with_no_node_to_spare_says_what_is_missing_and_repairs_when_one_comes() -> None:
    async def story() -> None:
        async with World(4) as world:
            await world.put(CONTENT, "f")
            lost = world.node(3)
            world.kill(lost)
            await asyncio.sleep(10)
            assert world.leading.copies_missing == 2
            answer = await asked(world)
            assert (answer.blocks, answer.copies, answer.bytes, answer.lost) == (2, 2, 0, [])
            lost.disk.flip(f"blocks/{BLOCKS[0][:2]}/{BLOCKS[0]}", 77)  # and its disk did not survive it well
            again = await world.restart(lost)
            await until(lambda: world.leading.copies_missing == 0)
            again.files.scrubber.begin()
            await asyncio.sleep(2)
            await repaired(world)
            assert (await asked(world)).nodes[2].rotten == 1
            assert world.leading.blocks_rotten() == {world.node(3).id: 1}

    run(story)


def test_a_node_that_announced_its_stop_is_waited_for() -> None:
    async def story() -> None:
        async with World(6) as world:
            await world.put(CONTENT, "f")
            stopped = victim_of(world, leader=False)
            world.kill(stopped, noticed_after_s=None)
            world.set_presence(stopped.id, "stopped")
            await asyncio.sleep(300)
            assert len(good(world, BLOCKS[0])) == 3
            answer = await asked(world)
            assert (answer.copies, answer.bytes, answer.waiting_for) == (2, 0, [stopped.name])
            world.now_ms += 300_000  # the machine's time goes on as well
            world.lead(world.living[-1].id)  # a new leader knows since when, and not what the stopped node has
            world.set_presence(world.leader or stopped.id, "present")
            await asyncio.sleep(200)
            assert len(good(world, BLOCKS[0])) == 3
            await asyncio.sleep(310)
            await repaired(world)

    run(story)


def test_a_stopped_node_that_is_removed_is_not_waited_for_any_more() -> None:
    async def story() -> None:
        async with World(6) as world:
            stopped = world.node(6)
            world.kill(stopped, noticed_after_s=None)
            world.set_presence(stopped.id, "stopped")
            await asyncio.sleep(30)
            assert (await asked(world)).waiting_for == [stopped.name]
            world.machine.roster.set_voters(frozenset(node.id for node in world.living))
            world.apply(RemoveNode(stopped.id), coordinator.SYSTEM)
            await asyncio.sleep(1)
            assert (await asked(world)).waiting_for == []

    run(story)


def test_with_two_copies_left_a_third_is_made_at_once_whoever_is_expected_back() -> None:
    async def story() -> None:
        async with World(7) as world:
            await world.put(CONTENT, "f")
            for node in [node for node in held(world, BLOCKS[0]) if node.id != world.leader][:2]:
                world.kill(node, noticed_after_s=None)
                world.set_presence(node.id, "stopped")
            await asyncio.sleep(5)
            assert [len(good(world, block)) for block in BLOCKS] == [3, 3]

    run(story)


def test_only_blocks_that_nodes_report_are_held_back_when_a_version_is_made() -> None:
    async def story() -> None:
        async with World(5) as world:
            await world.put(b"small", "s")
            core = world.leading._repairing.core
            assert core._held_back == {}
            await world.put(CONTENT, "f")
            assert set(core._held_back) == set(BLOCKS)

    run(story)


def test_blocks_without_a_copy_are_named_with_their_files() -> None:
    async def story() -> None:
        async with World(6) as world:
            await world.put(CONTENT, "f", write_quorum=1)
            await world.put(CONTENT[:MB], "g")
            for node in held(world, BLOCKS[0]):
                path = f"blocks/{BLOCKS[0][:2]}/{BLOCKS[0]}"
                node.disk.flip(path, 5)
                assert not await node.blocks.verify(BLOCKS[0])
            await asyncio.sleep(10)
            answer = await asked(world)
            assert (answer.lost, answer.lost_blocks, answer.lost_files) == ([BLOCKS[0]], 1, ["f"])
            assert world.leading.lost() == [BLOCKS[0]]

    run(story)


# -- while it is repaired -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["target", "leader"])
def test_whoever_dies_at_any_step_of_a_repair_there_are_four_copies_in_the_end(who: str) -> None:
    steps = 0

    async def story(step: int | None) -> None:
        nonlocal steps
        async with World(7) as world:
            await world.put(CONTENT, "f")
            lost = victim_of(world, leader=False)
            count = itertools.count()
            begun = False

            def before(node: Node, doing: str, path: str) -> None:
                nonlocal begun
                begun = begun or doing == "sdfs.copy begins"
                if begun and node is not lost and next(count) == step:
                    world.kill(node if who == "target" else world.nodes[world.leader or node.id])

            world.kill(lost)
            world.before = before
            await until(lambda: begun)
            await asyncio.sleep(20)
            world.before = None
            if step is None:
                steps = next(count)
            await repaired(world)
            assert await world.get("f", entry=4) == CONTENT

    run(lambda: story(None))
    assert steps > 20
    for step in range(0, steps, 3):
        run(lambda step=step: story(step))  # type: ignore[misc]


def test_the_leader_changes_in_the_middle_of_a_copy() -> None:
    async def story() -> None:
        async with World(6) as world:
            await world.put(CONTENT, "f")
            world.kill(victim_of(world, leader=False))
            changed = False

            def before(node: Node, doing: str, path: str) -> None:
                nonlocal changed
                if doing == "write" and path.startswith("tmp/block") and not changed:
                    changed = True
                    world.lead(next(n.id for n in world.living if n.id != world.leader))

            world.before = before
            await repaired(world)
            assert changed
            await asyncio.sleep(60)
            assert [len(held(world, block)) for block in BLOCKS] == [4, 4]  # at worst there was a fifth for a while

    run(story)


def test_a_rotten_source_is_not_copied_from_and_is_replaced_too() -> None:
    async def story() -> None:
        async with World(7) as world:
            await world.put(CONTENT, "f")
            lost, *others = held(world, BLOCKS[0])
            for node in others[:2]:
                node.disk.flip(f"blocks/{BLOCKS[0][:2]}/{BLOCKS[0]}", 4 * MB)
            world.kill(lost)
            for node in others[:2]:
                node.files.scrubber.begin()
            await repaired(world)
            assert await world.get("f", entry=3) == CONTENT

    run(story)


# -- a node comes back ----------------------------------------------------------------------------------------------------


def test_a_node_that_comes_back_is_counted_by_content_and_the_surplus_goes() -> None:
    async def story() -> None:
        async with World(6) as world:
            await world.put(CONTENT, "f")
            lost = victim_of(world, leader=False)
            world.kill(lost)
            await repaired(world)
            await asyncio.sleep(5)
            await world.restart(lost)
            await until(lambda: len(good(world, BLOCKS[0])) == 5)
            await asyncio.sleep(5)
            assert [len(held(world, block)) for block in BLOCKS] == [5, 5]  # not at once: it may go again
            await asyncio.sleep(40)
            assert [len(held(world, block)) for block in BLOCKS] == [4, 4]
            assert [len(good(world, block)) for block in BLOCKS] == [4, 4]
            await at_rest(world)
            assert await world.get("f", entry=3) == CONTENT

    run(story)


def test_a_surplus_copy_stays_while_one_of_the_others_is_rotten() -> None:
    async def story() -> None:
        async with World(6) as world:
            await world.put(CONTENT, "f")
            lost = victim_of(world, leader=False)
            world.kill(lost)
            await repaired(world)
            await world.restart(lost)
            await until(lambda: len(good(world, BLOCKS[0])) == 5)
            rotten = held(world, BLOCKS[0])[0]
            rotten.disk.flip(f"blocks/{BLOCKS[0][:2]}/{BLOCKS[0]}", 123)  # nobody has noticed
            for _ in range(600):
                await asyncio.sleep(0.1)
                assert len(good(world, BLOCKS[0])) >= 4
            await at_rest(world)
            assert len(good(world, BLOCKS[0])) == 4

    run(story)


async def _two_leaders_trim(world: World) -> int:
    """Five copies. An old leader decides to drop one, its order is late; a new one trims as well. The good copies left."""
    await world.put(CONTENT, "f")
    lost = victim_of(world, leader=False)
    world.kill(lost)
    await repaired(world)
    await world.restart(lost)
    await until(lambda: len(good(world, BLOCKS[0])) == 5)
    old_term = world.term
    world.lead(world.node(6).id)  # node 6 must not be the one that is dropped by the new leader and the old
    await asyncio.sleep(50)
    left = good(world, BLOCKS[0])
    assert len(left) == 4
    late = Peer(Actor(world.node(1).id, Role.NODE), node=world.node(1).id)
    for node in left[:1]:
        with contextlib.suppress(StaleTerm):
            await world.caller(node.id, late).call(DROP, Drop(BLOCKS[0], old_term), timeout_s=5)
    return len(good(world, BLOCKS[0]))


def test_a_deposed_leader_trims_nothing() -> None:
    async def story() -> None:
        async with World(6) as world:
            assert await _two_leaders_trim(world) == 4

    run(story)


def test_planted_a_node_that_does_not_look_at_the_term_loses_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Orders, "_check_term", lambda self, term: None)

    async def story() -> None:
        async with World(6) as world:
            assert await _two_leaders_trim(world) == 3

    run(story)


def test_verifying_for_a_new_leader_makes_a_node_refuse_the_old_one() -> None:
    async def story() -> None:
        async with World(4) as world:
            await world.put(CONTENT, "f")
            node = held(world, BLOCKS[0])[0]
            peer = Peer(Actor(world.node(1).id, Role.NODE), node=world.node(1).id)
            caller = world.caller(node.id, peer)
            newer = Term(world.term + 1)
            assert (await caller.call(HAVE_BLOCK, HaveBlock(BLOCKS[0], "", newer), timeout_s=5)).have
            with pytest.raises(StaleTerm):
                await caller.call(DROP, Drop(BLOCKS[0], world.term), timeout_s=5)
            with pytest.raises(StaleTerm):
                await caller.call(HAVE_BLOCK, HaveBlock(BLOCKS[0], "", world.term), timeout_s=5)

    run(story)


def test_a_leader_that_has_not_heard_from_everybody_drops_nothing_and_copies_only_after_a_while() -> None:
    async def story() -> None:
        async with World(6) as world:
            await world.put(CONTENT, "f")
            lost = victim_of(world, leader=False)
            world.kill(lost)
            await repaired(world)
            silent = next(n for n in world.living if n.id != world.leader and n not in held(world, BLOCKS[0]))

            async def refuse(leader: NodeId, page: object) -> None:
                raise Unavailable("not now")

            silent.data._reporter._report = refuse
            await world.restart(lost)
            world.lead(next(n.id for n in world.living if n is not silent and n.id != world.leader))
            await asyncio.sleep(100)
            assert world.leading.recovering
            assert len(held(world, BLOCKS[0])) == 5
            world.kill(held(world, BLOCKS[0])[0])
            world.kill(held(world, BLOCKS[0])[0])
            await repaired(world)  # all the same: copies are more urgent than knowing all

    run(story)


# -- leaving --------------------------------------------------------------------------------------------------------------


def test_a_node_that_leaves_gives_its_copies_away_first() -> None:
    async def story() -> None:
        async with World(6) as world:
            await world.put(CONTENT, "f")
            leaving = victim_of(world, leader=False)
            said = await world.leading.drain(leaving.id)
            assert said.startswith("each of its 2 blocks (9,437,184 bytes) has its copies on other nodes")
            others = [node for node in good(world, BLOCKS[0]) if node is not leaving]
            assert len(others) == 4
            await world.put(content_of(MB, 5), "g")
            assert block_id(content_of(MB, 5)) not in leaving.blocks  # nothing new goes there
            world.leading.undrain(leaving.id)
            await asyncio.sleep(60)
            assert len(held(world, BLOCKS[0])) == 4

    run(story)


def test_who_asks_again_for_what_is_moved_is_not_told_that_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with World(6) as world:
            await world.put(CONTENT, "f")
            leaving = victim_of(world, leader=False)
            said = await world.leading.drain(leaving.id)
            monkeypatch.setattr(repairing, "unable", lambda *_: "full")  # by these very copies
            assert await world.leading.drain(leaving.id) == said

    run(story)


def test_draining_ends_with_the_leadership_and_says_when_there_are_too_few_nodes() -> None:
    async def story() -> None:
        async with World(5) as world:
            await world.put(CONTENT, "f")
            leaving, other = [node for node in held(world, BLOCKS[0]) if node.id != world.leader][:2]
            world.kill(other)
            await asyncio.sleep(10)
            with pytest.raises(Conflict, match=rf"need 4 other nodes that are present, and 3 are; away: {other.name}"):
                await world.leading.drain(leaving.id)
            assert world.leading._repairing.draining == set()
            await world.restart(other)
            await asyncio.sleep(1)
            draining = asyncio.ensure_future(world.leading.drain(leaving.id))
            await asyncio.sleep(0)
            old = world.leading
            world.lead(next(n.id for n in world.living if n.id != world.leader))
            with pytest.raises(NotLeader):
                await draining
            with pytest.raises(NotLeader):
                await old.drain(leaving.id)
            await asyncio.sleep(5)
            await world.leading.drain(leaving.id)

    run(story)


def test_who_gives_up_a_drain_does_not_end_that_of_others() -> None:
    async def story() -> None:
        async with World(5) as world:
            await world.put(CONTENT, "f")
            leaving, other = [node for node in held(world, BLOCKS[0]) if node.id != world.leader][:2]
            world.kill(other)  # three others are left, and the copies cannot be moved
            await asyncio.sleep(10)
            first, second = (asyncio.ensure_future(world.leading.drain(leaving.id)) for _ in range(2))
            await asyncio.sleep(0.5)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            with pytest.raises(Conflict, match="need 4 other nodes"):
                await second
            assert world.leading._repairing.draining == set()

    run(story)


# -- disks ----------------------------------------------------------------------------------------------------------------


def test_a_node_whose_disk_fails_takes_no_blocks_and_says_so_until_it_works_again() -> None:
    async def story() -> None:
        async with World(6) as world:
            bad = world.node(2)
            bad.disk.faults["sync"] = "input/output error"
            assert not (await world.put(CONTENT, "f", entry=2)).degraded
            await asyncio.sleep(15)
            assert "input/output error" in world.leading.disk_problems()[bad.id]
            assert "input/output error" in (await asked(world)).nodes[1].problem
            assert not (await world.put(content_of(MB, 1), "g", entry=2)).degraded
            assert len(bad.blocks) == 0
            del bad.disk.faults["sync"]
            await asyncio.sleep(45)
            assert world.leading.disk_problems() == {}

    run(story)


def test_a_block_that_cannot_be_read_is_replaced() -> None:
    async def story() -> None:
        async with World(6) as world:
            await world.put(CONTENT, "f")
            bad = victim_of(world, leader=False)
            bad.disk.faults["read"] = "input/output error"
            bad.files.scrubber.begin()
            await asyncio.sleep(20)
            assert [len([n for n in held(world, b) if n is not bad]) for b in BLOCKS] == [4, 4]

    run(story)


def test_a_scrub_reads_each_block_once_as_they_lie_from_a_place_drawn_anew() -> None:
    """Without sorting them: a million names take half a second of everybody's."""

    async def story() -> None:
        async with World(1) as world:
            for number in range(8):
                await world.put(content_of(5000, number), f"f{number}")
            node = world.node(1)
            lie, read, firsts = node.blocks.held(), list[BlockId](), set[BlockId]()
            node.disk.before = lambda doing, path: told(read, doing, path)
            for _ in range(10):
                read.clear()
                assert await node.files.scrubber.scrub() == 0
                first = lie.index(read[0])
                assert read == lie[first:] + lie[:first]
                firsts.add(read[0])
            assert lie != sorted(lie)
            assert len(firsts) > 2

    async def told(read: list[BlockId], doing: str, path: str) -> None:
        if doing == "open" and path.startswith("blocks/"):
            read.append(BlockId(path.rsplit("/", 1)[1]))

    run(story)


def test_a_flipped_byte_is_found_by_the_scrub_and_replaced() -> None:
    async def story() -> None:
        async with World(5) as world:
            await world.put(CONTENT, "f")
            node = victim_of(world, leader=False)
            node.disk.flip(f"blocks/{BLOCKS[1][:2]}/{BLOCKS[1]}", 1)
            assert len(good(world, BLOCKS[1])) == 3
            began_s = asyncio.get_running_loop().time()
            assert await node.files.scrubber.scrub() == 1
            assert 0.8 < asyncio.get_running_loop().time() - began_s < 1.1  # 9 MiB at 10 MB/s
            await repaired(world)
            assert await node.blocks.verify(BLOCKS[0])

    run(story)
