"""The peer's own harness over its adapter and over ours, in turns, on one machine: two columns of the same measurements.

The harness (a script that is given an adapter, `kill N` or `idle SECONDS`, and prints a JSON object a line) starts ten agents in
a network namespace, kills, counts packets and processor time. It needs root, iproute2 and iptables, and the peer installed.
"""

from __future__ import annotations

import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from idunno.base.version import VERSION
from idunno.node.config import NodeConfig
from idunno.node.lifecycle import make_cluster

PIECE = 8
"""Kills in a row; then it is the other's turn, so that both have the same machine."""
IDLE_S = 25
PORT = 7946
ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def holding(lock: Path | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Side:
    """One of the two systems."""

    def __init__(self, harness: Path, adapter: Path, work: Path) -> None:
        self._harness, self._adapter, self._work = harness, adapter, work
        self.trials: list[dict[str, Any]] = []
        self.idle: dict[str, Any] = {}
        self.false_failures = 0
        self.name = ""

    def prepare(self) -> None:
        """Before each run of the harness."""

    def run(self, *arguments: str) -> None:
        self.prepare()
        environment = {**os.environ, "PEERS_DATA": str(self._work), "PEERS_RESULTS": str(self._work / "results")}
        environment["PYTHONPATH"] = str(ROOT)
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
        environment["PYTHONPYCACHEPREFIX"] = str(self._work / "bytecode")
        done = subprocess.run(
            [sys.executable, str(self._harness), str(self._adapter), *arguments],
            env=environment,
            cwd=self._harness.parent,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=600,
        )
        for line in done.stdout.splitlines():
            record = json.loads(line)
            self.name = f"{record['system']} {record['version']}"
            match record["name"]:
                case "form" if not record["ok"]:
                    raise SystemExit(
                        f"{self.name}: ten agents did not find together: the machine is too busy to measure"
                    )
                case "kill_trial":
                    self.trials.append(record)
                case "kill":
                    self.false_failures += record["false_pos"]
                case "idle":
                    self.idle = record

    def times(self, what: str) -> list[float]:
        return [trial[what] for trial in self.trials if trial[what] is not None]


class Ours(Side):
    def __init__(self, harness: Path, work: Path) -> None:
        adapter = {
            "name": "idunno",
            "version_cmd": f"echo {VERSION}",
            "cmd": [sys.executable, "-m", "bench.agent", "{data}/cluster/n{i}"],
            "join_args": [],
            "fail_re": r"member failed n(\d+)",
            "join_re": r"member (?:joined|refuted) n(\d+)",
            "suspect_re": r"member suspicious n(\d+)",
            "port": PORT,
        }
        path = work / "idunno.json"
        path.write_text(json.dumps(adapter))
        super().__init__(harness, path, work)
        self._made = 0

    def prepare(self) -> None:
        """A new cluster for each run."""
        cluster = self._work / "cluster"
        if cluster.exists():
            cluster.rename(self._work / f"before-{self._made}")
        self._made += 1
        directories = [cluster / f"n{number}" for number in range(1, 11)]
        configs = [
            NodeConfig(name=f"n{number}", listen=f"127.0.0.{10 + number}:{PORT}", warm_runner=False)
            for number in range(1, 11)
        ]
        make_cluster(directories, configs)


def beside(peers: Path, adapter: str, kills: int, lock: Path | None) -> bool:
    """Measure both and print the table. Returns whether ours keeps its bounds."""
    harness = peers / "membership.py"
    with tempfile.TemporaryDirectory(prefix="idunno-beside-") as name:
        work = Path(name)
        theirs, ours = Side(harness, peers / "adapters" / adapter, work), Ours(harness, work)
        left = kills
        while left > 0:
            for side in (theirs, ours):
                with holding(lock):
                    side.run("kill", str(min(PIECE, left)))
            left -= PIECE
        for side in (theirs, ours):
            with holding(lock):
                side.run("idle", str(IDLE_S))
        return _print(theirs, ours)


def _print(theirs: Side, ours: Side) -> bool:
    print(f"{'figure':<66} {theirs.name[:22]:>22} {ours.name[:16]:>16} {'bound':>8}")
    kept = True

    def row(figure: str, unit: str, value: Any, bound: float | None, digits: int = 2) -> None:
        nonlocal kept
        a, b = value(theirs), value(ours)
        missed = bound is not None and b > bound
        kept = kept and not missed
        limit = "" if bound is None else f"{bound:g}"
        mark = "  MISSED" if missed else ""
        print(f"{figure:<66} {f'{a:.{digits}f}{unit}':>22} {f'{b:.{digits}f}{unit}':>16} {limit:>8}{mark}", flush=True)

    def of(statistic: Any, what: str) -> Any:
        return lambda side: statistic(side.times(what))

    row("kill -9: kills that all others noticed", "", lambda side: float(len(side.times("all_s"))), None, 0)
    row("kill -9 until all others hold it failed, median", " s", of(statistics.median, "all_s"), 2.0)
    row("           max", " s", of(max, "all_s"), 3.2)
    row("           until the first does, median", " s", of(statistics.median, "first_s"), None)
    row("false failures meanwhile", "", lambda side: float(side.false_failures), 0, 0)
    row("a restarted process: from its start until all see it, median", " s", of(statistics.median, "join_all_s"), None)
    row("idle: UDP bytes sent per node and second (IP length), median", " B", _idle("udp_tx_Bps"), 1_200, 0)
    row("      TCP bytes sent (ours: consensus too), median", " B", _idle("tcp_tx_Bps"), None, 0)
    row("      processor per node, median", " %", _idle("cpu_pct_per_agent"), 1.0)
    row("      memory per node (PSS), median", " MiB", _idle("pss_mib"), None, 0)
    return kept


def _idle(what: str) -> Any:
    return lambda side: float(side.idle[what]["med"])
