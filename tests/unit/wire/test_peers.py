# Peers: one connection a node and lane, made when needed, remade when lost, and never with the wrong node.
from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from idunno.base.errors import ConnectionLost, Unavailable
from idunno.base.ids import NodeId
from idunno.wire.calls import Actor, Empty, Lane, Peer, Role
from idunno.wire.peers import Endpoint, PeerPool
from idunno.wire.rpc import LocalCaller, Server
from tests.unit.wire.support import (
    ECHO,
    HANG,
    LOOPS,
    REPEAT,
    TOLD,
    WHO,
    Story,
    Text,
    cluster,
    register,
    run,
    serving_tls,
    until,
)

HOME = "home"
A_NODE, B_NODE = NodeId("a" * 16), NodeId("b" * 16)
EITHER_LOOP = pytest.mark.parametrize("loop", LOOPS)


@contextlib.asynccontextmanager
async def pooled() -> AsyncIterator[tuple[PeerPool, dict[NodeId, Endpoint], Server, Story, list[tuple[NodeId, Lane]]]]:
    """Node b's pool, which knows node a; a's server; what b heard of lost connections."""
    home = cluster(HOME)
    async with serving_tls(home) as (port, server, story):
        endpoints = {A_NODE: Endpoint("127.0.0.1", port, home.node.fingerprint)}
        own = Server(lambda _: None, name="b")
        register(own)
        me = LocalCaller(own, Peer(Actor(B_NODE, Role.NODE), B_NODE))
        pool = PeerPool(endpoints.get, lambda: home.client_context(home.other_node), me=B_NODE, local=me)
        lost: list[tuple[NodeId, Lane]] = []
        pool.lost(lambda node, lane: lost.append((node, lane)))
        try:
            yield pool, endpoints, server, story, lost
        finally:
            await pool.close()
            await own.close(0)


@EITHER_LOOP
def test_all_calls_of_a_lane_share_one_connection_made_on_first_use(loop: str) -> None:
    async def main() -> None:
        async with pooled() as (pool, _, server, _, lost):
            assert server.connections == 0
            await asyncio.gather(*[pool.to(A_NODE).call(ECHO, Text(), timeout_s=5) for _ in range(50)])
            assert server.connections == 1
            async with pool.to(A_NODE, Lane.BULK).open(REPEAT, Text(), timeout_s=5) as stream:
                await stream.send(b"abc")
                await stream.end()
                item = await stream.receive()
                assert item is not None
                assert item.body == b"abc"
                assert (await stream.answer()).text == "3"
            assert server.connections == 2
            assert (await pool.to(A_NODE).call(WHO, Empty(), timeout_s=5)).text == f"{B_NODE} node"
            assert (await pool.to(A_NODE).call_with_body(ECHO, Text(), timeout_s=5, body=b"x"))[1] == b"x"
            assert lost == []

    run(loop, main)


@EITHER_LOOP
def test_a_lost_connection_is_told_and_the_next_call_makes_another(loop: str) -> None:
    async def main() -> None:
        async with pooled() as (pool, _, server, story, lost):
            hanging = asyncio.create_task(pool.to(A_NODE).call(HANG, Empty(), timeout_s=60))
            await until(lambda: story.started == 1)
            for door in list(server._doors):
                assert door.link is not None
                door.link.close()
            with pytest.raises(ConnectionLost):
                await hanging
            assert lost == [(A_NODE, Lane.CALLS)]
            assert await pool.to(A_NODE).call(ECHO, Text("again"), timeout_s=5) == Text("again")

    run(loop, main)


@EITHER_LOOP
def test_a_notification_begins_a_connection_and_never_waits(loop: str) -> None:
    async def main() -> None:
        async with pooled() as (pool, _, server, story, _):
            caller = pool.to(A_NODE, Lane.CONSENSUS)
            assert not caller.notify(TOLD, Text("too early"))
            await until(lambda: caller.notify(TOLD, Text("now")))
            await until(lambda: story.told == ["now"])
            assert server.connections == 1
            assert not pool.to(NodeId("c" * 16)).notify(TOLD, Text("nobody"))

    run(loop, main)


@EITHER_LOOP
def test_notifications_are_refused_when_the_peer_does_not_keep_up(loop: str) -> None:
    async def main() -> None:
        async with pooled() as (pool, _, _, story, _):
            caller = pool.to(A_NODE)
            await caller.call(ECHO, Text(), timeout_s=5)
            taken = 0
            while caller.notify(TOLD, Text(str(taken)), bytes(200_000)):
                taken += 1  # without giving the loop a turn: nothing can leave meanwhile beyond the socket's own buffer
            assert 10 < taken < 200
            await until(lambda: len(story.told) == taken)
            assert caller.notify(TOLD, Text("room again"))

    run(loop, main)


