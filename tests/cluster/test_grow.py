# Who votes follows the roster: a cluster grows to five voters by joins, outlives its first node, and shrinks by leaves.
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from idunno.node.identity import running_pid
from tests.cluster.harness import Cluster, CommandFailed, until

pytestmark = pytest.mark.cluster


class Grown:
    """Nodes made one by one, by `init` and `join`. Use as a context manager."""

    def __init__(self, directory: Path, settings: str = "") -> None:
        self.directory, self.settings, self.token = directory, settings, ""
        self.cluster = Cluster(0)  # only its ports, its home and its commands are used
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Grown:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)
        self.cluster.__exit__()

    def add(self, name: str, *, through: str = "") -> None:
        """A new node, made and started."""
        where, listen = self.directory / name, f"127.0.0.1:{self.cluster.port + int(name[1:])}"
        if not self.token:
            made = self.json("", "init", "--dir", str(where), "--listen", listen, "--name", name)
            self.token = made["token"]
        else:
            door = f"127.0.0.1:{self.cluster.port + int(through[1:])}"
            self.json(
                "", "join", door, "--token", self.token, "--dir", str(where), "--listen", listen, "--name", name
            )  # fmt: skip
        settings = (where / "node.toml").read_text()
        names = [line.split(" = ")[0] for line in self.settings.splitlines()]
        kept = [line for line in settings.splitlines() if line.split(" = ")[0] not in names]
        (where / "node.toml").write_text("\n".join([*kept, self.settings, ""]))
        self.start(name)

    def start(self, name: str) -> None:
        where = self.directory / name
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", "idunno", "node", "run", "--dir", str(where)],
            env={**os.environ, "IDUNNO_HOME": str(self.cluster.home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        until(lambda: running_pid(where) is not None and (where / "node.sock").exists(), f"the start of {name}")

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with contextlib.suppress(FileNotFoundError):
            (self.directory / name / "node.sock").unlink()

    def json(self, where: str, *words: str, timeout_s: float = 60.0) -> Any:
        return self.cluster.json(*words, where=str(self.directory / where), timeout_s=timeout_s)

    def voters(self, where: str) -> list[str]:
        with contextlib.suppress(CommandFailed):
            found: list[str] = self.json(where, "status")["voters"]
            return sorted(found)
        return []

    def until_voters(self, where: str, *names: str, timeout_s: float = 30.0) -> None:
        wanted = sorted(names)
        until(lambda: self.voters(where) == wanted, f"the voters {wanted}", timeout_s=timeout_s)

    def put(self, where: str, name: str, content: bytes) -> None:
        source = self.directory / "in"
        source.write_bytes(content)
        self.json(where, "put", str(source), name)

    def get(self, where: str, name: str) -> bytes:
        target = self.directory / "out"
        self.json(where, "get", name, str(target))
        return target.read_bytes()


@pytest.fixture
def grown(tmp_path: Path) -> Iterator[Grown]:
    with Grown(tmp_path, "voter_silent_s = 3\n") as grown:
        yield grown


def test_one_voter_becomes_three_and_five_and_outlives_the_first_node(grown: Grown) -> None:
    grown.add("n1")
    until(lambda: grown.json("n1", "status")["scheduler"] == "n1", "the first scheduler")
    grown.put("n1", "first", b"from the time of one")
    grown.add("n2", through="n1")
    grown.add("n3", through="n2")
    grown.until_voters("n1", "n1", "n2", "n3")
    grown.add("n4", through="n3")
    grown.add("n5", through="n1")
    grown.until_voters("n5", "n1", "n2", "n3", "n4", "n5")
    for name in ("n2", "n5"):
        key = grown.directory / name / "ca.key"
        assert key.stat().st_mode & 0o777 == 0o600
        assert key.read_bytes() == (grown.directory / "n1" / "ca.key").read_bytes()
    until(lambda: grown.json("n2", "status")["healthy"], "a healthy cluster")
    grown.kill("n1")
    assert until(lambda: grown.json("n2", "status")["scheduler"], "another scheduler") != "n1"
    grown.put("n4", "second", b"without the first")
    assert grown.get("n5", "first") == b"from the time of one"
    grown.add("n6", through="n2")  # whoever leads now signs
    grown.until_voters("n3", "n2", "n3", "n4", "n5", "n6")  # in the place of the silent one
    gone = grown.json("n3", "remove", "n1")
    assert "no longer works" in gone["text"]
    assert "n1" not in {row["name"] for row in grown.json("n4", "members")}
    grown.start("n1")
    with pytest.raises(CommandFailed):
        grown.json("n1", "put", str(grown.directory / "in"), "from-outside", timeout_s=5.0)
    assert grown.get("n6", "second") == b"without the first"


def test_nodes_leave_until_one_is_left_and_nothing_is_lost(grown: Grown) -> None:
    grown.add("n1")
    until(lambda: grown.json("n1", "status")["scheduler"] == "n1", "the first scheduler")
    for name in ("n2", "n3"):
        grown.add(name, through="n1")
    grown.until_voters("n1", "n1", "n2", "n3")
    grown.put("n2", "kept", b"kept")
    before = (grown.directory / "n2" / "cluster.key").read_bytes()
    answer = grown.json("n1", "leave", "n1")  # the one that leads, most likely, is asked itself
    assert "safe to switch it off" in answer["text"]
    assert grown.processes.pop("n1").wait(timeout=20) == 0
    until(lambda: {row["name"] for row in grown.json("n2", "members")} == {"n2", "n3"}, "two members")
    until(lambda: len(grown.voters("n2")) == 1, "one voter")
    until(lambda: (grown.directory / "n2" / "cluster.key").read_bytes() != before, "a new cluster key")
    assert grown.get("n3", "kept") == b"kept"
    grown.json("n2", "leave", "n3")
    assert grown.processes.pop("n3").wait(timeout=20) == 0
    grown.put("n2", "kept", b"alone")
    assert grown.get("n2", "kept") == b"alone"
    with pytest.raises(CommandFailed) as caught:
        grown.json("n2", "leave", "n2")
    assert "last node" in caught.value.error


def test_a_node_that_was_away_while_the_log_was_cut_comes_back_and_has_everything(tmp_path: Path) -> None:
    with Grown(tmp_path, "voter_silent_s = 60\nsnapshot_entries = 40\n") as grown:
        grown.add("n1")
        until(lambda: grown.json("n1", "status")["scheduler"] == "n1", "the first scheduler")
        for name in ("n2", "n3"):
            grown.add(name, through="n1")
        grown.until_voters("n1", "n1", "n2", "n3")
        grown.put("n1", "before", b"before")
        grown.kill("n3")
        folder = tmp_path / "small"
        folder.mkdir()
        for turn in range(4):
            for number in range(40):
                (folder / str(number)).write_bytes(b"content %d, turn %d" % (number, turn))
            grown.json("n1", "put", str(folder), "small/")
        grown.put("n1", "large", bytes(20_000))
        segments = grown.directory / "n1" / "log"
        until(lambda: (segments / "snapshot").exists(), "a snapshot")
        for name in ("n1", "n2"):  # from the snapshot and what follows it
            grown.kill(name)
        grown.start("n1")
        grown.start("n2")
        assert until(lambda: grown.json("n1", "status")["scheduler"], "a scheduler") in ("n1", "n2")
        assert grown.get("n2", "small/19") == b"content 19, turn 3"
        grown.start("n3")
        story = grown.directory / "n3" / "logs" / "node.jsonl"
        until(lambda: "snapshot taken in" in story.read_text(), "n3 to take a snapshot in")
        until(lambda: grown.json("n3", "status")["applied"] >= grown.json("n1", "status")["commit"], "n3 to catch up")
        for name in ("n1", "n2"):
            grown.kill(name)
        small = (grown.directory / "n3" / "small" / "0000000001.seg").read_bytes()
        assert all(b"content %d, turn %d" % (number, turn) in small for number in range(40) for turn in range(4))
        grown.start("n2")
        for number in (0, 39):
            assert grown.get("n3", f"small/{number}") == b"content %d, turn 3" % number
        assert grown.get("n3", "before") == b"before"
        assert grown.get("n3", "large") == bytes(20_000)
