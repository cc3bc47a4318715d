# What nothing refers to is removed; what somebody may still commit, or has just committed, never is.
from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from idunno.base.errors import Conflict
from idunno.base.ids import BlockId
from idunno.coordinator.commands import AbortPut, Purge
from idunno.sdfs.client import source_of
from idunno.sdfs.hashing import block_id
from idunno.sdfs.messages import COMMIT, DROP, BlockCopies, Commit, Drop
from idunno.sdfs.pins import Pins
from idunno.sdfs.sweep import BATCH, SLICE, Sweeper
from idunno.wire.calls import Actor, Peer, Role
from tests.unit.coordinator.world import SYSTEM
from tests.unit.sdfs.world import CONFIG, MB, USER, Node, World, content_of, run

CONTENT = content_of(9 * MB)
BLOCKS = [block_id(CONTENT[: 8 * MB]), block_id(CONTENT[8 * MB :])]


def files(world: World) -> int:
    """Block files on all living disks, under whatever name."""
    there = [path for node in world.living for path in node.disk.paths()]
    return sum(path.startswith(("blocks/", "tmp/", "quarantine/")) for path in there)


def purge_all(world: World) -> None:
    world.apply(Purge(tuple(world.machine.namespace.trash.entries)), SYSTEM)


# -- what goes ------------------------------------------------------------------------------------------------------------


def test_deleted_files_lie_in_the_trash_and_their_blocks_go_when_they_are_purged() -> None:
    async def story() -> None:
        async with World(5, config=replace(CONFIG, trash_ms=600_000)) as world:
            await world.put(CONTENT, "f")
            await world.put(CONTENT[8 * MB :], "g")  # shares a block
            await world.client().delete("f")
            await asyncio.sleep(100)
            assert files(world) == 8
            purge_all(world)
            await asyncio.sleep(3)
            assert files(world) == 4
            assert await world.get("g") == CONTENT[8 * MB :]
            await world.client().delete("g")
            world.now_ms += 590_000
            await world.put(b"x" * 5000, "h")  # machine time goes on with commands
            await asyncio.sleep(100)
            assert files(world) == 8
            world.now_ms += 10_000
            await world.put(b"x" * 5000, "h")
            await asyncio.sleep(100)
            assert files(world) == 4  # of h; that of g is gone by itself
            assert world.machine.namespace.trash.versions == 0

    run(story)


def test_the_blocks_of_an_aborted_put_go() -> None:
    async def story() -> None:
        async with World(5) as world:
            done = await world.client().upload(source_of(CONTENT), "f", system=False)
            await asyncio.sleep(200)
            assert files(world) == 8
            world.apply(AbortPut(done.put, "test"), SYSTEM)
            await asyncio.sleep(60)
            assert files(world) == 0
            await asyncio.sleep(15)
            assert world.leading.holders(BLOCKS[0]) == []

    run(story)


def test_what_is_left_over_from_before_a_restart_goes_but_not_before_the_puts_of_then_have_ended() -> None:
    async def story() -> None:
        async with World(4) as world:
            done = await world.client().upload(source_of(CONTENT), "f", system=False)
            gone = await world.client().upload(source_of(content_of(MB, 1)), "g", system=False)
            world.apply(AbortPut(gone.put, "test"), SYSTEM)
            for node in list(world.living):
                world.kill(node)
                await world.restart(node)
            world.lead(world.node(1).id)
            await asyncio.sleep(300)
            assert files(world) == 4 * 3  # nobody remembers what was written for which put
            commit = Commit(
                done.put, "f", done.size, [BlockCopies(b.block, b.size, list(world.nodes)) for b in done.blocks]
            )
            await world.caller(world.node(1).id, Peer(USER)).call(COMMIT, commit, timeout_s=5)
            await asyncio.sleep(60)
            assert files(world) == 4 * 2
            assert await world.get("f") == CONTENT

    run(story)


def test_rotten_files_go_when_their_block_is_whole_again() -> None:
    async def story() -> None:
        async with World(4) as world:
            await world.put(CONTENT, "f")
            node = world.node(2)
            node.disk.flip(f"blocks/{BLOCKS[0][:2]}/{BLOCKS[0]}", 9)
            assert not await node.blocks.verify(BLOCKS[0])
            assert f"quarantine/{BLOCKS[0]}" in node.disk.paths()
            await asyncio.sleep(60)
            assert await node.blocks.verify(BLOCKS[0])
            assert f"quarantine/{BLOCKS[0]}" not in node.disk.paths()

    run(story)


