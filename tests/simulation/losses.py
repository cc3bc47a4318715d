# tests/simulation/losses.py: machines are lost with their disks while files are put, the store repairs itself, and nothing that
# was acknowledged is gone.
#
# Rule 1: a world is one of four kinds. `gone`: machines never return and are removed by an admin (7 nodes and more: the others
#         go on). `wiped`: they come back without their blocks. `away`: they come back hours later, by their clocks, with all.
#         `rotten`: nobody is lost, and on three disks at once bits flip in every block.
# Rule 2: before the loss the disks have every fault a disk can have; then all is mended and repaired. So at the moment of the
#         loss each block has four good copies but for those that are being put, and three losses, rot included, leave one.
# Rule 3: it is judged all along (copies.py), and then three times: by users who read everything back, by the bytes on the disks
#         (each block that something refers to, whole, on four of them), and by what is left over (nothing else).
from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from blake3 import blake3

from idunno.base.errors import IdunnoError
from idunno.base.ids import BlockId
from idunno.coordinator.messages import NODE_REMOVE, RemoveDead
from idunno.node.node import Node
from tests.simulation.copies import Copies, watch_copies
from tests.simulation.faults import Faults
from tests.simulation.machine import Machine
from tests.simulation.scenario import Cluster, make
from tests.simulation.world import ProcessDied, World

KINDS: Final = ("gone", "wiped", "away", "rotten")
DISK_FAULTS: Final = ("kill", "power", "power_all", "disk_errors", "disk_full", "disk_slow")
LOST: Final = 3
"""Copies of a block that may go at one moment: by machines that are lost, and one more by rot."""
STORM_S: Final = 4.0
EVERY_S: Final = 0.7
FLIPS: Final = 4
"""Bits that flip on a disk that rots."""
REPAIR_S: Final = 240.0
"""Within this all copies are there again: the last of them were ordered when a target that had failed was asked again."""
WHOLE_S: Final = 20.0
"""What was put last, on as few nodes as there were, has all its copies within this."""
SWEPT_S: Final = 150.0
HOURS_MS: Final = 7 * 3_600_000


@dataclass(slots=True)
class Losses:
    """What happened in a world."""

    seed: str
    kind: str = ""
    dose: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    virtual_s: float = 0.0


def losses(seed: int | str, *, nodes: int = 7, kind: str = "", watch: bool = False) -> Losses:
    """One world. Raises AssertionError with the end of its story."""
    rng = random.Random(f"{seed} losses")
    kinds = [k for k in KINDS if nodes >= 7 or k != "gone"]
    told = Losses(f"{seed}", kind or rng.choice(kinds))
    cluster = make(f"losses {seed}", nodes, watch=watch)
    story = _Story(cluster, told, rng, watch_copies(cluster))
    cluster.world.run(story.whole, limit_s=3_000.0)
    told.virtual_s = cluster.world.scheduler.now
    told.done.update(cluster.promises.done)
    for what, count in cluster.dose.happened.items():
        told.dose[f"{what}"] += count
    for (fault, stage), count in cluster.dose.struck.items():
        told.dose[f"{fault} during {stage}"] += count
    return told


