# tests/simulation/scenario.py: the mixed-fault world: clients work, faults rain, everything is mended, every promise is checked.
from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final, TextIO

from idunno.coordinator.records import MACHINE_VERSION
from tests.simulation.admin import Admin
from tests.simulation.checkers import Checkers
from tests.simulation.clients import Client, Promises
from tests.simulation.dose import Dose
from tests.simulation.faults import KINDS, Faults
from tests.simulation.machine import Machine
from tests.simulation.world import World

CALM_S: Final = 60.0
"""After everything is mended, a cluster is one again within this."""
CLIENTS: Final = 2
EVERY_S: Final = 1.0
"""Between two faults, on average: about as long as one lasts, so that often two overlap and sometimes four."""


@dataclass(slots=True)
class Report:
    seed: str
    virtual_s: float = 0.0
    digest: str = ""
    steps: int = 0
    dose: Dose = field(default_factory=Dose)
    done: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Cluster:
    """A world with its checkers, clients and faults: what a story needs."""

    world: World
    checkers: Checkers
    promises: Promises
    clients: list[Client]
    dose: Dose
    faults: Faults
    admin: Admin
    not_one: str = ""
    """Why the cluster is not one, when it was last looked at."""

    async def begin(self, *, jobs: bool = True) -> None:
        """All nodes start, a leader is there, clients work."""
        self.world.start()
        await self.world.has_leader()
        await self.world.add_admin()
        for client in self.clients:
            client.begin(client.work_with_files)
        if jobs:
            client = self.clients[0]
            client.begin(lambda: client.work_with_jobs("model"))

    async def end(self) -> None:
        """Everything is mended; clients end; the cluster is one and keeps its promises."""
        world = self.world
        world.trace.tell("everything is mended")
        self.faults.end_all()
        now = world.scheduler.now
        self.checkers.disturb(now, now + 10.0)
        await self.admin.finish()
        for client in self.clients:
            await client.finish()
        try:
            await world.until(self.one, "one cluster", CALM_S)
        except AssertionError:
            world.found(f"not one cluster {CALM_S:g} s after everything is mended: {self.not_one}")
            world.check()
        self.checkers.machines_equal()
        world.trace.tell("one cluster again", leader=getattr(world.leader(), "name", None))
        await self.admin.finish()
        await self.clients[0].inside(self.clients[0].verify)
        self._count()

    def one(self) -> bool:
        """Everybody serves, follows one leader, has applied the same, and takes everybody for alive."""
        world = self.world
        for machine in world.machines:
            if not machine.running and not machine.given_up:
                world.start(machine.name)  # it ended by itself while things were broken, and somebody starts it again
        nodes = {
            machine.name: machine.node for machine in world.machines if machine.serving and machine.node is not None
        }
        found = {name: node for name, node in nodes.items() if hasattr(node, "seat")}
        if len(found) < len(world.machines):
            self.not_one = f"only {sorted(found)} run"
            return False
        leaders = {name: node.driver.leader and world.name(node.driver.leader) for name, node in found.items()}
        applied = {name: (node.driver.applied_index, node.driver.last_index) for name, node in found.items()}
        states = {
            (name, view.name, view.state)
            for name, node in found.items()
            for view in node.membership.view()
            if view.state != "active"
        }
        problems = {name: node.driver.problem for name, node in found.items() if node.driver.problem}
        self.not_one = f"leaders {leaders}, (applied, last) {applied}, not active {sorted(states)}, problems {problems}"
        one = len(set(leaders.values())) == 1 and None not in leaders.values()
        equal = len({number for pair in applied.values() for number in pair}) == 1
        return one and equal and not states and not problems

    def _count(self) -> None:
        happened = self.dose.happened
        happened.update(self.world.network.counts)
        for machine in self.world.machines:
            happened.update(machine.disk.counts)
            happened.update(machine.counts)
        happened.update(self.checkers.counts)
        happened["replaced"] += self.admin.replaced
        happened["leaders"] += self.checkers.elections
        happened["boots"] += sum(machine.boot for machine in self.world.machines)


def make(
    seed: int | str,
    nodes: int = 5,
    *,
    watch: bool = False,
    clients: int = CLIENTS,
    machine_version: int = MACHINE_VERSION,
) -> Cluster:
    world = World(seed, nodes, watch=watch, machine_version=machine_version)
    checkers, promises, dose = Checkers(world), Promises(), Dose()
    people = [Client(world, number, promises) for number in range(1, clients + 1)]
    admin = Admin(world, people[0] if people else Client(world, 99, promises))
    faults = Faults(world, checkers, promises, dose, admin)
    return Cluster(world, checkers, promises, people, dose, faults, admin)


def mixed(
    seed: int | str,
    *,
    nodes: int = 5,
    seconds: float = 20.0,
    kinds: list[str] | None = None,
    every_s: float = EVERY_S,
    watch: bool = False,
    trace: TextIO | None = None,
) -> Report:
    """One world with faults of these kinds (all by default). Raises AssertionError with the end of its story."""
    cluster = make(seed, nodes, watch=watch)
    cluster.world.trace.file = trace
    chosen = list(KINDS) if kinds is None else kinds

    async def story(world: World) -> None:
        await cluster.begin()
        if chosen:
            await cluster.faults.storm(seconds, chosen, every_s)
        else:
            await asyncio.sleep(seconds)
        await cluster.end()

    cluster.world.run(story, limit_s=seconds + 600.0)
    world = cluster.world
    return Report(
        world.seed,
        world.scheduler.now,
        world.trace.digest(),
        world.scheduler.steps,
        cluster.dose,
        cluster.promises.done,
    )


__all__ = ["Cluster", "Machine", "Report", "make", "mixed"]
