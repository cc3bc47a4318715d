# A cluster that grows machine by machine: init, join, a member's own directory as the way in.
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.answers import check_digits
from tests.cluster.harness import DIGITS, TOP, Cluster, until

pytestmark = pytest.mark.cluster


@contextmanager
def running(*words: str, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the foreground of its own process; stopped with SIGTERM, as a service manager would."""
    environment = {**os.environ, "IDUNNO_HOME": str(home), "IDUNNO_VENV": str(Path(sys.prefix))}
    process = subprocess.Popen(list(words), env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0, f"{words} did not stop cleanly"
    finally:
        process.kill()
        process.communicate()


def test_a_cluster_grows_by_joins_and_says_as_long_as_it_has_one_voter(tmp_path: Path) -> None:
    cluster = Cluster(0)  # only its ports, its home and its commands are used
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    ports = [cluster.port + i for i in range(3)]
    idunno = [sys.executable, "-m", "idunno"]
    made = cluster.json("init", "--dir", str(first), "--listen", f"127.0.0.1:{ports[0]}", "--name", "first")
    with running(*idunno, "node", "run", "--dir", str(first), home=cluster.home):
        until(lambda: (first / "node.sock").exists(), "the first node")

        def members(where: Path) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = cluster.json("members", where=str(where))
            return found

        until(lambda: cluster.json("status", where=str(first))["scheduler"] == "first", "the first scheduler")
        status = cluster.json("status", where=str(first))
        assert not status["healthy"]
        assert "one voter" in status["why"]
        joined = cluster.json(
            "join", f"127.0.0.1:{ports[0]}", "--token", made["token"], "--dir", str(second),
            "--listen", f"127.0.0.1:{ports[1]}", "--name", "second",
        )  # fmt: skip
        assert joined["name"] == "second"
        script = str(TOP / "scripts" / "run_process")
        address = f"127.0.0.1:{ports[0]}"
        with (
            running(*idunno, "node", "run", "--dir", str(second), home=cluster.home),
            running(script, address, made["token"], str(third), f"127.0.0.1:{ports[2]}", home=cluster.home),
        ):
            until(
                lambda: [m["state"] for m in members(first)] == ["active"] * 3 and (third / "node.sock").exists(),
                "three active members",
            )
            until(lambda: [m["state"] for m in members(third)] == ["active"] * 3, "the newcomer to see all")
            status = cluster.json("status", where=str(second))  # the joined node's own view
            assert (status["node"], status["scheduler"]) == ("second", "first")
            until(
                lambda: len(cluster.json("status", where=str(second))["voters"]) == 3,
                "three voters, where one was before",
            )
            put = cluster.json("put", str(DIGITS / "digits.zip"), "z.zip", where=str(second))
            assert (put["copies"], put["degraded"]) == (3, False)  # as many as there are nodes
            cluster.json("deploy", "digits", str(DIGITS / "digits.onnx"), where=str(second))
            cluster.json("infer", "digits", "sdfs:z.zip", "--output", str(tmp_path / "out.jsonl"), where=str(second))
            check_digits(tmp_path / "out.jsonl")
            assert cluster.json("get", "z.zip", str(tmp_path / "z"), where=str(first))["size"] == put["size"]
        until(lambda: sorted(m["state"] for m in members(first)) == ["active", "stopped", "stopped"], "their stop seen")
        # Two of three voters are stopped, and nobody has said that they are gone for good.
        until(lambda: "no quorum: 1 of 3" in cluster.json("status", where=str(first))["why"], "no quorum")
    cluster.__exit__()
