# From WHERE, as a user writes it, to doors.
from __future__ import annotations

import json
from pathlib import Path

import pytest

from idunno.base.errors import Corrupt, InvalidArgument, NotFound, Unauthenticated
from idunno.client.locate import SocketDoor, TcpDoor, home, locate, parse_address


def node(path: Path, *, runs: bool = True) -> Path:
    path.mkdir(parents=True)
    (path / "node.toml").write_text("")
    if runs:
        (path / "node.sock").touch()
    return path


def local_cluster(at_home: Path, nodes: int = 3) -> None:
    for i in range(nodes):
        node(at_home / "local" / f"n{i + 1}")
    about = {"cluster": "c", "nodes": ["n1"], "addresses": [f"127.0.0.1:{7400 + i}" for i in range(nodes)]}
    (at_home / "local" / "cluster.json").write_text(json.dumps(about))


def labels(where: str | Path | None, environ: dict[str, str]) -> list[str]:
    return [door.label for door in locate(where, environ).doors]


def test_the_directory_of_an_up_means_any_of_its_nodes_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        node(tmp_path / f"n{number}")
    node(tmp_path / "n3", runs=False)
    (tmp_path / "notes").mkdir()
    assert labels(tmp_path, {}) == ["n1", "n2", "n10"]


def test_the_directory_of_a_node_means_that_node_alone(tmp_path: Path) -> None:
    for number in (1, 2):
        node(tmp_path / f"n{number}")
    assert locate(tmp_path / "n2", {}).doors == (SocketDoor(tmp_path / "n2" / "node.sock", "n2"),)


def test_the_order_is_what_is_given_then_the_environment_then_the_local_cluster(tmp_path: Path) -> None:
    local_cluster(tmp_path / "home", 1)
    node(tmp_path / "other" / "n7")
    node(tmp_path / "given" / "n9")
    environ = {"IDUNNO_HOME": str(tmp_path / "home")}
    assert labels(None, environ) == ["n1"]
    environ["IDUNNO_CLUSTER"] = str(tmp_path / "other")
    assert labels(None, environ) == ["n7"]
    assert labels(tmp_path / "given", environ) == ["n9"]
    assert home({}) == Path.home() / ".idunno"


@pytest.mark.parametrize("where", ["nowhere", "./also/nowhere", "/tmp/nowhere:7400"])
def test_a_directory_that_is_not_there_is_named_with_the_next_step(where: str) -> None:
    with pytest.raises(NotFound, match=f"no cluster at {where}: run `idunno up` or give --cluster"):
        locate(where, {})


def test_an_empty_directory_is_no_cluster(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no cluster at"):
        locate(tmp_path, {})


def test_a_cluster_that_does_not_run_says_how_to_start_it(tmp_path: Path) -> None:
    node(tmp_path / "c" / "n1", runs=False)
    with pytest.raises(NotFound, match=f"does not run \\(0 of 1 nodes\\): run `idunno up --dir {tmp_path}/c`"):
        locate(tmp_path / "c", {})
    with pytest.raises(NotFound, match=f"start it with `idunno node run --dir {tmp_path}/c/n1`"):
        locate(tmp_path / "c" / "n1", {})


def test_an_address_of_the_local_cluster_means_that_cluster(tmp_path: Path) -> None:
    local_cluster(tmp_path)
    environ = {"IDUNNO_HOME": str(tmp_path)}
    assert labels("127.0.0.1:7401", environ) == ["n1", "n2", "n3"]
    assert labels("localhost:7400", environ) == ["n1", "n2", "n3"]


def test_an_address_without_a_login_names_the_command_that_makes_one(tmp_path: Path) -> None:
    local_cluster(tmp_path)
    for where in ("127.0.0.1:7500", "10.0.0.1:7400", "[::1]:7999"):
        with pytest.raises(Unauthenticated, match="run `idunno login"):
            locate(where, {"IDUNNO_HOME": str(tmp_path)})


def test_a_login_knows_the_other_members_too(tmp_path: Path) -> None:
    login = tmp_path / "logins" / "10.0.0.1_7400"
    login.mkdir(parents=True)
    members = [{"node": "0" * 16, "name": f"n{i}", "address": f"10.0.0.{i}:7400", "fingerprint": ""} for i in (1, 2)]
    about = {"cluster": "c", "name": "alice", "role": "user", "address": "10.0.0.1:7400", "members": members}
    (login / "cluster.json").write_text(json.dumps(about))
    place = locate("10.0.0.1:7400", {"IDUNNO_HOME": str(tmp_path)})
    assert place.login == login
    assert place.doors == (TcpDoor("10.0.0.1", 7400, "10.0.0.1:7400"), TcpDoor("10.0.0.2", 7400, "n2"))
    (login / "cluster.json").write_text("{")
    with pytest.raises(Corrupt, match="is damaged"):
        locate("10.0.0.1:7400", {"IDUNNO_HOME": str(tmp_path)})


def test_addresses() -> None:
    assert parse_address("[::1]:80") == ("::1", 80)
    for bad in ("host", "host:0", "host:65536", "a b:1", ":1"):
        with pytest.raises(InvalidArgument, match="write HOST:PORT"):
            parse_address(bad)


def test_somebody_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert home({"IDUNNO_HOME": "/x"}) == Path("/x")
    with pytest.raises(InvalidArgument, match=r"set \$IDUNNO_HOME"):
        home({})


def test_the_cluster_of_another_user_is_reached_by_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node(tmp_path / "n1")
    exists = Path.exists

    def refused(path: Path) -> bool:
        if path.parent.name == "n1":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refused)
    for where in (tmp_path, tmp_path / "n1"):
        with pytest.raises(Unauthenticated, match=r"belongs to another user; .*idunno login"):
            locate(where, {})
