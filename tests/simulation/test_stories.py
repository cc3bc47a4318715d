# Named stories: one thing goes wrong, and what a user is promised then.
from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from idunno.base.errors import Conflict, Corrupt, IdunnoError, NoQuorum, Unavailable, Unconfirmed
from idunno.coordinator.messages import MEMBERS, STATUS, Members, Status
from idunno.grep.messages import QUERY, Line, LineBatch, Query, QueryAnswer
from idunno.sdfs.client import source_of
from idunno.wire.calls import Actor, Peer, Role
from idunno.wire.local import LocalCaller
from tests.simulation.joining import grow, join
from tests.simulation.machine import PORT, Machine
from tests.simulation.scenario import Cluster, make
from tests.simulation.world import World, is_leader

Story = Callable[[Cluster], Coroutine[Any, Any, None]]


def tell(name: str, story: Story, *, nodes: int = 5, jobs: bool = False, clients: int = 1) -> Cluster:
    """A cluster whose clients work; `story` happens; all is mended and every promise checked."""
    cluster = make(name, nodes, clients=clients)

    async def whole(world: World) -> None:
        await cluster.begin(jobs=jobs)
        await asyncio.sleep(1.0)
        await story(cluster)
        await cluster.end()

    cluster.world.run(whole, limit_s=900)
    return cluster


async def put(cluster: Cluster, name: str, size: int, timeout_s: float = 20.0) -> int:
    """The version of a new file; noted among the promises."""
    client = cluster.clients[0]
    content = client.rng.randbytes(size)
    before = len(cluster.promises.files[name].acknowledged) if name in cluster.promises.files else 0
    await client.inside(lambda: client.put(name, content))
    versions = cluster.promises.files[name].acknowledged
    return max(versions) if len(versions) > before else 0


def others(cluster: Cluster, machine: Machine) -> list[str]:
    return [other.name for other in cluster.world.machines if other is not machine]


def test_the_leader_dies_during_a_put_and_the_put_succeeds() -> None:
    async def story(cluster: Cluster) -> None:
        leader = await cluster.world.has_leader()
        writing = asyncio.ensure_future(put(cluster, "large", 3_000_000))
        await cluster.world.until(lambda: cluster.promises.puts_under_way, "a put is under way")
        await asyncio.sleep(0.01)
        cluster.world.kill(leader.name)
        assert await writing == 1
        assert cluster.world.leader() is not leader

    tell("leader dies during a put", story)


def test_seven_nodes_lose_three_at_once_and_go_on_after_an_election() -> None:
    async def story(cluster: Cluster) -> None:
        world = cluster.world
        leader = await world.has_leader()
        assert await put(cluster, "before", 100_000) == 1
        dying = [leader.name, *others(cluster, leader)[:2]]
        when = world.scheduler.now
        world.lose_power(*dying)
        assert await put(cluster, "after", 100_000) == 1
        assert world.scheduler.now - when < 15
        await asyncio.sleep(5)

    tell("three of seven", story, nodes=7, jobs=True)


def test_a_partition_lets_the_majority_write_and_the_minority_promise_nothing() -> None:
    async def story(cluster: Cluster) -> None:
        world = cluster.world
        leader = await world.has_leader()
        minority = [leader.name, others(cluster, leader)[0]]
        majority = [name for name in others(cluster, leader) if name not in minority]
        heal = world.partition(minority, majority)
        cluster.faults.lasts(20.0, heal, [])
        await world.until(
            lambda: any(is_leader(m.node) for m in world.machines if m.name in majority and m.node is not None),
            "the majority elects a leader",
            10,
        )
        await world.until(lambda: leader.node is not None and not is_leader(leader.node), "the old one steps down", 10)
        node = leader.node
        assert node is not None
        with pytest.raises((NoQuorum, Unconfirmed)):
            await world.inside(leader.name, lambda: node.coordinator.read(3.0))

    tell("partition", story)


def test_a_frozen_leader_is_replaced_and_finds_itself_deposed() -> None:
    async def story(cluster: Cluster) -> None:
        world = cluster.world
        leader = await world.has_leader()
        cluster.faults.lasts(8.0, lambda: world.thaw(leader.name), [leader])
        world.freeze(leader.name)
        await world.until(lambda: world.leader() not in (None, leader), "another leader", 5)
        assert await put(cluster, "meanwhile", 50) == 1
        await asyncio.sleep(8)
        assert leader.node is not None
        assert not is_leader(leader.node)

    tell("frozen leader", story)


