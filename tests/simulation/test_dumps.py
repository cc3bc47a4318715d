# What a bug report holds can be looked at, and gone on with, in a world.
from __future__ import annotations

from pathlib import Path

from idunno.base.ids import Index
from idunno.client.api import Cluster as Connected
from idunno.client.backups import Snapshot
from idunno.client.dumps import DumpMade
from idunno.coordinator import backup
from idunno.coordinator.commands import PutSmall
from idunno.node.node import Node
from idunno.node.restore import read_backup
from idunno.sdfs.hashing import block_id
from idunno.wire.calls import Actor, Role
from tests.simulation.clients import Client
from tests.simulation.dumps import DumpedWorld, load
from tests.simulation.machine import Machine
from tests.simulation.scenario import make
from tests.simulation.world import World


async def dumped(client: Client, path: Path) -> DumpMade:
    return await client.inside(lambda: Connected(client.session, client.files, 60.0).dump(path))


async def put(world: World, name: str, content: bytes) -> None:
    """A small file, put by the node that leads."""
    leader = await world.has_leader()
    node = leader.node
    assert node is not None

    async def propose() -> None:
        command = PutSmall(f"put-{name}", name, block_id(content), content)
        await node.coordinator.propose(command, actor=Actor(node.me, Role.NODE), request=name, timeout_s=10.0)

    await world.inside(leader.name, propose)


def test_a_world_begins_with_the_machine_of_a_dump_and_goes_on(tmp_path: Path) -> None:
    cluster = make("dump", nodes=3, clients=1)
    client, path = cluster.clients[0], tmp_path / "report.zip"

    async def story(world: World) -> DumpMade:
        world.start()
        await world.has_leader()
        await world.add_admin()
        for number in range(20):
            await put(world, f"files/{number}", b"content %d" % number)
        nodes = [machine.node for machine in world.machines if machine.node is not None]
        await world.until(  # a dump has what the node that is asked has applied
            lambda: all(node.machine.namespace.find("files/19") for node in nodes), "the files everywhere"
        )
        return await dumped(client, path)

    made = cluster.world.run(story)
    assert (made.nodes, made.missing, made.complete) == (["n1", "n2", "n3"], {}, True)
    loaded = load(path)
    assert loaded.machine().digest().hex() == made.digest == loaded.digest
    assert loaded.machine().index == made.index
    assert sorted(loaded.json("n2", "raft")["voters"]) == sorted(machine.id for machine in cluster.world.machines)
    assert b"content 7" not in path.read_bytes()
    assert not [name for name, data in loaded.files.items() if b"content 7" in data]

    again = DumpedWorld(loaded, "loaded")
    begun: list[str] = []

    async def goes_on(world: World) -> None:
        world.start()
        leader = await world.has_leader()
        assert leader.node is not None
        names = {name for name, _ in leader.node.machine.namespace.each()}
        assert {f"files/{number}" for number in range(20)} <= names
        await put(world, "after", b"in the world")
        nodes = [machine.node for machine in world.machines if machine.node is not None]
        await world.until(
            lambda: all(node.machine.namespace.find("after") for node in nodes), "the new file everywhere"
        )

    again.on_applied.append(lambda machine, node, index, payload: begun.append(machine.name))
    again.run(goes_on)
    assert set(begun) == {"n1", "n2", "n3"}


def test_the_nodes_of_a_loaded_world_hold_the_very_machine(tmp_path: Path) -> None:
    """Looked at on their disks before anything happens."""
    cluster = make("dump", nodes=3, clients=1)
    path = tmp_path / "report.zip"

    async def story(world: World) -> None:
        world.start()
        await world.has_leader()
        await world.add_admin()
        await put(world, "file", b"content")
        await dumped(cluster.clients[0], path)

    cluster.world.run(story)
    again = DumpedWorld(load(path), "loaded")
    digests: set[str] = set()

    async def look(world: World) -> None:
        world.start()
        await world.until(lambda: all(machine.node is not None for machine in world.machines), "nodes")
        nodes = [machine.node for machine in world.machines if machine.node is not None]
        index = load(path).manifest["index"]
        await world.until(lambda: all(hasattr(n, "machine") and n.machine.index >= index for n in nodes), "snapshots")
        digests.update(node.machine.digest().hex() for node in nodes if node.machine.index == index)

    again.run(look)
    assert digests == {load(path).digest}


def test_a_dump_needs_no_leader_and_names_who_is_silent(tmp_path: Path) -> None:
    cluster = make("silent", nodes=3, clients=1)
    path = tmp_path / "report.zip"

    async def story(world: World) -> DumpMade:
        world.start()
        await world.has_leader()
        await world.add_admin()
        await put(world, "file", b"content")
        nodes = [machine.node for machine in world.machines if machine.node is not None]
        await world.until(lambda: all(node.machine.namespace.find("file") for node in nodes), "the file everywhere")
        world.kill("n2")
        world.freeze("n3")
        await world.until(lambda: world.leader() is None, "no leader", 30.0)
        began = world.scheduler.now
        made = await dumped(cluster.clients[0], path)
        assert world.scheduler.now - began < 30.0
        return made

    made = cluster.world.run(story)
    assert (made.nodes, sorted(made.missing)) == (["n1"], ["n2", "n3"])
    assert load(path).json("n1", "raft")["leader"] is None
    assert load(path).machine().namespace.files == 1


def test_a_snapshot_is_of_one_moment_while_others_write(tmp_path: Path) -> None:
    """Its machine is, byte for byte, the one that a node had at that index, but for what is secret."""
    cluster = make("backup", nodes=3, clients=2)
    client, path = cluster.clients[0], tmp_path / "backup"
    seen: dict[int, str] = {}

    def applied(machine: Machine, node: Node, index: Index, payload: bytes) -> None:
        seen[index] = backup.without_secrets(node.machine).digest().hex()

    cluster.world.on_applied.append(applied)

    async def story(world: World) -> Snapshot:
        world.start()
        await world.has_leader()
        await world.add_admin()
        for number in range(20):
            await put(world, f"files/{number}", b"content %d" % number)
        writing = client.world.loop.create_task(_write(world))
        taken = await client.inside(lambda: Connected(client.session, client.files, 60.0).snapshot(path))
        await writing
        return taken

    taken = cluster.world.run(story)
    read = read_backup(path, None)
    assert read.machine.index == taken.index
    assert read.machine.digest().hex() == seen[taken.index]
    assert len(read.smalls) >= 20
    assert taken.smalls_missing == 0


async def _write(world: World) -> None:
    for number in range(30):
        await put(world, f"meanwhile/{number}", b"another %d" % number)
