"""Tokens, users and joining, from any node, with real certificates."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest

from idunno.base.errors import (
    Conflict,
    InvalidArgument,
    NoQuorum,
    NotLeader,
    NotReady,
    PermissionDenied,
    Unauthenticated,
)
from idunno.base.ids import NodeId
from idunno.coordinator import messages as m
from idunno.coordinator.service import CoordinatorService
from idunno.coordinator.views import iso_time
from idunno.wire import security
from idunno.wire.calls import Actor, Empty, Peer, Role
from idunno.wire.tokens import make_token, parse_token
from tests.unit.coordinator.fakes import FakeCall, FakeCluster
from tests.unit.coordinator.world import ADMIN, ALICE, HOUR_MS, N1, N2, N3

CA_PEM, CA_KEY_PEM = security.make_ca()
NOBODY = Actor("", Role.ANYONE)
KEY_PEM, CSR_PEM = security.make_key_and_csr("whatever it says")


def cluster(ca_key: bytes | None = CA_KEY_PEM) -> FakeCluster:
    made = FakeCluster()
    made.begin([N1, N2, N3])
    for node in made.nodes.values():
        CoordinatorService(node.coordinator, node, ca_pem=CA_PEM, ca_key_pem=lambda: ca_key, version="0.1.0")
    made.lead(N1)
    return made


async def new_token(world: FakeCluster, role: str, ttl_s: int = 60, at: NodeId = N2) -> m.NewTokenAnswer:
    return await world.nodes[at].ask(m.TOKEN_NEW, m.NewToken(role, ttl_s, "r1"), ADMIN)


def joining(token: str, i: int = 4, name: str = "n4") -> m.Enroll:
    return m.Enroll(token, CSR_PEM, name, NodeId(f"{i:016x}"), f"127.0.0.1:{7400 + i}", 2, "z", "0.1.0")


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 20))


def test_hello_shows_the_ca() -> None:
    async def story() -> None:
        answer = await cluster().nodes[N3].ask(m.HELLO, m.Hello(), NOBODY)
        assert answer == m.HelloAnswer("c" * 32, CA_PEM, "0.1.0")

    run(story())


def test_a_node_joins_through_any_member() -> None:
    async def story() -> None:
        world = cluster()
        token = await new_token(world, "node")
        answer = await world.nodes[N3].ask(m.ENROLL, joining(token.token), NOBODY)
        assert (answer.role, answer.name, answer.cluster, answer.cluster_key) == ("node", "n4", "c" * 32, b"k" * 32)
        assert [member.name for member in answer.members] == ["n1", "n2", "n3", "n4"]
        peer = world.nodes[N1].driver.machine.roster.peer(security.fingerprint(answer.certificate_pem))
        assert peer is not None
        assert peer.node == f"{4:016x}"
        again = await world.nodes[N2].ask(m.ENROLL, joining(token.token), NOBODY)
        assert again == answer

    run(story())


def test_a_token_holds_at_a_leader_that_has_not_applied_it_yet() -> None:
    async def story() -> None:
        world = cluster()
        token = await new_token(world, "node")
        world.lead(N3)
        assert world.nodes[N3].driver.machine.roster.token(token.id) is None
        answer = await world.nodes[N2].ask(m.ENROLL, joining(token.token), NOBODY)
        assert answer.name == "n4"

    run(story())


def test_a_user_logs_in_and_is_revoked() -> None:
    async def story() -> None:
        world = cluster()
        token = await new_token(world, "user")
        answer = await world.nodes[N1].ask(m.ENROLL, m.Enroll(token.token, CSR_PEM, "carol"), NOBODY)
        assert (answer.role, answer.name, answer.cluster_key) == ("user", "carol", b"")
        roster = world.nodes[N1].driver.machine.roster
        peer = roster.peer(security.fingerprint(answer.certificate_pem))
        assert peer is not None
        assert peer.actor == Actor("carol", Role.USER)
        assert await world.nodes[N2].ask(m.USERS, Empty(), ADMIN) == m.UserRows(
            [m.UserRow("carol", "user", iso_time(1_000))]
        )
        await world.nodes[N3].ask(m.USER_REVOKE, m.ById("carol", "r"), ADMIN)
        await world.nodes[N3].ask(m.USER_REVOKE, m.ById("carol", "r"), ADMIN)
        assert roster.peer(security.fingerprint(answer.certificate_pem)) is None

    run(story())


def test_another_key_gets_neither_the_name_nor_the_id() -> None:
    async def story() -> None:
        world = cluster()
        token = await new_token(world, "node")
        await world.nodes[N1].ask(m.ENROLL, joining(token.token), NOBODY)
        other = msgspec.structs.replace(joining(token.token), csr_pem=security.make_key_and_csr("x")[1])
        with pytest.raises(Conflict, match="comes with another key"):
            await world.nodes[N2].ask(m.ENROLL, other, NOBODY)
        with pytest.raises(Conflict, match="the name n4 is in use"):
            await world.nodes[N2].ask(m.ENROLL, msgspec.structs.replace(other, node=NodeId("a" * 16)), NOBODY)

    run(story())


def test_wrong_expired_revoked_and_foreign_tokens_are_refused_with_one_clear_line() -> None:
    async def story() -> None:
        world = cluster()
        node = world.nodes[N2]
        token = await new_token(world, "node")
        with pytest.raises(InvalidArgument, match="mistyped"):
            await node.ask(m.ENROLL, joining(token.token[:-1]), NOBODY)
        unknown, _, _ = make_token(security.fingerprint(CA_PEM))
        with pytest.raises(Unauthenticated, match="not known here"):
            await node.ask(m.ENROLL, joining(unknown), NOBODY)
        foreign, _, _ = make_token(bytes(32))
        with pytest.raises(Unauthenticated, match="another cluster"):
            await node.ask(m.ENROLL, joining(foreign), NOBODY)
        with pytest.raises(Unauthenticated, match="idunno login"):
            await node.ask(m.ENROLL, joining((await new_token(world, "user")).token), NOBODY)
        with pytest.raises(Unauthenticated, match="idunno join"):
            await node.ask(m.ENROLL, m.Enroll(token.token, CSR_PEM, "carol"), NOBODY)
        with pytest.raises(InvalidArgument):
            await node.ask(m.ENROLL, msgspec.structs.replace(joining(token.token), csr_pem=b"junk"), NOBODY)
        await node.ask(m.TOKEN_REVOKE, m.ById(token.id, "r"), ADMIN)
        with pytest.raises(Unauthenticated, match="was revoked"):
            await node.ask(m.ENROLL, joining(token.token), NOBODY)
        token = await new_token(world, "node", ttl_s=60)
        world.now_ms += 60_000
        with pytest.raises(Unauthenticated, match=f"token {token.id} has expired; .*token new --role node"):
            await node.ask(m.ENROLL, joining(token.token), NOBODY)
        assert len(world.nodes[N1].driver.machine.roster.nodes()) == 3

    run(story())


def test_a_guess_of_the_secret_is_not_told_from_an_unknown_token() -> None:
    async def story() -> None:
        world = cluster()
        token = parse_token((await new_token(world, "node")).token)

        class Guess:
            def __init__(self) -> None:
                self.given = [bytes.fromhex(token.token_id), b"g" * 32]

            def token_bytes(self, nbytes: int, /) -> bytes:
                return self.given.pop(0)

        guess, same_id, _ = make_token(security.fingerprint(CA_PEM), Guess())
        assert same_id == token.token_id
        with pytest.raises(Unauthenticated, match="not known here"):
            await world.nodes[N1].ask(m.ENROLL, joining(guess), NOBODY)

    run(story())


def test_a_leader_without_the_ca_key_says_so() -> None:
    async def story() -> None:
        world = cluster(ca_key=None)
        with pytest.raises(NotReady, match=r"ca\.key"):
            await world.nodes[N1].ask(m.ENROLL, joining((await new_token(world, "node")).token), NOBODY)

    run(story())


def test_tokens_are_listed_with_their_state() -> None:
    async def story() -> None:
        world = cluster()
        first, second = await new_token(world, "reader", 10), await new_token(world, "admin", 7_200)
        await world.nodes[N2].ask(m.TOKEN_REVOKE, m.ById(second.id, "r"), ADMIN)
        world.now_ms += 20_000
        rows = (await world.nodes[N3].ask(m.TOKEN_LIST, Empty(), ADMIN)).tokens
        assert [(row.id, row.role, row.state, row.created_by) for row in rows] == [
            ("t-node", "node", "valid", ""),
            ("t-user", "user", "valid", ""),
            (first.id, "reader", "expired", "root"),
            (second.id, "admin", "revoked", "root"),
        ]
        assert rows[0].expires == iso_time(HOUR_MS) == "1970-01-01T01:00:00.000Z"
        assert not any(first.token in str(row) for row in rows)

    run(story())


@pytest.mark.parametrize(("role", "ttl_s"), [("king", 60), ("node", 0), ("node", 367 * 86_400)])
def test_a_token_that_cannot_be_is_refused(role: str, ttl_s: int) -> None:
    async def story() -> None:
        with pytest.raises(InvalidArgument):
            await new_token(cluster(), role, ttl_s)

    run(story())


def test_only_admins_make_tokens() -> None:
    async def story() -> None:
        with pytest.raises(PermissionDenied):
            await cluster().nodes[N1].ask(m.TOKEN_NEW, m.NewToken("admin", 60, "r"), ALICE)

    run(story())


def test_what_a_node_passed_on_is_not_passed_on_again() -> None:
    async def story() -> None:
        world = cluster()
        with pytest.raises(NotLeader):
            await world.nodes[N2].ask(
                m.TOKEN_NEW, m.NewToken("user", 60, "r"), ADMIN, Peer(Actor(N3, Role.NODE), node=N3)
            )
        assert world.calls == []

    run(story())


def test_times_are_written_in_utc() -> None:
    assert iso_time(1_795_176_480_123) == "2026-11-20T12:08:00.123Z"
    assert iso_time(-5) == "1970-01-01T00:00:00.000Z"
    assert iso_time(2**63).startswith("9999-12-31")


def test_without_a_leader_the_reason_comes_before_the_callers_time_is_over() -> None:
    """Else the caller hears only that time is over, and that a token may have been made."""

    async def story() -> None:
        world = cluster()
        world.lead(None)
        node = world.nodes[N2]
        requests: list[tuple[Any, Any]] = [
            (m.TOKEN_NEW, m.NewToken("user", 60, "r1")),
            (m.TOKEN_LIST, Empty()),
            (m.USERS, Empty()),
            (m.TOKEN_REVOKE, m.ById("x", "r2")),
        ]
        for method, request in requests:
            call: Any = FakeCall(request, Peer(ADMIN), ADMIN, time_s=1.0)
            with pytest.raises(NoQuorum, match=r"no leader is known|no consistent read"):
                await asyncio.wait_for(node.handlers[method.name](call), 1.0)
        await node.coordinator.close()

    run(story())
