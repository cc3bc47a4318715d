# bench/coord/cluster.py: three real nodes for the benchmark, and real clients of them over TLS.
#
# Rule 1: nothing here is special to the benchmark: `idunno up`, a token, `idunno login`, the client's own session.
# Rule 2: only processes that were started here are signalled.
from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from idunno.client.dial import dialer
from idunno.client.locate import Place, TcpDoor, login_directory
from idunno.client.session import Session
from idunno.node.identity import running_pid

TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
READY_S: Final = 60.0


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def memory_mb(pid: int, what: str = "VmRSS") -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no {what} of process {pid}")


def free_ports(count: int) -> int:
    for first in range(21_000 + os.getpid() % 400 * 20, 60_000, 20):
        try:
            for port in range(first, first + count):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    with socket.socket(socket.AF_INET, kind) as probe:
                        probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


class Nodes:
    """A cluster of `idunno up`; a context manager that leaves nothing behind."""

    def __init__(self, count: int = 3, directory: str | None = None) -> None:
        self.count = count
        self.directory = Path(tempfile.mkdtemp(prefix="idunno-bench-", dir=directory))
        self.port = free_ports(count)
        self.home = self.directory / "home"

    def __enter__(self) -> Nodes:
        self.up()
        token = self.run("token", "new", "--role", "user")["token"]
        self.run("login", f"127.0.0.1:{self.port}", "--token", token, "--name", "bench")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.names():
            self.signal(name, signal.SIGKILL)
        if os.environ.get("IDUNNO_BENCH_KEEP"):
            print(f"kept: {self.directory}", file=sys.stderr)
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    def up(self) -> None:
        self.run("up", "--nodes", str(self.count), "--dir", str(self.directory), "--port", str(self.port))

    def names(self) -> list[str]:
        return [f"n{i + 1}" for i in range(self.count)]

    def run(self, *words: str) -> Any:
        environment = {**os.environ, "IDUNNO_CLUSTER": str(self.directory), "IDUNNO_HOME": str(self.home)}
        command = [sys.executable, "-m", "idunno", *words, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"idunno {' '.join(words)}: {done.stderr.strip()[-2000:]}")
        return json.loads(done.stdout) if done.stdout.strip() else None

    def pid(self, name: str) -> int | None:
        return running_pid(self.directory / name)

    def pids(self) -> dict[str, int]:
        return {name: pid for name in self.names() if (pid := self.pid(name)) is not None}

    def signal(self, name: str, number: int) -> None:
        pid = self.pid(name)
        if pid is not None:
            os.kill(pid, number)

    def cpu_s(self) -> dict[str, float]:
        return {name: cpu_s(pid) for name, pid in self.pids().items()}

    def leader(self) -> str:
        """The name of the node that leads, once all are there and agree."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            try:
                members = self.run("members")
            except RuntimeError:
                members = []
            leaders = [row["name"] for row in members if row["role"] == "scheduler"]
            if leaders and all(row["state"] == "active" for row in members) and len(members) == self.count:
                return str(leaders[0])
            time.sleep(0.1)
        raise AssertionError("no leader")

    # -- clients ------------------------------------------------------------------------------------------------------

    def session(self, *names: str) -> Session:
        """A client's session over TLS with the first of these nodes that lives."""
        doors = tuple(TcpDoor("127.0.0.1", self.port + int(name[1:]) - 1, name) for name in names)
        place = Place(str(self.directory), doors, "the benchmark's cluster", self._login())
        return Session(place, dialer(place), _First())

    def local_session(self, name: str) -> Session:
        """The same without TLS, by the node's Unix socket: what TLS costs is the difference."""
        from idunno.client.locate import SocketDoor

        place = Place(str(self.directory), (SocketDoor(self.directory / name / "node.sock", name),), "")
        return Session(place, dialer(place), _First())

    def _login(self) -> Path:
        return login_directory(self.home, "127.0.0.1", self.port)


class _First(random.Random):
    """Begins with the first door."""

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return 0 if stop is None else start


async def closed(*sessions: Session) -> None:
    await asyncio.gather(*(session.close() for session in sessions))
