# TLS: who is let in, as whom, and who is told what when not.
from __future__ import annotations

import asyncio
import base64
import datetime
import os
import random
import socket
import ssl
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from idunno.base.errors import (
    ConnectionLost,
    Exhausted,
    IdunnoError,
    InvalidArgument,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unconfirmed,
)
from idunno.base.ids import check_label
from idunno.wire import security
from idunno.wire.calls import Actor, Empty, Method, Peer, Role
from idunno.wire.rpc import Limits, Server, connect_tcp, connect_unix
from idunno.wire.server import short_path
from tests.unit.wire.support import ECHO, HANG, HELLO, LOOPS, NODES_ONLY, WHO, Text, cluster, run, serving_tls, until

HOME, FOREIGN = "home", "foreign"
EITHER_LOOP = pytest.mark.parametrize("loop", LOOPS)


@EITHER_LOOP
def test_a_certificate_in_the_roster_is_who_the_roster_says(loop: str) -> None:
    home = cluster(HOME)

    async def main() -> None:
        async with serving_tls(home) as (port, _, _):
            for identity, expected in ((home.user, "ann user"), (home.other_node, f"{'b' * 16} node")):
                seen: list[bytes] = []
                context = home.client_context(identity)
                caller = await connect_tcp("127.0.0.1", port, context, expect=seen.append, timeout_s=5)
                assert seen == [home.node.fingerprint] == [caller.fingerprint]
                assert (await caller.call(WHO, Empty(), timeout_s=5)).text == expected
                body = os.urandom(200_000)
                assert (await caller.call_with_body(ECHO, Text(), timeout_s=5, body=body))[1] == body
                await caller.close()

    run(loop, main)


@EITHER_LOOP
def test_without_a_certificate_only_the_first_words_may_be_said(loop: str) -> None:
    home = cluster(HOME)

    async def main() -> None:
        async with serving_tls(home) as (port, _, _):
            for context in (home.client_context(None), security.client_context(None, None, None)):
                caller = await connect_tcp("127.0.0.1", port, context, timeout_s=5)
                assert await caller.call(HELLO, Text("hi"), timeout_s=5) == Text("hi")
                with pytest.raises(
                    PermissionDenied,
                    match=r"needs the role reader, .you. has anyone; an admin gives it: .*token new --role reader",
                ):
                    await caller.call(WHO, Empty(), timeout_s=5)
                with pytest.raises(ConnectionLost, match="at most"):  # strangers send no bodies
                    await caller.call(HELLO, Text(), timeout_s=5, body=b"x")

    run(loop, main)


@EITHER_LOOP
def test_a_certificate_of_another_cluster_is_refused(loop: str) -> None:
    home, foreign = cluster(HOME), cluster(FOREIGN)

    async def main() -> None:
        async with serving_tls(home) as (port, server, _):
            stranger = security.client_context(foreign.user.certificate, foreign.user.key, home.ca)
            with pytest.raises((Unavailable, Unauthenticated), match=r"of another cluster|TLS ended the connection"):
                await connect_tcp("127.0.0.1", port, stranger, timeout_s=5)
            with pytest.raises(Unauthenticated, match="not a node of this cluster"):  # and the other way round
                await connect_tcp("127.0.0.1", port, foreign.client_context(foreign.user), timeout_s=5)
            assert server.connections == 0

    run(loop, main)


@EITHER_LOOP
def test_a_certificate_that_is_not_in_the_roster_is_told_what_to_do(loop: str) -> None:
    home = cluster(HOME)

    async def main() -> None:
        roster = {key: peer for key, peer in home.peers().items() if key != home.user.fingerprint}
        async with serving_tls(home, roster) as (port, server, _):
            for _ in range(20):  # told every time, not only when it wins a race
                with pytest.raises(Unauthenticated, match=r"removed or revoked.*new token"):
                    await connect_tcp("127.0.0.1", port, home.client_context(home.user), timeout_s=5)
            assert (server.connections, server.counters["refused"]) == (0, 20)

    run(loop, main)


