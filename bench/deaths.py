"""Ten real nodes, three of them killed at once, again and again, the scheduler among them in half of the rounds.

    python bench/deaths.py [rounds=20] [nodes=10] [killed=3]

While files are put without a pause; after each round the dead come back. In the end every file that was acknowledged is read
back. Prints for each round how long no put succeeded, and what was refused or uncertain.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import idunno
from idunno.base.errors import IdunnoError
from tests.cluster.harness import Cluster, until

SETTLE_S = 2.0
"""Of writing before a death and after the first success behind it."""


class Writer(threading.Thread):
    """Puts files one after another; remembers what was acknowledged, and when."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        super().__init__(name="writer", daemon=True)
        self._where, self._directory = str(cluster.directory), directory
        self._rng, self._stopped = random.Random(7), threading.Event()
        self.acknowledged: dict[str, bytes] = {}
        self.when: list[float] = []
        self.failed: list[IdunnoError] = []

    def run(self) -> None:
        number = 0
        with idunno.connect(self._where, timeout_s=30.0) as client:
            while not self._stopped.is_set():
                number += 1
                content = self._rng.randbytes(self._rng.choice([100, 4096, 50_000]))
                path = self._directory / "out"
                path.write_bytes(content)
                try:
                    client.put(path, f"files/{number}")
                except IdunnoError as error:
                    self.failed.append(error)
                else:
                    self.acknowledged[f"files/{number}"] = content
                    self.when.append(time.monotonic())

    def stop(self) -> None:
        self._stopped.set()
        self.join(timeout=90.0)
        assert not self.is_alive(), "a put did not end within its time"


def leader_of(cluster: Cluster) -> str:
    def look() -> str | None:
        try:
            with idunno.connect(str(cluster.directory), timeout_s=10.0) as client:
                name = client.status().scheduler
                return name if name in cluster.living() else None
        except IdunnoError:
            return None

    return until(look, "a scheduler", timeout_s=60.0)


def one_round(cluster: Cluster, writer: Writer, rng: random.Random, *, killed: int, with_leader: bool) -> float:
    """Kill, wait for puts to succeed again, bring the dead back; the longest time without a success."""
    leader = leader_of(cluster)
    others = [name for name in cluster.names() if name != leader]
    victims = [leader, *rng.sample(others, killed - 1)] if with_leader else rng.sample(others, killed)
    time.sleep(SETTLE_S)
    begun = time.monotonic()
    for name in victims:
        cluster.kill(name)
    until(lambda: writer.when and writer.when[-1] > begun + 0.5, "a put that succeeds again", timeout_s=90.0)
    time.sleep(SETTLE_S)
    times = [begun, *(at for at in writer.when if at > begun)]
    gap = max(b - a for a, b in pairwise(times))
    cluster.up()
    return gap


def main(rounds: int = 20, nodes: int = 10, killed: int = 3) -> None:
    rng, gaps = random.Random(3), list[float]()
    with Cluster(nodes) as cluster, tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        writer = Writer(cluster, directory)
        writer.start()
        for number in range(rounds):
            with_leader = number % 2 == 0
            gaps.append(one_round(cluster, writer, rng, killed=killed, with_leader=with_leader))
            who = "with the scheduler" if with_leader else "without it"
            print(
                f"round {number + 1:2}: {killed} of {nodes} killed {who:18}  no put succeeded for {gaps[-1]:5.2f} s; "
                f"{len(writer.acknowledged)} acknowledged, {len(writer.failed)} not",
                flush=True,
            )
        writer.stop()
        with idunno.connect(str(cluster.directory), timeout_s=120.0) as client:
            for name, content in writer.acknowledged.items():
                client.get(name, directory / "back")
                assert (directory / "back").read_bytes() == content, f"{name} is lost"
        certain = sum(not error.may_have_happened for error in writer.failed)
        print(
            f"{rounds} rounds: all {len(writer.acknowledged)} acknowledged files are there; {len(writer.failed)} puts failed "
            f"({certain} certainly not done); without a success: median {statistics.median(gaps):.2f} s, "
            f"longest {max(gaps):.2f} s; load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
        )


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
