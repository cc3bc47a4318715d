# Who goes is looked up in what all have acknowledged, whichever node is asked.
from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from idunno.base.errors import NotFound
from idunno.base.ids import NodeId
from idunno.coordinator import commands as c
from idunno.coordinator.departure import Departures
from idunno.coordinator.messages import NODE_LEAVE, NODE_REMOVE, LeaveNode, RemoveDead
from idunno.coordinator.service import CoordinatorService
from idunno.wire.calls import Actor, Peer, Role
from idunno.wire.security import make_ca
from tests.unit.coordinator.fakes import FakeCluster
from tests.unit.coordinator.world import ADMIN, N1, N2, N3, SYSTEM, node

CA_PEM, CA_KEY_PEM = make_ca()


class Elector:
    def begin_leaving(self, node: NodeId) -> None: ...

    def end_leaving(self, node: NodeId) -> None: ...


def cluster() -> FakeCluster:
    made = FakeCluster()
    made.begin([N1, N2, N3])
    for name, there in made.nodes.items():
        CoordinatorService(there.coordinator, there, ca_pem=CA_PEM, ca_key_pem=lambda: CA_KEY_PEM)
        Departures(there.coordinator, cast(Any, Elector()), made.peers(name), there)
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