@EITHER_LOOP
def test_recheck_cuts_whom_the_roster_no_longer_knows_and_nobody_else(loop: str) -> None:
    home = cluster(HOME)

    async def main() -> None:
        roster = home.peers()
        async with serving_tls(home, roster) as (port, server, story):
            user = await connect_tcp("127.0.0.1", port, home.client_context(home.user), timeout_s=5)
            node = await connect_tcp("127.0.0.1", port, home.client_context(home.other_node), timeout_s=5)
            task = asyncio.create_task(user.call(HANG, Empty(), timeout_s=60))
            await until(lambda: story.started == 1)
            server.recheck()
            del roster[home.user.fingerprint]
            roster[home.other_node.fingerprint] = Peer(Actor("bob", Role.READER))
            assert not user.closed
            server.recheck()
            with pytest.raises(ConnectionLost, match="removed or revoked"):
                await task
            await until(lambda: story.cancelled == 1)
            await until(lambda: user.closed)
            assert (await node.call(WHO, Empty(), timeout_s=5)).text == "bob reader"
            assert server.connections == 1

    run(loop, main)


def test_the_roster_gives_rights_and_no_name_or_anonymity_does() -> None:
    home = cluster(HOME)

    async def main() -> None:
        admin = Peer(Actor("root", Role.ADMIN))
        async with serving_tls(home, {None: admin}) as (port, _, _):  # a mistake of the roster must not open the door
            caller = await connect_tcp("127.0.0.1", port, home.client_context(None), timeout_s=5)
            with pytest.raises(PermissionDenied, match="has anyone"):
                await caller.call(NODES_ONLY, Empty(), timeout_s=5)

    run("asyncio", main)


def test_a_user_cannot_serve_as_a_node() -> None:
    home = cluster(HOME)

    async def main() -> None:
        server = Server(home.peers().get, name="mallory")
        port = await server.listen_tcp(
            "127.0.0.1", 0, security.server_context(home.user.certificate, home.user.key, home.ca)
        )
        with pytest.raises(Unauthenticated):
            await connect_tcp("127.0.0.1", port, home.client_context(home.other_node), timeout_s=5)
        await server.close(0)

    run("asyncio", main)


@EITHER_LOOP
def test_dates_are_not_checked(loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "_NOT_AFTER", datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC))
    ca, ca_key = security.make_ca()
    key, csr = security.make_key_and_csr("a")
    certificate = security.sign(ca, ca_key, csr, common_name="a", role=Role.NODE)
    (tmp_path / "a.pem").write_bytes(certificate)
    (tmp_path / "a.key").write_bytes(key)
    files = (str(tmp_path / "a.pem"), str(tmp_path / "a.key"))

    async def main() -> None:
        node = Peer(Actor("a" * 16, Role.NODE))
        fingerprint = security.fingerprint(certificate)
        server = Server(lambda shown: node if shown == fingerprint else None, name="n1")
        port = await server.listen_tcp("127.0.0.1", 0, security.server_context(*files, ca))
        caller = await connect_tcp("127.0.0.1", port, security.client_context(*files, ca), timeout_s=5)
        await caller.close()
        await server.close(0)

    run(loop, main)


def test_expect_speaks_before_anything_is_sent() -> None:
    home = cluster(HOME)

    def expect(fingerprint: bytes) -> None:
        raise Unauthenticated("not the one I meant")

    async def main() -> None:
        async with serving_tls(home) as (port, server, _):
            with pytest.raises(Unauthenticated, match="not the one I meant"):
                await connect_tcp("127.0.0.1", port, home.client_context(home.user), expect=expect, timeout_s=5)
            await until(lambda: server.connections == 0)

    run("asyncio", main)


@EITHER_LOOP
def test_nobody_there_a_silent_one_and_a_port_in_use_are_named(loop: str) -> None:
    home = cluster(HOME)

    async def main() -> None:
        async with serving_tls(home) as (port, _, _):
            other = Server(lambda _: None, name="n2")
            with pytest.raises(Unavailable, match=f"port {port} of 127.0.0.1 is in use by another process"):
                await other.listen_tcp("127.0.0.1", port, home.server_context())
        with pytest.raises(Unavailable, match=r"cannot reach .*is the node running"):
            await connect_tcp("127.0.0.1", port, home.client_context(home.user), timeout_s=5)
        silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        silent_port = silent.sockets[0].getsockname()[1]
        for context in (home.client_context(home.user), None):
            with pytest.raises(Unavailable, match=r"did not answer within 0\.2 s"):
                await connect_tcp("127.0.0.1", silent_port, context, timeout_s=0.2)
        silent.close()

    run(loop, main)


