"""How fast and how truthful the failure detector is, beside its bounds. From the repository's top:

python -m bench.membership [--kills 30] [--minutes 60] [--large 1000] [--only simulated|real|beside] [--seed 1] [--port 28400]
    [--beside DIR] [--adapter serf.json] [--lock FILE]

`--beside DIR`: DIR holds a peer's harness, membership.py, and its adapters/; ours and the peer are measured by it in turns.
`simulated`: the shipped core in one process on a virtual clock (tests/unit/membership/net.py is the network). `real`: ten
processes on loopback, killed with SIGKILL one after the other; times are those of the log lines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import combinations
from pathlib import Path

from bench.beside import beside
from idunno.base.ids import NodeId
from idunno.membership.config import SwimConfig
from idunno.membership.events import Seed, Self
from idunno.membership.messages import State
from idunno.membership.transport import Membership
from idunno.node import lifecycle
from idunno.node.identity import running_pid
from idunno.node.local import down, existing_nodes, up
from idunno.wire.sealed import Opener, Sealer
from tests.unit.membership.net import SimNet, node_id

NODES = 10
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
T_DELETE_S = SwimConfig().t_delete_ms / 1000


class Table:
    """Prints each figure beside its bound as soon as it is there."""

    def __init__(self) -> None:
        self.missed = 0
        print(f"{'figure':<66} {'bound':>12} {'ours':>12}")

    def row(self, figure: str, ours: float, bound: float | None, unit: str = "", digits: int = 2) -> None:
        missed = bound is not None and ours > bound
        self.missed += missed
        limit = "" if bound is None else f"{bound:,.{digits}f}{unit}"
        print(f"{figure:<66} {limit:>12} {f'{ours:,.{digits}f}{unit}':>12}{'  MISSED' if missed else ''}", flush=True)


# -- simulated --------------------------------------------------------------------------------------------------------


def detection(dead: list[int], worlds: int, seed: int, *, lost_connections: bool = False) -> list[float]:
    """Seconds from the deaths until the last of the others holds each for failed."""
    took = []
    for world in range(worlds):
        net = SimNet(NODES, seed=seed * 1_000 + world)
        net.run(2_000 + world * 137 % 1_500)
        net.crash(*dead)
        if lost_connections:
            for number in dead:
                net.doubt(number)
        began_ms = net.now_ms
        net.run(8_000)
        assert all(net.seen(number) == {"failed"} for number in dead), "not within 8 s"
        assert {who for _, _, who in net.failures()} == set(dead)
        for number in dead:
            took.append(max(at for at, _, who in net.failures() if who == number) - began_ms)
    return [ms / 1000 for ms in took]


def freezes(net: SimNet, numbers: list[int], minutes: float, rng: random.Random) -> None:
    """Let each of `numbers` stop for 0.2 to 0.9 s again and again."""
    end_ms = net.now_ms + round(minutes * 60_000)
    todo = []
    for number in numbers:
        at_ms = net.now_ms
        while at_ms < end_ms:
            at_ms += rng.randint(200, 3_000)
            spell_ms = rng.randint(200, 900)
            todo += [(at_ms, True, number), (at_ms + spell_ms, False, number)]
            at_ms += spell_ms
    for at_ms, stops, number in sorted(todo):
        net.run(at_ms - net.now_ms)
        if stops:
            net.frozen.add(number)
        else:
            net.thaw(number)


def simulated(table: Table, minutes: float, large: int, seed: int) -> None:
    hour = f"{minutes:g} min"
    for words, dead in (("one dies", [4]), ("three adjacent", [4, 5, 6]), ("three apart", [2, 5, 8])):
        took = detection(dead, 100, seed)
        table.row(f"simulated: {words}: failed everywhere, median", statistics.median(took), 2.0, " s")
        table.row(f"simulated: {words}: max", max(took), 3.2, " s")
    took = [s for dead in combinations(range(1, NODES + 1), 3) for s in detection(list(dead), 1, seed)]
    table.row("simulated: any three of ten (all 120 choices) die at once, median", statistics.median(took), 2.0, " s")
    table.row("           max", max(took), 3.2, " s")
    took = detection([4], 100, seed, lost_connections=True)
    table.row("simulated: one dies, its connections are seen to break: median", statistics.median(took), 2.0, " s")
    for loss in (0.0, 0.03, 0.10, 0.20):
        net = SimNet(NODES, seed=seed)
        net.loss = loss
        net.bytes.clear()
        net.run(round(minutes * 60_000))
        table.row(f"simulated: {loss:.0%} loss, {hour}: false failures", len(net.failures()), 0, digits=0)
        accused = sum(change.new is State.SUSPICIOUS for _, _, change in net.log) / NODES
        table.row("           suspicions seen per node, all refuted", accused, None, digits=0)
        sent = sum(net.bytes.values()) / NODES / (minutes * 60)
        table.row("           bytes sent per node and second", sent, 1_200 if loss == 0.0 else None, " B", 0)
    net = SimNet(NODES, seed=seed)
    net.udp_cut = {frozenset((3, 8))}
    net.run(round(minutes * 60_000))
    table.row(f"simulated: UDP blocked between two, {hour}: false failures", len(net.failures()), 0, digits=0)
    named = "UDP to" in net.view(3, of=8).problem and "UDP to" in net.view(8, of=3).problem
    table.row("           not named by either's view", 0 if named else 1, 0, digits=0)
    net = SimNet(NODES, seed=seed)
    freezes(net, [2, 5, 6], minutes, random.Random(seed))
    wrong = [who for _, _, who in net.failures() if who not in (2, 5, 6)]
    table.row(f"simulated: 3 of 10 freeze for 0.2-0.9 s, {hour}: healthy ones failed", len(wrong), 0, digits=0)
    table.row("           frozen ones failed", len(net.failures()) - len(wrong), None, digits=0)
    large_world(table, large, seed)


def large_world(table: Table, size: int, seed: int) -> None:
    began_s = time.monotonic()
    net = SimNet(size, seed=seed, settle=False)
    net.know_all()
    net.bytes.clear()
    net.run(30_000)
    sent = sum(net.bytes.values()) / size / 30
    table.row(f"simulated: {size} nodes: bytes sent per node and second, idle", sent, 2_400, " B", 0)
    net.log.clear()
    net.crash(77)
    table.row(
        f"simulated: {size} nodes: a death known to all",
        net.until(_all_see(net, 77, State.FAILED), 20_000) / 1000,
        5.0,
        " s",
    )
    table.row("           false failures", sum(who != 77 for _, _, who in net.failures()), 0, digits=0)
    new = size + 1
    net.allowed.add(node_id(new))
    net.start(new, seeds=[5])
    table.row("           a join known to all", net.until(_all_see(net, new, State.ACTIVE), 20_000) / 1000, 3.0, " s")
    table.row("           this world took", time.monotonic() - began_s, None, " s", 0)


def _all_see(net: SimNet, number: int, state: State) -> Callable[[], bool]:
    node = node_id(number)

    def all_see() -> bool:
        others = (core.members.get(node) for other, core in net.cores.items() if other != number)
        return all(member is not None and member.state is state for member in others)

    return all_see


# -- real -------------------------------------------------------------------------------------------------------------


class Log:
    """A node's log, read on as it grows."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "logs" / "node.jsonl"
        self._offset = 0

    def new(self) -> list[dict[str, object]]:
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def at_s(line: dict[str, object]) -> float:
    return datetime.fromisoformat(str(line["time"])).timestamp()


