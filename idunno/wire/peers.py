# idunno/wire/peers.py: callers to the other nodes, by id, connected when first used.
#
# Rule 1: one connection for each (node, lane), so that a heartbeat never waits behind a block. All who call share it.
# Rule 2: a connection is made on demand. After a failure, calls fail at once with its reason until the back-off is over.
# Rule 3: the node at the other end must show the certificate that the roster holds, or nothing is sent.
from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from ssl import SSLContext
from types import TracebackType
from typing import Any, Final, Generic

import msgspec

from idunno.base.disk import Buffer
from idunno.base.errors import IdunnoError, Unauthenticated, Unavailable
from idunno.base.ids import NodeId
from idunno.wire.caller import Connection
from idunno.wire.calls import A, Actor, Caller, Empty, Item, Lane, Method, Q, Stream
from idunno.wire.rpc import connect_tcp

log = logging.getLogger("idunno.wire")

CONNECT_S: Final = 5.0
"""For TCP, TLS and greeting together: a slow board needs well under one second."""
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 2.0
"""A node that came back is reached within this; asking a dead one costs the network 0.5 packets/s."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a node listens, and the SHA-256 of its certificate, as the roster says."""

    host: str
    port: int
    fingerprint: bytes


class PeerPool:
    """calls.Peers."""

    def __init__(
        self,
        resolve: Callable[[NodeId], Endpoint | None],
        ssl_context: Callable[[], SSLContext | None],
        *,
        me: NodeId | None = None,
        local: Caller | None = None,
    ) -> None:
        """`resolve` gives the endpoint of a roster node, None for others; `local` is what to(me) returns (LocalCaller)."""
        self._resolve, self._ssl_context = resolve, ssl_context
        self._me, self._local = me, local
        self._lines: dict[tuple[NodeId, Lane], _Line] = {}
        self._lost: list[Callable[[NodeId, Lane], None]] = []
        self.refused: list[Callable[[NodeId], None]] = []
        """Told of a node that shows no certificate of ours, or does not know ours."""
        self.vacant: list[Callable[[NodeId], None]] = []
        """Told of a node where nothing listens: its machine refused the connection."""
        self.connected: list[Callable[[NodeId], None]] = []
        """Told of a node to which a connection was made."""
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()

    def to(self, node: NodeId, lane: Lane = Lane.CALLS) -> Caller:
        if node == self._me and self._local is not None:
            return self._local
        return _PeerCaller(self, node, lane)

    def lost(self, callback: Callable[[NodeId, Lane], None]) -> None:
        """Call `callback` whenever an established connection is gone, whoever cut it, unless the pool itself is closing."""
        self._lost.append(callback)

    def drop(self, node: NodeId) -> None:
        """Cut the connections to a node that is removed or Failed, and forget its back-off. A later call connects anew."""
        for lane in Lane:
            line = self._lines.pop((node, lane), None)
            if line is not None:
                line.drop()

    def keep_ready(self, node: NodeId, lane: Lane) -> None:
        """Begin to connect, unless connected or waiting for the next attempt: for what cannot wait for a handshake later."""
        with contextlib.suppress(Unavailable):
            line = self.line(node, lane)
            if line.connection is None:
                line.begin()

    async def close(self) -> None:
        """Close all connections; calls raise Unavailable from now on."""
        self._closed = True
        lines = list(self._lines.values())
        self._lines.clear()
        for line in lines:
            line.drop()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # -- for callers ----------------------------------------------------------------------------------------------------

    def line(self, node: NodeId, lane: Lane) -> _Line:
        """Raises Unavailable for a node that is not in the roster."""
        if self._closed:
            raise Unavailable("this node is stopping")
        line = self._lines.get((node, lane))
        if line is None:
            self.endpoint(node)
            line = self._lines[node, lane] = _Line(self, node, lane)
        return line

    def endpoint(self, node: NodeId) -> Endpoint:
        endpoint = self._resolve(node)
        if endpoint is None:
            raise Unavailable(f"node {node} is not in the roster: it was removed, or this node has not heard of it yet")
        return endpoint

    async def connect(self, node: NodeId) -> Connection:
        endpoint = self.endpoint(node)

        def expect(fingerprint: bytes) -> None:
            if fingerprint != endpoint.fingerprint:
                raise Unauthenticated(
                    f"{endpoint.host}:{endpoint.port} shows the certificate of another node than {node}: "
                    "its address may have gone to another machine"
                )

        context = self._ssl_context()
        if context is None:
            return await connect_tcp(endpoint.host, endpoint.port, None, timeout_s=CONNECT_S)
        return await connect_tcp(endpoint.host, endpoint.port, context, expect=expect, timeout_s=CONNECT_S)

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run it as a task that is kept referenced, and whose error is seen."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("connecting failed", exc_info=error)

    def tell(self, callbacks: list[Callable[[NodeId], None]], node: NodeId) -> None:
        if not self._closed:
            for callback in callbacks:
                callback(node)

    def tell_lost(self, node: NodeId, lane: Lane) -> None:
        if not self._closed:
            for callback in self._lost:
                callback(node, lane)


