# tests/simulation/planted.py: mistakes that somebody could make in the file store, and worlds in which they cost something.
#
# Rule 1: a mistake is the product with one thing changed; its world is one in which that matters often. The same world without
#         it must find nothing.
# Rule 2: `python -m tests.simulation.planted` counts over many seeds how many worlds find each, and that none finds anything
#         without it.
from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

from blake3 import blake3

from idunno.base.errors import IdunnoError, StaleTerm
from idunno.base.ids import BlockId, Term
from idunno.consensus.applying import Applying
from idunno.node.node import Node
from idunno.sdfs.blocks import BlockStore
from idunno.sdfs.chain import LocalCopy
from idunno.sdfs.messages import Drop
from idunno.sdfs.orders import Orders
from idunno.sdfs.repairing import Repairing
from idunno.sdfs.service import FileService
from idunno.sdfs.sweep import Sweeper
from tests.simulation.copies import MOMENT_S, watch_copies
from tests.simulation.disk import DiskView, SimFile
from tests.simulation.losses import losses
from tests.simulation.machine import Machine
from tests.simulation.scenario import make
from tests.simulation.world import World

STORM_S: Final = 5.0
TRIES_MAX: Final = 6
"""Worlds in which a mistake is looked for, from its seed on."""


@dataclass(frozen=True, slots=True)
class Mistake:
    plant: Callable[[], contextlib.AbstractContextManager[Any]]
    world: Callable[[str], object]
    seed: int
    """Of a world that found it once; which ones do changes with every change of the product's timing."""


def first_that_finds(mistake: str) -> int | None:
    first = MISTAKES[mistake].seed
    return next((seed for seed in range(first, first + TRIES_MAX) if found_by(mistake, seed) is not None), None)


def found_by(mistake: str, seed: int | str, *, world: str = "") -> str | None:
    """What the world of that seed finds, None when it finds nothing."""
    planted = MISTAKES[mistake].plant() if mistake else contextlib.nullcontext()
    try:
        with planted:
            MISTAKES[world or mistake].world(f"{seed}")
    except AssertionError as error:
        return str(error)
    return None


# -- mistakes ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _acknowledged_before_sync() -> Iterator[None]:
    """A block's bytes are in the system's cache when it is said to be stored."""
    sync = SimFile.sync

    async def not_blocks(self: SimFile) -> None:
        if not self._path.startswith("tmp/block-"):
            await sync(self)

    with patch.object(SimFile, "sync", not_blocks):
        yield


@contextlib.contextmanager
def _name_not_synced() -> Iterator[None]:
    """A block's content is on the disk, and its name perhaps not."""
    sync = DiskView.sync_directory

    async def not_blocks(self: DiskView, path: str) -> None:
        if not path.startswith("blocks/"):
            await sync(self, path)

    with patch.object(DiskView, "sync_directory", not_blocks):
        yield


@contextlib.contextmanager
def _no_barrier() -> Iterator[None]:
    """A sweep decides by this node's machine as it is."""

    decide = Sweeper._decide

    async def at_once(self: Sweeper) -> list[BlockId]:
        coordinator = self._coordinator

        class Hasty:
            machine = coordinator.machine
            driver = coordinator.driver

            async def read(self, timeout_s: float) -> Any:
                return coordinator.machine

        with patch.object(self, "_coordinator", Hasty()):
            return await decide(self)

    with patch.object(Sweeper, "_decide", at_once):
        yield


@contextlib.contextmanager
def _rotten_counts() -> Iterator[None]:
    """ "Have it" is said of whatever bears the block's name."""

    async def by_name(self: BlockStore, block: BlockId) -> bool:
        return block in self

    with patch.object(BlockStore, "verify", by_name):
        yield


@contextlib.contextmanager
def _below_quorum() -> Iterator[None]:
    """One copy is enough for a commit."""
    one = lambda roster, write_quorum=None: 1  # noqa: E731
    with patch("idunno.sdfs.service.quorum", one), patch("idunno.sdfs.leading.quorum", one):
        yield


