# Three of five nodes burn. What the other two have goes on as another cluster, and who comes back is told, and let in again.
from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, CommandFailed, until

pytestmark = pytest.mark.cluster


def test_three_of_five_are_destroyed_and_one_of_them_comes_back(tmp_path: Path) -> None:
    rng = random.Random(3)
    contents = {"small": b"rides in the log", "large": rng.randbytes(300_000), "later": rng.randbytes(50_000)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with Cluster(5) as cluster:
        for name in ("small", "large"):
            cluster.json("put", str(tmp_path / name), f"files/{name}")
        saved = cluster.directory / "saved"
        for name in cluster.names():
            cluster.kill(name)
        (cluster.directory / "n3").rename(saved)  # it was thought to be lost
        for name in ("n1", "n2"):
            shutil.rmtree(cluster.directory / name)
        survivors = [str(cluster.directory / name) for name in ("n4", "n5")]

        with pytest.raises(CommandFailed) as refused:
            cluster.command("recover", "--dir", *survivors)
        assert "look with --dry-run, then give --yes" in refused.value.error
        shown = cluster.json("recover", "--dry-run", "--dir", *survivors)
        assert (shown["recovered"], shown["report"]["gone"]) == (False, ["n1", "n2", "n3"])
        made = cluster.json("recover", "--yes", "--dir", *survivors)
        assert (made["recovered"], made["nodes"], made["report"]["versions_lost"]) == (True, ["n4", "n5"], 0)

        cluster.json("up", "--dir", str(cluster.directory))
        for name in ("small", "large"):
            cluster.json("get", f"files/{name}", str(tmp_path / "back"))
            assert (tmp_path / "back").read_bytes() == contents[name]
        cluster.json("put", str(tmp_path / "later"), "files/later")
        assert sorted(member["name"] for member in cluster.members()) == ["n4", "n5"]

        # The one that was not lost starts with its old identity: it is told, and ends.
        saved.rename(cluster.directory / "n3")
        old = [sys.executable, "-m", "idunno", "node", "run", "--dir", str(cluster.directory / "n3")]
        ended = subprocess.run(old, capture_output=True, text=True, timeout=30, check=False)
        assert ended.returncode == 1
        assert ended.stderr.startswith("error: cluster ")
        assert f"was recovered as {made['cluster'][:8]}" in ended.stderr
        assert "--adopt --token TOKEN" in ended.stderr

        address = f"127.0.0.1:{cluster.port + 3}"
        words = ["join", address, "--token", made["token"], "--dir", str(cluster.directory / "n3"), "--adopt"]
        adopted = cluster.json(*words)
        assert (adopted["cluster"], adopted["name"], adopted["quarantined"]) == (made["cluster"], "n3", 0)
        assert adopted["blocks"] >= 1
        cluster.json("up", "--dir", str(cluster.directory))
        assert sorted(member["name"] for member in cluster.members()) == ["n3", "n4", "n5"]
        where = until(
            lambda: (found := cluster.json("where", "files/large"))["copies"]["found"] == 3 and found,
            "all copies counted",
        )
        assert all("n3" in block["nodes"] for block in where["blocks"])
