# The leader's part in who votes: a step is taken only if it is still right when all is prepared for it.
from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Literal

from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.driver import FollowerView
from idunno.coordinator.elector import Elector
from tests.unit.coordinator.world import World

LOOK_S = 10.0
"""A look takes a millisecond: longer than this is one that never ends."""
WELL = FollowerView(Index(9), 100, installing=False)


class Driver:
    """Leads alone; the others have all of its log."""

    def __init__(self, me: NodeId, others: list[NodeId]) -> None:
        self.is_leader, self.term, self.last_index = True, Term(3), Index(9)
        self.voters = frozenset({me})
        self.seen = dict.fromkeys(others, WELL)
        self.changes: list[frozenset[NodeId]] = []

    def followers(self) -> dict[NodeId, FollowerView]:
        return self.seen

    async def change_voters(self, voters: frozenset[NodeId], timeout_s: float) -> Index:
        self.voters = frozenset(voters)
        self.changes.append(self.voters)
        return Index(10)


class Node:
    """Takes the CA's key; `dies` while it does."""

    def __init__(self, driver: Driver, name: NodeId, dies: bool) -> None:
        self.driver, self.name, self.dies = driver, name, dies

    async def call(self, *_: Any, **__: Any) -> None:
        if self.dies:
            self.driver.seen[self.name] = replace(WELL, silent_ms=2_000)


class Peers:
    def __init__(self, driver: Driver, dying: set[NodeId]) -> None:
        self.driver, self.dying, self.asked = driver, dying, list[NodeId]()

    def to(self, node: NodeId) -> Node:
        self.asked.append(node)
        return Node(self.driver, node, node in self.dying)


class Wake(asyncio.Event):
    """What the elector waits for between two looks, and so tells when a look is over."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = asyncio.Event()

    async def wait(self) -> Literal[True]:
        self.looked.set()
        return await super().wait()

    async def look(self) -> None:
        """Have the next look taken at once, and wait until it is over."""
        self.looked.clear()
        self.set()
        async with asyncio.timeout(LOOK_S):
            await self.looked.wait()


class Coordinator:
    def __init__(self, me: NodeId) -> None:
        self.machine, self.me = World().machine, me


async def lead(dying: int) -> tuple[Driver, Peers]:
    """For a look that only sees how far the log is, and three more; `dying` of the others die while they are given the key."""
    me, *others = [record.node for record in World().machine.roster.nodes()]
    driver = Driver(me, others)
    peers = Peers(driver, set(others[:dying]))
    coordinator: Any = Coordinator(me)
    given: Any = driver
    asked: Any = peers
    elector = Elector(coordinator, given, asked, ca_key_pem=lambda: b"key", new_key=lambda: bytes(32), silent_s=60.0)
    elector._wake = wake = Wake()
    elector.role_changed(True, Term(3))
    for _ in range(4):
        await wake.look()
    await elector.stop()
    return driver, peers


def test_who_dies_while_it_is_given_the_key_does_not_become_a_voter() -> None:
    """With two voters, one of them dead, nothing could be committed any more."""
    driver, peers = asyncio.run(lead(dying=9))
    assert peers.asked
    assert driver.changes == []


def test_who_lives_becomes_one_and_then_the_next() -> None:
    driver, _ = asyncio.run(lead(dying=0))
    assert [len(voters) for voters in driver.changes][:2] == [2, 3]
