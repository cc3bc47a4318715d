# Releases that know different machine versions in one cluster, and machines that differ where they must not.
from __future__ import annotations

import asyncio
import contextlib

import pytest

from idunno.base.errors import Conflict, Exhausted, IdunnoError
from idunno.base.ids import NodeId
from idunno.client.base import new_request
from idunno.consensus.messages import TimeoutNow
from idunno.coordinator import trash
from idunno.coordinator.commands import AddUser, Command, RaiseVersion, RevokeUser, SetRetention
from idunno.coordinator.messages import UpgradeAnswer
from idunno.coordinator.records import UserRecord
from idunno.node.node import Node
from idunno.wire.calls import Actor, Role
from tests.simulation.machine import Machine
from tests.simulation.scenario import Cluster, make
from tests.simulation.test_stories import others, put
from tests.simulation.world import World, is_leader


def node_of(machine: Machine) -> Node:
    assert machine.node is not None
    return machine.node


async def lead(world: World, machine: Machine) -> None:
    """Leadership goes to this one, as if the leader had handed it over (which chooses by itself)."""
    node = node_of(machine)

    async def stand() -> None:
        if node.driver.leader is not None:
            node.driver.receive(node.driver.leader, TimeoutNow(node.driver.term))

    while await world.has_leader() is not machine:
        await world.inside(machine.name, stand)
        await asyncio.sleep(0.3)


async def look(world: World) -> UpgradeAnswer:
    leader = await world.has_leader()
    node = node_of(leader)
    return await world.inside(leader.name, lambda: node.upgrades.look(5.0))


async def raise_version(world: World) -> UpgradeAnswer:
    leader = await world.has_leader()
    node = node_of(leader)

    async def work() -> UpgradeAnswer:
        found = await node.upgrades.look(5.0)
        return await node.upgrades._raise(found, Actor(NodeId("root"), Role.ADMIN), "", 5.0)

    return await world.inside(leader.name, work)


async def compare(world: World) -> bool:
    leader = await world.has_leader()
    node = node_of(leader)
    return await world.inside(leader.name, node.digests.check)


async def revoke_and_let_in(world: World) -> bytes:
    """A user is revoked and comes again, and an owner wants one retention rule too many. What is then his fingerprint."""
    leader = await world.has_leader()
    node = node_of(leader)
    system, admin = Actor(node.me, Role.NODE), Actor(NodeId("root"), Role.ADMIN)
    token = next(t.token for t in node.machine.roster.tokens() if t.role == Role.ADMIN.value)
    steps: list[tuple[Command, Actor]] = [
        (AddUser(UserRecord("eve", "admin", bytes([7]) * 32), token), system),
        (RevokeUser("eve"), admin),
        (AddUser(UserRecord("eve", "admin", bytes([8]) * 32), token), system),
        *((SetRetention(f"{i}/", 5, 0), Actor("eve", Role.USER)) for i in range(3)),
    ]

    async def work() -> None:
        for command, actor in steps:
            with contextlib.suppress(Conflict, Exhausted):
                await node.coordinator.propose(command, actor=actor, request=new_request(), timeout_s=10.0)

    await world.inside(leader.name, work)
    eve = node.machine.roster.user("eve")
    assert eve is not None
    return eve.fingerprint


async def restart(world: World, machine: Machine, supports: int) -> None:
    await world.stop(machine.name)
    machine.supports = supports
    world.start(machine.name)
    await world.until(
        lambda: machine.node is not None and hasattr(machine.node, "driver") and machine.node.driver.leader is not None,
        f"{machine.name} is back",
    )