def test_a_sweep_of_very_many_goes_in_batches() -> None:
    async def story() -> None:
        async with World(1) as world:
            client, puts = world.client(), []
            for number in range(300):
                puts.append(await client.upload(source_of(content_of(5000, number)), f"f{number}", system=False))
            for done in puts:
                world.apply(AbortPut(done.put, "test"), SYSTEM)
            assert len(await world.node(1).files.sweeper._decide()) == 256
            await asyncio.sleep(40)
            assert len(world.node(1).blocks) == 0

    run(story)


def test_of_very_many_candidates_one_turn_looks_at_few() -> None:
    looks = 0

    class Watched(dict[BlockId, None]):
        def popitem(self) -> tuple[BlockId, None]:
            nonlocal looks
            looks += 1
            return super().popitem()

        def __iter__(self) -> Iterator[BlockId]:
            raise AssertionError("all candidates were walked over")

    async def story() -> None:
        nonlocal looks
        async with World(1) as world:
            client, sweeper = world.client(), world.node(1).files.sweeper
            puts = [
                await client.upload(source_of(content_of(5000, number)), f"f{number}", system=False)
                for number in range(300)
            ]
            for done in puts:
                world.apply(AbortPut(done.put, "test"), SYSTEM)
            sweeper._candidates = Watched()
            assert len(await sweeper._decide()) == BATCH
            assert looks == BATCH
            elsewhere = (BlockId(f"{number:064x}") for number in range(3 * SLICE))
            sweeper._candidates, looks = Watched(dict.fromkeys(elsewhere)), 0
            assert await sweeper._decide() == []
            assert looks == SLICE
            await asyncio.sleep(10)  # it goes on by itself, long before the next look is due
            assert not sweeper._candidates

    run(story)


# -- what stays -----------------------------------------------------------------------------------------------------------


async def _sweep_at_every_step(step: int | None) -> int:
    """A put of what lies around as orphans; at that step of it every node sweeps. The steps there are."""
    async with World(5) as world:
        for node in world.living:
            await node.files.sweeper.sweep()
        before = await world.client().upload(source_of(CONTENT), "f", system=False)
        world.apply(AbortPut(before.put, "test"), SYSTEM)
        count = itertools.count()
        sweeps: list[asyncio.Task[int]] = []

        def told(node: Node, doing: str, path: str) -> None:
            if not sweeps and next(count) == step:
                for each in world.living:
                    each.files.sweeper.freed(BLOCKS)  # another file of that content was purged just now
                    sweeps.append(asyncio.ensure_future(each.files.sweeper.sweep()))

        world.before = told
        await world.put(CONTENT, "g", entry=2)
        await asyncio.gather(*sweeps)
        world.before = None
        for block in BLOCKS:
            holders = world.leading.holders(block)
            good = {node.id for node in world.durable(block) if block in node.blocks}
            assert len(good) >= 4, f"step {step}: committed with {len(good)} of 4 copies"
            assert set(holders) <= good | set(world.nodes)
        assert await world.get("g", entry=3) == CONTENT
        return next(count)


def test_a_sweep_at_any_step_of_a_put_takes_nothing_from_it() -> None:
    steps = run(lambda: _sweep_at_every_step(None))
    assert steps > 60
    for step in range(0, steps, 2):
        run(lambda step=step: _sweep_at_every_step(step))  # type: ignore[misc]


def _fails_somewhere() -> bool:
    for step in range(0, 200, 3):
        try:
            run(lambda step=step: _sweep_at_every_step(step))  # type: ignore[misc]
        except AssertionError:
            return True
    return False


def test_planted_a_sweep_without_pins_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pins, "take", lambda self, block, put: None)
    assert _fails_somewhere()