def is_change(line: dict[str, object], name: str, new: str) -> bool:
    return line["text"] == "member changed" and line.get("member") == name and line.get("new") == new


def wait_all(logs: dict[str, Log], name: str, new: str, after_s: float, timeout_s: float) -> dict[str, float]:
    """When (s after `after_s`) each log said that `name` is `new`."""
    seen: dict[str, float] = {}
    end_s = time.monotonic() + timeout_s
    while len(seen) < len(logs):
        for node, log in logs.items():
            for line in log.new():
                if is_change(line, name, new) and at_s(line) >= after_s - 0.002:
                    seen.setdefault(node, at_s(line) - after_s)
        if time.monotonic() > end_s:
            raise SystemExit(f"{name} is not {new} for {sorted(set(logs) - set(seen))} after {timeout_s:.0f} s")
        time.sleep(0.02)
    return seen


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def count(directory: Path, new: str) -> int:
    """How many lines of all logs say that a member is `new`."""
    lines = [line for node in existing_nodes(directory) for line in Log(node).new()]
    return sum(
        line["text"] == "member changed" and line["part"] == "membership" and line["new"] == new for line in lines
    )


def kill_and_restart(directory: Path, victim: Path) -> tuple[float, float]:
    """(until all others hold it failed, from its start until all others see it again), s."""
    others = {node.name: Log(node) for node in existing_nodes(directory) if node != victim}
    for log in others.values():
        log.new()
    own = Log(victim)
    own.new()
    pid = running_pid(victim)
    assert pid is not None
    killed_s = time.time()
    os.kill(pid, signal.SIGKILL)
    failed = max(wait_all(others, victim.name, "failed", killed_s, 15).values())
    time.sleep(T_DELETE_S)
    up(directory)
    started = next(line for line in own.new() if line["text"] == "membership started")
    back = {node: Log(directory / node) for node in others}
    joined = max(wait_all(back, victim.name, "active", at_s(started), 15).values())
    return failed, joined