@contextlib.contextmanager
def _no_look_at_the_term() -> Iterator[None]:
    """A node does what any leader orders, deposed or not."""
    with patch.object(Orders, "_check_term", lambda self, term: None):
        yield


# -- worlds -----------------------------------------------------------------------------------------------------------


def _storm(*kinds: str) -> Callable[[str], object]:
    """Clients put, disks and machines fail, copies are counted all along."""

    def world(seed: str) -> None:
        cluster = make(f"planted {seed}", 5)
        copies = watch_copies(cluster)

        async def story(world: World) -> None:
            await cluster.begin(jobs=False)
            copies.begin()
            await cluster.faults.storm(STORM_S, list(kinds), 0.7)
            await cluster.end()

        cluster.world.run(story, limit_s=900.0)

    return world


def _swept_while_claimed(seed: str) -> None:
    """Nodes say that they have a block that nothing refers to, for a put whose beginning their machines have not applied yet;
    and at that moment each of them sweeps. The put commits by what they said."""
    cluster = make(f"planted {seed}", 5, clients=1)
    copies = watch_copies(cluster)
    begin, have, committed = FileService.begin, LocalCopy._have, Applying.committed
    world = cluster.world
    put_begins = False
    late: list[Applying] = []
    swept: list[asyncio.Task[None]] = []

    async def and_others_are_late(self: FileService, call: Any) -> Any:
        if put_begins:
            others = [node for node in _nodes(world) if node.files is not self and not node.driver.is_leader]
            late[:] = [node.driver._applying for node in others]
        return await begin(self, call)

    async def and_sweeps(self: LocalCopy, block: BlockId, size: int, put: str) -> bool:
        held = await have(self, block, size, put)
        node = next(node for node in _nodes(world) if node.blocks is self._blocks)
        if put_begins and held and node.machine.namespace.open_put(put) is None:
            swept.append(asyncio.create_task(_sweep(node)))
        return held

    async def story(world: World) -> None:
        nonlocal put_begins
        await cluster.begin(jobs=False)
        copies.begin()
        client = cluster.clients[0]
        await client.finish()
        await world.until(lambda: all(node.machine.roster.present == 5 for node in _nodes(world)), "all are there")
        content = client.rng.randbytes(50_000)
        block = BlockId(blake3(content).hexdigest())
        for machine in world.machines:
            await world.inside(machine.name, functools.partial(_leave, machine, block, content))
        put_begins = True
        await client.inside(lambda: client.put("again", content))
        put_begins = False
        late.clear()
        for node in _nodes(world):
            await world.inside(node.config.name, functools.partial(_go_on, node))
        if not swept:
            raise RuntimeError("no node was behind: this world shows nothing")
        await asyncio.sleep(1.0)
        await cluster.end()

    with (
        patch.object(Applying, "committed", lambda self: None if self in late else committed(self)),
        patch.object(FileService, "begin", and_others_are_late),
        patch.object(LocalCopy, "_have", and_sweeps),
    ):
        world.run(story, limit_s=600.0)


def _nodes(world: World) -> list[Node]:
    return [machine.node for machine in world.machines if machine.node is not None]


async def _go_on(node: Node) -> None:
    node.driver._applying.committed()


async def _leave(machine: Machine, block: BlockId, content: bytes) -> None:
    """A block of a put that is long over, not looked at again before the next hour."""
    node = machine.node
    assert node is not None
    await node.files.sweeper.sweep()
    writer = await node.blocks.begin(block, len(content))
    try:
        await writer.append(content)
        await writer.finish()
    finally:
        await writer.close()


async def _sweep(node: Node) -> None:
    with contextlib.suppress(IdunnoError):  # no barrier came about: nothing is removed
        await node.files.sweeper.sweep()


