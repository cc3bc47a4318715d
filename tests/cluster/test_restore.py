# The metadata of a cluster goes into a file, and another cluster begins with it; the blocks come with the old node.
from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, CommandFailed, until
from tests.cluster.test_join import running

pytestmark = pytest.mark.cluster


def test_a_backup_is_restored_into_a_new_cluster_and_the_old_node_brings_the_blocks(tmp_path: Path) -> None:
    cluster = Cluster(0)  # only its ports, its home and its commands are used
    old, new, backup = tmp_path / "old", tmp_path / "new", tmp_path / "backup"
    addresses = [f"127.0.0.1:{cluster.port + i}" for i in range(2)]
    idunno = [sys.executable, "-m", "idunno"]
    content = random.Random(1).randbytes(100_000)
    (tmp_path / "large").write_bytes(content)
    (tmp_path / "small").write_bytes(b"rides in the log")
    (tmp_path / "passphrase").write_text("correct horse battery\n")
    keys = ["--with-keys", "--passphrase-file", str(tmp_path / "passphrase")]

    cluster.json("init", "--dir", str(old), "--listen", addresses[0], "--name", "old")
    with running(*idunno, "node", "run", "--dir", str(old), home=cluster.home):
        until(lambda: (old / "node.sock").exists(), "the first node")
        for name in ("small", "large", "large"):
            cluster.json("put", str(tmp_path / name), f"files/{name}", where=str(old))
        taken = cluster.json("snapshot", str(backup), *keys, where=str(old))
        assert (taken["files"], taken["keys"], taken["size"]) == (2, True, backup.stat().st_size)
        assert backup.stat().st_mode & 0o077 == 0
        with pytest.raises(CommandFailed, match="runs this node already: stop it first"):
            cluster.command("restore", str(backup), where=str(old))
        token = cluster.json("token", "new", "--role", "node", where=str(old))["token"]
        shutil.copytree(old, tmp_path / "copy", ignore=shutil.ignore_patterns("*.sock"))
        with pytest.raises(CommandFailed, match="this very cluster"):
            cluster.command("join", addresses[0], "--token", token, "--dir", str(tmp_path / "copy"), "--adopt")
        with pytest.raises(CommandFailed, match=r"is running at .* is a copy: stop it"):
            cluster.command("recover", "--yes", "--dir", str(tmp_path / "copy"))
        again = cluster.json("snapshot", str(backup), *keys, where=str(old))  # the token is in it
        assert again["index"] > taken["index"]
    with pytest.raises(CommandFailed, match="not empty: it holds 3 versions of files"):
        cluster.command("restore", str(backup), where=str(old))

    made = cluster.json("restore", str(backup), *keys, "--dir", str(new), "--listen", addresses[1])
    assert [(row["name"], row["version"]) for row in made["lost"]] == [("files/large", 1), ("files/large", 2)]
    with running(*idunno, "node", "run", "--dir", str(new), home=cluster.home):
        until(lambda: (new / "node.sock").exists(), "the restored node")
        cluster.json("get", "files/small", str(tmp_path / "back"), where=str(new))
        assert (tmp_path / "back").read_bytes() == b"rides in the log"
        assert [row["version"] for row in cluster.json("versions", "files/large", where=str(new))] == [2, 1]
        # The old cluster's token is good here too: the backup brought the CA that stands in it, and its hash.
        cluster.json("join", addresses[1], "--token", token, "--dir", str(old), "--adopt")
        with running(*idunno, "node", "run", "--dir", str(old), home=cluster.home):
            cluster.json("get", "files/large", str(tmp_path / "back"), where=str(new))
            assert (tmp_path / "back").read_bytes() == content