@pytest.mark.parametrize("who", ["leader", "follower"])
def test_a_full_disk_stops_nobody_else_and_is_forgotten_when_there_is_space(who: str) -> None:
    async def story(cluster: Cluster) -> None:
        world = cluster.world
        leader = await world.has_leader()
        machine = leader if who == "leader" else world.machine(others(cluster, leader)[0])
        before, machine.disk.capacity_bytes = machine.disk.capacity_bytes, machine.disk.used
        world.trace.tell("disk is full", machine=machine.name)

        def space() -> None:
            machine.disk.capacity_bytes = before

        cluster.faults.lasts(10.0, space, [machine])
        assert await put(cluster, "small", 100) == 1
        assert await put(cluster, "large", 200_000) == 1
        await asyncio.sleep(10)

    tell(f"full disk of the {who}", story)


def test_everything_loses_power_and_nothing_that_was_acknowledged_is_lost() -> None:
    async def story(cluster: Cluster) -> None:
        for number in range(3):
            await asyncio.sleep(3)
            assert await put(cluster, f"before-{number}", 30_000) == 1
            cluster.faults.strike("power_all")
            await cluster.world.until(lambda: cluster.world.leader() is None, "darkness")
            await cluster.world.has_leader()

    tell("darkness", story, jobs=True, clients=2)


def test_clocks_that_are_hours_wrong_change_nothing() -> None:
    async def story(cluster: Cluster) -> None:
        for number, machine in enumerate(cluster.world.machines):
            machine.skew_ms = (number - 2) * 5 * 3_600_000
        await asyncio.sleep(5)
        leader = await cluster.world.has_leader()
        leader.skew_ms -= 24 * 3_600_000  # back to yesterday, under way
        await asyncio.sleep(5)
        assert await put(cluster, "now", 10) == 1
        assert cluster.checkers.elections == 1

    tell("clocks", story, jobs=True)


def test_an_orderly_stop_hands_over_and_accuses_nobody() -> None:
    async def story(cluster: Cluster) -> None:
        world = cluster.world
        leader = await world.has_leader()
        when = world.scheduler.now
        await world.stop(leader.name)
        assert world.scheduler.now - when < 5
        await asyncio.sleep(6)
        assert not any("failed" in line and "member changed" in line for line in world.trace.story)
        assert await put(cluster, "without it", 10) == 1

    tell("orderly stop", story)


def test_udp_blocked_between_two_makes_no_false_failure() -> None:
    async def story(cluster: Cluster) -> None:
        first, second = cluster.world.machines[:2]
        pairs = [(first.address, second.address), (second.address, first.address)]
        cluster.world.cut(pairs, "udp blocked for good", "udp")  # no fault that would explain anything to the checkers
        await asyncio.sleep(60)
        assert cluster.checkers.false_failures == 0
        cluster.world.network.blocked.clear()

    tell("udp blocked", story)


def test_short_freezes_of_three_of_ten_are_held_against_nobody_healthy() -> None:
    cluster = make("freezes", nodes=10, clients=0)

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        cluster.checkers.excuse_accusers = False
        rng = cluster.faults.rng
        for _ in range(60):
            machine = world.machines[rng.choice([1, 4, 8])]
            loop = machine.loop
            assert loop is not None
            loop.freeze()
            seconds = cluster.faults.length_s(0.2, 0.9)
            cluster.faults.lasts(seconds, loop.thaw, [machine])
            await asyncio.sleep(seconds + rng.random())
        assert cluster.checkers.false_failures == 0

    cluster.world.run(story)


def test_deaths_one_by_one_are_noticed_by_everybody() -> None:
    """The bound is checkers.NOTICED_S."""
    cluster = make("deaths", nodes=7, clients=0)

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        for machine in world.machines[:3]:
            await asyncio.sleep(10)
            world.kill(machine.name)
            await asyncio.sleep(8)
            world.start(machine.name)
        await asyncio.sleep(10)
        assert cluster.checkers.deaths == 3

    cluster.world.run(story)


def test_a_node_whose_log_rotted_says_so_and_does_not_start() -> None:
    ends: list[str] = []

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        await asyncio.sleep(5)
        machine = world.machine(others(cluster, await world.has_leader())[0])
        world.on_died.append(lambda _, how: ends.append(how))
        world.kill(machine.name)
        machine.disk.rot("log/00000001.seg", 1_500)
        world.start(machine.name)
        await world.until(lambda: not machine.running, "it gives up")
        assert await put(cluster, "without it", 10) == 1

    cluster = make("rotten log", clients=1)
    cluster.world.run(story)
    assert ends[0] == "killed"
    assert ends[1].startswith(f"did not start: {Corrupt.__name__}: log/00000001.seg"), ends


