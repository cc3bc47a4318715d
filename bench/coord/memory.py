# bench/coord/memory.py: what a machine of many files takes: memory, seconds to restore, the longest slice of its snapshot.
#
# Each step in a process of its own, so that its memory is its own: one makes the snapshot, another restores it.
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from bench.coord.cluster import memory_mb
from idunno.base.ids import BlockId
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import Block
from idunno.coordinator.snapshot import Reader

PIECE_BYTES: Final = 256 * 1024


def measure(files: int) -> list[tuple[str, str, str]]:
    """(figure, value, goal) of each."""
    with tempfile.TemporaryDirectory(prefix="idunno-bench-") as directory:
        path = str(Path(directory) / "snapshot")
        made, restored = _child("make", path, str(files)), _child("restore", path)
    return [
        (f"memory, {files:,} files of one version, as built", f"{made['mb']:,.0f} MB", "<= 1.2 GB"),
        ("- restored", f"{restored['mb']:,.0f} MB", "<= 1.2 GB"),
        ("- at most during the restore", f"{restored['peak_mb']:,.0f} MB", "<= 1.2 GB"),
        ("- to restore", f"{restored['seconds']:.1f} s, {restored['cpu_s']:.1f} s of a processor", "<= 20 s"),
        ("- the loop stands still: capture", f"{made['capture_ms']:.0f} ms", "<= 50 ms"),
        ("- the loop stands still: longest piece", f"{made['piece_ms']:.1f} ms", "<= 50 ms"),
    ]


def _child(*words: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "bench.coord.memory", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _make(path: str, files: int) -> dict[str, float]:
    machine = Machine()
    for number in range(files):
        blocks = (Block(BlockId(os.urandom(32).hex()), 4_194_304),)
        machine.namespace.add(
            f"data/set{number // 1000:04}/{number:08}.bin",
            4_194_304,
            blocks,
            "somebody",
            os.urandom(16).hex(),
            1,
            small=False,
        )
        machine.references.add(blocks)
    mb = memory_mb(os.getpid())
    begun = time.perf_counter()
    pieces = machine.capture()
    capture_ms = (time.perf_counter() - begun) * 1e3
    longest = 0.0
    with open(path, "wb") as file:
        while True:
            begun = time.thread_time()
            piece = next(pieces, None)
            longest = max(longest, time.thread_time() - begun)
            if piece is None:
                break
            file.write(piece)
    return {"mb": mb, "capture_ms": capture_ms, "piece_ms": longest * 1e3}


def _restore(path: str) -> dict[str, float]:
    begun, reader = time.perf_counter(), Reader()
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            reader.feed(piece)
    machine = Machine.restored(reader)
    seconds, used_s = time.perf_counter() - begun, time.process_time()
    del reader
    assert machine.namespace.files > 0
    pid = os.getpid()
    return {"mb": memory_mb(pid), "peak_mb": memory_mb(pid, "VmHWM"), "seconds": seconds, "cpu_s": used_s}


if __name__ == "__main__":
    print(json.dumps(_make(sys.argv[2], int(sys.argv[3])) if sys.argv[1] == "make" else _restore(sys.argv[2])))
