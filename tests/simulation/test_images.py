# A disk is replaced by an old image of itself: what was acknowledged since is not lost with it, and it votes again only when it
# has all that again.
from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from idunno.base.ids import Term
from idunno.consensus.driver import RaftDriver
from idunno.consensus.messages import VoteAnswer
from idunno.consensus.standing import Witness
from tests.simulation.disk import Inode
from tests.simulation.machine import Machine
from tests.simulation.network import Quality
from tests.simulation.raftcheck import RaftChecks
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


def problem(machine: Machine) -> str:
    """What its status says that it waits for; "" once it takes part."""
    node = machine.node
    if node is None or not hasattr(node, "vouching"):
        return "starts"
    return node.driver.problem or ("" if node.vouching.proved.is_set() else "starts")


async def is_back(world: World, machine: Machine) -> None:
    """It takes part again, by itself, and all hear it under the boot number that it has now."""

    def heard() -> bool:
        leader = world.leader()
        if leader is None or leader.node is None or problem(machine) != "":
            return False
        record = leader.node.machine.roster.find(machine.id)
        return record is not None and (record.boot, record.presence) == (machine.boot, "present")

    await world.until(heard, f"{machine.name} takes part again", 40)


def test_an_old_image_does_not_help_those_who_were_away_to_elect_and_comes_back_with_what_it_lost() -> None:
    async def story(world: World) -> None:
        machine, dead, away = await acknowledged_by_three_of_five(cluster)
        await asyncio.sleep(10)
        assert world.leader() is None  # three of five run, and one of them does not count
        for _ in range(2):  # nor does it count when it is started again, and again
            assert "restored from an old image" in problem(machine)
            assert "it waits for a leader, elected by a majority of the voters without it" in problem(machine)
            world.kill(machine.name)
            world.start(machine.name)
            await asyncio.sleep(5)
            assert world.leader() is None

        world.start(*dead)
        leader = await world.has_leader()
        assert leader.name in [*dead, *away]
        await is_back(world, machine)
        await cluster.clients[0].inside(cluster.clients[0].verify)  # all that was acknowledged is there

        world.kill(*[name for name in (*dead, *away) if name != leader.name][:1], leader.name)
        assert (await world.has_leader()) is not leader  # with its vote, for two of five are gone
        await cluster.clients[0].inside(cluster.clients[0].verify)

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


def test_an_old_image_takes_a_boot_number_above_all_that_were_seen() -> None:
    """A backup of a disk is put in when the node has run already with higher boot numbers."""

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        machine = world.machine(others(cluster, await world.has_leader())[0])
        await asyncio.sleep(2)
        image = machine.disk.image()
        for _ in range(4):
            world.kill(machine.name)
            world.start(machine.name)
            await asyncio.sleep(3)
        world.kill(machine.name)
        machine.disk.restore(image)
        cluster.checkers.forget_terms(machine)
        world.start(machine.name)
        await world.until(lambda: "boot 2, but boot 5" in problem(machine), "it is refused")
        await is_back(world, machine)
        assert machine.boot == 6
        await cluster.end()

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
        assert await put(cluster, "after", 10_000) == 1
        assert leader is not machine
        await is_back(world, machine)
        await cluster.clients[0].inside(cluster.clients[0].verify)

    cluster = left_alone("dark, and one restored")
    cluster.world.run(story)


def test_an_old_image_that_is_all_that_is_heard_of_a_node_comes_back() -> None:
    """All lose power, so that only rosters know of its newest boot; the detectors hear the old one first."""

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
        await is_back(world, machine)
        await cluster.end()

    cluster = make("removed image")
    cluster.world.run(story)


def put_back(cluster: Cluster, machine: Machine, image: dict[str, Inode]) -> None:
    cluster.world.kill(machine.name)
    machine.disk.restore(image)
    cluster.checkers.forget_terms(machine)
    cluster.world.start(machine.name)


def test_one_of_three_comes_back_and_then_one_of_the_others_may_be_lost() -> None:
    """Without it there are two of three voters, and none may go: it stays a voter that says nothing until it is whole."""

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        leader = await world.has_leader()
        machine, other = (world.machine(name) for name in others(cluster, leader))
        image = machine.disk.image()
        for number in range(60):  # more than a snapshot leaves in the log
            assert await put(cluster, f"since-{number}", 2_000) == 1
        await asyncio.sleep(3)
        put_back(cluster, machine, image)
        await is_back(world, machine)
        assert leader.node is not None
        assert leader.node.driver.voters == {one.id for one in world.machines}
        world.kill(other.name)
        assert await put(cluster, "with it", 2_000) == 1
        world.start(other.name)
        await cluster.end()

    cluster = make("one of three", 3)
    cluster.world.run(story)