class _Story:
    def __init__(self, cluster: Cluster, told: Losses, rng: random.Random, copies: Copies) -> None:
        self.copies = copies
        self.cluster, self.world, self.told, self.rng = cluster, cluster.world, told, rng
        self.faults: Faults = cluster.faults

    async def whole(self, world: World) -> None:
        await self.cluster.begin(jobs=False)
        self.copies.begin()
        await self.faults.storm(STORM_S, list(DISK_FAULTS), EVERY_S)
        self.faults.end_all()
        await self.repaired("before the loss")
        rotten = LOST if self.told.kind == "rotten" else self.rng.choice([0, 0, 1])
        chosen = self.rng.sample(world.machines, LOST)
        # A put that is under way counts on the machines of its chain, and on nobody else's rot.
        for machine in chosen[:rotten]:
            self.rot(machine)
        if lost := chosen[rotten:]:
            await self.lose(lost)
        await asyncio.sleep(self.rng.random() * 2.0)
        await self.repaired("after the loss")
        await self.scrubbed()
        await self.repaired("after the scrub")
        await self.cluster.end()
        await self.copies_are_whole()

    # -- what goes wrong ------------------------------------------------------------------------------------------

    async def lose(self, lost: list[Machine]) -> None:
        kind, world, rng = self.told.kind, self.world, self.rng
        during = "put" if self.cluster.promises.puts_under_way else "idle"
        self.told.dose[f"{len(lost)} {kind} during {during}"] += 1
        self.cluster.checkers.disturb(world.scheduler.now, world.scheduler.now + 30.0)
        world.lose_power(*(machine.name for machine in lost))
        if kind == "gone":
            for path in (path for machine in lost for path in machine.disk.paths("blocks/")):
                self.copies.took(path)
            world.machines = [machine for machine in world.machines if machine not in lost]
            await self.remove(lost)
            return
        if kind == "away":
            # Long enough for their copies to be made anew elsewhere where there are nodes for that.
            await asyncio.sleep(rng.choice([5.0, 10.0, 10.0, 75.0]))
        for machine in lost:
            if kind == "wiped":
                paths = machine.disk.paths("blocks/")
                self.told.dose["blocks wiped"] += len(paths)
                for path in paths:
                    self.copies.took(path)
                _wipe(machine, paths)
            else:
                machine.skew_ms += HOURS_MS
            world.start(machine.name)
            await asyncio.sleep(rng.random())

    async def remove(self, lost: list[Machine]) -> None:
        """As an admin does who knows that they do not come back."""
        client = self.cluster.clients[0]
        for machine in lost:
            request, end = f"remove-{machine.name}", self.world.scheduler.now + 120.0
            while True:
                try:
                    await client.inside(
                        lambda name=machine.name, request=request: client.session.call(  # type: ignore[misc]
                            NODE_REMOVE, RemoveDead(name, request), timeout_s=30.0
                        )
                    )
                    break
                except IdunnoError as error:  # it is not known to be dead yet, or there is no leader
                    if self.world.scheduler.now > end:
                        self.world.found(f"{machine.name} cannot be removed: {error}")
                        self.world.check()
                    await asyncio.sleep(0.5)
            self.world.trace.tell("removed", machine=machine.name)

    def rot(self, machine: Machine) -> None:
        paths = machine.disk.paths("blocks/")
        flips = len(paths) if self.told.kind == "rotten" else FLIPS
        for path in self.rng.sample(paths, min(flips, len(paths))):
            machine.disk.rot(path, self.rng.randrange(max(1, machine.disk.written_bytes(path))))
            self.copies.took(path)
            self.told.dose["blocks rotten"] += 1

    # -- what must follow -----------------------------------------------------------------------------------------

    async def repaired(self, when: str) -> None:
        """One cluster, and no copy is missing."""
        why = ""

        def done() -> bool:
            nonlocal why
            if not self.cluster.one() and not self.at_work():
                why = self.cluster.not_one
                return False
            leader = self.world.leader()
            if leader is None or leader.node is None:
                why = "no leader"
                return False
            leading = leader.node.files.leading
            problems = leading.disk_problems()
            why = f"{leading.copies_missing} copies missing, recovering {leading.recovering}, {problems}"
            return not leading.recovering and not leading.copies_missing and not problems and self.all_up()

        try:
            await self.world.until(done, f"copies of everything {when}", REPAIR_S)
        except AssertionError:
            self.world.found(f"{when}: not repaired within {REPAIR_S:g} s: {why}")
            self.world.check()

    def all_up(self) -> bool:
        return all(machine.serving for machine in self.world.machines)

    def at_work(self) -> bool:
        """Clients write, so that the nodes are never all at the same entry."""
        return not self.cluster.clients[0].stopping

    async def scrubbed(self) -> None:
        for machine in list(self.world.machines):
            node = machine.node
            assert node is not None
            try:
                await self.world.inside(machine.name, node.files.scrubber.scrub)
            except ProcessDied as error:
                self.world.found(f"nothing was wrong any more: {error}")

    async def copies_are_whole(self) -> None:
        """On the disks themselves."""
        leader = await self.world.has_leader()
        await self.world.until(lambda: self.swept(leader.node), "nothing is left over", SWEPT_S)
        missing: list[str] = []

        def whole() -> bool:
            nonlocal missing
            missing = self.not_whole(leader)
            return not missing

        try:
            await self.world.until(whole, "whole copies of everything", WHOLE_S)
        except AssertionError:
            for what in missing:
                self.world.found(what)
            self.world.check()
        assert leader.node is not None
        self.told.dose["blocks checked"] += len(leader.node.machine.references)

    def not_whole(self, leader: Machine) -> list[str]:
        assert leader.node is not None
        machine, wanted = leader.node.machine, min(4, len(self.world.machines))
        whole: Counter[str] = Counter()
        found: list[str] = []
        for one in self.world.machines:
            for path in one.disk.paths("blocks/"):
                name = path.rpartition("/")[2]
                if blake3(one.disk.content(path)).hexdigest() == name:
                    whole[name] += 1
                else:
                    found.append(f"{one.name}: {path} is not what its name says, after a scrub")
        for block in machine.references:
            if whole[block] < wanted:
                found.append(f"block {block[:16]} is whole on {whole[block]} disks, {wanted} are wanted")
        return found

    def swept(self, node: Node | None) -> bool:
        """No file of a block that nothing refers to, but for what puts that are still open may commit."""
        assert node is not None
        if node.machine.namespace.open_puts():
            return True
        left = {BlockId(p.rpartition("/")[2]) for m in self.world.machines for p in m.disk.paths("blocks/")}
        return all(block in node.machine.references for block in left)


