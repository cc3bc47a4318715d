# Calls: many at once, deadlines, cancellation, lost connections, typed errors; over a socket and within the process alike.
from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import msgspec
import pytest

from idunno.base.errors import (
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    Exhausted,
    IdunnoError,
    Incompatible,
    InternalError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from idunno.base.ids import NodeId
from idunno.wire.calls import BODY_BYTES_MAX, Actor, Empty, Method, Peer, Role
from idunno.wire.codec import RequestHead, encode
from idunno.wire.frames import Frame, Kind, encode_frame
from idunno.wire.rpc import Connection, LocalCaller, Server, connect_tcp, connect_unix
from tests.unit.wire.support import (
    BUG,
    ECHO,
    HANG,
    LOOPS,
    MISSING,
    NODES_ONLY,
    TOLD,
    WHO,
    Story,
    Text,
    run,
    serving_unix,
    until,
)

ADMIN = Peer(Actor("ann", Role.ADMIN))
NODE = Peer(Actor("a" * 16, Role.NODE), NodeId("a" * 16))


@contextlib.asynccontextmanager
async def calling(way: str) -> AsyncIterator[tuple[Connection, Server, Story]]:
    """A caller with an admin's rights, over a Unix socket or within the process."""
    async with serving_unix() as (path, server, story):
        caller = LocalCaller(server, ADMIN) if way == "local" else await connect_unix(path, 5)
        try:
            yield caller, server, story
        finally:
            await caller.close()


WAYS = pytest.mark.parametrize(("loop", "way"), [("asyncio", "unix"), ("uvloop", "unix"), ("asyncio", "local")])


@WAYS
def test_a_call_brings_answer_and_body_back(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, _):
            assert await caller.call(ECHO, Text("hello"), timeout_s=5) == Text("hello")
            for size in (0, 1, 10_000, BODY_BYTES_MAX):
                body = bytes(range(256)) * (size // 256 + 1)
                answer = await caller.call_with_body(ECHO, Text("x"), timeout_s=5, body=body[:size])
                assert answer == (Text("x"), body[:size])

    run(loop, main)


@WAYS
def test_a_body_may_be_reused_once_the_call_was_begun(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, _):
            buffer = bytearray(b"a" * 200_000)
            task = asyncio.create_task(caller.call_with_body(ECHO, Text(), timeout_s=5, body=buffer))
            await asyncio.sleep(0)
            buffer[:] = b"b" * 200_000
            assert (await task)[1] == b"a" * 200_000

    run(loop, main)


@WAYS
def test_many_calls_in_flight_each_get_their_own_answer(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, _):
            calls = [caller.call(ECHO, Text(str(i)), timeout_s=20, body=bytes(i)) for i in range(1000)]
            assert await asyncio.gather(*calls) == [Text(str(i)) for i in range(1000)]

    run(loop, main)


@WAYS
def test_errors_arrive_as_the_class_that_was_raised(loop: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, _):
            with pytest.raises(NotFound, match="no cat"):
                await caller.call(MISSING, Text("cat"), timeout_s=5)
            with (
                caplog.at_level(logging.CRITICAL),
                pytest.raises(InternalError, match=r"[0-9a-f]{8}; see the log of node n1"),
            ):
                await caller.call(BUG, Empty(), timeout_s=5)
            with pytest.raises(Incompatible, match=r"no method 'test\.newer'"):
                await caller.call(Method("test.newer", Empty, Empty, Role.READER), Empty(), timeout_s=5)
            with pytest.raises(InvalidArgument, match="send larger content as a stream"):
                await caller.call(ECHO, Text(), timeout_s=5, body=bytes(BODY_BYTES_MAX + 1))
            assert await caller.call(ECHO, Text("still here"), timeout_s=5) == Text("still here")

    run(loop, main)


@WAYS
def test_a_deadline_ends_the_call_and_its_handler(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, story):
            with pytest.raises(DeadlineExceeded, match=r"test\.hang"):
                await caller.call(HANG, Empty(), timeout_s=0.05)
            await until(lambda: story.cancelled == 1)
            with pytest.raises(Unavailable, match="no time was left"):
                await caller.call(HANG, Empty(), timeout_s=0)
            assert story.started == 1

    run(loop, main)


@WAYS
def test_cancelling_a_call_reaches_its_handler(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, story):
            task = asyncio.create_task(caller.call(HANG, Empty(), timeout_s=60))
            await until(lambda: story.started == 1)
            task.cancel()
            await until(lambda: story.cancelled == 1)
            assert task.cancelled()

    run(loop, main)


@WAYS
def test_a_call_cancelled_before_its_handler_ran_leaves_nothing_behind(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, server, story):
            for _ in range(2000):  # more than may be under way at once
                task = asyncio.create_task(caller.call(HANG, Empty(), timeout_s=60))
                await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                await asyncio.sleep(0)
            assert await caller.call(ECHO, Text("x"), timeout_s=5) == Text("x")
            await until(lambda: story.started == story.cancelled)
            sessions = [door.serving for door in server._doors if door.serving] + server._local
            await until(lambda: all(not one.calls and one.held == 0 for one in sessions))

    run(loop, main)


@WAYS
def test_a_lost_connection_fails_its_calls_at_once_and_stops_their_handlers(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, server, story):
            lost: list[str] = []
            caller.on_lost.append(lambda: lost.append("lost"))
            tasks = [asyncio.create_task(caller.call(HANG, Empty(), timeout_s=60)) for _ in range(10)]
            await until(lambda: story.started == 10)
            if way == "local":
                server._local[0].link.close()
            else:
                for door in list(server._doors):
                    assert door.link is not None
                    door.link.close()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, ConnectionLost)
                assert result.may_have_happened
            await until(lambda: story.cancelled == 10)
            with pytest.raises(Unavailable, match="closed"):
                await caller.call(ECHO, Text(), timeout_s=5)
            assert (lost, caller.closed, caller.notify(TOLD, Text())) == (["lost"], True, False)

    run(loop, main)


@WAYS
def test_notifications_are_handled_in_the_order_they_were_sent(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, story):
            for i in range(100):
                assert caller.notify(TOLD, Text(str(i)))
            await until(lambda: len(story.told) == 100)
            assert story.told == [str(i) for i in range(100)]

    run(loop, main)


@WAYS
def test_more_calls_than_the_bound_are_refused_and_the_others_unharmed(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, story):
            tasks = [asyncio.create_task(caller.call(HANG, Empty(), timeout_s=60)) for _ in range(1024)]
            await until(lambda: story.started == 1024)
            with pytest.raises(Exhausted, match="1024"):
                await caller.call(ECHO, Text(), timeout_s=5)
            tasks[0].cancel()
            await until(lambda: story.cancelled == 1)
            await asyncio.sleep(0)
            assert await caller.call(ECHO, Text("room again"), timeout_s=5) == Text("room again")
            for task in tasks:
                task.cancel()

    run(loop, main)


@WAYS
def test_a_handlers_role_is_asked_for_and_the_refusal_names_it(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, _):
            with pytest.raises(PermissionDenied, match=r"test\.nodes-only needs the role node, .* has admin"):
                await caller.call(NODES_ONLY, Empty(), timeout_s=5)
            with pytest.raises(PermissionDenied, match="only nodes act for others"):
                await caller.call(WHO, Empty(), timeout_s=5, actor=Actor("bob", Role.USER))

    run(loop, main)


def test_a_node_acts_for_users_but_never_as_another_node() -> None:
    async def main() -> None:
        async with serving_unix() as (_, server, _):
            caller = LocalCaller(server, NODE)
            assert (await caller.call(WHO, Empty(), timeout_s=5)).text == f"{'a' * 16} node"
            assert (await caller.call(WHO, Empty(), timeout_s=5, actor=Actor("bob", Role.USER))).text == "bob user"
            assert (await caller.call(NODES_ONLY, Empty(), timeout_s=5, actor=NODE.actor)).text == f"{'a' * 16} node"
            with pytest.raises(PermissionDenied, match="may not act as node"):
                await caller.call(NODES_ONLY, Empty(), timeout_s=5, actor=Actor("b" * 16, Role.NODE))
            with pytest.raises(PermissionDenied, match="bob"):  # forwarding gives nobody more than they have
                await caller.call(NODES_ONLY, Empty(), timeout_s=5, actor=Actor("bob", Role.ADMIN))

    run("asyncio", main)


@pytest.mark.parametrize("loop", LOOPS)
def test_closing_lets_calls_end_in_the_grace_and_refuses_new_ones(loop: str) -> None:
    async def main() -> None:
        async with serving_unix() as (path, server, story):
            gate = asyncio.Event()

            async def slow(_: object) -> Text:
                await gate.wait()
                return Text("done")

            method = Method("test.slow", Empty, Text, Role.READER)
            server.register(method, slow)
            caller, other = await connect_unix(path, 5), await connect_unix(path, 5)
            good = asyncio.create_task(caller.call(method, Empty(), timeout_s=60))
            await caller.call(ECHO, Text(), timeout_s=5)
            closing = asyncio.create_task(server.close(5))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="stopping"):
                await other.call(ECHO, Text(), timeout_s=5)
            gate.set()
            assert await good == Text("done")
            await closing
            await until(lambda: caller.closed and other.closed)
            assert story.cancelled == 0
            with pytest.raises(Unavailable, match="is the node running"):
                await connect_unix(path, 5)

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_closing_without_grace_cancels_what_hangs(loop: str) -> None:
    async def main() -> None:
        async with serving_unix() as (path, server, story):
            caller = await connect_unix(path, 5)
            task = asyncio.create_task(caller.call(HANG, Empty(), timeout_s=60))
            await until(lambda: story.started == 1)
            await server.close(0)
            assert story.cancelled == 1
            result = (await asyncio.gather(task, return_exceptions=True))[0]
            assert isinstance(result, ConnectionLost)  # which callers take to the next node, whatever they asked
            assert "stopping" in str(result)

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_peer_that_never_reads_its_answers_does_not_fill_memory(loop: str) -> None:
    async def main() -> None:
        async with serving_unix() as (path, server, _):
            caller = await connect_unix(path, 5)
            link = caller._link
            assert link is not None
            link._transport.pause_reading()  # type: ignore[attr-defined]
            body = bytes(BODY_BYTES_MAX)
            tasks = [asyncio.create_task(caller.call(ECHO, Text(), timeout_s=20, body=body)) for _ in range(300)]
            door = next(iter(server._doors))
            assert door.link is not None
            serving, served = door.link, door.serving
            await until(lambda: serving.paused)
            for _ in range(200):
                await asyncio.sleep(0)
                assert serving.buffered() < 8 * 1024 * 1024
                assert served is not None
                assert served.held <= 64 * 1024 * 1024
            link._transport.resume_reading()  # type: ignore[attr-defined]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(result) for result in results} <= {Text, Exhausted}
            assert results.count(Text()) > 100

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_flood_of_small_requests_whose_errors_nobody_reads_is_not_read_either(loop: str) -> None:
    async def main() -> None:
        async with serving_unix() as (path, server, _):
            _, writer = await asyncio.open_unix_connection(path, limit=1024)
            header = encode(RequestHead("no.such.method", 1000, msgspec.Raw(encode(Empty()))))
            flood = b"".join(encode_frame(Frame(Kind.REQUEST, number, header)) for number in range(1, 1001))
            await until(lambda: server.connections == 1)
            link = next(iter(server._doors)).link
            assert link is not None
            stuck = 0
            while stuck < 3:  # until the server takes no more
                writer.write(flood)
                try:
                    async with asyncio.timeout(0.05):
                        await writer.drain()
                    stuck = 0
                except TimeoutError:
                    stuck += 1
                assert link.buffered() < 2 * 1024 * 1024
            assert link.paused
            writer.transport.abort()
            await until(lambda: server.connections == 0)

    run(loop, main)