def test_a_leader_with_an_old_image_and_another_come_back_at_once() -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        leader = await world.has_leader()
        machines = [leader, world.machine(others(cluster, leader)[0])]
        images = [machine.disk.image() for machine in machines]
        for number in range(10):
            assert await put(cluster, f"since-{number}", 10_000) == 1
        await asyncio.sleep(3)
        world.kill(*(machine.name for machine in machines))
        for machine, image in zip(machines, images, strict=True):
            machine.disk.restore(image)
            cluster.checkers.forget_terms(machine)
            world.start(machine.name)
        for machine in machines:
            await is_back(world, machine)
        whole = [one.name for one in world.machines if one not in machines]
        world.kill(*whole[:2])
        assert await put(cluster, "with both of them", 10_000) == 1
        world.start(*whole[:2])
        await cluster.end()

    cluster = make("two at once")
    cluster.world.run(story)


def test_old_images_of_most_voters_come_back_by_no_way_round_a_majority() -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        await asyncio.sleep(2)
        leader = await world.has_leader()
        machines = [world.machine(name) for name in others(cluster, leader)[:3]]
        images = [machine.disk.image() for machine in machines]
        assert await put(cluster, "since", 10_000) == 1
        await asyncio.sleep(3)
        cluster.clients[0].stopping = True
        world.kill(*(one.name for one in world.machines))
        for machine, image in zip(machines, images, strict=True):
            machine.disk.restore(image)
            cluster.checkers.forget_terms(machine)
        world.start()
        await asyncio.sleep(60)
        assert world.leader() is None
        for machine in machines:
            assert "it waits for a leader" in problem(machine)
            assert "idunno recover" in problem(machine)

    cluster = left_alone("most are old")
    cluster.world.run(story)


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_step_of_coming_back_it_comes_back_all_the_same(seed: int) -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        machine = world.machine(others(cluster, await world.has_leader())[0])
        image = machine.disk.image()
        for number in range(30):
            assert await put(cluster, f"since-{number}", 2_000) == 1
        await asyncio.sleep(3)
        put_back(cluster, machine, image)
        for _ in range(25):
            await asyncio.sleep(0.05 + rng.random() * 0.5)
            if machine.running:
                (world.kill if rng.random() < 0.5 else world.lose_power)(machine.name)
            world.start(machine.name)
            if rng.random() < 0.2:
                leader = await world.has_leader()
                world.kill(leader.name)
                world.start(leader.name)
        await is_back(world, machine)
        await cluster.end()

    rng = random.Random(seed)
    cluster = make(f"steps {seed}", 3)
    cluster.world.run(story)


def test_who_stood_in_a_term_that_nobody_took_up_comes_back_above_it() -> None:
    """A witness knows of that term, and refuses every log of an earlier one; the leader has not heard of it."""

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        leader = await world.has_leader()
        machine, other = (world.machine(name) for name in others(cluster, leader))
        image = machine.disk.image()
        assert await put(cluster, "since", 2_000) == 1
        heal = world.partition([machine.name], [leader.name])
        assert machine.node is not None
        assert other.node is not None
        driver, witness = machine.node.driver, other.node.vouching.witness
        await world.until(lambda: driver.leader is None, "it misses the leader", 10)
        term = Term(driver.term + 1)

        async def stands() -> None:
            driver.receive(
                other.id, VoteAnswer(term, True, pre=True)
            )  # as if that one missed the leader too, for a moment

        await world.inside(machine.name, stands)
        await world.until(lambda: witness.mark(machine.id).term == term, "its candidacy is heard", 5)
        put_back(cluster, machine, image)
        heal()
        await is_back(world, machine)
        assert machine.boot <= 6
        await cluster.end()

    cluster = make("a term of its own", 3)
    cluster.world.run(story)


