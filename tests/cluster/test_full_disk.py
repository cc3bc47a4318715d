# Real processes on real, small, full disks: puts go elsewhere, then are refused with numbers; what is deleted frees them again.
from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, CommandFailed, until

pytestmark = pytest.mark.cluster

SIZE = 24_000_000
HUGE = 4_000_000_000
FLOOR_MB = 2_048
"""A node keeps 2 GiB free, so these disks, of which exists what is written, are just above; the log takes 48 MB. n3's is full,
and the others have room for one file."""
ROOM_MB = {"n1": 92, "n2": 92, "n3": 40, "n4": 92, "n5": 92}


def mount(directory: Path, size_mb: int) -> None:
    """Put the directory's content on a disk of that size."""
    kept = directory.with_name(directory.name + ".kept")
    directory.rename(kept)
    directory.mkdir(mode=0o700)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m,mode=0700", "none", str(directory)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        directory.rmdir()
        kept.rename(directory)
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    shutil.copytree(kept, directory, dirs_exist_ok=True)


def held(cluster: Cluster) -> str:
    """What each disk holds, in MB a directory, and what its node says of itself last: a failure explains itself."""
    lines = []
    for row in cluster.json("repair")["nodes"]:
        directory = cluster.directory / row["node"]
        sizes = {
            part.name: round(sum(f.lstat().st_blocks * 512 for f in [part, *part.rglob("*")] if f.exists()) / 1e6, 1)
            for part in sorted(directory.iterdir())
        }
        above = round(shutil.disk_usage(directory).free / 1e6 - FLOOR_MB * 1.048576, 1)
        lines.append(f"{row} {above} MB above the floor, holds {sizes}")
        lines += (directory / "logs" / "node.jsonl").read_text().splitlines()[-15:]
    return "\n".join(lines)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    with Cluster(5) as made:
        made.down()
        mounted: list[Path] = []
        try:
            for name, room_mb in ROOM_MB.items():
                mount(made.directory / name, FLOOR_MB + room_mb)
                mounted.append(made.directory / name)
            made.up()
            yield made
        finally:
            for name in made.names():
                made.kill(name, missing_ok=True)
            for directory in mounted:
                subprocess.run(["umount", str(directory)], check=True)


def test_full_disks_are_passed_over_then_said_and_what_is_deleted_frees_them(cluster: Cluster, tmp_path: Path) -> None:
    rng = random.Random(1)

    def put(number: int) -> dict[str, object]:
        (tmp_path / "file").write_bytes(rng.randbytes(SIZE))
        answer: dict[str, object] = cluster.json("put", str(tmp_path / "file"), f"files/{number}")
        return answer

    def full() -> dict[str, str]:
        return {row["node"]: row["problem"] for row in cluster.json("repair")["nodes"] if row["problem"]}

    def room() -> list[str]:
        """Nodes that could take a file."""
        least = FLOOR_MB * 1024 * 1024 + SIZE
        return sorted(row["node"] for row in cluster.json("repair")["nodes"] if row["free_bytes"] >= least)

    until(lambda: not cluster.json("repair")["recovering"], "the nodes' reports", timeout_s=60)
    count = 0
    assert "bytes free" in until(lambda: full().get("n3"), "n3 to say that it is full", timeout_s=60)
    answer = put(count)  # there are four others
    assert (answer["copies"], answer["degraded"]) == (4, False)
    replicas = answer["replicas"]
    assert isinstance(replicas, list)
    assert "n3" not in replicas
    warnings = cluster.json("status")["warnings"]
    assert any("n3 takes no blocks: " in warning and "bytes free" in warning for warning in warnings), warnings

    # What nobody can take is refused at once, and ends: nodes that start remove nothing while such a put is open.
    with open(tmp_path / "huge", "wb") as huge:
        huge.truncate(HUGE)
    with pytest.raises(CommandFailed, match=r"no node can take 4,000,000,000 bytes: .*bytes free"):
        cluster.command("put", str(tmp_path / "huge"), "huge")

    refused = ""
    while not refused and count < 25:
        count += 1
        try:
            put(count)
        except CommandFailed as error:
            refused = error.error
    assert "error: " in refused
    assert "bytes free" in refused, refused
    (tmp_path / "small").write_bytes(b"small ones ride in the log")
    assert cluster.json("put", str(tmp_path / "small"), "small")["copies"] >= 4
    names = [row["name"] for row in cluster.json("ls", "files/")]
    for name in names:
        cluster.json("delete", name)
    assert cluster.json("trash", "empty")["versions"] == len(names)
    try:
        until(lambda: room() == ["n1", "n2", "n4", "n5"], "the other disks to be free again", timeout_s=120)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{held(cluster)}") from None
    assert put(99)["copies"] == 4
    cluster.command("get", "files/99", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
