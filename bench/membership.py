"""How fast and how truthful the failure detector is, beside its bounds. From the repository's top:

python -m bench.membership [--kills 30] [--trios 16] [--minutes 60] [--large 1000] [--only simulated|real|three|beside] [--seed 1]
    [--port 28400] [--beside DIR] [--adapter serf.json] [--lock FILE]

`--beside DIR`: DIR holds a peer's harness, membership.py, and its adapters/; ours and the peer are measured by it in turns.
`simulated`: the shipped core in one process on a virtual clock (tests/unit/membership/net.py is the network). `real`: ten
processes on loopback, killed with SIGKILL one after the other; times are those of the log lines. `three`: the same, but three
are killed at once, in turns three that are adjacent in the ring and any three; they are started again before the next round.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from bench.beside import beside
from idunno.base.ids import NodeId
from idunno.membership.config import SwimConfig
from idunno.membership.events import Seed, Self
from idunno.membership.messages import State
from idunno.membership.transport import Membership
from idunno.node import lifecycle
from idunno.node.identity import load_identity, running_pid
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
        self.node = directory.name
        self._path = directory / "logs" / "node.jsonl"
        self._offset = 0

    def to_end(self) -> Log:
        """Without what is there already."""
        self.new()
        return self

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


def wait_all(logs: Sequence[Log], names: Sequence[str], new: str, after_s: float, timeout_s: float) -> dict[str, float]:
    """When (s after `after_s`) the last of the logs said of each of `names` that it is `new`."""
    left = {(log, name) for log in logs for name in names}
    last = dict.fromkeys(names, 0.0)
    end_s = time.monotonic() + timeout_s
    while left:
        for log in logs:
            for line in log.new():
                for name in names:
                    if is_change(line, name, new) and (s := at_s(line) - after_s) >= -0.002 and (log, name) in left:
                        left.remove((log, name))
                        last[name] = max(last[name], s)
        if time.monotonic() > end_s:
            missing = sorted(f"{name} at {log.node}" for log, name in left)
            raise SystemExit(f"not {new} after {timeout_s:.0f} s: {', '.join(missing)}")
        time.sleep(0.02)
    return last


def wait_text(directory: Path, text: str, timeout_s: float) -> None:
    """Until the node's log has a line of this text."""
    log, end_s = Log(directory), time.monotonic() + timeout_s
    while not any(line["text"] == text for line in log.new()):
        if time.monotonic() > end_s:
            raise SystemExit(f"{directory.name} did not say {text!r} within {timeout_s:.0f} s")
        time.sleep(0.02)


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def born_s(pid: int) -> float:
    """When the process was made, by the wall clock; to a hundredth."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    booted_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted_s + int(fields[19]) / TICKS_PER_S


def count(directory: Path, new: str) -> int:
    """How many lines of all logs say that a member is `new`."""
    lines = [line for node in existing_nodes(directory) for line in Log(node).new()]
    return sum(
        line["text"] == "member changed" and line["part"] == "membership" and line["new"] == new for line in lines
    )


class Round(NamedTuple):
    """What one round of deaths took, in s; of several victims the slowest counts."""

    failed: float  # from the kill until all others hold them failed
    started: float  # from the start of their processes until all others see them again
    joined: float  # the same from the first word of their detectors
    false_failures: int  # of members that were not killed


def kill_and_restart(directory: Path, victims: list[Path]) -> Round:
    names = [victim.name for victim in victims]
    others = [node for node in existing_nodes(directory) if node not in victims]
    deaths, joins, all_lines = ([Log(node).to_end() for node in others] for _ in range(3))
    own = [Log(victim).to_end() for victim in victims]
    pids = [running_pid(victim) or 0 for victim in victims]
    assert all(pids)
    killed_s = time.time()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    failed = max(wait_all(deaths, names, "failed", killed_s, 15).values())
    time.sleep(T_DELETE_S)
    up(directory)
    seen = wait_all(joins, names, "active", killed_s, 15)
    started = [at_s(next(line for line in log.new() if line["text"] == "membership started")) for log in own]
    born = [born_s(running_pid(victim) or 0) for victim in victims]
    lines = [line for log in all_lines for line in log.new()]
    false = sum(is_change(line, str(line.get("member")), "failed") and line["member"] not in names for line in lines)
    return Round(
        failed,
        max(killed_s + seen[name] - at for name, at in zip(names, born, strict=True)),
        max(killed_s + seen[name] - at for name, at in zip(names, started, strict=True)),
        false,
    )


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
    logs = [Log(node) for node in nodes]
    (new / "logs").mkdir(exist_ok=True)
    started_s = time.time()
    process = subprocess.Popen([sys.executable, "-m", "idunno.node", "--dir", str(new)], stdin=subprocess.DEVNULL)
    try:
        last_s = started_s + wait_all(logs, ["newcomer"], "active", started_s, 60)["newcomer"]
        up_s = at_s(next(line for line in Log(new).new() if line["text"] == "membership started"))
        table.row("           from the start of its process until all see it", last_s - started_s, None, " s")
        table.row("           from the moment its detector is up until all see it", last_s - up_s, 0.40, " s")
        # A start that is broken off ends without a word, and the others would call it failed while the next figure is measured.
        wait_text(new, "node started", 10)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def cluster(port: int) -> Iterator[Path]:
    """Ten running nodes, with their bytecode, as an installed package has it."""
    with tempfile.TemporaryDirectory(prefix="idunno-bench-") as name:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(name) / "bytecode")
        directory = Path(name) / "cluster"
        up(directory, NODES, port)
        try:
            time.sleep(5)
            yield directory
        finally:
            down(directory)


def real(table: Table, kills: int, port: int, seed: int) -> None:
    asyncio.run(idle_bytes(table))
    rng = random.Random(seed)
    with cluster(port) as directory:
        idle_processor(table, directory)
        rounds = []
        for _ in range(kills):
            time.sleep(rng.uniform(2.0, 3.5))
            rounds.append(kill_and_restart(directory, [rng.choice(existing_nodes(directory))]))
        if rounds:
            deaths(table, f"real: kill -9 until all others hold it failed, {kills} kills", rounds)
            started, joined = [one.started for one in rounds], [one.joined for one in rounds]
            table.row("real: a restarted process until all see it, median", statistics.median(started), 0.40, " s")
            table.row("           from the first word of its detector, median", statistics.median(joined), None, " s")
            table.row("           max", max(joined), 0.40, " s")
        newcomer(table, directory, port)
        busy(table, directory)


def three(table: Table, trios: int, port: int, seed: int) -> None:
    """Three die at once: every other time three that are adjacent in the ring, else any three."""
    rng = random.Random(seed)
    adjacent, anywhere = list[Round](), list[Round]()
    with cluster(port) as directory:
        ring = sorted(existing_nodes(directory), key=lambda node: load_identity(node).node)
        for number in range(trios):
            time.sleep(rng.uniform(2.0, 3.5))
            if number % 2 == 0:
                at = rng.randrange(NODES)
                adjacent.append(kill_and_restart(directory, [ring[(at + i) % NODES] for i in range(3)]))
            else:
                anywhere.append(kill_and_restart(directory, rng.sample(ring, 3)))
    for words, rounds in (("adjacent", adjacent), ("any", anywhere)):
        if rounds:
            deaths(table, f"real: kill -9 of three at once ({words}), {len(rounds)} times", rounds)


def deaths(table: Table, figure: str, rounds: list[Round]) -> None:
    failed = [one.failed for one in rounds]
    table.row(f"{figure}, median", statistics.median(failed), 2.0, " s")
    table.row("           max", max(failed), 3.2, " s")
    table.row("           out of the list, max", max(failed) + T_DELETE_S, 4.3, " s")
    table.row("           false failures meanwhile", sum(one.false_failures for one in rounds), 0, digits=0)


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
    parser.add_argument("--trios", type=int, default=16, help="how often three are killed at once")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the simulated worlds of ten")
    parser.add_argument("--large", type=int, default=1_000, help="nodes of the large simulated world")
    parser.add_argument("--only", choices=("simulated", "real", "three", "beside"))
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
    if wanted.only in (None, "three"):
        three(table, wanted.trios, wanted.port, wanted.seed)
    if wanted.beside is not None:
        table.missed += not beside(wanted.beside, wanted.adapter, wanted.kills, wanted.lock)
    if table.missed:
        raise SystemExit(f"{table.missed} figures miss their bound")


if __name__ == "__main__":
    main()
