# tests/cluster/harness.py: real clusters of processes on loopback, for tests that kill for real.
#
# Rule 1: every wait is for a condition, with a deadline that names what was waited for.
# Rule 2: a cluster is gone when its test ends, whatever happened.
from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from idunno.node.identity import running_pid

T = TypeVar("T")

TOP = Path(__file__).parents[2]
DIGITS = TOP / "examples" / "digits"
COMMAND_TIMEOUT_S = 60.0

# Below the ports that the system gives to outgoing connections (32,768 and up), a half of them for each of two test processes,
# and somewhere else in it for each run.
_half = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 2
_next_port = itertools.count(12_000 + _half * 10_000 + os.getpid() % 45 * 200, 16)


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody uses."""
    for first in _next_port:
        try:
            for port in range(first, first + count):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    with socket.socket(socket.AF_INET, kind) as probe:
                        probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("unreachable")


def until(condition: Callable[[], T | None], what: str, *, timeout_s: float = 30.0) -> T:
    """The first true value of `condition`, asked again and again until then."""
    end = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"after {timeout_s} s still waiting for {what}"
        time.sleep(0.05)


class CommandFailed(Exception):
    def __init__(self, words: tuple[str, ...], done: subprocess.CompletedProcess[str]) -> None:
        super().__init__(f"idunno {' '.join(words)}: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
        self.status, self.error = done.returncode, done.stderr


class Cluster:
    """A cluster of `idunno up` in a directory of its own. Use as a context manager."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.directory = Path(tempfile.mkdtemp(prefix="idunno-test-"))
        self.home = self.directory / "home"
        self.port = free_ports(nodes + 4)

    def __enter__(self) -> Cluster:
        try:
            self.up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names():
            self.kill(name, missing_ok=True)
        if os.environ.get("IDUNNO_TEST_KEEP"):
            sys.stderr.write(f"kept: {self.directory}\n")
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    def names(self) -> list[str]:
        return [f"n{i + 1}" for i in range(self.nodes)]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "IDUNNO_CLUSTER": str(self.directory), "IDUNNO_HOME": str(self.home)}

    def command(self, *words: str, timeout_s: float = COMMAND_TIMEOUT_S, where: str | None = None) -> str:
        """Run `idunno WORDS` and return its standard output. Raises CommandFailed."""
        environment = self.environment()
        if where is not None:
            environment["IDUNNO_CLUSTER"] = where
        done = subprocess.run(
            [sys.executable, "-m", "idunno", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s + 30,
            check=False,
        )
        if done.returncode != 0:
            raise CommandFailed(words, done)
        return done.stdout

    def json(self, *words: str, timeout_s: float = COMMAND_TIMEOUT_S, where: str | None = None) -> Any:
        return json.loads(self.command(*words, "--json", "--timeout", str(timeout_s), timeout_s=timeout_s, where=where))

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Run `idunno WORDS` in the background."""
        return subprocess.Popen(
            [sys.executable, "-m", "idunno", *words],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def up(self) -> Any:
        return self.json("up", "--nodes", str(self.nodes), "--dir", str(self.directory), "--port", str(self.port))

    def down(self) -> Any:
        return self.json("down", "--dir", str(self.directory))

    def start_node(self, name: str, release: Path = TOP) -> None:
        """Start the process of one node, of this release or of one that is unpacked elsewhere."""
        with open(self.directory / name / "logs" / "stderr.log", "ab") as output:
            subprocess.Popen(
                [sys.executable, "-m", "idunno.node", "--dir", str(self.directory / name)],
                env={**self.environment(), "PYTHONPATH": str(release)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=release,
            )

    def pid(self, name: str) -> int:
        pid = running_pid(self.directory / name)
        assert pid is not None, f"{name} does not run"
        return pid

    def kill(self, name: str, *, missing_ok: bool = False) -> None:
        """kill -9, and wait until the process is gone."""
        pid = running_pid(self.directory / name)
        if pid is None:
            assert missing_ok, f"{name} does not run"
            return
        os.kill(pid, signal.SIGKILL)
        until(lambda: running_pid(self.directory / name) != pid, f"the end of {name}")

    def living(self) -> list[str]:
        return [name for name in self.names() if running_pid(self.directory / name) is not None]

    def members(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.json("members")
        return found

    def scheduler(self) -> str:
        """The name of the current scheduler, once there is one."""

        def look() -> str | None:
            names = [member["name"] for member in self.members() if member["role"] == "scheduler"]
            return names[0] if names and names[0] in self.living() else None

        return until(look, "a scheduler")

    def job(self, job: str) -> dict[str, Any]:
        found = [row for row in self.json("jobs", "--all") if row["job"] == job]
        assert found, f"job {job} is not listed"
        row: dict[str, Any] = found[0]
        return row

    def resident_mb(self, name: str) -> float:
        for line in Path(f"/proc/{self.pid(name)}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")
