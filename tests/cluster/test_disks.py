# Disks of real processes: all of them full, a log whose last bytes are not what was written, an old image.
from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import idunno
from idunno.base.errors import IdunnoError, NotFound
from idunno.consensus.records import SEGMENT_HEADER_BYTES, Record, decode_record
from idunno.node.identity import running_pid
from tests.cluster.harness import Cluster, CommandFailed, until

pytestmark = pytest.mark.cluster

SIZE_MB = 260
"""Three nodes: a segment of 16 MiB and a reserve of 32 MiB each, and room for some blocks."""


@contextmanager
def mounted(directory: Path) -> Iterator[None]:
    """A small file system of its own."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "none", str(directory)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()[:200]}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(path: Path) -> None:
    """Until there is no space left, to the last page."""
    with open(path, "wb", buffering=0) as file:
        for size in (1024 * 1024, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def test_with_all_disks_full_deleting_works_and_with_space_again_everything(tmp_path: Path) -> None:
    cluster = Cluster(3)
    (tmp_path / "large").write_bytes(b"l" * 300_000)
    (tmp_path / "other").write_bytes(b"o" * 300_000)  # equal contents would share their blocks
    (tmp_path / "small").write_bytes(b"s" * 1_000)
    with mounted(cluster.directory), cluster:
        cluster.down()
        for name in cluster.names():  # by default no block is taken with less than 2 GB free
            settings = cluster.directory / name / "node.toml"
            text = re.sub(r"disk_reserve_bytes = \d+", "disk_reserve_bytes = 1048576", settings.read_text())
            settings.write_text(text)
        cluster.up()
        with idunno.connect(str(cluster.directory), timeout_s=20.0) as client:
            for name in ("one", "two"):
                client.put(tmp_path / "large", name)
            fill(cluster.directory / "filler")
            with (
                idunno.connect(str(cluster.directory), timeout_s=4.0) as hasty,
                pytest.raises(IdunnoError) as caught,
            ):
                hasty.put(tmp_path / "other", "three")
            assert caught.value.code in ("exhausted", "disk-failed", "deadline-exceeded"), caught.value
            assert any(word in str(caught.value) for word in ("free", "space", "full")), caught.value
            assert client.delete("one").versions == 1
            with pytest.raises(NotFound):
                client.get("one", tmp_path / "back")
            client.get("two", tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == b"l" * 300_000

            (cluster.directory / "filler").unlink()

            def goes() -> bool:
                try:
                    return client.put(tmp_path / "other", "four").copies == 3
                except IdunnoError:
                    return False

            until(goes, "a put with three copies")
            client.put(tmp_path / "small", "five")
            assert [row.name for row in client.ls()] == ["five", "four", "two"]


def last_record(segment: Path) -> Record:
    data, number, at = segment.read_bytes(), int(segment.stem), SEGMENT_HEADER_BYTES
    found: Record | None = None
    while (record := decode_record(data, at, number, at)) is not None:
        found, at = record, record.end
    assert found is not None
    return found


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def status_of(cluster: Cluster, name: str) -> dict[str, Any]:
    """As that node itself tells it; nothing while it starts."""
    try:
        found: dict[str, Any] = cluster.json("status", where=str(cluster.directory / name))
    except CommandFailed:
        return {"problem": "starts"}
    return found


def is_back(cluster: Cluster, name: str) -> None:
    """It takes part, votes, and is alive for the others, without anybody having done anything."""
    until(lambda: status_of(cluster, name)["problem"] == "", f"{name} takes part again", timeout_s=60)
    until(lambda: {row["name"]: row["state"] for row in cluster.members()}[name] == "active", f"{name} is active")
    assert name in cluster.json("status")["voters"]


def test_a_node_whose_disk_is_an_old_image_says_what_it_waits_for_and_comes_back_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1_000)
    (tmp_path / "large").write_bytes(b"l" * 300_000)
    with Cluster(3) as cluster:
        with idunno.connect(str(cluster.directory)) as client:
            client.put(tmp_path / "large", "before")
            leader = cluster.scheduler()
            old, other = (name for name in cluster.names() if name != leader)
            cluster.kill(old)
            shutil.copytree(cluster.directory / old, tmp_path / "image", ignore=shutil.ignore_patterns("*.sock"))
            cluster.start_node(old)
            is_back(cluster, old)
            for number in range(5):
                client.put(tmp_path / "file", f"since-{number}")

        for name in (old, other):
            cluster.kill(name)
        shutil.rmtree(cluster.directory / old)
        shutil.copytree(tmp_path / "image", cluster.directory / old)
        cluster.start_node(old)
        log = cluster.directory / old / "logs" / "node.jsonl"
        until(lambda: running_pid(cluster.directory / old) is not None, "its start")
        cluster.start_node(other)
        seen: set[str] = set()

        def whole() -> bool:
            seen.add(status_of(cluster, old)["problem"])
            return "" in seen

        until(whole, "it takes part again", timeout_s=60)
        assert any("it comes back by itself when that is whole again" in problem for problem in seen), seen
        assert "log is whole again" in log.read_text()
        is_back(cluster, old)
        is_back(cluster, other)

        cluster.kill(other)  # from here on nothing goes without the one that came back
        with idunno.connect(str(cluster.directory), timeout_s=30.0) as client:
            client.put(tmp_path / "file", "with it")
            assert len(client.ls()) == 7
            client.get("before", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b"l" * 300_000


def test_a_torn_write_is_cut_and_a_log_that_lost_what_it_acknowledged_is_made_whole_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1_000)
    with Cluster(3) as cluster:
        with idunno.connect(str(cluster.directory)) as client:
            for number in range(5):
                client.put(tmp_path / "file", f"f{number}")
        leader = cluster.scheduler()
        torn, lost = (name for name in cluster.names() if name != leader)

        cluster.kill(torn)
        segment = max((cluster.directory / torn / "log").glob("*.seg"))
        last = last_record(segment)
        overwrite(segment, last.end, segment.read_bytes()[last.offset : last.offset + 30])  # a header cut off
        cluster.up()
        assert {member["state"] for member in cluster.json("members")} == {"active"}

        with idunno.connect(str(cluster.directory)) as client:
            client.put(tmp_path / "file", "more")
        if cluster.scheduler() == lost:
            torn, lost = lost, torn
        cluster.kill(lost)
        segment = max((cluster.directory / lost / "log").glob("*.seg"))
        last = last_record(segment)
        overwrite(segment, last.offset, bytes(36 + len(last.payload)))
        log = cluster.directory / lost / "logs" / "node.jsonl"
        cluster.start_node(lost)
        until(lambda: "lost what it had synced" in log.read_text(), "its refusal")
        is_back(cluster, lost)
        with idunno.connect(str(cluster.directory)) as client:
            client.get("more", tmp_path / "back")
            client.put(tmp_path / "file", "without it")