def test_a_disk_restored_from_yesterday_is_found_out_and_comes_back() -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        await asyncio.sleep(3)
        machine = world.machine(others(cluster, await world.has_leader())[0])
        image = machine.disk.image()
        for _ in range(2):
            world.kill(machine.name)
            world.start(machine.name)
            await asyncio.sleep(4)
        boots = machine.boot
        world.kill(machine.name)
        machine.disk.restore(image)
        cluster.checkers.forget_terms(machine)
        world.start(machine.name)

        def takes_part() -> bool:
            return machine.node is not None and machine.boot > boots and machine.node.driver.problem is None

        await world.until(takes_part, "it takes part again", 40)

    cluster = make("yesterday", clients=1)
    cluster.world.run(story)
    found = [line for line in cluster.world.trace.story if "log is an old one" in line]
    assert found, "it was not found out"
    assert "old image" in found[0], found


def test_who_asks_too_few_is_told_so() -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        await asyncio.sleep(2)
        cluster.clients[0].stopping = True
        await asyncio.sleep(3)
        leader = await world.has_leader()
        world.kill(*others(cluster, leader)[:3])
        client = cluster.clients[0]
        with pytest.raises(IdunnoError) as caught:
            await client.inside(lambda: client.files.put(source_of(b"x"), "lonely", timeout_s=6.0))
        assert "voters" in str(caught.value), caught.value

    cluster = make("too few", clients=1)
    cluster.world.run(story)


def test_a_node_that_has_heard_of_nobody_says_so_and_not_that_there_are_no_members() -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        world.kill(*(machine.name for machine in world.machines))
        alone = world.machines[0]
        world.start(alone.name)
        await world.until(lambda: alone.node is not None and alone.running, "it runs")
        node = alone.node
        assert node is not None
        own = Peer(Actor(node.me, Role.NODE), node=node.me, local=True)
        with pytest.raises(Unavailable, match=f"node {alone.name} has heard nothing of the cluster since its start"):
            await world.inside(
                alone.name, lambda: LocalCaller(node.server, own).call(MEMBERS, Members(), timeout_s=5.0)
            )

    cluster = make("one alone", nodes=3, clients=0)
    cluster.world.run(story)


def test_who_was_removed_while_a_node_was_away_is_not_shown_by_it_for_ever() -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        await asyncio.sleep(2)
        leader = await world.has_leader()
        away, gone = (world.machine(name) for name in others(cluster, leader)[:2])
        world.kill(away.name)
        world.kill(gone.name)
        await cluster.admin.remove(gone)
        world.machines.remove(gone)
        await asyncio.sleep(2)
        world.start(away.name)
        await world.until(cluster.one, "one cluster, without the one that was removed", 20)
        assert away.node is not None
        assert gone.id not in {view.node for view in away.node.membership.view()}

    cluster = make("removed meanwhile", clients=1)
    cluster.world.run(story)


def test_a_cluster_grows_by_machines_that_were_in_no_cluster_before() -> None:
    """HELLO, the call back to the newcomer, ENROLL and everything after it are the shipped code."""

    async def story(cluster: Cluster) -> None:
        world = cluster.world
        assert await put(cluster, "before", 50_000) == 1
        grown = [await grow(world) for _ in range(2)]
        await world.until(cluster.one, "one cluster of five", 20)
        nodes = [machine.node for machine in world.machines if machine.node is not None]
        assert [len(node.machine.roster.nodes()) for node in nodes] == [5] * 5
        await world.until(lambda: all(m.id in nodes[0].driver.voters for m in grown), "the newcomers vote", 30)
        assert await put(cluster, "after", 50_000) == 1

    tell("growth", story, nodes=3, jobs=True)


def test_a_name_used_twice_is_refused_with_both_addresses_and_so_is_a_deaf_newcomer() -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        first = world.machines[0]
        twin = world.new_machine()
        twin.config = replace(twin.config, name=first.name)
        with pytest.raises(Conflict) as caught:
            await join(world, twin, first)
        assert first.address in str(caught.value), caught.value
        assert twin.address in str(caught.value), caught.value
        deaf = world.new_machine()
        world.network.block(first.address, deaf.address, "udp")
        with pytest.raises(Unavailable, match=r"over TCP, but not over UDP"):
            await join(world, deaf, first)

    cluster = make("twins", nodes=2, clients=0)
    cluster.world.run(story)


def test_a_search_finds_the_same_lines_that_the_nodes_wrote_and_names_who_is_dead() -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        world.kill("n4")
        await asyncio.sleep(5)
        found: list[Line] = []

        def take(note: bytes) -> None:
            found.extend(msgspec.msgpack.decode(note, type=LineBatch).lines)

        client = cluster.clients[0]

        async def ask() -> QueryAnswer:
            async with client.session.open(QUERY, Query('member changed.*"n4".*failed'), timeout_s=10.0) as stream:
                while (item := await stream.receive()) is not None:
                    take(bytes(item.note))
                return await stream.answer()

        answer = await client.inside(ask)
        assert list(answer.unreachable) == ["n4"]
        assert {line.node for line in found} == {"n1", "n2", "n3", "n5"}
        assert answer.counts["n1"] == sum(line.node == "n1" for line in found)

    cluster = make("search", clients=1)
    cluster.world.run(story)