def _wipe(machine: Machine, paths: list[str]) -> None:
    for path in paths:
        machine.disk.names.pop(path, None)
        machine.disk.durable.pop(path, None)
    machine.disk.used = sum(inode.size for inode in machine.disk.names.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/simulation/losses")
    parser.add_argument("--seed", help="one world, with its story")
    parser.add_argument("--seeds", metavar="A-B", default="1-100", help="many: only failures and the sum of the doses")
    parser.add_argument("--nodes", type=int, default=7)
    parser.add_argument("--kind", choices=KINDS, default="", help="of loss; drawn by the seed without it")
    asked = parser.parse_args()
    if asked.seed is not None:
        first = last = asked.seed
    else:
        first, _, last = asked.seeds.partition("-")
    seeds = [first] if asked.seed is not None else [str(n) for n in range(int(first), int(last or first) + 1)]
    dose, done, kinds, failed, began = Counter[str](), Counter[str](), Counter[str](), 0, time.perf_counter()
    for seed in seeds:
        try:
            told = losses(seed, nodes=asked.nodes, kind=asked.kind, watch=asked.seed is not None)
        except AssertionError as error:
            failed += 1
            replay = f"tests/simulation/losses --seed {seed} --nodes {asked.nodes}"
            replay += f" --kind {asked.kind}" if asked.kind else ""
            print(f"seed {seed} FAILED: {error}\nreplay: {replay}\n", flush=True)  # noqa: T201
            continue
        dose.update(told.dose)
        done.update(told.done)
        kinds[told.kind] += 1
    for title, counts in (("worlds", kinds), ("dose", dose), ("clients", done)):
        print(f"{title}: " + ", ".join(f"{what} {count}" for what, count in sorted(counts.items())))  # noqa: T201
    print(f"{len(seeds)} worlds, {failed} failed, in {time.perf_counter() - began:.0f} s")  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
