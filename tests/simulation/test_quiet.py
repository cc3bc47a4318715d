# A world in which nothing goes wrong says nothing, costs little, and is the same in every process.
from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.simulation.scenario import make, mixed
from tests.simulation.world import World


def test_ten_quiet_minutes_of_ten_nodes_have_one_leader_and_no_accusation() -> None:
    cluster = make("quiet", nodes=10, clients=0)

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        await asyncio.sleep(600)
        await cluster.world.until(cluster.one, "one cluster", 1.0)

    began = time.perf_counter()
    cluster.world.run(story, limit_s=1_000)
    took = time.perf_counter() - began
    print(f"600 s in {took:.1f} s, {cluster.world.scheduler.steps} callbacks")  # noqa: T201
    assert cluster.checkers.elections == 1
    suspected = [line for line in cluster.world.trace.story if "suspicious" in line]
    assert suspected == []
    assert (
        took < 60
    )  # 4 s on the machine where this was written; far more means that simulated time is not cheap any more


def test_clients_of_a_quiet_world_are_never_refused() -> None:
    report = mixed("quiet clients", seconds=25, kinds=[])
    assert report.done["put"] > 20
    assert report.done["job success"] == report.done["submit"] >= 5
    refused = {what: count for what, count in report.done.items() if ": " in what and what != "get: not-found"}
    assert refused == {}
    assert report.dose.happened["leaders"] == 1


def test_the_same_seed_gives_the_same_trace_in_every_process() -> None:
    digests = set()
    for hash_seed in ("1", "4711"):
        code = "from tests.simulation.scenario import mixed; r = mixed(3, seconds=12); print(r.digest, r.steps)"
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        digests.add(done.stdout)
    assert len(digests) == 1, digests


def test_another_seed_gives_another_trace() -> None:
    assert mixed(3, seconds=3).digest != mixed(4, seconds=3).digest