def test_an_error_that_cannot_be_read_ends_its_call_too() -> None:
    async def main() -> None:
        class Broken:  # a Link to a server that answers every request with nonsense
            paused = False

            def send(self, kind: Kind, request: int, header: bytes = b"", body: bytes | memoryview = b"") -> None:
                if kind is Kind.REQUEST:
                    asyncio.get_running_loop().call_soon(self.answer, request)

            def answer(self, request: int) -> None:
                try:
                    connection.received(Frame(Kind.ERROR, request, b"\xc1"))
                except DecodeError as error:
                    connection.lost(error)  # as Wire does

            async def writable(self) -> None: ...
            def buffered(self) -> int:
                return 0

            def close(self, error: IdunnoError | None = None) -> None: ...
            async def gone(self) -> None: ...

        connection = Connection("n1")
        connection._link = Broken()
        with pytest.raises(ConnectionLost):
            await connection.call(ECHO, Text(), timeout_s=0.2)

    run("asyncio", main, timeout_s=2)


@WAYS
def test_a_request_that_cannot_be_written_down_is_the_askers_mistake(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, _):
            for text in ("\udcff", 2**64):
                with pytest.raises(InvalidArgument, match=r"test\.echo"):
                    await caller.call(ECHO, Text(text), timeout_s=5)  # type: ignore[arg-type]
            assert await caller.call(ECHO, Text("fine"), timeout_s=5) == Text("fine")

    run(loop, main)


def test_a_stranger_who_sends_notifications_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = Server(lambda _: None, name="n1")
        port = await server.listen_tcp("127.0.0.1", 0, None)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        header = encode(RequestHead(TOLD.name, 0, msgspec.Raw(encode(Text("x")))))
        writer.write(encode_frame(Frame(Kind.NOTIFY, 1, header)) * 1000)
        async with asyncio.timeout(2):
            with contextlib.suppress(ConnectionResetError):
                await reader.read()  # to the end of the connection
        writer.transport.abort()
        await server.close(0)

    with caplog.at_level(logging.INFO, "idunno.wire"):
        run("asyncio", main)
    assert len(caplog.records) < 10  # a stranger must not be able to fill the log


def test_a_host_that_cannot_be_a_name_is_a_clear_error() -> None:
    async def main() -> None:
        with pytest.raises(Unavailable, match=r"a\.\.b:7400"):
            await connect_tcp("a..b", 7400, None, timeout_s=5)

    for loop in LOOPS:
        run(loop, main)
