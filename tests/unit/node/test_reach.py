# The call-back at a join, on loopback: what a firewall that lets only half through looks like.
from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest

from idunno.base.errors import Unauthenticated, Unavailable
from idunno.coordinator.records import TokenRecord
from idunno.node import reach
from idunno.node.reach import NONCE_BYTES, Reach, answering, check_reachable
from idunno.wire.calls import Actor, Peer, Role
from idunno.wire.local import LocalCaller
from idunno.wire.server import Server

NONCE = bytes(range(NONCE_BYTES))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def check(listen: str, address: str, token: str = "node") -> None:
    server = Server(lambda fingerprint: None, name="n1")

    async def check_token(text: str, timeout_s: float) -> TokenRecord:
        if text not in ("node", "reader"):
            raise Unauthenticated("this token is not known here")
        return TokenRecord("t1", text, b"", 0, "init")

    Reach(server, check_token)
    caller = LocalCaller(server, Peer(Actor("", Role.ANYONE)))
    try:
        await check_reachable(caller, token=token, listen=listen, address=address, nonce=NONCE)
    finally:
        await caller.close()
        await server.close(0.0)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "TRY_S", 0.3)
    monkeypatch.setattr(reach, "UDP_AGAIN_S", 0.1)


def test_an_address_that_is_reached_both_ways_is_accepted_and_the_port_is_free_again() -> None:
    address = f"127.0.0.1:{free_port()}"
    for _ in range(2):
        asyncio.run(check(address, address))


def test_an_address_where_nobody_listens_is_refused() -> None:
    with pytest.raises(Unavailable, match=r"neither over TCP .* nor over UDP .*--advertise"):
        asyncio.run(check(f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"))


def test_the_direction_that_fails_is_named() -> None:
    async def story() -> None:
        port = free_port()
        # Somebody else's UDP socket is where the newcomer's should be seen: TCP passes, UDP does not.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            seen = int(other.getsockname()[1])
            loop = asyncio.get_running_loop()
            tcp_only = await loop.create_server(lambda: reach._Echo(NONCE, set()), "127.0.0.1", seen)
            with pytest.raises(Unavailable, match=r"over TCP, but not over UDP \(no answer within"):
                await check(f"127.0.0.1:{port}", f"127.0.0.1:{seen}")
            tcp_only.close()

    asyncio.run(story())


def test_only_who_holds_a_token_has_a_node_call_anywhere() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(Unauthenticated):
        asyncio.run(check(address, address, token="bad"))
    with pytest.raises(Unauthenticated, match="this token is for a reader"):
        asyncio.run(check(address, address, token="reader"))


def test_a_name_that_no_host_can_have_is_a_reason_and_not_a_bug() -> None:
    with pytest.raises(Unavailable, match="no host can have that name"):
        asyncio.run(check(f"127.0.0.1:{free_port()}", "a..b:7400"))


def test_whoever_connects_and_says_nothing_is_cut_at_the_end_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story() -> None:
        port = free_port()
        accepted = asyncio.Event()
        made = reach._Echo.connection_made

        def connection_made(echo: reach._Echo, transport: asyncio.BaseTransport) -> None:
            made(echo, transport)
            accepted.set()

        monkeypatch.setattr(reach._Echo, "connection_made", connection_made)
        async with answering("127.0.0.1", port, NONCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            async with asyncio.timeout(2):
                await accepted.wait()
        async with asyncio.timeout(2):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()

    asyncio.run(story())


def test_a_port_that_is_taken_is_told() -> None:
    async def story() -> None:
        port = free_port()
        loop = asyncio.get_running_loop()
        taken: Any = await loop.create_server(asyncio.Protocol, "127.0.0.1", port)
        with pytest.raises(Unavailable, match="cannot listen on"):
            async with answering("127.0.0.1", port, NONCE):
                pass
        taken.close()

    asyncio.run(story())


def test_garbage_gets_no_answer() -> None:
    async def story() -> None:
        port = free_port()
        async with answering("127.0.0.1", port, NONCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"x" * NONCE_BYTES)
            assert await reader.read() == b""
            writer.close()

    asyncio.run(story())
