"""What an idle cluster costs: start-up time, and resident memory and processor share of each node.

Usage: python bench/idle.py [nodes] [seconds]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from idunno.node.identity import running_pid
from idunno.node.local import down, existing_nodes, up

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def main() -> None:
    nodes = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    with tempfile.TemporaryDirectory(prefix="idunno-bench-") as name:
        directory = Path(name) / "cluster"
        began = up(directory, nodes, 27_400)
        try:
            print(f"{nodes} nodes ready in {began['seconds']:.1f} s (bound: 10 s)")
            time.sleep(5)  # what starting up left to do is not idleness
            pids = {node.name: running_pid(node) or 0 for node in existing_nodes(directory)}
            before = {node: processor_s(pid) for node, pid in pids.items()}
            start = time.monotonic()
            time.sleep(seconds)
            passed = time.monotonic() - start
            print("node  role        resident MB (bound: 90)   % of a core (bound: 1.5)")
            for node, pid in pids.items():
                role = "scheduler" if node == began["scheduler"] else "worker"
                share = (processor_s(pid) - before[node]) / passed
                print(f"{node:<5} {role:<11} {resident_mb(pid):>10.1f} {share:>24.2%}")
        finally:
            down(directory)


if __name__ == "__main__":
    main()
