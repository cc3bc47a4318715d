# One cluster of five, used as a person would: files, a model, logs, bad input, hostile packets.
from __future__ import annotations

import contextlib
import itertools
import json
import random
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.answers import check_digits
from tests.cluster.harness import DIGITS, Cluster, CommandFailed, until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(5) as cluster:
        cluster.json("deploy", "digits", str(DIGITS / "digits.onnx"))
        yield cluster


def fails(cluster: Cluster, *words: str, where: str | None = None) -> str:
    """The one line that a command failed with."""
    with pytest.raises(CommandFailed) as caught:
        cluster.json(*words, where=where)
    lines = [line for line in caught.value.error.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, caught.value.error
    assert lines[-1] == errors[0], caught.value.error
    assert caught.value.status == 1
    return errors[0]


def test_all_are_active_and_healthy(cluster: Cluster) -> None:
    members = cluster.json("members")
    assert [(member["name"], member["state"]) for member in members] == [(f"n{i}", "active") for i in range(1, 6)]
    assert [member["role"] for member in members].count("scheduler") == 1
    status = until(lambda: (found := cluster.json("status"))["healthy"] and found, "a healthy cluster")
    assert len(status["voters"]) == 5
    events = cluster.json("members", "--events", where=str(cluster.directory / "n1"))
    assert {event["name"] for event in events if event["event"] == "joined"} == {"n2", "n3", "n4", "n5"}


def test_the_main_job(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    about = cluster.json("infer", "digits", str(DIGITS / "digits.zip"), "--batch-size", "64", "--output", str(out))
    assert (about["queries"], about["succeeded"], about["failed"], about["tasks"]) == (1797, 1797, 0, 29)
    check_digits(out)
    rates = cluster.json("rates")
    assert rates["models"][0]["queries_done"] >= 1797
    times = cluster.json("times", "digits")
    assert times["count"] >= 1797
    assert 0 < times["median"] <= times["p90"] <= times["p99"] < 1.0
    working = {row["node"] for row in cluster.json("assignments") if "digits" in json.dumps(row["models"])}
    assert len(working) >= 4


def test_a_file_is_stored_four_times_and_every_version_is_kept(cluster: Cluster, tmp_path: Path) -> None:
    rng = random.Random(3)
    contents = [b"", b"small", rng.randbytes(4096), rng.randbytes(4097), rng.randbytes(9 * 1024 * 1024)]
    for version, content in enumerate(contents, start=1):
        (tmp_path / "in").write_bytes(content)
        put = cluster.json("put", str(tmp_path / "in"), "dir/versions")
        assert (put["version"], put["size"], put["copies"], put["degraded"]) == (
            version,
            len(content),
            put["copies"],
            False,
        )
        assert put["copies"] >= 4
        assert len(put["replicas"]) >= 4
    for version, content in enumerate(contents, start=1):
        got = cluster.json("get", "dir/versions", str(tmp_path / "out"), "--version", str(version))
        assert (got["version"], got["size"]) == (version, len(content))
        assert (tmp_path / "out").read_bytes() == content
    assert [row["version"] for row in cluster.json("versions", "dir/versions")] == [5, 4, 3, 2, 1]
    where = cluster.json("where", "dir/versions")
    assert where["copies"] == {"wanted": 4, "found": 4}
    assert len(where["blocks"]) == 2
    holder = where["blocks"][0]["nodes"][0]
    assert "dir/versions" in json.dumps(cluster.json("store", holder))
    cluster.command("get-versions", "dir/versions", "3", str(tmp_path / "three"))
    assert (tmp_path / "three").read_bytes().startswith(b"=== dir/versions version 5 ===\n")
    assert "dir/versions" in {row["name"] for row in cluster.json("ls", "dir/")}
    cluster.command("delete", "dir/versions")
    assert "no file 'dir/versions'" in fails(cluster, "get", "dir/versions", str(tmp_path / "gone"))
    assert not (tmp_path / "gone").exists()


def test_conditional_puts(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"1")
    assert cluster.json("put", str(tmp_path / "in"), "conditional", "--if-version", "0")["version"] == 1
    assert "1" in fails(cluster, "put", str(tmp_path / "in"), "conditional", "--if-version", "0")
    assert cluster.json("put", str(tmp_path / "in"), "conditional", "--if-version", "1")["version"] == 2


def test_grep_finds_lines_on_every_node(cluster: Cluster) -> None:
    found = cluster.json("grep", "node started")
    assert set(found["counts"]) == {f"n{i}" for i in range(1, 6)}
    assert all(count >= 1 for count in found["counts"].values())
    assert found["unreachable"] == []
    assert {match["node"] for match in found["matches"]} == set(found["counts"])


def test_one_bad_image_among_good_ones_costs_one_query(cluster: Cluster, tmp_path: Path) -> None:
    archive = tmp_path / "mixed.zip"
    with zipfile.ZipFile(DIGITS / "digits.zip") as good, zipfile.ZipFile(archive, "w") as mixed:
        names = sorted(name for name in good.namelist() if name.endswith(".png"))[:9]
        for name in names[:5]:
            mixed.writestr(name, good.read(name))
        mixed.writestr("images/bad.png", b"this is not an image")
        for name in names[5:]:
            mixed.writestr(name, good.read(name))
    out = tmp_path / "out.jsonl"
    about = cluster.json("infer", "digits", str(archive), "--output", str(out))
    assert (about["queries"], about["succeeded"], about["failed"]) == (10, 9, 1)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["query"] for answer in answers] == [*names[:5], "images/bad.png", *names[5:]]
    assert ["error" in answer for answer in answers] == [False] * 5 + [True] + [False] * 4


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"not a model", "x.onnx"), (b"", "empty.onnx"), (b"\x08\x07\x12" + b"\xff" * 100, "damaged.onnx")],
)
def test_a_file_that_is_no_model_fails_the_deployment_with_the_reason(
    cluster: Cluster, tmp_path: Path, content: bytes, name: str
) -> None:
    (tmp_path / name).write_bytes(content)
    error = fails(cluster, "deploy", "broken", str(tmp_path / name))
    assert "broken" in error or name in error
    assert "broken" in fails(cluster, "infer", "broken", str(DIGITS / "digits.zip"))


