# bench/coord/sent.py: how long the loops stand still while a leader sends the snapshot of many files, and a follower takes it in.
#
# Three real nodes; two hold the machine as a snapshot on disk, the third an empty log. When it starts, the leader sends it the
# snapshot. What is measured is the nodes' own account of their loops (`loop_late` of `idunno status`), and the same while nothing
# is sent.
#
# Rule 1: all files share one block that is there, so that nothing is repaired meanwhile; else they are as in memory.py.
from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from bench.coord.cluster import Nodes
from idunno.base.ids import BlockId, Index, Term
from idunno.consensus import snapshot as files
from idunno.consensus.log import Log
from idunno.coordinator.records import Block
from idunno.node.disk import RealDisk, ThreadOffload
from idunno.node.founding import write_log
from idunno.node.lateness import BOUNDS_MS, percentile_ms
from idunno.node.survivors import look, newest

FILE_BYTES: Final = 300_000
QUIET_S: Final = 10.0
READY_S: Final = 300.0


def measure(count: int, directory: str | None) -> list[tuple[str, str, str]]:
    """(figure, value, goal) of each."""
    with Nodes(directory=directory) as nodes:
        leader, follower = _prepare(nodes, count)
        time.sleep(QUIET_S)
        quiet = _late(nodes, leader)
        begun = time.monotonic()
        _start(nodes, follower)
        _until_equal(nodes, leader, follower)
        took = time.monotonic() - begun
        sent, taken = _late(nodes, leader) - quiet, _late(nodes, follower)
        size = (nodes.directory / leader / files.PATH).stat().st_size
    return [
        (f"a snapshot of {count:,} files ({size / 1e6:,.0f} MB) sent and taken in", f"{took:.1f} s", ""),
        ("- the leader's loop stands still: 99 % / longest", _told(sent), "<= 50 ms"),
        ("- the follower's", _told(taken), "<= 50 ms"),
        (f"- the leader's, {QUIET_S:g} s of nothing", _told(quiet), ""),
    ]


def _told(late: Counter[str]) -> str:
    counts = {name: late[name] for name in [*map(str, BOUNDS_MS), "inf"] if late[name] > 0}
    longest = list(counts)[-1]
    return f"<= {percentile_ms(counts, 0.99):g} / <= {longest} ms, {sum(counts.values()):,} samples"


def _status(nodes: Nodes, name: str) -> Any:
    return nodes.run("status", "--cluster", str(nodes.directory / name))


def _late(nodes: Nodes, name: str) -> Counter[str]:
    return Counter(_status(nodes, name)["loop_late"])


def _start(nodes: Nodes, *names: str) -> None:
    for name in names:
        with open(nodes.directory / name / "logs" / "stderr.log", "ab") as output:
            command = [sys.executable, "-m", "idunno.node", "--dir", str(nodes.directory / name)]
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


def _prepare(nodes: Nodes, count: int) -> tuple[str, str]:
    """The leader, and who has nothing yet."""
    source = nodes.directory / "file"
    source.write_bytes(os.urandom(FILE_BYTES))
    nodes.run("put", str(source), "file")
    nodes.run("down", "--dir", str(nodes.directory))
    command = [sys.executable, "-m", "bench.coord.sent", str(nodes.directory), str(count), *nodes.names()]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True, timeout=600)
    *holders, follower = nodes.names()
    _start(nodes, *holders)
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        try:
            told = _status(nodes, holders[0])
        except RuntimeError:  # it starts
            told = {}
        if told.get("scheduler") and told.get("files", 0) >= count and not told["recovering"]:
            return told["scheduler"], follower
        time.sleep(0.5)
    raise AssertionError("the two that hold the snapshot have no leader")


def _until_equal(nodes: Nodes, leader: str, follower: str) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        try:
            told = _status(nodes, follower)
        except RuntimeError:
            told = {"files": 0, "applied": 0}
        if told["files"] and told["applied"] >= _status(nodes, leader)["commit"]:
            return
        time.sleep(0.5)
    raise AssertionError("the follower has not taken the snapshot in")


# -- in a process of its own, whose memory ends with it ------------------------------------------------------------------


async def _make(top: Path, count: int, names: list[str]) -> None:
    found, machine, _ = await newest([await look(top / name) for name in names])
    stored = machine.namespace.find("file")
    assert stored is not None
    (block,) = stored.blocks
    for number in random.Random(1).sample(range(count), count):  # people do not make files in the order of their names
        blocks = (Block(BlockId(block.block), block.size),)
        name, request = f"data/set{number // 1000:04}/{number:08}.bin", os.urandom(16).hex()
        machine.namespace.add(name, block.size, blocks, "somebody", request, 1, small=False)
        machine.references.add(blocks)
    voters = tuple(sorted(record.node for record in machine.roster.nodes() if record.voter))
    head = files.Head(Index(machine.index), Term(found.term), voters, Index(0))
    for name in names:
        shutil.rmtree(top / name / "log")
    *holders, follower = names
    for name in holders:
        await write_log(top / name, head, machine.capture())
    offload = ThreadOffload(1, "log")
    await Log.create(RealDisk(str(top / follower), offload), None)
    offload.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    asyncio.run(_make(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