@EITHER_LOOP
def test_during_back_off_calls_fail_at_once_with_node_and_reason(loop: str) -> None:
    async def main() -> None:
        async with pooled() as (pool, endpoints, server, _, _):
            good = endpoints[A_NODE]
            endpoints[A_NODE] = Endpoint("127.0.0.1", 1, good.fingerprint)
            caller = pool.to(A_NODE)
            for _ in range(3):
                with pytest.raises(Unavailable, match=f"node {A_NODE} cannot be reached: cannot reach 127.0.0.1:1"):
                    await caller.call(ECHO, Text(), timeout_s=5)
            endpoints[A_NODE] = good
            begun = asyncio.get_running_loop().time()
            with pytest.raises(Unavailable):
                await caller.call(ECHO, Text(), timeout_s=5)
            assert asyncio.get_running_loop().time() - begun < 0.05
            pool.drop(A_NODE)  # news of the node: no reason to wait any longer
            assert await pool.to(A_NODE).call(ECHO, Text("x"), timeout_s=5) == Text("x")
            assert server.connections == 1

    run(loop, main)


@EITHER_LOOP
def test_back_off_ends_by_itself(loop: str) -> None:
    async def main() -> None:
        async with pooled() as (pool, endpoints, _, _, _):
            good = endpoints[A_NODE]
            endpoints[A_NODE] = Endpoint("127.0.0.1", 1, good.fingerprint)
            with pytest.raises(Unavailable):
                await pool.to(A_NODE).call(ECHO, Text(), timeout_s=5)
            endpoints[A_NODE] = good
            while True:
                with contextlib.suppress(Unavailable):
                    assert await pool.to(A_NODE).call(ECHO, Text("x"), timeout_s=5) == Text("x")
                    break
                await asyncio.sleep(0.01)

    run(loop, main)


@EITHER_LOOP
def test_another_machine_at_a_nodes_address_gets_nothing(loop: str) -> None:
    async def main() -> None:
        async with pooled() as (pool, endpoints, server, _, _):
            endpoints[A_NODE] = Endpoint("127.0.0.1", endpoints[A_NODE].port, b"\x00" * 32)
            with pytest.raises(Unavailable, match="shows the certificate of another node"):
                await pool.to(A_NODE).call(ECHO, Text(), timeout_s=5)
            await until(lambda: server.connections == 0)
            with pytest.raises(Unavailable, match="not in the roster"):
                await pool.to(NodeId("c" * 16)).call(ECHO, Text(), timeout_s=5)

    run(loop, main)


@EITHER_LOOP
def test_dropping_a_node_ends_its_calls_at_once(loop: str) -> None:
    async def main() -> None:
        async with pooled() as (pool, _, server, story, lost):
            hanging = asyncio.create_task(pool.to(A_NODE).call(HANG, Empty(), timeout_s=60))
            await until(lambda: story.started == 1)
            pool.drop(A_NODE)
            with pytest.raises(ConnectionLost):
                await hanging
            assert lost == [(A_NODE, Lane.CALLS)]
            await until(lambda: server.connections == 0)

    run(loop, main)


def test_a_silent_address_costs_a_call_its_own_deadline_and_no_more() -> None:
    async def main() -> None:
        async with pooled() as (pool, endpoints, _, _, _):
            silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
            port = silent.sockets[0].getsockname()[1]
            endpoints[A_NODE] = Endpoint("127.0.0.1", port, b"")
            with pytest.raises(Unavailable, match=r"no connection within 0\.05 s"):
                await pool.to(A_NODE).call(ECHO, Text(), timeout_s=0.05)
            silent.close()

    run("asyncio", main)


def test_to_oneself_is_the_local_caller() -> None:
    async def main() -> None:
        async with pooled() as (pool, _, _, _, _):
            assert isinstance(pool.to(B_NODE), LocalCaller)
            assert (await pool.to(B_NODE).call(WHO, Empty(), timeout_s=5)).text == f"{B_NODE} node"

    run("asyncio", main)


def test_a_closed_pool_says_so() -> None:
    async def main() -> None:
        async with pooled() as (pool, _, _, _, lost):
            await pool.to(A_NODE).call(ECHO, Text(), timeout_s=5)
            await pool.close()
            with pytest.raises(Unavailable, match="stopping"):
                await pool.to(A_NODE).call(ECHO, Text(), timeout_s=5)
            assert not pool.to(A_NODE).notify(TOLD, Text())
            assert lost == []

    run("asyncio", main)