def _trims_of_a_deposed_leader(seed: str) -> None:
    """A leader has verified four copies and is about to let the fifth go. It freezes, another leads, one of the four is lost
    with its disk; only then is the order heard."""
    cluster = make(f"planted {seed}", 6, clients=1)
    copies = watch_copies(cluster)
    verified = Repairing._verified

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        copies.begin()
        client = cluster.clients[0]
        client.stopping = True
        await asyncio.sleep(4.0)
        for number in range(8):
            await client.inside(lambda number=number: client.put(f"kept-{number}", client.rng.randbytes(50_000)))  # type: ignore[misc]
        leader = await world.has_leader()
        blocks = [block for block, (content, _) in copies._promised.items() if len(content) == 50_000]
        away = next(m for m in copies.whole(blocks[0]) if m is not leader)
        world.kill(away.name)
        await world.until(
            lambda: all(len([m for m in copies.whole(block) if m is not away]) == 4 for block in blocks), "copies", 20.0
        )
        world.start(away.name)
        about_to_drop = world.loop.create_future()

        async def slow(self: Repairing, order: Any) -> bool:
            whole = await verified(self, order)
            if order.block in blocks and order.drop != self._me and not about_to_drop.done():
                world.loop.call_soon(lambda: about_to_drop.done() or about_to_drop.set_result(order))
                await asyncio.sleep(0.05)
            return whole

        with patch.object(Repairing, "_verified", slow):
            order = await asyncio.wait_for(about_to_drop, 60.0)
            leader = await world.has_leader()
            holder = world.by_id[order.drop]
            term = leader.node.driver.term if leader.node is not None else Term(0)
            cluster.faults.lasts(20.0, lambda: None, [leader])
            world.freeze(leader.name)
        await world.until(lambda: world.leader() not in (None, leader), "another leader", 10.0)
        lost = next(m for m in world.machines if m.id in order.keep and m not in (leader, world.leader()))
        world.lose_power(lost.name)
        for path in lost.disk.paths("blocks/"):
            lost.disk.names.pop(path)
            lost.disk.durable.pop(path, None)
            copies.took(path)
        await asyncio.sleep(MOMENT_S + 0.1)
        late: Any = SimpleNamespace(request=Drop(order.block, term))  # the order was on its way all the time
        node = holder.node
        assert node is not None
        with contextlib.suppress(StaleTerm):
            await world.inside(holder.name, lambda: node.files.orders.drop(late))
        world.thaw(leader.name)
        await asyncio.sleep(10.0)
        await cluster.end()

    cluster.world.run(story, limit_s=600.0)


MISTAKES: Final = {
    "acknowledged before sync": Mistake(_acknowledged_before_sync, _storm("power", "power_all"), 1),
    "name not synced": Mistake(_name_not_synced, _storm("power", "power_all"), 1),
    "no barrier": Mistake(_no_barrier, _swept_while_claimed, 1),
    "rotten counts": Mistake(_rotten_counts, lambda seed: losses(f"planted {seed}", nodes=5, kind="rotten"), 3),
    "deposed leader trims": Mistake(_no_look_at_the_term, _trims_of_a_deposed_leader, 1),
    "below quorum": Mistake(_below_quorum, _storm("disk_errors", "disk_full"), 1),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.planted")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--mistake", choices=sorted(MISTAKES), action="append")
    asked = parser.parse_args()
    seeds, wrong = range(1, asked.seeds + 1), 0
    for mistake in asked.mistake or sorted(MISTAKES):
        finds = [seed for seed in seeds if found_by(mistake, seed) is not None]
        without = [seed for seed in seeds if found_by("", seed, world=mistake) is not None]
        wrong += len(without)
        said = f"{len(finds)} of {asked.seeds} worlds find it, the first ones {finds[:5]}; without it {without} find something"
        print(f"{mistake}: {said}", flush=True)  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