def newcomer(table: Table, directory: Path, port: int) -> None:
    """A machine that was in no cluster: `idunno join`, then its first start, until all others see it."""
    words = [sys.executable, "-m", "idunno", "token", "new", "--role", "node", "--json"]
    environment = {**os.environ, "IDUNNO_CLUSTER": str(directory)}
    told = json.loads(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)
    nodes = existing_nodes(directory)
    new = directory.parent / "newcomer"
    began_s = time.time()
    lifecycle.join(f"127.0.0.1:{port}", told["token"], new, f"127.0.0.1:{port + 200}", "newcomer")
    table.row("real: a brand-new member: idunno join", time.time() - began_s, None, " s")
    logs = {node.name: Log(node) for node in nodes}
    (new / "logs").mkdir(exist_ok=True)
    started_s = time.time()
    process = subprocess.Popen([sys.executable, "-m", "idunno.node", "--dir", str(new)], stdin=subprocess.DEVNULL)
    try:
        last_s = started_s + max(wait_all(logs, "newcomer", "active", started_s, 60).values())
        up_s = at_s(next(line for line in Log(new).new() if line["text"] == "membership started"))
        table.row("           from the start of its process until all see it", last_s - started_s, None, " s")
        table.row("           from the moment its detector is up until all see it", last_s - up_s, 0.40, " s")
    finally:
        process.terminate()
        process.wait()


def real(table: Table, kills: int, port: int, seed: int) -> None:
    asyncio.run(idle_bytes(table))
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="idunno-bench-") as name:
        directory = Path(name) / "cluster"
        up(directory, NODES, port)
        try:
            time.sleep(5)
            idle_processor(table, directory)
            fell, came = [], []
            for _ in range(kills):
                time.sleep(rng.uniform(2.0, 3.5))
                failed, joined = kill_and_restart(directory, rng.choice(existing_nodes(directory)))
                fell.append(failed)
                came.append(joined)
            if kills:
                table.row(
                    f"real: kill -9 until all others hold it failed, {kills} kills, median",
                    statistics.median(fell),
                    2.0,
                    " s",
                )
                table.row("           max", max(fell), 3.2, " s")
                table.row("           out of the list, max", max(fell) + T_DELETE_S, 4.3, " s")
                table.row("real: join until all see it, median", statistics.median(came), None, " s")
                table.row("           max", max(came), 0.40, " s")
            table.row(
                "           false failures meanwhile", count(directory, "failed") - kills * (NODES - 1), 0, digits=0
            )
            newcomer(table, directory, port)
            busy(table, directory)
        finally:
            down(directory)