def test_planted_a_sweep_that_believes_that_an_unknown_put_has_ended_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mark before the barrier: a node whose machine has not heard of a put drops its pins."""
    settle = Pins.settle

    async def story() -> None:
        async with World(5) as world:
            node = world.node(3)
            node.blocks.pins.take(BLOCKS[0], "a put that this node's machine has yet to hear of")
            mark = node.blocks.pins.mark()
            node.blocks.pins.take(BLOCKS[1], "another one, begun after the barrier")
            free = node.blocks.pins.settle(mark, lambda put: world.machine.namespace.open_put(put) is not None)
            assert free == [BLOCKS[0]]
            assert BLOCKS[1] in node.blocks.pins

    run(story)
    monkeypatch.setattr(Pins, "settle", lambda self, mark, is_open: settle(self, 10**9, is_open))
    with pytest.raises(AssertionError):
        run(story)


def test_planted_a_sweep_that_makes_no_barrier_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose machine is behind: the put is committed, and it knows neither of the put nor of its end."""

    async def story() -> None:
        async with World(5) as world:
            await world.put(CONTENT, "f")
            behind = next(node for node in world.living if BLOCKS[0] in node.blocks and node.id != world.leader)
            # What this node's machine would say had it not applied the log's last entries.
            sweeper: Sweeper = behind.files.sweeper
            now = sweeper._coordinator
            sweeper._coordinator = Behind(now)  # type: ignore[assignment]
            sweeper._candidates[BLOCKS[0]] = None
            sweeper._looked = True
            await sweeper.sweep()
            assert BLOCKS[0] in behind.blocks

    class Behind:
        """Its machine is an empty one until the barrier."""

        def __init__(self, real: object) -> None:
            self.real = real
            self.machine = type(real.machine)()  # type: ignore[attr-defined]
            self.driver = real.driver  # type: ignore[attr-defined]

        async def read(self, timeout_s: float) -> object:
            self.machine = self.real.machine if self.barrier else self.machine  # type: ignore[attr-defined]
            return self.machine

        barrier = True

    run(story)
    monkeypatch.setattr(Behind, "barrier", False)
    with pytest.raises(AssertionError):
        run(story)


def test_a_surplus_copy_that_an_open_put_counts_on_is_not_dropped() -> None:
    async def story() -> None:
        async with World(5) as world:
            done = await world.client().upload(source_of(CONTENT), "f", system=False)
            node = next(node for node in world.living if BLOCKS[0] in node.blocks)
            peer = Peer(Actor(world.node(1).id, Role.NODE), node=world.node(1).id)
            drop = Drop(BLOCKS[0], world.term)
            with pytest.raises(Conflict, match="is being put here"):
                await world.caller(node.id, peer).call(DROP, drop, timeout_s=5)
            world.apply(AbortPut(done.put, "test"), SYSTEM)
            await asyncio.sleep(60)
            assert BLOCKS[0] not in node.blocks

    run(story)


def test_a_block_that_comes_again_while_its_file_is_removed_is_there_afterwards() -> None:
    async def story() -> None:
        async with World(1) as world:
            node = world.node(1)
            content = content_of(MB)
            block = block_id(content)
            for step in range(12):
                await world.put(content, f"f{step}")
                await world.client().delete(f"f{step}")
                purge_all(world)
                again: list[asyncio.Task[object]] = []
                count = itertools.count()

                def told(at: Node, doing: str, path: str, step: int = step) -> None:
                    if next(count) == step:  # noqa: B023  # it is not used after this turn of the loop
                        again.append(asyncio.ensure_future(world.put(content, "again")))  # noqa: B023

                world.before = told
                await asyncio.sleep(3)
                world.before = None
                await asyncio.gather(*again)
                if again:
                    assert await node.blocks.verify(block)
                    assert await world.get("again") == content

    run(story)


# -- pins as a state machine ----------------------------------------------------------------------------------------------


class PinStories(RuleBasedStateMachine):
    """Puts are begun, write blocks, end; the node hears of both later. What an unended put wrote is pinned, always."""

    blocks = st.sampled_from([BlockId(c * 64) for c in "abc"])
    puts = st.sampled_from(["p", "q", "r"])

    def __init__(self) -> None:
        super().__init__()
        self.pins = Pins()
        self.open: set[str] = set()
        self.written: dict[str, set[BlockId]] = {}
        self.mark: int | None = None
        self.open_at_barrier: set[str] = set()

    @rule(put=puts, block=blocks)
    def write(self, put: str, block: BlockId) -> None:
        self.open.add(put)
        self.written.setdefault(put, set()).add(block)
        self.pins.take(block, put)

    @rule(put=puts)
    def end(self, put: str) -> None:
        self.open.discard(put)
        self.written.pop(put, None)

    @rule()
    def barrier_begins(self) -> None:
        if self.mark is None:
            self.mark = self.pins.mark()
            self.open_at_barrier = set(self.open)

    @rule()
    def barrier_ends(self) -> None:
        """The machine is as it was at the barrier, or later; here at the barrier: the oldest that it can be."""
        if self.mark is not None:
            self.pins.settle(self.mark, lambda put: put in self.open_at_barrier)
            self.mark = None

    @invariant()
    def what_an_open_put_wrote_is_pinned(self) -> None:
        for put in self.open:
            for block in self.written[put]:
                assert block in self.pins

    def teardown(self) -> None:
        for put in list(self.open):
            self.end(put)
        self.pins.settle(self.pins.mark(), lambda put: False)
        assert self.pins.puts() == []
        assert self.pins._count == {}


TestPinStories = PinStories.TestCase
TestPinStories.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
