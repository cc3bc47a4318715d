"""The file store's figures: five real nodes on this machine, four copies, synced, TLS between nodes; limits from the same run.

Usage: python bench/files.py [--rows put,get,small,repair] [--runs 3] [--mb 500] [--kills 10] [--dir DIR]

Rows: a large put and get beside `cp` + fsync; puts and gets of 4 KB files, 1 and 64 in flight; processor seconds of all nodes
and the client; peak memory; how late the nodes' loops ran meanwhile; how soon 40 MB that were lost with a node have their
copies again. The client is a process of its own (`bench/files_client.py`), through the node's Unix socket. `machine` is how
busy the two cores were before the bench began: with others at work only ratios of one run say something.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from idunno.node.identity import running_pid
from idunno.node.lateness import percentile_ms
from idunno.node.local import down, existing_nodes, up

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
LOST_BYTES = 40_000_000
SMALL_S = 5.0
"""For one run of small puts or gets, if it does not come to its end sooner."""
CLIENT = Path(__file__).with_name("files_client.py")


nice = 0


def favour(pid: int) -> None:
    """Give the process's session the priority that was asked for: each node and the bench itself are sessions of their own, among
    which the system divides the processors whatever the priority of a process is."""
    if nice:
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


class Client:
    """A client process: one JSON line in, one out."""

    def __init__(self, where: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(CLIENT), str(where)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        assert self._answer() == "ready"

    def __call__(self, what: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the client process ended: see its error above"
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@contextlib.contextmanager
def client(where: Path) -> Iterator[Client]:
    one = Client(where)
    try:
        yield one
    finally:
        one.close()


class Cluster:
    def __init__(self, directory: Path, port: int) -> None:
        self.directory, self.port = directory, port
        self.scheduler = ""
        self.start()

    def start(self) -> None:
        self.scheduler = str(up(self.directory, 5, self.port)["scheduler"])
        for pid in self.pids().values():
            favour(pid)

    def pids(self) -> dict[str, int]:
        return {node.name: pid for node in existing_nodes(self.directory) if (pid := running_pid(node)) is not None}

    def late(self) -> Counter[str]:
        """How late the loops ran so far, all nodes together."""
        total: Counter[str] = Counter()
        for name in self.pids():
            with client(self.directory / name) as one:
                total.update(one("late"))
        return total


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))


def middle(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def stamp(source: Path) -> None:
    """Make every block another one: what the nodes have already is not written again."""
    with open(source, "r+b") as file:
        for at in range(0, source.stat().st_size, 1_000_000):
            file.seek(at)
            file.write(os.urandom(16))
        file.flush()
        os.fsync(file.fileno())


def touch_memory(folder: Path, size: int) -> None:
    """Have the system hold so much free memory that was in use just now, before the limit and before ours alike.

    A virtual machine gives free memory back to its host, and gets it again page by page, at many times the cost of a copy.
    """
    piece = bytes(1 << 20)
    with open(folder / "touched", "wb", buffering=0) as file:
        for _ in range(size >> 20):
            file.write(piece)
    (folder / "touched").unlink()


def copies_s(source: Path, folder: Path, copies: int) -> float:
    """`copies` times cp and fsync, all at once: what nobody who stores so many copies on this disk can beat."""

    def one(number: int) -> None:
        target = folder / f"copy{number}"
        subprocess.run(["cp", source, target], check=True)
        subprocess.run(["sync", target], check=True)

    touch_memory(folder, copies * source.stat().st_size)
    began = time.perf_counter()
    with ThreadPoolExecutor(copies) as pool:
        list(pool.map(one, range(copies)))
    took = time.perf_counter() - began
    for number in range(copies):
        (folder / f"copy{number}").unlink()
    return took


def large(cluster: Cluster, folder: Path, runs: int, mb: int, rows: set[str]) -> None:
    source = folder / "source"
    with open(source, "wb") as file:
        for _ in range(mb):
            file.write(os.urandom(1_000_000))
    os.sync()
    gb = mb / 1000
    puts, gets, put_limits, get_limits, cpu = [], [], [], [], []
    size = mb * 1_000_000
    late: Counter[str] = Counter()
    with client(cluster.directory) as one:
        one("put", path=str(CLIENT), name="warm")  # connections are made, code is loaded
        for run in range(runs):
            stamp(source)
            put_limits.append(copies_s(source, folder, 4))
            pids = [*cluster.pids().values(), one.pid]
            touch_memory(folder, 4 * size)
            late_before, before = cluster.late(), sum(map(processor_s, pids))
            puts.append(one("put", path=str(source), name=f"large{run}")["seconds"])
            cpu.append((sum(map(processor_s, pids)) - before) / gb)
            late += cluster.late() - late_before  # not while the limit is measured: `cp` holds up the log's syncs, too
        for run in range(runs if "get" in rows else 0):
            get_limits.append(copies_s(source, folder, 1))
            touch_memory(folder, size)
            gets.append(one("get", path=str(folder / "back"), name=f"large{run}")["seconds"])
            if run == runs - 1:
                subprocess.run(["cmp", source, folder / "back"], check=True)
            (folder / "back").unlink()
        peak = peak_mb(one.pid)
    report(f"put {mb} MB, s", puts, put_limits, 2.2, "4 x cp + fsync at once")
    if gets:
        report(f"get {mb} MB, s", gets, get_limits, 2.0, "cp + fsync")
    print(f"{'processor s per GB put':<28} {middle(cpu):>24}   bound 9")
    print(
        f"{'loop late during puts, ms':<28} p50 {percentile_ms(late, 0.5):g}  p99 {percentile_ms(late, 0.99):g}  p99.9 "
        f"{percentile_ms(late, 0.999):g} of {sum(late.values())} samples   bound 20 at p99.9"
    )
    print(f"{'client peak MB':<28} {peak:>24.0f}   bound 160")
    source.unlink()


def report(what: str, ours: list[float], limits: list[float], bound: float, limit: str) -> None:
    ratio = statistics.median(mine / theirs for mine, theirs in zip(ours, limits, strict=True))
    print(f"{what:<28} {middle(ours):>24}   {limit}: {middle(limits)}   ratio {ratio:.2f}, bound {bound}", flush=True)


def small(cluster: Cluster, runs: int) -> None:
    follower = next(name for name in sorted(cluster.pids()) if name != cluster.scheduler)
    for entry, which in ((cluster.scheduler, "through the scheduler"), (follower, "through another node")):
        with client(cluster.directory / entry) as one:
            one("puts", name=f"warm-{entry}/", count=200, in_flight=16)
            pids = [*cluster.pids().values(), one.pid]
            put: dict[int, int] = {}  # how many of the first run, by how many were in flight
            for what, in_flight, count, bound in (
                ("puts", 1, 1_000, 1_000),
                ("puts", 64, 6_000, 6_000),
                ("gets", 1, 2_000, 2_000),
                ("gets", 64, 10_000, 10_000),
            ):
                rates, cpu = [], []
                for run in range(runs):
                    before = sum(map(processor_s, pids))
                    if what == "puts":
                        answer = one(
                            what, name=f"{entry}-{in_flight}-{run}/", count=count, in_flight=in_flight, seconds=SMALL_S
                        )
                        put[in_flight] = answer["done"] if run == 0 else put[in_flight]
                    else:
                        name, known = f"{entry}-{in_flight}-0/", max(1, put[in_flight] - in_flight)
                        answer = one(what, name=name, count=count, known=known, in_flight=in_flight, seconds=SMALL_S)
                    cpu.append((sum(map(processor_s, pids)) - before) / answer["done"] * 1e6)
                    rates.append(answer["done"] / answer["seconds"])
                print(
                    f"{what} of 4 KB, {in_flight} in flight: {statistics.median(rates):,.0f}/s "
                    f"({min(rates):,.0f}-{max(rates):,.0f}), {statistics.median(cpu):,.0f} us of processor each, {which}"
                    f"   bound {bound:,}",
                    flush=True,
                )
            print(f"{'client peak MB':<28} {peak_mb(one.pid):>24.0f}   bound 160")


def folder_of_files(cluster: Cluster, folder: Path, count: int = 2_000) -> None:
    """`idunno put FOLDER` and `idunno get NAME/`, the start of the program included."""
    source, back = folder / "many", folder / "many-back"
    for number in range(count):
        (source / str(number % 10)).mkdir(parents=True, exist_ok=True)
        (source / str(number % 10) / str(number)).write_bytes(os.urandom(4096))
    command = [sys.executable, "-m", "idunno", "--cluster", str(cluster.directory)]
    for what, words in (("put", ["put", str(source), "many"]), ("get", ["get", "many/", str(back)])):
        began = time.perf_counter()
        subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)
        print(
            f"`idunno {what}` of a folder of {count:,} files of 4 KB: {count / (time.perf_counter() - began):,.0f} files/s"
        )
    subprocess.run(["diff", "-r", source, back], check=True)


def repair(cluster: Cluster, folder: Path, kills: int) -> None:
    """Kill a node that holds about 40 MB of a file; until every block of it has four copies on present nodes again."""
    source, times = folder / "lost", []
    for kill in range(kills):
        names = sorted(cluster.pids())
        entry, victim = names[0], names[1 + kill % 4]
        source.write_bytes(os.urandom(LOST_BYTES * 5 // 4))  # four copies on five nodes: each node holds four fifths
        with client(cluster.directory / entry) as one:
            one("put", path=str(source), name=f"lost{kill}")
            one("whole", seconds=60)
            pid = cluster.pids()[victim]
            began = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            one("restored", victim=victim, seconds=120)
            times.append(time.perf_counter() - began)
            one("delete", name=f"lost{kill}")
        cluster.start()
    source.unlink()
    print(
        f"40 MB lost with a node, restored in s: median {statistics.median(times):.2f}, max {max(times):.2f} "
        f"({kills} kills)   bounds 2.6, 3.8"
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="put,get,small,repair")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--dir", help="on the disk to be measured")
    parser.add_argument("--port", type=int, default=27_500)
    parser.add_argument(
        "--nice", type=int, default=0, help="of limit and ours alike, where others use the machine (root)"
    )
    arguments = parser.parse_args()
    global nice
    nice = arguments.nice
    if nice:
        os.setsid()
    favour(os.getpid())
    rows = set(arguments.rows.split(","))
    load = os.getloadavg()
    print(
        f"machine: {os.cpu_count()} cores, load {load[0]:.1f} in the last minute, {load[1]:.1f} in the last five, nice {nice}"
    )
    folder = Path(tempfile.mkdtemp(prefix="idunno-bench-", dir=arguments.dir))
    directory = folder / "cluster"
    try:
        cluster = Cluster(directory, arguments.port)
        if rows & {"put", "get"}:
            large(cluster, folder, arguments.runs, arguments.mb, rows)
        if "small" in rows:
            small(cluster, arguments.runs)
            folder_of_files(cluster, folder)
        peaks = {name: peak_mb(pid) for name, pid in cluster.pids().items()}
        print(f"{'nodes peak MB':<28} {', '.join(f'{n} {p:.0f}' for n, p in peaks.items()):>24}   bound 160")
        if "repair" in rows:
            # In a cluster of its own: with other files' blocks lost as well, most would rest a minute before they are copied.
            down(directory)
            shutil.rmtree(directory)
            repair(Cluster(directory, arguments.port), folder, arguments.kills)
    finally:
        with contextlib.suppress(FileNotFoundError):
            down(directory)
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
