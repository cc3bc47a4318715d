# Three of five nodes burn. What the other two have goes on as another cluster, and who comes back is told, and let in again.
from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, CommandFailed, until
from tests.simulation.dumps import DumpedWorld, load
from tests.simulation.world import World

pytestmark = pytest.mark.cluster


def test_three_of_five_are_destroyed_and_one_of_them_comes_back(tmp_path: Path) -> None:
    rng = random.Random(3)
    contents = {"small": b"rides in the log", "large": rng.randbytes(300_000), "later": rng.randbytes(50_000)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with Cluster(5) as cluster:
        for name in ("small", "large"):
            cluster.json("put", str(tmp_path / name), f"files/{name}")
        where = cluster.json("where", "files/large")["blocks"][0]["nodes"]
        lucky = next(name for name in ("n3", "n2", "n1") if name in where)  # four of five hold it
        saved = cluster.directory / "saved"
        for name in ("n1", "n2", "n3"):
            cluster.kill(name)
        report = cluster.json("dump", str(tmp_path / "report.zip"))  # two of five: nobody leads
        assert (report["nodes"], sorted(report["missing"])) == (["n4", "n5"], ["n1", "n2", "n3"])
        for name in ("n4", "n5"):
            cluster.kill(name)
        (cluster.directory / lucky).rename(saved)  # it was thought to be lost
        for name in {"n1", "n2", "n3"} - {lucky}:
            shutil.rmtree(cluster.directory / name)
        survivors = [str(cluster.directory / name) for name in ("n4", "n5")]

        with pytest.raises(CommandFailed) as refused:
            cluster.command("recover", "--dir", *survivors)
        assert "look with --dry-run, then give --yes" in refused.value.error
        made = cluster.json("recover", "--yes", "--dir", *survivors)
        assert (made["recovered"], made["nodes"], made["report"]["gone"]) == (True, ["n4", "n5"], ["n1", "n2", "n3"])
        assert made["report"]["versions_lost"] == 0

        cluster.json("up", "--dir", str(cluster.directory))
        for name in ("small", "large"):
            cluster.json("get", f"files/{name}", str(tmp_path / "back"))
            assert (tmp_path / "back").read_bytes() == contents[name]
        cluster.json("put", str(tmp_path / "later"), "files/later")
        assert sorted(member["name"] for member in cluster.members()) == ["n4", "n5"]

        # The one that was not lost starts with its old identity: it is told, and ends.
        saved.rename(cluster.directory / lucky)
        old = [sys.executable, "-m", "idunno", "node", "run", "--dir", str(cluster.directory / lucky)]
        ended = subprocess.run(old, capture_output=True, text=True, timeout=30, check=False)
        assert ended.returncode == 1
        assert ended.stderr.startswith("error: cluster ")
        assert f"was recovered as {made['cluster'][:8]}" in ended.stderr
        assert "--adopt --token TOKEN" in ended.stderr

        again = cluster.json("up", "--dir", str(cluster.directory))
        assert (again["outlived"], again["cluster"]) == ([lucky], made["cluster"])

        address = f"127.0.0.1:{cluster.port + 3}"
        words = ["join", address, "--token", made["token"], "--dir", str(cluster.directory / lucky), "--adopt"]
        adopted = cluster.json(*words)
        assert (adopted["cluster"], adopted["name"], adopted["quarantined"]) == (made["cluster"], lucky, 0)
        assert adopted["blocks"] >= 1
        cluster.json("up", "--dir", str(cluster.directory))
        assert sorted(member["name"] for member in cluster.members()) == sorted([lucky, "n4", "n5"])
        copies = until(
            lambda: (found := cluster.json("where", "files/large"))["copies"]["found"] == 3 and found,
            "all copies counted",
        )
        assert all(lucky in block["nodes"] for block in copies["blocks"])

    # The report of the day it happened, gone on with in a simulated world.
    loaded = load(tmp_path / "report.zip")
    assert loaded.machine().digest().hex() == report["digest"]
    assert not [name for name, data in loaded.files.items() if contents["small"] in data]
    again = DumpedWorld(loaded, "report")

    async def goes_on(world: World) -> None:
        world.start()
        leader = await world.has_leader()
        assert leader.node is not None
        assert {"files/small", "files/large"} <= {name for name, _ in leader.node.machine.namespace.each()}

    again.run(goes_on)