def test_a_cluster_is_upgraded_node_by_node_and_back_and_each_side_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old, old and new with each leading, new, one back to old, new again; then the version is raised."""
    monkeypatch.setattr(trash, "RULES_OF_ONE_MAX", 2)

    async def story(world: World) -> None:
        for machine in world.machines:
            machine.supports = 1
        await cluster.begin(jobs=False)
        number = 0

        async def everybody_leads() -> None:
            nonlocal number
            for machine in world.machines:
                await lead(world, machine)
                number += 1
                assert await put(cluster, f"file-{number}", 5_000) == 1

        for machine in world.machines[:2]:
            await restart(world, machine, 2)
        await everybody_leads()
        assert await revoke_and_let_in(world) == bytes([8]) * 32  # as the first release does
        found = await look(world)
        assert (found.version, found.next, found.ready) == (1, 2, False)
        assert [row.name for row in found.nodes if row.why] == ["n3"]
        with pytest.raises(Conflict, match=r"n3: idunno .* knows machine version 1: upgrade it"):
            await raise_version(world)

        await restart(world, world.machines[0], 1)  # somebody changes his mind
        await everybody_leads()
        for machine in (world.machines[0], world.machines[2]):
            await restart(world, machine, 2)
        world.kill("n1")
        found = await look(world)
        assert not found.ready
        assert "it does not answer" in found.why
        world.start("n1")
        await world.until(lambda: world.machines[0].serving, "it is back")
        await asyncio.sleep(3)
        assert (await look(world)).ready
        assert (await raise_version(world)).raised
        assert (await look(world)).version == 2
        assert await compare(world)
        await everybody_leads()
        assert await revoke_and_let_in(world) == b""  # the name stays taken
        assert await compare(world)
        await asyncio.sleep(2)
        assert all(node_of(m).driver.problem is None for m in world.machines)
        await cluster.end()

    cluster = make("node by node", nodes=3, clients=1, machine_version=1)
    cluster.world.run(story)


def test_a_node_that_meets_what_it_does_not_know_stops_and_says_so_and_the_others_go_on() -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        old = world.machine(others(cluster, await world.has_leader())[0])
        await restart(world, old, 1)  # nobody asked whether all are ready
        leader = await world.has_leader()
        node = node_of(leader)
        command = RaiseVersion(2)

        async def work() -> None:
            actor = Actor(NodeId("root"), Role.ADMIN)
            await node.coordinator.propose(command, actor=actor, request="r", timeout_s=10.0)

        await world.inside(leader.name, work)
        assert await put(cluster, "after", 5_000) == 1
        await world.until(lambda: node_of(old).driver.problem is not None, "it stops")
        problem = str(node_of(old).driver.problem)
        assert "needs machine version 2, this idunno knows up to 1: upgrade idunno on this node" in problem
        stopped = node_of(old).driver.applied_index
        world.kill(leader.name)  # five of six are left, and one of those has no copies
        assert await put(cluster, "without it", 5_000) == 1
        assert node_of(old).driver.applied_index == stopped
        with pytest.raises(IdunnoError, match="upgrade idunno on this node"):
            await world.inside(old.name, lambda: node_of(old).coordinator.read(5.0))

        await restart_killed(world, old, 2)
        world.start(leader.name)
        await world.until(cluster.one, "one cluster", 60)

    cluster = make("too old", nodes=6, clients=1, machine_version=1)
    cluster.world.run(story)


async def restart_killed(world: World, machine: Machine, supports: int) -> None:
    world.kill(machine.name)
    machine.supports = supports
    world.start(machine.name)


@pytest.mark.parametrize("who", ["a follower", "the leader"])
def test_a_machine_that_differs_is_found_out_and_goes_into_quarantine(who: str) -> None:
    """The divergence is planted: one machine's clock is a millisecond off."""
    ends: list[str] = []

    async def story(world: World) -> None:
        world.start()
        leader = await world.has_leader()
        await world.add_admin()
        assert await compare(world)
        await asyncio.sleep(2)
        assert all(m.node is not None and m.node.driver.problem is None for m in world.machines)

        bad = leader if who == "the leader" else world.machine(others(Just(world), leader)[0])
        node = node_of(bad)
        node.machine.now_ms += 60_000
        with contextlib.suppress(IdunnoError):  # a leader that differs ends its own leadership by it
            assert await compare(world)
        await world.until(lambda: node.driver.problem is not None, "it is in quarantine", 10)
        assert "differs from the others'" in str(node.driver.problem)
        assert f"idunno remove {bad.name}" in str(node.driver.problem)
        stopped = node.driver.applied_index

        others_lead = await world_leader_but(world, bad)
        good = node_of(others_lead)
        machine = await world.inside(others_lead.name, lambda: good.coordinator.read(10.0))
        assert machine.roster.nodes()
        assert await compare(world)
        assert node.driver.applied_index == stopped < good.machine.index
        with pytest.raises(IdunnoError, match="differs from the others"):
            await world.inside(bad.name, lambda: node.coordinator.read(5.0))

        await asyncio.sleep(2)
        world.on_died.append(lambda machine, how: ends.append(how))
        world.kill(bad.name)
        world.start(bad.name)
        await world.until(lambda: len(ends) == 2, "it does not start with that log")

    world = World(f"quarantine of {who}", 5)
    world.run(story)
    assert "differs from the others'" in ends[1]


class Just(Cluster):
    """A world without checkers: they would find the divergence before the product does."""

    def __init__(self, world: World) -> None:
        self.world = world


async def world_leader_but(world: World, bad: Machine) -> Machine:
    await world.until(
        lambda: [m for m in world.machines if m is not bad and m.node is not None and is_leader(m.node)],
        "a good leader",
    )
    return next(m for m in world.machines if m is not bad and m.node is not None and is_leader(m.node))