@EITHER_LOOP
def test_garbage_leaves_the_server_healthy_and_nothing_behind(loop: str) -> None:
    home = cluster(HOME)
    rng = random.Random(1)

    async def main() -> None:
        async with serving_tls(home) as (port, server, _):
            plain = Server(lambda _: None, name="n2")
            plain_port = await plain.listen_tcp("127.0.0.1", 0, None)
            good = await connect_tcp("127.0.0.1", port, home.client_context(home.user), timeout_s=5)
            open_before = len(os.listdir("/proc/self/fd"))

            async def bother(target: int, data: bytes) -> None:
                reader, writer = await asyncio.open_connection("127.0.0.1", target)
                writer.write(data)
                try:
                    async with asyncio.timeout(0.05):
                        await reader.read()
                except (TimeoutError, OSError):
                    pass
                writer.transport.abort()

            def garbage(i: int) -> bytes:
                frame_like = b"iD\x01" + bytes([rng.randrange(10)]) + rng.randbytes(2) + bytes(2) if i % 3 == 0 else b""
                return frame_like + rng.randbytes(rng.randrange(1, 2000))

            for _ in range(20):
                await asyncio.gather(*[bother((port, plain_port)[i % 2], garbage(i)) for i in range(50)])
                assert await good.call(ECHO, Text("ok"), timeout_s=5) == Text("ok")
            await until(lambda: server.connections == 1 and plain.connections == 0)
            assert plain.counters["cut"] > 100
            await until(lambda: len(os.listdir("/proc/self/fd")) <= open_before)
            await good.close()
            await plain.close(0)

    run(loop, main)


@EITHER_LOOP
def test_connections_are_bounded_and_silent_or_idle_ones_are_cut(loop: str) -> None:
    home = cluster(HOME)
    limits = Limits(connections_max=4, anonymous_max=2, first_frame_s=0.3, anonymous_idle_s=0.3)

    async def main() -> None:
        async with serving_tls(home, limits=limits) as (port, server, _):
            anonymous, user = home.client_context(None), home.client_context(home.user)
            idle = [await connect_tcp("127.0.0.1", port, anonymous, timeout_s=5) for _ in range(2)]
            with pytest.raises(Exhausted, match="2 connections without a certificate"):
                await connect_tcp("127.0.0.1", port, anonymous, timeout_s=5)
            users = [await connect_tcp("127.0.0.1", port, user, timeout_s=5) for _ in range(2)]
            with pytest.raises(Exhausted, match="4 connections"):
                await connect_tcp("127.0.0.1", port, user, timeout_s=5)
            await until(lambda: all(connection.closed for connection in idle))
            assert not any(connection.closed for connection in users)  # known ones may be silent
            _, silent = await asyncio.open_connection(
                "127.0.0.1", port, ssl=user, server_hostname=""
            )  # a handshake, and then not a word
            await until(lambda: server.connections == 3)
            await until(lambda: server.connections == 2)
            silent.transport.abort()
            for connection in users:
                await connection.close()

    run(loop, main)


@EITHER_LOOP
def test_a_unix_socket_of_any_path_length_serves_the_same_user_as_admin(loop: str, tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)
    path = str(folder / "node.sock")

    async def main() -> None:
        for _ in range(2):  # the second time over the socket file of a process that died
            server = Server(lambda _: None, name="n1")

            async def who(call: object) -> Text:
                peer: Peer = call.peer  # type: ignore[attr-defined]
                assert peer.local
                with pytest.raises(InvalidArgument):  # nobody can log in under that name, and so own what is ours
                    check_label("user", peer.actor.name)
                return Text(f"{peer.actor.role.value}")

            server.register(WHO, who)
            await server.listen_unix(path)
            assert os.stat(path).st_mode & 0o777 == 0o600
            caller = await connect_unix(path, 5)
            assert (await caller.call(WHO, Empty(), timeout_s=5)).text == "admin"
            await caller.close()
            await server.close(0)
            assert os.listdir(folder) == []
            with short_path(path) as short:
                dead = socket.socket(socket.AF_UNIX)
                dead.bind(short)
                dead.close()
        with pytest.raises(Unavailable, match="is the node running"):
            await connect_unix(path, 5)
        with pytest.raises(Unavailable, match="No such file"):
            await connect_unix(str(folder / "none" / "node.sock"), 5)

    run(loop, main)


# -- certificates -------------------------------------------------------------------------------------------------------


def test_the_ca_decides_the_names_and_takes_the_key_only() -> None:
    ca, ca_key = security.make_ca()
    key, csr = security.make_key_and_csr("i-am-the-admin")
    certificate = security.sign(ca, ca_key, csr, common_name="ann", role=Role.READER)
    assert security.fingerprint(certificate) == security.fingerprint(ssl.PEM_cert_to_DER_cert(certificate.decode()))
    assert b"PRIVATE KEY" in key
    assert b"PRIVATE KEY" not in certificate
    assert security.key_fingerprint(csr) == security.key_fingerprint(csr)
    assert security.key_fingerprint(csr) != security.key_fingerprint(security.make_key_and_csr("x")[1])
    subject = x509.load_pem_x509_certificate(certificate).subject.rfc4514_string()
    assert "ann" in subject
    assert "reader" in subject
    assert "admin" not in subject


