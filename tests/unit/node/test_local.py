# `idunno up` that was killed while it made the cluster: called again, it makes a whole one.
from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from idunno.base.errors import Conflict, DeadlineExceeded, InvalidArgument, Unavailable
from idunno.base.ids import NodeId
from idunno.coordinator.messages import STATUS, Member, StatusAnswer, Succession
from idunno.node import lifecycle, local
from idunno.node.identity import BOOT_FILE, MADE, UP_FILE, Identity, load_identity, write_identity
from idunno.node.lineage import RECOVERED_FILE, encode_succession


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """`idunno up --nodes 3` without the processes."""

    async def ready(nodes: list[Path], processes: object) -> tuple[list[object], str, str, list[str]]:
        return [], nodes[0].name, load_identity(nodes[0]).cluster, []

    monkeypatch.setattr(local, "_spawn", lambda node: None)
    monkeypatch.setattr(local, "_until_ready", ready)
    monkeypatch.setattr(local, "_check_port", lambda config: None)
    return lambda: local.up(tmp_path / "cluster", 3, 7400)


def killed_at(what: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 at the identity number `what` from 0."""
    written = 0

    def write(directory: Path, identity: Identity) -> None:
        nonlocal written
        if written == what:
            raise Killed
        written += 1
        write_identity(directory, identity)

    monkeypatch.setattr(lifecycle, "write_identity", write)


@pytest.mark.parametrize("identities", [0, 1, 2])
def test_a_cluster_that_was_half_made_is_made_again(
    identities: int, up: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_at(identities, patch)
        with pytest.raises(Killed):
            up()
    assert up()["started"] == 3
    nodes = local.existing_nodes(tmp_path / "cluster")
    assert [node.name for node in nodes] == ["n1", "n2", "n3"]
    assert len({load_identity(node).cluster for node in nodes}) == 1
    assert (tmp_path / "cluster" / UP_FILE).exists()
    assert not (tmp_path / "cluster" / local.UNFINISHED_FILE).exists()


def test_a_node_that_has_run_is_never_removed(up: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    made = up()["cluster"]
    (tmp_path / "cluster" / local.UNFINISHED_FILE).write_text("n1\nn2\nn3")
    (tmp_path / "cluster" / "n2" / BOOT_FILE).write_text("1")
    assert up()["cluster"] == made


def test_a_purge_deletes_what_up_made_and_nothing_else(up: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    cluster = tmp_path / "cluster"
    up()
    assert local.down(cluster, purge=True) == {"stopped": 0, "killed": 0, "purged": True}
    assert not cluster.exists()

    up()
    (cluster / "thesis.txt").write_text("years of work")
    disk = tmp_path / "disk"
    (cluster / "n2").rename(disk)
    (cluster / "n2").symlink_to(disk)
    local.down(cluster, purge=True)
    assert sorted(path.name for path in cluster.iterdir()) == ["n2", "thesis.txt"]
    assert not list(disk.iterdir())
    with pytest.raises(InvalidArgument, match="holds no cluster"):
        local.down(cluster, purge=True)


def test_a_purge_that_was_interrupted_is_done_again(
    up: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = tmp_path / "cluster"
    up()
    (cluster / "n2" / "blocks").mkdir(exist_ok=True)
    (cluster / "n2" / "blocks" / "results").write_text("of a month")

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            local.down(cluster, purge=True)
    assert local.down(cluster, purge=True)["purged"]
    assert not cluster.exists()


def test_what_an_interrupted_up_made_is_purged_as_well(
    up: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_at(1, patch)
        with pytest.raises(Killed):
            up()
    assert local.down(tmp_path / "cluster", purge=True)["purged"]
    assert not (tmp_path / "cluster").exists()


def test_what_came_where_an_interrupted_up_would_have_made_a_node_is_never_removed(
    up: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = tmp_path / "cluster"
    with monkeypatch.context() as patch:
        killed_at(1, patch)
        with pytest.raises(Killed):
            up()
    (cluster / "n3" / "thesis.txt").write_text("years of work")
    (cluster / local.UNFINISHED_FILE).write_text("n1 n2 n3 . .. /")
    with pytest.raises(Conflict, match="n3 is there already"):
        up()
    assert local.down(cluster, purge=True)["purged"]
    assert [path.name for path in cluster.iterdir()] == ["n3"]
    assert (cluster / "n3" / "thesis.txt").read_text() == "years of work"


def test_what_up_makes_of_a_node_is_known(up: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    up()
    made = {path.name for node in (tmp_path / "cluster").glob("n*") for path in node.iterdir()}
    assert made == set(MADE)


def test_what_is_no_node_is_never_removed(up: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    thesis = tmp_path / "cluster" / "n2" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    with pytest.raises(Conflict, match=r"n2 is there already, and is no node of a cluster"):
        up()
    assert thesis.read_text() == "years of work"


def test_what_an_interrupted_up_did_not_begin_is_never_removed(
    up: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thesis = tmp_path / "cluster" / "n5" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    with monkeypatch.context() as patch:
        killed_at(0, patch)
        with pytest.raises(Killed):
            up()
    with pytest.raises(Conflict, match=r"n5 is there already"):
        local.up(tmp_path / "cluster", 5, 7400)
    assert thesis.read_text() == "years of work"


def test_a_node_may_have_a_file_system_of_its_own(
    up: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = tmp_path / "cluster" / "n2"
    (mounted / "lost+found").mkdir(parents=True)
    inode = mounted.stat().st_ino
    with monkeypatch.context() as patch:
        killed_at(2, patch)
        with pytest.raises(Killed):
            up()
    assert up()["started"] == 3
    assert mounted.stat().st_ino == inode, "it cannot be removed and made anew"
    assert (mounted / "lost+found").exists()


class Process:
    """A node process, as far as `up` looks at it."""

    def __init__(self) -> None:
        self.ended = False

    def poll(self) -> int | None:
        return 0 if self.ended else None

    def terminate(self) -> None:
        self.ended = True


def looked(me: str, ids: dict[str, NodeId], *, recovering: bool = False) -> local.Looked:
    members = [Member(name, node, "", "active", "worker", 0, "", 1, "") for name, node in ids.items()]
    status = StatusAnswer(
        True, "", "c", me, "n1" if ids else None, 1, [], [], {}, 5, 5, 0, 0, {}, {}, {}, recovering=recovering
    )  # fmt: skip
    return local.Looked(members, status)


def test_a_node_that_left_is_neither_waited_for_nor_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [tmp_path / name for name in ("n1", "n2", "n3")]
    ids = {node.name: NodeId(f"{number:016x}") for number, node in enumerate(nodes, 1)}
    for node in nodes:
        node.mkdir()
        write_identity(node, Identity(1, "ab" * 16, ids[node.name]))
    roster = {name: ids[name] for name in ("n1", "n2")}
    looks = 0

    async def look(node: Path) -> local.Looked:
        nonlocal looks
        looks += 1
        if node.name == "n3":
            return looked("n3", {})
        # Of the scheduler the first words are not its last: it does not know yet who is there, not even itself.
        if looks <= 3:
            return looked(node.name, {"n1": ids["n1"]}, recovering=True)
        if looks <= 6:
            return msgspec.structs.replace(looked(node.name, roster), members=[])
        return looked(node.name, roster)

    monkeypatch.setattr(local, "look", look)
    processes = {node: Process() for node in nodes}
    started = dict(processes)
    found = asyncio.run(local._until_ready(nodes, processes))  # type: ignore[arg-type]
    assert ([member.name for member in found[0]], found[1], found[3]) == (["n1", "n2"], "n1", ["n3"])
    assert [started[node].ended for node in nodes] == [False, False, True]


def test_nodes_that_find_no_scheduler_are_not_said_to_be_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just started and without a quorum they know no members, and refuse to tell them: but they answer, and say why."""
    why = "no quorum: 1 of 3 voters are active"

    class Alone:
        async def call(self, method: object, request: object, *, timeout_s: float) -> StatusAnswer:
            if method is STATUS:
                return msgspec.structs.replace(looked("n1", {}).status, why=why)
            raise Unavailable("node n1 has heard nothing of the cluster since its start")

        async def close(self) -> None:
            return

    async def connect(path: str, *, timeout_s: float) -> Alone:
        return Alone()

    monkeypatch.setattr(local, "connect_unix", connect)
    monkeypatch.setattr(local, "READY_TIMEOUT_S", 0.05)
    node = tmp_path / "n1"
    node.mkdir()
    write_identity(node, Identity(1, "ab" * 16, NodeId(f"{1:016x}")))
    with pytest.raises(DeadlineExceeded, match=f"waiting for node n1 to know a scheduler: {why}"):
        asyncio.run(local._until_ready([node], {}))


def test_another_port_for_a_cluster_that_is_there_is_refused(up: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    up()
    assert local.up(tmp_path / "cluster", 3, 7400)["gone"] == []
    with pytest.raises(Conflict, match="ports begin at 7400"):
        local.up(tmp_path / "cluster", 3, 7401)


def test_two_at_once_do_not_make_one_cluster_of_two(
    up: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second took for interrupted what the first was making: it emptied the first one's directories."""
    refused: list[str] = []

    def write(directory: Path, identity: Identity) -> None:
        if not refused:
            with pytest.raises(Conflict, match="another `idunno up` is at work") as caught:
                up()
            refused.append(str(caught.value))
        write_identity(directory, identity)

    monkeypatch.setattr(lifecycle, "write_identity", write)
    assert up()["started"] == 3
    assert len(refused) == 1
    nodes = local.existing_nodes(tmp_path / "cluster")
    assert len({load_identity(node).cluster for node in nodes}) == 1


def test_a_directory_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="one machine runs 1 to"):
        local.up(tmp_path / "new", 1000)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="is a file"):
        local.up(tmp_path / "file", 1)


def test_a_node_whose_disk_had_no_room_for_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local._last_words(tmp_path) == f"it wrote nothing; see {tmp_path}/logs/"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
    assert local._last_words(tmp_path) == f"the disk of {tmp_path} is full (4,096 bytes free); free some space there"


def test_who_was_not_part_of_a_recovery_is_not_started(up: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    old = up()["cluster"]
    survivor = tmp_path / "cluster" / "n3"
    write_identity(survivor, Identity(1, "ab" * 16, load_identity(survivor).node))
    (survivor / RECOVERED_FILE).write_bytes(encode_succession((Succession(old, "ab" * 16, b"", 5, 1, 0),)))
    again = up()
    assert (again["cluster"], again["started"], again["gone"]) == ("ab" * 16, 1, [])
    assert again["outlived"] == ["n1", "n2"]
