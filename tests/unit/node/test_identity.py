from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from idunno.base.errors import Conflict, Corrupt, Incompatible, InvalidArgument
from idunno.node.identity import (
    IDENTITY_FILE,
    UP_FILE,
    DirectoryLock,
    Identity,
    check_empty,
    load_identity,
    new_node_id,
    next_boot,
    running_pid,
    write_identity,
)


def test_every_start_raises_the_boot_number(tmp_path: Path) -> None:
    assert [next_boot(tmp_path) for _ in range(3)] == [1, 2, 3]
    (tmp_path / "boot").write_text("seven")
    with pytest.raises(Corrupt, match="no number"):
        next_boot(tmp_path)


def test_a_directory_belongs_to_one_node_only(tmp_path: Path) -> None:
    check_empty(tmp_path)
    write_identity(tmp_path, Identity(1, "ab" * 16, new_node_id()))
    with pytest.raises(Conflict, match="belongs to node"):
        check_empty(tmp_path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, InvalidArgument),
        (b"\xff\xfe", Corrupt),
        (b"{}", Corrupt),
        (b'{"format":2,"cluster":"x","node":"y"}', Incompatible),
        (b'{"format":1,"cluster":"x","node":"y"}', Corrupt),
    ],
)
def test_a_damaged_identity_is_told(tmp_path: Path, content: bytes | None, error: type[Exception]) -> None:
    if content is not None:
        (tmp_path / IDENTITY_FILE).write_bytes(content)
    with pytest.raises(error):
        load_identity(tmp_path)


def test_one_process_runs_a_directory_and_its_death_frees_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from idunno.node.identity import DirectoryLock\n"
        "lock = DirectoryLock(Path(sys.argv[1])); lock.take(); print('taken', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "taken\n"
    assert running_pid(tmp_path) == holder.pid
    with pytest.raises(Conflict, match=f"process {holder.pid} runs this node"):
        DirectoryLock(tmp_path).take()
    holder.kill()
    holder.communicate()
    assert running_pid(tmp_path) is None
    lock = DirectoryLock(tmp_path)
    lock.take()
    assert (tmp_path / "node.pid").read_text().strip() == str(os.getpid())
    lock.release()


def test_a_node_is_not_made_over_a_cluster_of_an_up(tmp_path: Path) -> None:
    (tmp_path / UP_FILE).write_text("{}")
    with pytest.raises(Conflict, match="holds a cluster of `idunno up`"):
        check_empty(tmp_path)
