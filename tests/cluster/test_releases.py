# Two releases in one cluster of real processes: node by node to the new one, one back, each side leading; then `idunno upgrade`.
#
# The old release is taken from the repository's history: the last commit of the machine version before, or the one that
# IDUNNO_OLD_COMMIT names.
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import idunno
from idunno.base.errors import IdunnoError
from idunno.coordinator.records import MACHINE_VERSION
from idunno.node.identity import running_pid
from tests.cluster.harness import TOP, Cluster, CommandFailed, until

pytestmark = pytest.mark.cluster

LAST_COMMIT_BEFORE = "b3fc73f9b1ff1979e05ec40e1c08f02e74a3e08c"
"""The last one on main of machine version 2."""
assert MACHINE_VERSION == 3, "a new machine version: LAST_COMMIT_BEFORE is another one now"


def git(*words: str) -> bytes:
    done = subprocess.run(["git", "-C", str(TOP), *words], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no history to take an older release from: {done.stderr.decode().strip()[:200]}")
    return done.stdout


def old_release(directory: Path) -> Path:
    """The older release, unpacked."""
    commit = os.environ.get("IDUNNO_OLD_COMMIT", LAST_COMMIT_BEFORE)
    archive = git("archive", commit, "idunno")
    directory.mkdir()
    subprocess.run(["tar", "-x", "-C", str(directory)], input=archive, check=True)
    return directory


class Mixed(Cluster):
    """Nodes of two releases; commands are the new one's."""

    def __init__(self, nodes: int, old: Path) -> None:
        super().__init__(nodes)
        self.old = old

    def up(self) -> object:
        """By the old release."""
        words = ["up", "--nodes", str(self.nodes), "--dir", str(self.directory), "--port", str(self.port)]
        environment = {**self.environment(), "PYTHONPATH": str(self.old)}
        done = subprocess.run(
            [sys.executable, "-m", "idunno", *words],
            env=environment,
            cwd=self.old,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return None

    def restart(self, name: str, release: Path) -> None:
        """As an operator does: stop it, install, start it."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGTERM)
        until(lambda: running_pid(self.directory / name) is None, f"the end of {name}")
        self.start_node(name, release)

        def whole() -> bool:
            try:
                with idunno.connect(str(self.directory / name), timeout_s=5.0) as node:
                    members, status = node.members(), node.status()
            except (IdunnoError, OSError):
                return False
            active = [member.name for member in members if member.state == "active"]
            return len(active) == self.nodes and status.scheduler is not None and not status.recovering

        until(whole, f"a whole cluster after the restart of {name}")

    def led_by(self, names: list[str], release: Path) -> None:
        """Restart the leader, as the release it is, until one of these leads."""
        for _ in range(6):
            with idunno.connect(str(self.directory)) as cluster:
                leader = until(lambda: cluster.status().scheduler, "a scheduler")
            if leader in names:
                return
            self.restart(leader, release)
        raise AssertionError(f"none of {names} leads")


def test_a_cluster_goes_from_one_release_to_the_next_node_by_node(tmp_path: Path) -> None:
    old = old_release(tmp_path / "old")
    written: dict[str, bytes] = {}
    cluster = Mixed(3, old)

    def work() -> None:
        """A small and a large file are put, and all are read back."""
        with idunno.connect(str(cluster.directory)) as client:
            for size in (100, 50_000):
                name, content = f"f{len(written)}", os.urandom(size)
                (tmp_path / name).write_bytes(content)
                client.put(tmp_path / name, name)
                written[name] = content
            for name, content in written.items():
                client.get(name, tmp_path / "back")
                assert (tmp_path / "back").read_bytes() == content, name

    with cluster:
        work()
        cluster.restart("n1", TOP)
        cluster.led_by(["n2", "n3"], TOP)
        work()  # two old ones, one of which leads, and a new one
        cluster.restart("n2", TOP)
        cluster.led_by(["n1", "n2"], old)
        work()  # a new one leads an old one
        with pytest.raises(CommandFailed) as caught:
            cluster.command(
                "upgrade", "--check", where=str(cluster.directory / "n1")
            )  # the old one does not know the word
        assert caught.value.status == 1
        assert "n3: idunno" in caught.value.error
        with pytest.raises(CommandFailed):
            cluster.command("upgrade", where=str(cluster.directory / "n1"))
        cluster.restart("n1", old)
        work()  # and back
        for name in ("n1", "n3"):
            cluster.restart(name, TOP)
        found = cluster.json("upgrade", "--check")
        assert (found["version"], found["next"], found["ready"]) == (MACHINE_VERSION - 1, MACHINE_VERSION, True)
        assert cluster.json("upgrade")["raised"]
        assert cluster.json("upgrade", "--check")["version"] == MACHINE_VERSION
        work()
