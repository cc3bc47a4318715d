"""Snapshots as consensus asks for them: what they lack is fetched before they count, and followers hear of a new machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

import pytest

from idunno.base.errors import Exhausted, InvalidArgument, Unavailable
from idunno.base.ids import BlockId, Index, NodeId
from idunno.consensus.voters import encode_voters
from idunno.coordinator import commands as c
from idunno.coordinator.applier import Applier
from idunno.coordinator.effects import Effect, JobsReplaced, ModelChanged, RosterChanged
from idunno.coordinator.keeper import Keeper
from idunno.coordinator.machine import Machine
from idunno.coordinator.namespace import small_block
from idunno.coordinator.records import SMALL_BYTES_MAX
from tests.unit.coordinator.replay import history
from tests.unit.coordinator.world import ALICE, N1, World

T = TypeVar("T")


class Smalls:
    def __init__(self) -> None:
        self.held: set[BlockId] = set()
        self.mark()
        self.flushes = self.losses = 0
        self.full = False
        self.unreadable: set[BlockId] = set()
        """What the next flush finds so."""

    def mark(self) -> None:
        self.marked: set[BlockId] = set()

    def hold(self, block: BlockId) -> bool:
        self.marked.add(block)
        return block in self.held

    async def room(self) -> None:
        pass

    async def keep_surely(self, block: BlockId, content: bytes) -> None:
        assert small_block(content).block == block
        if self.full:
            raise Exhausted("no room")
        self.held.add(block)

    async def flush(self) -> None:
        self.flushes += 1
        self.losses += len(self.unreadable & self.held)
        self.held -= self.unreadable
        self.unreadable = set()

    async def sweep(self) -> None:
        self.held &= self.marked


class Fixture:
    def __init__(self, machine: Machine) -> None:
        self.smalls = Smalls()
        self.asked: list[tuple[list[BlockId], list[NodeId]]] = []
        self.applier = Applier(machine)
        self.keeper = Keeper(self.applier, self.smalls, self.fetch, self.offload)

    async def fetch(self, blocks: Sequence[BlockId], sources: Sequence[NodeId]) -> None:
        self.asked.append((list(blocks), list(sources)))
        self.smalls.held.update(blocks)
        await self.smalls.flush()

    async def offload(self, work: Callable[[], T]) -> T:
        return work()


async def log_of(*payloads: bytes) -> AsyncGenerator[bytes]:
    for payload in payloads:
        yield payload


def with_small_files() -> World:
    world = World()
    for number in range(3):
        block = small_block(b"content %d" % number)
        world.do(c.PutSmall(f"p{number}", f"f{number}", block.block, b"content %d" % number), ALICE)
    world.put("large")
    world.do(c.DeleteFile("f1"), ALICE)  # into the trash: its content is still wanted
    return world


def blocks(*numbers: int) -> set[BlockId]:
    return {small_block(b"content %d" % number).block for number in numbers}


def test_before_the_log_is_cut_the_store_is_flushed_and_what_it_lacks_is_fetched() -> None:
    async def story() -> None:
        fixture = Fixture(with_small_files().machine)
        fixture.smalls.held = blocks(0)
        b"".join(fixture.keeper.capture())
        await fixture.keeper.secure(log_of())
        assert fixture.smalls.flushes == 2
        [(asked, sources)] = fixture.asked
        assert set(asked) == blocks(1, 2)
        assert N1 in sources
        b"".join(fixture.keeper.capture())
        await fixture.keeper.secure(log_of())
        assert len(fixture.asked) == 1  # nothing lacks any more

    asyncio.run(story())


def test_what_the_store_could_not_take_is_kept_anew_from_the_log_before_that_is_cut() -> None:
    async def story() -> None:
        world = with_small_files()
        whole = [b"", encode_voters({N1}), *world.log]
        fixture = Fixture(world.machine)
        fixture.smalls.held = blocks(0)
        b"".join(fixture.keeper.capture())
        await fixture.keeper.secure(log_of(*whole))
        assert fixture.smalls.held == blocks(0, 1, 2)
        assert fixture.asked == []  # no other node need have them
        assert fixture.smalls.flushes == 1

        fixture.smalls.held, fixture.smalls.full = blocks(0), True
        b"".join(fixture.keeper.capture())
        with pytest.raises(Exhausted):
            await fixture.keeper.secure(log_of(*whole))  # so the log stays

    asyncio.run(story())


def test_entries_that_were_refused_keep_no_snapshot_from_counting() -> None:
    async def story() -> None:
        world = with_small_files()
        large = bytes(SMALL_BYTES_MAX + 1)
        with pytest.raises(InvalidArgument):
            world.do(c.PutSmall("p9", "f9", small_block(b"").block, large), ALICE)
        fixture = Fixture(world.machine)
        b"".join(fixture.keeper.capture())
        await fixture.keeper.secure(log_of(*reversed(world.log)))
        assert fixture.smalls.held == blocks(0, 1, 2)

    asyncio.run(story())


def test_a_content_that_is_found_unreadable_after_the_store_was_asked_for_it_is_fetched_before_anything_counts() -> (
    None
):
    async def story() -> None:
        there = with_small_files().machine
        fixture = Fixture(there)
        fixture.smalls.held = blocks(0, 1, 2)
        b"".join(fixture.keeper.capture())
        fixture.smalls.unreadable = blocks(1)
        with pytest.raises(Unavailable):
            await fixture.keeper.secure(log_of())
        b"".join(fixture.keeper.capture())
        await fixture.keeper.secure(log_of())
        assert fixture.smalls.held == blocks(0, 1, 2)

        restore = fixture.keeper.restore()
        for piece in there.capture():
            restore.feed(piece)
        await restore.finish()
        fixture.smalls.unreadable = blocks(2)
        with pytest.raises(Unavailable):
            await restore.complete(NodeId("the-leader"))
        await restore.complete(NodeId("the-leader"))
        assert fixture.smalls.held == blocks(0, 1, 2)

    asyncio.run(story())


def test_what_a_snapshot_refers_to_stays_when_it_counts_and_nothing_goes_before() -> None:
    async def story() -> None:
        world = with_small_files()
        fixture = Fixture(world.machine)
        fixture.smalls.held = blocks(0, 1, 2, 3)
        b"".join(fixture.keeper.capture())
        await fixture.keeper.secure(log_of())
        assert fixture.smalls.held == blocks(0, 1, 2, 3)
        await fixture.keeper.settled()
        assert fixture.smalls.held == blocks(0, 1, 2)  # that of the file in the trash, too
        fixture.smalls.mark()
        restore = fixture.keeper.restore()
        for piece in world.machine.capture():
            restore.feed(piece)
        assert fixture.smalls.marked == blocks(0, 1, 2)  # what a snapshot that is being taken in refers to as well

    asyncio.run(story())


def test_a_received_snapshot_is_completed_from_its_leader_first_and_then_takes_the_machines_place() -> None:
    async def story() -> None:
        there = with_small_files().machine
        here = Machine()
        fixture = Fixture(here)
        told: list[Effect] = []
        fixture.applier.subscribe(lambda index, effect: told.append(effect))
        restore = fixture.keeper.restore()
        for piece in there.capture():
            restore.feed(piece)
        await restore.finish()
        assert here.index == 0
        await restore.complete(NodeId("the-leader"))
        [(asked, sources)] = fixture.asked
        assert (set(asked), sources[0]) == (blocks(0, 1, 2), "the-leader")
        restore.install()
        assert here.digest() == there.digest()
        assert told == [RosterChanged(), JobsReplaced()]
        here.apply(Index(here.index + 1), b"")

    asyncio.run(story())


def test_followers_hear_of_every_model_that_is_or_was_and_of_all_jobs_at_once() -> None:
    old, new = history(1, 900).machine, history(2, 900).machine
    applier = Applier(old)
    told: list[Effect] = []
    applier.subscribe(lambda index, effect: told.append(effect))
    assert list(old.ledger.jobs())
    models = {model.model for machine in (old, new) for model in machine.registry.models()}
    applier.replace(new)
    assert (told[0], told[-1], len(told)) == (RosterChanged(), JobsReplaced(), len(models) + 2)
    assert {effect.model for effect in told if isinstance(effect, ModelChanged)} == models
