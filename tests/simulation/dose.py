# tests/simulation/dose.py: how often each kind of fault struck which stage: a test that never hits anything proves nothing.
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from tests.simulation.clients import Promises
from tests.simulation.machine import Machine

if TYPE_CHECKING:
    from tests.simulation.world import World

STAGES: Final = ("idle", "election", "recovery", "replay", "put", "deploy", "job")


class Dose:
    def __init__(self) -> None:
        self.struck: Counter[tuple[str, str]] = Counter()
        self.happened: Counter[str] = Counter()
        """What faults brought about: packets lost, sectors lost, elections, and so on."""

    def strike(self, kind: str, stages: Iterable[str]) -> None:
        for stage in stages:
            self.struck[kind, stage] += 1

    def add(self, other: Dose) -> None:
        self.struck.update(other.struck)
        self.happened.update(other.happened)

    def table(self) -> list[str]:
        kinds = sorted({kind for kind, _ in self.struck})
        lines = [f"{'fault':16}" + "".join(f"{stage:>10}" for stage in STAGES)]
        lines += [f"{kind:16}" + "".join(f"{self.struck[kind, stage]:>10}" for stage in STAGES) for kind in kinds]
        happened = ", ".join(f"{what} {count}" for what, count in sorted(self.happened.items()))
        return [*lines, f"happened: {happened or 'nothing'}"]

    def below(self, least: int) -> list[str]:
        """Kinds of faults, with a stage that they struck less often than that."""
        kinds = sorted({kind for kind, _ in self.struck})
        return [
            f"{kind} at {stage}: {self.struck[kind, stage]}"
            for kind in kinds
            for stage in STAGES
            if self.struck[kind, stage] < least
        ]


def stages_now(world: World, promises: Promises) -> list[str]:
    """What the world is in the middle of."""
    found = []
    leader = world.leader()
    if leader is None or leader.node is None:
        found.append("election")
    elif leader.node.files.leading.recovering or leader.node.scheduler.recovering:
        found.append("recovery")
    if any(replaying(world, machine) for machine in world.machines):
        found.append("replay")
    if promises.puts_under_way:
        found.append("put")
    if promises.deploys_under_way:
        found.append("deploy")
    if promises.jobs_under_way:
        found.append("job")
    return found or ["idle"]


def replaying(world: World, machine: Machine) -> bool:
    """It started again and has not applied yet what the others have."""
    if not machine.running or machine.boot < 2:
        return False
    node = machine.node
    if node is None or not hasattr(node, "driver"):
        return True
    most = max((m.node.driver.applied_index for m in world.machines if m.serving and m.node is not None), default=0)
    return node.driver.applied_index < most - 2
