# A disk is replaced by an old image of itself: what was acknowledged since is not lost with it, and it never votes again.
from __future__ import annotations

import asyncio

import pytest

from idunno.consensus.standing import Witness
from tests.simulation.machine import Machine
from tests.simulation.scenario import Cluster, make
from tests.simulation.test_stories import others, put
from tests.simulation.world import World


def left_alone(name: str) -> Cluster:
    """A cluster whose admin does not put another machine in the place of the one that is told to go."""
    cluster = make(name, clients=1)
    cluster.world.on_died.remove(cluster.admin._died)
    return cluster


async def acknowledged_by_three_of_five(cluster: Cluster) -> tuple[Machine, list[str], list[str]]:
    """An image of one disk is taken; then two machines are cut off, and what the other three acknowledge is killed with two of
    them, but for what that disk had. Returns the machine, the two dead and the two that were away."""
    world = cluster.world
    await cluster.begin(jobs=False)
    await asyncio.sleep(2)
    leader = await world.has_leader()
    first, second, *away = others(cluster, leader)
    machine = world.machine(first)
    image = machine.disk.image()
    assert await put(cluster, "before", 10_000) == 1
    await asyncio.sleep(3)
    heal = world.partition(away, [leader.name, first, second])
    cluster.faults.lasts(60.0, lambda: None, world.machines)
    await world.until(
        lambda: leader.node is not None and leader.node.machine.roster.present == 3, "they are missed", 20
    )
    for number in range(3):
        assert await put(cluster, f"since-{number}", 10_000) == 1
    cluster.clients[0].stopping = True
    await asyncio.sleep(1)
    world.kill(first, second, leader.name)
    machine.disk.restore(image)
    cluster.checkers.forget_terms(machine)
    heal()
    world.start(first)
    return machine, [leader.name, second], away


def test_an_old_image_does_not_help_those_who_were_away_to_elect() -> None:
    ends: list[tuple[str, str]] = []

    async def story(world: World) -> None:
        machine, dead, away = await acknowledged_by_three_of_five(cluster)
        world.on_died.append(lambda who, how: ends.append((who.name, how)))
        await asyncio.sleep(10)
        assert world.leader() is None  # three of five run, and one of them does not count
        assert [who for who, _ in ends] == [machine.name]
        assert "restored from an old image" in ends[0][1]
        assert f"idunno remove {machine.name}" in ends[0][1]
        world.start(machine.name)  # nor does it count when it is started again, and again
        await world.until(lambda: len(ends) == 2, "it is told so again")
        assert "restored from an old image" in ends[1][1]

        world.start(*dead)
        leader = await world.has_leader()
        assert leader.name in [*dead, *away]
        await cluster.clients[0].inside(cluster.clients[0].verify)  # all that was acknowledged is there

    cluster = left_alone("old image")
    cluster.world.run(story)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_witness_that_believes_everything_loses_what_was_acknowledged(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The mistake planted: the same story, and the checkers see it, with seeds 1 to 25."""
    monkeypatch.setattr(Witness, "judge", lambda self, node, run, claim, seen=0: self.believe(node, run))

    async def story(world: World) -> None:
        _, dead, _ = await acknowledged_by_three_of_five(cluster)
        await world.has_leader()
        world.start(*dead)
        await asyncio.sleep(20)
        await cluster.clients[0].inside(cluster.clients[0].verify)

    cluster = left_alone(f"old image {seed}")
    with pytest.raises(AssertionError, match=r"entry \d+ differs"):
        cluster.world.run(story)


def test_a_copy_of_a_running_node_is_not_heard_beside_it() -> None:
    """A backup of a disk is put in when the node runs already with a higher boot number."""
    ends: list[str] = []

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        machine = world.machine(others(cluster, await world.has_leader())[0])
        await asyncio.sleep(2)
        image = machine.disk.image()
        for _ in range(2):
            world.kill(machine.name)
            world.start(machine.name)
            await asyncio.sleep(3)
        world.kill(machine.name)
        world.on_died.append(lambda _, how: ends.append(how))
        machine.disk.restore(image)
        cluster.checkers.forget_terms(machine)
        world.start(machine.name)
        await world.until(lambda: not machine.running, "it gives up")
        assert "boot 2, but boot 3" in ends[0]

    cluster = left_alone("a copy")
    cluster.world.run(story)


def test_all_lose_power_while_one_is_restored_and_the_others_still_elect() -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        await asyncio.sleep(2)
        machine = world.machine(others(cluster, await world.has_leader())[0])
        image = machine.disk.image()
        assert await put(cluster, "since", 10_000) == 1
        await asyncio.sleep(3)
        world.lose_power()
        machine.disk.restore(image)
        cluster.checkers.forget_terms(machine)
        world.start()
        leader = await world.has_leader()
        await world.until(lambda: not machine.running, "the old image gives up")
        assert await put(cluster, "after", 10_000) == 1
        assert leader is not machine
        await cluster.clients[0].inside(cluster.clients[0].verify)

    cluster = left_alone("dark, and one restored")
    cluster.world.run(story)


def test_an_old_image_that_is_all_that_is_heard_of_a_node_can_be_removed() -> None:
    """All lose power, so that only rosters know of its newest boot; the detectors hear the old one first, and see it die."""

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        await asyncio.sleep(2)
        machine = world.machine(others(cluster, await world.has_leader())[0])
        image = machine.disk.image()
        for _ in range(2):
            world.kill(machine.name)
            world.start(machine.name)
            await asyncio.sleep(3)
        assert (await world.has_leader()).node.machine.roster.find(machine.id).boot == 3  # type: ignore[union-attr]
        names = [one.name for one in world.machines]
        for name in names:
            world.lose_power(name)
        machine.disk.restore(image)
        cluster.checkers.forget_terms(machine)
        world.start(*(name for name in names if name != machine.name))
        await asyncio.sleep(0.05)
        world.start(machine.name)
        await world.until(lambda: cluster.admin.replaced == 1, "another is in its place", 60)
        await cluster.end()

    cluster = make("removed image")
    cluster.world.run(story)
