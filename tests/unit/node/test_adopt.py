# A node of another cluster comes in as a newcomer: blocks by their content, everything else put aside, through every crash.
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from idunno.base.errors import Conflict
from idunno.base.ids import NodeId
from idunno.coordinator.messages import EnrollAnswer, MemberAddress
from idunno.node import adopt as adopting
from idunno.node.adopt import adopt
from idunno.node.config import NodeConfig, load_config
from idunno.node.identity import load_identity, load_peers, load_secrets
from idunno.node.lifecycle import Newcomer, _newcomer
from idunno.node.running import run
from idunno.wire.calls import Role
from idunno.wire.security import fingerprint, is_key_of, make_ca, sign
from idunno.wire.tokens import make_token
from tests.unit.node.remains import Remains, machine_of, put, without_waiting
from tests.unit.node.test_recover import Crash, CrashAt

NEW = "a" * 32


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    without_waiting(monkeypatch)


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a cluster that lets everybody in."""
    ca_pem, ca_key_pem = make_ca()

    async def enroll(
        address: str, token: str, directory: Path, config: NodeConfig, *, before: str
    ) -> tuple[Newcomer, bytes, EnrollAnswer]:
        assert len(before) == 32
        who = _newcomer(directory, fingerprint(ca_pem))
        certificate = sign(ca_pem, ca_key_pem, who.csr_pem, common_name=who.node, role=Role.NODE)
        members = [MemberAddress(NodeId("1" * 16), "first", address, bytes(32), True)]
        return who, ca_pem, EnrollAnswer(NEW, certificate, "node", config.name, members, bytes(32))

    monkeypatch.setattr(adopting, "enroll", enroll)
    text, _, _ = make_token(fingerprint(ca_pem))
    return text


def old_node(top: Path) -> Remains:
    old = Remains(top, 1)
    old.append([0], [(1, payload) for payload in put("file", (old.hold(0, b"good"),))])
    rotten = old.hold(0, b"rotten")
    (old.directories[0] / "blocks" / rotten.block[:2] / rotten.block).write_bytes(b"rOtten")
    return old


def check(directory: Path, old: Remains, done: dict[str, Any]) -> None:
    identity = load_identity(directory)
    assert (identity.cluster, done["cluster"]) == (NEW, NEW)
    assert identity.node == done["node"] != old.ids[0]
    machine, _ = machine_of(directory)
    assert (machine.index, machine.roster.cluster) == (0, "")  # it will be told all by the leader
    held = sorted(path.read_bytes() for path in (directory / "blocks").glob("*/*"))
    assert held == [b"good"]
    assert [path.read_bytes() for path in (directory / "quarantine").iterdir()] == [b"rOtten"]
    secrets = load_secrets(directory)
    assert is_key_of(secrets.certificate_pem, secrets.key_pem)
    assert secrets.ca_key_pem is None
    assert [member.name for member in load_peers(directory).members] == ["first"]
    (aside,) = directory.glob("recovered-from-*")
    assert load_identity(aside).node == old.ids[0]
    assert machine_of(aside)[0].namespace.files == 1
    assert (aside / "ca.key").exists()


def test_blocks_are_kept_by_content_and_the_rest_is_put_aside(tmp_path: Path, token: str) -> None:
    old = old_node(tmp_path)
    seen: list[tuple[int, int]] = []
    done = adopt("127.0.0.1:901", token, old.directories[0], heard=lambda *of: seen.append(of))
    check(old.directories[0], old, done)
    assert (done["blocks"], done["quarantined"], seen) == (1, 1, [(1, 2), (2, 2)])
    assert load_config(old.directories[0]).listen == "127.0.0.1:901"


def test_what_is_given_takes_the_place_of_the_settings(tmp_path: Path, token: str) -> None:
    old = old_node(tmp_path)
    adopt("127.0.0.1:901", token, old.directories[0], listen="127.0.0.1:999", name="other")
    config = load_config(old.directories[0])
    assert (config.listen, config.name) == ("127.0.0.1:999", "other")


def test_killed_before_any_step_the_same_command_goes_on_as_the_same_newcomer(tmp_path: Path, token: str) -> None:
    number, first = 0, old_node(tmp_path / "first")
    while True:
        number += 1
        old = first.copied(tmp_path / str(number))
        (directory,) = old.directories
        try:
            adopt("127.0.0.1:901", token, directory, step=CrashAt(number))
        except Crash:
            before = {path.read_bytes() for path in directory.rglob("joining.json")}
        else:
            break
        if (directory / "recovering").exists():
            with pytest.raises(Conflict, match="finishes it"):
                run(directory)
        done = adopt("127.0.0.1:901", token, directory)
        check(directory, old, done)
        after = {path.read_bytes() for path in directory.rglob("joining.json")}
        assert before <= after, "another newcomer than the cluster knows already"
    assert number > 15