NO_REQUEST = b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"


@pytest.mark.parametrize("csr", [b"", b"garbage", NO_REQUEST, b"x" * 20_000])
def test_a_request_that_is_none_is_refused(csr: bytes) -> None:
    ca, ca_key = security.make_ca()
    with pytest.raises(InvalidArgument):
        security.sign(ca, ca_key, csr, common_name="ann", role=Role.USER)


def test_a_tampered_request_and_an_impossible_name_are_refused() -> None:
    ca, ca_key = security.make_ca()
    _, csr = security.make_key_and_csr("ann")
    der = bytearray(x509.load_pem_x509_csr(csr).public_bytes(Encoding.DER))
    der[-1] ^= 1
    tampered = (
        b"-----BEGIN CERTIFICATE REQUEST-----\n"
        + base64.encodebytes(bytes(der))
        + b"-----END CERTIFICATE REQUEST-----\n"
    )
    with pytest.raises(InvalidArgument, match="not signed with its own key"):
        security.sign(ca, ca_key, tampered, common_name="ann", role=Role.USER)
    for name in ("", "n" * 65):
        with pytest.raises(InvalidArgument, match="1 to 64"):
            security.sign(ca, ca_key, csr, common_name=name, role=Role.USER)


def test_missing_or_wrong_files_are_one_clear_error(tmp_path: Path) -> None:
    home = cluster(HOME)
    (tmp_path / "bad.pem").write_text("no certificate")
    for certificate, key in (
        (str(tmp_path / "none.pem"), home.node.key),
        (str(tmp_path / "bad.pem"), home.node.key),
        (home.user.certificate, home.node.key),
    ):
        with pytest.raises(InvalidArgument):
            security.server_context(certificate, key, home.ca)
    with pytest.raises(InvalidArgument):
        security.client_context(None, None, b"\xff no CA")


def test_errors_of_this_page_tell_the_caller_that_nothing_happened() -> None:
    kinds: tuple[type[IdunnoError], ...] = (Unauthenticated, PermissionDenied, Unavailable, Exhausted)
    assert not any(kind.may_have_happened for kind in kinds)


@EITHER_LOOP
def test_a_burst_of_large_calls_waits_its_turn_instead_of_filling_memory(loop: str) -> None:
    home = cluster(HOME)

    async def main() -> None:
        async with serving_tls(home) as (port, _, _):
            caller = await connect_tcp("127.0.0.1", port, home.client_context(home.user), timeout_s=5)
            body = os.urandom(256 * 1024)
            calls = [caller.call_with_body(ECHO, Text(), timeout_s=20, body=body) for _ in range(200)]
            tasks = [asyncio.create_task(call) for call in calls]
            link = caller._link
            assert link is not None
            await asyncio.sleep(0)
            assert link.buffered() < 4 * 1024 * 1024
            results = await asyncio.gather(*tasks)
            assert all(answer == (Text(), body) for answer in results)
            await caller.close()

    run(loop, main)


def test_an_answer_that_cannot_be_read_may_have_happened() -> None:
    home = cluster(HOME)

    async def main() -> None:
        async with serving_tls(home) as (port, _, _):
            caller = await connect_tcp("127.0.0.1", port, home.client_context(home.user), timeout_s=5)
            newer = Method("test.echo", Text, Number, Role.READER)
            with pytest.raises(Unconfirmed, match="cannot be read"):
                await caller.call(newer, Text("not a number"), timeout_s=5)
            await caller.close()

    run("asyncio", main)


class Number(msgspec.Struct):
    number: int


def test_people_cannot_take_the_connections_that_nodes_need() -> None:
    home = cluster(HOME)
    limits = Limits(connections_max=4, clients_max=2)

    async def main() -> None:
        async with serving_tls(home, limits=limits) as (port, _, _):
            user = home.client_context(home.user)
            users = [await connect_tcp("127.0.0.1", port, user, timeout_s=5) for _ in range(2)]
            with pytest.raises(Exhausted, match="2 connections of clients"):
                await connect_tcp("127.0.0.1", port, user, timeout_s=5)
            node = await connect_tcp("127.0.0.1", port, home.client_context(home.other_node), timeout_s=5)
            for connection in (*users, node):
                await connection.close()

    run("asyncio", main)
