# Logging in, and coming back with what the login left.
from __future__ import annotations

import asyncio
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from idunno.base.errors import Conflict, ConnectionLost, InvalidArgument, Unauthenticated, Unavailable
from idunno.client import dial
from idunno.client.dial import dialer, login
from idunno.client.locate import locate
from idunno.coordinator.messages import (
    ENROLL,
    HELLO,
    MEMBERS,
    Enroll,
    EnrollAnswer,
    Hello,
    HelloAnswer,
    Members,
    MembersAnswer,
)
from idunno.wire.calls import Actor, Call, Peer, Role
from idunno.wire.rpc import Server
from idunno.wire.security import fingerprint, key_fingerprint, make_ca, make_key_and_csr, server_context, sign
from idunno.wire.tokens import make_token


class Door:
    """One node's TCP door: Hello, Enroll, and something that only a known user may ask."""

    def __init__(self, folder: Path) -> None:
        self.ca_pem, self.ca_key = make_ca()
        key, csr = make_key_and_csr("n1")
        (folder / "node.pem").write_bytes(sign(self.ca_pem, self.ca_key, csr, common_name="n1", role=Role.NODE))
        (folder / "node.key").write_bytes(key)
        self.context = server_context(str(folder / "node.pem"), str(folder / "node.key"), self.ca_pem)
        self.token = make_token(fingerprint(self.ca_pem))[0]
        self.users: dict[bytes, str] = {}
        self.tokens_heard: list[str] = []
        self.keys: dict[str, bytes] = {}
        self.answers_lost = 0
        self.silent = False
        self.server = Server(self._identify, name="n1")
        self.server.register(HELLO, self._hello)
        self.server.register(ENROLL, self._enroll)
        self.server.register(MEMBERS, self._members)
        self.greeted: list[str] = []

    def _identify(self, print_: bytes | None) -> Peer | None:
        if print_ is None:
            return Peer(Actor("", Role.ANYONE))
        name = self.users.get(print_)
        return Peer(Actor(name, Role.USER)) if name is not None else None

    async def _hello(self, call: Call[Hello]) -> HelloAnswer:
        if self.silent:
            await asyncio.Event().wait()
        return HelloAnswer("c" * 32, self.ca_pem, "0.1.0")

    async def _enroll(self, call: Call[Enroll]) -> EnrollAnswer:
        self.tokens_heard.append(call.request.token)
        if call.request.token != self.token:
            raise Unauthenticated("this token has expired; ask an admin for `idunno token new`")
        name = call.request.name
        key = key_fingerprint(call.request.csr_pem)
        if self.keys.setdefault(name, key) != key:
            raise Conflict(f"there is a user {name} already")
        pem = sign(self.ca_pem, self.ca_key, call.request.csr_pem, common_name=name, role=Role.USER)
        self.users[fingerprint(pem)] = name
        if self.answers_lost:
            self.answers_lost -= 1
            raise ConnectionLost("the connection broke")
        return EnrollAnswer("c" * 32, pem, "user", name, [])

    async def _members(self, call: Call[Members]) -> MembersAnswer:
        self.greeted.append(call.actor.name)
        return MembersAnswer([])


def play(tmp_path: Path, body: Callable[[Door, str, Path], Awaitable[Any]]) -> None:
    async def story() -> None:
        door = Door(tmp_path)
        port = await door.server.listen_tcp("127.0.0.1", 0, door.context)
        try:
            await body(door, f"127.0.0.1:{port}", tmp_path / "home")
        finally:
            await door.server.close(1.0)

    asyncio.run(story())


def test_a_login_opens_the_door_from_then_on_and_is_for_this_user_alone(tmp_path: Path) -> None:
    async def body(door: Door, address: str, home: Path) -> None:
        about = await login(address, door.token, "alice", home, 10)
        assert (about.name, about.role) == ("alice", "user")
        place = locate(address, {"IDUNNO_HOME": str(home)})
        link = await dialer(place)(place.doors[0], 5)
        await link.call(MEMBERS, Members(), timeout_s=5)
        await link.close()
        assert door.greeted == ["alice"]
        assert place.login is not None
        assert stat.S_IMODE(place.login.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in place.login.iterdir()} == {0o600}
        door.keys.clear()
        await login(address, door.token, "alice", home, 10)  # again: replaces it
        assert [path.name for path in place.login.parent.iterdir()] == [place.login.name]

    play(tmp_path, body)