def idle_processor(table: Table, directory: Path) -> None:
    pids = [running_pid(node) or 0 for node in existing_nodes(directory)]
    before, began_s = [processor_s(pid) for pid in pids], time.monotonic()
    time.sleep(15)
    passed_s = time.monotonic() - began_s
    shares = [100 * (processor_s(pid) - then) / passed_s for pid, then in zip(pids, before, strict=True)]
    table.row("real: processor per idle node, whole process, mean", statistics.mean(shares), 1.0, " %")


@contextmanager
def burning(processes: int) -> Iterator[None]:
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def busy(table: Table, directory: Path, seconds: float = 30.0) -> None:
    """Every core wanted three times over by others: the detector must not lie, and may be slower."""
    failed, suspected = count(directory, "failed"), count(directory, "suspicious")
    with burning(3 * (os.cpu_count() or 1)):
        time.sleep(seconds)
    time.sleep(3)
    table.row(
        f"real: all cores busy three times over, {seconds:.0f} s: false failures",
        count(directory, "failed") - failed,
        0,
        digits=0,
    )
    table.row("           suspicions", count(directory, "suspicious") - suspected, None, digits=0)


async def idle_bytes(table: Table) -> None:
    """Ten detectors on loopback sockets, sealed as shipped; nothing else of a node."""
    ports = []
    for _ in range(NODES):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    seeds = [Seed(node_id(i + 1), f"n{i + 1}", f"127.0.0.1:{port}") for i, port in enumerate(ports)]
    members = []
    for i, seed in enumerate(seeds):
        sealer, opener = Sealer([b"k" * 32], seed.node, 1, bytes([i]) * 16), Opener([b"k" * 32])
        me = Self(seed.node, seed.name, seed.address, 1)
        member = Membership(me, SwimConfig(), random.Random(i), sealer.seal, opener.open, _anyone, _wall_ms)
        member.seeds(seeds)
        await member.start("127.0.0.1", ports[i])
        members.append(member)
    await asyncio.sleep(5)  # the news of the start are spread
    before = sum(member.counters["sent-bytes"] for member in members)
    await asyncio.sleep(20)
    sent = (sum(member.counters["sent-bytes"] for member in members) - before) / 20 / NODES
    table.row("real sockets: bytes sent per idle node and second (IP length)", sent, 1_200, " B", 0)
    for member in members:
        await member.stop()


def _anyone(_: NodeId) -> bool:
    return True


def _wall_ms() -> int:
    return int(time.time() * 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the simulated worlds of ten")
    parser.add_argument("--large", type=int, default=1_000, help="nodes of the large simulated world")
    parser.add_argument("--only", choices=("simulated", "real", "beside"))
    parser.add_argument("--beside", type=Path, metavar="DIR", help="a peer's harness, run over it and over ours")
    parser.add_argument("--adapter", default="serf.json", help="of the peer, in DIR/adapters")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="held during each piece of the measurement")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--port", type=int, default=28_400)
    wanted = parser.parse_args()
    table = Table()
    if wanted.only in (None, "simulated"):
        simulated(table, wanted.minutes, wanted.large, wanted.seed)
    if wanted.only in (None, "real"):
        real(table, wanted.kills, wanted.port, wanted.seed)
    if wanted.beside is not None:
        table.missed += not beside(wanted.beside, wanted.adapter, wanted.kills, wanted.lock)
    if table.missed:
        raise SystemExit(f"{table.missed} figures miss their bound")


if __name__ == "__main__":
    main()