class Storm:
    """Disks of any nodes are set back, again and again, while others die, hang and are cut off: never more than may be away."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self.cluster, self.world, self.rng = cluster, cluster.world, rng
        self.images: dict[str, dict[str, Inode]] = {}
        self.frozen: Machine | None = None
        self.heal: Callable[[], None] | None = None

    def may_go(self, machine: Machine) -> bool:
        away = {one.name for one in self.world.machines if not one.running or one is self.frozen or problem(one)}
        return machine is not self.frozen and len(away | {machine.name}) <= (len(self.world.machines) - 1) // 2

    def step(self) -> None:
        world, dice, machine = self.world, self.rng.random(), self.rng.choice(self.world.machines)
        if dice < 0.25:
            self.images[machine.name] = machine.disk.image()
        elif dice < 0.55:
            if machine.name in self.images and self.may_go(machine):
                if machine.running:
                    world.kill(machine.name)
                machine.disk.restore(self.images[machine.name])
                self.cluster.checkers.forget_terms(machine)
                world.start(machine.name)
        elif dice < 0.65:
            if machine.running and self.may_go(machine):
                (world.kill if self.rng.random() < 0.5 else world.lose_power)(machine.name)
        elif dice < 0.8:
            world.start(*[one.name for one in world.machines if not one.running])
        elif dice < 0.9:
            if self.frozen is None and machine.running and self.may_go(machine):
                world.freeze(machine.name)
                self.frozen = machine
            else:
                self.mend(freeze_too=True)
        elif self.heal is None:
            self.heal = world.partition([machine.name], [one.name for one in world.machines if one is not machine])
        else:
            self.mend()

    def mend(self, *, freeze_too: bool = False) -> None:
        if self.heal is not None:
            self.heal()
            self.heal = None
        if freeze_too and self.frozen is not None:
            self.world.thaw(self.frozen.name)
            self.frozen = None


@pytest.mark.parametrize(("seed", "nodes"), [(0, 3), (1, 3), (2, 5), (3, 5)])
def test_disks_that_are_set_back_again_and_again_lose_nothing_and_all_come_back(seed: int, nodes: int) -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        cluster.faults.lasts(300.0, lambda: None, world.machines)
        for number in range(5):
            assert await put(cluster, f"before-{number}", 2_000) == 1
        for _ in range(30):
            await asyncio.sleep(0.05 + rng.random() * rng.choice([0.5, 2.0, 5.0]))
            storm.step()
        storm.mend(freeze_too=True)
        world.start(*[one.name for one in world.machines if not one.running])
        for machine in world.machines:
            await is_back(world, machine)
        await cluster.end()

    rng = random.Random(seed)
    cluster = make(f"set back {seed}", nodes)
    storm = Storm(cluster, rng)
    cluster.world.run(story)


async def set_back_while_an_answer_waits(cluster: Cluster, *, told: bool, late_s: float = 0.0) -> None:
    """Three of five have an entry, and its answer waits for a fourth copy: one of the three is set back before the fourth has
    it. `told`: and the leader has judged its new process by then. `late_s`: how long what that one says of it is on its way."""
    world = cluster.world
    await cluster.begin(jobs=False)
    await asyncio.sleep(2)
    leader = await world.has_leader()
    first, _, third, fourth = others(cluster, leader)
    machine = world.machine(first)
    image = machine.disk.image()
    assert await put(cluster, "before", 10_000) == 1
    for away, stalled_s in ((third, 0.3), (fourth, 1.0)):
        world.machine(away).disk.stalled_until = world.scheduler.now + stalled_s
    node, client = leader.node, cluster.clients[0]
    assert node is not None
    index, wire = node.driver._core.terms.last + 1, world.network.wire
    if late_s:
        slow = (machine.address, world.machine(leader.name).address)
        world.network.wire = lambda *ends: Quality(delay_s=late_s) if ends == slow else wire(*ends)  # type: ignore[method-assign]
    waits = asyncio.ensure_future(client.inside(lambda: client._delete_one("before")))
    drivers = [found.node.driver for found in world.machines if found.node is not None]
    await world.until(lambda: sum(driver._core.synced >= index for driver in drivers) == 3, "it is on three", 0.2)
    world.kill(first)
    world.network.wire = wire  # type: ignore[method-assign]
    machine.disk.restore(image)
    cluster.checkers.forget_terms(machine)
    if not told:
        world.partition([first], others(cluster, machine))
    world.start(first)
    await world.until(
        lambda: machine.boot == (3 if told else 2), "it is not heard, and begins again" if told else "it runs", 0.2
    )
    if told:
        world.partition([first], others(cluster, machine))  # or it would have all that again in a moment
    await asyncio.wait_for(waits, 20)
    client.stopping = True


@pytest.mark.parametrize(("told", "late_s"), [(False, 0.0), (True, 0.0), (True, 0.5)])
def test_a_copy_that_the_leader_cannot_know_to_be_gone_counts_and_no_other(told: bool, late_s: float) -> None:
    async def story(world: World) -> None:
        await set_back_while_an_answer_waits(cluster, told=told, late_s=late_s)

    cluster = left_alone(f"set back, told {told}")
    RaftChecks(cluster.world)
    cluster.world.run(story)


def test_a_leader_that_counts_on_an_old_image_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake planted: the same story, and the leader hears of it and goes on as before."""
    monkeypatch.setattr(RaftDriver, "doubt", lambda self, node: None)

    async def story(world: World) -> None:
        await set_back_while_an_answer_waits(cluster, told=True)

    cluster = left_alone("set back, told True")
    RaftChecks(cluster.world)
    with pytest.raises(AssertionError, match="with 4 copies of 4, and it is synced on 3"):
        cluster.world.run(story)