def test_a_token_is_never_shown_to_another_cluster(tmp_path: Path) -> None:
    async def body(door: Door, address: str, home: Path) -> None:
        foreign = make_token(fingerprint(make_ca()[0]))[0]
        with pytest.raises(Unauthenticated, match="does not belong to the cluster that this token is for"):
            await login(address, foreign, "alice", home, 10)
        assert door.tokens_heard == []

    play(tmp_path, body)
    assert not (tmp_path / "home").exists()


def test_a_refused_token_leaves_no_login(tmp_path: Path) -> None:
    async def body(door: Door, address: str, home: Path) -> None:
        expired = make_token(fingerprint(door.ca_pem))[0]
        with pytest.raises(Unauthenticated, match="has expired"):
            await login(address, expired, "alice", home, 10)
        with pytest.raises(InvalidArgument):
            await login(address, "idunno-nonsense", "alice", home, 10)
        with pytest.raises(InvalidArgument, match="cannot name a user"):
            await login(address, door.token, "a/b", home, 10)

    play(tmp_path, body)
    assert list((tmp_path / "home").glob("logins/*")) == []


def test_a_revoked_user_is_refused_and_told_so(tmp_path: Path) -> None:
    async def body(door: Door, address: str, home: Path) -> None:
        await login(address, door.token, "alice", home, 10)
        door.users.clear()
        place = locate(address, {"IDUNNO_HOME": str(home)})
        with pytest.raises(Unauthenticated):
            await dialer(place)(place.doors[0], 5)

    play(tmp_path, body)


def test_nobody_there(tmp_path: Path) -> None:
    async def body(door: Door, address: str, home: Path) -> None:
        await door.server.close(0)
        with pytest.raises(Unavailable, match="cannot reach"):
            await login(address, door.token, "alice", home, 5)

    play(tmp_path, body)


def test_a_login_whose_answer_was_lost_asks_again_with_the_same_key(tmp_path: Path) -> None:
    async def body(door: Door, address: str, home: Path) -> None:
        door.answers_lost = 1
        assert (await login(address, door.token, "alice", home, 10)).name == "alice"
        assert len(door.tokens_heard) == 2

    play(tmp_path, body)


def test_a_login_that_could_not_be_kept_is_not_lost_for_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster has let alice in, then the disk is full: her name would be taken by a key that nobody has."""

    def full(directory: Path, files: dict[str, bytes]) -> None:
        raise OSError(28, "No space left on device", str(directory))

    async def body(door: Door, address: str, home: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(dial, "_keep", full)
            with pytest.raises(OSError, match="No space left"):
                await login(address, door.token, "alice", home, 10)
        assert list(door.keys) == ["alice"]
        with pytest.raises(Conflict):
            await login(address, door.token, "alice", tmp_path / "elsewhere", 10)
        assert (await login(address, door.token, "alice", home, 10)).name == "alice"
        assert [path.name for path in (home / "logins").iterdir()] == [address.replace(":", "_")]

    play(tmp_path, body)


def test_nobody_is_let_in_who_could_not_keep_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    async def body(door: Door, address: str, home: Path) -> None:
        monkeypatch.setattr(dial, "_write", full)
        with pytest.raises(OSError, match=r"No space left on device: .*logins"):
            await login(address, door.token, "alice", home, 10)
        assert door.keys == {}

    play(tmp_path, body)


def test_a_node_that_does_not_even_greet_has_changed_nothing(tmp_path: Path) -> None:
    async def body(door: Door, address: str, home: Path) -> None:
        door.silent = True
        with pytest.raises(Unavailable, match=r"join\.hello"):
            await login(address, door.token, "alice", home, 0.3)

    play(tmp_path, body)