def test_wrong_shapes_are_told_row_by_row(cluster: Cluster, tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "wrong.npy", np.zeros((3, 7), dtype=np.float32))
    with contextlib.suppress(CommandFailed):
        about = cluster.json("infer", "digits", str(tmp_path / "wrong.npy"), "--output", str(tmp_path / "out.jsonl"))
        assert (about["queries"], about["succeeded"], about["failed"]) == (3, 0, 3)
        return
    error = fails(cluster, "infer", "digits", str(tmp_path / "wrong.npy"))
    assert "shape" in error


def test_what_does_not_exist_is_told(cluster: Cluster, tmp_path: Path) -> None:
    assert "nothing/here" in fails(cluster, "get", "nothing/here", str(tmp_path / "x"))
    assert "nosuch" in fails(cluster, "infer", "nosuch", str(DIGITS / "digits.zip"))
    assert "nosuch" in fails(cluster, "results", "nosuch")
    assert "missing-file" in fails(cluster, "put", str(tmp_path / "missing-file"), "x")
    for name in ("../etc/passwd", "a//b", "/abs", "a\nb", ".idunno/x"):
        assert "name" in fails(cluster, "put", str(DIGITS / "labels.csv"), name)


def test_a_port_in_use_and_a_foreign_directory_are_told(cluster: Cluster, tmp_path: Path) -> None:
    port = str(cluster.port)
    assert "in use" in fails(cluster, "up", "--dir", str(tmp_path / "other"), "--port", port).lower()
    made = cluster.json("init", "--dir", str(tmp_path / "alone"), "--listen", f"127.0.0.1:{cluster.port + 5}")
    assert made["token"]
    # A token of one cluster is no token of another, and a directory of one cluster joins no other.
    error = fails(
        cluster,
        "join",
        f"127.0.0.1:{port}",
        "--token",
        made["token"],
        "--dir",
        str(tmp_path / "j"),
        "--listen",
        "127.0.0.1:1",
    )
    assert "cluster" in error
    token = cluster.json("token", "new", "--role", "node")["token"]
    error = fails(
        cluster,
        "join",
        f"127.0.0.1:{port}",
        "--token",
        token,
        "--dir",
        str(tmp_path / "alone"),
        "--listen",
        "127.0.0.1:1",
    )
    assert "belongs to" in error


def test_users_do_what_their_role_allows_and_no_more(cluster: Cluster, tmp_path: Path) -> None:
    address = f"127.0.0.1:{cluster.port + 1}"
    (tmp_path / "in").write_bytes(b"mine" * 5000)
    homes: dict[str, dict[str, Any]] = {}
    for name, role in (("ann", "user"), ("bob", "user"), ("eve", "reader")):
        token = cluster.json("token", "new", "--role", role)
        homes[name] = token
        cluster.home = cluster.directory / f"home-{name}"
        cluster.json("login", address, "--token", token["token"], "--name", name)

    def be(name: str) -> None:
        cluster.home = cluster.directory / f"home-{name}"

    be("ann")
    cluster.json("put", str(tmp_path / "in"), "ann/file", where=address)
    cluster.json("get", "ann/file", str(tmp_path / "ann"), where=address)
    assert (tmp_path / "ann").read_bytes() == b"mine" * 5000
    be("bob")
    assert "ann" in fails(cluster, "delete", "ann/file", where=address)
    assert "ann" in fails(cluster, "put", str(tmp_path / "in"), "ann/file", where=address)
    assert "admin" in fails(cluster, "token", "new", "--role", "admin", where=address)
    be("eve")
    assert "reader" in fails(cluster, "put", str(tmp_path / "in"), "eve/file", where=address)
    assert cluster.json("ls", where=address)
    cluster.home = cluster.directory / "home-mallory"
    wrong = homes["ann"]["token"][:-6] + "aaaaaa"
    assert "token" in fails(cluster, "login", address, "--token", wrong, "--name", "mallory")
    cluster.json("token", "revoke", homes["bob"]["id"])
    assert "revoked" in fails(cluster, "login", address, "--token", homes["bob"]["token"], "--name", "mallory")
    short = cluster.json("token", "new", "--role", "user", "--ttl", "1s")["token"]

    attempts = itertools.count()

    def expired() -> str | None:
        cluster.home = cluster.directory / f"home-late-{next(attempts)}"
        try:
            cluster.json("login", address, "--token", short, "--name", cluster.home.name)
        except CommandFailed as failure:
            return failure.error
        return None

    assert "expired" in until(expired, "the token to expire")


def test_garbage_from_outside_changes_nothing(cluster: Cluster) -> None:
    before = {name: cluster.resident_mb(name) for name in cluster.names()}
    rng = random.Random(5)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        for _ in range(100_000):
            out.sendto(rng.randbytes(rng.randrange(0, 1500)), ("127.0.0.1", cluster.port))
    for _ in range(1_000):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", cluster.port), timeout=5.0) as garbage,
        ):
            garbage.sendall(rng.randbytes(rng.randrange(1, 2000)))
    assert all(member["state"] == "active" for member in cluster.json("members"))
    assert cluster.json("ls") is not None
    after = {name: cluster.resident_mb(name) for name in cluster.names()}
    assert all(after[name] - before[name] < 20 for name in before), (before, after)
