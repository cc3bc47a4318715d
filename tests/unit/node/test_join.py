# A join whose answer is lost, or whose process is killed: repeated with the same directory, it is the same node.
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from idunno.base.errors import ConnectionLost
from idunno.base.ids import NodeId
from idunno.coordinator.messages import HELLO, Enroll, EnrollAnswer, HelloAnswer, MemberAddress
from idunno.node import lifecycle
from idunno.node.config import load_config
from idunno.node.identity import load_identity, load_secrets
from idunno.wire import security
from idunno.wire.calls import Role
from idunno.wire.tokens import make_token

CA_PEM, CA_KEY_PEM = security.make_ca()
TOKEN = make_token(security.fingerprint(CA_PEM))[0]


class Member:
    """A member of the cluster, as a newcomer meets it. It knows a key that has enrolled, as the roster does."""

    def __init__(self) -> None:
        self.enrolled: dict[NodeId, tuple[bytes, EnrollAnswer]] = {}
        self.loses = 0  # so many of the next answers

    async def call(self, method: Any, request: Any, *, timeout_s: float) -> Any:
        if method is HELLO:
            return HelloAnswer("c" * 32, CA_PEM, "0.1.0")
        assert isinstance(request, Enroll)
        assert request.node is not None
        key = security.key_fingerprint(request.csr_pem)
        if request.node not in self.enrolled:
            certificate = security.sign(CA_PEM, CA_KEY_PEM, request.csr_pem, common_name=request.node, role=Role.NODE)
            address = MemberAddress(request.node, request.name, request.address, security.fingerprint(certificate))
            answer = EnrollAnswer("c" * 32, certificate, "node", request.name, [address], b"k" * 32)
            self.enrolled[request.node] = key, answer
        assert self.enrolled[request.node][0] == key
        if self.loses:
            self.loses -= 1
            raise ConnectionLost("the answer got lost")
        return self.enrolled[request.node][1]

    async def close(self) -> None:
        return


@pytest.fixture
def member(monkeypatch: pytest.MonkeyPatch) -> Member:
    found = Member()

    async def connect(*_: Any, **__: Any) -> Member:
        return found

    async def reachable(*_: Any, **__: Any) -> None:
        return

    monkeypatch.setattr(lifecycle, "connect_tcp", connect)
    monkeypatch.setattr(lifecycle, "check_reachable", reachable)
    return found


def join(directory: Path, name: str = "n9") -> dict[str, str]:
    return lifecycle.join("127.0.0.1:7400", TOKEN, directory, "127.0.0.1:7409", name)


def test_a_join_whose_answer_was_lost_is_repeated_as_the_same_node(member: Member, tmp_path: Path) -> None:
    member.loses = 1
    with pytest.raises(ConnectionLost):
        join(tmp_path / "d")
    joined = join(tmp_path / "d", name="another")
    assert list(member.enrolled) == [joined["node"]] == [load_identity(tmp_path / "d").node]
    assert joined["name"] == load_config(tmp_path / "d").name == "n9"  # as the roster has it
    security.server_context(str(tmp_path / "d" / "node.pem"), str(tmp_path / "d" / "node.key"), CA_PEM)
    assert load_secrets(tmp_path / "d").cluster_key == b"k" * 32
    assert not (tmp_path / "d" / lifecycle.JOINING_FILE).exists()


def test_a_join_that_is_killed_before_its_identity_is_written_is_repeated_as_the_same_node(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "write_identity", killed)
        with pytest.raises(SystemExit):
            join(tmp_path / "d")
    assert list(member.enrolled) == [join(tmp_path / "d")["node"]]


def test_another_directory_is_another_node(member: Member, tmp_path: Path) -> None:
    assert join(tmp_path / "a")["node"] != join(tmp_path / "b", "n8")["node"]
    assert (tmp_path / "a" / "node.key").stat().st_mode & 0o777 == 0o600
