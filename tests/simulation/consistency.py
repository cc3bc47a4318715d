# tests/simulation/consistency.py: worlds that prove the coordinator: users write the same names at once while everything goes
# wrong, and afterwards the history must be one that a single machine could have given.
from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, TextIO

from tests.simulation.dose import Dose
from tests.simulation.faults import KINDS
from tests.simulation.history import History, User
from tests.simulation.raftcheck import RaftChecks, made_once
from tests.simulation.scenario import make
from tests.simulation.world import World
from tests.unit.consensus.registers import storm
from tests.unit.consensus.reigns import short_reigns

USERS: Final = 5
OPERATIONS: Final = 1_000
"""Of all users together."""
STORM_S: Final = 18.0
"""About as long as the users need when nothing is wrong."""


@dataclass(slots=True)
class Proof:
    dose: Dose = field(default_factory=Dose)
    counts: Counter[str] = field(default_factory=Counter)
    digest: str = ""
    virtual_s: float = 0.0


def consistent(
    seed: int | str,
    nodes: int = 5,
    *,
    operations: int = OPERATIONS,
    storm_s: float = STORM_S,
    kinds: list[str] | None = None,
    watch: bool = False,
    trace: TextIO | None = None,
) -> Proof:
    """One world. Raises AssertionError with what was found, and the end of its story."""
    cluster = make(f"{seed} consistency {nodes}", nodes, watch=watch, clients=USERS)
    world, chosen = cluster.world, list(KINDS) if kinds is None else kinds
    world.trace.file = trace
    history, raft = History(world, cluster.promises), RaftChecks(world)

    async def story(world: World) -> None:
        world.start()
        await world.has_leader()
        await world.add_admin()
        users = [User(client, history) for client in cluster.clients]
        for number, user in enumerate(users):
            cluster.clients[number].begin(user.work(operations // USERS))
        if chosen:
            await cluster.faults.storm(storm_s, chosen, every_s=1.2)
        await cluster.end()
        node = next(machine.node for machine in world.machines if machine.node is not None)
        for what in [*made_once(node), *history.judge()]:
            world.found(what)

    world.run(story, limit_s=storm_s + 900.0)
    return Proof(cluster.dose, history.counts + raft.counts, world.trace.digest(), world.scheduler.now)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/simulation/prove", description=__doc__)
    parser.add_argument("--seeds", default="1", metavar="A-B", help="worlds of these seeds, each of every size")
    parser.add_argument("--nodes", default="3,5,7,10", help="sizes of clusters")
    parser.add_argument("--operations", type=int, default=OPERATIONS)
    parser.add_argument("--faults", default="all", help="all, none, or a list of " + ", ".join(KINDS))
    parser.add_argument(
        "--cores", action="store_true", help="worlds of Raft cores only, with registers: ten times as fast"
    )
    parser.add_argument(
        "--short-reigns", action="store_true", help="the same, and whoever leads is cut off a few appends later"
    )
    parser.add_argument("--story", action="store_true", help="tell the story of each world")
    asked = parser.parse_args()
    kinds = None if asked.faults == "all" else [] if asked.faults == "none" else asked.faults.split(",")
    cores = short_reigns if asked.short_reigns else storm if asked.cores else None
    how = f"--operations {asked.operations} "
    how += "--short-reigns" if asked.short_reigns else "--cores" if asked.cores else f"--faults {asked.faults} --story"
    first, _, last = asked.seeds.partition("-")
    dose, counts, failed, worlds = Dose(), Counter[str](), 0, Counter[int]()
    began = time.process_time()
    for seed in range(int(first), int(last or first) + 1):
        for nodes in map(int, asked.nodes.split(",")):
            worlds[nodes] += 1
            try:
                if cores is not None:
                    counts.update(cores(seed, nodes, operations=asked.operations).dose)
                    continue
                proof = consistent(seed, nodes, operations=asked.operations, kinds=kinds, watch=asked.story)
            except (AssertionError, TimeoutError) as error:
                failed += 1
                again = f"tests/simulation/prove --seeds {seed} --nodes {nodes} {how}"
                print(f"FAILED: {error}\nreplay: {again}\n", flush=True)  # noqa: T201
                continue
            dose.add(proof.dose)
            counts.update(proof.counts)
    if cores is None:
        print("\n".join(dose.table()))  # noqa: T201
    print("counts: " + ", ".join(f"{what} {count}" for what, count in sorted(counts.items())))  # noqa: T201
    sizes = ", ".join(f"{count} of {nodes} nodes" for nodes, count in sorted(worlds.items()))
    took = time.process_time() - began
    print(f"{sum(worlds.values())} worlds ({sizes}), {failed} failed, in {took:.0f} s")  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
