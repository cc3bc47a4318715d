#!/usr/bin/env python3
# bench/coordinator.py: three real nodes against etcd in the same run: commits, reads, failover; the machine's memory, and its
# snapshot sent.
#
# Ours: the shipped node, TLS between all, every acknowledgement synced on three nodes; clients are the shipped client's sessions
# over TLS, at most 8 connections, puts of 256-byte files (an entry of about 500 bytes). etcd: no TLS, its own defaults.
# Every row alternates with etcd's, so that both meet the same machine; the load average stands beside the table.
# Run: python bench/coordinator.py [--etcd DIR/peers/cluster --etcd-python PYTHON] [--seconds 6] [--trials 20] [ROWS...]
from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import uvloop

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.coord import failover, load, memory, sent  # noqa: E402 - the path comes first
from bench.coord.cluster import Nodes  # noqa: E402

ROWS: Final = ("puts1", "puts16", "puts64", "reads64", "killed", "frozen", "cut", "memory", "sent", "plain")


class Etcd:
    """etcd's side, by the peers' own Python; None of it: only our figures."""

    def __init__(self, peers: str | None, python: str | None) -> None:
        self._peers, self._python = peers, python

    def run(self, *words: str) -> list[dict[str, float]]:
        if self._peers is None:
            return []
        command = [self._python or sys.executable, str(ROOT / "bench/coord/etcd_side.py"), self._peers, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"etcd's side failed: {done.stderr.strip()[-1000:]}")
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def say(figure: str, ours: str, theirs: str, ratio: str, goal: str) -> None:
    busy = os.getloadavg()[0]
    print(f"| {figure} | {ours} | {theirs or '-'} | {ratio or '-'} | {goal} | {busy:.1f} |", flush=True)


def against(ours: float, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if theirs else ""


async def rate(nodes: Nodes, etcd: Etcd, what: str, in_flight: int, seconds: float, goal: str) -> None:
    theirs = await asyncio.to_thread(etcd.run, what, str(in_flight), str(seconds))
    operation = load.put if what == "puts" else load.read
    if what == "reads":
        await load.fill(nodes)
    ours = await load.run(nodes, operation, in_flight, seconds)
    other = theirs[0] if theirs else {}
    name = f"{'commits' if what == 'puts' else 'linearizable reads'}/s, {in_flight} in flight"
    say(
        name,
        f"{ours.per_s:,.0f}",
        f"{other['per_s']:,.0f}" if other else "",
        against(ours.per_s, other.get("per_s")),
        goal,
    )
    for title, mine, key, wanted in (
        ("p50", ours.p50_ms, "p50_ms", ""),
        ("p99", ours.p99_ms, "p99_ms", "<= etcd's"),
        ("processor ms an operation, servers", ours.server_ms, "server_ms", "<= 0.17"),
    ):
        if in_flight == 64 or key == "p50_ms":
            unit = "" if key == "server_ms" else " ms"
            other_text = f"{other[key]:.3g}{unit}" if other else ""
            say(f"- {title}", f"{mine:.3g}{unit}", other_text, against(mine, other.get(key)), wanted)
    if in_flight == 64:
        say("- processor ms an operation, client", f"{ours.client_ms:.3g}", "", "", "")


async def gaps(nodes: Nodes, etcd: Etcd, name: str, fault: failover.Fault, trials: int, goal: str) -> None:
    ours = [await failover.trial(nodes, fault) for _ in range(trials)]
    theirs = await asyncio.to_thread(etcd.run, name, str(max(3, trials // 4)))
    other = [row["gap_s"] for row in theirs]
    middle = statistics.median(ours)
    say(
        f"no successful write, leader {name}, {trials} times",
        f"{middle:.2f} / {max(ours):.2f} s",
        f"{statistics.median(other):.2f} / {max(other):.2f} s ({len(other)})" if other else "",
        against(middle, statistics.median(other) if other else None),
        goal,
    )


async def measure(asked: argparse.Namespace) -> None:
    etcd, rows, seconds, trials = Etcd(asked.etcd, asked.etcd_python), asked.rows or ROWS, asked.seconds, asked.trials
    print("| figure | ours | etcd | ratio | goal | load |\n| --- | --- | --- | --- | --- | --- |")
    if "memory" in rows:
        for figure, value, goal in await asyncio.to_thread(memory.measure, asked.files):
            say(figure, value, "", "", goal)
    if "sent" in rows:
        for figure, value, goal in await asyncio.to_thread(sent.measure, asked.files, asked.directory):
            say(figure, value, "", "", goal)
    if not {*rows} - {"memory", "sent"}:
        return
    with Nodes(directory=asked.directory) as nodes:
        work: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "puts1": lambda: rate(nodes, etcd, "puts", 1, seconds, ">= 1.5x"),
            "puts16": lambda: rate(nodes, etcd, "puts", 16, seconds, ">= 1.5x"),
            "puts64": lambda: rate(nodes, etcd, "puts", 64, seconds, ">= 2x"),
            "reads64": lambda: rate(nodes, etcd, "reads", 64, seconds, ">= 1.5x"),
            "plain": lambda: plain(nodes, seconds),
            "killed": lambda: gaps(nodes, etcd, "killed", failover.killed(nodes), trials, "<= 0.4 / 1.0 s"),
            "frozen": lambda: gaps(nodes, etcd, "frozen", failover.frozen(nodes), trials, "<= 1.5 / 2.5 s"),
            "cut": lambda: gaps(nodes, etcd, "cut", failover.cut(nodes), trials, "<= 1.5 / 2.5 s"),
        }
        for row in rows:
            if row in work:
                await work[row]()


async def plain(nodes: Nodes, seconds: float) -> None:
    """What TLS to the clients costs: the same by the leader's Unix socket; between the nodes it stays."""
    ours = await load.run(nodes, load.put, 64, seconds, tls=False)
    say("commits/s, 64 in flight, clients without TLS", f"{ours.per_s:,.0f}", "", "", "")
    say("- processor ms an operation, servers", f"{ours.server_ms:.3g}", "", "", "")


def main() -> None:
    parser = argparse.ArgumentParser(description="The coordinator against etcd in the same run.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; none given: all")
    parser.add_argument("--etcd", metavar="DIR", help="where etcd_ref.py and lib.py lie; without it only our figures")
    parser.add_argument("--etcd-python", metavar="PYTHON", help="a Python with grpcio for them")
    parser.add_argument("--directory", help="where the nodes' directories go")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each rate")
    parser.add_argument("--trials", type=int, default=20, help="of each fault")
    parser.add_argument("--files", type=int, default=1_000_000, help="of the rows `memory` and `sent`")
    asked = parser.parse_args()
    if unknown := [row for row in asked.rows if row not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended all the same
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(asked))


if __name__ == "__main__":
    main()
