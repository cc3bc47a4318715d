# Who goes is looked up in what all have acknowledged, whichever node is asked.
from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from idunno.base.errors import Conflict, DeadlineExceeded, NotFound
from idunno.base.ids import NodeId
from idunno.coordinator import commands as c
from idunno.coordinator.departure import Departures, Drained
from idunno.coordinator.messages import LEFT, NODE_LEAVE, NODE_REMOVE, LeaveNode, RemoveDead
from idunno.coordinator.service import CoordinatorService
from idunno.wire.calls import Actor, Empty, Peer, Role
from idunno.wire.security import make_ca
from tests.unit.coordinator.fakes import FakeCall, FakeCluster, FakeNode
from tests.unit.coordinator.world import ADMIN, N1, N2, N3, SYSTEM, node

CA_PEM, CA_KEY_PEM = make_ca()


class Elector:
    def __init__(self, told: list[str]) -> None:
        self._told = told

    def begin_leaving(self, node: NodeId) -> None:
        self._told.append("is not to vote")

    def end_leaving(self, node: NodeId) -> None: ...


def cluster(told: list[str] | None = None, drained: Drained | None = None) -> FakeCluster:
    """`told` hears what the elector does; `drained` moves copies."""
    made = FakeCluster()
    made.begin([N1, N2, N3])
    for name, there in made.nodes.items():
        CoordinatorService(there.coordinator, there, ca_pem=CA_PEM, ca_key_pem=lambda: CA_KEY_PEM)
        departures = Departures(
            there.coordinator, cast(Any, Elector(told if told is not None else [])), made.peers(name), there
        )
        departures.drained = drained or departures.drained
    made.lead(N1)
    return made


def test_a_node_that_is_behind_does_not_say_that_a_newcomer_does_not_exist() -> None:
    async def story() -> None:
        world, newcomer = cluster(), node(4)
        await world.nodes[N1].coordinator.propose(c.AddNode(newcomer, "t-node"), actor=SYSTEM, timeout_s=5)
        behind = world.nodes[N3]
        assert behind.driver.machine.roster.find(newcomer.node) is None
        gone = await behind.ask(NODE_REMOVE, RemoveDead(newcomer.name, "r1"), ADMIN)
        assert (gone.id, gone.text) == (newcomer.node, "its certificate no longer works")
        with pytest.raises(NotFound):
            await behind.ask(NODE_REMOVE, RemoveDead("nobody", "r2"), ADMIN)

    asyncio.run(asyncio.wait_for(story(), 20))


def test_what_a_node_that_is_behind_passes_on_twice_is_done_once_and_said_twice() -> None:
    async def story() -> None:
        world, newcomer = cluster(), node(4)
        await world.nodes[N1].coordinator.propose(c.AddNode(newcomer, "t-node"), actor=SYSTEM, timeout_s=5)
        world.down.add(newcomer.node)  # it does not hear that it is out
        gone = await world.nodes[N3].ask(NODE_LEAVE, LeaveNode(newcomer.name, "r1"), ADMIN)
        assert "safe to switch it off" in gone.text
        passed_on = Peer(Actor(N3, Role.NODE), node=N3)
        again = await world.nodes[N1].ask(NODE_LEAVE, LeaveNode(newcomer.node, "r1"), ADMIN, passed_on)
        assert again.text == "it is out of the cluster"

    asyncio.run(asyncio.wait_for(story(), 20))


def test_a_node_whose_copies_cannot_be_moved_keeps_its_vote_and_the_reason_is_told_once() -> None:
    async def refuse(node: NodeId) -> str:
        story.append("asked to move")
        raise Conflict("3 blocks need 4 other nodes that are present; away: n3")

    story: list[str] = []

    async def run() -> None:
        world = cluster(story, refuse)
        with pytest.raises(Conflict, match="away: n3"):
            await world.nodes[N3].ask(NODE_LEAVE, LeaveNode(N2, "r1"), ADMIN)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert story == ["asked to move"]


def test_copies_are_moved_before_the_vote_goes() -> None:
    async def move(node: NodeId) -> str:
        told.append("moved")
        return "all is elsewhere"

    told: list[str] = []

    async def run() -> None:
        world = cluster(told, move)
        newcomer = node(4)
        await world.nodes[N1].coordinator.propose(c.AddNode(newcomer, "t-node"), actor=SYSTEM, timeout_s=5)
        world.down.add(newcomer.node)
        gone = await world.nodes[N1].ask(NODE_LEAVE, LeaveNode(newcomer.node, "r1"), ADMIN)
        assert gone.text == "all is elsewhere; it is safe to switch it off"
        assert told == ["moved", "is not to vote", "moved"], "what came meanwhile is looked at too"

    asyncio.run(asyncio.wait_for(run(), 20))


def test_what_takes_too_long_is_named_before_whoever_asked_has_given_up() -> None:
    async def never(node: NodeId) -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async def run() -> None:
        there = cluster().nodes[N1]
        departures = Departures(there.coordinator, cast(Any, Elector([])), cast(Any, None), there, drained=never)
        async with asyncio.timeout(0.2):
            with pytest.raises(DeadlineExceeded, match="still holds copies that are nowhere else"):
                await departures._go(N2, "r1", ADMIN, 0.2, leave=True)

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_node_that_asked_for_its_own_leaving_hears_of_it_though_its_call_is_cut_off_with_the_last_step() -> None:
    async def run() -> None:
        world, newcomer = cluster(), node(4)
        await world.nodes[N1].coordinator.propose(c.AddNode(newcomer, "t-node"), actor=SYSTEM, timeout_s=5)
        world.nodes[newcomer.node] = there = FakeNode(world, newcomer.node)
        leader, cut, told, commit = world.nodes[N1], asyncio.Event(), asyncio.Event(), world.commit

        async def left(call: FakeCall) -> Empty:
            await cut.wait()  # a word to another machine takes its time
            told.set()
            return Empty()

        def cut_off(payload: bytes, at: NodeId) -> Any:
            """As the server does: with the entry its connection is cut, and with that its call."""
            answer = commit(payload, at)
            asking.cancel()
            return answer

        there.register(LEFT, left)
        world.commit = cut_off  # type: ignore[method-assign]
        passed_on = Peer(Actor(newcomer.node, Role.NODE), node=newcomer.node)
        asking = asyncio.ensure_future(leader.ask(NODE_LEAVE, LeaveNode(newcomer.node, "r1"), ADMIN, passed_on))
        with pytest.raises(asyncio.CancelledError):
            await asking
        cut.set()
        await told.wait()
        assert leader.driver.machine.roster.find(newcomer.node) is None

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_node_that_is_told_that_it_has_left_answers_whoever_asked_it_to() -> None:
    async def run() -> None:
        world = cluster()
        departures = Departures(world.nodes[N3].coordinator, cast(Any, Elector([])), world.peers(N3), world.nodes[N3])
        asked = asyncio.Event()

        async def never(call: object) -> None:  # the leader's answer does not come
            asked.set()
            await asyncio.Event().wait()

        world.nodes[N1].handlers[NODE_LEAVE.name] = never
        asking = asyncio.ensure_future(world.nodes[N3].ask(NODE_LEAVE, LeaveNode(N3, "r1"), ADMIN))
        await asked.wait()
        departures.has_left()
        assert (await asking).text.endswith("it is safe to switch it off")

    asyncio.run(asyncio.wait_for(run(), 20))