class _Line:
    """The way to one node on one lane: a connection, the attempt to get one, or the wait before the next attempt."""

    def __init__(self, pool: PeerPool, node: NodeId, lane: Lane) -> None:
        self._pool, self._node, self._lane = pool, node, lane
        self.connection: Connection | None = None
        self._attempt: asyncio.Task[None] | None = None
        self._dropped = False
        self._error: IdunnoError | None = None  # of the last attempt
        self._not_before = 0.0  # loop time
        self._backoff_s = BACKOFF_FIRST_S

    async def ready(self, timeout_s: float) -> Connection:
        """The connection, made if need be. Raises Unavailable, naming the node and what went wrong last."""
        if self.connection is None:
            attempt = self.begin()
            if attempt is not None:
                await asyncio.wait([attempt], timeout=max(0.0, timeout_s))
        if self.connection is None:
            why = self._error or f"no connection within {timeout_s:g} s"
            raise Unavailable(f"node {self._node} cannot be reached: {why}")
        return self.connection

    def begin(self) -> asyncio.Task[None] | None:
        """The attempt under way, begun if none is; None while the back-off of the last one lasts."""
        loop = asyncio.get_running_loop()
        if self._attempt is None and not self._dropped and loop.time() >= self._not_before:
            self._error = None
            self._attempt = self._pool.keep(self._connect())
        return self._attempt

    def drop(self) -> None:
        self._dropped = True
        self._error = Unavailable("the connection was dropped: the node is removed or failed")
        if self._attempt is not None:
            self._attempt.cancel()
        if self.connection is not None:
            self._pool.keep(self.connection.close())

    async def _connect(self) -> None:
        try:
            connection = await self._pool.connect(self._node)
        except IdunnoError as error:
            self._error = error
            self._not_before = asyncio.get_running_loop().time() + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)
            if isinstance(error, Unauthenticated):
                self._pool.tell(self._pool.refused, self._node)
            elif isinstance(error.__cause__, ConnectionRefusedError):
                self._pool.tell(self._pool.vacant, self._node)
            log.info("no connection", extra={"node": self._node, "lane": self._lane.value, "error": str(error)})
        else:
            if connection.closed:
                self._error = Unavailable("the connection was lost at once")
                return
            self.connection, self._backoff_s = connection, BACKOFF_FIRST_S
            connection.on_lost.append(self._gone)
            self._pool.tell(self._pool.connected, self._node)
        finally:
            self._attempt = None

    def _gone(self) -> None:
        self.connection = None
        self._error = Unavailable("the connection was lost")
        self._pool.tell_lost(self._node, self._lane)


class _PeerCaller:
    """calls.Caller to one node on one lane."""

    __slots__ = ("_lane", "_node", "_pool")

    def __init__(self, pool: PeerPool, node: NodeId, lane: Lane) -> None:
        self._pool, self._node, self._lane = pool, node, lane

    async def call(
        self, method: Method[Q, A], request: Q, *, timeout_s: float, body: Buffer = b"", actor: Actor | None = None
    ) -> A:
        connection, left_s = await self.connected(timeout_s)
        return await connection.call(method, request, timeout_s=left_s, body=body, actor=actor)

    async def call_with_body(
        self, method: Method[Q, A], request: Q, *, timeout_s: float, body: Buffer = b"", actor: Actor | None = None
    ) -> tuple[A, bytes]:
        connection, left_s = await self.connected(timeout_s)
        return await connection.call_with_body(method, request, timeout_s=left_s, body=body, actor=actor)

    def open(self, method: Method[Q, A], request: Q, *, timeout_s: float, actor: Actor | None = None) -> Stream[A]:
        return _PeerStream(self, method, request, timeout_s, actor)

    def notify(self, method: Method[Q, Empty], request: Q | msgspec.Raw, body: Buffer = b"") -> bool:
        try:
            line = self._pool.line(self._node, self._lane)
        except Unavailable:
            return False
        if line.connection is None:
            line.begin()
            return False
        return line.connection.notify(method, request, body)

    async def connected(self, timeout_s: float) -> tuple[Connection, float]:
        """The connection, and what is left of the time."""
        line = self._pool.line(self._node, self._lane)
        if line.connection is not None:
            return line.connection, timeout_s
        loop = asyncio.get_running_loop()
        begun = loop.time()
        connection = await line.ready(timeout_s)
        return connection, timeout_s - (loop.time() - begun)


class _PeerStream(Generic[A]):
    """A stream whose connection is made when it is entered."""

    def __init__(
        self, caller: _PeerCaller, method: Method[Q, A], request: Q, timeout_s: float, actor: Actor | None
    ) -> None:
        async def make() -> Stream[A]:
            connection, left_s = await caller.connected(timeout_s)
            return connection.open(method, request, timeout_s=left_s, actor=actor)

        self._make = make
        self._stream: Stream[A] | None = None

    async def __aenter__(self) -> Stream[A]:
        stream = await self._make()
        self._stream = stream
        await stream.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._inner.__aexit__(kind, error, trace)

    async def send(self, body: Buffer = b"", note: bytes = b"") -> None:
        await self._inner.send(body, note)

    async def end(self) -> None:
        await self._inner.end()

    async def receive(self) -> Item | None:
        return await self._inner.receive()

    async def answer(self) -> A:
        return await self._inner.answer()

    @property
    def _inner(self) -> Stream[A]:
        assert self._stream is not None, "a stream is used inside `async with`"
        return self._stream
