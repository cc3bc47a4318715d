# A node tells each new leader what it has, then what changes.
from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from idunno.base.errors import Unavailable
from idunno.base.ids import BlockId, NodeId, Term
from idunno.sdfs.blocks import BlockStore
from idunno.sdfs.inventory import Reporter
from idunno.sdfs.locator import INVENTORY_BLOCKS_MAX, Locator
from idunno.sdfs.messages import Inventory
from idunno.sdfs.placement import Candidate, unable
from tests.unit.sdfs.test_blocks import keep, opened
from tests.unit.sdfs.world import CONFIG, ToldDisk, run, until

ME, LEADER, NEXT = NodeId("a" * 16), NodeId("b" * 16), NodeId("c" * 16)


class Desk:
    """Where reports arrive; `broken` refuses them."""

    def __init__(self) -> None:
        self.pages: list[tuple[NodeId, Inventory]] = []
        self.broken = False
        self.gate: asyncio.Event | None = None

    async def report(self, leader: NodeId, page: Inventory) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.broken:
            raise Unavailable("no")
        self.pages.append((leader, page))

    def locator(self, term: int) -> Locator:
        """What a leader of that term has learnt."""
        locator = Locator(Term(term))
        for _, page in self.pages:
            if page.term == term:
                locator.report(page)
        return locator


async def reporter(desk: Desk, store: BlockStore) -> Reporter:
    made = Reporter(ME, store, desk.report, CONFIG)
    store.on_change = made.changed
    made.start()
    return made


def many(store: BlockStore, count: int) -> list[BlockId]:
    blocks = [BlockId(f"{i:064x}") for i in range(count)]
    for block in blocks:
        store._held[block] = (10, 0)
    return blocks


def test_each_leader_gets_everything_in_pages_and_then_only_changes() -> None:
    async def story() -> None:
        desk, store = Desk(), await opened(ToldDisk(capacity_bytes=10**9))
        blocks = many(store, 2 * INVENTORY_BLOCKS_MAX + 5)
        made = await reporter(desk, store)
        made.leader_changed(LEADER, Term(1))
        await until(lambda: not desk.locator(1).recovering([ME]))
        assert [len(page.added) for _, page in desk.pages] == [INVENTORY_BLOCKS_MAX, INVENTORY_BLOCKS_MAX, 5]
        assert all(desk.locator(1).holders(block) == [ME] for block in blocks[::1000])
        assert desk.pages[0][1].total_bytes == 10**9
        await keep(store, b"new")
        await until(lambda: len(desk.pages) == 4)
        assert len(desk.pages[-1][1].added) == 1
        made.leader_changed(NEXT, Term(2))
        await until(lambda: not desk.locator(2).recovering([ME]))
        assert {leader for leader, page in desk.pages if page.term == 2} == {NEXT}
        await made.stop()

    run(story)


def test_free_space_is_told_when_nothing_else_changes() -> None:
    async def story() -> None:
        desk, disk = Desk(), ToldDisk(capacity_bytes=1000)
        made = await reporter(desk, await opened(disk))
        made.leader_changed(LEADER, Term(1))
        await until(lambda: len(desk.pages) == 1)
        disk.capacity_bytes = 500
        await until(lambda: len(desk.pages) == 2)
        assert desk.pages[-1][1].free_bytes == 500
        await made.stop()

    run(story)


def test_what_changes_during_a_full_report_and_what_was_refused_is_told_later() -> None:
    async def story() -> None:
        desk, store = Desk(), await opened(ToldDisk())
        desk.gate = asyncio.Event()
        made = await reporter(desk, store)
        made.leader_changed(LEADER, Term(1))
        await asyncio.sleep(1)  # the page is written, and on its way
        await keep(store, b"meanwhile")
        desk.gate.set()
        held = store.held()[0]
        await until(lambda: desk.locator(1).holders(held) == [ME])
        desk.broken = True
        await keep(store, b"while nobody listens")
        await asyncio.sleep(5)
        desk.broken = False
        await until(lambda: all(desk.locator(1).holders(block) == [ME] for block in store.held()))
        await made.stop()

    run(story)


def test_the_wish_to_report_too_many_changes_becomes_a_full_report() -> None:
    async def story() -> None:
        desk, store = Desk(), await opened(ToldDisk())
        made = await reporter(desk, store)
        made.leader_changed(LEADER, Term(1))
        await until(lambda: len(desk.pages) == 1)
        desk.gate = asyncio.Event()
        for block in many(store, INVENTORY_BLOCKS_MAX + 10):
            made.changed(block, True)
        assert len(made._changes) < INVENTORY_BLOCKS_MAX
        desk.gate.set()
        await until(lambda: len(desk.pages) == 3)
        assert [page.first for _, page in desk.pages] == [True, True, False]
        await made.stop()

    run(story)


@pytest.mark.parametrize(("kept", "able"), [(2 * 10**9, False), (0, True)])
def test_a_leader_goes_by_what_each_node_keeps_free_itself(kept: int, able: bool) -> None:
    async def story() -> None:
        desk, store = Desk(), await opened(ToldDisk(capacity_bytes=10**9))
        made = Reporter(ME, store, desk.report, replace(CONFIG, floor_bytes=kept, floor_percent=0))
        made.start()
        made.leader_changed(LEADER, Term(1))
        await until(lambda: bool(desk.pages))
        known = desk.locator(1)
        candidate = Candidate(ME, "n1", "", "present", known.space(ME), floor_bytes=known.floor_bytes(ME))
        leaders = replace(CONFIG, floor_bytes=2 * 10**9 - kept, floor_percent=0)
        assert (unable(candidate, leaders, 1) == "") == able
        await made.stop()

    run(story)