@pytest.mark.parametrize("first", ["before", "last"])
def test_a_cluster_restarted_on_new_addresses_forms_again_given_one_of_them(first: str) -> None:
    """A whole site was renumbered. `last`: whose address was given starts after all others."""

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        client = cluster.clients[0]
        await asyncio.sleep(2)
        await client.finish()
        names = [machine.name for machine in world.machines]
        world.kill(*names)
        for machine in world.machines:
            machine.moves(f"10.7.0.{machine.number}")
            machine.seed = None if machine.name == "n1" else f"10.7.0.1:{PORT}"
        for name in names if first == "before" else reversed(names):
            world.start(name)
            await asyncio.sleep(0.5 if first == "before" else 2.0)
        await world.until(cluster.one, "one cluster again", 20)
        nodes = [machine.node for machine in world.machines if machine.node is not None]
        told = {record.address for record in nodes[0].machine.roster.nodes()}
        assert told == {f"10.7.0.{number}:{PORT}" for number in range(1, 6)}

    cluster = make(f"renumbered {first}", clients=1)
    cluster.world.run(story)


def test_status_names_the_two_of_ten_between_whom_udp_is_blocked_and_events_tell_of_nothing_else() -> None:
    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        await cluster.clients[0].finish()
        here, there = sorted(world.machines, key=lambda machine: machine.id)[4:6]  # neighbours on the ring
        world.cut([(here.address, there.address), (there.address, here.address)], "udp blocked", "udp")
        before = [event_counts(machine) for machine in world.machines]

        async def warnings(machine: Machine) -> list[str]:
            node = machine.node
            assert node is not None
            own = Peer(Actor(node.me, Role.NODE), node=node.me, local=True)
            answer = await world.inside(
                machine.name, lambda: LocalCaller(node.server, own).call(STATUS, Status(own=True), timeout_s=5.0)
            )
            assert answer.healthy, answer.why
            return list(answer.warnings)

        await asyncio.sleep(15)
        for one, other in ((here, there), (there, here)):
            told = await warnings(one)
            assert [text for text in told if text.startswith(f"{other.name}: UDP to {other.address}:{PORT} is blocked")]
        assert await warnings(world.machines[0] if world.machines[0] not in (here, there) else world.machines[1]) == []
        assert [event_counts(machine) for machine in world.machines] == before  # no accusation, no failure

    def event_counts(machine: Machine) -> dict[str, int]:
        assert machine.node is not None
        return {what: n for what, n in machine.node.membership.counters.items() if what.startswith("event-")}

    cluster = make("status of blocked udp", nodes=10, clients=1)
    cluster.world.run(story)


@pytest.mark.parametrize("how", ["stopped", "cut off"])
def test_who_was_away_while_a_newcomer_became_the_leader_follows_it(how: str) -> None:
    """Its log would tell of the newcomer, but comes from the newcomer, whose certificate it does not know yet."""

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        await cluster.clients[0].finish()
        await world.until(cluster.one, "all have caught up", 20)
        away = world.machine(others(cluster, await world.has_leader())[0])
        if how == "stopped":
            world.kill(away.name)
        else:
            world.partition([away.name], others(cluster, away))
        world.machines.remove(away)
        newcomer = await grow(world)
        if how == "cut off":  # from it as well
            world.cut([(newcomer.address, away.address), (away.address, newcomer.address)], "cut off from the newcomer")
        world.machines.append(away)
        leader = await world.has_leader()
        assert leader.node is not None
        driver = leader.node.driver
        await world.until(lambda: newcomer.id in driver.voters, "the newcomer votes", 120)
        for _ in range(20):  # whoever else is elected is frozen until the newcomer leads
            if world.leader() is newcomer:
                break
            first = await world.has_leader()
            if first is not newcomer:
                world.freeze(first.name)
                await asyncio.sleep(3.0)
                world.thaw(first.name)
                await asyncio.sleep(1.0)
        assert world.leader() is newcomer
        if how == "stopped":
            world.start(away.name)
        else:
            world.network.blocked.clear()
        await world.until(cluster.one, "one cluster again", 20)
        assert world.leader() is newcomer
        node = away.node
        assert node is not None
        await world.until(lambda: not node.known.has_newcomers, "its roster alone counts again", 10)

    cluster = make("led by a newcomer", nodes=3, clients=1)
    cluster.checkers.disturb(0.0, 1_000.0)
    cluster.world.run(story)
